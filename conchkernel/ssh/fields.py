"""The fields of an SSH message (RFC 4251 section 5), read with a cursor that believes nothing.

Sans-IO. Reading beyond the end, or leaving bytes behind, raises :class:`ProtocolError`, which
carries the reason code of the SSH_MSG_DISCONNECT that the transport answers with. So a parser is
a list of what it expects, and never checks a length itself.
"""

from __future__ import annotations

import enum
import struct

from conchkernel.errors import ConchKernelError

_uint32 = struct.Struct(">L")


class DisconnectCode(enum.IntEnum):
    """Why a connection ends (RFC 4253 section 11.1)."""

    PROTOCOL_ERROR = 2
    KEY_EXCHANGE_FAILED = 3
    MAC_ERROR = 5
    SERVICE_NOT_AVAILABLE = 7
    VERSION_NOT_SUPPORTED = 8
    CONNECTION_LOST = 10
    BY_APPLICATION = 11
    TOO_MANY_CONNECTIONS = 12
    NO_MORE_AUTH_METHODS_AVAILABLE = 14


class ProtocolError(ConchKernelError):
    """The peer sent what it must not send; the connection ends with a reason code.

    The text goes to the peer and into one log line: it names no secret and quotes no payload.
    """

    def __init__(self, message: str, code: DisconnectCode = DisconnectCode.PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


class Fields:
    """A cursor over the payload of one message.

    :param data: the payload; kept, not copied.
    :param message: the name of the message, for the text of an error.
    """

    __slots__ = ("_data", "_message", "_offset")

    def __init__(self, data: bytes, message: str) -> None:
        self._data = data
        self._offset = 0
        self._message = message

    def raw(self, count: int) -> bytes:
        """The next ``count`` bytes as they are."""
        start = self._offset
        end = start + count
        if end > len(self._data):
            raise ProtocolError(f"truncated {self._message}")
        self._offset = end
        return self._data[start:end]

    def byte(self) -> int:
        """One octet."""
        return self.raw(1)[0]

    def boolean(self) -> bool:
        """One octet; everything but zero is true."""
        return self.raw(1) != b"\0"

    def uint32(self) -> int:
        """A number of four octets."""
        return int(_uint32.unpack(self.raw(4))[0])

    def string(self) -> bytes:
        """Bytes with their length before them."""
        return self.raw(self.uint32())

    def names(self) -> tuple[bytes, ...]:
        """A name-list; an empty one has no names."""
        text = self.string()
        return tuple(text.split(b",")) if text else ()

    def rest(self) -> bytes:
        """All that is left, which may be nothing."""
        return self.raw(len(self._data) - self._offset)

    def left(self) -> int:
        """How many bytes are not read yet."""
        return len(self._data) - self._offset

    def end(self) -> None:
        """Nothing may be left here."""
        if self._offset != len(self._data):
            raise ProtocolError(f"bytes after the end of {self._message}")


def printable(name: bytes) -> str:
    """A peer's name for the log or for a sentence: ASCII that moves no cursor, and not too long."""
    return name[:64].decode("latin-1").encode("unicode_escape").decode("ascii")


def string(data: bytes) -> bytes:
    """``data`` with its length before it."""
    return _uint32.pack(len(data)) + data


def names(values: tuple[bytes, ...]) -> bytes:
    """A name-list."""
    return string(b",".join(values))


def mpint(value: int) -> bytes:
    """A number that is not negative, in as few octets as two's complement allows."""
    return string(value.to_bytes(value.bit_length() // 8 + 1, "big") if value else b"")
