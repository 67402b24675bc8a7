"""Files of a Jupyter server without a kernel: its Contents API and ``/files``.

``/`` is the server's root directory. The API knows neither permissions nor links nor times to be
set, hides what begins with a dot if it is not told otherwise, lists no ``*~``, ``*.pyc`` nor
``__pycache__``, and appends but does not write into a file; what it cannot do is UNSUPPORTED, with
a sentence. Where its answer differs from POSIX:

- a removed file goes where the server puts it, by default into the trash of its account;
- a directory in which there is only what the server hides counts as empty;
- a rename over a file moves that aside first, so for a moment there is none of that name;
- a symbolic link is the file or directory that it leads to.
"""

from __future__ import annotations

import secrets
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred, DeferredList, fail, succeed
from twisted.logger import Logger
from zope.interface import implementer

from conchkernel.files import (
    Attributes,
    Entry,
    FileProblem,
    FileStoreError,
    IFileStore,
    IListing,
    OpenFlag,
)
from conchkernel.jupyter.contents_files import ContentsFile, refuse_untrue, unsupported
from conchkernel.jupyter.contents_reading import may_be_link, true_size
from conchkernel.jupyter.contents_rest import MAX_NAME_BYTES, Contents, Model
from conchkernel.jupyter.contents_spool import SPOOL_BYTES, Budget

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
    from pathlib import Path

    from conchkernel.files import Filesystem, IOpenFile
    from conchkernel.jupyter.rest import JupyterClient

_T = TypeVar("_T")

#: Longer than any path of Linux's.
MAX_PATH_BYTES = 4096
#: Files known to be no symbolic links, by size and time.
MAX_KNOWN = 4096
#: Small files that a listing looks at, to see which are links.
MAX_LOOKED_AT = 256
#: Where Jupyter keeps checkpoints.
_CHECKPOINTS = ".ipynb_checkpoints"
#: Entries handed out at once.
_BATCH = 128
#: Of what is written and waits, some chunks: the server takes 100 MB/s at best, and what is beyond
#: waits no worse with the client.
_BYTES_UNDER_WAY = 2 * 1024 * 1024
#: Bytes copied at once by copy-data.
_COPY_BYTES = 256 * 1024


def clean(path: bytes) -> bytes:
    """A path in its canonical form; relative ones begin at the root.

    :raises FileStoreError: if Jupyter's URLs cannot hold it.
    """
    if len(path) > MAX_PATH_BYTES:
        raise FileStoreError(FileProblem.NAME_TOO_LONG)
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    whole = b"/" + b"/".join(parts)
    try:
        text = whole.decode("utf-8")
    except UnicodeDecodeError:
        raise FileStoreError(
            FileProblem.INVALID, "Jupyter's API takes only names in UTF-8"
        ) from None
    if "\0" in text:
        raise FileStoreError(FileProblem.INVALID)
    return whole


@implementer(IListing)
class _Listing:
    """A directory as it was when it was opened."""

    def __init__(self, entries: deque[Entry]) -> None:
        self._entries = entries

    def next(self) -> Deferred[Sequence[Entry]]:
        """See :meth:`IListing.next`."""
        count = min(_BATCH, len(self._entries))
        return succeed([self._entries.popleft() for _ in range(count)])

    def close(self) -> Deferred[None]:
        """See :meth:`IListing.close`."""
        self._entries.clear()
        return succeed(None)


@implementer(IFileStore)
class ContentsFileStore:
    """See :class:`IFileStore`.

    :param client: a server that was found; its owner closes it, after the store.
    :param spoolDirectory: for what cannot go up in order; the system's choice if not given.
    :param spoolBytes: how much that may be, for all files together.
    """

    _log = Logger()

    home = b"/"
    bytesUnderWay = _BYTES_UNDER_WAY
    features = frozenset({"offset-writes", "sync"})

    def __init__(
        self,
        reactor: Any,
        client: JupyterClient,
        spoolDirectory: Path | None = None,
        *,
        spoolBytes: int = SPOOL_BYTES,
    ) -> None:
        self.contents = Contents(reactor, client)
        self.budget = Budget(spoolBytes, spoolDirectory)
        self._files: set[ContentsFile] = set()
        self._plain: dict[bytes, tuple[int | None, float | None]] = {}
        self._closed = False

    def probe(self) -> Deferred[None]:
        """Whether the server has files at all.

        Fails with UNSUPPORTED if it has no such API (a kernel gateway).
        """
        return self._run(self._probe())

    async def _probe(self) -> None:
        await self.contents.stat(b"/")

    def _run(self, work: Coroutine[Deferred[Any], Any, _T]) -> Deferred[_T]:
        if self._closed:
            work.close()
            return fail(FileStoreError(FileProblem.CONNECTION_LOST, "the file store is closed"))
        return Deferred.fromCoroutine(work)

    # --- what there is -----------------------------------------------------------------------

    def stat(self, path: bytes, *, follow: bool = True) -> Deferred[Attributes]:
        """See :meth:`IFileStore.stat`; links are always followed."""
        return self._run(self._stat(path))

    async def _stat(self, path: bytes) -> Attributes:
        path = clean(path)
        for file in self._files:
            # The API may be behind what this session has written.
            if file.path == path and file.dirty:
                return file.attributes
        return await self._seen(path)

    async def _seen(self, path: bytes) -> Attributes:
        model = await self.contents.stat(path)
        return await self._true(path, model)

    async def _true(self, path: bytes, model: Model) -> Attributes:
        """With the size and time of what a symbolic link leads to."""
        if model.directory or self._plain.get(path) == (model.size, model.mtime):
            return model.attributes
        size, mtime = await true_size(self.contents, path, model)
        if size == model.size:
            if len(self._plain) >= MAX_KNOWN:
                self._plain.clear()
            self._plain[path] = size, model.mtime
        return replace(model.attributes, size=size, atime=mtime, mtime=mtime)

    def listDirectory(self, path: bytes) -> Deferred[IListing]:
        """See :meth:`IFileStore.listDirectory`."""
        return self._run(self._list(path))

    async def _list(self, path: bytes) -> IListing:
        path = clean(path)
        found: dict[bytes, Model] = {}
        for model in await self._children(path):
            try:
                name = model.name.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                continue
            # A name that leads elsewhere is no name, whoever sends it.
            if name not in (b"", b".", b"..") and not set(b"/\0") & set(name):
                found[name] = model
        links = await self._links(path, found)
        return _Listing(
            deque(
                Entry(name, links.get(name) or model.attributes) for name, model in found.items()
            )
        )

    async def _links(self, path: bytes, found: dict[bytes, Model]) -> dict[bytes, Attributes]:
        """The true sizes of what may be symbolic links: a client reads no further than it is told.

        The API does not say which they are; only in a directory with few small files are they
        all looked at.
        """
        above = path.rstrip(b"/") + b"/"
        small = [name for name, model in found.items() if may_be_link(model)]
        unknown = [
            name
            for name in small
            if self._plain.get(above + name) != (found[name].size, found[name].mtime)
        ]
        if len(unknown) > MAX_LOOKED_AT:
            return {}
        asked = [
            Deferred.fromCoroutine(self._true(above + name, found[name])) for name in unknown
        ]
        told = await DeferredList(asked, consumeErrors=True)
        return {name: one for name, (good, one) in zip(unknown, told, strict=True) if good}

    async def _children(self, path: bytes) -> list[Model]:
        """What is in a directory, but for the empty directory for checkpoints that Jupyter makes
        beside whatever it removes or renames, and makes again when that is removed."""
        children = await self._listed(path)
        for child in children:
            if child.name == _CHECKPOINTS and child.directory and len(path) < MAX_PATH_BYTES:
                kept = path.rstrip(b"/") + b"/" + _CHECKPOINTS.encode("ascii")
                try:
                    empty = not await self._children(kept)
                except FileStoreError:
                    break  # It is there, whatever is in it.
                return [one for one in children if one is not child] if empty else children
        return children

    async def _listed(self, path: bytes) -> list[Model]:
        try:
            return await self.contents.list(path)
        except FileStoreError as error:
            if error.problem is FileProblem.FAILURE:
                model = await self.contents.stat(path)
                if not model.directory:
                    raise FileStoreError(FileProblem.NOT_DIRECTORY) from None
            raise

    def realPath(self, path: bytes) -> Deferred[bytes]:
        """See :meth:`IFileStore.realPath`; a symbolic link stays as it is."""
        try:
            return succeed(clean(path))
        except FileStoreError as error:
            return fail(error)

    # --- opening -----------------------------------------------------------------------------

    def open(
        self, path: bytes, flags: OpenFlag, attributes: Attributes
    ) -> Deferred[IOpenFile]:
        """See :meth:`IFileStore.open`; a new file's mode is the server's choice."""
        return self._run(self._open(path, flags))

    async def _open(self, path: bytes, flags: OpenFlag) -> IOpenFile:
        path = clean(path)
        if path == b"/":
            raise FileStoreError(FileProblem.IS_DIRECTORY)
        writing = bool(flags & (OpenFlag.WRITE | OpenFlag.APPEND))
        for file in [one for one in self._files if one.path == path and one.dirty]:
            await file.sync()
        create, truncate = OpenFlag.CREATE in flags, writing and OpenFlag.TRUNCATE in flags
        model: Model | None = None
        if not (create and truncate) or OpenFlag.EXCLUSIVE in flags:
            model = await self._existing(path, create=create)
            if model is not None and create and OpenFlag.EXCLUSIVE in flags:
                raise FileStoreError(FileProblem.EXISTS)
            if model is not None and model.directory:
                raise FileStoreError(FileProblem.IS_DIRECTORY)
        size: int | None = None
        if model is None or truncate:
            model, size = await self.contents.put(path, b""), 0
        if writing and not model.writable:
            raise FileStoreError(FileProblem.PERMISSION)
        if size is None:
            size = (await self._true(path, model)).size or 0
        opened = ContentsFile(self, path, flags, model, size)
        self._files.add(opened)
        return opened

    async def _existing(self, path: bytes, *, create: bool) -> Model | None:
        try:
            return await self.contents.stat(path)
        except FileStoreError as error:
            if error.problem is FileProblem.NOT_FOUND and create:
                return None
            raise

    def closed(self, file: ContentsFile) -> None:
        """A file of ours has been closed."""
        self._files.discard(file)

    # --- changes -----------------------------------------------------------------------------

    def setAttributes(
        self, path: bytes, attributes: Attributes, *, follow: bool = True
    ) -> Deferred[None]:
        """See :meth:`IFileStore.setAttributes`; only the size can be changed."""
        return self._run(self._set(path, attributes))

    async def _set(self, path: bytes, attributes: Attributes) -> None:
        path = clean(path)
        now = await self._stat(path)
        refuse_untrue(attributes, now)
        if attributes.size is None or attributes.size == now.size:
            return
        file = await self._open(path, OpenFlag.WRITE)
        try:
            await file.setAttributes(Attributes(size=attributes.size))
        finally:
            await file.close()

    def remove(self, path: bytes) -> Deferred[None]:
        """See :meth:`IFileStore.remove`."""
        return self._run(self._remove(path))

    async def _remove(self, path: bytes) -> None:
        path = clean(path)
        if (await self.contents.stat(path)).directory:
            raise FileStoreError(FileProblem.IS_DIRECTORY)
        async with self._held(path):
            await self.contents.delete(path)
            self._gone(path)

    @asynccontextmanager
    async def _held(self, *paths: bytes) -> AsyncIterator[None]:
        """Nothing goes up meanwhile of the files that are open there, or below: it would arrive
        under a name that is no longer theirs."""
        files = [
            file
            for file in self._files
            if any(file.path == path or file.path.startswith(path + b"/") for path in paths)
        ]
        releases: list[Callable[[], None]] = []
        try:
            for file in files:
                releases.append(await file.hold())
            yield
        finally:
            for release in releases:
                release()

    def _gone(self, path: bytes) -> None:
        """What is still to be written there must not make it anew."""
        for file in self._files:
            if file.path == path:
                file.removed()

    def makeDirectory(self, path: bytes, attributes: Attributes) -> Deferred[None]:
        """See :meth:`IFileStore.makeDirectory`; its mode is the server's choice."""
        return self._run(self._make_directory(path))

    async def _make_directory(self, path: bytes) -> None:
        path = clean(path)
        # The API is content with a directory that is there.
        if await self._existing(path, create=True) is not None:
            raise FileStoreError(FileProblem.EXISTS)
        await self.contents.make_directory(path)

    def removeDirectory(self, path: bytes) -> Deferred[None]:
        """See :meth:`IFileStore.removeDirectory`."""
        return self._run(self._remove_directory(path))

    async def _remove_directory(self, path: bytes) -> None:
        path = clean(path)
        if path == b"/":
            raise FileStoreError(FileProblem.PERMISSION, "this is the root of the server's files")
        # The API deletes a directory with all that is in it.
        if await self._children(path):
            raise FileStoreError(FileProblem.NOT_EMPTY)
        await self.contents.delete(path)

    def rename(self, old: bytes, new: bytes, *, overwrite: bool) -> Deferred[None]:
        """See :meth:`IFileStore.rename`.

        The API does not rename over a file, so with ``overwrite`` that is moved aside and, when
        the new one is in its place, removed. Between the two there is no file of that name; if
        the second move fails the first is taken back. A gateway that dies there leaves the old
        file as ``NAME.XXXXXXXX.replaced``.
        """
        return self._run(self._rename(old, new, overwrite=overwrite))

    async def _rename(self, old: bytes, new: bytes, *, overwrite: bool) -> None:
        old, new = clean(old), clean(new)
        if old == new:
            await self.contents.stat(old)
            return
        if b"/" in (old, new) or new.startswith(old + b"/"):
            raise FileStoreError(FileProblem.INVALID)
        async with self._held(old, new):
            try:
                await self.contents.rename(old, new)
            except FileStoreError as error:
                if error.problem is not FileProblem.EXISTS or not overwrite:
                    raise
                await self._replace(old, new)
                self._gone(new)
            for file in self._files:
                if file.path == old or file.path.startswith(old + b"/"):
                    file.path = new + file.path[len(old) :]

    async def _replace(self, old: bytes, new: bytes) -> None:
        source, target = await self.contents.stat(old), await self.contents.stat(new)
        if target.directory and not source.directory:
            raise FileStoreError(FileProblem.IS_DIRECTORY)
        if source.directory and not target.directory:
            raise FileStoreError(FileProblem.NOT_DIRECTORY)
        if target.directory and await self._children(new):
            raise FileStoreError(FileProblem.NOT_EMPTY)
        suffix = f".{secrets.token_hex(4)}.replaced".encode("ascii")
        directory, _, name = new.rpartition(b"/")
        name = name[: MAX_NAME_BYTES - len(suffix)].decode("utf-8", "ignore").encode("utf-8")
        aside = directory + b"/" + name + suffix
        await self.contents.rename(new, aside)
        try:
            await self.contents.rename(old, new)
        except Exception:
            try:
                await self.contents.rename(aside, new)
            except FileStoreError as error:
                left = aside.decode("utf-8")
                raise FileStoreError(
                    FileProblem.FAILURE, f"nothing was renamed, and the file is now {left}"
                ) from error
            raise
        try:
            await self.contents.delete(aside)
        except FileStoreError as error:
            self._log.warn("a replaced file is left behind: {error}", error=str(error))

    # --- what the API cannot -----------------------------------------------------------------

    def readLink(self, path: bytes) -> Deferred[bytes]:
        """See :meth:`IFileStore.readLink`."""
        return fail(unsupported("knows no symbolic links"))

    def symbolicLink(self, target: bytes, path: bytes) -> Deferred[None]:
        """See :meth:`IFileStore.symbolicLink`."""
        return fail(unsupported("makes no symbolic links"))

    def hardLink(self, existing: bytes, path: bytes) -> Deferred[None]:
        """See :meth:`IFileStore.hardLink`."""
        return fail(unsupported("makes no links"))

    def filesystem(self, path: bytes) -> Deferred[Filesystem]:
        """See :meth:`IFileStore.filesystem`."""
        return fail(unsupported("knows no file systems"))

    def names(
        self, uids: Sequence[int], gids: Sequence[int]
    ) -> Deferred[tuple[Sequence[str], Sequence[str]]]:
        """See :meth:`IFileStore.names`; all are unknown."""
        return succeed(([""] * len(uids), [""] * len(gids)))

    def homeOf(self, user: bytes) -> Deferred[bytes]:
        """See :meth:`IFileStore.homeOf`."""
        if user:
            return fail(unsupported("knows no accounts"))
        return succeed(self.home)

    # --- the rest ----------------------------------------------------------------------------

    def copy(
        self, source: IOpenFile, offset: int, length: int, target: IOpenFile, target_offset: int
    ) -> Deferred[None]:
        """See :meth:`IFileStore.copy`; the bytes come down and go up again."""
        return self._run(self._copy(source, offset, length, target, target_offset))

    async def _copy(
        self, source: IOpenFile, offset: int, length: int, target: IOpenFile, target_offset: int
    ) -> None:
        left = length or None
        while left is None or left > 0:
            count = _COPY_BYTES if left is None else min(left, _COPY_BYTES)
            data = source.read(offset, count)
            if isinstance(data, Deferred):
                data = await data
            if not data:
                return
            waiting = target.write(target_offset, data)
            if waiting is not None:
                await waiting
            offset += len(data)
            target_offset += len(data)
            if left is not None:
                left -= len(data)

    def close(self) -> Deferred[None]:
        """As a process that ends: what was written goes up, then the connections are closed.

        Cancelling it gives up what has not gone up.
        """
        self._closed = True
        closing = DeferredList([file.close() for file in list(self._files)], consumeErrors=True)

        def closed(_: object) -> Deferred[None]:
            return self.contents.close()

        return closing.addBoth(closed)
