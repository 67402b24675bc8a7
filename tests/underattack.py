"""Servers to attack, and what is asked of one in the end: the fixtures of the attacks' tests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any

import psutil
import pytest

from tests.attackers import CONCH_KEXINIT, LINUX, Attacker
from tests.rawclient import KEXINIT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: What a gateway may grow by, whatever is done to it.
MAXIMUM_GROWTH_KIB = 64 * 1024

#: Seconds for which nobody else is served, at most: of the server's own CPU time, so that a busy
#: machine is not taken for a busy server.
LONGEST_TURN = 0.25


class Server:
    """A process under attack.

    :ivar before: the most KiB that it held before the attack.
    """

    def __init__(self, kind: str, log: IO[str]) -> None:
        self.kexInit = KEXINIT if kind == "gateway" else CONCH_KEXINIT
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.attacked", kind],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.log = log
        Attacker(self, "127.0.0.200").login()
        self.before = self.memory()

    def memory(self) -> int:
        """The most KiB that it ever held; elsewhere than on Linux, what it holds now."""
        if not LINUX:
            return int(psutil.Process(self.process.pid).memory_info().rss) // 1024
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    def growth(self) -> int:
        """KiB."""
        return self.memory() - self.before

    def lines(self) -> list[str]:
        """Its log."""
        self.log.flush()
        with open(self.log.name) as file:
            return file.read().splitlines()

    def failures(self) -> list[str]:
        """The errors that nobody had expected."""
        return [line for line in self.lines() if "Traceback" in line]

    def stop(self) -> dict[str, Any]:
        """End it; what it has seen: its ``longest`` turn, the passwords that it ``judged``."""
        self.process.terminate()
        output, _ = self.process.communicate()
        seen: dict[str, Any] = json.loads(output)
        return seen

    def kill(self) -> None:
        """However it is, also when it has ended."""
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Bystander:
    """The process of the client who only wants to be served."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.attackers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _say(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def begin(self, server: Server) -> None:
        """Log in there, and type."""
        assert self._say(f"{server.port} {server.process.pid}") == '"typing"\n'

    def end(self) -> dict[str, Any]:
        """Its ``echoes``, and the ``longest`` time it waited for one."""
        seen: dict[str, Any] = json.loads(self._say("enough"))
        return seen

    def stop(self) -> None:
        """No more servers."""
        self.process.communicate()


@pytest.fixture(scope="session")
def bystander() -> Iterator[Bystander]:
    """A client of the servers under attack."""
    made = Bystander()
    yield made
    made.stop()


@pytest.fixture
def gateway(tmp_path: Path, bystander: Bystander) -> Iterator[Server]:
    """A gateway, which must have taken no harm in the end, nor its other clients."""
    with open(tmp_path / "log", "w") as log:
        found = Server("gateway", log)
        seen = {}
        try:
            bystander.begin(found)
            found.before = found.memory()
            yield found
            served = bystander.end()
            # It still lets others in.
            Attacker(found, "127.0.0.201").login()
            assert found.growth() < MAXIMUM_GROWTH_KIB
            assert not found.failures()
            seen = found.stop()
        finally:
            found.kill()
    assert seen["longest"] < LONGEST_TURN
    assert served["echoes"]
    assert served["longest"] < LONGEST_TURN


@pytest.fixture
def conch(tmp_path: Path) -> Iterator[Server]:
    """A server of stock Conch."""
    with open(tmp_path / "log", "w") as log:
        found = Server("conch", log)
        try:
            yield found
        finally:
            found.kill()
