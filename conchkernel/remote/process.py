"""A shell or a command on the kernel's host: terminal or pipes, in and out, until it ends.

Runs in the agent, or on the event loop of a gateway that serves its own host: it is told neither
what loop there is nor where its stream leads. Standard library only. Semantics are sshd's: a
command without a terminal is a session leader with three pipes; with one, the terminal's master is
read and its slave is the command's. Nothing is added to the bytes and nothing taken away.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import termios
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from conchkernel import frames
from conchkernel.remote import spawn
from conchkernel.remote.intake import Intake
from conchkernel.remote.service import Service

#: One read of a terminal beside somebody's keys, which wait while it is passed on.
BATCH_BESIDE_KEYS = 64 * 1024


class Host(Protocol):
    """The event loop that a process lives on."""

    options: dict[str, Any]
    """Defaults of what an OPEN does not say: ``environment``, ``directory``, ``path_prefix``."""
    batch: int
    """Bytes of one read of output."""
    drain: Callable[[int, int, bool], tuple[bytes, bool]]
    """:func:`conchkernel.remote.pump.drain` or its compiled twin."""

    def watch_read(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(fd)`` whenever it can be read."""

    def watch_write(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(fd)`` whenever it can be written."""

    def unwatch_read(self, fd: int) -> None:
        """No more reading; unknown descriptors are fine."""

    def unwatch_write(self, fd: int) -> None:
        """No more writing; unknown descriptors are fine."""

    def started(self, process: Process) -> None:
        """Call the process's ``reaped`` when its program has ended."""

    def settle(self, session: Any) -> None:
        """The session has something to send."""

    def look_again(self, process: Process) -> None:
        """Call the process's ``look`` before long."""


class ProcessStream(Protocol):
    """What a process asks of its stream: the part of :class:`conchkernel.wire.Stream`."""

    queued: int

    @property
    def room(self) -> int:
        """Bytes that may be written now."""

    @property
    def cap(self) -> int:
        """How far ahead of the process's reading input may be sent."""

    @property
    def share(self) -> int:
        """The same where there are many streams."""

    @property
    def beside_keys(self) -> bool:
        """Whether somebody types on another stream."""

    def write(self, data: bytes, flags: int = 0) -> None:
        """Output; within :attr:`room`."""

    def append(self, frame_type: int, payload: bytes = b"") -> None:
        """EOF, EXIT or CLOSE, after all output."""

    def control(self, frame_type: int, payload: bytes = b"") -> None:
        """OPENED."""

    def close(self, reason: str = "") -> None:
        """The end, at once."""

    def grant(self, limit: int) -> None:
        """Input up to byte ``limit`` may come."""


class Process(Service):
    """One OPEN of kind ``process``: the receiver of its stream.

    :param session: of the agent's, that the stream belongs to.
    :ivar pid: of the program, which leads a session and a process group.
    """

    def __init__(
        self,
        agent: Host,
        session: Any,
        stream: ProcessStream,
        parameters: dict[str, Any],
    ) -> None:
        self.session = session
        self._agent = agent
        self._stream = stream
        self._exit: int | None = None
        self._told_eof = False
        self._over = False
        self._terminal = parameters.get("pty") is not None
        self._input = -1
        self._outputs: dict[int, int] = {}  # fd -> flags of its DATA
        self._watched: set[int] = set()
        self.pid = -1
        request = spawn.Request(parameters, agent.options)
        spawned = (spawn.on_terminal if self._terminal else spawn.on_pipes)(request)
        self.pid = spawned.pid
        self._input = spawned.input
        self._intake = Intake(self, agent, stream, self._close_input, self._close_input)
        self._intake.open(self._input, partial(os.write, self._input))
        self._outputs[spawned.output] = 0
        info: dict[str, Any] = {"pid": self.pid}
        if spawned.error is not None:
            self._outputs[spawned.error] = frames.EXTENDED
        if spawned.tty is not None:
            info["tty"] = os.fsdecode(spawned.tty)
        stream.control(frames.OPENED, json.dumps(info).encode())
        agent.started(self)
        self._watch()

    # --- output ------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Read output exactly while the stream takes it: nothing is read that must be kept."""
        stream = self._stream
        wanted = not stream.queued and stream.room > 0
        for fd in self._outputs:
            if wanted != (fd in self._watched):
                if wanted:
                    self._watched.add(fd)
                    self._agent.watch_read(fd, self._readable)
                else:
                    self._watched.discard(fd)
                    self._agent.unwatch_read(fd)

    def _batch(self) -> int:
        """How much to read at once."""
        beside_keys = self._terminal and self._stream.beside_keys
        return BATCH_BESIDE_KEYS if beside_keys else self._agent.batch

    def _readable(self, fd: int) -> None:
        stream = self._stream
        room = stream.room
        if room <= 0 or stream.queued:
            self._watch()
            return
        try:
            data, ended = self._agent.drain(fd, min(room, self._batch()), self._terminal)
        except OSError:
            data, ended = b"", True
        if data:
            stream.write(data, self._outputs[fd])
            self._agent.settle(self.session)
        if ended:
            self._close_output(fd)
        elif stream.queued or stream.room <= 0:
            # Looked at when this has been sent: mostly there is room again, and nothing changes.
            self._agent.look_again(self)

    def _close_output(self, fd: int) -> None:
        if fd in self._watched:
            self._watched.discard(fd)
            self._agent.unwatch_read(fd)
        del self._outputs[fd]
        if fd != self._input:
            os.close(fd)
        self._maybe_end()

    def reaped(self, status: int) -> None:
        """The process ended with this wait status."""
        self._exit = status
        if self._terminal:
            self._drain_terminal()
        self._maybe_end()

    def _drain_terminal(self) -> None:
        """After the child's exit: what the terminal still holds, then the end.

        Whoever else holds the terminal open does not keep the session (as under sshd).
        """
        stream = self._stream
        while self._outputs and not self._over:
            room = stream.room
            if room <= 0:
                return  # wire_credit comes back here
            try:
                data, ended = self._agent.drain(self._input, min(room, self._agent.batch), True)
            except OSError:
                data, ended = b"", True
            if data:
                stream.write(data)
            if ended or not data:
                self._close_output(self._input)
        self._agent.settle(self.session)

    def _maybe_end(self) -> None:
        if self._over or self._outputs:
            return
        if not self._told_eof:
            self._told_eof = True
            self._stream.append(frames.EOF)
        if self._exit is not None:
            self._stream.append(frames.EXIT, json.dumps(spawn.exit_info(self._exit)).encode())
            self._stream.append(frames.CLOSE)
            self._release()
        self._agent.settle(self.session)

    # --- input -------------------------------------------------------------------------------

    def wire_data(self, data: memoryview, extended: int) -> None:
        """Bytes for stdin, or typed at the terminal."""
        self._intake.data(data)

    def wire_eof(self) -> None:
        """The client's stdin is at its end. A terminal has none (as under sshd)."""
        if not self._terminal:
            self._intake.end()

    def _close_input(self) -> None:
        """After its end, or where nobody reads any more; a terminal's is its output, too."""
        if self._input >= 0 and not self._terminal:
            self._intake.close()
            os.close(self._input)
            self._input = -1

    # --- what else the gateway says ----------------------------------------------------------

    def wire_control(self, frame_type: int, payload: bytes) -> None:
        """RESIZE, SIGNAL, BREAK and STOP."""
        if frame_type == frames.RESIZE and len(payload) == frames.SIZE.size:
            if self._terminal and self._input >= 0:
                size = spawn.winsize(frames.SIZE.unpack(payload))
                try:
                    fcntl.ioctl(self._input, termios.TIOCSWINSZ, size)
                except OSError:
                    pass  # the terminal has hung up; its end is on its way
        elif frame_type == frames.SIGNAL:
            number = getattr(signal, "SIG" + payload.decode("ascii", "replace"), None)
            if isinstance(number, signal.Signals):
                self._kill(number)
        elif frame_type == frames.BREAK and self._terminal and self._input >= 0:
            try:
                termios.tcsendbreak(self._input, 0)
            except termios.error:
                pass
        elif frame_type == frames.STOP:
            # A pipe's writer meets its end; a terminal fills up and its writer waits, as under
            # sshd, where a typed interrupt still ends it.
            for fd in list(self._outputs):
                self._close_output(fd)

    def _kill(self, number: int) -> None:
        if self._exit is None and self.pid > 0:
            try:
                os.killpg(self.pid, number)
            except OSError:
                pass  # ended a moment ago, or runs as somebody else now

    def wire_sent(self, count: int) -> None:
        """Output left the queue: more may be read."""
        if not self._over:
            self._agent.look_again(self)

    def wire_credit(self) -> None:
        """The gateway takes more."""
        if not self._over:
            self._agent.look_again(self)

    def look(self) -> None:
        """Go on reading if there is room (called by the agent between events)."""
        if self._over:
            return
        if self._exit is not None and self._terminal and self._outputs:
            if not self._stream.queued:
                self._drain_terminal()
        else:
            self._watch()

    def wire_closed(self, reason: str) -> None:
        """The gateway closed the stream: the terminal hangs up, pipes close."""
        self.hang_up()

    def failed(self) -> None:
        """A defect of ours: the stream ends with a sentence instead of an invented status."""
        self._stream.close("the agent could not go on with this process")
        self.hang_up()
        self._agent.settle(self.session)

    def hang_up(self) -> None:
        """Give the process up. One without a terminal is left running, as under sshd."""
        if self._over:
            return
        if self._terminal:
            self._kill(signal.SIGHUP)
        self._release()

    def _release(self) -> None:
        self._over = True
        for fd in list(self._outputs):
            if fd in self._watched:
                self._watched.discard(fd)
                self._agent.unwatch_read(fd)
            if fd != self._input:
                os.close(fd)
        self._outputs.clear()
        self._intake.close()
        if self._input >= 0:
            os.close(self._input)
            self._input = -1
