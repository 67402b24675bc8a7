"""Who is logged in: which backend, which channels, which use of a kernel.

A joint of the two columns: it knows the SSH column's channels and, through
:mod:`conchkernel.interfaces` alone, where kernels come from.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal

from twisted.conch.avatar import ConchUser
from twisted.conch.interfaces import IConchUser
from twisted.conch.ssh.connection import (
    OPEN_ADMINISTRATIVELY_PROHIBITED,
    OPEN_UNKNOWN_CHANNEL_TYPE,
)
from twisted.cred.portal import IRealm
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from zope.interface import Interface, implementer

from conchkernel.errors import JupyterError
from conchkernel.ssh.channel import ChannelRefused, GatewayChannel
from conchkernel.ssh.fields import printable
from conchkernel.ssh.forwarding import Forwarding
from conchkernel.ssh.permissions import Permissions
from conchkernel.ssh.sessions import ACCEPT_ENV, SessionChannel, Subsystem
from conchkernel.ssh.sftp_server import ServedFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from twisted.python.failure import Failure

    from conchkernel.files import IFileStore
    from conchkernel.interfaces import IBackend, IKernelLink

_REFUSED = {
    b"tun@openssh.com": "tunnel devices are not available on this gateway",
    b"x11": "X11 forwarding is not available on this gateway",
    b"auth-agent@openssh.com": "agent forwarding is not available on this gateway",
}

DEFAULT_PERMISSIONS = Permissions()


class KernelAvatar(ConchUser):
    """One user on one SSH connection.

    :param backend: where the kernel comes from.
    :param user: whose kernel it is.
    :param acceptEnv: patterns of the variables a client may set.
    :param permissions: what else it may ask for.
    """

    _log = Logger()

    _conn: Any = None

    def __init__(
        self,
        backend: IBackend,
        user: str,
        acceptEnv: Iterable[str] = ACCEPT_ENV,
        permissions: Permissions = DEFAULT_PERMISSIONS,
    ) -> None:
        super().__init__()
        self.user = user
        self.acceptEnv = tuple(acceptEnv)
        self.permissions = permissions
        self.forwarding = Forwarding(self)
        self.channelLookup: dict[bytes, Callable[..., Any]] = {
            b"session": SessionChannel,
            **self.forwarding.channels,
        }
        self.subsystemLookup: dict[bytes, Callable[[SessionChannel], Subsystem]] = {}  # type: ignore[assignment]
        self.globalRequestLookup: dict[bytes, Callable[[bytes], Any]] = self.forwarding.requests
        self._backend = backend
        self._link: IKernelLink | None = None
        self._lost: list[IKernelLink] = []
        self._connecting: Deferred[IKernelLink] | None = None
        self._waiting: list[Deferred[IKernelLink]] = []
        self._loggedOut = False

    # --- the use of a kernel -----------------------------------------------------------------

    def link(self) -> Deferred[IKernelLink]:
        """This connection's use of the kernel, one for all its channels.

        :returns: a Deferred of its own for each caller, who may cancel it.
        :raises conchkernel.errors.JupyterError: (as failure) and the next call tries anew.
        """
        waiting: Deferred[IKernelLink] = Deferred(self._forget)
        if self._link is not None:
            waiting.callback(self._link)
            return waiting
        if self._loggedOut:
            waiting.cancel()
            return waiting
        self._waiting.append(waiting)
        self._connect()
        return waiting

    def warmUp(self) -> None:
        """Have the kernel started before it is needed. That it fails is told to who needs it."""
        if self._link is None:
            self._connect()

    def linkLost(self, link: IKernelLink) -> None:
        """``link`` is of no more use: whoever needs one next gets another.

        It is given back at the end only, since other channels may still live on it.
        """
        if self._link is link:
            self._link = None
            self._lost.append(link)

    def logout(self) -> None:
        """The connection is gone. Idempotent."""
        self._loggedOut = True
        self.forwarding.stop()
        links, self._lost = self._lost, []
        if self._link is not None:
            links.append(self._link)
            self._link = None
        for link in links:
            link.release()
        if self._connecting is not None:
            self._connecting.cancel()

    def _connect(self) -> None:
        if self._connecting is None and not self._loggedOut:
            connecting = self._connecting = self._backend.connect(self.user)
            connecting.addCallbacks(self._connected, self._notConnected)

    def _connected(self, link: IKernelLink) -> None:
        self._connecting = None
        if self._loggedOut:
            link.release()
            return
        self._link = link
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            deferred.callback(link)

    def _notConnected(self, reason: Failure) -> None:
        self._connecting = None
        waiting, self._waiting = self._waiting, []
        if not reason.check(JupyterError, CancelledError):
            self._log.failure("no kernel for {user}", reason, user=self.user)
        elif not self._loggedOut:
            self._log.warn("no kernel for {user}: {error}", user=self.user, error=reason.value)
        for deferred in waiting:
            deferred.errback(reason)

    def _forget(self, waiting: Deferred[IKernelLink]) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)

    # --- what a client may ask for -----------------------------------------------------------

    def narrow(self, permissions: Permissions) -> None:
        """Take back what ``permissions`` do not allow, for as long as the connection lives."""
        self.permissions = self.permissions.narrowed(permissions)

    def serveFiles(self, files: Callable[[KernelAvatar], Deferred[IFileStore]]) -> None:
        """Have the ``sftp`` subsystem; ``files`` gives each of its sessions a store."""

        def serve(channel: SessionChannel) -> Subsystem:
            clock = getattr(getattr(channel.conn.transport, "factory", None), "reactor", None)
            return ServedFiles(channel, lambda: files(self), clock)

        self.subsystemLookup[b"sftp"] = serve

    def lookupChannel(
        self, channelType: bytes, windowSize: int, maxPacket: int, data: bytes
    ) -> GatewayChannel | Deferred[GatewayChannel]:
        """The channel a client asks for, or a Deferred of it.

        :raises ChannelRefused: with the sentence for the client.
        """
        make = self.channelLookup.get(channelType)
        if make is None:
            sentence = _REFUSED.get(channelType)
            if sentence is not None:
                raise ChannelRefused(OPEN_ADMINISTRATIVELY_PROHIBITED, sentence)
            raise ChannelRefused(
                OPEN_UNKNOWN_CHANNEL_TYPE, f"unknown channel type {printable(channelType)}"
            )
        channel: GatewayChannel | Deferred[GatewayChannel] = make(
            remoteWindow=windowSize, remoteMaxPacket=maxPacket, data=data, avatar=self
        )
        return channel

    def gotGlobalRequest(self, requestType: bytes, data: bytes) -> Any:
        """Answer through :attr:`globalRequestLookup`; what is not there is refused."""
        answer = self.globalRequestLookup.get(requestType)
        return False if answer is None else answer(data)


@implementer(IRealm)
class KernelRealm:
    """Gives every login its :class:`KernelAvatar`.

    :param backend: where kernels come from.
    :param acceptEnv: patterns of the variables a client may set, as sshd's AcceptEnv.
    :param kernelPer: whether the connections of a user share a kernel.
    :param files: gives each SFTP session a store of its own, which is closed with it; without
        this there is no SFTP.
    :param permissions: what everybody may ask for. A checker takes more back from one login by an
        avatar's id that has ``permissions``, too: :class:`~conchkernel.ssh.checkers.LimitedId`.
    """

    def __init__(
        self,
        backend: IBackend,
        *,
        acceptEnv: Iterable[str] = ACCEPT_ENV,
        kernelPer: Literal["user", "connection"] = "user",
        files: Callable[[KernelAvatar], Deferred[IFileStore]] | None = None,
        permissions: Permissions = DEFAULT_PERMISSIONS,
    ) -> None:
        self._backend = backend
        self._permissions = permissions
        self._acceptEnv = tuple(acceptEnv)
        self._kernelPer = kernelPer
        self._files = files
        self._numbers = itertools.count(1)

    def requestAvatar(
        self, avatarId: bytes | str | tuple[()], mind: object, *interfaces: object
    ) -> tuple[type[Interface], object, Callable[[], None]]:
        """:raises NotImplementedError: for anything but a Conch user, as cred has it."""
        if IConchUser not in interfaces:
            raise NotImplementedError("only SSH users live here")
        user = _userName(avatarId)
        if self._kernelPer == "connection":
            user = f"{user}#{next(self._numbers)}"
        avatar = KernelAvatar(self._backend, user, self._acceptEnv, self._permissions)
        limits = getattr(avatarId, "permissions", None)
        if limits is not None:
            avatar.narrow(limits)
        if self._files is not None:
            avatar.serveFiles(self._files)
        return IConchUser, avatar, avatar.logout


def _userName(avatarId: bytes | str | tuple[()]) -> str:
    if isinstance(avatarId, bytes):
        return avatarId.decode("utf-8", "surrogateescape")
    # cred's ANONYMOUS is an empty tuple.
    return avatarId or "anonymous"
