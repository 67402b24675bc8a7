"""A WebSocket client on Autobahn, with the byte path made short (RFC 6455 section 5).

Autobahn does the opening handshake, pings, the closing handshake. Data frames are read and written
here: a message is found where it lies and handed on as a range of bytes, and one to send is joined
once, masked in place and written once. Autobahn's own logging is off: it would format each frame,
and log the token with the handshake at debug level.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autobahn.twisted.websocket import WebSocketClientProtocol
from autobahn.websocket.protocol import FrameHeader

from conchkernel.tcp import PromptWriter

try:
    # What Autobahn's own masker stands on, which copies three times.
    from _nvx_xormasker import ffi as _ffi  # type: ignore[import-not-found]
    from _nvx_xormasker import lib as _lib
except ImportError:  # no compiled Autobahn for this platform
    _ffi = _lib = None

if TYPE_CHECKING:
    from conchkernel.jupyter.framing import Part

#: One message, received. Ours are far below; what a cell shows may be of any length, and is passed
#: over as it comes where it is longer.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
#: The head of a server's answer to the handshake (tornado allows itself 64 KiB).
MAX_HANDSHAKE_BYTES = 64 * 1024
#: Pieces of one frame that are kept before they are joined, so that a frame that comes byte by byte
#: costs no list of its length.
_MAX_PIECES = 1024

_BINARY = 0x82
_TEXT = 0x81
_MASKED = 0x80
_short = struct.Struct(">BBH")
_long = struct.Struct(">BBQ")
_uint16 = struct.Struct(">H")
_uint64 = struct.Struct(">Q")


#: One table for each octet that a mask may have: three times as fast as XOR of long integers.
_TABLES = [bytes(octet ^ key for octet in range(256)) for key in range(256)]


def _mask_plain(frame: bytearray, start: int, mask: bytes) -> None:
    for lane, key in enumerate(mask):
        every_fourth = slice(start + lane, None, 4)
        frame[every_fourth] = frame[every_fourth].translate(_TABLES[key])


def _mask_native(frame: bytearray, start: int, mask: bytes) -> None:
    masker = _lib.nvx_xormask_new(mask)
    try:
        data = _ffi.from_buffer("uint8_t[]", frame)
        _lib.nvx_xormask_process(masker, data + start, len(frame) - start)
        _ffi.release(data)
    finally:
        _lib.nvx_xormask_free(masker)


#: Masks ``frame`` in place from ``start`` to its end (RFC 6455 section 5.3).
mask_in_place = _mask_plain if _lib is None else _mask_native


def frame_of(
    parts: Sequence[Part], *, is_binary: bool = True, mask: bytes | None = None
) -> bytearray:
    """A whole message as one masked frame.

    :param parts: its bytes; copied.
    :param mask: four bytes; fresh random ones if not given, as the RFC wants it.
    """
    size = sum(map(len, parts))
    mask = os.urandom(4) if mask is None else mask
    first = _BINARY if is_binary else _TEXT
    if size < 126:
        head = bytes((first, _MASKED | size))
    elif size < 65536:
        head = _short.pack(first, _MASKED | 126, size)
    else:
        head = _long.pack(first, _MASKED | 127, size)
    frame = bytearray().join((head, mask, *parts))
    mask_in_place(frame, len(head) + 4, mask)
    return frame


_READING = (WebSocketClientProtocol.STATE_OPEN, WebSocketClientProtocol.STATE_CLOSING)


class _Quiet:
    """A logger for Autobahn that says nothing."""

    def debug(self, *args: object, **named: object) -> None:
        """Nothing."""

    trace = info = warn = error = failure = critical = debug


class ShortPathWebSocket(WebSocketClientProtocol):
    """A WebSocket whose subclass has :meth:`messageReceived`."""

    log = _Quiet()
    data: bytes

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes | memoryview] = []
        self._have = 0
        self._needed = 2
        self._passing = 0  # bytes still to come of a frame that is too long
        self._fragments: list[bytes] = []
        self._fragmentsSize = 0
        self._fragmentsBinary = False

    def makeConnection(self, transport: Any) -> None:
        """The connection stands."""
        self._writer = PromptWriter(transport)
        super().makeConnection(transport)

    def messageReceived(self, data: bytes, start: int, end: int, isBinary: bool) -> None:
        """One whole message: ``data[start:end]``, to be copied if it is to be kept."""
        raise NotImplementedError

    def sendParts(self, parts: Sequence[Part], *, isBinary: bool = True) -> bool:
        """Send one message at once.

        :returns: whether the connection was open for it. After a Close in either direction nothing
            may follow: jupyter_server 2 misreads it and allocates gigabytes.
        """
        if self.state != self.STATE_OPEN:
            return False
        self._writer.write(frame_of(parts, is_binary=isBinary))
        return True

    # --- Autobahn's hooks --------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Bytes from the transport."""
        if self.state in _READING:
            self._readFrames(data)
        elif self.state != self.STATE_CLOSED:
            self.data += data
            if len(self.data) > MAX_HANDSHAKE_BYTES and b"\r\n\r\n" not in self.data:
                self.failHandshake("the answer to the handshake is too long")
            else:
                self.consumeData()

    def consumeData(self) -> None:
        """What came in one piece with the handshake goes the same way as the rest."""
        if self.state in _READING:
            data, self.data = self.data, b""
            if data:
                self._readFrames(data)
        else:
            super().consumeData()

    def processHandshake(self) -> None:
        """Autobahn's, but for answers that make it raise."""
        try:
            super().processHandshake()
        except Exception:
            self.failHandshake("the answer to the handshake cannot be read")

    # --- frames ------------------------------------------------------------------------------

    def _readFrames(self, data: bytes) -> None:
        if self._passing:
            passed = min(self._passing, len(data))
            self._passing -= passed
            data = data[passed:]
        if self._pieces:
            self._pieces.append(data)
            self._have += len(data)
            if self._have < self._needed:
                if len(self._pieces) > _MAX_PIECES:
                    self._pieces = [b"".join(self._pieces)]
                return
            data = b"".join(self._pieces)
            self._pieces = []
        position, end = 0, len(data)
        needed = 2
        while True:
            left = end - position
            if left < 2:
                needed = 2
                break
            first, second = data[position], data[position + 1]
            size = second
            head = 2
            if size > 125:
                head = 4 if size == 126 else 10
                if size > 127:
                    self._protocol_violation("masked server-to-client frame")
                    return
                if left < head:
                    needed = head
                    break
                unpack = _uint16 if size == 126 else _uint64
                (size,) = unpack.unpack_from(data, position + 2)
                if size > MAX_MESSAGE_BYTES:
                    if not self._otherFrame(first, b"", size):
                        return
                    start = position + head
                    position = min(start + size, end)
                    self._passing = start + size - position
                    continue
            needed = head + size
            if left < needed:
                break
            start = position + head
            position = start + size
            if first in (_BINARY, _TEXT) and not self._fragments:
                self.messageReceived(data, start, position, first == _BINARY)
            elif not self._otherFrame(first, data[start:position], size):
                return
            if self.state == self.STATE_CLOSED:
                return
        if left:
            self._pieces = [memoryview(data)[position:] if position else data]
        self._have = left
        self._needed = needed

    def _otherFrame(self, first: int, payload: bytes, size: int) -> bool:
        """A control frame, a part of a message, or one that is too long.

        :param payload: empty where it is too long.
        :returns: whether to go on reading.
        """
        opcode = first & 0x0F
        final = first & 0x80
        if first & 0x70:
            self._protocol_violation("reserved bits are set and no extension was agreed")
        elif size >> 63:
            self._protocol_violation("impossible length")
        elif opcode in (8, 9, 10):
            if not final or size > 125 or (opcode == 8 and size == 1):
                self._protocol_violation("impossible control frame")
                return False
            self.current_frame = FrameHeader(opcode, True, 0, len(payload), None)
            self.control_frame_data = [payload]
            self.processControlFrame()
            self.current_frame = None
            return bool(self.state != self.STATE_CLOSED)
        elif opcode > 2 or (opcode == 0) != bool(self._fragments):
            self._protocol_violation("impossible data frame")
        else:
            self._fragment(opcode, bool(final), payload, size)
            return True
        return False

    def _fragment(self, opcode: int, final: bool, payload: bytes, size: int) -> None:
        if opcode:
            self._fragmentsBinary = opcode == 2
            self._fragmentsSize = 0
        self._fragments.append(payload)
        self._fragmentsSize += size
        isTooLong = self._fragmentsSize > MAX_MESSAGE_BYTES
        if isTooLong:
            self._fragments = [b""]
        elif len(self._fragments) > _MAX_PIECES:
            self._fragments = [b"".join(self._fragments)]
        if final:
            message = b"".join(self._fragments)
            self._fragments = []
            if not isTooLong:
                self.messageReceived(message, 0, len(message), self._fragmentsBinary)


def transport_of(protocol: Any) -> Any:
    """The TCP transport at the bottom of a protocol's, below TLS if there is any."""
    transport = protocol.transport
    while (below := getattr(transport, "transport", None)) is not None:
        transport = below
    return transport
