"""Taking connections, also when there are no descriptors left. Runs in the agent."""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import Any


class Door:
    """Keeps a descriptor to spare."""

    def __init__(self) -> None:
        self._spare = os.open(os.devnull, os.O_RDONLY)

    def accept(self, listener: socket.socket) -> tuple[socket.socket, Any] | None:
        """The next connection and its address; ``None`` if there is none, or none can be had.

        Out of descriptors, a connection that cannot be taken would wake the loop for ever: the
        spare one lets it be taken and closed.
        """
        try:
            return listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away(listener)
            return None

    def _turn_away(self, listener: socket.socket) -> None:
        try:
            if self._spare >= 0:
                os.close(self._spare)
                self._spare = -1
                listener.accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            time.sleep(0.01)  # somebody else was quicker; the loop must not spin until it is better
