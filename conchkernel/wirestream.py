"""One stream of the wire: its queue, and the credit that each side gives the other.

Gateway and agent run this same file, as :mod:`conchkernel.wire`, which has many of them share a
session; the standard library only.
"""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any

from conchkernel.frames import (
    CLOSE,
    CREDIT,
    DATA,
    FRAME,
    INITIAL_CREDIT,
    MAX_FRAME,
    REFUSED,
    U64,
    WireViolation,
)

if TYPE_CHECKING:
    from typing import Protocol

    from conchkernel.frames import Buffer, Frames

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

    class Session(Protocol):
        """What a stream asks of the :class:`conchkernel.wire.Endpoint` that it belongs to."""

        streams: dict[int, Stream]
        now: float
        typed_at: float
        typed_on: Stream | None
        rtt: float

        def control(self, frame_type: int, stream_id: int, payload: bytes = b"") -> None:
            """Send a frame that overtakes DATA."""

        def line_up(self, stream: Stream) -> None:
            """It has something to send."""


CAP_FLOOR = 512 * 1024
CAP_FLOOR_BESIDE_KEYS = 128 * 1024
CAP_FLOOR_OF_FILES = 2 * 1024 * 1024  # they cross five processes, each with a piece in hand
CAP_CEILING = 3 * 1024 * 1024
SHARED_CAPS = 32 * 1024 * 1024  # of all connections together, for as long as they are few
QUEUE_SECONDS = 0.01  # what may wait before a consumer, at the rate it takes
QUEUE_SECONDS_OF_TERMINALS = 0.03  # they give least when those behind them rest in between
NEAR_SECONDS = 0.005  # beyond this round trip the road is the bottleneck, not the Jupyter server
SMALL = 2 * 1024  # queued bytes up to here count as keystrokes, not as bulk
JOINED = 32 * 1024  # small writes that wait are joined up to here: an object each costs fifty times
KEY = 64  # DATA up to here counts as somebody typing
KEYS_SECONDS = 1.0  # for so long after it


class Stream:
    """One stream of an endpoint: what it may send, what it lets the peer send.

    :ivar lined_up: whether it stands in one of the endpoint's lines.
    """

    __slots__ = (
        "_ceiling", "_granted", "_mark", "_mark_time", "_product", "_queue",
        "_rate", "_session", "closed", "floor", "id", "limit", "lined_up", "of_terminal",
        "queued", "received", "receiver", "sent",
    )  # fmt: skip

    def __init__(
        self,
        session: Session,
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
        self.of_terminal = False
        self._session = session
        self._queue: deque[tuple[int | None, Buffer]] = deque()  # flags, None for a raw frame
        self.lined_up = False
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
        Then the flood of a terminal, which nobody reads, is held to the least on a near road.
        """
        product = self._product
        if not self.beside_keys:
            seconds = QUEUE_SECONDS_OF_TERMINALS if self.of_terminal else QUEUE_SECONDS
            waiting = max(self._rate * seconds, self.floor)
        else:
            waiting = 0.0
            if self.of_terminal and self._session.rtt < NEAR_SECONDS:
                product = 0.0
        return int(min(max(CAP_FLOOR_BESIDE_KEYS, product, waiting), CAP_CEILING))

    @property
    def share(self) -> int:
        """The most that a cap should be where each stream may have a consumer that takes nothing:
        less the more streams there are."""
        return max(INITIAL_CREDIT, SHARED_CAPS // max(1, len(self._session.streams)))

    @property
    def beside_keys(self) -> bool:
        """Whether somebody types on another stream."""
        session = self._session
        typing = session.now - session.typed_at < KEYS_SECONDS
        return typing and session.typed_on is not self

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
            self._session.control(frame_type, self.id, payload)

    def close(self, reason: str = "") -> None:
        """CLOSE now: queued DATA is dropped, what the peer still sends is ignored."""
        if not self.closed:
            self.control(CLOSE, reason.encode()[:MAX_FRAME])
            self.forget()

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

    # --- for the endpoint ----------------------------------------------------------------------

    def take(self, parts: Frames, room: int) -> int:
        """Move frames from the head of the queue into ``parts``; returns the room left."""
        queue = self._queue
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
            count = min(len(data), spare, self.limit - self.sent)
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
            parts[begun] = FRAME.pack(DATA, flags, self.id, length)
            parts.append(data)
            room = spare - count
            self.sent += count
            taken += count
        if taken:
            self.queued -= taken
            self.receiver.wire_sent(taken)
        return room

    def credited(self, body: Buffer) -> None:
        """A CREDIT of the peer's.

        :raises WireViolation: if it is none.
        """
        if len(body) != U64.size:
            raise WireViolation("a CREDIT of odd size")
        limit = U64.unpack(body)[0]
        if limit > self.limit:
            self.limit = limit
            if self.sendable:
                self._wake()
            self.receiver.wire_credit()

    def forget(self) -> None:
        """It is over, on both sides or for a violation: nothing of it is sent any more."""
        self.closed = True
        self._queue.clear()
        self.queued = 0
        self._session.streams.pop(self.id, None)

    @property
    def sendable(self) -> bool:
        """Is there a frame at the head of the queue that may go now?"""
        return bool(self._queue) and (self._queue[0][0] is None or self.sent < self.limit)

    @property
    def drained(self) -> bool:
        """Has all been sent that was queued?"""
        return not self._queue

    def arrived(self, count: int, now: float) -> None:
        """Count received DATA and let the cap follow the bytes of one round trip."""
        self.received += count
        if count <= KEY:
            self._session.typed_at = now
            self._session.typed_on = self
        if self.received > self._granted:
            raise WireViolation(f"stream {self.id} sent beyond its credit")
        if self._ceiling > self._granted:
            self.grant(self._ceiling)
        if self._mark_time is None:
            self._mark, self._mark_time = self.received, now
            return
        elapsed = now - self._mark_time
        rtt = self._session.rtt
        # Of a shorter time, one turn's messages would be taken for the road's speed.
        if elapsed >= max(rtt, QUEUE_SECONDS):
            rate = (self.received - self._mark) / elapsed
            self._rate = (self._rate + rate) / 2
            self._product = max(self._product, 2 * rate * rtt)
            self._mark, self._mark_time = self.received, now

    def _wake(self) -> None:
        if not self.lined_up:
            self.lined_up = True
            self._session.line_up(self)


def refuse(stream: Stream, code: int, message: str) -> None:
    """Answer an OPEN with REFUSED; the stream is gone."""
    stream.control(REFUSED, json.dumps({"code": code, "message": message}).encode()[:MAX_FRAME])
    stream.forget()
