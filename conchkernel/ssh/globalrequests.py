"""Requests that concern no channel (RFC 4254 section 4), of both sides.

Answers may take their time and still go out in order. The question whether the client is there at
all (sshd's ClientAliveInterval) is one of ours.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from twisted.conch.error import ConchError
from twisted.conch.ssh.connection import (
    MSG_GLOBAL_REQUEST,
    MSG_REQUEST_FAILURE,
    MSG_REQUEST_SUCCESS,
)
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from conchkernel.ssh.fields import Fields, string
from conchkernel.ssh.replies import Replies

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure


class GlobalRequests:
    """One connection's global requests.

    :param transport: an SSH transport.
    :param answer: given a request's name and data, answers as
        :meth:`~twisted.conch.interfaces.IConchUser.gotGlobalRequest` does, or with a Deferred of
        that.
    """

    _log = Logger()

    def __init__(self, transport: Any, answer: Callable[[bytes, bytes], Any]) -> None:
        self._transport = transport
        self._answer = answer
        self._replies: Replies[bytes | None] = Replies(self._sendReply, None)
        self._asked: deque[Deferred[bytes]] = deque()

    def received(self, packet: bytes) -> None:
        """GLOBAL_REQUEST. Payload: string name, boolean want reply, ..."""
        fields = Fields(packet, "GLOBAL_REQUEST")
        name, wantReply = fields.string(), fields.boolean()
        answer = self._answer(name, fields.rest())
        if isinstance(answer, Deferred):
            if wantReply:
                self._replies.add(answer.addCallback(_replyData))
            else:
                answer.addErrback(self._failed)
        elif wantReply:
            self._replies.add(_replyData(answer))

    def send(self, name: bytes, data: bytes, wantReply: bool = False) -> Deferred[bytes] | None:
        """Ask the client.

        :returns: its reply, if one is wanted; fails with :class:`ConchError` if it refuses or
            goes away.
        """
        self._transport.sendPacket(
            MSG_GLOBAL_REQUEST, string(name) + (b"\1" if wantReply else b"\0") + data
        )
        if not wantReply:
            return None
        reply: Deferred[bytes] = Deferred()
        self._asked.append(reply)
        return reply

    def succeeded(self, packet: bytes) -> None:
        """REQUEST_SUCCESS. Payload: what the request defines. One that nobody asked is ignored."""
        if self._asked:
            self._asked.popleft().callback(packet)

    def refused(self, packet: bytes) -> None:
        """REQUEST_FAILURE. No payload."""
        if self._asked:
            self._asked.popleft().errback(ConchError("request refused"))

    def stop(self) -> None:
        """The connection is gone."""
        self._replies.close()
        while self._asked:
            self._asked.popleft().errback(ConchError("connection lost"))

    def _sendReply(self, data: bytes | None) -> None:
        if data is None:
            self._transport.sendPacket(MSG_REQUEST_FAILURE, b"")
        else:
            self._transport.sendPacket(MSG_REQUEST_SUCCESS, data)

    def _failed(self, reason: Failure) -> None:
        self._log.failure("a request could not be carried out", reason)


class KeepAlive:
    """Asks a client that has been silent whether it is there, and gives it up in the end.

    :param clock: ``IReactorTime``.
    :param interval: seconds of silence before each question.
    :param countMax: unanswered questions after which ``lost`` is called.
    :param ask: sends one question.
    :param lost: the client is gone.
    """

    def __init__(
        self,
        clock: Any,
        interval: float,
        countMax: int,
        ask: Callable[[], object],
        lost: Callable[[], object],
    ) -> None:
        self._clock = clock
        self._interval = interval
        self._countMax = countMax
        self._ask = ask
        self._lost = lost
        #: Set by whoever hears anything of the client.
        self.heard = False
        self._unanswered = 0
        self._call: IDelayedCall | None = None
        self._schedule()

    def stop(self) -> None:
        """Ask no more."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _schedule(self) -> None:
        self._call = self._clock.callLater(self._interval, self._check)

    def _check(self) -> None:
        self._call = None
        if self.heard:
            self.heard = False
            self._unanswered = 0
        elif self._unanswered >= self._countMax:
            self._lost()
            return
        else:
            self._unanswered += 1
            self._ask()
        self._schedule()


def _replyData(answer: Any) -> bytes | None:
    """An :class:`IConchUser` answer as the reply's data, ``None`` for a failure."""
    if not answer:
        return None
    return answer[1] if isinstance(answer, tuple) else b""
