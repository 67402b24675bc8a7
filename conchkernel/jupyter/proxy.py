"""The road to a web server: straight or through an HTTP proxy, in the clear or over TLS.

HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY are honoured as curl does, for REST and WebSocket
alike: :class:`RoadAgent` and :func:`endpoint_for` share the endpoints made here. Through a proxy
everything goes by CONNECT, since a WebSocket has no other way. Loopback never goes through one.
"""

from __future__ import annotations

import base64
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from OpenSSL import SSL
from twisted.internet import ssl
from twisted.internet._sslverify import IOpenSSLTrustRoot
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.interfaces import IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import Agent, HTTPConnectionPool
from twisted.web.iweb import IAgent, IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

from conchkernel.errors import ConfigurationError, JupyterUnreachable

if TYPE_CHECKING:
    from twisted.internet.interfaces import IAddress, IOpenSSLClientConnectionCreator, IProtocol
    from twisted.web.client import URI
    from twisted.web.http_headers import Headers
    from twisted.web.iweb import IBodyProducer, IResponse

#: For the TCP connection, and again for a proxy's answer.
CONNECT_SECONDS = 10.0
#: A proxy that says more than this before its blank line is no proxy (nginx allows 32 KiB).
MAX_PROXY_REPLY_BYTES = 32 * 1024

_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy."""

    host: str
    port: int
    secure: bool = False
    """Whether the proxy itself is spoken to over TLS."""
    authorization: bytes = field(default=b"", repr=False)
    """The value of ``Proxy-Authorization``, or nothing."""


def proxy_for(
    scheme: str, host: str, port: int, environment: Mapping[str, str]
) -> Proxy | None:
    """The proxy that the environment names for a server, or ``None`` for the straight road.

    :param scheme: ``http``, ``https``, ``ws`` or ``wss``.
    :param host: name or address, IPv6 without brackets.
    :raises ConfigurationError: if it names something that is no HTTP proxy.
    """
    secure = _PORTS[scheme] == 443
    names = ("https_proxy", "all_proxy") if secure else ("http_proxy", "all_proxy")
    for name in names:
        value = (environment.get(name) or environment.get(name.upper()) or "").strip()
        if value:
            break
    else:
        return None
    exceptions = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if _is_loopback(host) or _excepted(host, port, exceptions):
        return None
    return _parsed(value, name)


def _is_loopback(host: str) -> bool:
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _excepted(host: str, port: int, exceptions: str) -> bool:
    """curl's rule: a name stands for itself and what is below it, ``*`` alone for everything, an
    address may have a prefix length. A port, where one is named, must be the server's."""
    host = host.rstrip(".").lower()
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        address = None
    for entry in exceptions.replace(",", " ").lower().split():
        if entry == "*":
            return True
        if address is not None:
            try:
                if address in ipaddress.ip_network(entry.strip("[]"), strict=False):
                    return True
            except ValueError:
                pass
        name, _, number = entry.rpartition(":")
        if number.isdecimal() and name and (":" not in name or name.startswith("[")):
            if int(number) != port:
                continue
            entry = name  # noqa: PLW2901
        entry = entry.strip("[].")  # noqa: PLW2901
        if entry and (host == entry or (address is None and host.endswith("." + entry))):
            return True
    return False


def _parsed(value: str, name: str) -> Proxy:
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(f"{name.upper()} has no valid host and port") from None
    if parts.scheme not in ("http", "https"):
        raise ConfigurationError(f"{name.upper()} must be an http:// or https:// proxy")
    if not host:
        raise ConfigurationError(f"{name.upper()} names no host")
    authorization = b""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = b"Basic " + base64.b64encode(pair.encode())
    secure = parts.scheme == "https"
    return Proxy(host, port or (443 if secure else 1080), secure, authorization)


class ProxyRefused(JupyterUnreachable):
    """The proxy did not connect us."""


class _Tunnel(Protocol):
    """Asks a proxy for a connection, and hands what follows to the protocol it was asked for."""

    def __init__(self, endpoint: ConnectEndpoint, factory: Any, made: Deferred[Any]) -> None:
        self._endpoint = endpoint
        self._factory = factory
        self._made: Deferred[Any] | None = made
        self._reply = b""
        self._inner: Any = None
        self._timeout = endpoint.reactor.callLater(
            CONNECT_SECONDS, self._fail, "the proxy did not answer; check HTTPS_PROXY"
        )

    def connectionMade(self) -> None:
        """Ask."""
        assert self.transport is not None
        target = self._endpoint.target
        lines = [b"CONNECT %s HTTP/1.1" % target, b"Host: %s" % target]
        if self._endpoint.authorization:
            lines.append(b"Proxy-Authorization: " + self._endpoint.authorization)
        self.transport.write(b"\r\n".join([*lines, b"", b""]))

    def dataReceived(self, data: bytes) -> None:
        """The proxy's answer, then the server's bytes."""
        if self._inner is not None:
            self._inner.dataReceived(data)
            return
        if self._made is None:
            return
        self._reply += data
        head, blank, rest = self._reply.partition(b"\r\n\r\n")
        if len(head) > MAX_PROXY_REPLY_BYTES:
            self._fail("the proxy's answer is too long; check HTTPS_PROXY")
        elif blank:
            self._reply = b""
            self._answered(head, rest)

    def _answered(self, head: bytes, rest: bytes) -> None:
        words = head.split(b"\r\n", 1)[0].split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            self._fail("what HTTPS_PROXY names is not an HTTP proxy")
        elif words[1] == b"407":
            self._fail("the proxy wants a user name and password; put them in HTTPS_PROXY")
        elif not words[1].startswith(b"2"):
            code = int(words[1][:4])
            self._fail(f"the proxy refused to connect to the Jupyter server (HTTP {code})")
        else:
            self._settle()
            made, self._made = self._made, None
            assert self.transport is not None
            self._inner = self._factory.buildProtocol(self.transport.getPeer())
            self._inner.makeConnection(self.transport)
            if made is not None:
                made.callback(self._inner)
            if rest:
                self._inner.dataReceived(rest)

    def _settle(self) -> None:
        if self._timeout.active():
            self._timeout.cancel()

    def _fail(self, sentence: str) -> None:
        self._settle()
        made, self._made = self._made, None
        if made is not None:
            made.errback(ProxyRefused(sentence))
        self.abandon()

    def abandon(self) -> None:
        """Nobody wants this connection any more."""
        self._settle()
        self._made = None
        if self.transport is not None:
            # Over TLS (https:// proxies) as well as over TCP.
            self.transport.abortConnection()  # type: ignore[attr-defined]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell whoever is concerned."""
        if self._inner is not None:
            self._inner.connectionLost(reason)
        else:
            self._fail("the proxy closed the connection; check HTTPS_PROXY")


@implementer(IStreamClientEndpoint)
class ConnectEndpoint:
    """The far end of a tunnel that an HTTP proxy makes (RFC 9110 section 9.3.6).

    :param endpoint: leads to the proxy.
    :param host: the server as the proxy shall find it.
    """

    def __init__(
        self,
        reactor: Any,
        endpoint: IStreamClientEndpoint,
        host: str,
        port: int,
        authorization: bytes = b"",
    ) -> None:
        self.reactor = reactor
        self.target = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode("ascii")
        self.authorization = authorization
        self._endpoint = endpoint

    def connect(self, protocolFactory: Any) -> Deferred[IProtocol]:
        """See :meth:`twisted.internet.interfaces.IStreamClientEndpoint.connect`."""
        tunnels: list[_Tunnel] = []

        def cancelled(_: Deferred[Any]) -> None:
            connecting.cancel()
            for tunnel in tunnels:
                tunnel.abandon()

        made: Deferred[Any] = Deferred(cancelled)

        def build(address: IAddress | None = None) -> _Tunnel:
            tunnels.append(_Tunnel(self, protocolFactory, made))
            return tunnels[-1]

        def failed(failure: Failure) -> None:
            if failure.check(ConnectError, DNSLookupError):
                # Else the server would be blamed.
                failure = Failure(ProxyRefused("the proxy cannot be reached; check HTTPS_PROXY"))
            if not made.called:
                made.errback(failure)

        connecting = self._endpoint.connect(Factory.forProtocol(build))
        connecting.addErrback(failed)
        return made


@implementer(IOpenSSLTrustRoot)
class _Authorities:
    """The system's authorities and one file's more. Twisted's own roots are either or; this
    interface, with its odd method, is the one seam it has for both."""

    def __init__(self, caFile: Path | None) -> None:
        self._caFile = caFile

    def _addCACertsToContext(self, context: SSL.Context) -> None:
        context.set_default_verify_paths()
        if self._caFile is not None:
            context.load_verify_locations(os.fspath(self._caFile))


@implementer(IPolicyForHTTPS)
class TrustPolicy:
    """Whose certificates are believed: the system's authorities, and perhaps one file's more.

    :param caFile: a PEM file with the authorities of a private network.
    :raises ConfigurationError: if it cannot be used.
    """

    def __init__(self, caFile: Path | None = None) -> None:
        self._authorities = _Authorities(caFile)
        # Reading the system's authorities takes some 20 ms: once a host, not once a connection.
        self._creators: dict[bytes, IOpenSSLClientConnectionCreator] = {}
        try:
            self._authorities._addCACertsToContext(SSL.Context(SSL.TLS_METHOD))
        except SSL.Error:
            raise ConfigurationError(
                f"{caFile} cannot be used as --jupyter-ca: it is no PEM file with certificates"
            ) from None

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """See :meth:`twisted.web.iweb.IPolicyForHTTPS.creatorForNetloc`."""
        creator = self._creators.get(hostname)
        if creator is None:
            creator = self._creators[hostname] = ssl.optionsForClientTLS(
                hostname.decode("ascii"), trustRoot=self._authorities
            )
        return creator


def endpoint_for(
    reactor: Any,
    url: str,
    *,
    tls_options: IPolicyForHTTPS,
    environment: Mapping[str, str] | None = None,
) -> IStreamClientEndpoint:
    """How to connect to the server of an http, https, ws or wss URL.

    :param environment: where the proxies are named; the process's own if not given.
    :raises ConfigurationError: if the proxy's name is wrong.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or _PORTS[parts.scheme]
    found = proxy_for(
        parts.scheme, host, port, os.environ if environment is None else environment
    )
    endpoint: IStreamClientEndpoint
    if found is None:
        endpoint = HostnameEndpoint(reactor, host, port, timeout=CONNECT_SECONDS)
    else:
        endpoint = HostnameEndpoint(reactor, found.host, found.port, timeout=CONNECT_SECONDS)
        if found.secure:
            creator = tls_options.creatorForNetloc(found.host.encode("ascii"), found.port)
            endpoint = wrapClientTLS(creator, endpoint)
        endpoint = ConnectEndpoint(reactor, endpoint, host, port, found.authorization)
    if _PORTS[parts.scheme] == 443:
        endpoint = wrapClientTLS(tls_options.creatorForNetloc(host.encode("ascii"), port), endpoint)
    return endpoint


@implementer(IStreamClientEndpoint)
class _QuietEndpoint:
    """Connects without a line in the log for every connection's beginning and end."""

    def __init__(self, endpoint: IStreamClientEndpoint) -> None:
        self._endpoint = endpoint

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """See :meth:`IStreamClientEndpoint.connect`."""
        protocolFactory.noisy = False  # type: ignore[attr-defined]
        connecting: Deferred[IProtocol] = self._endpoint.connect(protocolFactory)
        return connecting


@implementer(IAgent, IAgentEndpointFactory)
class RoadAgent:
    """An HTTP client's agent over the roads of this module, with kept connections.

    :param environment: where the proxies are named; the process's own if not given.
    """

    def __init__(
        self,
        reactor: Any,
        policy: IPolicyForHTTPS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._reactor = reactor
        self._policy = policy
        self._environment = environment
        self._pool = HTTPConnectionPool(reactor, persistent=True)
        self._agent = Agent.usingEndpointFactory(reactor, self, self._pool)

    def endpoint(self, url: str) -> IStreamClientEndpoint:
        """How this agent connects to the server of a URL."""
        return endpoint_for(
            self._reactor, url, tls_options=self._policy, environment=self._environment
        )

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """See :meth:`twisted.web.iweb.IAgentEndpointFactory.endpointForURI`."""
        return _QuietEndpoint(self.endpoint(uri.toBytes().decode("ascii")))

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        """See :meth:`twisted.web.iweb.IAgent.request`."""
        return self._agent.request(method, uri, headers, bodyProducer)

    def close(self) -> Deferred[None]:
        """Close the connections that were kept for later."""
        return self._pool.closeCachedConnections()


def make_agent(reactor: Any, ca_file: Path | None = None) -> RoadAgent:
    """The agent for :func:`conchkernel.jupyter.discovery.discover`. Close it in the end.

    :raises ConfigurationError: if ``ca_file`` cannot be used.
    """
    return RoadAgent(reactor, TrustPolicy(ca_file))
