"""Our SSH side beside other SSH servers, without any Jupyter: ``python -m bench.ssh_servers``.

``ours`` is the gateway over the backend of its own host; beside it sshd, asyncssh, paramiko and
stock Conch run the same commands for the same OpenSSH client, interleaved, and every byte is
compared. The figure of bulk is server CPU per GB: all processes of the server's. ``loopback`` has
an agent as well, whose share is told apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import mmap
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.client import LIMIT, Client, Master
from bench.processes import Process, descendants
from bench.rows import ROWS, Plan
from bench.servers import BenchError, Home, Loopback, Road, Sshd, delayed

GCM = "aes128-gcm@openssh.com"
_ROUND_TRIP_MS = 20.0
_TICKS = os.sysconf("SC_CLK_TCK")

Values = dict[str, float]


class Ours(Loopback):
    """The gateway, which runs the commands itself as the others do."""

    name = "ours"
    kind = "local"

    def processes(self, session_parent: int) -> dict[str, list[Process]]:
        """There is one."""
        return {"gateway": self._noticed(Process.of(self._server.pid))}


class _Peer(Road):
    """A server of :mod:`bench.peers`."""

    def _start(self) -> None:
        command: list[str | Path] = [sys.executable, "-m", "bench.peers", self.name, str(self.port)]
        command += [self.home.directory / "host", self.home.authorized]
        environment = {**os.environ, "HOME": str(self.home.account), "PYTHONWARNINGS": "ignore"}
        self._server = self.spawn(command, cwd=Path(__file__).parent.parent, env=environment)

    def processes(self, session_parent: int) -> dict[str, list[Process]]:
        """There is one."""
        return {self.name: self._noticed(Process.of(self._server.pid))}


class Asyncssh(_Peer):
    name = "asyncssh"


class Paramiko(_Peer):
    name = "paramiko"


class Conch(_Peer):
    name = "conch"


SERVERS: dict[str, type[Road]] = {
    server.name: server for server in (Sshd, Ours, Asyncssh, Paramiko, Conch, Loopback)
}
_USUAL = ["sshd", "ours", "asyncssh", "paramiko", "conch"]


# --- what is measured ----------------------------------------------------------------------------


class Setting:
    """How much is done, and the lines with a delay that lead to the servers."""

    def __init__(self, directory: Path, begun: ExitStack, *, quick: bool) -> None:
        self.plan = Plan(directory, quick=quick)
        self.connections = 20 if quick else 100
        self.idle = 10 if quick else 50
        # A second or so at 20 ms and a window of 2 MiB.
        self.far = copy.copy(self.plan)
        self.far.bulk_file = directory / "far"
        self.far.bulk_file.write_bytes(self.plan.bulk[: (10 if quick else 60) * 1_000_000])
        with open(self.far.bulk_file, "rb") as file:
            self.far.bulk = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._begun = begun
        self._relays: dict[str, Road] = {}

    def delayed(self, road: Road) -> Road:
        """The same server behind a long line."""
        if road.name not in self._relays:
            self._relays[road.name] = delayed(road, _ROUND_TRIP_MS)
        return self._relays[road.name]


def _pinned(road: Road, cipher: str) -> Road:
    other = copy.copy(road)
    other.home = copy.copy(road.home)
    other.home.cipher = cipher
    return other


def _bulk(row: str, cipher: str | None) -> Callable[[Road, Setting], Values]:
    def measure(road: Road, setting: Setting) -> Values:
        if cipher is not None:
            road = _pinned(road, cipher)
        measured = ROWS[row].measure(road, setting.plan)
        costs = {role: cost for role, cost in measured.cpu.items() if role != "ssh"}
        values = {"MB/s": measured.values["MB/s"], "CPU s/GB": sum(costs.values())}
        if "agent" in costs:
            values["of it agent"] = costs["agent"]
        return values

    return measure


def _far(row: str) -> Callable[[Road, Setting], Values]:
    def measure(road: Road, setting: Setting) -> Values:
        measured = ROWS[row].measure(setting.delayed(road), setting.far)
        return {"MB/s": measured.values["MB/s"]}

    return measure


def _sftp(word: str) -> Callable[[Road, Setting], Values]:
    """A file by the sftp client, as it asks by itself; CPU of all of the server's processes."""

    def measure(road: Road, setting: Setting) -> Values:
        there, here = road.directory / "there", road.directory / "here"
        source, target = (there, here) if word == "get" else (here, there)
        target.unlink(missing_ok=True)
        source.unlink(missing_ok=True)
        source.symlink_to(setting.plan.bulk_file)
        command = road.ssh()
        batch = f"{word} {source} {target}\n".encode()
        command = ["sftp", "-q", "-b", "-", *_for_sftp(command[1:-1]), command[-1]]
        time.sleep(0.3)
        before, start = _server_cpu(road), time.perf_counter()
        done = subprocess.run(
            command, input=batch, capture_output=True, timeout=LIMIT, check=False
        )
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            raise BenchError(f"sftp gave {done.returncode}: {done.stderr[-300:].decode()}")
        time.sleep(0.3)
        cost = _server_cpu(road) - before
        if target.read_bytes() != setting.plan.bulk[:]:
            raise BenchError("what sftp brought is not what it was")
        target.unlink()
        size = len(setting.plan.bulk)
        return {"MB/s": size / 1e6 / seconds, "CPU s/GB": cost / (size / 1e9)}

    return measure


def _for_sftp(options: list[str]) -> list[str]:
    """sftp's word for the port is -P."""
    return ["-P" if option == "-p" else option for option in options]


def _echo(road: Road, setting: Setting) -> Values:
    values = ROWS["echo"].measure(road, setting.plan).values
    return {f"{name} µs": values[name] * 1000 for name in ("p50", "p99")}


def _exec(road: Road, setting: Setting) -> Values:
    times = []
    with Master(road) as master:
        for number in range(-3, setting.plan.shared_execs):
            start = time.perf_counter()
            done = subprocess.run(
                [*master.ssh(), "true"], stdin=subprocess.DEVNULL, timeout=LIMIT, check=False
            )
            # Stock Conch now and then closes before it has told the status.
            if done.returncode != 0 and road.name != "conch":
                raise BenchError(f"true gave {done.returncode}")
            if number >= 0:
                times.append((time.perf_counter() - start) * 1000)
    return {"p50 ms": statistics.median(times)}


def _server_cpu(road: Road) -> float:
    """CPU seconds of the server, its agent and all children of theirs that have ended."""
    pid = road._server.pid
    agents = [it.pid for it in road._seen if it.pid != pid]
    total = 0
    for process in (pid, *agents, *(it.pid for it in descendants(pid))):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15]))
    return total / _TICKS


def _meet(road: Road) -> None:
    """Learn which processes there are beside the server's own."""
    with Client([*road.ssh(), "printf '%s\\n' \"$PPID\"; read x"]) as client:
        road.processes(int(client.line()))
        client.send(b"\n")
        client.finish()


def _connect(road: Road, setting: Setting) -> Values:
    """Connections that log in and end, two at a time; no session is opened."""
    command = road.ssh(
        *("-N", "-o", "PermitLocalCommand=yes", "-o", "LocalCommand=kill -9 $PPID")
    )
    # The last connection's processes may still be ending.
    time.sleep(0.3)
    before, start = _server_cpu(road), time.perf_counter()
    for _ in range(setting.connections // 2):
        pair = [
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for _ in range(2)
        ]
        for client in pair:
            _, said = client.communicate(timeout=LIMIT)
            if client.returncode != -signal.SIGKILL:
                raise BenchError(f"no connection: {said[-300:].decode(errors='replace')}")
    seconds = time.perf_counter() - start
    time.sleep(0.3)
    count = setting.connections // 2 * 2
    return {"per s": count / seconds, "CPU ms": (_server_cpu(road) - before) * 1000 / count}


def _memory(road: Road, setting: Setting) -> Values:
    """Idle terminals, each on a connection of its own. An agent's memory is told apart."""

    def resident() -> dict[str, float]:
        return {
            role: sum(process.memory()[1] for process in processes)
            for role, processes in road.resident(parent).items()
        }

    idle = "printf '%s\\n' \"$PPID\"; exec cat"
    with ExitStack() as clients:
        first = clients.enter_context(Client([*road.ssh("-tt"), idle]))
        parent = int(first.line())
        for _ in range(4):
            clients.enter_context(Client([*road.ssh("-tt"), idle])).line()
        time.sleep(0.5)
        before = resident()
        for _ in range(setting.idle):
            clients.enter_context(Client([*road.ssh("-tt"), idle])).line()
        time.sleep(0.5)
        after = resident()
    each = {role: (after[role] - before[role]) * 1e6 / 1024 / setting.idle for role in after}
    values = {"KiB each": sum(each[role] for role in each if role != "agent")}
    if "agent" in each:
        values["agent's"] = each["agent"]
    return values


# --- the targets ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goal:
    """What is hoped of a figure of ours."""

    text: str
    reached: Callable[[Medians], bool]


class Medians:
    """One figure: its median for each server, and ratios from within the rounds."""

    def __init__(self, rounds: list[dict[str, float]]) -> None:
        self._rounds = rounds

    def of(self, server: str) -> float | None:
        """The median."""
        values = [values[server] for values in self._rounds if server in values]
        return statistics.median(values) if values else None

    def ratio(self, server: str, other: str) -> float | None:
        """The median of each round's ratio: what disturbs a round disturbs both."""
        ratios = [
            values[server] / values[other]
            for values in self._rounds
            if server in values and values.get(other)
        ]
        return statistics.median(ratios) if ratios else None

    def difference(self, server: str, other: str) -> float | None:
        """The median of each round's difference."""
        values = [it[server] - it[other] for it in self._rounds if server in it and other in it]
        return statistics.median(values) if values else None


def _of_sshd(least: float) -> Goal:
    def reached(medians: Medians) -> bool:
        ratio = medians.ratio("ours", "sshd")
        return ratio is not None and ratio >= least

    return Goal(f">= {least:g} of sshd", reached)


def _at_most(bound: float) -> Goal:
    def reached(medians: Medians) -> bool:
        value = medians.of("ours")
        return value is not None and value <= bound

    return Goal(f"<= {bound:g}", reached)


def _above_sshd(bound: float) -> Goal:
    def reached(medians: Medians) -> bool:
        value = medians.difference("ours", "sshd")
        return value is not None and value <= bound

    return Goal(f"<= sshd + {bound:g}", reached)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: what is done, and its figures with what is hoped of each."""

    title: str
    measure: Callable[[Road, Setting], Values]
    figures: dict[str, tuple[Goal | None, bool | None]]
    """Figure -> goal, and whether more is better; ``None``: not compared with others."""
    without: tuple[str, ...] = ()
    """Servers that cannot."""
    once: bool = False


_SPEED, _COST = "MB/s", "CPU s/GB"


def _bulk_row(title: str, row: str, cipher: str | None) -> Row:
    pinned = cipher is not None
    figures: dict[str, tuple[Goal | None, bool | None]] = {
        _SPEED: (_of_sshd(0.9) if pinned else None, True),
        _COST: (_at_most(1.0) if pinned else None, False),
        "of it agent": (None, None),
    }
    return Row(title, _bulk(row, cipher), figures, ("conch",) if pinned else ())


#: Without paramiko, which has no files of its own, and stock Conch, whose sftp cannot begin.
_BY_SFTP: dict[str, tuple[Goal | None, bool | None]] = {_SPEED: (None, True), _COST: (None, False)}

TABLE: dict[str, Row] = {
    "down": _bulk_row("exec download, client's cipher", "download", None),
    "up": _bulk_row("exec upload, client's cipher", "upload", None),
    "down-gcm": _bulk_row("exec download, aes128-gcm", "download", GCM),
    "up-gcm": _bulk_row("exec upload, aes128-gcm", "upload", GCM),
    "far-down": Row("exec download, 20 ms away", _far("download"), {_SPEED: (None, True)}),
    "far-up": Row("exec upload, 20 ms away", _far("upload"), {_SPEED: (_of_sshd(0.9), True)}),
    "sftp-get": Row("sftp get", _sftp("get"), _BY_SFTP, ("paramiko", "conch")),
    "sftp-put": Row("sftp put", _sftp("put"), _BY_SFTP, ("paramiko", "conch")),
    "echo": Row("key echo", _echo, {"p50 µs": (_above_sshd(100), False), "p99 µs": (None, False)}),
    "exec": Row("true over ControlMaster", _exec, {"p50 ms": (None, False)}),
    "connect": Row(
        "new connection", _connect, {"per s": (None, True), "CPU ms": (_at_most(6), False)}
    ),
    "memory": Row(
        "idle terminal",
        _memory,
        {"KiB each": (_at_most(50), False), "agent's": (None, None)},
        once=True,
    ),
}

Results = dict[str, list[dict[str, Values]]]
"""Row -> rounds -> server -> values."""


# --- running and printing ------------------------------------------------------------------------


def _measure(
    roads: list[Road], rows: dict[str, Row], setting: Setting, rounds: int
) -> tuple[Results, list[str]]:
    results: Results = {name: [] for name in rows}
    failures: list[str] = []
    # Memory comes first: what a flood leaves in a heap would hide what connections take.
    for number in range(rounds):
        for name, row in sorted(rows.items(), key=lambda item: not item[1].once):
            if row.once and number:
                continue
            found: dict[str, Values] = {}
            results[name].append(found)
            for road in roads:
                if road.name in row.without:
                    continue
                if sys.stderr.isatty():
                    print(f"\r\x1b[K{number + 1}: {name} {road.name}", end="", file=sys.stderr)
                try:
                    found[road.name] = row.measure(road, setting)
                except (BenchError, OSError, ValueError, subprocess.TimeoutExpired) as error:
                    failures.append(f"{name} on {road.name}, round {number + 1}: {error}")
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return results, failures


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def _behind(medians: Medians, more: bool, servers: list[str]) -> list[str]:
    """Those of our likes who are better, by more than nothing."""
    ratios = {name: medians.ratio("ours", name) for name in ("asyncssh", "paramiko")}
    return [
        name
        for name, ratio in ratios.items()
        if name in servers and ratio is not None and (ratio < 1 if more else ratio > 1)
    ]


def render(results: Results, rows: dict[str, Row], servers: list[str]) -> str:
    """The table."""
    table = [["", "", *servers, "ours/sshd", "target", "", "behind"]]
    for name, row in rows.items():
        for number, (figure, (goal, more)) in enumerate(row.figures.items()):
            rounds = [
                {server: values[figure] for server, values in found.items() if figure in values}
                for found in results[name]
            ]
            medians = Medians(rounds)
            mark = "" if goal is None else "NOT REACHED"
            if goal is not None and goal.reached(medians):
                mark = "reached"
            table.append(
                [
                    "" if number else row.title,
                    figure,
                    *(_number(medians.of(server)) for server in servers),
                    _number(medians.ratio("ours", "sshd")),
                    "" if goal is None else goal.text,
                    mark,
                    "" if more is None else " ".join(_behind(medians, more, servers)),
                ]
            )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if 2 <= number < len(servers) + 3 else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _names(known: dict[str, object]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return [name for name in known if name in names]

    return chosen


def main() -> int:
    """Measure and print. Status 1 if something could not be measured; targets do not count."""
    parser = argparse.ArgumentParser(prog="python -m bench.ssh_servers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=_names(dict(TABLE)), default=list(TABLE))
    parser.add_argument("--servers", type=_names(dict(SERVERS)), default=_USUAL)
    parser.add_argument("--quick", action="store_true", help="less of everything: a smoke test")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    arguments = parser.parse_args()
    rows = {name: TABLE[name] for name in arguments.rows}
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    with ExitStack() as begun:
        directory = Path(begun.enter_context(tempfile.TemporaryDirectory(prefix="ckbench-")))
        home = Home(directory, None)
        setting = Setting(directory, begun, quick=arguments.quick)
        try:
            roads = [SERVERS[name](home, begun) for name in arguments.servers]
            for road in roads:
                _meet(road)
            version = subprocess.run(["ssh", "-V"], capture_output=True, check=False).stderr
            print(
                f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} before the start, Python "
                f"{platform.python_version()}, {version.decode().strip()}\n"
                f"medians of {arguments.rounds} interleaved rounds; MB are 10^6 and GB 10^9 bytes"
            )
            print("".join(f"{road.name}: {road.cipher()}\n" for road in roads))
        except BenchError as error:
            print(error, file=sys.stderr)
            return 1
        results, failures = _measure(roads, rows, setting, arguments.rounds)
    print(render(results, rows, arguments.servers))
    for failure in failures:
        print(f"FAILED: {failure}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
