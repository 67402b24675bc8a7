"""A store of the agent's files that outlives its stream.

Agents die, with their host or by somebody's hand, and links are given up. A client's session with
its files goes on: what was under way fails, files that were open are lost, and the next request
that names a path opens a new stream and is done there. Paths are the host's own, so they mean what
they meant before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from zope.interface import implementer

from conchkernel.files import (
    BYTES_UNDER_WAY,
    Attributes,
    Filesystem,
    IFileStore,
    IListing,
    IOpenFile,
    OpenFlag,
)

if TYPE_CHECKING:
    from conchkernel.jupyter.agentfiles import AgentFileStore


@implementer(IFileStore)
class LastingFileStore:
    """One stream's store after another.

    :param first: the store to begin with.
    :param begin: makes the next one, which need not be ready; ``None`` if there is to be none.
    """

    bytesUnderWay = BYTES_UNDER_WAY

    def __init__(
        self, first: AgentFileStore, begin: Callable[[], AgentFileStore | None]
    ) -> None:
        self._store = first
        self._begin = begin
        self._closed = False

    @property
    def home(self) -> bytes:
        """See :class:`IFileStore`."""
        return self._store.home

    @property
    def features(self) -> frozenset[str]:
        """See :class:`IFileStore`."""
        return self._store.features

    def _now(self) -> AgentFileStore:
        """The store of the moment, or a new one."""
        if not self._store.isOpen and not self._closed:
            begun = self._begin()
            if begun is not None:
                begun.home, begun.features = self._store.home, self._store.features
                self._store = begun
                # Whoever asks is told by the failure of what was asked.
                begun.ready.addErrback(lambda _: None)
        return self._store

    def open(self, path: bytes, flags: OpenFlag, attributes: Attributes) -> Deferred[IOpenFile]:
        """See :class:`IFileStore`."""
        return self._now().open(path, flags, attributes)

    def stat(self, path: bytes, *, follow: bool = True) -> Deferred[Attributes]:
        """See :class:`IFileStore`."""
        return self._now().stat(path, follow=follow)

    def setAttributes(
        self, path: bytes, attributes: Attributes, *, follow: bool = True
    ) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._now().setAttributes(path, attributes, follow=follow)

    def listDirectory(self, path: bytes) -> Deferred[IListing]:
        """See :class:`IFileStore`."""
        return self._now().listDirectory(path)

    def remove(self, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._now().remove(path)

    def makeDirectory(self, path: bytes, attributes: Attributes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._now().makeDirectory(path, attributes)

    def removeDirectory(self, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._now().removeDirectory(path)

    def rename(self, old: bytes, new: bytes, *, overwrite: bool) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._now().rename(old, new, overwrite=overwrite)

    def readLink(self, path: bytes) -> Deferred[bytes]:
        """See :class:`IFileStore`."""
        return self._now().readLink(path)

    def symbolicLink(self, target: bytes, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._now().symbolicLink(target, path)

    def hardLink(self, existing: bytes, path: bytes) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._now().hardLink(existing, path)

    def realPath(self, path: bytes) -> Deferred[bytes]:
        """See :class:`IFileStore`."""
        return self._now().realPath(path)

    def filesystem(self, path: bytes) -> Deferred[Filesystem]:
        """See :class:`IFileStore`."""
        return self._now().filesystem(path)

    def names(
        self, uids: Sequence[int], gids: Sequence[int]
    ) -> Deferred[tuple[Sequence[str], Sequence[str]]]:
        """See :class:`IFileStore`."""
        return self._now().names(uids, gids)

    def homeOf(self, user: bytes) -> Deferred[bytes]:
        """See :class:`IFileStore`."""
        return self._now().homeOf(user)

    def copy(
        self, source: IOpenFile, offset: int, length: int, target: IOpenFile, target_offset: int
    ) -> Deferred[None]:
        """See :class:`IFileStore`."""
        return self._store.copy(source, offset, length, target, target_offset)

    def close(self) -> Deferred[None]:
        """See :class:`IFileStore`."""
        self._closed = True
        return self._store.close()
