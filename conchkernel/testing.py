"""The public test kit: a kernel's road, and an SSH client, in memory.

:class:`MemoryBackend` gives :class:`MemoryLink`, whose processes are scripted by the test and keep
the contract of :mod:`conchkernel.interfaces` to the byte: no output beyond what was granted, input
counted as taken only when the script takes it. :class:`MemoryClient` stands on the other side of a
:class:`~conchkernel.ssh.connection.GatewayConnection` and fails where that breaks the protocol.
Nothing here needs a reactor or a network.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from twisted.conch.ssh import connection as messages
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from conchkernel.errors import RefusalCode, StreamRefused
from conchkernel.interfaces import (
    Exit,
    ExitStatus,
    IBackend,
    IKernelLink,
    IListener,
    Incoming,
    IStream,
    IStreamReceiver,
    PrivateSocket,
    ProcessRequest,
    SocketPath,
    TCPAddress,
    WindowSize,
)
from conchkernel.ssh.connection import GatewayConnection
from conchkernel.ssh.fields import Fields, string

if TYPE_CHECKING:
    from collections.abc import Callable

    from conchkernel.avatars import KernelAvatar
    from conchkernel.files import IFileStore


SUCCESS = ExitStatus(0)


@implementer(IStream)
class MemoryStream:
    """A process, or a connection, that does what a test tells it.

    :ivar request: what was asked for: a process, an address, or a connection that was accepted.
    :ivar received: input that was taken.
    :ivar waiting: input that was written and not taken yet.
    :ivar calls: everything else that was asked of the stream, in order.
    """

    def __init__(self, request: Any, receiver: IStreamReceiver) -> None:
        self.request = request
        self.receiver = receiver
        #: Called as input is written; a script may set it to answer.
        self.onInput: Callable[[], None] = lambda: None
        #: Called when the input's end is written, after all input was taken.
        self.onInputEOF: Callable[[], None] = lambda: None
        #: Called when nothing waits to be sent.
        self.onDrained: Callable[[], None] = lambda: None
        #: Called when the client's side reads no more, or gives the stream up.
        self.onHangup: Callable[[], None] = lambda: None
        self.received = bytearray()
        self.waiting = bytearray()
        self.inputEOF = False
        self.limit = 0
        self.sent = 0
        self.calls: list[tuple[object, ...]] = []
        self.closed = False
        self._reading = True
        self._delivering = False
        self._output: deque[tuple[str, Any]] = deque()

    # --- for the script ----------------------------------------------------------------------

    def opened(self, **info: object) -> None:
        """The process runs."""
        self.receiver.streamOpened(info)

    def take(self, count: int | None = None) -> bytes:
        """Read input as the process would, all that waits or ``count`` bytes."""
        count = len(self.waiting) if count is None else min(count, len(self.waiting))
        data = bytes(self.waiting[:count])
        del self.waiting[:count]
        self.received += data
        if data:
            self.receiver.streamConsumed(len(data))
        if self.inputEOF and not self.waiting:
            self.onInputEOF()
        return data

    def put(self, data: bytes) -> None:
        """Write to stdout or the terminal; what is not granted yet waits."""
        self._queue("data", data)

    def putError(self, data: bytes) -> None:
        """Write to stderr."""
        self._queue("error", data)

    def putEOF(self) -> None:
        """Close stdout and stderr after what was written."""
        self._queue("eof", None)

    def end(self, exit: Exit | None = SUCCESS, reason: Exception | None = None) -> None:
        """End after all output: EOF, ``exit`` if there is one, closed with ``reason``."""
        if exit is not None:
            self._queue("eof", None)
            self._queue("exit", exit)
        self._queue("closed", reason)

    def lose(self, reason: Exception) -> None:
        """The road is cut: what was not sent is lost."""
        self._output.clear()
        self._queue("closed", reason)

    @property
    def pending(self) -> int:
        """Output that the process wrote and nobody granted yet."""
        return sum(len(data) for _, data in self._output if isinstance(data, bytes))

    # --- IStream -----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        assert not self.inputEOF, "input after its end"
        self.waiting += data
        self.onInput()

    def writeEOF(self) -> None:
        assert not self.inputEOF, "input ends twice"
        self.inputEOF = True
        if not self.waiting:
            self.onInputEOF()

    def grant(self, limit: int) -> None:
        self.limit = max(self.limit, limit)
        self._deliver()

    def resize(self, size: WindowSize) -> None:
        self.calls.append(("resize", size))

    def signal(self, name: str) -> None:
        self.calls.append(("signal", name))

    def sendBreak(self, milliseconds: int) -> None:
        self.calls.append(("break", milliseconds))

    def stopReading(self) -> None:
        self.calls.append(("stopReading",))
        self._reading = False
        self._output = deque(item for item in self._output if not isinstance(item[1], bytes))
        self.onHangup()
        self._deliver()

    def close(self) -> None:
        if not self.closed and ("close",) not in self.calls:
            self.calls.append(("close",))
            self.onHangup()
            self._output.clear()
            self._queue("closed", None)

    # --- within ------------------------------------------------------------------------------

    def _queue(self, kind: str, data: object) -> None:
        if self.closed or (isinstance(data, bytes) and not self._reading):
            return
        self._output.append((kind, data))
        self._deliver()

    def _deliver(self) -> None:
        if self._delivering:
            return
        self._delivering = True
        try:
            while not self.closed:
                if self._output:
                    if not self._deliverNext():
                        break
                else:
                    self.onDrained()
                    if not self._output:
                        break
        finally:
            self._delivering = False

    def _deliverNext(self) -> bool:
        kind, data = self._output.popleft()
        if isinstance(data, bytes):
            room = self.limit - self.sent
            if len(data) > room:
                self._output.appendleft((kind, data[room:]))
                data = data[:room]
            if not data:
                return False
            self.sent += len(data)
            # Bytes in the form in which the wire has them.
            view: Any = memoryview(data)
            if kind == "data":
                self.receiver.streamData(view)
            else:
                self.receiver.streamExtendedData(view)
        elif kind == "eof":
            self.receiver.streamEOF()
        elif kind == "exit":
            self.receiver.streamExited(data)
        else:
            self.closed = True
            self._output.clear()
            self.receiver.streamClosed(data)
        return True


@implementer(IListener)
class MemoryListener:
    """An address to which a test connects.

    :ivar address: what was asked for.
    :ivar refused: who was turned away.
    """

    def __init__(self, link: MemoryLink, address: Any, receiver: Any) -> None:
        self.address = address
        self.port = (getattr(address, "port", 0) or 49152) if hasattr(address, "port") else 0
        name = getattr(address, "name", None)
        self.path = b"/private/" + name.encode() if name else getattr(address, "path", b"")
        self.receiver = receiver
        self.refused: list[Incoming] = []
        self.closed = False
        self._link = link
        self._number = 0

    def connect(self, host: str = "", port: int = 0) -> Incoming:
        """Somebody connects."""
        self._number += 1
        incoming = Incoming(self._number, host, port)
        self.receiver.connectionAccepted(incoming)
        return incoming

    def accept(self, incoming: Incoming, receiver: IStreamReceiver) -> IStream:
        return self._link.begin(incoming, receiver)

    def refuse(self, incoming: Incoming) -> None:
        self.refused.append(incoming)

    def close(self) -> None:
        self.closed = True


@implementer(IKernelLink)
class MemoryLink:
    """A link whose processes and connections are :class:`MemoryStream`.

    :param program: called with each stream that is opened, to script it.
    :ivar listeners: who listens, or did.
    :ivar refusal: why nobody may listen, if set.
    :ivar files: the store that whoever asks for files gets; ``None`` to refuse.
    """

    def __init__(self, program: Callable[[MemoryStream], None] | None = None) -> None:
        self.streams: list[MemoryStream] = []
        self.listeners: list[MemoryListener] = []
        self.refusal: Exception | None = None
        self.files: IFileStore | None = None
        self.released = False
        self._program = program

    def openProcess(self, request: ProcessRequest, receiver: IStreamReceiver) -> IStream:
        return self.begin(request, receiver)

    def openConnection(
        self, address: TCPAddress | SocketPath, receiver: IStreamReceiver
    ) -> IStream:
        return self.begin(address, receiver)

    def listen(
        self, address: TCPAddress | SocketPath | PrivateSocket, receiver: Any
    ) -> Deferred[IListener]:
        if self.refusal is not None:
            return fail(self.refusal)
        listener = MemoryListener(self, address, receiver)
        self.listeners.append(listener)
        return succeed(listener)

    def begin(self, request: Any, receiver: IStreamReceiver) -> IStream:
        """Open a stream for whatever was asked for."""
        stream = MemoryStream(request, receiver)
        self.streams.append(stream)
        if self._program is not None:
            self._program(stream)
        return stream

    def openFiles(self, root: bytes | None, readOnly: bool) -> Deferred[IFileStore]:
        if self.files is None:
            refused = StreamRefused(RefusalCode.UNKNOWN_KIND, "there are no files in memory")
            return fail(refused)
        return succeed(self.files)

    def release(self) -> None:
        if not self.released:
            self.released = True
            for stream in self.streams:
                stream.close()
            for listener in self.listeners:
                listener.close()


@implementer(IBackend)
class MemoryBackend:
    """Gives a new :class:`MemoryLink` to whoever connects.

    :ivar users: who connected, in order.
    :ivar links: what they got.
    """

    def __init__(self, program: Callable[[MemoryStream], None] | None = None) -> None:
        self.users: list[str] = []
        self.links: list[MemoryLink] = []
        #: While set, whoever connects waits until :meth:`answer`.
        self.slow = False
        self.waiting: list[Deferred[IKernelLink]] = []
        self._program = program

    def connect(self, user: str) -> Deferred[IKernelLink]:
        self.users.append(user)
        if self.slow:
            waiting: Deferred[IKernelLink] = Deferred(self.waiting.remove)
            self.waiting.append(waiting)
            return waiting
        return succeed(self._newLink())

    def answer(self, error: Exception | None = None) -> None:
        """Let the one who waits longest have a link, or ``error``."""
        waiting = self.waiting.pop(0)
        if error is None:
            waiting.callback(self._newLink())
        else:
            waiting.errback(error)

    def _newLink(self) -> IKernelLink:
        link = MemoryLink(self._program)
        self.links.append(link)
        return link


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
