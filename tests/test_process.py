"""How a process ends, under each of Twisted's runners: one line on stderr, and status 1."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import LocalJupyter

ROOT = Path(__file__).parent.parent

#: A runner and what makes it this runner: foreground, daemon, and the other one.
RUNNERS = {
    "twistd -n": ["twistd", "-n", "--pidfile=twistd.pid"],
    "twistd": ["twistd", "--pidfile=twistd.pid", "--logfile=gateway.log"],
    "twist": ["twist", "--log-format=text"],
}


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> list[str]:
    """The command line of a runner, up to our name."""
    name, *options = RUNNERS[request.param]
    return [str(Path(sys.executable).with_name(name)), *options, "conchkernel"]


def environment(directory: Path) -> dict[str, str]:
    """A clean account."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C.UTF-8",
    }


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run in a clean account in ``directory``; the issue's 30 s are all it may take."""
    return subprocess.run(
        command,
        cwd=directory,
        env=environment(directory),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def assertFailedInOneLine(
    directory: Path, result: subprocess.CompletedProcess[str], *words: str
) -> None:
    """Status 1, one line with these words, no traceback, no token, nothing left running."""
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("conchkernel: ")
    for word in words:
        assert word in line
    said = result.stdout + result.stderr
    log = directory / "gateway.log"
    if log.exists():
        said += log.read_text()
    assert "Traceback" not in said
    assert "sesame" not in said
    assert not (directory / "twistd.pid").exists()


@contextmanager
def running(
    directory: Path, runner: list[str], url: str, until: str, *arguments: str
) -> Iterator[None]:
    """A gateway that has logged ``until``; ended by SIGTERM, it has said nothing wrong and left
    nothing behind."""
    log = directory / "gateway.log"
    daemon = "-n" not in runner and Path(runner[0]).name != "twist"
    with log.open("ab") as output:
        gateway = subprocess.Popen(
            [*runner, "--log-level", "debug", *arguments],
            cwd=directory,
            env={**environment(directory), "CONCHKERNEL_JUPYTER_URL": url},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    process = psutil.Process(gateway.pid)
    if daemon:
        assert gateway.wait() == 0, log.read_text()
        process = psutil.Process(int((directory / "twistd.pid").read_text()))
    try:
        while until not in log.read_text():
            assert process.is_running(), log.read_text()
            assert daemon or gateway.poll() is None, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(timeout=15)
    assert not (directory / "twistd.pid").exists()
    said = log.read_text()
    assert "sesame" not in said
    assert "Traceback" not in said


def closedPort() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_wrongValue(tmp_path: Path, runner: list[str]) -> None:
    """A value that cannot be is refused before anything is begun."""
    result = run(tmp_path, *runner, "--jupyter-url", "http://h/?token=sesame", "--port", "many")
    assertFailedInOneLine(tmp_path, result, "--port", "many")


def test_badEndpoint(tmp_path: Path, runner: list[str]) -> None:
    """So is one that only Twisted's endpoints can judge."""
    result = run(tmp_path, *runner, "--jupyter-url", "http://h/?token=sesame", "--listen", "what:1")
    assertFailedInOneLine(tmp_path, result, "--listen what:1")


def test_jupyterUnreachable(tmp_path: Path, runner: list[str]) -> None:
    """Where no Jupyter answers, the gateway does not start; not even its debug log has the
    token."""
    url = f"http://127.0.0.1:{closedPort()}/?token=sesame"
    result = run(
        tmp_path, *runner, "--jupyter-url", url, "--port", "0", "--log-level", "debug"
    )
    assertFailedInOneLine(tmp_path, result, "127.0.0.1")


@pytest.mark.parametrize("more", [[], ["--wait-for-jupyter"]])
def test_portTaken(tmp_path: Path, runner: list[str], more: list[str]) -> None:
    """A port that is taken is told as such, before Jupyter is asked anything, and waiting for
    Jupyter would not help."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        result = run(
            tmp_path,
            *runner,
            *("--jupyter-url", f"http://127.0.0.1:{closedPort()}/?token=sesame", "--port", port),
            *more,
        )
    assertFailedInOneLine(tmp_path, result, port, "in use")


def test_tokenRefused(tmp_path: Path, runner: list[str], localJupyter: LocalJupyter) -> None:
    """A token that Jupyter does not take is told as such."""
    url = f"{localJupyter.base}?token=not-sesame"
    result = run(tmp_path, *runner, "--jupyter-url", url, "--port", "0")
    assertFailedInOneLine(tmp_path, result, "token")
    assert not localJupyter.ask("api/kernels")


def test_runsUntilTold(tmp_path: Path, runner: list[str], localJupyter: LocalJupyter) -> None:
    """It runs with a kernel started ahead, until SIGTERM; then nothing is left, and nothing that
    was logged on the way has the token."""
    port = closedPort()
    with running(tmp_path, runner, localJupyter.url, "Ready", "--port", str(port)):
        assert len(localJupyter.ask("api/kernels")) == 1
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert client.recv(8) == b"SSH-2.0-"
    assert not localJupyter.ask("api/kernels")
    assert not localJupyter.ask("api/sessions")
    assert not list(localJupyter.root.iterdir())


def test_waitsForJupyter(tmp_path: Path, runner: list[str]) -> None:
    """With patience asked for, a Jupyter that is not there yet is no reason to end."""
    url = f"http://127.0.0.1:{closedPort()}/?token=sesame"
    with running(
        tmp_path, runner, url, "Waiting for Jupyter", "--port", "0", "--wait-for-jupyter"
    ):
        pass


@pytest.mark.parametrize("patience", [[], ["--wait-for-jupyter"]])
def test_toldToEndWhileItStarts(tmp_path: Path, patience: list[str]) -> None:
    """A signal while Jupyter is being asked is obeyed; that is no failure to be told."""
    twistd = [str(Path(sys.executable).with_name("twistd")), *RUNNERS["twistd -n"][1:]]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/?token=sesame"
        with running(
            tmp_path, [*twistd, "conchkernel"], url, "Listening", "--port", "0", *patience
        ):
            silent.settimeout(20)
            asked, _ = silent.accept()
        asked.close()
    assert "conchkernel: " not in (tmp_path / "gateway.log").read_text()


def test_helpAndVersion(tmp_path: Path, runner: list[str]) -> None:
    """Both are for reading: stdout, status 0."""
    shown = run(tmp_path, *runner, "--help")
    assert shown.returncode == 0
    assert "--jupyter-url" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert run(tmp_path, *runner, "--version").stdout.startswith("conchkernel ")


def test_failureLeavesAnEmbeddingProcessAlone(tmp_path: Path) -> None:
    """A service in another application tells its failure to who asks; the application goes on."""
    program = f"""
        from twisted.internet import reactor, task
        from conchkernel import tap

        options = tap.Options()
        options.parseOptions(
            ["--jupyter-url", "http://127.0.0.1:{closedPort()}/?token=sesame", "--port", "0"]
        )
        service = tap.makeService(options)

        def failed(failure):
            print("told", failure.type.__name__)
            return task.deferLater(reactor, 0.1, print, "alive")

        service.whenStarted().addErrback(failed).addCallback(lambda _: reactor.stop())
        service.startService()
        reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
        reactor.run()
        print("done")
    """
    result = run(tmp_path, sys.executable, "-c", textwrap.dedent(program))
    assert result.stdout.split("\n") == ["told JupyterUnreachable", "alive", "done", ""]
    assert result.returncode == 0


def test_logLevel(tmp_path: Path) -> None:
    """``twistd`` logs what is at least of the level that was asked for, wherever it logs to."""
    twistd = str(Path(sys.executable).with_name("twistd"))
    url = f"http://127.0.0.1:{closedPort()}/"
    for level, expected in (("info", True), ("critical", False)):
        arguments = ["conchkernel", "--jupyter-url", url, "--port", "0", "--log-level", level]
        result = run(tmp_path, twistd, "-n", "--pidfile=", *arguments)
        assert ("Listening on" in result.stdout) == expected
        run(tmp_path, twistd, "-n", "--pidfile=", "--logfile", f"{level}.log", *arguments)
        assert ("Listening on" in (tmp_path / f"{level}.log").read_text()) == expected
