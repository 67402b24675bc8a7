"""Whose turn it is to send."""

from __future__ import annotations

import os

import pytest

from conchkernel.avatars import KernelAvatar
from conchkernel.ssh.channel import AHEAD_BYTES, MAX_DATA_BYTES
from conchkernel.testing import ClientChannel, MemoryBackend, MemoryClient, MemoryStream


class Rig:
    """Commands on one connection."""

    def __init__(self) -> None:
        self.backend = MemoryBackend(lambda stream: stream.opened())
        self.client = MemoryClient(KernelAvatar(self.backend, "joe"))

    def run(self, window: int = 1 << 24) -> tuple[ClientChannel, MemoryStream]:
        channel = self.client.execute(b"command", window=window)
        return channel, self.backend.links[0].streams[-1]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_channelsTakeTurns(rig: Rig) -> None:
    """Several floods leave a packet each in turn, whoever came first."""
    runs = [rig.run() for _ in range(3)]
    rig.client.pause()
    for _, stream in runs:
        stream.put(b"x" * (4 * MAX_DATA_BYTES))
    rig.client.resume()
    assert rig.client.turns == [0, 1, 2] * 4


def test_littleGoesFirst(rig: Rig) -> None:
    """A key's echo overtakes the floods of other channels that wait for the transport."""
    floods, typing = [rig.run() for _ in range(3)], rig.run()
    rig.client.pause()
    for _, stream in floods:
        stream.put(b"x" * (4 * MAX_DATA_BYTES))
    typing[1].put(b"k")
    rig.client.resume(capacity=2)
    assert rig.client.turns == [3, 0]
    typing[1].put(b"e")
    rig.client.resume(capacity=2)
    assert rig.client.turns == [3, 0, 3, 1]


def test_littleThatBecameMuchWaitsItsTurn(rig: Rig) -> None:
    """A channel that starts small and then floods has one packet ahead, not all."""
    (_, flood), (_, other) = rig.run(), rig.run()
    rig.client.pause()
    flood.put(b"x" * (3 * MAX_DATA_BYTES))
    other.put(b"k")
    other.put(b"x" * (2 * MAX_DATA_BYTES))
    rig.client.resume()
    assert rig.client.turns == [1, 0, 1, 0, 1, 0]


def test_closedWindowHoldsUpNobodyElse(rig: Rig) -> None:
    """A channel whose client does not read leaves its turns to the others."""
    (stuck, stalled), (free, stream) = rig.run(window=10), rig.run()
    rig.client.pause()
    stalled.put(b"x" * 1000)
    stream.put(b"y" * 1_000_000)
    rig.client.resume()
    assert (len(stuck.output), len(free.output)) == (10, 1_000_000)
    rig.client.adjust(stuck, 990)
    assert len(stuck.output) == 1000


def test_pauseInTheMiddleOfAFlood(rig: Rig) -> None:
    """Not one packet more leaves after the transport has said it is full."""
    channel, stream = rig.run()
    rig.client.resume(capacity=2)
    stream.put(b"x" * 1_000_000)
    assert len(channel.packets) == 2
    rig.client.resume()
    assert len(channel.output) == 1_000_000


def test_creditFollowsWhenTheTransportResumes(rig: Rig) -> None:
    """What a client's adjust allows while the transport is full is granted afterwards."""
    channel, stream = rig.run(window=1000)
    stream.put(b"x" * (AHEAD_BYTES + 1_000_000))
    rig.client.pause()
    rig.client.adjust(channel, 500_000)
    assert stream.sent == AHEAD_BYTES + 1000
    rig.client.resume()
    assert len(channel.output) == 501_000
    assert stream.sent == AHEAD_BYTES + 501_000


def test_brokenChannelDoesNotStopTheOthers(rig: Rig, loggedFailures: object) -> None:
    """An error while one channel sends closes that one; the rest still have their turn."""
    (bad, first), (good, second) = rig.run(), rig.run()
    rig.client.pause()
    first.put(b"x" * 100)
    second.put(b"y" * 100)
    first.receiver.sendNext = lambda runBytes: 1 / 0
    rig.client.resume()
    assert bad.closed
    assert good.output == b"y" * 100
    assert loggedFailures.flush(ZeroDivisionError)  # type: ignore[attr-defined]


class RunningClient(MemoryClient):
    """A client whose transport makes many packets in one go."""

    def __init__(self, avatar: KernelAvatar) -> None:
        self.runs: list[int] = []
        self.runBytes = lambda: 4 * MAX_DATA_BYTES
        super().__init__(avatar)

    def sendChannelRun(self, recipient: int, data: bytes, pieceBytes: int) -> None:
        assert self.writable
        assert len(data) <= self.runBytes()
        pieces = [data[at : at + pieceBytes] for at in range(0, len(data), pieceBytes)]
        assert {len(piece) for piece in pieces[:-1]} == {pieceBytes}
        self.runs.append(len(pieces))
        for piece in pieces:
            self.sendChannelData(recipient, piece)


def test_whoIsAloneSendsRuns() -> None:
    """A flood beside which nobody waits leaves in runs of full packets, with what is left behind
    them, within the client's window, and every byte in its place."""
    backend = MemoryBackend(lambda stream: stream.opened())
    client = RunningClient(KernelAvatar(backend, "joe"))
    channel = client.execute(b"command", window=7 * MAX_DATA_BYTES + 5)
    stream = backend.links[0].streams[-1]
    data = os.urandom(10 * MAX_DATA_BYTES + 77)
    stream.put(data)
    assert client.runs == [4, 3]
    assert channel.output == data[: 7 * MAX_DATA_BYTES + 5]
    client.adjust(channel, 1 << 20)
    assert channel.output == data
    # The rest of the packet that the window cut short begins where it ended.
    assert client.runs == [4, 3, 4]


def test_otherChannelsEndTheRuns() -> None:
    """Beside others each has its turn of one packet; a run waits for nobody else."""
    backend = MemoryBackend(lambda stream: stream.opened())
    client = RunningClient(KernelAvatar(backend, "joe"))
    channels = [client.execute(b"command", window=1 << 24) for _ in range(2)]
    first, second = backend.links[0].streams
    client.pause()
    first.put(b"x" * (8 * MAX_DATA_BYTES))
    second.put(b"y" * (2 * MAX_DATA_BYTES))
    client.resume()
    # The second one's turns are over after its two.
    assert client.turns[:5] == [0, 1, 0, 1, 0]
    assert client.runs == [4, 2]
    assert [len(channel.output) for channel in channels] == [
        8 * MAX_DATA_BYTES,
        2 * MAX_DATA_BYTES,
    ]


def test_stderrMakesNoRuns() -> None:
    """Bytes of another kind keep theirs, packet by packet."""
    backend = MemoryBackend(lambda stream: stream.opened())
    client = RunningClient(KernelAvatar(backend, "joe"))
    channel = client.execute(b"command", window=1 << 24)
    backend.links[0].streams[-1].putError(b"e" * (3 * MAX_DATA_BYTES))
    assert channel.errors == b"e" * (3 * MAX_DATA_BYTES)
    assert not client.runs
