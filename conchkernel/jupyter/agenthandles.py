"""What is open in a store of the agent's files: files, and directories being read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure
from zope.interface import implementer

from conchkernel.files import (
    Attributes,
    Entry,
    FileProblem,
    FileStoreError,
    Filesystem,
    IListing,
    IOpenFile,
)
from conchkernel.jupyter.filecodec import filesystem, pack_attributes
from conchkernel.remote import filewire as fw

if TYPE_CHECKING:
    from conchkernel.jupyter.agentahead import Ahead
    from conchkernel.jupyter.agentfiles import AgentFileStore
    from conchkernel.jupyter.foresight import Listing


@implementer(IOpenFile)
class AgentFile:
    """A file that the agent has open.

    :param readOnly: it was opened for reading alone.
    :param ahead: all of it, if it came with the answer.
    """

    def __init__(
        self, store: AgentFileStore, handle: int, readOnly: bool, ahead: Ahead | None
    ) -> None:
        self.handle = handle
        self.store = store
        self._handle = fw.HANDLE.pack(handle)
        self._readOnly = readOnly
        self._ahead = ahead
        self._writes = 0
        self._others = 0  # requests that are neither WRITE nor CLOSE
        self._isClosed = False  # over there, with the only WRITE

    @property
    def attributes(self) -> Attributes | None:
        """As they were when it was opened, if it came whole."""
        return None if self._ahead is None else self._ahead.attributes

    def _fresh(self) -> Ahead | None:
        ahead = self._ahead
        if ahead is not None and not self.store.isFresh(ahead):
            ahead = self._ahead = None
        return ahead

    def read(self, offset: int, length: int) -> bytes | Deferred[bytes]:
        """See :class:`IOpenFile`."""
        ahead = self._fresh()
        if ahead is not None:
            piece = ahead.read(offset, length)
            if piece is not None:
                return piece
        body = fw.READ_BODY.pack(self.handle, offset, min(length, fw.MAX_TRANSFER))
        self.used()
        return self.store.ask(fw.READ, body, bytes)

    def write(self, offset: int, data: bytes) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        self._writes += 1
        if len(data) <= fw.MAX_TRANSFER:
            body = fw.WRITE_HEAD.pack(self.handle, offset)
            if self.store.writeIsLast and len(data) <= fw.MAX_AHEAD and self._isNew():
                return self.store.ask(fw.WRITE_LAST, body, self._closedEarly, data)
            self._isClosed = False
            return self.store.ask(fw.WRITE, body, None, data)
        return Deferred.fromCoroutine(self._writeParts(offset, memoryview(data)))

    def _isNew(self) -> bool:
        return self._writes == 1 and not self._others

    def _closedEarly(self, answer: memoryview) -> None:
        # Unless something was asked meanwhile.
        self._isClosed = answer[0] == 1 and self._isNew()

    def used(self) -> None:
        """Something but WRITE and CLOSE is asked of it, which opens it again."""
        self._others += 1
        self._isClosed = False

    def _ask(self, *request: Any) -> Deferred[Any]:
        self.used()
        return self.store.ask(*request)

    async def _writeParts(self, offset: int, data: memoryview) -> None:
        # One after another: a failure in the middle leaves a beginning, not holes.
        for start in range(0, len(data), fw.MAX_TRANSFER):
            await self.write(offset + start, bytes(data[start : start + fw.MAX_TRANSFER]))

    def stat(self) -> Deferred[Attributes]:
        """See :class:`IOpenFile`."""
        ahead = self._fresh()
        if ahead is not None:
            attributes = ahead.stat()
            if attributes is not None:
                return succeed(attributes)
        return self._ask(fw.FSTAT, self._handle, self.store.owners.attributes)

    def setAttributes(self, attributes: Attributes) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        return self._ask(fw.FSETSTAT, self._handle + pack_attributes(attributes))

    def sync(self) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        return self._ask(fw.FSYNC, self._handle)

    def filesystem(self) -> Deferred[Filesystem]:
        """See :class:`IOpenFile`."""
        return self._ask(fw.FSTATVFS, self._handle, filesystem)

    def close(self) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        if self._readOnly and self.store.isOpen:
            # Nothing can be lost by it any more: nobody need wait.
            self._ahead = None
            self.store.dropSoon(self.handle)
            return succeed(None)
        self.store.writeIsLast = self._isNew() and "write-last" in self.store.features
        if self._isClosed and self.store.isOpen:
            self.store.dropSoon(self.handle)
            return succeed(None)
        return self.store.ask(fw.CLOSE, self._handle)


@implementer(IListing)
class AgentListing:
    """A directory that the agent reads; one piece is always on its way or here.

    :param listing: is told what was found.
    """

    def __init__(self, store: AgentFileStore, handle: int, listing: Listing) -> None:
        self.store = store
        self._handle = fw.HANDLE.pack(handle)
        self._listing = listing
        self._here: bytes | Failure | None = None
        self._waiting: Deferred[bytes] | None = None
        self._ask()

    def _ask(self) -> None:
        self.store.ask(fw.READDIR, self._handle, self.store.owners.learn).addBoth(self._came)

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
            entries = self.store.owners.entries(piece)
        except (ValueError, IndexError, struct.error):
            raise FileStoreError(FileProblem.FAILURE, "a malformed listing") from None
        self._listing.add(entries)
        return entries

    def close(self) -> Deferred[None]:
        """See :class:`IListing`."""
        return self.store.ask(fw.CLOSE, self._handle)
