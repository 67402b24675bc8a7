"""From an OPEN's parameters to a running shell or command: environment, shell, signals, session.

Standard library only: runs in the agent, and in a gateway that serves its own host. Semantics are
sshd's, but for the variables of the kernel's own environment, which stay.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import signal
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from conchkernel.remote import ttymodes

#: Pipes of commands; the usual 64 KiB costs a wake-up per 64 KiB.
PIPE_SIZE = 1024 * 1024


class CannotRun(Exception):
    """The process cannot be started; the text is a sentence for the user."""


class Request:
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
        wanted = parameters.get("directory")
        if wanted:
            # Somewhere else a command might do harm.
            self.directories = [_directory(wanted)]
        else:
            self.directories = [os.fsencode(options["directory"]), environment[b"HOME"], b"/"]
        pty = parameters.get("pty")
        if pty is not None:
            self.term = pty["term"].encode("latin-1")
            if b"\0" in self.term:
                raise ValueError
            self.size = winsize(pty["size"])
            self.modes = [(int(opcode), int(value)) for opcode, value in pty["modes"]]


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None  # a container with an account that has no name


def _shell(wanted: str | None, environment: dict[bytes, bytes]) -> bytes:
    if wanted:
        shell = wanted.encode("latin-1")
        if not os.path.isfile(shell) or not os.access(shell, os.X_OK):
            raise CannotRun(
                f"the shell {os.fsdecode(shell)} is not an executable file on the kernel's host"
            )
        return shell
    for shell in (environment.get(b"SHELL", b""), b"/bin/bash", b"/usr/bin/bash", b"/bin/sh"):
        if shell.startswith(b"/") and os.access(shell, os.X_OK):
            return shell
    raise CannotRun("there is no shell on the kernel's host")


def _directory(wanted: str) -> bytes:
    directory = wanted.encode("latin-1")
    if not os.path.isdir(directory) or not os.access(directory, os.X_OK):
        raise CannotRun(
            f"the directory {os.fsdecode(directory)} cannot be entered on the kernel's host"
        )
    return directory


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


def winsize(size: Any) -> bytes:
    """What TIOCSWINSZ takes, of columns, rows, width and height."""
    columns, rows, width, height = (min(max(int(value), 0), 0xFFFF) for value in size)
    return struct.pack("HHHH", rows, columns, width, height)


@dataclass(frozen=True)
class Spawned:
    """A running program and our ends of what it reads and writes, none of which blocks."""

    pid: int
    input: int
    """With a terminal, its master, and so the same as :attr:`output`."""
    output: int
    error: int | None = None
    tty: bytes | None = None
    """The terminal's path."""


def on_terminal(request: Request) -> Spawned:
    """Start the request's program on a new terminal."""
    master, slave = os.openpty()
    try:
        request.environment[b"SSH_TTY"] = tty = os.ttyname(slave).encode()
        request.environment[b"TERM"] = request.term
        ttymodes.apply(slave, request.modes)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, request.size)
        os.set_blocking(master, False)
        pid = _spawn(request, (slave, slave, slave), tty)
    except BaseException:
        os.close(master)
        raise
    finally:
        os.close(slave)
    return Spawned(pid, master, master, None, tty)


def on_pipes(request: Request) -> Spawned:
    """Start the request's program with three pipes."""
    opened: list[int] = []
    try:
        for _ in range(3):
            opened += os.pipe()
        in_r, in_w, out_r, out_w, err_r, err_w = opened
        for fd in (in_w, out_r, err_r):
            os.set_blocking(fd, False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux, and a Python from 3.10
            for fd in (in_w, out_r):
                try:
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
                except OSError:
                    break  # the account's allowance for pipes is used up; small ones work too
        pid = _spawn(request, (in_r, out_w, err_w))
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    for fd in (in_r, out_w, err_w):
        os.close(fd)
    return Spawned(pid, in_w, out_r, err_r)


#: A program expects the default of them all. Python and the agent ignore some; and under a Jupyter
#: server that a script started in its background SIGINT is ignored: Ctrl-C would be dead.
_TO_DEFAULT = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


def _spawn(request: Request, fds: tuple[int, int, int], tty: bytes | None = None) -> int:
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
    with _standing(request):
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
            # Pythons built for old C libraries (conda's are, for glibc 2.17) know no setsid.
            return _fork(request, fds, tty)
        except OSError as error:
            shell = os.fsdecode(request.shell)
            raise CannotRun(f"{shell} cannot be started: {error.strerror}") from None


@contextmanager
def _standing(request: Request) -> Iterator[None]:
    """Be where the program shall begin, which a child cannot be told by posix_spawn, and go back.

    A process that has other threads is there with all of them, for half a millisecond.
    """
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        _enter(request)
        yield
    finally:
        try:
            os.fchdir(before)
        finally:
            os.close(before)


def _enter(request: Request) -> None:
    """Go where the program shall begin, or as near as this account may."""
    for directory in request.directories:
        try:
            os.chdir(directory)
        except OSError:
            continue
        request.environment[b"PWD"] = directory
        break


def _fork(request: Request, fds: tuple[int, int, int], tty: bytes | None) -> int:
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


def exit_info(status: int) -> dict[str, Any]:
    """A wait status in the wire's words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name[3:]
        except ValueError:
            name = str(number)
        return {"signal": name, "core": os.WCOREDUMP(status)}
    return {"status": os.WEXITSTATUS(status)}
