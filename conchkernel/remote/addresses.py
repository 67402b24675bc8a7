"""What an OPEN says of an address, as the system's own addresses.

Runs in the agent. Numeric addresses are at hand at once; names take a thread's time.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from conchkernel.remote.service import CONNECT_FAILED, CannotServe

if TYPE_CHECKING:
    #: family, type, protocol, address: what a socket is made of, and what it connects or binds to.
    Address = tuple[int, int, int, Any]


def numeric(host: str, port: int, *, passive: bool = False) -> list[Address]:
    """The addresses of a host that is written as a number; empty for a name."""
    try:
        return _look_up(host, port, socket.AI_NUMERICHOST, passive)
    except (OSError, UnicodeError):
        return []


def named(host: str, port: int, *, passive: bool = False) -> list[Address]:
    """The addresses of a host. May take long.

    :raises OSError: there are none, with the system's words for it.
    """
    try:
        return _look_up(host, port, 0, passive)
    except UnicodeError:
        raise OSError(0, "not a host's name") from None


def _look_up(host: str, port: int, flags: int, passive: bool) -> list[Address]:
    flags |= socket.AI_PASSIVE if passive else 0
    found = socket.getaddrinfo(host or None, port, 0, socket.SOCK_STREAM, 0, flags)
    return [(family, kind, protocol, address) for family, kind, protocol, _, address in found]


def host_and_port(parameters: dict[str, Any], least: int) -> tuple[str, int]:
    """``host`` and ``port`` of an OPEN.

    :param least: the lowest port there may be.
    """
    host, port = parameters.get("host"), parameters.get("port")
    if not isinstance(host, str) or "\0" in host:
        raise CannotServe("the request has no host")
    if type(port) is not int or not least <= port <= 65535:
        raise CannotServe(f"there is no port {port}"[:100], CONNECT_FAILED)
    return host, port


def socket_path(parameters: dict[str, Any]) -> str:
    """``path`` of an OPEN. That it is not too long is the system's business."""
    try:
        path = parameters["path"].encode("latin-1")
    except (AttributeError, KeyError, UnicodeError):
        raise CannotServe("the request has no path") from None
    if not path.startswith(b"/") or b"\0" in path:
        raise CannotServe("the path of a socket must be absolute", CONNECT_FAILED)
    return os.fsdecode(path)


def why(error: OSError) -> str:
    """The system's own words for what went wrong."""
    return error.strerror or str(error)
