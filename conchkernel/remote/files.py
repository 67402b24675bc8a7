"""The agent's file service: the receiver of one stream of kind ``files``.

Runs in the agent. Requests come as DATA, are done one after another in the order they came, and
their answers go back as DATA. The system calls are made on a thread of the stream's own, so that a
disk that is slow, or a network file system that hangs, keeps no shell waiting: only its own stream.
The loop and the thread share one :class:`_Exchange` and nothing else.

What is bounded: requests by the credit that the agent gives, answers by the credit that it is given
and by ``AHEAD``; a READ's bytes are read from the disk only when there is room for them.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from conchkernel import frames, wirestream
from conchkernel.remote import filewire as fw
from conchkernel.remote.fileops import SLOW, Malformed, Operations
from conchkernel.remote.service import CannotServe, Service

if TYPE_CHECKING:
    from collections.abc import Callable

    from conchkernel.remote.agent import Agent, Session
    from conchkernel.remote.fileops import Answer

#: Answers that may wait for the carrier.
AHEAD = 512 * 1024
#: Answers, or requests that were done, that make it worth while to wake the loop.
BATCH = 128 * 1024
#: Answers up to here are joined: a frame for each would be longer than they are.
SMALL = 1024
#: Streams of this kind in one agent, each with its thread.
MAX_SERVICES = 64

FEATURES = (
    "modes", "links", "hardlinks", "statvfs", "sync", "times", "offset-writes", "write-last",
)  # fmt: skip


class _Over(Exception):
    """The stream is over: the thread ends."""


class _Exchange:
    """What the loop and the thread hand each other; each name is written by one side only."""

    def __init__(self) -> None:
        # The loop's.
        self.requests: SimpleQueue[bytes | None] = SimpleQueue()  # None: look at the others again
        self.ended = False  # no more requests come
        self.over = False  # nobody wants answers
        self.allowed = 0  # bytes of answers that may be made, in all
        # The thread's.
        self.answers: deque[Answer] = deque()
        self.done = 0  # bytes of requests that are done with
        self.hungry = False  # it waits for ``allowed``
        self.finished = False  # it has ended
        self.complaint = ""
        # Set by the thread before it wakes the loop, cleared by the loop before it looks.
        self.told = False


class FileService(Service):
    """One OPEN of kind ``files``, on the loop's side."""

    running = 0

    def __init__(
        self,
        agent: Agent,
        session: Session,
        stream: wirestream.Stream,
        parameters: dict[str, Any],
    ) -> None:
        self.session = session
        self._agent = agent
        self._stream = stream
        self._over = False
        self._finished = False
        self._exchange = _Exchange()
        if FileService.running >= MAX_SERVICES:
            raise CannotServe("the agent serves files to too many already")
        operations = _operations(parameters, agent.options)
        try:
            # It waits for requests, and for leave to answer them.
            _Worker(self._exchange, operations, self._wake).start()
        except RuntimeError:
            operations.close()
            raise CannotServe("the kernel's host has no thread to spare") from None
        info = {"home": operations.home.decode("latin-1"), "features": FEATURES}
        stream.control(frames.OPENED, json.dumps(info).encode())
        FileService.running += 1
        stream.floor = wirestream.CAP_FLOOR_OF_FILES
        self._grant()
        self._look()

    def _wake(self) -> None:
        """On the thread: have :meth:`_collect` called by the loop."""
        self._agent.post(self._collect)

    def _collect(self) -> None:
        """Take what the thread has made."""
        exchange, stream = self._exchange, self._stream
        exchange.told = False
        finished = exchange.finished
        answers = [exchange.answers.popleft() for _ in range(len(exchange.answers))]
        if finished and not self._finished:
            self._finished = True
            FileService.running -= 1
        if self._over:
            return
        for answer in _joined(answers):
            stream.write(answer)
        self._grant()
        if finished:
            self._over = True
            if exchange.complaint:
                stream.close(exchange.complaint)
            else:
                stream.append(frames.CLOSE)
        self._agent.settle(self.session)

    def _grant(self) -> None:
        """Let requests come; one is done when it is whole, so there is room for any one of them,
        however low the cap."""
        stream = self._stream
        stream.grant(self._exchange.done + max(stream.cap, 4 + fw.MAX_RECORD))

    def _look(self) -> None:
        """Let the thread make answers as far as they can go soon."""
        exchange, stream = self._exchange, self._stream
        exchange.allowed = min(stream.limit, stream.sent + AHEAD)
        if exchange.hungry:
            exchange.requests.put(None)

    # --- the wire's receiver -----------------------------------------------------------------

    def wire_data(self, data: memoryview, extended: int) -> None:
        """Requests, or pieces of them. The buffer under ``data`` is used again."""
        self._exchange.requests.put(bytes(data))

    def wire_sent(self, count: int) -> None:
        """Answers left the queue."""
        if not self._over:
            self._look()

    def wire_credit(self) -> None:
        """The gateway takes more."""
        if not self._over:
            self._look()

    def wire_eof(self) -> None:
        """No more requests; those that came are still answered."""
        self._exchange.ended = True
        self._exchange.requests.put(None)

    def wire_closed(self, reason: str) -> None:
        """The gateway closed the stream."""
        self.hang_up()

    def hang_up(self) -> None:
        """Give everything up: the thread closes the files after what it is doing."""
        self._over = True
        self._exchange.over = True
        self._exchange.requests.put(None)

    def failed(self) -> None:
        """A defect of ours."""
        self._stream.close("the agent could not go on with these files")
        self.hang_up()
        self._agent.settle(self.session)


class _Worker(threading.Thread):
    """The thread of one stream. A daemon: what hangs in it does not keep the agent."""

    def __init__(
        self, exchange: _Exchange, operations: Operations, wake: Callable[[], None]
    ) -> None:
        super().__init__(name="files", daemon=True)
        self._exchange = exchange
        self._operations = operations
        self._wake = wake
        self._view = memoryview(b"")  # requests taken and not yet done
        self._pieces: deque[bytes] = deque()  # that came while it waited for room
        self._bytes = 0  # of answers that the loop was not told of
        self._produced = 0
        self._done = 0
        operations.stopped = lambda: exchange.over

    def run(self) -> None:
        """Serve until the stream is over."""
        exchange = self._exchange
        try:
            while True:
                self._serve()
        except _Over:
            pass
        except Malformed as error:
            exchange.complaint = f"malformed request: {error}"
        except Exception as error:
            exchange.complaint = f"the agent could not go on with these files: {error!r}"
        self._operations.close()
        exchange.finished = True
        self._tell()

    def _serve(self) -> None:
        """One request."""
        length, request, operation = fw.HEAD.unpack(self._take(fw.HEAD.size))
        if not fw.COUNTED <= length <= fw.MAX_RECORD:
            raise Malformed(f"a record of {length} bytes")
        body = self._take(length - fw.COUNTED)
        exchange = self._exchange
        if operation in SLOW and self._bytes:
            self._tell()
        if self._produced >= exchange.allowed:
            self._await_room()
        if exchange.over:
            raise _Over
        answer = self._operations.answer(request, operation, body)
        exchange.answers.append(answer)
        self._bytes += len(answer)
        self._produced += len(answer)
        self._done += 4 + length
        if self._bytes >= BATCH or self._done - exchange.done >= BATCH:
            self._tell()

    def _take(self, count: int) -> memoryview:
        """The next ``count`` bytes of requests, as soon as they are there."""
        view = self._view
        if len(view) >= count:
            self._view = view[count:]
            return view[:count]
        pieces = [view]
        missing = count - len(view)
        while missing > 0:
            piece = memoryview(self._next_piece())
            pieces.append(piece[:missing])
            self._view = piece[missing:]
            missing -= len(piece)
        return memoryview(b"".join(pieces))

    def _next_piece(self) -> bytes:
        exchange = self._exchange
        if self._pieces:
            return self._pieces.popleft()
        while True:
            if exchange.ended and exchange.requests.empty():
                break
            if self._bytes and exchange.requests.empty():
                self._tell()
            piece = exchange.requests.get()
            if exchange.over:
                break
            if piece is not None:
                return piece
        raise _Over

    def _await_room(self) -> None:
        exchange = self._exchange
        self._tell()
        exchange.hungry = True
        while self._produced >= exchange.allowed and not exchange.over:
            piece = exchange.requests.get()
            if piece is not None:
                self._pieces.append(piece)
        exchange.hungry = False

    def _tell(self) -> None:
        exchange = self._exchange
        exchange.done = self._done
        self._bytes = 0
        if not exchange.told:
            exchange.told = True
            self._wake()


def _joined(answers: list[Answer]) -> list[Answer]:
    """Small answers that follow each other are one."""
    joined: list[Answer] = []
    small: list[Answer] = []
    for answer in answers:
        if len(answer) <= SMALL:
            small.append(answer)
            continue
        if small:
            joined.append(b"".join(small))
            small = []
        joined.append(answer)
    if small:
        joined.append(b"".join(small))
    return joined


def _operations(parameters: dict[str, Any], options: dict[str, Any]) -> Operations:
    """What OPEN asks for, checked."""
    try:
        root = parameters.get("root")
        given_root = None if root is None else root.encode("latin-1")
        wanted = parameters.get("directory")
        home = wanted.encode("latin-1") if wanted else os.fsencode(options["directory"])
        if b"\0" in home or (given_root is not None and b"\0" in given_root):
            raise ValueError
        if given_root is not None and not given_root.startswith(b"/"):
            raise ValueError
    except (AttributeError, ValueError, TypeError):
        raise CannotServe("the request for files is malformed") from None
    if not os.path.isdir(home):
        home = os.path.expanduser(b"~")
    try:
        return Operations(given_root, os.path.abspath(home), bool(parameters.get("read_only")))
    except OSError as error:
        raise CannotServe(
            f"the root of the files cannot be entered: {error.strerror}"
        ) from None
