"""Locks between processes: turns, who is alone, who stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from conchkernel.errors import ConfigurationError, LinkLost
from conchkernel.jupyter.sharing import FileLock, SharedState

if TYPE_CHECKING:
    from pathlib import Path


async def take(lock: FileLock, events: list[str], name: str, release: Deferred[None]) -> None:
    """Have a turn until told."""
    async with lock:
        events.append(name)
        await release


@pytest_twisted.ensureDeferred
async def test_turns(tmp_path: Path) -> None:
    """One after the other; who gives up waiting is not waited for."""
    clock = Clock()
    events: list[str] = []
    ends: list[Deferred[None]] = [Deferred() for _ in range(3)]
    locks = [FileLock(clock, tmp_path / "lock") for _ in ends]
    running = [
        Deferred.fromCoroutine(take(lock, events, str(number), end))
        for number, (lock, end) in enumerate(zip(locks, ends, strict=True))
    ]
    clock.pump([0.1] * 10)
    assert events == ["0"]
    running[1].cancel()
    with pytest.raises(CancelledError):
        await running[1]
    ends[0].callback(None)
    clock.advance(0.1)
    assert events == ["0", "2"]
    ends[2].callback(None)
    await running[0]
    await running[2]


@pytest_twisted.ensureDeferred
async def test_aTurnThatNeverComes(tmp_path: Path) -> None:
    """Is told in a sentence, with the file that is locked."""
    clock = Clock()
    end: Deferred[None] = Deferred()
    first = Deferred.fromCoroutine(take(FileLock(clock, tmp_path / "lock"), [], "", end))
    second = Deferred.fromCoroutine(take(FileLock(clock, tmp_path / "lock"), [], "", end))
    clock.pump([1.0] * 100)
    with pytest.raises(LinkLost, match="lock"):
        await second
    end.callback(None)
    await first


@pytest_twisted.ensureDeferred
async def test_aProcessThatIsKilledHasNothing(tmp_path: Path) -> None:
    """Its turn, its presence and its staying behind end with it."""
    program = (
        "import asyncio, sys, time\n"
        "from pathlib import Path\n"
        "from twisted.internet.task import Clock\n"
        "from conchkernel.jupyter.sharing import SharedState\n"
        f"state = SharedState(Clock(), Path({str(tmp_path)!r}))\n"
        "async def have():\n"
        "    await state.turn.__aenter__()\n"
        "asyncio.run(have())\n"
        "assert state.takeLingering()\n"
        "print('has', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    state = SharedState(Clock(), tmp_path)
    try:
        assert process.stdout.readline() == b"has\n"
        assert not state.alone()
        assert not state.takeLingering()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()
    async with state.turn:
        assert state.alone()
        assert state.takeLingering()
    state.close()


def test_whoAsksToStayBehindPutsTheEndOff(tmp_path: Path) -> None:
    """The one who lingers sees when the last one asked."""
    first, second = SharedState(Clock(), tmp_path), SharedState(Clock(), tmp_path)
    assert first.takeLingering()
    os.utime(tmp_path / "lingering.lock", (0, 0))
    assert first.secondsSinceLastUse() > 1000
    assert not second.takeLingering()
    assert first.secondsSinceLastUse() < 1000
    first.stopLingering()
    assert second.takeLingering()
    first.close()
    assert second.alone()
    second.close()


def test_anImpossibleDirectory(tmp_path: Path) -> None:
    """Is told by its path."""
    with pytest.raises(ConfigurationError, match="nowhere"):
        SharedState(Clock(), tmp_path / "nowhere")
