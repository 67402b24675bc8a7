"""The transport over two descriptors, on the real reactor and real pipes."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.internet.threads import deferToThread

from conchkernel.pipes import Pipes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twisted.python.failure import Failure


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

    def __init__(self, kind: str) -> None:
        self.protocol = Kept()
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
    """Until the end."""
    data = b""
    while piece := os.read(fd, 1 << 20):
        data += piece
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
