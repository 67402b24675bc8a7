"""Listening on the kernel's host: for TCP, at a Unix socket's path, or at a private one.

Runs in the agent. Who connects is told to the gateway as a line of JSON and waits until the
gateway opens a stream for it; so streams have one owner of their numbers. While many wait, the
others stay in the system's own queue.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import tempfile
from typing import TYPE_CHECKING, Any

from conchkernel import frames, wirestream
from conchkernel.remote import addresses
from conchkernel.remote.connection import Connection
from conchkernel.remote.service import CONNECT_FAILED, CannotServe, Service

if TYPE_CHECKING:
    from conchkernel.remote.addresses import Address
    from conchkernel.remote.agent import Agent, Session

#: Connections of one listener that wait for the gateway.
MAX_WAITING = 64
#: The system's queue behind them; sshd's is as long.
BACKLOG = 128
#: Addresses one OPEN may name; localhost is two.
MAX_HOSTS = 8


class Listener(Service):
    """The receiver of a stream of kind ``listen``."""

    def __init__(
        self, agent: Agent, session: Session, stream: wirestream.Stream, parameters: dict[str, Any]
    ) -> None:
        self.session = session
        self._agent = agent
        self._stream = stream
        self._sockets: list[socket.socket] = []
        self._made: list[tuple[str, int]] = []  # what to remove: the path, and whose inode it was
        self._directory = ""
        self._waiting: dict[int, socket.socket] = {}
        self._number = 0
        self._watched = False
        self._over = False
        self._found: list[Address] = []
        self._problem: OSError | None = None
        if "hosts" in parameters:
            self._listen_to_hosts(parameters)
        elif "private" in parameters:
            self._listen_privately(str(parameters["private"]))
        else:
            self._listen_at(addresses.socket_path(parameters))

    # --- TCP ---------------------------------------------------------------------------------

    def _listen_to_hosts(self, parameters: dict[str, Any]) -> None:
        hosts = parameters["hosts"]
        if not isinstance(hosts, list) or not 0 < len(hosts) <= MAX_HOSTS:
            raise CannotServe("the request has no hosts")
        wanted = [addresses.host_and_port({**parameters, "host": host}, 0) for host in hosts]
        self._found = [
            one for host, port in wanted for one in addresses.numeric(host, port, passive=True)
        ]
        if self._found:
            self._bind()
            return

        def look_up() -> None:
            for host, port in wanted:
                try:
                    self._found += addresses.named(host, port, passive=True)
                except OSError as error:
                    self._problem = error

        self._agent.pool.run(look_up, self._bind)

    def _bind(self) -> None:
        """Bind all addresses that can be bound, to one port; one is enough, as under sshd."""
        if self._over:
            return
        port = 0
        for family, kind, protocol, address in self._found:
            try:
                made = socket.socket(family, kind, protocol)
            except OSError as error:
                self._problem = error  # there is no IPv6, or there are no descriptors
                continue
            try:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                made.bind((address[0], address[1] or port, *address[2:]))
                made.listen(BACKLOG)
            except OSError as error:
                made.close()
                self._problem = error
                continue
            self._sockets.append(made)
            port = port or made.getsockname()[1]
        if self._sockets:
            self._begin({"port": port})
        else:
            problem = self._problem or OSError(0, "there is no such address")
            self._over = True
            wirestream.refuse(self._stream, CONNECT_FAILED, addresses.why(problem))
        self._agent.settle(self.session)

    # --- Unix sockets ------------------------------------------------------------------------

    def _listen_privately(self, name: str) -> None:
        if not name.isalnum() or len(name) > 16:
            raise CannotServe("that is no name for a socket")
        self._directory = tempfile.mkdtemp(prefix="ssh-")
        try:
            self._listen_at(os.path.join(self._directory, f"{name}.{os.getpid()}"))
        except BaseException:
            os.rmdir(self._directory)
            raise

    def _listen_at(self, path: str) -> None:
        """One at a path where nothing is that anybody could miss; only this account can connect."""
        made = socket.socket(socket.AF_UNIX)
        try:
            try:
                made.bind(path)
            except OSError:
                if not _is_dead(path):
                    raise
                os.unlink(path)
                made.bind(path)
            # Nobody can connect before listen(), so there is no moment with a wider mode.
            os.chmod(path, 0o600)
            made.listen(BACKLOG)
            self._made.append((path, os.lstat(path).st_ino))
        except OSError as error:
            made.close()
            raise CannotServe(addresses.why(error), CONNECT_FAILED) from None
        self._sockets.append(made)
        self._begin({"path": os.fsencode(path).decode("latin-1")})

    # --- who connects ------------------------------------------------------------------------

    def _begin(self, info: dict[str, Any]) -> None:
        for made in self._sockets:
            made.setblocking(False)
        self._stream.control(frames.OPENED, json.dumps(info).encode())
        self._watch()

    def _watch(self) -> None:
        wanted = not self._over and len(self._waiting) < MAX_WAITING
        if wanted != self._watched:
            self._watched = wanted
            for made in self._sockets:
                if wanted:
                    self._agent.watch_read(made.fileno(), self._acceptable)
                else:
                    self._agent.unwatch_read(made.fileno())

    def _acceptable(self, fd: int) -> None:
        listening = next(made for made in self._sockets if made.fileno() == fd)
        accepted = self._agent.accept(listening)
        if accepted is None:
            return
        connection, address = accepted
        self._number += 1
        self._waiting[self._number] = connection
        who: dict[str, Any] = {"number": self._number}
        if isinstance(address, tuple):
            who["host"], who["port"] = address[0], address[1]
        self._stream.write(json.dumps(who).encode() + b"\n")
        self._watch()
        self._agent.settle(self.session)

    def take(self, number: Any) -> socket.socket | None:
        """The connection of this number; ``None`` if it does not wait."""
        taken = self._waiting.pop(number, None) if isinstance(number, int) else None
        self._watch()
        return taken

    # --- the end -----------------------------------------------------------------------------

    def wire_data(self, data: memoryview, extended: int) -> None:
        """A listener is told nothing."""
        raise frames.WireViolation("DATA for a listener")

    def wire_closed(self, reason: str) -> None:
        """The gateway listens no more."""
        self.hang_up()

    def failed(self) -> None:
        """A defect of ours."""
        self._stream.close("the agent could not go on listening")
        self.hang_up()
        self._agent.settle(self.session)

    def hang_up(self) -> None:
        """Listen no more; a socket's path goes if it is still ours."""
        if self._over:
            return
        self._over = True
        self._watched = False
        for made in self._sockets:
            self._agent.unwatch_read(made.fileno())
            made.close()
        for waiting in self._waiting.values():
            waiting.close()
        self._waiting.clear()
        for path, inode in self._made:
            try:
                found = os.lstat(path)
                if stat.S_ISSOCK(found.st_mode) and found.st_ino == inode:
                    os.unlink(path)
            except OSError:
                pass
        if self._directory:
            try:
                os.rmdir(self._directory)
            except OSError:
                pass


def _is_dead(path: str) -> bool:
    """Whether it is a socket of this account that has lost its listener, as when an agent was
    killed: the next one is to listen there again."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED


def connect(
    agent: Agent, session: Session, stream: wirestream.Stream, parameters: dict[str, Any]
) -> Connection:
    """The receiver of a stream of kind ``connect``."""
    if "path" in parameters:
        path = addresses.socket_path(parameters)
        return Connection.to_path(agent, session, stream, path)
    host, port = addresses.host_and_port(parameters, 1)
    return Connection.to_host(agent, session, stream, host, port)


def accepted(
    agent: Agent, session: Session, stream: wirestream.Stream, parameters: dict[str, Any]
) -> Connection:
    """The receiver of a stream of kind ``accepted``."""
    listener = session.service(parameters.get("listener"))
    number = parameters.get("number")
    taken = listener.take(number) if isinstance(listener, Listener) else None
    if taken is None:
        raise CannotServe("that connection does not wait any more", CONNECT_FAILED)
    return Connection(agent, session, stream, taken)
