"""The agent's door: what reaches its socket and is not a gateway with the secret stays outside."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import threading
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

from conchkernel import frames
from conchkernel.errors import StreamRefused
from conchkernel.interfaces import (
    ExitStatus,
    ProcessRequest,
    PtyRequest,
    TCPAddress,
    WindowSize,
)
from conchkernel.jupyter import injection, link
from conchkernel.loopback import LoopbackBackend

from .collector import PATIENCE_SECONDS, Collector
from .peers import echo, received


@pytest.fixture
def backend():
    """An agent with a gateway attached."""
    made = LoopbackBackend(reactor)
    pytest_twisted.blockon(Deferred.fromCoroutine(made.start()))
    yield made
    pytest_twisted.blockon(Deferred.fromCoroutine(made.stop()))


def speak(path, data):
    """Say something to the agent's socket and hear until it hangs up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(path)
        heard = b""
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                heard += piece
        except (BrokenPipeError, ConnectionResetError):
            pass  # it hung up while we spoke
        return heard


def framed(message):
    """A message with its length."""
    return struct.pack(">I", len(message)) + message


def attach(**changed):
    """An ATTACH that differs from a good one."""
    good = {"versions": [1], "session": "0" * 32, "received": 0, "secret": "0" * 64}
    return framed(frames.message_of(frames.ATTACH, {**good, **changed}))


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (struct.pack(">I", 0), b""),
        (struct.pack(">I", 0xFFFFFFFF) + b"x" * 1000, b""),
        (framed(b"\0" * 17), b""),
        (framed(bytes([frames.ATTACH]) + b"[]"), b""),
        (framed(bytes([frames.ATTACH]) + b"\xff"), b""),
        (attach(), b"secret"),
        (attach(secret=None), b"secret"),
        (attach(secret=["x"]), b"secret"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_strangers_are_hung_up_on_and_the_gateway_goes_on(backend, data, answer):
    """Odd lengths, other messages and wrong secrets end their own connection only."""
    heard = await deferToThread(speak, backend._path, data)
    assert answer in heard
    collector = Collector()
    collector.start(await backend.connect("owner"), ProcessRequest(b"true"))
    await collector.untilClosed()
    assert collector.exit == ExitStatus(0)


@pytest.mark.parametrize(
    "changed",
    [{"versions": [99]}, {"versions": 1}, {"session": "short"}, {"session": 5}, {"received": "0"}],
)
@pytest_twisted.ensureDeferred
async def test_a_malformed_attach_gets_a_sentence(backend, changed):
    """Also of one who knows the secret."""
    heard = await deferToThread(speak, backend._path, attach(secret=backend._secret, **changed))
    assert b'"error"' in heard


@pytest_twisted.ensureDeferred
async def test_a_violation_ends_its_session_only(backend):
    """A gateway that breaks the protocol loses its session; the other one's processes live on."""
    collector = Collector()
    collector.start(await backend.connect("owner"), ProcessRequest(b"echo hi; cat; exit 6"))
    await collector.untilOutput(b"hi")
    bad = frames.MESSAGE.pack(frames.BYTES, 0, 0) + frames.FRAME.pack(99, 0, 0, 0)
    await deferToThread(speak, backend._path, attach(secret=backend._secret) + framed(bad))
    collector.stream.writeEOF()
    await collector.untilClosed()
    assert collector.exit == ExitStatus(6)


def test_the_socket_is_private(backend):
    """Mode 0600 in a directory of mode 0700."""
    path = Path(backend._path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest_twisted.ensureDeferred
async def test_the_secret_is_nowhere_to_be_read(backend):
    """Neither in the agent's argv nor in its environment."""
    collector = Collector()
    collector.start(await backend.connect("owner"), ProcessRequest(b"echo $PPID; env"))
    await collector.untilClosed()
    agent = Path("/proc") / collector.out.split()[0].decode()
    secret = backend._secret.encode()
    assert secret not in (agent / "cmdline").read_bytes()
    assert secret not in (agent / "environ").read_bytes()
    assert secret not in collector.out
    assert os.getpid() != int(agent.name)


_OLD_LIBRARY = """
import os
def posix_spawn(*arguments, setsid=False, **options):
    raise NotImplementedError("posix_spawn: setsid unavailable on this platform")
os.posix_spawn = posix_spawn
"""


_NO_MODES = """
import termios
def tcsetattr(*arguments):
    raise termios.error(22, "Invalid argument")
termios.tcsetattr = tcsetattr
"""

_DEFECT = """
import os
def openpty():
    raise RuntimeError("a defect")
os.openpty = openpty
"""

TERMINAL = PtyRequest(b"vt100", WindowSize(80, 24), ((53, 0),))


async def run_after(monkeypatch, boot, command, pty):
    """Run ``command`` by an agent whose Python is changed first."""
    sources = dict(injection.agent_sources())
    sources["boot"] = boot + sources["boot"]
    monkeypatch.setattr(injection, "agent_sources", lambda: sources)
    backend = LoopbackBackend(reactor)
    await backend.start()
    try:
        collector = Collector()
        collector.start(await backend.connect("owner"), ProcessRequest(command, pty))
        await collector.untilClosed()
    finally:
        await backend.stop()
    return collector


@pytest.mark.parametrize("pty", [None, TERMINAL])
@pytest_twisted.ensureDeferred
async def test_a_python_built_for_an_old_library_starts_programs_too(monkeypatch, pty):
    """conda's Pythons are built for glibc 2.17, whose posix_spawn cannot begin a session."""
    command = b"ps -o sid= -p $$; echo $$; exit 5"
    collector = await run_after(monkeypatch, _OLD_LIBRARY, command, pty)
    session, pid = collector.out.split()
    assert session == pid
    assert collector.exit == ExitStatus(5)


@pytest_twisted.ensureDeferred
async def test_modes_that_a_system_refuses_cost_no_terminal(monkeypatch):
    """A terminal that takes none of the client's modes is still one."""
    collector = await run_after(monkeypatch, _NO_MODES, b"echo here", TERMINAL)
    assert bytes(collector.out) == b"here\r\n"
    assert collector.exit == ExitStatus(0)


@pytest_twisted.ensureDeferred
async def test_a_defect_in_starting_is_answered(monkeypatch):
    """Whoever asked for the process hears of it at once, and of no status."""
    collector = await run_after(monkeypatch, _DEFECT, b"echo here", TERMINAL)
    assert isinstance(collector.reason, StreamRefused)
    assert collector.exit is None


@pytest_twisted.ensureDeferred
async def test_an_end_is_told_at_once(monkeypatch, serving):
    """The EOF of a connection does not wait for the next word of the gateway's."""
    monkeypatch.setattr(link, "FIRST_PINGS", -1)
    backend = LoopbackBackend(reactor)
    backend.link._pingSeconds = 1000
    await backend.start()
    try:
        go = threading.Event()

        def ends_first(connection):
            go.wait(PATIENCE_SECONDS)
            connection.shutdown(socket.SHUT_WR)
            received(connection)

        use = await backend.connect("owner")
        collector = Collector()
        use.openConnection(serving(ends_first).tcp, collector).grant(1000)
        await collector.until(lambda: collector.opened is not None)
        go.set()
        await collector.until(lambda: collector.eof)
    finally:
        await backend.stop()


def test_a_session_that_cannot_go_on_begins_anew(backend):
    """One that the agent never knew is new, whatever the gateway had; one that is broken ends."""
    secret = backend._secret

    def answer():
        connection = socket.socket(socket.AF_UNIX)
        with connection:
            connection.settimeout(20)
            connection.connect(backend._path)
            connection.sendall(attach(secret=secret, received=1000))
            head = connection.recv(5, socket.MSG_WAITALL)
            return json.loads(connection.recv(int.from_bytes(head[:4], "big") - 1))

    assert answer()["new"]
    assert "error" in answer()
    assert answer()["new"]


_ACCEPT_FAILS_ONCE = """
module = sys.modules["conchkernel.remote.agent"]
answers = [True, OSError("the peer has gone"), True, True]
def same_account(connection):
    answer = answers.pop(0)
    if answer is not True:
        raise answer
    return answer
module.same_account = same_account
"""


@pytest_twisted.ensureDeferred
async def test_a_connection_that_cannot_be_taken_does_not_shut_the_door(monkeypatch):
    """macOS refuses to tell of, or to set, options of a socket whose peer has gone already."""
    sources = dict(injection.agent_sources())
    boot, end = sources["boot"].rsplit("sys.modules", 1)
    sources["boot"] = f"{boot}{_ACCEPT_FAILS_ONCE}sys.modules{end}"
    monkeypatch.setattr(injection, "agent_sources", lambda: sources)
    backend = LoopbackBackend(reactor)
    await backend.start()
    try:
        assert await deferToThread(speak, backend._path, attach()) == b""
        assert b"secret" in await deferToThread(speak, backend._path, attach())
    finally:
        await backend.stop()


_FEW_THREADS = """
import os, threading
start = threading.Thread.start
def start_or_not(thread):
    if os.path.exists({mark!r}):
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = start_or_not
"""


@pytest_twisted.ensureDeferred
async def test_a_host_without_threads_refuses_what_needs_one(tmp_path, serving):
    """Whoever asks is told, however often; and when there are some again it is as before."""
    mark = tmp_path / "no-threads"
    backend = LoopbackBackend(reactor, prelude=_FEW_THREADS.format(mark=str(mark)))
    await backend.start()
    try:
        use = await backend.connect("owner")
        named = TCPAddress("localhost", serving(echo).port)
        mark.touch()
        for _ in range(70):
            with pytest.raises(StreamRefused, match="no thread to spare"):
                await use.openFiles(None, False)
            lost = Collector()
            use.openConnection(named, lost)
            await lost.untilClosed()
            assert isinstance(lost.reason, StreamRefused)
        mark.unlink()
        files = await use.openFiles(None, False)
        await files.stat(b"/")
        collector = Collector()
        use.openConnection(named, collector).grant(1000)
        await collector.until(lambda: collector.opened is not None)
        use.release()
    finally:
        await backend.stop()
