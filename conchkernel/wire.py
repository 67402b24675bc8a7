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
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conchkernel.frames import (
    ACK_BYTES,
    ACK_MESSAGES,
    BYTES,
    CLOSE,
    CREDIT,
    DATA,
    DATA_UNACKED_BYTES,
    DATA_UNACKED_MESSAGES,
    EOF,
    EXIT,
    EXTENDED,
    FAREWELL,
    FRAME,
    GOODBYE,
    INITIAL_CREDIT,
    MAX_CONTROL,
    MAX_DATA,
    MAX_FRAME,
    MAX_MESSAGE,
    MAX_STREAMS,
    MAX_UNACKED_BYTES,
    MAX_UNACKED_MESSAGES,
    MESSAGE,
    OPEN,
    OPENED,
    PING,
    PONG,
    REFUSED,
    RESIZE,
    STOP,
    U64,
    WireGap,
    WireViolation,
    object_of,
)
from conchkernel.wirestream import KEYS_SECONDS, NEAR_SECONDS, SMALL, Stream, refuse

if TYPE_CHECKING:
    from conchkernel.frames import Buffer, Frames
    from conchkernel.wirestream import Receiver

#: What a session moves before a PADDING.
PADDING_AFTER_BYTES = 1024 * 1024


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
        self._control_bytes = 0
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
        self.control(OPEN, self._last_id + 1, payload)
        self._last_id += 1
        stream = Stream(self, self._last_id, receiver, limit=INITIAL_CREDIT, granted=0)
        self.streams[stream.id] = stream
        return stream

    def control(self, frame_type: int, stream_id: int, payload: bytes = b"") -> None:
        """Queue a frame that goes before all DATA."""
        # A CLOSE always passes: each stream has one, and there is no other way to be rid of it.
        if len(self._control) >= MAX_CONTROL and frame_type != CLOSE:
            raise WireViolation("the peer asks for more than it takes answers")
        self._control.append(FRAME.pack(frame_type, 0, stream_id, len(payload)) + payload)
        self._control_bytes += FRAME.size + len(payload)

    @property
    def crowded(self) -> bool:
        """More waits than anybody should still be asked for, but far from what is too much."""
        return (
            len(self._control) >= MAX_CONTROL >> 4 or self._control_bytes >= MAX_UNACKED_BYTES
        )

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
                self._control_bytes -= len(frame)
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

    def line_up(self, stream: Stream) -> None:
        """The stream has something to send (called by itself)."""
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
            room = stream.take(parts, room)
            if stream.sendable:
                line.append(stream)
            else:
                stream.lined_up = False
                if stream.closed and stream.drained:
                    self.streams.pop(stream.id, None)
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
                    stream.credited(body)
                elif stream.closed:
                    # Our end is over but for what is queued; only the peer's CLOSE cuts that short.
                    if frame_type == CLOSE:
                        stream.forget()
                elif frame_type == DATA:
                    stream.arrived(length, now)
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
        parameters = object_of(bytes(body))
        stream = Stream(self, stream_id, _NOBODY, limit=0, granted=INITIAL_CREDIT)
        if len(self.streams) >= MAX_STREAMS:
            refuse(stream, 4, "too many streams are open")
            return
        self.streams[stream_id] = stream
        self._opened(stream, parameters)

    def _stream_frame(self, stream: Stream, frame_type: int, body: memoryview) -> None:
        receiver = stream.receiver
        if frame_type == CLOSE:
            stream.forget()
            receiver.wire_closed(str(body, "utf-8", "replace"))
        elif frame_type == EOF:
            receiver.wire_eof()
        elif self._opened is not None and RESIZE <= frame_type <= STOP:
            receiver.wire_control(frame_type, bytes(body))
        elif self._opened is None and frame_type == OPENED:
            receiver.wire_opened(object_of(bytes(body)))
        elif self._opened is None and frame_type == EXIT:
            receiver.wire_exit(object_of(bytes(body)))
        elif self._opened is None and frame_type == REFUSED:
            info = object_of(bytes(body))
            stream.forget()
            receiver.wire_refused(info.get("code"), info.get("message"))
        else:
            raise WireViolation(f"a frame of type {frame_type} on stream {stream.id}")
