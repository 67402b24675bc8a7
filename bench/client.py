"""The real ssh client, driven over pipes and over a terminal of its own.

Every wait has a limit, and what came is compared byte by byte with what was sent.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.processes import Process, stop
from bench.servers import BenchError, Road

if TYPE_CHECKING:
    from types import TracebackType

#: Seconds that anything may take: a slow road is measured, a hanging one is told.
LIMIT = 120.0

_PIPE_SIZE = 1024 * 1024
#: A shell's prompt at the end of what came: a last sign, a space, and perhaps colours.
_PROMPT = re.compile(rb"[#$%>] ?(?:\x1b\[[0-9;?]*[A-Za-z])*$")


class Client:
    """One ssh process and the ends of its pipes or of its terminal."""

    def __init__(self, command: list[str], *, terminal: bool = False) -> None:
        if terminal:
            self.input, far = os.openpty()
            self.output = self.input
            fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
            try:
                self._process = self._start(command, far, far)
            finally:
                os.close(far)
        else:
            near_read, far_write = os.pipe()
            far_read, near_write = os.pipe()
            for fd in (near_write, far_write):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            self.input, self.output = near_write, near_read
            try:
                self._process = self._start(command, far_read, far_write)
            finally:
                os.close(far_read)
                os.close(far_write)
        os.set_blocking(self.input, False)
        self._buffer = b""

    @staticmethod
    def _start(command: list[str], stdin: int, stdout: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stop(self._process, 5.0)
        self._close()

    def _close(self) -> None:
        for fd in {self.input, self.output}:
            if fd >= 0:
                os.close(fd)
        self.input = self.output = -1
        if self._process.stderr is not None:
            self._process.stderr.close()

    @property
    def process(self) -> Process:
        """The ssh process itself."""
        found = Process.of(self._process.pid)
        if found is None:
            raise BenchError("ssh has ended")
        return found

    def read(self, deadline: float) -> bytes:
        """What has come, once something has."""
        ready, _, _ = select.select([self.output], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise BenchError(f"nothing came for {LIMIT:.0f} s")
        try:
            data = os.read(self.output, _PIPE_SIZE)
        except OSError:  # a terminal whose other end has closed
            data = b""
        if not data:
            raise BenchError(f"ssh ended: {self._complaint()}")
        return data

    def _complaint(self) -> str:
        stop(self._process, 5.0)
        assert self._process.stderr is not None
        return self._process.stderr.read()[-300:].decode(errors="replace").strip()

    def line(self) -> bytes:
        """The next line; what comes after it is kept."""
        deadline = time.monotonic() + LIMIT
        while b"\n" not in self._buffer:
            self._buffer += self.read(deadline)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def prompt(self) -> None:
        """Wait for a shell's prompt."""
        deadline = time.monotonic() + LIMIT
        told = b""
        while not _PROMPT.search(told):
            told += self.read(deadline)

    def send(self, data: bytes) -> None:
        """Give a little input."""
        if os.write(self.input, data) != len(data):
            raise BenchError("ssh takes no input")

    def expect(self, wanted: mmap.mmap) -> None:
        """Read as many bytes as ``wanted`` has, which must be those."""
        deadline = time.monotonic() + LIMIT
        position, end = 0, len(wanted)
        data, self._buffer = self._buffer, b""
        while True:
            if data != wanted[position : position + len(data)]:
                raise BenchError(f"wrong bytes came near {position}")
            position += len(data)
            if position >= end:
                return
            data = self.read(deadline)

    def upload(self, content: mmap.mmap) -> None:
        """Send all of it."""
        deadline = time.monotonic() + LIMIT
        position, end = 0, len(content)
        piece = b""
        while position < end:
            piece = content[position : position + 256 * 1024]
            ready = select.select([self.output], [self.input], [], deadline - time.monotonic())
            if ready[0]:
                raise BenchError(f"an answer before the end: {self.read(deadline)[:100]!r}")
            if not ready[1]:
                raise BenchError(f"upload stands still after {position} bytes")
            position += os.write(self.input, piece)

    def finish(self) -> None:
        """End the input; the command must end well."""
        os.close(self.input)
        if self.output == self.input:
            self.output = -1
        self.input = -1
        if self._process.wait(LIMIT) != 0:
            raise BenchError(f"ssh gave {self._process.returncode}: {self._complaint()}")


class Master:
    """A ControlMaster that others can share."""

    def __init__(self, road: Road) -> None:
        self._road = road
        self._path = road.directory / "master"

    def __enter__(self) -> Master:
        self._client = Client(self._road.ssh("-M", "-N", "-S", str(self._path)))
        deadline = time.monotonic() + LIMIT
        check = self._road.ssh("-S", str(self._path), "-O", "check")
        while subprocess.run(check, capture_output=True, check=False).returncode != 0:
            if time.monotonic() > deadline:
                self._client.__exit__(None, None, None)
                raise BenchError("no ControlMaster")
            time.sleep(0.02)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.__exit__(kind, error, trace)
        Path(self._path).unlink(missing_ok=True)

    @property
    def process(self) -> Process:
        """The process whose connection it is."""
        return self._client.process

    def ssh(self, *options: str) -> list[str]:
        """The command line of one who shares it."""
        return self._road.ssh("-S", str(self._path), *options)
