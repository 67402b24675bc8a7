"""The ``conchkernel`` command, and its demo by the real ssh client."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from conchkernel import __version__
from conchkernel.cli import parser

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent

COMMAND = [sys.executable, "-m", "conchkernel.cli"]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A clean account whose temporary files are all in one place, which has a space in its name;
    nothing of it may remain."""
    (tmp_path / "tmp files").mkdir()
    yield {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path / "tmp files"),
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C.UTF-8",
    }
    # Every process that was started there has inherited the variable.
    left = [process for process in psutil.process_iter() if _belongs(process, tmp_path)]
    # A detached agent takes leave by itself, at our word.
    _, left = psutil.wait_procs(left, timeout=10)
    told = [shlex.join(process.cmdline()) for process in left]
    for process in left:
        process.kill()
    assert not told
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp files"]


def _belongs(process: psutil.Process, directory: Path) -> bool:
    try:
        return str(process.environ().get("TMPDIR", "")).startswith(str(directory))
    except psutil.Error:
        return False


def run(
    environment: dict[str, str], *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """``conchkernel`` with arguments, to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment,
        cwd=environment["HOME"],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def test_version(environment: dict[str, str]) -> None:
    """The version, on stdout."""
    assert run(environment, "--version").stdout == f"conchkernel {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["--nonsense"],
        ["demo", "--port", "65536"],
        ["demo", "--port", "ssh"],
        ["proxy"],
        ["doctor"],
        ["config-ssh"],
        ["config-ssh", "lab", "URL", "more"],
        ["config-ssh", "lab", "--linger", "0"],
        ["config-ssh", "lab", "--linger", "nan"],
        ["config-ssh", "lab", "--orphan-timeout", "soon"],
        ["config-ssh", "lab", "--jupyter-ca", "/nowhere"],
    ],
)
def test_wrongWords(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each is told in one line on stderr, with status 1."""
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    assert caught.value.code == 1
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("conchkernel")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("command", ["proxy", "doctor", "config-ssh"])
def test_noNames(environment: dict[str, str], command: str) -> None:
    """A word that cannot be a name: one line, and no file is touched."""
    words = ["--yes", "--", "../a", "-"] if command == "config-ssh" else ["--", "../a"]
    result = run(environment, command, *words)
    assert result.returncode == (255 if command == "proxy" else 1)
    assert result.stdout == ""
    assert "'../a' cannot be a name" in result.stderr
    assert result.stderr.count("\n") == 1


def test_demoRunsACommand(environment: dict[str, str]) -> None:
    """Its input, its two outputs and its status are the command's, and nothing else is said."""
    result = run(
        environment, "demo", "--run", "cat; echo trouble >&2; exit 7", stdin="through and back\n"
    )
    assert result.stdout == "through and back\n"
    assert result.stderr == "trouble\n"
    assert result.returncode == 7


@pytest.mark.parametrize("how", ["INT", "TERM", "HUP"])
def test_demoForAPerson(environment: dict[str, str], how: str) -> None:
    """The line that it prints works as it stands, with the key that it shows; a signal ends it
    and leaves nothing."""
    demo = subprocess.Popen(
        [*COMMAND, "demo", "--port", "0"],
        env=environment,
        cwd=environment["HOME"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert demo.stdout is not None
        line = demo.stdout.readline()
        words = shlex.split(line)
        assert words, demo.communicate()[1]
        assert words[0] == "ssh"
        done = subprocess.run(
            [*words, "pwd"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        assert done.stdout == f"{environment['HOME']}\n"
        (known,) = (word.partition("=")[2] for word in words if "UserKnownHostsFile" in word)
        shown = subprocess.run(
            ["ssh-keygen", "-lf", known.strip('"')], capture_output=True, text=True, check=True
        )
    finally:
        # As the terminal does it: everybody in the foreground gets Ctrl-C.
        os.killpg(demo.pid, getattr(signal, f"SIG{how}"))
        _, said = demo.communicate()
    assert shown.stdout.split()[1] in said
    assert demo.returncode == 0


def test_demoOnATakenPort(environment: dict[str, str]) -> None:
    """It says so, and what helps."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        result = run(environment, "demo", "--port", port)
    assert result.returncode == 1
    assert port in result.stderr
    assert "--port 0" in result.stderr
    assert "Traceback" not in result.stderr
