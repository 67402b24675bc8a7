"""The channels of real kernels on servers of every age."""

from __future__ import annotations

import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import globalLogPublisher
from twisted.web import resource, server

from conchkernel.errors import (
    JupyterError,
    JupyterUnreachable,
    KernelRefused,
    LinkLost,
    NotJupyter,
    TokenRefused,
)
from conchkernel.jupyter import channels as module
from conchkernel.jupyter.channels import KernelChannels, connect_channels
from conchkernel.jupyter.discovery import discover
from conchkernel.jupyter.proxy import RoadAgent, TrustPolicy, make_agent
from conchkernel.jupyter.rest import JupyterClient
from conchkernel.jupyter.urls import JupyterLocation
from conchkernel.jupyter.websocket import transport_of
from tests.jupyters import start_jupyter
from tests.kernelecho import Carriers, installEcho, kernelOn
from tests.ports import free_port
from tests.roads import Authority, proxying, terminating

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from twisted.logger import LogEvent

    from tests.jupyters import RunningJupyter


@asynccontextmanager
async def clientOf(jupyter: RunningJupyter) -> AsyncIterator[JupyterClient]:
    """A client, closed in the end."""
    agent = make_agent(reactor)
    try:
        yield await discover(reactor, jupyter.pasted, agent=agent)
    finally:
        await agent.close()


@asynccontextmanager
async def opened(
    client: JupyterClient, kernel: str, clock: Any = reactor
) -> AsyncIterator[tuple[KernelChannels, Carriers]]:
    """A connection, closed in the end."""
    carriers = Carriers()
    channels = await connect_channels(
        clock, client, kernel, on_carrier=carriers.received, on_lost=carriers.hasLost
    )
    try:
        yield channels, carriers
    finally:
        channels.close()
        await channels.when_closed()


@asynccontextmanager
async def echoing(
    jupyter: RunningJupyter,
) -> AsyncIterator[tuple[JupyterClient, KernelChannels, Carriers]]:
    """A connection to a kernel that echoes."""
    async with (
        clientOf(jupyter) as client,
        kernelOn(client) as kernel,
        opened(client, kernel) as (channels, carriers),
    ):
        await installEcho(channels)
        yield client, channels, carriers


async def exchange(channels: KernelChannels, carriers: Carriers) -> None:
    """Carriers of every interesting size go there and come back, in their order."""
    sizes = [0, 1, 2, 100, 125, 126, 4096, 65535, 65536, 262144, 262145, 1000000]
    wanted = [os.urandom(size) for size in sizes]
    for payload in wanted:
        half = len(payload) // 2
        channels.send_carrier([payload[:half], memoryview(payload)[half:]])
    assert await carriers.count(reactor, len(wanted)) == wanted
    assert carriers.got == []


@pytest_twisted.ensureDeferred
async def test_carriers(jupyter: RunningJupyter) -> None:
    """Byte-exact both ways on every stack, in the v1 framing."""
    async with echoing(jupyter) as (_, channels, carriers):
        assert not channels.legacy
        await exchange(channels, carriers)


@pytest_twisted.ensureDeferred
async def test_legacyCarriers(
    jupyter: RunningJupyter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where the server does not select the v1 framing."""
    monkeypatch.setattr(module, "OFFERED", [])
    async with echoing(jupyter) as (_, channels, carriers):
        assert channels.legacy
        await exchange(channels, carriers)
        # Replies in the legacy framing have been read already, to install the echo.
        reply = await channels.request("shell", "kernel_info_request", {}, 30)
        assert reply["status"] == "ok"


@pytest_twisted.ensureDeferred
async def test_requests(jupyter: RunningJupyter) -> None:
    """Each request gets its own answer, whatever else is said meanwhile."""
    async with (
        clientOf(jupyter) as client,
        kernelOn(client) as kernel,
        opened(client, kernel) as (channels, carriers),
    ):
        code = "print('x' * 5000); 1/0"
        content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
        failing = channels.request("shell", "execute_request", content, 60)
        told = await channels.request("control", "kernel_info_request", {}, 60)
        assert told["language_info"]["name"] == "python"
        reply = await failing
        assert (reply["status"], reply["ename"]) == ("error", "ZeroDivisionError")
        assert channels._requests == {}
        assert carriers.got == []


@pytest_twisted.ensureDeferred
async def test_foreignCarriersAreNotOurs(currentJupyter: RunningJupyter) -> None:
    """Two connections to one kernel: each gets what is for it."""
    async with echoing(currentJupyter) as (client, channels, carriers):
        kernel = channels.factory.path.split("/")[-2]
        async with opened(client, kernel) as (other, others):
            other.send_carrier([b"theirs"])
            channels.send_carrier([b"ours"])
            assert await carriers.count(reactor, 1) == [b"ours"]
            assert await others.count(reactor, 1) == [b"theirs"]


@pytest_twisted.ensureDeferred
async def test_requestsEnd(currentJupyter: RunningJupyter) -> None:
    """A request that is late, cancelled or cut off fails with an error of ours, at once."""
    async with clientOf(currentJupyter) as client, kernelOn(client) as kernel:
        async with opened(client, kernel) as (channels, _):
            busy = {"code": "import time; time.sleep(60)", "silent": True}
            late = channels.request("shell", "execute_request", busy, 0.1)
            with pytest.raises(KernelRefused, match=r"did not answer a execute_request|busy"):
                await late
            cut = channels.request("shell", "kernel_info_request", {}, 60)
            cancelled = channels.request("shell", "kernel_info_request", {}, 60)
            cancelled.addErrback(lambda failure: failure.type.__name__)
            cancelled.cancel()
            assert await cancelled == "CancelledError"
            with pytest.raises(ValueError, match="longer than"):
                await channels.request("shell", "x", {"code": "x" * 10_000_000}, 60)
        with pytest.raises(LinkLost):
            await cut
        with pytest.raises(LinkLost):
            await channels.request("shell", "kernel_info_request", {}, 60)


@pytest_twisted.ensureDeferred
async def test_lostOnce(currentJupyter: RunningJupyter) -> None:
    """A connection that breaks is told of once, with an error of ours; sending is harmless."""
    async with clientOf(currentJupyter) as client, kernelOn(client) as kernel:
        async with opened(client, kernel) as (channels, carriers):
            waiting = channels.request("shell", "kernel_info_request", {}, 60)
            waiting.addErrback(lambda failure: failure.type)
            transport_of(channels).socket.shutdown(2)
            await channels.when_closed()
            assert [type(reason) for reason in carriers.lost] == [LinkLost]
            assert await waiting in (LinkLost, dict)
            channels.send_carrier([b"x"])
            channels.close()
            channels.abort()
        assert len(carriers.lost) == 1


@pytest_twisted.ensureDeferred
async def test_closedByUs(currentJupyter: RunningJupyter) -> None:
    """Whoever closes is not told that the connection is lost, and nothing is sent any more."""
    async with clientOf(currentJupyter) as client, kernelOn(client) as kernel:
        for end in (KernelChannels.close, KernelChannels.abort):
            async with opened(client, kernel) as (channels, carriers):
                end(channels)
                end(channels)
                written: list[bytes] = []
                channels.transport.write = written.append
                channels.send_carrier([b"x"])
                assert written == []
                await channels.when_closed()
                assert carriers.lost == []


@pytest_twisted.ensureDeferred
async def test_serverEnds() -> None:
    """A server that goes away, gently or not, is noticed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        server = start_jupyter("current")
        try:
            async with clientOf(server) as client:
                kernel = await client.create_kernel()
                async with opened(client, kernel.id) as (channels, carriers):
                    os.kill(server.pid, number)
                    await channels.when_closed().addTimeout(30, reactor)
                    assert [type(reason) for reason in carriers.lost] == [LinkLost]
        finally:
            server.stop()


@pytest_twisted.ensureDeferred
async def test_closedByServer(
    currentJupyter: RunningJupyter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the server closes we are told at once, and not a byte of data follows the Close.

    A second connection with the same session id makes it do so.
    """
    async with clientOf(currentJupyter) as client, kernelOn(client) as kernel:
        monkeypatch.setattr(module.secrets, "token_hex", lambda count: "5e" * count)
        async with opened(client, kernel) as (first, carriers):
            lost: Deferred[Exception] = Deferred()
            first._onLost = lost.callback
            async with opened(client, kernel):
                reason = await lost.addTimeout(30, reactor)
                assert isinstance(reason, LinkLost)
                assert "closed" in str(reason)
                assert first.state == first.STATE_CLOSED
                first.send_carrier([b"x"])
                assert carriers.lost == []


@pytest_twisted.ensureDeferred
async def test_noSuchKernel(jupyter: RunningJupyter) -> None:
    """Asked for a kernel that is not there, or with a wrong token."""
    async with clientOf(jupyter) as client:
        with pytest.raises(KernelRefused, match="gone"):
            await connect_channels(
                reactor, client, "00000000-0000", on_carrier=print, on_lost=pytest.fail
            )
        async with kernelOn(client) as kernel:
            location = JupyterLocation(client.location.base, "hunter2")
            stranger = JupyterClient(reactor, location, client.agent)
            with pytest.raises(TokenRefused) as caught:
                await connect_channels(
                    reactor, stranger, kernel, on_carrier=print, on_lost=pytest.fail
                )
            assert "hunter2" not in str(caught.value)


@pytest_twisted.ensureDeferred
async def test_pausedAndResumed(currentJupyter: RunningJupyter) -> None:
    """When the server does not read we are not writable, and told when that is over."""
    server = start_jupyter("current")
    try:
        async with echoing(server) as (_, channels, carriers):
            resumed: Deferred[None] = Deferred()
            paused: list[bool] = []
            channels.on_paused = lambda: paused.append(channels.writable)
            channels.on_resumed = lambda: resumed.callback(None)
            assert channels.writable
            os.kill(server.pid, signal.SIGSTOP)
            count = 0
            while not paused:
                channels.send_carrier([b"quiet ", bytes(250_000)])
                count += 1
                assert count < 1000
                turn: Deferred[None] = Deferred()
                reactor.callLater(0, turn.callback, None)
                await turn
            assert paused == [False]
            os.kill(server.pid, signal.SIGCONT)
            await resumed.addTimeout(30, reactor)
            assert channels.writable
            channels.send_carrier([b"sink"])
            assert await carriers.count(reactor, 1) == [b"%d" % (count * 250_006)]
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.stop()


@pytest_twisted.ensureDeferred
async def test_roads(currentJupyter: RunningJupyter, tmp_path: Path) -> None:
    """The WebSocket goes the same roads as REST: TLS of a private authority, through a proxy."""
    authority = Authority(tmp_path)
    port = int(currentJupyter.url.rstrip("/").rpartition(":")[2])
    async with (
        terminating(reactor, authority.certify("jupyter.test"), port) as secure,
        proxying(reactor) as (proxy, proxyPort),
    ):
        environment = {"HTTPS_PROXY": f"127.0.0.1:{proxyPort}"}
        agent = RoadAgent(reactor, TrustPolicy(authority.file), environment)
        url = f"https://jupyter.test:{secure}/?token={currentJupyter.token}"
        client = await discover(reactor, url, agent=agent)
        async with kernelOn(client) as kernel, opened(client, kernel) as (channels, carriers):
            await installEcho(channels)
            await exchange(channels, carriers)
            assert transport_of(channels).bufferSize == module.READ_BYTES
            assert transport_of(channels).getTcpNoDelay()
        assert len(proxy.heard) == 2
        await agent.close()
        # The same without the authority: TLS fails after TCP, and is told as what it is.
        strange = JupyterClient(
            reactor, client.location, RoadAgent(reactor, TrustPolicy(), environment)
        )
        with pytest.raises(JupyterUnreachable, match="--jupyter-ca"):
            await connect_channels(
                reactor, strange, "x", on_carrier=print, on_lost=pytest.fail
            )


@pytest_twisted.ensureDeferred
async def test_nodelay(currentJupyter: RunningJupyter) -> None:
    """Nagle is off, the reads are long."""
    async with (
        clientOf(currentJupyter) as client,
        kernelOn(client) as kernel,
        opened(client, kernel) as (channels, _),
    ):
        assert channels.transport.getTcpNoDelay()
        assert channels.transport.bufferSize == module.READ_BYTES


@pytest_twisted.ensureDeferred
async def test_nothingListens(unusedPort: int) -> None:
    """The server is gone when we come again."""
    agent = make_agent(reactor)
    client = JupyterClient(reactor, JupyterLocation(f"http://127.0.0.1:{unusedPort}"), agent)
    with pytest.raises(JupyterUnreachable, match="nothing listens"):
        await connect_channels(reactor, client, "x", on_carrier=print, on_lost=pytest.fail)


@pytest.fixture
def unusedPort() -> int:
    """A port that was free a moment ago."""
    return free_port()


@pytest.mark.parametrize(
    ("head", "error", "sentence"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: /hub/user/a/", KernelRefused, "start it at http"),
        (b"HTTP/1.1 424 Failed Dependency", KernelRefused, "start it at http"),
        (b"HTTP/1.1 302 Found\r\nLocation: /login", TokenRefused, "token"),
        (b"HTTP/1.1 403 Forbidden", TokenRefused, "a proxy in between lets no WebSocket through"),
        (b"HTTP/1.1 200 OK", NotJupyter, "does not pass WebSockets on"),
        (b"HTTP/1.1 400 Bad", NotJupyter, "does not pass WebSockets on"),
        (b"HTTP/1.0 101 Old", NotJupyter, "does not pass WebSockets on"),
        (b"HTTP/1.1 101 Fine\r\nUpgrade: h2c", NotJupyter, "does not pass WebSockets on"),
        (b"HTTP/1.1 \xff", NotJupyter, "does not pass WebSockets on"),
        (b"HTTP/1.1 503 Busy", JupyterUnreachable, "cannot reach"),
        (b"HTTP/1.1 500 Oh", KernelRefused, "HTTP 500"),
        (b"", JupyterUnreachable, "closed the connection"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_refusedUpgrades(head: bytes, error: type[Exception], sentence: str) -> None:
    """What a server or a proxy says instead of switching protocols."""
    async with proxying(reactor, head + b"\r\n\r\n" if head else b"") as (_, port):
        agent = RoadAgent(reactor, TrustPolicy(), {})
        location = JupyterLocation(f"http://127.0.0.1:{port}", "hunter2")
        client = JupyterClient(reactor, location, agent)
        with pytest.raises(error, match=sentence) as caught:
            await connect_channels(reactor, client, "x", on_carrier=print, on_lost=pytest.fail)
        assert "hunter2" not in str(caught.value)


@pytest_twisted.ensureDeferred
async def test_silentUpgrade() -> None:
    """A server that says nothing is left after a time."""
    async with proxying(reactor, b"HTTP/1.1 101 ", hangsUp=False) as (_, port):
        client = JupyterClient(
            reactor, JupyterLocation(f"http://127.0.0.1:{port}"), make_agent(reactor)
        )
        with pytest.raises(JupyterUnreachable, match="in time"):
            await connect_channels(
                reactor, client, "x", on_carrier=print, on_lost=pytest.fail, patience=0.2
            )


@pytest.mark.parametrize(
    ("state", "sentence"),
    [("starting", "the kernel python3 says nothing"), ("idle", "but no WebSocket")],
)
@pytest_twisted.ensureDeferred
async def test_silentAboutOneKernel(state: str, sentence: str) -> None:
    """A server that answers, but not our WebSocket, has a kernel without a word, or a proxy."""
    answer = b'{"id": "x", "name": "python3", "execution_state": "%s"}' % state.encode()

    class Answering(resource.Resource):
        isLeaf = True

        def render_GET(self, request: server.Request) -> bytes | int:
            return server.NOT_DONE_YET if request.path.endswith(b"/channels") else answer

    port = reactor.listenTCP(0, server.Site(Answering()), interface="127.0.0.1")
    agent = make_agent(reactor)
    client = JupyterClient(
        reactor, JupyterLocation(f"http://127.0.0.1:{port.getHost().port}"), agent
    )
    try:
        with pytest.raises(JupyterError, match=sentence):
            await connect_channels(
                reactor, client, "x", on_carrier=print, on_lost=pytest.fail, patience=0.2
            )
    finally:
        await agent.close()
        await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_cancelled() -> None:
    """Whoever stops waiting for a connection leaves none behind."""
    async with proxying(reactor, b"HTTP/1.1 101 ", hangsUp=False) as (server, port):
        client = JupyterClient(
            reactor, JupyterLocation(f"http://127.0.0.1:{port}"), make_agent(reactor)
        )
        connecting = Deferred.fromCoroutine(
            connect_channels(reactor, client, "x", on_carrier=print, on_lost=pytest.fail)
        )
        while not server.heard:
            turn: Deferred[None] = Deferred()
            reactor.callLater(0.001, turn.callback, None)
            await turn
        gone = server.whenIdle()
        connecting.cancel()
        with pytest.raises(JupyterUnreachable):
            await connecting
        await gone.addTimeout(30, reactor)


@pytest_twisted.ensureDeferred
async def test_tokensAndLogs(currentJupyter: RunningJupyter) -> None:
    """The token is in no URL that the server logs, and in nothing that we do."""
    events: list[str] = []

    def observe(event: LogEvent) -> None:
        events.append(str(event))

    globalLogPublisher.addObserver(observe)
    try:
        async with (
            clientOf(currentJupyter) as client,
            kernelOn(client) as kernel,
            opened(client, kernel) as (channels, _),
        ):
            assert currentJupyter.token not in repr(channels)
            assert currentJupyter.token not in repr(client)
        with pytest.raises(KernelRefused):
            await connect_channels(
                reactor, client, "gone", on_carrier=print, on_lost=pytest.fail
            )
    finally:
        globalLogPublisher.removeObserver(observe)
        await client.agent.close()
    assert not [event for event in events if currentJupyter.token in event]
    # It logs a request when it has answered it.
    while not (asked := [line for line in currentJupyter.log.splitlines() if "/api" in line]):
        await deferLater(reactor, 0.01)
    assert not [line for line in asked if currentJupyter.token in line]
