"""Jupyter URLs as people paste them, and the base URLs they may mean.

Sans-IO. A pasted URL says where somebody looked, not where the server's root is: that is found by
asking (:mod:`conchkernel.jupyter.discovery`), and this module says in which order. What goes to a
log goes through :func:`redact` first.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from conchkernel.errors import ConfigurationError

#: Longer than any URL that a browser makes; a longer one is a paste gone wrong.
MAX_URL_LENGTH = 8192
#: Bases probed for one URL. A server's root is seldom deeper, files in a URL often are.
MAX_CANDIDATES = 12

_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}
_DEFAULT_PORTS = {"http": 80, "https": 443}

#: Two path segments after which everything names a file or a workspace, never a server.
_BELOW_THE_SERVER = {
    ("lab", "tree"),
    ("lab", "workspaces"),
    ("doc", "tree"),
    ("doc", "workspaces"),
}

#: What a path may hold as it is; the rest is percent-encoded, what is encoded already stays.
_PATH_SAFE = "/%:@!$&'()*+,;=~-._"

_TOKEN_PARAMETER = re.compile(r"(?i)(token(?:=|%3D))(?:(?!%26)[^&#\s\"'<>;])+")
_AUTHORIZATION = re.compile(r"(?i)(\bauthorization['\"]?\s*[:=]\s*(?:b?['\"])?\w+\s+)[^\s'\",]+")
_USER_INFO = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)[^/\s@]*@")
_KAGGLE = re.compile(r"(/k/[^/\s]+/)[^/\s?#]+(?=/proxy\b)")


def redact(text: str) -> str:
    """``text`` with the secrets of every URL in it replaced by ``***``.

    Tokens in query and fragment, user names and passwords before the host, the token in the path
    of a Kaggle proxy, and what follows ``Authorization:``.
    """
    text = _TOKEN_PARAMETER.sub(r"\1***", text)
    text = _AUTHORIZATION.sub(r"\1***", text)
    text = _USER_INFO.sub(r"\1***@", text)
    return _KAGGLE.sub(r"\1***", text)


@dataclass(frozen=True, slots=True, repr=False)
class JupyterLocation:
    """Where a Jupyter server may be, and what opens it."""

    base: str
    """The root of its API without a slash at the end: ``http://host:8888/user/alice``."""
    token: str = ""
    """Empty where none was given."""

    def __repr__(self) -> str:
        secret = "***" if self.token else ""
        return f"<JupyterLocation {redact(self.base)} token={secret!r}>"

    @property
    def host(self) -> str:
        """The host's name or address, an IPv6 address without its brackets."""
        return urlsplit(self.base).hostname or ""


def candidates(text: str) -> list[JupyterLocation]:
    """What a pasted URL may mean, the deepest path first.

    :param text: a URL with or without scheme, token, and whatever page of Jupyter's it shows;
        whitespace, quotes and angle brackets around it are ignored.
    :returns: at least one and at most :data:`MAX_CANDIDATES` locations on the same host.
    :raises ConfigurationError: if there is no host in it.
    """
    text = text.strip().strip("\"'`<>").strip()
    if not text:
        raise ConfigurationError("the Jupyter URL is empty")
    if len(text) > MAX_URL_LENGTH or any(c.isspace() or ord(c) < 32 for c in text):
        raise ConfigurationError("the Jupyter URL is not a URL; paste one from a browser")
    scheme, origin, path, query, fragment = _split(text)
    token = _token(query) or _token(fragment)
    segments = [quote(segment, safe=_PATH_SAFE) for segment in path.split("/") if segment]
    return [JupyterLocation(f"{scheme}://{origin}{base}", token) for base in _bases(segments)]


def spawn_page(base: str) -> str:
    """Where a JupyterHub starts the server of a base URL, ``.../user/NAME`` or
    ``.../user/NAME/SERVER``; elsewhere the host's root."""
    root, separator, server = base.rpartition("/user/")
    if separator and server.count("/") < 2:
        return f"{root}/hub/spawn/{server}"
    parts = urlsplit(base)
    return f"{parts.scheme}://{parts.netloc}/"


def _split(text: str) -> tuple[str, str, str, str, str]:
    """Scheme, host with port, path, query and fragment."""
    given, separator, rest = text.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", given):
        # A bare IPv6 address has colons enough to look like anything.
        given, rest = "", text.removeprefix("//")
        head = re.split(r"[/?#]", rest, maxsplit=1)[0]
        if head.count(":") > 1 and not head.startswith("["):
            rest = f"[{head}]{rest[len(head) :]}"
    try:
        parts = urlsplit("//" + rest)
        host, port = parts.hostname or "", parts.port
        if ":" in host:
            ipaddress.IPv6Address(host.partition("%")[0])
        name = host if ":" in host else host.encode("idna").decode("ascii") if host else ""
    except ValueError:
        # Not chained: the text of the cause quotes the URL.
        raise ConfigurationError("the Jupyter URL has no valid host and port") from None
    if given and given.lower() not in _SCHEMES:
        raise ConfigurationError("the Jupyter URL must begin with http:// or https://")
    if not name or port == 0 or re.search(r"[^\w.:%\-]", name):
        raise ConfigurationError(
            "the Jupyter URL names no host; it looks like http://host:8888/?token=..."
        )
    if parts.username is not None:
        raise ConfigurationError("the Jupyter URL must not hold a user name; use its token")
    scheme = _SCHEMES[given.lower()] if given else _guessed(host, port)
    origin = f"[{name}]" if ":" in name else name
    if port is not None and port != _DEFAULT_PORTS[scheme]:
        origin += f":{port}"
    return scheme, origin, parts.path, parts.query, parts.fragment


def _guessed(host: str, port: int | None) -> str:
    """The scheme that somebody meant who wrote none."""
    if port == _DEFAULT_PORTS["https"]:
        return "https"
    if port is not None or host == "localhost" or host.endswith(".localhost"):
        return "http"
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "https"
    return "http"


def _token(parameters: str) -> str:
    """The token in a query or a fragment (JupyterLab's ``#token=``), or nothing."""
    for name, value in parse_qsl(parameters.lstrip("?")):
        if name == "token" and value:
            if not value.isascii() or not value.isprintable() or " " in value:
                raise ConfigurationError("the token in the Jupyter URL has impossible characters")
            return value
    return ""


def _bases(segments: list[str]) -> list[str]:
    """Every prefix of a path, longest first, that can be the root of a server."""
    if segments[:1] == ["k"] and segments[3:4] == ["proxy"]:
        # Kaggle: the path is the secret, and above it there is nothing of ours.
        return ["/" + "/".join(segments[:4])]
    plain = [unquote(segment) for segment in segments]
    deepest = len(segments)
    for index, pair in enumerate(pairwise(plain)):
        # In /user/lab/tree a person is called lab.
        if pair in _BELOW_THE_SERVER and plain[max(0, index - 1) : index] != ["user"]:
            deepest = index + 1
            break
    bases = ["/" + "/".join(segments[:depth]) for depth in range(deepest, 0, -1)]
    return [*bases, ""][-MAX_CANDIDATES:]
