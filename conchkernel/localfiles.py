"""The files of this machine as a store: for embedders, and the measure of other stores in tests.

Paths are the host's. Calls are made in the reactor's thread, as a local disk answers in
microseconds; what may take long (fsync, copying) goes to a thread where there is a reactor.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
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

_T = TypeVar("_T")

PROBLEMS: dict[int, FileProblem] = {
    errno.ENOENT: FileProblem.NOT_FOUND,
    errno.EACCES: FileProblem.PERMISSION,
    errno.EPERM: FileProblem.PERMISSION,
    errno.EEXIST: FileProblem.EXISTS,
    errno.ENOTDIR: FileProblem.NOT_DIRECTORY,
    errno.EISDIR: FileProblem.IS_DIRECTORY,
    errno.ENOTEMPTY: FileProblem.NOT_EMPTY,
    errno.ENOSPC: FileProblem.NO_SPACE,
    errno.EDQUOT: FileProblem.QUOTA,
    errno.EROFS: FileProblem.READ_ONLY,
    errno.ENAMETOOLONG: FileProblem.NAME_TOO_LONG,
    errno.ELOOP: FileProblem.LOOP,
    errno.EINVAL: FileProblem.INVALID,
    errno.ENOSYS: FileProblem.UNSUPPORTED,
    errno.EOPNOTSUPP: FileProblem.UNSUPPORTED,
}

#: Entries of a directory that are looked at in one go, each with an lstat.
_LISTED_AT_ONCE = 200
_COPIED_AT_ONCE = 8 * 1024 * 1024
#: An owner, or group, that chown(2) leaves as it is.
_UNCHANGED = 0xFFFFFFFF
_NO_SEEK = (errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def problemOf(error: OSError | OverflowError) -> FileStoreError:
    """What a system call said, or would say to a number that it cannot be given."""
    if isinstance(error, OverflowError):
        return FileStoreError(FileProblem.INVALID, "a number that is too large")
    problem = PROBLEMS.get(error.errno or 0, FileProblem.FAILURE)
    return FileStoreError(problem, error.strerror or problem.value)


def _now(call: Callable[..., _T], *arguments: Any) -> Deferred[_T]:
    """The result of a system call, or what it says."""
    try:
        return succeed(call(*arguments))
    except (OSError, OverflowError) as error:
        return fail(problemOf(error))


def _told(reason: Failure) -> Any:
    reason.trap(OSError, OverflowError)
    raise problemOf(reason.value)  # type: ignore[arg-type]


def attributesOf(status: os.stat_result) -> Attributes:
    """All that stat(2) tells."""
    return Attributes(
        size=status.st_size, uid=status.st_uid, gid=status.st_gid, mode=status.st_mode,
        atime=status.st_atime, mtime=status.st_mtime, links=status.st_nlink,
        owner=_userName(status.st_uid), group=_groupName(status.st_gid),
    )  # fmt: skip


_users: dict[int, str] = {}
_groups: dict[int, str] = {}


def _userName(uid: int) -> str:
    name = _users.get(uid)
    if name is None:
        try:
            name = pwd.getpwuid(uid).pw_name
        except (KeyError, OverflowError):
            name = ""
        # Everybody who owns a file here: bounded by the machine's accounts in practice.
        _users[uid] = name
    return name


def _groupName(gid: int) -> str:
    name = _groups.get(gid)
    if name is None:
        try:
            name = grp.getgrgid(gid).gr_name
        except (KeyError, OverflowError):
            name = ""
        _groups[gid] = name
    return name


def _change(target: bytes | int, attributes: Attributes, follow: bool) -> None:
    options: Any = {} if isinstance(target, int) else {"follow_symlinks": follow}
    if attributes.size is not None:
        if not follow:
            raise OSError(errno.EINVAL, "a link has no size to set")
        os.truncate(target, attributes.size)
    if attributes.uid is not None and attributes.gid is not None:
        wanted = (attributes.uid, attributes.gid)
        owner, group = (-1 if one == _UNCHANGED else one for one in wanted)
        os.chown(target, owner, group, **options)
    if attributes.mode is not None:
        try:
            os.chmod(target, attributes.mode & 0o7777, **options)
        except NotImplementedError:
            # Links have no mode on Linux.
            raise OSError(errno.EOPNOTSUPP, "not supported for links") from None
    if attributes.mtime is not None:
        atime = attributes.mtime if attributes.atime is None else attributes.atime
        os.utime(target, (atime, attributes.mtime), **options)


def _filesystem(target: bytes | int) -> Filesystem:
    told = os.statvfs(target)
    return Filesystem(
        told.f_bsize, told.f_frsize, told.f_blocks, told.f_bfree, told.f_bavail,
        told.f_files, told.f_ffree, told.f_favail, told.f_fsid, told.f_flag, told.f_namemax,
    )  # fmt: skip


@implementer(IOpenFile)
class LocalFile:
    """An open file of this machine."""

    def __init__(self, store: DirectoryFileStore, descriptor: int) -> None:
        self.descriptor = descriptor
        self._store = store

    def read(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self.descriptor, length, offset)
        except (OSError, OverflowError) as error:
            raise problemOf(error) from None

    def write(self, offset: int, data: bytes) -> None:
        try:
            written = os.pwrite(self.descriptor, data, offset)
            while written < len(data):
                written += os.pwrite(self.descriptor, data[written:], offset + written)
        except (OSError, OverflowError) as error:
            raise problemOf(error) from None

    def stat(self) -> Deferred[Attributes]:
        return _now(lambda: attributesOf(os.fstat(self.descriptor)))

    def setAttributes(self, attributes: Attributes) -> Deferred[None]:
        return _now(_change, self.descriptor, attributes, True)

    def sync(self) -> Deferred[None]:
        return self._store.slowly(os.fsync, self.descriptor)

    def filesystem(self) -> Deferred[Filesystem]:
        return _now(_filesystem, self.descriptor)

    def close(self) -> Deferred[None]:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor < 0:
            return succeed(None)
        self._store.opened.discard(self)
        return _now(os.close, descriptor)


@implementer(IListing)
class LocalListing:
    """A directory of this machine being read."""

    def __init__(self, store: DirectoryFileStore, path: bytes) -> None:
        self._path = path
        self._store = store
        self._scan = os.scandir(path)
        self._names = self._allNames()

    def _allNames(self) -> Iterator[bytes]:
        yield b"."
        yield b".."
        for entry in self._scan:
            yield entry.name

    def next(self) -> Deferred[Sequence[Entry]]:
        return _now(self._some)

    def _some(self) -> list[Entry]:
        entries: list[Entry] = []
        for name in self._names:
            try:
                status = os.lstat(os.path.join(self._path, name))
            except OSError:
                # Gone since, or not to be looked at: the name is still what was listed.
                entries.append(Entry(name, Attributes()))
            else:
                entries.append(Entry(name, attributesOf(status)))
            if len(entries) == _LISTED_AT_ONCE:
                break
        return entries

    def close(self) -> Deferred[None]:
        self._store.opened.discard(self)
        self._scan.close()
        return succeed(None)


@implementer(IFileStore)
class DirectoryFileStore:
    """The files of this machine, as this process may use them.

    :param home: where a session begins. It is no jail: that is
        :class:`conchkernel.filepolicies.JailedFileStore`.
    :param reactor: with one, what may take long is done in its threads.
    """

    bytesUnderWay = BYTES_UNDER_WAY
    features = frozenset(
        {"modes", "links", "hardlinks", "statvfs", "sync", "times", "offset-writes"}
    )

    def __init__(self, home: bytes | str | os.PathLike[str], reactor: Any = None) -> None:
        self.home = os.path.abspath(os.fsencode(home))
        #: What was opened here and is not closed.
        self.opened: set[LocalFile | LocalListing] = set()
        self._reactor = reactor

    def slowly(self, call: Callable[..., _T], *arguments: Any) -> Deferred[_T]:
        """Make a call that may take long."""
        if self._reactor is None:
            return _now(call, *arguments)
        pool = self._reactor.getThreadPool()
        return deferToThreadPool(self._reactor, pool, call, *arguments).addErrback(_told)

    def open(self, path: bytes, flags: OpenFlag, attributes: Attributes) -> Deferred[IOpenFile]:
        return _now(self._open, path, flags, attributes)

    def _open(self, path: bytes, flags: OpenFlag, attributes: Attributes) -> IOpenFile:
        # Not blocking, so that a FIFO without another end does not stop everything.
        wanted = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        writes = bool(flags & (OpenFlag.WRITE | OpenFlag.APPEND))
        if writes:
            wanted |= os.O_RDWR if flags & OpenFlag.READ else os.O_WRONLY
        for flag, system in (
            (OpenFlag.APPEND, os.O_APPEND), (OpenFlag.CREATE, os.O_CREAT),
            (OpenFlag.TRUNCATE, os.O_TRUNC), (OpenFlag.EXCLUSIVE, os.O_EXCL),
        ):  # fmt: skip
            if flags & flag:
                wanted |= system
        mode = 0o666 if attributes.mode is None else attributes.mode & 0o7777
        descriptor = os.open(path, wanted, mode)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        file = LocalFile(self, descriptor)
        self.opened.add(file)
        return file

    def stat(self, path: bytes, *, follow: bool = True) -> Deferred[Attributes]:
        return _now(lambda: attributesOf(os.stat(path, follow_symlinks=follow)))

    def setAttributes(
        self, path: bytes, attributes: Attributes, *, follow: bool = True
    ) -> Deferred[None]:
        return _now(_change, path, attributes, follow)

    def listDirectory(self, path: bytes) -> Deferred[IListing]:
        return _now(self._list, path)

    def _list(self, path: bytes) -> IListing:
        listing = LocalListing(self, path)
        self.opened.add(listing)
        return listing

    def remove(self, path: bytes) -> Deferred[None]:
        return _now(os.unlink, path)

    def makeDirectory(self, path: bytes, attributes: Attributes) -> Deferred[None]:
        mode = 0o777 if attributes.mode is None else attributes.mode & 0o7777
        return _now(os.mkdir, path, mode)

    def removeDirectory(self, path: bytes) -> Deferred[None]:
        return _now(os.rmdir, path)

    def rename(self, old: bytes, new: bytes, *, overwrite: bool) -> Deferred[None]:
        return _now(os.rename if overwrite else _renameNew, old, new)

    def readLink(self, path: bytes) -> Deferred[bytes]:
        return _now(os.readlink, path)

    def symbolicLink(self, target: bytes, path: bytes) -> Deferred[None]:
        return _now(os.symlink, target, path)

    def hardLink(self, existing: bytes, path: bytes) -> Deferred[None]:
        return _now(lambda: os.link(existing, path, follow_symlinks=False))

    def realPath(self, path: bytes) -> Deferred[bytes]:
        return _now(_realPath, os.path.join(self.home, path))

    def filesystem(self, path: bytes) -> Deferred[Filesystem]:
        return _now(_filesystem, path)

    def names(
        self, uids: Sequence[int], gids: Sequence[int]
    ) -> Deferred[tuple[Sequence[str], Sequence[str]]]:
        return succeed(([_userName(uid) for uid in uids], [_groupName(gid) for gid in gids]))

    def copy(
        self, source: IOpenFile, offset: int, length: int, target: IOpenFile, target_offset: int
    ) -> Deferred[None]:
        assert isinstance(source, LocalFile)
        assert isinstance(target, LocalFile)
        # Descriptors of their own: whoever closes the files meanwhile must not let these
        # numbers become other files'.
        try:
            ends = os.dup(source.descriptor), os.dup(target.descriptor)
        except OSError as error:
            return fail(problemOf(error))

        def closed(result: Any) -> Any:
            for end in ends:
                os.close(end)
            return result

        return self.slowly(_copy, *ends, offset, length, target_offset).addBoth(closed)

    def homeOf(self, user: bytes) -> Deferred[bytes]:
        if not user:
            return succeed(self.home)
        try:
            return succeed(os.fsencode(pwd.getpwnam(os.fsdecode(user)).pw_dir))
        except (KeyError, ValueError):
            return succeed(b"")

    def close(self) -> Deferred[None]:
        for one in list(self.opened):
            one.close()
        return succeed(None)


def _renameNew(old: bytes, new: bytes) -> None:
    """rename(2) to a name that is free, as sftp-server does it: a link, where links can be."""
    if stat.S_ISREG(os.lstat(old).st_mode):
        try:
            os.link(old, new, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (
                errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EPERM,
            ):  # fmt: skip
                raise
        else:
            os.unlink(old)
            return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, "File exists")
    os.rename(old, new)


def _realPath(path: bytes) -> bytes:
    """realpath(3), but the last component need not exist."""
    try:
        return os.path.realpath(path, strict=True)
    except FileNotFoundError:
        parent = os.path.realpath(os.path.dirname(path.rstrip(b"/")), strict=True)
        return os.path.realpath(os.path.join(parent, os.path.basename(path.rstrip(b"/"))))


def _copy(source: int, target: int, offset: int, length: int, targetOffset: int) -> None:
    left = length or None
    while left is None or left > 0:
        size = _COPIED_AT_ONCE if left is None else min(left, _COPIED_AT_ONCE)
        try:
            copied = os.copy_file_range(source, target, size, offset, targetOffset)
        except OSError as error:
            if error.errno not in _NO_SEEK:
                raise
            data = os.pread(source, min(size, 1024 * 1024), offset)
            copied = os.pwrite(target, data, targetOffset) if data else 0
        if not copied:
            return
        offset += copied
        targetOffset += copied
        if left is not None:
            left -= copied
