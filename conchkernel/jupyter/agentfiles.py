"""Files of the kernel's host: an :class:`~conchkernel.files.IFileStore` over one wire stream.

Requests carry an id and are answered in the order they were sent; any number may be under way, as
their caller bounds them. Handles are numbered here, so that what follows an open need not wait for
its answer. A carrier that is cut is the wire's business: nothing is lost or said twice. When the
stream itself ends, everything under way fails with ``CONNECTION_LOST``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.python.failure import Failure
from zope.interface import implementer

from conchkernel.errors import LinkLost
from conchkernel.files import (
    Attributes,
    Entry,
    FileProblem,
    FileStoreError,
    Filesystem,
    IFileStore,
    IListing,
    IOpenFile,
    OpenFlag,
)
from conchkernel.interfaces import Exit, IStreamReceiver
from conchkernel.remote import filewire as fw

if TYPE_CHECKING:
    from conchkernel.jupyter.link import KernelStream

_PROBLEMS = tuple(FileProblem[name] if name else None for name in fw.PROBLEMS)
#: Data up to here goes with its request's head in one piece: a frame costs more than the copy.
_JOINED = 64 * 1024
#: Owners whose names are remembered.
_MAX_OWNERS = 4096


class _Malformed(Exception):
    """The agent said what the protocol does not allow."""


@implementer(IFileStore, IStreamReceiver)
class AgentFileStore:
    """Files served by an agent.

    :ivar stream: the wire's stream, for those who must end it.
    :ivar ready: fires with this store when the agent has opened it; cancelling closes it.
    """

    home = b"/"
    features: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.stream: KernelStream
        self.ready: Deferred[IFileStore] = Deferred(lambda _: self.stream.close())
        self._pending: dict[int, Request | None] = {}
        self._last_request = 0
        self._last_handle = 0
        self._pieces: list[memoryview] = []  # of an answer that is not whole
        self._missing = 0  # bytes until more can be said of it
        self._accounts: dict[int, str] = {}
        self._groups: dict[int, str] = {}
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

    def _ask(
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
        head = fw.HEAD.pack(length, number, operation)
        if len(data) <= _JOINED:
            self.stream.write(b"".join((head, body, data)))
        else:
            self.stream.write(head + body)
            self.stream.write(data)
        request = self._pending[number] = Request(
            partial(self._cancelled, number, handle), decode
        )
        return request

    def _cancelled(self, number: int, handle: int | None, request: Deferred[Any]) -> None:
        """Nobody waits any more: the answer is dropped when it comes."""
        if number in self._pending:
            self._pending[number] = None
        if handle is not None:
            self.drop(handle)

    def drop(self, handle: int) -> None:
        """Close a handle whose end nobody asks for."""
        if self._lost is None:
            self._ask(fw.CLOSE, fw.HANDLE.pack(handle)).addErrback(lambda _: None)

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
        handle = self._new_handle()
        body = fw.OPEN_HEAD.pack(handle, int(flags)) + _packed(attributes) + path
        return self._ask(fw.OPEN, body, lambda _: AgentFile(self, handle), handle=handle)

    def stat(self, path: bytes, *, follow: bool = True) -> Deferred[Attributes]:
        """See :class:`IFileStore`."""
        return self._ask(fw.STAT if follow else fw.LSTAT, path, self.attributes)

    def setAttributes(
        self, path: bytes, attributes: Attributes, *, follow: bool = True
    ) -> Deferred[None]:
        """See :class:`IFileStore`."""
        operation = fw.SETSTAT if follow else fw.LSETSTAT
        return self._ask(operation, _packed(attributes) + path)

    def listDirectory(self, path: bytes) -> Deferred[IListing]:
        """See :class:`IFileStore`."""
        handle = self._new_handle()
        opened = self._ask(
            fw.OPENDIR,
            fw.HANDLE.pack(handle) + path,
            lambda _: listing,
            handle=handle,
        )
        listing = AgentListing(self, handle)
        return opened

    def remove(self, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._ask(fw.REMOVE, path)

    def makeDirectory(self, path: bytes, attributes: Attributes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._ask(fw.MKDIR, _packed(attributes) + path)

    def removeDirectory(self, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._ask(fw.RMDIR, path)

    def rename(self, old: bytes, new: bytes, *, overwrite: bool) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._two(fw.RENAME, b"\1" if overwrite else b"\0", old, new)

    def readLink(self, path: bytes) -> Deferred[bytes]:
        """See :class:`IFileStore`."""
        return self._ask(fw.READLINK, path, bytes)

    def symbolicLink(self, target: bytes, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._two(fw.SYMLINK, b"", target, path)

    def hardLink(self, existing: bytes, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._two(fw.LINK, b"", existing, path)

    def _two(self, operation: int, head: bytes, first: bytes, second: bytes) -> Deferred[None]:
        if len(first) > fw.MAX_PATH or len(second) > fw.MAX_PATH:
            return fail(FileStoreError(FileProblem.NAME_TOO_LONG))
        return self._ask(operation, head + fw.U16.pack(len(first)) + first + second)

    def realPath(self, path: bytes) -> Deferred[bytes]:
        """See :class:`IFileStore`."""
        return self._ask(fw.REALPATH, path, bytes)

    def filesystem(self, path: bytes) -> Deferred[Filesystem]:
        """See :class:`IFileStore`."""
        return self._ask(fw.STATVFS, path, _filesystem)

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
                name, position = _name(answer, position)
                found.append(name.decode("utf-8", "replace"))
            return found[: len(uids)], found[len(uids) :]

        return self._ask(fw.NAMES, body, decode)

    def homeOf(self, user: bytes) -> Deferred[bytes]:
        """See :class:`IFileStore`."""
        return self._ask(fw.HOME, user, bytes)

    def copy(
        self, source: IOpenFile, offset: int, length: int, target: IOpenFile, target_offset: int
    ) -> Deferred[None]:
        """See :class:`IFileStore`."""
        if not isinstance(source, AgentFile) or not isinstance(target, AgentFile):
            return fail(FileStoreError(FileProblem.UNSUPPORTED, "files of another store"))
        body = fw.COPY_BODY.pack(source.handle, offset, length, target.handle, target_offset)
        return self._ask(fw.COPY, body)

    def close(self) -> Deferred[None]:
        """See :class:`IFileStore`."""
        if self._lost is not None:
            return succeed(None)
        closed: Deferred[None] = Deferred()
        self._closing.append(closed)
        self.stream.close()
        return closed

    # --- for files and listings --------------------------------------------------------------

    def attributes(self, body: memoryview, position: int = 0) -> Attributes:
        """Attributes as they were told, with names where they are known."""
        given, size, uid, gid, mode, atime, mtime, links = fw.ATTRIBUTES.unpack_from(
            body, position
        )
        if given != fw.HAS_ALL:
            raise ValueError("attributes are missing")
        return Attributes(
            size, uid, gid, mode, _seconds(atime), _seconds(mtime),
            self._accounts.get(uid), self._groups.get(gid), links,
        )  # fmt: skip

    def owners(self, body: memoryview) -> bytes:
        """Remember the names before a piece of a listing; returns the entries behind them."""
        counts = fw.COUNTS.unpack_from(body)
        position = fw.COUNTS.size
        for count, known in zip(counts, (self._accounts, self._groups), strict=True):
            for _ in range(count):
                (number,) = fw.U32.unpack_from(body, position)
                name, position = _name(body, position + 4)
                if name and len(known) < _MAX_OWNERS:
                    known[number] = name.decode("utf-8", "replace")
        return bytes(body[position:])

    def entries(self, piece: bytes) -> list[Entry]:
        """The entries of a piece."""
        body = memoryview(piece)
        position, end = 0, len(body)
        entries = []
        while position < end:
            name, position = _name(body, position)
            entries.append(Entry(name, self.attributes(body, position)))
            position += fw.ATTRIBUTES.size
        return entries


class Request(Deferred[Any]):
    """What is under way, and how its answer is read."""

    def __init__(
        self,
        canceller: Callable[[Deferred[Any]], None],
        decode: Callable[[memoryview], Any] | None,
    ) -> None:
        super().__init__(canceller)
        self.decode = decode


@implementer(IOpenFile)
class AgentFile:
    """A file that the agent has open."""

    def __init__(self, store: AgentFileStore, handle: int) -> None:
        self.handle = handle
        self._store = store
        self._handle = fw.HANDLE.pack(handle)

    def read(self, offset: int, length: int) -> Deferred[bytes]:
        """See :class:`IOpenFile`."""
        body = fw.READ_BODY.pack(self.handle, offset, min(length, fw.MAX_TRANSFER))
        return self._store._ask(fw.READ, body, bytes)

    def write(self, offset: int, data: bytes) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        if len(data) <= fw.MAX_TRANSFER:
            body = fw.WRITE_HEAD.pack(self.handle, offset)
            return self._store._ask(fw.WRITE, body, None, data)
        return Deferred.fromCoroutine(self._writeParts(offset, memoryview(data)))

    async def _writeParts(self, offset: int, data: memoryview) -> None:
        # One after another: a failure in the middle leaves a beginning, not holes.
        for start in range(0, len(data), fw.MAX_TRANSFER):
            await self.write(offset + start, bytes(data[start : start + fw.MAX_TRANSFER]))

    def stat(self) -> Deferred[Attributes]:
        """See :class:`IOpenFile`."""
        return self._store._ask(fw.FSTAT, self._handle, self._store.attributes)

    def setAttributes(self, attributes: Attributes) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        return self._store._ask(fw.FSETSTAT, self._handle + _packed(attributes))

    def sync(self) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        return self._store._ask(fw.FSYNC, self._handle)

    def filesystem(self) -> Deferred[Filesystem]:
        """See :class:`IOpenFile`."""
        return self._store._ask(fw.FSTATVFS, self._handle, _filesystem)

    def close(self) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        return self._store._ask(fw.CLOSE, self._handle)


@implementer(IListing)
class AgentListing:
    """A directory that the agent reads; one piece is always on its way or here."""

    def __init__(self, store: AgentFileStore, handle: int) -> None:
        self._store = store
        self._handle = fw.HANDLE.pack(handle)
        self._here: bytes | Failure | None = None
        self._waiting: Deferred[bytes] | None = None
        self._ask()

    def _ask(self) -> None:
        self._store._ask(fw.READDIR, self._handle, self._store.owners).addBoth(self._came)

    def _came(self, piece: bytes | Failure) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.callback(piece)
        else:
            # A failure that nobody comes for is no news: opening has failed, too.
            self._here = piece

    def next(self) -> Deferred[Sequence[Entry]]:
        """See :class:`IListing`."""
        piece: Deferred[bytes] = Deferred(self._cancelled)
        here, self._here = self._here, None
        if here is not None:
            piece.callback(here)
        else:
            self._waiting = piece
        return piece.addCallback(self._decode)

    def _cancelled(self, _: object) -> None:
        self._waiting = None

    def _decode(self, piece: bytes) -> Sequence[Entry]:
        if piece:
            self._ask()
        else:
            self._here = piece
        try:
            return self._store.entries(piece)
        except (ValueError, IndexError, struct.error):
            raise FileStoreError(FileProblem.FAILURE, "a malformed listing") from None

    def close(self) -> Deferred[None]:
        """See :class:`IListing`."""
        return self._store._ask(fw.CLOSE, self._handle)


def _name(body: memoryview, position: int) -> tuple[bytes, int]:
    """A name with its length before it, and where it ends."""
    (length,) = fw.U16.unpack_from(body, position)
    start = position + fw.U16.size
    end = start + length
    if end > len(body):
        raise ValueError("a name is cut short")
    return bytes(body[start:end]), end


def _filesystem(body: memoryview) -> Filesystem:
    return Filesystem(*fw.FILESYSTEM.unpack(body))


def _seconds(nanoseconds: int) -> float:
    # Not rounded up into the next second, as one division would now and then.
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return seconds + rest // 1000 / 1e6


def _nanoseconds(seconds: float) -> int:
    whole = math.floor(seconds)
    return min(max(whole, -(2**33)), 2**33) * 1_000_000_000 + round((seconds - whole) * 1e9)


def _packed(attributes: Attributes) -> bytes:
    given = 0
    uid = gid = fw.SAME
    atime = mtime = 0
    if attributes.size is not None:
        given |= fw.HAS_SIZE
    if attributes.uid is not None or attributes.gid is not None:
        given |= fw.HAS_OWNER
        uid = fw.SAME if attributes.uid is None else attributes.uid
        gid = fw.SAME if attributes.gid is None else attributes.gid
    if attributes.mode is not None:
        given |= fw.HAS_MODE
    if attributes.mtime is not None or attributes.atime is not None:
        given |= fw.HAS_TIMES
        first = attributes.mtime if attributes.atime is None else attributes.atime
        second = attributes.atime if attributes.mtime is None else attributes.mtime
        atime, mtime = _nanoseconds(first or 0), _nanoseconds(second or 0)
    return fw.ATTRIBUTES.pack(
        given, attributes.size or 0, uid, gid, attributes.mode or 0, atime, mtime, 0
    )
