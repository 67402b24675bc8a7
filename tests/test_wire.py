"""The wire, both ends in memory: every cut, every fragmentation, no credit, hostile lengths."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conchkernel import frames, wire, wirestream


class Recorder:
    """A receiver that writes down what it is told."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.err = bytearray()
        self.events: list[object] = []
        self.sent = 0

    def wire_data(self, data, extended):
        (self.err if extended else self.out).extend(data)

    def wire_sent(self, count):
        self.sent += count

    def wire_credit(self):
        pass

    def __getattr__(self, name):
        if not name.startswith("wire_"):
            raise AttributeError(name)
        return lambda *args: self.events.append((name[5:], *args))


class Pair:
    """A gateway's endpoint and an agent's, with a carrier between that can be cut."""

    def __init__(self) -> None:
        self.opened: list[tuple[wirestream.Stream, dict]] = []
        self.receivers: dict[int, Recorder] = {}
        self.told: list[tuple[int, bytes]] = []
        self.gateway = wire.Endpoint(told=lambda *event: self.told.append(event))
        self.agent = wire.Endpoint(opened=self._opened, told=lambda *e: self.told.append(e))
        self.now = 0.0

    def _opened(self, stream, parameters):
        self.opened.append((stream, parameters))
        stream.receiver = self.receivers[stream.id] = Recorder()

    def open(self, **parameters):
        """A stream at both ends: (gateway's, its recorder, agent's, its recorder)."""
        near = Recorder()
        stream = self.gateway.open({"kind": "process", **parameters}, near)
        self.pump()
        far, _ = self.opened[-1]
        return stream, near, far, self.receivers[far.id]

    def pump(self):
        """Move messages until both ends have nothing to say."""
        moved = True
        while moved:
            moved = False
            for source, target in ((self.gateway, self.agent), (self.agent, self.gateway)):
                while (message := source.next_message()) is not None:
                    moved = True
                    target.receive(b"".join(message), self.now)

    def attach_again(self):
        """A new carrier: each sends again what the other has not."""
        back = self.agent.resume(self.gateway.received_bytes)
        forth = self.gateway.resume(self.agent.received_bytes)
        for message in forth:
            self.agent.receive(b"".join(message), self.now)
        for message in back:
            self.gateway.receive(b"".join(message), self.now)
        self.pump()


def test_open_tells_the_parameters_and_the_answer():
    """OPEN reaches the agent with its JSON; OPENED comes back."""
    pair = Pair()
    stream, near, far, _ = pair.open(command="true")
    assert pair.opened[0][1] == {"kind": "process", "command": "true"}
    far.control(frames.OPENED, b'{"pid": 7}')
    pair.pump()
    assert near.events == [("opened", {"pid": 7})]
    assert stream.id == far.id == 1


def test_nothing_is_sent_before_credit_and_all_of_it_after():
    """An agent's output waits for CREDIT; stdout and stderr share the account."""
    pair = Pair()
    stream, near, far, _ = pair.open()
    far.write(b"x" * 100)
    far.write(b"y" * 50, frames.EXTENDED)
    far.append(frames.EOF)
    pair.pump()
    assert near.out == b""
    assert far.room == -150
    stream.grant(120)
    pair.pump()
    assert (bytes(near.out), bytes(near.err)) == (b"x" * 100, b"y" * 20)
    stream.grant(1000)
    pair.pump()
    assert bytes(near.err) == b"y" * 50
    assert near.events == [("eof",)]


def test_many_small_writes_are_joined():
    """Bytes that come one by one while there is no credit are few objects, and stay in order."""
    pair = Pair()
    near, _, _, far = pair.open()
    data = bytes(number % 251 for number in range(300_000))
    for number in range(0, len(data), 3):
        near.write(data[number : number + 3])
        if number % 30_000 == 0:
            pair.pump()
    assert len(near._queue) < 20
    assert near.queued == len(data) - frames.INITIAL_CREDIT
    pair.agent.streams[near.id].grant(len(data))
    pair.pump()
    assert far.out == data


def test_pieces_go_as_one_frame():
    """What was written in pieces arrives at once; what stands between them parts them."""
    pair = Pair()
    stream, near, far, _ = pair.open()
    stream.grant(1 << 20)
    pair.pump()
    came = []
    near.wire_data = lambda data, extended: came.append((bytes(data), extended))
    for flags in (0, 0, frames.EXTENDED, frames.EXTENDED, 0):
        far.write(b"x" * 10_000, flags)
    pair.pump()
    x = b"x" * 10_000
    assert came == [(x * 2, 0), (x * 2, frames.EXTENDED), (x, 0)]
    came.clear()
    far.write(x * 60)
    far.write(x)
    pair.pump()
    assert b"".join(data for data, _ in came) == x * 61
    stream.grant(2_000_000)
    pair.pump()


def test_a_near_carrier_that_is_used_for_bulk_is_worth_a_padding():
    """One that is slow, or carries keys, is not."""
    pair = Pair()
    stream, near, far, _ = pair.open()
    stream.grant(1 << 24)
    for seconds, due in ((0.02, False), (0.001, True)):
        pair.agent.ping(pair.now)
        message = b"".join(pair.agent.next_message())
        pair.gateway.receive(message, pair.now)
        pair.now += seconds
        pair.pump()
        far.write(b"x" * 600_000)
        pair.pump()
        assert pair.agent.padding_due is due
    assert len(near.out) == 1_200_000


def test_a_natural_end_drains_before_it_closes():
    """DATA, EOF, EXIT and CLOSE written at once all arrive, in order, as credit allows."""
    pair = Pair()
    stream, near, far, _ = pair.open()
    far.write(b"z" * 1000)
    far.append(frames.EOF)
    far.append(frames.EXIT, b'{"status": 3}')
    far.append(frames.CLOSE)
    pair.pump()
    assert near.events == []
    for limit in (400, 999, 1000):
        stream.grant(limit)
        pair.pump()
    assert bytes(near.out) == b"z" * 1000
    assert near.events == [("eof",), ("exit", {"status": 3}), ("closed", "")]
    assert not pair.gateway.streams
    assert not pair.agent.streams


def test_close_overtakes_and_what_still_comes_is_ignored():
    """A CLOSE of the gateway drops queued data at both ends; late frames do no harm."""
    pair = Pair()
    stream, near, far, far_receiver = pair.open()
    stream.grant(10)
    pair.pump()
    far.write(b"late")
    late = pair.agent.next_message()
    stream.write(b"q" * 1_000_000)
    stream.close()
    pair.gateway.receive(b"".join(late), 0.0)
    pair.pump()
    assert far_receiver.events == [("closed", "")]
    assert near.out == b""
    assert not pair.agent.streams


def test_refusal_reaches_the_opener():
    """REFUSED is the last word on a stream."""
    pair = Pair()
    _, near, far, _ = pair.open()
    wirestream.refuse(far, 3, "no")
    pair.pump()
    assert near.events == [("refused", 3, "no")]
    assert not pair.gateway.streams


def test_keys_overtake_a_flood():
    """A small write on one stream is in the next message although another has megabytes queued."""
    pair = Pair()
    flood, *_ = pair.open()
    keys, _, _, typed = pair.open()
    for far, _parameters in pair.opened:
        far.grant(1 << 24)
    pair.pump()
    flood.write(b"f" * 400_000)
    keys.write(b"k")
    pair.agent.receive(b"".join(pair.gateway.next_message()), 0.0)
    assert bytes(typed.out) == b"k"


def test_bulk_streams_take_turns():
    """Two floods alternate message by message."""
    pair = Pair()
    one, _, _, first = pair.open()
    two, _, _, second = pair.open()
    for far, _parameters in pair.opened:
        far._product = 1 << 24
        far.grant(1 << 24)
    pair.pump()
    one.write(b"1" * 2_000_000)
    two.write(b"2" * 2_000_000)
    for _ in range(4):
        pair.agent.receive(b"".join(pair.gateway.next_message()), 0.0)
    assert abs(len(first.out) - len(second.out)) <= frames.MAX_MESSAGE
    assert len(first.out) > 0
    assert len(second.out) > 0


def test_data_stops_before_the_bounds_and_control_still_passes():
    """Without acknowledgements DATA stops at its bound, and CREDIT, EOF and CLOSE go on."""
    pair = Pair()
    stream, _, _, _ = pair.open()
    stream.limit = 1 << 40
    stream.write(b"d" * (8 << 20))
    kept = []
    while (message := pair.gateway.next_message()) is not None:
        kept.append(message)
    unacked = pair.gateway.sent_bytes - pair.gateway.acked_bytes
    assert unacked <= frames.DATA_UNACKED_BYTES
    assert pair.gateway.blocked
    stream.control(frames.RESIZE, frames.SIZE.pack(80, 24, 0, 0))
    assert len(b"".join(pair.gateway.next_message())) < 100


def test_messages_are_bounded_by_number():
    """A thousand single keys without an acknowledgement stop at 400 messages."""
    pair = Pair()
    stream, _, _, _ = pair.open()
    count = 0
    for _ in range(1000):
        stream.write(b"k")
        count += pair.gateway.next_message() is not None
    assert count <= frames.DATA_UNACKED_MESSAGES


def test_acknowledgements_go_alone_when_they_are_due():
    """A silent receiver acknowledges by bytes and by messages, and never an acknowledgement."""
    pair = Pair()
    stream, _, _, _ = pair.open()
    pair.pump()
    for _ in range(frames.ACK_MESSAGES):
        stream.write(b"k")
        pair.agent.receive(b"".join(pair.gateway.next_message()), 0.0)
    alone = pair.agent.next_message()
    assert len(b"".join(alone)) == frames.MESSAGE.size
    pair.gateway.receive(b"".join(alone), 0.0)
    assert pair.gateway.acked_bytes == pair.gateway.sent_bytes
    assert pair.gateway.next_message() is None


def test_a_gap_is_noticed_and_nothing_is_delivered():
    """A lost message is a WireGap; attaching again brings everything once."""
    pair = Pair()
    stream, _, _, typed = pair.open()
    stream.write(b"lost")
    pair.gateway.next_message()
    stream.write(b"found")
    with pytest.raises(frames.WireGap):
        pair.agent.receive(b"".join(pair.gateway.next_message()), 0.0)
    assert typed.out == b""
    pair.attach_again()
    assert bytes(typed.out) == b"lostfound"


def test_a_peer_that_forgot_is_not_resumed():
    """Resuming below what was acknowledged, or beyond what was sent, is refused."""
    pair = Pair()
    pair.open()
    pair.agent.ping(0.0)
    pair.pump()
    assert pair.gateway.acked_bytes > 0
    with pytest.raises(frames.WireViolation):
        pair.gateway.resume(0)
    with pytest.raises(frames.WireViolation):
        pair.gateway.resume(pair.gateway.sent_bytes + 1)


def road(rtt: float) -> tuple[Pair, wirestream.Stream, wirestream.Stream]:
    """A stream over a road of that round trip, and its far end."""
    pair = Pair()
    stream, _, far, _ = pair.open()
    pair.gateway.ping(pair.now)
    question = pair.gateway.next_message()
    pair.agent.receive(b"".join(question), pair.now + rtt / 2)
    pair.now += rtt
    pair.pump()
    assert pair.gateway.rtt == pytest.approx(rtt)
    return pair, stream, far


def take(
    pair: Pair, stream: wirestream.Stream, far: wirestream.Stream, rate: float, seconds: float
) -> None:
    """The far end gives whatever it may, of what is taken at ``rate``, for so long."""
    end = pair.now + seconds
    while pair.now < end:
        stream.grant(stream.received + int(rate * 0.001) + 1)
        pair.pump()
        far.write(b"b" * max(far.room, 0))
        pair.pump()
        pair.now += 0.001


def test_the_cap_follows_the_round_trip():
    """On a far road it is twice the bytes of one round trip, and no more than its ceiling."""
    pair, stream, far = road(0.1)
    assert stream.cap == wirestream.CAP_FLOOR
    for _ in range(40):
        stream.grant(1 << 30)
        pair.pump()
        far.write(b"b" * max(far.room, 0))
        pair.pump()
        pair.now += 0.1
    assert stream.cap == wirestream.CAP_CEILING


def test_the_cap_follows_the_consumer():
    """On a near road it is what is taken within a hundredth of a second, of late."""
    pair, stream, far = road(0.001)
    take(pair, stream, far, 150e6, 0.5)
    assert stream.cap == pytest.approx(1.5e6, rel=0.02)
    take(pair, stream, far, 70e6, 0.5)
    assert stream.cap == pytest.approx(7e5, rel=0.02)
    take(pair, stream, far, 1e6, 0.5)
    assert stream.cap == wirestream.CAP_FLOOR
    stream.of_terminal = True
    take(pair, stream, far, 70e6, 0.5)
    assert stream.cap == pytest.approx(2.1e6, rel=0.02)


def test_beside_keys_nothing_waits():
    """While somebody types on another stream the cap is what keeps the road busy."""
    pair, stream, far = road(0.001)
    take(pair, stream, far, 100e6, 0.5)
    assert stream.cap == pytest.approx(1e6, rel=0.02)
    typed, _, echo, _ = pair.open()
    typed.grant(1 << 20)
    pair.pump()
    echo.write(b"k")
    pair.pump()
    assert stream.cap == pytest.approx(2e5, rel=0.02)
    assert typed.cap == wirestream.CAP_FLOOR
    stream.of_terminal = True
    assert stream.cap == wirestream.CAP_FLOOR_BESIDE_KEYS
    pair.gateway.rtt = 0.1  # a far road stays full
    assert stream.cap == pytest.approx(2e5, rel=0.02)


def frame(frame_type: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """One frame, perhaps lying about its length."""
    size = len(payload) if length is None else length
    return frames.FRAME.pack(frame_type, 0, stream, size) + payload


@pytest.mark.parametrize(
    "payload",
    [
        frame(frames.DATA, 1, length=frames.MAX_DATA + 1),
        frame(frames.OPEN, 1, length=frames.MAX_FRAME + 1),
        frame(frames.DATA, 5, b"x"),
        frame(frames.OPEN, 2, b"{}"),
        frame(frames.OPEN, 1, b"[1]"),
        frame(frames.OPEN, 1, b"\xff\xfe"),
        frame(frames.OPEN, 1, b"[" * 60000),
        frame(99, 0),
        frame(frames.PING, 0, b"short"),
        frame(frames.OPEN, 1, b"{}") + frame(99, 1),
        frame(frames.OPEN, 1, b"{}") + frame(frames.EXIT, 1, b"{}"),
        frame(frames.OPEN, 1, b"{}") + frame(frames.CREDIT, 1, b"12"),
        frame(frames.OPEN, 1, b"{}") + frame(frames.DATA, 1, b"x" * (frames.INITIAL_CREDIT + 1)),
    ],
)
def test_what_an_honest_peer_never_sends_is_a_violation(payload):
    """Hostile lengths, unknown types and streams, and DATA beyond credit."""
    agent = wire.Endpoint(opened=lambda stream, _: setattr(stream, "receiver", Recorder()))
    with pytest.raises(frames.WireViolation):
        agent.receive(frames.MESSAGE.pack(frames.BYTES, 0, 0) + payload, 0.0)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0",
        frames.MESSAGE.pack(frames.START, 0, 0),
        frames.MESSAGE.pack(0, 0, 5),
        b"\0" * 300000,
    ],
)
def test_malformed_messages_are_violations(message):
    """Too short, too long, of another kind, or acknowledging what was never sent."""
    with pytest.raises(frames.WireViolation):
        wire.Endpoint().receive(message, 0.0)


@given(st.binary(max_size=400))
def test_noise_is_a_violation_or_waits_for_more(noise):
    """No bytes of a peer raise anything but what the owner of an endpoint expects."""
    agent = wire.Endpoint(opened=lambda stream, _: setattr(stream, "receiver", Recorder()))
    try:
        agent.receive(frames.MESSAGE.pack(frames.BYTES, 0, 0) + noise, 0.0)
    except frames.WireViolation:
        pass


@given(st.binary(max_size=300))
def test_json_bodies_are_objects_or_violations(noise):
    """ATTACH and its kin never raise anything else either."""
    try:
        assert isinstance(frames.body_of(b"\1" + noise), dict)
    except frames.WireViolation:
        pass


def stream_of_frames(writes: list[tuple[bool, bytes]]) -> bytes:
    """The byte stream that a gateway makes of these writes."""
    gateway = wire.Endpoint()
    streams = [gateway.open({"kind": "process"}, Recorder()) for _ in range(2)]
    data = bytearray()
    for second, payload in writes:
        streams[second].write(payload)
        while (message := gateway.next_message()) is not None:
            data += b"".join(message[1:])
    return bytes(data)


writes = st.lists(
    st.tuples(st.booleans(), st.binary(min_size=1, max_size=300)), min_size=1, max_size=12
)


@given(writes, st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_every_fragmentation_gives_the_same(writes, sizes):
    """Messages may cut frames anywhere: what arrives is what was written."""
    data = stream_of_frames(writes)
    received: dict[int, Recorder] = {}

    def opened(stream, _):
        stream.receiver = received[stream.id] = Recorder()

    agent = wire.Endpoint(opened=opened)
    offset = step = 0
    while offset < len(data):
        piece = data[offset : offset + sizes[step % len(sizes)]]
        agent.receive(frames.MESSAGE.pack(frames.BYTES, offset, 0) + piece, 0.0)
        offset, step = offset + len(piece), step + 1
    for second in (False, True):
        expected = b"".join(payload for which, payload in writes if which is second)
        assert bytes(received[1 + second].out) == expected


@settings(max_examples=150)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("up"), st.binary(min_size=1, max_size=3000)),
            st.tuples(st.just("down"), st.binary(min_size=1, max_size=3000)),
            st.tuples(st.just("carry"), st.integers(0, 6)),
            st.tuples(st.just("cut"), st.integers(0, 6)),
        ),
        max_size=40,
    )
)
def test_every_cut_and_resume_is_byte_exact(steps):
    """Whatever is lost when a carrier breaks, both directions arrive whole, once and in order."""
    pair = Pair()
    stream, near, far, typed = pair.open()
    stream.grant(1 << 20)
    far.grant(1 << 20)
    pair.pump()
    up, down = bytearray(), bytearray()
    for step, value in steps:
        if step == "up":
            stream.write(value)
            up += value
        elif step == "down":
            far.write(value)
            down += value
        elif step == "carry":
            for source, target in ((pair.gateway, pair.agent), (pair.agent, pair.gateway)):
                for _ in range(value):
                    if (message := source.next_message()) is not None:
                        target.receive(b"".join(message), 0.0)
        else:
            for source in (pair.gateway, pair.agent):
                for _ in range(value):
                    source.next_message()  # handed to a carrier that was cut
            pair.attach_again()
    pair.attach_again()
    assert bytes(typed.out) == bytes(up)
    assert bytes(near.out) == bytes(down)


def test_a_repeated_message_is_taken_once():
    """What is below the receiver's position is skipped, also in part."""
    pair = Pair()
    stream, _, _, typed = pair.open()
    stream.write(b"abcdef")
    message = b"".join(pair.gateway.next_message())
    pair.agent.receive(message, 0.0)
    pair.agent.receive(message, 0.0)
    kind, offset, acked = frames.MESSAGE.unpack_from(message)
    more = frame(frames.DATA, 1, b"ghi")
    overlap = message[frames.MESSAGE.size + 4 :] + more
    pair.agent.receive(frames.MESSAGE.pack(kind, offset + 4, acked) + overlap, 0.0)
    assert bytes(typed.out) == b"abcdefghi"


def test_a_receivers_defect_costs_nothing_of_other_streams():
    """What stands behind it in the message is taken with the next one, also half a frame."""
    pair = Pair()
    bad, _, _, _ = pair.open()
    good, _, _, far = pair.open()

    class Defective:
        def wire_data(self, data, extended):
            raise RuntimeError("a defect")

    pair.agent.streams[bad.id].receiver = Defective()
    bad.write(b"x")
    good.write(b"12345")
    message = b"".join(pair.gateway.next_message())
    half = len(message) - 2
    offset = pair.agent.received_bytes + half - frames.MESSAGE.size
    later = frames.MESSAGE.pack(frames.BYTES, offset, 0)
    with pytest.raises(RuntimeError):
        pair.agent.receive(message[:half], 0.0)
    pair.agent.receive(later + message[half:], 0.0)
    assert far.out == b"12345"


def test_a_stream_can_be_closed_whatever_is_queued():
    """Somebody asked for more than the cut carrier holds; streams are given up all the same."""
    pair = Pair()
    loud, _, _, _ = pair.open()
    other, _, _, far = pair.open()
    size = frames.SIZE.pack(80, 24, 0, 0)
    for _ in range(frames.MAX_CONTROL):
        loud.control(frames.RESIZE, size)
    with pytest.raises(frames.WireViolation):
        loud.control(frames.RESIZE, size)
    other.close("over")
    assert other.closed
    pair.pump()
    assert far.events == [("closed", "over")]


def test_too_many_streams_are_refused_one_by_one():
    """The limit costs the newcomer its stream, not the session."""
    pair = Pair()
    for _ in range(frames.MAX_STREAMS):
        pair.gateway.open({"kind": "process"}, Recorder())
    late = Recorder()
    pair.gateway.open({"kind": "process"}, late)
    pair.pump()
    assert late.events[0][:2] == ("refused", 4)
    assert len(pair.agent.streams) == frames.MAX_STREAMS


def test_pings_do_not_pile_up_answers():
    """A peer that only asks finds at most one PONG waiting."""
    agent = wire.Endpoint(opened=lambda *_: None)
    pings = b"".join(frame(frames.PING, 0, struct.pack(">Q", n)) for n in range(5000))
    agent.receive(frames.MESSAGE.pack(frames.BYTES, 0, 0) + pings, 0.0)
    answer = b"".join(agent.next_message())
    assert len(answer) == frames.MESSAGE.size + frames.FRAME.size + 8


def test_goodbye_and_farewell_are_told():
    """Stream 0 carries the end of a session."""
    pair = Pair()
    pair.gateway.control(frames.GOODBYE, 0)
    pair.pump()
    pair.agent.control(frames.FAREWELL, 0, json.dumps({"sessions": 0}).encode())
    pair.pump()
    assert pair.told == [(frames.GOODBYE, b""), (frames.FAREWELL, b'{"sessions": 0}')]
