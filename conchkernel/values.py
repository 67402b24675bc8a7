"""What the text of an option may be: judges, which give the value or say why it is none.

A judge raises :class:`ValueError` with half a sentence; :class:`Value` puts the option's name in
front. Syntax, names and defaults are those of sshd_config(5) wherever sshd has the option.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import ipaddress
import math
import re
from typing import TYPE_CHECKING, Any

from twisted.python import usage

from conchkernel.ssh.limits import Limits, PenaltyRules
from conchkernel.ssh.permissions import (
    Directions,
    GatewayPorts,
    Place,
    listenPlace,
    openPlace,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    Judge = Callable[[str], Any]


class Value:
    """Judges one option's text, and names the option when it is no good."""

    def __init__(self, option: str, judge: Judge) -> None:
        self._option = option
        self._judge = judge

    def __call__(self, text: str) -> Any:
        try:
            return self._judge(text)
        except ValueError as error:
            raise usage.UsageError(f"--{self._option}: {error}") from None


def wholeNumber(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Decimal digits within bounds."""

    def judge(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
            span = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{text!r} is not a whole number {span}")
        return int(text)

    return judge


def absolutePath(text: str) -> str:
    """A path on another host, where nobody could say what it is relative to."""
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is no absolute path")
    return text


def oneOf(*words: str) -> Callable[[str], str]:
    """One of some words."""

    def judge(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text

    return judge


_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,6})?"
_TIME = re.compile(rf"(?:{_NUMBER}[smhdw])*{_NUMBER}[smhdw]?", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE = re.compile(rf"({_NUMBER})([kmg]?)", re.IGNORECASE)
_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def seconds(text: str) -> float:
    """A time as sshd_config(5) has them: ``90``, ``2m``, ``1h30m``."""
    if not _TIME.fullmatch(text):
        raise ValueError(f"{text!r} is not a time such as 90, 2m or 1h30m")
    parts = re.findall(rf"({_NUMBER})([smhdw]?)", text.lower())
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def size(text: str) -> float:
    """A size as sshd_config(5) has them: ``512M``, ``1G``."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 512M or 1G")
    return float(match[1]) * _BYTES[match[2].lower()]


def startups(text: str) -> tuple[int, int, int]:
    """MaxStartups: ``START:RATE:FULL``, or ``FULL`` alone."""
    match = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,3}):([0-9]{1,6}))?", text)
    if match is not None:
        start, rate, full = int(match[1]), int(match[2] or 100), int(match[3] or match[1])
        if 1 <= start <= full and 1 <= rate <= 100:
            return start, rate, full
    raise ValueError(f"{text!r} is not START:RATE:FULL, such as 10:30:100")


def rekey(text: str) -> tuple[int, float]:
    """RekeyLimit: a size and perhaps a time; ``default`` and ``none`` are ours and no limit."""
    first, _, time = text.partition(" ")
    most = Limits().rekeyLimitBytes if first == "default" else int(size(first))
    if most < 1 << 20:
        raise ValueError(f"{first!r} is less than 1M")
    if time == "none":
        return most, 0
    return most, seconds(time) if time else Limits().rekeyLimitSeconds


def unlessNone(judge: Judge) -> Judge:
    """What ``judge`` takes, or the word ``none``."""
    return lambda text: None if text == "none" else judge(text)


def blocks(text: str) -> tuple[int, int]:
    """PerSourceNetBlockSize: bits of an IPv4 address, and perhaps of an IPv6 one."""
    match = re.fullmatch(r"([0-9]{1,2})(?::([0-9]{1,3}))?", text)
    if match is not None:
        bits = int(match[1]), int(match[2] or Limits().perSourceNetBlockSize[1])
        if bits[0] <= 32 and bits[1] <= 128:
            return bits
    raise ValueError(f"{text!r} is not a pair of bits such as 24:64")


_PENALTIES = {
    "authfail": "authfail",
    "noauth": "noauth",
    "grace-exceeded": "graceExceeded",
    "crash": "crash",
    "min": "min",
    "max": "max",
}


def penalties(text: str) -> PenaltyRules:
    """PerSourcePenalties: ``yes``, ``no``, or times by name, such as ``authfail:30s max:1h``."""
    if text in ("yes", "no"):
        return PenaltyRules(enabled=text == "yes")
    changes: dict[str, Any] = {}
    for word in text.split():
        name, _, time = word.partition(":")
        if name not in _PENALTIES:
            raise ValueError(f"{word!r} is not yes, no, or a time for {', '.join(_PENALTIES)}")
        changes[_PENALTIES[name]] = seconds(time)
    if not changes:
        raise ValueError("it is empty")
    return dataclasses.replace(PenaltyRules(), **changes)


def networks(text: str) -> tuple[str, ...]:
    """PerSourcePenaltyExemptList: addresses and networks, with commas between them."""
    found: list[str] = []
    for word in [] if text == "none" else text.split(","):
        try:
            found.append(str(ipaddress.ip_network(word, strict=False)))
        except ValueError:
            raise ValueError(f"{word!r} is no address or network such as 192.0.2.0/24") from None
    return tuple(found)


def algorithms(known: Collection[bytes]) -> Callable[[str], tuple[bytes, ...]]:
    """Names with commas between them; after ``-`` those to leave out, after ``^`` or ``+`` those to
    put first or last."""
    default = tuple(name.decode("ascii") for name in known)

    def judge(text: str) -> tuple[bytes, ...]:
        sign, words = (text[0], text[1:]) if text[:1] in ("-", "+", "^") else ("", text)
        named: list[str] = []
        for word in words.split(","):
            matching = [name for name in default if fnmatch.fnmatchcase(name, word)]
            if not matching:
                raise ValueError(f"{word!r} is none of {', '.join(default)}")
            named += matching
        others = [name for name in default if name not in named]
        chosen = {"": named, "-": others, "^": named + others, "+": [*default, *named]}[sign]
        if not chosen:
            raise ValueError(f"{text!r} leaves nothing")
        return tuple(name.encode("ascii") for name in dict.fromkeys(chosen))

    return judge


def methods(known: Collection[bytes]) -> Callable[[str], tuple[tuple[bytes, ...], ...]]:
    """AuthenticationMethods: lists with spaces between them, or ``any``."""
    names = [name.decode("ascii") for name in known]

    def judge(text: str) -> tuple[tuple[bytes, ...], ...]:
        if text == "any":
            return ()
        lists = [words.split(",") for words in text.split()]
        for word in (word for words in lists for word in words):
            if word not in names:
                raise ValueError(f"{word!r} is none of {', '.join(names)}")
        if not lists:
            raise ValueError("it is empty")
        return tuple(tuple(word.encode("ascii") for word in words) for words in lists)

    return judge


def directions(text: str) -> Directions:
    """AllowTcpForwarding: ``yes``, ``all``, ``no``, ``local`` or ``remote``."""
    known = {
        "yes": Directions.BOTH,
        "all": Directions.BOTH,
        "no": Directions.NONE,
        "local": Directions.LOCAL,
        "remote": Directions.REMOTE,
    }
    return known[oneOf(*known)(text)]


def yesOrNo(text: str) -> bool:
    """``yes`` or ``no``."""
    return oneOf("yes", "no")(text) == "yes"


def gatewayPorts(text: str) -> GatewayPorts:
    """GatewayPorts: ``no``, ``yes`` or ``clientspecified``."""
    return GatewayPorts(oneOf(*(one.value for one in GatewayPorts))(text))


def places(judge: Callable[[str], Place]) -> Callable[[str], tuple[tuple[Place, ...], ...]]:
    """PermitOpen and PermitListen: places with spaces between them, ``any`` or ``none``."""

    def permitted(text: str) -> tuple[tuple[Place, ...], ...]:
        words = text.split()
        if not words:
            raise ValueError("it is empty")
        if words == ["any"]:
            return ()
        return (() if words == ["none"] else tuple(map(judge, words)),)

    return permitted


#: Options that are permissions, by sshd's names: the field of :class:`Permissions` that the value
#: fills, what judges it, and the description.
PERMISSIONS: dict[str, tuple[str, Judge, str]] = {
    "allow-tcp-forwarding": (
        "tcp",
        directions,
        "Whether TCP connections are forwarded: yes, no, 'local' for ssh -L and -D only, or "
        "'remote' for -R. (default: yes)",
    ),
    "allow-stream-local-forwarding": (
        "streamLocal",
        directions,
        "The same for Unix sockets. (default: yes)",
    ),
    "allow-agent-forwarding": (
        "agent",
        yesOrNo,
        "Whether ssh -A is served. (default: yes)",
    ),
    "gateway-ports": (
        "gatewayPorts",
        gatewayPorts,
        "Where ssh -R listens on the kernel's host: on loopback with 'no', on every address with "
        "'yes', where the client says with 'clientspecified'. (default: no)",
    ),
    "permit-open": (
        "opens",
        places(openPlace),
        "Where ssh -L and -D may lead: HOST:PORT, with spaces between several and * for any of "
        "either; or none. Any but *:* also keeps them from Unix sockets. (default: any)",
    ),
    "permit-listen": (
        "listens",
        places(listenPlace),
        "Where ssh -R may listen: PORT or HOST:PORT, likewise. (default: any)",
    ),
}

#: Options that are limits of the SSH side, by sshd's names: the fields of :class:`Limits` that the
#: value fills, what judges it, and the description.
LIMITS: dict[str, tuple[tuple[str, ...], Judge, str]] = {
    "login-grace-time": (
        ("loginGraceTime",),
        seconds,
        "Time that a client has to log in; 0 is for ever. (default: 2m)",
    ),
    "max-auth-tries": (
        ("maxAuthTries",),
        wholeNumber(1),
        "Failed attempts after which a connection is closed. (default: 6)",
    ),
    "max-startups": (
        ("maxStartups",),
        startups,
        "Connections not logged in: from START on, RATE percent are refused, and all from FULL "
        "on. (default: 10:30:100)",
    ),
    "max-sessions": (
        ("maxSessions",),
        wholeNumber(1),
        "Sessions that one connection may have open. (default: 10)",
    ),
    "per-source-max-startups": (
        ("perSourceMaxStartups",),
        unlessNone(wholeNumber(1)),
        "Connections not logged in that one source may have. (default: none)",
    ),
    "per-source-net-block-size": (
        ("perSourceNetBlockSize",),
        blocks,
        "Bits of an IPv4 and of an IPv6 address that make one source. (default: 32:128)",
    ),
    "per-source-penalties": (
        ("perSourcePenalties",),
        penalties,
        "Whether sources of failed logins are refused for a while: yes, no, or times such as "
        "'authfail:30s max:1h'. (default: yes)",
    ),
    "per-source-penalty-exempt-list": (
        ("perSourcePenaltyExemptList",),
        networks,
        "Addresses and networks that are never refused so, with commas between them. "
        "(default: none)",
    ),
    "required-rsa-size": (
        ("requiredRSASize",),
        wholeNumber(1024, 16384),
        "Bits that a user's RSA key must have. (default: 2048)",
    ),
    "client-alive-interval": (
        ("clientAliveInterval",),
        seconds,
        "Silence after which a client is asked whether it is there; 0 never asks. (default: 0)",
    ),
    "client-alive-count-max": (
        ("clientAliveCountMax",),
        wholeNumber(1),
        "Questions without an answer after which a client is given up. (default: 3)",
    ),
    "rekey-limit": (
        ("rekeyLimitBytes", "rekeyLimitSeconds"),
        rekey,
        "Bytes, and perhaps a time, after which keys are made anew. (default: '1G 1h')",
    ),
}
