"""Real Jupyter servers for tests: one of each age and kind that we promise to work with.

A pytest plugin (``tests/conftest.py`` loads it). ``jupyter`` runs a test on every stack,
``currentJupyter`` only on the one that is installed beside us. The others live in venvs that are
made on first use and kept in ``.cache/venvs``, or where ``CONCHKERNEL_TEST_VENVS`` says.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from .ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

REPOSITORY = Path(__file__).parent.parent

#: In every venv. (Later versions of jsonschema import what takes 2 s at each server's start.)
COMMON = ["tornado==6.6.1", "pyzmq==27.3.0", "jupyter_client==8.10.0", "jsonschema==4.24.1"]
#: Stack -> what its venv holds. ``current`` is the interpreter that runs the tests.
REQUIREMENTS: dict[str, list[str]] = {
    "s1": ["jupyter_server==1.24.0", "ipykernel==6.29.5", *COMMON],
    "v6": ["jupyter_server==2.14.2", "ipykernel==6.29.5", *COMMON],
    "kg": ["jupyter_kernel_gateway==3.0.1", "ipykernel==6.29.5", *COMMON],
}
STACKS = ("current", *REQUIREMENTS)

#: A server's configuration: its kernels have ports of ours, since those that a system gives to
#: whoever asks for any may be somebody's before the kernel listens there.
_PORTS = f"""
import runpy
from jupyter_client.connect import LocalPortCache
free_port = runpy.run_path({str(Path(__file__).with_name("ports.py"))!r})["free_port"]
LocalPortCache.find_available_port = lambda cache, ip: free_port()
"""

_STAMP = ".conchkernel-complete"
_START_SECONDS = 60.0
_STOP_SECONDS = 15.0
#: What names every process of a server, its kernels' too.
MARK = "CONCHKERNEL_TEST_SERVER"


@dataclass
class RunningJupyter:
    """A Jupyter server of ours."""

    url: str
    """Its root, without the token and with a slash at the end."""
    token: str = field(repr=False)
    pid: int
    stack: str
    root_dir: Path
    """What its file API shows; empty at first."""
    _spawn: Callable[[], subprocess.Popen[bytes]] = field(repr=False)
    _process: subprocess.Popen[bytes] = field(repr=False)
    _home: Path = field(repr=False)
    _mark: str = field(repr=False)

    @property
    def pasted(self) -> str:
        """The URL as a browser shows it, with its token."""
        return f"{self.url}?token={self.token}"

    @property
    def log(self) -> str:
        """What the server has printed."""
        return (self._home / "log").read_text(errors="replace")

    def restart(self) -> None:
        """Start it once more where it was, after somebody has killed it."""
        self._process.wait(_STOP_SECONDS)
        self._process = self._spawn()
        self.pid = self._process.pid
        _wait(self)

    def stop(self) -> None:
        """End it and whatever it started, and remove its files. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                _signal_group(self.pid, signal.SIGKILL)
                self._process.wait()
        kill_marked(self._mark)
        shutil.rmtree(self._home, ignore_errors=True)


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def kill_marked(mark: str) -> None:
    """End the processes that inherited a mark in their environment, as :data:`MARK`."""
    for pid in _marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _marked(mark: str) -> list[int]:
    """The processes that inherited a mark (on Linux; elsewhere kernels see their server end)."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


# --- venvs -------------------------------------------------------------------------------------


def venvs_directory() -> Path:
    """Where the stacks' venvs are kept."""
    named = os.environ.get("CONCHKERNEL_TEST_VENVS")
    return Path(named) if named else REPOSITORY / ".cache" / "venvs"


def made_once(name: str, requirements: list[str], make: Callable[[Path], None]) -> Path:
    """A directory that is made on first use, and again when what it shall hold changes.

    :param name: its own, beside the venvs.
    :param requirements: what it shall hold.
    :param make: fills the directory, which is empty.
    """
    kept = venvs_directory()
    kept.mkdir(parents=True, exist_ok=True)
    made = kept / name
    wanted = "\n".join([f"python {sys.version_info.major}.{sys.version_info.minor}", *requirements])
    with open(kept / f"{name}.lock", "w") as lock:
        # Several test runs may share the directory; the lock goes with the process.
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = made / _STAMP
        if not stamp.exists() or stamp.read_text() != wanted:
            if made.is_symlink():
                made.unlink()
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            make(made)
            stamp.write_text(wanted)
    return made


def venv_of(name: str, requirements: list[str]) -> Path:
    """The interpreter of a venv that holds ``requirements``, and is made if need be."""

    def make(venv: Path) -> None:
        # Without a pip of its own, which takes as long as some of the stacks.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install"]
        pip += ["--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements], check=True)

    return made_once(name, requirements, make) / "bin" / "python"


def python_of(stack: str) -> Path:
    """The interpreter of a stack."""
    return Path(sys.executable) if stack == "current" else venv_of(stack, REQUIREMENTS[stack])


# --- servers -----------------------------------------------------------------------------------


def start_jupyter(
    stack: str, *, base_url: str = "/", token: str | None = None, options: Sequence[str] = ()
) -> RunningJupyter:
    """Start a server and wait until it answers.

    :param base_url: below which it is, with slashes around.
    :param token: a random one if not given.
    :param options: more of its command line.
    """
    python = python_of(stack)
    for attempt in range(3):
        try:
            return _start(stack, python, base_url, token or secrets.token_hex(16), options)
        except _PortTaken:
            if attempt == 2:
                raise
    raise AssertionError("not reached")


class _PortTaken(Exception):
    """Somebody was quicker."""


def _start(
    stack: str, python: Path, base_url: str, token: str, options: Sequence[str]
) -> RunningJupyter:
    home = Path(tempfile.mkdtemp(prefix="conchkernel-jupyter-"))
    root = home / "root"
    root.mkdir()
    port = free_port()
    mark = secrets.token_hex(8)
    if stack == "kg":
        command = [python, "-m", "kernel_gateway", f"--KernelGatewayApp.base_url={base_url}"]
        command += [f"--KernelGatewayApp.port={port}", "--KernelGatewayApp.port_retries=0"]
        command += ["--KernelGatewayApp.ip=127.0.0.1"]
    else:
        command = [python, "-m", "jupyter_server", f"--ServerApp.base_url={base_url}"]
        command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
        command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={root}"]
        command += ["--ServerApp.open_browser=False", "--allow-root"]
        # Else it answers only to requests for the names of this machine.
        command += ["--ServerApp.allow_remote_access=True"]
    command += options
    environment = environment_in(home, python)
    environment |= {"JUPYTER_TOKEN": token, "KG_AUTH_TOKEN": token, MARK: mark}

    def spawn() -> subprocess.Popen[bytes]:
        with open(home / "log", "ab") as log:
            return subprocess.Popen(
                command,
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    process = spawn()
    url = f"http://127.0.0.1:{port}{base_url}"
    running = RunningJupyter(url, token, process.pid, stack, root, spawn, process, home, mark)
    try:
        _wait(running)
    except BaseException:
        running.stop()
        raise
    return running


def environment_in(home: Path, python: Path) -> dict[str, str]:
    """The test's environment, but for what would lead a server to somebody's own files."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JUPYTER", "JPY_", "KG_", "IPYTHON", "XDG_", "PYTEST", "VIRTUAL"))
    }
    for name in ("HOME", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        directory = home / name.lower()
        directory.mkdir(mode=0o700)
        environment[name] = str(directory)
    (home / "jupyter_config_dir" / "jupyter_config.py").write_text(_PORTS)
    environment["IPYTHONDIR"] = str(home / "ipython")
    environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return environment


def _wait(running: RunningJupyter) -> None:
    """Until the server answers for itself."""
    where = urlsplit(running.url)
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if running._process.poll() is not None:
            told = running.log
            if "already in use" in told:
                raise _PortTaken(told)
            raise RuntimeError(f"the {running.stack} server ended at once:\n{told}")
        connection = http.client.HTTPConnection(where.netloc, timeout=5)
        try:
            headers = {"Authorization": f"token {running.token}"}
            connection.request("GET", f"{where.path}api", headers=headers)
            answer = connection.getresponse()
            if answer.status == 200 and "version" in json.loads(answer.read()):
                return
        except (OSError, ValueError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        if time.monotonic() > deadline:
            raise RuntimeError(f"the {running.stack} server does not answer:\n{running.log}")
        time.sleep(0.05)


# --- the plugin --------------------------------------------------------------------------------


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make missing venvs before the first test: they take longer than a test may.

    Of several processes each begins with another one.
    """
    wanted = {
        value
        for item in session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        for value in item.callspec.params.values()
        if value in STACKS
    }
    if not session.config.option.collectonly:
        number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        stacks = deque(sorted(wanted))
        stacks.rotate(-number)
        for stack in stacks:
            python_of(stack)


class Jupyters:
    """The servers that the tests of one run share, each started when it is first asked for."""

    def __init__(self) -> None:
        self._running: dict[str, RunningJupyter] = {}

    def __getitem__(self, stack: str) -> RunningJupyter:
        running = self._running.get(stack)
        if running is None:
            running = self._running[stack] = start_jupyter(stack)
        return running

    def stop(self) -> None:
        """Stop them all."""
        while self._running:
            _, running = self._running.popitem()
            running.stop()


@pytest.fixture(scope="session")
def jupyters() -> Iterator[Jupyters]:
    """All of them, by stack."""
    shared = Jupyters()
    yield shared
    shared.stop()


@pytest.fixture(scope="session", params=STACKS)
def jupyter(request: pytest.FixtureRequest, jupyters: Jupyters) -> RunningJupyter:
    """Every stack in turn."""
    return jupyters[request.param]


@pytest.fixture(scope="session")
def currentJupyter(jupyters: Jupyters) -> RunningJupyter:
    """The stack that is installed beside us."""
    return jupyters["current"]
