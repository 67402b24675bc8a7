"""Reading what is there: the pure twin of :mod:`conchkernel._fastpty`.

Runs in the agent. One call empties a terminal or pipe into one buffer, up to a limit: batches come
from draining, never from waiting, so that a single key goes on at once and a flood goes in large
pieces.
"""

from __future__ import annotations

import os
import time

#: The agent takes a compiled twin only if this number agrees.
ABI = 2
#: A flood fills a terminal while it is read. So long at most others wait, and those who pass on
#: what was read: if they rest for longer, the system's part of a terminal is slower, too.
TERMINAL_SECONDS = 0.0005


def drain(fd: int, limit: int, terminal: bool) -> tuple[bytes, bool]:
    """Read what ``fd`` (non-blocking) holds, up to ``limit`` bytes.

    :param terminal: ``fd`` is a terminal's master: it gives its bytes in small pieces, so read
        until it has no more, or :data:`TERMINAL_SECONDS` have passed; its end shows as ``EIO``.
        A pipe is read once.
    :returns: the bytes, and whether the end was met behind them.
    :raises OSError: for errors other than "nothing there now" and the end of a terminal.
    """
    try:
        data = os.read(fd, limit)
    except BlockingIOError:
        return b"", False
    except OSError:
        if terminal:
            return b"", True
        raise
    if not data:
        return b"", True
    if not terminal or len(data) >= limit:
        return data, False
    pieces = [data]
    limit -= len(data)
    until = time.monotonic() + TERMINAL_SECONDS
    try:
        while limit > 0 and time.monotonic() < until:
            data = os.read(fd, limit)
            if not data:
                return b"".join(pieces), True
            pieces.append(data)
            limit -= len(data)
    except BlockingIOError:
        pass
    except OSError:
        return b"".join(pieces), True
    return b"".join(pieces), False
