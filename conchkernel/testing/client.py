"""A client of a :class:`~conchkernel.ssh.connection.GatewayConnection`, in memory, that believes
nothing: it fails where the connection breaks the protocol."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from twisted.conch.ssh import connection as messages
from twisted.internet.address import IPv4Address

from conchkernel.ssh.connection import GatewayConnection
from conchkernel.ssh.fields import Fields, string

if TYPE_CHECKING:
    from conchkernel.avatars import KernelAvatar


@dataclass
class ClientChannel:
    """What a :class:`MemoryClient` knows of one channel."""

    number: int
    window: int
    maxPacket: int
    remote: int = -1
    """The gateway's number of it; negative until it is confirmed."""
    remoteWindow: int = 0
    remoteMaxPacket: int = 0
    refusal: tuple[int, bytes] | None = None
    output: bytearray = field(default_factory=bytearray)
    errors: bytearray = field(default_factory=bytearray)
    events: list[Any] = field(default_factory=list)
    """Everything but window adjusts, in order; runs of ``data`` or ``stderr`` stand once."""
    packets: list[int] = field(default_factory=list)
    """The sizes of the data packets."""
    adjusts: list[int] = field(default_factory=list)
    closed: bool = False


@dataclass
class AskedChannel:
    """A channel that the gateway asks a :class:`MemoryClient` for."""

    kind: bytes
    remote: int
    window: int
    maxPacket: int
    data: bytes


class MemoryClient:
    """A logged in client, directly upon a gateway's connection, that believes nothing.

    It is the connection's transport. Set :attr:`writable` by :meth:`pause` and :meth:`resume` to
    play a full one.
    """

    def __init__(self, avatar: KernelAvatar, factory: object = None) -> None:
        self.avatar = avatar
        self.factory = factory
        self.writable = True
        self.channels: list[ClientChannel] = []
        #: Channels that the gateway asked for and that have had no answer.
        self.asked: list[AskedChannel] = []
        self.globalReplies: list[bytes | None] = []
        self.globalRequests: list[tuple[bytes, bool]] = []
        #: Every message as (number, payload).
        self.sent: list[tuple[int, bytes]] = []
        self.disconnected: tuple[int, bytes] | None = None
        self.unimplemented = 0
        #: The numbers of the channels that got data, in order.
        self.turns: list[int] = []
        #: Pause after so many data packets, if set.
        self.capacity: int | None = None
        self.connection = GatewayConnection()
        self.connection.transport = self
        self.connection.serviceStarted()

    # --- a client's doings -------------------------------------------------------------------

    def open(
        self, kind: bytes = b"session", window: int = 1 << 21, maxPacket: int = 1 << 15,
        data: bytes = b"",
    ) -> ClientChannel:  # fmt: skip
        """Ask for a channel."""
        channel = ClientChannel(len(self.channels), window, maxPacket)
        self.channels.append(channel)
        numbers = struct.pack(">3L", channel.number, window, maxPacket)
        self.receive(messages.MSG_CHANNEL_OPEN, string(kind) + numbers + data)
        return channel

    def confirm(self, window: int = 1 << 21, maxPacket: int = 1 << 15) -> ClientChannel:
        """Take the channel that the gateway has waited for longest."""
        asked = self.asked.pop(0)
        channel = ClientChannel(len(self.channels), window, maxPacket, asked.remote)
        channel.remoteWindow, channel.remoteMaxPacket = asked.window, asked.maxPacket
        self.channels.append(channel)
        numbers = struct.pack(">4L", asked.remote, channel.number, window, maxPacket)
        self.receive(messages.MSG_CHANNEL_OPEN_CONFIRMATION, numbers)
        return channel

    def refuse(self, code: int = 1) -> None:
        """Do not take it."""
        numbers = struct.pack(">2L", self.asked.pop(0).remote, code)
        self.receive(messages.MSG_CHANNEL_OPEN_FAILURE, numbers + string(b"no") + string(b""))

    def request(
        self, channel: ClientChannel, name: bytes, data: bytes = b"", reply: bool = True
    ) -> None:
        """Send a channel request."""
        self._to(channel, messages.MSG_CHANNEL_REQUEST, string(name) + bytes([reply]) + data)

    def execute(self, command: bytes, **options: int) -> ClientChannel:
        """Open a session and run a command."""
        channel = self.open(**options)  # type: ignore[arg-type]
        self.request(channel, b"exec", string(command))
        return channel

    def write(self, channel: ClientChannel, data: bytes) -> None:
        """Send data in packets as the gateway wants them, and heed its window."""
        for start in range(0, len(data), channel.remoteMaxPacket):
            piece = data[start : start + channel.remoteMaxPacket]
            assert len(piece) <= channel.remoteWindow, "the gateway's window is full"
            channel.remoteWindow -= len(piece)
            self._to(channel, messages.MSG_CHANNEL_DATA, string(piece))

    def eof(self, channel: ClientChannel) -> None:
        """Send EOF."""
        self._to(channel, messages.MSG_CHANNEL_EOF, b"")

    def close(self, channel: ClientChannel) -> None:
        """Send CLOSE."""
        self._to(channel, messages.MSG_CHANNEL_CLOSE, b"")

    def adjust(self, channel: ClientChannel, count: int) -> None:
        """Take ``count`` more bytes."""
        channel.window += count
        self._to(channel, messages.MSG_CHANNEL_WINDOW_ADJUST, struct.pack(">L", count))

    def globalRequest(self, name: bytes, data: bytes = b"", reply: bool = True) -> None:
        """Send a global request."""
        self.receive(messages.MSG_GLOBAL_REQUEST, string(name) + bytes([reply]) + data)

    def receive(self, message: int, payload: bytes) -> None:
        """Let the gateway receive any message."""
        self.connection.packetReceived(message, payload)

    def pause(self) -> None:
        """The transport is full."""
        self.writable = False
        self.connection.transportPaused()

    def resume(self, capacity: int | None = None) -> None:
        """The transport takes data again, up to ``capacity`` packets."""
        self.writable = True
        self.capacity = capacity
        self.connection.transportResumed()

    def lose(self) -> None:
        """The TCP connection is gone."""
        self.connection.serviceStopped()
        self.avatar.logout()

    def _to(self, channel: ClientChannel, message: int, payload: bytes) -> None:
        self.receive(message, struct.pack(">L", channel.remote) + payload)

    # --- the transport -----------------------------------------------------------------------

    def isWritable(self) -> bool:
        return self.writable

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.1", 40000)

    def getHost(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.2", 22)

    def sendDisconnect(self, code: int, reason: bytes) -> None:
        assert self.disconnected is None, "disconnected twice"
        self.disconnected = (code, reason)

    def sendUnimplemented(self) -> None:
        self.unimplemented += 1

    def sendChannelData(self, recipient: int, data: bytes) -> None:
        self.sendPacket(messages.MSG_CHANNEL_DATA, struct.pack(">L", recipient) + string(data))

    def sendChannelExtendedData(self, recipient: int, dataType: int, data: bytes) -> None:
        self.sendPacket(
            messages.MSG_CHANNEL_EXTENDED_DATA,
            struct.pack(">2L", recipient, dataType) + string(data),
        )

    def sendPacket(self, message: int, payload: bytes) -> None:
        self.sent.append((message, payload))
        fields = Fields(payload, "a gateway's message")
        if message == messages.MSG_REQUEST_SUCCESS:
            self.globalReplies.append(payload)
        elif message == messages.MSG_REQUEST_FAILURE:
            self.globalReplies.append(None)
        elif message == messages.MSG_GLOBAL_REQUEST:
            self.globalRequests.append((fields.string(), fields.boolean()))
        elif message == messages.MSG_CHANNEL_OPEN:
            kind, remote = fields.string(), fields.uint32()
            asked = AskedChannel(kind, remote, fields.uint32(), fields.uint32(), fields.rest())
            self.asked.append(asked)
        else:
            channel = self.channels[fields.uint32()]
            assert not channel.closed, f"message {message} after CLOSE"
            self._take(channel, message, fields)
            fields.end()

    def _take(self, channel: ClientChannel, message: int, fields: Fields) -> None:
        if message == messages.MSG_CHANNEL_OPEN_CONFIRMATION:
            channel.remote = fields.uint32()
            channel.remoteWindow, channel.remoteMaxPacket = fields.uint32(), fields.uint32()
        elif message == messages.MSG_CHANNEL_OPEN_FAILURE:
            channel.refusal = (fields.uint32(), fields.string())
            fields.string()
        elif message == messages.MSG_CHANNEL_WINDOW_ADJUST:
            count = fields.uint32()
            channel.adjusts.append(count)
            channel.remoteWindow += count
        elif message == messages.MSG_CHANNEL_DATA:
            self._takeData(channel, "data", channel.output, fields.string())
        elif message == messages.MSG_CHANNEL_EXTENDED_DATA:
            assert fields.uint32() == messages.EXTENDED_DATA_STDERR
            self._takeData(channel, "stderr", channel.errors, fields.string())
        elif message == messages.MSG_CHANNEL_REQUEST:
            name, wantReply = fields.string(), fields.boolean()
            assert not wantReply
            channel.events.append((name.decode("ascii"), fields.rest()))
        else:
            event = {
                messages.MSG_CHANNEL_SUCCESS: "success",
                messages.MSG_CHANNEL_FAILURE: "failure",
                messages.MSG_CHANNEL_EOF: "eof",
                messages.MSG_CHANNEL_CLOSE: "close",
            }[message]
            channel.events.append(event)
            channel.closed = event == "close"

    def _takeData(
        self, channel: ClientChannel, event: str, into: bytearray, data: bytes
    ) -> None:
        assert self.writable, "data into a full transport"
        assert 0 < len(data) <= channel.maxPacket, "a packet of the wrong size"
        assert len(data) <= channel.window, "more than the window"
        assert "eof" not in channel.events, "data after EOF"
        channel.window -= len(data)
        channel.packets.append(len(data))
        into += data
        self.turns.append(channel.number)
        if channel.events[-1:] != [event]:
            channel.events.append(event)
        if self.capacity is not None:
            self.capacity -= 1
            if self.capacity <= 0:
                self.capacity = None
                self.pause()
