"""The rows of the table: what is done on a road, and what is measured of it.

Each function measures one row on one road, once, and returns a
:class:`~bench.figures.Measurement`. The clock runs only while bytes move: connections are made
before it starts, unless making them is the row.
"""

from __future__ import annotations

import gc
import mmap
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.client import LIMIT, Client, Master
from bench.figures import Figure, Measurement, Target
from bench.processes import Process
from bench.servers import BenchError, Road

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds between typed keys, at random, so that no timer on the road falls into step with them.
_TYPING = (0.005, 0.015)
_SETTLE_SECONDS = 0.5
_LINE = "A line of eighty columns is what a terminal shows, and this one is as long as.."

#: Says that all is set, and who the shell's parent is; waits for a line.
_READY = "printf '%s\\n' \"$PPID\"; read x"


class Plan:
    """How much of each thing is done, and the files that are sent."""

    def __init__(self, directory: Path, *, quick: bool) -> None:
        self.keys = 100 if quick else 300
        self.warm_keys = 20 if quick else 50
        self.shared_execs = 10 if quick else 30
        self.connections = 3 if quick else 5
        self.shells = (0, 10) if quick else (0, 10, 100)
        self.bulk_file = directory / "bulk"
        self.lines_file = directory / "lines"
        generator = random.Random(2)
        with open(self.bulk_file, "wb") as file:
            for _ in range(40 if quick else 200):
                file.write(generator.randbytes(1_000_000))
        with open(self.lines_file, "wb") as file:
            for _ in range(10 if quick else 60):
                # 12500 lines of 79 hexadecimal digits and a newline
                digits = generator.randbytes(500_000).hex().encode()
                lines = (digits[start : start + 79] for start in range(0, 987_500, 79))
                file.write(b"\n".join((*lines, b"")))
        self.bulk = mapped(self.bulk_file)
        self.lines = mapped(self.lines_file)


def mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table, which may have several figures."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    measure: Callable[[Road, Any], Measurement]
    once: bool = False
    """Whether one round is enough, on servers that have done nothing yet."""


# --- bulk --------------------------------------------------------------------------------------


class Meter:
    """CPU and wall time of everything on a road, from now until :meth:`stop`."""

    def __init__(self, road: Road, client: Client, session_parent: bytes) -> None:
        self._roles = {**road.processes(int(session_parent)), "ssh": [client.process]}
        self._before = self._cpu()
        self._start = time.perf_counter()

    def _cpu(self) -> dict[str, float]:
        return {
            role: sum(process.cpu() for process in processes)
            for role, processes in self._roles.items()
        }

    def stop(self, size: int) -> Measurement:
        """What moving ``size`` bytes has cost."""
        seconds = time.perf_counter() - self._start
        gigabytes = size / 1e9
        cpu = {role: (now - self._before[role]) / gigabytes for role, now in self._cpu().items()}
        values = {"MB/s": size / 1e6 / seconds, "CPU": sum(cpu.values())}
        return Measurement(values, cpu)


def _receive(command: list[str], road: Road, content: mmap.mmap) -> Measurement:
    with Client(command) as client:
        parent = client.line()
        meter = Meter(road, client, parent)
        client.send(b"\n")
        client.expect(content)
        measured = meter.stop(len(content))
        client.send(b"\n")
        client.finish()
    return measured


def _download(road: Road, plan: Plan) -> Measurement:
    command = f"{_READY}; cat {plan.bulk_file}; read x"
    return _receive([*road.ssh(), command], road, plan.bulk)


def _upload(road: Road, plan: Plan) -> Measurement:
    sink = Path(__file__).with_name("sink.py")
    command = f"{_READY}; exec {sys.executable} -I -S {sink} {plan.bulk_file}"
    with Client([*road.ssh(), command]) as client:
        parent = client.line()
        client.send(b"\n")
        if client.line() != b"ready":
            raise BenchError("the far end of the upload does not start")
        meter = Meter(road, client, parent)
        client.upload(plan.bulk)
        told = client.line()
        measured = meter.stop(len(plan.bulk))
        if told != b"same %d" % len(plan.bulk):
            raise BenchError(f"what was uploaded came {told.decode()}")
        client.finish()
    return measured


def _pty_flood(road: Road, plan: Plan) -> Measurement:
    command = f"stty -opost -echo; {_READY}; cat {plan.lines_file}; read x"
    return _receive([*road.ssh("-tt"), command], road, plan.lines)


# --- keys --------------------------------------------------------------------------------------


def _keys(
    command: list[str], plan: Plan, pauses: tuple[float, float] | None = None
) -> dict[str, float]:
    """Send keys to a PTY that gives every byte back, each when the one before has come back.

    :param pauses: seconds to wait before each, from and to.
    """
    pause = random.Random(3)
    times = []
    command = [*command, "stty raw -echo; printf '\\n'; exec cat"]
    with Client(command, terminal=True) as client:
        client.line()
        gc.disable()
        try:
            for number in range(-plan.warm_keys, plan.keys):
                if pauses is not None:
                    time.sleep(pause.uniform(*pauses))
                key = bytes([33 + number % 90])
                start = time.perf_counter()
                client.send(key)
                echo = client.read(time.monotonic() + LIMIT)
                seconds = time.perf_counter() - start
                if echo != key:
                    raise BenchError(f"{echo!r} came back for {key!r}")
                if number >= 0:
                    times.append(seconds * 1000)
        finally:
            gc.enable()
    return {"p50": statistics.median(times), "p99": statistics.quantiles(times, n=100)[98]}


def _echo(road: Road, plan: Plan) -> Measurement:
    return Measurement(_keys(road.ssh("-tt"), plan))


def _echo_typed(road: Road, plan: Plan) -> Measurement:
    return Measurement(_keys(road.ssh("-tt"), plan, _TYPING))


@contextmanager
def _flood(command: list[str], writer: Process | None = None) -> Iterator[Callable[[], float]]:
    """Another session that prints for ever and is read; gives what tells its MB/s so far.

    :param writer: who writes what comes to its end, if not the ssh process itself.
    """
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    ) as flood:
        try:
            counted = writer or Process.of(flood.pid)
            assert counted is not None
            first, begin = counted.written(), time.monotonic()
            while counted.written() - first < 2_000_000:
                if time.monotonic() - begin > LIMIT or flood.poll() is not None:
                    raise BenchError("the flood does not flow")
                time.sleep(0.05)
            first, begin = counted.written(), time.monotonic()
            yield lambda: (counted.written() - first) / 1e6 / (time.monotonic() - begin)
        finally:
            flood.terminate()
            flood.wait(LIMIT)


def _echo_beside(road: Road, plan: Plan, flooding: str) -> Measurement:
    with _flood([*road.ssh("-tt"), flooding]) as speed:
        values = _keys(road.ssh("-tt"), plan)
        values["flood"] = speed()
    return Measurement(values)


def _echo_flood(road: Road, plan: Plan) -> Measurement:
    return _echo_beside(road, plan, f"yes '{_LINE}'")


def _echo_raw_flood(road: Road, plan: Plan) -> Measurement:
    return _echo_beside(road, plan, f"stty -opost; yes '{_LINE}'")


def _echo_shared_flood(road: Road, plan: Plan) -> Measurement:
    with Master(road) as master:
        command = [*master.ssh("-tt"), f"yes '{_LINE}'"]
        with _flood(command, master.process) as speed:
            values = _keys(master.ssh("-tt"), plan)
            values["flood"] = speed()
    return Measurement(values)


# --- connections -------------------------------------------------------------------------------


def _timed(command: list[str], times: int) -> dict[str, float]:
    measured = []
    for _ in range(times):
        start = time.perf_counter()
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, check=False
        )
        measured.append((time.perf_counter() - start) * 1000)
        if done.returncode != 0:
            raise BenchError(f"status {done.returncode}: {done.stderr.decode()[-300:]}")
    return {"p50": statistics.median(measured)}


def _exec_shared(road: Road, plan: Plan) -> Measurement:
    with Master(road) as master:
        command = [*master.ssh(), "true"]
        _timed(command, 2)
        return Measurement(_timed(command, plan.shared_execs))


def _exec_new(road: Road, plan: Plan) -> Measurement:
    return Measurement(_timed([*road.ssh(), "true"], plan.connections))


def _prompt(road: Road, plan: Plan) -> Measurement:
    times = []
    for _ in range(plan.connections):
        start = time.perf_counter()
        with Client(road.ssh(), terminal=True) as client:
            client.prompt()
            times.append((time.perf_counter() - start) * 1000)
    return Measurement({"p50": statistics.median(times)})


# --- memory ------------------------------------------------------------------------------------


def _memory(road: Road, plan: Plan) -> Measurement:
    """Idle login shells, each on a connection of its own. The Jupyter server is told apart."""
    measured = Measurement()
    with Client([*road.ssh(), _READY]) as client:
        parent = int(client.line())
        client.send(b"\n")
        # read's own status decides, and it has read a line
        client.finish()
        none = 0.0
        with ExitStack() as begun:
            shells: list[Client] = []
            for number in range(plan.shells[-1] + 1):
                if number:
                    shells.append(begun.enter_context(Client(road.ssh(), terminal=True)))
                    shells[-1].prompt()
                if number in plan.shells:
                    time.sleep(_SETTLE_SECONDS)
                    pss, anonymous = _resident(road, parent)
                    measured.memory[number] = pss
                    if number:
                        measured.values[f"{number} more"] = anonymous - none
                    else:
                        none = anonymous
                        measured.values["0 shells"] = _ours(pss)
            if not all(shell.process.alive for shell in shells):
                raise BenchError("shells that should be idle have ended")
    return measured


def _resident(road: Road, session_parent: int) -> tuple[dict[str, float], float]:
    """PSS by role, and the anonymous part of what is ours, in MB."""
    pss: dict[str, float] = {}
    anonymous: dict[str, float] = {}
    for role, processes in road.resident(session_parent).items():
        memory = [process.memory() for process in processes]
        pss[role], anonymous[role] = (sum(column) for column in zip(*memory, strict=True))
    return pss, _ours(anonymous)


def _ours(roles: dict[str, float]) -> float:
    return sum(megabytes for role, megabytes in roles.items() if role != "server")


# --- all of them -------------------------------------------------------------------------------

_SPEED = "MB/s"
_P50_IDLE, _P99_IDLE = Figure("p50", "ms", Target(1.2)), Figure("p99", "ms", Target(4))
_PAUSED = (Figure("p50", "ms"), Figure("p99", "ms"))
_BESIDE = (Figure("p50", "ms", Target(3)), Figure("p99", "ms"), Figure("flood", _SPEED))
_CPU = Figure("CPU", "s/GB")


def _bulk(share: float) -> tuple[Figure, ...]:
    return Figure(_SPEED, _SPEED, Target(share, at_least=True, of_sshd=True)), _CPU


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("echo", "key echo, idle", (_P50_IDLE, _P99_IDLE), _echo),
        Row("echo-typed", "the same with pauses", _PAUSED, _echo_typed),
        Row("echo-flood", "key echo beside another connection's yes", _BESIDE, _echo_flood),
        Row("echo-raw", "key echo beside its yes with -opost", _BESIDE, _echo_raw_flood),
        Row("echo-shared", "key echo beside yes on one connection", _BESIDE, _echo_shared_flood),
        Row("download", "exec download", _bulk(0.5), _download),
        Row("upload", "exec upload", _bulk(0.4), _upload),
        Row("pty", "PTY flood with -opost", _bulk(0.9), _pty_flood),
        Row("exec", "true over ControlMaster", (Figure("p50", "ms", Target(10)),), _exec_shared),
        Row("exec-new", "true over a new connection", (Figure("p50", "ms"),), _exec_new),
        Row("prompt", "new connection to prompt", (Figure("p50", "ms", Target(130)),), _prompt),
        Row(
            "memory",
            "memory, idle shells",
            (
                Figure("0 shells", "MB"),
                Figure("10 more", "MB"),
                Figure("100 more", "MB", Target(50)),
            ),
            _memory,
            once=True,
        ),
    )
}
