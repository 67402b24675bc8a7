"""The ``ssh-connection`` service (RFC 4254): what a client's messages mean for its channels.

What differs from Conch's: messages are dispatched by a table and checked before they are believed,
input is not acknowledged before somebody took it, output leaves through an
:class:`~conchkernel.ssh.outlet.Outlet`, and replies keep the order of the requests.

Rules of this file: the handlers of DATA and WINDOW_ADJUST run once per packet and call as little
as they can; whatever a peer does wrong is a :class:`ProtocolError`, answered in one place.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from twisted.conch.error import ConchError
from twisted.conch.ssh.connection import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_OPEN_CONFIRMATION,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_SUCCESS,
    MSG_CHANNEL_WINDOW_ADJUST,
    MSG_GLOBAL_REQUEST,
    MSG_REQUEST_FAILURE,
    MSG_REQUEST_SUCCESS,
    OPEN_ADMINISTRATIVELY_PROHIBITED,
    OPEN_CONNECT_FAILED,
    OPEN_RESOURCE_SHORTAGE,
    OPEN_UNKNOWN_CHANNEL_TYPE,
    SSHConnection,
)
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionLost
from twisted.logger import Logger

from conchkernel.errors import ConchKernelError, RefusalCode, StreamRefused
from conchkernel.ssh.channel import (
    MAX_DATA_BYTES,
    MAX_WINDOW,
    ChannelRefused,
    GatewayChannel,
)
from conchkernel.ssh.fields import DisconnectCode, Fields, ProtocolError, printable, string
from conchkernel.ssh.globalrequests import GlobalRequests, KeepAlive
from conchkernel.ssh.outlet import Outlet

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.python.failure import Failure

_ONE = struct.Struct(">L")
_TWO = struct.Struct(">2L")
_THREE = struct.Struct(">3L")
_FOUR = struct.Struct(">4L")

#: sshd's MaxSessions, where the factory brings no limits.
MAX_SESSIONS = 10
#: Channels of all kinds, open or opening. A browser over ``ssh -D`` holds a few hundred; each may
#: bind a window of memory.
MAX_CHANNELS = 1024
#: A client that takes less per packet would have us pay a packet's cost for every few bytes.
MIN_PEER_PACKET = 1024

_OPEN_CODES = {
    RefusalCode.PROHIBITED: OPEN_ADMINISTRATIVELY_PROHIBITED,
    RefusalCode.CONNECT_FAILED: OPEN_CONNECT_FAILED,
    RefusalCode.UNKNOWN_KIND: OPEN_UNKNOWN_CHANNEL_TYPE,
    RefusalCode.RESOURCE_SHORTAGE: OPEN_RESOURCE_SHORTAGE,
}


class GatewayConnection(SSHConnection):
    """One authenticated client: its channels and its global requests.

    The transport calls :meth:`transportPaused` when it holds more than it can send, and
    :meth:`transportResumed` when that is over. ``transport.factory`` may have ``limits`` and a
    ``reactor``.
    """

    _log = Logger()

    transport: Any
    channels: dict[int, GatewayChannel]

    outlet: Outlet
    globalRequests: GlobalRequests

    def __init__(self) -> None:
        super().__init__()
        self._opening: set[Deferred[GatewayChannel]] = set()
        self._noMoreSessions = False
        self._handlers: dict[int, Callable[[bytes], object]] = {}
        self._keepAlive: KeepAlive | None = None

    # --- life --------------------------------------------------------------------------------

    def serviceStarted(self) -> None:
        """The user is logged in; ``transport.avatar`` is who."""
        self.outlet = Outlet(self.transport)
        self.globalRequests = GlobalRequests(self.transport, self.gotGlobalRequest)
        self._handlers = {
            MSG_CHANNEL_DATA: self.ssh_CHANNEL_DATA,
            MSG_CHANNEL_EXTENDED_DATA: self.ssh_CHANNEL_EXTENDED_DATA,
            MSG_CHANNEL_WINDOW_ADJUST: self.ssh_CHANNEL_WINDOW_ADJUST,
            MSG_CHANNEL_OPEN: self.ssh_CHANNEL_OPEN,
            MSG_CHANNEL_OPEN_CONFIRMATION: self.ssh_CHANNEL_OPEN_CONFIRMATION,
            MSG_CHANNEL_OPEN_FAILURE: self.ssh_CHANNEL_OPEN_FAILURE,
            MSG_CHANNEL_EOF: self.ssh_CHANNEL_EOF,
            MSG_CHANNEL_CLOSE: self.ssh_CHANNEL_CLOSE,
            MSG_CHANNEL_REQUEST: self.ssh_CHANNEL_REQUEST,
            MSG_CHANNEL_SUCCESS: self.ssh_CHANNEL_SUCCESS,
            MSG_CHANNEL_FAILURE: self.ssh_CHANNEL_FAILURE,
            MSG_GLOBAL_REQUEST: self.globalRequests.received,
            MSG_REQUEST_SUCCESS: self.globalRequests.succeeded,
            MSG_REQUEST_FAILURE: self.globalRequests.refused,
        }
        limits, clock = self._limits(), getattr(self._factory(), "reactor", None)
        interval = getattr(limits, "clientAliveInterval", 0)
        if interval and clock is not None:
            countMax = getattr(limits, "clientAliveCountMax", 3)
            self._keepAlive = KeepAlive(clock, interval, countMax, self._askAlive, self._notAlive)
        avatar = self.transport.avatar
        avatar.conn = self
        warmUp = getattr(avatar, "warmUp", None)
        if warmUp is not None:
            warmUp()

    def serviceStopped(self) -> None:
        """The connection is gone: every channel is told, whatever the others make of it."""
        self._stop()
        channels, self.channels = list(self.channels.values()), {}
        for channel in channels:
            self._endChannel(channel)
        for opening in list(self._opening):
            opening.cancel()
        self.globalRequests.stop()

    def disconnect(self, reason: str, code: int = DisconnectCode.PROTOCOL_ERROR) -> None:
        """End the whole connection and tell the peer why; what it still sends is not read."""
        self._stop()
        self.transport.sendDisconnect(code, reason.encode("ascii", "backslashreplace"))

    def _stop(self) -> None:
        self._handlers = {}
        self.outlet.stop()
        if self._keepAlive is not None:
            self._keepAlive.stop()
            self._keepAlive = None

    def _peer(self) -> str:
        peerName = getattr(self.transport, "peerName", None)
        return "a client" if peerName is None else peerName()

    def _factory(self) -> object:
        return getattr(self.transport, "factory", None)

    def _limits(self) -> object:
        return getattr(self._factory(), "limits", None)

    def packetReceived(self, messageNum: int, packet: bytes) -> None:
        """The one place where a peer's mistakes, and our own, end."""
        handler = self._handlers.get(messageNum)
        if handler is None:
            if self._handlers:
                self.transport.sendUnimplemented()
            return
        if self._keepAlive is not None:
            self._keepAlive.heard = True
        try:
            handler(packet)
        except ProtocolError as error:
            self.disconnect(str(error), error.code)
        except ConchKernelError as error:
            self._log.info(
                "{peer}: message {number} was refused: {why}",
                peer=self._peer(),
                number=messageNum,
                why=str(error),
            )
            self._abandon(messageNum, packet)
        except Exception:
            self._log.failure(
                "{peer}: message {number} could not be handled",
                peer=self._peer(),
                number=messageNum,
            )
            self._abandon(messageNum, packet)

    def _abandon(self, messageNum: int, packet: bytes) -> None:
        """What cannot be done costs the channel it was asked in, or where there is none, all."""
        channel = None
        if messageNum > MSG_CHANNEL_OPEN and len(packet) >= 4:
            channel = self.channels.get(int.from_bytes(packet[:4], "big"))
        if channel is None or channel.remoteId < 0:
            self.disconnect("internal error", DisconnectCode.BY_APPLICATION)
        else:
            channel.abortConnection()

    def transportPaused(self) -> None:
        """The transport is full."""
        self.outlet.pause()

    def transportResumed(self) -> None:
        """The transport takes output again."""
        self.outlet.resume()

    # --- bytes -------------------------------------------------------------------------------

    def ssh_CHANNEL_DATA(self, packet: bytes) -> None:
        """Payload: uint32 our channel, string data."""
        if len(packet) < 8:
            raise ProtocolError("truncated message")
        local, size = _TWO.unpack_from(packet)
        channel = self.channels.get(local)
        if channel is None:
            self._find(local)
            return
        left = channel.localWindowLeft - size
        if left < 0 or size != len(packet) - 8 or size > channel.localMaxPacket:
            raise self._badData(channel, size, len(packet) - 8)
        channel.localWindowLeft = left
        channel.deliver(packet[8:])

    def ssh_CHANNEL_EXTENDED_DATA(self, packet: bytes) -> None:
        """Payload: uint32 our channel, uint32 type, string data."""
        if len(packet) < 12:
            raise ProtocolError("truncated message")
        local, dataType, size = _THREE.unpack_from(packet)
        channel = self._find(local)
        if channel is None:
            return
        left = channel.localWindowLeft - size
        if left < 0 or size != len(packet) - 12 or size > channel.localMaxPacket:
            raise self._badData(channel, size, len(packet) - 12)
        channel.localWindowLeft = left
        channel.extReceived(dataType, packet[12:])

    def ssh_CHANNEL_WINDOW_ADJUST(self, packet: bytes) -> None:
        """Payload: uint32 our channel, uint32 bytes to add."""
        if len(packet) != 8:
            raise ProtocolError("malformed window adjust")
        local, count = _TWO.unpack(packet)
        channel = self.channels.get(local)
        if channel is None:
            self._find(local)
            return
        if channel.remoteWindowLeft + count > MAX_WINDOW:
            raise ProtocolError(f"window of channel {local} overflows")
        channel.addWindowBytes(count)

    def _badData(self, channel: GatewayChannel, size: int, actual: int) -> ProtocolError:
        if size != actual:
            return ProtocolError("malformed channel data")
        if size > channel.localMaxPacket:
            return ProtocolError(f"packet too large for channel {channel.id}")
        return ProtocolError(f"window of channel {channel.id} ignored")

    def _find(self, local: int) -> GatewayChannel | None:
        """The channel; ``None`` if it is closed already, which a peer may not know yet."""
        channel = self.channels.get(local)
        if channel is not None and channel.remoteId >= 0:
            return channel
        if channel is not None or local >= self.localChannelID:
            raise ProtocolError(f"no channel {local}")
        return None

    # --- channels come and go ----------------------------------------------------------------

    def ssh_CHANNEL_OPEN(self, packet: bytes) -> None:
        """Payload: string type, uint32 sender channel, uint32 window, uint32 max packet, ..."""
        fields = Fields(packet, "CHANNEL_OPEN")
        kind = fields.string()
        sender, window, maxPacket = fields.uint32(), fields.uint32(), fields.uint32()
        data = fields.rest()
        try:
            channel = self.getChannel(kind, window, maxPacket, data)
        except ChannelRefused as refused:
            self._refuse(sender, refused.code, str(refused))
            return
        except ConchError as refused:
            # (code, text) by an IConchUser that is not ours.
            code = refused.value if isinstance(refused.value, int) else OPEN_CONNECT_FAILED
            self._refuse(sender, code, "open failed")
            return
        if isinstance(channel, Deferred):
            self._opening.add(channel)
            channel.addBoth(self._opened, channel)
            channel.addCallback(self._confirm, sender, data)
            channel.addErrback(self._notOpened, sender)
        else:
            self._confirm(channel, sender, data)

    def getChannel(
        self, channelType: bytes, windowSize: int, maxPacket: int, data: bytes
    ) -> GatewayChannel | Deferred[GatewayChannel]:
        """The channel a client asks for, or a Deferred of it.

        :raises ChannelRefused: with the sentence for the client.
        """
        if maxPacket < MIN_PEER_PACKET:
            raise ChannelRefused(
                OPEN_ADMINISTRATIVELY_PROHIBITED,
                f"a maximum packet size of {maxPacket} is too small",
            )
        self._checkChannels()
        if channelType == b"session":
            self._checkSessions()
        channel = self.transport.avatar.lookupChannel(channelType, windowSize, maxPacket, data)
        if channel is None:
            raise ChannelRefused(
                OPEN_UNKNOWN_CHANNEL_TYPE, f"unknown channel type {printable(channelType)}"
            )
        return channel

    @property
    def channelCount(self) -> int:
        """Channels of all kinds, open or opening."""
        return len(self.channels) + len(self._opening)

    def _checkChannels(self) -> None:
        if self.channelCount >= MAX_CHANNELS:
            raise ChannelRefused(OPEN_RESOURCE_SHORTAGE, "too many channels")

    def _checkSessions(self) -> None:
        if self._noMoreSessions:
            raise ChannelRefused(OPEN_ADMINISTRATIVELY_PROHIBITED, "no more sessions were wanted")
        limit = getattr(self._limits(), "maxSessions", MAX_SESSIONS)
        sessions = sum(
            channel.name == b"session" and not channel.localClosed
            for channel in self.channels.values()
        )
        if sessions >= limit:
            raise ChannelRefused(
                OPEN_RESOURCE_SHORTAGE, f"open failed: {limit} sessions are open (MaxSessions)"
            )

    def _confirm(self, channel: GatewayChannel, sender: int, data: bytes) -> None:
        local = self.localChannelID
        self.localChannelID += 1
        channel.id = local
        channel.conn = self
        channel.outlet = self.outlet
        channel.remoteId = sender
        self.channels[local] = channel
        self.transport.sendPacket(
            MSG_CHANNEL_OPEN_CONFIRMATION,
            _FOUR.pack(sender, local, channel.localWindowSize, channel.localMaxPacket)
            + channel.specificData,
        )
        channel.channelOpen(data)

    def _refuse(self, sender: int, code: int, message: str) -> None:
        self.transport.sendPacket(
            MSG_CHANNEL_OPEN_FAILURE,
            _TWO.pack(sender, code) + string(message.encode()) + string(b""),
        )

    def _opened(
        self, result: GatewayChannel | Failure, opening: Deferred[GatewayChannel]
    ) -> GatewayChannel | Failure:
        self._opening.discard(opening)
        return result

    def _notOpened(self, reason: Failure, sender: int) -> None:
        error = reason.value
        if not self._handlers:
            if not isinstance(error, CancelledError):
                self._log.info("channel not opened: {error}", error=error)
        elif isinstance(error, ChannelRefused):
            self._refuse(sender, error.code, str(error))
        elif isinstance(error, StreamRefused):
            self._refuse(sender, _OPEN_CODES.get(error.code, OPEN_CONNECT_FAILED), str(error))
        elif isinstance(error, ConchKernelError):
            self._refuse(sender, OPEN_CONNECT_FAILED, str(error))
        else:
            self._log.failure("channel could not be opened", reason)
            self._refuse(sender, OPEN_CONNECT_FAILED, "open failed")

    def openChannel(self, channel: GatewayChannel, extra: bytes = b"") -> None:
        """Ask the client for a channel; ``channelOpen`` or ``openFailed`` is called on it.

        :raises ChannelRefused: there are too many, or the connection is over.
        """
        if not self._handlers:
            raise ChannelRefused(OPEN_CONNECT_FAILED, "the connection is over")
        self._checkChannels()
        channel.id = self.localChannelID
        channel.conn = self
        channel.outlet = self.outlet
        self.localChannelID += 1
        self.channels[channel.id] = channel
        self.transport.sendPacket(
            MSG_CHANNEL_OPEN,
            string(channel.name)
            + _THREE.pack(channel.id, channel.localWindowSize, channel.localMaxPacket)
            + extra,
        )

    def ssh_CHANNEL_OPEN_CONFIRMATION(self, packet: bytes) -> None:
        """Payload: uint32 our channel, uint32 sender channel, uint32 window, uint32 max, ..."""
        fields = Fields(packet, "CHANNEL_OPEN_CONFIRMATION")
        channel = self._asked(fields.uint32())
        remoteId, window, maxPacket = fields.uint32(), fields.uint32(), fields.uint32()
        channel.remoteId = remoteId
        if maxPacket < MIN_PEER_PACKET:
            raise ProtocolError(f"a maximum packet size of {maxPacket} is too small")
        channel.remoteWindowLeft = window
        channel.remoteMaxPacket = min(maxPacket, MAX_DATA_BYTES)
        channel.channelOpen(fields.rest())

    def ssh_CHANNEL_OPEN_FAILURE(self, packet: bytes) -> None:
        """Payload: uint32 our channel, uint32 reason, string description, string language."""
        fields = Fields(packet, "CHANNEL_OPEN_FAILURE")
        channel = self._asked(fields.uint32())
        code, description = fields.uint32(), fields.string()
        del self.channels[channel.id]
        channel.openFailed(ChannelRefused(code, printable(description)))

    def _asked(self, local: int) -> GatewayChannel:
        channel = self.channels.get(local)
        if channel is None or channel.remoteId >= 0:
            raise ProtocolError(f"channel {local} was not asked for")
        return channel

    def ssh_CHANNEL_EOF(self, packet: bytes) -> None:
        """Payload: uint32 our channel."""
        channel = self._only(packet)
        if channel is not None:
            channel.eofReceived()

    def ssh_CHANNEL_CLOSE(self, packet: bytes) -> None:
        """Payload: uint32 our channel."""
        channel = self._only(packet)
        if channel is None:
            return
        channel.remoteClosed = True
        if channel.localClosed:
            self.channelClosed(channel)
        else:
            channel.closeReceived()

    def _only(self, packet: bytes) -> GatewayChannel | None:
        if len(packet) != 4:
            raise ProtocolError("malformed channel message")
        return self._find(int.from_bytes(packet, "big"))

    def sendClose(self, channel: GatewayChannel) -> None:
        """Send CLOSE at once; :meth:`GatewayChannel.loseConnection` sends it after the data."""
        if channel.localClosed:
            return
        channel.localClosed = True
        self.transport.sendPacket(MSG_CHANNEL_CLOSE, _ONE.pack(channel.remoteId))
        if channel.remoteClosed:
            self.channelClosed(channel)

    def channelClosed(self, channel: GatewayChannel) -> None:
        """Both sides have closed."""
        if self.channels.pop(channel.id, None) is not None:
            self.outlet.forget(channel)
            self._endChannel(channel)

    def _endChannel(self, channel: GatewayChannel) -> None:
        try:
            if channel.remoteId < 0:
                channel.openFailed(ConnectionLost())
            else:
                channel.localClosed = channel.remoteClosed = True
                channel.closed()
        except Exception:
            self._log.failure("channel {id} did not end well", id=channel.id)

    def adjustWindow(self, channel: GatewayChannel, bytesToAdd: int) -> None:
        """Let the client send ``bytesToAdd`` more."""
        if not channel.localClosed:
            channel.localWindowLeft += bytesToAdd
            self.transport.sendPacket(
                MSG_CHANNEL_WINDOW_ADJUST, _TWO.pack(channel.remoteId, bytesToAdd)
            )

    # --- requests ----------------------------------------------------------------------------

    def ssh_CHANNEL_REQUEST(self, packet: bytes) -> None:
        """Payload: uint32 our channel, string name, boolean want reply, ..."""
        fields = Fields(packet, "CHANNEL_REQUEST")
        channel = self._find(fields.uint32())
        name, wantReply = fields.string(), fields.boolean()
        if channel is None or channel.localClosed:
            return
        answer = channel.requestReceived(name, fields.rest())
        if wantReply:
            channel.replies.add(answer)
        elif isinstance(answer, Deferred):
            answer.addErrback(self._requestFailed)

    def ssh_CHANNEL_SUCCESS(self, packet: bytes) -> None:
        """Payload: uint32 our channel. We ask for no replies, so there is none to match."""
        self._only(packet)

    def ssh_CHANNEL_FAILURE(self, packet: bytes) -> None:
        """Payload: uint32 our channel."""
        self._only(packet)

    def gotGlobalRequest(self, requestType: bytes, data: bytes) -> Any:
        """Answer as :meth:`IConchUser.gotGlobalRequest` does, or with a Deferred of that.

        What the connection itself does not know is the avatar's; what nobody knows is refused,
        and that is all ``keepalive@openssh.com`` wants to hear.
        """
        if requestType == b"no-more-sessions@openssh.com":
            self._noMoreSessions = True
            return True
        return self.transport.avatar.gotGlobalRequest(requestType, data)

    def sendGlobalRequest(
        self, request: bytes, data: bytes, wantReply: bool = False
    ) -> Deferred[bytes] | None:
        """Ask the client something that concerns no channel; see :meth:`GlobalRequests.send`."""
        return self.globalRequests.send(request, data, wantReply)

    def _requestFailed(self, reason: Failure) -> None:
        self._log.failure("a request could not be carried out", reason)

    def _askAlive(self) -> None:
        reply = self.sendGlobalRequest(b"keepalive@openssh.com", b"", True)
        if reply is not None:
            # Any answer will do.
            reply.addBoth(lambda _: None)

    def _notAlive(self) -> None:
        self.disconnect("the client does not respond", DisconnectCode.BY_APPLICATION)
