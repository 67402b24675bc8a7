"""One SSH channel: two windows, one queue, and an order that nothing overtakes.

Output waits in a queue of chunks together with what must follow it (EOF, exit-status, CLOSE), so
the order on the wire is the order of the calls. The queue is bounded because its source may never
send beyond what :meth:`GatewayChannel.attach`'s ``grant`` was told. Input is charged to the local
window when it arrives and given back only by :meth:`GatewayChannel.consumed`.

This module does not know what a session is, nor where the bytes come from.
"""

from __future__ import annotations

import enum
import struct
import sys
from collections import deque
from typing import TYPE_CHECKING, ClassVar

from twisted.conch.ssh.channel import SSHChannel
from twisted.conch.ssh.connection import (
    EXTENDED_DATA_STDERR,
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_SUCCESS,
)
from twisted.logger import Logger

from conchkernel.errors import ConchKernelError
from conchkernel.ssh.fields import string
from conchkernel.ssh.replies import Replies

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.defer import Deferred

    from conchkernel.ssh.connection import GatewayConnection
    from conchkernel.ssh.outlet import Data, Outlet

_UINT32 = struct.Struct(">L")

#: What a client may send before the far side took any of it. OpenSSH's own: 64 packets of 32 KiB.
LOCAL_WINDOW_BYTES = 2 * 1024 * 1024
#: The largest DATA packet we take and, if the client takes it too, send. OpenSSH, PuTTY, asyncssh
#: and paramiko all use 32 KiB; every implementation must take packets of 35000 (RFC 4253, 6.1).
MAX_DATA_BYTES = 32 * 1024
#: The window is given back in steps of this size, or of half the window where that is less, as
#: OpenSSH does (channels.c, three packets).
ADJUST_STEP_BYTES = 3 * MAX_DATA_BYTES
#: Granted and not yet handed to the transport, at most: the bound of a channel's queue.
CREDIT_CAP_BYTES = 2560 * 1024
#: A step of granting, unless half of the cap is less.
STEP_BYTES = 256 * 1024
#: Granted beyond the client's window: so much waits here for a window that opens, so that the way
#: from the source does not add to the client's own round trip.
AHEAD_BYTES = 1024 * 1024
#: Chunks below this are joined in the queue, so that many small ones do not cost an object each.
SMALL_BYTES = 1024
#: The largest window there is (RFC 4254 section 5.2).
MAX_WINDOW = 2**32 - 1


class ChannelRefused(ConchKernelError):
    """A channel is not opened; others are not concerned.

    :param code: the reason code of RFC 4254 section 5.1.
    :param message: the sentence that the client's user sees.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Outgoing(enum.IntEnum):
    """What may still be queued towards the client. Only ever goes up; ``OPEN`` alone is false."""

    OPEN = 0
    #: The client wants no more output, but is still told how it ended.
    DISCARDING = 1
    #: EOF is queued or sent: only requests and CLOSE may follow.
    EOF = 2
    #: CLOSE is queued or sent: nothing may follow.
    CLOSED = 3


class GatewayChannel(SSHChannel):
    """A channel on a :class:`~conchkernel.ssh.connection.GatewayConnection`.

    Subclasses connect it to something by :meth:`attach` and answer requests through the table
    :attr:`requests`.
    """

    _log = Logger()

    conn: GatewayConnection
    #: Set by the connection before anything can be sent.
    outlet: Outlet
    id: int  # type: ignore[assignment]

    #: Request name to the method that answers it, given the request's own fields.
    requests: ClassVar[dict[bytes, Callable[..., bool | Deferred[bool]]]] = {}

    def __init__(
        self,
        localWindow: int = 0,
        localMaxPacket: int = 0,
        remoteWindow: int = 0,
        remoteMaxPacket: int = 0,
        conn: GatewayConnection | None = None,
        data: bytes | None = None,
        avatar: object = None,
    ) -> None:
        super().__init__(
            localWindow or LOCAL_WINDOW_BYTES,
            localMaxPacket or MAX_DATA_BYTES,
            remoteWindow,
            min(remoteMaxPacket, MAX_DATA_BYTES),
            conn,
            data,
            avatar,  # type: ignore[arg-type]
        )
        self.remoteId = -1
        #: Takes a DATA packet's bytes; the connection calls it without a hop between.
        self.deliver: Callable[[bytes], None] = self._keepEarly
        #: In a queue of the connection's pump.
        self.scheduled = False
        self._early = bytearray()
        self._earlyEOF = False
        self._finishInput: Callable[[], None] | None = None
        self._consumedBytes = 0
        self._adjustStep = min(ADJUST_STEP_BYTES, self.localWindowSize >> 1)
        # Chunks are (extended type, bytes), what follows data is (-message number, payload).
        self._queue: deque[tuple[int, Data]] = deque()
        self._offset = 0
        self._outgoing = Outgoing.OPEN
        self._grant: Callable[[int], None] | None = None
        self._granted = 0
        self._handed = 0
        self._creditAt = sys.maxsize
        self._creditCap = CREDIT_CAP_BYTES
        self.replies: Replies[bool] = Replies(self._sendReply, False)

    # --- where the bytes come from and go to -------------------------------------------------

    def attach(
        self,
        deliver: Callable[[bytes], None],
        finishInput: Callable[[], None],
        grant: Callable[[int], None],
        creditCap: int = CREDIT_CAP_BYTES,
    ) -> None:
        """Connect the channel; input that came before is delivered now.

        :param deliver: takes input; :meth:`consumed` must be called as it is really taken.
        :param finishInput: called once, after all input, when the client sends EOF.
        :param grant: told up to which byte output may be given to :meth:`write` and
            :meth:`writeExtended` together, counted from the channel's start; only ever raised.
        :param creditCap: output that may be granted and not handed to the transport.
        """
        self._grant = grant
        self._creditCap = creditCap
        self._finishInput = finishInput
        self.deliver = deliver
        early, self._early = self._early, bytearray()
        if early:
            deliver(bytes(early))
        if self._earlyEOF:
            self.eofReceived()
        self.credit()

    def detach(self) -> None:
        """Nobody takes input any more, nor may be granted output. Idempotent."""
        self.deliver = self._ignore
        self._early = bytearray()
        self._grant = self._finishInput = None
        self._creditAt = sys.maxsize

    # --- input -------------------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Input that is charged to the window already."""
        self.deliver(data)

    def extReceived(self, dataType: int, data: bytes) -> None:
        """A client has no stderr: ignored as by sshd, but its window must not shrink by it."""
        self.consumed(len(data))

    def eofReceived(self) -> None:
        """The client sends no more data, but still takes some."""
        if self.deliver == self._keepEarly:
            self._earlyEOF = True
            return
        self.deliver = self._ignore
        finishInput, self._finishInput = self._finishInput, None
        if finishInput is not None:
            finishInput()

    def consumed(self, count: int) -> None:
        """``count`` more bytes of input were really taken, and the client may send as many."""
        self._consumedBytes += count
        if self._consumedBytes >= self._adjustStep and not self.localClosed:
            count, self._consumedBytes = self._consumedBytes, 0
            self.conn.adjustWindow(self, count)

    def _keepEarly(self, data: bytes) -> None:
        # Bounded by the window, which nobody opens again before the channel is attached; joined,
        # because a window of single bytes would cost forty times its size in objects.
        self._early += data

    def _ignore(self, data: bytes) -> None:
        pass

    # --- output ------------------------------------------------------------------------------

    def write(self, data: Data) -> None:
        """Send bytes; within what was granted. ``data`` is kept, not copied."""
        size = len(data)
        outlet = self.outlet
        if (
            outlet.clear
            and not self._outgoing
            and not self._queue
            and 0 < size <= self.remoteWindowLeft
            and size <= self.remoteMaxPacket
        ):
            self.remoteWindowLeft -= size
            self._handed += size
            outlet.sendData(self.remoteId, data)
            if self._handed >= self._creditAt:
                self.credit()
        else:
            self._enqueue(0, data)

    def writeExtended(self, dataType: int, data: Data) -> None:
        """Send bytes of another kind (RFC 4254 section 5.2); within what was granted."""
        self._enqueue(dataType, data)

    def writeError(self, message: str) -> None:
        """Tell the user why this channel ends, on stderr; to be called only when it ends."""
        # With a carriage return, since nobody knows whether the client's terminal is raw.
        data = b"conchkernel: " + message.encode("utf-8", "replace") + b"\r\n"
        self._enqueue(EXTENDED_DATA_STDERR, data)

    def sendRequest(self, requestType: bytes, data: bytes) -> None:
        """Send a request that wants no reply, after all output written so far."""
        if self._outgoing < Outgoing.CLOSED:
            self._follow(MSG_CHANNEL_REQUEST, string(requestType) + b"\0" + data)

    def writeEOF(self) -> None:
        """Send EOF after all output written so far. Idempotent."""
        if self._outgoing < Outgoing.EOF:
            self._outgoing = Outgoing.EOF
            self._follow(MSG_CHANNEL_EOF, b"")

    def loseConnection(self) -> None:
        """Close the channel after all that was written so far. Idempotent."""
        if self._outgoing < Outgoing.CLOSED:
            self._outgoing = Outgoing.CLOSED
            self.detach()
            self._follow(MSG_CHANNEL_CLOSE, b"")

    def abortConnection(self) -> None:
        """Close the channel now; output that waits is dropped. Idempotent."""
        self._queue.clear()
        self._offset = 0
        self.detach()
        self._outgoing = Outgoing.CLOSED
        self.conn.sendClose(self)

    def discardOutput(self) -> None:
        """The client wants no more output: what waits and what still comes is dropped.

        What follows it (EOF, a status, CLOSE) needs no window, and goes.
        """
        if self._outgoing and not self._queue:
            return
        self._outgoing = max(self._outgoing, Outgoing.DISCARDING)
        self._handed += self.bufferedBytes
        self._queue = deque(entry for entry in self._queue if entry[0] < 0)
        self._offset = 0
        self.credit()
        if self._queue:
            # Last, since it may be CLOSE, and then this is over.
            self.outlet.schedule(self, False)

    @property
    def bufferedBytes(self) -> int:
        """Output that waits for the client or the transport; never more than the credit cap."""
        return sum(len(data) for kind, data in self._queue if kind >= 0) - self._offset

    def _enqueue(self, kind: int, data: Data) -> None:
        if self._outgoing:
            # Dropped, and so not against the credit of what may still come.
            self._handed += len(data)
            if self._outgoing is Outgoing.DISCARDING:
                self.credit()
            return
        queue = self._queue
        size = len(data)
        if not size:
            return
        if size <= SMALL_BYTES:
            if queue:
                lastKind, last = queue[-1]
                if (
                    lastKind == kind
                    and type(last) is bytearray
                    and len(last) < self.remoteMaxPacket
                ):
                    last += data
                    return
            # A copy: a view would keep the whole message that it came in.
            data = bytearray(data)
        elif isinstance(data, memoryview) and memoryview(data.obj).nbytes > 4 * size:
            data = bytes(data)  # for the same reason: the rest of it was others'
        queue.append((kind, data))
        if len(queue) == 1:
            self.outlet.schedule(self, size <= SMALL_BYTES)

    def _follow(self, message: int, payload: bytes) -> None:
        """Send a message after the data that waits; it costs no window."""
        if self._queue:
            self._queue.append((-message, payload))
        else:
            self._sendMessage(message, payload)

    def _sendMessage(self, message: int, payload: bytes) -> None:
        if message == MSG_CHANNEL_CLOSE:
            self.conn.sendClose(self)
        elif not self.localClosed:
            self.conn.transport.sendPacket(message, _UINT32.pack(self.remoteId) + payload)

    def sendNext(self, runBytes: int = 0) -> bool:
        """Send one packet of what waits, or several that are ``runBytes`` at most.

        :returns: whether another could be sent now.
        """
        queue = self._queue
        if not queue:
            return False
        kind, data = queue[0]
        if kind < 0:
            queue.popleft()
            self._sendMessage(-kind, bytes(data))
            return bool(queue)
        offset = self._offset
        left = len(data) - offset
        full = self.remoteMaxPacket
        size = min(left, self.remoteWindowLeft, full)
        if not kind and size == full and runBytes:
            run = min(left, self.remoteWindowLeft, runBytes)
            size = run if run == left else run - run % full
        piece: Data
        if size == left:
            queue.popleft()
            self._offset = 0
            piece = memoryview(data)[offset:] if offset else data
        elif size <= 0:
            return False
        else:
            if type(data) is bytearray:
                # From here on nothing is joined to it: a view of it does not let it grow.
                data = bytes(data)
                queue[0] = (kind, data)
            piece = memoryview(data)[offset : offset + size]
            self._offset = offset + size
        self.remoteWindowLeft -= size
        self._handed += size
        if kind:
            self.outlet.sendExtendedData(self.remoteId, kind, piece)
        elif size > full:
            self.outlet.sendRun(self.remoteId, piece, full)
        else:
            self.outlet.sendData(self.remoteId, piece)
        if self._handed >= self._creditAt:
            self.credit()
        # A message that follows data needs no window.
        return bool(queue) and (self.remoteWindowLeft > 0 or queue[0][0] < 0)

    def addWindowBytes(self, data: int) -> None:
        """The client takes ``data`` more bytes of output."""
        self.remoteWindowLeft += data
        if self._queue and not self.scheduled:
            self.outlet.schedule(self, False)
        self.credit()

    def credit(self) -> None:
        """Grant what the client's window and the cap allow by now.

        Done in steps of an eighth of the cap, of a small one in larger ones, or when as much is
        gained as is left: each is a message to the source, and a client which opens its window
        byte by byte must not cost one per byte.
        """
        grant = self._grant
        if grant is None:
            return
        if not self.outlet.writable:
            # What is granted now would only wait here.
            self.outlet.owe(self)
            return
        handed, granted, cap = self._handed, self._granted, self._creditCap
        end = handed + self.remoteWindowLeft + AHEAD_BYTES
        limit = min(end, handed + cap)
        gained = limit - granted
        step = max(cap >> 3, min(cap >> 1, STEP_BYTES))
        due = gained >= step or gained >= max(granted - handed, 1)
        if due:
            self._granted = granted = limit
        # Where handing on alone, without another word of the client, makes a grant due.
        if end - granted >= step:
            self._creditAt = granted - cap + step
        elif end > granted:
            self._creditAt = granted - (end - granted)
        else:
            self._creditAt = sys.maxsize
        if due:
            grant(limit)

    # --- requests ----------------------------------------------------------------------------

    def requestReceived(self, requestType: bytes, data: bytes) -> bool | Deferred[bool]:
        """Answer a request through :attr:`requests`; what is not there is refused."""
        answer = self.requests.get(requestType)
        return answer(self, data) if answer is not None else False

    def _sendReply(self, succeeded: bool) -> None:
        if not self.localClosed:
            message = MSG_CHANNEL_SUCCESS if succeeded else MSG_CHANNEL_FAILURE
            self.conn.transport.sendPacket(message, _UINT32.pack(self.remoteId))

    # --- the end -----------------------------------------------------------------------------

    def channelOpen(self, specificData: bytes) -> None:
        """The channel is confirmed."""

    def openFailed(self, reason: object) -> None:
        """The channel we asked for was refused, or the connection was lost before."""

    def closeReceived(self) -> None:
        """The client has closed: nothing that waits can reach anybody."""
        self.abortConnection()

    def closed(self) -> None:
        """Both sides have closed, or the connection is gone. Called once."""
        self._outgoing = Outgoing.CLOSED
        self._queue.clear()
        self.detach()
        self.replies.close()

    def logPrefix(self) -> str:
        return f"channel {self.id}"
