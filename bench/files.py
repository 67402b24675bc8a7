"""Files through the gateway beside OpenSSH's sftp-server: ``python -m bench.files``.

One OpenSSH client does the same with three roads in turn: ``sshd`` with its sftp-server,
``gateway`` with the agent's store, ``contents`` with the Contents API's. Every byte is compared
afterwards. The clock of a batch starts when its connection is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bench import figures
from bench.client import Client
from bench.figures import Measurement, Results, Target
from bench.filework import Far, FileBatch, Sources, clone, randomReads, sameFile, sameTree
from bench.processes import Process, descendants
from bench.servers import BenchError, Gateway, Home, Road, Sshd
from bench.table import aligned, number

if TYPE_CHECKING:
    from collections.abc import Callable

_TICKS = os.sysconf("SC_CLK_TCK")
_MIB = 1024 * 1024
#: Bytes that warm every buffer up before memory is looked at.
_WARM_BYTES = 64_000_000


class Contents(Gateway):
    """The gateway, with files through Jupyter's Contents API."""

    name = "contents"
    options = ("--files", "contents")


class Agent(Gateway):
    """The gateway, with files through the agent."""

    options = ("--files", "agent")


ROADS: dict[str, type[Road]] = {"sshd": Sshd, "gateway": Agent, "contents": Contents}


class Site:
    """A road, the directory at its far end, and a session that keeps its processes there."""

    def __init__(self, road: Road, begun: ExitStack) -> None:
        self.road = road
        directory = road.directory / "far"
        directory.mkdir()
        # The Contents API's root is the road's directory.
        self.far = Far(directory, "/far" if road.name == "contents" else str(directory))
        holding = begun.enter_context(Client([*road.ssh(), "echo $PPID; exec cat"]))
        self._parent = int(holding.line())
        self._standing = {it.pid for it in self._tree()}

    @property
    def name(self) -> str:
        return self.road.name

    def _tree(self) -> list[Process]:
        return descendants(self.road._server.pid)

    def roles(self) -> dict[str, list[Process]]:
        """The processes that stay, by role; none of sshd's do."""
        if self.name == "sshd":
            return {}
        roles = self.road.processes(self._parent)
        if self.name == "contents":
            return {role: roles[role] for role in ("gateway", "server")}
        return roles

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by role; the client's are those of our own children."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = {"client": used.ru_utime + used.ru_stime}
        if self.name == "sshd":
            self._settle()
            pids = (self.road._server.pid, *(it.pid for it in self._tree()))
            found["sshd"] = sum(map(_withChildren, pids))
        for role, processes in self.roles().items():
            found[role] = sum(process.cpu() for process in processes)
        return found

    def _settle(self) -> None:
        """Until the last connection's processes have ended, which count when they are reaped."""
        deadline = time.monotonic() + 10
        while {it.pid for it in self._tree()} - self._standing and time.monotonic() < deadline:
            time.sleep(0.02)


def _withChildren(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


# --- what is measured ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row: what is done, its one figure or several, and what is hoped of each on each road."""

    name: str
    title: str
    units: tuple[str, ...]
    measure: Callable[[Site, Sources], Measurement]
    targets: dict[str, Target] = dataclasses.field(default_factory=dict)
    """By road, of every figure."""
    per: str = ""
    """What CPU time is told for."""
    once: bool = False
    full: bool = False
    """Only where everything is wanted."""
    without: tuple[str, ...] = ()


def _metered(
    site: Site, do: Callable[[], float], amount: float, unit: str, each: float
) -> Measurement:
    """:param do: gives seconds. :param each: how much CPU time is told for, per second of it."""
    before = site.cpu()
    seconds = do()
    after = site.cpu()
    cpu = {role: (after[role] - before[role]) * each for role in after}
    return Measurement({unit: amount / seconds}, cpu)


def _getBulk(site: Site, sources: Sources, *, delayed: bool = False) -> Measurement:
    source = sources.far if delayed else sources.bulk
    there = site.far.give(source)
    here = sources.arrivals / "bulk"
    here.unlink(missing_ok=True)
    road = sources.delayed(site.road) if delayed else site.road
    size = source.stat().st_size
    batch = FileBatch(road, [f"get {there} {here}"])
    measured = _metered(site, batch.run, size / 1e6, "MB/s", 1e9 / size)
    sameFile(source, here)
    here.unlink()
    return measured


def _putBulk(site: Site, sources: Sources, *, delayed: bool = False) -> Measurement:
    source = sources.far if delayed else sources.bulk
    there, path = site.far.place("put")
    path.unlink(missing_ok=True)
    road = sources.delayed(site.road) if delayed else site.road
    size = source.stat().st_size
    batch = FileBatch(road, [f"put {source} {there}"])
    measured = _metered(site, batch.run, size / 1e6, "MB/s", 1e9 / size)
    sameFile(source, path)
    path.unlink()
    return measured


def _getDelayed(site: Site, sources: Sources) -> Measurement:
    return _getBulk(site, sources, delayed=True)


def _putDelayed(site: Site, sources: Sources) -> Measurement:
    return _putBulk(site, sources, delayed=True)


def _getSmall(site: Site, sources: Sources, *, many: bool = False) -> Measurement:
    source = sources.small(many)
    count = len(os.listdir(source))
    there = site.far.give(source)
    with sources.emptied() as here:
        batch = FileBatch(site.road, [f"get {there}/* {here}/"])
        measured = _metered(site, batch.run, count, "files/s", 1e3 / count)
        sameTree(source, here)
    return measured


def _putSmall(site: Site, sources: Sources, *, many: bool = False) -> Measurement:
    source = sources.small(many)
    count = len(os.listdir(source))
    there, path = site.far.newDirectory("puts")
    batch = FileBatch(site.road, [f"put {source}/* {there}/"])
    measured = _metered(site, batch.run, count, "files/s", 1e3 / count)
    sameTree(source, path)
    site.far.discard("puts")
    return measured


def _getMany(site: Site, sources: Sources) -> Measurement:
    return _getSmall(site, sources, many=True)


def _putMany(site: Site, sources: Sources) -> Measurement:
    return _putSmall(site, sources, many=True)


def _list(site: Site, sources: Sources) -> Measurement:
    there, count = site.far.listing()
    batch = FileBatch(site.road, [f"ls -l {there}"])
    measured = _metered(site, batch.run, count, "entries/s", 1e3 / count)
    lines = [line for line in batch.output.splitlines() if line.startswith("-rw")]
    if len({line.split()[-1] for line in lines}) != count:
        raise BenchError(f"{len(lines)} of {count} entries were listed")
    return measured


def _random(site: Site, sources: Sources) -> Measurement:
    there = site.far.give(sources.bulk)
    values = {}
    for depth in (1, 16):
        count = sources.reads * (1 if depth == 1 else 4)
        seconds = randomReads(site.road, there, sources.bulk, count, depth)
        values[f"{depth} under way, reads/s"] = count / seconds
    return Measurement(values)


def _clone(site: Site, sources: Sources) -> Measurement:
    there, path = site.far.newDirectory("mounted")
    seconds = clone(site.road, there, path, sources)
    site.far.discard("mounted")
    return Measurement({"s": seconds})


def _memory(site: Site, sources: Sources) -> Measurement:
    """By how much each process grows at its highest, once its buffers are warm."""
    processes = {role: them for role, them in site.roles().items() if them}
    large = sources.large
    with open(sources.bulk, "rb") as file:
        warm = sources.arrivals / "warm"
        warm.write_bytes(file.read(_WARM_BYTES))
    values: dict[str, float] = {}
    for name, source in (("warm", warm), ("large", large)):
        there, path = site.far.place(name)
        here = sources.arrivals / "back"
        before = {role: _resetPeak(them) for role, them in processes.items()}
        FileBatch(site.road, [f"put {source} {there}"]).run()
        FileBatch(site.road, [f"get {there} {here}"]).run()
        for role, them in processes.items():
            values[f"{role} MiB"] = (sum(map(_peak, them)) - before[role]) / _MIB
        sameFile(source, path)
        sameFile(source, here)
        for arrived in (path, here):
            arrived.unlink()
    warm.unlink()
    return Measurement(values)


def _resetPeak(processes: list[Process]) -> int:
    for process in processes:
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return sum(map(_peak, processes))


def _peak(process: Process) -> int:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {process.pid} has no memory")


def _ofSshd(bound: float, *, least: bool = True) -> Target:
    return Target(bound, at_least=least, of_sshd=True)


_HALF = {"gateway": _ofSshd(0.5)}
_NEAR = {"gateway": _ofSshd(0.8)}
_MEMORY = ("gateway MiB", "server MiB", "kernel MiB", "agent MiB")

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            "get", "get, one file", ("MB/s",), _getBulk,
            {**_HALF, "contents": Target(100, at_least=True)}, "GB",
        ),
        Row(
            "put", "put, one file", ("MB/s",), _putBulk,
            {**_HALF, "contents": Target(40, at_least=True)}, "GB",
        ),
        Row("get-small", "get, files of 4 KiB", ("files/s",), _getSmall, _HALF, "1000 files"),
        Row("put-small", "put, files of 4 KiB", ("files/s",), _putSmall, _HALF, "1000 files"),
        Row("list", "ls -l, 10000 entries", ("entries/s",), _list, {}, "1000 entries"),
        Row(
            "random", "random 32 KiB", ("1 under way, reads/s", "16 under way, reads/s"), _random
        ),
        Row("far-get", "get, 20 ms away", ("MB/s",), _getDelayed, _NEAR, "GB"),
        Row("far-put", "put, 20 ms away", ("MB/s",), _putDelayed, _NEAR, "GB"),
        # Jupyter hides what begins with a dot, and so .git.
        Row("clone", "git clone into sshfs", ("s",), _clone, without=("contents",)),
        Row(
            "get-many", "get, 10000 files", ("files/s",), _getMany, {}, "1000 files", full=True
        ),
        Row(
            "put-many", "put, 10000 files", ("files/s",), _putMany, {}, "1000 files", full=True
        ),
        Row(
            "memory", "growth, a large file", _MEMORY, _memory,
            {"gateway": Target(16), "contents": Target(16)}, once=True, without=("sshd",),
        ),
    )
}  # fmt: skip


# --- running and printing ------------------------------------------------------------------------


def _measureAll(
    sites: list[Site], rows: list[Row], sources: Sources, rounds: int
) -> tuple[Results, list[str]]:
    results: Results = {(row.name, site.name): {} for row in rows for site in sites}
    failures: list[str] = []
    for turn in range(rounds):
        for row in rows:
            if row.once and turn:
                continue
            for site in sites:
                if site.name in row.without:
                    continue
                if sys.stderr.isatty():
                    print(f"\r\x1b[K{turn + 1}: {row.name} {site.name}", end="", file=sys.stderr)
                try:
                    results[row.name, site.name][turn] = row.measure(site, sources)
                except (BenchError, OSError, ValueError, subprocess.TimeoutExpired) as error:
                    failures.append(f"{row.name} on {site.name}, round {turn + 1}: {error}")
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return results, failures


def _verdict(results: Results, row: Row, road: str, unit: str) -> str:
    target = row.targets.get(road)
    if target is None or (road == "contents" and row.name == "memory" and "gateway" not in unit):
        return ""
    compare = figures.ratio if target.of_sshd else figures.median
    value = compare(results, row.name, road, unit)
    if value is None:
        return f"{target} not measured"
    return f"{target} {'reached' if target.reached(value) else 'NOT REACHED'}"


def render(results: Results, rows: list[Row], roads: list[str]) -> str:
    """Both tables."""
    ours = [road for road in roads if road != "sshd"]
    head = ["", ""]
    for road in roads:
        head += [road] if road == "sshd" else [road, "/sshd"]
    table = [[*head, *(f"target of {road}" for road in ours)]]
    for row in rows:
        for place, unit in enumerate(row.units):
            cells = ["" if place else row.title, unit]
            for road in roads:
                cells.append(number(figures.median(results, row.name, road, unit)))
                if road != "sshd":
                    cells.append(number(figures.ratio(results, row.name, road, unit)))
            table.append([*cells, *(_verdict(results, row, road, unit) for road in ours)])
    parts = [aligned(table, left=2)]
    found = {
        (row, road): costs
        for row in rows
        for road in roads
        if row.per and (costs := figures.cpu(results, row.name, road))
    }
    roles = list(dict.fromkeys(role for costs in found.values() for role in costs))
    roles.sort(key=["sshd", "gateway", "server", "kernel", "agent", "client"].index)
    costs_table = [["CPU seconds", "for", "", *roles, "sum"]]
    for (row, road), costs in found.items():
        numbers = [*(costs.get(role) for role in roles), sum(costs.values())]
        costs_table.append([row.title, row.per, road, *map(number, numbers)])
    if found:
        parts.append(aligned(costs_table, left=3))
    return "\n\n".join(parts)


def _names(known: list[str]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return [name for name in known if name in names]

    return chosen


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.files", description=__doc__)
    parser.add_argument("--rounds", type=int, help="rounds of each row (5; with --quick 2)")
    parser.add_argument("--rows", type=_names(list(ROWS)), help=", ".join(ROWS))
    parser.add_argument("--roads", type=_names(list(ROADS)), default=list(ROADS))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="less of everything: a smoke test")
    size.add_argument("--full", action="store_true", help="10000 small files and 5 GB, too")
    parser.add_argument("--cipher", help="pin a cipher instead of the client's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    arguments.rows = arguments.rows or [
        row.name for row in ROWS.values() if arguments.full or not row.full
    ]
    return arguments


def main() -> int:
    """Measure and print. Status 1 if something could not be measured; targets do not count."""
    if not sys.platform.startswith("linux"):
        print("the benchmark reads /proc, which only Linux has", file=sys.stderr)
        return 1
    arguments = _arguments()
    for signalled in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signalled, lambda *_: sys.exit(1))
    rows = [ROWS[name] for name in arguments.rows]
    with ExitStack() as begun:
        directory = Path(begun.enter_context(tempfile.TemporaryDirectory(prefix="ckbench-")))
        home = Home(directory, arguments.cipher)
        try:
            sources = Sources(
                directory, quick=arguments.quick, full=arguments.full, rows=arguments.rows
            )
            sites = [Site(ROADS[name](home, begun), begun) for name in arguments.roads]
            version = subprocess.run(["ssh", "-V"], capture_output=True, check=False).stderr
            print(
                f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} before the start, Python "
                f"{platform.python_version()}, {version.decode().strip()}\n"
                f"medians of {arguments.rounds} interleaved rounds; {sources.about()}; MB are "
                "10^6 and GB 10^9 bytes"
            )
            print("".join(f"{site.name}: {site.road.cipher()}\n" for site in sites), flush=True)
        except BenchError as error:
            print(error, file=sys.stderr)
            return 1
        results, failures = _measureAll(sites, rows, sources, arguments.rounds)
    print(render(results, rows, arguments.roads))
    for failure in failures:
        print(f"FAILED: {failure}")
    if arguments.json:
        raw = [
            {"row": row, "road": road, "round": turn, **dataclasses.asdict(measured)}
            for (row, road), turns in results.items()
            for turn, measured in turns.items()
        ]
        arguments.json.write_text(json.dumps(raw, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
