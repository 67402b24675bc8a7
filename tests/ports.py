"""Ports for programs that must be told one."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

#: Below those that systems give to whoever asks for any, or connects: such a port may be somebody's
#: by the time it is used.
_FIRST, _BEHIND = 10_000, 32_000
#: The last one that was given to anybody. They are given in turn: of two that were chosen at random
#: before either is in use, sooner or later both are the same.
_LAST = Path(tempfile.gettempdir()) / f"conchkernel-test-ports-{os.getuid()}"


def free_port() -> int:
    """A port of loopback where nobody listens, and that nobody else is given soon."""
    while True:
        port = _next()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _next() -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(_LAST, flags, 0o600), "r+b", buffering=0) as last:
        fcntl.flock(last, fcntl.LOCK_EX)
        told = last.read(16)
        port = int(told) + 1 if told.isdigit() else _FIRST
        port = port if _FIRST <= port < _BEHIND else _FIRST
        last.seek(0)
        last.truncate()
        last.write(b"%d" % port)
    return port
