"""Starting agents, and finding them again. Inside the kernel, for the relay.

Standard library only, any Python from 3.8.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Started with nothing in argv but this line; secret and sources come by its stdin, which may stay
#: open behind them.
_BOOT = "import json,sys;g=json.loads(sys.stdin.buffer.read(%d));exec(g.pop('boot'),{'given':g})"
#: An agent that has not detached by then is in trouble.
_START_SECONDS = 20.0
_LOOK_SECONDS = 0.005
_OF_THE_KERNEL = re.compile(r"JPY_|PYDEVD_|IPY_INTERRUPT|MPLBACKEND$|INTERRUPT_EVENT")
#: What ipykernel sets in its own process; shells get what the server's account has.
_OF_IPYTHON = ("CLICOLOR", "CLICOLOR_FORCE", "FORCE_COLOR", "PAGER", "GIT_PAGER", "TERM")


def path_of(agent_id: str) -> str:
    """Where an agent's socket is.

    :raises ValueError: if that is no agent's id.
    """
    if not re.fullmatch(r"[0-9a-f]{16}", agent_id):
        raise ValueError("malformed id")
    directory = f"conchkernel-{os.getuid()}-{agent_id}"
    path = os.path.join(tempfile.gettempdir(), directory, "s")
    # sun_path holds 104 bytes on macOS, 108 on Linux.
    return path if len(path.encode()) < 100 else os.path.join("/tmp", directory, "s")


def connection(path: str) -> socket.socket | None:
    """A connection to the agent; ``None`` if none listens there.

    :raises OSError: if what is there is not ours.
    """
    directory = os.path.dirname(path)
    try:
        found = os.lstat(directory)
    except OSError:
        return None
    if found.st_uid != os.getuid():
        raise OSError(f"{directory} belongs to somebody else")
    made = socket.socket(socket.AF_UNIX)
    try:
        made.connect(path)
    except OSError:
        made.close()
        return None
    return made


def start(path: str, request: dict[str, Any], sources: dict[str, Any], version: str) -> None:
    """Start an agent, and return when it listens.

    :param path: of its socket.
    :param request: its ``secret``, and perhaps ``options``.
    :param sources: what it is started with: ``boot`` (code) and ``modules``.
    :param version: of the sources.
    :raises OSError: with a sentence, if there will be none.
    """
    options = dict(request.get("options") or {})
    options["environment"] = _environment()
    options["directory"] = os.getcwd()
    options["path_prefix"] = os.path.dirname(os.path.abspath(sys.executable))
    options["version"] = version
    given = {
        "path": path,
        "secret": request["secret"],
        "options": options,
        "fastpty": _compiled_pump(),
        **sources,
    }
    # Big buffers come and go all the time; without this each of them is an mmap.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "4194304",
                   "MALLOC_TRIM_THRESHOLD_": "4194304"}  # fmt: skip
    message = json.dumps(given).encode()
    # A secret is never on a disk: where the system has no files in memory, a pipe it is.
    with _in_memory(message) as told, tempfile.TemporaryFile() as complaint:
        status = _run(message, told, complaint, environment)
        complaint.seek(0)
        text = complaint.read().decode("utf-8", "replace").strip().splitlines()
    if status != 0:
        raise OSError(text[-1] if text else f"status {status}")


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[Any]:
    """A file without a name that is on no disk; ``None`` where the system has no such."""
    try:
        file = os.fdopen(os.memfd_create("conchkernel"), "w+b")
    except (AttributeError, OSError):
        yield None
        return
    with file:
        file.write(content)
        file.seek(0)
        yield file


def _run(message: bytes, told: Any, complaint: Any, environment: dict[str, str]) -> int:
    """Start an agent and wait until it has detached; its status, -N where signal N ended it.

    Not by ``subprocess``: a child that a cell forks just then has a copy of every descriptor, and
    would keep open the pipe by whose end that hears of the exec.

    :param told: a file with the message; ``None`` if it is to go by a pipe.
    :param complaint: a file for what the agent has to say against it.
    :raises OSError: if it does not start, or takes too long.
    """
    deadline = time.monotonic() + _START_SECONDS
    reading, writing = (os.dup(told.fileno()), -1) if told else os.pipe()
    try:
        try:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", "-c", _BOOT % len(message)],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, reading, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, complaint.fileno(), 2),
                ],
                setsigdef=[signal.SIGPIPE],
            )
        finally:
            os.close(reading)
        if not told:
            _write(writing, message, deadline)
    finally:
        if writing >= 0:
            os.close(writing)
    while True:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return 0  # somebody in the kernel waits for every child; the agent will be asked
        if ended:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise OSError("it took too long")
        time.sleep(_LOOK_SECONDS)


def _write(pipe: int, message: bytes, deadline: float) -> None:
    """Write it all, or as much as is taken until then: who reads may have ended."""
    os.set_blocking(pipe, False)
    view = memoryview(message)
    while view and time.monotonic() < deadline:
        try:
            view = view[os.write(pipe, view) :]
        except BrokenPipeError:
            return
        except BlockingIOError:
            time.sleep(_LOOK_SECONDS)


def _environment() -> dict[str, str]:
    """The environment of the Jupyter server's account, without what is the kernel's own."""
    try:
        with open("/proc/self/environ", "rb") as file:
            pairs = [os.fsdecode(pair).partition("=") for pair in file.read().split(b"\0")]
        environment = {name: value for name, equals, value in pairs if equals}
    except OSError:
        environment = {k: v for k, v in os.environ.items() if k not in _OF_IPYTHON}
    return {k: v for k, v in environment.items() if not _OF_THE_KERNEL.match(k)}


def _compiled_pump() -> str | None:
    """The compiled pump, where conchkernel happens to be installed in the kernel's Python."""
    try:
        spec = importlib.util.find_spec("conchkernel._fastpty")
    except (ImportError, ValueError, AttributeError):
        return None
    return spec.origin if spec is not None else None
