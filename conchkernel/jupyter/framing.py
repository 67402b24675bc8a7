"""Jupyter messages inside WebSocket messages: the v1 binary framing and the legacy one.

Sans-IO. Besides whole messages it knows one shape by heart, the *carrier*: a message on the control
channel, of a type of our own, with one buffer. A carrier is written and recognised without JSON,
since every byte of every session goes through here.

Nothing here believes a length or an offset before it was held against the message's end.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from conchkernel.errors import ConchKernelError

#: The WebSocket subprotocol of the v1 framing.
V1_SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"
#: The type of carrier messages, known to the relay.
CARRIER_TYPE = "conchkernel"
#: The channels they go over: to the relay in the kernel, and to the agent itself.
CARRIER_CHANNELS = (b"control", b"stdin")
#: A message has four JSON parts and perhaps buffers; ours one, widgets a few, nothing thousands.
MAX_PARTS = 1024

Part = bytes | bytearray | memoryview

_uint64le = struct.Struct("<Q")
_uint32be = struct.Struct(">L")

# v1 of a carrier: count, offsets (channel, header, parent, metadata, content, buffer, end).
_CARRIER_OFFSETS = 7
_carrier = struct.Struct("<8Q")
_EMPTY = b"{}{}{}"  # parent, metadata, content
#: Where a carrier's header begins -> the channel that its place tells.
_HEADER_STARTS = {_carrier.size + len(channel): channel for channel in CARRIER_CHANNELS}
_SHORTEST = min(_HEADER_STARTS)


def _spelled(name: str, value: str) -> tuple[bytes, bytes]:
    """A member of an object in the two ways in which JSON writers space it.

    Inside a string its quotes would be escaped: it is found only where it is a member.
    """
    return f'"{name}": {value}'.encode("ascii"), f'"{name}":{value}'.encode("ascii")


_MARKS = _spelled("msg_type", f'"{CARRIER_TYPE}"')
#: The legacy framing has all of a message in one object; what could hold objects is empty.
_LEGACY_MARKS = (
    _MARKS,
    tuple(
        mark
        for channel in CARRIER_CHANNELS
        for mark in _spelled("channel", f'"{channel.decode()}"')
    ),
    _spelled("parent_header", "{}"),
    _spelled("metadata", "{}"),
    _spelled("content", "{}"),
)
#: Header of a carrier, or the whole JSON of a legacy one, at most; theirs are about 250 bytes.
_MAX_CARRIER_JSON = 4096


class FramingError(ConchKernelError):
    """The server sent what is no Jupyter message. Quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class Message:
    """A Jupyter message, its JSON not yet read."""

    channel: str
    header: bytes
    parent: bytes
    metadata: bytes
    content: bytes
    buffers: tuple[bytes, ...] = ()


# --- v1 ----------------------------------------------------------------------------------------


def pack(message: Message) -> bytes:
    """A message in the v1 framing."""
    channel = message.channel.encode("ascii")
    parts = (message.header, message.parent, message.metadata, message.content, *message.buffers)
    count = len(parts) + 2
    offset = 8 * (count + 1)
    offsets = [offset, offset := offset + len(channel)]
    for part in parts:
        offset += len(part)
        offsets.append(offset)
    return b"".join([struct.pack(f"<{count + 1}Q", count, *offsets), channel, *parts])


def unpack(data: bytes) -> Message:
    """A message from the v1 framing.

    :raises FramingError: if it is none.
    """
    if len(data) < 8:
        raise FramingError("truncated message")
    (count,) = _uint64le.unpack_from(data)
    if not 6 <= count <= MAX_PARTS or 8 * (count + 1) > len(data):
        raise FramingError("impossible number of parts")
    offsets = struct.unpack_from(f"<{count}Q", data, 8)
    _check(offsets, 8 * (count + 1), len(data))
    channel, *parts = (data[start:end] for start, end in pairwise(offsets))
    return Message(_channel(channel), parts[0], parts[1], parts[2], parts[3], tuple(parts[4:]))


def _check(offsets: Sequence[int], first: int, end: int) -> None:
    """Offsets begin behind the table, never go back and stay inside."""
    previous = first
    for offset in offsets:
        if offset < previous or offset > end:
            raise FramingError("impossible offset")
        previous = offset


def _channel(name: bytes) -> str:
    try:
        return name.decode("ascii")
    except UnicodeDecodeError:
        raise FramingError("impossible name of a channel") from None


# --- legacy ------------------------------------------------------------------------------------


def pack_legacy(message: Message) -> bytes:
    """A message in the legacy framing: bare JSON without buffers, binary with them.

    The former goes into a text frame, the latter into a binary one.
    """
    text = b'{"channel":"%s","header":%s,"parent_header":%s,"metadata":%s,"content":%s' % (
        message.channel.encode("ascii"),
        message.header,
        message.parent,
        message.metadata,
        message.content,
    )
    if not message.buffers:
        return text + b',"buffers":[]}'
    parts = [text + b"}", *message.buffers]
    offset = 4 * (len(parts) + 1)
    offsets = []
    for part in parts:
        offsets.append(offset)
        offset += len(part)
    return b"".join([struct.pack(f">{len(parts) + 1}L", len(parts), *offsets), *parts])


def unpack_legacy(data: bytes, *, is_binary: bool) -> Message:
    """A message from the legacy framing.

    :raises FramingError: if it is none.
    """
    buffers: tuple[bytes, ...] = ()
    if is_binary:
        if len(data) < 4:
            raise FramingError("truncated message")
        (count,) = _uint32be.unpack_from(data)
        if not 1 <= count <= MAX_PARTS or 4 * (count + 1) > len(data):
            raise FramingError("impossible number of parts")
        offsets = (*struct.unpack_from(f">{count}L", data, 4), len(data))
        _check(offsets, 4 * (count + 1), len(data))
        data, *rest = (data[start:end] for start, end in pairwise(offsets))
        buffers = tuple(rest)
    told = read_json(data)
    channel = told.get("channel")
    if not isinstance(channel, str):
        raise FramingError("no channel")
    header, parent, metadata, content = (
        json.dumps(told.get(name) or {}).encode()
        for name in ("header", "parent_header", "metadata", "content")
    )
    return Message(channel, header, parent, metadata, content, buffers)


def read_json(data: bytes) -> dict[str, Any]:
    """One JSON part of a message.

    :raises FramingError: if it is no JSON object.
    """
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        raise FramingError("impossible JSON") from None
    if not isinstance(told, dict):
        raise FramingError("impossible JSON")
    return told


# --- carriers ----------------------------------------------------------------------------------


def carrier_prefix(channel: bytes, header: bytes, size: int) -> bytes:
    """What stands before the ``size`` bytes of a carrier's buffer, in the v1 framing."""
    start = _carrier.size + len(channel)
    parent = start + len(header)
    return b"".join(
        [
            _carrier.pack(
                _CARRIER_OFFSETS,
                _carrier.size,
                start,
                parent,
                parent + 2,
                parent + 4,
                parent + 6,
                parent + 6 + size,
            ),
            channel,
            header,
            _EMPTY,
        ]
    )


def carrier_prefix_legacy(channel: bytes, header: bytes) -> bytes:
    """The same in the legacy framing, which tells no size."""
    text = b'{"channel":"%s","header":%s,"parent_header":{},"metadata":{},"content":{}}' % (
        channel,
        header,
    )
    return struct.pack(">3L", 2, 12, 12 + len(text)) + text


def find_carrier(data: bytes, start: int, end: int) -> int:
    """Where the buffer of the carrier begins that lies in ``data[start:end]``.

    :returns: an index into ``data``; the buffer ends at ``end``. ``-1`` if it is another message.
    """
    if end - start < _SHORTEST:
        return -1
    count, channel, header, parent, _, content, buffer, last = _carrier.unpack_from(data, start)
    if (
        count != _CARRIER_OFFSETS
        or channel != _carrier.size
        or header not in _HEADER_STARTS
        or not header <= parent <= header + _MAX_CARRIER_JSON
        or not parent <= content <= buffer <= last
        or last != end - start
        or data[start + channel : start + header] != _HEADER_STARTS[header]
    ):
        return -1
    for mark in _MARKS:
        if data.find(mark, start + header, start + parent) >= 0:
            return start + int(buffer)
    return -1


def find_carrier_legacy(data: bytes, start: int, end: int) -> int:
    """:func:`find_carrier` for a binary message in the legacy framing."""
    if end - start < 12:
        return -1
    count, text, buffer = struct.unpack_from(">3L", data, start)
    if count != 2 or text != 12 or not text < buffer <= min(end - start, _MAX_CARRIER_JSON):
        return -1
    for marks in _LEGACY_MARKS:
        if all(data.find(mark, start + text, start + buffer) < 0 for mark in marks):
            return -1
    return start + int(buffer)
