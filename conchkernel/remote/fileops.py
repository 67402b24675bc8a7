"""What requests for files do: system calls, one function for each operation.

Runs in the agent, on the thread of one stream of kind ``files``. It takes a request's body and
gives the answer's, or raises ``OSError``; it knows
nothing of threads, credit or the order of requests.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conchkernel.remote import filewire as fw
from conchkernel.remote.directory import Directory, account_name, group_name
from conchkernel.remote.filecalls import (
    all_of,
    can_pin,
    change,
    copy_slice,
    copy_through,
    hard_link,
    pack_filesystem,
    pack_status,
    read_into,
    rename_to_new,
)
from conchkernel.remote.paths import Host, Jail

#: One slice of a copy: between two of them a stream that was closed stops.
COPY_SLICE = 8 * 1024 * 1024
#: What may take long by itself; answers that are ready are not kept waiting for it.
SLOW = frozenset((fw.FSYNC, fw.COPY, fw.CLOSE, fw.WRITE_LAST, fw.NAMES, fw.HOME))

if TYPE_CHECKING:
    Answer = bytes | bytearray | memoryview


class Malformed(Exception):
    """A body is not what the operation takes: the peer broke the protocol."""


class _File:
    """An open file.

    :param flags: to open it with once more, if it was closed before its client said so.
    """

    __slots__ = ("_early", "_fd", "_flags", "append")

    def __init__(self, fd: int, flags: int) -> None:
        self.append = bool(flags & os.O_APPEND)
        self._fd = fd
        self._flags = flags
        self._early = False

    @property
    def fd(self) -> int:
        if self._early:
            pinned = self._fd
            self._fd = os.open(f"/proc/self/fd/{pinned}", self._flags)
            self._early = False
            os.close(pinned)
        return self._fd

    def close_early(self) -> bool:
        """Close it as far as others, and errors, are concerned; whether that could be.

        What is kept is no open file for anybody else, and leads back to this one whatever becomes
        of its name. Only what can surely be opened again is closed.
        """
        if self._early or not can_pin(self._fd):
            return False
        pinned = os.open(f"/proc/self/fd/{self._fd}", os.O_PATH | os.O_CLOEXEC)
        written, self._fd, self._early = self._fd, pinned, True
        os.close(written)
        return True

    def close(self) -> None:
        os.close(self._fd)


class Operations:
    """One client's files: the handles it has, and where its paths lead.

    :param root: a directory that is the client's ``/``; ``None`` for the whole host.
    :param home: where a session begins, as a path of the host.
    :raises OSError: if ``root`` cannot be entered.
    """

    def __init__(self, root: bytes | None, home: bytes, read_only: bool) -> None:
        self.stopped: Callable[[], bool] = lambda: False
        self._paths: Host | Jail
        if root is None:
            self._paths = Host(home)
        else:
            self._paths = Jail(root)
            self._paths.home = self._paths.inside(home) or b"/"
        self.home = self._paths.home
        self._read_only = read_only
        self._handles: dict[int, Any] = {}
        self._told: set[tuple[bool, int]] = set()  # owners whose names a listing told
        self._table: dict[int, Callable[[memoryview], Answer]] = {
            fw.OPEN: self._open,
            fw.CLOSE: self._close,
            fw.WRITE: self._write,
            fw.WRITE_LAST: self._write_last,
            fw.FSTAT: self._fstat,
            fw.FSETSTAT: self._fsetstat,
            fw.FSYNC: self._fsync,
            fw.FSTATVFS: self._fstatvfs,
            fw.STAT: self._stat,
            fw.LSTAT: self._lstat,
            fw.SETSTAT: self._setstat,
            fw.LSETSTAT: self._lsetstat,
            fw.OPENDIR: self._opendir,
            fw.READDIR: self._readdir,
            fw.REMOVE: self._remove,
            fw.MKDIR: self._mkdir,
            fw.RMDIR: self._rmdir,
            fw.RENAME: self._rename,
            fw.READLINK: self._readlink,
            fw.SYMLINK: self._symlink,
            fw.LINK: self._link,
            fw.REALPATH: self._realpath,
            fw.STATVFS: self._statvfs,
            fw.NAMES: self._names,
            fw.HOME: self._home,
            fw.COPY: self._copy,
        }

    def answer(self, request: int, operation: int, body: memoryview) -> Answer:
        """Do what a request asks; returns the whole record of its answer.

        :raises Malformed: the peer broke the protocol.
        """
        try:
            if operation == fw.READ:
                return self._read(request, body)
            function = self._table.get(operation)
            if function is None:
                return problem(request, fw.UNSUPPORTED, "the agent does not know this operation")
            if self._read_only and operation in fw.CHANGING:
                return problem(request, fw.READ_ONLY, "files may only be read here")
            result = function(body)
        except OSError as error:
            return problem(request, fw.problem_of(error.errno or 0), _sentence(error))
        except (ValueError, OverflowError) as error:  # a NUL in a path, a number beyond off_t
            return problem(request, fw.INVALID, str(error))
        return fw.HEAD.pack(fw.COUNTED + len(result), request, 0) + result

    def close(self) -> None:
        """Close every handle; what is lost by that is lost."""
        for handle in self._handles.values():
            try:
                handle.close()
            except OSError:
                pass
        self._handles.clear()
        self._paths.close()

    # --- handles -----------------------------------------------------------------------------

    def _reserve(self, handle: int) -> None:
        if handle in self._handles:
            raise Malformed("a handle is in use already")
        if len(self._handles) >= fw.MAX_HANDLES:
            raise OSError(errno.EMFILE, "too many files are open")

    def _handle(self, body: memoryview, kind: type) -> Any:
        if len(body) < fw.HANDLE.size:
            raise Malformed("a request without a handle")
        found = self._handles.get(fw.HANDLE.unpack_from(body)[0])
        if type(found) is not kind:
            raise OSError(errno.EINVAL, "no such handle")
        return found

    def _file(self, body: memoryview) -> int:
        fd: int = self._handle(body, _File).fd
        return fd

    def _open(self, body: memoryview) -> bytes:
        handle, wanted = _unpack(fw.OPEN_HEAD, body)
        attributes, path = _attributes(body[fw.OPEN_HEAD.size :])
        self._reserve(handle)
        if self._read_only and wanted & fw.OPEN_CHANGES:
            raise OSError(errno.EROFS, "files may only be read here")
        # A FIFO or a terminal must not hold up the files behind it.
        flags = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        if wanted & fw.OPEN_WRITE:
            flags |= os.O_RDWR if wanted & fw.OPEN_READ else os.O_WRONLY
        for bit, flag in (
            (fw.OPEN_APPEND, os.O_APPEND), (fw.OPEN_CREATE, os.O_CREAT),
            (fw.OPEN_TRUNCATE, os.O_TRUNC), (fw.OPEN_EXCLUSIVE, os.O_EXCL),
        ):  # fmt: skip
            if wanted & bit:
                flags |= flag
        mode = attributes[4] & 0o7777 if attributes[0] & fw.HAS_MODE else 0o666
        with self._paths.at(path, not wanted & fw.OPEN_EXCLUSIVE) as place:
            fd = place.open(flags, mode)
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        except BaseException:
            os.close(fd)
            raise
        self._handles[handle] = _File(fd, flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC))
        return b"" if wanted & fw.OPEN_CHANGES else all_of(fd, status)

    def _close(self, body: memoryview) -> bytes:
        (handle,) = _unpack(fw.HANDLE, body)
        found = self._handles.pop(handle, None)
        if found is None:
            raise OSError(errno.EINVAL, "no such handle")
        found.close()
        return b""

    def _read(self, request: int, body: memoryview) -> Answer:
        _, offset, length = _unpack(fw.READ_BODY, body)
        fd = self._file(body)
        # Read behind room for the answer's head: the bytes are not moved again.
        answer = bytearray(fw.HEAD.size + min(length, fw.MAX_TRANSFER))
        view = memoryview(answer)
        count = read_into(fd, view[fw.HEAD.size :], offset)
        fw.HEAD.pack_into(answer, 0, fw.COUNTED + count, request, 0)
        return view[: fw.HEAD.size + count]

    def _write_last(self, body: memoryview) -> bytes:
        self._write(body)
        return b"\1" if self._handle(body, _File).close_early() else b"\0"

    def _write(self, body: memoryview) -> bytes:
        _, offset = _unpack(fw.WRITE_HEAD, body)
        file = self._handle(body, _File)
        fd = file.fd
        data = body[fw.WRITE_HEAD.size :]
        while data:
            count = os.write(fd, data) if file.append else os.pwrite(fd, data, offset)
            offset += count
            data = data[count:]
        return b""

    def _fstat(self, body: memoryview) -> bytes:
        return pack_status(os.fstat(self._file(body)))

    def _fsetstat(self, body: memoryview) -> bytes:
        attributes, _ = _attributes(body[fw.HANDLE.size :])
        change(attributes, self._file(body), None)
        return b""

    def _fsync(self, body: memoryview) -> bytes:
        os.fsync(self._file(body))
        return b""

    def _fstatvfs(self, body: memoryview) -> bytes:
        return pack_filesystem(os.fstatvfs(self._file(body)))

    def _copy(self, body: memoryview) -> bytes:
        _, offset, length, _, target_offset = _unpack(fw.COPY_BODY, body)
        to_end = length == 0
        source_fd = self._file(body)
        target_fd = self._file(body[fw.COPY_BODY.size - 12 :])
        if source_fd == target_fd:
            raise OSError(errno.EINVAL, "a file cannot be copied into itself")
        copy = copy_slice
        while to_end or length:
            if self.stopped():
                raise OSError(errno.EINTR, "the stream was closed")
            count = copy(source_fd, target_fd, COPY_SLICE if to_end else min(length, COPY_SLICE),
                         offset, target_offset)  # fmt: skip
            if count == 0 and copy is copy_slice:
                copy = copy_through  # files in /proc seem empty to the system's own copy
                continue
            if count == 0:
                if to_end:
                    break
                raise OSError(errno.EIO, "the file ends before what is to be copied")
            offset += count
            target_offset += count
            length -= 0 if to_end else count
        return b""

    # --- paths -------------------------------------------------------------------------------

    def _stat(self, body: memoryview) -> bytes:
        return self._status(body, True)

    def _lstat(self, body: memoryview) -> bytes:
        return self._status(body, False)

    def _status(self, body: memoryview, follow: bool) -> bytes:
        with self._paths.at(bytes(body), follow) as place:
            return pack_status(place.stat())

    def _setstat(self, body: memoryview) -> bytes:
        attributes, path = _attributes(body)
        with self._paths.at(path, True) as place:
            change(attributes, None, place)
        return b""

    def _lsetstat(self, body: memoryview) -> bytes:
        attributes, path = _attributes(body)
        with self._paths.at(path, False) as place:
            change(attributes, None, place)
        return b""

    def _remove(self, body: memoryview) -> bytes:
        with self._paths.at(bytes(body), False) as place:
            place.refuse_itself()
            os.unlink(place.name, dir_fd=place.dir_fd)
        return b""

    def _mkdir(self, body: memoryview) -> bytes:
        attributes, path = _attributes(body)
        mode = attributes[4] & 0o7777 if attributes[0] & fw.HAS_MODE else 0o777
        with self._paths.at(path, False) as place:
            os.mkdir(place.name, mode, dir_fd=place.dir_fd)
        return b""

    def _rmdir(self, body: memoryview) -> bytes:
        with self._paths.at(bytes(body), False) as place:
            place.refuse_itself()
            os.rmdir(place.name, dir_fd=place.dir_fd)
        return b""

    def _rename(self, body: memoryview) -> bytes:
        if not body:
            raise Malformed("a RENAME of nothing")
        old, new = _two_paths(body[1:])
        with self._paths.at(old, False) as source, self._paths.at(new, False) as target:
            source.refuse_itself()
            target.refuse_itself()
            if body[0] or not rename_to_new(source, target):
                os.rename(
                    source.name, target.name, src_dir_fd=source.dir_fd, dst_dir_fd=target.dir_fd
                )
        return b""

    def _readlink(self, body: memoryview) -> bytes:
        with self._paths.at(bytes(body), False) as place:
            return os.readlink(place.name, dir_fd=place.dir_fd)

    def _symlink(self, body: memoryview) -> bytes:
        target, path = _two_paths(body)
        with self._paths.at(path, False) as place:
            os.symlink(target, place.name, dir_fd=place.dir_fd)
        return b""

    def _link(self, body: memoryview) -> bytes:
        existing, path = _two_paths(body)
        with self._paths.at(existing, False) as source, self._paths.at(path, False) as place:
            hard_link(source, place)
        return b""

    def _realpath(self, body: memoryview) -> bytes:
        return self._paths.real(bytes(body) or self.home)

    def _statvfs(self, body: memoryview) -> bytes:
        with self._paths.at(bytes(body), True) as place:
            fd = place.pin()
        try:
            return pack_filesystem(os.fstatvfs(fd))
        finally:
            os.close(fd)

    # --- directories -------------------------------------------------------------------------

    def _opendir(self, body: memoryview) -> bytes:
        (handle,) = _unpack(fw.HANDLE, body)
        self._reserve(handle)
        with self._paths.at(bytes(body[fw.HANDLE.size :]), True) as place:
            fd = place.open(os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._handles[handle] = Directory(fd, self._paths, self._told)
        return b""

    def _readdir(self, body: memoryview) -> bytes:
        piece: bytes = self._handle(body, Directory).piece()
        return piece

    # --- accounts ----------------------------------------------------------------------------

    def _names(self, body: memoryview) -> bytes:
        accounts, groups = _unpack(fw.COUNTS, body)
        numbers = body[fw.COUNTS.size :]
        if len(numbers) != 4 * (accounts + groups) or accounts + groups > fw.MAX_NAMES:
            raise Malformed("a table of names of odd size")
        parts = []
        for index in range(accounts + groups):
            (number,) = fw.U32.unpack_from(numbers, 4 * index)
            name = account_name(number) if index < accounts else group_name(number)
            parts.append(fw.U16.pack(len(name)) + name)
        return b"".join(parts)

    def _home(self, body: memoryview) -> bytes:
        name = bytes(body)
        try:
            found = pwd.getpwnam(os.fsdecode(name)) if name else pwd.getpwuid(os.getuid())
        except KeyError:
            if not name:
                return self.home
            raise OSError(errno.ENOENT, "there is no account of this name") from None
        inside = self._paths.inside(os.fsencode(found.pw_dir))
        if inside is None:
            if name:
                raise OSError(errno.ENOENT, "this home directory is not among these files")
            return self.home
        return inside


def problem(request: int, number: int, text: str) -> bytes:
    """The record of an answer that says no."""
    data = text.encode("utf-8", "replace")[:1000]
    return fw.HEAD.pack(fw.COUNTED + len(data), request, number) + data


def _sentence(error: OSError) -> str:
    return error.strerror or str(error)


def _unpack(layout: Any, body: memoryview) -> tuple[Any, ...]:
    if len(body) < layout.size:
        raise Malformed("a request is too short")
    fields: tuple[Any, ...] = layout.unpack_from(body)
    return fields


def _attributes(body: memoryview) -> tuple[tuple[Any, ...], bytes]:
    return _unpack(fw.ATTRIBUTES, body), bytes(body[fw.ATTRIBUTES.size :])


def _two_paths(body: memoryview) -> tuple[bytes, bytes]:
    (length,) = _unpack(fw.U16, body)
    rest = bytes(body[fw.U16.size :])
    if len(rest) < length:
        raise Malformed("a path is longer than its request")
    return rest[:length], rest[length:]
