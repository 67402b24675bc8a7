"""Hostile clients who have logged in: channels, programs and files; see ``test_attacks``."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from conchkernel.ssh.fields import string
from conchkernel.ssh.sftp_handles import MAX_HANDLES
from conchkernel.ssh.sftp_packets import Kind, frame
from tests.attackers import KEEPALIVE, LINUX, Attacker, cpuTime, sealed
from tests.underattack import LONGEST_TURN, MAXIMUM_GROWTH_KIB, Server

# --- questions -----------------------------------------------------------------------------------


def test_answersThatNobodyTakes(gateway: Server) -> None:
    """One who asks for replies without end, and takes none. (Stock Conch has no such question.)"""
    attacker = Attacker(gateway)
    attacker.login()
    data = sealed(attacker, 192, string(bytes(16000)), 2000)
    assert attacker.flood(data) < len(data)


def unanswered(server: Server) -> tuple[int, int]:
    """Small questions, the answers to which nobody takes: how many bytes of how many were."""
    attacker = Attacker(server)
    attacker.login()
    data = sealed(attacker, 80, KEEPALIVE, 300_000)
    return attacker.flood(data), len(data)


def test_globalRequestsThatNobodyTakes(gateway: Server) -> None:
    """They are not read any more."""
    taken, sent = unanswered(gateway)
    assert taken < sent


def inTheExchange(server: Server) -> Attacker:
    """A key exchange that is begun and not gone on with, and questions without end."""
    attacker = Attacker(server)
    attacker.login()
    attacker.sendKexInit(attacker.offer)
    attacker.flood(sealed(attacker, 80, KEEPALIVE, 20_000))
    return attacker


def test_exchangeLeftOpen(gateway: Server) -> None:
    """The first ends it."""
    assert inTheExchange(gateway).reason() == (2, b"message 80 during the key exchange")


def test_exchangeLeftOpenOnConch(conch: Server) -> None:
    """Every answer is kept until the keys are there."""
    attacker = inTheExchange(conch)
    attacker.until(20)
    attacker.sendPublic()
    attacker.until(21)
    attacker.sendNewKeys()
    answers = 0
    while answers < 20_000:
        answers += sum(number == 82 for number, _ in attacker.more())


def test_keysAgainAndAgain(gateway: Server) -> None:
    """New keys a hundred times are only that."""
    attacker = Attacker(gateway)
    attacker.login()
    for _ in range(100):
        attacker.sendKexInit()
        attacker.until(20)
        attacker.sendPublic()
        attacker.until(21)
        attacker.sendNewKeys()
    attacker.send(192, string(b"still there"))
    assert attacker.until(193)[-1] == (193, string(b"still there"))


def test_proofsWithoutEnd(gateway: Server) -> None:
    """A small question for our host key's signature: not without end. (Stock Conch knows no such
    question.)"""
    attacker = Attacker(gateway)
    attacker.login()
    question = string(b"hostkeys-prove-00@openssh.com") + b"\1" + string(attacker.hostKeyBlob)
    attacker.write(sealed(attacker, 80, question, 3000))
    answers: list[int] = []
    while len(answers) < 3000:
        answers += [number for number, _ in attacker.more() if number in (81, 82)]
    assert answers == [81] * 16 + [82] * 2984


def odd(server: Server, number: int, payload: bytes) -> list[int]:
    """One message that means nothing; what comes, and whether the connection lives."""
    attacker = Attacker(server)
    attacker.login()
    attacker.session()
    attacker.send(97, bytes(4))
    attacker.until(97)
    attacker.send(number, payload)
    try:
        return [number for number, _ in attacker.alive()]
    except OSError:
        return []


#: For a channel that is closed already; a name that is not ASCII.
ODD = [
    (93, bytes(4) + struct.pack(">L", 1)),
    (94, bytes(4) + string(b"late")),
    (96, bytes(4)),
    (98, bytes(4) + string(b"exec") + b"\1" + string(b"true")),
    (80, string(b"\xff\xfe") + b"\0"),
]


def test_oddMessages(gateway: Server) -> None:
    """Who says something to a channel that has just closed is no enemy."""
    for number, payload in ODD:
        assert odd(gateway, number, payload), number


def test_oddMessagesOnConch(conch: Server) -> None:
    """Each of them costs the connection."""
    for number, payload in ODD:
        assert not odd(conch, number, payload), number


# --- channels ------------------------------------------------------------------------------------


def channels(server: Server) -> int:
    """Ten thousand sessions; how many are opened."""
    attacker = Attacker(server)
    attacker.login()
    session = string(b"session") + struct.pack(">3L", 7, 1 << 20, 32768)
    opened = 0
    for _ in range(10):
        attacker.write(sealed(attacker, 90, session, 1000))
        answers = [number for number, _ in attacker.alive() if number in (91, 92)]
        assert len(answers) == 1000
        opened += answers.count(91)
    return opened


def test_channelsWithoutEnd(gateway: Server) -> None:
    """Ten are opened, and all the others are told why not."""
    assert channels(gateway) == 10


def test_channelsWithoutEndOnConch(conch: Server) -> None:
    """All are opened."""
    assert channels(conch) == 10_000


def test_packetsOfNothing(gateway: Server) -> None:
    """A channel whose packets may hold nothing is not opened: no loop is to come of it."""
    attacker = Attacker(gateway)
    attacker.login()
    attacker.send(90, string(b"session") + struct.pack(">3L", 0, 1 << 20, 0))
    assert attacker.until(92)[-1][1][4:8] == struct.pack(">L", 1)


def computes(server: Server, seconds: float) -> None:
    """Wait until it has."""
    begin = cpuTime(server.process.pid)
    while cpuTime(server.process.pid) - begin < seconds:
        time.sleep(0.02)


@pytest.mark.skipif(not LINUX, reason="asks for the CPU time of another process")
def test_packetsOfNothingOnConch(conch: Server) -> None:
    """Three bytes of stderr stop the process for ever."""
    attacker = Attacker(conch)
    attacker.login()
    channel = attacker.session(maxPacket=0)
    attacker.send(98, struct.pack(">L", channel) + string(b"exec") + b"\0" + string(b"echo no >&2"))
    computes(conch, 1)
    waiting = socket.create_connection(("127.0.0.1", conch.port))
    computes(conch, 1)
    waiting.setblocking(False)
    with pytest.raises(BlockingIOError):
        waiting.recv(1)


def test_windowsByteByByte(gateway: Server) -> None:
    """A hundred thousand adjustments cost little; one too many for 32 bits ends it."""
    attacker = Attacker(gateway)
    attacker.login()
    channel = attacker.run(b"head -c 30000000 /dev/zero", window=0)
    for _ in range(20):
        attacker.write(sealed(attacker, 93, struct.pack(">2L", channel, 1), 5000))
        attacker.alive()
    for _ in range(2):
        attacker.send(93, struct.pack(">2L", channel, 0xFFFFFFFF))
    assert attacker.reason() == (2, b"window of channel 0 overflows")


def test_windowsByteByByteOnConch(conch: Server) -> None:
    """Two thousand adjustments: each copies all that waits."""
    attacker = Attacker(conch)
    attacker.login()
    channel = attacker.run(b"head -c 5000000 /dev/zero", window=0)
    attacker.until(96)
    attacker.write(sealed(attacker, 93, struct.pack(">2L", channel, 1), 2000))
    attacker.alive()
    assert conch.stop()["longest"] > LONGEST_TURN


def stalled(server: Server) -> list[Attacker]:
    """Forty programs write 2 MB each to clients who take nothing."""
    attackers = []
    for number in range(4):
        attacker = Attacker(server, f"127.0.0.{10 + number}")
        attacker.login()
        for _ in range(10):
            attacker.run(b"head -c 2000000 /dev/zero", window=0)
        attackers.append(attacker)
    return attackers


def test_outputThatNobodyTakes(gateway: Server) -> None:
    """The programs wait."""
    for attacker in stalled(gateway):
        assert all(number != 96 for number, _ in attacker.alive())


def test_outputThatNobodyTakesOnConch(conch: Server) -> None:
    """All of it is kept here, and the programs have ended."""
    for attacker in stalled(conch):
        ends = 0
        while ends < 10:
            ends += sum(number == 96 for number, _ in attacker.more())
    assert conch.growth() > MAXIMUM_GROWTH_KIB


def unread(server: Server) -> int:
    """Input for a program that reads none: how much is taken of 100 MB."""
    attacker = Attacker(server)
    attacker.login()
    channel = attacker.run(b"exec sleep 20")
    return attacker.pour(channel, 100_000_000)


def test_inputThatNobodyTakes(gateway: Server) -> None:
    """What the window allows, and a pipe holds."""
    assert unread(gateway) < 8_000_000


def test_inputThatNobodyTakesOnConch(conch: Server) -> None:
    """All of it."""
    assert unread(conch) >= 100_000_000
    assert conch.growth() > MAXIMUM_GROWTH_KIB


def test_inputBeyondTheWindow(gateway: Server) -> None:
    """More input than the window has room for. (Stock Conch closes the channel.)"""
    attacker = Attacker(gateway)
    attacker.login()
    channel = attacker.run(b"exec sleep 5")
    data = struct.pack(">L", channel) + string(bytes(32768))
    attacker.flood(sealed(attacker, 94, data, 3000))
    assert attacker.reason() == (2, b"window of channel 0 ignored")


def test_farewellWithEscapes(gateway: Server) -> None:
    """What a client says when it goes steers no terminal that shows the log. (Nor with stock
    Conch.)"""
    attacker = Attacker(gateway)
    attacker.login()
    text = b"\x1b]0;owned\x07\r\n2026 forged line " + bytes(range(128, 256)) * 100
    attacker.send(1, struct.pack(">L", 2) + string(text) + string(b""))
    attacker.untilClosed()
    (line,) = (line for line in gateway.lines() if "owned" in line)
    assert line.isascii()
    assert "\x1b" not in line
    assert "forged line" in line
    assert len(line) < 1000


def test_byteByByte(gateway: Server) -> None:
    """A big packet in the smallest pieces costs no more than its size. (With stock Conch, too.)"""
    attacker = Attacker(gateway)
    attacker.login()
    packet = attacker.pack(192, string(bytes(200_000)))
    attacker.write(packet[:-2000])
    for at in range(2000, 0, -1):
        attacker.write(packet[-at : len(packet) - at + 1])
    assert attacker.until(193)[-1] == (193, string(bytes(200_000)))


# --- files ---------------------------------------------------------------------------------------


class Files:
    """An SFTP session that says what it is told to."""

    def __init__(self, server: Server) -> None:
        self.attacker = Attacker(server)
        self.attacker.login()
        self.channel = self.attacker.session(window=0x7FFFFFFF)
        self.attacker.request(self.channel, b"subsystem", string(b"sftp"))
        self._data = b""
        self.send(frame(Kind.INIT, 3, b""))
        self.answer()

    def send(self, packet: bytes) -> None:
        self.attacker.send(94, struct.pack(">L", self.channel) + string(packet))

    def size(self) -> int:
        """How long the next answer is said to be."""
        while len(self._data) < 4:
            self._more()
        return int.from_bytes(self._data[:4], "big")

    def answer(self) -> tuple[int, int, bytes]:
        """The next answer: its kind, its id, and the rest."""
        end = self.size() + 4
        while len(self._data) < end:
            self._more()
        _, kind, number = struct.unpack_from(">LBL", self._data)
        rest, self._data = self._data[9:end], self._data[end:]
        return kind, number, rest

    def _more(self) -> None:
        for number, payload in self.attacker.more():
            if number == 94:
                self._data += payload[8:]

    def open(self, number: int, path: bytes) -> None:
        self.send(frame(Kind.OPEN, number, string(path) + struct.pack(">2L", 1, 0)))


def hugeRead(server: Server) -> int:
    """One READ of 100 MB from a file that has no end; how much comes."""
    files = Files(server)
    files.open(1, b"/dev/zero")
    kind, _, handle = files.answer()
    assert kind == Kind.HANDLE
    files.send(frame(Kind.READ, 2, handle + struct.pack(">QL", 0, 100_000_000)))
    return files.size()


def test_hugeRead(gateway: Server) -> None:
    """As much as a packet holds."""
    assert hugeRead(gateway) <= 256 * 1024


def test_hugeReadOnConch(conch: Server) -> None:
    """All of it is read, and kept until it is sent."""
    assert hugeRead(conch) > 100_000_000
    assert conch.growth() > MAXIMUM_GROWTH_KIB


#: What must have an answer: no such handle, no such request, and requests that are cut off.
NONSENSE = [
    frame(Kind.READ, 1, string(b"none") + struct.pack(">QL", 0, 10)),
    frame(Kind.WRITE, 1, string(b"none") + struct.pack(">Q", 0) + string(b"x")),
    frame(99, 1, b""),
    frame(Kind.STAT, 1, b"\0"),
    frame(Kind.OPEN, 1, string(b"/") + b"\0"),
]


def nonsense(server: Server, packet: bytes) -> list[int]:
    """A request that means nothing, and one that does; the ids of the answers."""
    files = Files(server)
    files.send(packet)
    files.send(frame(Kind.REALPATH, 2, string(b"/")))
    answers = [0]
    while answers[-1] != 2:
        answers.append(files.answer()[1])
    return answers[1:]


def test_nonsense(gateway: Server) -> None:
    """Each has its answer."""
    for packet in NONSENSE:
        assert nonsense(gateway, packet) == [1, 2], packet


def test_nonsenseOnConch(conch: Server) -> None:
    """None has: its client waits for ever."""
    for packet in NONSENSE:
        assert nonsense(conch, packet) == [2], packet


def handles(server: Server) -> int:
    """As many files as can be opened."""
    files = Files(server)
    for number in range(400):
        files.open(number, b"/dev/null")
    return sum(files.answer()[0] == Kind.HANDLE for _ in range(400))


def test_handlesWithoutEnd(gateway: Server) -> None:
    """There is a bound."""
    assert handles(gateway) == MAX_HANDLES


def test_handlesWithoutEndOnConch(conch: Server) -> None:
    """There is none but the process's own, which others need too."""
    assert handles(conch) == 400


def test_hugePacket(gateway: Server) -> None:
    """The session ends."""
    files = Files(gateway)
    files.send(b"\xff\xff\xff\xff")
    assert {96, 98} <= {number for number, _ in files.attacker.until(97)}


def test_hugePacketOnConch(conch: Server) -> None:
    """It is kept, and copied anew with each piece that comes."""
    files = Files(conch)
    files.send(b"\xff\xff\xff\xff")
    assert files.attacker.pour(files.channel, 10_000_000) >= 10_000_000
