"""``ssh -L``, ``-D``, ``-W``, ``-R`` and ``-J``: what works with sshd works with the gateway.

The kernel's host is this one, so the tests stand at both ends of each tunnel.
"""

from __future__ import annotations

import asyncio
import getpass
import hashlib
import os
import re
import signal
import socket
import stat
from typing import TYPE_CHECKING

import paramiko
import psutil
import pytest

from ..peers import answer, dial, echo, exchange, received
from .conftest import PATIENCE, GatewayHost, free_port, read_until, until
from .test_paramiko import transport

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ..peers import Peer
    from .conftest import Host

    Serving = Callable[..., Peer]

BULK = os.urandom(8_000_000)


def is_refused(address: tuple[str, int]) -> bool:
    """Whether nobody listens there."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as connection:
        return connection.connect_ex(address) != 0


# --- to the host -----------------------------------------------------------------------------


def test_much_both_ways_at_once(host: Host, serving: Serving, tmp_path: Path) -> None:
    """``-L``: 8 MB there while 8 MB come back, exact; the name is resolved over there."""
    local = tmp_path / "local"
    with host.forwarding(f"-L{local}:localhost:{serving(echo).port}"):
        with dial(local) as connection:
            assert hashlib.sha256(exchange(connection, BULK)).digest() == (
                hashlib.sha256(BULK).digest()
            )


def test_several_forwardings_of_one_client(host: Host, serving: Serving) -> None:
    """Each leads to its own server, one of them over IPv6."""
    ports = [free_port(), free_port()]
    first = serving(lambda connection: connection.sendall(b"first"))
    second = serving(lambda connection: connection.sendall(b"second"), ("::1", 0), socket.AF_INET6)
    with host.forwarding(
        f"-L{ports[0]}:127.0.0.1:{first.port}", f"-L{ports[1]}:[::1]:{second.port}"
    ):
        for port, said in ((ports[0], b"first"), (ports[1], b"second")):
            with dial(port) as connection:
                assert received(connection) == said


def test_each_side_may_end_first(host: Host, serving: Serving, tmp_path: Path) -> None:
    """Half-close: the other direction goes on, either way."""
    heard = []

    def ends_first(connection: socket.socket) -> None:
        connection.sendall(b"bye")
        connection.shutdown(socket.SHUT_WR)
        heard.append(received(connection))

    answers, leaves = tmp_path / "answers", tmp_path / "leaves"
    with host.forwarding(
        f"-L{answers}:127.0.0.1:{serving(answer).port}",
        f"-L{leaves}:127.0.0.1:{serving(ends_first).port}",
    ):
        with dial(answers) as connection:
            assert exchange(connection, BULK) == hashlib.sha256(BULK).digest()
        with dial(leaves) as connection:
            assert received(connection) == b"bye"
            connection.sendall(BULK)
            connection.shutdown(socket.SHUT_WR)
            until(lambda: heard, "the other side has heard all")
    assert heard == [BULK]


def test_a_reader_that_leaves_early(gateway: GatewayHost, serving: Serving, tmp_path: Path) -> None:
    """All has come and ended over there, and the client's side goes without having read it: its
    channel closes, so that ssh can end."""
    heard = []

    def sends(connection: socket.socket) -> None:
        # More than a client's window, and the end of it.
        connection.sendall(BULK[:2_750_000])
        connection.shutdown(socket.SHUT_WR)
        heard.append(received(connection))

    local = tmp_path / "local"
    with gateway.started(f"-L{local}:127.0.0.1:{serving(sends).port}", "cat") as client:
        until(local.exists, "the client listens")
        with dial(local):
            gateway.road().until_quiet()
        assert client.stdin is not None
        client.stdin.close()
        assert client.wait(PATIENCE) == 0
    until(lambda: heard, "the other side has been told")


def test_stdin_and_stdout(host: Host, serving: Serving) -> None:
    """``-W``: the client is the connection, to its end."""
    ran = host.ssh(f"-W127.0.0.1:{serving(answer).port}", given=BULK)
    assert (ran.status, ran.out) == (0, hashlib.sha256(BULK).digest())


def test_the_client_is_told_when_it_stands(host: Host, tmp_path: Path) -> None:
    """Not before the other side over there has taken the connection, nor instead of its refusal."""
    log = tmp_path / "log"

    def is_asked(port: int) -> bool:
        return any(
            one.status == psutil.CONN_SYN_SENT and one.raddr.port == port
            for one in psutil.net_connections("tcp4")
            if one.raddr
        )

    with socket.socket() as listener, socket.socket() as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        # Its queue is full.
        first.connect(("127.0.0.1", port))
        with host.started("-vv", f"-E{log}", f"-W127.0.0.1:{port}"):
            until(lambda: is_asked(port), "somebody connects over there")
            assert "open confirm" not in log.read_text()
            listener.accept()[0].close()
            until(lambda: "open confirm" in log.read_text(), "the client is told")
            listener.accept()[0].close()


def test_no_connection(host: Host) -> None:
    """The reason is the system's, in the client's words."""
    ran = host.ssh("-oLogLevel=INFO", f"-W127.0.0.1:{free_port()}")
    assert ran.status == 255
    assert "open failed: connect failed: Connection refused" in ran.err
    ran = host.ssh("-oLogLevel=INFO", "-Wno-such-host.invalid:80")
    assert ran.status == 255
    assert re.search("open failed: connect failed: .*name resolution|not known", ran.err), ran.err


def test_a_port_where_nobody_is(host: Host, tmp_path: Path) -> None:
    """``-L``: who connects here is closed, and the connection serves on."""
    local = tmp_path / "local"
    with host.master() as master:
        assert host.ssh(master, "-Oforward", f"-L{local}:127.0.0.1:{free_port()}").status == 0
        for _ in range(3):
            with dial(local) as connection:
                assert received(connection) == b""
        assert host.ssh(master, "echo on") == (0, b"on\n", "")


def test_through_the_host_to_another(gateway: GatewayHost, sshd: Host, tmp_path: Path) -> None:
    """``-J``: a jump over the gateway to an sshd that the kernel's host can reach."""
    config = tmp_path / "config"
    config.write_text(gateway.config.read_text() + sshd.config.read_text())
    words = ["ssh", "-F", str(config), "-J", gateway.name, sshd.name]
    ran = sshd.run([*words, "echo $SSH_CONNECTION; cat; exit 7"], given=BULK)
    where, _, rest = ran.out.partition(b"\n")
    assert (ran.status, rest, ran.err) == (7, BULK, "")
    assert where.split()[3] == b"%d" % sshd.port


@pytest.mark.parametrize("way", ["-L", "-R"])
def test_many_at_once(host: Host, serving: Serving, way: str) -> None:
    """Five hundred connections by one client, all open together, each with its own bytes.

    They are more than the window of a channel beside so many, which has to be given back.
    """
    port = free_port()
    everybody = asyncio.Event()
    count = 0

    async def visit(number: int) -> bool:
        nonlocal count
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"%d " % number)
        assert await reader.readexactly(1)
        count += 1
        if count == 500:
            everybody.set()
        await everybody.wait()
        data = b"%04d" % number * 25_000
        writer.write(data)
        writer.write_eof()
        came = await reader.read(-1)
        writer.close()
        return (b"%d " % number + data).endswith(came) and len(came) > len(data)

    async def visit_all() -> list[bool]:
        return await asyncio.gather(*map(visit, range(500)))

    with host.forwarding(f"{way}{port}:127.0.0.1:{serving(echo, backlog=500).port}"):
        assert all(asyncio.run(asyncio.wait_for(visit_all(), 2 * PATIENCE)))


# --- from the host ---------------------------------------------------------------------------


def test_the_chosen_port_is_printed(host: Host, serving: Serving) -> None:
    """``-R 0:...``: both by a client of its own and through a master."""
    to = f"127.0.0.1:{serving(echo).port}"
    with host.forwarding(f"-R0:{to}") as port:
        with dial(int(port)) as connection:
            assert exchange(connection, BULK) == BULK
    words = ("-oLogLevel=INFO", f"-R0:{to}", "-N")
    with host.started(*words, stderr=-1) as client:
        said = read_until(client.stderr, f"to {to}".encode()).decode()
        chosen = re.search(r"Allocated port (\d+) for remote forward", said)
        assert chosen is not None, said
        with dial(int(chosen[1])) as connection:
            assert exchange(connection, b"once more") == b"once more"


def test_listening_is_on_loopback(host: Host, serving: Serving) -> None:
    """On both its addresses and no other, whatever the client asks for; and both directions
    end by themselves there, too."""
    port = free_port()
    with host.forwarding(f"-R*:{port}:127.0.0.1:{serving(answer).port}"):
        assert is_refused(("127.0.0.2", port))
        for address in ("127.0.0.1", "::1"):
            with socket.create_connection((address, port), PATIENCE) as connection:
                assert exchange(connection, BULK) == hashlib.sha256(BULK).digest()


def test_a_port_that_is_taken(host: Host) -> None:
    """The client is told that nobody listens for it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = (f"-R127.0.0.1:{port}:localhost:1", "-oExitOnForwardFailure=yes")
        ran = host.ssh(*words, "true")
    assert ran.status == 255
    assert f"remote port forwarding failed for listen port {port}" in ran.err


def test_nobody_is_at_the_clients_end(host: Host) -> None:
    """Who connects over there is closed, and the listener goes on."""
    with host.forwarding(f"-R0:127.0.0.1:{free_port()}") as port:
        for _ in range(3):
            with dial(int(port)) as connection:
                assert received(connection) == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_listeners_go_with_the_client(host: Host, number: int, tmp_path: Path) -> None:
    """However it ends."""
    port = free_port()
    with host.started(f"-R{port}:127.0.0.1:1", "-N") as client:
        until(lambda: not is_refused(("127.0.0.1", port)), "somebody listens")
        client.send_signal(number)
        client.wait(PATIENCE)
        until(lambda: is_refused(("127.0.0.1", port)), "nobody listens any more")


# --- Unix sockets ----------------------------------------------------------------------------


def test_unix_sockets_on_either_side(host: Host, serving: Serving, tmp_path: Path) -> None:
    """``-L`` and ``-R`` with a socket here, there, or on both sides."""
    there, here, back = tmp_path / "there", tmp_path / "here", tmp_path / "back"
    port = free_port()
    serving(echo, str(there), socket.AF_UNIX)
    with host.forwarding(
        f"-L{here}:{there}", f"-L{port}:{there}", f"-R{back}:{there}", f"-R0:{there}"
    ) as chosen:
        for address in (here, port, back, int(chosen)):
            with dial(address) as connection:
                assert exchange(connection, BULK[:1_000_000]) == BULK[:1_000_000]
        # Made on the kernel's host, for its owner alone.
        assert stat.S_IMODE(back.stat().st_mode) == 0o600


def test_no_socket_there(host: Host, tmp_path: Path) -> None:
    """The connection is closed, and the client says that there is none."""
    local = tmp_path / "local"
    words = ("-oLogLevel=INFO", f"-L{local}:{tmp_path}/none", "-N")
    with host.started(*words, stderr=-1) as client:
        until(local.exists, "the client listens")
        with dial(local) as connection:
            assert received(connection) == b""
        assert b"open failed: connect failed: " in read_until(client.stderr, b"\n")


def test_a_sockets_path_that_is_taken(host: Host, tmp_path: Path) -> None:
    """What is there already is not touched."""
    there = tmp_path / "there"
    there.write_text("somebody's file")
    words = (f"-R{there}:127.0.0.1:1", "-oExitOnForwardFailure=yes", "true")
    ran = host.ssh(*words)
    assert ran.status == 255
    assert "remote port forwarding failed" in ran.err
    assert there.read_text() == "somebody's file"


def test_a_socket_is_removed(gateway: GatewayHost, tmp_path: Path) -> None:
    """With its forwarding, where sshd leaves it; so the same client can come again."""
    there = tmp_path / "there"
    for _ in range(2):
        with gateway.forwarding(f"-R{there}:127.0.0.1:1"):
            assert there.is_socket()
        until(lambda: not there.exists(), "the socket is gone")


# --- a shared connection ---------------------------------------------------------------------


def test_a_masters_commands(host: Host, serving: Serving) -> None:
    """``-O check``, ``forward``, ``cancel`` and ``exit``, each of both kinds of forwarding."""
    to = f"127.0.0.1:{serving(echo).port}"
    local, remote = free_port(), free_port()
    with host.master() as master:
        checked = host.ssh(master, "-Ocheck")
        assert checked.status == 0
        assert "Master running" in checked.err
        for _ in range(2):
            assert host.ssh(master, "-Oforward", f"-L{local}:{to}", f"-R{remote}:{to}").status == 0
            with dial(local) as here, dial(remote) as there:
                for one in (here, there):
                    one.sendall(b"it stands: ")
                    assert one.recv(1) == b"i"
                assert host.ssh(master, "-Ocancel", f"-L{local}:{to}").status == 0
                assert host.ssh(master, "-Ocancel", f"-R{remote}:{to}").status == 0
                # What stands goes on; nobody new is let in.
                until(lambda: is_refused(("127.0.0.1", remote)), "nobody listens over there")
                assert is_refused(("127.0.0.1", local))
                assert exchange(here, b"here") == b"t stands: here"
                assert exchange(there, b"there") == b"t stands: there"
        assert "port not forwarded" in host.ssh(master, "-Ocancel", f"-R{remote}:{to}").err
        assert host.ssh(master, "-Oforward", f"-R{remote}:{to}").status == 0
        assert host.ssh(master, "-Oexit").status == 0
        until(lambda: is_refused(("127.0.0.1", remote)), "nobody listens over there")


def test_sessions_beside_tunnels(host: Host, serving: Serving, tmp_path: Path) -> None:
    """A tunnel that nobody reads keeps no session of the same connection waiting."""
    local = tmp_path / "local"

    def floods(connection: socket.socket) -> None:
        while True:
            connection.sendall(BULK)

    with host.master() as master:
        assert host.ssh(master, "-Oforward", f"-L{local}:127.0.0.1:{serving(floods).port}") == (
            0, b"", ""
        )  # fmt: skip
        with dial(local) as connection:
            assert connection.recv(1)
            assert host.ssh(master, "cat", given=BULK) == (0, BULK, "")


def test_no_more_sessions(host: Host, serving: Serving) -> None:
    """What OpenSSH asks for when it wants one session: a second is not to be had by whoever
    takes the connection over, and the first one goes on unless sshd ends them both."""
    with transport(host) as client:
        key = paramiko.Ed25519Key.from_private_key_file(str(host.key))
        client.auth_publickey(getpass.getuser(), key)
        first = client.open_session()
        client.global_request("no-more-sessions@openssh.com", wait=False)
        with pytest.raises((paramiko.ChannelException, paramiko.SSHException)):
            client.open_session(timeout=PATIENCE)
        if isinstance(host, GatewayHost):
            to = ("127.0.0.1", serving(echo).port)
            tunnel = client.open_channel("direct-tcpip", to, ("127.0.0.1", 1))
            tunnel.sendall(b"x")
            assert tunnel.recv(1) == b"x"
            first.exec_command("echo first")
            assert first.recv(100) == b"first\n"
