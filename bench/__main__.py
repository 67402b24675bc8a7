"""The command: what to measure, in which order, and where the numbers go."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.figures import Results
from bench.rows import ROWS, Plan, Row
from bench.servers import ROADS, BenchError, Home, Road
from bench.table import render

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return [name for name in known if name in names]

    return chosen


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _arguments(known: dict[str, Row], program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description="conchkernel beside a real sshd on this host. bench/README.md reads the table.",
    )
    rows, roads = list(known), list(ROADS)
    parser.add_argument("--rounds", type=_positive, help="rounds of each row (5; with --quick 2)")
    parser.add_argument("--rows", type=_names(rows), default=rows, help=", ".join(rows))
    parser.add_argument(
        "--roads",
        type=_names(roads),
        default=["sshd", "gateway"],
        help=f"{', '.join(roads)} (sshd,gateway): loopback is the gateway without Jupyter, pure "
        "the same without the compiled pump",
    )
    parser.add_argument("--quick", action="store_true", help="less of everything: a smoke test")
    parser.add_argument("--cipher", help="pin a cipher instead of the client's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    if arguments.cipher is not None:
        known = subprocess.run(["ssh", "-Q", "cipher"], capture_output=True, check=True).stdout
        if arguments.cipher not in known.decode().split():
            parser.error(f"--cipher: this ssh knows no {arguments.cipher!r}; see ssh -Q cipher")
    return arguments


def main(
    known: dict[str, Row] = ROWS, make_plan: Callable[..., Any] = Plan, program: str = "bench"
) -> int:
    """Measure and print. Status 1 if something could not be measured; targets do not count.

    :param known: the rows there are.
    :param make_plan: given the run's directory and ``quick``, what the rows are given.
    """
    if not sys.platform.startswith("linux"):
        print("the benchmark reads /proc, which only Linux has", file=sys.stderr)
        return 1
    arguments = _arguments(known, program)
    rows = [known[name] for name in arguments.rows]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    with ExitStack() as begun:
        name = begun.enter_context(tempfile.TemporaryDirectory(prefix="ckbench-"))
        home = Home(Path(name), arguments.cipher)
        plan = make_plan(Path(name), quick=arguments.quick)
        try:
            roads = [ROADS[name](home, begun) for name in arguments.roads]
            print(_about(arguments, roads))
        except BenchError as error:
            print(error, file=sys.stderr)
            return 1
        results, failures = _measure(roads, rows, plan, arguments.rounds)
    print(render(results, rows, arguments.roads))
    for failure in failures:
        print(f"FAILED: {failure}")
    if arguments.json:
        arguments.json.write_text(json.dumps(_raw(results), indent=1))
    return 1 if failures else 0


def _measure(
    roads: list[Road], rows: list[Row], plan: Any, rounds: int
) -> tuple[Results, list[str]]:
    results: Results = {(row.name, road.name): {} for row in rows for road in roads}
    failures = []
    # Memory comes first: what a flood leaves in a heap would hide what shells take.
    steps = [(0, row) for row in rows if row.once]
    steps += [(number, row) for number in range(rounds) for row in rows if not row.once]
    for number, row in steps:
        for road in roads:
            _progress(f"round {number + 1} of {rounds}: {row.name} on {road.name}")
            try:
                results[row.name, road.name][number] = row.measure(road, plan)
            except (BenchError, OSError, ValueError, subprocess.TimeoutExpired) as error:
                failures.append(f"{row.name} on {road.name}, round {number + 1}: {error}")
    _progress("")
    return results, failures


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _about(arguments: argparse.Namespace, roads: list[Road]) -> str:
    version = subprocess.run(["ssh", "-V"], capture_output=True, check=False).stderr.decode()
    one, five, fifteen = os.getloadavg()
    lines = [
        f"{os.cpu_count()} cores, load {one:.2f} {five:.2f} {fifteen:.2f} before the start, "
        f"Python {platform.python_version()}, {version.strip()}",
        f"medians of {arguments.rounds} interleaved rounds{', quick' * arguments.quick}; "
        "MB are 10^6 and GB 10^9 bytes",
        *(f"{road.name}: {road.cipher()}" for road in roads),
        "",
    ]
    return "\n".join(lines)


def _raw(results: Results) -> list[dict[str, Any]]:
    return [
        {"row": row, "road": road, "round": number, **dataclasses.asdict(measured)}
        for (row, road), rounds in results.items()
        for number, measured in rounds.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
