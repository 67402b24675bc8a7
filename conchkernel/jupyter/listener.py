"""A listener on the kernel's host, seen from the gateway: the receiver of its stream."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from zope.interface import implementer

from conchkernel.errors import LinkLost
from conchkernel.interfaces import IListener, Incoming, IStreamReceiver

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from conchkernel.interfaces import Exit, IStream
    from conchkernel.jupyter.kernelstream import KernelStream

#: A line of the agent's is much shorter; a longer one is none of its lines.
_LONGEST_LINE = 4096


@implementer(IListener, IStreamReceiver)
class KernelListener:
    """See :class:`IListener`.

    :param receiver: an :class:`~conchkernel.interfaces.IListenerReceiver`.
    :param open: opens a stream: given what OPEN says and the stream's receiver.
    :ivar ready: fires with this when it listens, or fails; to be given away once.
    """

    _log = Logger()

    def __init__(
        self, receiver: Any, open: Callable[[dict[str, Any], Any], KernelStream]
    ) -> None:
        self.port = 0
        self.path = b""
        self.ready: Deferred[Any] = Deferred(lambda _: self.close())
        self.stream: KernelStream | None = None
        self._receiver = receiver
        self._open = open
        self._listening = False
        self._closed = False
        self._line = b""

    # --- IListener ---------------------------------------------------------------------------

    def accept(self, incoming: Incoming, receiver: Any) -> IStream:
        """See :class:`IListener`."""
        return self._open(self._accepted(incoming), receiver)

    def refuse(self, incoming: Incoming) -> None:
        """See :class:`IListener`."""
        if not self._closed:
            self._open(self._accepted(incoming), _Nobody()).close()

    def _accepted(self, incoming: Incoming) -> dict[str, Any]:
        assert self.stream is not None
        # The number of one that is over may be another's by now, with another agent.
        number = 0 if self._closed else self.stream.number
        return {"kind": "accepted", "listener": number, "number": incoming.number}

    def close(self) -> None:
        """See :class:`IListener`."""
        if not self._closed:
            self._closed = True
            if self.stream is not None:
                self.stream.close()

    # --- the stream's receiver ---------------------------------------------------------------

    def streamOpened(self, info: Mapping[str, object]) -> None:
        """It listens."""
        self.port, path = _port(info.get("port")), info.get("path")
        self.path = path.encode("latin-1", "replace") if isinstance(path, str) else b""
        if not self._listening and not self._closed:
            self._listening = True
            self.ready.callback(self)

    def streamData(self, data: bytes | memoryview) -> None:
        """Lines of JSON, each somebody who connected."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            try:
                told = json.loads(line)
                incoming = Incoming(
                    int(told["number"]), str(told.get("host", ""))[:255], _port(told.get("port"))
                )
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self._log.error("the agent said something odd of a connection")
                continue
            if not self._closed:
                self._receiver.connectionAccepted(incoming)
        self._line = self._line[:_LONGEST_LINE]

    def streamExtendedData(self, data: bytes | memoryview) -> None:
        """A listener has none."""

    def streamConsumed(self, count: int) -> None:
        """Nothing is said to a listener."""

    def streamEOF(self) -> None:
        """Said by streamClosed, too."""

    def streamExited(self, exit: Exit) -> None:
        """A listener has no exit."""

    def streamClosed(self, reason: Exception | None) -> None:
        """It does not listen, or no more."""
        if reason is None:
            reason = LinkLost("the agent has closed the listener")
        closed, self._closed = self._closed, True
        if closed:
            return
        if self._listening:
            self._receiver.listenerLost(reason)
        else:
            self.ready.errback(reason)


def _port(told: object) -> int:
    """A TCP port; 0 where it is none."""
    return told if isinstance(told, int) and 0 <= told <= 65535 else 0


@implementer(IStreamReceiver)
class _Nobody:
    """Wants nothing of a stream."""

    def streamOpened(self, info: Mapping[str, object]) -> None: ...

    def streamData(self, data: bytes | memoryview) -> None: ...

    def streamExtendedData(self, data: bytes | memoryview) -> None: ...

    def streamConsumed(self, count: int) -> None: ...

    def streamEOF(self) -> None: ...

    def streamExited(self, exit: Exit) -> None: ...

    def streamClosed(self, reason: Exception | None) -> None: ...
