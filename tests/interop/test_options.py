"""What the operator leaves to the defaults or chooses, as a client sees it."""

from __future__ import annotations

import socket
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from ..jupyters import start_jupyter
from .conftest import PATIENCE, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import GatewayHost


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to start in, with a name that is hard to pass on."""
    path = tmp_path_factory.mktemp("else where") / "d'ïr"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def chosen(
    client_home: Path, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayHost]:
    """A gateway with the account's own keys and state, another shell and another directory."""
    home = tmp_path_factory.mktemp("account")
    (home / ".ssh").mkdir(mode=0o700)
    key, stranger = ((client_home / f"{name}.pub").read_text() for name in ("key", "stranger"))
    # What an option forbids is not to be had by an older program that does not know it.
    (home / ".ssh" / "authorized_keys").write_text(f'{key}unheard-of="yes" {stranger}')
    options = ["--shell", "/bin/sh", "--working-dir", str(elsewhere)]
    options += ["--login-grace-time", "1", "--max-auth-tries", "2"]
    server = start_jupyter("current")
    try:
        with running("chosen", home, client_home, server, *options) as made:
            yield made
    finally:
        server.stop()


def test_the_accounts_own_keys(chosen: GatewayHost) -> None:
    """``~/.ssh/authorized_keys`` lets in; a line with an option that nobody knows does not, and
    the log says so."""
    assert chosen.ssh("true").status == 0
    words = chosen.words("-b127.0.4.1", "true")
    words[2] = str(chosen.home / "stranger.config")
    config = chosen.config.read_text().replace(str(chosen.key), f"{chosen.home}/stranger")
    (chosen.home / "stranger.config").write_text(config)
    refused = chosen.run(words)
    assert refused.status == 255
    assert "Permission denied" in refused.err
    assert "stranger' is not used: it has options" in chosen.log.read_text()


def test_the_host_key_in_its_place(chosen: GatewayHost) -> None:
    """Made at the first start below the account's home, readable by nobody else, and told."""
    state = chosen.log.parent / ".local" / "state" / "conchkernel"
    (key,) = [path for path in state.iterdir() if path.read_bytes().startswith(b"-----BEGIN")]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    known = chosen.home / "chosen.known"
    listed = subprocess.run(
        ["ssh-keygen", "-lf", known], capture_output=True, check=True, timeout=20, text=True
    )
    assert listed.stdout.split()[1] in chosen.log.read_text()


@pytest.mark.parametrize("how", ["-T", "-tt"])
def test_another_shell_and_directory(chosen: GatewayHost, elsewhere: Path, how: str) -> None:
    """Commands are run by that shell and start there."""
    ran = chosen.ssh(how, 'pwd; echo "$PWD"; echo "$SHELL"; readlink /proc/$$/exe; exit 3')
    here, told, shell, program = ran.text.splitlines()
    assert here == told == str(elsewhere)
    assert shell == "/bin/sh"
    assert not program.endswith("/bash")
    assert ran.status == 3


def test_another_login_shell(chosen: GatewayHost) -> None:
    """``-sh`` by its name."""
    ran = chosen.ssh("-T", given=b"echo $0; exit 4\n")
    assert (ran.status, ran.out) == (4, b"-sh\n")


def test_time_to_log_in(chosen: GatewayHost) -> None:
    """Who does not log in is not waited for."""
    with socket.create_connection(("127.0.0.1", chosen.port), PATIENCE) as silent:
        heard = b""
        while data := silent.recv(4096):
            heard += data
    assert heard.startswith(b"SSH-2.0-")


def test_tries_to_log_in(chosen: GatewayHost) -> None:
    """A client with more keys than tries is told that it has too many."""
    extra = []
    for number in range(3):
        path = chosen.home / f"extra{number}"
        command = ["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(path)]
        subprocess.run(command, check=True, timeout=20)
        extra.append(f"-oIdentityFile={path}")
    ran = chosen.ssh(*extra, "-b127.0.4.2", "true")
    assert ran.status == 255
    assert "too many authentication failures" in ran.err.lower()
