"""Lines of an ``authorized_keys`` file (sshd(8), AUTHORIZED_KEYS FILE FORMAT).

A line is taken with all its options or not at all: one that is not honoured would give more than
the line was written for. Options that take back what this gateway never gives (X11, user rc) are
honoured by that.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, replace

from conchkernel.ssh import userkeys
from conchkernel.ssh.permissions import Directions, Permissions, Place, listenPlace, openPlace

_KEY_TYPES = frozenset(name.decode("ascii") for name in userkeys.SIGNATURE_ALGORITHMS.values())

_DEFAULT = Permissions()
_NOTHING = replace(
    _DEFAULT, tcp=Directions.NONE, streamLocal=Directions.NONE, agent=False, pty=False
)


@dataclass(frozen=True, slots=True)
class AuthorizedKey:
    """A key that may log in."""

    blob: bytes
    permissions: Permissions = _DEFAULT
    """What its options leave."""


def parse(line: str) -> AuthorizedKey | None:
    """The key of one line; ``None`` where there is none.

    :raises ValueError: the line cannot be used; the text says why, as "it ...".
    """
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    permissions = _DEFAULT
    kind, rest = _word(line)
    if kind not in _KEY_TYPES:
        options, rest = _split(line)
        permissions = _permissions(options)
        kind, rest = _word(rest)
        if kind not in _KEY_TYPES:
            raise ValueError("has options or a key type that are not supported")
    try:
        return AuthorizedKey(base64.b64decode(rest.split()[0], validate=True), permissions)
    except (IndexError, binascii.Error):
        raise ValueError("is not a key") from None


def _word(line: str) -> tuple[str, str]:
    """What stands before the first blank or tab, and what behind."""
    word, *rest = line.split(None, 1) or [""]
    return word, "".join(rest)


def _split(line: str) -> tuple[list[str], str]:
    """The options at a line's beginning, and what follows them."""
    options, option, quoted, position = [], "", False, 0
    while position < len(line):
        letter = line[position]
        if letter == "\\" and line[position + 1 : position + 2] == '"':
            position += 1
            option += '"'
        elif letter == '"':
            quoted = not quoted
        elif letter == "," and not quoted:
            options.append(option)
            option = ""
        elif letter in " \t" and not quoted:
            break
        else:
            option += letter
        position += 1
    if quoted:
        raise ValueError("has a quotation mark too few")
    return [*options, option], line[position:].strip()


def _permissions(options: list[str]) -> Permissions:
    found = _DEFAULT
    for option in options:
        name, equals, value = option.partition("=")
        name = name.lower()
        allowed = not name.startswith("no-")
        if equals and name in ("permitopen", "permitlisten"):
            try:
                if name == "permitopen":
                    found = replace(found, opens=_more(found.opens, openPlace(value)))
                else:
                    found = replace(found, listens=_more(found.listens, listenPlace(value)))
            except ValueError as error:
                raise ValueError(f"has a {name} that cannot be used: {error}") from None
        elif equals:
            raise ValueError("has options or a key type that are not supported")
        elif name == "restrict":
            found = replace(_NOTHING, opens=found.opens, listens=found.listens)
        elif name in ("port-forwarding", "no-port-forwarding"):
            directions = Directions.BOTH if allowed else Directions.NONE
            found = replace(found, tcp=directions, streamLocal=directions)
        elif name in ("agent-forwarding", "no-agent-forwarding"):
            found = replace(found, agent=allowed)
        elif name in ("pty", "no-pty"):
            found = replace(found, pty=allowed)
        elif name not in ("x11-forwarding", "no-x11-forwarding", "user-rc", "no-user-rc"):
            raise ValueError("has options or a key type that are not supported")
    return found


def _more(places: tuple[tuple[Place, ...], ...], place: Place) -> tuple[tuple[Place, ...]]:
    """One list with ``place`` added: a key may go to each of its places."""
    return ((*(places[0] if places else ()), place),)
