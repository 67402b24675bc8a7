"""The real VS Code server on the kernel's host, started and reached as Remote-SSH does it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from .. import vscode as package
from .conftest import PATIENCE, free_port, quoted, read_until
from .test_ides import install_script, told

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from .conftest import Host

    Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

TOKEN = "a-token-of-the-tests"
#: How a message of its protocol begins: kind, number, acknowledged number, length.
_HEAD = struct.Struct(">BIII")
#: Kinds of messages.
_REGULAR, _CONTROL, _KEEP_ALIVE = 1, 2, 9
#: Kinds of connections: one that manages, and one to a process that runs extensions.
MANAGEMENT, EXTENSION_HOST = 1, 2


@pytest.fixture(scope="session")
def vscode() -> package.VSCode:
    """The server's programs."""
    return package.installed()


class Message(NamedTuple):
    """One of the protocol's."""

    kind: int
    body: bytes


class Remote:
    """A client's connection to the server, by its own protocol without WebSocket frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connected(cls, connect: Connect, commit: str, kind: int, **args: Any) -> Remote:
        """A connection of a kind, which has been admitted by its token."""
        self = cls(*await connect())
        query = f"reconnectionToken={uuid.uuid4()}&reconnection=false&skipWebSocketFrames=true"
        lines = [f"GET /?{query} HTTP/1.1", "Host: localhost", "Connection: Upgrade"]
        lines += ["Upgrade: websocket", "Sec-WebSocket-Key: MDEyMzQ1Njc4OUFCQ0RFRg=="]
        self._writer.write("\r\n".join([*lines, "Sec-WebSocket-Version: 13", "", ""]).encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        self._say({"type": "auth", "auth": TOKEN, "data": "challenge"})
        sign = json.loads((await self.heard(_CONTROL)).body)
        assert sign["type"] == "sign", sign
        admitted = {"type": "connectionType", "commit": commit, "signedData": sign["data"]}
        self._say({**admitted, "desiredConnectionType": kind, "args": args})
        return self

    def _say(self, what: dict[str, Any]) -> None:
        data = json.dumps(what).encode()
        self._writer.write(_HEAD.pack(_CONTROL, 0, 0, len(data)) + data)

    async def heard(self, kind: int) -> Message:
        """The next message that is of a kind."""
        while True:
            found, _, _, length = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
            body = await self._reader.readexactly(length)
            if found == kind:
                return Message(found, body)

    def close(self) -> None:
        """End it."""
        self._writer.close()


async def fetched(connect: Connect, path: str) -> bytes:
    """What the server has at a path."""
    reader, writer = await connect()
    # By HTTP/1.0 there are no chunks.
    lines = [f"GET {path} HTTP/1.0", f"Cookie: vscode-tkn={TOKEN}"]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    body = await reader.read(-1)
    writer.close()
    return body


async def work(connect: Connect, vscode: package.VSCode) -> None:
    """What a window does: two lasting connections, and many short ones beside them."""
    assert await fetched(connect, "/version") == vscode.commit.encode()
    managing = await Remote.connected(connect, vscode.commit, MANAGEMENT)
    assert json.loads((await managing.heard(_CONTROL)).body) == {"type": "ok"}
    extensions = await Remote.connected(
        connect, vscode.commit, EXTENSION_HOST, language="en", env={}
    )
    answer = json.loads((await extensions.heard(_CONTROL)).body)
    assert answer.get("type") != "error", answer
    # The process runs: these are its own first words.
    assert (await extensions.heard(_REGULAR)).body
    out = vscode.directory / "out"
    large = "vs/code/browser/workbench/workbench.js"
    paths = [large] + ["server-main.js", "nls.messages.js", "nls.keys.json"] * 16
    bodies = await asyncio.gather(
        *(fetched(connect, f"/static/out/{path}") for path in paths)
    )
    assert [len(body) for body in bodies] == [(out / path).stat().st_size for path in paths]
    assert bodies == [(out / path).read_bytes() for path in paths]
    await managing.heard(_KEEP_ALIVE)
    extensions.close()
    managing.close()


@pytest.mark.parametrize("listens", ["at a port", "at a socket"])
def test_a_window_of_vscode(
    host: Host, vscode: package.VSCode, tmp_path: Path, listens: str
) -> None:
    """Its server is started by a script on stdin and reached through ``-D``, or through ``-L``
    where it listens at a Unix socket (remoteServerListenOnSocket)."""
    (tmp_path / "token").write_text(TOKEN)
    there, local = tmp_path / "there", free_port()
    where = ["--host=127.0.0.1", "--port=0"]
    forwarding = f"-D{local}"
    if listens == "at a socket":
        where, forwarding = [f"--socket-path={there}"], f"-L{local}:{there}"
    server = quoted(
        vscode.node, vscode.main, "--start-server", *where, "--accept-server-license-terms",
        f"--connection-token-file={tmp_path}/token", "--telemetry-level=off",
        f"--server-data-dir={tmp_path}/data",
    )  # fmt: skip

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", local)
        if listens == "at a port":
            port = int(said["listeningOn"])
            writer.write(b"\5\1\0\5\1\0\3\x09127.0.0.1" + port.to_bytes(2, "big"))
            assert (await reader.readexactly(12))[:4] == b"\5\0\5\0"
        return reader, writer

    with host.started("-T", forwarding, "bash") as client:
        client.stdin.write(install_script(tmp_path, server))
        said = told(read_until(client.stdout, b"mark-7: end\n"))
        try:
            asyncio.run(asyncio.wait_for(work(connect, vscode), 2 * PATIENCE))
        finally:
            # With its extension host, which would wait hours for the window to come again.
            os.killpg(os.getpgid(int(said["serverPid"])), signal.SIGTERM)
