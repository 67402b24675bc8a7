"""Sessions: terminals, environments, commands, and how they end."""

from __future__ import annotations

import hashlib
import random
import struct
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from twisted.conch.ssh.keys import Key
from twisted.cred.portal import Portal
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol

from conchkernel.avatars import KernelAvatar, KernelRealm
from conchkernel.errors import (
    JupyterUnreachable,
    LinkLost,
    RefusalCode,
    StreamRefused,
)
from conchkernel.interfaces import ExitSignal, ExitStatus, PtyRequest, WindowSize
from conchkernel.ssh.checkers import AnonymousOwnerChecker
from conchkernel.ssh.factory import GatewayFactory
from conchkernel.ssh.fields import string
from conchkernel.ssh.sessions import MAX_ENV_BYTES, MAX_ENV_VARIABLES, SessionChannel
from conchkernel.testing import ClientChannel, MemoryBackend, MemoryClient, MemoryStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from twisted.python.failure import Failure

SIZE = struct.pack(">4L", 100, 40, 800, 600)
PTY = string(b"xterm-256color") + SIZE + string(b"\x03\0\0\0\x7f\x35\0\0\0\x01\0")


class Rig:
    """A client with a backend whose commands run when the test says."""

    def __init__(self, **options: object) -> None:
        self.backend = MemoryBackend()
        self.avatar = KernelAvatar(self.backend, "joe", **options)  # type: ignore[arg-type]
        self.client = MemoryClient(self.avatar)

    @property
    def stream(self) -> MemoryStream:
        """The latest command."""
        return self.backend.links[-1].streams[-1]

    def run(self, command: bytes = b"command", pty: bool = False) -> ClientChannel:
        """A command that runs already."""
        channel = self.client.open()
        if pty:
            self.client.request(channel, b"pty-req", PTY)
        self.client.request(channel, b"exec", string(command))
        self.stream.opened(pid=1)
        channel.events.clear()
        return channel


@pytest.fixture
def rig() -> Rig:
    return Rig()


# --- what is asked for -----------------------------------------------------------------------


def test_shellOnATerminal(rig: Rig) -> None:
    """A terminal's name, size and modes arrive as the client sent them; no command is a shell."""
    channel = rig.client.open()
    rig.client.request(channel, b"pty-req", PTY)
    rig.client.request(channel, b"shell")
    request = rig.stream.request
    assert request.command is None
    assert request.pty == PtyRequest(
        b"xterm-256color", WindowSize(100, 40, 800, 600), ((3, 127), (0x35, 1))
    )
    assert channel.events == ["success"]
    rig.stream.opened()
    assert channel.events == ["success", "success"]


@pytest.mark.parametrize("command", [b"", b"ls -l", bytes(range(1, 256)), b"x" * 100_000])
def test_commandsArriveByteForByte(rig: Rig, command: bytes) -> None:
    """Whatever bytes a command is made of."""
    rig.client.execute(command)
    assert rig.stream.request.command == command
    assert rig.stream.request.pty is None


@pytest.mark.parametrize("command", [b"nul\0", b"x" * 200_000])
def test_commandsThatCannotBe(rig: Rig, command: bytes) -> None:
    """What no system would run is refused, and the session may still be used."""
    channel = rig.client.open()
    rig.client.request(channel, b"exec", string(command))
    assert channel.events == ["failure"]
    rig.client.request(channel, b"shell")
    rig.stream.opened()
    assert channel.events == ["failure", "success"]


def test_successComesWhenTheProcessRuns(rig: Rig) -> None:
    """A request is answered once its process is there; later ones wait for that answer."""
    channel = rig.client.open()
    rig.client.request(channel, b"shell")
    rig.client.request(channel, b"signal", string(b"INT"))
    rig.client.request(channel, b"unknown")
    assert channel.events == []
    rig.stream.opened()
    assert channel.events == ["success", "success", "failure"]


def test_oneProcessPerSession(rig: Rig) -> None:
    """A second shell, command, subsystem or terminal, and a late variable, are refused."""
    channel = rig.run()
    for name, data in (
        (b"shell", b""),
        (b"exec", string(b"ls")),
        (b"subsystem", string(b"sftp")),
        (b"pty-req", PTY),
        (b"env", string(b"LANG") + string(b"C")),
    ):
        rig.client.request(channel, name, data)
    assert channel.events == ["failure"] * 5
    assert len(rig.backend.links[0].streams) == 1


def test_secondTerminal(rig: Rig) -> None:
    """The first one counts."""
    channel = rig.client.open()
    rig.client.request(channel, b"pty-req", PTY)
    rig.client.request(channel, b"pty-req", string(b"vt100") + SIZE + string(b""))
    assert channel.events == ["success", "failure"]


def test_hugeTerminal(rig: Rig) -> None:
    """Sizes that no terminal can have are cut to what it can."""
    channel = rig.client.open()
    size = struct.pack(">4L", 2**32 - 1, 65536, 65535, 0)
    rig.client.request(channel, b"pty-req", string(b"") + size + string(b""))
    rig.client.request(channel, b"shell")
    assert rig.stream.request.pty == PtyRequest(b"", WindowSize(65535, 65535, 65535, 0))


def test_requestsNobodyKnows(rig: Rig) -> None:
    """They fail, whatever their names are made of; without a wish for a reply, silently."""
    channel = rig.client.open()
    for name in (b"x11-req", b"auth-agent-req", b"__init__", b"\xff\xfe", b""):
        rig.client.request(channel, name, b"whatever")
    rig.client.request(channel, b"xon-xoff", b"\1", reply=False)
    assert channel.events == ["failure"] * 5


def test_subsystems(rig: Rig) -> None:
    """A subsystem is looked up by name and given its channel; others are refused."""
    served: list[SessionChannel] = []

    class Echo:
        closed = False

        def __init__(self, channel: SessionChannel) -> None:
            served.append(channel)
            channel.attach(channel.write, self.finish, lambda limit: None)

        def finish(self) -> None:
            served[0].streamExited(ExitStatus(0))

        def channelClosed(self) -> None:
            Echo.closed = True

    rig.avatar.subsystemLookup[b"echo"] = Echo
    channel = rig.client.open()
    rig.client.request(channel, b"subsystem", string(b"sftp"))
    rig.client.request(channel, b"subsystem", string(b"echo"))
    assert channel.events == ["failure", "success"]
    rig.client.write(channel, b"hello")
    assert channel.output == b"hello"
    rig.client.eof(channel)
    assert channel.events[-3:] == [("exit-status", b"\0\0\0\0"), "eof", "close"]
    assert Echo.closed


# --- the environment -------------------------------------------------------------------------


def test_acceptEnv() -> None:
    """Variables pass by the patterns of sshd's AcceptEnv; the rest is refused."""
    rig = Rig(acceptEnv=("LANG", "LC_*", "MY_?"))
    channel = rig.client.open()
    offered = [b"LANG", b"LC_ALL", b"LC_", b"MY_A", b"MY_AB", b"PATH", b"lang", b"", b"LC_\xff"]
    for name in offered:
        rig.client.request(channel, b"env", string(name) + string(b"\xff value\n"))
    accepted = [b"LANG", b"LC_ALL", b"LC_", b"MY_A", b"LC_\xff"]
    assert channel.events == [
        "success" if name in accepted else "failure" for name in offered
    ]
    rig.client.request(channel, b"shell")
    environment = dict(rig.stream.request.environment)
    assert [environment.pop(name) for name in accepted] == [b"\xff value\n"] * 5
    assert set(environment) == {b"SSH_CLIENT", b"SSH_CONNECTION"}


@pytest.mark.parametrize(
    ("name", "value"), [(b"LC_=X", b"v"), (b"LC_\0", b"v"), (b"LC_A", b"v\0w")]
)
def test_variablesThatCannotBe(rig: Rig, name: bytes, value: bytes) -> None:
    """What execve would misunderstand is refused."""
    channel = rig.client.open()
    rig.client.request(channel, b"env", string(name) + string(value))
    assert channel.events == ["failure"]


def test_environmentIsBounded(rig: Rig) -> None:
    """Neither many variables nor large ones pass beyond the bounds, repeated names included."""
    channel = rig.client.open()
    for _ in range(2 * MAX_ENV_VARIABLES):
        rig.client.request(channel, b"env", string(b"LC_A") + string(b"v"))
    assert channel.events.count("success") == MAX_ENV_VARIABLES
    channel = rig.client.open()
    for number in range(20):
        rig.client.request(channel, b"env", string(b"LC_%d" % number) + string(b"v" * 4000))
    assert channel.events.count("success") == MAX_ENV_BYTES // 4010


def test_aValueTooLargeIsRefusedAlone(rig: Rig) -> None:
    """What comes after it is taken."""
    channel = rig.client.open()
    rig.client.request(channel, b"env", string(b"LC_BIG") + string(b"v" * MAX_ENV_BYTES))
    rig.client.request(channel, b"env", string(b"LANG") + string(b"C.UTF-8"))
    assert channel.events == ["failure", "success"]


def test_lastValueCounts(rig: Rig) -> None:
    """A variable sent twice has its second value."""
    channel = rig.client.open()
    for value in (b"first", b"second"):
        rig.client.request(channel, b"env", string(b"LANG") + string(value))
    rig.client.request(channel, b"shell")
    assert dict(rig.stream.request.environment)[b"LANG"] == b"second"


def test_addresses(rig: Rig) -> None:
    """SSH_CLIENT and SSH_CONNECTION tell both ends as sshd does."""
    rig.client.execute(b"env")
    environment = dict(rig.stream.request.environment)
    assert environment[b"SSH_CLIENT"] == b"192.0.2.1 40000 22"
    assert environment[b"SSH_CONNECTION"] == b"192.0.2.1 40000 192.0.2.2 22"


def test_addressesWithoutIP(rig: Rig) -> None:
    """Over a UNIX socket they say what sshd says there."""
    rig.client.getPeer = rig.client.getHost = lambda: None  # type: ignore[method-assign,assignment,return-value]
    rig.client.execute(b"env")
    environment = dict(rig.stream.request.environment)
    assert environment[b"SSH_CONNECTION"] == b"UNKNOWN 65535 UNKNOWN 65535"


# --- while it runs ---------------------------------------------------------------------------


def test_windowChange(rig: Rig) -> None:
    """A new size reaches the terminal at once, before the process starts as well as later."""
    channel = rig.client.open()
    rig.client.request(channel, b"window-change", SIZE)
    rig.client.request(channel, b"pty-req", PTY)
    rig.client.request(channel, b"window-change", struct.pack(">4L", 90, 30, 0, 0))
    rig.client.request(channel, b"shell")
    assert rig.stream.request.pty is not None
    assert rig.stream.request.pty.size == WindowSize(90, 30)
    rig.client.request(channel, b"window-change", struct.pack(">4L", 80, 24, 0, 0), reply=False)
    assert rig.stream.calls == [("resize", WindowSize(80, 24))]
    assert channel.events == ["failure", "success", "success"]


def test_signals(rig: Rig) -> None:
    """Signals of the RFC are delivered; others, and any before there is a process, fail."""
    channel = rig.client.open()
    rig.client.request(channel, b"signal", string(b"INT"))
    assert channel.events == ["failure"]
    channel = rig.run()
    for name in (b"INT", b"KILL", b"INFO@openssh.com", b"SIGINT", b"int", b"STOP", b"\xff"):
        rig.client.request(channel, b"signal", string(name))
    assert rig.stream.calls == [("signal", "INT"), ("signal", "KILL"), ("signal", "INFO")]
    assert channel.events == ["success"] * 3 + ["failure"] * 4


def test_break(rig: Rig) -> None:
    """A break needs a terminal."""
    plain = rig.run()
    rig.client.request(plain, b"break", struct.pack(">L", 500))
    assert plain.events == ["failure"]
    terminal = rig.run(pty=True)
    rig.client.request(terminal, b"break", struct.pack(">L", 500))
    assert terminal.events == ["success"]
    assert rig.stream.calls == [("break", 500)]


def test_endOfWriting(rig: Rig) -> None:
    """eow@openssh.com: what waits is dropped, the process is told, and its end still comes."""
    channel = rig.client.execute(b"yes", window=10)
    stream = rig.stream
    stream.opened()
    stream.put(b"y\n" * 1000)
    assert channel.output == b"y\n" * 5
    rig.client.request(channel, b"eow@openssh.com", reply=False)
    assert stream.calls == [("stopReading",)]
    stream.receiver.streamData(b"y\n" * 1000)
    stream.end(ExitSignal("PIPE"))
    assert channel.output == b"y\n" * 5
    assert channel.events[-3:] == [
        "eof",
        ("exit-signal", string(b"PIPE") + b"\0" + string(b"") + string(b"")),
        "close",
    ]


def test_endOfWritingAfterTheProcess(rig: Rig) -> None:
    """What waits is dropped also when it is all there is, and what follows it comes at once."""
    channel = rig.client.execute(b"command", window=10)
    rig.stream.opened()
    rig.stream.put(b"y" * 1000)
    rig.stream.end(ExitStatus(3))
    assert channel.events[-1] == "data"
    rig.client.request(channel, b"eow@openssh.com", reply=False)
    assert channel.output == b"y" * 10
    assert channel.events[-3:] == ["eof", ("exit-status", b"\0\0\0\3"), "close"]


def test_endOfWritingBeforeTheProcess(rig: Rig) -> None:
    """A client that loses interest while the kernel starts still learns how it ended."""
    channel = rig.client.open()
    rig.client.request(channel, b"eow@openssh.com", reply=False)
    rig.client.request(channel, b"exec", string(b"yes"))
    rig.stream.opened()
    rig.stream.put(b"y" * 10_000_000)
    rig.stream.end(ExitStatus(1))
    assert channel.output == b""
    assert channel.closed


# --- how it ends -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exit", "told"),
    [
        (ExitStatus(0), ("exit-status", b"\0\0\0\0")),
        (ExitStatus(255), ("exit-status", b"\0\0\0\xff")),
        (
            ExitSignal("SEGV", core_dumped=True, message="Segmentation fault"),
            ("exit-signal", string(b"SEGV") + b"\1" + string(b"Segmentation fault") + string(b"")),
        ),
    ],
)
def test_exits(rig: Rig, exit: object, told: object) -> None:
    """Data, then how it ended, then CLOSE; and the stream is given up."""
    channel = rig.run()
    rig.stream.put(b"bye")
    rig.stream.end(exit)  # type: ignore[arg-type]
    assert channel.events == ["data", "eof", told, "close"]
    rig.client.close(channel)
    assert rig.client.connection.channels == {}


def test_outputMayEndLongBeforeTheProcess(rig: Rig) -> None:
    """EOF is told when it happens; the status and CLOSE when they do."""
    channel = rig.run()
    rig.stream.put(b"x")
    rig.stream.putEOF()
    assert channel.events == ["data", "eof"]
    rig.client.write(channel, b"still listening")
    assert rig.stream.take() == b"still listening"
    rig.stream.end(ExitStatus(3))
    assert channel.events == ["data", "eof", ("exit-status", b"\0\0\0\3"), "close"]


@pytest.mark.parametrize("pty", [False, True])
def test_closeBetweenOutputsEndAndTheStatus(rig: Rig, pty: bool) -> None:
    """A client that closes once all output is there still learns how the process ended."""
    channel = rig.run(pty=pty)
    rig.stream.putEOF()
    rig.client.close(channel)
    assert channel.events == ["eof"]
    assert rig.stream.inputEOF
    assert rig.stream.calls == ([("signal", "HUP")] if pty else [("stopReading",)])
    rig.stream.end(ExitStatus(3))
    assert channel.events == ["eof", ("exit-status", b"\0\0\0\3"), "close"]
    assert rig.client.connection.channels == {}


def test_closeBetweenOutputsEndAndALostRoad(rig: Rig) -> None:
    """Where no status comes, CLOSE does."""
    channel = rig.run()
    rig.stream.putEOF()
    rig.client.close(channel)
    rig.stream.lose(LinkLost("the road is gone"))
    assert channel.events == ["eof", "close"]
    assert rig.client.connection.channels == {}


def test_endThatNobodyKnows(rig: Rig) -> None:
    """A stream that closes without an exit leaves no status to be invented."""
    channel = rig.run()
    rig.stream.put(b"x")
    rig.stream.end(None)
    assert channel.events == ["data", "eof", "close"]
    assert channel.errors == b""


def test_lostRoad(rig: Rig) -> None:
    """One sentence on stderr, behind the output, and no status; what comes next has a new link."""
    channel = rig.run()
    rig.stream.put(b"x")
    rig.stream.lose(LinkLost("The connection to the kernel was lost."))
    assert channel.events == ["data", "stderr", "eof", "close"]
    assert channel.errors == b"conchkernel: The connection to the kernel was lost.\r\n"
    rig.run()
    assert len(rig.backend.links) == 2
    rig.client.lose()
    assert all(link.released for link in rig.backend.links)


def test_lostRoadOfOneIsNotTheOthers(rig: Rig) -> None:
    """Channels that live on an old link go on, and do not take a newer one from each other."""
    first, second = rig.run(), rig.run()
    streams = rig.backend.links[0].streams
    streams[0].lose(LinkLost("lost"))
    rig.run()
    streams[1].put(b"still here")
    assert first.closed
    assert second.output == b"still here"
    streams[1].lose(LinkLost("lost"))
    rig.run()
    assert len(rig.backend.links) == 2


def test_refusedProcess(rig: Rig) -> None:
    """What cannot be started says so on stderr: a failed request would tell the user nothing."""
    channel = rig.client.execute(b"command")
    rig.stream.lose(StreamRefused(RefusalCode.RESOURCE_SHORTAGE, "no terminal is left"))
    assert channel.events == ["success", "stderr", "eof", "close"]
    assert channel.errors == b"conchkernel: no terminal is left\r\n"
    assert not rig.backend.links[0].released


def test_noKernel() -> None:
    """Neither does a kernel that cannot be had keep the user waiting without a word."""
    rig = Rig()
    rig.backend.slow = True
    rig.avatar.linkLost(rig.backend.links[0])
    channels = [rig.client.execute(b"command") for _ in range(2)]
    rig.backend.answer(JupyterUnreachable("Nothing answers at http://nowhere."))
    for channel in channels:
        assert channel.events == ["success", "stderr", "eof", "close"]
        assert channel.errors == b"conchkernel: Nothing answers at http://nowhere.\r\n"
    again = rig.client.execute(b"command")
    rig.backend.answer()
    rig.stream.opened()
    assert again.events == ["success"]


def test_ourOwnMistake(rig: Rig, loggedFailures: object) -> None:
    """An error nobody foresaw is logged, and the user learns that it was not theirs."""
    rig.backend.links[0].openProcess = lambda *_: 1 / 0  # type: ignore[assignment,method-assign]
    channel = rig.client.execute(b"command")
    assert channel.errors == b"conchkernel: the process could not be started (internal error)\r\n"
    assert channel.closed
    assert loggedFailures.flush(ZeroDivisionError)  # type: ignore[attr-defined]


def test_clientLeavesWhileTheKernelStarts() -> None:
    """A session closed before its kernel was there starts nothing when it comes."""
    rig = Rig()
    rig.backend.slow = True
    rig.avatar.linkLost(rig.backend.links[0])
    channel = rig.client.execute(b"command")
    rig.client.close(channel)
    assert channel.events == ["close"]
    rig.backend.answer()
    assert rig.backend.links[1].streams == []


def test_connectionLostWhileTheKernelStarts() -> None:
    """Nobody waits for a kernel that nobody wants any more."""
    rig = Rig()
    rig.backend.slow = True
    rig.avatar.linkLost(rig.backend.links[0])
    rig.client.execute(b"command")
    rig.client.lose()
    assert rig.backend.waiting == []


def test_inputAfterTheEnd(rig: Rig) -> None:
    """What a client types at a process that has ended goes nowhere, quietly."""
    channel = rig.run()
    rig.stream.end()
    rig.client.write(channel, b"too late")
    rig.client.eof(channel)
    rig.client.close(channel)
    assert rig.stream.waiting == b""
    assert rig.client.disconnected is None


def test_closeGivesATerminalUp(rig: Rig) -> None:
    """When the client closes, the stream is closed, once."""
    channel = rig.run(pty=True)
    rig.client.close(channel)
    assert rig.stream.calls == [("close",)]
    assert channel.events == ["close"]


def test_closeLeavesACommandItsInput(rig: Rig) -> None:
    """What the client sent before is still taken; nobody wants the output; the end is told."""
    channel = rig.run()
    rig.client.write(channel, b"last words")
    rig.stream.put(b"a question")
    rig.client.close(channel)
    rig.stream.put(b"another one")
    assert rig.stream.take() == b"last words"
    assert rig.stream.inputEOF
    assert rig.stream.calls == [("stopReading",)]
    assert channel.output == b"a question"
    rig.stream.end(ExitStatus(3))
    assert channel.events == ["data", "eof", ("exit-status", b"\0\0\0\3"), "close"]
    assert rig.client.connection.channels == {}


def test_closeBeforeACommandRuns(rig: Rig) -> None:
    """The same where nobody has said yet that it runs, or says that it does not."""
    for ending in (ExitStatus(0), None):
        channel = rig.client.execute(b"command")
        rig.client.write(channel, b"early")
        rig.client.close(channel)
        if ending is None:
            rig.stream.lose(StreamRefused(RefusalCode.RESOURCE_SHORTAGE, "no"))
        else:
            rig.stream.opened()
            assert rig.stream.take() == b"early"
            rig.stream.end(ending)
        assert channel.closed
    assert rig.client.connection.channels == {}


def test_oneChannelsEndIsNotTheOthers(rig: Rig) -> None:
    """Many channels on one connection live and end apart."""
    channels = [rig.run() for _ in range(10)]
    streams = rig.backend.links[0].streams
    for number in (3, 7):
        streams[number].end(ExitStatus(number))
        rig.client.close(channels[number])
    streams[5].lose(StreamRefused(RefusalCode.PROHIBITED, "no"))
    for number, stream in enumerate(streams):
        stream.put(b"%d" % number)
    assert [bytes(channel.output) for channel in channels] == [
        b"" if number in (3, 5, 7) else b"%d" % number for number in range(10)
    ]


# --- with the real client --------------------------------------------------------------------

BULK = random.Random(5).randbytes(8 * 1024 * 1024)


def _program(stream: MemoryStream) -> None:
    """What the commands of these tests do."""
    stream.opened(pid=1)
    words = (stream.request.command or b"").split()
    if words[0] == b"download":
        for start in range(0, len(BULK), 99_991):
            stream.put(BULK[start : start + 99_991])
        stream.end()
    elif words[0] == b"upload":
        stream.onInput = lambda: stream.take() and None
        stream.onInputEOF = lambda: (
            stream.put(hashlib.sha256(stream.received).hexdigest().encode()),
            stream.end(),
        )  # type: ignore[assignment,func-returns-value]
    elif words[0] == b"exit":
        stream.put(b"out\n")
        stream.putError(b"err\n")
        stream.end(ExitStatus(int(words[1])))
    elif words[0] == b"lose":
        stream.onDrained = lambda: stream.lose(LinkLost("The road is cut."))
        stream.put(b"out\n")
    elif words[0] == b"wait":
        stream.onInputEOF = stream.end
        stream.put(b"ready")


class _Ssh(ProcessProtocol):
    """One run of the ssh client; without ``stdin`` it is left open."""

    transport: Any

    def __init__(self, stdin: bytes | None) -> None:
        self.answered: Deferred[None] = Deferred()
        self.done: Deferred[tuple[bytes, bytes, int | None]] = Deferred()
        self._stdin = stdin
        self._out = {1: bytearray(), 2: bytearray()}

    def connectionMade(self) -> None:
        if self._stdin is not None:
            self.transport.write(self._stdin)
            self.transport.closeStdin()

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._out[childFD] += data
        if not self.answered.called:
            self.answered.callback(None)

    def processEnded(self, reason: Failure) -> None:
        code = reason.value.exitCode  # type: ignore[attr-defined]
        self.done.callback((bytes(self._out[1]), bytes(self._out[2]), code))


class Gateway:
    """A gateway whose processes are scripted, and the command line that leads there."""

    def __init__(self, home: Path, port: int) -> None:
        options = (
            "StrictHostKeyChecking=no", f"UserKnownHostsFile={home}/known", "LogLevel=ERROR",
            f"ControlPath={home}/control", "ControlPersist=no", "BatchMode=yes",
        )  # fmt: skip
        self._command = ["ssh", "-F", "none", "-p", str(port)]
        for option in options:
            self._command += ["-o", option]
        self._environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}

    def start(
        self, command: str, stdin: bytes | None = b"", options: tuple[str, ...] = ()
    ) -> _Ssh:
        """Start a command."""
        run = _Ssh(stdin)
        words = [*self._command, *options, "joe@127.0.0.1", command]
        reactor.spawnProcess(run, "ssh", words, self._environment)  # type: ignore[attr-defined]
        return run

    def ssh(
        self, command: str, stdin: bytes = b"", options: tuple[str, ...] = ()
    ) -> Deferred[tuple[bytes, bytes, int | None]]:
        """Run a command; its stdout, stderr and status."""
        return self.start(command, stdin, options).done


@pytest_twisted.async_yield_fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway on a free port, for whoever comes."""
    portal = Portal(KernelRealm(MemoryBackend(_program)), [AnonymousOwnerChecker()])
    factory = GatewayFactory(portal, [Key(Ed25519PrivateKey.generate())], reactor=reactor)
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")  # type: ignore[attr-defined]
    yield Gateway(tmp_path, port.getHost().port)
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_sshTellsHowItEnded(gateway: Gateway) -> None:
    """Output, errors and status as the process gave them."""
    assert await gateway.ssh("exit 7") == (b"out\n", b"err\n", 7)


@pytest_twisted.ensureDeferred
async def test_sshOverALostRoad(gateway: Gateway) -> None:
    """The output so far, a sentence, and 255."""
    assert await gateway.ssh("lose") == (b"out\n", b"conchkernel: The road is cut.\r\n", 255)


@pytest.mark.parametrize("options", [(), ("-o", "RekeyLimit=1M")])
@pytest_twisted.ensureDeferred
async def test_sshCarriesEveryByte(gateway: Gateway, options: tuple[str, ...]) -> None:
    """Bulk both ways is the same at the other end, also while keys change."""
    out, _, status = await gateway.ssh("download", options=options)
    assert (hashlib.sha256(out).digest(), status) == (hashlib.sha256(BULK).digest(), 0)
    out, _, status = await gateway.ssh("upload", stdin=BULK, options=options)
    assert (out.decode(), status) == (hashlib.sha256(BULK).hexdigest(), 0)


@pytest_twisted.ensureDeferred
async def test_sshWithManyChannels(gateway: Gateway) -> None:
    """Sessions over one ControlMaster run at once, do not mix, and end apart."""
    master = gateway.start("wait", stdin=None, options=("-M",))
    await master.answered
    runs = [gateway.ssh("download") for _ in range(3)]
    runs += [gateway.ssh("upload", stdin=BULK) for _ in range(3)]
    runs += [gateway.ssh(f"exit {status}") for status in range(3)]
    results = [await run for run in runs]
    digest = hashlib.sha256(BULK)
    assert all(hashlib.sha256(out).digest() == digest.digest() for out, _, _ in results[:3])
    assert [out.decode() for out, _, _ in results[3:6]] == [digest.hexdigest()] * 3
    assert [status for _, _, status in results] == [0] * 6 + [0, 1, 2]
    master.transport.closeStdin()
    assert (await master.done)[2] == 0
