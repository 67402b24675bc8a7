"""The port of a kernel's stdin channel, at which the agent listens in the kernel's place.

So a gateway's messages go from the Jupyter server straight to the agent, and the kernel's process
has no part in them. Every connection is led through to the kernel's own socket, which has moved to
another port, until a relay claims it for its gateway; nobody else's is ever touched. Runs in the
agent.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from conchkernel.remote import zmtp
from conchkernel.remote.carriers import RelayCarrier, ServerCarrier

if TYPE_CHECKING:
    from conchkernel.remote.agent import Agent

#: Connections of Jupyter servers: each WebSocket to the kernel has one. Beyond that somebody crowds
#: the port; then the longest silent goes, and a server's ZeroMQ comes again by itself.
MAX_PEERS = 64
#: What a connection that is led through may hold, each way; an answer to input() is a line.
_PIECE = 64 * 1024


def hand_over(agent: Agent, carrier: RelayCarrier, request: dict[str, Any]) -> None:
    """Listen at a kernel's port for as long as its relay's connection ``carrier`` stands."""
    former = agent.ports.get(request.get("port", 0))
    if former is not None:
        former.lost()  # one port is one kernel's: this is another that began in its place
    try:
        if carrier.given is None:
            raise ValueError("no socket")
        carrier.stands_for = StdinPort(agent, carrier, carrier.given, request)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        carrier.answer(False)
    else:
        carrier.given = None
        carrier.answer(True)


def claim(agent: Agent, carrier: RelayCarrier, request: dict[str, Any]) -> None:
    """Have a gateway's connection at a port carry messages; ``carrier`` stands for it."""
    port = agent.ports.get(request.get("port", 0))
    identity = request.get("identity")
    if port is None or not isinstance(identity, str):
        carrier.answer(False)
    else:
        port.claim(bytes.fromhex(identity), carrier)


class StdinPort:
    """Listens while the kernel that handed it over is there.

    :param door: the relay's connection, hung up when the port has been left.
    :param listener: what listens at the port; the kernel keeps it too, and accepts nobody.
    :param handed: ``pid`` of the kernel, ``port`` of the channel, ``inner`` (the port on 127.0.0.1
        where its socket is now), ``key`` (hex) and ``digest`` of its session.
    :raises ValueError: if it does not listen there, or cannot sign as the kernel does.
    """

    def __init__(
        self, agent: Agent, door: RelayCarrier, listener: socket.socket, handed: dict[str, Any]
    ) -> None:
        self._agent = agent
        self._door = door
        self._inner = ("127.0.0.1", int(handed["inner"]))
        self.signer = zmtp.Signer(bytes.fromhex(handed["key"]), str(handed["digest"]))
        #: The longest silent first.
        self._peers: dict[_Peer, None] = {}
        self._claims: dict[bytes, RelayCarrier] = {}
        self._number = int(handed["port"])
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not listens or listener.getsockname()[1] != self._number:
            raise ValueError("it listens elsewhere")
        listener.setblocking(False)
        self._listener = listener
        agent.watch_read(listener.fileno(), self._accept)
        # The next kernel gets the same port: this must be let go of as soon as the process ends,
        # though a child that it forked may keep the relay's connection open.
        try:
            self._kernel = os.pidfd_open(int(handed["pid"]))
            agent.watch_read(self._kernel, lambda _: self.lost())
        except (AttributeError, OSError):
            self._kernel = -1  # Python 3.8, or not Linux
        agent.ports[self._number] = self

    def claim(self, identity: bytes, claimant: RelayCarrier) -> None:
        """Make a carrier of the connection with this identity, now or when it comes."""
        former = self._claims.pop(identity, None)
        if former is not None:
            former.lost()
        for peer in self._peers:
            if peer.identity == identity:
                del self._peers[peer]
                self.carry(peer.release(), claimant)
                return
        self._claims[identity] = claimant
        claimant.stands_for = _Claim(self, identity)

    def carry(self, connection: socket.socket, claimant: RelayCarrier) -> None:
        """Make a carrier of a connection."""
        ServerCarrier(self._agent, connection, self.signer, claimant)
        claimant.answer(True)

    def forget(self, identity: bytes) -> None:
        """Nobody claims it any more."""
        self._claims.pop(identity, None)

    def identified(self, peer: _Peer, identity: bytes) -> bool:
        """Whether the connection was claimed already, and is a carrier now."""
        claimant = self._claims.pop(identity, None)
        if claimant is None:
            return False
        del self._peers[peer]
        self.carry(peer.release(), claimant)
        return True

    def _accept(self, fd: int) -> None:
        accepted = self._agent.accept(self._listener)
        if accepted is None:
            return
        if len(self._peers) >= MAX_PEERS:
            next(iter(self._peers)).close()
        try:
            peer = _Peer(self._agent, self, accepted[0], self._inner)
        except OSError:
            accepted[0].close()  # its peer has gone already (macOS)
        else:
            self._peers[peer] = None
            peer.greet()

    def spoke(self, peer: _Peer) -> None:
        """A connection that nobody had claimed is in use."""
        self._peers[peer] = self._peers.pop(peer)

    def gone(self, peer: _Peer) -> None:
        """A connection that nobody had claimed has closed."""
        del self._peers[peer]

    def lost(self) -> None:
        """The kernel is gone, or wants its port back: let go of it at once. Idempotent."""
        if self._listener.fileno() < 0:
            return
        self._agent.unwatch_read(self._listener.fileno())
        self._listener.close()
        if self._kernel >= 0:
            self._agent.unwatch_read(self._kernel)
            os.close(self._kernel)
        if self._agent.ports.get(self._number) is self:
            del self._agent.ports[self._number]
        for peer in list(self._peers):
            peer.close()
        for claimant in list(self._claims.values()):
            claimant.lost()
        self._door.lost()


class _Claim:
    """A claim for a connection that has not come."""

    def __init__(self, port: StdinPort, identity: bytes) -> None:
        self._port = port
        self._identity = identity

    def lost(self) -> None:
        """The relay does not wait any more."""
        self._port.forget(self._identity)


class _Peer:
    """A connection of a Jupyter server that is led through to the kernel.

    The agent says hello in the kernel's place, to learn who it is; then the kernel is told the same
    hello, and its own is passed over.

    :ivar identity: its routing id, as long as nothing but hellos has passed.
    """

    def __init__(
        self, agent: Agent, port: StdinPort, connection: socket.socket, inner: tuple[str, int]
    ) -> None:
        self.identity: bytes | None = None
        self._agent = agent
        self._port = port
        self._inner_address = inner
        self._outer = connection
        self._inner: socket.socket | None = None
        self._hello = bytearray()
        self._behind = b""
        #: What waits for a socket, by its descriptor.
        self._waiting: dict[int, bytes] = {}
        self._passing = False
        self._closed = False
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def greet(self) -> None:
        """Say hello, and listen."""
        self._agent.watch_read(self._outer.fileno(), self._greeted)
        self._put(self._outer, zmtp.HELLO)

    def release(self) -> socket.socket:
        """Give the connection away: nothing but hellos has passed."""
        self._unwatch(self._outer)
        if self._inner is not None:
            self._unwatch(self._inner)
            self._inner.close()
        self._closed = True
        return self._outer

    def _hear(self, source: socket.socket) -> tuple[bytes, int] | None:
        """What one end has said before its first message, once all of it has come."""
        data = self._get(source)
        if data is None:
            return None
        self._hello += data
        try:
            return zmtp.hello(bytes(self._hello))  # which bounds how long it can be
        except zmtp.Malformed:
            self.close()
            return None

    def _greeted(self, fd: int) -> None:
        """The server's hello, or a part of it."""
        said = self._hear(self._outer)
        if said is None:
            return
        identity, end = said
        if end == len(self._hello) and self._port.identified(self, identity):
            return
        self.identity = identity if end == len(self._hello) else None
        inner = self._inner = socket.socket()
        inner.setblocking(False)
        inner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        inner.connect_ex(self._inner_address)  # how it ends is seen when it is written to
        # What is behind the hello waits for the answer to it: libzmq does not take both at once.
        self._waiting[inner.fileno()] = bytes(self._hello[:end])
        self._behind = bytes(self._hello[end:])
        self._hello.clear()
        self._agent.unwatch_read(fd)
        self._agent.watch_read(inner.fileno(), self._answered)
        self._agent.watch_write(inner.fileno(), self._writable)

    def _answered(self, fd: int) -> None:
        """The kernel's hello, which its peer has had from us."""
        assert self._inner is not None
        said = self._hear(self._inner)
        if said is None:
            return
        rest = bytes(self._hello[said[1] :])
        self._hello.clear()
        self._passing = True
        self._agent.watch_read(fd, self._readable)
        self._agent.watch_read(self._outer.fileno(), self._readable)
        for source, target, data in (
            (self._inner, self._outer, rest),
            (self._outer, self._inner, self._behind),
        ):
            if data and not self._closed:
                self._pass(source, target, data)

    def _readable(self, fd: int) -> None:
        assert self._inner is not None
        source, target = self._inner, self._outer
        if fd == self._outer.fileno():
            source, target = target, source
        data = self._get(source)
        if data is not None:
            self._port.spoke(self)
            self._pass(source, target, data)

    def _pass(self, source: socket.socket, target: socket.socket, data: bytes) -> None:
        self.identity = None
        if not self._put(target, data) and not self._closed:
            self._agent.unwatch_read(source.fileno())

    def _get(self, source: socket.socket) -> bytes | None:
        try:
            data = source.recv(_PIECE)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self.close()
            return None
        return data

    def _put(self, target: socket.socket, data: bytes) -> bool:
        """Send what the socket takes; whether that was all."""
        try:
            sent = target.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return False
        if sent < len(data):
            self._waiting[target.fileno()] = data[sent:]
            self._agent.watch_write(target.fileno(), self._writable)
            return False
        return True

    def _writable(self, fd: int) -> None:
        target = self._outer if fd == self._outer.fileno() else self._inner
        assert target is not None
        data = self._waiting.pop(fd)
        self._agent.unwatch_write(fd)
        source = self._inner if target is self._outer else self._outer
        if self._put(target, data) and self._passing and source is not None:
            self._agent.watch_read(source.fileno(), self._readable)

    def _unwatch(self, connection: socket.socket) -> None:
        self._agent.unwatch_read(connection.fileno())
        self._agent.unwatch_write(connection.fileno())

    def failed(self) -> None:
        """A defect of ours."""
        self.close()

    def close(self) -> None:
        """Close both ends. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._port.gone(self)
        for connection in (self._outer, self._inner):
            if connection is not None:
                self._unwatch(connection)
                connection.close()
