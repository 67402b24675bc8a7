"""Channels: windows, order, and how much is held."""

from __future__ import annotations

import random
import struct

import pytest

from conchkernel.avatars import KernelAvatar
from conchkernel.ssh.channel import (
    ADJUST_STEP_BYTES,
    AHEAD_BYTES,
    CREDIT_CAP_BYTES,
    LOCAL_WINDOW_BYTES,
    MAX_DATA_BYTES,
)
from conchkernel.testing import ClientChannel, MemoryBackend, MemoryClient, MemoryStream

MIB = 1024 * 1024


def running(
    client: MemoryClient, window: int = 2 * MIB, maxPacket: int = MAX_DATA_BYTES
) -> tuple[ClientChannel, MemoryStream]:
    """A channel with a command that runs, and that command."""
    channel = client.execute(b"command", window=window, maxPacket=maxPacket)
    stream = client.backend.links[0].streams[-1]  # type: ignore[attr-defined]
    return channel, stream


@pytest.fixture
def client() -> MemoryClient:
    """A client whose commands run at once and do what the test says."""
    backend = MemoryBackend(lambda stream: stream.opened(pid=1))
    client = MemoryClient(KernelAvatar(backend, "joe"))
    client.backend = backend  # type: ignore[attr-defined]
    return client


def test_bulkIsCutToTheClientsPackets(client: MemoryClient) -> None:
    """Output leaves in packets as large as both sides take, and whole."""
    channel, stream = running(client)
    data = random.Random(1).randbytes(200_001)
    stream.put(data)
    assert channel.output == data
    assert channel.packets == [MAX_DATA_BYTES] * 6 + [200_001 - 6 * MAX_DATA_BYTES]


@pytest.mark.parametrize("maxPacket", [1024, 1500, 16384, 32768, 2**32 - 1])
def test_peersMaximumPacketHolds(client: MemoryClient, maxPacket: int) -> None:
    """No packet is larger than the client said, nor larger than we ever send."""
    channel, stream = running(client, maxPacket=maxPacket)
    stream.put(b"x" * 100_000)
    assert len(channel.output) == 100_000
    assert max(channel.packets) == min(maxPacket, MAX_DATA_BYTES)


def test_outputStopsAtTheWindow(client: MemoryClient) -> None:
    """Little of what the window does not take is granted: the rest waits where it is made."""
    channel, stream = running(client, window=100_000)
    stream.put(b"x" * (AHEAD_BYTES + 900_000))
    assert (len(channel.output), stream.pending) == (100_000, 800_000)
    assert stream.receiver.bufferedBytes == AHEAD_BYTES
    client.adjust(channel, 500_000)
    assert (len(channel.output), stream.pending) == (600_000, 300_000)
    client.adjust(channel, 10_000_000)
    assert (len(channel.output), stream.pending) == (AHEAD_BYTES + 900_000, 0)


def test_closedWindowLetsTheEndWait(client: MemoryClient) -> None:
    """EOF, exit-status and CLOSE come after the last byte, whenever that goes."""
    channel, stream = running(client, window=10)
    stream.put(b"0123456789abc")
    stream.end()
    assert channel.events == ["success", "data"]
    client.adjust(channel, 2)
    assert channel.output == b"0123456789ab"
    assert channel.events == ["success", "data"]
    client.adjust(channel, 1)
    assert channel.output == b"0123456789abc"
    assert channel.events == ["success", "data", "eof", ("exit-status", b"\0\0\0\0"), "close"]


def test_fullTransportHoldsWhatWasGrantedAndGrantsNoMore(client: MemoryClient) -> None:
    """While the client's TCP is full, a channel holds the granted bytes and asks for none."""
    channel, stream = running(client, window=2**32 - 1)
    client.pause()
    stream.put(b"x" * (5 * MIB))
    stream.end()
    assert len(channel.output) == 0
    assert stream.sent == CREDIT_CAP_BYTES
    assert stream.receiver.bufferedBytes == CREDIT_CAP_BYTES
    client.resume()
    assert len(channel.output) == 5 * MIB
    assert channel.closed


def test_transportThatFillsAgainAndAgain(client: MemoryClient) -> None:
    """A transport that takes a few packets at a time gets them in order and all of them."""
    channel, stream = running(client)
    data = random.Random(2).randbytes(MIB)
    client.pause()
    stream.put(data)
    stream.end()
    rounds = 0
    while not channel.closed:
        client.resume(capacity=3)
        rounds += 1
        assert rounds < 100
    assert channel.output == data
    assert rounds >= MIB // MAX_DATA_BYTES // 3


def test_creditIsNeverMoreThanTheCapAhead(client: MemoryClient) -> None:
    """However large the client's window, a process runs ahead by the cap at most."""
    _, stream = running(client, window=2**32 - 1)
    assert stream.limit == CREDIT_CAP_BYTES
    stream.put(b"x" * (3 * MIB))
    assert 3 * MIB < stream.limit <= 3 * MIB + CREDIT_CAP_BYTES


def test_windowOpenedByteByByteIsGrantedInSteps(client: MemoryClient) -> None:
    """Tiny adjusts do not each cost a message to the kernel's host, and nothing gets stuck."""
    channel, stream = running(client, window=1000)
    grants = []
    grant = stream.grant
    stream.receiver._grant = lambda limit: (grants.append(limit), grant(limit))
    stream.put(b"x" * 2000)
    for _ in range(1000):
        client.adjust(channel, 1)
    assert len(channel.output) == 2000
    grants.clear()
    for _ in range(1000):
        client.adjust(channel, 1)
    assert len(grants) <= 12
    stream.put(b"y" * 1000)
    assert len(channel.output) == 3000


def test_manySmallWritesAreJoined(client: MemoryClient) -> None:
    """Bytes that come one by one while the transport is full leave in few packets."""
    channel, stream = running(client)
    client.pause()
    for number in range(10_000):
        stream.put(bytes([number % 256]))
    assert len(stream.receiver._queue) < 10
    client.resume()
    assert channel.output == bytes(number % 256 for number in range(10_000))
    assert len(channel.packets) < 10


def test_littleOfALargeMessageDoesNotKeepIt(client: MemoryClient) -> None:
    """What waits of a message that was mostly others' costs what it is, not what it came in."""
    channel, stream = running(client)
    client.pause()
    for number in range(100):
        message = memoryview(bytes([number]) * 262_144)
        stream.receiver.streamData(message[:1500])
    kept = [data for _, data in stream.receiver._queue]
    held = sum(len(data.obj if isinstance(data, memoryview) else data) for data in kept)
    assert held <= 4 * 150_000
    client.resume()
    assert channel.output == b"".join(bytes([number]) * 1500 for number in range(100))


def test_everyMixOfSizesStaysInOrder(client: MemoryClient) -> None:
    """Whatever the sizes, windows and pauses, stdout and stderr come whole and in order."""
    dice = random.Random(3)
    for _ in range(60):
        channel, stream = running(client, dice.randrange(5000), dice.choice([1024, 4096, 32768]))
        out, err = bytearray(), bytearray()
        for _ in range(dice.randrange(1, 60)):
            data = dice.randbytes(dice.choice([0, 1, 10, 1000, 1024, 1025, 5000, 70_000]))
            if dice.random() < 0.7:
                out += data
                stream.put(data)
            else:
                err += data
                stream.putError(data)
            step = dice.randrange(4)
            if step == 0:
                client.adjust(channel, dice.randrange(3000))
            elif step == 1:
                client.pause()
            elif step == 2:
                client.resume(dice.choice([None, 1, 2]))
        stream.end()
        while not channel.closed:
            client.resume()
            client.adjust(channel, dice.randrange(1, 100_000))
        assert (channel.output, channel.errors) == (out, err)
        client.close(channel)
    assert client.disconnected is None


def test_stderrCountsAgainstTheSameWindow(client: MemoryClient) -> None:
    """Both kinds of output share the client's window and the grant."""
    channel, stream = running(client, window=30)
    stream.putError(b"e" * 20)
    stream.put(b"o" * 20)
    assert (len(channel.errors), len(channel.output)) == (20, 10)
    client.adjust(channel, 10)
    assert (len(channel.errors), len(channel.output)) == (20, 20)


def test_inputWindowOpensOnlyAsTheProcessTakes(client: MemoryClient) -> None:
    """Input nobody reads is not acknowledged; input that is read is, in steps."""
    channel, stream = running(client)
    assert channel.remoteWindow == LOCAL_WINDOW_BYTES
    client.write(channel, b"x" * LOCAL_WINDOW_BYTES)
    assert channel.remoteWindow == 0
    assert channel.adjusts == []
    stream.take(ADJUST_STEP_BYTES - 1)
    assert channel.adjusts == []
    stream.take(1)
    assert channel.adjusts == [ADJUST_STEP_BYTES]
    stream.take()
    assert sum(channel.adjusts) == LOCAL_WINDOW_BYTES
    client.write(channel, b"y" * LOCAL_WINDOW_BYTES)
    assert len(stream.waiting) == LOCAL_WINDOW_BYTES


def test_inputBeforeThereIsAProcessWaits() -> None:
    """A client that types ahead while the kernel starts loses nothing, and not its EOF either."""
    backend = MemoryBackend(lambda stream: stream.opened())
    backend.slow = True
    client = MemoryClient(KernelAvatar(backend, "joe"))
    channel = client.open()
    client.write(channel, b"early ")
    client.request(channel, b"exec", struct.pack(">L", 3) + b"cat")
    client.write(channel, b"bird")
    client.eof(channel)
    assert channel.events == []
    backend.answer()
    (stream,) = backend.links[0].streams
    assert (bytes(stream.waiting), stream.inputEOF) == (b"early bird", True)
    assert channel.events == ["success"]


def test_inputEOFComesAfterAllInput(client: MemoryClient) -> None:
    """EOF goes on once, behind the data; a second one, and data after it, go nowhere."""
    channel, stream = running(client)
    client.write(channel, b"last")
    client.eof(channel)
    client.eof(channel)
    client.write(channel, b"late")
    assert (bytes(stream.waiting), stream.inputEOF) == (b"last", True)
    assert client.disconnected is None


def test_dataForStderrOfTheServerIsDroppedAndPaidBack(client: MemoryClient) -> None:
    """Extended data towards a server means nothing, but must not eat the window."""
    channel, stream = running(client)
    numbers = struct.pack(">3L", channel.remote, 1, MAX_DATA_BYTES)
    for _ in range(3):
        client.receive(95, numbers + b"x" * MAX_DATA_BYTES)
    assert sum(channel.adjusts) == 3 * MAX_DATA_BYTES
    assert not stream.waiting


def test_clientClosesInTheMiddle(client: MemoryClient) -> None:
    """What waited is dropped, and CLOSE is answered when the process has ended."""
    channel, stream = running(client, window=10)
    stream.put(b"x" * 100)
    client.close(channel)
    assert stream.calls == [("stopReading",)]
    stream.end()
    assert channel.output == b"x" * 10
    assert channel.closed
    assert client.connection.channels == {}


def test_noMixOfWindowsGetsStuck(client: MemoryClient) -> None:
    """A client that adjusts only after it has taken enough is always given that much."""
    dice = random.Random(4)
    for _ in range(60):
        window = dice.choice([1, 2, 1000, 65_536, 2 * MIB, 3 * MIB, 16 * MIB])
        threshold = dice.randrange(1, window + 1)
        channel, stream = running(client, window)
        total = 3 * threshold + dice.randrange(1, min(window, 300_000) + 1)
        stream.put(b"x" * total)
        taken = 0
        while (unread := len(channel.output) - taken) >= threshold:
            taken += unread
            client.adjust(channel, unread)
        assert len(channel.output) > total - threshold
        client.close(channel)
        stream.end()
