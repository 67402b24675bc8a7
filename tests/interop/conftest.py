"""A real gateway process and a real sshd, and OpenSSH's client to knock at both.

The gateway is ``twistd -n conchkernel`` as a user starts it, over a Jupyter server of the packages
that are installed beside us. A test that takes ``host`` runs on both, so that sshd itself says
whether the test's expectation is right; one that takes ``gateway`` is about what sshd has not.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest

from ..jupyters import start_jupyter
from ..ports import free_port
from .filetrees import Far, far_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..jupyters import RunningJupyter

#: Seconds after which what a test waits for will not come any more.
PATIENCE = 30.0


def until(condition: Callable[[], Any], what: str = "it") -> Any:
    """Wait for a condition; its first true value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)
    return value


class Ran(NamedTuple):
    """How a client's run ended."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        """What it printed, as text."""
        return self.out.decode()


@dataclass
class Host:
    """Somewhere to ssh to, with a client's own configuration, key and known_hosts."""

    name: str
    port: int
    home: Path
    """The client's."""
    options: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Path:
        """The private key that gets in."""
        return self.home / "key"

    @property
    def config(self) -> Path:
        """For ``ssh -F``; the host's name is :attr:`name`."""
        return self.home / f"{self.name}.config"

    @property
    def environment(self) -> dict[str, str]:
        """The client's: small, so that nothing gets across unless a test sends it."""
        return {"HOME": str(self.home), "PATH": os.environ["PATH"], "TERM": "dumb"}

    def write_config(self) -> None:
        """Write :attr:`config`, and learn the host's keys."""
        known = self.home / f"{self.name}.known"
        scan = ["ssh-keyscan", "-T10", "-ted25519", "-p", str(self.port), "127.0.0.1"]
        known.write_bytes(subprocess.run(scan, check=True, capture_output=True, timeout=20).stdout)
        options = {
            "HostName": "127.0.0.1",
            "Port": str(self.port),
            "User": getpass.getuser(),
            "IdentityFile": str(self.key),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": str(known),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
            **self.options,
        }
        lines = [f"Host {self.name}", *(f"  {name} {value}" for name, value in options.items())]
        self.config.write_text("\n".join(lines) + "\n")

    def words(self, *words: str) -> list[str]:
        """The command line of ssh: options in one word each, and last perhaps the command."""
        options = [word for word in words if word.startswith("-")]
        command = words[len(options) :]
        return ["ssh", "-F", str(self.config), *options, self.name, *command]

    def ssh(self, *words: str, given: bytes = b"", patience: float = PATIENCE) -> Ran:
        """Run the client to its end. See :meth:`words`."""
        return self.run(self.words(*words), given=given, patience=patience)

    def run(
        self,
        words: list[str],
        *,
        given: bytes = b"",
        patience: float = PATIENCE,
        environment: dict[str, str] | None = None,
    ) -> Ran:
        """Run any client program to its end."""
        done = subprocess.run(
            words,
            input=given,
            capture_output=True,
            env=self.environment | (environment or {}),
            cwd=self.home,
            timeout=patience,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr.decode(errors="replace"))

    @contextlib.contextmanager
    def started(self, *words: str, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A client that runs meanwhile, and is killed if it still does."""
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, **how}
        how.setdefault("stderr", subprocess.DEVNULL)
        process = subprocess.Popen(
            self.words(*words), env=self.environment, cwd=self.home, bufsize=0, **how
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(PATIENCE)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    @contextlib.contextmanager
    def master(self, *options: str) -> Iterator[str]:
        """A connection to be shared; gives the option for ``ssh`` that uses it."""
        path = self.home / f"{self.name}.master"
        option = f"-S{path}"
        with self.started("-M", option, "-N", *options) as client:
            until(path.exists, "the master listens")
            try:
                yield option
            finally:
                self.ssh(option, "-Oexit")
                # Not killed before it has removed its socket.
                client.wait(PATIENCE)

    @contextlib.contextmanager
    def forwarding(self, *options: str) -> Iterator[str]:
        """A connection that forwards (``-L...``, ``-R...``, ``-D...``) and does nothing else;
        gives the port that was chosen for ``-R0:...``, as the client prints it."""
        with self.master() as option:
            made = self.ssh(option, "-Oforward", *options)
            assert (made.status, made.err) == (0, "")
            yield made.text.strip()


@dataclass
class Road:
    """The processes between a client and its command."""

    processes: dict[str, psutil.Process]

    def resident(self) -> dict[str, int]:
        """Bytes of memory each has now."""
        return {name: process.memory_info().rss for name, process in self.processes.items()}

    def until_quiet(self) -> None:
        """Wait until no process on the road has anything more to do."""
        until(self._is_quiet, "nothing moves any more")

    def _is_quiet(self) -> bool:
        before = self._seconds()
        time.sleep(0.4)
        return self._seconds() - before < 0.05

    def _seconds(self) -> float:
        times = [process.cpu_times() for process in self.processes.values()]
        return sum(one.user + one.system for one in times)


@dataclass
class GatewayHost(Host):
    """The product."""

    jupyter: Any = None
    log: Path = Path()
    pid: int = 0

    def road(self) -> Road:
        """The processes on the road as it is now."""
        server = psutil.Process(self.jupyter.pid)
        agent = psutil.Process(int(self.ssh("echo $PPID").out))
        kernels = set(server.children(recursive=True)) - {agent}
        return Road(
            {"gateway": psutil.Process(self.pid), "server": server, "agent": agent}
            | {f"kernel {kernel.pid}": kernel for kernel in kernels}
        )


@pytest.fixture(scope="session")
def client_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's home with its key, and a stranger's."""
    home = tmp_path_factory.mktemp("client")
    for name in ("key", "stranger"):
        command = ["ssh-keygen", "-qt", "ed25519", "-N", "", "-C", name, "-f", str(home / name)]
        subprocess.run(command, check=True, timeout=20)
    return home


@pytest.fixture(scope="session")
def jupyter_of_gateway() -> Iterator[RunningJupyter]:
    """A server of its own: all its kernels are the gateway's."""
    server = start_jupyter("current")
    yield server
    server.stop()


@contextlib.contextmanager
def running(
    name: str, directory: Path, client_home: Path, jupyter: RunningJupyter, *options: str
) -> Iterator[GatewayHost]:
    """``twistd -n conchkernel`` as a user starts it; ``directory`` is the account's home.

    When it has ended, nothing that it started may be left, and no failure may be in its log.
    """
    log = directory / "log"
    words = [str(Path(sys.executable).with_name("twistd")), "--pidfile=", "-n", "conchkernel"]
    words += ["--port", "0", *options]
    environment = {**os.environ, "HOME": str(directory), "PYTHONUNBUFFERED": "1"}
    environment.pop("XDG_STATE_HOME", None)
    environment["CONCHKERNEL_JUPYTER_URL"] = jupyter.pasted
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            return " Ready" in log.read_text()

        until(is_ready, "the gateway is ready")
        listening = re.search(r"Listening on .*port=(\d+)", log.read_text())
        assert listening is not None, log.read_text()
        made = GatewayHost(name, int(listening[1]), client_home)
        made.jupyter, made.log, made.pid = jupyter, log, process.pid
        made.write_config()
        yield made
        road = made.road().processes
        process.terminate()
        assert process.wait(PATIENCE) in (0, -signal.SIGTERM)
        left = [one for name, one in road.items() if name != "server"]
        until(lambda: not any(one.is_running() for one in left), "kernel and agent are gone")
        assert "Traceback" not in log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def gateway(
    client_home: Path, jupyter_of_gateway: RunningJupyter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayHost]:
    """One for nearly all tests; ``MY_*`` may be set in it."""
    directory = tmp_path_factory.mktemp("gateway")
    options = ["--state-dir", str(directory / "state"), "--accept-env", "MY_*"]
    options += ["--authorized-keys", str(client_home / "key.pub")]
    with running("gateway", directory, client_home, jupyter_of_gateway, *options) as made:
        yield made


@pytest.fixture(scope="session")
def contents_gateway(
    client_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayHost]:
    """One that finds files through the Contents API, of a server of its own."""
    directory = tmp_path_factory.mktemp("contents")
    options = ["--files", "contents", "--authorized-keys", str(client_home / "key.pub")]
    server = start_jupyter("current")
    try:
        with running("contents", directory, client_home, server, *options) as made:
            yield made
    finally:
        server.stop()


@contextlib.contextmanager
def running_sshd(name: str, directory: Path, client_home: Path, *lines: str) -> Iterator[Host]:
    """OpenSSH's own server, as Debian sets it up but for the port, keys and ``MY_*``.

    :param lines: of sshd_config(5). The first line of a kind counts, and these are the first.
    """
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    assert program is not None, "these tests compare with sshd: apt install openssh-server"
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    subprocess.run(
        ["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", directory / "host"], check=True, timeout=20
    )
    port = free_port()
    config = directory / "config"
    usual = f"""\
ListenAddress 127.0.0.1:{port}
HostKey {directory}/host
AuthorizedKeysFile {client_home}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PrintMotd no
PrintLastLog no
AcceptEnv LANG LC_* COLORTERM MY_*
SetEnv HOME={directory}
Subsystem sftp internal-sftp
"""
    config.write_text("".join(f"{line}\n" for line in lines) + usual)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "-D", "-e", "-f", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:

        def listens() -> bool:
            assert process.poll() is None, (directory / "log").read_text()
            return b"Server listening" in (directory / "log").read_bytes()

        until(listens, "sshd listens")
        made = Host(name, port, client_home)
        made.write_config()
        yield made
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def sshd(client_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """What knows what is right."""
    with running_sshd("sshd", tmp_path_factory.mktemp("sshd"), client_home) as made:
        yield made


@pytest.fixture(params=["sshd", "gateway"])
def host(request: pytest.FixtureRequest) -> Host:
    """sshd, which knows what is right, and then the gateway."""
    made: Host = request.getfixturevalue(request.param)
    return made


@pytest.fixture(params=["sshd", "agent", "contents"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Far:
    """A new directory at sshd, and in either store of a gateway."""
    of = {"sshd": "sshd", "agent": "gateway", "contents": "contents_gateway"}
    return far_on(request.getfixturevalue(of[request.param]), request.param, tmp_path)


def read_until(stream: IO[bytes] | int | None, mark: bytes) -> bytes:
    """Read until ``mark`` came; all that was read."""
    assert stream is not None
    fd = stream if isinstance(stream, int) else stream.fileno()
    data = b""
    deadline = time.monotonic() + PATIENCE
    while mark not in data:
        left = max(deadline - time.monotonic(), 0)
        assert select.select([fd], [], [], left)[0], data
        more = os.read(fd, 65536)
        assert more, data
        data += more
    return data


def quoted(*words: str | Path) -> str:
    """A command line for the remote shell."""
    return shlex.join(str(word) for word in words)
