"""A shell or a command on the kernel's host: terminal or pipes, in and out, until it ends.

Runs in the agent. Standard library only. Semantics are sshd's: a command without a terminal is a
session leader with three pipes; with one, the terminal's master is read and its slave is the
command's. Nothing is added to the bytes and nothing taken away.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import signal
import struct
import sys
import termios
from collections import deque
from typing import TYPE_CHECKING, Any

from conchkernel import wire
from conchkernel.remote import pump, ttymodes

if TYPE_CHECKING:
    from conchkernel.remote.agent import Agent, Session

#: One read of output: with its headers it fills one message.
BATCH = wire.MAX_MESSAGE - wire.MESSAGE.size - wire.FRAME.size
#: A terminal fills while it is read, at some 80 MB/s: so long other streams wait.
TERMINAL_BATCH = 64 * 1024
#: Pipes of commands; the usual 64 KiB costs a wake-up per 64 KiB.
PIPE_SIZE = 1024 * 1024


class CannotRun(Exception):
    """The process cannot be started; the text is a sentence for the user."""


class Process:
    """One OPEN of kind ``process``: the receiver of its stream.

    :ivar exit: the wait status once the process is reaped.
    """

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
        self._exit: int | None = None
        self._consumed = 0
        self._backlog: deque[memoryview | bytes] = deque()
        self._ending_input = False
        self._told_eof = False
        self._over = False
        self._terminal = parameters.get("pty") is not None
        self._input = -1
        self._outputs: dict[int, int] = {}  # fd -> flags of its DATA
        self._watched: set[int] = set()
        self.pid = -1
        request = _Request(parameters, agent.options)
        if self._terminal:
            self._start_on_terminal(request)
        else:
            self._start_on_pipes(request)
        agent.processes[self.pid] = self

    # --- starting ----------------------------------------------------------------------------

    def _start_on_terminal(self, request: _Request) -> None:
        master, slave = os.openpty()
        try:
            request.environment[b"SSH_TTY"] = tty = os.ttyname(slave).encode()
            request.environment[b"TERM"] = request.term
            ttymodes.apply(slave, request.modes)
            fcntl.ioctl(slave, termios.TIOCSWINSZ, request.size)
            os.set_blocking(master, False)
            self.pid = _spawn(request, (slave, slave, slave), tty)
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        self._input = master
        self._outputs = {master: 0}
        self._opened({"pid": self.pid, "tty": os.fsdecode(tty)})

    def _start_on_pipes(self, request: _Request) -> None:
        opened: list[int] = []
        try:
            for _ in range(3):
                opened += os.pipe()
            in_r, in_w, out_r, out_w, err_r, err_w = opened
            for fd in (in_w, out_r, err_r):
                os.set_blocking(fd, False)
            if hasattr(fcntl, "F_SETPIPE_SZ"):
                for fd in (in_w, out_r):
                    try:
                        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
                    except OSError:
                        break  # the account's allowance for pipes is used up; small ones work too
            self.pid = _spawn(request, (in_r, out_w, err_w))
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        for fd in (in_r, out_w, err_w):
            os.close(fd)
        self._input = in_w
        self._outputs = {out_r: 0, err_r: wire.EXTENDED}
        self._opened({"pid": self.pid})

    def _opened(self, info: dict[str, Any]) -> None:
        self._stream.control(wire.OPENED, json.dumps(info).encode())
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
        """How much to read at once: a terminal's flood in smaller pieces while somebody types."""
        return TERMINAL_BATCH if self._terminal and self._stream.beside_keys else BATCH

    def _readable(self, fd: int) -> None:
        stream = self._stream
        room = stream.room
        if room <= 0 or stream.queued:
            self._watch()
            return
        try:
            data, ended = pump.drain(fd, min(room, self._batch()), self._terminal)
        except OSError:
            data, ended = b"", True
        if data:
            stream.write(data, self._outputs[fd])
            self._agent.settle(self.session)
        if ended:
            self._close_output(fd)
        elif stream.queued or stream.room <= 0:
            self._watch()

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
                data, ended = pump.drain(self._input, min(room, BATCH), True)
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
            self._stream.append(wire.EOF)
        if self._exit is not None:
            self._stream.append(wire.EXIT, json.dumps(_exit_info(self._exit)).encode())
            self._stream.append(wire.CLOSE)
            self._release()
        self._agent.settle(self.session)

    # --- input -------------------------------------------------------------------------------

    def wire_data(self, data: memoryview, extended: int) -> None:
        """Bytes for stdin, or typed at the terminal."""
        if self._input < 0 or self._ending_input:
            self._took(len(data))
            return
        if not self._backlog:
            written = self._write(data)
            if written == len(data):
                return
            data = data[written:]
        # The buffer under ``data`` is used again; the peer's credit bounds what is kept.
        self._backlog.append(bytes(data))
        self._agent.watch_write(self._input, self._writable)

    def _write(self, data: memoryview | bytes) -> int:
        try:
            written = os.write(self._input, data)
        except BlockingIOError:
            return 0
        except OSError:
            # Nobody reads any more. What comes is taken and dropped, as under sshd.
            self._took(len(data))
            self._drop_input()
            return len(data)
        self._took(written)
        return written

    def _took(self, count: int) -> None:
        self._consumed += count
        self._stream.grant(self._consumed + self._stream.cap)

    def _writable(self, fd: int) -> None:
        backlog = self._backlog
        while backlog:
            data = backlog.popleft()
            written = self._write(data)
            if self._input < 0:
                break
            if written < len(data):
                backlog.appendleft(memoryview(data)[written:])
                return
        if self._input >= 0:
            self._agent.unwatch_write(self._input)
        if self._ending_input:
            self._close_input()
        self._agent.settle(self.session)

    def _drop_input(self) -> None:
        self._took(sum(map(len, self._backlog)))
        if self._backlog:
            self._backlog.clear()
        if not self._terminal:
            self._close_input()

    def _close_input(self) -> None:
        if self._input >= 0 and not self._terminal:
            self._agent.unwatch_write(self._input)
            os.close(self._input)
            self._input = -1

    def wire_eof(self) -> None:
        """The client's stdin is at its end. A terminal has none (as under sshd)."""
        if self._terminal:
            return
        self._ending_input = True
        if not self._backlog:
            self._close_input()

    # --- what else the gateway says ----------------------------------------------------------

    def wire_control(self, frame_type: int, payload: bytes) -> None:
        """RESIZE, SIGNAL, BREAK and STOP."""
        if frame_type == wire.RESIZE and len(payload) == wire.SIZE.size:
            if self._terminal and self._input >= 0:
                size = _winsize(wire.SIZE.unpack(payload))
                try:
                    fcntl.ioctl(self._input, termios.TIOCSWINSZ, size)
                except OSError:
                    pass  # the terminal has hung up; its end is on its way
        elif frame_type == wire.SIGNAL:
            number = getattr(signal, "SIG" + payload.decode("ascii", "replace"), None)
            if isinstance(number, signal.Signals):
                self._kill(number)
        elif frame_type == wire.BREAK and self._terminal and self._input >= 0:
            try:
                termios.tcsendbreak(self._input, 0)
            except termios.error:
                pass
        elif frame_type == wire.STOP:
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
        self._backlog.clear()
        if self._input >= 0:
            self._agent.unwatch_write(self._input)
            os.close(self._input)
            self._input = -1

    # Frames that only the gateway's end gets.

    def wire_opened(self, info: dict[str, Any]) -> None:
        """Not sent to an agent."""

    def wire_refused(self, code: Any, message: Any) -> None:
        """Not sent to an agent."""

    def wire_exit(self, info: dict[str, Any]) -> None:
        """Not sent to an agent."""


class _Request:
    """OPEN's parameters, checked, with the agent's defaults filled in."""

    def __init__(self, parameters: dict[str, Any], options: dict[str, Any]) -> None:
        try:
            self._parse(parameters, options)
        except (TypeError, ValueError, KeyError, AttributeError, struct.error):
            raise CannotRun("the request to start a process is malformed") from None

    def _parse(self, parameters: dict[str, Any], options: dict[str, Any]) -> None:
        environment = {os.fsencode(k): os.fsencode(v) for k, v in options["environment"].items()}
        account = _account()
        environment.setdefault(b"HOME", os.fsencode(account.pw_dir if account else "/"))
        name = os.fsencode(account.pw_name) if account else b"%d" % os.getuid()
        environment[b"USER"] = environment[b"LOGNAME"] = name
        for variable in (b"TERM", b"COLUMNS", b"LINES", b"PWD", b"OLDPWD", b"SHLVL", b"_"):
            environment.pop(variable, None)
        self.shell = _shell(parameters.get("shell"), environment)
        environment[b"SHELL"] = self.shell
        prefix = os.fsencode(options.get("path_prefix") or "")
        command = parameters.get("command")
        if prefix:
            _put_first_on_path(environment, prefix, login=command is None, shell=self.shell)
        for name_, value in parameters.get("environment", ()):
            key, text = name_.encode("latin-1"), value.encode("latin-1")
            if not key or b"=" in key or b"\0" in key or b"\0" in text:
                raise ValueError
            environment[key] = text
        self.environment = environment
        base = os.path.basename(self.shell)
        if command is None:
            self.arguments = [b"-" + base]
        else:
            self.arguments = [base, b"-c", command.encode("latin-1")]
            if b"\0" in self.arguments[2]:
                raise ValueError
        wanted = parameters.get("directory") or options["directory"]
        self.directories = [os.fsencode(wanted), environment[b"HOME"], b"/"]
        pty = parameters.get("pty")
        if pty is not None:
            self.term = pty["term"].encode("latin-1")
            if b"\0" in self.term:
                raise ValueError
            self.size = _winsize(pty["size"])
            self.modes = [(int(opcode), int(value)) for opcode, value in pty["modes"]]


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None  # a container with an account that has no name


def _shell(wanted: str | None, environment: dict[bytes, bytes]) -> bytes:
    if wanted:
        shell = os.fsencode(wanted)
        if not os.access(shell, os.X_OK):
            raise CannotRun(f"the shell {wanted} is not an executable file on the kernel's host")
        return shell
    for shell in (environment.get(b"SHELL", b""), b"/bin/bash", b"/usr/bin/bash", b"/bin/sh"):
        if shell.startswith(b"/") and os.access(shell, os.X_OK):
            return shell
    raise CannotRun("there is no shell on the kernel's host")


def _put_first_on_path(
    environment: dict[bytes, bytes], prefix: bytes, login: bool, shell: bytes
) -> None:
    """The kernel's Python is the first on PATH, as it is in its notebooks.

    A bash login shell reads /etc/profile, which on Debian sets PATH anew. There the first prompt
    puts the directory back and removes every trace of itself, whatever the user's own files made
    of PROMPT_COMMAND meanwhile.
    """
    path = environment.get(b"PATH", b"/usr/local/bin:/usr/bin:/bin")
    rest = [part for part in path.split(b":") if part != prefix]
    environment[b"PATH"] = b":".join([prefix, *rest])
    if login and os.path.basename(shell) == b"bash" and prefix not in (b"/usr/bin", b"/bin"):
        quoted = b"'" + prefix.replace(b"'", b"'\\''") + b"'"
        environment[b"PROMPT_COMMAND"] = b'eval "$_CONCHKERNEL_PATH"'
        environment[b"_CONCHKERNEL_PATH"] = (
            b'case "$PATH" in ' + quoted + b"|" + quoted + b":*) ;; *) PATH=" + quoted + b":$PATH;;"
            b' esac; PROMPT_COMMAND="${PROMPT_COMMAND/eval \\"\\$_CONCHKERNEL_PATH\\"/:}"; '
            b'[ "$PROMPT_COMMAND" != : ] || unset PROMPT_COMMAND; unset _CONCHKERNEL_PATH'
        )


def _winsize(size: Any) -> bytes:
    columns, rows, width, height = (min(max(int(value), 0), 0xFFFF) for value in size)
    return struct.pack("HHHH", rows, columns, width, height)


#: A program expects the default of them all. Python and the agent ignore some; and under a Jupyter
#: server that a script started in its background SIGINT is ignored: Ctrl-C would be dead.
_TO_DEFAULT = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


def _spawn(request: _Request, fds: tuple[int, int, int], tty: bytes | None = None) -> int:
    """Start the request's program in a session of its own; returns its pid.

    By posix_spawn, which does not copy the agent's page tables: 1 ms from here to the end of
    ``true``, where fork takes 3.5.

    :param tty: the terminal's path, if ``fds`` are one: the first terminal that a session's leader
        opens becomes its own (on Linux).
    """
    if tty is not None and not sys.platform.startswith("linux"):
        return _fork(request, fds, tty)
    actions: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(fds)
    ]
    if tty is not None:
        actions[0] = (os.POSIX_SPAWN_OPEN, 0, tty, os.O_RDWR, 0)
    _enter(request)
    try:
        return os.posix_spawn(
            request.shell,
            request.arguments,
            request.environment,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=_TO_DEFAULT,
        )
    except NotImplementedError:
        # Pythons that are built for old C libraries (conda's are, for glibc 2.17) know no setsid.
        return _fork(request, fds, tty)
    except OSError as error:
        shell = os.fsdecode(request.shell)
        raise CannotRun(f"{shell} cannot be started: {error.strerror}") from None
    finally:
        os.chdir("/")


def _enter(request: _Request) -> None:
    """Go where the program shall begin; a child cannot be told by posix_spawn."""
    for directory in request.directories:
        try:
            os.chdir(directory)
        except OSError:
            continue
        request.environment[b"PWD"] = directory
        break


def _fork(request: _Request, fds: tuple[int, int, int], tty: bytes | None) -> int:
    """The same where posix_spawn cannot, or a terminal must be asked for (macOS)."""
    try:
        pid = os.fork()
    except OSError as error:
        raise CannotRun(f"no process can be started: {error.strerror}") from None
    if pid:
        return pid
    try:  # the child: only what is needed, then exec
        os.setsid()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        if tty is not None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in _TO_DEFAULT:
            signal.signal(number, signal.SIG_DFL)
        _enter(request)
        os.execve(request.shell, request.arguments, request.environment)
    except BaseException as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        os.write(2, f"{os.fsdecode(request.shell)}: {reason}\n".encode())
    finally:
        os._exit(126 if os.path.exists(request.shell) else 127)


def _exit_info(status: int) -> dict[str, Any]:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name[3:]
        except ValueError:
            name = str(number)
        return {"signal": name, "core": os.WCOREDUMP(status)}
    return {"status": os.WEXITSTATUS(status)}


