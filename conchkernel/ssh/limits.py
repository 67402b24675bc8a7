"""What a client may ask of us, by sshd's names and with sshd's defaults where it has one.

Sans-IO: numbers, the random early drop of MaxStartups, and the penalties of PerSourcePenalties.
The time is always an argument.
"""

from __future__ import annotations

import enum
import ipaddress
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class Offence(enum.Enum):
    """What a source is punished for (sshd_config, PerSourcePenalties)."""

    AUTH_FAIL = "authfail"
    NO_AUTH = "noauth"
    GRACE_EXCEEDED = "grace-exceeded"
    CRASH = "crash"


@dataclass(frozen=True, slots=True)
class PenaltyRules:
    """sshd's PerSourcePenalties. Seconds, but for :attr:`maxSources`."""

    enabled: bool = True
    authfail: float = 5
    """A connection ended after failed attempts, and without a success."""
    noauth: float = 1
    """A connection ended without an attempt. ``ssh-keyscan`` and port probes do so."""
    graceExceeded: float = 10
    """LoginGraceTime ran out."""
    crash: float = 90
    """The connection broke our code, as an exploit would."""
    min: float = 15
    """A source is refused only when its penalties have summed up to this."""
    max: float = 600
    """The sum never exceeds this."""
    maxSources: int = 65536
    """Sources remembered, of each address family; beyond that new ones go unpunished (sshd's
    ``overflow:permissive``)."""

    def seconds(self, offence: Offence) -> float:
        """The penalty for one offence."""
        return {
            Offence.AUTH_FAIL: self.authfail,
            Offence.NO_AUTH: self.noauth,
            Offence.GRACE_EXCEEDED: self.graceExceeded,
            Offence.CRASH: self.crash,
        }[offence]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on clients, known and unknown; names and defaults are those of sshd_config(5)."""

    loginGraceTime: float = 120
    """Seconds from accept to success; 0 waits for ever."""
    maxAuthTries: int = 6
    """Failed attempts on one connection, whatever the method."""
    maxStartups: tuple[int, int, int] = (10, 30, 100)
    """Unauthenticated connections: from so many on, refuse by this percentage, rising to all."""
    maxSessions: int = 10
    """Session channels open at once on one connection."""
    perSourceMaxStartups: int | None = None
    """Unauthenticated connections from one source; ``None`` counts only all of them."""
    perSourceNetBlockSize: tuple[int, int] = (32, 128)
    """Bits of an IPv4 and of an IPv6 address that make one source."""
    perSourcePenalties: PenaltyRules = field(default_factory=PenaltyRules)
    perSourcePenaltyExemptList: tuple[str, ...] = ()
    """Addresses and networks that are never punished."""
    requiredRSASize: int = 2048
    """Bits; sshd's own default is 1024."""
    rekeyLimitBytes: int = 1 << 30
    """Bytes in both directions under one set of keys."""
    rekeyLimitSeconds: float = 3600
    """sshd sets no time by default."""
    clientAliveInterval: float = 0
    """Seconds without a word from the client after which it is asked; 0 never asks."""
    clientAliveCountMax: int = 3
    """Questions without an answer after which the connection is given up."""


def dropProbability(rule: tuple[int, int, int], startups: int) -> float:
    """The chance by which MaxStartups refuses one more, from 0 to 1.

    :param startups: unauthenticated connections there already.
    """
    begin, rate, full = rule
    if startups < begin:
        return 0.0
    if startups >= full:
        return 1.0
    return (rate + (100 - rate) * (startups - begin) / (full - begin)) / 100


class Penalties:
    """Who is refused for now because of what came from its address.

    Penalties add up and wear off with time; only a sum of :attr:`PenaltyRules.min` refuses, so a
    mistyped password costs nothing and a busy guesser much.
    """

    def __init__(self, limits: Limits) -> None:
        self._rules = limits.perSourcePenalties
        self._bits = limits.perSourceNetBlockSize
        self._exempt: Sequence[IPNetwork] = tuple(
            ipaddress.ip_network(text, strict=False) for text in limits.perSourcePenaltyExemptList
        )
        self._until: dict[int, dict[IPNetwork, float]] = {4: {}, 6: {}}
        self._nextSweep = -math.inf

    def source(self, host: str) -> IPNetwork | None:
        """The netblock that stands for ``host``; ``None`` for what is no IP address."""
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return None
        if address.version == 6 and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        bits = self._bits[0 if address.version == 4 else 1]
        return ipaddress.ip_network((address, bits), strict=False)

    def punish(self, host: str, offence: Offence, now: float) -> None:
        """Remember an offence of ``host``."""
        rules = self._rules
        source = self.source(host)
        seconds = rules.seconds(offence)
        if not rules.enabled or source is None or seconds <= 0 or self._isExempt(source):
            return
        known = self._until[source.version]
        if source not in known and len(known) >= rules.maxSources:
            self._forget(now)
            if len(known) >= rules.maxSources:
                return
        start = max(known.get(source, now), now)
        known[source] = min(start + seconds, now + rules.max)

    def refusedFor(self, host: str, now: float) -> float:
        """Seconds for which ``host`` is refused; 0 where it is welcome."""
        source = self.source(host)
        if source is None:
            return 0.0
        left = self._until[source.version].get(source, now) - now
        if left < self._rules.min:
            return 0.0
        return left

    def _isExempt(self, source: IPNetwork) -> bool:
        return any(
            source.version == network.version and source.network_address in network
            for network in self._exempt
        )

    def _forget(self, now: float) -> None:
        """Drop what has worn off; a full table is swept at most once a second."""
        if now < self._nextSweep:
            return
        self._nextSweep = now + 1
        for known in self._until.values():
            for source in [source for source, until in known.items() if until <= now]:
                del known[source]
