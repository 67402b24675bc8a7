"""What each SFTP request does: from parsed fields to calls of a store, and back to an answer.

READ and WRITE are not here but in :mod:`conchkernel.ssh.sftp_server`, as they must cost nothing.
Nothing here knows in which order requests run: the table tells what each concerns, and a request
is called only when it may.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from conchkernel.files import Attributes, FileProblem, FileStoreError, OpenFlag
from conchkernel.ssh import sftp_packets as packets
from conchkernel.ssh.sftp_handles import Handle
from conchkernel.ssh.sftp_longname import longname
from conchkernel.ssh.sftp_order import place
from conchkernel.ssh.sftp_packets import MAX_DATA_BYTES, Kind, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from conchkernel.files import Entry, IFileStore, IListing, IOpenFile
    from conchkernel.ssh.sftp_handles import Handles

#: Of names, long names and attributes in one answer: what sshfs and OpenSSH take at once, and
#: little enough that an answer waits for no one.
MAX_LISTING_BYTES = 64 * 1024

_ALL_FLAGS = sum(OpenFlag)
_READ, _APPEND = int(OpenFlag.READ), int(OpenFlag.APPEND)
_READ_OR_WRITE = _READ | int(OpenFlag.WRITE)
_PERMISSIONS = 0o7777
_NOTHING = Attributes()

Answer = Reply | Deferred[Reply]


def extensionsFor(features: frozenset[str]) -> list[tuple[bytes, bytes]]:
    """What is announced, as sftp-server announces it, of what a store can do."""
    wanted = (
        (b"posix-rename@openssh.com", b"1", True),
        (b"statvfs@openssh.com", b"2", "statvfs" in features),
        (b"fstatvfs@openssh.com", b"2", "statvfs" in features),
        (b"hardlink@openssh.com", b"1", "hardlinks" in features),
        (b"fsync@openssh.com", b"1", "sync" in features),
        (b"lsetstat@openssh.com", b"1", bool(features & {"modes", "times"})),
        (b"limits@openssh.com", b"1", True),
        (b"expand-path@openssh.com", b"1", True),
        (b"copy-data", b"1", "offset-writes" in features),
        (b"home-directory", b"1", True),
        (b"users-groups-by-id@openssh.com", b"1", "modes" in features),
    )
    return [(name, version) for name, version, can in wanted if can]


class Requests:
    """The requests of one session on one store.

    Each method is given a request's fields, paths absolute and handles as what they stand for, and
    answers or fails with :class:`~conchkernel.files.FileStoreError`.

    :param clock: lets others have their turn in long copies.
    """

    def __init__(self, store: IFileStore, handles: Handles, clock: Any = None) -> None:
        self._store = store
        self._handles = handles
        self._clock = clock

    def absolute(self, path: bytes) -> bytes:
        """A client's path; what is relative begins at the store's home (section 6.2)."""
        return path if path[:1] == b"/" else self._store.home.rstrip(b"/") + b"/" + path

    # --- files and directories that are open -------------------------------------------------

    def open(self, path: bytes, flags: int, attributes: Attributes) -> Answer:
        flags &= _ALL_FLAGS
        if not flags & _READ_OR_WRITE:
            # As sftp-server does.
            flags |= _READ
        wanted = OpenFlag(flags)
        self._handles.reserve()

        def opened(file: IOpenFile) -> Reply:
            handle = Handle(
                file,
                place(path),
                writes=flags != _READ,
                appends=bool(flags & _APPEND),
            )
            return packets.handle(self._handles.add(handle))

        return self._opening(self._store.open(path, wanted, _permissions(attributes)), opened)

    def openDirectory(self, path: bytes) -> Answer:
        self._handles.reserve()

        def opened(listing: IListing) -> Reply:
            handle = Handle(listing, place(path), isListing=True)
            return packets.handle(self._handles.add(handle))

        return self._opening(self._store.listDirectory(path), opened)

    def _opening(self, opening: Deferred[Any], opened: Callable[[Any], Reply]) -> Answer:
        def done(result: Any) -> Any:
            self._handles.unreserve()
            return result

        return opening.addBoth(done).addCallback(opened)

    def readDirectory(self, handle: Handle) -> Answer:
        if handle.entries:
            return self._listed(handle)
        if handle.isAtEnd:
            return packets.END_OF_FILE

        def more(entries: Sequence[Entry]) -> Reply:
            if not entries:
                handle.isAtEnd = True
                return packets.END_OF_FILE
            handle.entries = list(reversed(entries))
            return self._listed(handle)

        return handle.opened.next().addCallback(more)

    def _listed(self, handle: Handle) -> Reply:
        """As many entries as one answer takes."""
        now = time.time()
        packed: list[bytes] = []
        room = MAX_LISTING_BYTES
        waiting = handle.entries
        while waiting and (room > 0 or not packed):
            entry = waiting[-1]
            one = packets.name(
                entry.name, longname(entry.name, entry.attributes, now), entry.attributes
            )
            if packed and len(one) > room:
                break
            waiting.pop()
            room -= len(one)
            packed.append(one)
        return packets.names(packed, len(packed))

    def close(self, handle: Handle) -> Answer:
        handle.entries = []
        return _done(handle.opened.close())

    def fileStat(self, handle: Handle) -> Answer:
        return handle.opened.stat().addCallback(packets.attributes)

    def setFileAttributes(self, handle: Handle, attributes: Attributes) -> Answer:
        return _done(handle.opened.setAttributes(_permissions(attributes)))

    def sync(self, handle: Handle) -> Answer:
        return _done(handle.opened.sync())

    def fileFilesystem(self, handle: Handle) -> Answer:
        return handle.opened.filesystem().addCallback(packets.filesystem)

    def copy(
        self, source: Handle, offset: int, length: int, target: Handle, targetOffset: int
    ) -> Answer:
        if source is target and (
            not length or (offset < targetOffset + length and targetOffset < offset + length)
        ):
            raise FileStoreError(FileProblem.INVALID, "a copy of a file over itself")
        return Deferred.fromCoroutine(
            self._copy(source.opened, offset, length, target.opened, targetOffset)
        )

    async def _copy(
        self, source: IOpenFile, offset: int, length: int, target: IOpenFile, targetOffset: int
    ) -> Reply:
        try:
            await self._store.copy(source, offset, length, target, targetOffset)
        except FileStoreError as error:
            if error.problem is not FileProblem.UNSUPPORTED:
                raise
        else:
            return packets.OK
        # The store has no better way than the client's; it still spares the client's road.
        end = offset + length if length else None
        while end is None or offset < end:
            size = MAX_DATA_BYTES if end is None else min(MAX_DATA_BYTES, end - offset)
            data = source.read(offset, size)
            if isinstance(data, Deferred):
                data = await data
            if not data:
                break
            written = target.write(targetOffset, data)
            if written is not None:
                await written
            offset += len(data)
            targetOffset += len(data)
            if self._clock is not None:
                # A store that answers at once would have everybody wait.
                await deferLater(self._clock, 0)
        return packets.OK

    # --- names -------------------------------------------------------------------------------

    def stat(self, path: bytes) -> Answer:
        return self._store.stat(path, follow=True).addCallback(packets.attributes)

    def linkStat(self, path: bytes) -> Answer:
        return self._store.stat(path, follow=False).addCallback(packets.attributes)

    def setAttributes(self, path: bytes, attributes: Attributes) -> Answer:
        return _done(self._store.setAttributes(path, _permissions(attributes), follow=True))

    def setLinkAttributes(self, path: bytes, attributes: Attributes) -> Answer:
        return _done(self._store.setAttributes(path, _permissions(attributes), follow=False))

    def remove(self, path: bytes) -> Answer:
        return _done(self._store.remove(path))

    def makeDirectory(self, path: bytes, attributes: Attributes) -> Answer:
        return _done(self._store.makeDirectory(path, _permissions(attributes)))

    def removeDirectory(self, path: bytes) -> Answer:
        return _done(self._store.removeDirectory(path))

    def rename(self, old: bytes, new: bytes) -> Answer:
        return _done(self._store.rename(old, new, overwrite=False))

    def renameOver(self, old: bytes, new: bytes) -> Answer:
        return _done(self._store.rename(old, new, overwrite=True))

    def symbolicLink(self, target: bytes, path: bytes) -> Answer:
        return _done(self._store.symbolicLink(target, path))

    def hardLink(self, existing: bytes, path: bytes) -> Answer:
        return _done(self._store.hardLink(existing, path))

    def filesystem(self, path: bytes) -> Answer:
        return self._store.filesystem(path).addCallback(packets.filesystem)

    def readLink(self, path: bytes) -> Answer:
        return self._store.readLink(path).addCallback(_oneName)

    def realPath(self, path: bytes) -> Answer:
        return self._store.realPath(path).addCallback(_oneName)

    # --- what concerns no file ---------------------------------------------------------------

    def expandPath(self, path: bytes) -> Answer:
        """As the shell does with ``~`` and ``~user``, and nothing else."""
        if path[:1] != b"~":
            return self.realPath(self.absolute(path))
        user, _, rest = path[1:].partition(b"/")
        if not user:
            return self.realPath(self.absolute(rest))
        finding = self._home(user)
        return finding.addCallback(
            lambda home: self.realPath(home.rstrip(b"/") + b"/" + rest)
        )

    def homeDirectory(self, user: bytes) -> Answer:
        return self._home(user).addCallback(_oneName)

    def _home(self, user: bytes) -> Deferred[bytes]:
        def found(home: bytes) -> bytes:
            if not home:
                raise FileStoreError(FileProblem.NOT_FOUND, "no such user")
            return home

        return self._store.homeOf(user).addCallback(found)

    def accounts(self, users: tuple[int, ...], groups: tuple[int, ...]) -> Answer:
        return self._store.names(users, groups).addCallback(
            lambda names: packets.accounts(names[0], names[1])
        )

    def limits(self) -> Answer:
        return packets.limits(self._handles.limit)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a request is done, and which of its fields are what it concerns."""

    operation: Callable[..., Answer]
    #: Whether others would see what it concerns differently after it. A handle that was not
    #: opened for writing changes nothing.
    changes: bool
    paths: tuple[int, ...] = ()
    handles: tuple[int, ...] = ()
    #: The handle must be of a directory.
    ofListing: bool = False
    #: Each of the two is closed by CLOSE.
    ofEither: bool = False


RULES: dict[int | bytes, Rule] = {
    Kind.OPEN: Rule(Requests.open, True, paths=(0,)),
    Kind.OPENDIR: Rule(Requests.openDirectory, False, paths=(0,)),
    Kind.READDIR: Rule(Requests.readDirectory, False, handles=(0,), ofListing=True),
    Kind.CLOSE: Rule(Requests.close, True, handles=(0,), ofEither=True),
    Kind.FSTAT: Rule(Requests.fileStat, False, handles=(0,)),
    Kind.FSETSTAT: Rule(Requests.setFileAttributes, True, handles=(0,)),
    b"fsync@openssh.com": Rule(Requests.sync, False, handles=(0,)),
    b"fstatvfs@openssh.com": Rule(Requests.fileFilesystem, False, handles=(0,)),
    b"copy-data": Rule(Requests.copy, True, handles=(0, 3)),
    Kind.STAT: Rule(Requests.stat, False, paths=(0,)),
    Kind.LSTAT: Rule(Requests.linkStat, False, paths=(0,)),
    Kind.SETSTAT: Rule(Requests.setAttributes, True, paths=(0,)),
    b"lsetstat@openssh.com": Rule(Requests.setLinkAttributes, True, paths=(0,)),
    Kind.REMOVE: Rule(Requests.remove, True, paths=(0,)),
    Kind.MKDIR: Rule(Requests.makeDirectory, True, paths=(0,)),
    Kind.RMDIR: Rule(Requests.removeDirectory, True, paths=(0,)),
    Kind.RENAME: Rule(Requests.rename, True, paths=(0, 1)),
    b"posix-rename@openssh.com": Rule(Requests.renameOver, True, paths=(0, 1)),
    Kind.SYMLINK: Rule(Requests.symbolicLink, True, paths=(1,)),
    b"hardlink@openssh.com": Rule(Requests.hardLink, True, paths=(0, 1)),
    Kind.READLINK: Rule(Requests.readLink, False, paths=(0,)),
    Kind.REALPATH: Rule(Requests.realPath, False, paths=(0,)),
    b"statvfs@openssh.com": Rule(Requests.filesystem, False, paths=(0,)),
    b"expand-path@openssh.com": Rule(Requests.expandPath, False),
    b"home-directory": Rule(Requests.homeDirectory, False),
    b"users-groups-by-id@openssh.com": Rule(Requests.accounts, False),
    b"limits@openssh.com": Rule(Requests.limits, False),
}


def _permissions(attributes: Attributes) -> Attributes:
    """Attributes to be set: a client may send the type of the file among its permissions."""
    if attributes.mode is None:
        return attributes
    return replace(attributes, mode=attributes.mode & _PERMISSIONS)


def _done(doing: Deferred[None]) -> Deferred[Reply]:
    return doing.addCallback(lambda _: packets.OK)


def _oneName(path: bytes) -> Reply:
    """A path as the only entry of a list, without attributes, as sftp-server gives it."""
    return packets.names([packets.name(path, path, _NOTHING)], 1)
