"""Answers on their way to the client: in the order of the requests, joined, within what is granted.

The protocol allows any order, and sftp-server never uses that: OpenSSH's client takes a reply that
overtakes others for the end of what it has, and cuts the file there.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from conchkernel.ssh import sftp_packets as packets
from conchkernel.ssh.sftp_order import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from conchkernel.ssh.sftp_packets import Reply

#: Answers are joined up to this size on their way to the channel.
_JOIN_BYTES = 128 * 1024


class Answers:
    """What is to be sent, and what must be sent before.

    :param write: takes bytes for the client, within what was granted.
    :ivar bytes: of all answers that were not given to ``write`` yet.
    :ivar granted: up to where ``write`` may be called, counted from the beginning.
    :ivar row: requests in their order, from the first that has no answer yet on; of one that was
        answered at once the answer itself.
    """

    def __init__(self, write: Callable[[bytes | memoryview], None]) -> None:
        self.bytes = 0
        self.granted = 0
        self.row: deque[Task | Sequence[bytes | memoryview]] = deque()
        self._write = write
        self._written = 0
        # Packets, or parts of one, that may go.
        self._ready: deque[bytes | memoryview] = deque()

    def __bool__(self) -> bool:
        """Whether any may be sent as soon as it is granted."""
        return bool(self._ready)

    def expect(self, task: Task) -> None:
        """``task`` is answered later; what is answered from now on comes after it."""
        self.row.append(task)

    def reply(self, requestId: int, reply: Reply, task: Task | None = None) -> None:
        """Answer a request; ``task`` if it was expected."""
        self.send((packets.frame(reply[0], requestId, reply[1]),), task)

    def data(
        self, requestId: int, data: bytes, length: int, task: Task | None = None
    ) -> None:
        """Answer a READ of ``length`` bytes; none are the end of the file."""
        size = len(data)
        if not size and length:
            self.reply(requestId, packets.END_OF_FILE, task)
            return
        if size > length:
            # Clients end the session for this.
            data, size = data[:length], length
        self.send((packets.dataHead(requestId, size), data), task)

    def send(self, packet: Sequence[bytes | memoryview], task: Task | None = None) -> None:
        """Send a packet, in pieces, as soon as all earlier requests have their answers."""
        self.bytes += sum(map(len, packet))
        row = self.row
        if task is None:
            if row:
                row.append(packet)
            else:
                self._ready.extend(packet)
            return
        task.answer = packet
        while row:
            first = row[0]
            ready = first.answer if isinstance(first, Task) else first
            if ready is None:
                break
            row.popleft()
            self._ready.extend(ready)

    def flush(self) -> bool:
        """Send what was granted; whether anything was sent."""
        ready = self._ready
        flushed = False
        # What is granted may grow with each write; and the channel may close, and clear this.
        while ready and (room := self.granted - self._written) > 0:
            pieces: list[bytes | memoryview] = []
            size = 0
            bound = min(room, _JOIN_BYTES)
            while ready and size < bound:
                piece = ready.popleft()
                size += len(piece)
                pieces.append(piece)
            if size > room:
                # Only the last piece is too long.
                last = memoryview(pieces[-1])
                keep = len(last) - (size - room)
                pieces[-1] = last[:keep]
                ready.appendleft(last[keep:])
                size = room
            self._written += size
            self.bytes -= size
            self._write(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            flushed = True
        return flushed

    def clear(self) -> None:
        """Nobody takes answers any more."""
        self._ready.clear()
        self.row.clear()
