"""The packets of SFTP version 3 (draft-ietf-secsh-filexfer-02), and what OpenSSH adds to them.

Sans-IO. :class:`RequestReader` takes bytes in any fragmentation and gives requests with their
fields parsed; a request that makes no sense is one, too, since it has an id and must be answered.
Bytes after a request's last field are tolerated as by OpenSSH: rclone sends some. The builders
give what follows the request id; :func:`frame` puts the rest before it.

This module does not know what a request does.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Any

from conchkernel.files import Attributes
from conchkernel.ssh.fields import Fields, ProtocolError, string

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from conchkernel.files import Filesystem

VERSION = 3
#: The largest packet either side sends, as in OpenSSH's sftp-common.h.
MAX_PACKET_BYTES = 256 * 1024
#: What is taken at most: a client may count its header apart.
MAX_REQUEST_BYTES = MAX_PACKET_BYTES + 1024
#: The largest READ or WRITE, as sftp-server has it: a packet less its overhead.
MAX_DATA_BYTES = MAX_PACKET_BYTES - 1024
#: The draft sets no bound; a handle of ours has 16 bytes, and this is the draft's own for others.
MAX_HANDLE_BYTES = 256


#: Accounts, and groups, that are asked for at once: OpenSSH asks for those of one listing.
MAX_ACCOUNTS = 8192
#: Pieces of a request that are kept before they are joined, however short they come.
_MAX_PIECES = 1024


class Kind(enum.IntEnum):
    """Packet types (section 3)."""

    INIT = 1
    VERSION = 2
    OPEN = 3
    CLOSE = 4
    READ = 5
    WRITE = 6
    LSTAT = 7
    FSTAT = 8
    SETSTAT = 9
    FSETSTAT = 10
    OPENDIR = 11
    READDIR = 12
    REMOVE = 13
    MKDIR = 14
    RMDIR = 15
    REALPATH = 16
    STAT = 17
    RENAME = 18
    READLINK = 19
    SYMLINK = 20
    STATUS = 101
    HANDLE = 102
    DATA = 103
    NAME = 104
    ATTRS = 105
    EXTENDED = 200
    EXTENDED_REPLY = 201


class Status(enum.IntEnum):
    """Status codes (section 7); version 3 has no others."""

    OK = 0
    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3
    FAILURE = 4
    BAD_MESSAGE = 5
    NO_CONNECTION = 6
    CONNECTION_LOST = 7
    OP_UNSUPPORTED = 8


class AttributeFlag(enum.IntFlag):
    """Which attributes are there (section 5)."""

    SIZE = 0x00000001
    UIDGID = 0x00000002
    PERMISSIONS = 0x00000004
    ACMODTIME = 0x00000008
    EXTENDED = 0x80000000


# Plain numbers for the byte path: an enumeration's operators cost more than all else there.
_SIZE, _UIDGID, _PERMISSIONS, _ACMODTIME, _EXTENDED = map(int, AttributeFlag)


#: Stands for a request that could not be parsed; its one argument says why.
MALFORMED = -1
#: Stands for an extended request that nobody knows; its one argument is the name.
UNKNOWN_EXTENSION = -2

#: What it is (an extension by its name), the request id (or the version, for INIT), its fields.
Request = tuple[int | bytes, int, tuple[Any, ...]]
#: The packet type of an answer and what follows the request id.
Reply = tuple[int, bytes]

_HEAD = struct.Struct(">LBL")
_READ = struct.Struct(">QL")
_uint32 = struct.Struct(">L")
_uint64 = struct.Struct(">Q")
_two = struct.Struct(">2L")
_DATA_HEAD = struct.Struct(">LBLL")


# --- requests --------------------------------------------------------------------------------


def _path(fields: Fields) -> bytes:
    path = fields.string()
    if b"\0" in path:
        raise ProtocolError("a path with a NUL byte")
    return path


def _handle(fields: Fields) -> bytes:
    handle = fields.string()
    if len(handle) > MAX_HANDLE_BYTES:
        raise ProtocolError("a handle that is too long")
    return handle


def _uint64Of(fields: Fields) -> int:
    return int(_uint64.unpack(fields.raw(8))[0])


def parseAttributes(fields: Fields) -> Attributes:
    """The ATTRS structure; extended pairs are read and ignored."""
    flags = fields.uint32()
    size = _uint64Of(fields) if flags & _SIZE else None
    uid = gid = mode = atime = mtime = None
    if flags & _UIDGID:
        uid, gid = fields.uint32(), fields.uint32()
    if flags & _PERMISSIONS:
        mode = fields.uint32()
    if flags & _ACMODTIME:
        atime, mtime = float(fields.uint32()), float(fields.uint32())
    if flags & _EXTENDED:
        # A count that lies ends with the packet.
        for _ in range(fields.uint32()):
            fields.string()
            fields.string()
    return Attributes(size=size, uid=uid, gid=gid, mode=mode, atime=atime, mtime=mtime)


def _numbers(fields: Fields) -> tuple[int, ...]:
    data = fields.string()
    if len(data) % 4 or len(data) > MAX_ACCOUNTS * 4:
        raise ProtocolError("not a list of numbers, or too long")
    return struct.unpack(f">{len(data) // 4}L", data)


def _parser(*parts: Callable[[Fields], Any]) -> Callable[[Fields], tuple[Any, ...]]:
    return lambda fields: tuple([part(fields) for part in parts])


_PARSERS: dict[int | bytes, Callable[[Fields], tuple[Any, ...]]] = {
    Kind.OPEN: _parser(_path, Fields.uint32, parseAttributes),
    Kind.CLOSE: _parser(_handle),
    Kind.READ: _parser(_handle, _uint64Of, Fields.uint32),
    Kind.WRITE: _parser(_handle, _uint64Of, Fields.string),
    Kind.LSTAT: _parser(_path),
    Kind.FSTAT: _parser(_handle),
    Kind.SETSTAT: _parser(_path, parseAttributes),
    Kind.FSETSTAT: _parser(_handle, parseAttributes),
    Kind.OPENDIR: _parser(_path),
    Kind.READDIR: _parser(_handle),
    Kind.REMOVE: _parser(_path),
    Kind.MKDIR: _parser(_path, parseAttributes),
    Kind.RMDIR: _parser(_path),
    Kind.REALPATH: _parser(_path),
    Kind.STAT: _parser(_path),
    Kind.RENAME: _parser(_path, _path),
    Kind.READLINK: _parser(_path),
    # The target, then the link: the order of ln(1). The draft has it the other way round, but
    # OpenSSH sent it so from the start (PROTOCOL, 4.1), and everybody followed.
    Kind.SYMLINK: _parser(_path, _path),
    b"posix-rename@openssh.com": _parser(_path, _path),
    b"statvfs@openssh.com": _parser(_path),
    b"fstatvfs@openssh.com": _parser(_handle),
    b"hardlink@openssh.com": _parser(_path, _path),
    b"fsync@openssh.com": _parser(_handle),
    b"lsetstat@openssh.com": _parser(_path, parseAttributes),
    b"limits@openssh.com": _parser(),
    b"expand-path@openssh.com": _parser(_path),
    b"copy-data": _parser(_handle, _uint64Of, _uint64Of, _handle, _uint64Of),
    b"home-directory": _parser(Fields.string),
    b"users-groups-by-id@openssh.com": _parser(_numbers, _numbers),
}


def parseFields(what: int | bytes, data: bytes) -> tuple[Any, ...] | None:
    """The fields of a request, or nothing if nobody knows it.

    :raises ProtocolError: they are truncated, or cannot be.
    """
    parse = _PARSERS.get(what)
    return None if parse is None else parse(Fields(data, "request"))


class RequestReader:
    """Requests out of the bytes of a channel.

    :ivar taken: bytes that belonged to the requests given so far.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._buffer = b""
        self._offset = 0
        self._more: list[bytes] = []  # behind the buffer
        self._have = 0  # bytes in all
        self._needed = _HEAD.size  # of the next request: the shortest has a type and an id
        self._begun = False

    def feed(self, data: bytes) -> None:
        """Add what came; kept until it is part of a whole request."""
        self._more.append(data)
        self._have += len(data)
        if len(self._more) > _MAX_PIECES:
            self._more = [b"".join(self._more)]

    def _gather(self, count: int) -> None:
        """Have the next ``count`` bytes in one piece: each byte of a long request moves once."""
        if len(self._buffer) - self._offset >= count:
            return
        rest = self._buffer[self._offset :]
        self._buffer = b"".join((rest, *self._more)) if rest else b"".join(self._more)
        self._offset = 0
        self._more = []

    def next(self) -> Request | None:
        """The next request, or nothing until more bytes are fed.

        :raises ProtocolError: the stream cannot be understood any further: a length that cannot
            be, a packet without a request id, or anything before INIT.
        """
        if self._have < self._needed:
            if 4 <= self._have < _HEAD.size:
                self._gather(4)
                self._checkLength(_uint32.unpack_from(self._buffer, self._offset)[0])
            return None
        self._gather(self._needed)
        length, kind, requestId = _HEAD.unpack_from(self._buffer, self._offset)
        if not 5 <= length <= MAX_REQUEST_BYTES:
            self._checkLength(length)
        self._needed = length + 4
        if self._have < self._needed:
            return None
        self._gather(self._needed)
        buffer, offset = self._buffer, self._offset
        if not self._begun:
            if kind != Kind.INIT:
                raise ProtocolError("a request before INIT")
            self._begun = True
        start, end = offset + 9, offset + 4 + length
        request = self._parse(kind, requestId, start, end)
        self.taken += length + 4
        self._have -= length + 4
        self._needed = _HEAD.size
        self._offset = end
        if end == len(buffer):
            self._buffer, self._offset = b"", 0
        return request

    @staticmethod
    def _checkLength(length: int) -> None:
        if length > MAX_REQUEST_BYTES:
            raise ProtocolError(f"an SFTP packet of {length} bytes")
        if length < 5:
            raise ProtocolError("an SFTP packet without a request id")

    def _parse(self, kind: int, requestId: int, start: int, end: int) -> Request:
        if kind == Kind.WRITE:
            # Bulk: one copy, straight out of the buffer.
            buffer = self._buffer
            if end - start >= 4:
                data = start + 4 + _uint32.unpack_from(buffer, start)[0]
                if end - data >= 12:
                    position, size = _READ.unpack_from(buffer, data)
                    data += 12
                    if end - data >= size:
                        with memoryview(buffer) as view:
                            return (
                                kind,
                                requestId,
                                (
                                    bytes(view[start + 4 : data - 12]),
                                    position,
                                    bytes(view[data : data + size]),
                                ),
                            )
            return MALFORMED, requestId, ("truncated WRITE",)
        if kind == Kind.INIT:
            # Extension pairs may follow; there is none that we would need.
            return kind, requestId, ()
        with memoryview(self._buffer) as view:
            fields = Fields(bytes(view[start:end]), "request")
        try:
            what: int | bytes = fields.string() if kind == Kind.EXTENDED else kind
            parse = _PARSERS.get(what)
            if parse is not None:
                return what, requestId, parse(fields)
        except ProtocolError as error:
            return MALFORMED, requestId, (str(error),)
        if kind == Kind.EXTENDED:
            return UNKNOWN_EXTENSION, requestId, (what,)
        return kind, requestId, ()


# --- answers ---------------------------------------------------------------------------------


def frame(kind: int, requestId: int, rest: bytes) -> bytes:
    """A whole packet."""
    return _HEAD.pack(len(rest) + 5, kind, requestId) + rest


def dataHead(requestId: int, size: int) -> bytes:
    """What stands before the bytes of a DATA packet."""
    return _DATA_HEAD.pack(size + 9, Kind.DATA, requestId, size)


def version(extensions: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The whole VERSION packet, with the names and values of extensions."""
    pairs = b"".join([string(name) + string(value) for name, value in extensions])
    return frame(Kind.VERSION, VERSION, pairs)


def status(code: Status, message: str) -> Reply:
    """STATUS: a code and a sentence, in no particular language."""
    return Kind.STATUS, _uint32.pack(code) + string(message.encode("utf-8", "replace")) + b"\0" * 4


OK: Reply = status(Status.OK, "Success")
END_OF_FILE: Reply = status(Status.EOF, "End of file")


def handle(token: bytes) -> Reply:
    """HANDLE."""
    return Kind.HANDLE, string(token)


def attributes(value: Attributes) -> Reply:
    """ATTRS."""
    return Kind.ATTRS, packAttributes(value)


def names(entries: Iterable[bytes], count: int) -> Reply:
    """NAME, of entries made by :func:`name`."""
    return Kind.NAME, _uint32.pack(count) + b"".join(entries)


def name(filename: bytes, longname: bytes, value: Attributes) -> bytes:
    """One entry of a NAME packet."""
    return string(filename) + string(longname) + packAttributes(value)


def filesystem(value: Filesystem) -> Reply:
    """EXTENDED_REPLY to statvfs@openssh.com: eleven numbers in the order of PROTOCOL 4.4."""
    return Kind.EXTENDED_REPLY, struct.pack(
        ">11Q",
        *[
            number & 0xFFFFFFFFFFFFFFFF
            for number in (
                value.block_size, value.fragment_size, value.blocks, value.free_blocks,
                value.available_blocks, value.files, value.free_files, value.available_files,
                value.id, value.flags, value.name_max,
            )
        ],
    )  # fmt: skip


def limits(openHandles: int) -> Reply:
    """EXTENDED_REPLY to limits@openssh.com."""
    return Kind.EXTENDED_REPLY, struct.pack(
        ">4Q", MAX_PACKET_BYTES, MAX_DATA_BYTES, MAX_DATA_BYTES, openHandles
    )


def accounts(users: Iterable[str], groups: Iterable[str]) -> Reply:
    """EXTENDED_REPLY to users-groups-by-id@openssh.com; what does not fit is left nameless."""
    room = MAX_PACKET_BYTES - 2 * 4 * MAX_ACCOUNTS - 1024
    lists = []
    for wanted in (users, groups):
        packed = bytearray()
        for text in wanted:
            one = text.encode("utf-8", "replace")
            if len(one) > room:
                one = b""
            room -= len(one)
            packed += string(one)
        lists.append(string(bytes(packed)))
    return Kind.EXTENDED_REPLY, b"".join(lists)


def packAttributes(value: Attributes) -> bytes:
    """The ATTRS structure. Numbers that version 3 cannot say are the nearest it can."""
    flags = 0
    packed = b""
    if value.size is not None:
        flags |= _SIZE
        packed += _uint64.pack(min(max(value.size, 0), 0xFFFFFFFFFFFFFFFF))
    if value.uid is not None and value.gid is not None:
        flags |= _UIDGID
        packed += _two.pack(value.uid & 0xFFFFFFFF, value.gid & 0xFFFFFFFF)
    if value.mode is not None:
        flags |= _PERMISSIONS
        packed += _uint32.pack(value.mode & 0xFFFFFFFF)
    if value.mtime is not None:
        flags |= _ACMODTIME
        atime = value.mtime if value.atime is None else value.atime
        packed += _two.pack(_seconds(atime), _seconds(value.mtime))
    return _uint32.pack(flags) + packed


def _seconds(time: float) -> int:
    # Before 1970 and after 2106 there is nothing; comparisons first, since infinity is no int.
    if not time > 0:
        return 0
    return int(time) if time < 0xFFFFFFFF else 0xFFFFFFFF
