"""Which file store an SFTP session gets: the agent's or the Contents API's, and what is forbidden.

A joint of the two columns, like :mod:`conchkernel.avatars`. The choice is made once for each
session and never mixed, because the two have different paths: the host's own, and those below the
Jupyter root.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from conchkernel.errors import KernelUnsupported, StreamRefused
from conchkernel.filepolicies import JailedFileStore, ReadOnlyFileStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from conchkernel.avatars import KernelAvatar
    from conchkernel.files import IFileStore


class Files(enum.Enum):
    """Where files are."""

    AUTO = "auto"
    """On the kernel's host through the agent, through the Contents API where there is none."""
    AGENT = "agent"
    CONTENTS = "contents"


class StoreChoice:
    """Gives each SFTP session its store; ``files`` of :class:`~conchkernel.avatars.KernelRealm`.

    :param contents: makes a store over the Contents API.
    :param root: a directory that no path leaves.
    :param readOnly: whether nothing may be changed.
    """

    _log = Logger()

    def __init__(
        self,
        contents: Callable[[], IFileStore],
        *,
        files: Files = Files.AUTO,
        root: bytes | None = None,
        readOnly: bool = False,
    ) -> None:
        self._contents = contents
        self._files = files
        self._root = root
        self._readOnly = readOnly

    def __call__(self, avatar: KernelAvatar) -> Deferred[IFileStore]:
        """A store for a session of ``avatar``."""
        return Deferred.fromCoroutine(self._choose(avatar))

    async def _choose(self, avatar: KernelAvatar) -> IFileStore:
        if self._files is not Files.CONTENTS:
            try:
                link = await avatar.link()
                # The agent holds the jail itself, against races too.
                return await link.openFiles(self._root, self._readOnly)
            except (KernelUnsupported, StreamRefused) as error:
                if self._files is Files.AGENT:
                    raise
                self._log.info("files through the Contents API: {reason}", reason=str(error))
        store = self._contents()
        if self._root is not None:
            store = JailedFileStore(store, self._root)
        return ReadOnlyFileStore(store) if self._readOnly else store
