"""``ssh -A``: the client's own keys on the kernel's host; and ``ssh -X``, which goes without."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .conftest import PATIENCE, GatewayHost, free_port, quoted, read_until, running_sshd, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Host


@pytest.fixture(scope="module")
def keys(client_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of an ssh-agent with one key, which is in no file any more."""
    directory = tmp_path_factory.mktemp("keys")
    path, key = directory / "socket", directory / "key"
    with subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL) as agent:
        try:
            until(path.exists, "the ssh-agent listens")
            subprocess.run(
                ["ssh-keygen", "-qt", "ed25519", "-N", "", "-C", "mine", "-f", key], check=True
            )
            environment = {"SSH_AUTH_SOCK": str(path)}
            subprocess.run(["ssh-add", "-q", key], env=environment, check=True, timeout=20)
            key.unlink()
            yield path
        finally:
            agent.terminate()


@pytest.fixture(scope="module")
def inner(
    keys: Path, client_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """An sshd that opens with that key alone, and what a client over there knows of it."""
    authorized = keys.with_name("key.pub")
    with running_sshd(
        "inner",
        tmp_path_factory.mktemp("inner"),
        client_home,
        f"AuthorizedKeysFile {authorized}",
    ) as made:
        made.options = {
            "IdentityFile": "none",
            "IdentitiesOnly": "no",
            "IdentityAgent": "SSH_AUTH_SOCK",
        }
        made.write_config()
        yield made


def forwarding(keys: Path) -> tuple[str, str]:
    """The options of a client that has this ssh-agent and forwards it."""
    return (f"-oIdentityAgent={keys}", "-A")


def test_the_keys_are_there(host: Host, keys: Path) -> None:
    """A program over there sees what the client's ssh-agent holds; without ``-A`` nothing."""
    ran = host.ssh(*forwarding(keys), "ssh-add -l")
    assert ran.status == 0
    assert ran.text.split()[2] == "mine"
    assert host.ssh(f"-oIdentityAgent={keys}", 'echo "${SSH_AUTH_SOCK-none}"').text == "none\n"


@pytest.mark.parametrize("how", ["-T", "-tt"])
def test_the_socket_is_private_and_goes(host: Host, keys: Path, how: str) -> None:
    """Nobody else can reach it, and it is gone with its session."""
    modes = 'stat -c %a "$SSH_AUTH_SOCK" "${SSH_AUTH_SOCK%/*}"'
    command = f'echo "$SSH_AUTH_SOCK"; {modes}; echo "done"; read x'
    with host.started(*forwarding(keys), how, command) as client:
        said = read_until(client.stdout, b"done").decode().split()
        path, mode, directory_mode = said[:3]
        # sshd's own is 0755, in such a directory.
        assert (mode, directory_mode) == (
            "600" if isinstance(host, GatewayHost) else mode,
            "700",
        )
        assert Path(path).is_socket()
        client.stdin.write(b"\n")
        client.wait(PATIENCE)
    until(lambda: not Path(path).parent.exists(), "the socket is gone")


def test_a_client_that_is_killed_leaves_no_socket(host: Host, keys: Path) -> None:
    """Though its command lives on."""
    command = 'echo "$SSH_AUTH_SOCK" $$; exec sleep 1000 > /dev/null 2>&1'
    with host.started(*forwarding(keys), command) as client:
        path, pid = read_until(client.stdout, b"\n").decode().split()
        client.kill()
        until(lambda: not Path(path).parent.exists(), "the socket is gone")
    os.kill(int(pid), signal.SIGTERM)


def test_each_session_has_its_own(gateway: GatewayHost, keys: Path) -> None:
    """Also of one connection: the end of one is not the end of the other's."""
    command = 'echo "$SSH_AUTH_SOCK"; read x; ssh-add -l'
    with gateway.master(*forwarding(keys)) as master:
        with (
            gateway.started(master, *forwarding(keys), command) as one,
            gateway.started(master, *forwarding(keys), command) as other,
        ):
            paths = [read_until(each.stdout, b"\n") for each in (one, other)]
            assert paths[0] != paths[1]
            for each in (one, other):
                each.stdin.write(b"\n")
                assert b"mine" in read_until(each.stdout, b"\n")
                assert each.wait(PATIENCE) == 0


def test_git_with_the_users_own_keys(host: Host, inner: Host, keys: Path, tmp_path: Path) -> None:
    """A clone on the kernel's host of what only those keys open, and a push back."""
    bare, clone = tmp_path / "bare.git", tmp_path / "clone"
    ssh = quoted("ssh", "-F", inner.config)
    url = f"ssh://{inner.name}{bare}"
    script = f"""
set -e
export GIT_SSH_COMMAND={quoted(ssh)}
git init -q --bare -b main {bare}
git clone -q {url} {clone} 2> /dev/null
cd {clone}
git -c user.name=A -c user.email=a@example.com commit -q --allow-empty -m one
git push -q origin HEAD:main
git -C {bare} log --format=%s main
"""
    ran = host.ssh(*forwarding(keys), script)
    assert (ran.status, ran.text) == (0, "one\n"), ran.err
    without = host.ssh(f"GIT_SSH_COMMAND={quoted(ssh)} git clone -q {url} {clone}-2")
    assert without.status == 128
    assert "Permission denied" in without.err


def test_further_hops(host: Host, inner: Host, keys: Path) -> None:
    """The keys can be handed on."""
    hop = quoted("ssh", "-A", "-F", inner.config, inner.name, "ssh-add -l")
    ran = host.ssh(*forwarding(keys), hop)
    assert (ran.status, ran.text.split()[2:3]) == (0, ["mine"]), ran.err


def test_an_ssh_agent_that_is_gone(host: Host, tmp_path: Path) -> None:
    """Programs are told so, soon."""
    path = tmp_path / "socket"
    with subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL) as agent:
        until(path.exists, "the ssh-agent listens")
        with host.started(*forwarding(path), "read x; ssh-add -l 2>&1; echo $?") as client:
            until(lambda: client.poll() is None, "it runs")
            agent.terminate()
            agent.wait(PATIENCE)
            client.stdin.write(b"\n")
            assert b"agent" in read_until(client.stdout, b"2\n")


def test_x11_is_refused(host: Host) -> None:
    """The client warns, and the command runs without a display."""
    words = host.words("-oLogLevel=INFO", "-X", 'echo "${DISPLAY-none}"')
    ran = host.run(words, environment={"DISPLAY": f"127.0.0.1:{free_port() - 6000}"})
    assert (ran.status, ran.text) == (0, "none\n")
    assert "X11 forwarding request failed on channel 0" in ran.err
