"""A file opened through the Contents API: a reader, and an uploader once it is written to."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from conchkernel.files import Attributes, FileProblem, FileStoreError, IOpenFile, OpenFlag
from conchkernel.jupyter.contents_reading import Reader
from conchkernel.jupyter.contents_writing import Uploader

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.python.failure import Failure

    from conchkernel.files import Filesystem
    from conchkernel.jupyter.contents import ContentsFileStore
    from conchkernel.jupyter.contents_rest import Model

#: SFTP tells whole seconds.
_SAME_SECONDS = 1.0


def unsupported(what: str) -> FileStoreError:
    """What Jupyter's API cannot do."""
    return FileStoreError(FileProblem.UNSUPPORTED, f"Jupyter's Contents API {what}")


def refuse_untrue(wanted: Attributes, now: Attributes) -> None:
    """Refuse to set what is not so already.

    Who copies a file sets what the copy has anyway; who wants something else must hear that it
    cannot be had.

    :raises FileStoreError: UNSUPPORTED.
    """
    if wanted.uid is not None or wanted.gid is not None:
        raise unsupported("knows no owners")
    if wanted.mode is not None and (wanted.mode ^ (now.mode or 0)) & 0o7777:
        raise unsupported("sets no permissions; the file has those of the server's new files")
    if wanted.mtime is not None and (
        now.mtime is None or abs(wanted.mtime - now.mtime) > _SAME_SECONDS
    ):
        raise unsupported("sets no times; the file has the time of its last change")


@implementer(IOpenFile)
class ContentsFile:
    """See :class:`IOpenFile`.

    :param size: of what one reads there; the model may tell a symbolic link's.
    """

    def __init__(
        self, store: ContentsFileStore, path: bytes, flags: OpenFlag, model: Model, size: int
    ) -> None:
        self._store = store
        self._flags = flags
        self._model = model
        self._path = path
        self._size = size
        self._closed = False
        self._whole_when_removed = False
        self._finishing: Deferred[None] | None = None
        self._reader: Reader | None = None
        self._uploader: Uploader | None = None
        self._written = 0.0
        if flags & (OpenFlag.WRITE | OpenFlag.APPEND):
            self._uploader = Uploader(store.contents, path, size, store.budget)
        else:
            self._reader = Reader(store.contents, path, size, model)

    @property
    def path(self) -> bytes:
        """Where it is; a renamed file keeps its handles."""
        return self._path

    @path.setter
    def path(self, path: bytes) -> None:
        self._path = path
        for part in (self._reader, self._uploader):
            if part is not None:
                part.path = path

    @property
    def dirty(self) -> bool:
        """Whether the server has not all of it."""
        return self._uploader is not None and not self._uploader.clean

    @property
    def attributes(self) -> Attributes:
        """As its writer sees it."""
        if self._uploader is None:
            told = replace(self._model.attributes, size=self._size)
            return replace(told, size=self._reader.size) if self._reader is not None else told
        told = (self._uploader.model or self._model).attributes
        if self.dirty:
            told = replace(told, atime=self._written, mtime=self._written)
        return replace(told, size=self._uploader.size)

    def read(self, offset: int, length: int) -> bytes | Deferred[bytes]:
        """See :meth:`IOpenFile.read`."""
        if self._closed or not self._flags & OpenFlag.READ:
            return fail(self._not_open("reading"))
        if self._reader is not None:
            return self._reader.read(offset, length)
        assert self._uploader is not None
        return Deferred.fromCoroutine(self._uploader.read(offset, length))

    def write(self, offset: int, data: bytes) -> Deferred[None] | None:
        """See :meth:`IOpenFile.write`."""
        uploader = self._uploader
        if self._closed or uploader is None:
            return fail(self._not_open("writing"))
        self._written = time.time()
        try:
            return uploader.write(
                uploader.size if self._flags & OpenFlag.APPEND else offset, data
            )
        except FileStoreError as error:
            return fail(error)

    def _not_open(self, what: str) -> FileStoreError:
        if self._closed:
            return FileStoreError(FileProblem.INVALID, "the file is closed")
        return FileStoreError(FileProblem.PERMISSION, f"the file is not open for {what}")

    def stat(self) -> Deferred[Attributes]:
        """See :meth:`IOpenFile.stat`."""
        return succeed(self.attributes)

    def setAttributes(self, attributes: Attributes) -> Deferred[None]:
        """See :meth:`IOpenFile.setAttributes`."""
        return Deferred.fromCoroutine(self._set(attributes))

    async def _set(self, attributes: Attributes) -> None:
        refuse_untrue(attributes, self.attributes)
        size, uploader = attributes.size, self._uploader
        if size is None or size == self.attributes.size:
            return
        if self._closed or uploader is None:
            raise self._not_open("writing")
        self._written = time.time()
        if size < uploader.size:
            await uploader.shorten(size)
        else:
            waiting = uploader.extend(size)
            if waiting is not None:
                await waiting

    def sync(self) -> Deferred[None]:
        """The server has all of it; what its disk has is its own affair."""
        if self._uploader is None or self._closed:
            return succeed(None)
        return Deferred.fromCoroutine(self._uploader.flush())

    def filesystem(self) -> Deferred[Filesystem]:
        """Not known to Jupyter."""
        return fail(unsupported("knows no file systems"))

    def close(self) -> Deferred[None]:
        """Send what was not sent yet, and end the file."""
        finishing = self._finishing
        if self._closed:
            if finishing is None:
                return succeed(None)
            # The second who closes it only waits.
            over: Deferred[None] = Deferred()
            finishing.addBoth(self._pass_on, over)
            return over
        self._closed = True
        if self._reader is not None:
            self._reader.close()
        if self._uploader is None or self._whole_when_removed:
            self._store.closed(self)
            return succeed(None)
        finishing = self._finishing = Deferred.fromCoroutine(self._uploader.finish())
        finishing.addBoth(self._finished)
        return finishing

    async def hold(self) -> Callable[[], None]:
        """Wait for what is going up, and let nothing follow until the answer is called."""
        if self._uploader is None:
            return lambda: None
        return await self._uploader.hold()

    def removed(self) -> None:
        """There is no such file any more: what is written now is nobody's."""
        if self._uploader is not None and not self._closed:
            self._whole_when_removed = self._uploader.clean
            self._uploader.abandon("the file was removed while it was written")

    def _finished(self, result: Failure | None) -> Failure | None:
        self._finishing = None
        self._store.closed(self)
        return result

    @staticmethod
    def _pass_on(result: Failure | None, over: Deferred[None]) -> Failure | None:
        over.callback(None)
        return result
