"""The public test kit: a kernel's road in memory.

:class:`MemoryBackend` gives :class:`MemoryLink`, whose processes are scripted by the test and keep
the contract of :mod:`conchkernel.interfaces` to the byte: no output beyond what was granted, input
counted as taken only when the script takes it. Nothing here needs a reactor or a network.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from conchkernel.interfaces import (
    Exit,
    ExitStatus,
    IBackend,
    IKernelLink,
    IStream,
    IStreamReceiver,
    ProcessRequest,
    WindowSize,
)

if TYPE_CHECKING:
    from collections.abc import Callable


SUCCESS = ExitStatus(0)


@implementer(IStream)
class MemoryStream:
    """A process that does what a test tells it.

    :ivar received: input that was taken.
    :ivar waiting: input that was written and not taken yet.
    :ivar calls: everything else that was asked of the stream, in order.
    """

    def __init__(self, request: ProcessRequest, receiver: IStreamReceiver) -> None:
        self.request = request
        self.receiver = receiver
        #: Called as input is written; a script may set it to answer.
        self.onInput: Callable[[], None] = lambda: None
        #: Called when the input's end is written, after all input was taken.
        self.onInputEOF: Callable[[], None] = lambda: None
        #: Called when nothing waits to be sent.
        self.onDrained: Callable[[], None] = lambda: None
        #: Called when the client's side reads no more, or gives the stream up.
        self.onHangup: Callable[[], None] = lambda: None
        self.received = bytearray()
        self.waiting = bytearray()
        self.inputEOF = False
        self.limit = 0
        self.sent = 0
        self.calls: list[tuple[object, ...]] = []
        self.closed = False
        self._reading = True
        self._delivering = False
        self._output: deque[tuple[str, Any]] = deque()

    # --- for the script ----------------------------------------------------------------------

    def opened(self, **info: object) -> None:
        """The process runs."""
        self.receiver.streamOpened(info)

    def take(self, count: int | None = None) -> bytes:
        """Read input as the process would, all that waits or ``count`` bytes."""
        count = len(self.waiting) if count is None else min(count, len(self.waiting))
        data = bytes(self.waiting[:count])
        del self.waiting[:count]
        self.received += data
        if data:
            self.receiver.streamConsumed(len(data))
        if self.inputEOF and not self.waiting:
            self.onInputEOF()
        return data

    def put(self, data: bytes) -> None:
        """Write to stdout or the terminal; what is not granted yet waits."""
        self._queue("data", data)

    def putError(self, data: bytes) -> None:
        """Write to stderr."""
        self._queue("error", data)

    def putEOF(self) -> None:
        """Close stdout and stderr after what was written."""
        self._queue("eof", None)

    def end(self, exit: Exit | None = SUCCESS, reason: Exception | None = None) -> None:
        """End after all output: EOF, ``exit`` if there is one, closed with ``reason``."""
        if exit is not None:
            self._queue("eof", None)
            self._queue("exit", exit)
        self._queue("closed", reason)

    def lose(self, reason: Exception) -> None:
        """The road is cut: what was not sent is lost."""
        self._output.clear()
        self._queue("closed", reason)

    @property
    def pending(self) -> int:
        """Output that the process wrote and nobody granted yet."""
        return sum(len(data) for _, data in self._output if isinstance(data, bytes))

    # --- IStream -----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        assert not self.inputEOF, "input after its end"
        self.waiting += data
        self.onInput()

    def writeEOF(self) -> None:
        assert not self.inputEOF, "input ends twice"
        self.inputEOF = True
        if not self.waiting:
            self.onInputEOF()

    def grant(self, limit: int) -> None:
        self.limit = max(self.limit, limit)
        self._deliver()

    def resize(self, size: WindowSize) -> None:
        self.calls.append(("resize", size))

    def signal(self, name: str) -> None:
        self.calls.append(("signal", name))

    def sendBreak(self, milliseconds: int) -> None:
        self.calls.append(("break", milliseconds))

    def stopReading(self) -> None:
        self.calls.append(("stopReading",))
        self._reading = False
        self._output = deque(item for item in self._output if not isinstance(item[1], bytes))
        self.onHangup()
        self._deliver()

    def close(self) -> None:
        if not self.closed and ("close",) not in self.calls:
            self.calls.append(("close",))
            self.onHangup()
            self.lose_quietly()

    def lose_quietly(self) -> None:
        """The stream closes in the ordinary way, without what was not sent."""
        self._output.clear()
        self._queue("closed", None)

    # --- within ------------------------------------------------------------------------------

    def _queue(self, kind: str, data: object) -> None:
        if self.closed or (isinstance(data, bytes) and not self._reading):
            return
        self._output.append((kind, data))
        self._deliver()

    def _deliver(self) -> None:
        if self._delivering:
            return
        self._delivering = True
        while self._output and not self.closed:
            kind, data = self._output.popleft()
            if isinstance(data, bytes):
                room = self.limit - self.sent
                if len(data) > room:
                    self._output.appendleft((kind, data[room:]))
                    data = data[:room]
                if not data:
                    break
                self.sent += len(data)
                if kind == "data":
                    self.receiver.streamData(data)
                else:
                    self.receiver.streamExtendedData(data)
            elif kind == "eof":
                self.receiver.streamEOF()
            elif kind == "exit":
                self.receiver.streamExited(data)
            else:
                self.closed = True
                self._output.clear()
                self.receiver.streamClosed(data)
        self._delivering = False
        if not self._output and not self.closed:
            self.onDrained()


@implementer(IKernelLink)
class MemoryLink:
    """A link whose processes are :class:`MemoryStream`.

    :param program: called with each stream that is opened, to script it.
    """

    def __init__(self, program: Callable[[MemoryStream], None] | None = None) -> None:
        self.streams: list[MemoryStream] = []
        self.released = False
        self._program = program

    def openProcess(self, request: ProcessRequest, receiver: IStreamReceiver) -> IStream:
        stream = MemoryStream(request, receiver)
        self.streams.append(stream)
        if self._program is not None:
            self._program(stream)
        return stream

    def release(self) -> None:
        if not self.released:
            self.released = True
            for stream in self.streams:
                stream.close()


@implementer(IBackend)
class MemoryBackend:
    """Gives a new :class:`MemoryLink` to whoever connects.

    :ivar users: who connected, in order.
    :ivar links: what they got.
    """

    def __init__(self, program: Callable[[MemoryStream], None] | None = None) -> None:
        self.users: list[str] = []
        self.links: list[MemoryLink] = []
        #: While set, whoever connects waits until :meth:`answer`.
        self.slow = False
        self.waiting: list[Deferred[IKernelLink]] = []
        self._program = program

    def connect(self, user: str) -> Deferred[IKernelLink]:
        self.users.append(user)
        if self.slow:
            waiting: Deferred[IKernelLink] = Deferred(self.waiting.remove)
            self.waiting.append(waiting)
            return waiting
        return succeed(self._newLink())

    def answer(self, error: Exception | None = None) -> None:
        """Let the one who waits longest have a link, or ``error``."""
        waiting = self.waiting.pop(0)
        if error is None:
            waiting.callback(self._newLink())
        else:
            waiting.errback(error)

    def _newLink(self) -> IKernelLink:
        link = MemoryLink(self._program)
        self.links.append(link)
        return link
