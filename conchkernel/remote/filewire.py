"""What is said on a stream of kind ``files``: numbers and layouts, once for both ends.

``docs/wire.md`` section 7 in code. It opens no file and knows no socket: the agent's service
(:mod:`conchkernel.remote.files`) and the gateway's store both import it. Integers are unsigned and
big-endian, except times.
"""

from __future__ import annotations

import errno
import struct

#: A record: length of what follows, id, operation (requests) or problem (answers).
HEAD = struct.Struct(">IIB")
#: What the length counts beside the body.
COUNTED = HEAD.size - 4

# Operations.
(
    OPEN, CLOSE, READ, WRITE, FSTAT, FSETSTAT, FSYNC, FSTATVFS, STAT, LSTAT, SETSTAT, LSETSTAT,
    OPENDIR, READDIR, REMOVE, MKDIR, RMDIR, RENAME, READLINK, SYMLINK, LINK, REALPATH, STATVFS,
    NAMES, HOME, COPY, WRITE_LAST,
) = range(1, 28)  # fmt: skip

#: What changes something that others see, besides an OPEN for it.
CHANGING = frozenset((
    WRITE, FSETSTAT, SETSTAT, LSETSTAT, REMOVE, MKDIR, RMDIR, RENAME, SYMLINK, LINK, COPY,
    WRITE_LAST,
))  # fmt: skip

# Bodies, as far as they have a fixed size.
HANDLE = struct.Struct(">I")
OPEN_HEAD = struct.Struct(">II")  # handle, flags; then attributes and the path
READ_BODY = struct.Struct(">IQI")  # handle, offset, length
WRITE_HEAD = struct.Struct(">IQ")  # handle, offset; then the bytes
COPY_BODY = struct.Struct(">IQQIQ")  # source, offset, length, target, offset
COUNTS = struct.Struct(">HH")  # of a table of names: accounts, groups
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")

#: Which are given, size, account, group, mode, access and modification in nanoseconds, links.
ATTRIBUTES = struct.Struct(">BQIIIqqI")
HAS_SIZE, HAS_OWNER, HAS_MODE, HAS_TIMES = 1, 2, 4, 8
HAS_ALL = 15
#: An owner that is not to be changed, while the group is (or the other way round).
SAME = 0xFFFFFFFF

#: statvfs(2), in the order of :class:`conchkernel.files.Filesystem`.
FILESYSTEM = struct.Struct(">11Q")

# How to open; the numbers are SFTP's.
OPEN_READ, OPEN_WRITE, OPEN_APPEND, OPEN_CREATE, OPEN_TRUNCATE, OPEN_EXCLUSIVE = (
    1, 2, 4, 8, 16, 32,
)  # fmt: skip
#: An OPEN with any of these may change something.
OPEN_CHANGES = OPEN_WRITE | OPEN_APPEND | OPEN_CREATE | OPEN_TRUNCATE | OPEN_EXCLUSIVE

# Bounds.
#: Bytes of one READ or WRITE; with every header it fits one message of the wire.
MAX_TRANSFER = 255 * 1024
#: A record without its length: the longest is a RENAME of two paths, or a WRITE.
MAX_RECORD = 256 * 1024
#: A file up to here comes whole with the answer to its OPEN for reading, and may be written by a
#: single WRITE_LAST.
MAX_AHEAD = 32 * 1024
#: A path; Linux takes 4095. Longer ones are told so by the system, not cut.
MAX_PATH = 65535
#: A client has 256, and the gateway opens some early.
MAX_HANDLES = 256 + 32
#: Entries of one READDIR, in bytes: some hundred names.
LISTING_BYTES = 64 * 1024
#: Accounts and groups of one NAMES.
MAX_NAMES = 512

#: Problems by number; the names are those of :class:`conchkernel.files.FileProblem`.
PROBLEMS: tuple[str, ...] = (
    "", "NOT_FOUND", "PERMISSION", "EXISTS", "NOT_DIRECTORY", "IS_DIRECTORY", "NOT_EMPTY",
    "NO_SPACE", "QUOTA", "READ_ONLY", "NAME_TOO_LONG", "LOOP", "INVALID", "UNSUPPORTED", "FAILURE",
)  # fmt: skip

_BY_NAME: dict[str, int] = {name: number for number, name in enumerate(PROBLEMS)}
FAILURE = _BY_NAME["FAILURE"]
INVALID = _BY_NAME["INVALID"]
READ_ONLY = _BY_NAME["READ_ONLY"]
UNSUPPORTED = _BY_NAME["UNSUPPORTED"]

_BY_ERRNO: dict[int, str] = {
    errno.ENOENT: "NOT_FOUND",
    errno.EACCES: "PERMISSION",
    errno.EPERM: "PERMISSION",
    errno.EBADF: "PERMISSION",  # a handle that was not opened for this
    errno.EEXIST: "EXISTS",
    errno.ENOTDIR: "NOT_DIRECTORY",
    errno.EISDIR: "IS_DIRECTORY",
    errno.ENOTEMPTY: "NOT_EMPTY",
    errno.ENOSPC: "NO_SPACE",
    errno.EDQUOT: "QUOTA",
    errno.EROFS: "READ_ONLY",
    errno.ENAMETOOLONG: "NAME_TOO_LONG",
    errno.ELOOP: "LOOP",
    errno.EINVAL: "INVALID",
    errno.EOPNOTSUPP: "UNSUPPORTED",
    errno.ENOSYS: "UNSUPPORTED",
}


def problem_of(number: int) -> int:
    """The problem that an ``errno`` is told as; the text says more."""
    return _BY_NAME[_BY_ERRNO.get(number, "FAILURE")]
