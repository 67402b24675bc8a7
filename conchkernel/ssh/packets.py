"""From bytes to packets and back (RFC 4253 section 6), for one direction each.

Sans-IO, and the only place that counts sequence numbers and believes a packet's length: not
before it is within bounds. What arrives may be cut anywhere; the packets are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conchkernel.ssh.fields import ProtocolError
from conchkernel.ssh.sealing import Data, PlainOpener, PlainSealer

if TYPE_CHECKING:
    from conchkernel.ssh.sealing import Opener, Sealer

#: Packet lengths we believe. RFC 4253 section 6.1 asks for 35000 at least; OpenSSH takes 256 KiB.
UNKNOWN_PEER_BYTES = 35000
KNOWN_PEER_BYTES = 256 * 1024

_SEQUENCE_MASK = 0xFFFFFFFF
_MINIMUM_LENGTH = 6  # padding length, the message number and four bytes of padding
_NOT_KNOWN = -1


class Outbound:
    """What we send: the keys in use and the number of the next packet."""

    __slots__ = ("bytes", "packets", "sealer", "seals_runs", "sequence")

    def __init__(self) -> None:
        self.sealer: Sealer = PlainSealer()
        self.seals_runs = False
        """Whether :meth:`seal_run` can be used: the cipher makes many packets in one go."""
        self.sequence = 0
        self.bytes = 0
        """Sent under these keys, nearly: padding is a guess."""
        self.packets = 0

    def seal(self, head: bytes, body: Data) -> tuple[bytes, ...]:
        """The pieces of the next packet. ``head`` starts with the message number."""
        sequence = self.sequence
        self.sequence = (sequence + 1) & _SEQUENCE_MASK
        self.packets += 1
        self.bytes += len(head) + len(body) + 32
        return self.sealer.seal(sequence, head, body)

    def seal_run(self, head: bytes, body: Data, piece_bytes: int, out: memoryview) -> int:
        """Write the next packets to ``out``, each with ``head`` and a piece of ``body``.

        Only where :attr:`seals_runs`.

        :param body: a whole number of pieces.
        :returns: how many bytes were written.
        """
        sealer: Any = self.sealer
        count = len(body) // piece_bytes
        self.sequence = (self.sequence + count) & _SEQUENCE_MASK
        self.packets += count
        written: int = sealer.seal_run(head, body, piece_bytes, out)
        self.bytes += written
        return written

    def new_keys(self, sealer: Sealer, reset_sequence: bool) -> None:
        """What follows is under new keys."""
        self.sealer = sealer
        self.seals_runs = hasattr(sealer, "seal_run")
        self.bytes = self.packets = 0
        if reset_sequence:
            self.sequence = 0


class Inbound:
    """What we receive: bytes that are no packet yet, the keys in use and the next number.

    Data that arrives while nothing is left over is parsed where it is; only the packet that was
    cut is put together by copying.
    """

    __slots__ = ("_buffer", "_length", "_offset", "bytes", "limit", "opener", "packets", "sequence")

    def __init__(self) -> None:
        self.opener: Opener = PlainOpener()
        self.sequence = 0
        self.limit = UNKNOWN_PEER_BYTES
        self.bytes = 0
        self.packets = 0
        self._buffer: bytes | bytearray = b""
        self._offset = 0
        self._length = _NOT_KNOWN

    def feed(self, data: bytes) -> None:
        """More bytes came."""
        self.bytes += len(data)
        if self._offset == len(self._buffer):
            self._buffer = data
            self._offset = 0
        elif isinstance(self._buffer, bytearray):
            self._buffer += data
        else:
            self._buffer = bytearray(self._buffer) + data

    def next(self) -> bytes | None:
        """The next packet: its padding length, the payload and the padding.

        The payload is ``packet[1 : -packet[0]]`` and has at least one byte. Keys may be changed
        between two calls. Where there is no whole packet left, this is ``None``, and what is
        left is kept.

        :raises ProtocolError: the length is out of bounds, or the packet is not by the peer.
        """
        buffer = self._buffer
        offset = self._offset
        opener = self.opener
        length = self._length
        have = len(buffer) - offset
        if length < 0:
            if have < opener.head_bytes:
                self._compact()
                return None
            length = opener.length(buffer, offset, self.sequence)
            if (
                not _MINIMUM_LENGTH <= length <= self.limit
                or (length + opener.counted_bytes) % opener.block_bytes
            ):
                raise ProtocolError("bad packet length")
            self._length = length
        total = length + 4 + opener.tag_bytes
        if have < total:
            self._compact()
            return None
        packet = opener.open(buffer, offset, length, self.sequence)
        self._length = _NOT_KNOWN
        self._offset = offset + total
        self.sequence = (self.sequence + 1) & _SEQUENCE_MASK
        self.packets += 1
        padding = packet[0]
        if padding < 4 or padding > length - 2:
            raise ProtocolError("bad padding length")
        return packet

    def new_keys(self, opener: Opener, reset_sequence: bool) -> None:
        """What follows is under new keys."""
        self.opener = opener
        self.bytes = self.packets = 0
        if reset_sequence:
            self.sequence = 0

    def _compact(self) -> None:
        """Keep only what is left, so that an idle connection holds nothing."""
        offset = self._offset
        if not offset:
            return
        self._offset = 0
        if offset == len(self._buffer):
            self._buffer = b""
        elif isinstance(self._buffer, bytearray):
            del self._buffer[:offset]
        else:
            self._buffer = bytearray(memoryview(self._buffer)[offset:])
