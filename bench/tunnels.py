"""Tunnels: ``ssh -L`` through the gateway beside sshd, to a server on the same host.

``make bench-tunnels``; bench/README.md reads the table.
"""

from __future__ import annotations

import random
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.__main__ import main
from bench.client import LIMIT, Client
from bench.figures import Figure, Measurement, Target
from bench.rows import Meter, Row, mapped
from bench.servers import BenchError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator

    from bench.servers import Road

_STREAMS = 50
_SETTLE_SECONDS = 1.0
_PIECE = 256 * 1024


class TunnelPlan:
    """How much of each thing is done, and the server that tunnels lead to."""

    def __init__(self, directory: Path, *, quick: bool) -> None:
        self.pings = 200 if quick else 1000
        self.connections = 100 if quick else 400
        self.idle = 100 if quick else 300
        path = directory / "bulk"
        generator = random.Random(5)
        with open(path, "wb") as file:
            for _ in range(40 if quick else 200):
                file.write(generator.randbytes(1_000_000))
        self.content = mapped(path)
        script = Path(__file__).with_name("tunnel_peer.py")
        # It ends with our end of its stdin, however that comes.
        self._peer = subprocess.Popen(
            [sys.executable, "-I", "-S", script, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._peer.stdout is not None
        self.port = int(self._peer.stdout.readline())


@dataclass
class _Tunnel:
    """A client's port that leads to the server."""

    port: int
    client: Client
    session_parent: bytes

    def connect(self) -> socket.socket:
        """A connection through it."""
        connection = socket.create_connection(("127.0.0.1", self.port), LIMIT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


class _Stream:
    """One of several connections over which bytes are moved by one thread."""

    def __init__(self, tunnel: _Tunnel, content: mmap.mmap, size: int, *, upload: bool) -> None:
        self.socket = tunnel.connect()
        self.socket.sendall((b"t" if upload else b"g") + size.to_bytes(8, "big"))
        self.socket.setblocking(False)
        self.left = size
        self._content = content
        self._size = size
        self._buffer = bytearray(_PIECE)

    def readable(self) -> bool:
        """Take what came; whether that was the end."""
        count = self.socket.recv_into(self._buffer)
        position = self._size - self.left
        if not count or self._content[position : position + count] != self._buffer[:count]:
            raise BenchError(f"wrong bytes came near {position}")
        self.left -= count
        return not self.left

    def writable(self) -> bool:
        """Send on; whether that was the end."""
        position = self._size - self.left
        end = position + min(self.left, _PIECE)
        self.left -= self.socket.send(self._content[position:end])
        return not self.left

    def finish(self, *, upload: bool) -> None:
        """What was sent must be what arrived."""
        self.socket.settimeout(LIMIT)
        if upload and self.socket.recv(1) != b"+":
            raise BenchError("wrong bytes arrived")
        self.socket.close()


def _move(
    tunnel: _Tunnel, content: mmap.mmap, size: int, *, upload: bool, streams: int = 1
) -> None:
    """Move ``size`` bytes in all, over so many connections at once."""
    selector = selectors.DefaultSelector()
    event = selectors.EVENT_WRITE if upload else selectors.EVENT_READ
    moving = []
    for _ in range(streams):
        stream = _Stream(tunnel, content, size // streams, upload=upload)
        moving.append(stream)
        selector.register(stream.socket, event, stream.writable if upload else stream.readable)
    while selector.get_map():
        ready = selector.select(LIMIT)
        if not ready:
            raise BenchError("nothing moves")
        for key, _ in ready:
            if key.data():
                selector.unregister(key.fileobj)
    for stream in moving:
        stream.finish(upload=upload)


@contextmanager
def _tunnel(road: Road, plan: TunnelPlan) -> Iterator[_Tunnel]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    forward = ("-o", "ExitOnForwardFailure=yes", "-L", f"{port}:127.0.0.1:{plan.port}")
    # The session tells who is on the road, and ends the tunnel.
    with Client([*road.ssh(*forward), "printf '%s\\n' \"$PPID\"; read x"]) as client:
        yield _Tunnel(port, client, client.line())
        client.send(b"\n")
        client.finish()


def _together(count: int, work: Callable[[], None]) -> None:
    """Do it ``count`` times at once; the first failure is told."""
    failures: list[Exception] = []

    def one() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise BenchError(str(failures[0]))


def _bulk(road: Road, plan: TunnelPlan, *, upload: bool) -> Measurement:
    """One stream, then many that move as much together."""
    size = len(plan.content)
    with _tunnel(road, plan) as tunnel:
        _move(tunnel, plan.content, 1_000_000, upload=upload)
        meter = Meter(road, tunnel.client, tunnel.session_parent)
        _move(tunnel, plan.content, size, upload=upload)
        measured = meter.stop(size)
        meter = Meter(road, tunnel.client, tunnel.session_parent)
        _move(tunnel, plan.content, size, upload=upload, streams=_STREAMS)
        many = meter.stop(size)
    one = measured.values["MB/s"]
    measured.values["50 streams"] = many.values["MB/s"]
    measured.values["50 of one"] = many.values["MB/s"] / one
    measured.values["CPU of 50"] = many.values["CPU"]
    return measured


def _down(road: Road, plan: TunnelPlan) -> Measurement:
    return _bulk(road, plan, upload=False)


def _up(road: Road, plan: TunnelPlan) -> Measurement:
    return _bulk(road, plan, upload=True)


def _ping(road: Road, plan: TunnelPlan) -> Measurement:
    """One byte there and back, each when the one before is back."""
    times = []
    with _tunnel(road, plan) as tunnel, tunnel.connect() as connection:
        connection.sendall(b"e")
        for number in range(-50, plan.pings):
            byte = bytes([number & 0xFF])
            start = time.perf_counter()
            connection.sendall(byte)
            if connection.recv(1) != byte:
                raise BenchError("another byte came back")
            if number >= 0:
                times.append((time.perf_counter() - start) * 1000)
    return Measurement(
        {"p50": statistics.median(times), "p99": statistics.quantiles(times, n=100)[98]}
    )


def _connections(road: Road, plan: TunnelPlan) -> Measurement:
    """Connections that carry one byte each way, eight at a time."""
    left = iter(range(plan.connections))
    lock = threading.Lock()
    with _tunnel(road, plan) as tunnel:

        def some() -> None:
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                with tunnel.connect() as connection:
                    connection.sendall(b"ex")
                    if connection.recv(1) != b"x":
                        raise BenchError("another byte came back")

        start = time.perf_counter()
        _together(8, some)
        seconds = time.perf_counter() - start
    return Measurement({"per s": plan.connections / seconds})


def _memory(road: Road, plan: TunnelPlan) -> Measurement:
    """What an idle connection takes in the process that it takes most of."""
    measured = Measurement()
    with _tunnel(road, plan) as tunnel, ExitStack() as begun:
        parent = int(tunnel.session_parent)

        def connect(count: int) -> None:
            for _ in range(count):
                connection = begun.enter_context(tunnel.connect())
                connection.sendall(b"ex")
                if connection.recv(1) != b"x":
                    raise BenchError("another byte came back")

        def anonymous() -> dict[str, float]:
            time.sleep(_SETTLE_SECONDS)
            found = road.processes(parent)
            return {role: sum(p.memory()[1] for p in found[role]) for role in found}

        connect(20)  # what the first ones begin is not theirs
        before = anonymous()
        connect(plan.idle)
        after = anonymous()
        for role in before:
            measured.values[role] = (after[role] - before[role]) * 1e6 / 1024 / plan.idle
    measured.values["most"] = max(measured.values.values())
    return measured


_CPU = Figure("CPU", "s/GB")
_BULK = (
    Figure("MB/s", "MB/s", Target(0.4, at_least=True, of_sshd=True)),
    _CPU,
    Figure("50 streams", "MB/s"),
    # Of what sshd keeps: with 50 channels it is the ssh client that takes twice the CPU per byte.
    Figure("50 of one", "", Target(1.0, at_least=True, of_sshd=True)),
    Figure("CPU of 50", "s/GB"),
)

TUNNEL_ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("down", "from the server", _BULK, _down),
        Row("up", "to the server", _BULK, _up),
        Row(
            "ping",
            "one byte there and back",
            (Figure("p50", "ms", Target(2)), Figure("p99", "ms")),
            _ping,
        ),
        Row("connect", "connections, 8 at a time", (Figure("per s", ""),), _connections),
        Row(
            "memory",
            "memory, an idle connection",
            (
                Figure("gateway", "KiB"),
                Figure("server", "KiB"),
                Figure("agent", "KiB"),
                Figure("most", "KiB", Target(64)),
            ),
            _memory,
            once=True,
        ),
    )
}

if __name__ == "__main__":
    sys.exit(main(TUNNEL_ROWS, TunnelPlan, "bench.tunnels"))
