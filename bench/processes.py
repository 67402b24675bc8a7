"""What processes have used: CPU time and memory, out of ``/proc``, and how they are ended.

Linux only. A process is named by pid and start time together, so that a pid which the kernel has
given to somebody else is neither measured nor killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Process:
    """One process, for as long as it lives."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this pid now."""
        fields = _stat(pid)
        return None if fields is None else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        """Whether it is still there, and no zombie."""
        fields = _stat(self.pid)
        return fields is not None and fields[0] != "Z" and int(fields[19]) == self.started

    def cpu(self) -> float:
        """Seconds of CPU it has used itself; what its children used is not in it."""
        fields = _stat(self.pid)
        if fields is None or int(fields[19]) != self.started:
            raise ProcessLookupError(f"process {self.pid} has ended while it was measured")
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory(self) -> tuple[float, float]:
        """Its memory in MB: PSS, and how much of that is anonymous.

        PSS counts its share of what it has in common with others, libraries above all, and so
        moves when somebody else's process comes or goes. The anonymous part does not.
        """
        found = {}
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("Pss", "Pss_Anon"):
                found[name] = int(value.split()[0]) * 1024 / 1e6
        if len(found) != 2:
            raise ProcessLookupError(f"process {self.pid} has no memory")
        return found["Pss"], found["Pss_Anon"]

    def written(self) -> int:
        """Bytes it has given to write(2) so far, wherever to."""
        for line in Path(f"/proc/{self.pid}/io").read_text().splitlines():
            if line.startswith("wchar:"):
                return int(line.split()[1])
        raise ProcessLookupError(f"process {self.pid} has no counters")

    def kill(self) -> None:
        """End it at once, if it is still this process that has the pid."""
        if self.alive:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on: the second may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def parent(pid: int) -> int:
    """The pid of its parent, 0 if it has none."""
    fields = _stat(pid)
    return 0 if fields is None else int(fields[1])


def children(pid: int) -> list[Process]:
    """Its direct children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and parent(int(entry.name)) == pid:
            child = Process.of(int(entry.name))
            if child is not None:
                found.append(child)
    return found


def descendants(pid: int) -> list[Process]:
    """Its children, and theirs."""
    found = children(pid)
    for child in tuple(found):
        found += descendants(child.pid)
    return found


def executable(pid: int) -> str:
    """The file that it runs; nothing if it cannot be told."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def stop(process: subprocess.Popen[bytes], seconds: float = _STOP_SECONDS) -> bool:
    """End a child of ours in the ordinary way, or else by force. Whether force was needed."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True
    return False


def wait_for_end(processes: list[Process], seconds: float) -> list[Process]:
    """Wait until they have ended; those that have not are returned."""
    deadline = time.monotonic() + seconds
    while left := [process for process in processes if process.alive]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []
