"""Writing at once: what leaves, what waits, in which order, and below which wrappers."""

from __future__ import annotations

import os
import socket
import ssl as standard
import struct
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory

from conchkernel.tcp import PromptWriter, beneath
from tests.roads import Authority


class Server(Protocol):
    """The side that writes."""

    def __init__(self) -> None:
        self.lost: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.writer = PromptWriter(self.transport)
        self.factory.made.callback(self)  # type: ignore[union-attr]

    def connectionLost(self, reason: Any = None) -> None:
        self.lost.callback(None)


class Pair:
    """A server's protocol and a client's socket, connected."""

    def __init__(self, wrapper: Any = None, options: Any = None) -> None:
        inner = Factory.forProtocol(Server)
        inner.made = self.made = Deferred()  # type: ignore[attr-defined]
        factory: Any = inner
        if wrapper is not None:
            factory = WrappingFactory(inner)
            factory.protocol = wrapper
        if options is None:
            self.port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        else:
            self.port = reactor.listenSSL(0, factory, options, interface="127.0.0.1")
        self.client = socket.create_connection(("127.0.0.1", self.port.getHost().port))
        self.client.settimeout(30)

    def all(self, count: int) -> Any:
        """On a thread: so many bytes."""

        def read() -> bytes:
            data = bytearray()
            while len(data) < count and (piece := self.client.recv(1 << 20)):
                data += piece
            return bytes(data)

        return deferToThread(read)

    async def close(self) -> None:
        self.client.close()
        await self.port.stopListening()


@pytest.fixture
def pairs():
    """Makes pairs, which end with the test."""
    made: list[Pair] = []

    def make(*arguments: Any) -> Pair:
        made.append(Pair(*arguments))
        return made[-1]

    yield make
    for pair in made:
        pytest_twisted.blockon(Deferred.fromCoroutine(pair.close()))


@pytest_twisted.ensureDeferred
async def test_itIsThereBeforeTheReactorTurns(pairs: Any) -> None:
    """Where nothing waits, the bytes have left when the call returns."""
    pair = pairs()
    server = await pair.made
    server.writer.write(b"at once")
    assert pair.client.recv(100) == b"at once"


@pytest_twisted.ensureDeferred
async def test_whatIsNotTakenWaitsInOrder(pairs: Any) -> None:
    """More than TCP takes, from one buffer that is written to again, among ordinary writes."""
    pair = pairs()
    server = await pair.made
    expected = b""
    buffer = bytearray(300_000)
    for number in range(30):
        buffer[:] = os.urandom(10_000) * 30
        expected += bytes(buffer)
        server.writer.write(memoryview(buffer))
        if number % 3 == 0:
            server.transport.write(b"between")
            expected += b"between"
    assert await pair.all(len(expected)) == expected
    server.writer.write(b"again at once")
    assert await pair.all(13) == b"again at once"


@pytest_twisted.ensureDeferred
async def test_aWrapperThatChangesBytesIsNotPassedBy(pairs: Any) -> None:
    """What stands between and has a say in writing is asked; one that has none is not."""

    class Upper(ProtocolWrapper):
        def write(self, data: bytes) -> None:
            super().write(data.upper())

    changing, plain = pairs(Upper), pairs(ProtocolWrapper)
    (await changing.made).writer.write(b"text")
    assert await changing.all(4) == b"TEXT"
    server = await plain.made
    server.writer.write(b"text")
    assert plain.client.recv(100) == b"text"
    assert beneath(server.transport).socket.getsockname()[1] == plain.port.getHost().port


@pytest_twisted.ensureDeferred
async def test_nothingGoesPastTLS(pairs: Any, tmp_path: Path) -> None:
    """Over TLS the peer gets the text by TLS."""
    authority = Authority(tmp_path)
    pair = pairs(None, authority.certify("127.0.0.1"))
    context = standard.create_default_context(cafile=str(authority.file))

    def shake() -> Any:
        return context.wrap_socket(pair.client, server_hostname="127.0.0.1")

    pair.client = await deferToThread(shake)
    (await pair.made).writer.write(b"secret")
    assert await pair.all(6) == b"secret"


@pytest_twisted.ensureDeferred
async def test_aPeerThatIsGone(pairs: Any) -> None:
    """Writing to who has reset the connection is no error; that it is lost is told as ever."""
    pair = pairs()
    server = await pair.made
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.client.close()
    server.writer.write(b"x" * 100_000)
    server.writer.write(b"x" * 100_000)
    await server.lost
    server.writer.write(b"after the end")
