"""The servers that are compared: each a road from an ssh client to a shell on this host.

All are subprocesses, listen on loopback, let in one key made for the run, and keep their files in
one temporary directory. A road knows its ssh command line and which processes are on it.
"""

from __future__ import annotations

import copy
import getpass
import http.client
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.processes import (
    Process,
    children,
    descendants,
    executable,
    parent,
    stop,
    wait_for_end,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

_START_SECONDS = 60.0
_REPOSITORY = Path(__file__).parent.parent


class BenchError(Exception):
    """Something that is measured did not do what it should."""


class Home:
    """The run's directory: the client's key, known_hosts, and what the servers keep."""

    def __init__(self, directory: Path, cipher: str | None) -> None:
        self.directory = directory
        self.key = directory / "id"
        self.cipher = cipher
        #: HOME over there: what the account's own start-up files cost is not ours to measure.
        self.account = directory / "account"
        self.account.mkdir()
        for name in ("id", "host"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name]
            subprocess.run(command, check=True)

    @property
    def authorized(self) -> Path:
        """The public half, as an authorized_keys file."""
        return self.key.with_suffix(".pub")


class Road:
    """A server of ours that speaks SSH."""

    name = ""

    def __init__(self, home: Home, begun: ExitStack) -> None:
        self.home = home
        self.directory = home.directory / self.name
        self.directory.mkdir()
        self.port = _free_port()
        self._begun = begun
        self._seen: set[Process] = set()
        begun.callback(self._sweep)
        self._start()
        _wait(self._answers, self._server, self.directory / "log")

    _server: subprocess.Popen[bytes]

    def _start(self) -> None:
        raise NotImplementedError

    def processes(self, session_parent: int) -> dict[str, list[Process]]:
        """What is on the road of a session, by role.

        :param session_parent: the pid of the parent of the session's shell.
        """
        raise NotImplementedError

    def resident(self, session_parent: int) -> dict[str, list[Process]]:
        """The processes whose memory sessions are held in, by role."""
        return self.processes(session_parent)

    def ssh(self, *options: str) -> list[str]:
        """The client's command line up to and with the destination."""
        cipher = () if self.home.cipher is None else ("-c", self.home.cipher)
        return [
            "ssh",
            *("-F", "none", "-p", str(self.port), "-i", str(self.home.key), *cipher),
            *("-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR"),
            *("-o", f"UserKnownHostsFile={self.home.directory / 'known_hosts'}"),
            *("-o", "StrictHostKeyChecking=accept-new"),
            # Since 9.5 keys leave in a fixed rhythm; that would be measured, and nothing else.
            *("-o", "IgnoreUnknown=ObscureKeystrokeTiming", "-o", "ObscureKeystrokeTiming=no"),
            *options,
            f"{getpass.getuser()}@127.0.0.1",
        ]

    def cipher(self) -> str:
        """What client and server agree upon by themselves."""
        command = [*self.ssh("-v"), "true"]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        for line in done.stderr.decode(errors="replace").splitlines():
            if "server->client cipher:" in line:
                return line.partition("cipher: ")[2].partition(" compression")[0]
        raise BenchError(f"{self.name}: no cipher agreed: {done.stderr.decode()[-300:]}")

    def spawn(
        self, command: list[str | Path], log: str = "log", **options: object
    ) -> subprocess.Popen[bytes]:
        """Start a part of the road, which ends with the run."""
        with open(self.directory / log, "ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,  # type: ignore[call-overload]
            )
        self._begun.callback(self._end, process)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if stop(process):
            print(f"{self.name}: had to be killed: {process.args!r}", file=sys.stderr)

    def _sweep(self) -> None:
        """After the servers have ended: nothing of theirs may be left."""
        for process in wait_for_end([p for p in self._seen if p.alive], 10.0):
            print(f"{self.name}: left process {process.pid} behind", file=sys.stderr)
            process.kill()

    def _answers(self) -> bool:
        command = [*self.ssh("-o", "ConnectTimeout=5"), "true"]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        return done.returncode == 0

    def _noticed(self, process: Process | None) -> list[Process]:
        if process is None:
            raise BenchError(f"{self.name}: a process has ended")
        self._seen.add(process)
        return [process]


class Sshd(Road):
    """OpenSSH's own server, with a configuration of its own."""

    name = "sshd"

    def _start(self) -> None:
        program = find_sshd()
        if os.geteuid() == 0 and not Path("/run/sshd").exists():
            Path("/run/sshd").mkdir(mode=0o755)
            self._begun.callback(shutil.rmtree, "/run/sshd", ignore_errors=True)
        config = self.directory / "config"
        config.write_text(
            f"ListenAddress 127.0.0.1:{self.port}\n"
            f"HostKey {self.home.directory / 'host'}\n"
            f"AuthorizedKeysFile {self.home.authorized}\n"
            "UsePAM no\nStrictModes no\nPidFile none\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "PrintMotd no\nPrintLastLog no\nUseDNS no\n"
            f"SetEnv HOME={self.home.account}\n"
            f"Subsystem sftp {_find_sftp_server()}\n"
        )
        self._server = self.spawn([program, "-D", "-e", "-f", config])

    def processes(self, session_parent: int) -> dict[str, list[Process]]:
        """The listener and the processes of one connection."""
        pids = [self._server.pid]
        pid = session_parent
        while pid not in (0, 1, self._server.pid):
            pids.append(pid)
            pid = parent(pid)
        return {"sshd": [process for pid in pids if (process := Process.of(pid)) is not None]}

    def resident(self, session_parent: int) -> dict[str, list[Process]]:
        """The listener and the processes of all connections; no shells."""
        program = executable(self._server.pid)
        tree = [self._server.pid, *(it.pid for it in descendants(self._server.pid))]
        ours = [pid for pid in tree if executable(pid).startswith(os.path.dirname(program))]
        sshds = [pid for pid in ours if "sshd" in os.path.basename(executable(pid))]
        return {"sshd": [process for pid in sshds if (process := Process.of(pid)) is not None]}


class Gateway(Road):
    """conchkernel before a Jupyter server."""

    name = "gateway"
    options: tuple[str, ...] = ()

    def _start(self) -> None:
        self._jupyter, url = self._start_jupyter()
        file = self.directory / "url"
        file.touch(mode=0o600)
        file.write_text(url)
        command: list[str | Path] = [Path(sys.executable).parent / "twistd", "-n", "--pidfile="]
        command += ["conchkernel", "--jupyter-url-file", file, "--port", str(self.port)]
        command += ["--state-dir", self.directory / "state"]
        command += ["--authorized-keys", self.home.authorized, *self.options]
        self._server = self.spawn(command, cwd=_REPOSITORY)

    def _start_jupyter(self) -> tuple[subprocess.Popen[bytes], str]:
        token, port = secrets.token_hex(24), _free_port()
        names = ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
        environment = {
            **os.environ,
            **{name: str(self.directory / name.lower()) for name in names},
            "JUPYTER_TOKEN": token,
            "HOME": str(self.home.account),
            # What sshd takes from the account's entry.
            "SHELL": pwd.getpwuid(os.geteuid()).pw_shell,
        }
        command: list[str | Path] = [sys.executable, "-m", "jupyter_server", "--allow-root"]
        command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
        command += ["--ServerApp.port_retries=0", "--ServerApp.open_browser=False"]
        command += [f"--ServerApp.root_dir={self.directory}"]
        jupyter = self.spawn(command, "jupyter.log", env=environment)

        def answers() -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/api", headers={"Authorization": f"token {token}"})
                return connection.getresponse().status == 200
            except OSError:
                return False
            finally:
                connection.close()

        _wait(answers, jupyter, self.directory / "jupyter.log")
        return jupyter, f"http://127.0.0.1:{port}/?token={token}"

    def processes(self, session_parent: int) -> dict[str, list[Process]]:
        """Gateway, Jupyter server, kernel and agent."""
        kernels = children(self._jupyter.pid)
        for kernel in kernels:
            self._noticed(kernel)
        return {
            "gateway": self._noticed(Process.of(self._server.pid)),
            "server": self._noticed(Process.of(self._jupyter.pid)),
            "kernel": kernels,
            "agent": self._noticed(Process.of(session_parent)),
        }


class Loopback(Road):
    """The gateway without Jupyter: the agent is reached over a Unix socket."""

    name = "loopback"
    kind = "compiled"

    def _start(self) -> None:
        script = Path(__file__).with_name("loopback_gateway.py")
        command: list[str | Path] = [sys.executable, script, str(self.port)]
        command += [self.directory / "state", self.home.authorized, self.kind]
        environment = {**os.environ, "HOME": str(self.home.account)}
        self._server = self.spawn(command, cwd=_REPOSITORY, env=environment)

    def processes(self, session_parent: int) -> dict[str, list[Process]]:
        """Gateway and agent."""
        return {
            "gateway": self._noticed(Process.of(self._server.pid)),
            "agent": self._noticed(Process.of(session_parent)),
        }


class Pure(Loopback):
    """The same with the pump's pure twin in the agent."""

    name = "pure"
    kind = "pure"


ROADS: dict[str, type[Road]] = {road.name: road for road in (Sshd, Gateway, Loopback, Pure)}


def find_sshd() -> str:
    """Where sshd is, which must be called by its whole path."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"))
    found = shutil.which("sshd", path=path)
    if found is None:
        raise BenchError("there is no sshd to compare with; on Debian: apt install openssh-server")
    return found


def _find_sftp_server() -> str:
    """The program beside sshd; where it is not found, sshd's own, which is the same code."""
    places = ("/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh", "/usr/libexec")
    return shutil.which("sftp-server", path=os.pathsep.join(places)) or "internal-sftp"


def delayed(road: Road, milliseconds: float) -> Road:
    """The same server behind a line with that round trip."""
    other = copy.copy(road)
    other.port = _free_port()
    relay = other.spawn(
        [
            *(sys.executable, "-m", "bench.delay"),
            *(str(other.port), str(road.port), str(milliseconds / 2)),
        ],
        "relay.log",
        cwd=_REPOSITORY,
    )
    _wait(other._answers, relay, other.directory / "relay.log")
    return other


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(answers: Callable[[], bool], server: subprocess.Popen[bytes], log: Path) -> None:
    """Until a server answers."""
    deadline = time.monotonic() + _START_SECONDS
    while not answers():
        told = log.read_text(errors="replace")[-2000:]
        if server.poll() is not None:
            raise BenchError(f"{server.args!r} ended at once:\n{told}")
        if time.monotonic() > deadline:
            raise BenchError(f"{server.args!r} does not answer:\n{told}")
        time.sleep(0.1)
