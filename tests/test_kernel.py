"""The road to a kernel: what is begun when nobody wants it any more is still removed."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from conchkernel import frames
from conchkernel.errors import JupyterError, LinkLost
from conchkernel.jupyter.kernel import ENDING_SECONDS, KernelCarrier, KernelRoad
from conchkernel.jupyter.rest import KernelModel

WANTED = "11111111-2222-3333-4444-555555555555"


class Server:
    """A Jupyter server that answers when it is told to, and starts kernels all the same."""

    def __init__(self, *, takesIds: bool) -> None:
        self.takesIds = takesIds
        self.kernels: set[str] = set()
        self.answers: list[Deferred[None]] = []

    async def _answer(self) -> None:
        answer: Deferred[None] = Deferred()
        self.answers.append(answer)
        await answer

    async def kernel(self, kernelId: str) -> KernelModel | None:
        """Whether there is such a kernel."""
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

    async def delete_kernel(self, kernelId: str) -> None:
        """At once."""
        self.kernels.discard(kernelId)

    async def delete_session(self, session: str) -> None:
        """At once, with its kernel."""
        self.kernels.discard("s")


@pytest.mark.parametrize(("takesIds", "answers"), [(True, 0), (False, 0), (False, 1)])
@pytest_twisted.ensureDeferred
async def test_a_stop_while_a_kernel_is_started_leaves_none(tmp_path, takesIds, answers):
    """The request is on its way; its answer is waited for, since it tells what to delete."""
    server = Server(takesIds=takesIds)
    road = KernelRoad(
        Clock(),
        server,
        kernelId=WANTED,
        kernelName=None,
        agentId="0" * 16,
        secret="",
        orphanTimeout=1.0,
        memory=tmp_path / "kernel",
        creation=nullcontext(),
    )
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
