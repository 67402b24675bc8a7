"""Tunnels when the road, the kernel, the agent or an end of theirs breaks.

What can go on goes on without a lost byte. What cannot is closed without the EOF that would make it
look whole, and the connection serves on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ..jupyters import start_jupyter
from ..peers import Detour, dial, echo, exchange, received, reset, taken
from .conftest import PATIENCE, GatewayHost, free_port, running, until
from .faults import (
    delete_the_kernel,
    kill_the_agent,
    kill_the_kernel,
    restart_the_kernel,
    stop_for_a_while,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ..peers import Peer
    from .conftest import Host

    Serving = Callable[..., Peer]

THERE, BACK = os.urandom(24_000_000), os.urandom(24_000_000)
#: Held back until what breaks has broken.
REST = 1_000_000
#: Streams of one client that nobody reads.
MANY = 100
#: Seconds without a road.
OUTAGE = 5.0


@pytest.fixture(scope="module")
def road() -> Iterator[tuple[Any, Detour]]:
    """A Jupyter server, and the one road to it that a gateway knows."""
    server = start_jupyter("current")
    port = int(re.findall(r":(\d+)/", server.url)[0])
    detour = Detour(port)
    try:
        yield replace(server, url=server.url.replace(f":{port}/", f":{detour.port}/")), detour
    finally:
        detour.close()
        server.stop()


@pytest.fixture(scope="module")
def frail(
    road: tuple[Any, Detour], client_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayHost]:
    """A gateway behind which things break."""
    directory = tmp_path_factory.mktemp("frail")
    options = ["--authorized-keys", str(client_home / "key.pub")]
    with running("frail-tunnels", directory, client_home, road[0], *options) as made:
        yield made


class End:
    """One end of a connection, on a thread: sends all of ``data`` and reads meanwhile.

    :param go: the last of it is sent when this is set.
    :ivar count: bytes that came.
    :ivar problem: why it did not come to both ends.
    """

    def __init__(self, data: bytes, go: threading.Event) -> None:
        self.count = 0
        self.problem: OSError | None = None
        self.ended = threading.Event()
        self._data = data
        self._go = go
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> bytes:
        """Of what came."""
        return self._digest.digest()

    def __call__(self, connection: socket.socket) -> None:
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(self._send, connection)
            try:
                while piece := connection.recv(65536):
                    self.count += len(piece)
                    self._digest.update(piece)
            except OSError as error:
                self.problem = error
            # The system tells of a reset once: whoever of the two asks first.
            self.problem = sending.result() or self.problem
        self.ended.set()

    def _send(self, connection: socket.socket) -> OSError | None:
        try:
            connection.sendall(self._data[:-REST])
            self._go.wait(PATIENCE)
            connection.sendall(self._data[-REST:])
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            return error
        return None


def socks(port: int, to: int) -> socket.socket:
    """A connection to a port over there, by SOCKS 5 (RFC 1928)."""
    connection = dial(port)
    connection.sendall(b"\5\1\0" + b"\5\1\0\3\x09localhost" + to.to_bytes(2, "big"))
    head = b""
    while len(head) < 12:
        piece = connection.recv(12 - len(head))
        assert piece, head
        head += piece
    assert head[:4] == b"\5\0\5\0"
    return connection


class Streams:
    """A stream through ``-L``, one through ``-R`` and one through SOCKS, with much under way in
    both directions of each.

    :ivar near: the ends at the client.
    :ivar far: those on the kernel's host.
    """

    def __init__(self, host: GatewayHost, option: str, serving: Serving) -> None:
        self.go = threading.Event()
        self.near = [End(THERE, self.go) for _ in range(3)]
        self.far = [End(BACK, self.go) for _ in range(3)]
        local, proxy, beyond = free_port(), free_port(), serving(self.far[1]).port
        made = host.ssh(
            option,
            "-Oforward",
            f"-L{local}:localhost:{serving(self.far[0]).port}",
            f"-D{proxy}",
            f"-R0:127.0.0.1:{serving(self.near[2]).port}",
        )
        assert (made.status, made.err) == (0, "")
        connections = [dial(local), socks(proxy, beyond), dial(int(made.out))]
        for connection, end in zip(connections, [*self.near[:2], self.far[2]], strict=True):
            threading.Thread(target=self._run, args=(connection, end), daemon=True).start()
        self.ends = (*self.near, *self.far)
        until(lambda: all(end.count > REST for end in self.ends), "all have begun")

    @staticmethod
    def _run(connection: socket.socket, end: End) -> None:
        with connection:
            end(connection)

    def until_ended(self) -> None:
        """Let the last bytes go, and wait for all ends."""
        self.go.set()
        for end in self.ends:
            assert end.ended.wait(PATIENCE)


def assert_whole(streams: Streams) -> None:
    """Each end got all that the other sent."""
    streams.until_ended()
    for end in streams.ends:
        assert (end.problem, end.count) == (None, len(BACK if end in streams.near else THERE))
    assert {end.digest for end in streams.near} == {hashlib.sha256(BACK).digest()}
    assert {end.digest for end in streams.far} == {hashlib.sha256(THERE).digest()}


class Master:
    """A connection that forwards to an echo: by ``-L``, ``-D``, ``-R`` and ``-R`` with a socket.

    :ivar log: what the client says of it, with its channels' messages.
    """

    def __init__(self, host: GatewayHost, option: str, log: Path, serving: Serving) -> None:
        self.host, self.option, self.log = host, option, log
        self._local, self._proxy, self._to = free_port(), free_port(), serving(echo).port
        self._path = log.with_name("back")
        forwardings = [
            f"-L{self._local}:localhost:{self._to}",
            f"-D{self._proxy}",
            f"-R{self._path}:localhost:{self._to}",
            f"-R0:localhost:{self._to}",
        ]
        made = host.ssh(option, "-Oforward", *forwardings)
        assert (made.status, made.err) == (0, "")
        self._remote = int(made.out)

    def connect(self) -> socket.socket:
        """By ``-L``."""
        return dial(self._local)

    def serves(self) -> bool:
        """Whether sessions and new connections of each kind work."""
        said = []
        with contextlib.suppress(OSError):
            for connect in (
                self.connect,
                lambda: socks(self._proxy, self._to),
                lambda: dial(self._remote),
                lambda: dial(self._path),
            ):
                with connect() as connection:
                    said.append(exchange(connection, b"once more"))
        assert self.host.ssh(self.option, "cat", given=b"on") == (0, b"on", "")
        return said == [b"once more"] * 4


@pytest.fixture
def master(frail: GatewayHost, serving: Serving, tmp_path: Path) -> Iterator[Master]:
    """See :class:`Master`."""
    log = tmp_path / "client.log"
    with frail.master("-vv", f"-E{log}") as option:
        yield Master(frail, option, log, serving)


def test_the_road_is_away(master: Master, road: tuple[Any, Detour], serving: Serving) -> None:
    """For five seconds, with every stream in the middle: each goes on without a lost byte. Who
    connects meanwhile waits."""
    streams = Streams(master.host, master.option, serving)
    detour = road[1]
    detour.cut()
    with master.connect() as late:
        threading.Event().wait(OUTAGE)
        assert not any(end.ended.is_set() for end in streams.ends)
        detour.mend()
        assert_whole(streams)
        assert exchange(late, b"waited") == b"waited"
    assert master.serves()


@pytest.mark.parametrize(
    "fault", [restart_the_kernel, delete_the_kernel, kill_the_kernel, stop_for_a_while]
)
def test_the_kernel_is_not_needed(
    master: Master, serving: Serving, fault: Callable[[GatewayHost], None]
) -> None:
    """It may go while every stream is in the middle: the agent holds them until there is another
    road, and what listens listens on."""
    streams = Streams(master.host, master.option, serving)
    fault(master.host)
    assert_whole(streams)
    assert master.serves()


def test_the_agent_is_killed(master: Master, serving: Serving) -> None:
    """Every stream with it, and none as if it were whole; the connection goes on with the next
    agent, and what listened listens again."""
    streams = Streams(master.host, master.option, serving)
    kill_the_agent(master.host)
    streams.until_ended()
    for end in streams.ends:
        assert end.count < len(THERE)
    assert all(isinstance(end.problem, ConnectionError) for end in streams.far)
    said = master.log.read_text()
    assert "rcvd close" in said
    assert "rcvd eof" not in said
    until(master.serves, "it serves again")


# --- the ends --------------------------------------------------------------------------------


class Ways:
    """Tunnels to one server by each way, made by one client.

    :ivar near: connects here to what serves on the host.
    :ivar far: connects on the host to what serves here.
    """

    def __init__(self, host: Host, option: str, port: int) -> None:
        local, proxy = free_port(), free_port()
        to = f"localhost:{port}"
        made = host.ssh(option, "-Oforward", f"-L{local}:{to}", f"-D{proxy}", f"-R0:{to}")
        assert (made.status, made.err) == (0, "")
        remote = int(made.out)
        self.near = (lambda: dial(local), lambda: socks(proxy, port))
        self.far = (lambda: dial(remote),)


@contextlib.contextmanager
def leaving_nothing(host: Host) -> Iterator[None]:
    """In the end gateway and agent have the descriptors that they had."""
    if not isinstance(host, GatewayHost):
        yield
        return
    processes = host.road().processes
    watched = [processes[name] for name in ("gateway", "agent")]

    def count() -> list[int]:
        return [one.num_fds() for one in watched]

    before = count()
    yield
    # An HTTP connection that was kept for later may be given up meanwhile.
    until(
        lambda: all(now <= then for now, then in zip(count(), before, strict=True)),
        f"of gateway and agent {before} descriptors are left",
    )


def test_an_end_resets(host: Host, serving: Serving) -> None:
    """Whoever is at the other one hears of it at once, after what was sent before; nothing is
    left of a hundred of them."""
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def answers_and_resets(connection: socket.socket) -> None:
        connection.sendall(b"before")
        connection.recv(1)
        reset(connection)

    def listens(connection: socket.socket) -> None:
        connection.sendall(b"!")
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(100):
                data += piece
        heard.put(data)

    with host.master() as option:
        resetting, listening = (
            Ways(host, option, serving(serve).port) for serve in (answers_and_resets, listens)
        )
        with leaving_nothing(host):
            for connect in (*resetting.near, *resetting.far):
                for _ in range(17):
                    with connect() as connection:
                        assert taken(connection, 6) == b"before"
                        connection.sendall(b"x")
                        with contextlib.suppress(ConnectionResetError):
                            assert connection.recv(1) == b""
            for connect in (*listening.near, *listening.far):
                for _ in range(17):
                    connection = connect()
                    assert taken(connection, 1) == b"!"
                    connection.sendall(b"before")
                    reset(connection)
                    assert heard.get(timeout=PATIENCE) in (b"", b"before")
        assert host.ssh(option, "cat", given=b"on") == (0, b"on", "")


def until_stopped(connection: socket.socket) -> None:
    """Send until nobody has taken anything for a second."""
    connection.settimeout(1)
    with contextlib.suppress(TimeoutError):
        while True:
            connection.send(BACK[:1_000_000])


def send_for_ever(connection: socket.socket) -> None:
    """Until it is closed."""
    while True:
        connection.sendall(BACK[:1_000_000])


class Flood:
    """Sends and reads without end, until the other end is gone; then resets its own."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.count = 0
        self.ended = threading.Event()

    def run(self) -> None:
        """Go on until it has ended."""
        with ThreadPoolExecutor(1) as pool, contextlib.suppress(OSError):
            pool.submit(self._send)
            while piece := self.connection.recv(65536):
                self.count += len(piece)
            self.connection.shutdown(socket.SHUT_RDWR)
        reset(self.connection)
        self.ended.set()

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            send_for_ever(self.connection)


def test_an_end_resets_while_much_is_under_way(host: Host, serving: Serving) -> None:
    """In both directions; the other end hears of it."""
    arrived: queue.SimpleQueue[Flood] = queue.SimpleQueue()

    def serve(connection: socket.socket) -> None:
        flood = Flood(connection)
        arrived.put(flood)
        flood.run()

    with host.master() as option:
        ways = Ways(host, option, serving(serve).port)
        with leaving_nothing(host):
            for connect in (*ways.near, *ways.far):
                for leaves in (0, 1):
                    flood = Flood(connect())
                    threading.Thread(target=flood.run, daemon=True).start()
                    both = flood, arrived.get(timeout=PATIENCE)
                    until(lambda both=both: min(one.count for one in both) > 3_000_000)
                    # Both its threads end, and it is reset.
                    both[leaves].connection.shutdown(socket.SHUT_RDWR)
                    for one in both:
                        assert one.ended.wait(PATIENCE)
        assert host.ssh(option, "cat", given=b"on") == (0, b"on", "")


def test_an_end_that_has_sent_all_goes_away(host: Host, serving: Serving) -> None:
    """It is not there any more for what still comes; the other end hears of it at its next
    bytes, and nothing is left."""

    def leaves(connection: socket.socket) -> None:
        connection.sendall(b"all")
        taken(connection, 3)

    with host.master() as option:
        ways = Ways(host, option, serving(leaves).port)
        with leaving_nothing(host):
            for connect in (*ways.near, *ways.far):
                with connect() as connection:
                    connection.sendall(b"now")
                    assert received(connection) == b"all"
                    with pytest.raises(ConnectionError):
                        send_for_ever(connection)


def test_half_of_a_connection_is_enough(host: Host, serving: Serving) -> None:
    """One end has sent all, before anything or after it; the other goes on for long."""
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def ends_first(connection: socket.socket) -> None:
        connection.shutdown(socket.SHUT_WR)
        heard.put(hashlib.sha256(received(connection)).digest())

    def answers(connection: socket.socket) -> None:
        received(connection)
        connection.sendall(BACK)

    with host.master() as option:
        ending, answering = (Ways(host, option, serving(one).port) for one in (ends_first, answers))
        with leaving_nothing(host):
            # OpenSSH's sshd at times does not see an end that comes with the connection itself
            # until something else happens.
            first = () if host.name == "sshd" else (*ending.near, *ending.far)
            for connect in first:
                with connect() as connection:
                    assert received(connection) == b""
                    connection.sendall(THERE)
                    connection.shutdown(socket.SHUT_WR)
                    assert heard.get(timeout=PATIENCE) == hashlib.sha256(THERE).digest()
            for connect in (*answering.near, *answering.far):
                with connect() as connection:
                    connection.shutdown(socket.SHUT_WR)
                    assert hashlib.sha256(received(connection)).digest() == (
                        hashlib.sha256(BACK).digest()
                    )


# --- clients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("deaf", ["who connected", "the client", "who serves"])
def test_many_streams_that_nobody_reads(
    gateway: GatewayHost, serving: Serving, tmp_path: Path, deaf: str
) -> None:
    """They stop those who send, and take little memory on the road; another client is served
    meanwhile."""
    stopped = threading.Semaphore(0)
    over = threading.Event()

    def floods(connection: socket.socket) -> None:
        connection.sendall(b"!")
        if deaf != "who serves":
            until_stopped(connection)
            stopped.release()
        over.wait(2 * PATIENCE)

    local = tmp_path / "local"
    to = serving(floods, backlog=MANY).port
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(gateway.started(f"-L{local}:localhost:{to}", "-N"))
        until(local.exists, "the client listens")
        road = gateway.road()
        before = road.resident()
        connections = [stack.enter_context(dial(local)) for _ in range(MANY)]
        for connection in connections:
            assert connection.recv(1)
        if deaf == "the client":
            client.send_signal(signal.SIGSTOP)
            stack.callback(client.send_signal, signal.SIGCONT)
        if deaf == "who serves":
            with ThreadPoolExecutor(MANY) as pool:
                list(pool.map(until_stopped, connections))
        else:
            for _ in range(MANY):
                assert stopped.acquire(timeout=2 * PATIENCE)
        grown = {name: size - before[name] for name, size in road.resident().items()}
        with gateway.forwarding(f"-L{tmp_path}/other:localhost:{serving(echo).port}"):
            with dial(tmp_path / "other") as connection:
                assert exchange(connection, THERE) == THERE
        assert gateway.ssh("cat", given=THERE) == (0, THERE, "")
        over.set()
        # In the gateway the nth has 2 MiB or 32 / n, which makes 91; in the agent all have 32.
        most = {"gateway": 128, "agent": 64}
        for name, size in grown.items():
            assert size < most.get(name, 16) << 20, grown
