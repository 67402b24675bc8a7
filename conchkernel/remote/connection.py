"""A connection on the kernel's host: the two directions of a socket as one stream of the wire.

Runs in the agent. Nothing is read that the stream does not take, and nothing is granted that the
socket has not taken. Each direction ends by itself, and the stream when both have, as a channel of
sshd's does (channels.c): what one side sent before its end always arrives. A socket that is given
up between the first byte for it and the gateway's EOF is reset: what came to its peer is not whole,
and does not look so.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from functools import partial
from typing import TYPE_CHECKING, Any

from conchkernel import frames, wirestream
from conchkernel.remote import addresses
from conchkernel.remote.intake import Intake
from conchkernel.remote.service import CONNECT_FAILED, SHORTAGE, Service

if TYPE_CHECKING:
    from conchkernel.remote.addresses import Address
    from conchkernel.remote.agent import Agent, Session

#: One read: with its headers it fills one message.
BATCH = frames.MAX_MESSAGE - frames.MESSAGE.size - frames.FRAME.size
#: Seconds for which a Unix socket's full queue is waited for.
_PATIENCE = 30

#: What closing a socket does (``struct linger``): reset it, or deliver what was written.
_RESET, _FLUSH = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)

_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Connection(Service):
    """The receiver of a stream over one socket.

    :param connected: the socket; without one the stream begins when :meth:`found` was called and
        one of the addresses could be connected to.
    """

    def __init__(
        self,
        agent: Agent,
        session: Session,
        stream: wirestream.Stream,
        connected: socket.socket | None = None,
    ) -> None:
        self.session = session
        self._agent = agent
        self._stream = stream
        self._socket: socket.socket | None = connected
        self._addresses: list[Address] = []
        self._problem: OSError | None = None
        self._late: socket.socket | None = None
        self._intake = Intake(self, agent, stream, self._end_writing, self._not_taken)
        self._open = False
        self._watched = False
        self._read_all = False  # nothing more is read
        self._over = False
        if connected is not None:
            self._begin()

    # --- connecting --------------------------------------------------------------------------

    @classmethod
    def to_host(
        cls, agent: Agent, session: Session, stream: wirestream.Stream, host: str, port: int
    ) -> Connection:
        """One to a TCP port; its addresses are tried one after the other."""
        self = cls(agent, session, stream)
        found = addresses.numeric(host, port)
        if found:
            self._addresses = found
            self._try_next()
        else:

            def look_up() -> None:
                try:
                    self._addresses = addresses.named(host, port)
                except OSError as error:
                    self._problem = error

            agent.pool.run(look_up, self._try_next)
        return self

    @classmethod
    def to_path(
        cls, agent: Agent, session: Session, stream: wirestream.Stream, path: str
    ) -> Connection:
        """One to a Unix socket."""
        self = cls(agent, session, stream)
        self._addresses = [(socket.AF_UNIX, socket.SOCK_STREAM, 0, path)]
        self._try_next()
        return self

    def _try_next(self) -> None:
        """Connect to the first address that is left; with none, the stream is refused."""
        while self._addresses and not self._over:
            family, kind, protocol, address = self._addresses.pop(0)
            try:
                made = self._socket = socket.socket(family, kind, protocol)
            except OSError as error:
                self._failed_with(error)
                continue
            made.setblocking(False)
            try:
                made.connect(address)
            except BlockingIOError as error:
                if error.errno == errno.EINPROGRESS:
                    self._agent.watch_write(made.fileno(), self._connectable)
                else:
                    # The queue of a Unix socket is full, and there is no event for room in it.
                    self._agent.pool.run(partial(self._wait_for, address), self._waited)
            except OSError as error:
                self._failed_with(error)
                continue
            else:
                self._begin()
            return
        if not self._over:
            self._refuse()

    def _connectable(self, fd: int) -> None:
        self._agent.unwatch_write(fd)
        assert self._socket is not None
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._failed_with(OSError(number, os.strerror(number)))
            self._try_next()
        else:
            self._begin()

    def _wait_for(self, path: Any) -> None:
        """On a thread: connect when the listener has taken some of those before us.

        A socket of its own, since the loop may close the first one at any moment.
        """
        made = socket.socket(socket.AF_UNIX)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _PATIENCE, 0))
            made.connect(path)
        except BlockingIOError:
            made.close()
            self._problem = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        except OSError as error:
            made.close()
            self._problem = error
        else:
            self._late = made

    def _waited(self) -> None:
        late, self._late = self._late, None
        if self._over:
            if late is not None:
                late.close()
        elif late is None:
            self._failed_with(self._problem or OSError())
            self._try_next()
        else:
            self._failed_with(OSError())
            self._socket = late
            self._begin()

    def _failed_with(self, error: OSError) -> None:
        self._problem = error
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _refuse(self) -> None:
        error = self._problem or OSError(0, "it has no address")
        self._over = True
        code = SHORTAGE if error.errno in _SHORTAGES else CONNECT_FAILED
        wirestream.refuse(self._stream, code, addresses.why(error))
        self._agent.settle(self.session)

    def _begin(self) -> None:
        assert self._socket is not None
        self._open = True
        self._problem = None
        self._addresses = []
        self._socket.setblocking(False)
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Also where the agent is killed: then the system closes it.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._stream.control(frames.OPENED, b"{}")
        self._intake.open(self._socket.fileno(), self._socket.send)
        self._watch()
        self._agent.settle(self.session)

    # --- from the socket ---------------------------------------------------------------------

    def _watch(self) -> None:
        """Read exactly while the stream takes it: nothing is read that must be kept."""
        if self._socket is None or not self._open:
            return
        stream = self._stream
        wanted = not self._read_all and not stream.queued and stream.room > 0
        if wanted != self._watched:
            self._watched = wanted
            if wanted:
                self._agent.watch_read(self._socket.fileno(), self._readable)
            else:
                self._agent.unwatch_read(self._socket.fileno())

    def _readable(self, fd: int) -> None:
        stream = self._stream
        room = stream.room
        if room <= 0 or stream.queued:
            self._watch()
            return
        assert self._socket is not None
        try:
            data = self._socket.recv(min(room, BATCH))
        except BlockingIOError:
            return
        except OSError as error:
            # It was reset: the other direction is over, too. What was read before still goes.
            self._end(addresses.why(error))
            return
        if data:
            stream.write(data)
            # Looked at when this has been sent: mostly there is room again, and nothing changes.
            self._agent.look_again(self)
        else:
            stream.append(frames.EOF)
            self._end_reading()
            self._agent.settle(self.session)

    def _end_reading(self) -> None:
        self._read_all = True
        self._watch()
        self._end_if_done()

    def wire_sent(self, count: int) -> None:
        """What was read has left the queue: more may be."""
        if not self._over:
            self._agent.look_again(self)

    def wire_credit(self) -> None:
        """The gateway takes more."""
        if not self._over:
            self._agent.look_again(self)

    def look(self) -> None:
        """Go on reading if there is room (called by the agent between events)."""
        if not self._over:
            self._watch()

    def wire_control(self, frame_type: int, payload: bytes) -> None:
        """STOP: nobody wants what the socket would still give."""
        if frame_type == frames.STOP and not self._over and not self._read_all:
            self._shut_down(socket.SHUT_RD)
            self._end_reading()

    # --- to the socket -----------------------------------------------------------------------

    def wire_data(self, data: memoryview, extended: int) -> None:
        """Bytes for the socket."""
        self._intake.data(data)

    def wire_eof(self) -> None:
        """The client sends no more; the socket's other end is told after the last byte."""
        self._intake.end()

    def _end_writing(self) -> None:
        if not self._intake.closed:
            self._intake.close()
            self._shut_down(socket.SHUT_WR)
            self._end_if_done()

    def _not_taken(self) -> None:
        """The other end is gone, which reading tells."""
        self._intake.close()
        self._end_if_done()

    def _shut_down(self, direction: int) -> None:
        if self._socket is not None and self._open:
            try:
                self._socket.shutdown(direction)
            except OSError:
                pass  # it is not connected any more, which reading tells

    # --- the end -----------------------------------------------------------------------------

    def _end_if_done(self) -> None:
        if self._read_all and self._intake.closed and not self._over:
            self._end("")

    def _end(self, reason: str) -> None:
        """Nothing more goes either way; ``reason`` is why, where that is not the usual end."""
        self._stream.append(frames.CLOSE, reason.encode())
        self._release()
        self._agent.settle(self.session)

    def wire_closed(self, reason: str) -> None:
        """The gateway closed the stream."""
        self.hang_up()

    def failed(self) -> None:
        """A defect of ours."""
        self._stream.close("the agent could not go on with this connection")
        self.hang_up()
        self._agent.settle(self.session)

    def hang_up(self) -> None:
        """Give the connection up."""
        if not self._over:
            self._release()

    def _release(self) -> None:
        self._over = True
        whole = self._intake.closed or not self._intake.consumed
        self._intake.close()
        taken, self._socket = self._socket, None
        if taken is not None:
            fd = taken.fileno()
            self._agent.unwatch_read(fd)
            self._agent.unwatch_write(fd)
            if whole and taken.family != socket.AF_UNIX:
                try:
                    taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FLUSH)
                except OSError:
                    pass  # macOS, where the peer has gone already
            taken.close()
