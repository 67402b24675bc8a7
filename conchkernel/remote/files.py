"""The agent's file service: the receiver of one stream of kind ``files``.

Runs in the agent. Requests come as DATA, are done one after another in the order they came, and
their answers go back as DATA. The system calls are made on a thread of the stream's own, so that a
disk that is slow, or a network file system that hangs, keeps no shell waiting: only its own stream.
The loop and the thread share one :class:`_Exchange` and nothing else. What is bounded: requests by
the credit that the agent gives, answers by the credit that it is given and by ``AHEAD``; a READ's
bytes are read from the disk only when there is room for them.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from conchkernel import wire
from conchkernel.remote import filewire as fw
from conchkernel.remote.fileops import SLOW, Malformed, Operations

if TYPE_CHECKING:
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

FEATURES = ("modes", "links", "hardlinks", "statvfs", "sync", "times", "offset-writes")


class CannotServe(Exception):
    """The stream is refused; the text is a sentence for the user."""


class _Over(Exception):
    """The stream is over: the thread ends."""


class _Exchange:
    """What the loop and the thread hand each other, under one lock."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.requests: deque[bytes] = deque()
        self.ended = False  # no more requests come
        self.over = False  # nobody wants answers
        self.allowed = 0  # bytes of answers that may be made, in all
        self.waiting = False  # the thread sleeps
        self.answers: list[Answer] = []
        self.done = 0  # bytes of requests that are done with
        self.told = False  # the loop knows that there is something
        self.complaint = ""
        self.finished = False  # the thread has ended


class FileService:
    """One OPEN of kind ``files``, on the loop's side."""

    running = 0

    def __init__(
        self,
        agent: Agent,
        session: Session,
        stream: wire.Stream,
        parameters: dict[str, Any],
    ) -> None:
        self.session = session
        self._agent = agent
        self._stream = stream
        self._over = False
        self._exchange = _Exchange()
        if FileService.running >= MAX_SERVICES:
            raise CannotServe("the agent serves files to too many already")
        operations = _operations(parameters, agent.options)
        info = {"home": operations.home.decode("latin-1"), "features": FEATURES}
        stream.control(wire.OPENED, json.dumps(info).encode())
        FileService.running += 1
        self._look()
        _Worker(self._exchange, operations, self._wake).start()

    def _wake(self) -> None:
        """On the thread: have :meth:`_collect` called by the loop."""
        self._agent.post(self._collect)

    def _collect(self) -> None:
        """Take what the thread has made."""
        exchange = self._exchange
        with exchange.changed:
            answers, exchange.answers = exchange.answers, []
            exchange.told = False
            done = exchange.done
            finished, complaint = exchange.finished, exchange.complaint
        if finished:
            FileService.running -= 1
        if self._over:
            return
        stream = self._stream
        for answer in _joined(answers):
            stream.write(answer)
        stream.grant(done + stream.cap)
        if finished:
            self._over = True
            if complaint:
                stream.close(complaint)
            else:
                stream.append(wire.CLOSE)
        self._agent.settle(self.session)

    def _look(self) -> None:
        """Let the thread make answers as far as they can go soon."""
        exchange, stream = self._exchange, self._stream
        allowed = min(stream.limit, stream.sent + AHEAD)
        with exchange.changed:
            exchange.allowed = allowed
            if exchange.waiting:
                exchange.changed.notify()

    # --- the wire's receiver -----------------------------------------------------------------

    def wire_data(self, data: memoryview, extended: int) -> None:
        """Requests, or pieces of them. The buffer under ``data`` is used again."""
        exchange = self._exchange
        piece = bytes(data)
        with exchange.changed:
            exchange.requests.append(piece)
            if exchange.waiting:
                exchange.changed.notify()

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
        with self._exchange.changed:
            self._exchange.ended = True
            self._exchange.changed.notify()

    def wire_closed(self, reason: str) -> None:
        """The gateway closed the stream."""
        self.hang_up()

    def hang_up(self) -> None:
        """Give everything up: the thread closes the files after what it is doing."""
        self._over = True
        with self._exchange.changed:
            self._exchange.over = True
            self._exchange.changed.notify()

    def failed(self) -> None:
        """A defect of ours."""
        self._stream.close("the agent could not go on with these files")
        self.hang_up()
        self._agent.settle(self.session)

    # Frames that mean nothing to files, or that only the gateway's end gets.

    def wire_control(self, frame_type: int, payload: bytes) -> None:
        """RESIZE, SIGNAL, BREAK and STOP are for processes."""

    def wire_opened(self, info: dict[str, Any]) -> None:
        """Not sent to an agent."""

    def wire_refused(self, code: Any, message: Any) -> None:
        """Not sent to an agent."""

    def wire_exit(self, info: dict[str, Any]) -> None:
        """Not sent to an agent."""


class _Worker(threading.Thread):
    """The thread of one stream. A daemon: what hangs in it does not keep the agent."""

    def __init__(self, exchange: _Exchange, operations: Operations, wake: Any) -> None:
        super().__init__(name="files", daemon=True)
        self._exchange = exchange
        self._operations = operations
        self._wake = wake
        self._view = memoryview(b"")  # requests taken and not yet done
        self._answers: list[Answer] = []
        self._bytes = 0  # of answers not handed over
        self._produced = 0
        self._done = 0
        self._handed = 0  # of ``done``, as told
        operations.stopped = lambda: exchange.over

    def run(self) -> None:
        complaint = ""
        try:
            while True:
                self._serve()
        except _Over:
            pass
        except Malformed as error:
            complaint = f"malformed request: {error}"
        except Exception as error:
            complaint = f"the agent could not go on with these files: {error!r}"
        self._operations.close()
        exchange = self._exchange
        with exchange.changed:
            exchange.finished = True
            exchange.complaint = complaint
        self._hand_over()

    def _serve(self) -> None:
        """One request."""
        length, request, operation = fw.HEAD.unpack(self._take(fw.HEAD.size))
        if not fw.COUNTED <= length <= fw.MAX_RECORD:
            raise Malformed(f"a record of {length} bytes")
        body = self._take(length - fw.COUNTED)
        if operation in SLOW and self._answers:
            self._hand_over()
        if self._produced >= self._exchange.allowed:
            self._await_room()
        answer = self._operations.answer(request, operation, body)
        self._answers.append(answer)
        self._bytes += len(answer)
        self._produced += len(answer)
        self._done += 4 + length
        if self._bytes >= BATCH or self._done - self._handed >= BATCH:
            self._hand_over()

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
        if not exchange.requests and self._answers:
            self._hand_over()
        with exchange.changed:
            while not exchange.requests or exchange.over:
                if exchange.over or exchange.ended:
                    raise _Over
                exchange.waiting = True
                exchange.changed.wait()
                exchange.waiting = False
            return exchange.requests.popleft()

    def _await_room(self) -> None:
        self._hand_over()
        exchange = self._exchange
        with exchange.changed:
            while self._produced >= exchange.allowed:
                if exchange.over:
                    raise _Over
                exchange.waiting = True
                exchange.changed.wait()
                exchange.waiting = False

    def _hand_over(self) -> None:
        exchange = self._exchange
        with exchange.changed:
            exchange.answers += self._answers
            exchange.done = self._handed = self._done
            wake = not exchange.told
            exchange.told = True
        self._answers = []
        self._bytes = 0
        if wake:
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
