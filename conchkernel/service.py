"""A gateway with a beginning and an end: listening ports, a backend, and who is told of failure.

Knows neither SSH nor Jupyter, only that there is a factory to listen with and something that
starts and stops. It never ends a process: a start that failed is told to whoever asked
:meth:`GatewayService.whenStarted`, and logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, TimeoutError, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from conchkernel.errors import (
    ConchKernelError,
    ConfigurationError,
    JupyterError,
    JupyterUnreachable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twisted.internet.interfaces import (
        IListeningPort,
        IProtocol,
        IProtocolFactory,
        IReactorTime,
        IStreamServerEndpoint,
    )

#: Seconds that a start may take before it has failed; the user has been promised 30.
START_TIME_LIMIT = 25.0

#: Seconds that a stop may take; service managers lose patience after 15 to 90.
STOP_TIME_LIMIT = 14.0

#: Seconds that a client may take for what was written to it before.
CLOSE_TIME_LIMIT = 1.0
_LOOK_SECONDS = 0.02

#: Seconds between attempts while waiting for Jupyter: doubling from the first to the last.
FIRST_RETRY, LAST_RETRY = 1.0, 30.0


class StartStop(Protocol):
    """A backend as this service sees it."""

    async def start(self) -> None:
        """Become usable.

        :raises conchkernel.errors.JupyterError: with a sentence for the operator.
        """

    async def stop(self) -> None:
        """Undo :meth:`start`, also one that failed or was cancelled half-way. Idempotent."""


class _Remembering(Factory):
    """A factory that can close what another one made, and is on no byte's way."""

    noisy = False

    def __init__(self, factory: IProtocolFactory) -> None:
        self._factory = factory
        self._made: WeakSet[IProtocol] = WeakSet()

    def startFactory(self) -> None:
        self._factory.doStart()

    def stopFactory(self) -> None:
        self._factory.doStop()

    def buildProtocol(self, addr: Any) -> Any:
        """What the other factory makes."""
        protocol = self._factory.buildProtocol(addr)
        if protocol is not None:
            self._made.add(protocol)
        return protocol

    async def closeAll(self, reactor: IReactorTime) -> None:
        """Close the connections that are still there, after what is written already, but cut off
        who does not take it."""
        left = self._transports()
        for transport in left:
            transport.loseConnection()
        patience = CLOSE_TIME_LIMIT
        while left and patience > 0:
            await deferLater(reactor, _LOOK_SECONDS)
            patience -= _LOOK_SECONDS
            left = self._transports()
        for transport in left:
            transport.abortConnection()
        if left:
            await deferLater(reactor, 0)  # as late as their protocols are told

    def _transports(self) -> list[Any]:
        """Of the connections that are there."""
        transports = [getattr(protocol, "transport", None) for protocol in list(self._made)]
        return [one for one in transports if getattr(one, "connected", False)]


class GatewayService(Service):
    """Listens and keeps a backend started for as long as it runs.

    Ports are bound first, in ``privilegedStartService`` where there is one, so that a port below
    1024 can be had and a port that is taken costs no kernel. What a client that comes before the
    backend is ready gets to hear is the backend's word.

    :ivar ports: what is being listened on, once started.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IReactorTime,
        backend: StartStop,
        factory: IProtocolFactory,
        endpoints: Sequence[tuple[str, IStreamServerEndpoint]],
        *,
        waitForBackend: bool = False,
    ) -> None:
        """
        :param endpoints: where to listen, each with the operator's words for it.
        :param waitForBackend: try again, without end, while the backend cannot be started.
        """
        self.ports: list[IListeningPort] = []
        self._reactor = reactor
        self._backend = backend
        self._factory = _Remembering(factory)
        self._endpoints = endpoints
        self._waitForBackend = waitForBackend
        self._listening: list[Deferred[None]] | None = None
        self._starting: Deferred[None] | None = None
        self._outcome: Failure | bool | None = None
        self._waiters: list[Deferred[None]] = []

    def whenStarted(self) -> Deferred[None]:
        """Fires when the backend is up and every port listens; fails with what went wrong.

        :raises conchkernel.errors.ConchKernelError: (as failure) with a sentence.
        :raises twisted.internet.defer.CancelledError: (as failure) if stopped before that.
        """
        waiter: Deferred[None] = Deferred()
        self._waiters.append(waiter)
        self._tellWaiters()
        return waiter

    def privilegedStartService(self) -> None:
        """Bind the ports, while the process may still have the right to."""
        super().privilegedStartService()
        self._listen()

    def startService(self) -> None:
        """Begin to start; :meth:`whenStarted` tells the end of it."""
        super().startService()
        self._outcome = None
        self._listen()
        self._starting = Deferred.fromCoroutine(self._start())
        self._starting.addCallbacks(self._started, self._failed)

    def stopService(self) -> Deferred[None]:
        """Stop listening and undo what was started; the Deferred fires when all of it is gone."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    def _listen(self) -> None:
        if self._listening is None:
            self._listening = [
                Deferred.fromCoroutine(self._listenOn(name, endpoint))
                for name, endpoint in self._endpoints
            ]

    async def _listenOn(self, name: str, endpoint: IStreamServerEndpoint) -> None:
        try:
            port = await endpoint.listen(self._factory)
        except (CannotListenError, OSError) as error:
            raise ConfigurationError(f"Cannot listen on {name}: {_reason(error)}.") from error
        self.ports.append(port)
        self._log.info("Listening on {address}", address=port.getHost())

    async def listening(self) -> None:
        """Wait until every port listens, once :meth:`privilegedStartService` has bound them.

        :raises conchkernel.errors.ConfigurationError: where one cannot be listened on.
        """
        for listening in self._listening or ():
            await listening

    async def _start(self) -> None:
        await self.listening()
        if self._waitForBackend:
            await self._startPatiently()
        else:
            await self._startBackend()

    async def _startBackend(self) -> None:
        starting = Deferred.fromCoroutine(self._backend.start())
        try:
            await starting.addTimeout(START_TIME_LIMIT, self._reactor)
        except TimeoutError:
            raise JupyterUnreachable(
                f"Jupyter did not start a kernel within {START_TIME_LIMIT:.0f} s; look at its log."
            ) from None

    async def _startPatiently(self) -> None:
        delay = FIRST_RETRY
        told = ""
        while True:
            try:
                return await self._startBackend()
            except JupyterError as error:
                if not self.running:
                    raise  # by the stop: a request that is cancelled has no answer either
                if str(error) != told:
                    told = str(error)
                    self._log.warn("Waiting for Jupyter: {reason}", reason=told)
            await deferLater(self._reactor, delay)
            delay = min(2 * delay, LAST_RETRY)

    def _started(self, _: object) -> None:
        self._starting = None
        self._outcome = True
        self._log.info("Ready")
        self._tellWaiters()

    def _failed(self, failure: Failure) -> None:
        self._starting = None
        if not self.running and failure.check(JupyterError):
            failure = Failure(CancelledError())  # what a stop broke off tells nothing
        self._outcome = failure
        if failure.check(ConchKernelError):
            self._log.error("Could not start: {reason}", reason=failure.getErrorMessage())
        elif not failure.check(CancelledError):
            self._log.failure("Could not start", failure)
        self._tellWaiters()

    def _tellWaiters(self) -> None:
        if self._outcome is None:
            return
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if isinstance(self._outcome, Failure):
                waiter.errback(self._outcome)
            else:
                waiter.callback(None)

    async def _stop(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        for listening in self._listening or ():
            listening.cancel()
            listening.addErrback(lambda _: None)  # was told as the start's failure
        self._listening = None
        ports, self.ports = self.ports, []
        for port in ports:
            await maybeDeferred(port.stopListening)
        await self._stopBackend()
        # After the sessions have told their clients why they end.
        await self._factory.closeAll(self._reactor)

    async def _stopBackend(self) -> None:
        stopping = Deferred.fromCoroutine(self._backend.stop())
        try:
            await stopping.addTimeout(STOP_TIME_LIMIT, self._reactor)
        except TimeoutError:
            self._log.warn(
                "Jupyter did not confirm within {limit} s that all was ended", limit=STOP_TIME_LIMIT
            )
        except JupyterError as error:
            self._log.warn("Jupyter was left untidy: {reason}", reason=str(error))
        except Exception:  # a defect; whoever stops us has more to stop
            self._log.failure("Stopping the backend")


def _reason(error: CannotListenError | OSError) -> str:
    """``Address already in use`` rather than ``[Errno 98] Address already in use``."""
    if isinstance(error, CannotListenError):
        error = error.socketError
    return getattr(error, "strerror", None) or str(error)
