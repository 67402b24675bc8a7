"""Attackers over real TCP, and the client beside them who only wants to be served.

``python -m tests.attackers`` is that client: for each line on its stdin that names a port and a
process it logs in and types into a ``cat`` there, until the next line, and prints how long it had
to wait for an echo at most, in the server's own CPU time. So a busy machine is not taken for a
busy server.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time
from dataclasses import replace
from typing import Any

from conchkernel.ssh.fields import Fields, string
from conchkernel.ssh.packets import Inbound, Outbound
from tests.attacked import PASSWORD, USER, say
from tests.rawclient import KEXINIT, VERSION, RawClient

LINUX = sys.platform == "linux"

#: What stock Conch and we have in common.
CONCH_KEXINIT = replace(
    KEXINIT,
    methods=(b"curve25519-sha256",),
    host_key_algorithms=(b"ssh-ed25519",),
    ciphers_in=(b"aes128-ctr",),
    ciphers_out=(b"aes128-ctr",),
    macs_in=(b"hmac-sha2-256",),
    macs_out=(b"hmac-sha2-256",),
)

KEEPALIVE = string(b"keepalive@openssh.com") + b"\1"


class Attacker(RawClient):
    """A raw client over a socket. It waits for what it reads, and for nothing else."""

    def __init__(self, server: Any, host: str = "127.0.0.2") -> None:
        self.offer = server.kexInit
        self.socket = socket.socket()
        if LINUX:
            # Elsewhere only 127.0.0.1 is there without an administrator.
            self.socket.bind((host, 0))
        self.socket.settimeout(30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Less than the gateway may hold back for us.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        self.socket.connect(("127.0.0.1", server.port))
        self.window = 0
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

    def more(self) -> list[tuple[int, bytes]]:
        """The next messages.

        :raises OSError: it ends here.
        """
        data, self.data = self.data or self.socket.recv(65536), b""
        if not data:
            raise ConnectionResetError("closed")
        self.inbound.feed(data)
        return self._parse()

    def until(self, number: int) -> list[tuple[int, bytes]]:
        """All that comes before a message of this number, and it."""
        messages: list[tuple[int, bytes]] = []
        while not any(one == number for one, _ in messages):
            messages += self.more()
        return messages

    def untilClosed(self) -> list[tuple[int, bytes]]:
        """All that comes before the end."""
        messages: list[tuple[int, bytes]] = []
        try:
            while True:
                messages += self.more()
        except TimeoutError:
            raise
        except OSError:
            return messages

    def read(self) -> list[tuple[int, bytes]]:
        return []

    def start(self, offer: Any = None) -> RawClient:
        self.write(VERSION + b"\r\n")
        self.sendKexInit(offer or self.offer)
        self.until(20)
        self.sendPublic()
        self.until(21)
        self.sendNewKeys()
        return self

    def requestAuth(self) -> None:
        self.send(5, string(b"ssh-userauth"))
        self.until(6)

    def login(self) -> RawClient:
        self.start()
        self.requestAuth()
        self.password(PASSWORD, USER)
        self.until(52)
        return self

    def session(self, window: int = 1 << 20, maxPacket: int = 32768) -> int:
        """Open a session; the server's number of it."""
        self.send(90, string(b"session") + struct.pack(">3L", 0, window, maxPacket))
        _, channel, self.window, _ = struct.unpack_from(">4L", self.until(91)[-1][1])
        return int(channel)

    def request(self, channel: int, name: bytes, rest: bytes = b"") -> None:
        """A request of a channel, which is granted."""
        self.send(98, struct.pack(">L", channel) + string(name) + b"\1" + rest)
        self.until(99)

    def run(self, command: bytes, window: int = 1 << 20, maxPacket: int = 32768) -> int:
        """Run a command in a session of its own; the server's number of that."""
        channel = self.session(window, maxPacket)
        self.request(channel, b"exec", string(command))
        return channel

    def alive(self) -> list[tuple[int, bytes]]:
        """What comes until a question that both servers answer is answered."""
        self.send(80, KEEPALIVE)
        return self.until(82)

    def pour(self, channel: int, count: int) -> int:
        """Send input as the window of the last session allows.

        :returns: how much was sent when no more was allowed, or all was.
        """
        sent, window = 0, self.window
        piece = struct.pack(">L", channel) + string(bytes(32768))
        while sent < count:
            if window < 32768:
                got = sum(
                    int.from_bytes(rest[4:8], "big")
                    for number, rest in self.alive()
                    if number == 93
                )
                window += got
                if not got:
                    break
            else:
                self.send(94, piece)
                sent += 32768
                window -= 32768
        return sent

    def packNothing(self) -> bytes:
        """A packet without a message."""
        return b"".join(self.outbound.seal(b"", b""))

    def flood(self, data: bytes) -> int:
        """Send until all is sent, or the server takes no more, or has gone.

        :returns: how many bytes it took.
        """
        sent = 0
        self.socket.settimeout(1)
        try:
            while sent < len(data):
                sent += self.socket.send(memoryview(data)[sent:])
        except OSError:
            pass
        self.socket.settimeout(30)
        return sent

    def reason(self) -> tuple[int, bytes]:
        """Code and text of the DISCONNECT that comes."""
        payload = self.until(1)[-1][1]
        fields = Fields(payload, "DISCONNECT")
        return fields.uint32(), fields.string()


def sealed(attacker: Attacker, number: int, payload: bytes, count: int) -> bytes:
    """Many packets of one message."""
    return b"".join(attacker.pack(number, payload) for _ in range(count))


class _Place:
    """Where a bystander goes."""

    kexInit = KEXINIT

    def __init__(self, port: int) -> None:
        self.port = port


def cpuTime(pid: int) -> float:
    """Seconds that a process has computed; where that cannot be asked, none."""
    # The number of the clock of another process, as clock_getcpuclockid(3) makes it.
    return time.clock_gettime((~pid << 3) | 2) if LINUX else 0.0


def _standBy() -> None:
    while line := sys.stdin.readline():
        port, pid = map(int, line.split())
        client = Attacker(_Place(port), "127.0.0.199")
        client.login()
        channel = client.run(b"cat")
        key = struct.pack(">L", channel) + string(b"k")
        say("typing")
        longest, echoes, enough = 0.0, 0, False
        while not enough:
            # Once more after the attack, whatever comes.
            enough = bool(select.select([sys.stdin], [], [], 0.005)[0])
            before = cpuTime(pid)
            client.send(94, key)
            client.until(94)
            longest = max(longest, cpuTime(pid) - before)
            echoes += 1
        sys.stdin.readline()
        say({"longest": longest, "echoes": echoes})
        client.socket.close()


if __name__ == "__main__":
    _standBy()
