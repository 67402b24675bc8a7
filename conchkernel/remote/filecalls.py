"""System calls on files, as far as one request needs more than one of them.

Runs in the agent. Descriptors, :class:`~conchkernel.remote.paths.Place` and numbers in, ``OSError``
out; it knows no requests.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from conchkernel.remote import filewire as fw

if TYPE_CHECKING:
    from collections.abc import Callable

    from conchkernel.remote.paths import Place

_COPY_BUFFER = 256 * 1024


def pack_status(status: os.stat_result) -> bytes:
    return fw.ATTRIBUTES.pack(
        fw.HAS_ALL, status.st_size, status.st_uid, status.st_gid, status.st_mode,
        status.st_atime_ns, status.st_mtime_ns, min(status.st_nlink, 0xFFFFFFFF),
    )  # fmt: skip


def pack_filesystem(found: os.statvfs_result) -> bytes:
    return fw.FILESYSTEM.pack(
        found.f_bsize, found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail,
        found.f_files, found.f_ffree, found.f_favail, found.f_fsid & 0xFFFFFFFFFFFFFFFF,
        found.f_flag, found.f_namemax,
    )  # fmt: skip


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def all_of(fd: int, status: os.stat_result) -> bytes:
    """The attributes and all the bytes of a small regular file, or nothing.

    One more byte is asked for than there should be: a file that grows, or whose size is not what
    can be read (in /proc), is read by those who ask for it.
    """
    size = status.st_size
    if not 0 < size <= fw.MAX_AHEAD or not stat.S_ISREG(status.st_mode):
        return b""
    try:
        data = os.pread(fd, size + 1, 0)
    except OSError:
        return b""  # whoever reads is told
    return pack_status(status) + data if len(data) == size else b""


def can_pin(fd: int) -> bool:
    """Whether a file can be held without being open, and surely be opened again for writing."""
    if not hasattr(os, "O_PATH") or not os.path.exists(f"/proc/self/fd/{fd}"):
        return False
    status = os.fstat(fd)
    # Not root's rights: on a network file system they may be nobody's.
    mine = status.st_uid == os.geteuid() and bool(status.st_mode & stat.S_IWUSR)
    return stat.S_ISREG(status.st_mode) and mine


def change(attributes: tuple[Any, ...], fd: int | None, place: Place | None) -> None:
    """Change what is given; all of it is tried, and the first error told.

    Owner before mode, since chown(2) clears bits of it; times last, since truncation sets them.
    """
    given, size, uid, gid, mode, atime, mtime, _ = attributes
    steps: list[Callable[[], None]] = []
    if given & fw.HAS_SIZE:
        steps.append(lambda: _truncate(size, fd, place))
    if given & fw.HAS_OWNER:
        owner = tuple(-1 if number == fw.SAME else number for number in (uid, gid))
        if fd is not None:
            steps.append(lambda: os.fchown(fd, *owner))
        elif place is not None:
            steps.append(lambda: os.chown(
                place.name, *owner, dir_fd=place.dir_fd, follow_symlinks=place.follow
            ))  # fmt: skip
    if given & fw.HAS_MODE:
        steps.append(lambda: _chmod(mode & 0o7777, fd, place))
    if given & fw.HAS_TIMES:
        times = (atime, mtime)
        if fd is not None:
            steps.append(lambda: os.utime(fd, ns=times))
        elif place is not None:
            steps.append(lambda: os.utime(
                place.name, ns=times, dir_fd=place.dir_fd, follow_symlinks=place.follow
            ))  # fmt: skip
    problems = []
    for step in steps:
        try:
            step()
        except (OSError, OverflowError) as error:
            problems.append(error)
    if problems:
        raise problems[0]


def _truncate(size: int, fd: int | None, place: Place | None) -> None:
    if fd is not None:
        os.ftruncate(fd, size)
        return
    assert place is not None
    if place.follow:
        os.truncate(place.name, size)
        return
    fd = place.open(os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _chmod(mode: int, fd: int | None, place: Place | None) -> None:
    if fd is not None:
        os.fchmod(fd, mode)
        return
    assert place is not None
    if place.follow:
        os.chmod(place.name, mode)
        return
    # No system call before Linux 6.6 changes a mode without following: hold the file itself.
    fd = place.pin()
    try:
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            raise OSError(errno.EOPNOTSUPP, "a symbolic link has no mode of its own")
        if hasattr(os, "O_PATH"):
            os.chmod(f"/proc/self/fd/{fd}", mode)
        else:
            os.fchmod(fd, mode)
    finally:
        os.close(fd)


def hard_link(source: Place, target: Place) -> None:
    os.link(
        source.name, target.name,
        src_dir_fd=source.dir_fd, dst_dir_fd=target.dir_fd, follow_symlinks=False,
    )  # fmt: skip


def rename_to_new(source: Place, target: Place) -> bool:
    """Rename where nothing may be replaced, as far as that can be done without a race.

    :returns: whether it is done; else nothing is at ``target`` and rename(2) may go on.
    """
    if not stat.S_ISDIR(source.stat().st_mode):
        try:
            hard_link(source, target)
        except FileExistsError:
            raise
        except OSError:
            pass  # a file system without hard links, or somebody else's file
        else:
            os.unlink(source.name, dir_fd=source.dir_fd)
            return True
    try:
        target.stat()
    except FileNotFoundError:
        return False
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def copy_slice(source: int, target: int, count: int, offset: int, target_offset: int) -> int:
    copy_file_range = getattr(os, "copy_file_range", None)
    if copy_file_range is not None:
        try:
            copied: int = copy_file_range(source, target, count, offset, target_offset)
            return copied
        except OSError as error:
            if error.errno not in (
                errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF,
                errno.EPERM,
            ):  # fmt: skip
                raise
    return copy_through(source, target, count, offset, target_offset)


def copy_through(source: int, target: int, count: int, offset: int, target_offset: int) -> int:
    done = 0
    while done < count:
        data = os.pread(source, min(_COPY_BUFFER, count - done), offset + done)
        if not data:
            break
        view = memoryview(data)
        while view:
            written = os.pwrite(target, view, target_offset + done)
            done += written
            view = view[written:]
    return done
