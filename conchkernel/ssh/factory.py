"""The gateway as a factory of connections: its host keys, its services, and whom it refuses.

A connection is refused in two places. MaxStartups is judged at accept, so that a flood costs
nothing; what depends on the peer's address waits for its first packet, because behind a
``haproxy:`` endpoint the address is not known before.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from twisted.conch.ssh.factory import SSHFactory
from twisted.internet.protocol import Protocol
from twisted.logger import Logger

from conchkernel.errors import ConfigurationError
from conchkernel.ssh import hostkeys
from conchkernel.ssh.connection import GatewayConnection
from conchkernel.ssh.exchange import DEFAULT_ALGORITHMS
from conchkernel.ssh.limits import Limits, Offence, Penalties, dropProbability
from conchkernel.ssh.transport import GatewayTransport
from conchkernel.ssh.userauth import METHODS, GatewayUserAuth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twisted.conch.ssh.keys import Key
    from twisted.conch.ssh.service import SSHService
    from twisted.cred.portal import Portal
    from twisted.internet.interfaces import IAddress

    from conchkernel.ssh.algorithms import Algorithms
    from conchkernel.ssh.limits import IPNetwork

#: While connections are refused, this often at most the log says so.
_REFUSAL_LOG_SECONDS = 60.0

DEFAULT_LIMITS = Limits()


class _Refused(Protocol):
    """A connection too many: told so, as by sshd, and closed."""

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(b"Exceeded MaxStartups\r\n")
        self.transport.loseConnection()


class GatewayFactory(SSHFactory):
    """SSH connections for the users of ``portal``.

    :param portal: its checkers say how one may log in, its realm gives avatars for
        :class:`~twisted.conch.interfaces.IConchUser`, whose channels are each a
        :class:`~conchkernel.ssh.channel.GatewayChannel`.
    :param hostKeys: private keys, the preferred one first; at most one of a type counts.
    :param reactor: for time.
    :param banner: sent before the first answer about a login.
    :param authenticationMethods: as sshd's: lists of methods, one of which must succeed from its
        first to its last method; without any list one method is enough.
    :raises ConfigurationError: a value cannot be used, or a method is served by no checker.
    :param algorithms: what may be negotiated.
    :param hostCertificates: blobs of :func:`conchkernel.ssh.hostkeys.loadCertificate`.
    :ivar limits: what connections and their channels may ask for.
    """

    _log = Logger()

    protocol = GatewayTransport
    noisy = False
    services: dict[bytes, type[SSHService]] = {  # noqa: RUF012 - as in Conch
        b"ssh-userauth": GatewayUserAuth,
        b"ssh-connection": GatewayConnection,
    }

    def __init__(
        self,
        portal: Portal,
        hostKeys: Sequence[Key],
        *,
        reactor: Any,
        limits: Limits = DEFAULT_LIMITS,
        banner: bytes | None = None,
        hostCertificates: Sequence[bytes] = (),
        authenticationMethods: Sequence[Sequence[bytes]] = (),
        algorithms: Algorithms = DEFAULT_ALGORITHMS,
    ) -> None:
        if not hostKeys:
            raise ConfigurationError("A server needs a host key.")
        self.portal = portal
        self.reactor = reactor
        self.limits = limits
        self.banner = banner
        self.algorithms = algorithms
        if not all(authenticationMethods):
            raise ConfigurationError("A list of authentication methods is empty.")
        self.authenticationMethods = tuple(map(tuple, authenticationMethods))
        interfaces = set(portal.listCredentialsInterfaces())
        for name in (name for steps in self.authenticationMethods for name in steps):
            if METHODS.get(name) not in interfaces:
                text = name.decode("ascii", "backslashreplace")
                raise ConfigurationError(f"Nobody could log in by {text}: no checker takes that.")
        self.random = random.random
        self.penalties = Penalties(limits)
        self.primes = None
        self.publicKeys: dict[bytes, Key] = {}
        self.privateKeys: dict[bytes, Key] = {}
        self.hostKeys = hostkeys.algorithms(hostKeys, hostCertificates)
        for key in hostKeys:
            kind = key.sshType()
            self.publicKeys.setdefault(kind, key.public())
            self.privateKeys.setdefault(kind, key)
        # Connections that have not logged in, with their source once it is known.
        self._startups: dict[GatewayTransport, IPNetwork | None] = {}
        self._refusals = 0
        self._nextRefusalLog = 0.0

    def getService(self, transport: Any, service: bytes) -> type[SSHService] | None:
        """The class for a service; any but authentication only after that."""
        if service == b"ssh-userauth" or hasattr(transport, "avatar"):
            return self.services.get(service)
        return None

    # --- who is let in -----------------------------------------------------------------------

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """A connection, or now and then a refusal when many have not logged in yet."""
        chance = dropProbability(self.limits.maxStartups, len(self._startups))
        if chance and self.random() < chance:
            self._logRefusal("too many connections that have not logged in")
            return _Refused()
        transport = self.protocol()
        transport.factory = self
        return transport

    def refusal(self, transport: GatewayTransport) -> str | None:
        """Why this client is not served, ``None`` if it is. Asked when its address is known."""
        host = transport.peerHost()
        if self.penalties.refusedFor(host, self.reactor.seconds()):
            self._logRefusal(f"too many offences from {host}")
            return "too many offences from this address"
        source = self.penalties.source(host)
        if transport in self._startups:
            self._startups[transport] = source
        maximum = self.limits.perSourceMaxStartups
        if maximum is not None and source is not None:
            count = sum(1 for other in self._startups.values() if other == source)
            if count > maximum:
                self._logRefusal(f"too many connections from {host}")
                return "too many connections from this address"
        return None

    def connectionOpened(self, transport: GatewayTransport) -> None:
        """Called by a transport when it begins."""
        self._startups[transport] = None

    def connectionAuthenticated(self, transport: GatewayTransport) -> None:
        """Called by a transport when its client has logged in."""
        self._startups.pop(transport, None)

    def connectionClosed(self, transport: GatewayTransport, offence: Offence | None) -> None:
        """Called by a transport when it is gone."""
        self._startups.pop(transport, None)
        if offence is not None:
            self.penalties.punish(transport.peerHost(), offence, self.reactor.seconds())

    def _logRefusal(self, why: str) -> None:
        self._refusals += 1
        now = self.reactor.seconds()
        if now >= self._nextRefusalLog:
            self._nextRefusalLog = now + _REFUSAL_LOG_SECONDS
            self._log.warn(
                "{count} connections refused, lately: {why}", count=self._refusals, why=why
            )
            self._refusals = 0
