"""What all channels of a connection send through: whose turn it is, and when.

Data leaves only while the transport takes it. Then little output goes first, so that a key's echo
does not wait behind a flood, and after that each channel has its turn of one packet. Nothing is
kept here but channels: each holds its own bytes, bounded by what it granted.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from twisted.conch.ssh.connection import MSG_CHANNEL_DATA, MSG_CHANNEL_EXTENDED_DATA
from twisted.logger import Logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from conchkernel.ssh.channel import GatewayChannel

Data = bytes | bytearray | memoryview

_TWO = struct.Struct(">2L")
_THREE = struct.Struct(">3L")


class Outlet:
    """The way of data to one client.

    :param transport: an SSH transport; where it has ``sendChannelData``,
        ``sendChannelExtendedData`` and ``sendChannelRun`` with ``runBytes``, these are used, and
        decided so once.
    """

    _log = Logger()

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        #: Sends one DATA packet: (recipient, bytes), which are not kept. The window is the
        #: caller's business.
        self.sendData: Callable[[int, Data], None] = getattr(
            transport, "sendChannelData", self._sendData
        )
        #: Sends one EXTENDED_DATA packet: (recipient, type, bytes).
        self.sendExtendedData: Callable[[int, int, Data], None] = getattr(
            transport, "sendChannelExtendedData", self._sendExtendedData
        )
        #: Sends some DATA packets of one size: (recipient, bytes, that size).
        self.sendRun: Callable[[int, Data, int], None] = getattr(
            transport, "sendChannelRun", _neverAsked
        )
        self._runBytes: Callable[[], int] = getattr(transport, "runBytes", _none)
        isWritable = getattr(transport, "isWritable", None)
        self._cork: Callable[[], bool] = getattr(transport, "cork", _uncorkable)
        #: The transport takes output.
        self.writable: bool = True if isWritable is None else isWritable()
        #: A channel may send past the queues: writable, and nobody waits or is being served.
        self.clear = self.writable
        self._stopped = False
        self._small: deque[GatewayChannel] = deque()
        self._bulk: deque[GatewayChannel] = deque()
        self._owed: set[GatewayChannel] = set()

    def pause(self) -> None:
        """The transport is full: nothing is sent, and nobody credited, until it resumes."""
        self.writable = self.clear = False

    def resume(self) -> None:
        """The transport takes output again."""
        if self._stopped:
            return
        self.writable = True
        self._pump()
        if self._owed and self.writable:
            owed, self._owed = self._owed, set()
            for channel in owed:
                channel.credit()

    def stop(self) -> None:
        """Nothing is sent any more."""
        self._stopped = True
        self.writable = self.clear = False
        self._small.clear()
        self._bulk.clear()
        self._owed.clear()

    def schedule(self, channel: GatewayChannel, small: bool) -> None:
        """``channel`` has something to send.

        :param small: it is little, and what it had is all sent: it goes before others' bulk.
        """
        if not channel.scheduled:
            channel.scheduled = True
            (self._small if small else self._bulk).append(channel)
            if self.clear:
                self._pump()

    def owe(self, channel: GatewayChannel) -> None:
        """``channel`` is to be credited when the transport takes output again."""
        self._owed.add(channel)

    def forget(self, channel: GatewayChannel) -> None:
        """``channel`` is closed."""
        self._owed.discard(channel)

    def _pump(self) -> None:
        corked = self._cork()
        try:
            self._sendInTurn()
        finally:
            if corked:
                self._transport.uncork()

    def _sendInTurn(self) -> None:
        small, bulk = self._small, self._bulk
        self.clear = False
        while self.writable:
            if small:
                channel = small.popleft()
            elif bulk:
                channel = bulk.popleft()
            else:
                self.clear = True
                return
            # Stays marked while it is served, so that what it is credited meanwhile only queues.
            try:
                # Alone, it may send more than a packet at its turn.
                if channel.sendNext(0 if small or bulk else self._runBytes()):
                    bulk.append(channel)
                else:
                    channel.scheduled = False
            except Exception:
                channel.scheduled = False
                self._log.failure("channel {id} could not send", id=channel.id)
                channel.abortConnection()

    def _sendData(self, recipient: int, data: Data) -> None:
        self._transport.sendPacket(MSG_CHANNEL_DATA, _TWO.pack(recipient, len(data)) + data)

    def _sendExtendedData(self, recipient: int, dataType: int, data: Data) -> None:
        self._transport.sendPacket(
            MSG_CHANNEL_EXTENDED_DATA, _THREE.pack(recipient, dataType, len(data)) + data
        )


def _uncorkable() -> bool:
    return False


def _none() -> int:
    return 0


def _neverAsked(recipient: int, data: Data, pieceBytes: int) -> None:
    raise AssertionError("no run was allowed")
