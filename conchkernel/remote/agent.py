"""The agent: a small process on the kernel's host that runs shells and commands for a gateway.

It is started by the relay inside the kernel, detaches, and listens on a Unix socket that only its
own account can reach. One event loop, standard library only; system calls on files, which may take
any time, are made on threads of their own (:mod:`conchkernel.remote.files`). It never looks for
work: it ends at the gateway's word, or when no gateway has been heard for the orphan timeout.
"""

from __future__ import annotations

import hmac
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from conchkernel import frames, wire, wirestream
from conchkernel.remote import home, listening, pump, stdinport
from conchkernel.remote.carriers import Carrier, RelayCarrier, same_account
from conchkernel.remote.door import Door
from conchkernel.remote.files import FileService
from conchkernel.remote.pool import Pool
from conchkernel.remote.process import Process
from conchkernel.remote.service import SHORTAGE, UNKNOWN_KIND, CannotServe
from conchkernel.remote.spawn import CannotRun

MAX_SESSIONS = 64
#: A gateway at a kernel's stdin channel has two: its own, and the relay's that stands for it.
MAX_CARRIERS = 256
#: One read of output: with its headers it fills one message.
BATCH = frames.MAX_MESSAGE - frames.MESSAGE.size - frames.FRAME.size
#: What an OPEN may ask for.
_KINDS: dict[Any, Callable[..., Any]] = {
    "process": Process,
    "files": FileService,
    "connect": listening.connect,
    "listen": listening.Listener,
    "accepted": listening.accepted,
}


class Agent:
    """The event loop and what lives in it.

    :param listener: a listening Unix socket, already bound where the relay looks for it.
    :param secret: what an ATTACH must know.
    :param options: ``environment`` (dict), ``directory``, ``path_prefix``, ``orphan_timeout``
        (seconds), ``version``.
    :param peer_uid: the account whose connections are taken.
    """

    def __init__(self, listener: socket.socket, secret: str, options: dict[str, Any]) -> None:
        self.options = options
        self.batch = BATCH
        self.drain = pump.drain  # or its compiled twin, which stands there by now
        self._processes: dict[int, Process] = {}
        self.sessions: dict[str, Session] = {}
        self.carriers: set[Carrier] = set()
        self.ports: dict[int, stdinport.StdinPort] = {}
        self._secret = secret.encode()
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._readers: dict[int, Callable[[int], None]] = {}
        self._writers: dict[int, Callable[[int], None]] = {}
        self._dirty: set[Session] = set()
        self._look: set[Any] = set()
        self._posted: deque[Callable[[], None]] = deque()
        self.accept = Door().accept
        self.pool = Pool(self.post)
        self._wake_fd = -1
        self._orphan_timeout = float(options["orphan_timeout"])
        self._last_used = time.monotonic()
        self._ending = False

    # --- the loop ----------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until there is nobody left to serve."""
        wake_r, wake_w = os.pipe()
        os.set_blocking(wake_r, False)
        os.set_blocking(wake_w, False)
        self._wake_fd = wake_w
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self.end())
        self.watch_read(wake_r, self._woken)
        self._listener.setblocking(False)
        self.watch_read(self._listener.fileno(), self._accept)
        check_at = 0.0
        while not self._ending:
            now = time.monotonic()
            if now >= check_at:
                self._drop_orphans(now)
                check_at = now + min(self._orphan_timeout / 4, 15)
            for key, mask in self._selector.select(check_at - now):
                fd = key.fd
                # A callback may have closed what a later event of this round is for.
                if mask & selectors.EVENT_READ:
                    self._call(self._readers.get(fd), fd)
                if mask & selectors.EVENT_WRITE:
                    self._call(self._writers.get(fd), fd)
        for session in list(self.sessions.values()):
            session.end()
        for carrier in list(self.carriers):
            carrier.close()

    def _call(self, callback: Callable[[int], None] | None, fd: int) -> None:
        """One event, and what follows from it. A defect costs its descriptor, not the agent."""
        if callback is None:
            return
        try:
            callback(fd)
            self._settle()
        except Exception:
            failed = getattr(getattr(callback, "__self__", None), "failed", None)
            if failed is None:
                return  # the loop's own: without its door and its alarm nobody is served any more
            self.unwatch_read(fd)
            self.unwatch_write(fd)
            self._give_up(failed)

    def _settle(self) -> None:
        """Send what the last event produced, then read on where there is room again."""
        while self._dirty or self._look:
            while self._dirty:
                self._dirty.pop().flush()
            while self._look:
                self._look.pop().look()

    def watch_read(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(fd)`` whenever it can be read."""
        self._readers[fd] = callback
        self._register(fd)

    def watch_write(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(fd)`` whenever it can be written."""
        self._writers[fd] = callback
        self._register(fd)

    def unwatch_read(self, fd: int) -> None:
        """No more reading; unknown descriptors are fine."""
        if self._readers.pop(fd, None) is not None:
            self._register(fd)

    def unwatch_write(self, fd: int) -> None:
        """No more writing; unknown descriptors are fine."""
        if self._writers.pop(fd, None) is not None:
            self._register(fd)

    def _register(self, fd: int) -> None:
        events = (selectors.EVENT_READ if fd in self._readers else 0) | (
            selectors.EVENT_WRITE if fd in self._writers else 0
        )
        known = fd in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(fd)
        elif known:
            self._selector.modify(fd, events)
        else:
            self._selector.register(fd, events)

    def started(self, process: Process) -> None:
        """Tell the process when its program has ended."""
        self._processes[process.pid] = process

    def look_again(self, service: Any) -> None:
        """The service may have room to read on, once what is queued has gone."""
        self._look.add(service)
        self._dirty.add(service.session)

    def _give_up(self, failed: Callable[[], None] | None) -> None:
        """End what met a defect; that it cannot be ended well ends nothing else."""
        try:
            if failed is not None:
                failed()
        except Exception:
            pass

    def post(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called by the loop; for other threads."""
        self._posted.append(callback)
        try:
            os.write(self._wake_fd, b"\0")
        except BlockingIOError:
            pass  # it is full of reasons to wake

    def _woken(self, fd: int) -> None:
        try:
            os.read(fd, 4096)
        except BlockingIOError:
            pass
        while self._posted:
            callback: Any = self._posted.popleft()
            try:
                callback()
            except Exception:
                self._give_up(getattr(getattr(callback, "__self__", None), "failed", None))
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self._processes.pop(pid, None)
            if process is not None:
                process.reaped(status)

    # --- sessions ----------------------------------------------------------------------------

    def _accept(self, fd: int) -> None:
        accepted = self.accept(self._listener)
        if accepted is None:
            return
        connection = accepted[0]
        try:
            if same_account(connection) and len(self.carriers) < MAX_CARRIERS:
                RelayCarrier(self, connection)
                return
        except OSError:
            pass  # its peer has gone already (macOS)
        connection.close()

    def asked(self, carrier: RelayCarrier, kind: int, request: dict[str, Any]) -> None:
        """A relay asks for something that is no session's."""
        answer = stdinport.hand_over if kind == frames.HANDOVER else stdinport.claim
        answer(self, carrier, request)

    def attach(self, carrier: Carrier, request: dict[str, Any]) -> None:
        """Answer an ATTACH."""
        secret = str(request.get("secret")).encode()
        versions = request.get("versions")
        name = request.get("session")
        received = request.get("received")
        if not hmac.compare_digest(secret, self._secret):
            carrier.refuse("the agent does not know this gateway's secret")
        elif not isinstance(versions, list) or frames.VERSION not in versions:
            carrier.refuse(f"the agent speaks version {frames.VERSION} of the wire only")
        elif not isinstance(name, str) or len(name) != 32 or not isinstance(received, int):
            carrier.refuse("malformed ATTACH")
        else:
            former = request.get("former")
            if isinstance(former, str) and former != name and former in self.sessions:
                self.sessions[former].end()
            session = self.sessions.get(name)
            new = session is None
            if session is None:
                if len(self.sessions) >= MAX_SESSIONS:
                    carrier.refuse("the agent serves too many gateways")
                    return
                session = self.sessions[name] = Session(self, name)
                received = 0  # of this session; what the gateway has is a former agent's
            session.attach(carrier, received, new)

    def settle(self, session: Session) -> None:
        """Have the session send what it has."""
        self._dirty.add(session)

    def heard(self) -> None:
        """A gateway is there."""
        self._last_used = time.monotonic()

    def _drop_orphans(self, now: float) -> None:
        for session in list(self.sessions.values()):
            if now - session.heard > self._orphan_timeout:
                session.end()
        if not self.sessions and now - self._last_used > self._orphan_timeout:
            self._ending = True

    def end(self) -> None:
        """Leave the loop; sessions and their terminals are hung up behind it."""
        self._ending = True


class Session:
    """What one gateway has here: its streams, and the carrier it is reached by, if any."""

    def __init__(self, agent: Agent, name: str) -> None:
        self.name = name
        self.endpoint = wire.Endpoint(opened=self._opened, told=self._told)
        self.heard = time.monotonic()
        self._agent = agent
        self._carrier: Carrier | None = None
        self._streams: dict[int, Any] = {}
        self._farewell = False
        self._padded = False

    def attach(self, carrier: Carrier, received: int, new: bool) -> None:
        """Go on over this carrier; the former one is closed."""
        try:
            replay = self.endpoint.resume(received)
        except frames.WireViolation as error:
            carrier.refuse(str(error))
            self.end()  # nothing can go on from there; asked for again, it begins anew
            return
        if self._carrier is not None:
            former, self._carrier = self._carrier, None
            former.session = None
            former.close()
        self._carrier = carrier
        carrier.session = self
        self.heard = time.monotonic()
        answer = {
            "version": frames.VERSION,
            "received": self.endpoint.received_bytes,
            "new": new,
            "agent": self._agent.options.get("version", ""),
        }
        carrier.send([frames.message_of(frames.ATTACHED, answer)])
        for message in replay:
            carrier.send(message)
        self.endpoint.ping(time.monotonic())
        self.flush()

    def received(self, message: memoryview) -> None:
        """One message of the carrier."""
        self.heard = now = time.monotonic()
        self._agent.heard()
        try:
            self.endpoint.receive(message, now)
        except frames.WireGap:
            self.detach()
        except frames.WireViolation:
            self.end()
        else:
            self._agent.settle(self)

    def flush(self) -> None:
        """Give the carrier messages for as long as it takes them at once."""
        carrier = self._carrier
        while carrier is not None and carrier.clear:
            message = self.endpoint.next_message()
            if message is None:
                break
            carrier.send(message)
        if carrier is not None and carrier.padding and not self._padded:
            self._pad(carrier)
        if self._farewell and carrier is not None and carrier.clear:
            self.end()
            if not self._agent.sessions:
                self._agent.end()

    def _pad(self, carrier: Carrier) -> None:
        """Send the session's one PADDING, when it is due. A carrier that is lost by it, since a
        proxy takes no message of that length, would be lost again and again by more of them."""
        if self.endpoint.padding_due:
            self._padded = True
            carrier.pad()

    def detach(self) -> None:
        """The carrier is lost; streams live on and wait."""
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            carrier.session = None
            carrier.close()

    def end(self) -> None:
        """The session is over: terminals hang up, pipes close."""
        self._agent.sessions.pop(self.name, None)
        self.detach()
        for service in list(self._streams.values()):
            service.hang_up()
        self._streams.clear()

    def _opened(self, stream: wirestream.Stream, parameters: dict[str, Any]) -> None:
        for stream_id in [n for n in self._streams if n not in self.endpoint.streams]:
            del self._streams[stream_id]
        kind = parameters.get("kind")
        make = _KINDS.get(kind) if isinstance(kind, str) else None
        if make is None:
            wirestream.refuse(stream, UNKNOWN_KIND, "the agent does not know this kind of stream")
            return
        try:
            service = make(self._agent, self, stream, parameters)
        except CannotServe as error:
            wirestream.refuse(stream, error.code, str(error))
        except CannotRun as error:
            wirestream.refuse(stream, SHORTAGE, str(error))
        except OSError as error:
            wirestream.refuse(stream, SHORTAGE, f"nothing can be started for it: {error.strerror}")
        except Exception as error:
            # A defect of ours; without an answer somebody would wait for ever.
            problem = f"nothing can be started for it ({type(error).__name__})"
            wirestream.refuse(stream, SHORTAGE, problem)
        else:
            stream.receiver = service
            self._streams[stream.id] = service

    def service(self, stream_id: Any) -> Any:
        """What serves a stream; ``None`` if none does."""
        return self._streams.get(stream_id) if isinstance(stream_id, int) else None

    def _told(self, frame_type: int, payload: bytes) -> None:
        if frame_type != frames.GOODBYE:
            raise frames.WireViolation("only a gateway says farewell")
        answer = b'{"sessions": %d}' % (len(self._agent.sessions) - 1)
        self.endpoint.control(frames.FAREWELL, 0, answer)
        self._farewell = True


def detach() -> bool:
    """Leave the kernel's process tree: fork, new session, fork again.

    :returns: whether this is the detached process (the others should exit).
    """
    if os.fork():
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    return True


def close_inherited() -> None:
    """Let go of what the kernel has open and did not say that programs shall not have."""
    try:
        numbers = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        numbers = list(range(256))  # no such directory: as far as most programs go
    for number in numbers:
        if number > 2:
            try:
                os.close(number)
            except OSError:
                pass  # that by which the directory was read


def main(given: dict[str, Any]) -> None:
    """Start as told by the relay: listen, detach, serve, clean up."""
    close_inherited()
    path = given["path"]
    try:
        listener = home.listen(path)
        inode = os.lstat(path).st_ino
    except OSError as error:
        sys.stderr.write(str(error))
        sys.exit(1)
    if not detach():
        # The socket lives on in the child. Nothing of the parent's clean-up may touch it.
        os._exit(0)
    agent = Agent(listener, given.pop("secret"), given["options"])
    # On a thread: a full directory of temporary files takes its time.
    threading.Thread(target=home.sweep, args=(path,), daemon=True).start()
    try:
        agent.run()
    finally:
        home.leave(path, inode)
