"""The TCP connection below an SSH transport: what it takes goes at once, without a reactor's turn.

Twisted's transport copies what it is given, asks the reactor to be told when it may write, and is
told in the next turn. Where nothing waits, the system takes nearly always all there is, so it is
asked first; what it does not take waits in Twisted's transport as ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.tcp import Connection
from twisted.protocols.policies import ProtocolWrapper

if TYPE_CHECKING:
    from conchkernel.ssh.sealing import Data


def beneath(transport: Any) -> Any:
    """The connection below wrappers that leave bytes alone, such as a PROXY header's."""
    while isinstance(transport, ProtocolWrapper):
        transport = transport.transport
    return transport


class PromptWriter:
    """Writes to a transport, at once where that can be.

    :param transport: a protocol's; anything but plain TCP, TLS say, is written to as usual.
    """

    __slots__ = ("_tcp", "_transport")

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        tcp = transport
        while isinstance(tcp, ProtocolWrapper) and type(tcp).write is ProtocolWrapper.write:
            tcp = tcp.transport
        plain = isinstance(tcp, Connection) and not tcp.TLS
        self._tcp: Connection | None = tcp if plain else None

    def write(self, data: Data) -> None:
        """Send ``data``, which is not kept."""
        tcp = self._tcp
        sent = 0
        # Without these names everything would seem to wait, and nothing is written at once.
        if (
            tcp is not None
            and tcp.connected
            and not getattr(tcp, "dataBuffer", True)
            and not getattr(tcp, "_tempDataLen", True)
            and not tcp.disconnecting
        ):
            taken = tcp.writeSomeData(data)  # type: ignore[arg-type]
            if isinstance(taken, int) and taken > 0:
                sent = taken
            # A failure is found again by the reactor, which closes the connection for it.
        if sent < len(data):
            self._transport.write(bytes(memoryview(data)[sent:]) if sent else bytes(data))
