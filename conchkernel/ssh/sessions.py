"""Session channels (RFC 4254 section 6): a terminal, an environment, and one process or subsystem.

The channel is the receiver of the process's stream, so no object stands between the two. A process
that cannot be started, and a road that is lost, are told in one sentence on stderr and leave no
exit status, since none is known: ssh then returns 255.
"""

from __future__ import annotations

import enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Protocol

from twisted.conch.ssh.connection import EXTENDED_DATA_STDERR
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from zope.interface import implementer

from conchkernel.errors import ConchKernelError, LinkLost
from conchkernel.interfaces import (
    Exit,
    ExitStatus,
    IKernelLink,
    IStream,
    IStreamReceiver,
    ProcessRequest,
    PtyRequest,
    WindowSize,
)
from conchkernel.ssh.channel import CREDIT_CAP_BYTES, GatewayChannel, Outgoing
from conchkernel.ssh.fields import Fields, string
from conchkernel.ssh.ttymodes import parseModes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from twisted.python.failure import Failure

    from conchkernel.ssh.forwarding import Forwarded, Forwarding
    from conchkernel.ssh.permissions import Permissions

#: Variables a client may set unless the operator names more; Debian's sshd takes the same.
ACCEPT_ENV = ("LANG", "LC_*", "COLORTERM")
#: sshd's own bound on the number of variables.
MAX_ENV_VARIABLES = 128
#: All names and values together: they go into one message to the kernel's host.
MAX_ENV_BYTES = 32 * 1024
#: The command line: Linux takes no single argument of more than 128 KiB.
MAX_COMMAND_BYTES = 128 * 1024
#: The value of TERM; the longest name in terminfo has 30 bytes.
MAX_TERM_BYTES = 256

#: Signals a client may send (RFC 4254 section 6.10), and what OpenSSH adds.
SIGNALS = {
    name.encode("ascii"): name
    for name in (
        "ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL", "PIPE", "QUIT", "SEGV", "TERM",
        "USR1", "USR2",
    )
} | {b"INFO@openssh.com": "INFO"}  # fmt: skip


class Subsystem(Protocol):
    """What serves a subsystem.

    It is made with its channel, and connects itself by the channel's ``attach``. It ends the
    session by :meth:`SessionChannel.streamExited`: clients want a status from subsystems too.
    """

    def channelClosed(self) -> None:
        """The channel is gone. Called once."""


class SessionAvatar(Protocol):
    """What a session asks of the user it belongs to."""

    acceptEnv: tuple[str, ...]
    subsystemLookup: dict[bytes, Callable[[SessionChannel], Subsystem]]

    permissions: Permissions
    forwarding: Forwarding

    def link(self) -> Deferred[IKernelLink]: ...

    def linkLost(self, link: IKernelLink) -> None: ...


class Stage(enum.Enum):
    """How far a session has come."""

    #: Being prepared: a terminal and an environment may be asked for.
    LARVAL = enum.auto()
    #: A process or subsystem is wanted; there is not to be another.
    STARTING = enum.auto()
    RUNNING = enum.auto()
    #: Nothing runs any more; the channel closes when all output is sent.
    ENDED = enum.auto()


@implementer(IStreamReceiver)
class SessionChannel(GatewayChannel):
    """One session of one client."""

    _log = Logger()

    name = b"session"
    avatar: SessionAvatar  # type: ignore[assignment]

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.stage = Stage.LARVAL
        self._pty: PtyRequest | None = None
        self._environment: dict[bytes, bytes] = {}
        self._environmentCount = self._environmentBytes = 0
        self._link: IKernelLink | None = None
        self._linking: Deferred[IKernelLink] | None = None
        self._stream: IStream | None = None
        self._started: Deferred[bool] | None = None
        self._subsystem: Subsystem | None = None
        self._agent: Forwarded | None = None
        self._forwarding: Deferred[Forwarded] | None = None

    # --- preparation -------------------------------------------------------------------------

    def request_pty_req(self, data: bytes) -> bool:
        """Payload: string TERM, uint32 columns, rows, width, height, string modes."""
        fields = Fields(data, "pty-req")
        term, size, modes = fields.string(), _windowSize(fields), parseModes(fields.string())
        fields.end()
        if self.stage is not Stage.LARVAL or self._pty is not None or len(term) > MAX_TERM_BYTES:
            return False
        if not self.avatar.permissions.pty:
            return False
        self._pty = PtyRequest(term, size, modes)
        return True

    def request_env(self, data: bytes) -> bool:
        """Payload: string name, string value."""
        fields = Fields(data, "env request")
        name, value = fields.string(), fields.string()
        fields.end()
        if self.stage is not Stage.LARVAL or not self._isAccepted(name) or b"\0" in value:
            return False
        # Each request counts, also where it replaces an earlier one: nobody needs that many.
        self._environmentCount += 1
        size = self._environmentBytes + len(name) + len(value)
        if self._environmentCount > MAX_ENV_VARIABLES or size > MAX_ENV_BYTES:
            return False
        self._environmentBytes = size
        self._environment[name] = value
        return True

    def _isAccepted(self, name: bytes) -> bool:
        if not name or b"=" in name or b"\0" in name:
            return False
        decoded = name.decode("utf-8", "surrogateescape")
        return any(fnmatchcase(decoded, pattern) for pattern in self.avatar.acceptEnv)

    def request_window_change(self, data: bytes) -> bool:
        """Payload: uint32 columns, rows, width, height."""
        fields = Fields(data, "window-change")
        size = _windowSize(fields)
        fields.end()
        if self._pty is None:
            return False
        self._pty = PtyRequest(self._pty.term, size, self._pty.modes)
        if self._stream is not None:
            self._stream.resize(size)
        return True

    def request_auth_agent(self, data: bytes) -> bool | Deferred[bool]:
        """No payload: have a socket over there that leads to the client's ssh-agent."""
        Fields(data, "auth-agent-req").end()
        if self.stage is not Stage.LARVAL or self._agent or self._forwarding:
            return False
        forwarding = self._forwarding = self.avatar.forwarding.forwardAgent()
        if forwarding is None:
            return False
        answer: Deferred[bool] = Deferred()

        def listening(agent: Forwarded) -> None:
            self._forwarding, self._agent = None, agent
            if self.stage is Stage.ENDED:
                self._giveUpAgent()
            answer.callback(True)

        def failed(reason: Failure) -> None:
            self._forwarding = None
            if not reason.check(ConchKernelError, CancelledError):
                self._log.failure("the ssh-agent could not be forwarded", reason)
            answer.callback(False)

        forwarding.addCallbacks(listening, failed)
        return answer

    # --- what runs ---------------------------------------------------------------------------

    def request_shell(self, data: bytes) -> bool | Deferred[bool]:
        """No payload."""
        Fields(data, "shell request").end()
        return self._start(None)

    def request_exec(self, data: bytes) -> bool | Deferred[bool]:
        """Payload: string command."""
        fields = Fields(data, "exec request")
        command = fields.string()
        fields.end()
        if len(command) > MAX_COMMAND_BYTES or b"\0" in command:
            return False
        return self._start(command)

    def request_subsystem(self, data: bytes) -> bool:
        """Payload: string name."""
        fields = Fields(data, "subsystem request")
        name = fields.string()
        fields.end()
        serve = self.avatar.subsystemLookup.get(name)
        if self.stage is not Stage.LARVAL or serve is None:
            return False
        self.stage = Stage.RUNNING
        self._subsystem = serve(self)
        return True

    def _start(self, command: bytes | None) -> bool | Deferred[bool]:
        if self.stage is not Stage.LARVAL:
            return False
        self.stage = Stage.STARTING
        started: Deferred[bool] = Deferred()
        self._started = started
        if self._forwarding is None:
            self._connect(command)
        else:
            # The process is told where its ssh-agent is.
            self._forwarding.addBoth(lambda _: self._connect(command))
        return started

    def _connect(self, command: bytes | None) -> None:
        if self.stage is Stage.STARTING:
            linking = self._linking = self.avatar.link()
            linking.addCallbacks(self._openProcess, self._notLinked, callbackArgs=(command,))
            linking.addErrback(self._notLinked)

    def _openProcess(self, link: IKernelLink, command: bytes | None) -> None:
        self._linking = None
        if self.stage is not Stage.STARTING:
            return
        self._link = link
        environment = {**self._environment, **self._addresses()}
        if self._agent is not None and self._agent.listener is not None:
            environment[b"SSH_AUTH_SOCK"] = self._agent.listener.path
        request = ProcessRequest(command, self._pty, tuple(environment.items()))
        stream = link.openProcess(request, self)
        if self._hasEnded():
            # Told so while it was opened, before there was anything to close.
            return
        self._stream = stream
        self.attach(
            stream.write,
            stream.writeEOF,
            stream.grant,
            getattr(stream, "creditCap", CREDIT_CAP_BYTES),
        )

    def _notLinked(self, reason: Failure) -> None:
        self._linking = None
        error = reason.value
        if self.stage is not Stage.STARTING:
            return
        if isinstance(error, ConchKernelError):
            self._end(str(error))
        else:
            if not isinstance(error, CancelledError):
                self._log.failure("a process could not be started", reason)
            self._end("the process could not be started (internal error)")

    def _addresses(self) -> dict[bytes, bytes]:
        """What sshd tells of both ends, in SSH_CLIENT and SSH_CONNECTION."""
        transport = self.conn.transport
        # The TCP addresses; behind a PROXY header they are right only since it arrived.
        below = getattr(transport, "transport", None) or transport
        peer, peerPort = _address(below.getPeer())
        host, hostPort = _address(below.getHost())
        return {
            b"SSH_CLIENT": f"{peer} {peerPort} {hostPort}".encode("ascii", "replace"),
            b"SSH_CONNECTION": f"{peer} {peerPort} {host} {hostPort}".encode("ascii", "replace"),
        }

    # --- while it runs -----------------------------------------------------------------------

    def request_signal(self, data: bytes) -> bool:
        """Payload: string name, without its SIG."""
        fields = Fields(data, "signal request")
        name = SIGNALS.get(fields.string())
        fields.end()
        if name is None or self._stream is None:
            return False
        self._stream.signal(name)
        return True

    def request_break(self, data: bytes) -> bool:
        """Payload: uint32 milliseconds (RFC 4335)."""
        fields = Fields(data, "break request")
        milliseconds = fields.uint32()
        fields.end()
        if self._pty is None or self._stream is None:
            return False
        self._stream.sendBreak(milliseconds)
        return True

    def request_eow(self, data: bytes) -> bool:
        """No payload: the client has nowhere to put more output (OpenSSH's PROTOCOL, 2.1)."""
        Fields(data, "eow@openssh.com").end()
        self.discardOutput()
        if self._stream is not None:
            self._stream.stopReading()
        return True

    # --- the stream's side -------------------------------------------------------------------

    def streamOpened(self, info: Mapping[str, object]) -> None:
        """The process runs, and so the request that asked for it has succeeded."""
        if self.stage is Stage.STARTING:
            self.stage = Stage.RUNNING
        self._answerStart()

    streamData = GatewayChannel.write
    streamConsumed = GatewayChannel.consumed
    streamEOF = GatewayChannel.writeEOF

    def streamExtendedData(self, data: bytes | memoryview) -> None:
        """Bytes of stderr."""
        self.writeExtended(EXTENDED_DATA_STDERR, data)

    def streamExited(self, exit: Exit) -> None:
        """The process ended, and all its output came before this."""
        if isinstance(exit, ExitStatus):
            self.sendRequest(b"exit-status", (exit.status & 0xFFFFFFFF).to_bytes(4, "big"))
        else:
            self.sendRequest(
                b"exit-signal",
                string(exit.name.encode("ascii", "replace"))
                + (b"\1" if exit.core_dumped else b"\0")
                + string(exit.message.encode("utf-8", "replace"))
                + string(b""),
            )
        self._end(None)

    def streamClosed(self, reason: Exception | None) -> None:
        """The stream is gone, in the ordinary way or not."""
        link, self._link = self._link, None
        stopped, self._stream = self.stage is Stage.ENDED, None
        if isinstance(reason, LinkLost) and link is not None:
            self.avatar.linkLost(link)
        if not stopped:
            self._end(None if reason is None else _sentence(reason))

    def _hasEnded(self) -> bool:
        return self.stage is Stage.ENDED

    # --- the end -----------------------------------------------------------------------------

    def _answerStart(self) -> None:
        started, self._started = self._started, None
        if started is not None:
            started.callback(True)

    def _end(self, message: str | None) -> None:
        """Close after all that is queued; ``message`` is why, where it is not the usual end.

        A request that failed would leave the user without a reason: ssh prints none. So it
        succeeds, and the reason comes on stderr.
        """
        self.stage = Stage.ENDED
        self._answerStart()
        if message is not None:
            self.writeError(message)
        self.writeEOF()
        self.loseConnection()
        self._giveUp()

    def closed(self) -> None:
        """The channel is gone: so is whatever runs on it."""
        self.stage = Stage.ENDED
        super().closed()
        self._giveUp()

    def closeReceived(self) -> None:
        """The client gives the session up; a terminal hangs up, pipes close.

        As under sshd our CLOSE waits for the end of a process that has pipes: what the client has
        sent to its stdin is still delivered, and the process counts as a session.

        OpenSSH's client closes as soon as both directions are at their ends, which may be before
        the process has been reaped, and it still wants the status: so a terminal's waits too then.
        """
        stream = self._stream
        if stream is not None and self._pty is None:
            self.eofReceived()
            self.discardOutput()
            stream.stopReading()
            return
        if stream is not None and self._outgoing is Outgoing.EOF and not self._queue:
            self.eofReceived()
            stream.signal("HUP")
            return
        self.stage = Stage.ENDED
        super().closeReceived()

    def _giveUp(self) -> None:
        linking, self._linking = self._linking, None
        if linking is not None:
            linking.cancel()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        subsystem, self._subsystem = self._subsystem, None
        if subsystem is not None:
            subsystem.channelClosed()
        self._giveUpAgent()

    def _giveUpAgent(self) -> None:
        if self._forwarding is not None:
            self._forwarding.cancel()
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()

    requests: ClassVar = {
        b"pty-req": request_pty_req,
        b"env": request_env,
        b"auth-agent-req@openssh.com": request_auth_agent,
        b"shell": request_shell,
        b"exec": request_exec,
        b"subsystem": request_subsystem,
        b"window-change": request_window_change,
        b"signal": request_signal,
        b"break": request_break,
        b"eow@openssh.com": request_eow,
    }


def _windowSize(fields: Fields) -> WindowSize:
    """Four numbers; a terminal has 16 bits for each, so what is larger is cut."""
    return WindowSize(*(min(fields.uint32(), 0xFFFF) for _ in range(4)))


def _address(address: object) -> tuple[str, int]:
    """Host and port as sshd writes them."""
    host, port = getattr(address, "host", None), getattr(address, "port", None)
    if not isinstance(host, str) or not isinstance(port, int):
        return "UNKNOWN", 65535
    # An IPv4 client of an IPv6 socket.
    return host.removeprefix("::ffff:") if "." in host else host, port


def _sentence(reason: Exception) -> str:
    return str(reason) or type(reason).__name__
