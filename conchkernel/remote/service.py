"""What every service of the agent has in common: the frames that mean nothing to it.

A service is the receiver of one stream. It answers an OPEN by itself, with OPENED or REFUSED.
"""

from __future__ import annotations

from typing import Any

#: Codes of REFUSED (wire.md section 5).
CONNECT_FAILED, UNKNOWN_KIND, SHORTAGE = 2, 3, 4


class CannotServe(Exception):
    """The stream is refused; the text is a sentence for the user."""

    def __init__(self, message: str, code: int = SHORTAGE) -> None:
        super().__init__(message)
        self.code = code


class Service:
    """A receiver (see :mod:`conchkernel.wire`) to which nothing is said that it does not know."""

    def wire_control(self, frame_type: int, payload: bytes) -> None:
        """RESIZE, SIGNAL and BREAK are for processes, STOP for whoever sends output."""

    def wire_eof(self) -> None:
        """The gateway sends no more DATA."""

    def wire_sent(self, count: int) -> None:
        """Output left the queue."""

    def wire_credit(self) -> None:
        """The gateway takes more."""

    # Frames that only the gateway's end gets.

    def wire_opened(self, info: dict[str, Any]) -> None:
        """Not sent to an agent."""

    def wire_refused(self, code: Any, message: Any) -> None:
        """Not sent to an agent."""

    def wire_exit(self, info: dict[str, Any]) -> None:
        """Not sent to an agent."""
