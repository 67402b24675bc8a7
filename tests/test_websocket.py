"""The frame reader and writer, against frames of any size in any number of pieces."""

from __future__ import annotations

import pytest
from autobahn.twisted.websocket import WebSocketClientFactory
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransportWithDisconnection

from conchkernel.jupyter import websocket
from conchkernel.jupyter.websocket import ShortPathWebSocket, frame_of


class Recorder(ShortPathWebSocket):
    """An open connection that keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[bytes, bool]] = []
        self.factory = WebSocketClientFactory("ws://host", reactor=Clock())
        self.factory.setProtocolOptions(
            openHandshakeTimeout=0, closeHandshakeTimeout=0, serverConnectionDropTimeout=0
        )
        self.transport = StringTransportWithDisconnection()
        self.transport.protocol = self
        self.makeConnection(self.transport)
        self.transport.clear()
        self.transport.registerProducer(self.transport, True)
        self.state = self.STATE_OPEN
        self.websocket_version = 18
        self.current_frame = None

    def messageReceived(self, data: bytes, start: int, end: int, isBinary: bool) -> None:
        self.messages.append((data[start:end], isBinary))

    @property
    def failed(self) -> bool:
        """Whether we ended the connection."""
        return bool(self.state == self.STATE_CLOSED)


def frame(payload: bytes, first: int = 0x82) -> bytes:
    """What a server sends: an unmasked frame."""
    size = len(payload)
    if size < 126:
        head = bytes((first, size))
    elif size < 65536:
        head = bytes((first, 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, 127)) + size.to_bytes(8, "big")
    return head + payload


def unmasked(data: bytes) -> tuple[int, bytes]:
    """First octet and payload of the one frame that a client sent."""
    first, size, offset = data[0], data[1] & 127, 2
    assert data[1] & 128
    if size > 125:
        width = 2 if size == 126 else 8
        size = int.from_bytes(data[2 : 2 + width], "big")
        offset += width
    mask = data[offset : offset + 4]
    payload = data[offset + 4 :]
    assert len(payload) == size
    return first, bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


SIZES = st.sampled_from([0, 1, 2, 125, 126, 127, 300, 65535, 65536, 70000])


@settings(deadline=None)
@given(st.lists(st.tuples(SIZES, st.booleans()), max_size=5), st.data())
def test_messagesInAnyPieces(sizes: list[tuple[int, bool]], data: st.DataObject) -> None:
    """However the bytes are cut, the same messages come out."""
    wanted = [(bytes([index % 251]) * size, text) for index, (size, text) in enumerate(sizes)]
    stream = b"".join(frame(payload, 0x82 if text else 0x81) for payload, text in wanted)
    protocol = Recorder()
    for cut in data.draw(st.lists(st.sampled_from([1, 2, 3, 9, 11, 1000, 66000]), max_size=40)):
        protocol.dataReceived(stream[:cut])
        stream = stream[cut:]
    protocol.dataReceived(stream)
    assert protocol.messages == wanted
    assert not protocol.failed


def test_byteByByte() -> None:
    """A frame that comes one octet at a time is joined now and then, and whole in the end."""
    protocol = Recorder()
    payload = bytes(range(256)) * 20
    for index in range(len(stream := frame(payload) + frame(b"after"))):
        protocol.dataReceived(stream[index : index + 1])
        assert len(protocol._pieces) <= websocket._MAX_PIECES + 1
    assert protocol.messages == [(payload, True), (b"after", True)]


@settings(deadline=None)
@given(st.lists(SIZES, min_size=2, max_size=5), st.booleans(), st.integers(99, 100000))
def test_fragments(sizes: list[int], binary: bool, cut: int) -> None:
    """A message in several frames, with a ping between them, is one message."""
    parts = [bytes([index]) * size for index, size in enumerate(sizes)]
    stream = frame(parts[0], 2 if binary else 1)
    for part in parts[1:-1]:
        stream += frame(part, 0)
    stream += frame(b"ping", 0x89) + frame(parts[-1], 0x80)
    protocol = Recorder()
    for start in range(0, len(stream), cut):
        protocol.dataReceived(stream[start : start + cut])
    assert protocol.messages == [(b"".join(parts), binary)]
    assert unmasked(protocol.transport.value()) == (0x8A, b"ping")


@pytest.mark.parametrize(
    "stream",
    [
        b"\x82\x85maskdata!",
        frame(b"x", 0xC2),
        frame(b"x", 0x83),
        frame(b"x", 0x8B),
        frame(b"x", 0x80),
        frame(b"x", 2) + frame(b"y", 0x82),
        frame(b"x", 2) + frame(b"y", 2),
        frame(b"x" * 126, 0x89),
        frame(b"x", 0x09),
        frame(b"x", 0x88),
        b"\x82\x7f" + (2**63).to_bytes(8, "big"),
        b"\x82\x7f" + (2**64 - 1).to_bytes(8, "big"),
        b"\x89\x7f" + (2**32).to_bytes(8, "big"),
    ],
)
def test_hostileFrames(stream: bytes) -> None:
    """A violation ends the connection; nothing is kept, nothing after it is read."""
    protocol = Recorder()
    protocol.dataReceived(stream + frame(b"later"))
    assert protocol.failed
    assert protocol.messages == []


@pytest.mark.parametrize("cut", [1, 7, 999, 10_000])
@pytest.mark.parametrize(
    "long",
    [
        frame(b"x" * 1001),
        frame(b"x" * 70_000, 0x81),
        frame(b"x" * 600, 2) + frame(b"x" * 600, 0x80),
        frame(b"x" * 5000, 2) + frame(b"", 0) + frame(b"ping", 0x89) + frame(b"y", 0x80),
        frame(b"x", 2) + frame(b"x" * 5000, 0x80),
    ],
)
def test_tooLong(monkeypatch: pytest.MonkeyPatch, long: bytes, cut: int) -> None:
    """A message that is too long to be ours is passed over, and not kept meanwhile."""
    monkeypatch.setattr(websocket, "MAX_MESSAGE_BYTES", 1000)
    protocol = Recorder()
    stream = long + frame(b"after")
    for start in range(0, len(stream), cut):
        protocol.dataReceived(stream[start : start + cut])
        assert sum(map(len, protocol._pieces)) <= cut + 1010
        assert sum(map(len, protocol._fragments)) <= 1000
    assert protocol.messages == [(b"after", True)]
    assert not protocol.failed


def test_nothingAfterClose() -> None:
    """A Close is answered, and after it no data frame leaves."""
    protocol = Recorder()
    protocol.dataReceived(frame((1000).to_bytes(2, "big"), 0x88))
    assert unmasked(protocol.transport.value())[0] == 0x88
    protocol.transport.clear()
    assert not protocol.sendParts([b"data"])
    assert protocol.transport.value() == b""


def test_endlessHandshake() -> None:
    """A server that never ends its answer is left."""
    protocol = Recorder()
    protocol.state = protocol.STATE_CONNECTING
    protocol.dataReceived(b"HTTP/1.1 101 Fine\r\nX: " + b"x" * websocket.MAX_HANDSHAKE_BYTES)
    assert protocol.failed


def test_unreadableHandshake() -> None:
    """An answer that makes Autobahn raise is a refusal too."""
    protocol = Recorder()
    protocol.state = protocol.STATE_CONNECTING
    protocol.dataReceived(b"HTTP/1.1 101 \xff\xfe\r\nno colon\r\n\r\n")
    assert protocol.failed


@settings(deadline=None, max_examples=20)
@given(st.lists(SIZES, max_size=3), st.booleans())
def test_sentFrames(sizes: list[int], binary: bool) -> None:
    """What we send is one masked frame of the parts, whatever they are made of."""
    parts = [memoryview(bytes([index + 1]) * size) for index, size in enumerate(sizes)]
    first, payload = unmasked(frame_of(parts, is_binary=binary))
    assert first == (0x82 if binary else 0x81)
    assert payload == b"".join(parts)


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4), st.integers(0, 20))
def test_maskTwins(data: bytes, mask: bytes, start: int) -> None:
    """The compiled masking and its plain twin do the same, and leave what is before alone."""
    start = min(start, len(data))
    wanted = data[:start] + bytes(b ^ mask[i % 4] for i, b in enumerate(data[start:]))
    twins = {websocket._mask_plain, websocket.mask_in_place}
    for twin in twins:
        masked = bytearray(data)
        twin(masked, start, mask)
        assert masked == wanted


def test_masksDiffer() -> None:
    """Each frame has its own mask."""
    assert len({bytes(frame_of([b"\0" * 64])) for _ in range(20)}) == 20
