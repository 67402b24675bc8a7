"""The wire between gateway and agent, without I/O: ``docs/wire.md`` in code.

Two layers. Underneath, one resumable byte stream each way, cut into messages that carry absolute
offsets. On top, frames that multiplex streams with credit. The gateway and the agent run this same
file (it is sent to the kernel's host), so it imports the standard library only.

It refuses to know sockets, clocks and processes: messages go in by :meth:`Endpoint.receive` and
come out by :meth:`Endpoint.next_message`, the time is a parameter, and what happens is told to
receivers.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Protocol

    Buffer = bytes | bytearray | memoryview
    Frames = list[Buffer]

    class Receiver(Protocol):
        """What is told of one stream; a call must not raise anything but our own exceptions."""

        def wire_opened(self, info: dict[str, Any]) -> None:
            """OPENED: the far side runs it."""

        def wire_refused(self, code: Any, message: Any) -> None:
            """REFUSED: the last call."""

        def wire_data(self, data: memoryview, extended: int) -> None:
            """DATA. At the agent ``data`` is valid during the call only."""

        def wire_sent(self, count: int) -> None:
            """``count`` bytes of what was written have left the queue."""

        def wire_credit(self) -> None:
            """The peer takes more than before."""

        def wire_eof(self) -> None:
            """EOF."""

        def wire_exit(self, info: dict[str, Any]) -> None:
            """EXIT."""

        def wire_control(self, frame_type: int, payload: bytes) -> None:
            """RESIZE, SIGNAL, BREAK or STOP."""

        def wire_closed(self, reason: str) -> None:
            """The peer's CLOSE: the last call. Not made after a CLOSE of ours."""

VERSION = 1

# Kinds of messages (wire.md section 2).
BYTES, ATTACH, ATTACHED, START, STARTED, LOST, HANDOVER, CLAIM, TAKEN, PADDING = range(10)

# Types of frames (wire.md section 5).
OPEN, OPENED, REFUSED, DATA, CREDIT, EOF, EXIT, CLOSE, RESIZE, SIGNAL, BREAK, STOP = range(1, 13)
PING, PONG, GOODBYE, FAREWELL = range(16, 20)

EXTENDED = 1  # flag of DATA: stderr

MESSAGE = struct.Struct(">BQQ")  # kind, offset, acknowledged
FRAME = struct.Struct(">BBII")  # type, flags, stream, length
U64 = struct.Struct(">Q")
U32 = struct.Struct(">I")
SIZE = struct.Struct(">IIII")

# Bounds (wire.md section 4).
MAX_MESSAGE = 256 * 1024
MAX_DATA = MAX_MESSAGE
MAX_FRAME = 192 * 1024  # an OPEN with the longest argument that Linux takes, and its environment
MAX_UNACKED_BYTES = 4 * 1024 * 1024
MAX_UNACKED_MESSAGES = 500
DATA_UNACKED_BYTES = MAX_UNACKED_BYTES - MAX_MESSAGE
DATA_UNACKED_MESSAGES = 400
ACK_BYTES = 1536 * 1024
ACK_MESSAGES = 32
MAX_STREAMS = 4096
MAX_CONTROL = 65536  # frames queued: more than any honest peer needs while a carrier is away

INITIAL_CREDIT = 64 * 1024  # towards the process
CAP_FLOOR = 512 * 1024
CAP_FLOOR_BESIDE_KEYS = 128 * 1024
CAP_FLOOR_OF_FILES = 2 * 1024 * 1024  # they cross five processes, each with a piece in hand
CAP_CEILING = 3 * 1024 * 1024
SHARED_CAPS = 32 * 1024 * 1024  # of all connections together, for as long as they are few
QUEUE_SECONDS = 0.01  # what may wait before a consumer, at the rate it takes
#: A PADDING, what a session moves before it, and the round trip beyond which the road is the
#: bottleneck and not the Jupyter server.
PADDING_BYTES = 2 * 1024 * 1024
PADDING_AFTER_BYTES = 1024 * 1024
NEAR_SECONDS = 0.005
SMALL = 2 * 1024  # queued bytes up to here count as keystrokes, not as bulk
JOINED = 32 * 1024  # small writes that wait are joined up to here: an object each costs fifty times
KEY = 64  # DATA up to here counts as somebody typing
KEYS_SECONDS = 1.0  # for so long after it


class WireViolation(Exception):
    """The peer broke the protocol; the session cannot go on."""


class WireGap(Exception):
    """Bytes are missing: the carrier lost a message. Attach again; nothing is lost."""


def message_of(kind: int, body: dict[str, Any]) -> bytes:
    """A message whose body is JSON (kinds ATTACH to STARTED)."""
    return bytes([kind]) + json.dumps(body).encode()


def body_of(message: Buffer) -> dict[str, Any]:
    """The JSON object of such a message.

    :raises WireViolation: if it is none.
    """
    return _object(bytes(message[1:]))


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise WireViolation("not JSON where JSON must be") from None
    if not isinstance(value, dict):
        raise WireViolation("not a JSON object where one must be")
    return value


class Stream:
    """One stream of an :class:`Endpoint`: what it may send, what it lets the peer send."""

    __slots__ = (
        "_ceiling", "_endpoint", "_granted", "_mark", "_mark_time", "_product", "_queue",
        "_rate", "_ready", "closed", "floor", "id", "limit", "queued", "received", "receiver",
        "sent",
    )  # fmt: skip

    def __init__(
        self,
        endpoint: Endpoint,
        stream_id: int,
        receiver: Receiver,
        limit: int,
        granted: int,
    ) -> None:
        self.id = stream_id
        self.receiver = receiver
        self.closed = False  # our CLOSE is queued or sent, or the peer's has come
        self.limit = limit  # bytes we may send in all
        self.sent = 0
        self.queued = 0  # bytes of DATA in the queue
        self.received = 0
        self.floor = CAP_FLOOR  # of the cap, while nobody types
        self._endpoint = endpoint
        self._queue: deque[tuple[int | None, Buffer]] = deque()  # flags, None for a raw frame
        self._ready = False
        self._granted = granted
        self._ceiling = granted
        self._product = 0.0  # twice the bytes of a round trip, at the best
        self._rate = 0.0  # bytes per second that come, of late
        self._mark = 0
        self._mark_time: float | None = None

    @property
    def room(self) -> int:
        """Bytes that may be written now and will not wait for credit."""
        return self.limit - self.sent - self.queued

    @property
    def cap(self) -> int:
        """How far ahead of the consumer the peer may be, in bytes.

        Twice the bytes of a round trip keep a road busy. More saves messages, since half a cap is
        one CREDIT, but what waits before a slow end is what a key on another stream waits behind:
        it is what the consumer takes in :data:`QUEUE_SECONDS`, and nothing while somebody types.
        """
        waiting = 0.0 if self.beside_keys else max(self._rate * QUEUE_SECONDS, self.floor)
        return int(min(max(CAP_FLOOR_BESIDE_KEYS, self._product, waiting), CAP_CEILING))

    @property
    def share(self) -> int:
        """The most that a cap should be where each stream may have a consumer that takes nothing:
        less the more streams there are."""
        return max(INITIAL_CREDIT, SHARED_CAPS // max(1, len(self._endpoint.streams)))

    @property
    def beside_keys(self) -> bool:
        """Whether somebody types on another stream."""
        endpoint = self._endpoint
        typing = endpoint.now - endpoint.typed_at < KEYS_SECONDS
        return typing and endpoint.typed_on is not self

    def write(self, data: Buffer, flags: int = 0) -> None:
        """Queue DATA; ``data`` is kept. The caller bounds the queue (see :attr:`queued`)."""
        size = len(data)
        if size and not self.closed:
            queue = self._queue
            if size <= SMALL:
                last_flags, last = queue[-1] if queue else (None, b"")
                # What was taken in part is a view, and no longer grows.
                if last_flags == flags and type(last) is bytearray and len(last) < JOINED:
                    last += data
                else:
                    queue.append((flags, bytearray(data)))
            else:
                queue.append((flags, data))
            self.queued += size
            self._wake()

    def append(self, frame_type: int, payload: bytes = b"") -> None:
        """Queue a frame behind the DATA written so far (EOF, EXIT, CLOSE)."""
        if not self.closed:
            self._queue.append((None, FRAME.pack(frame_type, 0, self.id, len(payload)) + payload))
            self._wake()
            if frame_type == CLOSE:
                # Nothing follows. The queue drains; then the endpoint forgets the stream.
                self.closed = True

    def control(self, frame_type: int, payload: bytes = b"") -> None:
        """Send a frame that overtakes queued DATA."""
        if not self.closed:
            self._endpoint.control(frame_type, self.id, payload)

    def close(self, reason: str = "") -> None:
        """CLOSE now: queued DATA is dropped, what the peer still sends is ignored."""
        if not self.closed:
            self.control(CLOSE, reason.encode()[:MAX_FRAME])
            self._forget()

    def grant(self, limit: int) -> None:
        """Let the peer send up to byte ``limit``; the cap keeps it from all of that at once."""
        self._ceiling = limit
        cap = self.cap
        limit = min(limit, self.received + cap)
        fresh = limit - self._granted
        half = cap >> 1
        # Few large steps: a CREDIT costs a message on the carrier.
        if fresh > 0 and (fresh >= half or self._granted - self.received < half):
            self._granted = limit
            self.control(CREDIT, U64.pack(limit))

    def _forget(self) -> None:
        self.closed = True
        self._queue.clear()
        self.queued = 0
        self._endpoint.streams.pop(self.id, None)

    def _wake(self) -> None:
        if not self._ready:
            self._ready = True
            self._endpoint._line_up(self)

    def _sendable(self) -> bool:
        """Is there a frame at the head of the queue that may go now?"""
        return bool(self._queue) and (self._queue[0][0] is None or self.sent < self.limit)

    def _arrived(self, count: int, now: float) -> None:
        """Count received DATA and let the cap follow the bytes of one round trip."""
        self.received += count
        if count <= KEY:
            self._endpoint.typed_at = now
            self._endpoint.typed_on = self
        if self.received > self._granted:
            raise WireViolation(f"stream {self.id} sent beyond its credit")
        if self._ceiling > self._granted:
            self.grant(self._ceiling)
        if self._mark_time is None:
            self._mark, self._mark_time = self.received, now
            return
        elapsed = now - self._mark_time
        rtt = self._endpoint.rtt
        # Of a shorter time, one turn's messages would be taken for the road's speed.
        if elapsed >= max(rtt, QUEUE_SECONDS):
            rate = (self.received - self._mark) / elapsed
            self._rate = (self._rate + rate) / 2
            self._product = max(self._product, 2 * rate * rtt)
            self._mark, self._mark_time = self.received, now


class _Nobody:
    """The receiver of a stream until its owner has set one."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


_NOBODY: Any = _Nobody()


class Endpoint:
    """One end of a session: streams above, numbered messages below.

    :param opened: called with (stream, object) for each OPEN; ``None`` at the gateway, which opens
        streams itself and takes none. It sets ``stream.receiver`` before it returns.
    :param told: called with (type, payload) for frames of stream 0 other than PING and PONG.
    """

    def __init__(
        self,
        opened: Callable[[Stream, dict[str, Any]], None] | None = None,
        told: Callable[[int, bytes], None] | None = None,
    ) -> None:
        self.streams: dict[int, Stream] = {}
        self.now = 0.0  # when something last arrived
        self.typed_at = -KEYS_SECONDS
        self.typed_on: Stream | None = None
        self.rtt = 0.001  # seconds; the least round trip of this carrier
        self.sent_bytes = 0  # our position
        self.acked_bytes = 0  # what the peer has of it
        self.received_bytes = 0  # the peer's position, as we have it
        self._opened = opened
        self._told = told
        self._last_id = 0
        self._control: deque[bytes] = deque()
        self._small: deque[Stream] = deque()
        self._bulk: deque[Stream] = deque()
        self._unacked: deque[tuple[int, Frames]] = deque()  # end offset and payload of each message
        self._partial = bytearray()
        self._ack_bytes = 0  # received since our last acknowledgement
        self._ack_messages = 0
        self._pings: dict[int, float] = {}
        self._measured = False  # whether rtt is of this carrier
        self._next_ping = 1

    # --- streams -----------------------------------------------------------------------------

    def open(self, parameters: dict[str, Any], receiver: Receiver) -> Stream:
        """Open a stream (gateway's side). ``parameters`` is the JSON object of OPEN."""
        # Escaped, text of other alphabets would be three times as long.
        payload = json.dumps(parameters, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if len(payload) > MAX_FRAME:
            raise ValueError(f"the request is longer than {MAX_FRAME} bytes")
        self._last_id += 1
        stream = Stream(self, self._last_id, receiver, limit=INITIAL_CREDIT, granted=0)
        self.streams[stream.id] = stream
        self.control(OPEN, stream.id, payload)
        return stream

    def control(self, frame_type: int, stream_id: int, payload: bytes = b"") -> None:
        """Queue a frame that goes before all DATA."""
        # A CLOSE always passes: each stream has one, and there is no other way to be rid of it.
        if len(self._control) >= MAX_CONTROL and frame_type != CLOSE:
            raise WireViolation("the peer asks for more than it takes answers")
        self._control.append(FRAME.pack(frame_type, 0, stream_id, len(payload)) + payload)

    @property
    def crowded(self) -> bool:
        """More waits than anybody should still be asked for, but far from what is too much."""
        return len(self._control) >= MAX_CONTROL >> 4

    def ping(self, now: float) -> None:
        """Queue a PING; a quick answer refreshes :attr:`rtt`. At most eight are remembered."""
        token, self._next_ping = self._next_ping, self._next_ping + 1
        while len(self._pings) >= 8:
            del self._pings[next(iter(self._pings))]
        self._pings[token] = now
        self.control(PING, 0, U64.pack(token))

    @property
    def padding_due(self) -> bool:
        """Whether the carrier is worth a PADDING (wire.md section 2): near, and used for bulk."""
        used = self.sent_bytes + self.received_bytes > PADDING_AFTER_BYTES
        return used and self._measured and self.rtt < NEAR_SECONDS

    # --- sending -----------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing is queued that waits for a message."""
        return not (self._control or self._small or self._bulk)

    @property
    def blocked(self) -> bool:
        """DATA must wait until the peer acknowledges more."""
        return (
            self.sent_bytes - self.acked_bytes > DATA_UNACKED_BYTES - MAX_MESSAGE
            or len(self._unacked) >= DATA_UNACKED_MESSAGES
        )

    def next_message(self) -> Frames | None:
        """The next message as a list of buffers, or ``None`` if there is nothing to say now.

        The caller hands it to the carrier in this order, at once: its offset is committed.
        """
        parts: Frames = []
        room = MAX_MESSAGE - MESSAGE.size
        unacked = self.sent_bytes - self.acked_bytes
        control = self._control
        if control and len(self._unacked) < MAX_UNACKED_MESSAGES:
            room = min(room, MAX_UNACKED_BYTES - unacked)
            while control and len(control[0]) <= room:
                frame = control.popleft()
                parts.append(frame)
                room -= len(frame)
        if (self._small or self._bulk) and not self.blocked:
            room = self._fill(parts, self._small, room, len(self._small))
            self._fill(parts, self._bulk, room, len(self._bulk))
        if not parts and self._ack_bytes < ACK_BYTES and self._ack_messages < ACK_MESSAGES:
            return None
        header = MESSAGE.pack(BYTES, self.sent_bytes, self.received_bytes)
        self._ack_bytes = self._ack_messages = 0
        if parts:
            self.sent_bytes += sum(map(len, parts))
            self._unacked.append((self.sent_bytes, parts))
        return [header, *parts]

    def _line_up(self, stream: Stream) -> None:
        (self._small if stream.queued <= SMALL else self._bulk).append(stream)

    def _fill(self, parts: Frames, line: deque[Stream], room: int, turns: int) -> int:
        """Give each stream in ``line`` one turn while there is room; returns the room left."""
        for _ in range(turns):
            if room <= FRAME.size:
                break
            stream = line.popleft()
            if line is self._small and stream.queued > SMALL:
                self._bulk.append(stream)
                continue
            room = self._take(stream, parts, room)
            if stream._sendable():
                line.append(stream)
            else:
                stream._ready = False
                if stream.closed and not stream._queue:
                    self.streams.pop(stream.id, None)
        return room

    def _take(self, stream: Stream, parts: Frames, room: int) -> int:
        """Move frames from the head of a stream's queue into ``parts``."""
        queue = stream._queue
        taken = 0
        # What was written in pieces goes as one frame, which the far end writes at once.
        begun, length, kind = -1, 0, 0
        while queue:
            flags, data = queue[0]
            if flags is None:
                if len(data) > room:
                    break
                parts.append(data)
                room -= len(data)
                queue.popleft()
                begun = -1
                continue
            grows = begun >= 0 and flags == kind
            spare = room if grows else room - FRAME.size
            count = min(len(data), spare, stream.limit - stream.sent)
            if count <= 0:
                break
            if count < len(data):
                view = memoryview(data)
                queue[0] = (flags, view[count:])
                data = view[:count]
            else:
                queue.popleft()
            if grows:
                length += count
            else:
                begun, length, kind = len(parts), count, flags
                parts.append(b"")
            parts[begun] = FRAME.pack(DATA, flags, stream.id, length)
            parts.append(data)
            room = spare - count
            stream.sent += count
            taken += count
        if taken:
            stream.queued -= taken
            stream.receiver.wire_sent(taken)
        return room

    # --- resuming ----------------------------------------------------------------------------

    def resume(self, peer_received: int) -> list[Frames]:
        """The messages to send again on a new carrier, from what the peer has received.

        :raises WireViolation: if the peer claims what was never sent or forgot what it had.
        """
        self._acknowledge(peer_received)
        if peer_received != self.acked_bytes:
            raise WireViolation("the peer forgot bytes that it had acknowledged")
        messages: list[Frames] = []
        offset = self.acked_bytes
        for end, parts in self._unacked:
            data = b"".join(parts)
            data = data[len(data) - (end - offset) :]
            header = MESSAGE.pack(BYTES, offset, self.received_bytes)
            messages.append([header, data])
            offset = end
        self._ack_bytes = self._ack_messages = 0
        self._measured = False
        self._pings.clear()
        return messages

    # --- receiving ---------------------------------------------------------------------------

    def receive(self, message: Buffer, now: float) -> None:
        """Take one BYTES message.

        :raises WireGap: bytes are missing before it.
        :raises WireViolation: it is not what the protocol allows.
        """
        if len(message) < MESSAGE.size or len(message) > MAX_MESSAGE:
            raise WireViolation(f"a message of {len(message)} bytes")
        self.now = now
        kind, offset, acked = MESSAGE.unpack_from(message)
        if kind != BYTES:
            raise WireViolation(f"a message of kind {kind} in a session")
        if acked > self.acked_bytes:
            self._acknowledge(acked)
        payload = memoryview(message)[MESSAGE.size :]
        if not payload:
            return
        known = self.received_bytes - offset
        if known < 0:
            raise WireGap(f"{-known} bytes are missing")
        self._ack_messages += 1
        if known >= len(payload):
            return
        if known:
            payload = payload[known:]
        self.received_bytes += len(payload)
        self._ack_bytes += len(payload)
        if self._partial:
            self._partial += payload
            whole, self._partial = self._partial, bytearray()
            payload = memoryview(whole)
        used = self._frames(payload, now)
        if used < len(payload):
            self._partial = bytearray(payload[used:])

    def _acknowledge(self, offset: int) -> None:
        if offset > self.sent_bytes:
            raise WireViolation("the peer acknowledges what was never sent")
        if offset <= self.acked_bytes:
            return
        self.acked_bytes = offset
        unacked = self._unacked
        while unacked and unacked[0][0] <= offset:
            unacked.popleft()

    def _frames(self, payload: memoryview, now: float) -> int:
        """Dispatch the whole frames of ``payload``; returns how many bytes they are."""
        position, end, head = 0, len(payload), FRAME.size
        try:
            while end - position >= head:
                frame_type, flags, stream_id, length = FRAME.unpack_from(payload, position)
                if length > (MAX_DATA if frame_type == DATA else MAX_FRAME):
                    raise WireViolation(f"a frame of {length} bytes")
                start = position + head
                if end - start < length:
                    break
                position = start + length
                body = payload[start:position]
                if stream_id == 0:
                    self._session_frame(frame_type, body, now)
                    continue
                stream = self.streams.get(stream_id)
                if stream is None:
                    self._stray(frame_type, stream_id, body)
                elif frame_type == CREDIT:
                    self._credit(stream, body)
                elif stream.closed:
                    # Our end is over but for what is queued; only the peer's CLOSE cuts that short.
                    if frame_type == CLOSE:
                        stream._forget()
                elif frame_type == DATA:
                    stream._arrived(length, now)
                    stream.receiver.wire_data(body, flags & EXTENDED)
                else:
                    self._stream_frame(stream, frame_type, body)
        except Exception:
            # A receiver's defect costs what it was told; the frames behind it come with the next.
            self._partial = bytearray(payload[position:])
            raise
        return position

    def _session_frame(self, frame_type: int, body: memoryview, now: float) -> None:
        if frame_type == PING and len(body) == U64.size:
            # One answer waits at a time: a peer that only asks gets no queue of ours.
            if not self._control or self._control[-1][0] != PONG:
                self.control(PONG, 0, bytes(body))
        elif frame_type == PONG and len(body) == U64.size:
            asked = self._pings.pop(U64.unpack(body)[0], None)
            if asked is not None:
                sample = max(now - asked, 1e-4)
                self.rtt = min(self.rtt, sample) if self._measured else sample
                self._measured = True
        elif frame_type in (GOODBYE, FAREWELL) and self._told is not None:
            self._told(frame_type, bytes(body))
        else:
            raise WireViolation(f"a frame of type {frame_type} on stream 0")

    def _stray(self, frame_type: int, stream_id: int, body: memoryview) -> None:
        """A frame for a stream that is not open: a new one, a closed one, or nonsense."""
        if stream_id <= self._last_id:
            return
        if frame_type != OPEN or self._opened is None or stream_id != self._last_id + 1:
            raise WireViolation(f"a frame of type {frame_type} for unknown stream {stream_id}")
        self._last_id = stream_id
        parameters = _object(bytes(body))
        stream = Stream(self, stream_id, _NOBODY, limit=0, granted=INITIAL_CREDIT)
        if len(self.streams) >= MAX_STREAMS:
            refuse(stream, 4, "too many streams are open")
            return
        self.streams[stream_id] = stream
        self._opened(stream, parameters)

    def _credit(self, stream: Stream, body: memoryview) -> None:
        if len(body) != U64.size:
            raise WireViolation("a CREDIT of odd size")
        limit = U64.unpack(body)[0]
        if limit > stream.limit:
            stream.limit = limit
            if stream._sendable():
                stream._wake()
            stream.receiver.wire_credit()

    def _stream_frame(self, stream: Stream, frame_type: int, body: memoryview) -> None:
        receiver = stream.receiver
        if frame_type == CLOSE:
            stream._forget()
            receiver.wire_closed(str(body, "utf-8", "replace"))
        elif frame_type == EOF:
            receiver.wire_eof()
        elif self._opened is not None and RESIZE <= frame_type <= STOP:
            receiver.wire_control(frame_type, bytes(body))
        elif self._opened is None and frame_type == OPENED:
            receiver.wire_opened(_object(bytes(body)))
        elif self._opened is None and frame_type == EXIT:
            receiver.wire_exit(_object(bytes(body)))
        elif self._opened is None and frame_type == REFUSED:
            info = _object(bytes(body))
            stream._forget()
            receiver.wire_refused(info.get("code"), info.get("message"))
        else:
            raise WireViolation(f"a frame of type {frame_type} on stream {stream.id}")


def refuse(stream: Stream, code: int, message: str) -> None:
    """Answer an OPEN with REFUSED; the stream is gone."""
    stream.control(REFUSED, json.dumps({"code": code, "message": message}).encode()[:MAX_FRAME])
    stream._forget()
