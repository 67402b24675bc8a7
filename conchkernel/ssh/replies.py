"""Answers in the order of their questions (RFC 4254 sections 4 and 5.4).

SSH requests carry no number: a reply belongs to the oldest request that has none yet. So an
answer that is known late holds back those behind it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from conchkernel.ssh.fields import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.python.failure import Failure

T = TypeVar("T")

#: Requests that wait for their answer, per connection or channel. A client needs a handful.
MAX_WAITING = 128


class Replies(Generic[T]):
    """The replies that one connection, or one channel, still owes its peer.

    :param send: sends one reply.
    :param refused: the reply where a Deferred answer fails.
    """

    _log = Logger()

    def __init__(self, send: Callable[[T], None], refused: T) -> None:
        self._send = send
        self._refused = refused
        self._owed: deque[list[T]] = deque()
        self._closed = False

    def add(self, answer: T | Deferred[T]) -> None:
        """Reply with ``answer`` after all replies owed already.

        :raises ProtocolError: if the peer asks on and on without taking a breath.
        """
        if isinstance(answer, Deferred):
            if len(self._owed) >= MAX_WAITING:
                raise ProtocolError("too many requests at once")
            slot: list[T] = []
            self._owed.append(slot)
            answer.addErrback(self._failed).addCallback(self._answered, slot)
        elif self._owed:
            if len(self._owed) >= MAX_WAITING:
                raise ProtocolError("too many requests at once")
            self._owed.append([answer])
        else:
            self._send(answer)

    def close(self) -> None:
        """Nobody is there to be answered any more; what comes late is dropped."""
        self._closed = True
        self._owed.clear()

    def _failed(self, reason: Failure) -> T:
        self._log.failure("a request could not be answered", reason)
        return self._refused

    def _answered(self, answer: T, slot: list[T]) -> None:
        slot.append(answer)
        while self._owed and self._owed[0] and not self._closed:
            self._send(self._owed.popleft()[0])
