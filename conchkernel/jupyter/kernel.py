"""One kernel of the gateway's own, and the carriers that lead through it to its agent.

A :class:`KernelRoad` finds or creates the kernel, connects to its channels, puts the relay in, has
the agent started, and gives the :class:`~conchkernel.jupyter.link.Link` a carrier. It is asked
again after each loss, and does whatever of this is missing by then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from conchkernel import frames
from conchkernel.errors import KernelSilent, KernelUnsupported, LinkLost
from conchkernel.jupyter import injection
from conchkernel.jupyter.channels import HANDSHAKE_SECONDS, KernelChannels, connect_channels

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

    from conchkernel.jupyter.carrier import CarrierUser
    from conchkernel.jupyter.rest import JupyterClient, KernelModel

#: A kernel on a busy host may take this long to answer its first request.
KERNEL_SECONDS = 60.0
#: Later, with streams waiting, one that does not answer may be on its way out: look again.
AGAIN_SECONDS = 10.0
#: One that is silent for so long may be at somebody's cell, and have our relay still.
BUSY_SECONDS = 2.0
START_SECONDS = 30.0
#: For the first word of a kernel that was made because the one before it said none.
SECOND_SECONDS = 10.0
#: A kernel that has said goodbye still looks alive to its server for so long.
ENDING_SECONDS = 1.0
#: Cullers look for activity of kernels, in which a carrier's bytes have no part. Of what costs
#: nothing, jupyter_server counts this request; ``kernel_info_request`` it does not.
KEEP_ALIVE_SECONDS = 60.0
KEEP_ALIVE = ("is_complete_request", {"code": ""})


class KernelCarrier:
    """Messages over one WebSocket: its control channel, or that of stdin."""

    def __init__(self, user: CarrierUser) -> None:
        self._user: CarrierUser | None = user
        self._channels: KernelChannels | None = None
        self._started: Deferred[dict[str, Any]] | None = None
        #: Fires with the kernel's answer, or with ``None`` when its relay was quicker.
        self._stands: Deferred[dict[str, Any] | None] | None = None
        self._keepAlive = LoopingCall(self._sayAlive)
        self._leaving: IDelayedCall | None = None

    # --- the link's side ---------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """Whether the WebSocket's socket takes more."""
        return self._channels is not None and self._channels.writable

    def send(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Send one message."""
        if self._channels is not None:
            self._channels.send_carrier(parts)

    def close(self) -> None:
        """Give the WebSocket up."""
        self._user = None
        if self._keepAlive.running:
            self._keepAlive.stop()
        if self._leaving is not None and self._leaving.active():
            self._leaving.cancel()
        channels, self._channels = self._channels, None
        if channels is not None:
            channels.close()

    # --- the channels' side ------------------------------------------------------------------

    def received(self, message: bytes | memoryview) -> None:
        """One message of the relay."""
        if message[:1] == bytes([frames.STARTED]):
            started, self._started = self._started, None
            if started is not None:
                try:
                    started.callback(frames.body_of(message))
                except frames.WireViolation as violation:
                    started.errback(LinkLost(str(violation)))
        elif self._stands is not None:
            if message[:1] == bytes([frames.LOST]) and not self._stands.called:
                self._stands.callback(None)
        elif self._leaving is not None and message[:1] == bytes([frames.LOST]):
            pass  # that is known, and it is too early to look for the next kernel
        elif self._user is not None:
            self._user.received(message)

    def lost(self, error: Exception) -> None:
        """The WebSocket is gone."""
        started, self._started = self._started, None
        if started is not None:
            started.errback(Failure(error))
        user = self._user
        self.close()
        if user is not None:
            user.lost(error)

    def resumed(self) -> None:
        """The socket takes more again."""
        if self._user is not None:
            self._user.resumed()

    # --- making it ---------------------------------------------------------------------------

    async def open(
        self,
        reactor: Any,
        client: JupyterClient,
        kernel_id: str,
        start: dict[str, Any],
        handshake: float,
        patience: float,
        again: bool,
    ) -> None:
        """Connect, inject, start the agent.

        :param handshake: seconds for the kernel's first word.
        :param patience: seconds for each of its answers.
        :param again: whether we have put a relay into this kernel before.
        :raises JupyterError: with a sentence.
        """
        channels = await connect_channels(
            reactor,
            client,
            kernel_id,
            on_carrier=self.received,
            on_lost=self.lost,
            patience=handshake,
        )
        channels.on_resumed = self.resumed
        self._channels = channels
        info = channels.request("shell", "kernel_info_request", {}, patience)
        told = await (self._unlessBusy(reactor, channels, info) if again else info)
        if told is not None:
            await self._inject(channels, told, patience)
        started: Deferred[dict[str, Any]] = Deferred()
        self._started = started
        started.addTimeout(START_SECONDS, reactor)
        channels.send_carrier([bytes([frames.START]) + json.dumps(start).encode()])
        try:
            answer = await started
            self._stands = None
        except TimeoutError:
            raise KernelUnsupported(
                "the relay in the kernel does not answer on the control channel; "
                "choose a kernel with ipykernel 6 or newer with --kernel-name"
            ) from None
        finally:
            self._started = None
        if "error" in answer:
            raise KernelUnsupported(str(answer["error"])[:300])
        if answer.get("direct"):
            channels.carrierChannel = b"stdin"
        # From here on a kernel that begins is not the one that holds the relay.
        channels.on_restarted = self._restarted
        self._keepAlive.clock = reactor
        self._keepAlive.start(KEEP_ALIVE_SECONDS, now=False)

    async def _unlessBusy(
        self, reactor: Any, channels: KernelChannels, info: Deferred[dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The kernel's answer; ``None`` if it is busy, and has a relay from before.

        A cell may run for hours, or wait in ``input()``. To inject would be to wait for its end,
        and is not needed. A relay says of itself to who is no client of it that there is no agent.
        """
        stands: Deferred[dict[str, Any] | None] = Deferred()
        self._stands = stands
        probe = reactor.callLater(BUSY_SECONDS, channels.send_carrier, [bytes([frames.LOST])])

        def answered(answer: Any) -> None:
            if probe.active():
                probe.cancel()
            if not stands.called:
                stands.callback(answer)  # or with the failure

        info.addBoth(answered)
        return await stands

    async def _inject(
        self, channels: KernelChannels, info: dict[str, Any], patience: float
    ) -> None:
        language = (info.get("language_info") or {}).get("name")
        if language != "python":
            raise KernelUnsupported(
                f"this kernel speaks {str(language)[:40]}, not Python, and cannot carry a shell; "
                "choose a Python kernel with --kernel-name"
            )
        reply = await channels.request(
            "shell", "execute_request", injection.injection(), patience
        )
        injection.check(reply)

    def _restarted(self) -> None:
        if self._leaving is None and self._channels is not None:
            self._leaving = self._keepAlive.clock.callLater(
                ENDING_SECONDS, self.lost, LinkLost("the kernel was restarted")
            )

    def _sayAlive(self) -> None:
        if self._channels is not None:
            asked = self._channels.request("shell", *KEEP_ALIVE, KERNEL_SECONDS)
            # Its answer does not matter, and its loss is noticed by others.
            asked.addErrback(lambda _: None)


class KernelRoad:
    """The way to one user's agent.

    :param kernelId: the id that the kernel shall have (and has, where the server allows it).
    :param agentId: 16 hex digits, by which the relay finds the agent again.
    :param memory: a file that remembers a kernel whose id the server chose.
    :param creation: held while one is made, for others who have the same identity.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        client: JupyterClient,
        *,
        kernelId: str,
        kernelName: str | None,
        agentId: str,
        secret: str,
        orphanTimeout: float,
        memory: Path,
        creation: AbstractAsyncContextManager[Any],
    ) -> None:
        self._reactor = reactor
        self._client = client
        self._wantedId = kernelId
        self._kernelName = kernelName
        self._memory = memory
        self._creation = creation
        self._start = {
            "id": agentId,
            "direct": True,
            "secret": secret,
            "options": {"orphan_timeout": orphanTimeout},
        }
        self._patience = KERNEL_SECONDS
        self._carried: str | None = None
        self._kernel: str | None = None
        self._sessionId: str | None = None
        #: The kernel that we made, until it is heard of.
        self._unheard: str | None = None
        self._creating: Deferred[None] | None = None

    async def carry(self, user: CarrierUser) -> KernelCarrier:
        """A carrier for the link.

        :raises JupyterError: with a sentence.
        """
        kernel_id = await self._ensureKernel()
        try:
            return await self._carry(user, kernel_id, HANDSHAKE_SECONDS)
        except KernelSilent as silent:
            if kernel_id != self._unheard:
                raise
            # One of its ports was another program's by the time it listened there, and its server
            # starts it over and over with those same ports.
            self._log.warn("{silent}; trying another one", silent=str(silent))
        await self.remove()
        kernel_id = await self._ensureKernel()
        self._unheard = None  # this one may be slow, and is waited for
        return await self._carry(user, kernel_id, SECOND_SECONDS)

    async def _carry(
        self, user: CarrierUser, kernel_id: str, handshake: float
    ) -> KernelCarrier:
        carrier = KernelCarrier(user)
        try:
            await carrier.open(
                self._reactor,
                self._client,
                kernel_id,
                self._start,
                handshake=handshake,
                patience=self._patience,
                again=kernel_id == self._carried,
            )
        except BaseException:
            carrier.close()
            raise
        self._patience = AGAIN_SECONDS
        self._carried = kernel_id
        self._unheard = None
        return carrier

    async def _ensureKernel(self) -> str:
        await self._created()
        if await self._isKnown():
            assert self._kernel is not None
            return self._kernel
        creating = self._creating = Deferred.fromCoroutine(self._create())
        failures: list[Failure] = []
        creating.addErrback(failures.append)
        await self._created()
        if failures:
            failures[0].raiseException()
        assert self._kernel is not None
        return self._kernel

    async def _created(self) -> None:
        """Wait for the end of a creation, if one is going on.

        It is never cancelled itself: the server would go on with it, and only its answer tells
        what there is to delete.
        """
        creating = self._creating
        if creating is not None:
            over: Deferred[None] = Deferred()

            def ended(_: object) -> None:
                self._creating = None
                over.callback(None)

            creating.addCallback(ended)
            await over

    async def _isKnown(self) -> bool:
        """Whether the kernel that we had, or that is remembered, is still there."""
        remembered, session = self._remembered()
        for known in dict.fromkeys((self._kernel, remembered)):
            if known is not None and await self._client.kernel(known) is not None:
                self._kernel = known
                self._sessionId = session if known == remembered else self._sessionId
                return True
        return False

    async def _create(self) -> None:
        async with self._creation:
            if await self._isKnown():
                return  # by somebody else meanwhile
            kernel = await self._client.create_kernel(self._kernelName, self._wantedId)
            if kernel.id != self._wantedId:
                # An older server chose an id itself. A session's path is the next best name.
                kernel = await self._sessionKernel(kernel)
            self._kernel = self._unheard = kernel.id

    async def _sessionKernel(self, unwanted: KernelModel) -> KernelModel:
        await self._client.delete_kernel(unwanted.id)
        path = f"conchkernel-{self._start['id']}"
        kernel = await self._client.create_session(path, self._kernelName)
        self._sessionId = kernel.session
        # The session's path would lead to it too, but only by way of one more kernel.
        self._remember(kernel)
        return kernel

    def _remembered(self) -> tuple[str | None, str | None]:
        """The ids of a kernel and of its session."""
        try:
            kernel, _, session = self._memory.read_text("ascii").strip().partition(" ")
        except (OSError, ValueError):
            return None, None
        return kernel or None, session or None

    def _remember(self, kernel: KernelModel) -> None:
        try:
            self._memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._memory.write_text(f"{kernel.id} {kernel.session or ''}\n", "ascii")
        except OSError as error:
            # It serves this gateway all the same; only the next one will not find it.
            self._log.warn("a kernel's id cannot be remembered: {error}", error=str(error))

    async def remove(self) -> None:
        """Delete the kernel (and its session); one that is gone already is fine.

        :raises JupyterError: with a sentence, if it may still be there.
        """
        await self._created()
        kernel, self._kernel = self._kernel, None
        session, self._sessionId = self._sessionId, None
        if kernel is None:
            # It was not found again; the server may not have been there.
            kernel, session = self._remembered()
        if session is not None:
            await self._client.delete_session(session)
        elif kernel is not None:
            await self._client.delete_kernel(kernel)
        try:
            self._memory.unlink(missing_ok=True)
        except OSError as error:
            self._log.warn("a kernel's id cannot be forgotten: {error}", error=str(error))
