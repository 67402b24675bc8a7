"""An SSH client for tests that says whatever it is told to, over a TCP transport in memory.

It has both halves of every key, so a test sees each message that the server sends, and may send
each in the wrong place. Nothing here waits: time is a :class:`~twisted.internet.task.Clock`.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from twisted.conch.avatar import ConchUser
from twisted.conch.interfaces import IConchUser
from twisted.conch.ssh.keys import Key
from twisted.conch.ssh.service import SSHService
from twisted.cred.portal import IRealm, Portal
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from conchkernel.ssh import ciphers, kex
from conchkernel.ssh.algorithms import Algorithms
from conchkernel.ssh.exchange import DEFAULT_ALGORITHMS, MSG_KEXINIT
from conchkernel.ssh.factory import GatewayFactory
from conchkernel.ssh.fields import Fields, mpint, string
from conchkernel.ssh.kex import KexInit
from conchkernel.ssh.limits import Limits
from conchkernel.ssh.packets import KNOWN_PEER_BYTES, Inbound, Outbound

VERSION = b"SSH-2.0-raw_1"
HOST_KEY = Key(Ed25519PrivateKey.generate())

#: What a current OpenSSH offers, as far as it matters here.
KEXINIT = KexInit(
    (b"mlkem768x25519-sha256", b"curve25519-sha256", kex.EXT_INFO_CLIENT, kex.STRICT_CLIENT),
    (b"ssh-ed25519", b"rsa-sha2-512"),
    (b"chacha20-poly1305@openssh.com", b"aes128-ctr", b"aes128-gcm@openssh.com"),
    (b"chacha20-poly1305@openssh.com", b"aes128-ctr", b"aes128-gcm@openssh.com"),
    (b"hmac-sha2-256-etm@openssh.com",),
    (b"hmac-sha2-256-etm@openssh.com",),
    (b"none",),
    (b"none",),
)


class Tcp:
    """The server's end of a TCP connection."""

    bufferSize = 65536

    def __init__(self, host: str) -> None:
        self.host = host
        self.written: list[bytes] = []
        self.writes = 0
        self.producer: Any = None
        self.reading = True
        self.noDelay = self.keepAlive = False
        self.closed = ""

    def setTcpNoDelay(self, enabled: bool) -> None:
        self.noDelay = enabled

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self.keepAlive = enabled

    def write(self, data: bytes) -> None:
        self.writeSequence([data])

    def writeSequence(self, pieces: Any) -> None:
        assert all(type(piece) is bytes for piece in pieces)
        self.writes += 1
        if not self.closed:
            self.written.extend(pieces)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert streaming
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def pauseProducing(self) -> None:
        self.reading = False

    def resumeProducing(self) -> None:
        self.reading = True

    def loseWriteConnection(self) -> None:
        assert self.producer is None
        self.closed = self.closed or "half"

    def loseConnection(self) -> None:
        self.closed = "lost"

    def abortConnection(self) -> None:
        self.closed = "aborted"

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", self.host, 40000)

    def getHost(self) -> IPv4Address:
        return IPv4Address("TCP", "127.0.0.1", 22)


class EchoConnection(SSHService):
    """A connection service that knows one message: channel data, which it sends back."""

    name = b"ssh-connection"

    def __init__(self) -> None:
        self.received: list[tuple[int, bytes]] = []
        self.changes: list[str] = []
        self.stopped = 0

    def packetReceived(self, messageNum: int, packet: bytes) -> None:
        self.received.append((messageNum, packet))
        if messageNum == 94:
            self.transport.sendPacket(94, packet)

    def transportPaused(self) -> None:
        self.changes.append("paused")

    def transportResumed(self) -> None:
        self.changes.append("resumed")

    def serviceStopped(self) -> None:
        self.stopped += 1


@implementer(IRealm)
class Realm:
    """Gives everybody an avatar, and counts who came and went."""

    def __init__(self) -> None:
        self.avatarIds: list[Any] = []
        self.logouts = 0

    def requestAvatar(self, avatarId: Any, mind: object, *interfaces: Any) -> Any:
        assert IConchUser in interfaces
        self.avatarIds.append(avatarId)
        return IConchUser, ConchUser(), self._logout

    def _logout(self) -> None:
        self.logouts += 1


class EchoFactory(GatewayFactory):
    """The gateway's factory with a connection service for tests."""

    services = {**GatewayFactory.services, b"ssh-connection": EchoConnection}  # noqa: RUF012


class RawClient:
    """One connection to a factory of its own, or to one that is given."""

    def __init__(
        self,
        checkers: Any = (),
        *,
        factory: Any = None,
        host: str = "127.0.0.2",
        hostKeys: Any = (HOST_KEY,),
        banner: bytes | None = None,
        authenticationMethods: Any = (),
        algorithms: Algorithms = DEFAULT_ALGORITHMS,
        **limits: Any,
    ) -> None:
        if factory is None:
            factory = EchoFactory(
                Portal(Realm(), checkers),
                list(hostKeys),
                reactor=Clock(),
                limits=Limits(**limits),
                banner=banner,
                authenticationMethods=authenticationMethods,
                algorithms=algorithms,
            )
        self.factory = factory
        self.clock: Clock = factory.reactor
        self.tcp = Tcp(host)
        self.server = factory.buildProtocol(self.tcp.getPeer())
        self.inbound = Inbound()
        self.inbound.limit = KNOWN_PEER_BYTES
        self.outbound = Outbound()
        self.greeting = b""
        self.kexInit = b""
        self.sessionID: bytes | None = None
        self.strict = False
        self.messages: list[tuple[int, bytes]] = []
        self.extensions: dict[bytes, bytes] = {}
        self.server.makeConnection(self.tcp)

    @property
    def service(self) -> Any:
        """What the server runs for us now."""
        return self.server.service

    # --- bytes -------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Have the server receive something."""
        self.server.dataReceived(data)

    def pack(self, number: int, payload: bytes = b"") -> bytes:
        """A message as a packet."""
        return b"".join(self.outbound.seal(bytes((number,)), payload))

    def send(self, number: int, payload: bytes = b"") -> None:
        """Have the server receive a message."""
        self.write(self.pack(number, payload))

    def read(self) -> list[tuple[int, bytes]]:
        """What the server has sent since the last time."""
        data = b"".join(self.tcp.written)
        self.tcp.written.clear()
        if not self.greeting:
            self.greeting, _, data = data.partition(b"\r\n")
        self.inbound.feed(data)
        return self._parse()

    def _parse(self) -> list[tuple[int, bytes]]:
        messages = []
        while (packet := self.inbound.next()) is not None:
            message = packet[1], packet[2 : -packet[0]]
            messages.append(message)
            if message[0] == MSG_KEXINIT:
                self.kexInit = message[1]
            elif message[0] == 31:
                self._finish(message[1])
            elif message[0] == 21:
                self.inbound.new_keys(self._opener, self.strict)
        return messages

    def drop(self) -> None:
        """The TCP connection is gone."""
        self.server.connectionLost(Failure(ConnectionDone()))

    # --- key exchange ------------------------------------------------------------------------

    def start(self, offer: KexInit = KEXINIT) -> RawClient:
        """Say hello and exchange keys."""
        self.write(VERSION + b"\r\n")
        self.exchange(offer)
        return self

    def exchange(self, offer: KexInit = KEXINIT) -> list[tuple[int, bytes]]:
        """One whole key exchange; what the server said beside."""
        self.sendKexInit(offer)
        self.sendPublic()
        messages = self.read()
        self.sendNewKeys()
        for number, payload in messages:
            if number == 7:
                fields = Fields(payload, "EXT_INFO")
                self.extensions = {
                    fields.string(): fields.string() for _ in range(fields.uint32())
                }
        return messages + self.read()

    def sendKexInit(self, offer: KexInit = KEXINIT) -> None:
        self.offer = offer
        payload = offer.encode()
        self.payload = b"\x14" + payload
        if self.sessionID is None:
            self.strict = kex.STRICT_CLIENT in offer.methods
        self.send(MSG_KEXINIT, payload)

    def sendPublic(self) -> None:
        """Our half, for what the two KEXINIT agree on."""
        self.held = self.read()
        self.agreement = kex.agree(self.offer, KexInit.parse(self.kexInit))
        self.curve = X25519PrivateKey.generate()
        self.public = self.curve.public_key().public_bytes_raw()
        if self.agreement.method.startswith(b"mlkem"):
            self.kem = MLKEM768PrivateKey.generate()
            self.public = self.kem.public_key().public_bytes_raw() + self.public
        self.send(30, string(self.public))

    def sendNewKeys(self) -> None:
        self.send(21)
        self.outbound.new_keys(self._sealer, self.strict)

    def _finish(self, reply: bytes) -> None:
        fields = Fields(reply, "KEX reply")
        blob, public, signature = fields.string(), fields.string(), fields.string()
        fields.end()
        classical = self.curve.exchange(X25519PublicKey.from_public_bytes(public[-32:]))
        if self.agreement.method.startswith(b"mlkem"):
            secret = string(sha256(self.kem.decapsulate(public[:-32]) + classical).digest())
        else:
            secret = mpint(int.from_bytes(classical, "big"))
        digest = kex.exchange_hash(
            VERSION,
            self.greeting,
            self.payload,
            b"\x14" + self.kexInit,
            blob,
            self.public,
            public,
            secret=secret,
        )
        assert Key.fromString(blob).verify(signature, digest)
        self.hostKeyBlob = blob
        if self.sessionID is None:
            self.sessionID = digest
        inward = kex.key_material(secret, digest, self.sessionID, b"BDF")
        outward = kex.key_material(secret, digest, self.sessionID, b"ACE")
        agreed = self.agreement
        self._opener = ciphers.make_opener(agreed.cipher_out, agreed.mac_out, inward)
        self._sealer = ciphers.make_sealer(agreed.cipher_in, agreed.mac_in, outward)

    # --- authentication ----------------------------------------------------------------------

    def requestAuth(self) -> None:
        """Ask for the service."""
        self.send(5, string(b"ssh-userauth"))
        assert self.read() == [(6, string(b"ssh-userauth"))]

    def auth(self, method: bytes, rest: bytes = b"", user: bytes = b"joe") -> None:
        """One request to log in."""
        self.send(50, string(user) + string(b"ssh-connection") + string(method) + rest)

    def password(self, password: bytes, user: bytes = b"joe") -> None:
        self.auth(b"password", b"\0" + string(password), user)

    def login(self) -> RawClient:
        """All the way in, where anybody may come."""
        self.start()
        self.requestAuth()
        self.auth(b"none")
        assert self.read() == [(52, b"")]
        return self

    # --- what came of it ---------------------------------------------------------------------

    def disconnected(self) -> tuple[int, bytes] | None:
        """The code and the text of the server's DISCONNECT, the last thing it says."""
        for number, payload in self.read():
            if number == 1:
                fields = Fields(payload, "DISCONNECT")
                return fields.uint32(), fields.string()
        return None
