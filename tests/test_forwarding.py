"""Forwarding for one client: what it may open, what is listened at for it, and how both end."""

from __future__ import annotations

import struct
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.conch.ssh import connection as messages
from twisted.internet.task import Clock

from conchkernel.avatars import KernelAvatar
from conchkernel.errors import LinkLost, RefusalCode, StreamRefused
from conchkernel.interfaces import Incoming, PrivateSocket, SocketPath, TCPAddress
from conchkernel.ssh.channel import AHEAD_BYTES, LOCAL_WINDOW_BYTES
from conchkernel.ssh.connection import MAX_CHANNELS
from conchkernel.ssh.fields import string
from conchkernel.ssh.forwarding import MAX_LISTENERS
from conchkernel.ssh.permissions import Directions, GatewayPorts, Permissions, Place
from conchkernel.ssh.tunnels import LEAST_BYTES
from conchkernel.testing import (
    ClientChannel,
    MemoryBackend,
    MemoryClient,
    MemoryListener,
    MemoryStream,
)

EVERYTHING = Permissions()


def direct(host: bytes = b"db", port: int = 5432) -> bytes:
    return string(host) + struct.pack(">L", port) + string(b"127.0.0.1") + struct.pack(">L", 4)


def bind(address: bytes = b"localhost", port: int = 8080) -> bytes:
    return string(address) + struct.pack(">L", port)


class Rig:
    """A client; connections stand when a test says so."""

    def __init__(self, permissions: Permissions = EVERYTHING, factory: object = None) -> None:
        self.backend = MemoryBackend()
        self.avatar = KernelAvatar(self.backend, "joe", permissions=permissions)
        self.client = MemoryClient(self.avatar, factory)
        self.link = self.backend.links[0]

    def open(self) -> tuple[ClientChannel, MemoryStream]:
        """A channel and its connection, which stands."""
        channel = self.client.open(b"direct-tcpip", data=direct())
        stream = self.link.streams[-1]
        stream.opened()
        return channel, stream

    def listen(self, data: bytes = bind()) -> MemoryListener:
        self.client.globalRequest(b"tcpip-forward", data)
        assert self.client.globalReplies[-1] is not None
        return self.link.listeners[-1]

    def accepted(self) -> tuple[ClientChannel, MemoryStream]:
        """A forwarded connection that the client has taken."""
        self.link.listeners[-1].connect("127.0.0.9", 4000)
        channel = self.client.confirm()
        stream = self.link.streams[-1]
        stream.opened()
        return channel, stream


@pytest.fixture
def rig() -> Rig:
    return Rig()


# --- to the kernel's host --------------------------------------------------------------------


def test_aChannelIsConfirmedWhenTheConnectionStands(rig: Rig) -> None:
    """Not before: until then nobody knows whether it will."""
    channel = rig.client.open(b"direct-tcpip", data=direct())
    (stream,) = rig.link.streams
    assert stream.request == TCPAddress("db", 5432)
    assert channel.remote < 0
    stream.opened()
    assert channel.remote >= 0
    rig.client.write(channel, b"query")
    stream.take()
    stream.put(b"answer")
    assert (bytes(stream.received), bytes(channel.output)) == (b"query", b"answer")


def test_aConnectionThatCannotBeMadeIsAFailureWithItsReason(rig: Rig) -> None:
    """As sshd says it: connect failed, and the system's words."""
    channel = rig.client.open(b"direct-tcpip", data=direct())
    refused = StreamRefused(RefusalCode.CONNECT_FAILED, "Connection refused")
    rig.link.streams[0].lose(refused)
    assert channel.refusal == (2, b"Connection refused")


def test_aUnixSocketIsReached(rig: Rig) -> None:
    """direct-streamlocal, with its two reserved fields."""
    data = string(b"/run/db.sock") + string(b"") + struct.pack(">L", 0)
    rig.client.open(b"direct-streamlocal@openssh.com", data=data)
    assert rig.link.streams[0].request == SocketPath(b"/run/db.sock")


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"direct-tcpip", direct(port=0)),
        (b"direct-tcpip", direct(port=65536)),
        (b"direct-tcpip", direct(b"\xff\xfe")),
        (b"direct-tcpip", direct(b"a\0b")),
        (b"direct-tcpip", direct(b"\x1b[2Jsees the operator's terminal")),
        (b"direct-tcpip", direct(b"h" * 2000)),
        (b"direct-streamlocal@openssh.com", string(b"relative") + string(b"") + b"\0\0\0\0"),
        (b"direct-streamlocal@openssh.com", string(b"/a\0b") + string(b"") + b"\0\0\0\0"),
        (b"direct-streamlocal@openssh.com", string(b"/" * 5000) + string(b"") + b"\0\0\0\0"),
    ],
)
def test_whatIsNoAddressIsRefused(rig: Rig, kind: bytes, data: bytes) -> None:
    """Before anybody over there is asked; the client goes on."""
    channel = rig.client.open(kind, data=data)
    assert channel.refusal is not None
    assert not rig.link.streams
    assert rig.client.disconnected is None


def test_eachDirectionEndsByItself(rig: Rig) -> None:
    """Half-close both ways; the channel closes when both have ended."""
    channel, stream = rig.open()
    rig.client.write(channel, b"request")
    rig.client.eof(channel)
    stream.take()
    assert stream.inputEOF
    stream.put(b"reply")
    stream.putEOF()
    assert channel.events == ["data", "eof"]
    stream.end(None)
    assert channel.events == ["data", "eof", "close"]


def test_whatAClientSentBeforeItsCloseStillArrives(rig: Rig) -> None:
    """The channel lives until the last byte was taken, and closes then."""
    channel, stream = rig.open()
    stream.put(b"z" * 100)
    rig.client.write(channel, b"last words")
    rig.client.close(channel)
    assert stream.calls == [("stopReading",)]
    assert not channel.closed
    assert stream.take() == b"last words"
    assert stream.inputEOF
    stream.end(None)
    assert channel.closed
    assert not rig.client.connection.channels


def test_aChannelClosesThoughMoreWaitsThanItsWindow(rig: Rig) -> None:
    """What the other side had sent to its end is in nobody's way when the client has closed."""
    channel = rig.client.open(b"direct-tcpip", window=1000, data=direct())
    stream = rig.link.streams[0]
    stream.opened()
    stream.put(b"z" * 5000)
    stream.putEOF()
    assert len(channel.output) == 1000
    rig.client.close(channel)
    stream.end(None)
    assert len(channel.output) == 1000
    assert channel.closed
    assert not rig.client.connection.channels


@pytest.mark.parametrize("window", [1000, 10_000])
def test_aChannelClosesWhoseConnectionEndsWithTheClients(rig: Rig, window: int) -> None:
    """The same where the client's end is the connection's own, and the channel is the last."""
    channel = rig.client.open(b"direct-tcpip", window=window, data=direct())
    stream = rig.link.streams[0]
    stream.opened()
    stream.put(b"z" * 5000)
    stream.putEOF()
    stream.onInputEOF = lambda: stream.end(None)
    rig.client.close(channel)
    assert channel.closed
    assert not rig.client.connection.channels
    assert rig.client.disconnected is None


def test_nothingIsTakenThatTheConnectionDoesNotTake(rig: Rig) -> None:
    """The window is given back as the far side takes bytes, and the client may send no more."""
    channel, stream = rig.open()
    rig.client.write(channel, b"x" * LOCAL_WINDOW_BYTES)
    assert (channel.remoteWindow, channel.adjusts) == (0, [])
    stream.take(LOCAL_WINDOW_BYTES // 2)
    assert sum(channel.adjusts) == LOCAL_WINDOW_BYTES // 2


def test_noTunnelOfManyGetsStuck(rig: Rig) -> None:
    """A client may always go on when half of what it was let send has been taken."""
    for _ in range(MAX_CHANNELS):
        channel, stream = rig.open()
        window = channel.remoteWindow
        rig.client.write(channel, b"x" * window)
        stream.take(window // 2)
        assert channel.remoteWindow > 0


def test_manyTunnelsHoldLess(rig: Rig) -> None:
    """What waits for peers, or a client, that do not read has a bound that is not their number."""
    for _ in range(MAX_CHANNELS):
        rig.client.open(b"direct-tcpip", window=1 << 30, data=direct())
    for stream in rig.link.streams:
        stream.opened()
    windows = [channel.remoteWindow for channel in rig.client.channels]
    limits = [stream.limit for stream in rig.link.streams]
    assert windows[:8] == [LOCAL_WINDOW_BYTES] * 8
    for held in (windows, limits):
        assert held == sorted(held, reverse=True)
        assert held[-1] == LEAST_BYTES
        assert sum(held) < 130 << 20


def test_aTunnelThatIsLeftAloneHoldsMore(rig: Rig) -> None:
    """The share is one of those that are there, not of those that were when it was opened."""
    for _ in range(100):
        rig.client.open(b"direct-tcpip", window=1 << 30, data=direct())
    streams, channels = rig.link.streams, rig.client.channels
    for stream in streams:
        stream.opened()
    last = streams[-1]
    share = last.limit
    assert share < 200 << 10
    for channel in channels[:-1]:
        rig.client.close(channel)
    for stream in streams[:-1]:
        stream.end(None)
    last.put(b"y" * share)
    assert last.limit - share > 1 << 20


def test_nothingIsReadThatTheClientDoesNotTake(rig: Rig) -> None:
    """What is granted follows the client's window."""
    channel = rig.client.open(b"direct-tcpip", window=1000, data=direct())
    stream = rig.link.streams[0]
    stream.opened()
    stream.put(b"y" * (AHEAD_BYTES + 5000))
    assert (len(channel.output), stream.pending) == (1000, 4000)
    rig.client.adjust(channel, AHEAD_BYTES + 4000)
    assert stream.pending == 0


def test_aConnectionThatIsCutClosesItsChannel(rig: Rig) -> None:
    """Without an EOF that would make what came look whole."""
    channel, stream = rig.open()
    stream.put(b"half of")
    stream.lose(LinkLost("Connection reset by peer"))
    assert channel.events == ["data", "close"]


def test_aClientThatGoesWhileItsConnectionIsMade(rig: Rig) -> None:
    """Nobody waits for what nobody wants."""
    rig.client.open(b"direct-tcpip", data=direct())
    (stream,) = rig.link.streams
    rig.client.lose()
    assert stream.calls == [("close",)]


def test_aClientThatGoesBeforeThereIsAKernel() -> None:
    """The same, before there is anything to connect by."""
    backend = MemoryBackend()
    backend.slow = True
    client = MemoryClient(KernelAvatar(backend, "joe"))
    client.open(b"direct-tcpip", data=direct())
    client.globalRequest(b"tcpip-forward", bind())
    client.lose()
    assert not backend.links


def test_anOpenChannelEndsWithTheConnection(rig: Rig) -> None:
    """And its stream with it."""
    _, stream = rig.open()
    rig.client.lose()
    assert stream.closed


# --- from the kernel's host ------------------------------------------------------------------


def test_whoConnectsGetsAChannel(rig: Rig) -> None:
    """With the address that the client asked for, and the one that connected."""
    listener = rig.listen()
    assert listener.address == TCPAddress("localhost", 8080)
    assert rig.client.globalReplies == [b""]
    listener.connect("127.0.0.9", 4000)
    (asked,) = rig.client.asked
    assert asked.kind == b"forwarded-tcpip"
    assert asked.data == bind() + string(b"127.0.0.9") + struct.pack(">L", 4000)
    channel = rig.client.confirm()
    (stream,) = rig.link.streams
    assert stream.request == Incoming(1, "127.0.0.9", 4000)
    stream.opened()
    stream.put(b"hello")
    rig.client.write(channel, b"you")
    stream.take()
    assert (bytes(channel.output), bytes(stream.received)) == (b"hello", b"you")


def test_aPortOfTheHostsChoiceIsTold(rig: Rig) -> None:
    """In the reply, and in each channel; and it is by that port that it is cancelled."""
    listener = rig.listen(bind(port=0))
    assert rig.client.globalReplies == [struct.pack(">L", listener.port)]
    listener.connect()
    assert rig.client.asked[0].data.startswith(bind(port=listener.port))
    rig.client.globalRequest(b"cancel-tcpip-forward", bind(port=listener.port))
    assert listener.closed
    assert rig.client.globalReplies[-1] == b""


def test_aClientThatDoesNotTakeAConnectionHasItClosed(rig: Rig) -> None:
    """Over there, somebody waits for an answer."""
    listener = rig.listen()
    incoming = listener.connect()
    rig.client.refuse()
    assert listener.refused == [incoming]
    assert not rig.client.connection.channels


def test_cancelledIsNotHeardAgain(rig: Rig) -> None:
    """Connections that stand live on; what was never asked for cannot be cancelled."""
    listener = rig.listen()
    channel, stream = rig.accepted()
    rig.client.globalRequest(b"cancel-tcpip-forward", bind())
    assert listener.closed
    stream.put(b"still here")
    assert bytes(channel.output) == b"still here"
    rig.client.globalRequest(b"cancel-tcpip-forward", bind())
    rig.client.globalRequest(b"cancel-streamlocal-forward@openssh.com", string(b"/x"))
    assert rig.client.globalReplies[1:] == [b"", None, None]


def test_listenersGoWithTheConnection(rig: Rig) -> None:
    """All kinds."""
    rig.listen()
    rig.client.globalRequest(b"streamlocal-forward@openssh.com", string(b"/tmp/s"))
    session = rig.client.open()
    rig.client.request(session, b"auth-agent-req@openssh.com")
    assert len(rig.link.listeners) == 3
    rig.client.lose()
    assert all(listener.closed for listener in rig.link.listeners)


def test_aUnixSocketIsListenedAt(rig: Rig) -> None:
    """streamlocal-forward, its channels, and its end."""
    rig.client.globalRequest(b"streamlocal-forward@openssh.com", string(b"/tmp/s"))
    (listener,) = rig.link.listeners
    assert listener.address == SocketPath(b"/tmp/s")
    listener.connect()
    (asked,) = rig.client.asked
    assert asked.kind == b"forwarded-streamlocal@openssh.com"
    assert asked.data == string(b"/tmp/s") + string(b"")
    rig.client.globalRequest(b"cancel-streamlocal-forward@openssh.com", string(b"/tmp/s"))
    assert listener.closed
    assert rig.client.globalReplies == [b"", b""]


def test_aListenerThatIsLostIsSoughtAgain(rig: Rig) -> None:
    """At the port that the client knows, with whatever agent comes next."""
    lost = rig.listen(bind(port=0))
    rig.link.release()
    lost.receiver.listenerLost(LinkLost("the agent is gone"))
    again = rig.link.listeners[-1]
    assert again is not lost
    assert again.address == TCPAddress("localhost", lost.port)
    again.connect("127.0.0.9", 4000)
    assert rig.client.asked[0].data.startswith(bind(port=lost.port))
    rig.client.globalRequest(b"cancel-tcpip-forward", bind(port=lost.port))
    assert again.closed
    before = list(rig.link.listeners)
    again.receiver.listenerLost(LinkLost("gone"))
    assert rig.link.listeners == before


@pytest.mark.parametrize("end", ["listens", "refused", "cancelled"])
def test_aListenerIsSoughtForAsLongAsThereIsNoAgent(end: str) -> None:
    """Until it listens, the host refuses it, or the client wants it no more."""
    clock = Clock()
    rig = Rig(factory=SimpleNamespace(reactor=clock))
    lost = rig.listen(bind(port=8080))
    rig.link.refusal = LinkLost("no road")
    lost.receiver.listenerLost(LinkLost("the agent is gone"))
    for _ in range(5):
        (call,) = clock.getDelayedCalls()
        clock.advance(call.getTime() - clock.seconds())
    if end == "cancelled":
        rig.client.globalRequest(b"cancel-tcpip-forward", bind(port=8080))
    elif end == "refused":
        rig.link.refusal = StreamRefused(RefusalCode.CONNECT_FAILED, "Address already in use")
    else:
        rig.link.refusal = None
    clock.pump([60] * 3)
    assert not clock.getDelayedCalls()
    found = rig.link.listeners[rig.link.listeners.index(lost) + 1 :]
    assert [one.address for one in found if not one.closed] == (
        [TCPAddress("localhost", 8080)] if end == "listens" else []
    )


def test_anAddressThatIsTakenIsRefused(rig: Rig) -> None:
    """The client is told no, and others can still be had."""
    rig.link.refusal = StreamRefused(RefusalCode.CONNECT_FAILED, "Address already in use")
    rig.client.globalRequest(b"tcpip-forward", bind())
    assert rig.client.globalReplies == [None]
    rig.link.refusal = None
    rig.listen()
    rig.client.globalRequest(b"tcpip-forward", bind())
    assert rig.client.globalReplies == [None, b"", None]


def test_listenersAreLimited(rig: Rig) -> None:
    """Each holds sockets over there."""
    for port in range(1, MAX_LISTENERS + 2):
        rig.client.globalRequest(b"tcpip-forward", bind(port=port))
    assert rig.client.globalReplies == [b""] * MAX_LISTENERS + [None]


def test_channelsThatWeAskForAreLimited(rig: Rig) -> None:
    """A client that answers none of them binds no more than its channels."""
    listener = rig.listen()
    for _ in range(MAX_CHANNELS + 1):
        listener.connect()
    assert len(rig.client.asked) == MAX_CHANNELS
    assert listener.refused == [Incoming(MAX_CHANNELS + 1)]


@pytest.mark.parametrize(
    ("policy", "asked", "bound"),
    [
        (GatewayPorts.NO, b"localhost", "localhost"),
        (GatewayPorts.NO, b"", "localhost"),
        (GatewayPorts.NO, b"192.0.2.1", "localhost"),
        (GatewayPorts.YES, b"localhost", ""),
        (GatewayPorts.CLIENT_SPECIFIED, b"", ""),
        (GatewayPorts.CLIENT_SPECIFIED, b"*", ""),
        (GatewayPorts.CLIENT_SPECIFIED, b"localhost", "localhost"),
        (GatewayPorts.CLIENT_SPECIFIED, b"192.0.2.1", "192.0.2.1"),
    ],
)
def test_whereItIsListened(policy: GatewayPorts, asked: bytes, bound: str) -> None:
    """GatewayPorts decides, as with sshd."""
    rig = Rig(replace(EVERYTHING, gatewayPorts=policy))
    assert rig.listen(bind(asked)).address == TCPAddress(bound, 8080)


@pytest.mark.parametrize("data", [bind(port=65536), bind(b"\xff"), bind(b"a\0")])
def test_whatIsNoAddressIsNotListenedAt(rig: Rig, data: bytes) -> None:
    """Nor does it cost the connection."""
    rig.client.globalRequest(b"tcpip-forward", data)
    assert (rig.client.globalReplies, rig.client.disconnected) == ([None], None)


# --- the ssh-agent ---------------------------------------------------------------------------


def test_theAgentsSocketIsKnownToTheProcess(rig: Rig) -> None:
    """And goes with the session; each connection to it is a channel to the client's agent."""
    channel = rig.client.open()
    rig.client.request(channel, b"auth-agent-req@openssh.com")
    (listener,) = rig.link.listeners
    assert listener.address == PrivateSocket("agent")
    rig.client.request(channel, b"exec", string(b"ssh-add -l"))
    (stream,) = rig.link.streams
    assert dict(stream.request.environment)[b"SSH_AUTH_SOCK"] == listener.path
    stream.opened()
    assert channel.events == ["success", "success"]
    listener.connect()
    assert (rig.client.asked[0].kind, rig.client.asked[0].data) == (b"auth-agent@openssh.com", b"")
    stream.end()
    assert listener.closed


def test_aProcessWaitsForItsAgentsSocket() -> None:
    """Its environment is complete when it starts, also while a kernel does."""
    backend = MemoryBackend()
    backend.slow = True
    client = MemoryClient(KernelAvatar(backend, "joe"))
    channel = client.open()
    client.request(channel, b"auth-agent-req@openssh.com")
    client.request(channel, b"shell")
    backend.answer()
    (stream,) = backend.links[0].streams
    assert b"SSH_AUTH_SOCK" in dict(stream.request.environment)


def test_aProcessStartsWithoutAnAgentThatCannotBeHad(rig: Rig) -> None:
    """The request is refused, as sshd does; the shell comes."""
    rig.link.refusal = StreamRefused(RefusalCode.RESOURCE_SHORTAGE, "no space")
    channel = rig.client.open()
    rig.client.request(channel, b"auth-agent-req@openssh.com")
    rig.client.request(channel, b"shell")
    rig.link.streams[0].opened()
    assert channel.events == ["failure", "success"]


def test_anAgentIsForwardedOncePerSession(rig: Rig) -> None:
    """And before the process starts."""
    channel = rig.client.open()
    rig.client.request(channel, b"auth-agent-req@openssh.com")
    rig.client.request(channel, b"auth-agent-req@openssh.com")
    assert channel.events == ["success", "failure"]


# --- policy ----------------------------------------------------------------------------------


def _answers(permissions: Permissions) -> dict[str, Any]:
    """What of everything is permitted."""
    rig = Rig(permissions)
    client = rig.client
    tcp = client.open(b"direct-tcpip", data=direct())
    local = client.open(
        b"direct-streamlocal@openssh.com", data=string(b"/s") + string(b"") + b"\0\0\0\0"
    )
    client.globalRequest(b"tcpip-forward", bind())
    client.globalRequest(b"streamlocal-forward@openssh.com", string(b"/t"))
    session = client.open()
    client.request(session, b"auth-agent-req@openssh.com")
    client.request(
        session, b"pty-req", string(b"vt100") + struct.pack(">4L", 1, 1, 0, 0) + string(b"")
    )
    for channel in (tcp, local):
        assert channel.refusal is None or channel.refusal[0] == 1
    return {
        "-L": tcp.refusal is None,
        "-L path": local.refusal is None,
        "-R": client.globalReplies[0] is not None,
        "-R path": client.globalReplies[1] is not None,
        "-A": session.events[0] == "success",
        "-t": session.events[1] == "success",
    }


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, set()),
        ({"tcp": Directions.NONE}, {"-L", "-R"}),
        ({"tcp": Directions.LOCAL}, {"-R"}),
        ({"tcp": Directions.REMOTE}, {"-L"}),
        ({"streamLocal": Directions.NONE}, {"-L path", "-R path"}),
        ({"streamLocal": Directions.LOCAL}, {"-R path"}),
        ({"streamLocal": Directions.REMOTE}, {"-L path"}),
        ({"agent": False}, {"-A"}),
        ({"pty": False}, {"-t"}),
        ({"opens": ((Place("db", 5432),),)}, {"-L path"}),
        ({"opens": ((Place("*", 5432),), (Place("db", None),))}, {"-L path"}),
        ({"opens": ((Place("db", None),), (Place("db", 1),))}, {"-L", "-L path"}),
        ({"opens": ((Place("*", None),),)}, set()),
        ({"opens": ((),)}, {"-L", "-L path"}),
        ({"listens": ((Place("local*", 8080),),)}, set()),
        ({"listens": ((Place("localhost", 80), Place("::1", None)),)}, {"-R"}),
    ],
)
def test_whatIsNotPermittedIsRefused(changes: dict[str, Any], refused: set[str]) -> None:
    """Each permission by itself, and nothing else with it."""
    answers = _answers(replace(EVERYTHING, **changes))
    assert {name for name, allowed in answers.items() if not allowed} == refused


def test_aRefusalByPolicyIsASentence() -> None:
    """In the channel's failure, where the user sees it."""
    rig = Rig(replace(EVERYTHING, opens=((Place("db", 1),),)))
    channel = rig.client.open(b"direct-tcpip", data=direct())
    assert channel.refusal == (1, b"forwarding to db port 5432 is not permitted")


def test_aLoginIsNarrowedByItsKey() -> None:
    """What a realm permits and what a key's options leave add up."""
    realm = replace(EVERYTHING, opens=((Place("db", None),),), gatewayPorts=GatewayPorts.YES)
    key = replace(EVERYTHING, agent=False, opens=((Place("*", 5432),),))
    both = realm.narrowed(key)
    assert both.whyNotOpen("db", 5432) is None
    assert both.whyNotOpen("db", 5433) is not None
    assert both.whyNotOpen("web", 5432) is not None
    assert (both.agent, both.gatewayPorts) == (False, GatewayPorts.YES)


def test_messagesThatAreNoneEndTheConnection(rig: Rig) -> None:
    """A truncated request is the transport's mistake or an attack, as sshd judges it."""
    rig.client.receive(messages.MSG_GLOBAL_REQUEST, string(b"tcpip-forward") + b"\1\0\0")
    assert rig.client.disconnected is not None
