"""Hostile clients over real TCP: the gateway stays small, goes on serving, and has no traceback.

The gateway is a process of its own, so that its memory can be told from ours. Each attacker comes
from an address of its own; what they do is refused by stock Conch only after gigabytes, hours or
never.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from conchkernel.ssh.fields import Fields, string
from tests.rawclient import KEXINIT, VERSION, Inbound, Outbound, RawClient

LINUX = sys.platform == "linux"
#: What a gateway may grow by, whatever is done to it.
MAXIMUM_GROWTH_KIB = 64 * 1024

#: Seconds for which nobody else is served, at most: of the gateway's own CPU time, so that a busy
#: machine is not taken for a busy gateway.
LONGEST_TURN = 0.25

GATEWAY = """
import sys, time
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from twisted.conch.ssh.keys import Key
from twisted.cred.portal import Portal
from twisted.internet import reactor
from twisted.logger import globalLogPublisher, textFileLogObserver
from conchkernel.avatars import KernelRealm
from conchkernel.ssh.checkers import AnonymousOwnerChecker, TokenChecker
from conchkernel.ssh.factory import GatewayFactory
from conchkernel.testing import MemoryBackend
globalLogPublisher.addObserver(textFileLogObserver(sys.stderr))
factory = GatewayFactory(
    Portal(KernelRealm(MemoryBackend(lambda stream: stream.opened())),
           [AnonymousOwnerChecker(), TokenChecker("tok")]),
    [Key(Ed25519PrivateKey.generate())], reactor=reactor)
port = reactor.listenTCP(0, factory, interface="0.0.0.0", backlog=500)
print(port.getHost().port, flush=True)
longest, last = 0.0, time.thread_time()
def tick():
    global longest, last
    now = time.thread_time()
    longest, last = max(longest, now - last), now
    reactor.callLater(0.01, tick)
tick()
reactor.run()
print(longest)
"""


class Gateway:
    """The process under attack."""

    def __init__(self, log: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", GATEWAY], stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.log = log
        Attacker(self, "127.0.0.200").login()
        self.before = self.memory()

    def memory(self) -> int:
        """The most KiB that it ever held; elsewhere than on Linux, what it holds now."""
        if not LINUX:
            return int(psutil.Process(self.process.pid).memory_info().rss) // 1024
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    def lines(self) -> list[str]:
        self.log.flush()
        with open(self.log.name) as file:
            return file.read().splitlines()


@pytest.fixture
def gateway(tmp_path: Any) -> Iterator[Gateway]:
    """A gateway, which must have taken no harm in the end."""
    with open(tmp_path / "log", "w") as log:
        found = Gateway(log)
        try:
            yield found
            # It still serves.
            Attacker(found, "127.0.0.201").login()
            assert found.memory() - found.before < MAXIMUM_GROWTH_KIB
            assert not [line for line in found.lines() if "Traceback" in line]
        finally:
            found.process.terminate()
            last, _ = found.process.communicate()
    assert float(last) < LONGEST_TURN


class Attacker(RawClient):
    """A raw client over a socket. It waits for what it reads, and for nothing else."""

    def __init__(self, gateway: Gateway, host: str = "127.0.0.2") -> None:
        self.socket = socket.socket()
        if LINUX:
            # Elsewhere only 127.0.0.1 is there without an administrator.
            self.socket.bind((host, 0))
        self.socket.settimeout(30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Less than the gateway may hold back for us.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        self.socket.connect(("127.0.0.1", gateway.port))
        self.inbound = Inbound()
        self.inbound.limit = 1 << 20
        self.outbound = Outbound()
        self.greeting = b""
        self.kexInit = b""
        self.sessionID = None
        self.strict = False
        self.data = b""
        while b"\r\n" not in self.data:
            block = self.socket.recv(4096)
            if not block:
                break
            self.data += block
        self.greeting, _, self.data = self.data.partition(b"\r\n")

    def write(self, data: bytes) -> None:
        self.socket.sendall(data)

    def until(self, number: int) -> list[tuple[int, bytes]]:
        """All that comes before a message of this number, and it."""
        messages: list[tuple[int, bytes]] = []
        while not any(one == number for one, _ in messages):
            self.inbound.feed(self.data or self.socket.recv(65536))
            self.data = b""
            messages += self._parse()
        return messages

    def read(self) -> list[tuple[int, bytes]]:
        return []

    def start(self, offer: Any = KEXINIT) -> RawClient:
        self.write(VERSION + b"\r\n")
        self.sendKexInit(offer)
        self.until(20)
        self.sendPublic()
        self.until(21)
        self.sendNewKeys()
        return self

    def login(self) -> RawClient:
        self.start()
        self.send(5, string(b"ssh-userauth"))
        self.auth(b"none")
        self.until(52)
        return self

    def flood(self, data: bytes) -> int:
        """Send until all is sent, or the gateway takes no more, or has gone.

        :returns: how many bytes it took.
        """
        sent = 0
        self.socket.settimeout(1)
        try:
            while sent < len(data):
                sent += self.socket.send(memoryview(data)[sent:])
        except OSError:
            pass
        return sent

    def reason(self) -> tuple[int, bytes]:
        """Code and text of the DISCONNECT that comes."""
        payload = self.until(1)[-1][1]
        fields = Fields(payload, "DISCONNECT")
        return fields.uint32(), fields.string()


def sealed(attacker: Attacker, number: int, payload: bytes, count: int) -> bytes:
    """Many packets of one message."""
    return b"".join(attacker.pack(number, payload) for _ in range(count))


def test_chatterBeforeTheLogin(gateway: Gateway) -> None:
    """Megabytes of junk by a client that reads nothing: cut off after 256 messages."""
    attacker = Attacker(gateway)
    attacker.start()
    attacker.flood(sealed(attacker, 2, string(bytes(100)), 30000))
    assert attacker.reason() == (2, b"too many messages before authentication")
    assert len(gateway.lines()) < 10


def test_requestsBeforeTheKeys(gateway: Gateway) -> None:
    """Nothing but the key exchange before the keys: no service runs in clear."""
    for number in (5, 50, 80, 90):
        attacker = Attacker(gateway)
        attacker.write(VERSION + b"\r\n")
        attacker.flood(sealed(attacker, number, string(b"ssh-userauth"), 10000))
        assert attacker.reason()[0] == 2


def test_answersThatNobodyTakes(gateway: Gateway) -> None:
    """One who has logged in, asks for replies without end, and takes none."""
    attacker = Attacker(gateway)
    attacker.login()
    data = sealed(attacker, 192, string(bytes(16000)), 2000)
    assert attacker.flood(data) < len(data)


def test_globalRequestsThatNobodyTakes(gateway: Gateway) -> None:
    """The same with small questions."""
    attacker = Attacker(gateway)
    attacker.login()
    question = string(b"keepalive@openssh.com") + b"\1"
    data = sealed(attacker, 80, question, 400_000)
    assert attacker.flood(data) < len(data)


def test_exchangeLeftOpen(gateway: Gateway) -> None:
    """A key exchange that is begun and not gone on with holds nothing."""
    attacker = Attacker(gateway)
    attacker.login()
    attacker.sendKexInit()
    attacker.flood(sealed(attacker, 192, string(bytes(16000)), 3000))
    assert attacker.reason() == (2, b"message 192 during the key exchange")


def test_keysAgainAndAgain(gateway: Gateway) -> None:
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


def test_channelsWithoutEnd(gateway: Gateway) -> None:
    """Twenty thousand sessions: ten are opened, and all the others are told why not."""
    attacker = Attacker(gateway)
    attacker.login()
    session = string(b"session") + struct.pack(">3L", 7, 1 << 20, 32768)
    for _ in range(20):
        attacker.write(sealed(attacker, 90, session, 1000))
        attacker.send(192, string(b"all"))
        answers = [number for number, _ in attacker.until(193) if number in (91, 92)]
        assert len(answers) == 1000


def test_packetsOfNothing(gateway: Gateway) -> None:
    """A channel whose packets may hold nothing is not opened: no loop is to come of it."""
    attacker = Attacker(gateway)
    attacker.login()
    attacker.send(90, string(b"session") + struct.pack(">3L", 0, 1 << 20, 0))
    assert attacker.until(92)[-1][1][4:8] == struct.pack(">L", 1)


def test_windowsByteByByte(gateway: Gateway) -> None:
    """A hundred thousand adjustments by one byte, and then one too many for 32 bits."""
    attacker = Attacker(gateway)
    attacker.login()
    attacker.send(90, string(b"session") + struct.pack(">3L", 0, 0, 32768))
    attacker.until(91)
    attacker.send(98, struct.pack(">L", 0) + string(b"shell") + b"\1")
    attacker.until(99)
    attacker.write(sealed(attacker, 93, struct.pack(">2L", 0, 1), 100_000))
    attacker.send(192, string(b"through"))
    attacker.until(193)
    attacker.send(93, struct.pack(">2L", 0, 0xFFFFFFFF))
    assert attacker.reason() == (2, b"window of channel 0 overflows")


def test_inputThatNobodyTakes(gateway: Gateway) -> None:
    """More input than the window has room for, to a command that reads nothing."""
    attacker = Attacker(gateway)
    attacker.login()
    attacker.send(90, string(b"session") + struct.pack(">3L", 0, 1 << 20, 32768))
    attacker.until(91)
    attacker.send(98, struct.pack(">L", 0) + string(b"exec") + b"\1" + string(b"sleep 5"))
    attacker.until(99)
    data = struct.pack(">L", 0) + string(bytes(32768))
    attacker.flood(sealed(attacker, 94, data, 3000))
    assert attacker.reason() == (2, b"window of channel 0 ignored")


def test_farewellWithEscapes(gateway: Gateway) -> None:
    """What a client says when it goes steers no terminal that shows the log."""
    attacker = Attacker(gateway)
    attacker.login()
    text = b"\x1b]0;owned\x07\r\n2026 forged line " + bytes(range(128, 256)) * 100
    attacker.send(1, struct.pack(">L", 2) + string(text) + string(b""))
    assert attacker.socket.recv(1) == b""
    (line,) = (line for line in gateway.lines() if "owned" in line)
    assert line.isascii()
    assert "\x1b" not in line
    assert "forged line" in line
    assert len(line) < 1000


def test_hugeLengths(gateway: Gateway) -> None:
    """A length of gigabytes is not waited for."""
    for length in (1 << 20, 1 << 30, 0xFFFFFFFF):
        attacker = Attacker(gateway)
        attacker.write(VERSION + b"\r\n" + length.to_bytes(4, "big") + bytes(100))
        assert attacker.reason() == (2, b"bad packet length")


def test_forgedPackets(gateway: Gateway) -> None:
    """Packets under other keys, also behind good ones."""
    attacker = Attacker(gateway)
    attacker.login()
    head = (65536 - 16).to_bytes(4, "big")
    forged = head + AESGCM(bytes(16)).encrypt(bytes(12), bytes(65536 - 16), head)
    attacker.flood(forged * 100)
    assert attacker.reason() == (5, b"packet failed its integrity check")


def test_crowd(gateway: Gateway) -> None:
    """Four hundred that say nothing: at most a hundred are kept, and others still get in."""
    crowd = []
    refused = 0
    for _ in range(400):
        one = Attacker(gateway, "127.0.0.3")
        refused += one.greeting == b"Exceeded MaxStartups"
        crowd.append(one)
    assert refused >= 300
    for one in crowd:
        one.socket.close()
    # Until their ends have been seen, one in three may still be refused.
    deadline = time.monotonic() + 20
    while Attacker(gateway, "127.0.0.4").greeting == b"Exceeded MaxStartups":
        assert time.monotonic() < deadline


def test_connectAndReset(gateway: Gateway) -> None:
    """Three hundred that break off with a reset in the middle of the key exchange."""
    for _ in range(300):
        attacker = Attacker(gateway, "127.0.0.5")
        try:
            attacker.write(VERSION + b"\r\n")
            attacker.sendKexInit()
        except OSError:
            pass
        attacker.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        attacker.socket.close()


def test_guessesSentAhead(gateway: Gateway) -> None:
    """Three thousand passwords in one segment: six are judged."""
    attacker = Attacker(gateway)
    attacker.start()
    attacker.send(5, string(b"ssh-userauth"))
    attacker.until(6)
    head = string(b"joe") + string(b"ssh-connection") + string(b"password") + b"\0"
    attacker.write(b"".join(attacker.pack(50, head + string(os.urandom(8))) for _ in range(3000)))
    assert attacker.reason() == (2, b"too many login attempts at once")
    assert len([line for line in gateway.lines() if "refused" in line]) <= 6


def test_byteByByte(gateway: Gateway) -> None:
    """A big packet in the smallest pieces costs no more than its size."""
    attacker = Attacker(gateway)
    attacker.login()
    packet = attacker.pack(192, string(bytes(200_000)))
    attacker.write(packet[:-2000])
    for at in range(2000, 0, -1):
        attacker.write(packet[-at : len(packet) - at + 1])
    assert attacker.until(193)[-1] == (193, string(bytes(200_000)))
