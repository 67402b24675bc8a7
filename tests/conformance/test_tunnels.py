"""Connections on the kernel's host, to the byte and to the end, on every backend.

The kernel's host is this one, so the peers are sockets of the test's own.
"""

from __future__ import annotations

import hashlib
import os
import queue
import socket
import stat
import threading

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import DeferredList
from twisted.internet.threads import deferToThread
from zope.interface import implementer

from conchkernel.errors import RefusalCode, StreamRefused
from conchkernel.interfaces import (
    IListenerReceiver,
    PrivateSocket,
    ProcessRequest,
    SocketPath,
    TCPAddress,
)

from ..collector import PATIENCE_SECONDS, Collector
from ..peers import answer, echo, received, reset

EVERY_BYTE = bytes(range(256)) * 4097


def connect(link, address):
    """A stream to an address, with what collects what comes of it."""
    collector = Collector()
    collector.stream = link.openConnection(address, collector)
    collector.stream.grant(1 << 21)
    return collector


@implementer(IListenerReceiver)
class Taker:
    """Accepts whoever connects."""

    def __init__(self):
        self.listener = None
        self.incoming = []
        self.taken = []
        self.lost = None

    def connectionAccepted(self, incoming):
        self.incoming.append(incoming)
        collector = Collector()
        collector.stream = self.listener.accept(incoming, collector)
        collector.stream.grant(1 << 21)
        self.taken.append(collector)

    def listenerLost(self, reason):
        self.lost = reason


async def listen(link, address):
    """A listener whose connections are taken."""
    taker = Taker()
    taker.listener = await link.listen(address, taker)
    return taker


def on_thread(work, *args):
    """The test's own blocking calls."""
    return deferToThread(work, *args)


@pytest_twisted.ensureDeferred
async def test_every_byte_goes_there_and_back(link, serving):
    """In order, and each direction to its end."""
    collector = connect(link, serving(echo).tcp)
    await collector.until(lambda: collector.opened is not None)
    collector.stream.write(EVERY_BYTE)
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert collector.reason is None
    assert bytes(collector.out) == EVERY_BYTE
    assert collector.consumed == len(EVERY_BYTE)
    assert collector.order == ["opened", "data", "eof", "closed"]


@pytest_twisted.ensureDeferred
async def test_an_answer_follows_the_end_of_the_question(link, serving):
    """Half-close: the other direction goes on."""
    collector = connect(link, serving(answer).tcp)
    collector.stream.write(EVERY_BYTE)
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert bytes(collector.out) == hashlib.sha256(EVERY_BYTE).digest()


@pytest_twisted.ensureDeferred
async def test_the_other_side_may_end_first(link, serving):
    """What we still send then arrives all the same."""
    got = queue.Queue()

    def ends_first(connection):
        connection.sendall(b"bye")
        connection.shutdown(socket.SHUT_WR)
        got.put(received(connection))

    collector = connect(link, serving(ends_first).tcp)
    await collector.until(lambda: collector.eof)
    assert bytes(collector.out) == b"bye"
    collector.stream.write(EVERY_BYTE)
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert collector.reason is None
    assert await on_thread(got.get, True, PATIENCE_SECONDS) == EVERY_BYTE


@pytest_twisted.ensureDeferred
async def test_refused_is_told_with_the_systems_words(link):
    """And so is a name that nobody knows."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        collector = connect(link, TCPAddress("127.0.0.1", taken.getsockname()[1]))
        await collector.untilClosed()
    assert isinstance(collector.reason, StreamRefused)
    assert collector.reason.code is RefusalCode.CONNECT_FAILED
    assert "refused" in str(collector.reason)
    collector = connect(link, TCPAddress("no-such-host.invalid", 1))
    await collector.untilClosed()
    assert isinstance(collector.reason, StreamRefused)
    assert collector.reason.code is RefusalCode.CONNECT_FAILED


@pytest_twisted.ensureDeferred
async def test_names_are_resolved_over_there(link, serving):
    """localhost, which is two addresses: the second is tried where the first is not served."""
    collector = connect(link, TCPAddress("localhost", serving(echo).address[1]))
    collector.stream.write(b"x")
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert bytes(collector.out) == b"x"


@pytest_twisted.ensureDeferred
async def test_ipv6(link, serving):
    """As an address in numbers."""
    peer = serving(echo, ("::1", 0), socket.AF_INET6)
    collector = connect(link, TCPAddress("::1", peer.address[1]))
    collector.stream.write(b"six")
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert bytes(collector.out) == b"six"


@pytest_twisted.ensureDeferred
async def test_a_unix_socket(link, serving, tmp_path):
    """At its path; and the reason where there is none."""
    path = str(tmp_path / "s")
    serving(echo, path, socket.AF_UNIX)
    collector = connect(link, SocketPath(os.fsencode(path)))
    collector.stream.write(EVERY_BYTE)
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert bytes(collector.out) == EVERY_BYTE
    for wrong in (b"/no/such", b"/" + b"x" * 200):
        collector = connect(link, SocketPath(wrong))
        await collector.untilClosed()
        assert isinstance(collector.reason, StreamRefused)


@pytest_twisted.ensureDeferred
async def test_a_unix_socket_whose_queue_is_full_is_waited_for(link, tmp_path):
    """As a blocking connect would."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)
    address = SocketPath(os.fsencode(tmp_path / "s"))
    collectors = [connect(link, address) for _ in range(8)]
    listener.settimeout(PATIENCE_SECONDS)

    def serve():
        for _ in collectors:
            connection, _ = listener.accept()
            connection.sendall(b"served")
            connection.close()

    await on_thread(serve)
    for collector in collectors:
        await collector.untilOutput(b"served")
        collector.stream.writeEOF()
        await collector.untilClosed()
        assert bytes(collector.out) == b"served"
    listener.close()


@pytest_twisted.ensureDeferred
async def test_a_reset_is_no_ordinary_end(link, serving):
    """What came before it is delivered; it is closed with a reason and without EOF."""

    def resets(connection):
        connection.sendall(b"before")
        connection.recv(1)
        reset(connection)

    collector = connect(link, serving(resets).tcp)
    await collector.untilOutput(b"before")
    collector.stream.write(b"x")
    await collector.untilClosed()
    assert collector.reason is not None
    assert not collector.eof


@pytest_twisted.ensureDeferred
async def test_a_peer_that_does_not_read_stops_the_writer(link, serving):
    """Nothing is taken from us that the socket does not take, and nothing of it is lost."""
    go = threading.Event()
    digests = []

    def slow(connection):
        go.wait(PATIENCE_SECONDS)
        digests.append(hashlib.sha256(received(connection)).hexdigest())
        connection.close()

    collector = connect(link, serving(slow).tcp)
    await collector.until(lambda: collector.opened is not None)
    data = os.urandom(1 << 20)
    whole = hashlib.sha256()
    written = 0
    while written - collector.consumed <= 4 << 20 and written < 64 << 20:
        collector.stream.write(data)
        whole.update(data)
        written += len(data)
        if written - collector.consumed > 2 << 20:
            before = collector.consumed
            try:
                await collector.until(lambda before=before: collector.consumed > before).addTimeout(
                    1, reactor
                )
            except Exception:
                break
    assert written < 64 << 20
    go.set()
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert digests == [whole.hexdigest()]


@pytest_twisted.ensureDeferred
async def test_a_reader_that_takes_nothing_stops_the_peer(link, serving):
    """No byte comes that was not granted."""

    def floods(connection):
        for _ in range(64):
            connection.sendall(b"f" * (1 << 20))
        connection.close()

    collector = Collector(limit=300_000)
    collector.stream = link.openConnection(serving(floods).tcp, collector)
    collector.stream.grant(300_000)
    await collector.until(lambda: collector.count == 300_000)
    collector._limit = None
    collector._keep = False
    collector.stream.grant(1 << 21)
    await collector.until(lambda: collector.eof)
    assert collector.count == 64 << 20
    collector.stream.close()


@pytest_twisted.ensureDeferred
async def test_who_wants_no_more_and_sends_no_more_is_done(link, serving):
    """stopReading ends one direction, EOF the other: a peer that floods meets its end."""
    ended = threading.Event()

    def floods(connection):
        try:
            while True:
                connection.sendall(b"c" * (1 << 20))
        except OSError:
            ended.set()

    collector = Collector(limit=1000, keep=False)
    collector.stream = link.openConnection(serving(floods).tcp, collector)
    collector.stream.grant(1000)
    await collector.until(lambda: collector.count == 1000)
    collector.stream.stopReading()
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert collector.reason is None
    assert await on_thread(ended.wait, PATIENCE_SECONDS)


@pytest_twisted.ensureDeferred
async def test_many_at_once(link, serving):
    """Five hundred connections, each with its own bytes."""
    peer = serving(answer, backlog=500)
    collectors = [connect(link, peer.tcp) for _ in range(500)]
    for number, collector in enumerate(collectors):
        collector.stream.write(b"%d" % number * 1000)
        collector.stream.writeEOF()
    await DeferredList([collector.untilClosed() for collector in collectors])
    for number, collector in enumerate(collectors):
        assert bytes(collector.out) == hashlib.sha256(b"%d" % number * 1000).digest()


@pytest_twisted.ensureDeferred
async def test_who_connects_over_there_is_taken(link):
    """On both addresses of localhost and one port, which is told."""
    taker = await listen(link, TCPAddress("localhost", 0))
    port = taker.listener.port

    def visit(family, host):
        with socket.socket(family) as connection:
            connection.settimeout(PATIENCE_SECONDS)
            connection.connect((host, port))
            connection.sendall(b"hello " + host.encode())
            connection.shutdown(socket.SHUT_WR)
            return received(connection), connection.getsockname()[:2]

    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        visiting = on_thread(visit, family, host)
        while not taker.taken:
            await collector_turn()
        collector = taker.taken.pop()
        await collector.until(lambda c=collector: c.eof)
        assert bytes(collector.out) == b"hello " + host.encode()
        collector.stream.write(EVERY_BYTE)
        collector.stream.writeEOF()
        await collector.untilClosed()
        got, name = await visiting
        assert got == EVERY_BYTE
        incoming = taker.incoming.pop()
        assert (incoming.host, incoming.port) == name
    taker.listener.close()
    await until_refused(port)


async def collector_turn():
    """Let the reactor have a turn."""
    await on_thread(lambda: None)


async def until_refused(port):
    """Nobody listens there any more, soon."""
    while True:
        with socket.socket() as connection:
            if await on_thread(connection.connect_ex, ("127.0.0.1", port)) != 0:
                return


@pytest_twisted.ensureDeferred
async def test_an_address_that_is_taken(link):
    """Is refused with the system's words."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StreamRefused, match="in use"):
            await link.listen(TCPAddress("127.0.0.1", taken.getsockname()[1]), Taker())


@pytest_twisted.ensureDeferred
async def test_a_unix_socket_is_made_for_its_owner_and_removed(link, tmp_path):
    """Mode 0600 from the first moment; what is there already is not touched."""
    path = tmp_path / "s"
    taker = await listen(link, SocketPath(os.fsencode(path)))
    found = os.stat(path)
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    with pytest.raises(StreamRefused, match="in use"):
        await link.listen(SocketPath(os.fsencode(path)), Taker())
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        while not taker.taken:
            await collector_turn()
    taker.listener.close()
    while path.exists():
        await collector_turn()


@pytest_twisted.ensureDeferred
async def test_a_dead_socket_is_in_nobodys_way(link, tmp_path):
    """One of a program that was killed; but another one's kind of socket is not touched."""
    dead, other = tmp_path / "dead", tmp_path / "other"
    for path, kind in ((dead, socket.SOCK_STREAM), (other, socket.SOCK_DGRAM)):
        with socket.socket(socket.AF_UNIX, kind) as left:
            left.bind(str(path))
            if kind == socket.SOCK_DGRAM:
                with pytest.raises(StreamRefused, match="in use"):
                    await link.listen(SocketPath(os.fsencode(path)), Taker())
    taker = await listen(link, SocketPath(os.fsencode(dead)))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(dead))
        while not taker.taken:
            await collector_turn()
    taker.listener.close()


@pytest_twisted.ensureDeferred
async def test_a_socket_that_was_replaced_is_left_alone(link, tmp_path):
    """Only what we made is removed."""
    path = tmp_path / "s"
    taker = await listen(link, SocketPath(os.fsencode(path)))
    path.unlink()
    path.write_text("somebody's file")
    taker.listener.close()
    other = await listen(link, SocketPath(os.fsencode(tmp_path / "t")))
    other.listener.close()
    assert path.read_text() == "somebody's file"


@pytest_twisted.ensureDeferred
async def test_a_private_socket(link):
    """In a directory that nobody else can enter; both go."""
    taker = await listen(link, PrivateSocket("agent"))
    path = os.fsdecode(taker.listener.path)
    directory = os.path.dirname(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    taker.listener.close()
    while os.path.exists(directory):
        await collector_turn()


@pytest_twisted.ensureDeferred
async def test_who_is_refused_is_closed(link):
    """A connection that nobody takes does not hang."""

    @implementer(IListenerReceiver)
    class Refuser(Taker):
        def connectionAccepted(self, incoming):
            self.listener.refuse(incoming)

    taker = Refuser()
    taker.listener = await link.listen(TCPAddress("127.0.0.1", 0), taker)

    def visit():
        with socket.create_connection(("127.0.0.1", taker.listener.port)) as connection:
            connection.settimeout(PATIENCE_SECONDS)
            return connection.recv(1)

    assert await on_thread(visit) == b""
    taker.listener.close()


@pytest_twisted.ensureDeferred
async def test_more_wait_than_the_agent_holds(link):
    """They stay in the system's queue, and are all served."""
    held = []

    @implementer(IListenerReceiver)
    class Late(Taker):
        def connectionAccepted(self, incoming):
            held.append(incoming)

    taker = Late()
    taker.listener = await link.listen(TCPAddress("127.0.0.1", 0), taker)
    connections = []

    def visit():
        for _ in range(100):
            connection = socket.create_connection(("127.0.0.1", taker.listener.port))
            connection.settimeout(PATIENCE_SECONDS)
            connections.append(connection)

    await on_thread(visit)
    served = 0
    while served < len(connections):
        while not held:
            await collector_turn()
        collector = Collector()
        collector.stream = taker.listener.accept(held.pop(0), collector)
        collector.stream.grant(1)
        collector.stream.write(b"!")
        collector.stream.writeEOF()
        served += 1
    assert await on_thread(lambda: [one.recv(1) for one in connections]) == [b"!"] * 100
    for connection in connections:
        connection.close()
    taker.listener.close()


@pytest_twisted.ensureDeferred
async def test_a_use_that_is_over_leaves_nothing(backend, serving, tmp_path):
    """Listeners and connections go with it; the peer does not take it for the client's EOF."""
    use = await backend.connect("owner")
    path = tmp_path / "s"
    await listen(use, SocketPath(os.fsencode(path)))
    ends = []

    def serve(connection):
        connection.sendall(connection.recv(1))
        try:
            ends.append(received(connection))
        except ConnectionResetError as error:
            ends.append(error)

    peer = serving(serve)
    collector = connect(use, peer.tcp)
    collector.stream.write(b"x")
    await collector.untilOutput(b"x")
    use.release()
    await collector.untilClosed()
    while path.exists() or not ends:
        await collector_turn()
    assert isinstance(ends[0], ConnectionResetError)
    # and the agent serves on
    use = await backend.connect("owner")
    collector = Collector()
    collector.start(use, ProcessRequest(b"echo on"))
    await collector.untilClosed()
    assert bytes(collector.out) == b"on\n"
    use.release()
