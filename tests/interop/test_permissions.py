"""What the operator and a key's options forbid: what the user is told, and what the log says.

sshd runs with the same words, and refuses the same things.
"""

from __future__ import annotations

import re
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from ..jupyters import start_jupyter
from ..peers import Peer, answer, dial, echo, exchange, received
from .conftest import PATIENCE, GatewayHost, free_port, running, running_sshd, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ..jupyters import RunningJupyter
    from .conftest import Host

#: Lines of sshd_config; ``{open}`` is where a server is, ``{listen}`` a free port.
POLICIES: dict[str, dict[str, str]] = {
    "named": {
        "PermitOpen": "127.0.0.1:{open}",
        "PermitListen": "{listen}",
        "AllowStreamLocalForwarding": "no",
        "AllowAgentForwarding": "no",
    },
    "local": {"AllowTcpForwarding": "local", "AllowStreamLocalForwarding": "local"},
    "remote": {
        "AllowTcpForwarding": "remote",
        "AllowStreamLocalForwarding": "remote",
        "GatewayPorts": "yes",
    },
    "keys": {"GatewayPorts": "clientspecified"},
}
#: Options of a key in authorized_keys, by the key's name.
KEYS = {
    "bare": "",
    "restricted": "restrict ",
    "forwards": "restrict,port-forwarding ",
    "opens": 'permitopen="127.0.0.1:{open}",permitlisten="localhost:{listen}" ',
    "no-forwarding": "no-port-forwarding,no-agent-forwarding ",
    "no-pty": "no-pty ",
}


@pytest.fixture(scope="module")
def served() -> Iterator[Peer]:
    """A server that answers with a digest."""
    peer = Peer(answer)
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def ports(served: Peer) -> dict[str, int]:
    """Those that policies name."""
    return {"open": served.port, "listen": free_port()}


@pytest.fixture(scope="module")
def jupyter_of_policies() -> Iterator[RunningJupyter]:
    """A server of its own."""
    server = start_jupyter("current")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def authorized(
    client_home: Path, ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An authorized_keys file with a line for each of :data:`KEYS`."""
    path = tmp_path_factory.mktemp("authorized") / "keys"
    lines = []
    for name, options in KEYS.items():
        key = client_home / name
        subprocess.run(
            ["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", key], check=True, timeout=20
        )
        lines.append(options.format(**ports) + key.with_suffix(".pub").read_text())
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def policed(
    request: pytest.FixtureRequest,
    client_home: Path,
    ports: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Host]:
    """sshd or a gateway under a policy."""
    kind, policy = request.param
    directory = tmp_path_factory.mktemp("policed")
    words = {name: value.format(**ports) for name, value in POLICIES[policy].items()}
    keys = client_home / "key.pub"
    if policy == "keys":
        keys = request.getfixturevalue("authorized")
    if kind == "sshd":
        lines = [f"AuthorizedKeysFile {keys}"]
        lines += [f"{name} {value}" for name, value in words.items()]
        with running_sshd("policed-sshd", directory, client_home, *lines) as made:
            yield made
        return
    options = ["--authorized-keys", str(keys)]
    for name, value in words.items():
        options += [re.sub("([A-Z])", r"-\1", name).lower().replace("-", "--", 1), value]
    jupyter = request.getfixturevalue("jupyter_of_policies")
    with running("policed-gateway", directory, client_home, jupyter, *options) as gateway:
        if policy == "keys":
            gateway.options["IdentityFile"] = str(client_home / "bare")
            gateway.write_config()
        yield gateway


def under(policy: str) -> Callable[..., object]:
    """Run a test under a policy, at sshd and at a gateway."""
    return pytest.mark.parametrize(
        "policed", [(kind, policy) for kind in ("sshd", "gateway")], ids=lambda one: one[0],
        indirect=True,
    )  # fmt: skip


def tells(host: Host, words: list[str], why: str) -> str:
    """Run a client whose wish is refused; what it prints. The gateway's log says why."""
    before = len(host.log.read_text()) if isinstance(host, GatewayHost) else 0
    ran = host.run(host.words("-oLogLevel=INFO", *words))
    assert ran.status == 255
    if isinstance(host, GatewayHost):
        until(lambda: why in host.log.read_text()[before:], f"the log says: {why}")
    return ran.err


def opens(host: Host, *words: str) -> bool:
    """Whether a connection through the host stands, from one end to the other."""
    ran = host.ssh(*words, given=b"all")
    return ran.status == 0 and len(ran.out) == 32


def refuses_to_open(host: Host, port: int, why: str, *words: str) -> None:
    """``-W`` fails by policy, and says so to the user."""
    said = tells(host, [*words, f"-W127.0.0.1:{port}"], why)
    assert "open failed: administratively prohibited: " in said
    # sshd has one sentence for everything.
    assert ("open failed\r\n" if not isinstance(host, GatewayHost) else why) in said


def refuses_to_listen(host: Host, where: str, why: str, *words: str) -> None:
    """``-R`` fails; the protocol has no reason to give, and so the log has it."""
    words = (*words, "-oExitOnForwardFailure=yes", f"-R{where}:127.0.0.1:1", "true")
    said = tells(host, list(words), why)
    port = where.rpartition(":")[2]
    assert "remote port forwarding failed for listen p" in said
    assert port in said


def listens(host: Host, where: str, address: tuple[str, int], *words: str) -> bool:
    """Whether ``-R`` stands; who connects at ``address`` is led back."""
    peer = Peer(lambda connection: connection.sendall(b"here"))
    spec = f"-R{where}:127.0.0.1:{peer.port}"
    try:
        with host.master(*words) as master:
            made = host.ssh(master, "-Oforward", spec)
            assert (made.status, made.err) == (0, "")
            try:
                with socket.create_connection(address, PATIENCE) as connection:
                    return received(connection) == b"here"
            except ConnectionRefusedError:
                return False
    finally:
        peer.close()


@under("named")
def test_only_what_is_named(policed: Host, ports: dict[str, int]) -> None:
    """PermitOpen and PermitListen: one place each; every other is refused by its name."""
    assert opens(policed, f"-W127.0.0.1:{ports['open']}")
    listen, other = ports["listen"], free_port()
    assert listens(policed, f"{listen}", ("127.0.0.1", listen))
    assert listens(policed, f"127.0.0.1:{listen}", ("127.0.0.1", listen))
    why = f"forwarding to 127.0.0.1 port {other} is not permitted"
    refuses_to_open(policed, other, why)
    refuses_to_listen(policed, f"{other}", f"listening at localhost port {other} is not permitted")


@under("named")
def test_neither_sockets_nor_an_ssh_agent(policed: Host, tmp_path: Path) -> None:
    """They are refused; commands run all the same."""
    assert not reaches_a_socket(policed, tmp_path)
    refuses_to_listen(policed, f"{tmp_path}/back", "socket forwarding is not permitted")
    with subprocess.Popen(
        ["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.DEVNULL
    ) as agent:
        until((tmp_path / "agent").exists, "the ssh-agent listens")
        words = (f"-oIdentityAgent={tmp_path}/agent", "-A", 'echo "${SSH_AUTH_SOCK-none}"')
        ran = policed.ssh(*words)
        agent.terminate()
    assert (ran.status, ran.text) == (0, "none\n")
    if isinstance(policed, GatewayHost):
        assert "agent forwarding is not permitted" in policed.log.read_text()


def reaches_a_socket(host: Host, tmp_path: Path, *words: str) -> bool:
    """Whether ``-L`` leads to a Unix socket over there."""
    peer = Peer(echo, str(tmp_path / "there"), socket.AF_UNIX)
    try:
        with host.master(*words) as master:
            assert host.ssh(master, "-Oforward", f"-L{tmp_path}/here:{tmp_path}/there").status == 0
            with dial(tmp_path / "here") as connection:
                try:
                    return exchange(connection, b"data") == b"data"
                except OSError:
                    return False
    finally:
        peer.close()


@under("local")
def test_one_direction(policed: Host, ports: dict[str, int], tmp_path: Path) -> None:
    """``local`` is ``-L`` and its like."""
    assert opens(policed, f"-W127.0.0.1:{ports['open']}")
    assert reaches_a_socket(policed, tmp_path)
    refuses_to_listen(policed, f"{free_port()}", "TCP forwarding is not permitted")
    refuses_to_listen(policed, f"{tmp_path}/back", "socket forwarding is not permitted")


@under("remote")
def test_the_other_direction(policed: Host, ports: dict[str, int], tmp_path: Path) -> None:
    """``remote`` is ``-R``; with GatewayPorts it listens on every address, wherever the client
    wants it."""
    refuses_to_open(policed, ports["open"], "TCP forwarding is not permitted")
    assert not reaches_a_socket(policed, tmp_path)
    port = free_port()
    assert listens(policed, f"localhost:{port}", ("127.0.0.2", port))
    with policed.forwarding(f"-R{tmp_path}/back:127.0.0.1:{ports['open']}"):
        with dial(tmp_path / "back") as connection:
            assert len(exchange(connection, b"data")) == 32


@under("keys")
def test_where_the_client_says(policed: Host, client_home: Path) -> None:
    """GatewayPorts clientspecified: there and nowhere else."""
    port = free_port()
    key = f"-i{client_home}/bare"
    assert listens(policed, f"127.0.0.2:{port}", ("127.0.0.2", port), key)
    assert not listens(policed, f"127.0.0.2:{port}", ("127.0.0.1", port), key)
    assert listens(policed, f"*:{port}", ("127.0.0.3", port), key)


@under("keys")
def test_a_restricted_key(policed: Host, ports: dict[str, int], client_home: Path) -> None:
    """``restrict``: a command and nothing else; what follows it gives something back."""
    key = f"-i{client_home}/restricted"
    assert policed.ssh(key, "echo in") == (0, b"in\n", "")
    refuses_to_open(policed, ports["open"], "TCP forwarding is not permitted", key)
    refuses_to_listen(policed, f"{free_port()}", "TCP forwarding is not permitted", key)
    terminal = policed.ssh(key, "-oLogLevel=INFO", "-tt", "true")
    assert (terminal.status, terminal.out) == (255, b"")
    assert "PTY allocation request failed on channel 0" in terminal.err
    assert opens(policed, f"-i{client_home}/forwards", f"-W127.0.0.1:{ports['open']}")


@under("keys")
def test_a_key_that_opens_one_place(
    policed: Host, ports: dict[str, int], client_home: Path, tmp_path: Path
) -> None:
    """``permitopen`` and ``permitlisten``. A key for one port reaches no socket either."""
    key, other, listen = f"-i{client_home}/opens", free_port(), ports["listen"]
    assert opens(policed, key, f"-W127.0.0.1:{ports['open']}")
    why = f"forwarding to 127.0.0.1 port {other} is not permitted"
    refuses_to_open(policed, other, why, key)
    assert not reaches_a_socket(policed, tmp_path, key)
    assert listens(policed, f"localhost:{listen}", ("127.0.0.1", listen), key)
    why = f"listening at localhost port {other} is not permitted"
    refuses_to_listen(policed, f"localhost:{other}", why, key)
    assert policed.ssh(key, "-tt", "tty").status == 0


@under("keys")
def test_a_key_without_this_and_that(
    policed: Host, ports: dict[str, int], client_home: Path
) -> None:
    """``no-port-forwarding`` and ``no-pty``: what they name and nothing else."""
    key = f"-i{client_home}/no-forwarding"
    refuses_to_open(policed, ports["open"], "TCP forwarding is not permitted", key)
    assert policed.ssh(key, "-tt", "tty").status == 0
    key = f"-i{client_home}/no-pty"
    assert policed.ssh(key, "-tt", "true").status == 255
    assert opens(policed, key, f"-W127.0.0.1:{ports['open']}")
