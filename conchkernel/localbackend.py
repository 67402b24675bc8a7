"""A backend without a kernel: shells, commands, files and connections of this host.

An SSH door to the host that the gateway runs on. The services are the agent's own
(:mod:`conchkernel.remote`), in this process and on its reactor, with no wire or socket between:
what a program writes is read once and handed to the channel. So it is also the measure of the SSH
side alone, beside :class:`~conchkernel.loopback.LoopbackBackend`, which has the whole road.

Everything runs as the account of this process, whoever has logged in. The reactor must have its
signal handlers, as it has by default: they tell when a program has ended.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.internet.process import registerReapProcessHandler, unregisterReapProcessHandler
from twisted.logger import Logger
from zope.interface import implementer

from conchkernel import frames
from conchkernel.errors import LinkLost, RefusalCode, StreamRefused
from conchkernel.filepolicies import JailedFileStore, ReadOnlyFileStore
from conchkernel.interfaces import IBackend, IKernelLink, ProcessRequest
from conchkernel.jupyter import openings
from conchkernel.jupyter.kernelstream import KernelStream
from conchkernel.jupyter.uses import LinkUse
from conchkernel.localfiles import DirectoryFileStore
from conchkernel.remote import listening, pump
from conchkernel.remote.door import Door
from conchkernel.remote.pool import Pool
from conchkernel.remote.process import Process
from conchkernel.remote.service import SHORTAGE, CannotServe
from conchkernel.remote.spawn import CannotRun

if TYPE_CHECKING:
    from twisted.python.failure import Failure

    from conchkernel.files import IFileStore

try:
    from conchkernel import _fastpty
except ImportError:
    _drain = pump.drain
else:
    _drain = _fastpty.drain if _fastpty.ABI == pump.ABI else pump.drain

#: As much output is read ahead of what the client's TCP takes. There is no road to keep full, and
#: what is still in the processor's cache when it is encrypted costs less.
CREDIT_CAP_BYTES = 1024 * 1024
#: One read of output: packets of 32 KiB, and no rest.
BATCH = 512 * 1024

_KINDS: dict[str, Callable[..., Any]] = {
    "process": Process,
    "connect": listening.connect,
    "listen": listening.Listener,
    "accepted": listening.accepted,
}


@implementer(IReadWriteDescriptor)
class _Descriptor:
    """A pipe, terminal or socket, as the reactor has them."""

    def __init__(self, fd: int, guard: Callable[[Callable[[int], None], int], None]) -> None:
        self.readable: Callable[[int], None] | None = None
        self.writable: Callable[[int], None] | None = None
        self._fd = fd
        self._guard = guard

    def fileno(self) -> int:
        """See :class:`IReadWriteDescriptor`."""
        return self._fd

    def logPrefix(self) -> str:
        """See :class:`IReadWriteDescriptor`."""
        return "local service"

    def doRead(self) -> None:
        """There is something to read."""
        if self.readable is not None:
            self._guard(self.readable, self._fd)

    def doWrite(self) -> None:
        """What waits may be written."""
        if self.writable is not None:
            self._guard(self.writable, self._fd)

    def connectionLost(self, reason: Failure) -> None:
        """The other end is closed: whoever reads or writes is to find out by doing so."""
        self.doRead()
        self.doWrite()


class _Child:
    """Whoever waits for a program, as Twisted has it."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._pid = process.pid

    def reapProcess(self) -> None:
        """Some program has ended: this one?"""
        try:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:
            # Somebody else was told how, and it is not for us to invent it. The pid may be
            # another program's by now, which is not to be hung up.
            unregisterReapProcessHandler(self._pid, self)
            self._process.pid = -1
            self._process.failed()
            return
        if pid:
            unregisterReapProcessHandler(self._pid, self)
            self.processEnded(status)

    def processEnded(self, status: int) -> None:
        """It has."""
        self._process.reaped(status)


class _Host:
    """The reactor as the services' event loop (see :class:`conchkernel.remote.process.Host`)."""

    _log = Logger()

    def __init__(self, reactor: Any, options: dict[str, Any]) -> None:
        self.options = options
        self.batch = BATCH
        self.drain: Callable[[int, int, bool], tuple[bytes, bool]] = _drain
        self.pool = Pool(reactor.callFromThread)
        self.accept = Door().accept
        self._reactor = reactor
        self._descriptors: dict[int, _Descriptor] = {}

    def watch_read(self, fd: int, callback: Callable[[int], None]) -> None:
        descriptor = self._descriptor(fd)
        descriptor.readable = callback
        self._reactor.addReader(descriptor)

    def watch_write(self, fd: int, callback: Callable[[int], None]) -> None:
        descriptor = self._descriptor(fd)
        descriptor.writable = callback
        self._reactor.addWriter(descriptor)

    def unwatch_read(self, fd: int) -> None:
        descriptor = self._descriptors.get(fd)
        if descriptor is not None:
            descriptor.readable = None
            self._reactor.removeReader(descriptor)
            self._forget(fd, descriptor)

    def unwatch_write(self, fd: int) -> None:
        descriptor = self._descriptors.get(fd)
        if descriptor is not None:
            descriptor.writable = None
            self._reactor.removeWriter(descriptor)
            self._forget(fd, descriptor)

    def _descriptor(self, fd: int) -> _Descriptor:
        descriptor = self._descriptors.get(fd)
        if descriptor is None:
            descriptor = self._descriptors[fd] = _Descriptor(fd, self._call)
        return descriptor

    def _forget(self, fd: int, descriptor: _Descriptor) -> None:
        if descriptor.readable is None and descriptor.writable is None:
            del self._descriptors[fd]

    def _call(self, callback: Callable[[int], None], fd: int) -> None:
        try:
            callback(fd)
        except Exception:
            self._log.failure("bytes could not be handled")
            service: Any = callback.__self__  # type: ignore[attr-defined]
            service.failed()

    def started(self, process: Process) -> None:
        registerReapProcessHandler(process.pid, _Child(process))

    def settle(self, session: LocalLink) -> None:
        """Nothing waits."""

    def look_again(self, service: Any) -> None:
        service.look()


class _FarEnd:
    """A stream as its service sees it: what is written has arrived.

    The service's side of :class:`~conchkernel.wire.Stream`, without a queue.
    """

    queued = 0
    #: Input goes where it shall go at once, so that what is granted is what was taken.
    cap = share = 0
    beside_keys = False

    def __init__(self, stream: LocalStream) -> None:
        self.limit = 0
        self.writing = False
        self._sent = 0
        self._taken = 0
        self._stream = stream

    @property
    def room(self) -> int:
        return self.limit - self._sent

    def write(self, data: bytes, flags: int = 0) -> None:
        self._sent += len(data)
        self.writing = True
        try:
            self._stream.wire_data(data, flags)
        finally:
            self.writing = False

    def append(self, frame_type: int, payload: bytes = b"") -> None:
        if frame_type == frames.EOF:
            self._stream.wire_eof()
        elif frame_type == frames.EXIT:
            self._stream.wire_exit(json.loads(payload))
        else:
            self._stream.wire_closed(payload.decode())

    def control(self, frame_type: int, payload: bytes = b"") -> None:
        self._stream.answered(frame_type, json.loads(payload))

    def close(self, reason: str = "") -> None:
        self._stream.wire_closed(reason)

    def grant(self, limit: int) -> None:
        count, self._taken = limit - self._taken, limit
        self._stream.wire_sent(count)

    def forget(self) -> None:
        """It was refused (:func:`conchkernel.wirestream.refuse`)."""


class _NearEnd:
    """The same stream as the gateway sees it: what is written has arrived, too."""

    def __init__(self, number: int, end: _FarEnd, service: Any) -> None:
        self.id = number
        self._end = end
        self._service = service

    def write(self, data: bytes) -> None:
        self._service.wire_data(memoryview(data), 0)

    def append(self, frame_type: int) -> None:
        self._service.wire_eof()

    def grant(self, limit: int) -> None:
        if limit > self._end.limit:
            self._end.limit = limit
            # In the midst of handing on, the service looks for room by itself.
            if not self._end.writing:
                self._service.wire_credit()

    def control(self, frame_type: int, payload: bytes = b"") -> None:
        self._service.wire_control(frame_type, payload)

    def close(self) -> None:
        self._service.wire_closed("")


class LocalStream(KernelStream):
    """A stream that ends on this host."""

    creditCap = CREDIT_CAP_BYTES

    def __init__(self, link: LocalLink, receiver: Any) -> None:
        super().__init__(link, receiver)
        self._answer: tuple[int, dict[str, Any]] | None = None
        self._owed = 0

    def began(self, end: Any) -> None:
        """There is somebody at the other end."""
        self.wire = end
        if self._answer is not None:
            # Not while our caller is still at work.
            self._link.soon(self._tell)

    def grant(self, limit: int) -> None:
        """See :class:`IStream`. Nothing may come before it is told that the stream is open."""
        if self._answer is None:
            super().grant(limit)
        else:
            self._owed = max(self._owed, limit)

    def close(self) -> None:
        """See :class:`IStream`."""
        self._answer = None
        super().close()

    def answered(self, frame_type: int, body: dict[str, Any]) -> None:
        """OPENED or REFUSED, perhaps before it has begun."""
        self._answer = frame_type, body
        if self.wire is not None:
            self._tell()

    def _tell(self) -> None:
        if self._answer is None or self.over:
            return
        (frame_type, body), self._answer = self._answer, None
        if frame_type == frames.OPENED:
            self.wire_opened(body)
            self.grant(self._owed)
        else:
            self.wire_refused(body["code"], body["message"])


class LocalLink:
    """This host, as a :class:`~conchkernel.jupyter.uses.LinkUse` and its streams want a link."""

    _log = Logger()

    #: Nothing waits for a road that there is not.
    crowded = False

    def __init__(self, reactor: Any, options: dict[str, Any], shell: str | None) -> None:
        self.stirred = 0
        self._reactor = reactor
        self._host = _Host(reactor, options)
        self._defaults = {"shell": os.fsencode(shell).decode("latin-1")} if shell else {}
        self._services: dict[int, Any] = {}
        self._numbers = itertools.count(1)
        self._stopped = False

    def open(self, parameters: dict[str, Any], receiver: Any) -> LocalStream:
        """Open a stream; see :meth:`conchkernel.jupyter.link.Link.open`."""
        stream = LocalStream(self, receiver)
        if self._stopped:
            stream.lostSoon(stopping())
            return stream
        number = next(self._numbers)
        end = _FarEnd(stream)
        try:
            service = _KINDS[parameters["kind"]](self._host, self, end, parameters)
        except CannotServe as error:
            stream.lostSoon(StreamRefused(RefusalCode(error.code), str(error)))
        except (CannotRun, OSError) as error:
            why = error if isinstance(error, CannotRun) else error.strerror
            sentence = f"nothing can be started for it: {why}"
            stream.lostSoon(StreamRefused(RefusalCode(SHORTAGE), sentence))
        else:
            self._services[number] = service
            stream.began(_NearEnd(number, end, service))
        return stream

    def openProcess(self, request: ProcessRequest, receiver: Any) -> LocalStream:
        """Open a process's stream."""
        return self.open({**openings.process(request), **self._defaults}, receiver)

    def service(self, number: Any) -> Any:
        """What serves a stream; ``None`` if none does."""
        return self._services.get(number)

    def wake(self) -> None:
        """Something was written, which is where it shall be."""

    def soon(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call it when the caller has returned to the reactor."""
        self._reactor.callLater(0, call, *arguments)

    def forget(self, stream: KernelStream) -> None:
        """The stream is over."""
        self._services.pop(stream.number, None)

    def stop(self) -> None:
        """Nothing is opened any more."""
        self._stopped = True


@implementer(IKernelLink)
class LocalUse(LinkUse):
    """One use of this host, with its files."""

    def __init__(self, backend: LocalBackend, link: Any) -> None:
        super().__init__(link, self._end)
        self._backend = backend
        # A session may let go of its store, and then there is nothing left to close.
        self._stores: WeakSet[DirectoryFileStore] = WeakSet()
        backend.uses.add(self)

    def openFiles(self, root: bytes | None, readOnly: bool) -> Deferred[IFileStore]:
        """See :class:`IKernelLink`."""
        if self not in self._backend.uses:
            return fail(stopping())
        if root is not None and not (os.path.isabs(root) and os.path.isdir(root)):
            sentence = f"the root of the files, {os.fsdecode(root)!r}, is no directory"
            return fail(StreamRefused(RefusalCode.RESOURCE_SHORTAGE, sentence))
        files = DirectoryFileStore(self._backend.directory, self._backend.reactor)
        self._stores.add(files)
        store: IFileStore = files if root is None else JailedFileStore(files, root)
        return succeed(ReadOnlyFileStore(store) if readOnly else store)

    def _end(self) -> None:
        self._backend.uses.discard(self)
        for store in list(self._stores):
            store.close()


def stopping() -> LinkLost:
    """Why nothing is opened any more."""
    return LinkLost("the gateway is stopping")


@implementer(IBackend)
class LocalBackend:
    """This host, for everybody who logs in.

    :param environment: of its programs; this process's own where not given.
    :param directory: where programs and SFTP sessions begin; the account's home where not given.
    :param shell: the account's where not given.
    :ivar uses: what :meth:`connect` gave and was not given back.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        environment: dict[str, str] | None = None,
        directory: str | None = None,
        shell: str | None = None,
    ) -> None:
        self.reactor = reactor
        self.directory = directory or os.path.expanduser("~")
        self.uses: set[LocalUse] = set()
        options = {
            "environment": dict(os.environ if environment is None else environment),
            "directory": self.directory,
        }
        self._link = LocalLink(reactor, options, shell)

    async def start(self) -> None:
        """There is nothing to start; a service may ask for it all the same."""

    async def stop(self) -> None:
        """End every use: terminals hang up, pipes and sockets close."""
        self._link.stop()
        for use in list(self.uses):
            use.release()

    def connect(self, user: str) -> Deferred[IKernelLink]:
        """See :class:`IBackend`."""
        return succeed(LocalUse(self, self._link))
