"""The kernel's side of :mod:`conchkernel.remote.stdinport`: the stdin channel's port is lent out.

ipykernel gets another socket for the channel, at another port of the same host, and the agent leads
everybody's connection through to that, so that ``input()`` works as ever. When the agent is gone,
it gets one at the old port again. Nobody ever stops listening there: it is one listening socket of
the system's that libzmq, the agent and libzmq again accept from, so that nobody else can get the
port, and a child that a cell has forked, which has it too, is in nobody's way. Whoever was
connected connects again by itself, as ZeroMQ does; a socket that only left its port (``unbind``)
would keep its connections open, and deaf. Meanwhile a question waits for whoever is to answer it,
and so does an answer.

Standard library only, any Python from 3.8; runs in the kernel, beside the relay.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import socket
import struct
import sys
import threading
import time
from typing import Any

HANDOVER, CLAIM, TAKEN = 6, 7, 8
#: The kernel's main thread may compute; then its socket stays where it is.
_MAIN_SECONDS = 2.0
#: ZeroMQ connects again after 100 ms; who has not by then will not.
_CLAIM_SECONDS = 1.0
_AGAIN_SECONDS = 1.0
#: How long a question waits for the connection of who is to answer it.
_ASK_SECONDS = 2.0
_TRY_SECONDS = 0.01
_LENGTH = struct.Struct(">I")


class Handover:
    """The stdin channel of one kernel. Made, like :meth:`end`, in the kernel's main thread.

    :param main: the main thread's loop: the socket is used by that thread alone.
    """

    def __init__(self, kernel: Any, main: Any) -> None:
        self._kernel = kernel
        self._zmq: Any = importlib.import_module("zmq")  # the kernel's own
        self._main = main
        self._lock = threading.Lock()
        self._moving = threading.Lock()
        self._socket = _patient(self._zmq, kernel)
        self._linger = -1
        self._outer = ""
        #: Where the channel is instead; 0 while it is where it belongs.
        self._inner = 0
        #: The system's socket at ``_outer``, while the channel is elsewhere.
        self._listener: socket.socket | None = None
        #: To the agent; it listens for as long as this stands.
        self._door: socket.socket | None = None
        self._left = threading.Event()
        self._ended = False

    def connection(self, connect: Any, identity: bytes) -> socket.socket | None:
        """Have the agent take a client's messages from the server itself. Not on any loop.

        :param connect: gives a new connection to the agent.
        :param identity: of the client, which is the same on all channels.
        :returns: what stands for the client's connection; ``None`` if it cannot be done.
        """
        with self._lock:
            if self._door is None and (self._ended or not self._lend(connect)):
                return None
        claim: socket.socket | None = connect()
        if claim is not None:
            request = {"port": _port(self._outer)[1], "identity": identity.hex()}
            if _ask(claim, CLAIM, request, _CLAIM_SECONDS):
                claim.settimeout(None)
                return claim
            claim.close()
        return None

    def _lend(self, connect: Any) -> bool:
        door = connect()
        if door is None:
            return False
        moved = threading.Event()
        self._main.add_callback(self._move, moved)
        listener = self._listener if moved.wait(_MAIN_SECONDS) else None
        if listener is not None:
            request = {
                "pid": os.getpid(),
                "port": _port(self._outer)[1],
                "inner": self._inner,
                "key": self._kernel.session.key.hex(),
                "digest": self._kernel.session.signature_scheme.partition("-")[2],
            }
            done = _ask(door, HANDOVER, request, _MAIN_SECONDS, listener)
            if done and self._lent(door, listener):
                threading.Thread(target=self._watch, args=(door,), daemon=True).start()
                if self._ended:
                    self.leave()  # by a newer relay meanwhile, which lends the port itself
                return True
        door.close()
        # Behind a _move that the main thread comes to only now.
        self._main.add_callback(threading.Thread(target=self._come_back, daemon=True).start)
        return False

    def _lent(self, door: socket.socket, listener: socket.socket) -> bool:
        """Whether it is the agent's turn now, or the kernel has gone back to the port meanwhile."""
        door.settimeout(None)
        with self._moving:
            if self._listener is not listener:
                return False
            self._left.clear()
            self._door = door
            return True

    def _watch(self, door: socket.socket) -> None:
        try:
            while door.recv(64):
                pass
        except OSError:
            pass
        self._door = None
        door.close()
        self._left.set()
        self._come_back()

    def _come_back(self) -> None:
        while not self._restore():
            time.sleep(_AGAIN_SECONDS)  # there is no descriptor to be had

    def leave(self) -> bool:
        """Ask the agent for the port, if it has it; on any thread. It comes back by itself."""
        door = self._door
        try:
            if door is not None:
                door.shutdown(socket.SHUT_WR)  # the agent leaves the port, and then hangs up
        except OSError:
            pass  # it has just done so
        return door is not None

    def _restore(self) -> bool:
        """Listen where the kernel's server looks for it; whether it does, or the agent. On any
        thread: the main one may be in an ``input()``, which looks for its answer at the kernel's
        socket of the moment every 10 ms.
        """
        with self._moving:
            listener = self._listener
            if listener is not None and self._door is None:
                try:
                    # The former one closes with its last user.
                    self._replace(self._outer, listener)
                except (self._zmq.ZMQError, OSError):
                    self._kernel.log.debug("conchkernel: the stdin channel", exc_info=True)
                    return False
                self._inner, self._listener = 0, None
                listener.close()
        return True

    def _replace(self, endpoint: str, listener: socket.socket | None = None) -> str:
        """Give the kernel another socket, bound to ``endpoint``; gives what that has become.

        :param listener: what listens there already.
        """
        former = self._kernel.stdin_socket
        fresh = self._socket(former.context, self._zmq.ROUTER)
        copy = -1
        try:
            fresh.linger = self._linger
            fresh.setsockopt(self._zmq.ROUTER_HANDOVER, 1)  # as ipykernel has it
            fresh.setsockopt(self._zmq.ROUTER_MANDATORY, 1)
            if listener is not None:
                copy = os.dup(listener.fileno())
                fresh.setsockopt(self._zmq.USE_FD, copy)  # which closes it with the socket
            fresh.bind(endpoint)
        except BaseException:
            fresh.close(0)
            if copy >= 0:
                os.close(copy)
            raise
        owners: list[Any] = [self._kernel, getattr(self._kernel, "parent", None)]
        for owner in owners:
            if getattr(owner, "stdin_socket", None) is former:
                owner.stdin_socket = fresh
        return str(fresh.getsockopt(self._zmq.LAST_ENDPOINT).rstrip(b"\0").decode())

    # --- in the main thread ------------------------------------------------------------------

    def _move(self, moved: threading.Event) -> None:
        """Leave the port, where the channel is one that the agent can stand in for."""
        channel: Any = getattr(self._kernel, "stdin_socket", None)
        try:
            endpoint = channel.getsockopt(self._zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
            with self._moving:
                if (
                    not self._inner
                    and not self._ended
                    and endpoint.startswith("tcp://")
                    and channel.getsockopt(self._zmq.MECHANISM) == self._zmq.NULL
                ):
                    self._linger = channel.linger
                    listener, connections = _sockets_at(*_port(endpoint))
                    inner = self._replace("tcp://127.0.0.1:*")
                    self._outer, self._inner = endpoint, _port(inner)[1]
                    self._listener = listener
                    channel.close()
                    for connection in connections:
                        _part(connection)
        except Exception:
            self._kernel.log.debug("conchkernel: the stdin channel stays", exc_info=True)
        moved.set()

    def end(self) -> bool:
        """Take the port back from the agent, and wait for it. It is not lent again.

        :returns: whether the channel is where it belongs. If not, an agent that does not run just
            now has the port; it comes back by itself when that hangs up.
        """
        self._ended = True
        if self.leave():
            self._left.wait(_MAIN_SECONDS)
        self._restore()
        return not self._inner


def _patient(zmq: Any, kernel: Any) -> Any:
    """A class of sockets for the channel, which lose no question and are told answers alone.

    A ROUTER drops what it has no connection for; but to ask first and to be connected then is
    usual: a cell runs as soon as the shell channel is there, and when the channel has just moved,
    its clients are on their way.
    """

    class StdinSocket(zmq.Socket):
        def send_multipart(self, *args: Any, **kwargs: Any) -> Any:
            until = time.monotonic() + _ASK_SECONDS
            while True:
                # It may be another by now: where the client looks for it.
                channel = kernel.stdin_socket if type(kernel.stdin_socket) is StdinSocket else self
                try:
                    return super(StdinSocket, channel).send_multipart(*args, **kwargs)
                except zmq.ZMQError as error:
                    if error.errno != zmq.EHOSTUNREACH:
                        raise
                if time.monotonic() > until:
                    return None  # as a ROUTER does
                time.sleep(_TRY_SECONDS)

        def recv_multipart(self, *args: Any, **kwargs: Any) -> Any:
            # A gateway's last messages to an agent that has just gone arrive here; input() would
            # take one for its answer.
            while True:
                parts = super().recv_multipart(*args, **kwargs)
                if not _carries(parts):
                    return parts

        def __del__(self) -> None:
            self.close()

    return StdinSocket


def _carries(parts: list[Any]) -> bool:
    """Whether a message is for an agent."""
    try:
        # identity, delimiter, signature, header
        return bool(json.loads(bytes(parts[3]))["msg_type"] == "conchkernel")
    except (ValueError, LookupError, TypeError):
        return False


def _port(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.partition("://")[2].rpartition(":")
    return host.strip("[]"), int(port)


def _sockets_at(host: str, port: int) -> tuple[socket.socket, list[socket.socket]]:
    """The system's sockets of this process with this address: that which listens, and those that
    were accepted from it. libzmq does not give them.

    :raises OSError: if none listens.
    """
    system = importlib.import_module("ctypes").CDLL(None)
    listener = None
    connections = []
    for name in os.listdir("/dev/fd"):
        if not _has_port(system, int(name), port):
            continue
        try:
            one = socket.socket(fileno=os.dup(int(name)))
            here = one.getsockname()
        except OSError:
            continue  # closed meanwhile
        streams = one.type == socket.SOCK_STREAM and here[1] == port
        listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if streams and listens and here[0] == host and listener is None:
            listener = one
        elif streams and not listens and host in (here[0], "0.0.0.0", "::"):
            connections.append(one)
        else:
            one.close()
    if listener is None:
        for one in connections:
            one.close()
        raise OSError("nothing listens at the channel's port")
    # libzmq and the agent may be told of the same connection; who comes second must not wait.
    listener.setblocking(False)
    return listener, connections


def _has_port(system: Any, descriptor: int, port: int) -> bool:
    """Whether this is a socket with this port, asked from outside: one that is made a socket of
    Python's ceases to block for everybody where the user has set a timeout for new sockets.
    """
    ctypes = importlib.import_module("ctypes")
    told, size = ctypes.create_string_buffer(128), ctypes.c_uint(128)
    if system.getsockname(descriptor, told, ctypes.byref(size)) != 0:
        return False
    address = told.raw
    # Of IPv4 and IPv6 alike; the family has two bytes, but on macOS the first is the length.
    second = sys.platform == "darwin" or sys.byteorder == "big"
    family = address[1] if second else address[0]
    return family in (socket.AF_INET, socket.AF_INET6) and address[2:4] == port.to_bytes(2, "big")


def _part(connection: socket.socket) -> None:
    """End a connection though a child that was forked may have it too."""
    try:
        connection.shutdown(socket.SHUT_WR)  # what was said last still arrives
    except OSError:
        pass  # it has ended
    connection.close()


def _ask(
    connection: socket.socket,
    kind: int,
    request: dict[str, Any],
    seconds: float,
    given: socket.socket | None = None,
) -> bool:
    """Whether the agent has done what is asked.

    :param given: what it gets a copy of.
    """
    message = bytes([kind]) + json.dumps(request).encode()
    answer = b""
    try:
        connection.settimeout(seconds)
        parts = _LENGTH.pack(len(message)) + message
        if given is not None:
            rights = array.array("i", [given.fileno()])
            # The first byte brings it.
            connection.sendmsg([parts[:1]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            parts = parts[1:]
        connection.sendall(parts)
        while len(answer) < 6:
            data = connection.recv(6 - len(answer))
            if not data:
                return False
            answer += data
    except OSError:
        return False
    return answer[4] == TAKEN and answer[5] == 1
