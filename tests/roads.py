"""What may stand between a gateway and its Jupyter server: a TLS terminator, an HTTP proxy, one
that knows no WebSockets.

Small real ones, on loopback, so that tests need not leave the machine.
"""

from __future__ import annotations

import datetime
import ipaddress
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from twisted.internet import ssl
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.portforward import ProxyFactory, ProxyServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Authority:
    """A private certificate authority, its certificate in a file."""

    def __init__(self, directory: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a private authority")])
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        certificate = self._signed(
            self._name,
            self._key.public_key(),
            (x509.BasicConstraints(ca=True, path_length=None), True),
            (usage, True),
            (x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), False),
        )
        self.file = directory / "ca.pem"
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        *extensions: tuple[x509.ExtensionType, bool],
    ) -> x509.Certificate:
        """One with these extensions, each critical or not, such as OpenSSL is content with that
        takes RFC 5280 strictly, as Python does from 3.13."""
        now = datetime.datetime.now(datetime.UTC)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(issuer, critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())

    def certify(self, *names: str) -> ssl.CertificateOptions:
        """What a server needs that is called by these names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        general: list[x509.GeneralName] = []
        for name in names:
            try:
                general.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                general.append(x509.DNSName(name))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        certificate = self._signed(
            subject, key.public_key(), (x509.SubjectAlternativeName(general), False)
        )
        pem = certificate.public_bytes(Encoding.PEM) + key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        return ssl.PrivateCertificate.loadPEM(pem).options()


@asynccontextmanager
async def terminating(
    reactor: Any, options: ssl.CertificateOptions, port: int
) -> AsyncIterator[int]:
    """A TLS server on loopback that passes on to ``port``; gives its own port."""
    listening = reactor.listenSSL(
        0, ProxyFactory("127.0.0.1", port), options, interface="127.0.0.1"
    )
    try:
        yield listening.getHost().port
    finally:
        await listening.stopListening()


class _WithoutWebSockets(ProxyServer):
    def dataReceived(self, data: bytes) -> None:
        if b"upgrade: websocket" in data.lower():
            self.transport.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            self.transport.loseConnection()
        else:
            super().dataReceived(data)


@asynccontextmanager
async def withoutWebSockets(reactor: Any, port: int) -> AsyncIterator[int]:
    """A server on loopback that passes on to ``port`` all but WebSockets; gives its own port."""
    factory = ProxyFactory("127.0.0.1", port)
    factory.protocol = _WithoutWebSockets
    listening = reactor.listenTCP(0, factory, interface="127.0.0.1")
    try:
        yield listening.getHost().port
    finally:
        await listening.stopListening()


class _Far(Protocol):
    """The proxy's connection to a server."""

    def __init__(self, near: HttpProxyProtocol) -> None:
        self._near = near

    def connectionMade(self) -> None:
        self._near.joined(self)

    def dataReceived(self, data: bytes) -> None:
        self._near.transport.write(data)

    def connectionLost(self, reason: Any = None) -> None:
        self._near.transport.loseConnection()


class HttpProxyProtocol(Protocol):
    """One connection of a client's."""

    factory: HttpProxy

    def __init__(self) -> None:
        self._head = b""
        self._far: _Far | None = None

    def connectionMade(self) -> None:
        self.factory.connections.add(self)

    def dataReceived(self, data: bytes) -> None:
        if self._far is not None:
            self._far.transport.write(data)
            return
        self._head += data
        if b"\r\n\r\n" in self._head:
            head = self._head.split(b"\r\n\r\n")[0].decode("ascii")
            self.factory.heard.append(head)
            if self.factory.answer is not None:
                # One octet at a time is how no client should need it otherwise.
                for index in range(len(self.factory.answer)):
                    self.transport.write(self.factory.answer[index : index + 1])
                if self.factory.hangsUp:
                    self.transport.loseConnection()
                return
            port = int(head.split()[1].rpartition(":")[2])
            endpoint = TCP4ClientEndpoint(self.factory.reactor, "127.0.0.1", port)
            connectProtocol(endpoint, _Far(self))

    def joined(self, far: _Far) -> None:
        self._far = far
        self.transport.write(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")

    def connectionLost(self, reason: Any = None) -> None:
        self.factory.connections.discard(self)
        if self._far is not None:
            self._far.transport.abortConnection()
        if not self.factory.connections and self.factory.idle is not None:
            idle, self.factory.idle = self.factory.idle, None
            idle.callback(None)


class HttpProxy(Factory):
    """An HTTP proxy that finds every host on loopback.

    :param answer: said instead of connecting.
    """

    protocol = HttpProxyProtocol
    noisy = False

    def __init__(self, reactor: Any, answer: bytes | None = None, *, hangsUp: bool = True) -> None:
        self.reactor = reactor
        self.answer = answer
        self.hangsUp = hangsUp
        self.heard: list[str] = []
        self.connections: set[HttpProxyProtocol] = set()
        self.idle: Deferred[None] | None = None

    def whenIdle(self) -> Deferred[None]:
        """Fires when no connection is left."""
        idle: Deferred[None] = Deferred()
        if self.connections:
            self.idle = idle
        else:
            idle.callback(None)
        return idle

    async def end(self) -> None:
        """Cut what connections are left."""
        idle = self.whenIdle()
        for connection in list(self.connections):
            connection.transport.abortConnection()
        await idle


@asynccontextmanager
async def proxying(
    reactor: Any,
    answer: bytes | None = None,
    *,
    options: ssl.CertificateOptions | None = None,
    hangsUp: bool = True,
) -> AsyncIterator[tuple[HttpProxy, int]]:
    """An HTTP proxy on loopback and its port; over TLS with ``options``."""
    proxy = HttpProxy(reactor, answer, hangsUp=hangsUp)
    if options is None:
        listening = reactor.listenTCP(0, proxy, interface="127.0.0.1")
    else:
        listening = reactor.listenSSL(0, proxy, options, interface="127.0.0.1")
    try:
        yield proxy, listening.getHost().port
    finally:
        await listening.stopListening()
        await proxy.end()
