"""The sending half of the transport: when a packet goes, and who is told to wait.

A message is sealed at once unless a key exchange blocks it. What is sent within one read leaves in
one write. A peer that takes nothing costs a bounded amount of memory: bulk is paused, and if it is
only asking for replies, so is its own voice.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from twisted.conch.ssh.transport import SSHServerTransport
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from conchkernel.ssh.exchange import MSG_DEBUG
from conchkernel.ssh.fields import DisconnectCode
from conchkernel.ssh.packets import Outbound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conchkernel.ssh.sealing import Data
    from conchkernel.tcp import PromptWriter

MSG_CHANNEL_DATA = 94
MSG_CHANNEL_EXTENDED_DATA = 95

#: What may wait for the end of a key exchange. Channel data does not, as the connection service
#: is told to pause; replies and window adjustments do.
_MAXIMUM_HELD_BYTES = 1024 * 1024
#: What one held message costs beside its payload.
_HELD_OVERHEAD_BYTES = 128
#: Beyond this, what is sealed within one read is given to the TCP transport before the read ends.
_MAXIMUM_CORKED_BYTES = 128 * 1024
#: What is sent by us while TCP takes nothing, before we stop reading from this peer: replies that
#: it asks for and does not take.
_MAXIMUM_UNTAKEN_BYTES = 512 * 1024

#: Data that is sealed, and written, in one go.
_MAXIMUM_RUN_BYTES = 512 * 1024
# Its packets, with at most 64 bytes of their own each. One for all connections: what is written
# here has left, or was copied, when a call returns.
_run = memoryview(bytearray(_MAXIMUM_RUN_BYTES + _MAXIMUM_RUN_BYTES // 1024 * 64))

#: Output up to this waits for the reactor's next turn, unless it answers something.
_LITTLE_BYTES = 4096

#: Message numbers as the octet that starts a payload.
NUMBER = tuple(bytes((number,)) for number in range(256))
_pack_data = struct.Struct(">BLL").pack
_pack_extended = struct.Struct(">BLLL").pack


@implementer(IPushProducer)
class OutgoingPackets(SSHServerTransport):
    """Sends, for :class:`~conchkernel.ssh.transport.GatewayTransport`.

    Flow control: :meth:`isWritable` tells whether bulk may be sent. The running service, where it
    has these methods, is told of changes by ``transportPaused()`` and ``transportResumed()``,
    which may come from within a send. What is sent all the same is not lost.
    """

    transport: Any

    def __init__(self) -> None:
        self._outbound = Outbound()
        self._closing = False
        # Held back until the key exchange ends: (number, payload).
        self._held: list[tuple[int, bytes]] = []
        self._heldBytes = 0
        # Sealed within the current read.
        self._corked = False
        self._sealed: list[bytes] = []
        self._sealedBytes = 0
        # What stops us from sending bulk: a key exchange, or TCP.
        self._blocked = False
        self._tcpFull = False
        self._writable = False
        self._untakenBytes = 0
        self._readingPaused = False
        # Writes what is below us at once; made when we know that.
        self._writer: PromptWriter
        # The client has sent something since the last little answer that left at once.
        self._heard = False

    # --- packets out -------------------------------------------------------------------------

    def sendPacket(self, messageType: int, payload: bytes) -> None:
        """Send a message, or hold it until the end of a key exchange."""
        if self._blocked and messageType > MSG_DEBUG:
            self._hold(messageType, payload)
        else:
            self._send(NUMBER[messageType], payload)

    def sendChannelData(self, recipientChannel: int, data: bytes | memoryview) -> None:
        """Send SSH_MSG_CHANNEL_DATA (RFC 4254 section 5.2); ``data`` is not kept.

        :param recipientChannel: the client's number of the channel.
        """
        head = _pack_data(MSG_CHANNEL_DATA, recipientChannel, len(data))
        if self._blocked:
            self._hold(MSG_CHANNEL_DATA, head[1:] + bytes(data))
        else:
            self._send(head, data)

    def sendChannelRun(
        self, recipientChannel: int, data: bytes | memoryview, pieceBytes: int
    ) -> None:
        """Send messages as :meth:`sendChannelData` does, each with the next ``pieceBytes``.

        Only while :meth:`isWritable`, and :meth:`runBytes` is so much.

        :param pieceBytes: a KiB or more; the last message may have less.
        """
        self._flush()
        size = 0
        whole = len(data) - len(data) % pieceBytes
        view = memoryview(data)
        for run in (view[:whole], view[whole:]):
            if run:
                piece = min(pieceBytes, len(run))
                head = _pack_data(MSG_CHANNEL_DATA, recipientChannel, piece)
                size += self._outbound.seal_run(head, run, piece, _run[size:])
        self._writer.write(_run[:size])

    def runBytes(self) -> int:
        """How much :meth:`sendChannelRun` takes; 0 where packets are made one by one."""
        return _MAXIMUM_RUN_BYTES if self._outbound.seals_runs else 0

    def sendChannelExtendedData(
        self, recipientChannel: int, dataType: int, data: bytes | memoryview
    ) -> None:
        """Send SSH_MSG_CHANNEL_EXTENDED_DATA; as :meth:`sendChannelData`."""
        number = MSG_CHANNEL_EXTENDED_DATA
        head = _pack_extended(number, recipientChannel, dataType, len(data))
        if self._blocked:
            self._hold(number, head[1:] + bytes(data))
        else:
            self._send(head, data)

    def _hold(self, number: int, payload: bytes) -> None:
        if self._closing:
            return
        self._held.append((number, payload))
        self._heldBytes += len(payload) + _HELD_OVERHEAD_BYTES
        if self._heldBytes > _MAXIMUM_HELD_BYTES:
            self._held = []
            self.sendDisconnect(
                DisconnectCode.PROTOCOL_ERROR, b"too many requests during a key exchange"
            )

    def _sendHeld(self) -> None:
        """Nothing blocks any more: send what was held, in its order."""
        self._blocked = False
        held, self._held, self._heldBytes = self._held, [], 0
        for number, payload in held:
            self._send(NUMBER[number], payload)

    def _send(self, head: bytes, body: Data) -> None:
        if self._closing:
            return
        pieces = self._outbound.seal(head, body)
        if self._corked:
            self._sealed += pieces
            self._sealedBytes += len(body) + 32
            if self._sealedBytes > _MAXIMUM_CORKED_BYTES:
                self._flush()
            return
        self._write(pieces, len(body) + 32)

    def _flush(self) -> None:
        sealed, self._sealed = self._sealed, []
        size, self._sealedBytes = self._sealedBytes, 0
        if sealed:
            self._write(sealed, size)

    def _write(self, pieces: Sequence[bytes], size: int) -> None:
        if self._tcpFull:
            self._countUntaken(size)
        if size > _LITTLE_BYTES:
            self._writer.write(b"".join(pieces))
        elif self._heard:
            # The echo of a key, most likely, or what answers a read. Once for each read, so that
            # a stream of little output is still joined.
            self._heard = False
            self._writer.write(b"".join(pieces))
        else:
            self.transport.writeSequence(pieces)

    def cork(self) -> bool:
        """Collect what is sent until :meth:`uncork`, but not more than a bound.

        :returns: whether the caller has to uncork: not where somebody before it will.
        """
        if self._corked:
            return False
        self._corked = True
        return True

    def uncork(self) -> None:
        """Send what was collected."""
        self._corked = False
        self._flush()

    def _countUntaken(self, size: int) -> None:
        """A peer that asks and asks, and takes no answer, is not read any more until it does."""
        self._untakenBytes += size
        if self._untakenBytes > _MAXIMUM_UNTAKEN_BYTES and not self._readingPaused:
            self._readingPaused = True
            self.transport.pauseProducing()

    # --- flow control ------------------------------------------------------------------------

    def isWritable(self) -> bool:
        """Whether bulk may be sent now."""
        return self._writable

    def _updateWritable(self) -> None:
        writable = not (self._tcpFull or self._closing or self._blocked)
        if writable is self._writable:
            return
        self._writable = writable
        name = "transportResumed" if writable else "transportPaused"
        changed = getattr(self.service, name, None)
        if changed is not None:
            changed()

    def pauseProducing(self) -> None:
        """TCP holds enough."""
        if not self._tcpFull:
            self._tcpFull = True
            self._updateWritable()

    def resumeProducing(self) -> None:
        """TCP has sent all that it held."""
        self._tcpFull = False
        self._untakenBytes = 0
        if self._readingPaused:
            self._readingPaused = False
            self.transport.resumeProducing()
        self._updateWritable()

    def stopProducing(self) -> None:
        """TCP is gone; :meth:`connectionLost` follows."""
