"""One process's use of a named server's kernel: an SSH connection through pipes, and its end.

Any number of these share the kernel of a name. Arriving and leaving are done in turns
(:mod:`conchkernel.jupyter.sharing`), and what is decided in a turn is carried out in it, so that
nobody attaches to an agent that has just been told to end.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IAnonymous
from twisted.cred.portal import Portal
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from conchkernel.avatars import KernelRealm
from conchkernel.errors import ConchKernelError, KernelUnsupported
from conchkernel.jupyter.backends import OWNER, JupyterBackend
from conchkernel.jupyter.sharing import SharedState
from conchkernel.pipes import Pipes
from conchkernel.ssh import hostkeys
from conchkernel.ssh.factory import GatewayFactory
from conchkernel.ssh.fields import DisconnectCode, ProtocolError
from conchkernel.stores import StoreChoice

if TYPE_CHECKING:
    from collections.abc import Callable

    from conchkernel.names import Name, Settings

#: For a stop; whoever is shutting down the machine does not wait for longer.
_STOP_SECONDS = 14.0


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


class Attachment:
    """Serve one connection, then leave nothing behind that nobody uses.

    :param name: whose directory has the identity, the host key and the locks.
    """

    _log = Logger()

    def __init__(self, reactor: Any, name: Name, settings: Settings) -> None:
        self._reactor = reactor
        self._name = name
        self._settings = settings
        self._sharing: SharedState | None = None
        self._backend: JupyterBackend | None = None
        self._pipes: Pipes | None = None
        self._starting: Deferred[str | None] | None = None
        self._waiting: Deferred[None] | None = None
        self._hurried = False

    async def serve(self, incoming: int, outgoing: int, front: socket.socket) -> str | None:
        """Speak SSH until the connection is over.

        :param front: the process that the client knows; when that ends, so does the connection.
        :returns: why there was nothing to connect to; ``None`` where there was.
        """
        try:
            factory = self._makeFactory()
        except ConchKernelError as error:
            return str(error)
        factory.doStart()
        self._pipes = Pipes(self._reactor, factory.buildProtocol(None), incoming, outgoing)
        self._starting = Deferred.fromCoroutine(self._start())
        watch = _Watch(self._reactor, front, self._pipes.loseConnection)
        await self._pipes.closed
        watch.stop()
        factory.doStop()
        # What has not started by now is not waited for.
        self._starting.cancel()
        return await self._starting

    def _makeFactory(self) -> GatewayFactory:
        hostKey = hostkeys.loadOrCreate(self._name.directory)
        self._sharing = SharedState(self._reactor, self._name.directory)
        settings = self._settings
        self._backend = JupyterBackend(
            self._reactor,
            settings.url,
            state_dir=self._name.directory,
            kernel_name=settings.kernelName,
            ca_file=Path(settings.jupyterCA) if settings.jupyterCA else None,
            orphan_timeout=settings.orphanTimeout,
            prestart=None,
            sharing=self._sharing,
        )
        realm = KernelRealm(self._backend, files=StoreChoice(self._backend.contents))
        return GatewayFactory(
            Portal(realm, [PipeChecker(self._whenStarted)]), [hostKey], reactor=self._reactor
        )

    async def _start(self) -> str | None:
        """Be attached; the sentence why not."""
        assert self._backend is not None
        try:
            await self._backend.start()
            # Never released: it holds the kernel until the backend stops.
            await self._backend.connect(OWNER)
        except KernelUnsupported:
            return None  # files can be had all the same; who wants a shell is told
        except ConchKernelError as error:
            return str(error)
        except CancelledError:
            return None
        return None

    def _whenStarted(self) -> Deferred[str | None]:
        assert self._starting is not None
        waiting: Deferred[str | None] = Deferred()

        def tell(problem: Any) -> Any:
            waiting.callback(problem)
            return problem

        self._starting.addBoth(tell)
        return waiting

    def hurry(self) -> None:
        """End the connection and all waiting: the process is to go."""
        self._hurried = True
        if self._pipes is not None:
            self._pipes.loseConnection()
        if self._waiting is not None:
            self._waiting.cancel()

    # --- the end -----------------------------------------------------------------------------

    async def leave(self) -> None:
        """Stay behind for the grace time, where nobody else does; then stop."""
        sharing, backend = self._sharing, self._backend
        if sharing is None or backend is None:
            return
        try:
            async with sharing.turn:
                if self._hurried or not sharing.takeLingering():
                    # Whoever lingers already waits anew from now on, and has been counted.
                    await self._stop(backend)
                    return
            while not await self._lingered(sharing, backend):
                pass
        except ConchKernelError as error:
            self._log.warn("not left in order: {reason}", reason=str(error))
        finally:
            sharing.close()

    async def _lingered(self, sharing: SharedState, backend: JupyterBackend) -> bool:
        """Wait until the last use is long enough ago, and stop; whether that was all."""
        left = self._settings.linger - sharing.secondsSinceLastUse()
        while left > 0 and not self._hurried:
            await self._sleep(left)
            left = self._settings.linger - sharing.secondsSinceLastUse()
        async with sharing.turn:
            if not self._hurried and sharing.secondsSinceLastUse() < self._settings.linger:
                return False
            await self._stop(backend)
            sharing.stopLingering()
            return True

    async def _sleep(self, seconds: float) -> None:
        self._waiting = deferLater(self._reactor, seconds)
        try:
            await self._waiting
        except CancelledError:
            pass
        finally:
            self._waiting = None

    async def _stop(self, backend: JupyterBackend) -> None:
        stopping = Deferred.fromCoroutine(backend.stop())
        try:
            await stopping.addTimeout(_STOP_SECONDS, self._reactor)
        except TimeoutError:
            self._log.warn("Jupyter did not confirm in time that all was ended")


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
