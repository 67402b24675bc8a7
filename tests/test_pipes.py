"""The transport over two descriptors, on the real reactor and real pipes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from conchkernel.pipes import Pipes
from conchkernel.tcp import PromptWriter

if TYPE_CHECKING:
    from collections.abc import Iterator


class Kept(Protocol):
    """Keeps what came, and fires when it is told of the end."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.lost: Deferred[None] = Deferred()
        self.waiting: tuple[int, Deferred[None]] | None = None

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        if self.waiting is not None and len(self.received) >= self.waiting[0]:
            waiting, self.waiting = self.waiting[1], None
            waiting.callback(None)

    def until(self, count: int) -> Deferred[None]:
        """Fires when so many bytes are there."""
        waiting: Deferred[None] = Deferred()
        self.waiting = (count, waiting)
        self.dataReceived(b"")
        return waiting

    def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
        self.lost.callback(None)


class Ends:
    """Both ends: ours as a transport, and what the client has."""

    def __init__(self, kind: str, protocol: Kept | None = None) -> None:
        self.protocol = protocol or Kept()
        if kind == "socket":
            ours, theirs = socket.socketpair()
            incoming, outgoing = os.dup(ours.fileno()), os.dup(ours.fileno())
            ours.close()
            self.reads = os.dup(theirs.fileno())
            self.writes = theirs.detach()
        else:
            incoming, self.writes = os.pipe()
            self.reads, outgoing = os.pipe()
        self.pipes = Pipes(reactor, self.protocol, incoming, outgoing)

    def close(self) -> None:
        """The client goes."""
        for fd in (self.reads, self.writes):
            if fd >= 0:
                os.close(fd)
        self.reads = self.writes = -1


@pytest.fixture(params=["pipes", "socket"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Two pipes, as OpenSSH has them, and one socket, as others have."""
    made = Ends(request.param)
    yield made
    made.close()
    pytest_twisted.blockon(made.pipes.closed)


def readAll(fd: int) -> bytes:
    """Until the end, or until a socket's peer has gone without reading all."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := os.read(fd, 1 << 20):
            data += piece
    return data


def readWhatIsThere(fd: int) -> bytes:
    """Without waiting."""
    data = b""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(fd, 1 << 20):
            data += piece
    os.set_blocking(fd, True)
    return data


@pytest_twisted.ensureDeferred
async def test_bulkBothWays(ends: Ends) -> None:
    """Much more than a pipe holds goes both ways whole, and the last of it before the end."""
    much = os.urandom(3 * 1024 * 1024)
    written = deferToThread(_writeAll, ends.writes, much)
    reading = deferToThread(readAll, ends.reads)
    ends.pipes.writeSequence([much[:1000], much[1000:]])
    await ends.protocol.until(len(much))
    await written
    assert ends.protocol.received == much
    ends.pipes.loseConnection()
    assert await reading == much


def _writeAll(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@pytest_twisted.ensureDeferred
async def test_halfClose(ends: Ends) -> None:
    """The client sees the end of what we write, and what it still writes is read."""
    ends.pipes.write(b"last words")
    ends.pipes.loseWriteConnection()
    assert await deferToThread(readAll, ends.reads) == b"last words"
    os.write(ends.writes, b"more")
    await ends.protocol.until(4)
    assert not ends.protocol.lost.called


@pytest_twisted.ensureDeferred
async def test_theClientGoes(ends: Ends) -> None:
    """That is the end of the connection, told once."""
    ends.close()
    await ends.protocol.lost
    await ends.pipes.closed
    ends.pipes.write(b"into nothing")
    ends.pipes.loseConnection()
    ends.pipes.abortConnection()


@pytest_twisted.ensureDeferred
async def test_abort(ends: Ends) -> None:
    """Ends at once although the client takes nothing."""
    ends.pipes.write(bytes(8 * 1024 * 1024))
    ends.pipes.abortConnection()
    await ends.protocol.lost


@pytest_twisted.ensureDeferred
async def test_aProducerIsPaused(ends: Ends) -> None:
    """Beyond the buffer's size the producer waits, until what there is has been taken."""
    told: list[str] = []
    resumed: Deferred[None] = Deferred()

    class Producer:
        def pauseProducing(self) -> None:
            told.append("pause")

        def resumeProducing(self) -> None:
            told.append("resume")
            resumed.callback(None)

        def stopProducing(self) -> None:
            pass

    ends.pipes.registerProducer(Producer(), True)
    count = 4 * 1024 * 1024
    ends.pipes.write(bytes(count))
    assert told == ["pause"]
    taken = 0
    while taken < count:
        taken += len(await deferToThread(os.read, ends.reads, 1 << 20))
    await resumed
    assert told == ["pause", "resume"]
    ends.pipes.unregisterProducer()


@pytest_twisted.ensureDeferred
async def test_itIsThereBeforeTheReactorTurns(ends: Ends) -> None:
    """Where nothing waits, what is written at once has left when the call returns."""
    PromptWriter(ends.pipes).write(memoryview(b"at once"))
    assert readWhatIsThere(ends.reads) == b"at once"


@pytest_twisted.ensureDeferred
async def test_manyWritesOfAllSizes(ends: Ends) -> None:
    """At once or not, from one buffer that is written to again, into what is empty, full or half
    full: every byte arrives, once and in order."""
    writer = PromptWriter(ends.pipes)
    sizes = [1, 37, 52, 4096, 1, 100_000, 36, 300_000, 4097, 2] * 12
    buffer = bytearray(max(sizes))
    expected = bytearray()
    reading: Deferred[bytes] | None = None
    for number, size in enumerate(sizes):
        buffer[:size] = os.urandom(16) * (size // 16) + os.urandom(size % 16)
        expected += buffer[:size]
        if number % 3:
            writer.write(memoryview(buffer)[:size])
        else:
            ends.pipes.writeSequence([bytes(buffer[: size // 2]), bytes(buffer[size // 2 : size])])
        if number == 40:  # it has been full for long
            reading = deferToThread(readAll, ends.reads)
        if number % 7 == 0:
            await deferLater(reactor, 0)
    ends.pipes.loseWriteConnection()
    assert reading is not None
    assert await reading == expected


@pytest_twisted.ensureDeferred
async def test_aWritersProducerIsPaused(ends: Ends) -> None:
    """What is written at once is bounded like anything else: who writes is told to wait as soon
    as more waits than the buffer's size, however small each piece is, and to go on only when all
    of it has been taken."""
    paused = False
    resumed: Deferred[None] = Deferred()

    class Producer:
        def pauseProducing(self) -> None:
            nonlocal paused
            paused = True

        def resumeProducing(self) -> None:
            resumed.callback(None)

        def stopProducing(self) -> None:
            pass

    ends.pipes.registerProducer(Producer(), True)
    writer = PromptWriter(ends.pipes)
    written = 0
    while not paused:
        writer.write(b"x" * 36)
        written += 36
    # As much as a pipe or a socket holds has been taken, and no more than the buffer waits.
    held = len(readWhatIsThere(ends.reads))
    assert 0 < written - held <= ends.pipes.bufferSize + 36
    while held < written:
        assert not resumed.called
        held += len(await deferToThread(os.read, ends.reads, 1 << 20))
    await resumed
    ends.pipes.unregisterProducer()


@pytest_twisted.ensureDeferred
async def test_writingToWhoIsGone(ends: Ends) -> None:
    """Is no error, and found again by the reactor."""
    writer = PromptWriter(ends.pipes)
    ends.close()
    writer.write(b"x" * 100_000)
    writer.write(b"x")
    await ends.protocol.lost
    writer.write(b"after the end")


@pytest_twisted.ensureDeferred
async def test_noRoomForTheMoment(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that has no buffer for a socket just now is asked again."""
    write, refusals = os.write, 3

    def refusing(fd: int, data: Any) -> int:
        nonlocal refusals
        if fd == ends.pipes.fileno() and refusals:
            refusals -= 1
            raise OSError(errno.ENOBUFS, "no room")
        return write(fd, data)

    monkeypatch.setattr(os, "write", refusing)
    PromptWriter(ends.pipes).write(b"late")
    assert await deferToThread(os.read, ends.reads, 10) == b"late"
    assert refusals == 0


@pytest_twisted.ensureDeferred
async def test_theEndOfAnEnd(ends: Ends) -> None:
    """What is written after our end, a second end, and ends after the last are nothing."""
    ends.pipes.loseWriteConnection()
    assert await deferToThread(readAll, ends.reads) == b""
    PromptWriter(ends.pipes).write(b"late")
    ends.pipes.write(b"late")
    ends.pipes.loseWriteConnection()
    ends.pipes.loseConnection()
    await ends.protocol.lost
    ends.pipes.loseWriteConnection()
    ends.pipes.resumeProducing()


@pytest_twisted.ensureDeferred
async def test_nothingAfterAnAbort(ends: Ends) -> None:
    """Neither leaves anything any more, nor comes."""
    ends.pipes.abortConnection()
    os.write(ends.writes, b"too late")
    PromptWriter(ends.pipes).write(b"late")
    ends.pipes.write(b"late")
    ends.pipes.resumeProducing()
    ends.pipes.loseWriteConnection()
    ends.pipes.loseConnection()
    ends.pipes.abortConnection()
    await ends.protocol.lost
    assert await deferToThread(readAll, ends.reads) == b""
    assert ends.protocol.received == b""


@pytest.mark.parametrize("kind", ["pipes", "socket"])
@pytest_twisted.ensureDeferred
async def test_aProtocolWithAWillOfItsOwn(kind: str) -> None:
    """One that does not want to read at first is not made to, and one that fails at the end does
    not keep the others from knowing that it is over."""

    class Wilful(Kept):
        def connectionMade(self) -> None:
            self.transport.pauseProducing()  # type: ignore[union-attr]

        def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
            raise RuntimeError("no")

    ends = Ends(kind, Wilful())
    os.write(ends.writes, b"wait")
    await deferLater(reactor, 0)
    await deferLater(reactor, 0)
    assert ends.protocol.received == b""
    ends.pipes.resumeProducing()
    await ends.protocol.until(4)
    with pytest.raises(RuntimeError, match="no"):
        ends.pipes.connectionLost(Failure(CONNECTION_DONE))
    await ends.pipes.closed
    ends.close()
