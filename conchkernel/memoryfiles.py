"""Files in memory: a whole store, for tests of what is above stores.

It does what a POSIX system does, in order or, while :attr:`MemoryFileStore.delayed` is set, when
and in which order the test says. Nothing here needs a reactor, a disk or a kernel.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from conchkernel.files import (
    BYTES_UNDER_WAY,
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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_T = TypeVar("_T")

_MAX_LINKS = 40
_BLOCK_BYTES = 4096


@dataclass(eq=False)
class Node:
    """A file, directory or link."""

    mode: int
    data: bytearray = field(default_factory=bytearray)
    children: dict[bytes, Node] = field(default_factory=dict)
    target: bytes = b""
    uid: int = 1000
    gid: int = 1000
    atime: float = 0.0
    mtime: float = 0.0
    links: int = 1

    def attributes(self) -> Attributes:
        """As stat(2) tells them."""
        size = len(self.target) if stat.S_ISLNK(self.mode) else len(self.data)
        return Attributes(
            size=size, uid=self.uid, gid=self.gid, mode=self.mode, atime=self.atime,
            mtime=self.mtime, owner="joe", group="users", links=self.links,
        )  # fmt: skip

    def change(self, attributes: Attributes) -> None:
        """As truncate(2), chown(2), chmod(2) and utime(2) do."""
        if attributes.size is not None:
            if not stat.S_ISREG(self.mode):
                raise FileStoreError(FileProblem.IS_DIRECTORY)
            if attributes.size > 1 << 30:
                raise FileStoreError(FileProblem.NO_SPACE)
            del self.data[attributes.size :]
            self.data += bytes(attributes.size - len(self.data))
        if attributes.uid is not None and attributes.gid is not None:
            self.uid, self.gid = attributes.uid, attributes.gid
        if attributes.mode is not None:
            self.mode = stat.S_IFMT(self.mode) | stat.S_IMODE(attributes.mode)
        if attributes.mtime is not None:
            self.atime, self.mtime = attributes.atime or 0.0, attributes.mtime


@implementer(IOpenFile)
class MemoryFile:
    """An open file."""

    def __init__(self, store: MemoryFileStore, node: Node, flags: OpenFlag) -> None:
        self.node = node
        self.flags = flags
        self.isClosed = False
        self._store = store

    def read(self, offset: int, length: int) -> bytes | Deferred[bytes]:
        if self._store.delayed:
            return self._store.do(self._read, offset, length)
        return self._read(offset, length)

    def _read(self, offset: int, length: int) -> bytes:
        self._check(OpenFlag.READ)
        return bytes(self.node.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> Deferred[None] | None:
        if self._store.delayed:
            return self._store.do(self._write, offset, data)
        self._write(offset, data)
        return None

    def _write(self, offset: int, data: bytes) -> None:
        self._check(OpenFlag.WRITE)
        content = self.node.data
        if self.flags & OpenFlag.APPEND:
            offset = len(content)
        if offset + len(data) > 1 << 30:
            raise FileStoreError(FileProblem.NO_SPACE)
        if offset > len(content):
            content += bytes(offset - len(content))
        content[offset : offset + len(data)] = data

    def stat(self) -> Deferred[Attributes]:
        return self._store.do(self.node.attributes)

    def setAttributes(self, attributes: Attributes) -> Deferred[None]:
        return self._store.do(self.node.change, attributes)

    def sync(self) -> Deferred[None]:
        return self._store.do(self._check, OpenFlag(0))

    def filesystem(self) -> Deferred[Filesystem]:
        return self._store.filesystem(b"/")

    def close(self) -> Deferred[None]:
        return self._store.do(self._close)

    def _close(self) -> None:
        self._check(OpenFlag(0))
        self.isClosed = True
        self._store.opened.discard(self)

    def _check(self, flag: OpenFlag) -> None:
        if self.isClosed or not (flag & self.flags or not flag):
            raise FileStoreError(FileProblem.FAILURE, "bad file descriptor")


@implementer(IListing)
class MemoryListing:
    """A directory being read."""

    def __init__(self, store: MemoryFileStore, node: Node) -> None:
        self._store = store
        self._left = [
            Entry(b".", node.attributes()),
            Entry(b"..", node.attributes()),
            *[Entry(name, child.attributes()) for name, child in sorted(node.children.items())],
        ]

    def next(self) -> Deferred[Sequence[Entry]]:
        return self._store.do(self._next)

    def _next(self) -> Sequence[Entry]:
        count = self._store.listedAtOnce
        entries, self._left = self._left[:count], self._left[count:]
        return entries

    def close(self) -> Deferred[None]:
        return self._store.do(self._store.opened.discard, self)


@implementer(IFileStore)
class MemoryFileStore:
    """Files in memory.

    :ivar opened: what is open.
    :ivar delayed: while set, nothing is done before :meth:`release`.
    :ivar waiting: what is to be done, in the order in which it was asked.
    :ivar cancelled: how many were given up while they waited.
    """

    home = b"/home/joe"
    bytesUnderWay = BYTES_UNDER_WAY

    def __init__(self, features: frozenset[str] | None = None) -> None:
        self.features = (
            frozenset({"modes", "links", "hardlinks", "statvfs", "sync", "times", "offset-writes"})
            if features is None
            else features
        )
        self.root = Node(stat.S_IFDIR | 0o755)
        self.opened: set[MemoryFile | MemoryListing] = set()
        self.delayed = False
        self.waiting: list[tuple[Deferred[Any], Callable[..., Any], tuple[Any, ...]]] = []
        self.cancelled = 0
        self.listedAtOnce = 100
        self.isClosed = False
        self._makeDirectory(b"/home", Attributes())
        self._makeDirectory(self.home, Attributes())

    # --- for the test ------------------------------------------------------------------------

    def do(self, call: Callable[..., _T], *arguments: Any) -> Deferred[_T]:
        """Do it now or later."""
        if self.delayed:
            waiting: Deferred[_T] = Deferred(self._cancel)
            self.waiting.append((waiting, call, arguments))
            return waiting
        try:
            return succeed(call(*arguments))
        except FileStoreError as error:
            return fail(error)

    def release(self, index: int = 0) -> None:
        """Do one of those that wait."""
        waiting, call, arguments = self.waiting.pop(index)
        try:
            result = call(*arguments)
        except FileStoreError as error:
            waiting.errback(error)
        else:
            waiting.callback(result)

    def _cancel(self, deferred: Deferred[Any]) -> None:
        self.waiting = [one for one in self.waiting if one[0] is not deferred]
        self.cancelled += 1

    def put(self, path: bytes, data: bytes) -> None:
        """Have a file."""
        parent, name = self._parent(path)
        parent.children[name] = Node(stat.S_IFREG | 0o644, bytearray(data))

    def get(self, path: bytes) -> bytes:
        """A file's bytes."""
        return bytes(self._node(path).data)

    # --- names -------------------------------------------------------------------------------

    def _walk(self, path: bytes, follow: bool, depth: int = 0) -> tuple[list[bytes], Node | None]:
        """The words of the true path, and what is there; only the last may be missing."""
        words: list[bytes] = []
        nodes = [self.root]
        todo = [word for word in path.split(b"/") if word not in (b"", b".")]
        while todo:
            word = todo.pop(0)
            here = nodes[-1]
            if not stat.S_ISDIR(here.mode):
                raise FileStoreError(FileProblem.NOT_DIRECTORY)
            if word == b"..":
                if words:
                    words.pop()
                    nodes.pop()
                continue
            child = here.children.get(word)
            if child is None:
                if todo:
                    raise FileStoreError(FileProblem.NOT_FOUND)
                return [*words, word], None
            if stat.S_ISLNK(child.mode) and (todo or follow):
                if depth == _MAX_LINKS:
                    raise FileStoreError(FileProblem.LOOP)
                begin = b"" if child.target[:1] == b"/" else b"/" + b"/".join(words) + b"/"
                rest = b"/".join([child.target, *todo])
                return self._walk(begin + rest, follow, depth + 1)
            words.append(word)
            nodes.append(child)
        return words, nodes[-1]

    def _node(self, path: bytes, follow: bool = True) -> Node:
        node = self._walk(path, follow)[1]
        if node is None:
            raise FileStoreError(FileProblem.NOT_FOUND)
        return node

    def _parent(self, path: bytes, follow: bool = False) -> tuple[Node, bytes]:
        words, _ = self._walk(path, follow)
        if not words:
            raise FileStoreError(FileProblem.IS_DIRECTORY)
        return self._node(b"/" + b"/".join(words[:-1])), words[-1]

    def _new(self, path: bytes, node: Node) -> None:
        parent, name = self._parent(path)
        if name in parent.children:
            raise FileStoreError(FileProblem.EXISTS)
        parent.children[name] = node

    # --- the store ---------------------------------------------------------------------------

    def open(self, path: bytes, flags: OpenFlag, attributes: Attributes) -> Deferred[IOpenFile]:
        return self.do(self._open, path, flags, attributes)

    def _open(self, path: bytes, flags: OpenFlag, attributes: Attributes) -> IOpenFile:
        parent, name = self._parent(path, not flags & OpenFlag.EXCLUSIVE)
        node = parent.children.get(name)
        if node is None:
            if not flags & OpenFlag.CREATE:
                raise FileStoreError(FileProblem.NOT_FOUND)
            mode = 0o644 if attributes.mode is None else attributes.mode
            node = parent.children[name] = Node(stat.S_IFREG | mode)
        elif flags & OpenFlag.CREATE and flags & OpenFlag.EXCLUSIVE:
            raise FileStoreError(FileProblem.EXISTS)
        if stat.S_ISDIR(node.mode):
            raise FileStoreError(FileProblem.IS_DIRECTORY)
        if flags & OpenFlag.TRUNCATE:
            node.data.clear()
        file = MemoryFile(self, node, flags)
        self.opened.add(file)
        return file

    def stat(self, path: bytes, *, follow: bool = True) -> Deferred[Attributes]:
        return self.do(lambda: self._node(path, follow).attributes())

    def setAttributes(
        self, path: bytes, attributes: Attributes, *, follow: bool = True
    ) -> Deferred[None]:
        return self.do(lambda: self._node(path, follow).change(attributes))

    def listDirectory(self, path: bytes) -> Deferred[IListing]:
        return self.do(self._listDirectory, path)

    def _listDirectory(self, path: bytes) -> IListing:
        node = self._node(path)
        if not stat.S_ISDIR(node.mode):
            raise FileStoreError(FileProblem.NOT_DIRECTORY)
        listing = MemoryListing(self, node)
        self.opened.add(listing)
        return listing

    def remove(self, path: bytes) -> Deferred[None]:
        return self.do(self._remove, path, False)

    def removeDirectory(self, path: bytes) -> Deferred[None]:
        return self.do(self._remove, path, True)

    def _remove(self, path: bytes, isDirectory: bool) -> None:
        parent, name = self._parent(path)
        node = self._node(path, False)
        if stat.S_ISDIR(node.mode) is not isDirectory:
            problem = FileProblem.NOT_DIRECTORY if isDirectory else FileProblem.IS_DIRECTORY
            raise FileStoreError(problem)
        if node.children:
            raise FileStoreError(FileProblem.NOT_EMPTY)
        node.links -= 1
        del parent.children[name]

    def makeDirectory(self, path: bytes, attributes: Attributes) -> Deferred[None]:
        return self.do(self._makeDirectory, path, attributes)

    def _makeDirectory(self, path: bytes, attributes: Attributes) -> None:
        mode = 0o755 if attributes.mode is None else attributes.mode
        self._new(path, Node(stat.S_IFDIR | mode))

    def rename(self, old: bytes, new: bytes, *, overwrite: bool) -> Deferred[None]:
        return self.do(self._rename, old, new, overwrite)

    def _rename(self, old: bytes, new: bytes, overwrite: bool) -> None:
        node = self._node(old, False)
        oldWords, newWords = self._walk(old, False)[0], self._walk(new, False)[0]
        parent, name = self._parent(old)
        newParent, newName = self._parent(new)
        there = newParent.children.get(newName)
        if there is not None and not overwrite:
            raise FileStoreError(FileProblem.EXISTS)
        if there is node:
            return
        if newWords[: len(oldWords)] == oldWords:
            raise FileStoreError(FileProblem.INVALID)
        if there is not None and there.children:
            raise FileStoreError(FileProblem.NOT_EMPTY)
        if there is not None and stat.S_ISDIR(there.mode) is not stat.S_ISDIR(node.mode):
            raise FileStoreError(FileProblem.IS_DIRECTORY)
        del parent.children[name]
        newParent.children[newName] = node

    def readLink(self, path: bytes) -> Deferred[bytes]:
        return self.do(self._readLink, path)

    def _readLink(self, path: bytes) -> bytes:
        node = self._node(path, False)
        if not stat.S_ISLNK(node.mode):
            raise FileStoreError(FileProblem.INVALID)
        return node.target

    def symbolicLink(self, target: bytes, path: bytes) -> Deferred[None]:
        return self.do(self._new, path, Node(stat.S_IFLNK | 0o777, target=target))

    def hardLink(self, existing: bytes, path: bytes) -> Deferred[None]:
        return self.do(self._hardLink, existing, path)

    def _hardLink(self, existing: bytes, path: bytes) -> None:
        node = self._node(existing, False)
        if stat.S_ISDIR(node.mode):
            raise FileStoreError(FileProblem.PERMISSION)
        self._new(path, node)
        node.links += 1

    def realPath(self, path: bytes) -> Deferred[bytes]:
        return self.do(self._realPath, path)

    def _realPath(self, path: bytes) -> bytes:
        if path[:1] != b"/":
            path = self.home + b"/" + path
        return b"/" + b"/".join(self._walk(path, True)[0])

    def filesystem(self, path: bytes) -> Deferred[Filesystem]:
        return self.do(self._filesystem, path)

    def _filesystem(self, path: bytes) -> Filesystem:
        self._node(path)
        return Filesystem(_BLOCK_BYTES, _BLOCK_BYTES, 1000, 500, 400, 300, 200, 100, 7, 0, 255)

    def names(
        self, uids: Sequence[int], gids: Sequence[int]
    ) -> Deferred[tuple[Sequence[str], Sequence[str]]]:
        return self.do(
            lambda: (
                ["joe" if uid == 1000 else "" for uid in uids],
                ["users" if gid == 1000 else "" for gid in gids],
            )
        )

    def copy(
        self, source: IOpenFile, offset: int, length: int, target: IOpenFile, target_offset: int
    ) -> Deferred[None]:
        return self.do(self._copy, source, offset, length, target, target_offset)

    def _copy(
        self, source: MemoryFile, offset: int, length: int, target: MemoryFile, begin: int
    ) -> None:
        length = length or max(len(source.node.data) - offset, 0)
        target._write(begin, source._read(offset, length))

    def homeOf(self, user: bytes) -> Deferred[bytes]:
        return self.do(lambda: self.home if user in (b"", b"joe") else b"")

    def close(self) -> Deferred[None]:
        self.isClosed = True
        self.opened.clear()
        return succeed(None)
