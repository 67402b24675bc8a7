"""The worker of ``conchkernel proxy``: an SSH connection through pipes to a named kernel."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IAnonymous
from twisted.cred.portal import Portal
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReadDescriptor
from zope.interface import implementer

from conchkernel.avatars import KernelRealm
from conchkernel.errors import ConchKernelError, ConfigurationError, KernelUnsupported
from conchkernel.pipes import Pipes
from conchkernel.ssh import hostkeys
from conchkernel.ssh.checkers import OWNER
from conchkernel.ssh.factory import GatewayFactory
from conchkernel.ssh.fields import DisconnectCode, ProtocolError
from conchkernel.stores import StoreChoice

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.conch.ssh.keys import Key

    from conchkernel.attachment import Attachment
    from conchkernel.names import Name
    from conchkernel.ssh.transport import GatewayTransport

#: The client hears this from one that was asked to end, or whose front has died.
_ENDED = b"conchkernel proxy has been ended"


@implementer(ICredentialsChecker)
class PipeChecker:
    """Lets in whoever has the other end of the pipe, once there is something to be let in to.

    Only for a transport that nobody else can reach: it asks for no credential.

    :param ready: a Deferred for each caller, of ``None`` or the sentence why it will not be.
    """

    credentialInterfaces = (IAnonymous,)

    def __init__(self, ready: Callable[[], Deferred[str | None]]) -> None:
        self._ready = ready

    def requestAvatarId(self, credentials: object) -> Any:
        """The owner, as a Deferred.

        :raises ProtocolError: (as failure) with the sentence, which ends the connection.
        """
        return self._ready().addCallback(_ownerUnless)


def _ownerUnless(problem: str | None) -> str:
    if problem is not None:
        sentence = problem.encode("ascii", "backslashreplace").decode()
        raise ProtocolError(sentence, DisconnectCode.BY_APPLICATION)
    return OWNER


class PipedConnection:
    """One SSH connection. Its handshake and the way to the kernel are gone at the same time.

    :param name: whose host key it has, the one that ssh has been told of.
    :raises ConfigurationError: if that cannot be used.
    """

    def __init__(self, reactor: Any, name: Name, attachment: Attachment) -> None:
        self._reactor = reactor
        self._attachment = attachment
        self._transport: GatewayTransport | None = None
        self._starting: Deferred[str | None] | None = None
        self._over = False
        backend = attachment.backend
        realm = KernelRealm(backend, files=StoreChoice(backend.contents))
        self._factory = GatewayFactory(
            Portal(realm, [PipeChecker(self._whenStarted)]),
            [_hostKey(name)],
            reactor=reactor,
        )

    async def serve(
        self,
        incoming: int,
        outgoing: int,
        front: socket.socket,
        complain: Callable[[str], object],
    ) -> bool:
        """Speak SSH until the connection is over.

        :param front: the process that the client knows; when that ends, so does the connection.
        :param complain: told why there is nothing to connect to, before the client is.
        :returns: whether there was something.
        """
        self._factory.doStart()
        self._transport = self._factory.buildProtocol(None)
        pipes = Pipes(self._reactor, self._transport, incoming, outgoing)
        self._starting = Deferred.fromCoroutine(self._start(complain))
        watch = _Watch(self._reactor, front, self.end)
        await pipes.closed
        watch.stop()
        self._factory.doStop()
        # What has not started by now is not waited for.
        self._over = True
        self._starting.cancel()
        return await self._starting is None

    def end(self) -> None:
        """End the connection and say so; a client that takes nothing is not waited for."""
        if self._transport is not None:
            self._transport.sendDisconnect(DisconnectCode.BY_APPLICATION, _ENDED)

    async def _start(self, complain: Callable[[str], object]) -> str | None:
        """Be attached; the sentence why not."""
        try:
            await self._attachment.attach()
        except KernelUnsupported:
            return None  # files can be had all the same; who wants a shell is told
        except ConchKernelError as error:
            if self._over:
                return None  # that is what our not waiting has become
            complain(str(error))
            return str(error)
        except CancelledError:
            return None
        return None

    def _whenStarted(self) -> Deferred[str | None]:
        assert self._starting is not None
        waiting: Deferred[str | None] = Deferred()

        def tell(problem: str | None) -> str | None:
            waiting.callback(problem)
            return problem

        self._starting.addCallback(tell)
        return waiting


def _hostKey(name: Name) -> Key:
    try:
        return hostkeys.load(name.directory / hostkeys.FILE_NAME)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} Run: conchkernel config-ssh {name.text} URL") from None


@implementer(IReadDescriptor)
class _Watch:
    """Calls back when the other end of a socket is gone. (It says nothing.)"""

    def __init__(self, reactor: Any, peer: socket.socket, gone: Callable[[], object]) -> None:
        self._reactor = reactor
        self._peer = peer
        self._gone = gone
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._peer.fileno()

    def logPrefix(self) -> str:
        return "front"

    def doRead(self) -> None:
        self.stop()
        self._gone()

    def connectionLost(self, reason: object) -> None:
        self.doRead()

    def stop(self) -> None:
        """Watch no more."""
        self._reactor.removeReader(self)
