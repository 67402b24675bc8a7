"""A transport over two descriptors, for a process that is spoken to through its stdin and stdout.

Twisted's ``StandardIO`` reads 8 KiB at a time, cannot abort, and knows neither where TCP's buffer
size is set nor how to write at once; :class:`~conchkernel.ssh.transport.GatewayTransport` counts on
all of that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IReadDescriptor
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.python.failure import Failure
from zope.interface import implementer

if TYPE_CHECKING:
    from twisted.internet.interfaces import IProtocol

    Data = bytes | memoryview

#: What a pipe is asked to hold; Linux gives it 64 KiB unasked, and as much as this to anybody.
_PIPE_BYTES = 1024 * 1024


@implementer(IAddress)
@dataclass(frozen=True)
class PipeAddress:
    """Where a pipe leads: there is nothing to tell."""

    def __str__(self) -> str:
        return "the pipe"


@implementer(IReadDescriptor)
class _Incoming:
    """The reading half, as a reactor wants it."""

    def __init__(self, pipes: Pipes, fd: int) -> None:
        self._pipes = pipes
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return "pipes"

    def doRead(self) -> Any:
        try:
            data = os.read(self._fd, self._pipes.bufferSize)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return CONNECTION_LOST
        if not data:
            return CONNECTION_DONE
        self._pipes.protocol.dataReceived(data)
        return None

    def connectionLost(self, reason: Failure) -> None:
        self._pipes.connectionLost(reason)


class Pipes(FileDescriptor):
    """Runs a protocol over two descriptors, which it owns from then on.

    :param reactor: an :class:`~twisted.internet.interfaces.IReactorFDSet`.
    :ivar closed: fires with ``None`` when the connection is over, and both are closed.
    """

    #: How much is read at once, and held before the producer is paused.
    bufferSize = 64 * 1024

    def __init__(self, reactor: Any, protocol: IProtocol, incoming: int, outgoing: int) -> None:
        super().__init__(reactor)
        self._clock = reactor
        self.protocol = protocol
        self.closed: Deferred[None] = Deferred()
        self._outgoing = outgoing
        self._incoming = _Incoming(self, incoming)
        for fd in (incoming, outgoing):
            os.set_blocking(fd, False)
            _widen(fd)
        self.connected = 1
        # In this order, so that the protocol may change its mind.
        self.startReading()
        protocol.makeConnection(self)

    def fileno(self) -> int:
        """The descriptor that is written to; ``-1`` afterwards."""
        return self._outgoing

    def writeSomeData(self, data: Data) -> int | BaseException:
        """Hand over what is taken at once, of data that is not kept.

        :returns: how many bytes that were, or why there will be no more.
        """
        try:
            return os.write(self._outgoing, data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            # The system has no room, which passes; said of sockets only.
            return 0 if error.errno == errno.ENOBUFS else CONNECTION_LOST

    def startReading(self) -> None:
        """Read from the other descriptor."""
        self.reactor.addReader(self._incoming)

    def stopReading(self) -> None:
        """Leave what comes where it is."""
        self.reactor.removeReader(self._incoming)

    def loseWriteConnection(self) -> None:
        """End what we write, after what is written already; nothing where it has ended."""
        if self.connected and not self._writeDisconnected:
            super().loseWriteConnection()

    def _closeWriteConnection(self) -> None:
        self._closeOutgoing()

    def _closeOutgoing(self) -> None:
        fd, self._outgoing = self._outgoing, -1
        if fd < 0:
            return
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            # Both descriptors may be the same socket's: closing one of them tells nobody.
            with socket.socket(fileno=fd) as one:
                try:
                    one.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # its peer has gone before
        else:
            os.close(fd)

    def abortConnection(self) -> None:
        """Close at once, whatever is unsent. Nothing is taken or brought any more."""
        if self.connected:
            self.connected = 0
            self.stopReading()
            self.stopWriting()
            self._clock.callLater(0, self.connectionLost, Failure(CONNECTION_LOST))

    def connectionLost(self, reason: Failure) -> None:
        """It is over."""
        if self.disconnected:
            return
        super().connectionLost(reason)
        self._closeOutgoing()
        os.close(self._incoming.fileno())
        try:
            self.protocol.connectionLost(reason)
        finally:
            self.closed.callback(None)

    def getPeer(self) -> PipeAddress:
        """See :class:`twisted.internet.interfaces.ITransport`."""
        return PipeAddress()

    def getHost(self) -> PipeAddress:
        """See :class:`twisted.internet.interfaces.ITransport`."""
        return PipeAddress()


def _widen(fd: int) -> None:
    """Have a pipe hold more, so that bulk takes fewer turns of both processes."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:
            pass  # it is no pipe, or the account has enough of them
