"""The fields of an SSH message (RFC 4251 section 5), read with a cursor that believes nothing.

Sans-IO. What is short, too long or left over raises :class:`ProtocolViolation`, which carries the
reason code that the connection ends with; so a parser is a list of what it expects and never
checks a length itself. The messages that carry a channel's bytes are unpacked where they arrive.
"""

from __future__ import annotations

import enum
import struct

from conchkernel.errors import ConchKernelError

_UINT32 = struct.Struct(">L")


class DisconnectCode(enum.IntEnum):
    """Why a connection ends (RFC 4253 section 11.1)."""

    PROTOCOL_ERROR = 2
    KEY_EXCHANGE_FAILED = 3
    MAC_ERROR = 5
    COMPRESSION_ERROR = 6
    SERVICE_NOT_AVAILABLE = 7
    VERSION_NOT_SUPPORTED = 8
    CONNECTION_LOST = 10
    BY_APPLICATION = 11
    TOO_MANY_CONNECTIONS = 12
    NO_MORE_AUTH_METHODS_AVAILABLE = 14


class ProtocolViolation(ConchKernelError):
    """The peer sent what the protocol does not allow.

    :param message: the reason that the peer is told and that is logged; quotes no payload.
    :param code: why the connection ends.
    """

    def __init__(
        self, message: str, code: DisconnectCode = DisconnectCode.PROTOCOL_ERROR
    ) -> None:
        super().__init__(message)
        self.code = code


class Payload:
    """What is not read yet of one message.

    :param data: the message without its number; kept, not copied.
    """

    __slots__ = ("_data", "_offset")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    def raw(self, count: int) -> bytes:
        """The next ``count`` bytes as they are."""
        offset = self._offset
        if count > len(self._data) - offset:
            raise ProtocolViolation("truncated message")
        self._offset = offset + count
        return self._data[offset : offset + count]

    def byte(self) -> int:
        """The next octet."""
        return self.raw(1)[0]

    def boolean(self) -> bool:
        """The next boolean; every value but zero is true."""
        return self.raw(1) != b"\0"

    def uint32(self) -> int:
        """The next unsigned 32-bit number."""
        return int(_UINT32.unpack(self.raw(4))[0])

    def string(self) -> bytes:
        """The next string, a copy."""
        return self.raw(self.uint32())

    def names(self) -> tuple[bytes, ...]:
        """The next name-list; an empty one has no names."""
        value = self.string()
        return tuple(value.split(b",")) if value else ()

    def rest(self) -> bytes:
        """All that is left, which may be nothing."""
        return self.raw(len(self._data) - self._offset)

    def end(self) -> None:
        """Nothing may be left over."""
        if self._offset != len(self._data):
            raise ProtocolViolation("trailing bytes in a message")


def packString(data: bytes) -> bytes:
    """The string as it stands in a message."""
    return _UINT32.pack(len(data)) + data


def packNames(names: tuple[bytes, ...]) -> bytes:
    """The name-list as it stands in a message."""
    return packString(b",".join(names))
