"""A kernel's road in memory: processes, connections and listeners that do what a test tells them.

They keep the contract of :mod:`conchkernel.interfaces` to the byte: no output beyond what was
granted, input counted as taken only when the script takes it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from conchkernel.errors import RefusalCode, StreamRefused
from conchkernel.interfaces import (
    Exit,
    ExitStatus,
    IBackend,
    IKernelLink,
    IListener,
    Incoming,
    IStream,
    IStreamReceiver,
    PrivateSocket,
    ProcessRequest,
    SocketPath,
    TCPAddress,
    WindowSize,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from conchkernel.files import IFileStore

SUCCESS = ExitStatus(0)


@implementer(IStream)
class MemoryStream:
    """A process, or a connection, that does what a test tells it.

    :ivar request: what was asked for: a process, an address, or a connection that was accepted.
    :ivar received: input that was taken.
    :ivar waiting: input that was written and not taken yet.
    :ivar calls: everything else that was asked of the stream, in order.
    """

    def __init__(self, request: Any, receiver: IStreamReceiver) -> None:
        self.request = request
        self.receiver = receiver
        #: Called as input is written; a script may set it to answer.
        self.onInput: Callable[[], None] = lambda: None
        #: Called when the input's end is written, after all input was taken.
        self.onInputEOF: Callable[[], None] = lambda: None
        #: Called when nothing waits to be sent.
        self.onDrained: Callable[[], None] = lambda: None
        #: Called when the client's side reads no more, or gives the stream up.
        self.onHangup: Callable[[], None] = lambda: None
        self.received = bytearray()
        self.waiting = bytearray()
        self.inputEOF = False
        self.limit = 0
        self.sent = 0
        self.calls: list[tuple[object, ...]] = []
        self.closed = False
        self._reading = True
        self._delivering = False
        self._output: deque[tuple[str, Any]] = deque()

    # --- for the script ----------------------------------------------------------------------

    def opened(self, **info: object) -> None:
        """The process runs."""
        self.receiver.streamOpened(info)

    def take(self, count: int | None = None) -> bytes:
        """Read input as the process would, all that waits or ``count`` bytes."""
        count = len(self.waiting) if count is None else min(count, len(self.waiting))
        data = bytes(self.waiting[:count])
        del self.waiting[:count]
        self.received += data
        if data:
            self.receiver.streamConsumed(len(data))
        if self.inputEOF and not self.waiting:
            self.onInputEOF()
        return data

    def put(self, data: bytes) -> None:
        """Write to stdout or the terminal; what is not granted yet waits."""
        self._queue("data", data)

    def putError(self, data: bytes) -> None:
        """Write to stderr."""
        self._queue("error", data)

    def putEOF(self) -> None:
        """Close stdout and stderr after what was written."""
        self._queue("eof", None)

    def end(self, exit: Exit | None = SUCCESS, reason: Exception | None = None) -> None:
        """End after all output: EOF, ``exit`` if there is one, closed with ``reason``."""
        if exit is not None:
            self._queue("eof", None)
            self._queue("exit", exit)
        self._queue("closed", reason)

    def lose(self, reason: Exception) -> None:
        """The road is cut: what was not sent is lost."""
        self._output.clear()
        self._queue("closed", reason)

    @property
    def pending(self) -> int:
        """Output that the process wrote and nobody granted yet."""
        return sum(len(data) for _, data in self._output if isinstance(data, bytes))

    # --- IStream -----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        assert not self.inputEOF, "input after its end"
        self.waiting += data
        self.onInput()

    def writeEOF(self) -> None:
        assert not self.inputEOF, "input ends twice"
        self.inputEOF = True
        if not self.waiting:
            self.onInputEOF()

    def grant(self, limit: int) -> None:
        self.limit = max(self.limit, limit)
        self._deliver()

    def resize(self, size: WindowSize) -> None:
        self.calls.append(("resize", size))

    def signal(self, name: str) -> None:
        self.calls.append(("signal", name))

    def sendBreak(self, milliseconds: int) -> None:
        self.calls.append(("break", milliseconds))

    def stopReading(self) -> None:
        self.calls.append(("stopReading",))
        self._reading = False
        self._output = deque(item for item in self._output if not isinstance(item[1], bytes))
        self.onHangup()
        self._deliver()

    def close(self) -> None:
        if not self.closed and ("close",) not in self.calls:
            self.calls.append(("close",))
            self.onHangup()
            self._output.clear()
            self._queue("closed", None)

    # --- within ------------------------------------------------------------------------------

    def _queue(self, kind: str, data: object) -> None:
        if self.closed or (isinstance(data, bytes) and not self._reading):
            return
        self._output.append((kind, data))
        self._deliver()

    def _deliver(self) -> None:
        if self._delivering:
            return
        self._delivering = True
        try:
            while not self.closed:
                if self._output:
                    if not self._deliverNext():
                        break
                else:
                    self.onDrained()
                    if not self._output:
                        break
        finally:
            self._delivering = False

    def _deliverNext(self) -> bool:
        kind, data = self._output.popleft()
        if isinstance(data, bytes):
            room = self.limit - self.sent
            if len(data) > room:
                self._output.appendleft((kind, data[room:]))
                data = data[:room]
            if not data:
                return False
            self.sent += len(data)
            # Bytes in the form in which the wire has them.
            view: Any = memoryview(data)
            if kind == "data":
                self.receiver.streamData(view)
            else:
                self.receiver.streamExtendedData(view)
        elif kind == "eof":
            self.receiver.streamEOF()
        elif kind == "exit":
            self.receiver.streamExited(data)
        else:
            self.closed = True
            self._output.clear()
            self.receiver.streamClosed(data)
        return True


@implementer(IListener)
class MemoryListener:
    """An address to which a test connects.

    :ivar address: what was asked for.
    :ivar refused: who was turned away.
    """

    def __init__(self, link: MemoryLink, address: Any, receiver: Any) -> None:
        self.address = address
        self.port = (getattr(address, "port", 0) or 49152) if hasattr(address, "port") else 0
        name = getattr(address, "name", None)
        self.path = b"/private/" + name.encode() if name else getattr(address, "path", b"")
        self.receiver = receiver
        self.refused: list[Incoming] = []
        self.closed = False
        self._link = link
        self._number = 0

    def connect(self, host: str = "", port: int = 0) -> Incoming:
        """Somebody connects."""
        self._number += 1
        incoming = Incoming(self._number, host, port)
        self.receiver.connectionAccepted(incoming)
        return incoming

    def accept(self, incoming: Incoming, receiver: IStreamReceiver) -> IStream:
        return self._link.begin(incoming, receiver)

    def refuse(self, incoming: Incoming) -> None:
        self.refused.append(incoming)

    def close(self) -> None:
        self.closed = True


@implementer(IKernelLink)
class MemoryLink:
    """A link whose processes and connections are :class:`MemoryStream`.

    :param program: called with each stream that is opened, to script it.
    :ivar listeners: who listens, or did.
    :ivar refusal: why nobody may listen, if set.
    :ivar files: the store that whoever asks for files gets; ``None`` to refuse.
    """

    def __init__(self, program: Callable[[MemoryStream], None] | None = None) -> None:
        self.streams: list[MemoryStream] = []
        self.listeners: list[MemoryListener] = []
        self.refusal: Exception | None = None
        self.files: IFileStore | None = None
        self.released = False
        self._program = program

    def openProcess(self, request: ProcessRequest, receiver: IStreamReceiver) -> IStream:
        return self.begin(request, receiver)

    def openConnection(
        self, address: TCPAddress | SocketPath, receiver: IStreamReceiver
    ) -> IStream:
        return self.begin(address, receiver)

    def listen(
        self, address: TCPAddress | SocketPath | PrivateSocket, receiver: Any
    ) -> Deferred[IListener]:
        if self.refusal is not None:
            return fail(self.refusal)
        listener = MemoryListener(self, address, receiver)
        self.listeners.append(listener)
        return succeed(listener)

    def begin(self, request: Any, receiver: IStreamReceiver) -> IStream:
        """Open a stream for whatever was asked for."""
        stream = MemoryStream(request, receiver)
        self.streams.append(stream)
        if self._program is not None:
            self._program(stream)
        return stream

    def openFiles(self, root: bytes | None, readOnly: bool) -> Deferred[IFileStore]:
        if self.files is None:
            refused = StreamRefused(RefusalCode.UNKNOWN_KIND, "there are no files in memory")
            return fail(refused)
        return succeed(self.files)

    def release(self) -> None:
        if not self.released:
            self.released = True
            for stream in self.streams:
                stream.close()
            for listener in self.listeners:
                listener.close()


@implementer(IBackend)
class MemoryBackend:
    """Gives a new :class:`MemoryLink` to whoever connects.

    :ivar users: who connected, in order.
    :ivar links: what they got.
    """

    def __init__(self, program: Callable[[MemoryStream], None] | None = None) -> None:
        self.users: list[str] = []
        self.links: list[MemoryLink] = []
        #: While set, whoever connects waits until :meth:`answer`.
        self.slow = False
        self.waiting: list[Deferred[IKernelLink]] = []
        self._program = program

    def connect(self, user: str) -> Deferred[IKernelLink]:
        self.users.append(user)
        if self.slow:
            waiting: Deferred[IKernelLink] = Deferred(self.waiting.remove)
            self.waiting.append(waiting)
            return waiting
        return succeed(self._newLink())

    def answer(self, error: Exception | None = None) -> None:
        """Let the one who waits longest have a link, or ``error``."""
        waiting = self.waiting.pop(0)
        if error is None:
            waiting.callback(self._newLink())
        else:
            waiting.errback(error)

    def _newLink(self) -> IKernelLink:
        link = MemoryLink(self._program)
        self.links.append(link)
        return link
