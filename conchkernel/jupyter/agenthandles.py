"""What is open in a store of the agent's files: files, and directories being read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
        return self.store.ask(fw.READ, body, bytes)

    def write(self, offset: int, data: bytes) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        if len(data) <= fw.MAX_TRANSFER:
            body = fw.WRITE_HEAD.pack(self.handle, offset)
            return self.store.ask(fw.WRITE, body, None, data)
        return Deferred.fromCoroutine(self._writeParts(offset, memoryview(data)))

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
        return self.store.ask(fw.FSTAT, self._handle, self.store.owners.attributes)

    def setAttributes(self, attributes: Attributes) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        return self.store.ask(fw.FSETSTAT, self._handle + pack_attributes(attributes))

    def sync(self) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        return self.store.ask(fw.FSYNC, self._handle)

    def filesystem(self) -> Deferred[Filesystem]:
        """See :class:`IOpenFile`."""
        return self.store.ask(fw.FSTATVFS, self._handle, filesystem)

    def close(self) -> Deferred[None]:
        """See :class:`IOpenFile`."""
        if self._readOnly and self.store.isOpen:
            # Nothing can be lost by it any more: nobody need wait.
            self._ahead = None
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
