"""Jupyter's two framings, against the server's own code and against hostile bytes."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_server.services.kernels.connection import base as server

from conchkernel.jupyter import framing
from conchkernel.jupyter.framing import FramingError, Message

objects = st.dictionaries(
    st.text(max_size=8), st.one_of(st.integers(), st.text(max_size=8), st.none()), max_size=4
).map(lambda told: json.dumps(told).encode())
messages = st.builds(
    Message,
    st.sampled_from(["shell", "control", "iopub", "stdin"]),
    objects,
    objects,
    objects,
    objects,
    st.lists(st.binary(max_size=40), max_size=4).map(tuple),
)
HEADER = b'{"msg_id":"a-1","msg_type":"conchkernel","username":"","session":"s"}'


@given(messages)
def test_v1BothWays(message: Message) -> None:
    """What is packed is unpacked, here and by a Jupyter server."""
    packed = framing.pack(message)
    assert framing.unpack(packed) == message
    channel, parts = server.deserialize_msg_from_ws_v1(packed)
    assert channel == message.channel
    assert parts == [
        message.header,
        message.parent,
        message.metadata,
        message.content,
        *message.buffers,
    ]
    assert server.serialize_msg_to_ws_v1(parts, channel) == packed


@given(messages)
def test_legacyBothWays(message: Message) -> None:
    """The same for the legacy framing, where the JSON may be written anew."""
    packed = framing.pack_legacy(message)
    is_binary = bool(message.buffers)
    if is_binary:
        assert server.deserialize_binary_message(packed)["buffers"] == list(message.buffers)
    else:
        assert json.loads(packed)["channel"] == message.channel
    unpacked = framing.unpack_legacy(packed, is_binary=is_binary)
    assert unpacked.channel == message.channel
    assert unpacked.buffers == message.buffers
    for name in ("header", "parent", "metadata", "content"):
        assert json.loads(getattr(unpacked, name)) == json.loads(getattr(message, name))


@given(st.binary(max_size=300), st.booleans())
def test_anyBytes(data: bytes, is_binary: bool) -> None:
    """Bytes that are no message are refused and are no carrier."""
    for unpack in (framing.unpack, lambda d: framing.unpack_legacy(d, is_binary=is_binary)):
        try:
            unpack(data)
        except FramingError:
            pass
    assert framing.find_carrier(data, 0, len(data)) == -1
    assert framing.find_carrier_legacy(data, 0, len(data)) == -1


@given(messages, st.data())
def test_damagedMessages(message: Message, data: st.DataObject) -> None:
    """A number changed in the table gives another message of no more bytes, or the refusal."""
    packed = bytearray(framing.pack(message))
    index = data.draw(st.integers(0, 6)) * 8
    number = data.draw(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, len(packed) + 1)))
    packed[index : index + 8] = struct.pack("<Q", number)
    try:
        found = framing.unpack(bytes(packed))
    except FramingError:
        return
    sizes = map(len, (found.header, found.parent, found.metadata, found.content, *found.buffers))
    assert sum(sizes) <= len(packed)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\7",
        struct.pack(">LL", 1, 8) + b"[]",
        struct.pack(">LL", 1, 8) + b'{"channel": 3}',
        struct.pack(">LL", 1, 4) + b"{}",
        struct.pack(">LLL", 2, 14, 12) + b"{}",
        struct.pack(">LL", 1, 8) + b"[" * 200_000,
        struct.pack(">L", 0x06000000) + b"\0" * 67,
    ],
)
def test_hostileLegacy(data: bytes) -> None:
    """Counts, offsets and JSON that nobody means."""
    with pytest.raises(FramingError):
        framing.unpack_legacy(data, is_binary=True)


@pytest.mark.parametrize(
    "table",
    [
        (7, 64, 71, 71, 71, 71, 71, 2**63),
        (7, 64, 71, 70, 71, 71, 71, 71),
        (7, 63, 71, 71, 71, 71, 71, 71),
        (2**64 - 1, 64, 71, 71, 71, 71, 71, 71),
        (5, 64, 71, 71, 71, 71, 71, 71),
        (1025, 64, 71, 71, 71, 71, 71, 71),
    ],
)
def test_hostileTables(table: tuple[int, ...]) -> None:
    """Offsets that go back, out of the message, or into the table."""
    with pytest.raises(FramingError):
        framing.unpack(struct.pack("<8Q", *table) + b"control")


CHANNELS = st.sampled_from(framing.CARRIER_CHANNELS)


@given(CHANNELS, st.binary(max_size=100), st.binary(max_size=20), st.binary(max_size=20))
def test_carriers(channel: bytes, payload: bytes, before: bytes, after: bytes) -> None:
    """A carrier is found where it lies between other bytes, and read by the server as it was
    meant."""
    prefix = framing.carrier_prefix(channel, HEADER, len(payload))
    packed = prefix + payload
    data = before + packed + after
    end = len(before) + len(packed)
    start = framing.find_carrier(data, len(before), end)
    assert data[start:end] == payload
    assert framing.unpack(packed) == Message(
        channel.decode(), HEADER, b"{}", b"{}", b"{}", (payload,)
    )
    for wrong in range(len(before), end):
        assert framing.find_carrier(data, len(before), wrong) == -1


@given(CHANNELS, st.binary(max_size=100), st.binary(max_size=20))
def test_legacyCarriers(channel: bytes, payload: bytes, before: bytes) -> None:
    """The same in the legacy framing, as a server writes it and as we do."""
    told = {
        "header": json.loads(HEADER),
        "msg_id": "a-1",
        "msg_type": "conchkernel",
        "parent_header": {},
        "metadata": {},
        "content": {},
        "buffers": [payload],
        "channel": channel.decode(),
    }
    ours = framing.carrier_prefix_legacy(channel, HEADER) + payload
    assert server.deserialize_binary_message(ours)["buffers"] == [payload]
    for packed in (server.serialize_binary_message(told), ours):
        data = before + packed
        start = framing.find_carrier_legacy(data, len(before), len(data))
        assert data[start:] == payload


@pytest.mark.parametrize(
    "message",
    [
        Message("shell", HEADER, b"{}", b"{}", b"{}", (b"x",)),
        Message("iopubxx", HEADER, b"{}", b"{}", b"{}", (b"x",)),
        Message("control", HEADER, b"{}", b"{}", b"{}"),
        Message("control", HEADER, b"{}", b"{}", b"{}", (b"x", b"y")),
        Message("control", b'{"msg_type":"status"}', HEADER, b"{}", b"{}", (b"x",)),
        Message("control", b'{"msg_type":"status"}', b"{}", HEADER, b"{}", (b"x",)),
        Message("control", b'{"msg_type":"status"}', b"{}", b"{}", HEADER, (HEADER,)),
        Message(
            "control",
            json.dumps({"msg_type": "x", "username": '"msg_type":"conchkernel"'}).encode(),
            b"{}",
            b"{}",
            b"{}",
            (b"x",),
        ),
    ],
)
def test_notCarriers(message: Message) -> None:
    """Messages that come close, and one whose text holds the mark."""
    packed = framing.pack(message)
    assert framing.find_carrier(packed, 0, len(packed)) == -1
    packed = framing.pack_legacy(message)
    assert framing.find_carrier_legacy(packed, 0, len(packed)) == -1


def test_carrierOfAnyJsonWriter() -> None:
    """Kernels write JSON with and without spaces."""
    for separators in ((", ", ": "), (",", ":")):
        header = json.dumps(json.loads(HEADER), separators=separators).encode()
        packed = framing.pack(Message("control", header, b"{}", b"{}", b"{}", (b"data",)))
        assert packed[framing.find_carrier(packed, 0, len(packed)) :] == b"data"
