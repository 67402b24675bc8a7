"""The road to a kernel: what is begun when nobody wants it any more is still removed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from conchkernel import frames
from conchkernel.errors import JupyterError, JupyterUnreachable, KernelSilent, LinkLost
from conchkernel.jupyter import kernel as module
from conchkernel.jupyter.kernel import ENDING_SECONDS, KernelCarrier, KernelRoad
from conchkernel.jupyter.rest import KernelModel

WANTED = "11111111-2222-3333-4444-555555555555"


class Server:
    """A Jupyter server that answers when it is told to, and starts kernels all the same."""

    def __init__(self, *, takesIds: bool) -> None:
        self.takesIds = takesIds
        self.isThere = True
        self.kernels: set[str] = set()
        self.answers: list[Deferred[None]] = []

    async def _answer(self) -> None:
        answer: Deferred[None] = Deferred()
        self.answers.append(answer)
        await answer

    async def kernel(self, kernelId: str) -> KernelModel | None:
        """Whether there is such a kernel."""
        self._mustBeThere()
        return KernelModel(kernelId, "python3") if kernelId in self.kernels else None

    async def create_kernel(self, name: str | None, kernelId: str) -> KernelModel:
        """A kernel is started as soon as the request is there."""
        created = kernelId if self.takesIds else "a"
        self.kernels.add(created)
        await self._answer()
        return KernelModel(created, "python3")

    async def create_session(self, path: str, name: str | None) -> KernelModel:
        """So with a session."""
        self.kernels.add("s")
        await self._answer()
        return KernelModel("s", "python3", "session")

    def _mustBeThere(self) -> None:
        if not self.isThere:
            raise JupyterUnreachable("nothing listens there")

    async def delete_kernel(self, kernelId: str) -> None:
        """At once."""
        self._mustBeThere()
        self.kernels.discard(kernelId)

    async def delete_session(self, session: str) -> None:
        """At once, with its kernel."""
        self._mustBeThere()
        self.kernels.discard("s")


def roadTo(server: Server, memory: Path) -> KernelRoad:
    """A road that finds its kernel by ``memory``."""
    return KernelRoad(
        Clock(),
        server,
        kernelId=WANTED,
        kernelName=None,
        agentId="0" * 16,
        secret="",
        orphanTimeout=1.0,
        memory=memory,
        creation=nullcontext(),
    )


@pytest.mark.parametrize(("takesIds", "answers"), [(True, 0), (False, 0), (False, 1)])
@pytest_twisted.ensureDeferred
async def test_a_stop_while_a_kernel_is_started_leaves_none(tmp_path, takesIds, answers):
    """The request is on its way; its answer is waited for, since it tells what to delete."""
    server = Server(takesIds=takesIds)
    road = roadTo(server, tmp_path / "kernel")
    carrying = Deferred.fromCoroutine(road.carry(None))
    for _ in range(answers):
        server.answers.pop(0).callback(None)
    assert len(server.answers) == 1
    carrying.cancel()
    with pytest.raises((CancelledError, JupyterError)):
        await carrying
    removing = Deferred.fromCoroutine(road.remove())
    while server.answers:
        answer = server.answers.pop(0)
        if not answer.called:
            answer.callback(None)
    await removing
    assert not server.kernels


@pytest_twisted.ensureDeferred
async def test_a_kernel_is_remembered_until_it_is_gone(tmp_path):
    """A server that is away when a gateway comes, and still when it gives up, keeps the kernel of
    the one before: whoever comes next knows of it."""
    server = Server(takesIds=False)
    server.kernels.add("s")
    memory = tmp_path / "kernel"
    memory.write_text("s session\n")
    server.isThere = False
    road = roadTo(server, memory)
    for attempt in (road.carry(None), road.remove()):
        with pytest.raises(JupyterUnreachable):
            await attempt
    server.isThere = True
    await roadTo(server, memory).remove()
    assert not server.kernels
    assert not memory.exists()


class SlowServer(Server):
    """Its first kernels never say a word; the WebSockets are for :func:`connect`."""

    def __init__(self, silent: int) -> None:
        super().__init__(takesIds=True)
        self.silent = silent
        self.made = 0

    async def create_kernel(self, name: str | None, kernelId: str) -> KernelModel:
        """At once."""
        self.made += 1
        self.kernels.add(kernelId)
        return KernelModel(kernelId, "python3")

    async def connect(self, reactor, client, kernelId, *, patience, **listeners):
        """No kernel, or one that speaks no Python."""
        if self.made <= self.silent:
            raise KernelSilent(f"nothing in {patience:g} seconds")
        raise JupyterError("heard")


@pytest.mark.parametrize(
    ("silent", "told"),
    [(1, ["heard"]), (2, ["nothing in 10 seconds", "nothing in 15 seconds"])],
)
@pytest_twisted.ensureDeferred
async def test_a_new_kernel_that_says_nothing_is_replaced_once(
    tmp_path, monkeypatch, silent, told
):
    """A port of it may be another program's; but where each is slow, the second is waited for."""
    server = SlowServer(silent)
    monkeypatch.setattr(module, "connect_channels", server.connect)
    road = roadTo(server, tmp_path / "kernel")
    for words in told:
        with pytest.raises(JupyterError, match=words):
            await road.carry(None)
        assert (server.made, server.kernels) == (2, {WANTED})


@pytest_twisted.ensureDeferred
async def test_a_silent_kernel_that_was_there_stays(tmp_path, monkeypatch):
    """It is somebody's, and may be heard again."""
    server = SlowServer(1)
    server.kernels.add("s")
    (tmp_path / "kernel").write_text("s session\n")
    monkeypatch.setattr(module, "connect_channels", server.connect)
    with pytest.raises(KernelSilent, match="15 seconds"):
        await roadTo(server, tmp_path / "kernel").carry(None)
    assert (server.made, server.kernels) == (0, {"s"})


def test_a_kernel_that_ends_is_let_end() -> None:
    """The agent sees the end of it first; its server, asked for it then, lets us wait."""
    told: list[object] = []
    clock = Clock()
    carrier = KernelCarrier(SimpleNamespace(received=told.append, lost=told.append))
    carrier._channels = SimpleNamespace(close=lambda: None)
    carrier._keepAlive.clock = clock
    carrier._restarted()
    carrier.received(bytes([frames.LOST]))
    assert not told
    clock.advance(ENDING_SECONDS)
    (reason,) = told
    assert isinstance(reason, LinkLost)
