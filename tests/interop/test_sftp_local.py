"""OpenSSH's own sftp and scp on the files of this machine, through a gateway in this process."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from twisted.conch.ssh.keys import Key
from twisted.cred.portal import Portal
from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.protocol import ProcessProtocol

from conchkernel.avatars import KernelRealm
from conchkernel.localfiles import DirectoryFileStore
from conchkernel.ssh.checkers import AnonymousOwnerChecker
from conchkernel.ssh.factory import GatewayFactory
from conchkernel.testing import MemoryBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from twisted.python.failure import Failure

BULK = random.Random(8).randbytes(5_000_011)


class _Run(ProcessProtocol):
    """One run of a client."""

    transport: Any

    def __init__(self, stdin: bytes) -> None:
        self.done: Deferred[tuple[str, int | None]] = Deferred()
        self._stdin = stdin
        self._out = bytearray()

    def connectionMade(self) -> None:
        self.transport.write(self._stdin)
        self.transport.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._out += data

    def processEnded(self, reason: Failure) -> None:
        code = reason.value.exitCode  # type: ignore[union-attr]
        self.done.callback((self._out.decode("utf-8", "replace"), code))


class Client:
    """Clients of a gateway whose SFTP sessions begin in :attr:`far`."""

    def __init__(self, home: Path, port: int) -> None:
        self.near = home / "near"
        self.far = home / "far"
        self.near.mkdir()
        self.far.mkdir()
        self.stores: list[DirectoryFileStore] = []
        self._home = home
        self._port = port

    def run(self, *words: str, stdin: str = "") -> Deferred[tuple[str, int | None]]:
        """Run ``sftp`` or ``scp``; what it printed, and its status."""
        options = (
            "StrictHostKeyChecking=no", f"UserKnownHostsFile={self._home}/known",
            "LogLevel=ERROR", "BatchMode=yes", f"Port={self._port}",
        )  # fmt: skip
        command = [words[0], "-F", "none"]
        for option in options:
            command += ["-o", option]
        run = _Run(stdin.encode())
        reactor.spawnProcess(  # type: ignore[attr-defined]
            run, words[0], [*command, *words[1:]],
            {"HOME": str(self._home), "PATH": "/usr/bin:/bin", "TZ": "UTC"}, str(self.near),
        )  # fmt: skip
        return run.done

    def sftp(self, *commands: str) -> Deferred[tuple[str, int | None]]:
        """Run commands in one session."""
        return self.run("sftp", "-b", "-", "joe@127.0.0.1", stdin="\n".join(commands) + "\n")


@pytest_twisted.async_yield_fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    """Clients, and a gateway for them."""

    stores = []

    def files(avatar: object) -> Any:
        stores.append(DirectoryFileStore(tmp_path / "far", reactor))
        return succeed(stores[-1])

    realm = KernelRealm(MemoryBackend(), files=files)
    factory = GatewayFactory(
        Portal(realm, [AnonymousOwnerChecker()]), [Key(Ed25519PrivateKey.generate())],
        reactor=reactor,
    )  # fmt: skip
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")  # type: ignore[attr-defined]
    client = Client(tmp_path, port.getHost().port)
    client.stores = stores
    yield client
    await port.stopListening()


def digest(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 32768, len(BULK)])
@pytest_twisted.ensureDeferred
async def test_scpBothWays(client: Client, size: int) -> None:
    """Bytes, mode and time arrive, and scp says 0."""
    source = client.near / "source"
    source.write_bytes(BULK[:size])
    source.chmod(0o640)
    os.utime(source, (1_000_000_000, 1_234_567_890))
    assert await client.run("scp", "-p", "source", "joe@127.0.0.1:a name") == ("", 0)
    assert await client.run("scp", "-p", "joe@127.0.0.1:a name", "back") == ("", 0)
    for path in (client.far / "a name", client.near / "back"):
        told = path.stat()
        assert digest(path) == digest(source)
        assert stat.S_IMODE(told.st_mode) == 0o640
        assert told.st_mtime == 1_234_567_890


@pytest_twisted.ensureDeferred
async def test_trees(client: Client) -> None:
    """``scp -r`` of a tree, both ways."""
    tree = client.near / "tree"
    wanted = {}
    for number in range(60):
        path = tree / f"d{number % 4}" / "ä ö" / f"{number} %#?"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(BULK[number : number + number * 1000])
        wanted[path.relative_to(tree)] = digest(path)
    assert await client.run("scp", "-r", "tree", "joe@127.0.0.1:") == ("", 0)
    assert await client.run("scp", "-r", "joe@127.0.0.1:tree", "back") == ("", 0)
    for root in (client.far / "tree", client.near / "back"):
        found = {p.relative_to(root): digest(p) for p in root.rglob("*") if p.is_file()}
        assert found == wanted


@pytest_twisted.ensureDeferred
async def test_missing(client: Client) -> None:
    """A file that is not there is a sentence and a status."""
    out, status = await client.run("scp", "joe@127.0.0.1:missing", "here")
    assert ("No such file" in out, status) == (True, 1)
    out, status = await client.sftp("cd /nowhere")
    assert ("No such file" in out, status) == (True, 1)


@pytest_twisted.ensureDeferred
async def test_interactiveCommands(client: Client) -> None:
    """What a person types: links, names, modes, listings, space."""
    (client.near / "one").write_bytes(BULK)
    out, status = await client.sftp(
        "pwd", "put one", "ln one hard", "ln -s one soft", "rename one two", "mkdir dir",
        "chmod 600 two", "ls -l", "ls -la dir", "df", "rm soft", "rmdir dir", "get two",
        "cp two three", "get hard",
    )  # fmt: skip
    assert status == 0, out
    assert str(client.far) in out
    assert sorted(os.listdir(client.far)) == ["hard", "three", "two"]
    assert digest(client.far / "three") == digest(client.near / "two") == digest(
        client.near / "hard"
    )
    assert stat.S_IMODE((client.far / "two").stat().st_mode) == 0o600
    lines = {line.split()[-1]: line.split() for line in out.splitlines() if BULK_SIZE in line}
    assert lines["two"][0] == "-rw-------"
    assert lines["two"][2] == (client.far / "two").owner()


BULK_SIZE = str(len(BULK))


@pytest_twisted.ensureDeferred
async def test_resuming(client: Client) -> None:
    """``reget`` and ``reput`` go on where they stopped."""
    (client.far / "file").write_bytes(BULK)
    (client.near / "file").write_bytes(BULK[:100_000])
    out, status = await client.sftp("reget file")
    assert (digest(client.near / "file"), status) == (digest(client.far / "file"), 0), out
    (client.far / "up").write_bytes(BULK[:33_333])
    (client.near / "up").write_bytes(BULK)
    out, status = await client.sftp("reput up")
    assert (digest(client.far / "up"), status) == (digest(client.near / "up"), 0), out


@pytest_twisted.ensureDeferred
async def test_longListing(client: Client) -> None:
    """Many names come whole, each once."""
    names = {f"a file with quite a long name {number:05}" for number in range(3000)}
    for name in names:
        (client.far / name).touch()
    out, status = await client.sftp("ls -1")
    assert status == 0
    assert sorted(line.strip() for line in out.splitlines() if "long name" in line) == sorted(
        names
    )


@pytest_twisted.ensureDeferred
async def test_leftOpen(client: Client) -> None:
    """Nothing is, behind a client that leaves in the middle."""
    (client.near / "one").write_bytes(BULK)
    assert (await client.sftp("put one", "get one two", "get one", "ls"))[1] == 0
    left = await client.run("scp", "-l", "1000", "joe@127.0.0.1:one", "/dev/full")
    assert left[1] == 1
    assert len(client.stores) == 2
    assert not any(store.opened for store in client.stores)
