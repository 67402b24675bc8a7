"""What tunnels lead to: small servers on this host, a thread for each connection.

A pytest plugin (``tests/conftest.py`` loads it), for the fixture ``serving``.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from conchkernel.interfaces import TCPAddress

from .collector import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Peer:
    """A server in a thread.

    :param serve: what is done with each connection, on a thread of its own. The connection is
        closed after it.
    """

    def __init__(
        self,
        serve: Callable[[socket.socket], object],
        address: Any = ("127.0.0.1", 0),
        family: int = socket.AF_INET,
        backlog: int = 64,
    ) -> None:
        self.listener = socket.socket(family)
        self.listener.bind(address)
        self.listener.listen(backlog)
        self.address = self.listener.getsockname()
        self._serve = serve
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self.address[1]
        return port

    @property
    def tcp(self) -> TCPAddress:
        """Where it listens."""
        return TCPAddress("127.0.0.1", self.port)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            connection.settimeout(PATIENCE_SECONDS)
            self._connections.append(connection)
            threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        # The test that ends the peer also ends what it does.
        with connection, contextlib.suppress(OSError):
            self._serve(connection)

    def close(self) -> None:
        """End it and its connections."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self._connections:
            connection.close()


def received(connection: socket.socket) -> bytes:
    """All until EOF."""
    data = bytearray()
    while piece := connection.recv(65536):
        data += piece
    return bytes(data)


def taken(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if the end comes before."""
    data = bytearray()
    while len(data) < count and (piece := connection.recv(min(65536, count - len(data)))):
        data += piece
    return bytes(data)


def echo(connection: socket.socket) -> None:
    """Give back what comes, to its end."""
    while piece := connection.recv(65536):
        connection.sendall(piece)


def answer(connection: socket.socket) -> None:
    """Read all there is, then tell its digest."""
    connection.sendall(hashlib.sha256(received(connection)).digest())


def reset(connection: socket.socket) -> None:
    """Close with a reset instead of an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def dial(address: int | Path) -> socket.socket:
    """A connection to a port of loopback, or to a Unix socket."""
    if isinstance(address, int):
        return socket.create_connection(("127.0.0.1", address), PATIENCE_SECONDS)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE_SECONDS)
    connection.connect(str(address))
    return connection


def exchange(connection: socket.socket, data: bytes) -> bytes:
    """Send all and end, and read meanwhile; what came until the other side's end."""
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(received, connection)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return reading.result(PATIENCE_SECONDS)


@pytest.fixture
def serving() -> Iterator[Callable[..., Peer]]:
    """Start peers that end with the test; takes what :class:`Peer` does."""
    peers = []

    def start(*args: Any, **kwargs: Any) -> Peer:
        peer = Peer(*args, **kwargs)
        peers.append(peer)
        return peer

    yield start
    for peer in peers:
        peer.close()


class Detour:
    """A road to a port of loopback, which can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = threading.Event()
        self._open.set()
        self._sockets: set[socket.socket] = set()
        self._peer = Peer(self._serve)
        self.port = self._peer.port

    def _serve(self, near: socket.socket) -> None:
        if not self._open.is_set():
            return
        with socket.create_connection(("127.0.0.1", self._port)) as far:
            both = {near, far}
            self._sockets |= both
            for one in both:
                one.settimeout(None)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(self._copy, near, far)
                self._copy(far, near)
            self._sockets -= both

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                target.sendall(piece)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End what goes over it, and let nobody on."""
        self._open.clear()
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let people on again."""
        self._open.set()

    def close(self) -> None:
        """End it for good."""
        self.cut()
        self._peer.close()
