"""What a login may ask for beyond a command: forwarding, and a terminal.

Names, syntax and defaults are those of sshd_config(5) and of the options in authorized_keys
(sshd(8)). What the operator forbids and what a key's options forbid add up: permissions are only
ever narrowed.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase


class Directions(enum.Flag):
    """Which ways connections may be forwarded (AllowTcpForwarding)."""

    NONE = 0
    #: Asked for by the client's side: ``ssh -L``, ``-D``, ``-W``.
    LOCAL = 1
    #: Asked for on the kernel's host: ``ssh -R``.
    REMOTE = 2
    BOTH = 3


class GatewayPorts(enum.Enum):
    """Where ``ssh -R`` may listen on the kernel's host."""

    #: On loopback, whatever the client asks for.
    NO = "no"
    #: On every address, whatever the client asks for.
    YES = "yes"
    #: Where the client asks for.
    CLIENT_SPECIFIED = "clientspecified"


@dataclass(frozen=True, slots=True)
class Place:
    """A host and a port that PermitOpen or PermitListen names."""

    host: str
    """``*`` is any; to listen, a pattern."""
    port: int | None
    """``None`` is any."""

    def opens(self, host: str, port: int) -> bool:
        """Whether a connection there is meant. Hosts are compared as they are written."""
        return self.port in (None, port) and self.host in ("*", host)

    def listens(self, host: str, port: int) -> bool:
        """Whether listening there is meant."""
        return self.port in (None, port) and fnmatchcase(host, self.host)


@dataclass(frozen=True, slots=True)
class Permissions:
    """What one login may ask for. The defaults are sshd's."""

    tcp: Directions = Directions.BOTH
    streamLocal: Directions = Directions.BOTH
    agent: bool = True
    pty: bool = True
    gatewayPorts: GatewayPorts = GatewayPorts.NO
    opens: tuple[tuple[Place, ...], ...] = ()
    """Lists (PermitOpen), each of which must name where a connection goes."""
    listens: tuple[tuple[Place, ...], ...] = ()
    """The same for PermitListen."""

    def narrowed(self, by: Permissions) -> Permissions:
        """What both allow. ``gatewayPorts`` is the operator's alone, and so ours."""
        return replace(
            self,
            tcp=self.tcp & by.tcp,
            streamLocal=self.streamLocal & by.streamLocal,
            agent=self.agent and by.agent,
            pty=self.pty and by.pty,
            opens=self.opens + by.opens,
            listens=self.listens + by.listens,
        )

    def whyNotOpen(self, host: str, port: int) -> str | None:
        """Why no connection is made for ``ssh -L``; ``None`` if it is."""
        if not self.tcp & Directions.LOCAL:
            return "TCP forwarding is not permitted"
        if not all(any(place.opens(host, port) for place in places) for places in self.opens):
            return f"forwarding to {host} port {port} is not permitted"
        return None

    def whyNotListen(self, host: str, port: int) -> str | None:
        """Why nobody listens for ``ssh -R``; ``None`` if somebody does."""
        if not self.tcp & Directions.REMOTE:
            return "TCP forwarding is not permitted"
        if not all(any(place.listens(host, port) for place in places) for places in self.listens):
            return f"listening at {host or '*'} port {port} is not permitted"
        return None

    def whyNotOpenPath(self) -> str | None:
        """Why ``ssh -L`` reaches no Unix socket; ``None`` if it does.

        What names places names all that may be reached, and no path is a host and a port: it is
        permitted by ``*:*`` alone, as with sshd.
        """
        if not self.streamLocal & Directions.LOCAL:
            return "socket forwarding is not permitted"
        if not all(_EVERYWHERE in places for places in self.opens):
            return "forwarding to a socket is not permitted"
        return None

    def whyNotListenPath(self) -> str | None:
        """Why no Unix socket is made for ``ssh -R``; ``None`` if one is.

        Places are not asked, as with sshd: they name ports.
        """
        if not self.streamLocal & Directions.REMOTE:
            return "socket forwarding is not permitted"
        return None


_EVERYWHERE = Place("*", None)

_PORT = re.compile(r"\*|[0-9]{1,5}")


def openPlace(text: str) -> Place:
    """``HOST:PORT`` as PermitOpen and ``permitopen`` have it; IPv6 in brackets.

    :raises ValueError: with half a sentence.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return Place(_host(host, text), _port(port, text))


def listenPlace(text: str) -> Place:
    """``PORT`` or ``HOST:PORT`` as PermitListen and ``permitlisten`` have it.

    Without a host it is any, as with sshd. What asks for none in particular, as ``ssh -R PORT:...``
    does, asks for ``localhost``.

    :raises ValueError: with half a sentence.
    """
    host, colon, port = text.rpartition(":")
    return Place(_host(host, text) if colon else "*", _port(port, text))


def _host(host: str, text: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1]
    if ":" in host:
        raise ValueError(f"the address in {text!r} needs brackets")
    return host


def _port(port: str, text: str) -> int | None:
    if not _PORT.fullmatch(port) or (port != "*" and not 0 < int(port) <= 65535):
        raise ValueError(f"{text!r} does not end in a port")
    return None if port == "*" else int(port)
