"""``conchkernel config-ssh`` and then ``ssh NAME``: no daemon, by OpenSSH's own programs."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from ..jupyters import start_jupyter
from ..roads import Authority, proxying, terminating, withoutWebSockets
from .conftest import PATIENCE, Host, Ran, quoted, read_until, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..jupyters import RunningJupyter

CONCHKERNEL = Path(sys.executable).with_name("conchkernel")

#: Seconds of grace in these tests, and of the orphan rule; both are waited for.
LINGER = 2.0
ORPHAN_TIMEOUT = 4.0


@dataclass
class Lab(Host):
    """A host that ssh finds by what ``config-ssh`` has written."""

    jupyter: Any = None

    @property
    def state(self) -> Path:
        """Its state directory."""
        return self.home / "the state"

    @property
    def directory(self) -> Path:
        """What is kept for its name."""
        return self.state / "names" / self.name

    def conchkernel(
        self, *words: str, given: str = "", environment: dict[str, str] | None = None
    ) -> Ran:
        """Run our own command."""
        places = ["--state-dir", str(self.state), "--ssh-config", str(self.config)]
        command = [str(CONCHKERNEL), *words, *places]
        return self.run(command, given=given.encode(), environment=environment)

    def configure(self, url: str, *options: str, environment: dict[str, str] | None = None) -> Ran:
        """``config-ssh``, with the URL on stdin."""
        times = [f"--linger={LINGER}", f"--orphan-timeout={ORPHAN_TIMEOUT}"]
        words = ["config-ssh", self.name, "-", "--yes", *times, *options]
        return self.conchkernel(*words, given=url + "\n", environment=environment)

    def processes(self) -> list[psutil.Process]:
        """Every process of ours for this name, those that stay behind among them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if "conchkernel.cli" in words and str(self.state) in words:
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """Those that speak, or stay behind: each leads a session of its own."""
        found = []
        for process in self.processes():
            with contextlib.suppress(OSError):
                if os.getsid(process.pid) == process.pid:
                    found.append(process)
        return found

    def kernels(self) -> list[str]:
        """The ids of the server's kernels."""
        url = f"{self.jupyter.url}api/kernels?token={self.jupyter.token}"
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            return [kernel["id"] for kernel in json.load(answer)]

    def is_clean(self) -> bool:
        """Whether nothing of ours is left, here or there."""
        return not self.processes() and not self.kernels()


@pytest.fixture(scope="module")
def jupyter_of_lab() -> Iterator[RunningJupyter]:
    """A server of its own: all its kernels are the proxies'."""
    server = start_jupyter("current")
    yield server
    server.stop()


@pytest.fixture
def lab(jupyter_of_lab: RunningJupyter) -> Iterator[Lab]:
    """A home where nothing is known yet. In the end nothing may run any more."""
    home = Path(tempfile.mkdtemp(prefix="ck "))
    made = Lab("lab", 0, home, jupyter=jupyter_of_lab)
    try:
        yield made
        made.ssh("-Oexit")
        until(made.is_clean, "kernel and processes are gone")
    finally:
        for process in made.processes():
            process.kill()
        shutil.rmtree(home)


@pytest.fixture
def known(lab: Lab) -> Lab:
    """The same after ``config-ssh``, without a shared master unless a test wants it."""
    done = lab.configure(lab.jupyter.pasted)
    assert done.status == 0, done.err
    return lab


ALONE = ("-Snone", "-oControlMaster=no", "-oControlPersist=no")


def test_twoCommands(lab: Lab) -> None:
    """``config-ssh`` and ``ssh NAME``: nothing is asked, no key and no password; input, outputs
    and status are the command's; further ones go over the master."""
    done = lab.configure(lab.jupyter.pasted)
    assert done.status == 0
    assert done.err.endswith(f"Now: ssh -F {quoted(lab.config)} lab\n")
    first = lab.ssh("cat; echo trouble >&2; exit 7", given=b"through and back\n")
    assert first == (7, b"through and back\n", "trouble\n")
    (worker,) = lab.workers()
    assert lab.ssh("echo $SSH_CONNECTION").text == "UNKNOWN 65535 UNKNOWN 65535\n"
    assert lab.workers() == [worker]
    with lab.started("-tt", stdin=subprocess.PIPE) as shell:
        assert shell.stdin is not None
        shell.stdin.write(b"tty; exit 3\n")
        read_until(shell.stdout, b"/dev/pts/")
        assert shell.wait(PATIENCE) == 3


def test_theTokenIsNobodysToSee(known: Lab) -> None:
    """It is in one file that others cannot read: in no argument, and not in ssh's configuration."""
    token = known.jupyter.token
    assert known.ssh("true").status == 0
    for process in known.processes():
        assert not any(token in word for word in process.cmdline())
        assert not any(token in value for value in process.environ().values())
    told = known.run(["ssh", "-F", str(known.config), "-G", "lab"]).text
    (command,) = re.findall("^proxycommand (.*)$", told, re.MULTILINE)
    logged = known.ssh(*ALONE, f"-oProxyCommand={command} --verbose", "true")
    assert "logged in" in logged.err
    assert token not in logged.err
    assert token not in told
    holding = [
        path for path in known.home.rglob("*") if path.is_file() and token in path.read_text()
    ]
    assert holding == [known.directory / "settings.json"]
    assert holding[0].stat().st_mode & 0o777 == 0o600


def test_files(known: Lab, tmp_path: Path) -> None:
    """scp, sftp and git as with any host."""
    data = os.urandom(3 * 1024 * 1024)
    (tmp_path / "data").write_bytes(data)
    far = tmp_path / "far"
    far.mkdir()
    config = ["-F", str(known.config)]
    assert known.run(["scp", *config, str(tmp_path / "data"), f"lab:{far}/a"]).status == 0
    assert known.run(["scp", *config, f"lab:{far}/a", str(tmp_path / "back")]).status == 0
    assert (tmp_path / "back").read_bytes() == data
    batch = f"rename {quoted(far / 'a')} {quoted(far / 'b')}\n".encode()
    assert known.run(["sftp", *config, "-b", "-", "lab"], given=batch).status == 0
    assert (far / "b").read_bytes() == data
    ssh = f"ssh -F {quoted(known.config)}"
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
                "GIT_COMMITTER_EMAIL": "a@b", "GIT_SSH_COMMAND": ssh}  # fmt: skip
    assert known.ssh(f"git init -q --bare {quoted(far / 'repo')}").status == 0
    clone = tmp_path / "clone"
    for words in (
        ["clone", "-q", f"lab:{far / 'repo'}", str(clone)],
        ["-C", str(clone), "commit", "-q", "--allow-empty", "-m", "one"],
        ["-C", str(clone), "push", "-q", "origin", "HEAD"],
    ):
        done = known.run(["git", *words], environment=identity)
        assert done.status == 0, done.err


def test_mounted(known: Lab, tmp_path: Path) -> None:
    """sshfs, by the name alone."""
    far, here = tmp_path / "far", tmp_path / "here"
    far.mkdir()
    here.mkdir()
    words = ["sshfs", "-f", "-F", str(known.config), f"lab:{far}", str(here)]
    with subprocess.Popen(words, env=known.environment, stdin=subprocess.DEVNULL) as process:
        try:
            until(lambda: os.path.ismount(here), "it is mounted")
            (here / "file").write_bytes(b"through")
            assert (far / "file").read_bytes() == b"through"
        finally:
            subprocess.run(["fusermount", "-u", here], check=False, timeout=20)
            process.wait(PATIENCE)


def hostsIn(config: Path) -> list[str]:
    """As VS Code lists them: what is included, wherever that leads, and no patterns."""
    found = []
    for line in config.read_text().splitlines():
        word, *values = shlex.split(line, comments=True) or [""]
        if word.lower() == "include":
            found += [host for value in values for path in sorted(glob.glob(value))
                      for host in hostsIn(Path(path))]  # fmt: skip
        elif word.lower() == "host":
            found += [value for value in values if not set("*?!") & set(value)]
    return found


@pytest_twisted.ensureDeferred
async def test_programsThatReadTheConfiguration(known: Lab) -> None:
    """An editor finds the name in its list of hosts, and a client of its own, here asyncssh, gets
    in by the same lines: command, user and host key."""
    assert hostsIn(known.config) == ["lab"]
    program = (
        "import asyncio, asyncssh, sys\n"
        "async def main():\n"
        "    async with asyncssh.connect('lab', config=[sys.argv[1]]) as connection:\n"
        "        print((await connection.run('echo $((6 * 7))', check=True)).stdout, end='')\n"
        "asyncio.run(main())\n"
    )
    words = [sys.executable, "-c", program, str(known.config)]
    ran = await deferToThread(known.run, words)
    assert ran == (0, b"42\n", "")


def test_manyStartAtOnce(known: Lab) -> None:
    """All share one kernel and one agent, though each was the first; when the last has gone so do
    both."""
    count = 4
    running = [known.started(*ALONE, "echo $PPID; read word; echo $word") for _ in range(count)]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(one) for one in running]
        agents = {read_until(process.stdout, b"\n") for process in started}
        assert len(agents) == 1
        assert len(known.kernels()) == 1
        for number, process in enumerate(started):
            assert process.stdin is not None
            process.stdin.write(b"%d\n" % number)
            assert read_until(process.stdout, b"\n") == b"%d\n" % number
            assert process.wait(PATIENCE) == 0
    until(known.is_clean, "kernel and processes are gone")


def test_manyComeAndGo(known: Lab) -> None:
    """However arrivals meet departures, each command runs and one process at most stays behind."""

    def once(number: int) -> Ran:
        return known.ssh(*ALONE, f"echo {number}")

    with ThreadPoolExecutor(3) as pool:
        for number, ran in enumerate(pool.map(once, range(9))):
            assert ran == (0, b"%d\n" % number, "")
    until(lambda: len(known.workers()) <= 1, "one at most stays behind")


def test_whoComesWhileOneLingersKeepsTheKernel(known: Lab) -> None:
    """The one that stayed behind goes, and takes nothing with it."""
    assert known.ssh(*ALONE, "true").status == 0
    (lingering,) = known.workers()
    kernels = known.kernels()
    with known.started(*ALONE, "echo here; read word; echo $word") as process:
        read_until(process.stdout, b"here\n")
        until(lambda: not lingering.is_running(), "the one that stayed behind has gone")
        assert known.kernels() == kernels
        assert process.stdin is not None
        process.stdin.write(b"still\n")
        assert read_until(process.stdout, b"still\n")


def test_nobodyWaitsForTheOneThatLingers(known: Lab) -> None:
    """What ssh has started ends with the connection, and holds none of its descriptors, although
    the kernel is still there for who comes next."""
    with known.started(*ALONE, "-v", "echo here; read word", stderr=subprocess.PIPE) as process:
        read_until(process.stdout, b"here\n")
        (worker,) = known.workers()
        (front,) = [one for one in known.processes() if one != worker]
        assert front.parent() == psutil.Process(process.pid)
        assert process.stdin is not None
        process.stdin.write(b"end\n")
        # To their ends: no process holds them open.
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read() == b""
        process.stderr.read()
        process.wait(PATIENCE)
    until(lambda: not front.is_running(), "the front has ended")
    assert worker.is_running()
    assert len(known.kernels()) == 1


def test_theWorkerIsKilled(known: Lab) -> None:
    """ssh ends with an error, and the kernel goes by the orphan rule."""
    with known.started(*ALONE, "echo here; read word", stderr=subprocess.PIPE) as process:
        read_until(process.stdout, b"here\n")
        (worker,) = known.workers()
        worker.kill()
        assert process.wait(PATIENCE) == 255
    until(known.is_clean, "kernel and processes are gone")


def test_theFrontIsKilled(known: Lab) -> None:
    """Then the connection ends in order: what nobody knows does not go on."""
    with known.started(*ALONE, "echo here; read word", stderr=subprocess.PIPE) as process:
        read_until(process.stdout, b"here\n")
        (worker,) = known.workers()
        (front,) = [one for one in known.processes() if one != worker]
        front.kill()
        assert process.wait(PATIENCE) == 255
    until(known.is_clean, "kernel and processes are gone")


def test_bothAreKilled(known: Lab) -> None:
    """The kernel is left until somebody comes again, and goes with that one."""
    with known.started(*ALONE, "echo here; read word", stderr=subprocess.PIPE) as process:
        read_until(process.stdout, b"here\n")
        for one in known.processes():
            one.send_signal(signal.SIGSTOP)
        for one in known.processes():
            one.kill()
        assert process.wait(PATIENCE) == 255
    assert len(known.kernels()) == 1
    assert known.ssh(*ALONE, "echo again") == (0, b"again\n", "")
    until(known.is_clean, "kernel and processes are gone")


def test_askedToEnd(known: Lab) -> None:
    """SIGTERM: at once, tidily, and ssh says why."""
    with known.started(*ALONE, "echo here; read word", stderr=subprocess.PIPE) as process:
        read_until(process.stdout, b"here\n")
        (worker,) = known.workers()
        worker.terminate()
        assert process.stderr is not None
        assert b"conchkernel proxy has been ended" in process.stderr.read()
        assert process.wait(PATIENCE) == 255
    until(known.is_clean, "kernel and processes are gone")
    assert known.ssh("true").status == 0
    (worker,) = known.workers()
    worker.terminate()
    until(known.is_clean, "kernel and processes are gone")


def waitingBetween(one: int, other: int) -> int:
    """How many bytes are in the pipes that two processes share."""

    def pipes(pid: int) -> dict[str, Path]:
        fds = {fd: os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        return {link: fd for fd, link in fds.items() if link.startswith("pipe:")}

    count = 0
    for link in pipes(one).keys() & pipes(other).keys():
        fd = os.open(pipes(one)[link], os.O_RDONLY | os.O_NONBLOCK)
        count += int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
        os.close(fd)
    return count


def test_endedWhileSSHTakesNothing(known: Lab) -> None:
    """Whoever has stopped ssh amid a flood does not keep the worker from ending, nor the kernel."""
    with known.started(*ALONE, "yes") as process:
        read_until(process.stdout, b"y\n")
        (worker,) = known.workers()
        process.send_signal(signal.SIGSTOP)
        until(lambda: waitingBetween(process.pid, worker.pid) >= 64 * 1024, "the pipe is full")
        worker.terminate()
        until(known.is_clean, "kernel and processes are gone")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"url": "http://127.0.0.1:1/"}, "nothing listens at 127.0.0.1:1"),
        ({"token": "wrong"}, "the token is wrong; copy the URL again"),
        ({"kernelName": "fortran"}, "no kernel named fortran"),
    ],
)
def test_whatIsWrongIsSaidBySSH(known: Lab, change: dict[str, str], sentence: str) -> None:
    """In one line of the proxy's, and as ssh's own reason where there is no place for that one;
    status 255, no traceback, and nothing on stdout."""
    damage(known, change)
    alone = known.ssh(*ALONE, "true")
    assert (alone.status, alone.out) == (255, b"")
    first, *others = alone.err.splitlines()
    assert first.startswith("conchkernel proxy lab: ")
    assert sentence in first
    assert any("Received disconnect" in line and sentence in line for line in others)
    shared = known.ssh("true")
    assert (shared.status, shared.out) == (255, b"")
    assert sentence in shared.err
    assert "Traceback" not in alone.err + shared.err


def openToOthers(lab: Lab) -> None:
    """What holds the token can be read by everybody."""
    (lab.directory / "settings.json").chmod(0o644)


def noSettings(lab: Lab) -> None:
    """They are gone."""
    (lab.directory / "settings.json").unlink()


def noHostKey(lab: Lab) -> None:
    """It is gone."""
    (lab.directory / "ssh_host_ed25519_key").unlink()


def noAuthorities(lab: Lab) -> None:
    """The file that has been named is gone."""
    damage(lab, {"jupyterCA": "/nowhere/ca.pem"})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (openToOthers, "run: chmod 600"),
        (noSettings, "run: conchkernel config-ssh lab URL"),
        (noHostKey, "Run: conchkernel config-ssh lab URL"),
        (noAuthorities, "/nowhere/ca.pem"),
    ],
)
def test_whatCannotBeUsedIsSaidBySSH(
    known: Lab, spoil: Callable[[Lab], None], sentence: str
) -> None:
    """Also where there is nothing to be encrypted with, and by doctor."""
    spoil(known)
    shared = known.ssh("true")
    assert (shared.status, shared.out) == (255, b"")
    assert shared.err.startswith("Received disconnect from ")
    assert sentence in shared.err
    alone = known.ssh(*ALONE, "true")
    assert alone.err.startswith("conchkernel proxy lab: ")
    assert sentence in alone.err
    told = known.conchkernel("doctor", "lab")
    assert told.text.splitlines()[-1].startswith("NO ")
    assert sentence.lower() in told.text.splitlines()[-1].lower()


def damage(lab: Lab, change: dict[str, str]) -> None:
    """Change what is kept of a server."""
    path = lab.directory / "settings.json"
    settings = json.loads(path.read_text())
    if "token" in change:
        change = {"url": f"{lab.jupyter.url}?token={change['token']}"}
    path.write_text(json.dumps({**settings, **change}))


def test_withoutAServer(lab: Lab, jupyter_of_lab: RunningJupyter) -> None:
    """``config-ssh`` keeps nothing of a URL that does not work."""
    for url, sentence in (
        ("http://127.0.0.1:1/", "nothing listens"),
        (f"{jupyter_of_lab.url}?token=wrong", "the token is wrong"),
        ("ftp://example.org", "must begin with http"),
        ("", "is empty"),
    ):
        done = lab.configure(url)
        assert (done.status, done.out) == (1, b"")
        assert sentence in done.err
        assert done.err.count("\n") == 1
    assert list(lab.home.rglob("*")) == []


def test_removed(known: Lab) -> None:
    """Every byte of a configuration comes back, while others of our names keep what they need; a
    process that still runs for the name leaves nothing behind, and none waits for who comes."""
    assert known.configure(known.jupyter.pasted, "--linger=600").status == 0
    assert known.ssh("true").status == 0
    second = known.run(
        [str(CONCHKERNEL), "config-ssh", "other", "-", "--yes", "--state-dir", str(known.state),
         "--ssh-config", str(known.config)],
        given=known.jupyter.pasted.encode(),
    )  # fmt: skip
    assert second.status == 0, second.err
    assert known.conchkernel("config-ssh", "lab", "--remove", "--yes").status == 0
    assert not known.directory.exists()
    assert b"Include" in known.config.read_bytes()
    told = known.run(["ssh", "-F", str(known.config), "-G", "other"])
    assert "conchkernel.cli" in told.text
    # The shared connection, which nobody used, has ended too.
    until(known.is_clean, "kernel and processes are gone")
    gone = known.run(
        [str(CONCHKERNEL), "config-ssh", "other", "--remove", "--yes", "--state-dir",
         str(known.state), "--ssh-config", str(known.config)]
    )  # fmt: skip
    assert gone.status == 0, gone.err
    assert not known.config.exists()
    known.config.touch()


def test_anotherURL(known: Lab) -> None:
    """Whoever comes after ``config-ssh`` is on the new server, though connections to the old one
    are shared; who was there before stays to the end. What was not said again is as it was."""
    other = start_jupyter("current")
    try:
        with known.started("echo here; read word; echo $word") as before:
            read_until(before.stdout, b"here\n")
            done = known.configure(other.pasted, "--kernel-name=python3")
            assert done.status == 0, done.err
            assert known.ssh("pwd") == (0, f"{other.root_dir}\n".encode(), "")
            assert before.stdin is not None
            before.stdin.write(b"still\n")
            read_until(before.stdout, b"still\n")
            assert before.wait(PATIENCE) == 0
        until(lambda: not known.kernels(), "the old kernel is gone")
        again = [str(CONCHKERNEL), "config-ssh", "lab", "-", "--yes", "--state-dir",
                 str(known.state), "--ssh-config", str(known.config)]  # fmt: skip
        given = known.jupyter.pasted.encode()
        assert known.run(again, given=given).status == 0
        kept = json.loads((known.directory / "settings.json").read_text())
        times = (kept["linger"], kept["orphanTimeout"])
        assert (kept["kernelName"], times) == ("python3", (LINGER, ORPHAN_TIMEOUT))
        assert known.run([*again, "--kernel-name="], given=given).status == 0
        assert json.loads((known.directory / "settings.json").read_text())["kernelName"] is None
        until(known.is_clean, "kernel and processes are gone")
    finally:
        other.stop()


def test_byTheEnvironment(lab: Lab) -> None:
    """The URL may come from there; without any the command says where from it can."""
    words = ("config-ssh", "lab", "--yes")
    nothing = lab.conchkernel(*words)
    assert (nothing.status, nothing.err.count("\n")) == (1, 1)
    assert "CONCHKERNEL_JUPYTER_URL" in nothing.err
    url = {"CONCHKERNEL_JUPYTER_URL": lab.jupyter.pasted}
    assert lab.conchkernel(*words, f"--linger={LINGER}", environment=url).status == 0
    assert lab.ssh("echo it works") == (0, b"it works\n", "")


def asked(lab: Lab, *answers: tuple[bytes, bytes]) -> tuple[int, bytes]:
    """``config-ssh lab`` on a terminal, with what is typed at which prompt."""
    words = [str(CONCHKERNEL), "config-ssh", "lab", f"--linger={LINGER}"]
    words += ["--state-dir", str(lab.state), "--ssh-config", str(lab.config)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(words[0], words, lab.environment)
    said = b""
    for prompt, answer in answers:
        said += read_until(terminal, prompt)
        os.write(terminal, answer + b"\n")
    with contextlib.suppress(OSError):  # how a terminal ends
        while more := os.read(terminal, 65536):
            said += more
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def test_asking(lab: Lab) -> None:
    """Without a URL it is asked for and not shown; without a yes nothing is changed."""
    url = (b"not shown): ", lab.jupyter.pasted.encode())
    status, said = asked(lab, url, (b"[y/N] ", b"no"))
    assert status == 1
    assert b"+Host lab" in said
    assert lab.jupyter.token.encode() not in said
    assert not lab.config.exists()
    assert not lab.directory.exists()
    status, said = asked(lab, url, (b"[y/N] ", b"y"))
    assert status == 0, said
    assert lab.ssh("echo it works") == (0, b"it works\n", "")
    lab.ssh("-Oexit")
    unasked = lab.conchkernel("config-ssh", "lab", "-", given=lab.jupyter.pasted)
    assert (unasked.status, "--yes" in unasked.err) == (1, True)


def test_tunnels(known: Lab) -> None:
    """A port of the kernel's host, through the pipe."""
    port = known.jupyter.url.rsplit(":", 1)[1].strip("/")
    with known.started(*ALONE, f"-W127.0.0.1:{port}") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"GET /api HTTP/1.0\r\n\r\n")
        # Our end stays open until then: to Jupyter an end of what comes is the client's going,
        # and unless it has answered by then it does not.
        assert b'"version"' in process.stdout.read()
        assert process.wait(PATIENCE) == 0


def test_aConfigurationWithHosts(lab: Lab) -> None:
    """What is there stays as it is, behind the Include and through a link; what is to change is
    shown; a name that is taken is refused."""
    before = b"Host lab2\n  Port 3\nHost *\n  User eve\n  ControlMaster no"
    real = lab.home / "dotfiles"
    real.write_bytes(before)
    real.chmod(0o644)
    lab.config.symlink_to(real)
    done = lab.configure(lab.jupyter.pasted)
    assert done.status == 0
    assert "+Include" in done.text
    assert "+Host lab" in done.text
    assert lab.config.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o644
    assert lab.ssh("echo it works") == (0, b"it works\n", "")
    lab.ssh("-Oexit")
    again = lab.configure(lab.jupyter.pasted)
    assert (again.status, again.out) == (0, b"")
    assert lab.conchkernel("config-ssh", "lab", "--remove", "--yes").status == 0
    assert real.read_bytes() == before
    assert lab.config.is_symlink()
    taken = lab.conchkernel("config-ssh", "lab2", "-", "--yes", given=lab.jupyter.pasted)
    assert taken.status == 1
    assert "Host lab2 already" in taken.err
    assert real.read_bytes() == before


def test_byHand(known: Lab) -> None:
    """Somebody who types it learns what it is for, and a name that is not there is told."""
    words = [str(CONCHKERNEL), "proxy", "--state-dir", str(known.state)]
    for name, sentence in (("nowhere", "no Jupyter server is called nowhere"), ("-", "a name")):
        done = known.run([*words, "--", name])
        assert done.status == 255
        assert sentence in done.err
        assert done.err.count("\n") == 1
    # Nobody there, or not even descriptors: that is no error of anything's.
    for closed in ("<&-", ">&-", "<&- >&-", "<&- >&- 2>&-", "</dev/null >/dev/null"):
        done = known.run(["/bin/sh", "-c", f'exec "$@" lab {closed}', "sh", *words])
        assert (done.status, done.err) == (0, "")
    master, slave = os.openpty()
    typed = subprocess.run(
        [*words, "lab"], stdin=slave, capture_output=True, timeout=PATIENCE, check=False
    )
    os.close(master)
    os.close(slave)
    assert typed.returncode == 255
    assert b"type: ssh lab" in typed.stderr


def test_doctor(known: Lab) -> None:
    """Each hop works; nothing is left that was not there before."""
    done = known.conchkernel("doctor", "lab")
    assert done.status == 0
    hops = [line.split()[:2] for line in done.text.splitlines()]
    before = ["name", "ssh", "URL", "server", "TLS", "Jupyter", "token", "kernels"]
    assert hops == [["ok", name] for name in [*before, "kernel", "carrier", "echo"]]
    assert "ms from a key to its echo" in done.text
    assert known.is_clean()


@pytest.mark.parametrize(
    ("change", "hop", "sentence"),
    [
        ({"url": "http://127.0.0.1:1/"}, "server", "is the Jupyter server running?"),
        ({"url": "http://nowhere.invalid/"}, "server", "no host is called nowhere.invalid"),
        ({"url": "ftp://x"}, "URL", "must begin with http"),
        ({"token": "wrong"}, "token", "the token is wrong; copy the URL again"),
        ({"kernelName": "fortran"}, "kernel", "no kernel named fortran"),
        ({"jupyterCA": "/dev/null"}, "TLS", "no PEM file"),
    ],
)
def test_doctorFinds(known: Lab, change: dict[str, str], hop: str, sentence: str) -> None:
    """The first hop that does not work comes last, with what to do; status 1."""
    damage(known, change)
    done = known.conchkernel("doctor", "lab")
    assert (done.status, done.err) == (1, "")
    *before, last = done.text.splitlines()
    assert all(line.startswith("ok ") for line in before)
    assert last.split()[:2] == ["NO", hop]
    assert sentence in last


def test_doctorOnSSH(known: Lab) -> None:
    """A name that is not known, a configuration that is not ours, and one that ssh refuses."""
    unknown = known.conchkernel("doctor", "nowhere")
    assert unknown.text.startswith("NO  name")
    before = known.config.read_bytes()
    for content, sentence in ((b"", "does not lead lab to us"), (b"Nonsense 1\n", "does not take")):
        known.config.write_bytes(content)
        done = known.conchkernel("doctor", "lab")
        assert done.status == 1
        assert sentence in done.text.splitlines()[-1]
        assert done.text.splitlines()[-1].startswith("NO  ssh")
    known.config.write_bytes(before)


def test_doctorWhereSomethingElseAnswers(known: Lab) -> None:
    """A web server that is not Jupyter's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            damage(known, {"url": f"http://127.0.0.1:{server.server_address[1]}/"})
            done = known.conchkernel("doctor", "lab")
        finally:
            server.shutdown()
            thread.join()
    assert done.text.splitlines()[-1].startswith("NO  Jupyter")
    assert "not as a Jupyter server" in done.text


@pytest_twisted.ensureDeferred
async def test_doctorWhereNoWebSocketPasses(known: Lab) -> None:
    """As behind many a proxy: Jupyter answers, and no kernel can be talked to."""
    plain = int(known.jupyter.url.rsplit(":", 1)[1].strip("/"))
    async with withoutWebSockets(reactor, plain) as port:
        damage(known, {"url": f"http://127.0.0.1:{port}/?token={known.jupyter.token}"})
        told = await deferToThread(known.conchkernel, "doctor", "lab")
        *before, last = told.text.splitlines()
        assert all(line.startswith("ok ") for line in before)
        assert before[-1].split()[1] == "kernels"
        assert last.startswith("NO ")
        assert "WebSocket" in last
        assert told.status == 1
        await deferToThread(until, known.is_clean, "kernel and processes are gone")


@pytest_twisted.ensureDeferred
async def test_throughAProxyAndTLS(known: Lab, tmp_path: Path) -> None:
    """HTTPS_PROXY is honoured by ``config-ssh``, ``ssh`` and ``doctor``; a certificate of the
    network's own authority needs its file, and doctor says so."""
    authority = Authority(tmp_path)
    plain = int(known.jupyter.url.rsplit(":", 1)[1].strip("/"))
    async with (
        terminating(reactor, authority.certify("jupyter.test"), plain) as port,
        proxying(reactor) as (proxy, proxyPort),
    ):
        url = f"https://jupyter.test:{port}/?token={known.jupyter.token}"
        road = {"HTTPS_PROXY": f"http://127.0.0.1:{proxyPort}"}
        refused = await deferToThread(known.configure, url, environment=road)
        assert refused.status == 1
        assert "--jupyter-ca" in refused.err
        option = f"--jupyter-ca={authority.file}"
        done = await deferToThread(known.configure, url, option, environment=road)
        assert done.status == 0, done.err
        words = known.words(*ALONE, "echo through")
        ran = await deferToThread(known.run, words, environment=road)
        assert ran == (0, b"through\n", "")
        told = await deferToThread(known.conchkernel, "doctor", "lab", environment=road)
        assert told.status == 0, told.text
        assert f"by way of 127.0.0.1:{proxyPort}" in told.text
        assert any("jupyter.test" in head for head in proxy.heard)
        damage(known, {"jupyterCA": ""})
        told = await deferToThread(known.conchkernel, "doctor", "lab", environment=road)
        assert told.text.splitlines()[-1].startswith("NO  TLS")
        assert "--jupyter-ca" in told.text
        await deferToThread(until, known.is_clean, "kernel and processes are gone")
