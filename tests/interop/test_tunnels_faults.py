"""Tunnels when the road, the kernel, the agent or an end of theirs breaks.

What can go on goes on without a lost byte. What cannot is closed without the EOF that would make it
look whole, and the connection serves on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ..jupyters import start_jupyter
from ..peers import Detour, dial, echo, exchange
from .conftest import PATIENCE, free_port, running, until
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
    from .conftest import GatewayHost

    Serving = Callable[..., Peer]

THERE, BACK = os.urandom(24_000_000), os.urandom(24_000_000)
#: Held back until what breaks has broken.
REST = 1_000_000
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

    def serves(self) -> bool:
        """Whether sessions and new connections of each kind work."""
        said = []
        with contextlib.suppress(OSError):
            for connect in (
                lambda: dial(self._local),
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
    """For five seconds, with every stream in the middle: each goes on without a lost byte."""
    streams = Streams(master.host, master.option, serving)
    detour = road[1]
    detour.cut()
    threading.Event().wait(OUTAGE)
    assert not any(end.ended.is_set() for end in streams.ends)
    detour.mend()
    assert_whole(streams)
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
