"""ZMTP 3.0, as much of it as the agent needs to stand in for a ROUTER. Sans-IO.

The peers are the DEALERs of a Jupyter server, the mechanism is NULL (https://rfc.zeromq.org/spec/23).
On top of it stand Jupyter's messages: a delimiter, a signature, four JSON parts, buffers.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import time

_MORE, _LONG, _COMMAND = 1, 2, 4
_NULL = b"NULL".ljust(20, b"\0")
#: Signature, version 3.0, mechanism, not as-server, filler.
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + _NULL + bytes(32)
_GREETING_SIZE = 64
_READY_NAME = b"\x05READY"
_MAX_READY = 1024
#: A Jupyter message of ours: delimiter, signature, header, parent, metadata, content, buffer.
_FRAMES = 7
_DELIMITER = b"<IDS|MSG>"
_MARK = b'"conchkernel"'
_MAX_PART = 4096  # of what stands before the buffer; ours are about 200 bytes
_EMPTY = b"\x01\x02{}" * 3  # parent, metadata, content
_UINT64 = struct.Struct(">Q")
_UINT32 = struct.Struct(">I")


class Malformed(Exception):
    """The peer does not keep to ZMTP, or to its bounds."""


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + _UINT32.pack(len(value)) + value


_READY = _READY_NAME + _property(b"Socket-Type", b"ROUTER") + _property(b"Identity", b"")
#: All that a ROUTER says before the first message.
HELLO = _GREETING + bytes([_COMMAND, len(_READY)]) + _READY


def hello(data: bytes) -> tuple[bytes, int] | None:
    """What a peer says before its first message.

    :returns: its identity, and how long its hello is; ``None`` if that has not all come yet.
    :raises Malformed: if it speaks another version, or wants a mechanism.
    """
    if len(data) < _GREETING_SIZE + 2:
        return None
    if data[0] != 0xFF or data[9] != 0x7F or data[10] < 3 or data[12:32] != _NULL:
        raise Malformed("another greeting")
    if data[_GREETING_SIZE] & ~_LONG != _COMMAND:
        raise Malformed("no command")
    frame = _frame(memoryview(data), _GREETING_SIZE, _MAX_READY)
    if frame is None:
        return None
    start, end = frame
    body = data[start:end]
    if not body.startswith(_READY_NAME):
        raise Malformed("no READY")
    identity = b""
    position = len(_READY_NAME)
    while position < len(body):
        named = position + 1 + body[position]
        valued = named + 4
        if valued > len(body):
            raise Malformed("truncated property")
        (length,) = _UINT32.unpack_from(body, named)
        if valued + length > len(body):
            raise Malformed("truncated property")
        if body[position + 1 : named].lower() == b"identity":
            identity = body[valued : valued + length]
        position = valued + length
    return identity, end


def _frame(view: memoryview, position: int, most: int) -> tuple[int, int] | None:
    """Where the body of the frame at ``position`` begins and ends; ``None`` if it is not whole."""
    available = len(view) - position
    if available < 2:
        return None
    if view[position] & _LONG:
        if available < 9:
            return None
        (length,) = _UINT64.unpack_from(view, position + 1)
        start = position + 9
    else:
        length = view[position + 1]
        start = position + 2
    if length > most:
        raise Malformed("a frame is too long")
    end = start + length
    return (start, end) if end <= len(view) else None


def find_message(
    view: memoryview, position: int, most: int
) -> tuple[list[memoryview], int] | None:
    """The message that begins at ``position``.

    :param most: how long its longest part may be.
    :returns: its frames, and where it ends; ``None`` if it is not whole. A command of ZMTP's
        (none is needed here) is a message without frames.
    :raises Malformed: if no message of ours looks like that.
    """
    frames: list[memoryview] = []
    while True:
        found = _frame(view, position, most if len(frames) == _FRAMES - 1 else _MAX_PART)
        if found is None:
            return None
        flags = view[position]
        start, position = found
        if flags & _COMMAND:
            if frames:
                raise Malformed("a command within a message")
            return frames, position
        frames.append(view[start:position])
        if not flags & _MORE:
            return frames, position
        if len(frames) == _FRAMES:
            raise Malformed("too many frames")


class Signer:
    """Writes and checks the messages of type ``conchkernel`` of one kernel.

    :param key: of the kernel's session; empty where it does not sign.
    :param digest: the name of its hash function.
    :raises ValueError: if that is none that HMAC can use.
    """

    def __init__(self, key: bytes, digest: str) -> None:
        # HMAC (RFC 2104) from two states that are copied. To look a hash function up by its name,
        # as hmac.digest does each time, costs more than to use it: 18 us a message in an agent
        # that has slept.
        blank = hashlib.new(digest)
        if not blank.digest_size:
            raise ValueError(f"{digest} has no size of its own")
        block = blank.block_size
        key = hashlib.new(digest, key).digest() if len(key) > block else key
        self._signs = bool(key)
        padded = key.ljust(block, b"\0")
        self._inner = hashlib.new(digest, bytes(byte ^ 0x36 for byte in padded))
        self._outer = hashlib.new(digest, bytes(byte ^ 0x5C for byte in padded))
        self._sent = 0
        nonce = os.urandom(8).hex()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
        self._start = f'{{"msg_id":"{nonce}-'
        self._end = (
            f'","msg_type":"conchkernel","username":"kernel","session":"{nonce}",'
            f'"date":"{date}","version":"5.3"}}'
        )

    def _sign(self, parts: bytes) -> bytes:
        if not self._signs:
            return b""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(parts)
        outer.update(inner.digest())
        return outer.hexdigest().encode()

    def head(self, size: int) -> bytes:
        """What goes before the ``size`` bytes of a message's buffer."""
        self._sent += 1
        header = f"{self._start}{self._sent}{self._end}".encode()
        signature = self._sign(header + b"{}{}{}")
        return b"".join(
            (
                b"\x01\x09<IDS|MSG>\x01",
                bytes((len(signature),)),
                signature,
                b"\x01",
                bytes((len(header),)),
                header,
                _EMPTY,
                b"\x02" + _UINT64.pack(size) if size > 255 else bytes((0, size)),
            )
        )

    def checked(self, frames: list[memoryview]) -> memoryview | None:
        """The buffer of a message; ``None`` if it is not one of ours, or not signed."""
        if len(frames) != _FRAMES or frames[0] != _DELIMITER or not frames[6]:
            return None
        header = bytes(frames[2])
        if _MARK not in header:
            return None
        signature = self._sign(b"".join((header, *frames[3:6])))
        return frames[6] if hmac.compare_digest(signature, bytes(frames[1])) else None
