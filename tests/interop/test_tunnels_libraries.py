"""Forwarding by the libraries that scripts are written with: asyncssh, paramiko, Fabric."""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import asyncssh
import paramiko
import paramiko.agent
import pytest
from fabric import Config, Connection

from ..peers import answer, dial, echo, received, taken
from .conftest import PATIENCE, free_port, until
from .test_asyncssh import connected
from .test_paramiko import client  # noqa: F401 (a fixture)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ..peers import Peer
    from .conftest import Host

    Serving = Callable[..., Peer]

BULK = os.urandom(2_000_000)


def listens(path: Path) -> bool:
    """Whether somebody listens at a socket, which is there a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def agent_socket(host: Host, tmp_path: Path) -> Iterator[Path]:
    """An ssh-agent with the key that gets in."""
    path = tmp_path / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL) as agent:
        try:
            environment = {"SSH_AUTH_SOCK": str(path)}
            until(lambda: listens(path), "the ssh-agent listens")
            subprocess.run(["ssh-add", "-q", host.key], env=environment, check=True, timeout=20)
            yield path
        finally:
            agent.terminate()


# --- asyncssh --------------------------------------------------------------------------------


async def through(address: int | Path, data: bytes) -> bytes:
    """Send all to an address, end, and read to the end."""
    if isinstance(address, int):
        reader, writer = await asyncio.open_connection("127.0.0.1", address)
    else:
        reader, writer = await asyncio.open_unix_connection(str(address))
    return await _exchanged(reader, writer, data)


async def by_socks(proxy: int, name: str, port: int, data: bytes) -> bytes:
    """The same by SOCKS 5, with a name that is resolved at the other end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy)
    writer.write(b"\5\1\0")
    assert await reader.readexactly(2) == b"\5\0"
    host = bytes([len(name)]) + name.encode()
    writer.write(b"\5\1\0\3" + host + port.to_bytes(2, "big"))
    assert (await reader.readexactly(10))[:2] == b"\5\0"
    return await _exchanged(reader, writer, data)


async def _exchanged(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes
) -> bytes:
    writer.write(data)
    writer.write_eof()
    came = await reader.read(-1)
    writer.close()
    return came


def test_asyncssh_listeners(host: Host, serving: Serving, tmp_path: Path) -> None:
    """forward_local_port, forward_remote_port, and both with Unix sockets; they end one by one."""
    port = serving(echo).port
    there = tmp_path / "there"
    serving(echo, str(there), socket.AF_UNIX)
    here, back = tmp_path / "here", tmp_path / "back"

    async def script(connection: asyncssh.SSHClientConnection) -> None:
        local = await connection.forward_local_port("127.0.0.1", 0, "localhost", port)
        remote = await connection.forward_remote_port("localhost", 0, "127.0.0.1", port)
        socket_here = await connection.forward_local_path(str(here), str(there))
        socket_there = await connection.forward_remote_path(str(back), str(there))
        for address in (local.get_port(), remote.get_port(), here, back):
            assert await through(address, BULK) == BULK
        for listener in (local, remote, socket_here, socket_there):
            listener.close()
            await listener.wait_closed()
        while True:
            try:
                await through(remote.get_port(), b"x")
            except ConnectionResetError:
                pass  # it stood in the listener's queue when that closed
            except ConnectionRefusedError:
                break

    connected(host, script)


def test_asyncssh_connections(host: Host, serving: Serving, tmp_path: Path) -> None:
    """open_connection and open_unix_connection, and the reason where there is none."""
    port = serving(answer).port
    there = tmp_path / "there"
    serving(echo, str(there), socket.AF_UNIX)

    async def script(connection: asyncssh.SSHClientConnection) -> None:
        reader, writer = await connection.open_connection("localhost", port, encoding=None)
        writer.write(BULK)
        writer.write_eof()
        assert len(await reader.read(-1)) == 32
        reader, writer = await connection.open_unix_connection(str(there), encoding=None)
        writer.write(BULK)
        writer.write_eof()
        assert await reader.read(-1) == BULK
        with pytest.raises(asyncssh.ChannelOpenError, match="Connection refused"):
            await connection.open_connection("127.0.0.1", free_port())
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.open_unix_connection(str(tmp_path / "none"))

    connected(host, script)


def test_asyncssh_socks(host: Host, serving: Serving) -> None:
    """forward_socks, and a client that asks it by SOCKS 5 for a name."""
    port = serving(echo).port

    async def script(connection: asyncssh.SSHClientConnection) -> None:
        listener = await connection.forward_socks("127.0.0.1", 0)
        assert await by_socks(listener.get_port(), "localhost", port, BULK) == BULK

    connected(host, script)


def test_asyncssh_agent(host: Host, agent_socket: Path) -> None:
    """agent_forwarding: its keys are seen over there."""
    done = connected(
        host,
        lambda connection: connection.run("ssh-add -l"),
        agent_path=str(agent_socket),
        agent_forwarding=True,
    )
    assert (done.exit_status, done.stdout.split()[2:3]) == (0, ["key"])


# --- paramiko --------------------------------------------------------------------------------


def test_paramiko_connections(
    client: paramiko.SSHClient,  # noqa: F811
    serving: Serving,
) -> None:
    """direct-tcpip, half-closed; and the reason where there is none."""
    transport = client.get_transport()
    assert transport is not None
    to, us = ("localhost", serving(answer).port), ("127.0.0.1", 1)
    with transport.open_channel("direct-tcpip", to, us) as channel:
        channel.sendall(BULK)
        channel.shutdown_write()
        assert len(received(channel)) == 32
    with pytest.raises(paramiko.ChannelException, match="Connect failed"):
        transport.open_channel("direct-tcpip", ("127.0.0.1", free_port()), us)


def test_paramiko_listeners(client: paramiko.SSHClient) -> None:  # noqa: F811
    """request_port_forward: who connects there comes here; and cancel."""
    transport = client.get_transport()
    assert transport is not None
    port = transport.request_port_forward("127.0.0.1", 0)
    for _ in range(3):
        with dial(port) as visitor:
            channel = transport.accept(PATIENCE)
            assert channel is not None
            channel.settimeout(PATIENCE)
            visitor.sendall(b"knock")
            visitor.shutdown(socket.SHUT_WR)
            assert received(channel) == b"knock"
            channel.sendall(b"come in")
            channel.close()
            assert received(visitor) == b"come in"
    transport.cancel_port_forward("127.0.0.1", port)

    def is_over() -> bool:
        with socket.socket() as visitor:
            return visitor.connect_ex(("127.0.0.1", port)) != 0

    until(is_over, "nobody listens any more")


def test_paramiko_agent(
    client: paramiko.SSHClient,  # noqa: F811
    agent_socket: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AgentRequestHandler: its keys are seen over there."""
    monkeypatch.setenv("SSH_AUTH_SOCK", str(agent_socket))
    transport = client.get_transport()
    assert transport is not None
    session = transport.open_session(timeout=PATIENCE)
    handler = paramiko.agent.AgentRequestHandler(session)
    try:
        session.exec_command("ssh-add -l")
        assert received(session).split()[2:3] == [b"key"]
        assert session.recv_exit_status() == 0
    finally:
        handler.close()


# --- Fabric ----------------------------------------------------------------------------------


def reached(port: int) -> socket.socket | None:
    """A connection, if somebody listens."""
    try:
        return dial(port)
    except ConnectionRefusedError:
        return None


def test_fabric(host: Host, serving: Serving, tmp_path: Path) -> None:
    """run, put, get, and its forwarding either way."""
    settings: dict[str, Any] = {"load_ssh_configs": False}
    how = {"key_filename": str(host.key), "allow_agent": False, "look_for_keys": False}
    source, far, back = (tmp_path / name for name in ("source", "far", "back"))
    source.write_bytes(BULK)
    with Connection(
        "127.0.0.1",
        getpass.getuser(),
        host.port,
        config=Config(overrides=settings),
        connect_kwargs=how,
    ) as connection:
        ran = connection.run(
            "echo out; echo err >&2; exit 3", hide=True, warn=True, in_stream=False
        )
        assert (ran.exited, ran.stdout, ran.stderr) == (3, "out\n", "err\n")
        connection.put(str(source), str(far))
        connection.get(str(far), str(back))
        assert far.read_bytes() == back.read_bytes() == BULK
        there, local, remote = serving(echo).port, free_port(), free_port()
        for forwarding, port in (
            (connection.forward_local(local, there), local),
            (connection.forward_remote(remote, there), remote),
        ):
            # It begins on a thread.
            with forwarding, until(lambda port=port: reached(port), "it listens") as one:
                one.sendall(BULK[:100_000])
                assert taken(one, 100_000) == BULK[:100_000]
