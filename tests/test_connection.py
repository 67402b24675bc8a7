"""The ssh-connection service: what each message of a client, good or bad, leads to."""

from __future__ import annotations

import struct
import tracemalloc
from types import SimpleNamespace

import pytest
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock

from conchkernel.avatars import KernelAvatar
from conchkernel.errors import LinkLost, RefusalCode, StreamRefused
from conchkernel.ssh.channel import (
    LOCAL_WINDOW_BYTES,
    MAX_DATA_BYTES,
    ChannelRefused,
    GatewayChannel,
)
from conchkernel.ssh.connection import MAX_CHANNELS, GatewayConnection
from conchkernel.ssh.fields import string
from conchkernel.testing import ClientChannel, MemoryBackend, MemoryClient, MemoryStream


class Rig:
    """A client with a backend whose commands run at once."""

    def __init__(self, factory: object = None) -> None:
        self.backend = MemoryBackend(lambda stream: stream.opened())
        self.avatar = KernelAvatar(self.backend, "joe")
        self.client = MemoryClient(self.avatar, factory)

    def run(self, **options: int) -> tuple[ClientChannel, MemoryStream]:
        channel = self.client.execute(b"command", **options)
        return channel, self.backend.links[0].streams[-1]


@pytest.fixture
def rig() -> Rig:
    return Rig()


# --- channels come and go --------------------------------------------------------------------


def test_openConfirmsWithOurWindow(rig: Rig) -> None:
    """A session is confirmed with a window of 2 MiB and packets of 32 KiB."""
    channel = rig.client.open()
    assert channel.refusal is None
    assert channel.remote == 0
    assert (channel.remoteWindow, channel.remoteMaxPacket) == (LOCAL_WINDOW_BYTES, MAX_DATA_BYTES)


@pytest.mark.parametrize("maxPacket", [0, 1, 1023])
def test_tooSmallAPacketIsRefused(rig: Rig, maxPacket: int) -> None:
    """A client that takes next to nothing per packet gets no channel, and is told why."""
    channel = rig.client.open(maxPacket=maxPacket)
    assert channel.refusal is not None
    assert b"too small" in channel.refusal[1]
    assert rig.client.disconnected is None


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        (b"nonsense", 3, b"unknown channel type nonsense"),
        (b"\xff\x00", 3, b"unknown channel type \\xff"),
        (b"x11", 1, b"X11"),
        (b"auth-agent@openssh.com", 1, b"agent forwarding"),
        (b"tun@openssh.com", 1, b"tunnel devices"),
    ],
)
def test_otherChannelsAreRefused(rig: Rig, kind: bytes, code: int, text: bytes) -> None:
    """What we do not have is refused with a sentence, and nothing else suffers."""
    channel = rig.client.open(kind)
    assert channel.refusal is not None
    assert channel.refusal[0] == code
    assert channel.refusal[1].startswith(text)
    assert rig.client.open().refusal is None


def test_maxSessions() -> None:
    """As many sessions as the limits say; one that is over makes room for another."""
    rig = Rig(SimpleNamespace(limits=SimpleNamespace(maxSessions=3)))
    channels = [rig.client.open() for _ in range(4)]
    assert [channel.refusal is None for channel in channels] == [True, True, True, False]
    assert channels[3].refusal is not None
    assert b"MaxSessions" in channels[3].refusal[1]
    rig.client.close(channels[0])
    assert rig.client.open().refusal is None


def test_channelsThatTheClientNeverClosesAreBounded(rig: Rig) -> None:
    """A client that does not answer our CLOSE cannot pile up channels without end."""
    refusals = 0
    for _ in range(MAX_CHANNELS + 5):
        channel = rig.client.open()
        if channel.refusal is not None:
            refusals += 1
            continue
        rig.client.request(channel, b"exec", string(b"command"))
        rig.backend.links[0].streams.pop().end()
        assert channel.closed
    assert refusals == 5


def test_noMoreSessions(rig: Rig) -> None:
    """A client that renounced further sessions gets none."""
    first = rig.client.open()
    rig.client.globalRequest(b"no-more-sessions@openssh.com", reply=False)
    second = rig.client.open()
    assert first.refusal is None
    assert second.refusal == (1, b"no more sessions were wanted")


def test_idsAreNotUsedAgain(rig: Rig) -> None:
    """A late message for a closed channel can never reach another one."""
    first = rig.client.open()
    rig.client.close(first)
    second = rig.client.open()
    assert (first.remote, second.remote) == (0, 1)


class Later:
    """An avatar's channels that open when the test says."""

    def __init__(self, rig: Rig) -> None:
        self.answers: list[Deferred[GatewayChannel]] = []
        self.cancelled = 0
        rig.avatar.channelLookup[b"later"] = self.look
        self.options: dict[str, object] = {}

    def look(self, **options: object) -> Deferred[GatewayChannel]:
        self.options = options
        self.answers.append(Deferred(self._cancel))
        return self.answers[-1]

    def _cancel(self, _: object) -> None:
        self.cancelled += 1

    def channel(self) -> GatewayChannel:
        return GatewayChannel(remoteWindow=1000, remoteMaxPacket=32768)


def test_channelsMayOpenLater(rig: Rig) -> None:
    """A channel is confirmed when what it leads to is there; others need not wait for it."""
    later = Later(rig)
    waiting = rig.client.open(b"later", data=b"where to")
    assert later.options["data"] == b"where to"
    session = rig.client.open()
    assert session.remote == 0
    assert waiting.remote == -1
    later.answers[0].callback(later.channel())
    assert waiting.remote == 1


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ChannelRefused(4, "full"), 4, b"full"),
        (StreamRefused(RefusalCode.CONNECT_FAILED, "nobody there"), 2, b"nobody there"),
        (StreamRefused(RefusalCode.PROHIBITED, "not allowed"), 1, b"not allowed"),
        (LinkLost("the road is cut"), 2, b"the road is cut"),
    ],
)
def test_openingMayFailLater(rig: Rig, error: Exception, code: int, text: bytes) -> None:
    """Why the far side refused is told in the words it used."""
    later = Later(rig)
    channel = rig.client.open(b"later")
    later.answers[0].errback(error)
    assert channel.refusal == (code, text)


def test_openingEndsWithTheConnection(rig: Rig) -> None:
    """What was being opened is cancelled when the client goes."""
    later = Later(rig)
    rig.client.open(b"later")
    rig.client.lose()
    assert later.cancelled == 1


def test_ourOwnMistakeWhileOpening(rig: Rig, loggedFailures: object) -> None:
    """An error nobody foresaw refuses the channel and is logged, and that is all."""
    rig.avatar.channelLookup[b"broken"] = lambda **_: fail(ZeroDivisionError())
    channel = rig.client.open(b"broken")
    assert channel.refusal == (2, b"open failed")
    assert len(loggedFailures.flush(ZeroDivisionError)) == 1  # type: ignore[attr-defined]
    assert rig.client.disconnected is None


def test_weMayOpenChannelsToo(rig: Rig) -> None:
    """A channel towards the client takes the windows of its confirmation."""
    opened, refused = GatewayChannel(), GatewayChannel()
    opened.name = refused.name = b"forwarded-tcpip"
    failures: list[object] = []
    refused.openFailed = failures.append  # type: ignore[method-assign]
    connection = rig.client.connection
    connection.openChannel(opened, b"from")
    connection.openChannel(refused)
    rig.client.receive(91, struct.pack(">4L", 0, 77, 5000, 4096))
    rig.client.receive(92, struct.pack(">2L", 1, 2) + string(b"no") + string(b""))
    assert (opened.remoteId, opened.remoteWindowLeft, opened.remoteMaxPacket) == (77, 5000, 4096)
    assert [str(failure) for failure in failures] == ["no"]
    assert list(connection.channels) == [0]


# --- bad messages ----------------------------------------------------------------------------

OPENED = struct.pack(">L", 0)
NEVER = struct.pack(">L", 5)


@pytest.mark.parametrize(
    ("message", "payload", "reason"),
    [
        (80, b"", b"truncated"),
        (80, string(b"name"), b"truncated"),
        (90, b"\0\0\0", b"truncated"),
        (90, string(b"session") + b"\0" * 11, b"truncated"),
        (90, b"\xff\xff\xff\xff", b"truncated"),
        (91, b"", b"truncated"),
        (91, struct.pack(">4L", 0, 0, 0, 0), b"not asked for"),
        (92, struct.pack(">2L", 5, 0), b"not asked for"),
        (93, OPENED, b"malformed window adjust"),
        (93, NEVER * 2, b"no channel 5"),
        (93, OPENED + b"\xff\xff\xff\xff", b"overflows"),
        (94, OPENED, b"truncated"),
        (94, OPENED + struct.pack(">L", 5) + b"1234", b"malformed channel data"),
        (94, OPENED + struct.pack(">L", 5) + b"123456", b"malformed channel data"),
        (94, NEVER + string(b"x"), b"no channel 5"),
        (94, OPENED + string(b"x" * (MAX_DATA_BYTES + 1)), b"too large"),
        (95, OPENED + struct.pack(">L", 1), b"truncated"),
        (95, OPENED + struct.pack(">2L", 1, 9) + b"x", b"malformed channel data"),
        (95, NEVER + struct.pack(">L", 1) + string(b"x"), b"no channel 5"),
        (96, b"", b"malformed channel message"),
        (96, NEVER, b"no channel 5"),
        (96, OPENED + b"more", b"malformed channel message"),
        (97, NEVER, b"no channel 5"),
        (98, OPENED, b"truncated"),
        (98, OPENED + string(b"shell"), b"truncated"),
        (98, NEVER + string(b"shell") + b"\1", b"no channel 5"),
        (98, OPENED + string(b"shell") + b"\1extra", b"bytes after"),
        (98, OPENED + string(b"pty-req") + b"\1" + string(b"xterm"), b"truncated"),
        (99, NEVER, b"no channel 5"),
        (100, b"\0", b"malformed channel message"),
    ],
)
def test_whatIsWrongEndsTheConnectionWithAReason(
    rig: Rig, message: int, payload: bytes, reason: bytes
) -> None:
    """A malformed or impossible message: one DISCONNECT that says what, and nothing after it."""
    channel = rig.client.open()
    rig.client.receive(message, payload)
    assert rig.client.disconnected is not None
    assert rig.client.disconnected[0] == 2
    assert reason in rig.client.disconnected[1]
    sent = len(rig.client.sent)
    rig.client.request(channel, b"shell")
    rig.client.receive(message, payload)
    rig.client.connection.transportResumed()
    assert len(rig.client.sent) == sent
    rig.client.lose()


def test_windowThatIsIgnored(rig: Rig) -> None:
    """A client that sends more than its window is cut off."""
    channel, stream = rig.run()
    rig.client.write(channel, b"x" * LOCAL_WINDOW_BYTES)
    assert rig.client.disconnected is None
    rig.client.receive(94, OPENED + string(b"x"))
    assert rig.client.disconnected == (2, b"window of channel 0 ignored")
    assert len(stream.waiting) == LOCAL_WINDOW_BYTES


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (93, struct.pack(">L", 10)),
        (94, string(b"x")),
        (95, struct.pack(">L", 1) + string(b"x")),
        (96, b""),
        (97, b""),
        (98, string(b"window-change") + b"\1" + b"\0" * 16),
        (99, b""),
        (100, b""),
    ],
)
def test_lateMessagesAreIgnored(rig: Rig, message: int, payload: bytes) -> None:
    """What a client sent before it saw our CLOSE, or after its own, harms nobody."""
    closed = rig.client.open()
    rig.client.close(closed)
    half, stream = rig.run()
    stream.end()
    assert half.closed
    sent = len(rig.client.sent)
    for channel in (closed, half):
        rig.client.receive(message, struct.pack(">L", channel.remote) + payload)
    assert rig.client.disconnected is None
    assert len(rig.client.sent) == sent


def test_unknownMessage(rig: Rig) -> None:
    """A number that means nothing is answered with UNIMPLEMENTED."""
    rig.client.receive(79, b"")
    assert rig.client.unimplemented == 1


def test_ourOwnMistakeCostsOneChannel(rig: Rig, loggedFailures: object) -> None:
    """An error in one channel closes that one; its neighbours and the connection go on."""
    bad, _ = rig.run()
    good, stream = rig.run()
    rig.client.connection.channels[bad.remote].deliver = lambda _: 1 / 0  # type: ignore[assignment]
    rig.client.write(bad, b"x")
    assert bad.closed
    rig.client.write(good, b"x")
    assert bytes(stream.waiting) == b"x"
    assert len(loggedFailures.flush(ZeroDivisionError)) == 1  # type: ignore[attr-defined]


def test_everyChannelIsToldOfTheEnd(rig: Rig, loggedFailures: object) -> None:
    """When the client is gone, each stream is closed and the link given back, whoever raises."""
    runs = [rig.run() for _ in range(3)]
    broken = runs[1][1].receiver
    broken._giveUp = lambda: 1 / 0
    rig.client.lose()
    assert all(("close",) in stream.calls for _, stream in (runs[0], runs[2]))
    assert rig.backend.links[0].released
    assert loggedFailures.flush(ZeroDivisionError)  # type: ignore[attr-defined]
    runs[0][1].put(b"too late")


# --- requests --------------------------------------------------------------------------------


def test_keepaliveIsAnswered(rig: Rig) -> None:
    """ServerAliveInterval of a client wants any answer, and gets a refusal as from sshd."""
    rig.client.globalRequest(b"keepalive@openssh.com")
    assert rig.client.globalReplies == [None]


def test_strangeGlobalRequests(rig: Rig) -> None:
    """A name that is no ASCII, or that nobody knows, is refused and nothing more."""
    for name in (b"", b"\xff\xfe", b"tun-forward", b"x" * 1000):
        rig.client.globalRequest(name, b"whatever")
    assert rig.client.globalReplies == [None] * 4
    rig.client.globalRequest(b"unknown", reply=False)
    assert len(rig.client.globalReplies) == 4


def test_globalRepliesKeepTheOrder(rig: Rig) -> None:
    """An answer that takes its time holds back those behind it."""
    answers: list[Deferred[object]] = []

    def slow(data: bytes) -> Deferred[object]:
        answers.append(Deferred())
        return answers[-1]

    rig.avatar.globalRequestLookup[b"slow"] = slow
    rig.avatar.globalRequestLookup[b"fast"] = lambda data: (1, b"fast:" + data)
    rig.client.globalRequest(b"slow")
    rig.client.globalRequest(b"fast", b"2")
    rig.client.globalRequest(b"slow")
    rig.client.globalRequest(b"unknown")
    answers[1].callback(True)
    assert rig.client.globalReplies == []
    answers[0].callback((1, b"slow"))
    assert rig.client.globalReplies == [b"slow", b"fast:2", b"", None]


def test_endlessQuestions(rig: Rig) -> None:
    """A client that asks and asks while nothing can be answered is cut off."""
    rig.avatar.globalRequestLookup[b"slow"] = lambda data: Deferred()
    for _ in range(200):
        rig.client.globalRequest(b"slow")
    assert rig.client.disconnected == (2, b"too many requests at once")


def test_weMayAskToo(rig: Rig) -> None:
    """Our own global requests are answered in order, and fail when the client goes."""
    connection = rig.client.connection
    results: list[object] = []
    for _ in range(3):
        asked = connection.sendGlobalRequest(b"question", b"", True)
        assert asked is not None
        asked.addCallbacks(results.append, lambda reason: results.append(reason.value.value))
    assert connection.sendGlobalRequest(b"statement", b"") is None
    rig.client.receive(81, b"yes")
    rig.client.receive(82, b"")
    assert results == [b"yes", "request refused"]
    rig.client.lose()
    assert results[2] == "connection lost"


def test_answersNobodyAskedFor(rig: Rig) -> None:
    """They are ignored, as sshd does."""
    rig.client.receive(81, b"")
    rig.client.receive(82, b"")
    assert rig.client.disconnected is None


def test_silentClientIsAskedAndGivenUp() -> None:
    """ClientAliveInterval and ClientAliveCountMax mean what they mean for sshd."""
    clock = Clock()
    limits = SimpleNamespace(clientAliveInterval=10, clientAliveCountMax=2)
    rig = Rig(SimpleNamespace(limits=limits, reactor=clock))
    client = rig.client
    clock.advance(10)
    assert client.globalRequests == [(b"keepalive@openssh.com", True)]
    client.receive(82, b"")
    clock.advance(10)
    assert len(client.globalRequests) == 1
    for _ in range(2):
        clock.advance(10)
    assert len(client.globalRequests) == 3
    assert client.disconnected is None
    clock.advance(10)
    assert client.disconnected == (11, b"the client does not respond")
    client.lose()
    assert clock.getDelayedCalls() == []


def test_nobodyIsAskedByDefault(rig: Rig) -> None:
    """As with sshd, keepalives from us are off unless wanted."""
    clock = Clock()
    Rig(SimpleNamespace(limits=SimpleNamespace(clientAliveInterval=0), reactor=clock))
    assert clock.getDelayedCalls() == []


# --- the plain transport ---------------------------------------------------------------------


def test_transportWithoutShortcuts() -> None:
    """A transport that has sendPacket alone, such as Conch's, carries the same messages."""
    sent: list[tuple[int, bytes]] = []

    def program(stream: MemoryStream) -> None:
        stream.opened()
        stream.put(b"o")
        stream.putError(b"e")

    backend = MemoryBackend(program)
    transport = SimpleNamespace(
        avatar=KernelAvatar(backend, "joe"),
        sendPacket=lambda number, payload: sent.append((number, payload)),
        getPeer=lambda: None,
        getHost=lambda: None,
    )
    connection = GatewayConnection()
    connection.transport = transport
    connection.serviceStarted()
    connection.packetReceived(90, string(b"session") + struct.pack(">3L", 7, 100, 32768))
    connection.packetReceived(98, struct.pack(">L", 0) + string(b"shell") + b"\0")
    assert sent[1:] == [
        (94, struct.pack(">L", 7) + string(b"o")),
        (95, struct.pack(">2L", 7, 1) + string(b"e")),
    ]


def test_largeWindowOfSmallPackets(rig: Rig) -> None:
    """Input that waits costs what it weighs, in however many packets it came."""
    rig.backend.slow = True
    rig.avatar.linkLost(rig.backend.links[0])
    channel = rig.client.execute(b"command")
    packet = struct.pack(">L", channel.remote) + string(b"x")
    tracemalloc.start()
    for _ in range(200_000):
        rig.client.receive(94, packet)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 1_000_000
    rig.backend.answer()
    assert bytes(rig.backend.links[-1].streams[0].waiting) == b"x" * 200_000


def test_tinyAdjustsOfAFullChannel(rig: Rig) -> None:
    """A window opened byte by byte costs work per byte, not per byte of all that waits."""
    channel, stream = rig.run(window=0)
    stream.receiver._creditCap = 1 << 26
    stream.grant(1 << 26)
    stream.put(b"x" * (1 << 26))
    for _ in range(3000):
        rig.client.adjust(channel, 1)
    assert len(channel.output) == 3000
