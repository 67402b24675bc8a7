"""The gateway's beginning and end, with a backend that does as it is told."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint, connectProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock

from conchkernel.errors import ConfigurationError, JupyterUnreachable
from conchkernel.service import LAST_RETRY, START_TIME_LIMIT, STOP_TIME_LIMIT, GatewayService


class Backend:
    """Counts its starts and stops; fails as often as it has failures."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls: list[str] = []
        self.hang = ""

    async def start(self) -> None:
        """Fail, hang or be started."""
        await self._called("start")
        if self.failures:
            raise self.failures.pop(0)

    async def stop(self) -> None:
        """Hang or be stopped."""
        await self._called("stop")

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.hang == name:
            await Deferred()


def listenable(port: int = 0) -> list[tuple[str, Any]]:
    """One endpoint on loopback."""
    return [("somewhere", TCP4ServerEndpoint(reactor, port, interface="127.0.0.1"))]


@pytest_twisted.ensureDeferred
async def test_listensThenStartsTheBackend() -> None:
    """Whoever waits is told once the ports are bound and the backend is up; a stop undoes both."""
    backend = Backend()
    service = GatewayService(Clock(), backend, Factory(), listenable())
    service.startService()
    await service.whenStarted()
    assert len(service.ports) == 1
    assert backend.calls == ["start"]
    await service.stopService()
    assert not service.ports
    assert backend.calls == ["start", "stop"]


@pytest_twisted.ensureDeferred
async def test_privilegedStartBindsOnly() -> None:
    """Ports are bound while there is the right to; the backend starts later, once."""
    backend = Backend()
    service = GatewayService(Clock(), backend, Factory(), listenable())
    service.privilegedStartService()
    assert len(service.ports) == 1
    assert not backend.calls
    service.startService()
    await service.whenStarted()
    assert len(service.ports) == 1
    await service.stopService()


@pytest_twisted.ensureDeferred
async def test_canBeStartedAgain() -> None:
    """A service that was stopped starts as if it were new."""
    backend = Backend(JupyterUnreachable("gone"))
    service = GatewayService(Clock(), backend, Factory(), listenable())
    service.startService()
    with pytest.raises(JupyterUnreachable):
        await service.whenStarted()
    await service.stopService()
    service.startService()
    await service.whenStarted()
    assert len(service.ports) == 1
    await service.stopService()


@pytest_twisted.ensureDeferred
async def test_failureIsToldToEverybodyWhoAsks() -> None:
    """Before and after the fact alike; and nothing was done to the process."""
    service = GatewayService(
        Clock(), Backend(JupyterUnreachable("nothing there")), Factory(), listenable()
    )
    early = service.whenStarted()
    service.startService()
    for waiting in (early, service.whenStarted()):
        with pytest.raises(JupyterUnreachable, match="nothing there"):
            await waiting
    await service.stopService()


@pytest_twisted.ensureDeferred
async def test_takenPortCostsNoKernel() -> None:
    """The backend is not started where the gateway cannot listen."""
    first = GatewayService(Clock(), Backend(), Factory(), listenable())
    first.startService()
    await first.whenStarted()
    port = first.ports[0].getHost().port  # type: ignore[attr-defined]
    backend = Backend()
    second = GatewayService(Clock(), backend, Factory(), listenable(port))
    second.startService()
    with pytest.raises(ConfigurationError, match=r"somewhere: .*in use"):
        await second.whenStarted()
    assert not backend.calls
    await second.stopService()
    await first.stopService()


@pytest_twisted.ensureDeferred
async def test_waitsForJupyter() -> None:
    """With patience, failures are retried with growing pauses until it works."""
    clock = Clock()
    backend = Backend(*[JupyterUnreachable("not yet")] * 8)
    service = GatewayService(clock, backend, Factory(), listenable(), waitForBackend=True)
    service.startService()
    started = service.whenStarted()
    pauses = []
    while not started.called:
        (pause,) = [call.getTime() - clock.seconds() for call in clock.getDelayedCalls()]
        pauses.append(pause)
        clock.advance(pause)
    await started
    assert pauses == [1, 2, 4, 8, 16, LAST_RETRY, LAST_RETRY, LAST_RETRY]
    await service.stopService()


@pytest_twisted.ensureDeferred
async def test_stopWhileWaiting() -> None:
    """A stop ends the patience, and leaves no call behind."""
    clock = Clock()
    backend = Backend(JupyterUnreachable("not yet"))
    service = GatewayService(clock, backend, Factory(), listenable(), waitForBackend=True)
    service.startService()
    started = service.whenStarted()
    await service.stopService()
    with pytest.raises(CancelledError):
        await started
    assert not clock.getDelayedCalls()
    assert backend.calls == ["start", "stop"]


@pytest.mark.parametrize("patient", [True, False])
@pytest_twisted.ensureDeferred
async def test_stopIsNotTakenForAFailure(patient: bool) -> None:
    """A request that is cancelled looks like a server that does not answer; nobody tries again."""

    class Asking(Backend):
        async def start(self) -> None:
            self.calls.append("start")
            try:
                await Deferred()
            except CancelledError:
                raise JupyterUnreachable("no answer") from None

    clock = Clock()
    backend = Asking()
    service = GatewayService(clock, backend, Factory(), listenable(), waitForBackend=patient)
    service.startService()
    started = service.whenStarted()
    await service.stopService()
    with pytest.raises(CancelledError):
        await started
    assert not clock.getDelayedCalls()
    assert backend.calls == ["start", "stop"]


@pytest_twisted.ensureDeferred
async def test_startHasALimit() -> None:
    """A Jupyter that accepts and never answers is a failure in good time."""
    clock = Clock()
    backend = Backend()
    backend.hang = "start"
    service = GatewayService(clock, backend, Factory(), listenable())
    service.startService()
    started = service.whenStarted()
    clock.advance(START_TIME_LIMIT)
    with pytest.raises(JupyterUnreachable):
        await started
    await service.stopService()


@pytest_twisted.ensureDeferred
async def test_stopHasALimit() -> None:
    """A Jupyter that does not answer does not keep the gateway from ending."""
    clock = Clock()
    backend = Backend()
    backend.hang = "stop"
    service = GatewayService(clock, backend, Factory(), listenable())
    service.startService()
    await service.whenStarted()
    stopped = service.stopService()
    while not stopped.called and not clock.getDelayedCalls():
        turn: Deferred[None] = Deferred()
        reactor.callLater(0, turn.callback, None)  # type: ignore[attr-defined]
        await turn
    clock.advance(STOP_TIME_LIMIT)
    await stopped


@pytest_twisted.ensureDeferred
async def test_stopClosesConnections() -> None:
    """Once the backend has ended what it had to say, clients are gone too."""
    ends: list[str] = []
    backend = Backend()

    class Client(Protocol):
        def connectionLost(self, reason: object = None) -> None:
            ends.append(backend.calls[-1])
            lost.callback(None)

    lost: Deferred[None] = Deferred()
    service = GatewayService(reactor, backend, Factory.forProtocol(Protocol), listenable())
    service.startService()
    await service.whenStarted()
    port = service.ports[0].getHost().port  # type: ignore[attr-defined]
    endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port)
    await connectProtocol(endpoint, Client())
    await service.stopService()
    await lost
    assert ends == ["stop"]


@pytest_twisted.ensureDeferred
async def test_stopCutsOffWhoTakesNothing() -> None:
    """A client that stands still keeps its connection no longer than a second."""
    ends: list[object] = []

    class Server(Protocol):
        def connectionMade(self) -> None:
            assert self.transport is not None
            self.transport.write(bytes(50_000_000))

        def connectionLost(self, reason: object = None) -> None:
            ends.append(reason)

    class Client(Protocol):
        def connectionMade(self) -> None:
            self.transport.pauseProducing()  # type: ignore[union-attr]

    service = GatewayService(reactor, Backend(), Factory.forProtocol(Server), listenable())
    service.startService()
    await service.whenStarted()
    port = service.ports[0].getHost().port  # type: ignore[attr-defined]
    client = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), Client())
    await service.stopService()
    assert len(ends) == 1
    client.transport.abortConnection()  # type: ignore[union-attr]
