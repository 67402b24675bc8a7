"""Channels that are connections (RFC 4254 section 7): ``direct-tcpip`` and its like.

Each direction ends by itself. A client that closes its channel has perhaps just sent its last
bytes: they are still delivered, and only then do we close (as sshd's channels.c does), so that a
client which opens and closes can bind no more than its channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from conchkernel.errors import LinkLost
from conchkernel.interfaces import Incoming, IStreamReceiver
from conchkernel.ssh.channel import CREDIT_CAP_BYTES, GatewayChannel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from conchkernel.interfaces import Exit, IKernelLink, IListener, IStream

#: What all tunnels of a connection may hold here in each direction, for as long as they are few;
#: with many, each has at least :data:`LEAST_BYTES`. So 1024 of them, on whose other ends nobody
#: reads, hold some 120 MiB, and not 2 GiB. More would not be faster: fifty uploads at once move 6 %
#: more bytes with 16 MiB than with 32, since less of them has left the processor's cache.
SHARED_BYTES = 16 * 1024 * 1024
LEAST_BYTES = 64 * 1024


def shareBeside(channels: int, most: int) -> int:
    """What a tunnel that is opened beside so many channels may hold."""
    return max(LEAST_BYTES, min(most, SHARED_BYTES // (channels + 1)))


@implementer(IStreamReceiver)
class TunnelChannel(GatewayChannel):
    """A channel on one connection of the kernel's host."""

    _log = Logger()

    _stream: IStream | None = None
    _streamOver = False
    _most = CREDIT_CAP_BYTES

    # --- the stream --------------------------------------------------------------------------

    def _join(self, stream: IStream) -> None:
        """Bytes flow from now on."""
        self._stream = stream
        self._most = getattr(stream, "creditCap", CREDIT_CAP_BYTES)
        self.attach(stream.write, stream.writeEOF, stream.grant)

    def credit(self) -> None:
        """Grant a share of what all tunnels may hold: those that are there by now."""
        self._creditCap = shareBeside(self.conn.channelCount - 1, self._most)
        super().credit()

    def streamOpened(self, info: Mapping[str, object]) -> None:
        """The connection stands."""

    streamData = GatewayChannel.write
    streamConsumed = GatewayChannel.consumed
    streamEOF = GatewayChannel.writeEOF

    def streamExtendedData(self, data: bytes | memoryview) -> None:
        """A connection has none."""

    def streamExited(self, exit: Exit) -> None:
        """A connection has no exit."""

    def streamClosed(self, reason: Exception | None) -> None:
        """The connection is gone; what came before is still sent."""
        self._stream = None
        self._streamOver = True
        if self.remoteId >= 0:
            self.loseConnection()

    # --- the client --------------------------------------------------------------------------

    def closeReceived(self) -> None:
        """The client has closed: what it sent still goes where it was going."""
        stream = self._stream
        if stream is None:
            super().closeReceived()
            return
        self.eofReceived()
        self.discardOutput()
        stream.stopReading()

    def closed(self) -> None:
        """The channel is gone."""
        super().closed()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


class DirectChannel(TunnelChannel):
    """One that the client asked for: confirmed when the connection stands."""

    _opened: Deferred[GatewayChannel] | None = None

    def open(
        self, linking: Deferred[IKernelLink], connect: Callable[[IKernelLink], IStream]
    ) -> Deferred[GatewayChannel]:
        """Connect.

        :returns: fires with this channel, or why there is no connection. Cancellable.
        """

        def giveUp(_: object) -> None:
            self._opened = None
            linking.cancel()
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.close()

        def linked(link: IKernelLink) -> None:
            stream = connect(link)
            if self._streamOver:
                return
            self._stream = stream
            if self.remoteId >= 0:
                self._join(stream)  # it stood, and the channel was confirmed, within the call

        opened = self._opened = Deferred(giveUp)
        linking.addCallback(linked).addErrback(self._answer)
        return opened

    def _answer(self, result: Any) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.callback(result)

    def streamOpened(self, info: Mapping[str, object]) -> None:
        """The connection stands, and so does the channel."""
        self._answer(self)

    def channelOpen(self, specificData: bytes) -> None:
        """The channel is confirmed."""
        if self._stream is not None:
            self._join(self._stream)

    def streamClosed(self, reason: Exception | None) -> None:
        """There is no connection, or no more."""
        super().streamClosed(reason)
        self._answer(Failure(reason or LinkLost("the connection was closed at once")))


class AcceptedChannel(TunnelChannel):
    """One that we ask the client for, because somebody connected on the kernel's host.

    :param name: the channel's type.
    :param window: what the client may send ahead.
    """

    def __init__(
        self, name: bytes, listener: IListener, incoming: Incoming, window: int = 0
    ) -> None:
        super().__init__(window)
        self.name = name
        self._listener = listener
        self._incoming: Incoming | None = incoming

    def channelOpen(self, specificData: bytes) -> None:
        """The client takes it."""
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            stream = self._listener.accept(incoming, self)
            if not self._streamOver:
                self._join(stream)

    def openFailed(self, reason: object) -> None:
        """The client does not, or is gone."""
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            self._listener.refuse(incoming)

