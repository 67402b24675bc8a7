"""Real clients at the gateway's door: OpenSSH, asyncssh and paramiko, by every cipher and login."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from twisted.conch.ssh.keys import Key
from twisted.cred.portal import Portal
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol, serverFromString
from twisted.internet.protocol import ProcessProtocol, Protocol

from conchkernel.avatars import KernelRealm
from conchkernel.ssh.checkers import AuthorizedKeysChecker, TokenChecker
from conchkernel.ssh.factory import GatewayFactory
from conchkernel.ssh.kex import METHODS
from conchkernel.ssh.limits import Limits, PenaltyRules
from conchkernel.ssh.sealing import PlainSealer
from conchkernel.testing import MemoryBackend, MemoryStream
from tests.rawclient import KEXINIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

BULK = os.urandom(3_000_000)
TOKEN = "open sesame"


def _cat(stream: MemoryStream) -> None:
    """What every command does: give back what it is given."""
    stream.opened(pid=1)

    def more() -> None:
        stream.put(stream.take())

    stream.onInput = more
    stream.onInputEOF = stream.end


class _Run(ProcessProtocol):
    """One run of a client."""

    transport: Any

    def __init__(self, stdin: bytes) -> None:
        self.done: Deferred[tuple[bytes, str, int]] = Deferred()
        self._stdin = stdin
        self._out = {1: bytearray(), 2: bytearray()}

    def connectionMade(self) -> None:
        self.transport.write(self._stdin)
        self.transport.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._out[childFD] += data

    def processEnded(self, reason: Any) -> None:
        text = self._out[2].decode(errors="replace")
        self.done.callback((bytes(self._out[1]), text, reason.value.exitCode))


class Door:
    """A gateway, and clients to knock with."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.port = port

    def run(self, words: list[str], stdin: bytes, **environment: str) -> Deferred[Any]:
        """Run a client; its stdout, stderr and status."""
        run = _Run(stdin)
        environment = {"HOME": str(self.home), "PATH": "/usr/bin:/bin", **environment}
        reactor.spawnProcess(run, words[0], words, environment)  # type: ignore[attr-defined]
        return run.done

    def ssh(self, *options: str, stdin: bytes = b"hello", **environment: str) -> Deferred[Any]:
        """OpenSSH's client, which tells all it does on stderr."""
        words = ["ssh", "-v", "-F", "none", "-p", str(self.port)]
        for option in (
            "StrictHostKeyChecking=no",
            f"UserKnownHostsFile={self.home}/known",
            "IdentitiesOnly=yes",
            "NumberOfPasswordPrompts=1",
        ):
            words += ["-o", option]
        return self.run([*words, *options, "joe@127.0.0.1", "cat"], stdin, **environment)

    def python(self, script: str, *words: str, stdin: bytes = b"hello") -> Deferred[Any]:
        """A client in Python."""
        arguments = [str(self.port), str(self.home), *words]
        return self.run([sys.executable, "-c", script, *arguments], stdin)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A client's home: one key of each kind that counts, and some that do not."""
    path = tmp_path_factory.mktemp("home")
    for name, kind, bits in (
        ("ed25519", "ed25519", "256"),
        ("ecdsa", "ecdsa", "256"),
        ("ecdsa384", "ecdsa", "384"),
        ("rsa", "rsa", "2048"),
        ("weak", "rsa", "1024"),
        ("stranger", "ed25519", "256"),
    ):
        command = ["ssh-keygen", "-qt", kind, "-b", bits, "-N", "", "-f", str(path / name)]
        subprocess.run(command, check=True)
    known = [path / f"{name}.pub" for name in ("ed25519", "ecdsa", "ecdsa384", "rsa", "weak")]
    (path / "authorized").write_text("".join(one.read_text() for one in known))
    askpass = path / "askpass"
    askpass.write_text('#!/bin/sh\nprintf "%s\\n" "$PASSWORD"\n')
    askpass.chmod(0o700)
    return path


@pytest_twisted.async_yield_fixture
async def openDoor(home: Path) -> AsyncIterator[Callable[..., Deferred[Door]]]:
    """Makes gateways, each on a free port, of the factory's options."""
    ports = []

    async def make(endpoint: str = "tcp:0:interface=127.0.0.1", **options: Any) -> Door:
        checkers = [AuthorizedKeysChecker([home / "authorized"]), TokenChecker(TOKEN)]
        options.setdefault("hostKeys", [Key(Ed25519PrivateKey.generate())])
        # All these clients come from one address.
        options.setdefault("limits", Limits(perSourcePenalties=PenaltyRules(enabled=False)))
        portal = Portal(KernelRealm(MemoryBackend(_cat)), checkers)
        factory = GatewayFactory(portal, reactor=reactor, banner=b"welcome\r\n", **options)
        port = await serverFromString(reactor, endpoint).listen(factory)
        ports.append(port)
        (home / "known").unlink(missing_ok=True)
        return Door(home, port.getHost().port)

    yield lambda *given, **options: Deferred.fromCoroutine(make(*given, **options))
    for port in ports:
        await port.stopListening()


@pytest_twisted.async_yield_fixture
async def door(openDoor: Callable[..., Deferred[Door]]) -> AsyncIterator[Door]:
    """A gateway; its host key is ed25519."""
    yield await openDoor()


# --- OpenSSH ---------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_opensshByDefault(door: Door) -> None:
    """AES-GCM, strict, with extensions, bound to the host key; and the banner is shown."""
    out, log, status = await door.ssh("-i", str(door.home / "ed25519"))
    assert (out, status) == (b"hello", 0)
    assert "kex: server->client cipher: aes128-gcm@openssh.com" in log
    assert "kex: client->server cipher: aes128-gcm@openssh.com" in log
    assert "resetting send seqnr" in log
    assert "resetting read seqnr" in log
    assert "server-sig-algs=<ssh-ed25519," in log
    assert "publickey-hostbound@openssh.com=<0>" in log
    assert "welcome" in log


CIPHERS = [
    ("aes128-gcm@openssh.com", ""),
    ("aes256-gcm@openssh.com", ""),
    ("chacha20-poly1305@openssh.com", ""),
    ("aes128-ctr", "hmac-sha2-256-etm@openssh.com"),
    ("aes256-ctr", "hmac-sha2-512-etm@openssh.com"),
    ("aes192-ctr", "hmac-sha2-256"),
    ("aes256-ctr", "hmac-sha2-512"),
]


@pytest.mark.parametrize(("cipher", "mac"), CIPHERS)
@pytest_twisted.ensureDeferred
async def test_opensshRekeysUnderLoad(door: Door, cipher: str, mac: str) -> None:
    """By each cipher, with new keys every megabyte, all bytes come back."""
    options = ["-c", cipher, "-o", "RekeyLimit=1M", "-i", str(door.home / "ed25519")]
    if mac:
        options += ["-m", mac]
    out, log, status = await door.ssh(*options, stdin=BULK)
    assert status == 0
    assert out == BULK
    assert f"cipher: {cipher}" in log
    assert log.count("SSH2_MSG_NEWKEYS received") >= 3


@pytest.mark.parametrize("name", ["ed25519", "ecdsa", "ecdsa384", "rsa"])
@pytest_twisted.ensureDeferred
async def test_opensshKeys(door: Door, name: str) -> None:
    """Each kind of key, also RSA where the host key is ed25519."""
    out, log, status = await door.ssh("-i", str(door.home / name))
    assert (out, status) == (b"hello", 0)
    assert "Server accepts key" in log


@pytest.mark.parametrize("name", ["stranger", "weak"])
@pytest_twisted.ensureDeferred
async def test_opensshWrongKeys(door: Door, name: str) -> None:
    """Not even confirmed."""
    _, log, status = await door.ssh("-i", str(door.home / name), "-o", "BatchMode=yes")
    assert status == 255
    assert "Server accepts key" not in log
    assert "Permission denied (publickey,keyboard-interactive,password)" in log


@pytest.mark.parametrize("method", ["password", "keyboard-interactive"])
@pytest_twisted.ensureDeferred
async def test_opensshPassword(door: Door, method: str) -> None:
    """The token as the password, asked for in either way; a wrong one is refused."""
    options = ["-o", f"PreferredAuthentications={method}"]
    askpass = {"SSH_ASKPASS": str(door.home / "askpass"), "SSH_ASKPASS_REQUIRE": "force"}
    out, log, status = await door.ssh(*options, PASSWORD=TOKEN, **askpass)
    assert (out, status) == (b"hello", 0)
    assert f'using "{method}"' in log
    _, log, status = await door.ssh(*options, PASSWORD="guess", **askpass)
    assert status == 255
    assert "Permission denied" in log


@pytest_twisted.ensureDeferred
async def test_sshKeyscan(door: Door) -> None:
    """The host key, for known_hosts files."""
    words = ["ssh-keyscan", "-p", str(door.port), "127.0.0.1"]
    out, _, status = await door.run(words, b"")
    assert status == 0
    assert b"ssh-ed25519" in out


@pytest_twisted.ensureDeferred
async def test_opensshLearnsAllHostKeys(openDoor: Callable[..., Deferred[Door]]) -> None:
    """The second key is known to the client before it is the only one."""
    first = Key(Ed25519PrivateKey.generate())
    second = Key(rsa.generate_private_key(65537, 2048))
    door = await openDoor(hostKeys=[first, second])
    options = ["-i", str(door.home / "ed25519"), "-o", "UpdateHostKeys=yes"]
    known = door.home / "known"
    assert (await door.ssh(*options))[2] == 0
    assert len(known.read_bytes().splitlines()) == 1
    _, log, status = await door.ssh(*options)
    assert status == 0
    assert base64.b64encode(first.blob()) in known.read_bytes()
    assert base64.b64encode(second.public().blob()) in known.read_bytes(), log
    options += ["-o", "HostKeyAlgorithms=rsa-sha2-512", "-o", "StrictHostKeyChecking=yes"]
    assert (await door.ssh(*options))[2] == 0


@pytest_twisted.ensureDeferred
async def test_opensshHostCertificate(openDoor: Callable[..., Deferred[Door]]) -> None:
    """A client that knows only the CA asks nothing."""
    private = Ed25519PrivateKey.generate()
    authority = Ed25519PrivateKey.generate()
    certificate = (
        serialization.SSHCertificateBuilder()
        .public_key(private.public_key())
        .serial(1)
        .type(serialization.SSHCertificateType.HOST)
        .key_id(b"gateway")
        .valid_principals([b"127.0.0.1"])
        .valid_after(0)
        .valid_before(2**63)
        .sign(authority)
    )
    blob = base64.b64decode(certificate.public_bytes().split()[1])
    door = await openDoor(hostKeys=[Key(private)], hostCertificates=[blob])
    line = authority.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (door.home / "known").write_bytes(b"@cert-authority * " + line + b"\n")
    options = ["-i", str(door.home / "ed25519"), "-o", "StrictHostKeyChecking=yes"]
    out, log, status = await door.ssh(*options)
    assert (out, status) == (b"hello", 0), log
    assert "ssh-ed25519-cert-v01@openssh.com" in log


class _Proxy(Protocol):
    """A load balancer that tells whom it speaks for, and who is told no."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.received = b""
        self.lost: Deferred[bytes] = Deferred()

    def connectionMade(self) -> None:
        assert self.transport is not None
        hello = f"PROXY TCP4 {self.source} 127.0.0.1 1234 22\r\nSSH-2.0-x\r\n".encode()
        payload = b"\x14" + KEXINIT.encode()
        self.transport.write(hello + b"".join(PlainSealer().seal(0, payload[:1], payload[1:])))

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        if b"ssh-ed25519" in data:
            assert self.transport is not None
            self.transport.loseConnection()

    def connectionLost(self, reason: Any = None) -> None:
        self.lost.callback(self.received)


@pytest_twisted.ensureDeferred
async def test_limitsBehindAProxy(openDoor: Callable[..., Deferred[Door]]) -> None:
    """With ``haproxy:`` it is the client's address that counts, not the balancer's."""
    door = await openDoor("haproxy:tcp:0:interface=127.0.0.1", limits=Limits())
    endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", door.port)

    async def knock(source: str) -> bytes:
        proxy = _Proxy(source)
        await connectProtocol(endpoint, proxy)
        return await proxy.lost

    while b"too many offences" not in await knock("192.0.2.1"):
        pass
    assert b"too many offences" not in await knock("192.0.2.2")
    assert b"too many offences" in await knock("192.0.2.1")


# --- ssh-audit -------------------------------------------------------------------------------

POLICY = str(Path(__file__).parent.parent / "ssh-audit.policy")
AUDIT = [sys.executable, "-m", "ssh_audit.ssh_audit", "--no-colors", "--skip-rate-test"]


@pytest_twisted.ensureDeferred
async def test_sshAuditPolicy(door: Door) -> None:
    """All that is offered is what the policy names."""
    words = [*AUDIT, "-p", str(door.port), "-P", POLICY, "127.0.0.1"]
    out, log, status = await door.run(words, b"")
    assert status == 0, out.decode() + log


@pytest_twisted.ensureDeferred
async def test_sshAuditFindings(openDoor: Callable[..., Deferred[Door]]) -> None:
    """No failure, and no warning but the exchange for clients without the hybrid one.

    That is with the limits as they are by default, and several times in a row.
    """
    door = await openDoor(limits=Limits())
    for _ in range(4):
        words = [*AUDIT, "-p", str(door.port), "-l", "warn", "127.0.0.1"]
        out, log, _ = await door.run(words, b"")
        found = [line for line in out.decode().splitlines() if line and line[0] != "#"]
        assert found, log
        assert all(line.startswith("(kex) curve25519-sha256") for line in found), found


# --- asyncssh --------------------------------------------------------------------------------

ASYNCSSH = """
import asyncio, sys, asyncssh
port, home, kex, cipher, mac, how = sys.argv[1:]
data = sys.stdin.buffer.read()
options = {}
if how == "key":
    options["client_keys"] = [home + "/ed25519"]
else:
    options.update(client_keys=None, preferred_auth=how, password="open sesame")
if mac:
    options["mac_algs"] = [mac]
async def main():
    async with asyncssh.connect("127.0.0.1", int(port), username="joe", known_hosts=None,
            agent_path=None, config=None, kex_algs=[kex], encryption_algs=[cipher],
            rekey_bytes=1000000, **options) as connection:
        result = await connection.run("cat", input=data, encoding=None)
        sys.stdout.buffer.write(result.stdout)
        print(connection.get_extra_info("send_cipher"), file=sys.stderr)
        return result.exit_status
sys.exit(asyncio.run(main()))
"""


@pytest.mark.parametrize(("cipher", "mac"), CIPHERS)
@pytest_twisted.ensureDeferred
async def test_asyncssh(door: Door, cipher: str, mac: str) -> None:
    """An independent implementation, by each cipher, rekeying on the way."""
    out, log, status = await door.python(
        ASYNCSSH, METHODS[0].decode(), cipher, mac, "key", stdin=BULK
    )
    assert (status, cipher in log) == (0, True), log
    assert out == BULK


@pytest.mark.parametrize("method", [name.decode() for name in METHODS])
@pytest_twisted.ensureDeferred
async def test_asyncsshKeyExchange(door: Door, method: str) -> None:
    """Each method, the hybrid one among them."""
    out, log, status = await door.python(ASYNCSSH, method, "aes128-gcm@openssh.com", "", "key")
    assert (out, status) == (b"hello", 0), log


@pytest.mark.parametrize("how", ["password", "keyboard-interactive"])
@pytest_twisted.ensureDeferred
async def test_asyncsshPassword(door: Door, how: str) -> None:
    """The token in either way."""
    words = [METHODS[-1].decode(), "aes128-gcm@openssh.com", "", how]
    out, log, status = await door.python(ASYNCSSH, *words)
    assert (out, status) == (b"hello", 0), log


# --- paramiko --------------------------------------------------------------------------------

PARAMIKO = """
import sys, threading, paramiko
port, home, how, wrong = sys.argv[1:]
data = sys.stdin.buffer.read()
transport = paramiko.Transport(("127.0.0.1", int(port)))
transport.start_client(timeout=20)
for _ in range(int(wrong)):
    try:
        transport.auth_password("joe", "guess", fallback=False)
    except paramiko.AuthenticationException:
        pass
if how == "password":
    transport.auth_password("joe", "open sesame", fallback=False)
elif how == "interactive":
    transport.auth_interactive("joe", lambda title, text, prompts: ["open sesame"])
else:
    loader = {"ed25519": paramiko.Ed25519Key, "rsa": paramiko.RSAKey}.get(how, paramiko.ECDSAKey)
    transport.auth_publickey("joe", loader.from_private_key_file(home + "/" + how))
channel = transport.open_session()
channel.exec_command("cat")
def send():
    channel.sendall(data)
    channel.shutdown_write()
sender = threading.Thread(target=send)
sender.start()
while block := channel.recv(65536):
    sys.stdout.buffer.write(block)
sender.join()
print(transport.remote_cipher, file=sys.stderr)
sys.exit(channel.recv_exit_status())
"""


@pytest.mark.parametrize("how", ["password", "interactive", "ed25519", "ecdsa", "rsa"])
@pytest_twisted.ensureDeferred
async def test_paramiko(door: Door, how: str) -> None:
    """Each way to log in, and a megabyte both ways."""
    out, log, status = await door.python(PARAMIKO, how, "0", stdin=BULK[:1_000_000])
    assert status == 0, log
    assert out == BULK[:1_000_000]


@pytest_twisted.ensureDeferred
async def test_paramikoAsksAgain(door: Door) -> None:
    """It requests the service before each attempt; one wrong password before the right one."""
    out, log, status = await door.python(PARAMIKO, "password", "1")
    assert (out, status) == (b"hello", 0), log
