"""How much of a near client's window is used, so that the client stays quick.

OpenSSH's client keeps what it has not written out yet in one buffer, which grows, and moves up, a
packet at a time: with 2 MiB in it (its whole window) a packet of 32 KiB costs it 2 ms of computing,
over a whole download 0.02. Whoever sends faster than the client's program reads fills it. A client
that is far away needs its window to keep the road full; a near one does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IDelayedCall

#: What is sent to a near client and not yet taken by it, at most.
NEAR_BYTES = 512 * 1024
#: A client is near if it was once so quick from our sending to its giving the window back. In that
#: time 512 KiB are 260 MB/s, and the least time is mostly well below.
NEAR_SECONDS = 0.002
#: One that gives its window back in large pieces only is not kept waiting for the last byte of one.
PIECES = 4
#: So long without a word of a client that we keep waiting, and it is thought to wait for us.
PATIENCE_SECONDS = 0.05
#: Thought so this often, it is never kept waiting again.
MISTAKES = 3

_ANY = 2**63


class Flight:
    """What one channel has sent and its client not yet taken, as far as its window tells.

    :ivar bytes: of them.
    :ivar most: as many may be.

    :param reactor: for time; without one nothing is limited.
    :param resume: called when more may be sent though the client said nothing.
    """

    def __init__(self, reactor: Any, resume: Callable[[], None]) -> None:
        self.bytes = 0
        self.most = _ANY
        self._reactor = reactor
        self._resume = resume
        self._near = False
        self._largest = 0
        #: Bytes until the one whose way is measured is taken; 0 while none is.
        self._until = 0
        self._since = 0.0
        self._heard = False
        self._mistakes = 0
        self._patience: IDelayedCall | None = None

    def sent(self, count: int) -> None:
        """``count`` bytes were sent."""
        self.bytes += count
        if not self._until and not self._near and self._reactor is not None:
            self._until = self.bytes
            self._since = self._reactor.seconds()

    def returned(self, count: int) -> None:
        """The client's window has grown by ``count`` bytes."""
        # A client may enlarge its window as well.
        self.bytes = max(0, self.bytes - count)
        self._heard = True
        self._largest = max(self._largest, count)
        if self._until:
            self._until = max(0, self._until - count)
            if not self._until and self._reactor.seconds() - self._since <= NEAR_SECONDS:
                self._near = True
        if self._near and self._mistakes < MISTAKES:
            self.most = max(NEAR_BYTES, PIECES * self._largest)

    def full(self) -> None:
        """Nothing is sent though the client's window is open."""
        if self._patience is None:
            self._heard = False
            self._patience = self._reactor.callLater(PATIENCE_SECONDS, self._look)

    def _look(self) -> None:
        self._patience = None
        if self.bytes < self.most:
            return
        if self._heard:
            self.full()
            return
        self._mistakes += 1
        self.most = _ANY  # until it is heard again
        self._resume()

    def close(self) -> None:
        """The channel is closed."""
        patience, self._patience = self._patience, None
        if patience is not None:
            patience.cancel()
