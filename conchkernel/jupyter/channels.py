"""The channels of one kernel: its WebSocket, for carriers and for ordinary requests.

A carrier goes to and from our relay in the kernel, is never queued here and never parsed as JSON.
Requests are the few that a gateway makes of ipykernel itself: to inject, to keep a culler content.
Everything else that a kernel tells its clients is dropped unread.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from autobahn.twisted.websocket import WebSocketClientFactory
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from zope.interface import implementer

from conchkernel.errors import (
    ConchKernelError,
    JupyterError,
    JupyterUnreachable,
    KernelRefused,
    KernelSilent,
    LinkLost,
    NotJupyter,
    TokenRefused,
)
from conchkernel.jupyter import framing
from conchkernel.jupyter.framing import FramingError, Message, Part
from conchkernel.jupyter.reasons import unreachable
from conchkernel.jupyter.rest import JupyterClient, refusal_of
from conchkernel.jupyter.urls import redact
from conchkernel.jupyter.websocket import (
    MAX_MESSAGE_BYTES,
    ShortPathWebSocket,
    transport_of,
)

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure

#: For TLS and the upgrade; a kernel that is just starting lets the server wait.
HANDSHAKE_SECONDS = 15.0
#: What may wait to be written before we say that we are not writable: a message.
BUFFER_BYTES = 256 * 1024
#: One read: a message and what is around it, which else came in two parts and had to be joined.
READ_BYTES = 2 * BUFFER_BYTES
#: tornado closes the connection at 10 MiB.
MAX_REQUEST_BYTES = 9 * 1024 * 1024
#: Requests without an answer. A gateway makes them one after another.
MAX_REQUESTS = 64
#: The server's answer to our Close; it is a courtesy to wait for it.
CLOSE_SECONDS = 1.0
#: What we would rather speak; a server that selects none of it speaks the legacy framing.
OFFERED = [framing.V1_SUBPROTOCOL]
_PROTOCOL_VERSION = "5.3"


@implementer(IPushProducer)
class _Backlog:
    """How a transport tells that too much waits to be written."""

    def __init__(self, channels: KernelChannels) -> None:
        self._channels = channels

    def pauseProducing(self) -> None:
        """More waits than :data:`BUFFER_BYTES`."""
        channels = self._channels
        channels.writable = False
        if channels.on_paused is not None:
            channels.on_paused()

    def resumeProducing(self) -> None:
        """It has gone."""
        channels = self._channels
        channels.writable = True
        if channels.on_resumed is not None:
            channels.on_resumed()

    def stopProducing(self) -> None:
        """The connection is lost; :meth:`KernelChannels.connectionLost` sees to it."""


class KernelChannels(ShortPathWebSocket):
    """An open connection to one kernel's channels; :func:`connect_channels` makes it.

    One that has gone deaf is found out by its user: each request has its time, and a link hears
    from its agent every few seconds.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        client: JupyterClient,
        session_id: str,
        on_carrier: Callable[[memoryview], None],
        on_lost: Callable[[Exception], None],
    ) -> None:
        super().__init__()
        self._reactor = reactor
        self._client = client
        self._onCarrier = on_carrier
        self._onLost: Callable[[Exception], None] | None = on_lost
        self.opened: Deferred[None] = Deferred()
        self._closed: list[Deferred[None]] = []
        self._gone = False
        self._wasOpen = False
        self._closing: IDelayedCall | None = None
        self._failed: ConchKernelError | None = None
        self._requests: dict[str, Deferred[dict[str, Any]]] = {}
        self._legacy = False
        self._count = 0
        self._nonce = secrets.token_hex(8)
        self._quickAck: Callable[[], None] | None = None
        self._session = session_id
        self._headerEnd = (
            f'","msg_type":"{framing.CARRIER_TYPE}","username":"","session":"{session_id}",'
            f'"date":"{_now()}","version":"{_PROTOCOL_VERSION}"}}'
        ).encode("ascii")
        self._headerStart = f'{{"msg_id":"{self._nonce}-'.encode("ascii")
        self.carrierChannel = b"control"
        """The channel that carriers are sent over; they are taken from either."""
        self.writable = True
        """Whether what was sent has left for the network; no reason to refuse, one to wait."""
        self.on_paused: Callable[[], None] | None = None
        self.on_resumed: Callable[[], None] | None = None
        self.on_restarted: Callable[[], None] | None = None
        """Called when the kernel behind the connection is another process than before."""

    def __repr__(self) -> str:
        framing_ = "legacy" if self._legacy else "v1"
        return f"<KernelChannels {framing_} to {redact(self._client.location.base)}>"

    @property
    def legacy(self) -> bool:
        """Whether the server did not select the v1 framing."""
        return self._legacy

    # --- carriers ----------------------------------------------------------------------------

    def send_carrier(self, parts: Sequence[Part]) -> None:
        """Send one carrier, whose buffer is ``parts`` one after another; copied at once.

        Nothing is sent when the connection is lost or closing; ``on_lost`` tells or has told.
        """
        if self.state != self.STATE_OPEN:
            return
        self._count += 1
        header = b"%b%d%b" % (self._headerStart, self._count, self._headerEnd)
        size = sum(map(len, parts))
        if self._legacy:
            prefix = framing.carrier_prefix_legacy(self.carrierChannel, header)
        else:
            prefix = framing.carrier_prefix(self.carrierChannel, header, size)
        self.sendParts((prefix, *parts))

    def messageReceived(self, data: bytes, start: int, end: int, isBinary: bool) -> None:
        """A message of the kernel's, or of its server's."""
        if isBinary:
            find = framing.find_carrier_legacy if self._legacy else framing.find_carrier
            buffer = find(data, start, end)
            if buffer >= 0:
                if self._onLost is not None:
                    self._onCarrier(memoryview(data)[buffer:end])
                return
        if not self._requests and self.on_restarted is None:
            return
        try:
            if self._legacy:
                message = framing.unpack_legacy(data[start:end], is_binary=isBinary)
            elif isBinary:
                message = framing.unpack(data[start:end])
            else:
                return
            if message.channel in ("shell", "control"):
                self._replied(message)
            elif message.channel == "iopub" and self.on_restarted is not None:
                self._noticed(message, self.on_restarted)
        except FramingError as error:
            self._log.warn("a message was dropped: {reason}", reason=str(error))

    def _noticed(self, message: Message, restarted: Callable[[], None]) -> None:
        """A kernel says of itself when it ends, and when it begins: that is another one then."""
        if b'"shutdown_reply"' in message.header:
            restarted()
            return
        if b'"status"' not in message.header:
            return
        try:
            state = json.loads(message.content).get("execution_state")
        except (ValueError, AttributeError, RecursionError):
            return
        if state in ("starting", "restarting", "dead"):
            restarted()

    # --- the connection ----------------------------------------------------------------------

    def onOpen(self) -> None:
        """The server has agreed: the transport is set up for bulk and for keys alike."""
        self._legacy = self.websocket_protocol_in_use != framing.V1_SUBPROTOCOL
        try:
            # Autobahn's own option has no effect under Twisted, and Nagle costs 41 ms a key.
            self.transport.setTcpNoDelay(True)
        except (AttributeError, OSError):
            pass  # not TCP
        self._quickAck = _quick_ack(self.transport)
        transport_of(self).bufferSize = READ_BYTES
        self.transport.registerProducer(_Backlog(self), True)
        self._wasOpen = True
        self.opened.callback(None)

    def dataReceived(self, data: bytes) -> None:
        """Bytes from the transport."""
        super().dataReceived(data)
        if self._quickAck is not None:
            # The server leaves Nagle on: its second small message waits for our ACK of the first,
            # and the system delays that by 40 ms. The option does not stay set.
            self._quickAck()

    def close(self) -> None:
        """End the connection properly, within a second. Idempotent."""
        self._onLost = None
        self._end(LinkLost("the connection to the kernel was closed"))
        if self.state != self.STATE_OPEN:
            self.abort()
            return
        self.sendClose(1000)
        self._closing = self._reactor.callLater(CLOSE_SECONDS, self.abort)

    def abort(self) -> None:
        """End the connection at once. Idempotent."""
        self._onLost = None
        self._end(LinkLost("the connection to the kernel was closed"))
        if self.transport is not None and not self._gone:
            self.state = self.STATE_CLOSED
            self.transport.unregisterProducer()
            self.transport.abortConnection()

    def when_closed(self) -> Deferred[None]:
        """Fires when the transport is gone, however that came."""
        closed: Deferred[None] = Deferred()
        if self._gone:
            closed.callback(None)
        else:
            self._closed.append(closed)
        return closed

    def _lost(self, reason: Exception) -> None:
        """The connection is useless: nothing is sent any more, and whoever waits is told."""
        on_lost, self._onLost = self._onLost, None
        self.abort()
        if on_lost is not None and self._wasOpen:
            on_lost(reason)

    def _end(self, reason: Exception) -> None:
        """No answer comes any more."""
        closing, self._closing = self._closing, None
        if closing is not None and closing.active():
            closing.cancel()
        requests, self._requests = self._requests, {}
        for answer in requests.values():
            answer.errback(reason)

    def failHandshake(self, reason: str) -> None:
        """The server did not agree; its status says why."""
        self._failed = self._refusal()
        super().failHandshake(reason)

    def _refusal(self) -> ConchKernelError:
        words = str(getattr(self, "http_status_line", "")).split()
        status = int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0
        place = urlsplit(self._client.location.base).netloc
        headers = getattr(self, "http_headers", {})
        if status in (0, 101, 200, 400, 405, 426):
            return NotJupyter(
                f"{place} does not pass WebSockets on; a proxy before the Jupyter server must"
            )
        if status in (401, 403):
            # Jupyter says it of tokens, and many a proxy of all WebSockets.
            return TokenRefused(
                f"the Jupyter server at {place} refused our WebSocket (HTTP {status}): the token "
                "is wrong, or a proxy in between lets no WebSocket through"
            )
        hub = "/hub/" in headers.get("location", "")
        return refusal_of(status, self._client.location, hub=hub)

    def onCloseFrame(self, code: int | None, reasonRaw: bytes | None) -> bool | None:
        """The server closes: nothing may be sent on this connection from here on."""
        done: bool | None = super().onCloseFrame(code, reasonRaw)
        if self._closing is None:
            self._lost(LinkLost("the Jupyter server closed the connection"))
        else:
            self.abort()
        return done

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The transport is gone."""
        self._gone = True
        super().connectionLost(reason)
        if not self.opened.called:
            problem = self._failed or unreachable(
                reason.value or LinkLost("no reason"), self._client.location.base
            )
            self._end(problem)
            self.opened.errback(problem)
        else:
            self._lost(LinkLost("the connection to the Jupyter server was lost"))
        waiting, self._closed = self._closed, []
        for closed in waiting:
            closed.callback(None)

    # --- requests ----------------------------------------------------------------------------

    def request(
        self, channel: str, msg_type: str, content: dict[str, Any], timeout: float
    ) -> Deferred[dict[str, Any]]:
        """Ask the kernel something.

        :param channel: ``shell`` or ``control``.
        :param timeout: in seconds.
        :returns: the content of the reply. Cancellable; the kernel does not hear of that.
        :raises LinkLost: (as failure) if the connection is or gets lost.
        :raises KernelRefused: (as failure) if the kernel does not answer in time.
        """
        name = f"{self._nonce}-r{secrets.token_hex(4)}"

        def forget(_: Deferred[dict[str, Any]]) -> None:
            self._requests.pop(name, None)

        answer: Deferred[dict[str, Any]] = Deferred(forget)
        if self.state != self.STATE_OPEN or len(self._requests) >= MAX_REQUESTS:
            answer.errback(LinkLost("there is no connection to the kernel"))
            return answer
        header = {
            "msg_id": name,
            "msg_type": msg_type,
            "username": "",
            "session": self._session,
            "date": _now(),
            "version": _PROTOCOL_VERSION,
        }
        message = Message(
            channel, json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()
        )
        packed = framing.pack_legacy(message) if self._legacy else framing.pack(message)
        if len(packed) > MAX_REQUEST_BYTES:
            raise ValueError("the request is longer than a Jupyter server takes")
        self._requests[name] = answer

        def late(_result: object, seconds: float) -> dict[str, Any]:
            raise KernelRefused(
                f"the kernel did not answer a {msg_type} in {seconds:g} seconds; is it busy?"
            )

        answer.addTimeout(timeout, self._reactor, onTimeoutCancel=late)
        self.sendParts((packed,), isBinary=not self._legacy)
        return answer

    def _replied(self, message: Message) -> None:
        parent = framing.read_json(message.parent).get("msg_id")
        answer = self._requests.pop(parent, None) if isinstance(parent, str) else None
        if answer is not None:
            try:
                content = framing.read_json(message.content)
            except FramingError as error:
                answer.errback(error)
            else:
                answer.callback(content)


def _quick_ack(transport: Any) -> Callable[[], None] | None:
    """What sends the ACK that a TCP transport owes; ``None`` where there is no way (not Linux)."""
    option = getattr(socket, "TCP_QUICKACK", None)
    try:
        handle = transport.getHandle()
    except AttributeError:
        return None
    if option is None or not isinstance(handle, socket.socket):
        return None

    def acknowledge() -> None:
        try:
            handle.setsockopt(socket.IPPROTO_TCP, option, 1)
        except OSError:
            pass  # closed while its last bytes were read

    return acknowledge


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


async def connect_channels(
    reactor: Any,
    client: JupyterClient,
    kernel_id: str,
    *,
    on_carrier: Callable[[memoryview], None],
    on_lost: Callable[[Exception], None],
    patience: float = HANDSHAKE_SECONDS,
) -> KernelChannels:
    """Connect to a kernel's channels.

    :param on_carrier: called at once with the buffer of each carrier; it may be kept.
    :param on_lost: called once when the connection, once made, is gone or useless, with an error
        of ours; not after :meth:`KernelChannels.close` or :meth:`KernelChannels.abort`.
    :param patience: seconds for the WebSocket's handshake.
    :raises KernelRefused: if there is no such kernel.
    :raises KernelSilent: if it does not start in time.
    :raises JupyterError: as :class:`~conchkernel.jupyter.rest.JupyterClient` does.
    """
    # A second connection with the same id makes jupyter_server close the first one, and then
    # misread what that still carries; nor is its replay of lost messages reliable.
    session_id = secrets.token_hex(16)
    url = client.websocket_url(kernel_id, session_id)
    factory = WebSocketClientFactory(
        url,
        protocols=OFFERED,
        headers=client.authorization_headers,
        useragent="conchkernel",
        reactor=reactor,
    )
    factory.noisy = False
    # No permessage-deflate is offered, masking stays on. The timers are ours: Autobahn's run on
    # the global reactor.
    factory.setProtocolOptions(
        maxMessagePayloadSize=MAX_MESSAGE_BYTES,
        openHandshakeTimeout=0,
        closeHandshakeTimeout=0,
        serverConnectionDropTimeout=0,
        autoPingInterval=0,
    )
    made: list[KernelChannels] = []

    def build() -> KernelChannels:
        made.append(KernelChannels(reactor, client, session_id, on_carrier, on_lost))
        return made[-1]

    factory.protocol = build
    try:
        await client.agent.endpoint(url).connect(factory)
        (channels,) = made
        channels.opened.addTimeout(patience, reactor)
        try:
            await channels.opened
        except TimeoutError:
            asking = Deferred.fromCoroutine(_silence(client, kernel_id, patience))
            raise await asking.addTimeout(patience / 3, reactor) from None
    except BaseException as error:
        for one in made:
            one.abort()
        if isinstance(error, Exception) and not isinstance(error, ConchKernelError):
            raise unreachable(error, client.location.base) from None
        raise
    return channels


async def _silence(client: JupyterClient, kernel_id: str, patience: float) -> JupyterError:
    """Why a WebSocket is not answered. The server waits with that for the kernel's first word,
    and calls a kernel that nobody has heard yet starting."""
    kernel = await client.kernel(kernel_id)
    if kernel is None or kernel.state in ("starting", "restarting", "dead"):
        name = f"the kernel {kernel.name}" if kernel is not None else "the kernel"
        return KernelSilent(
            f"{name} says nothing in {patience:g} seconds: it does not start, or a proxy "
            "keeps our WebSocket; the Jupyter server's log says which"
        )
    place = urlsplit(client.location.base).netloc
    return JupyterUnreachable(
        f"{place} answers, but no WebSocket in {patience:g} seconds; a proxy before the "
        "Jupyter server must pass them on"
    )
