"""A connection that takes what it can at once, without a reactor's turn.

Twisted's transport copies what it is given, asks the reactor to be told when it may write, and is
told in the next turn. Where nothing waits, the system takes nearly always all there is, so it is
asked first; what it does not take waits in Twisted's transport as ever.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.protocols.policies import ProtocolWrapper

Data = bytes | bytearray | memoryview


def beneath(transport: Any) -> Any:
    """The connection below wrappers that leave bytes alone, such as a PROXY header's."""
    while isinstance(transport, ProtocolWrapper):
        transport = transport.transport
    return transport


class PromptWriter:
    """Writes to a transport, at once where that can be.

    :param transport: a protocol's; anything but a plain socket or pipe, TLS say, is written to as
        usual.
    """

    __slots__ = ("_below", "_transport")

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        below = transport
        while isinstance(below, ProtocolWrapper) and type(below).write is ProtocolWrapper.write:
            below = below.transport
        plain = isinstance(below, FileDescriptor) and not getattr(below, "TLS", False)
        self._below: FileDescriptor | None = below if plain else None

    def write(self, data: Data) -> None:
        """Send ``data``, which is not kept."""
        below = self._below
        sent = 0
        # Without these names everything would seem to wait, and nothing is written at once.
        if (
            below is not None
            and below.connected
            and not getattr(below, "dataBuffer", True)
            and not getattr(below, "_tempDataLen", True)
            and not below.disconnecting
        ):
            taken = below.writeSomeData(data)  # type: ignore[arg-type]
            if isinstance(taken, int) and taken > 0:
                sent = taken
            # A failure is found again by the reactor, which closes the connection for it.
        if sent < len(data):
            self._transport.write(bytes(memoryview(data)[sent:]) if sent else bytes(data))
