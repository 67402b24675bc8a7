"""What an OPEN says (``docs/wire.md`` section 6), from what the SSH side asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conchkernel.interfaces import PrivateSocket, SocketPath

if TYPE_CHECKING:
    from conchkernel.interfaces import ProcessRequest, TCPAddress

_LOOPBACK = ["127.0.0.1", "::1"]
_EVERYWHERE = ["0.0.0.0", "::"]


def process(request: ProcessRequest) -> dict[str, Any]:
    """A shell or a command."""
    parameters: dict[str, Any] = {"kind": "process"}
    if request.command is not None:
        parameters["command"] = request.command.decode("latin-1")
    parameters["environment"] = [
        [name.decode("latin-1"), value.decode("latin-1")] for name, value in request.environment
    ]
    if request.pty is not None:
        size = request.pty.size
        parameters["pty"] = {
            "term": request.pty.term.decode("latin-1"),
            "size": [size.columns, size.rows, size.width_pixels, size.height_pixels],
            "modes": [list(mode) for mode in request.pty.modes],
        }
    return parameters


def connection(address: TCPAddress | SocketPath) -> dict[str, Any]:
    """A connection to somewhere."""
    if isinstance(address, SocketPath):
        return {"kind": "connect", "path": address.path.decode("latin-1")}
    return {"kind": "connect", "host": address.host, "port": address.port}


def listening(address: TCPAddress | SocketPath | PrivateSocket) -> dict[str, Any]:
    """An address to listen at. ``localhost`` is both of its addresses, whatever a name server
    over there makes of it."""
    if isinstance(address, SocketPath):
        return {"kind": "listen", "path": address.path.decode("latin-1")}
    if isinstance(address, PrivateSocket):
        return {"kind": "listen", "private": address.name}
    hosts = {"localhost": _LOOPBACK, "": _EVERYWHERE}.get(address.host, [address.host])
    return {"kind": "listen", "hosts": hosts, "port": address.port}
