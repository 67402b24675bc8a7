"""What :mod:`bench.files` does with files: batches of sftp, random reads, a clone, comparing.

Nothing is believed: whatever arrived is compared with what was sent, after the clock has stopped.
"""

from __future__ import annotations

import filecmp
import os
import random
import shlex
import shutil
import struct
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.servers import BenchError, delayed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

    from bench.servers import Road

#: Seconds that one step may take: ten thousand files are slow on some roads.
LIMIT = 1200.0
_LISTED = 10_000
_PIECE = 32 * 1024
_SMALL = 4096
_ROUND_TRIP_MS = 20.0


class Sources:
    """The files at this end, made once, and how much of each thing is done."""

    def __init__(self, directory: Path, *, quick: bool, full: bool, rows: list[str]) -> None:
        here = directory / "here"
        here.mkdir()
        self.directory = here
        self.arrivals = here / "arrivals"
        self.arrivals.mkdir()
        self.reads = 200 if quick else 1000
        self._few = 100 if quick else 500
        self._generator = random.Random(4)
        self._relays: dict[str, Road] = {}
        self._block = self._generator.randbytes(1_000_000)
        self._megabytes = {
            "bulk": 40 if quick else 200,
            "far": 10 if quick else 60,
            "large": 5000 if full else 300 if quick else 1000,
        }
        self.bulk = self._random("bulk")
        self.far = self._random("far")
        self.large = self._random("large") if "memory" in rows else self.bulk

    def about(self) -> str:
        """How much, in a few words."""
        sizes = ", ".join(f"{name} {size} MB" for name, size in self._megabytes.items())
        return f"{sizes}, {self._few} small files"

    def _random(self, name: str) -> Path:
        path = self.directory / name
        with open(path, "wb") as file:
            for position in range(self._megabytes[name]):
                # No two places are alike, and it is made in no time.
                file.write(struct.pack(">QQ", position, len(name)))
                start = position * 7919 % 1_000_000
                file.write(self._block[start:])
                file.write(self._block[: start - 16] if start >= 16 else b"")
            file.truncate(self._megabytes[name] * 1_000_000)
        return path

    def small(self, many: bool) -> Path:
        """A directory of small files."""
        count = _LISTED if many else self._few
        path = self.directory / f"small-{count}"
        if not path.exists():
            path.mkdir()
            for place in range(count):
                (path / f"file-{place:05}").write_bytes(self._generator.randbytes(_SMALL))
        return path

    def repository(self) -> Path:
        """A small git repository."""
        path = self.directory / "repository"
        if not path.exists():
            path.mkdir()
            _git(path, "init", "-q")
            for commit in range(3):
                for place in range(60):
                    file = path / f"part-{place % 7}" / f"file-{place}.txt"
                    file.parent.mkdir(exist_ok=True)
                    file.write_text(self._generator.randbytes(1500).hex())
                _git(path, "add", ".")
                _git(path, "commit", "-q", "-m", f"Commit {commit}")
        return path

    @contextmanager
    def emptied(self) -> Iterator[Path]:
        """A directory for what arrives."""
        path = self.arrivals / "several"
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def delayed(self, road: Road) -> Road:
        """The same server behind a long line."""
        if road.name not in self._relays:
            self._relays[road.name] = delayed(road, _ROUND_TRIP_MS)
        return self._relays[road.name]


class Far:
    """The directory at the far end of a road, which this host has, too.

    :param named: its name over there.
    """

    def __init__(self, directory: Path, named: str) -> None:
        self._directory = directory
        self._named = named

    def place(self, name: str) -> tuple[str, Path]:
        """Where a file or directory is: over there, and here."""
        return f"{self._named}/{name}", self._directory / name

    def give(self, source: Path) -> str:
        """Have a file or directory over there; its name there."""
        there, path = self.place(source.name)
        if not path.exists():
            if source.is_dir():
                shutil.copytree(source, path)
            else:
                shutil.copyfile(source, path)
        return there

    def newDirectory(self, name: str) -> tuple[str, Path]:
        """An empty directory."""
        self.discard(name)
        there, path = self.place(name)
        path.mkdir()
        return there, path

    def discard(self, name: str) -> None:
        """Have it no more."""
        shutil.rmtree(self._directory / name, ignore_errors=True)

    def listing(self) -> tuple[str, int]:
        """A directory of many empty files, and how many."""
        there, path = self.place("listed")
        if not path.exists():
            path.mkdir()
            for place in range(_LISTED):
                (path / f"a-name-as-files-have-it-{place:05}.txt").touch()
        return there, _LISTED


class FileBatch:
    """Commands for sftp, done on a connection of their own."""

    def __init__(self, road: Road, commands: list[str]) -> None:
        self._road = road
        self._commands = commands
        self.output = ""

    def run(self) -> float:
        """Seconds from the first command to the end of the last."""
        stamps = self._road.directory / "stamps"
        batch = self._road.directory / "batch"
        stamp = f"!date +%s.%N >>{stamps}"
        batch.write_text("\n".join((stamp, *self._commands, stamp, "")))
        stamps.unlink(missing_ok=True)
        *command, destination = self._road.ssh()
        command[0] = "sftp"
        command[command.index("-p")] = "-P"
        command += ["-q", "-b", str(batch), destination]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT,
            check=False,
        )
        if done.returncode != 0:
            raise BenchError(f"sftp gave {done.returncode}: {done.stderr[-300:]!r}")
        self.output = done.stdout.decode()
        begun, ended = map(float, stamps.read_text().split())
        return ended - begun


def sameFile(one: Path, other: Path) -> None:
    """They must have the same bytes."""
    if not filecmp.cmp(one, other, shallow=False):
        raise BenchError(f"{other.name} is not what was sent")


def sameTree(one: Path, other: Path) -> None:
    """They must have the same files with the same bytes."""
    names = sorted(os.listdir(one))
    if names != sorted(os.listdir(other)):
        raise BenchError(f"{len(os.listdir(other))} of {len(names)} files arrived")
    for name in names:
        sameFile(one / name, other / name)


# --- random reads: a client that asks for what it wants, in SFTP 3 -------------------------------

_INIT, _OPEN, _READ, _VERSION, _HANDLE, _DATA = 1, 3, 5, 2, 102, 103


class _Session:
    """The sftp subsystem of an ssh process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input: IO[bytes] = process.stdin
        self._output: IO[bytes] = process.stdout

    def send(self, *packets: bytes) -> None:
        self._input.write(b"".join(struct.pack(">I", len(it)) + it for it in packets))
        self._input.flush()

    def receive(self, kind: int) -> bytes:
        head = self._output.read(5)
        if len(head) < 5:
            raise BenchError("the sftp subsystem ended")
        length, found = struct.unpack(">IB", head)
        body = self._output.read(length - 1)
        if found != kind:
            raise BenchError(f"answer {found}, not {kind}: {body[:100]!r}")
        return body


def randomReads(road: Road, there: str, source: Path, count: int, depth: int) -> float:
    """Seconds for so many reads at random places, ``depth`` of them under way."""
    places = random.Random(count)
    size = source.stat().st_size - _PIECE
    offsets = [places.randrange(size) for _ in range(count)]
    process = subprocess.Popen(
        [*road.ssh("-s"), "sftp"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        session = _Session(process)
        session.send(struct.pack(">BI", _INIT, 3))
        session.receive(_VERSION)
        path = os.fsencode(there)
        opening = struct.pack(">BII", _OPEN, 0, len(path)) + path + struct.pack(">II", 1, 0)
        session.send(opening)
        (length,) = struct.unpack_from(">I", handle := session.receive(_HANDLE), 4)
        handle = handle[4 : 8 + length]
        requests = [
            struct.pack(">BI", _READ, place) + handle + struct.pack(">QI", offset, _PIECE)
            for place, offset in enumerate(offsets)
        ]
        answers: dict[int, bytes] = {}
        start = time.perf_counter()
        session.send(*requests[:depth])
        for place in range(count):
            body = session.receive(_DATA)
            if place + depth < count:
                session.send(requests[place + depth])
            answers[struct.unpack_from(">I", body)[0]] = body[8:]
        seconds = time.perf_counter() - start
    finally:
        process.kill()
        process.communicate()
    with open(source, "rb") as file:
        for place, offset in enumerate(offsets):
            file.seek(offset)
            if answers.get(place) != file.read(_PIECE):
                raise BenchError(f"wrong bytes at {offset}")
    return seconds


# --- a clone into a mounted directory ------------------------------------------------------------


def clone(road: Road, there: str, path: Path, sources: Sources) -> float:
    """Seconds for a git clone into a directory of the road's, mounted with sshfs."""
    if shutil.which("sshfs") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise BenchError("no sshfs, or no /dev/fuse that can be used")
    source = sources.repository()
    mount = sources.directory / "mount"
    mount.mkdir(exist_ok=True)
    *command, destination = road.ssh()
    mounting = subprocess.Popen(
        [
            *("sshfs", "-f", f"{destination}:{there}", str(mount)),
            *("-o", f"ssh_command={shlex.join(command)}"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while not os.path.ismount(mount):
            if mounting.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"sshfs does not mount ({mounting.poll()})")
            time.sleep(0.02)
        start = time.perf_counter()
        _git(mount, "clone", "-q", source.as_uri(), "clone")
        seconds = time.perf_counter() - start
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(mount)], capture_output=True, check=False)
        try:
            mounting.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            mounting.kill()
            mounting.communicate()
    for directory in (path / "clone", source):
        _git(directory, "fsck", "--full", "--strict")
    heads = {_git(directory, "rev-parse", "HEAD") for directory in (path / "clone", source)}
    if len(heads) != 1 or _git(path / "clone", "diff", "HEAD", "--stat"):
        raise BenchError("the clone is not what was cloned")
    return seconds


def _git(directory: Path, *arguments: str) -> bytes:
    command = [
        *("git", "-c", "user.name=Bench", "-c", "user.email=bench@localhost"),
        *("-c", "safe.directory=*", "-c", "core.fileMode=false", *arguments),
    ]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"git {arguments[0]}: {done.stderr[-300:]!r}")
    return done.stdout
