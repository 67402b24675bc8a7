"""The link over the loopback backend: cuts, loss, orphans, farewells; nothing is invented."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from zope.interface import implementer

from conchkernel.errors import JupyterUnreachable, LinkLost, StreamRefused
from conchkernel.interfaces import (
    ExitStatus,
    IListenerReceiver,
    ProcessRequest,
    PtyRequest,
    SocketPath,
    TCPAddress,
    WindowSize,
)
from conchkernel.jupyter import link
from conchkernel.loopback import LoopbackBackend

from .collector import Collector

TERMINAL = PtyRequest(b"vt100", WindowSize(80, 24))


async def until(condition, seconds=20.0):
    """Wait for a condition outside the reactor's sight; fails after ``seconds``."""
    deadline = reactor.seconds() + seconds
    while not condition():
        assert reactor.seconds() < deadline, "it did not come to pass"
        await deferLater(reactor, 0.02)


def alive(pid):
    """Whether a process exists and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@implementer(IListenerReceiver)
class Listening:
    """Nobody connects."""

    def __init__(self):
        self.lost = None

    def connectionAccepted(self, incoming):
        raise AssertionError(incoming)

    def listenerLost(self, reason):
        self.lost = reason


@pytest.fixture
def start():
    """Starts loopback backends; what is left of them ends with the test."""
    started = []

    async def begin(**options):
        backend = LoopbackBackend(reactor, **options)
        started.append(backend)
        await backend.start()
        return backend

    yield begin
    for backend in started:
        pytest_twisted.blockon(Deferred.fromCoroutine(backend.stop()))


async def begin(backend, command, pty=None, **options):
    """A collector for a process that runs."""
    collector = Collector(**options)
    collector.start(await backend.connect("owner"), ProcessRequest(command, pty))
    await collector.until(lambda: collector.opened is not None)
    return collector


@pytest_twisted.ensureDeferred
async def test_cuts_in_the_middle_lose_nothing(start):
    """A carrier that breaks again and again: both directions are byte-exact, the status is true."""
    backend = await start()
    block = os.urandom(100_000)
    written = hashlib.sha256()
    count = 0
    collector = await begin(backend, b"tee /dev/stderr; exit 7")
    cuts = 0

    def cut():
        nonlocal cuts
        if not collector.closed and cuts < 6:
            if backend.link.attached:
                backend.carrier.transport.abortConnection()
                cuts += 1
            reactor.callLater(0.02, cut)

    reactor.callLater(0, cut)
    while cuts < 6:
        collector.stream.write(block)
        written.update(block)
        count += len(block)
        enough = count - 1_000_000
        await collector.until(lambda enough=enough: collector.consumed > enough)
        await deferLater(reactor, 0)
    collector.stream.writeEOF()
    await collector.untilClosed()
    digest = written.digest()
    assert hashlib.sha256(collector.out).digest() == digest
    assert hashlib.sha256(collector.err).digest() == digest
    assert collector.exit == ExitStatus(7)
    assert collector.consumed == count


@pytest_twisted.ensureDeferred
async def test_a_message_that_vanishes_is_fetched_again(start):
    """A carrier that silently drops a message (as ZeroMQ can) is found out and replaced."""
    backend = await start()
    collector = await begin(backend, b"cat")
    carrier = backend.carrier
    send = carrier.send
    dropped = []

    def lossy(parts):
        if len(dropped) < 1 and sum(map(len, parts)) > 1000:
            dropped.append(parts)
        else:
            send(parts)

    carrier.send = lossy
    collector.stream.write(b"a" * 5000)
    await until(lambda: dropped)
    collector.stream.write(b"b" * 5000)
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert bytes(collector.out) == b"a" * 5000 + b"b" * 5000
    assert backend.carrier is not carrier


@pytest_twisted.ensureDeferred
async def test_a_message_of_very_many_pieces_is_sent(start):
    """So many answers at once that the system would not take them piece by piece; the carrier is
    not lost by that."""
    backend = await start()
    use = await backend.connect("owner")
    carrier = backend.carrier
    collectors = [Collector() for _ in range(1500)]
    for collector in collectors:
        use.openConnection(SocketPath(b"/nobody/listens/here"), collector)
    for collector in collectors:
        await collector.untilClosed()
        assert isinstance(collector.reason, StreamRefused)
    assert backend.carrier is carrier


@pytest_twisted.ensureDeferred
async def test_who_asks_without_end_is_refused(start):
    """What waits for the road is bounded, also by who only changes the window's size; the others
    do not notice."""
    backend = await start()
    collector = await begin(backend, b"cat", TERMINAL)
    other = await begin(backend, b"cat")
    backend.carrier.transport.abortConnection()
    size = WindowSize(132, 24)
    with pytest.raises(StreamRefused):
        # Far from all of what the wire would hold.
        any(collector.stream.resize(size) for _ in range(10_000))
    other.stream.write(b"still here")
    other.stream.writeEOF()
    await other.untilClosed()
    assert bytes(other.out) == b"still here"
    assert other.exit == ExitStatus(0)
    collector.stream.close()


@pytest_twisted.ensureDeferred
async def test_who_begins_without_end_is_refused(start):
    """A command waits for the road whole, also when its channel was closed at once: some of them
    may, and then no more. What ran before does not notice."""
    backend = await start()
    other = await begin(backend, b"cat")
    use = await backend.connect("owner")
    connect = backend.link._connect

    async def nowhere(user):
        raise LinkLost("no road")

    backend.link._connect = nowhere
    backend.carrier.transport.abortConnection()
    await until(lambda: not backend.link.attached)
    for _ in range(100):
        Collector().start(use, ProcessRequest(b": " + b"x" * 100_000)).close()
    late = Collector()
    late.start(use, ProcessRequest(b"true"))
    await late.untilClosed()
    assert isinstance(late.reason, StreamRefused)
    assert sum(map(len, backend.link._endpoint._control)) < 5_000_000
    backend.link._connect = connect
    other.stream.write(b"still here")
    other.stream.writeEOF()
    await other.untilClosed()
    assert bytes(other.out) == b"still here"
    assert other.exit == ExitStatus(0)


@pytest_twisted.ensureDeferred
async def test_streams_end_with_a_sentence_when_the_link_stays_away(start):
    """After the survival time: a reason, and no invented status."""
    backend = await start(survivalSeconds=0.3, orphanTimeout=1.0)
    collector = await begin(backend, b"sleep 1000", TERMINAL)

    async def nowhere(user):
        raise LinkLost("no road")

    backend.link._connect = nowhere
    backend.carrier.transport.abortConnection()
    await collector.untilClosed()
    assert isinstance(collector.reason, LinkLost)
    assert "has been lost for 0 seconds: no road" in str(collector.reason)
    assert collector.exit is None
    late = Collector()
    late.start(await backend.connect("owner"), ProcessRequest(b"true"))
    await late.untilClosed()
    assert isinstance(late.reason, LinkLost)


@pytest_twisted.ensureDeferred
async def test_a_terminals_output_has_a_cap_of_its_own(start):
    """More of it may be under way, and less beside somebody's keys; a command's has the usual."""
    backend = await start()
    shell = await begin(backend, b"cat", TERMINAL)
    plain = await begin(backend, b"cat")
    assert shell.stream.wire.of_terminal
    assert not plain.stream.wire.of_terminal
    plain.stream.writeEOF()
    await plain.untilClosed()


@pytest_twisted.ensureDeferred
async def test_who_comes_late_does_not_wait_as_long(start, monkeypatch):
    """The link has been lost for so long that it may stay so; what there is to say is said soon."""
    monkeypatch.setattr(link, "LATE_SECONDS", 0.2)
    backend = await start(survivalSeconds=30.0, orphanTimeout=1.0)

    async def nowhere(user):
        raise LinkLost("no road")

    backend.link._connect = nowhere
    backend.carrier.transport.abortConnection()
    await until(lambda: not backend.link.attached)
    backend.link._lostAt -= 31.0
    backend.link._cancel("_giveUp")
    late = Collector()
    late.start(await backend.connect("owner"), ProcessRequest(b"true"))
    await late.untilClosed()
    assert "has been lost for 31 seconds: no road" in str(late.reason)


@pytest_twisted.ensureDeferred
async def test_an_orphaned_agent_cleans_up(start, tmp_path):
    """No gateway is heard: terminals hang up, the socket goes, the agent ends; a command without
    a terminal is left running."""
    backend = await start(orphanTimeout=1.0, survivalSeconds=0.1)
    shell = await begin(backend, b"exec sleep 1000", TERMINAL)
    plain = await begin(backend, b"exec sleep 1000")
    directory = Path(backend._path).parent
    assert Path(backend._path).is_socket()

    async def nowhere(user):
        raise LinkLost("no road")

    backend.link._connect = nowhere
    backend.carrier.transport.abortConnection()
    await until(lambda: not directory.exists())
    await until(lambda: not alive(shell.opened["pid"]))
    assert alive(plain.opened["pid"])
    os.kill(plain.opened["pid"], 9)
    assert shell.exit is None


@pytest_twisted.ensureDeferred
async def test_a_farewell_ends_the_agent_at_once(start):
    """A clean stop leaves no process of a terminal, no socket and no directory."""
    backend = await start()
    collector = await begin(backend, b"exec sleep 1000", TERMINAL)
    directory = Path(backend._path).parent
    others = await backend.link.stop()
    assert others == 0
    assert isinstance(collector.reason, LinkLost)
    await until(lambda: not directory.exists())
    await until(lambda: not alive(collector.opened["pid"]))


@pytest_twisted.ensureDeferred
async def test_an_agent_that_is_just_found_hears_the_farewell(start):
    """The link was lost, and comes back while it is stopped."""
    backend = await start()
    directory = Path(backend._path).parent
    connect, found = backend.link._connect, Deferred()
    begun = []

    async def slowly(user):
        begun.append(user)
        await found
        return await connect(user)

    backend.link._connect = slowly
    backend.carrier.transport.abortConnection()
    await until(lambda: begun)
    stopping = Deferred.fromCoroutine(backend.link.stop())
    found.callback(None)
    assert await stopping == 0
    await until(lambda: not directory.exists())


@pytest_twisted.ensureDeferred
async def test_a_stop_does_not_wait_for_a_road_for_long(start, monkeypatch):
    """The attempt to attach is given up."""
    monkeypatch.setattr(link, "FAREWELL_SECONDS", 0.1)
    backend = await start(orphanTimeout=1.0)
    waiting = []

    async def nowhere(user):
        waiting.append(Deferred())
        await waiting[0]

    backend.link._connect = nowhere
    backend.carrier.transport.abortConnection()
    await until(lambda: waiting)
    assert await backend.link.stop() == -1
    assert waiting[0].called


@pytest_twisted.ensureDeferred
async def test_two_gateways_share_an_agent(start):
    """The agent counts its sessions; the last one out ends it."""
    from conchkernel.jupyter.link import Link

    backend = await start()
    second = Link(reactor, backend._carry, backend._secret)
    await second.start()
    collector = Collector()
    collector.start(second, ProcessRequest(b"echo two"))
    await collector.untilClosed()
    assert bytes(collector.out) == b"two\n"
    assert await second.stop() == 1
    again = await begin(backend, b"echo one")
    await again.untilClosed()
    assert bytes(again.out) == b"one\n"


@pytest_twisted.ensureDeferred
async def test_a_wrong_secret_is_refused(start):
    """Whoever reaches the socket must also know the secret."""
    from conchkernel.jupyter.link import Link

    backend = await start()
    stranger = Link(reactor, backend._carry, "0" * 64)
    with pytest.raises(LinkLost, match="secret"):
        await stranger.start()
    await stranger.stop()


@pytest_twisted.ensureDeferred
async def test_a_dead_agent_closes_its_streams(start):
    """The agent is killed: streams close with a reason and no status, as soon as that is known."""
    backend = await start(survivalSeconds=0.5)
    collector = await begin(backend, b"echo $PPID; exec cat")
    await collector.untilOutput(b"\n")
    os.kill(int(collector.out), 9)
    await collector.untilClosed()
    assert isinstance(collector.reason, LinkLost)
    assert collector.exit is None


@pytest_twisted.ensureDeferred
async def test_an_agent_holds_no_more_than_the_wire_allows(start):
    """A flood that nobody takes, and input that nobody reads, cost the agent almost no memory."""
    backend = await start()
    probe = await begin(backend, b"echo $PPID")
    await probe.untilClosed()
    status = Path(f"/proc/{int(probe.out)}/status")

    def resident():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmRSS"].split()[0])

    before = resident()
    flood = await begin(backend, b"cat /dev/zero", limit=3_000_000, keep=False)
    await flood.until(lambda: flood.count == 3_000_000)
    deaf = await begin(backend, b"exec sleep 1000")
    deaf.stream.write(b"x" * 50_000_000)
    other = await begin(backend, b"echo between")
    await other.untilClosed()
    assert resident() - before < 8 * 1024
    for collector in (flood, deaf):
        collector.stream.signal("KILL")
    flood.stream.grant(1 << 40)
    flood._limit = None
    await flood.untilClosed()
    await deaf.untilClosed()


@pytest_twisted.ensureDeferred
async def test_what_is_opened_on_a_link_that_was_given_up_runs_when_it_is_back(start):
    """Only the streams of before are gone: a new one waits for the road, and has it."""
    backend = await start(survivalSeconds=0.3)
    lost = await begin(backend, b"exec cat")
    connect = backend.link._connect

    async def nowhere(user):
        raise LinkLost("no road")

    backend.link._connect = nowhere
    backend.carrier.transport.abortConnection()
    await lost.untilClosed()
    backend.link._survivalSeconds = 20
    late = Collector()
    late.start(await backend.connect("owner"), ProcessRequest(b"echo late; exit 4"))
    backend.link._connect = connect
    await late.untilClosed()
    assert late.reason is None
    assert bytes(late.out) == b"late\n"
    assert late.exit == ExitStatus(4)


@pytest_twisted.ensureDeferred
async def test_what_was_given_up_goes_when_the_road_is_back(start):
    """Nobody can come back to it: a terminal hangs up, and an address is free for the next."""
    backend = await start(survivalSeconds=0.3)
    use = await backend.connect("owner")
    first = Listening()
    listener = await use.listen(TCPAddress("127.0.0.1", 0), first)
    shell = await begin(backend, b"exec sleep 1000", TERMINAL)
    connect = backend.link._connect

    async def nowhere(user):
        raise LinkLost("no road")

    backend.link._connect = nowhere
    backend.carrier.transport.abortConnection()
    await shell.untilClosed()
    await until(lambda: first.lost is not None)
    assert alive(shell.opened["pid"])
    backend.link._survivalSeconds = 20
    again = use.listen(TCPAddress("127.0.0.1", listener.port), Listening())
    backend.link._connect = connect
    assert (await again).port == listener.port
    await until(lambda: not alive(shell.opened["pid"]))


@pytest_twisted.ensureDeferred
async def test_a_cut_after_another_agent_came_loses_nothing(start):
    """The session that a new agent begins is the one that the next carrier goes on with."""
    backend = await start()
    lost = await begin(backend, b"echo $PPID; exec cat")
    await lost.untilOutput(b"\n")
    os.kill(int(lost.out), 9)
    backend._spawn()
    await lost.untilClosed()
    assert isinstance(lost.reason, LinkLost)
    collector = await begin(backend, b"cat")
    carrier = backend.carrier
    carrier.transport.abortConnection()
    await until(lambda: backend.link.attached and backend.carrier is not carrier)
    collector.stream.write(b"after the cut")
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert collector.reason is None
    assert bytes(collector.out) == b"after the cut"
    assert collector.exit == ExitStatus(0)


@pytest_twisted.ensureDeferred
async def test_an_agent_that_does_not_start_leaves_nothing(tmp_path, monkeypatch):
    """Also no directory for its socket."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(JupyterUnreachable):
        await LoopbackBackend(reactor, python="/bin/false").start()
    assert os.listdir(tmp_path) == []
