"""Ports for programs that must be told one."""

from __future__ import annotations

import random
import socket

#: Below those that systems give to whoever asks for any, or connects: such a port may be somebody's
#: by the time it is used. One of so many is not chosen twice at the same time.
_FIRST, _BEHIND = 10_000, 32_000


def free_port() -> int:
    """A port of loopback where nobody listens."""
    while True:
        port = random.randrange(_FIRST, _BEHIND)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
