"""Files of the kernel's host: an :class:`~conchkernel.files.IFileStore` over one wire stream.

Requests carry an id and are answered in the order they were sent; any number may be under way, as
their caller bounds them. Handles are numbered here, so that what follows an open need not wait for
its answer. A carrier that is cut is the wire's business: nothing is lost or said twice. When the
stream itself ends, everything under way fails with ``CONNECTION_LOST``.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from conchkernel.errors import LinkLost
from conchkernel.files import (
    BYTES_UNDER_WAY,
    Attributes,
    FileProblem,
    FileStoreError,
    Filesystem,
    IFileStore,
    IListing,
    IOpenFile,
    OpenFlag,
)
from conchkernel.interfaces import Exit, IStreamReceiver
from conchkernel.jupyter.agentahead import AHEAD_SECONDS, MAX_FILES, Ahead
from conchkernel.jupyter.agenthandles import AgentFile, AgentListing
from conchkernel.jupyter.filecodec import Owners, filesystem, pack_attributes, take_name
from conchkernel.jupyter.foresight import Foresight
from conchkernel.remote import filewire as fw

if TYPE_CHECKING:
    from conchkernel.jupyter.kernelstream import KernelStream
    from conchkernel.jupyter.link import Link

_PROBLEMS = tuple(FileProblem[name] if name else None for name in fw.PROBLEMS)
#: Data up to here goes with its request's head in one piece: a frame costs more than the copy.
_JOINED = 64 * 1024
#: A CLOSE that nobody waits for goes with the next request, or alone after so long.
_CLOSE_SECONDS = 0.01


class _Malformed(Exception):
    """The agent said what the protocol does not allow."""


@implementer(IFileStore, IStreamReceiver)
class AgentFileStore:
    """Files served by an agent.

    :param clock: tells the time, and calls later.
    :param link: whose stream it is.
    :ivar stream: the wire's stream, for those who must end it.
    :ivar ready: fires with this store when the agent has opened it; cancelling closes it.
    """

    home = b"/"
    bytesUnderWay = BYTES_UNDER_WAY
    features: frozenset[str] = frozenset()
    #: Whether the file that was written last had one WRITE, and then its CLOSE: so will the next.
    writeIsLast = False

    def __init__(self, clock: Any, link: Link) -> None:
        self.stream: KernelStream
        self._clock = clock
        self._link = link
        self.ready: Deferred[IFileStore] = Deferred(lambda _: self.stream.close())
        self._pending: dict[int, Request | None] = {}
        self._last_request = 0
        self._last_handle = 0
        self._pieces: list[memoryview] = []  # of an answer that is not whole
        self._missing = 0  # bytes until more can be said of it
        self._unsent = b""  # requests that go with the next one
        self._sendingSoon = False
        self._aheads: deque[Ahead] = deque()
        self._foresight = Foresight(self, clock)
        self.owners = Owners()
        self._lost: Exception | None = None
        self._closing: list[Deferred[None]] = []

    def began(self, stream: KernelStream) -> None:
        """The stream that carries this store (called by the link)."""
        self.stream = stream

    # --- the stream --------------------------------------------------------------------------

    def streamOpened(self, info: Mapping[str, object]) -> None:
        """The agent serves files."""
        home, features = info.get("home"), info.get("features")
        try:
            if not isinstance(home, str) or not isinstance(features, list):
                raise ValueError
            self.home = home.encode("latin-1")
            self.features = frozenset(map(str, features[:64]))
        except ValueError:
            self._break("it does not say where files begin")
            return
        if not self.ready.called:
            self.ready.callback(self)

    def streamData(self, data: bytes | memoryview) -> None:
        """Answers, or pieces of them."""
        view = memoryview(data)
        pieces = self._pieces
        try:
            while pieces and view:
                taken, view = view[: self._missing], view[self._missing :]
                pieces.append(taken)
                self._missing -= len(taken)
                if not self._missing:
                    whole = memoryview(b"".join(pieces))
                    pieces.clear()
                    self._records(whole)
            if view:
                self._records(view)
        except _Malformed as error:
            self._break(str(error))

    def _records(self, view: memoryview) -> None:
        """Take the whole answers; what is left waits for the rest of it."""
        position, end = 0, len(view)
        while position < end:
            start = position
            if end - start < fw.HEAD.size:
                position = start + fw.HEAD.size
            else:
                length, request, problem = fw.HEAD.unpack_from(view, start)
                if not fw.COUNTED <= length <= fw.MAX_RECORD:
                    raise _Malformed(f"a record of {length} bytes")
                position = start + 4 + length
                if position <= end:
                    self._answered(request, problem, view[start + fw.HEAD.size : position])
                    continue
            self._missing = position - end
            self._pieces.append(view[start:])

    def streamExtendedData(self, data: bytes | memoryview) -> None:
        """There is none."""

    def streamConsumed(self, count: int) -> None:
        """Whoever asks is told by the answer."""

    def streamEOF(self) -> None:
        """There is none."""

    def streamExited(self, exit: Exit) -> None:
        """There is none."""

    def streamClosed(self, reason: Exception | None) -> None:
        """The road is gone: everything fails."""
        self._lost = reason or LinkLost("the files were closed")
        self._foresight.stop()
        pending, self._pending = self._pending, {}
        if not self.ready.called:
            self.ready.errback(self._lost)
        for request in pending.values():
            if request is not None:
                request.errback(self._gone())
        closing, self._closing = self._closing, []
        for waiting in closing:
            waiting.callback(None)

    def _gone(self) -> FileStoreError:
        return FileStoreError(FileProblem.CONNECTION_LOST, str(self._lost))

    def _break(self, why: str) -> None:
        """The agent is not to be understood any more."""
        reason = LinkLost(f"the agent's files cannot be used: {why}")
        self.stream.close()
        self.stream.lost(reason)

    # --- requests ----------------------------------------------------------------------------

    def ask(
        self,
        operation: int,
        body: bytes,
        decode: Callable[[memoryview], Any] | None = None,
        data: bytes = b"",
        handle: int | None = None,
    ) -> Deferred[Any]:
        """Send a request.

        :param decode: makes the result of the answer's body; nothing is made without it.
        :param data: follows the body.
        :param handle: what is to be closed if nobody waits for this answer any more.
        """
        if self._lost is not None:
            return fail(self._gone())
        number = self._last_request = (self._last_request + 1) & 0xFFFFFFFF
        length = fw.COUNTED + len(body) + len(data)
        if length > fw.MAX_RECORD:
            return fail(FileStoreError(FileProblem.NAME_TOO_LONG))
        if operation in fw.CHANGING:
            self._changing()
        head = self._unsent + fw.HEAD.pack(length, number, operation)
        self._unsent = b""
        if len(data) <= _JOINED:
            self.stream.write(b"".join((head, body, data)))
        else:
            self.stream.write(head + body)
            self.stream.write(data)
        request = self._pending[number] = Request(
            partial(self._cancelled, number, handle), decode
        )
        return request

    def _changing(self) -> None:
        """What is asked next changes something that was told early."""
        self._link.stirred += 1
        self._foresight.forget()

    def _cancelled(self, number: int, handle: int | None, request: Deferred[Any]) -> None:
        """Nobody waits any more: the answer is dropped when it comes."""
        if number in self._pending:
            self._pending[number] = None
        if handle is not None:
            self.drop(handle)

    def drop(self, handle: int) -> None:
        """Close a handle whose end nobody asks for."""
        if self._lost is None:
            self.ask(fw.CLOSE, fw.HANDLE.pack(handle)).addErrback(lambda _: None)

    def dropSoon(self, handle: int) -> None:
        """The same, with the next request: one message less."""
        if self._lost is not None:
            return
        number = self._last_request = (self._last_request + 1) & 0xFFFFFFFF
        self._pending[number] = None
        if not self._sendingSoon:
            self._sendingSoon = True
            self._clock.callLater(_CLOSE_SECONDS, self._sendUnsent)
        self._unsent += fw.HEAD.pack(fw.COUNTED + fw.HANDLE.size, number, fw.CLOSE)
        self._unsent += fw.HANDLE.pack(handle)

    def _sendUnsent(self) -> None:
        self._sendingSoon = False
        unsent, self._unsent = self._unsent, b""
        self.stream.write(unsent)

    @property
    def isOpen(self) -> bool:
        """Whether anything can still be asked."""
        return self._lost is None

    @property
    def stirred(self) -> int:
        """See :attr:`conchkernel.jupyter.link.Link.stirred`."""
        return self._link.stirred

    def isFresh(self, ahead: Ahead) -> bool:
        """Whether a file that came whole may still be told."""
        fresh = ahead.isFresh(self._link.stirred, self._clock.seconds())
        return fresh and self._lost is None

    def _answered(self, number: int, problem: int, body: memoryview) -> None:
        try:
            request = self._pending.pop(number)
        except KeyError:
            raise _Malformed("an answer to nothing") from None
        if request is None:
            return
        if problem:
            known = _PROBLEMS[problem] if problem < len(_PROBLEMS) else None
            text = str(body, "utf-8", "replace")
            request.errback(FileStoreError(known or FileProblem.FAILURE, text))
            return
        try:
            result = request.decode(body) if request.decode is not None else None
        except (ValueError, IndexError, struct.error):
            request.errback(FileStoreError(FileProblem.FAILURE, "a malformed answer"))
            raise _Malformed("a malformed answer") from None
        request.callback(result)

    def _new_handle(self) -> int:
        self._last_handle = (self._last_handle + 1) & 0xFFFFFFFF
        return self._last_handle

    # --- IFileStore --------------------------------------------------------------------------

    def open(self, path: bytes, flags: OpenFlag, attributes: Attributes) -> Deferred[IOpenFile]:
        """See :class:`IFileStore`."""
        if flags == fw.OPEN_READ:
            return self._foreseen(fw.OPEN, path)
        return self._open(path, flags, attributes)

    def _foreseen(self, operation: int, path: bytes) -> Deferred[Any]:
        """What may have been asked already, and what tells of what will be."""
        answer = self._foresight.take(operation, path)
        if answer is None:
            answer = self.askNow(operation, path)
        self._foresight.asked(operation, path)
        return answer

    def askNow(self, operation: int, path: bytes) -> Deferred[Any]:
        """Ask one of the questions that may be asked early: OPEN for reading, STAT, LSTAT."""
        if operation == fw.OPEN:
            return self._open(path, OpenFlag.READ, Attributes())
        return self.ask(operation, path, self.owners.attributes)

    def _open(
        self, path: bytes, flags: OpenFlag, attributes: Attributes
    ) -> Deferred[IOpenFile]:
        handle = self._new_handle()
        wanted = int(flags)
        readOnly = not wanted & fw.OPEN_CHANGES
        if not readOnly:
            self._changing()
        stirred, until = self._link.stirred, self._clock.seconds() + AHEAD_SECONDS

        def decode(answer: memoryview) -> AgentFile:
            ahead = None
            if answer:
                told = self.owners.attributes(answer)
                ahead = Ahead(told, bytes(answer[fw.ATTRIBUTES.size :]), stirred, until)
                if len(self._aheads) >= MAX_FILES:
                    self._aheads.popleft().forget()
                self._aheads.append(ahead)
            return AgentFile(self, handle, readOnly, ahead)

        body = fw.OPEN_HEAD.pack(handle, wanted) + pack_attributes(attributes) + path
        return self.ask(fw.OPEN, body, decode, handle=handle)

    def stat(self, path: bytes, *, follow: bool = True) -> Deferred[Attributes]:
        """See :class:`IFileStore`."""
        return self._foreseen(fw.STAT if follow else fw.LSTAT, path)

    def setAttributes(
        self, path: bytes, attributes: Attributes, *, follow: bool = True
    ) -> Deferred[None]:
        """See :class:`IFileStore`."""
        operation = fw.SETSTAT if follow else fw.LSETSTAT
        return self.ask(operation, pack_attributes(attributes) + path)

    def listDirectory(self, path: bytes) -> Deferred[IListing]:
        """See :class:`IFileStore`."""
        handle = self._new_handle()
        opened = self.ask(
            fw.OPENDIR,
            fw.HANDLE.pack(handle) + path,
            lambda _: listing,
            handle=handle,
        )
        listing = AgentListing(self, handle, self._foresight.listing(path))
        return opened

    def remove(self, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self.ask(fw.REMOVE, path)

    def makeDirectory(self, path: bytes, attributes: Attributes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self.ask(fw.MKDIR, pack_attributes(attributes) + path)

    def removeDirectory(self, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self.ask(fw.RMDIR, path)

    def rename(self, old: bytes, new: bytes, *, overwrite: bool) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._two(fw.RENAME, b"\1" if overwrite else b"\0", old, new)

    def readLink(self, path: bytes) -> Deferred[bytes]:
        """See :class:`IFileStore`."""
        return self.ask(fw.READLINK, path, bytes)

    def symbolicLink(self, target: bytes, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._two(fw.SYMLINK, b"", target, path)

    def hardLink(self, existing: bytes, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._two(fw.LINK, b"", existing, path)

    def _two(self, operation: int, head: bytes, first: bytes, second: bytes) -> Deferred[None]:
        if len(first) > fw.MAX_PATH or len(second) > fw.MAX_PATH:
            return fail(FileStoreError(FileProblem.NAME_TOO_LONG))
        return self.ask(operation, head + fw.U16.pack(len(first)) + first + second)

    def realPath(self, path: bytes) -> Deferred[bytes]:
        """See :class:`IFileStore`."""
        return self.ask(fw.REALPATH, path, bytes)

    def filesystem(self, path: bytes) -> Deferred[Filesystem]:
        """See :class:`IFileStore`."""
        return self.ask(fw.STATVFS, path, filesystem)

    def names(
        self, uids: Sequence[int], gids: Sequence[int]
    ) -> Deferred[tuple[Sequence[str], Sequence[str]]]:
        """See :class:`IFileStore`."""
        numbers = [*uids, *gids]
        if len(numbers) > fw.MAX_NAMES:
            return fail(FileStoreError(FileProblem.INVALID, "too many accounts at once"))
        body = fw.COUNTS.pack(len(uids), len(gids)) + b"".join(map(fw.U32.pack, numbers))

        def decode(answer: memoryview) -> tuple[Sequence[str], Sequence[str]]:
            found, position = [], 0
            for _ in numbers:
                name, position = take_name(answer, position)
                found.append(name.decode("utf-8", "replace"))
            return found[: len(uids)], found[len(uids) :]

        return self.ask(fw.NAMES, body, decode)

    def homeOf(self, user: bytes) -> Deferred[bytes]:
        """See :class:`IFileStore`."""
        return self.ask(fw.HOME, user, bytes)

    def copy(
        self, source: IOpenFile, offset: int, length: int, target: IOpenFile, target_offset: int
    ) -> Deferred[None]:
        """See :class:`IFileStore`."""
        if (
            not isinstance(source, AgentFile)
            or not isinstance(target, AgentFile)
            or not source.store is target.store is self
        ):
            return fail(FileStoreError(FileProblem.UNSUPPORTED, "a file of another store"))
        source.used()
        target.used()
        body = fw.COPY_BODY.pack(source.handle, offset, length, target.handle, target_offset)
        return self.ask(fw.COPY, body)

    def close(self) -> Deferred[None]:
        """See :class:`IFileStore`."""
        if self._lost is not None:
            return succeed(None)
        closed: Deferred[None] = Deferred()
        self._closing.append(closed)
        self.stream.close()
        return closed


class Request(Deferred[Any]):
    """What is under way, and how its answer is read."""

    def __init__(
        self,
        canceller: Callable[[Deferred[Any]], None],
        decode: Callable[[memoryview], Any] | None,
    ) -> None:
        super().__init__(canceller)
        self.decode = decode
