"""What brings a session's messages to the agent: a relay's socket, or the Jupyter server's own.

Both move whole messages and hold back at most one that the socket does not take; they differ in
what stands around a message. Runs in the agent.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from conchkernel import frames
from conchkernel.remote import zmtp

if TYPE_CHECKING:
    from conchkernel.remote.agent import Agent

_LENGTH = struct.Struct(">I")
_INT = struct.Struct("i")
_ONE_SOCKET = socket.CMSG_LEN(_INT.size)
_CLOSED_BY_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # macOS has it not
_RECEIVE = 1024 * 1024
#: Of one message: the system takes 1024 at once (IOV_MAX), and a copy of many small ones is cheap.
_MAX_PARTS = 64
#: A carrier that takes nothing holds back at most one message; the rest waits in the session.
_SEND_BUFFER = 512 * 1024


class Carrier:
    """A connection that carries messages.

    :ivar session: the :class:`~conchkernel.remote.agent.Session` that it serves, once attached.
    :cvar padding: bytes of the PADDING that it is worth, once it is used for bulk.
    """

    padding = 0

    def __init__(self, agent: Agent, connection: socket.socket) -> None:
        self.session: Any = None
        self._agent = agent
        self._socket = connection
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._buffer = bytearray(_RECEIVE)
        self._filled = 0
        self._unsent: deque[memoryview] = deque()
        self.closed = False
        agent.carriers.add(self)
        agent.watch_read(connection.fileno(), self._readable)

    # --- for a session -----------------------------------------------------------------------

    @property
    def clear(self) -> bool:
        """Nothing waits for the socket."""
        return not self._unsent

    def send(self, parts: list[Any]) -> None:
        """Send one message, given in parts."""
        if self.closed:
            return
        parts = [self._head(sum(map(len, parts))), *parts]
        if len(parts) > _MAX_PARTS:
            parts = [b"".join(parts)]
        if not self._unsent:
            try:
                sent = self._socket.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.broken()
                return
            for part in parts:
                if sent >= len(part):
                    sent -= len(part)
                else:
                    self._unsent.append(memoryview(part)[sent:])
                    sent = 0
            if self._unsent:
                self._agent.watch_write(self._socket.fileno(), self._writable)
        else:
            self._unsent.extend(memoryview(part) for part in parts)

    def pad(self) -> None:
        """Send the PADDING that the carrier is worth."""
        self.send([bytes([frames.PADDING]), bytes(self.padding)])

    def refuse(self, sentence: str) -> None:
        """Answer an ATTACH with a sentence and hang up."""
        self.send([frames.message_of(frames.ATTACHED, {"error": sentence})])
        self.close()

    def failed(self) -> None:
        """A defect of ours: the session goes on over another carrier, from what was received."""
        self.lost()

    def broken(self) -> None:
        """The socket is gone."""
        self.lost()

    def lost(self) -> None:
        """It carries no more; its session waits for another."""
        session, self.session = self.session, None
        if session is not None:
            session.detach()
        self.close()

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self.closed:
            return
        self.closed = True
        fd = self._socket.fileno()
        self._agent.unwatch_read(fd)
        self._agent.unwatch_write(fd)
        self._agent.carriers.discard(self)
        self._socket.close()

    # --- the socket --------------------------------------------------------------------------

    def _writable(self, fd: int) -> None:
        unsent = self._unsent
        try:
            while unsent:
                sent = self._socket.send(unsent[0])
                if sent < len(unsent[0]):
                    unsent[0] = unsent[0][sent:]
                    return
                unsent.popleft()
        except BlockingIOError:
            return
        except OSError:
            self.broken()
            return
        self._agent.unwatch_write(fd)
        if self.session is not None:
            self._agent.settle(self.session)

    def _readable(self, fd: int) -> None:
        try:
            count = self._receive(memoryview(self._buffer)[self._filled :])
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self.broken()
            return
        self._filled += count
        position = self._take(memoryview(self._buffer)[: self._filled])
        if position and not self.closed:
            rest = self._filled - position
            self._buffer[:rest] = self._buffer[position : self._filled]
            self._filled = rest

    def _message(self, message: memoryview) -> None:
        if self.session is not None:
            self.session.received(message)
        elif message[0] == frames.ATTACH:
            try:
                request = frames.body_of(message)
            except frames.WireViolation:
                self.lost()
            else:
                self._agent.attach(self, request)
        else:
            self.lost()

    def _receive(self, view: memoryview) -> int:
        return self._socket.recv_into(view)

    # --- what stands around a message --------------------------------------------------------

    def _head(self, size: int) -> bytes:
        """What goes before a message of ``size`` bytes."""
        raise NotImplementedError

    def _take(self, view: memoryview) -> int:
        """Take the whole messages that lie in ``view``; gives how many bytes they are.

        ``view`` is never full without holding one: the buffer is larger than any message.
        """
        raise NotImplementedError


class RelayCarrier(Carrier):
    """A relay's connection to the agent's socket: messages with a length before them.

    It may also stand for something, without carrying messages: for a kernel that has handed over
    its port, or for a gateway's connection at that port. What it stands for ends with it.

    :ivar stands_for: its ``lost()`` is called when this ends.
    :ivar given: a socket that the relay has sent along, until somebody takes it.
    """

    def __init__(self, agent: Agent, connection: socket.socket) -> None:
        self.stands_for: Any = None
        self.given: socket.socket | None = None
        super().__init__(agent, connection)

    def answer(self, done: bool) -> None:
        """Tell the relay whether what it asked for was done."""
        self.send([bytes([frames.TAKEN, done])])

    def lost(self) -> None:
        """The relay has hung up, or the kernel is gone."""
        stands_for, self.stands_for = self.stands_for, None
        if stands_for is not None:
            stands_for.lost()
        super().lost()

    def close(self) -> None:
        """Close the socket. Idempotent."""
        super().close()
        if self.given is not None:
            self.given.close()
            self.given = None

    def _receive(self, view: memoryview) -> int:
        if self.session is not None or self.given is not None:
            return super()._receive(view)  # and the system closes what else is sent along
        count, ancillary, _, _ = self._socket.recvmsg_into([view], _ONE_SOCKET, _CLOSED_BY_EXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) == _INT.size:
                (descriptor,) = _INT.unpack(data)
                os.set_inheritable(descriptor, False)
                self.given = socket.socket(fileno=descriptor)
        return count

    def _message(self, message: memoryview) -> None:
        asks = message[0] in (frames.HANDOVER, frames.CLAIM)
        if asks and self.session is self.stands_for is None:
            try:
                self._agent.asked(self, message[0], frames.body_of(message))
            except (frames.WireViolation, ValueError):
                self.lost()
        else:
            super()._message(message)

    def _head(self, size: int) -> bytes:
        return _LENGTH.pack(size)

    def _take(self, view: memoryview) -> int:
        position = 0
        while len(view) - position >= 4 and not self.closed:
            (length,) = _LENGTH.unpack_from(view, position)
            if not 0 < length <= frames.MAX_MESSAGE:
                self.lost()
                break
            end = position + 4 + length
            if end > len(view):
                break
            self._message(view[position + 4 : end])
            position = end
        return position


class ServerCarrier(Carrier):
    """The Jupyter server's own connection, at the port of the kernel's stdin channel.

    :param signer: signs and checks as the kernel's session does.
    :param claimant: the relay's connection that stands for this one: when either ends, so does
        the other, and the relay tells the gateway.
    """

    padding = frames.PADDING_BYTES

    def __init__(
        self,
        agent: Agent,
        connection: socket.socket,
        signer: zmtp.Signer,
        claimant: RelayCarrier,
    ) -> None:
        self._signer = signer
        self._claimant = claimant
        self._broken = False
        super().__init__(agent, connection)
        claimant.stands_for = self

    def refuse(self, sentence: str) -> None:
        """Answer an ATTACH with a sentence. The gateway hangs up."""
        self.send([frames.message_of(frames.ATTACHED, {"error": sentence})])

    def broken(self) -> None:
        """The socket is gone: what is said here reaches nobody."""
        self._broken = True
        super().broken()

    def close(self) -> None:
        """Close the socket, and let the gateway know. Idempotent.

        It is told here, behind what was sent before: what the relay says goes another way, and
        might come first. The relay tells it what cannot be told here.
        """
        if self.closed:
            return
        told = self.clear and not self._broken
        if told:
            self.send([bytes([frames.LOST])])
            if self.closed:
                return  # there was nobody to send it to
            told = self.clear
        super().close()
        self._claimant.stands_for = None
        if told:
            self._claimant.answer(False)
        self._claimant.close()

    def _head(self, size: int) -> bytes:
        return self._signer.head(size)

    def _take(self, view: memoryview) -> int:
        position = 0
        while not self.closed:
            try:
                found = zmtp.find_message(view, position, frames.MAX_MESSAGE)
            except zmtp.Malformed:
                self.lost()
                break
            if found is None:
                break
            pieces, position = found
            message = self._signer.checked(pieces)
            if message is not None:
                self._message(message)
        return position


def same_account(connection: socket.socket) -> bool:
    """Whether the other end is this account's, as far as the system tells (the directory is private
    in any case)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return bool(struct.unpack("iII", data)[1] == os.getuid())
