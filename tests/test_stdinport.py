"""A kernel's port in the agent's hands: who is led through, who is claimed, and how it ends.

The kernel is a ROUTER of libzmq's, the Jupyter server a DEALER, the agent the real one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import pytest_twisted
import zmq
from jupyter_client.session import Session
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from conchkernel import frames, wire
from conchkernel.loopback import LoopbackBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 20
IDENTITY = b"a gateway's session"
YES, NO = bytes([frames.TAKEN, 1]), bytes([frames.TAKEN, 0])


@pytest.fixture(scope="module")
def backend():
    """An agent, and a gateway that it serves in its usual way."""
    made = LoopbackBackend(reactor)
    pytest_twisted.blockon(Deferred.fromCoroutine(made.start()))
    yield made
    pytest_twisted.blockon(Deferred.fromCoroutine(made.stop()))


class Kernel:
    """A kernel that has handed its port over."""

    def __init__(self, backend: LoopbackBackend, context: zmq.Context) -> None:
        self.session = Session(key=b"the kernel's key")
        self.path = backend._path
        self.secret = backend._secret
        self._context = context
        self.inner = context.socket(zmq.ROUTER)
        self.inner.linger = 0
        self.inner.router_handover = 1  # as ipykernel has it
        self.inner.rcvtimeo = SECONDS * 1000
        inner = self.inner.bind_to_random_port("tcp://127.0.0.1")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.request = {
            "pid": os.getpid(),
            "port": self.port,
            "inner": inner,
            "key": self.session.key.hex(),
            "digest": "sha256",
        }
        self.door = Relay(self.path)

    def handed(self) -> Kernel:
        """Hand the port over."""
        self.door.give(self.listener)
        assert self.door.ask(frames.HANDOVER, self.request)
        return self

    def ended(self) -> Kernel:
        """It keeps no socket at the port."""
        self.listener.close()
        return self

    def server(self, identity: bytes = b"somebody") -> zmq.Socket:
        """A Jupyter server's connection."""
        return self.connected(self.dealer(identity))

    def dealer(self, identity: bytes) -> zmq.Socket:
        """What such a connection will be."""
        made = self._context.socket(zmq.DEALER)
        made.linger = 0
        made.rcvtimeo = SECONDS * 1000
        made.identity = identity
        return made

    def connected(self, dealer: zmq.Socket) -> zmq.Socket:
        """The same, connecting to the port."""
        dealer.connect(f"tcp://127.0.0.1:{self.port}")
        return dealer

    def claim(self, identity: bytes = IDENTITY) -> Relay:
        """Ask for a connection, and do not wait for the answer."""
        relay = Relay(self.path)
        relay.say(frames.CLAIM, {"port": self.port, "identity": identity.hex()})
        return relay

    def attach(self, server: zmq.Socket, **changed: object) -> dict:
        """A gateway's ATTACH through the server, and the agent's answer."""
        request = {
            "versions": [frames.VERSION],
            "session": os.urandom(16).hex(),
            "received": 0,
            "secret": self.secret,
            **changed,
        }
        self.send(server, frames.message_of(frames.ATTACH, request))
        return frames.body_of(self.receive(server))

    def send(self, server: zmq.Socket, message: bytes) -> None:
        """One carrier, signed."""
        self.session.send(server, "conchkernel", content={}, buffers=[message])

    def receive(self, server: zmq.Socket) -> bytes:
        """The next carrier; its signature is checked."""
        parts = self.session.feed_identities(server.recv_multipart())[1]
        told = self.session.deserialize(parts)
        assert told["msg_type"] == "conchkernel"
        return bytes(told["buffers"][0])


class Relay:
    """A relay's connection to the agent."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SECONDS)
        self.socket.connect(path)
        self._given: list[socket.socket] = []

    def give(self, given: socket.socket) -> None:
        """Send a socket along with what is said next."""
        self._given.append(given)

    def say(self, kind: int, request: dict) -> None:
        """Ask for something."""
        message = bytes([kind]) + json.dumps(request).encode()
        data = struct.pack(">I", len(message)) + message
        given, self._given = self._given, []
        if given:
            socket.send_fds(self.socket, [data[:1]], [one.fileno() for one in given])
            data = data[1:]
        self.socket.sendall(data)

    def answer(self) -> bytes:
        """What is said next; nothing if the agent has hung up."""
        head = self.socket.recv(4, socket.MSG_WAITALL)
        if not head:
            return b""
        return self.socket.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)

    def ask(self, kind: int, request: dict) -> bool:
        """Ask, and whether it was done."""
        self.say(kind, request)
        return self.answer() == YES


@pytest.fixture
def kernel(backend) -> Iterator[Kernel]:
    """A kernel whose port the agent has."""
    with context() as made:
        lent = Kernel(backend, made).handed()
        yield lent
        lent.ended()


@contextmanager
def context() -> Iterator[zmq.Context]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


def hello(identity: bytes) -> bytes:
    """What a DEALER says."""
    body = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity"
    body += struct.pack(">I", len(identity)) + identity
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32)
    return greeting + b"\x04" + bytes([len(body)]) + body


def lead_through(kernel: Kernel, server: zmq.Socket, size: int = 10) -> None:
    """The server and the kernel reach each other, in both directions, by the server's name."""
    data = os.urandom(size)
    server.send_multipart([b"from the server", data])
    name, *parts = kernel.inner.recv_multipart()
    assert parts == [b"from the server", data]
    kernel.inner.send_multipart([name, b"from the kernel", data])
    assert server.recv_multipart() == [b"from the kernel", data]


def test_everybody_is_led_through(kernel: Kernel) -> None:
    """Small and large, several at once; the kernel sees their names, and may speak first."""
    servers = {name: kernel.server(name) for name in (b"one", b"two", b"three")}
    for size in (0, 100, 3_000_000):
        for server in servers.values():
            lead_through(kernel, server, size)
    kernel.inner.send_multipart([b"two", b"a question"])
    assert servers[b"two"].recv_multipart() == [b"a question"]


def test_a_server_that_does_not_read_holds_up_nobody(kernel: Kernel) -> None:
    """What is led through waits in the sockets, not in the agent; others go on."""
    with socket.socket() as deaf:
        deaf.connect(("127.0.0.1", kernel.port))
        deaf.sendall(hello(b"deaf"))
        assert deaf.recv(64, socket.MSG_WAITALL)[0] == 0xFF
        other = kernel.server()
        lead_through(kernel, other)
        for _ in range(20):
            kernel.inner.send_multipart([b"deaf", bytes(1_000_000)])
        lead_through(kernel, other)


@pytest.mark.parametrize("first", ["the connection", "the claim"])
def test_a_claimed_connection_carries_messages(kernel: Kernel, first: str) -> None:
    """Whichever comes first; the kernel hears nothing of it, and others go on as before."""
    other = kernel.server()
    lead_through(kernel, other)
    if first == "the claim":
        relay = kernel.claim()
        server = kernel.server(IDENTITY)
    else:
        server = kernel.dealer(IDENTITY)
        events = server.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        kernel.connected(server)
        # When the claim comes it is known, and led through: the kernel has said hello.
        assert events.poll(SECONDS * 1000)
        relay = kernel.claim()
    assert relay.answer() == YES
    assert kernel.attach(server)["new"]
    lead_through(kernel, other)


def test_a_session_that_moves_bulk_has_one_padding(kernel: Kernel) -> None:
    """A message of nothing, longer than all others; no byte is lost by it. There is not another on
    the next carrier: this one may have been lost by it."""
    gateway = wire.Endpoint()
    session = os.urandom(16).hex()
    size = 4_000_000
    command = f"head -c {size} /dev/zero"
    paddings = []
    relays = []
    for identity in (b"the first", b"the second"):
        server = kernel.server(identity)
        relays.append(kernel.claim(identity))
        assert relays[-1].answer() == YES
        attached = kernel.attach(server, session=session, received=gateway.received_bytes)
        for replayed in gateway.resume(attached["received"]):
            kernel.send(server, b"".join(replayed))
        taken: list[int] = []
        ends: list[bool] = []
        receiver = SimpleNamespace(
            wire_data=lambda data, extended, taken=taken: taken.append(len(data)),
            wire_opened=lambda info: None,
            wire_eof=lambda ends=ends: ends.append(True),
            wire_exit=lambda info: None,
            wire_sent=lambda count: None,
            wire_closed=lambda reason: None,
        )
        stream = gateway.open({"kind": "process", "command": command}, receiver)
        stream.grant(size + 1)
        while not ends:
            while (message := gateway.next_message()) is not None:
                kernel.send(server, b"".join(message))
            message = kernel.receive(server)
            if message[0] == frames.PADDING:
                paddings.append(len(message) - 1)
            else:
                gateway.receive(message, 0.0)
        assert sum(taken) == size
    assert paddings in ([], [frames.PADDING_BYTES])  # none where the machine is too slow to be near


def test_a_wrong_secret_gets_a_sentence(kernel: Kernel) -> None:
    """A claim makes a carrier and no more."""
    server = kernel.server(IDENTITY)
    relay = kernel.claim()
    assert relay.answer() == YES
    assert "secret" in kernel.attach(server, secret="0" * 64)["error"]


def test_what_is_not_signed_is_not_heard(kernel: Kernel) -> None:
    """Nor what has another shape; the next good message is."""
    server = kernel.server(IDENTITY)
    relay = kernel.claim()
    assert relay.answer() == YES
    forger = Session(key=b"another key")
    forger.send(server, "conchkernel", content={}, buffers=[bytes([frames.ATTACH]) + b"{}"])
    kernel.session.send(server, "input_reply", content={"value": "x"})
    server.send_multipart([b"x"])
    assert kernel.attach(server)["new"]


def test_a_relay_that_hangs_up_ends_what_it_claimed(kernel: Kernel) -> None:
    """The gateway is told so in order, behind what was said before."""
    server = kernel.server(IDENTITY)
    relay = kernel.claim()
    assert relay.answer() == YES
    assert kernel.attach(server)["new"]
    relay.socket.close()
    while (message := kernel.receive(server)) != bytes([frames.LOST]):
        assert message[0] == frames.BYTES


def test_a_server_that_hangs_up_ends_the_claim(kernel: Kernel) -> None:
    """So the relay knows; the same name may come again, and be claimed again."""
    for _ in range(3):
        server = kernel.server(IDENTITY)
        relay = kernel.claim()
        assert relay.answer() == YES
        assert kernel.attach(server)["new"]
        server.close()
        while relay.answer():
            pass


def test_a_claim_that_is_given_up(kernel: Kernel) -> None:
    """Then the connection, if it comes, is led through like any other."""
    relay = kernel.claim()
    second = kernel.claim()
    assert relay.answer() == b""  # one name is claimed once
    second.socket.close()
    lead_through(kernel, kernel.server())
    lead_through(kernel, kernel.server(IDENTITY))


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(64),
        hello(b"")[:64] + b"\x06" + struct.pack(">Q", 2**62) + b"\x05READY",
        hello(b"")[:64] + b"\x04\x06\x05ERROR",
        b"\xff" * 100_000,
    ],
)
def test_strangers_are_hung_up_on(kernel: Kernel, said: bytes) -> None:
    """Whatever comes to the port, others are served."""
    with socket.socket() as stranger:
        stranger.settimeout(SECONDS)
        stranger.connect(("127.0.0.1", kernel.port))
        try:
            stranger.sendall(said)
            while stranger.recv(1000):
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass
    lead_through(kernel, kernel.server())


def test_lengths_of_a_claimed_connection(kernel: Kernel) -> None:
    """A frame that is too long ends it before a byte of it is waited for."""
    with socket.socket() as server:
        server.settimeout(SECONDS)
        server.connect(("127.0.0.1", kernel.port))
        server.sendall(hello(IDENTITY))
        relay = kernel.claim()
        assert relay.answer() == YES
        server.sendall(b"\x03" + struct.pack(">Q", 2**63))
        # Relay and server are both told.
        assert relay.answer() in (b"", NO)
        while server.recv(1000):
            pass


@pytest.mark.parametrize("said", [b"", hello(b"a stranger")])
def test_a_crowd_shuts_nobody_out(kernel: Kernel, said: bytes) -> None:
    """Connections are bounded, but it is the silent that make room, whoever was there first."""
    early = kernel.server(b"early")
    lead_through(kernel, early)
    crowd = [connection(kernel, said) for _ in range(300)]
    for stranger in crowd[:30]:
        drain(stranger)  # it has had to go
    late = kernel.server(b"late")
    for server in (late, early):
        lead_through(kernel, server)
    served = kernel.server(IDENTITY)
    relay = kernel.claim()
    assert relay.answer() == YES
    assert kernel.attach(served)["new"]
    for stranger in crowd:
        stranger.close()


def test_who_hangs_up_before_the_first_word_leaves_no_trace(kernel: Kernel) -> None:
    """By a reset, before the agent has seen that there was somebody."""
    pid = agent_pid(kernel)
    for _ in range(6):
        os.kill(pid, signal.SIGSTOP)
        for stranger in [connection(kernel) for _ in range(60)]:
            reset(stranger)
        os.kill(pid, signal.SIGCONT)
        lead_through(kernel, kernel.server())


def test_a_server_that_resets_ends_the_claim(kernel: Kernel) -> None:
    """Nobody can be told there; so the relay is left to tell it, and nothing is kept."""
    before = None
    for _ in range(3):
        server = connection(kernel, hello(IDENTITY))
        relay = kernel.claim()
        assert relay.answer() == YES
        reset(server)
        assert relay.answer() == b""
        after = len(os.listdir(f"/proc/{agent_pid(kernel)}/fd"))
        assert before in (None, after)
        before = after


def connection(kernel: Kernel, said: bytes = b"") -> socket.socket:
    """Somebody at the port, by TCP alone."""
    made = socket.create_connection(("127.0.0.1", kernel.port), SECONDS)
    made.sendall(said)
    return made


def drain(one: socket.socket) -> None:
    """Read to the end, whichever it is."""
    try:
        while one.recv(1000):
            pass
    except ConnectionResetError:
        pass


def reset(one: socket.socket) -> None:
    """Hang up by a reset."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def agent_pid(kernel: Kernel) -> int:
    """The other process that has the socket at the kernel's port."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()]
    (inode,) = [row[9] for row in rows if row[1].endswith(f":{kernel.port:04X}") and row[3] == "0A"]
    for found in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if int(found.parts[2]) != os.getpid() and os.readlink(found) == f"socket:[{inode}]":
                return int(found.parts[2])
        except OSError:
            pass  # closed, or somebody else's
    raise AssertionError("nobody listens")


def test_the_port_is_let_go_of(kernel: Kernel) -> None:
    """At once, with whoever is led through; a kernel can have it again."""
    server = kernel.server()
    lead_through(kernel, server)
    waiting = kernel.claim()
    events = server.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    events.rcvtimeo = SECONDS * 1000
    kernel.door.socket.shutdown(socket.SHUT_WR)
    assert kernel.door.answer() == b""
    assert waiting.answer() in (b"", NO)
    events.recv_multipart()  # what it sent before that would be lost
    server.disable_monitor()
    kernel.ended().inner.bind(f"tcp://127.0.0.1:{kernel.port}")
    lead_through(kernel, server)


def test_what_cannot_be_handed_over(backend, kernel: Kernel) -> None:
    """No socket, or one that does not listen, or elsewhere; a kernel that signs in an unknown
    way. Nothing of it is kept."""
    server = kernel.server()
    lead_through(kernel, server)
    descriptors = f"/proc/{agent_pid(kernel)}/fd"
    before = len(os.listdir(descriptors))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        for given, change in (
            ([], {}),
            ([deaf], {"port": deaf.getsockname()[1]}),
            ([listener], {"port": 9}),
            ([listener], {"port": None}),
            ([listener], {"key": "x"}),
            ([listener], {"digest": "no-such-hash"}),
            ([listener], {"inner": {}}),
            ([listener, listener], {"port": 9}),
        ):
            relay = Relay(backend._path)
            for one in given:
                relay.give(one)
            assert not relay.ask(frames.HANDOVER, {**kernel.request, "port": port, **change})
            relay.socket.close()
    for nonsense in ({"port": [1], "identity": "00"}, {"identity": "zz", "port": kernel.port}, {}):
        relay = Relay(backend._path)
        relay.say(frames.CLAIM, nonsense)
        assert relay.answer() in (b"", NO)
        relay.socket.close()
    lead_through(kernel, server)
    assert len(os.listdir(descriptors)) == before


def test_another_kernel_takes_the_place(backend, kernel: Kernel) -> None:
    """One that got the same port, before the end of the former was seen."""
    server = kernel.server()
    lead_through(kernel, server)
    with context() as made:
        other = Kernel(backend, made).ended()
        other.listener = kernel.listener
        other.request["port"] = other.port = kernel.port
        other.handed()
        assert kernel.door.answer() == b""
        lead_through(other, other.server())


def test_the_kernels_end_is_seen(backend, kernel: Kernel) -> None:
    """Though a child that it forked has the relay's connection still."""
    with context() as made, subprocess.Popen(["sleep", "1000"]) as process:
        other = Kernel(backend, made)
        other.request["pid"] = process.pid
        other.handed()
        lead_through(other, other.server())
        waiting = other.claim()
        process.kill()
        # Told when the port is free, though the relay's connection stands.
        assert waiting.answer() in (b"", NO)
        other.ended().inner.bind(f"tcp://127.0.0.1:{other.port}")
