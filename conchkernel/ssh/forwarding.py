"""Forwarding for one client: where it may connect to, and what listens for it on the kernel's host.

TCP (RFC 4254 section 7), Unix sockets and the client's ssh-agent (OpenSSH's PROTOCOL, 2.4, and
draft-ietf-sshm-ssh-agent). All of it ends on the kernel's host. What is not permitted is refused
in a sentence that the log has too; what listens goes with the connection that asked for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from twisted.conch.ssh.connection import (
    OPEN_ADMINISTRATIVELY_PROHIBITED,
    OPEN_CONNECT_FAILED,
)
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from zope.interface import implementer

from conchkernel.errors import ConchKernelError, JupyterError
from conchkernel.interfaces import (
    IListenerReceiver,
    Incoming,
    PrivateSocket,
    SocketPath,
    TCPAddress,
)
from conchkernel.ssh.channel import LOCAL_WINDOW_BYTES, ChannelRefused, GatewayChannel
from conchkernel.ssh.fields import Fields, printable, string
from conchkernel.ssh.permissions import GatewayPorts, Permissions
from conchkernel.ssh.tunnels import AcceptedChannel, DirectChannel, shareBeside

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.python.failure import Failure

    from conchkernel.interfaces import IKernelLink, IListener

    Address = TCPAddress | SocketPath | PrivateSocket

#: Addresses at which one connection may have somebody listen; each holds sockets over there.
MAX_LISTENERS = 128
#: The longest name of a host (RFC 1035), with room for what is no name.
_MAX_HOST_BYTES = 1024
_MAX_PATH_BYTES = 4096
#: Between attempts to listen again, while there is no agent. One that waits for the road costs
#: nothing meanwhile.
AGAIN_SECONDS = 5.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ForwardingUser(Protocol):
    """What forwarding asks of the user it belongs to."""

    conn: Any
    permissions: Permissions

    def link(self) -> Deferred[IKernelLink]: ...


@implementer(IListenerReceiver)
class Forwarded:
    """One address that is listened at for a client.

    :param extra: what the client is told of each connection, when it is asked for a channel.
    """

    _log = Logger()

    def __init__(
        self, user: ForwardingUser, name: bytes, extra: Callable[[Incoming], bytes]
    ) -> None:
        self.listener: IListener | None = None
        self._address: Address
        self._closed = False
        self._again: Any = None  # the call that will seek the next agent
        self._user = user
        self._name = name
        self._extra = extra

    def listen(self, address: Address) -> Deferred[IListener]:
        """Begin. Cancellable."""
        self._address = address
        return self._user.link().addCallback(lambda link: link.listen(address, self)).addCallback(
            self._listening
        )

    def _listening(self, listener: IListener) -> IListener:
        self.listener = listener
        if self._closed:
            self.close()
        elif isinstance(self._address, TCPAddress):
            self._address = replace(self._address, port=listener.port)
        return listener

    def connectionAccepted(self, incoming: Incoming) -> None:
        """Ask the client for a channel."""
        listener = self.listener
        assert listener is not None
        conn = self._user.conn
        window = shareBeside(conn.channelCount, LOCAL_WINDOW_BYTES)
        channel = AcceptedChannel(self._name, listener, incoming, window)
        try:
            conn.openChannel(channel, self._extra(incoming))
        except ChannelRefused as refused:
            self._log.info("a forwarded connection is dropped: {why}", why=str(refused))
            listener.refuse(incoming)

    def listenerLost(self, reason: Exception) -> None:
        """The agent over there has ended, or the road was away for long. The protocol has no word
        for this, so it is listened again with whatever agent comes next, however long that takes;
        what comes of it is in the log."""
        self.listener = None
        address = self._address
        self._log.warn(
            "nobody listens at {address} any more: {why}", address=named(address), why=str(reason)
        )
        # A socket of its own choice would be at another path, which nobody knows.
        if not isinstance(address, PrivateSocket):
            self._listenAgain()

    def _listenAgain(self) -> None:
        self._again = None
        if not self._closed:
            self.listen(self._address).addCallbacks(self._restored, self._notRestored)

    def _restored(self, listener: IListener) -> None:
        self._log.info("{address} is listened at again", address=named(self._address))

    def _notRestored(self, reason: Failure) -> None:
        reason.trap(ConchKernelError, CancelledError)
        clock = getattr(getattr(self._user.conn.transport, "factory", None), "reactor", None)
        if self._closed:
            return
        if reason.check(JupyterError) and clock is not None:
            self._again = clock.callLater(AGAIN_SECONDS, self._listenAgain)
            return
        address = named(self._address)
        self._log.warn("{address} is given up: {why}", address=address, why=str(reason.value))

    def close(self) -> None:
        """Listen no more; connections live on."""
        self._closed = True
        again, self._again = self._again, None
        if again is not None:
            again.cancel()
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.close()


class Forwarding:
    """What one connection forwards.

    :ivar channels: channel types that a client may ask for.
    :ivar requests: global requests that a client may make.
    """

    _log = Logger()

    def __init__(self, user: ForwardingUser) -> None:
        self._user = user
        #: By what the client called it.
        self._listening: dict[tuple[object, ...], Forwarded] = {}
        self._beginning = 0
        self._over = False
        self.channels: dict[bytes, Callable[..., Any]] = {
            b"direct-tcpip": self.directTCP,
            b"direct-streamlocal@openssh.com": self.directStreamLocal,
        }
        self.requests: dict[bytes, Callable[[bytes], Any]] = {
            b"tcpip-forward": self.forwardTCP,
            b"cancel-tcpip-forward": self.cancelTCP,
            b"streamlocal-forward@openssh.com": self.forwardStreamLocal,
            b"cancel-streamlocal-forward@openssh.com": self.cancelStreamLocal,
        }

    def stop(self) -> None:
        """The connection is gone: nobody listens for it any more. Idempotent."""
        self._over = True
        listening, self._listening = self._listening, {}
        for forwarded in listening.values():
            forwarded.close()

    # --- to the kernel's host ----------------------------------------------------------------

    def directTCP(self, data: bytes, **windows: Any) -> Deferred[GatewayChannel]:
        """Payload: string host, uint32 port, string originator, uint32 its port."""
        fields = Fields(data, "direct-tcpip")
        host, port = _host(fields.string()), fields.uint32()
        fields.string()
        fields.uint32()
        fields.end()
        if host is None or not 0 < port <= 65535:
            raise ChannelRefused(OPEN_CONNECT_FAILED, "there is no such host or port")
        self._check(self._user.permissions.whyNotOpen(host, port))
        return self._open(TCPAddress(host, port), windows)

    def directStreamLocal(self, data: bytes, **windows: Any) -> Deferred[GatewayChannel]:
        """Payload: string path, string reserved, uint32 reserved."""
        fields = Fields(data, "direct-streamlocal")
        path = fields.string()
        fields.string()
        fields.uint32()
        fields.end()
        if not _isPath(path):
            raise ChannelRefused(OPEN_CONNECT_FAILED, "the path of a socket must be absolute")
        self._check(self._user.permissions.whyNotOpenPath())
        return self._open(SocketPath(path), windows)

    def _check(self, whyNot: str | None) -> None:
        if whyNot is not None:
            self._log.info("{peer}: {why}", peer=self._peer(), why=whyNot)
            raise ChannelRefused(OPEN_ADMINISTRATIVELY_PROHIBITED, whyNot)

    def _open(
        self, address: TCPAddress | SocketPath, windows: dict[str, Any]
    ) -> Deferred[GatewayChannel]:
        window = shareBeside(self._user.conn.channelCount, LOCAL_WINDOW_BYTES)
        channel = DirectChannel(window, **windows)
        return channel.open(
            self._user.link(), lambda link: link.openConnection(address, channel)
        )

    # --- from the kernel's host --------------------------------------------------------------

    def forwardTCP(self, data: bytes) -> bool | Deferred[Any]:
        """Payload: string address to bind, uint32 port, where 0 is any."""
        fields = Fields(data, "tcpip-forward")
        address, port = fields.string(), fields.uint32()
        fields.end()
        host = _host(address)
        if host is None or port > 65535:
            return False
        permissions = self._user.permissions
        if self._refuses(permissions.whyNotListen(host, port)):
            return False

        def extra(incoming: Incoming) -> bytes:
            # With the address as the client gave it, by which it finds what it forwards to.
            listener = forwarded.listener
            return b"".join((
                string(address),
                (port or (listener.port if listener is not None else 0)).to_bytes(4, "big"),
                string(incoming.host.encode("ascii", "replace")),
                incoming.port.to_bytes(4, "big"),
            ))  # fmt: skip

        forwarded = Forwarded(self._user, b"forwarded-tcpip", extra)
        bind = TCPAddress(_bound(host, permissions.gatewayPorts), port)

        def listening(listener: IListener) -> Any:
            self._keep((address, listener.port), forwarded)
            return (True, listener.port.to_bytes(4, "big")) if port == 0 else True

        return self._begin((address, port), forwarded, bind, listening)

    def cancelTCP(self, data: bytes) -> bool:
        """Payload: string address, uint32 port, as they were asked for, but the true port."""
        fields = Fields(data, "cancel-tcpip-forward")
        address, port = fields.string(), fields.uint32()
        fields.end()
        return self._cancel((address, port))

    def forwardStreamLocal(self, data: bytes) -> bool | Deferred[Any]:
        """Payload: string path."""
        fields = Fields(data, "streamlocal-forward")
        path = fields.string()
        fields.end()
        if not _isPath(path) or self._refuses(self._user.permissions.whyNotListenPath()):
            return False
        told = string(path) + string(b"")
        forwarded = Forwarded(
            self._user, b"forwarded-streamlocal@openssh.com", lambda incoming: told
        )

        def listening(listener: IListener) -> bool:
            self._keep((path,), forwarded)
            return True

        return self._begin((path,), forwarded, SocketPath(path), listening)

    def cancelStreamLocal(self, data: bytes) -> bool:
        """Payload: string path."""
        fields = Fields(data, "cancel-streamlocal-forward")
        path = fields.string()
        fields.end()
        return self._cancel((path,))

    def _refuses(self, whyNot: str | None) -> bool:
        if whyNot is not None:
            self._log.info("{peer}: {why}", peer=self._peer(), why=whyNot)
        return whyNot is not None

    def _begin(
        self,
        key: tuple[object, ...],
        forwarded: Forwarded,
        address: Address,
        listening: Callable[[IListener], Any],
    ) -> bool | Deferred[Any]:
        if key in self._listening or len(self._listening) + self._beginning >= MAX_LISTENERS:
            return False
        self._beginning += 1
        return forwarded.listen(address).addBoth(self._begun).addCallbacks(
            listening, self._notListening, errbackArgs=(address,)
        )

    def _begun(self, result: Any) -> Any:
        self._beginning -= 1
        return result

    def _keep(self, key: tuple[object, ...], forwarded: Forwarded) -> None:
        self._listening[key] = forwarded
        if self._over:
            self.stop()

    def _notListening(self, reason: Failure, address: Address) -> bool:
        reason.trap(ConchKernelError, CancelledError)
        if not self._over:
            self._log.info(
                "{peer}: nobody listens at {address}: {why}",
                peer=self._peer(),
                address=named(address),
                why=str(reason.value),
            )
        return False

    def _cancel(self, key: tuple[object, ...]) -> bool:
        forwarded = self._listening.pop(key, None)
        if forwarded is None:
            return False
        forwarded.close()
        return True

    # --- the client's ssh-agent --------------------------------------------------------------

    def forwardAgent(self) -> Deferred[Forwarded] | None:
        """A socket on the kernel's host that leads to the client's ssh-agent.

        :returns: ``None`` if that is not permitted; else fires when it listens, with what is to be
            closed at the end. Cancellable.
        """
        if self._refuses(
            None if self._user.permissions.agent else "agent forwarding is not permitted"
        ):
            return None
        forwarded = Forwarded(self._user, b"auth-agent@openssh.com", lambda incoming: b"")
        return forwarded.listen(PrivateSocket("agent")).addCallback(lambda _: forwarded)

    def _peer(self) -> str:
        peerName = getattr(getattr(self._user.conn, "transport", None), "peerName", None)
        return peerName() if peerName is not None else "a client"


def _host(data: bytes) -> str | None:
    """A host as a client names it; ``None`` if it cannot be one."""
    if len(data) > _MAX_HOST_BYTES or b"\0" in data:
        return None
    try:
        host = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return host if host.isprintable() else None


def _isPath(path: bytes) -> bool:
    return path.startswith(b"/") and len(path) <= _MAX_PATH_BYTES and b"\0" not in path


def _bound(host: str, gatewayPorts: GatewayPorts) -> str:
    """The address to bind, from the one that the client asks for (as sshd's channels.c)."""
    if gatewayPorts is GatewayPorts.NO:
        return host if host in _LOOPBACK else "localhost"
    if gatewayPorts is GatewayPorts.YES or host in ("", "*"):
        return ""
    return host


def named(address: Address) -> str:
    """An address for the log."""
    if isinstance(address, TCPAddress):
        return f"{address.host or '*'} port {address.port}"
    return printable(address.path) if isinstance(address, SocketPath) else "a private socket"
