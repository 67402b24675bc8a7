"""DATA on its way into a descriptor: what a stream brings to a program, a terminal or a socket.

Runs in the agent, or on the event loop of a gateway that serves its own host. What was written is
granted again, so that the stream's cap bounds what is kept here. Standard library only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol


class Loop(Protocol):
    """The part of an event loop that is needed."""

    def watch_write(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(fd)`` whenever it can be written."""

    def unwatch_write(self, fd: int) -> None:
        """No more writing; unknown descriptors are fine."""

    def settle(self, session: Any) -> None:
        """The session has something to send."""


class Creditor(Protocol):
    """The part of :class:`conchkernel.wire.Stream` that is needed."""

    @property
    def cap(self) -> int:
        """How far ahead of the descriptor the gateway may be."""

    @property
    def share(self) -> int:
        """The same where there are many streams, each with a descriptor that may take nothing."""

    def grant(self, limit: int) -> None:
        """Bytes up to this one may come."""


class Owner(Protocol):
    """The service that the descriptor is of."""

    session: Any

    def failed(self) -> None:
        """A defect of ours."""


class Intake:
    """One direction into a descriptor, which begins with :meth:`open`; what comes before is kept.

    :param done: called when the gateway's EOF has come and all before it is written.
    :param broken: called when the descriptor takes nothing any more. That is no end by itself, as
        under sshd: unless it is answered by :meth:`close`, what comes is tried again, and dropped.
    :ivar consumed: bytes that the stream has got rid of.
    :ivar closed: nothing is written any more.
    """

    def __init__(
        self,
        owner: Owner,
        loop: Loop,
        stream: Creditor,
        done: Callable[[], None],
        broken: Callable[[], None],
    ) -> None:
        self.consumed = 0
        self.closed = False
        self._owner = owner
        self._loop = loop
        self._stream = stream
        self._done = done
        self._broken = broken
        self._kept: deque[memoryview | bytes] = deque()
        self._ending = False
        self._fd = -1
        self._write: Callable[[memoryview | bytes], int] | None = None

    def open(self, fd: int, write: Callable[[memoryview | bytes], int]) -> None:
        """Write to ``fd``, by ``write``, which raises like :func:`os.write`; it must not block."""
        self._fd, self._write = fd, write
        if self._kept:
            self._loop.watch_write(fd, self._writable)
        elif self._ending:
            self._done()

    def data(self, data: memoryview) -> None:
        """Bytes have come."""
        if self.closed or self._ending:
            self._took(len(data))
            return
        if self._write is not None and not self._kept:
            written = self._put(self._write, data)
            if written == len(data):
                return
            data = data[written:]
        # The buffer under ``data`` is used again.
        self._kept.append(bytes(data))
        if self._write is not None:
            self._loop.watch_write(self._fd, self._writable)

    def end(self) -> None:
        """No more comes."""
        self._ending = True
        if self._write is not None and not self._kept and not self.closed:
            self._done()

    def close(self) -> None:
        """Write nothing any more: what waits is dropped, and what comes. Idempotent."""
        if not self.closed:
            self.closed = True
            if self._fd >= 0:
                self._loop.unwatch_write(self._fd)
            waiting = sum(map(len, self._kept))
            self._kept.clear()
            self._took(waiting)

    def failed(self) -> None:
        """A defect of ours."""
        self._owner.failed()

    def _put(
        self, write: Callable[[memoryview | bytes], int], data: memoryview | bytes
    ) -> int:
        try:
            written = write(data)
        except BlockingIOError:
            return 0
        except OSError:
            # Nobody takes it any more.
            self._took(len(data))
            self._broken()
            return len(data)
        self._took(written)
        return written

    def _took(self, count: int) -> None:
        self.consumed += count
        stream = self._stream
        stream.grant(self.consumed + min(stream.cap, stream.share))

    def _writable(self, fd: int) -> None:
        kept = self._kept
        while kept and self._write is not None:
            data = kept.popleft()
            written = self._put(self._write, data)
            if written < len(data):
                kept.appendleft(memoryview(data)[written:])
                return
        if not self.closed:
            self._loop.unwatch_write(fd)
            if self._ending:
                self._done()
        self._loop.settle(self._owner.session)
