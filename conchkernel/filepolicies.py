"""What an operator forbids, as stores around stores: writing, and leaving a directory.

Each has the interface of what it wraps, so policies add up and no store knows of them. A wrapper
sees paths only: it cannot hinder that a directory becomes a link between its look and the store's
call. Where the other side of that race is an adversary, the store itself must hold the jail.
"""

from __future__ import annotations

import os.path
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred, fail
from zope.interface import implementer

from conchkernel.files import FileProblem, FileStoreError, IFileStore, IOpenFile, OpenFlag

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from conchkernel.files import Attributes, Filesystem, IListing

_T = TypeVar("_T")

#: statvfs(3)'s ST_RDONLY, with the number that statvfs@openssh.com gives it.
READ_ONLY_FLAG = 1


def _refused() -> Deferred[Any]:
    return fail(FileStoreError(FileProblem.READ_ONLY, "this gateway does not change files"))


def _marked(filesystem: Filesystem) -> Filesystem:
    return replace(filesystem, flags=filesystem.flags | READ_ONLY_FLAG)


@implementer(IOpenFile)
class ReadOnlyFile:
    """An open file that is only read."""

    def __init__(self, file: IOpenFile) -> None:
        self.read: Callable[[int, int], bytes | Deferred[bytes]] = file.read
        self._file = file

    def write(self, offset: int, data: bytes) -> Deferred[None] | None:
        return _refused()

    def stat(self) -> Deferred[Attributes]:
        return self._file.stat()

    def setAttributes(self, attributes: Attributes) -> Deferred[None]:
        return _refused()

    def sync(self) -> Deferred[None]:
        return _refused()

    def filesystem(self) -> Deferred[Filesystem]:
        return self._file.filesystem().addCallback(_marked)

    def close(self) -> Deferred[None]:
        return self._file.close()


@implementer(IFileStore)
class ReadOnlyFileStore:
    """Files that can be looked at.

    :param store: where they are; closed with this.
    """

    def __init__(self, store: IFileStore) -> None:
        self._store = store
        self.home: bytes = store.home
        self.bytesUnderWay: int = store.bytesUnderWay
        self.features: frozenset[str] = store.features - {"hardlinks", "sync", "offset-writes"}
        self.stat = store.stat
        self.listDirectory = store.listDirectory
        self.readLink = store.readLink
        self.realPath = store.realPath
        self.names = store.names
        self.homeOf = store.homeOf
        self.close = store.close

    def open(self, path: bytes, flags: OpenFlag, attributes: Attributes) -> Deferred[IOpenFile]:
        if flags & ~OpenFlag.READ:
            return _refused()
        return self._store.open(path, flags, attributes).addCallback(ReadOnlyFile)

    def setAttributes(
        self, path: bytes, attributes: Attributes, *, follow: bool = True
    ) -> Deferred[None]:
        return _refused()

    def remove(self, path: bytes) -> Deferred[None]:
        return _refused()

    def makeDirectory(self, path: bytes, attributes: Attributes) -> Deferred[None]:
        return _refused()

    def removeDirectory(self, path: bytes) -> Deferred[None]:
        return _refused()

    def rename(self, old: bytes, new: bytes, *, overwrite: bool) -> Deferred[None]:
        return _refused()

    def symbolicLink(self, target: bytes, path: bytes) -> Deferred[None]:
        return _refused()

    def hardLink(self, existing: bytes, path: bytes) -> Deferred[None]:
        return _refused()

    def filesystem(self, path: bytes) -> Deferred[Filesystem]:
        return self._store.filesystem(path).addCallback(_marked)

    def copy(
        self, source: IOpenFile, offset: int, length: int, target: IOpenFile, target_offset: int
    ) -> Deferred[None]:
        return _refused()


def _together(path: bytes) -> bytes:
    """A client's path with ``..`` taken by its letters, so that none is left; ``/..`` is ``/``."""
    return b"/" + os.path.normpath(b"/" + path).lstrip(b"/")


@implementer(IFileStore)
class JailedFileStore:
    """The files below a directory, which is ``/`` here.

    A link that leads out is there, can be read and removed, and is not followed. That includes
    links to absolute paths, which mean the store's, not the jail's.

    :param store: where they are; closed with this.
    :param root: a directory of the store.
    """

    def __init__(self, store: IFileStore, root: bytes) -> None:
        self._store = store
        self._root = root
        self._realRoot: bytes | None = None
        self.features: frozenset[str] = store.features
        self.bytesUnderWay: int = store.bytesUnderWay
        begin, home = root.rstrip(b"/") + b"/", store.home.rstrip(b"/") + b"/"
        #: The store's own, if it is within.
        self.home = b"/" + home[len(begin) :].rstrip(b"/") if home.startswith(begin) else b"/"
        self.names = store.names
        self.copy = store.copy
        self.close = store.close

    # --- paths -------------------------------------------------------------------------------

    async def _found(self, path: bytes, follow: bool) -> bytes:
        """The store's path of what a client means.

        :param follow: of what a link leads to, not of the link itself.
        :raises FileStoreError: it is not in the jail.
        """
        root = self._realRoot
        if root is None:
            root = self._realRoot = (await self._store.realPath(self._root)).rstrip(b"/")
        path = _together(path)
        if path == b"/":
            return root or b"/"
        if follow:
            found = await self._store.realPath(root + path)
        else:
            parent, _, name = path.rpartition(b"/")
            above = await self._store.realPath(root + parent or b"/")
            found = above.rstrip(b"/") + b"/" + name
        if not (found + b"/").startswith(root + b"/"):
            raise FileStoreError(FileProblem.PERMISSION, "that leads out of the gateway's files")
        return found

    async def _name(self, path: bytes) -> bytes:
        """The store's path of a name that is to be made or to go."""
        if _together(path) == b"/":
            raise FileStoreError(FileProblem.PERMISSION, "that is the root of all files here")
        return await self._found(path, False)

    def _with(
        self, path: bytes, follow: bool, call: Callable[[bytes], Awaitable[_T]]
    ) -> Deferred[_T]:
        async def found() -> _T:
            return await call(await self._found(path, follow))

        return Deferred.fromCoroutine(found())

    def _named(self, path: bytes, call: Callable[[bytes], Awaitable[_T]]) -> Deferred[_T]:
        async def named() -> _T:
            return await call(await self._name(path))

        return Deferred.fromCoroutine(named())

    # --- the store ---------------------------------------------------------------------------

    def open(self, path: bytes, flags: OpenFlag, attributes: Attributes) -> Deferred[IOpenFile]:
        # A file that must be new is not one that a link leads to.
        follow = not (flags & OpenFlag.CREATE and flags & OpenFlag.EXCLUSIVE)
        return self._with(path, follow, lambda p: self._store.open(p, flags, attributes))

    def stat(self, path: bytes, *, follow: bool = True) -> Deferred[Attributes]:
        return self._with(path, follow, lambda p: self._store.stat(p, follow=follow))

    def setAttributes(
        self, path: bytes, attributes: Attributes, *, follow: bool = True
    ) -> Deferred[None]:
        return self._with(
            path, follow, lambda p: self._store.setAttributes(p, attributes, follow=follow)
        )

    def listDirectory(self, path: bytes) -> Deferred[IListing]:
        return self._with(path, True, self._store.listDirectory)

    def remove(self, path: bytes) -> Deferred[None]:
        return self._named(path, self._store.remove)

    def makeDirectory(self, path: bytes, attributes: Attributes) -> Deferred[None]:
        return self._named(path, lambda p: self._store.makeDirectory(p, attributes))

    def removeDirectory(self, path: bytes) -> Deferred[None]:
        return self._named(path, self._store.removeDirectory)

    def rename(self, old: bytes, new: bytes, *, overwrite: bool) -> Deferred[None]:
        return Deferred.fromCoroutine(self._rename(old, new, overwrite))

    async def _rename(self, old: bytes, new: bytes, overwrite: bool) -> None:
        names = await self._name(old), await self._name(new)
        await self._store.rename(*names, overwrite=overwrite)

    def readLink(self, path: bytes) -> Deferred[bytes]:
        return self._with(path, False, self._store.readLink)

    def symbolicLink(self, target: bytes, path: bytes) -> Deferred[None]:
        return self._named(path, lambda p: self._store.symbolicLink(target, p))

    def hardLink(self, existing: bytes, path: bytes) -> Deferred[None]:
        return Deferred.fromCoroutine(self._hardLink(existing, path))

    async def _hardLink(self, existing: bytes, path: bytes) -> None:
        names = await self._name(existing), await self._name(path)
        await self._store.hardLink(*names)

    def realPath(self, path: bytes) -> Deferred[bytes]:
        if path[:1] != b"/":
            path = self.home.rstrip(b"/") + b"/" + path

        async def found() -> bytes:
            real = await self._found(path, True)
            assert self._realRoot is not None
            return real[len(self._realRoot) :] or b"/"

        return Deferred.fromCoroutine(found())

    def filesystem(self, path: bytes) -> Deferred[Filesystem]:
        return self._with(path, True, self._store.filesystem)

    def homeOf(self, user: bytes) -> Deferred[bytes]:
        return Deferred.fromCoroutine(self._homeOf(user))

    async def _homeOf(self, user: bytes) -> bytes:
        if not user:
            return self.home
        home = (await self._store.homeOf(user)).rstrip(b"/")
        await self._found(b"/", True)
        assert self._realRoot is not None
        # One that is elsewhere is none here.
        if not (home + b"/").startswith(self._realRoot + b"/"):
            return b""
        return home[len(self._realRoot) :] or b"/"
