"""The relay: inside the kernel, between the control channel and the agent's socket.

It moves messages it does not read. On the control stream's own loop it takes the messages of type
``conchkernel`` before ipykernel's dispatcher sees them (that way costs 44 ms a message) and hands
every other message, and everything it cannot understand, to that dispatcher as if it were not
there.

Standard library only, any Python from 3.8. It lives in ``sys.modules`` under ``_conchkernel_relay``
and nowhere in the user's namespace; :mod:`conchkernel.remote.starter` and
:mod:`conchkernel.remote.handover` are attributes of it there.
"""

from __future__ import annotations

import hmac
import importlib
import json
import os
import socket
import struct
import sys
import threading
import time
from collections import deque
from typing import Any

BYTES, ATTACH, ATTACHED, START, STARTED, LOST = range(6)
MAX_MESSAGE = 256 * 1024
MAX_CLIENTS = 128
#: What may wait for the agent's socket: the wire allows 4 MiB in flight; beyond it somebody cheats.
MAX_UNSENT = 8 * 1024 * 1024
#: Messages taken from the control socket in one go, before others on the loop have their turn.
BURST = 32
#: A gateway that was told by the agent of an end is told once more: what the agent said last may
#: have gone down with its connection.
_AGAIN_SECONDS = 1.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MARK = b'"conchkernel"'
_DELIMITER = b"<IDS|MSG>"
_LENGTH = struct.Struct(">I")


class Relay:
    """Installed once per kernel.

    :param kernel: the ipykernel ``Kernel``.
    :param sources: what an agent is started with: ``boot`` (code) and ``modules``.
    :param version: of the sources; a relay of another version replaces this one.
    :param starter: the module :mod:`conchkernel.remote.starter`.
    :param handover: of the kernel's stdin channel, where that can be.
    :ivar installed: whether it stands before the dispatcher.
    """

    def __init__(
        self,
        kernel: Any,
        sources: dict[str, Any],
        version: str,
        starter: Any,
        handover: Any = None,
    ) -> None:
        self.version = version
        self.handover = handover
        self.installed = False
        self._zmq: Any = importlib.import_module("zmq")  # the kernel's own
        self._kernel = kernel
        self._sources = sources
        self._starter = starter
        self._stream = kernel.control_stream
        self._loop = self._stream.io_loop
        self._session = kernel.session
        self._clients: dict[bytes, _Client] = {}
        self._original: Any = None
        self._copy = False
        self._sent = 0
        self._nonce = os.urandom(8).hex()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
        self._header = (
            f'","msg_type":"conchkernel","username":"kernel","session":"{self._nonce}",'
            f'"date":"{date}","version":"5.3"}}'
        )

    # --- the control stream ------------------------------------------------------------------

    def install(self) -> None:
        """Step in front of the dispatcher. Called on the control loop's thread."""
        self.installed = True
        self._original = self._stream._recv_callback
        self._copy = self._stream._recv_copy
        self._stream.on_recv(self._received, copy=False)

    def uninstall(self) -> None:
        """Step aside and hang up on the agent. Called on the control loop's thread."""
        if not self.installed:
            return
        self.installed = False
        if self.handover is not None:
            self.handover.leave()
        self._stream.on_recv(self._original, copy=self._copy)
        for client in list(self._clients.values()):
            client.close()

    def _received(self, frames: list[Any]) -> Any:
        """The control stream's callback, in the dispatcher's place."""
        if not self._ours(frames):
            return self._pass_on(frames)
        # The stream would give one message per turn of its loop; take what is there already.
        for _ in range(BURST):
            try:
                more = self._stream.socket.recv_multipart(self._zmq.NOBLOCK, copy=False)
            except self._zmq.ZMQError:
                break
            if not self._ours(more):
                return self._pass_on(more)
        return None

    def _pass_on(self, frames: list[Any]) -> Any:
        if self._copy:
            frames = [frame.bytes for frame in frames]
        return self._original(frames)

    def _ours(self, frames: list[Any]) -> bool:
        """Take the message if it is ours; whatever goes wrong, a foreign one is not."""
        try:
            # identity, delimiter, signature, header, parent, metadata, content, one buffer
            if len(frames) != 8 or frames[1].bytes != _DELIMITER:
                return False
            header = frames[3].bytes
            if _MARK not in header or json.loads(header).get("msg_type") != "conchkernel":
                return False
            if self._session.auth is not None:
                signed = [header, *[frame.bytes for frame in frames[4:7]]]
                if not hmac.compare_digest(self._session.sign(signed), frames[2].bytes):
                    return False
            message = frames[7].buffer
            if not 0 < len(message) <= MAX_MESSAGE:
                return True
            identity = frames[0].bytes
        except Exception:
            return False
        try:
            self._take(identity, message)
        except Exception:
            self._kernel.log.error("conchkernel: relay", exc_info=True)
        return True

    def _take(self, identity: bytes, message: Any) -> None:
        if message[0] == START:
            request = json.loads(bytes(message[1:]))
            threading.Thread(target=self._start, args=(identity, request), daemon=True).start()
            return
        client = self._clients.get(identity)
        if client is not None:
            client.send(message)
        else:
            self.tell(identity, bytes([LOST]))

    def tell(self, identity: bytes, message: Any) -> None:
        """Send a message to a client of the control channel. On the control loop's thread."""
        self._sent += 1
        header = f'{{"msg_id":"{self._nonce}-{self._sent}{self._header}'.encode()
        parts = [header, b"{}", b"{}", b"{}"]
        signature = self._session.sign(parts)
        try:
            self._stream.socket.send_multipart(
                [identity, _DELIMITER, signature, *parts, message], self._zmq.NOBLOCK
            )
        except self._zmq.ZMQError:
            pass  # that client is gone; what it lacks it will ask for again

    def told(self) -> None:
        """After :meth:`tell` outside a receive event: sending may have eaten the edge of one."""
        if self._stream.socket.EVENTS & self._zmq.POLLIN:
            self._loop.add_callback(self._stream.flush, self._zmq.POLLIN, BURST)

    # --- the agent ---------------------------------------------------------------------------

    def _start(self, identity: bytes, request: dict[str, Any]) -> None:
        """Find the agent or start one (in a thread of its own: it takes 50 ms and more)."""
        connection = None
        answer: dict[str, Any] = {"started": False}
        try:
            path = self._starter.path_of(str(request["id"]))
            connection = self._starter.connection(path)
            if connection is None:
                self._starter.start(path, request, self._sources, self.version)
                answer["started"] = True
                connection = self._starter.connection(path)
                if connection is None:
                    answer = {"error": "the agent started but does not answer"}
            if connection is not None and request.get("direct"):
                claim = self._claim(path, identity)
                answer["direct"] = claim is not None
                if claim is not None:
                    connection.close()
                    connection = claim
        except Exception as problem:
            answer = {"error": f"the agent could not be started: {problem}"}
        self._loop.add_callback(self._started, identity, connection, answer)

    def _claim(self, path: str, identity: bytes) -> socket.socket | None:
        """What stands for the client's own connection to the agent; ``None`` if it has none."""
        try:
            if self.handover is not None:
                claim: socket.socket | None = self.handover.connection(
                    lambda: self._starter.connection(path), identity
                )
                return claim
        except Exception:
            self._kernel.log.error("conchkernel: the stdin channel", exc_info=True)
        return None

    def _started(
        self, identity: bytes, connection: socket.socket | None, answer: dict[str, Any]
    ) -> None:
        if connection is None or "error" in answer:
            if connection is not None:
                connection.close()
        elif identity not in self._clients and len(self._clients) >= MAX_CLIENTS:
            connection.close()
            answer = {"error": "the relay serves too many gateways"}
        else:
            former = self._clients.get(identity)
            if former is not None:
                former.close()
            direct = answer.get("direct", False)
            self._clients[identity] = _Client(self, self._loop, identity, connection, direct)
        self.tell(identity, bytes([STARTED]) + json.dumps(answer).encode())
        self.told()

    def gone(self, identity: bytes, client: _Client) -> None:
        """The agent's end of a client's socket has closed."""
        if self._clients.get(identity) is client:
            del self._clients[identity]
            if client.told:
                self._loop.call_later(_AGAIN_SECONDS, self._tell_lost, identity)
            else:
                self._tell_lost(identity)

    def _tell_lost(self, identity: bytes) -> None:
        if identity not in self._clients:
            self.tell(identity, bytes([LOST]))
            self.told()


class _Client:
    """One client of the control channel: its socket to the agent.

    :param direct: it stands for the connection by which the agent hears from the client itself.
    """

    def __init__(
        self, relay: Relay, loop: Any, identity: bytes, connection: socket.socket, direct: bool
    ) -> None:
        self._direct = direct
        self._relay = relay
        self._loop = loop
        self._identity = identity
        self._socket = connection
        self._buffer = bytearray(1024 * 1024)
        self._filled = 0
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._closed = False
        self.told = False
        connection.setblocking(False)
        loop.add_handler(connection, self._event, loop.READ)

    def send(self, message: Any) -> None:
        """One message to the agent."""
        if self._closed:
            return
        parts = [_LENGTH.pack(len(message)), message]
        sent = 0
        if not self._unsent:
            try:
                sent = self._socket.sendmsg(parts)
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
                continue
            if not self._unsent:
                self._loop.update_handler(self._socket, self._loop.READ | self._loop.WRITE)
            # The frame's memory is ZeroMQ's: keep it by a copy, bounded by the wire.
            rest = memoryview(bytes(part[sent:]))
            self._unsent.append(rest)
            self._unsent_bytes += len(rest)
            sent = 0
        if self._unsent_bytes > MAX_UNSENT:
            self.close()

    def _event(self, _: Any, events: int) -> None:
        if events & self._loop.WRITE and not self._closed:
            self._write()
        if events & (self._loop.READ | self._loop.ERROR) and not self._closed:
            self._read()

    def _write(self) -> None:
        unsent = self._unsent
        try:
            while unsent:
                sent = self._socket.send(unsent[0])
                self._unsent_bytes -= sent
                if sent < len(unsent[0]):
                    unsent[0] = unsent[0][sent:]
                    return
                unsent.popleft()
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._loop.update_handler(self._socket, self._loop.READ)

    def _read(self) -> None:
        try:
            count = self._socket.recv_into(memoryview(self._buffer)[self._filled :])
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self.close()
            return
        self._filled += count
        view = memoryview(self._buffer)
        position = 0
        while self._filled - position >= 4:
            (length,) = _LENGTH.unpack_from(view, position)
            if not 0 < length <= MAX_MESSAGE:
                self.close()
                return
            end = position + 4 + length
            if end > self._filled:
                break
            if self._direct:
                self.told = True  # by the agent, that this is the end
            else:
                self._relay.tell(self._identity, view[position + 4 : end])
            position = end
        if position:
            rest = self._filled - position
            self._buffer[:rest] = self._buffer[position : self._filled]
            self._filled = rest
            self._relay.told()

    def close(self) -> None:
        """Hang up. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_handler(self._socket)
        self._socket.close()
        self._unsent.clear()
        self._relay.gone(self._identity, self)


def _keep_large_buffers() -> None:
    """Have glibc keep freed memory: else each message of 256 KiB is a fresh mapping, page by page.

    Measured with agent and gateway alike: the kernel's share of a download fell by a third.
    """
    try:
        mallopt = importlib.import_module("ctypes").CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 4 * 1024 * 1024)
        mallopt(_M_TRIM_THRESHOLD, 4 * 1024 * 1024)
    except (OSError, AttributeError, ImportError):
        pass  # not glibc


def install(sources: dict[str, Any], version: str) -> None:
    """Put a relay of this version in place, on the control loop's thread, and wait for it.

    Called by the injected code, in the kernel's main thread.

    :raises RuntimeError: with a sentence, where this kernel cannot carry one.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    stream = getattr(kernel, "control_stream", None)
    if stream is None or not hasattr(stream, "on_recv"):
        raise RuntimeError("this kernel has no control stream of ipykernel")
    module = sys.modules[__name__]
    former = getattr(module, "relay", None)
    if former is not None and former.installed and former.version == version:
        return
    main = importlib.import_module("tornado.ioloop").IOLoop.current()
    lent = getattr(former, "handover", None)
    # Two must not move the channel: while the former one's is away, all goes by the relay.
    free = lent is None or lent.end()
    handover = module.handover.Handover(kernel, main) if free else None
    relay = Relay(kernel, sources, version, module.starter, handover)
    _keep_large_buffers()
    done = threading.Event()
    problem: list[Exception] = []

    def swap() -> None:
        try:
            if former is not None:
                former.uninstall()
            relay.install()
            module.relay = relay  # type: ignore[attr-defined]
        except Exception as error:
            problem.append(error)
        finally:
            done.set()

    stream.io_loop.add_callback(swap)
    if not done.wait(10):
        raise RuntimeError("the kernel's control channel does not run")
    if problem:
        raise RuntimeError(f"the relay cannot be installed: {problem[0]}")
