"""A stream's receiver for tests: collects output, takes it at the test's pace, waits for events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from zope.interface import implementer

from conchkernel.interfaces import Exit, IStreamReceiver, ProcessRequest

AHEAD = 2 * 1024 * 1024
#: An event that has not come by then does not come.
PATIENCE_SECONDS = 30


@implementer(IStreamReceiver)
class Collector:
    """Collects what a process says.

    :param limit: how much it grants in all; ``None`` to go on granting as it takes.
    :param keep: whether bytes are kept or only counted.
    """

    def __init__(self, limit: int | None = None, *, keep: bool = True) -> None:
        self.out = bytearray()
        self.err = bytearray()
        self.count = 0
        self.consumed = 0
        self.opened: Mapping[str, object] | None = None
        self.eof = False
        self.exit: Exit | None = None
        self.reason: Exception | None = None
        self.closed = False
        self.order: list[str] = []
        self.stream: Any = None
        self._limit = limit
        self._keep = keep
        self._waiting: list[tuple[Any, Deferred[None]]] = []

    def start(self, link: Any, request: ProcessRequest) -> Any:
        """Open the process and grant."""
        self.stream = link.openProcess(request, self)
        self.stream.grant(AHEAD if self._limit is None else self._limit)
        return self.stream

    def until(self, condition: Any) -> Deferred[None]:
        """Fires when ``condition()`` holds after some event."""
        waiting: Deferred[None] = Deferred()
        waiting.addTimeout(PATIENCE_SECONDS, reactor)
        self._waiting.append((condition, waiting))
        self._check()
        return waiting

    def untilClosed(self) -> Deferred[None]:
        """Fires at the stream's end."""
        return self.until(lambda: self.closed)

    def untilOutput(self, text: bytes) -> Deferred[None]:
        """Fires when the output holds ``text``."""
        return self.until(lambda: text in self.out or self.closed)

    def _check(self) -> None:
        for entry in list(self._waiting):
            if entry[0]():
                self._waiting.remove(entry)
                if not entry[1].called:
                    entry[1].callback(None)

    def streamOpened(self, info: Mapping[str, object]) -> None:
        self.order.append("opened")
        self.opened = info
        self._check()

    def streamData(self, data: bytes) -> None:
        self._take(data, self.out)

    def streamExtendedData(self, data: bytes) -> None:
        self._take(data, self.err)

    def _take(self, data: bytes, into: bytearray) -> None:
        if self.order[-1:] != ["data"]:
            self.order.append("data")
        self.count += len(data)
        if self._keep:
            into += data
        if self._limit is None:
            self.stream.grant(self.count + AHEAD)
        self._check()

    def streamConsumed(self, count: int) -> None:
        self.consumed += count
        self._check()

    def streamEOF(self) -> None:
        self.order.append("eof")
        self.eof = True
        self._check()

    def streamExited(self, exit: Exit) -> None:
        self.order.append("exited")
        self.exit = exit
        self._check()

    def streamClosed(self, reason: Exception | None) -> None:
        assert not self.closed
        self.order.append("closed")
        self.closed = True
        self.reason = reason
        self._check()
