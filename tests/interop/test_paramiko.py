"""paramiko against the running gateway: the client of Ansible, Fabric and many scripts."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import threading
from typing import TYPE_CHECKING

import paramiko
import pytest

from .conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import GatewayHost, Host


@contextlib.contextmanager
def transport(host: Host, address: str = "127.0.0.1") -> Iterator[paramiko.Transport]:
    """A connection that is not logged in yet, from an address of this host."""
    connection = socket.create_connection(
        ("127.0.0.1", host.port), PATIENCE, source_address=(address, 0)
    )
    made = paramiko.Transport(connection)
    try:
        made.start_client(timeout=PATIENCE)
        yield made
    finally:
        made.close()
        made.join(PATIENCE)


@pytest.fixture
def client(host: Host) -> Iterator[paramiko.SSHClient]:
    """Logged in, as scripts do it."""
    made = paramiko.SSHClient()
    made.load_host_keys(str(host.home / f"{host.name}.known"))
    made.connect(
        "127.0.0.1",
        host.port,
        getpass.getuser(),
        key_filename=str(host.key),
        allow_agent=False,
        look_for_keys=False,
        timeout=PATIENCE,
    )
    yield made
    made.close()


def test_commands(client: paramiko.SSHClient) -> None:
    """stdout, stderr and status."""
    given, out, err = client.exec_command("cat; echo err >&2; exit 3", timeout=PATIENCE)
    given.write(bytes(range(256)))
    given.channel.shutdown_write()
    assert (out.read(), err.read()) == (bytes(range(256)), b"err\n")
    assert out.channel.recv_exit_status() == 3


def test_a_command_that_a_signal_ended(client: paramiko.SSHClient) -> None:
    """There is no status then, and paramiko says -1."""
    _, out, _ = client.exec_command("kill -TERM $$", timeout=PATIENCE)
    assert out.channel.recv_exit_status() == -1


def test_a_terminal(client: paramiko.SSHClient) -> None:
    """Its type and size, and a change of size that the shell sees."""
    channel = client.invoke_shell("vt220", 101, 33)
    channel.settimeout(PATIENCE)
    heard = b""
    channel.sendall(b"echo $TERM:$(stty size):\n")
    while b"vt220:33 101:" not in heard:
        heard += channel.recv(4096)
    channel.resize_pty(132, 50)
    channel.sendall(b"stty size; exit 6\n")
    while data := channel.recv(4096):
        heard += data
    assert b"50 132\r\n" in heard
    assert channel.recv_exit_status() == 6


def test_combined_output(client: paramiko.SSHClient) -> None:
    """stdout and stderr in the order of one stream each, none lost."""
    channel = client.get_transport().open_session()
    channel.set_combine_stderr(True)
    channel.exec_command("for i in $(seq 500); do echo out $i; echo err $i >&2; done")
    lines = b"".join(iter(lambda: channel.recv(65536), b"")).decode().splitlines()
    for word in ("out", "err"):
        wanted = [f"{word} {number}" for number in range(1, 501)]
        assert [line for line in lines if line.startswith(word)] == wanted
    assert channel.recv_exit_status() == 0


def test_environment(client: paramiko.SSHClient) -> None:
    """Its ``environment`` asks for no answer; accepted names are set all the same."""
    _, out, _ = client.exec_command(
        'echo "$LC_ALL|$MY_WORD|$OTHER"',
        environment={"LC_ALL": "C", "MY_WORD": "one", "OTHER": "x"},
        timeout=PATIENCE,
    )
    assert out.read() == b"C|one|\n"


def test_both_ways_at_once(client: paramiko.SSHClient) -> None:
    """3 MB through ``cat``, with paramiko's own windows."""
    data = os.urandom(3_000_000)
    given, out, _ = client.exec_command("cat", timeout=PATIENCE)

    def send() -> None:
        given.channel.sendall(data)
        given.channel.shutdown_write()

    sender = threading.Thread(target=send)
    sender.start()
    received = out.read()
    sender.join(PATIENCE)
    assert received == data
    assert out.channel.recv_exit_status() == 0


def test_channels_at_once(client: paramiko.SSHClient) -> None:
    """Eight commands on one connection."""
    ran = [client.exec_command(f"cat; exit {number}", timeout=PATIENCE) for number in range(8)]
    for number, (given, _, _) in reversed(list(enumerate(ran))):
        given.write(b"%d" % number)
        given.channel.shutdown_write()
    for number, (_, out, _) in enumerate(ran):
        assert (out.read(), out.channel.recv_exit_status()) == (b"%d" % number, number)


# --- who gets in -----------------------------------------------------------------------------
# Failures are held against an address; each test has its own.


def test_the_ways_in(gateway: GatewayHost) -> None:
    """``none`` is refused, and the refusal names what there is."""
    with transport(gateway, "127.0.3.1") as made:
        with pytest.raises(paramiko.BadAuthenticationType) as refused:
            made.auth_none("anybody")
    assert set(refused.value.allowed_types) == {"publickey", "password", "keyboard-interactive"}


def test_password(gateway: GatewayHost) -> None:
    """The token; after a wrong one there is another try."""
    with transport(gateway, "127.0.3.2") as made:
        with pytest.raises(paramiko.AuthenticationException):
            made.auth_password("anybody", gateway.jupyter.token + " ", fallback=False)
        assert not made.is_authenticated()
        made.auth_password("anybody", gateway.jupyter.token, fallback=False)
        assert made.is_authenticated()


def test_keyboard_interactive(gateway: GatewayHost) -> None:
    """One question, whose answer is not to be shown; the token is the answer."""
    asked = []

    def answer(title: str, text: str, prompts: list[tuple[str, bool]]) -> list[str]:
        asked.extend(prompts)
        return [gateway.jupyter.token for _ in prompts]

    with transport(gateway, "127.0.3.3") as made:
        made.auth_interactive("anybody", answer)
        assert made.is_authenticated()
    assert [shown for _, shown in asked] == [False]


def test_a_strangers_key(gateway: GatewayHost) -> None:
    """Refused."""
    stranger = paramiko.Ed25519Key.from_private_key_file(str(gateway.home / "stranger"))
    with transport(gateway, "127.0.3.4") as made:
        with pytest.raises(paramiko.AuthenticationException):
            made.auth_publickey("anybody", stranger)


def test_tries_are_limited(gateway: GatewayHost) -> None:
    """A guesser's connection is closed after a few tries, and others still get in."""
    tries = 0
    with transport(gateway, "127.0.3.5") as made:
        while made.is_active() and tries < 50:
            with contextlib.suppress(paramiko.SSHException, EOFError):
                made.auth_password("anybody", f"guess {tries}", fallback=False)
            tries += 1
    assert 1 < tries <= 6
    assert gateway.ssh("true").status == 0
