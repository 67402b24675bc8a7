"""The gateway's end of the wire: streams for the SSH side, over carriers that come and go.

A :class:`Link` is one session with one agent. It owns the :class:`~conchkernel.wire.Endpoint`, asks
its ``connect`` for a carrier whenever it has none, attaches, and sends again what was lost. It does
not know what a carrier is made of: :mod:`conchkernel.jupyter.kernel` brings WebSockets,
:mod:`conchkernel.loopback` a local socket.
"""

from __future__ import annotations

import enum
import json
import os
import random
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred, TimeoutError
from twisted.logger import Logger
from twisted.python.failure import Failure

from conchkernel import frames, wire, wirestream
from conchkernel.errors import (
    ConchKernelError,
    JupyterError,
    LinkLost,
    RefusalCode,
    StreamRefused,
)
from conchkernel.interfaces import ProcessRequest
from conchkernel.jupyter import openings
from conchkernel.jupyter.agentfiles import AgentFileStore
from conchkernel.jupyter.kernelstream import EVERYTHING, FilesStream, KernelStream, tooMuch

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

    from conchkernel.jupyter.carrier import Carrier, Connect

#: How long streams live without a carrier before they are given up.
SURVIVAL_SECONDS = 60.0
#: How long one that is asked for later waits, when the carrier has been away for longer than that.
LATE_SECONDS = 10.0
#: Pause before the first, and at most before the next, attempt to attach again.
RETRY_FIRST_SECONDS = 0.1
RETRY_MOST_SECONDS = 15.0
#: A session that is asked for longer than this to say farewell is left alone.
FAREWELL_SECONDS = 4.0
ATTACH_SECONDS = 20.0
FIRST_PINGS = 5
FIRST_PING_SECONDS = 0.2

_Stream = TypeVar("_Stream", bound=KernelStream)


class _State(enum.Enum):
    NEW = "new"
    ATTACHED = "attached"
    DETACHED = "detached"
    CLOSED = "closed"


class Link:
    """One session with an agent.

    :ivar stirred: grows with whatever may have changed a file on the kernel's host, or may tell
        somebody of such a change: what processes say, and what is asked of files.

    :param connect: makes a carrier that leads to the agent and tells this link.
    :param secret: what the agent must be told.
    :param defaults: paths that are added to each OPEN: ``shell`` and ``directory``, where given.
    :param pingSeconds: how often the agent hears from us; well below its orphan timeout.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        connect: Connect,
        secret: str,
        *,
        defaults: dict[str, Any] | None = None,
        pingSeconds: float = 15.0,
        survivalSeconds: float = SURVIVAL_SECONDS,
    ) -> None:
        self._reactor = reactor
        self._connect = connect
        self._secret = secret
        self._defaults = {
            name: os.fsencode(path).decode("latin-1")
            for name, path in (defaults or {}).items()
            if path
        }
        self._pingSeconds = pingSeconds
        self._survivalSeconds = survivalSeconds
        self._state = _State.NEW
        self._carrier: Carrier | None = None
        self._streams: set[KernelStream] = set()
        self._flushing = False
        self._answer: Deferred[dict[str, Any]] | None = None
        self._farewell: Deferred[int] | None = None
        self._attaching: Deferred[None] | None = None
        self._retry: IDelayedCall | None = None
        self._giveUp: IDelayedCall | None = None
        self._ping: IDelayedCall | None = None
        self._attempts = 0
        self._complained = False
        self._lostAt = 0.0
        self._obstacle = ""
        self._heard = 0.0
        self.stirred = 0
        self._pings = 0
        self._session = self._former = ""
        self._begun = False
        self._newSession()

    def _newSession(self) -> None:
        # What the former one had over there is of no more use to anybody.
        self._former = self._session if self._begun else self._former
        self._session = secrets.token_hex(16)
        self._begun = False  # whether an agent has had it
        self._endpoint = wire.Endpoint(told=self._told)

    # --- attaching ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Attach for the first time.

        :raises JupyterError: with a sentence; the link may be started again.
        """
        self._attaching = Deferred.fromCoroutine(self._attach())
        try:
            await self._attaching
        except BaseException:
            self._dropCarrier()
            self._newSession()
            raise

    async def _attach(self) -> None:
        self._carrier = None
        carrier = await self._connect(self)
        if self._state is _State.CLOSED:
            carrier.close()
            raise LinkLost("the gateway is stopping")
        self._carrier = carrier
        self._heard = self._reactor.seconds()
        answer: Deferred[dict[str, Any]] = Deferred()
        answer.addTimeout(ATTACH_SECONDS, self._reactor)
        self._answer = answer
        session = self._session
        request = {
            "versions": [frames.VERSION],
            "session": session,
            "received": self._endpoint.received_bytes,
            "secret": self._secret,
        }
        if self._former:
            request["former"] = self._former
        carrier.send([frames.message_of(frames.ATTACH, request)])
        try:
            attached = await answer
        except TimeoutError:
            raise LinkLost("the agent on the kernel's host does not answer") from None
        finally:
            self._answer = None
        if "error" in attached:
            raise LinkLost(str(attached["error"])[:300])
        if self._session != session:
            raise LinkLost("the session was given up while the agent was asked for it")
        self._former = ""
        if self._begun and attached.get("new"):
            # The agent that had our streams is gone, and they with it. This one has begun a
            # session of the same name, and is to find it again.
            self._abandon(LinkLost("the processes on the kernel's host are gone"))
            self._session, self._former = session, ""
        received = attached.get("received")
        if attached.get("version") != frames.VERSION or not isinstance(received, int):
            raise LinkLost("the agent on the kernel's host speaks another language")
        try:
            for message in self._endpoint.resume(received):
                carrier.send(message)
        except frames.WireViolation as error:
            self._abandon(LinkLost("the session with the kernel's host is broken"))
            raise LinkLost(str(error)) from None
        self._state = _State.ATTACHED
        self._begun = True
        self._attempts = 0
        if self._complained:
            self._complained = False
            self._log.info("the link to the kernel's host is back")
        self._cancel("_giveUp")
        self._cancel("_ping")
        self._pings = 0
        self._ping = None
        self._keepAlive()

    def _keepAlive(self) -> None:
        now = self._reactor.seconds()
        if now - self._heard > 2 * self._pingSeconds + 1:
            self._ping = None
            self._detach(LinkLost("the kernel's host does not answer any more"))
            return
        self._endpoint.ping(now)
        # The first ones go quickly: the least of them is taken for the road's own round trip.
        self._pings += 1
        pause = self._pingSeconds if self._pings > FIRST_PINGS else FIRST_PING_SECONDS
        self._ping = self._reactor.callLater(min(pause, self._pingSeconds), self._keepAlive)
        self.wake()

    def _cancel(self, name: str) -> None:
        call = getattr(self, name)
        setattr(self, name, None)
        if call is not None and call.active():
            call.cancel()

    def _dropCarrier(self) -> None:
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            carrier.close()

    def _detach(self, reason: Exception) -> None:
        """The carrier is lost or useless: go on with another one."""
        self._dropCarrier()
        answer = self._answer
        if answer is not None:
            self._answer = None
            answer.errback(Failure(reason))
            return
        if self._state is not _State.ATTACHED:
            return
        self._state = _State.DETACHED
        self._lostAt = self._reactor.seconds()
        self._obstacle = ""
        self._cancel("_ping")
        if self._farewell is not None:
            farewell, self._farewell = self._farewell, None
            farewell.errback(Failure(reason))
            return
        if not self._complained:
            self._complained = True
            self._log.warn("the link to the kernel's host is lost: {reason}", reason=str(reason))
        self._expectSoon()
        self._again()

    def _expectSoon(self) -> None:
        """Streams wait for a carrier: not for ever, and not for a long pause between attempts."""
        if self._giveUp is None:
            patience = self._survivalSeconds
            if self._reactor.seconds() - self._lostAt > patience:
                patience = min(patience, LATE_SECONDS)
            self._giveUp = self._reactor.callLater(patience, self._gaveUp)
        if self._retry is not None:
            self._attempts = 0
            self._cancel("_retry")
            self._again()

    def _again(self) -> None:
        if self._state is not _State.DETACHED or self._retry is not None:
            return
        delay = min(RETRY_FIRST_SECONDS * 2**self._attempts, RETRY_MOST_SECONDS)
        self._attempts = min(self._attempts + 1, 16)
        self._retry = self._reactor.callLater(delay * random.uniform(0.5, 1.0), self._reattach)

    def _reattach(self) -> None:
        self._retry = None
        self._attaching = Deferred.fromCoroutine(self._attach())
        self._attaching.addErrback(self._attachFailed)

    def _attachFailed(self, failure: Failure) -> None:
        self._dropCarrier()
        if self._state is _State.CLOSED:
            return
        if failure.check(ConchKernelError) is None:
            self._log.failure("attaching to the kernel's host", failure)
        else:
            self._obstacle = str(failure.value)
            self._log.debug("attaching failed: {reason}", reason=self._obstacle)
        self._again()

    def _gaveUp(self) -> None:
        self._giveUp = None
        seconds = round(self._reactor.seconds() - self._lostAt)
        why = f": {self._obstacle}" if self._obstacle else ""
        self._abandon(
            LinkLost(f"the link to the kernel's host has been lost for {seconds} seconds{why}")
        )

    def _abandon(self, reason: Exception) -> None:
        """Close every stream and begin a new session."""
        self._newSession()
        for stream in list(self._streams):
            stream.lost(reason)

    # --- what the carrier tells --------------------------------------------------------------

    def received(self, message: bytes | memoryview) -> None:
        """One message of the carrier."""
        kind = message[0] if message else -1
        if kind == frames.BYTES:
            self._heard = now = self._reactor.seconds()
            try:
                self._endpoint.receive(message, now)
            except frames.WireGap as gap:
                self._detach(LinkLost(str(gap)))
            except frames.WireViolation as violation:
                self._log.error("the agent broke the protocol: {why}", why=str(violation))
                self._abandon(LinkLost("the session with the kernel's host is broken"))
                self._detach(LinkLost(str(violation)))
            else:
                self.wake()
        elif kind == frames.ATTACHED and self._answer is not None:
            answer, self._answer = self._answer, None
            try:
                answer.callback(frames.body_of(message))
            except frames.WireViolation as violation:
                answer.errback(LinkLost(str(violation)))
        elif kind == frames.LOST:
            self._detach(LinkLost("the agent on the kernel's host is gone"))

    def lost(self, reason: Exception) -> None:
        """The carrier is gone."""
        self._carrier = None
        self._detach(reason)

    def resumed(self) -> None:
        """The carrier is writable again."""
        self.wake()

    def _told(self, frame_type: int, payload: bytes) -> None:
        if frame_type != frames.FAREWELL:
            raise frames.WireViolation("only an agent says farewell")
        farewell, self._farewell = self._farewell, None
        if farewell is not None:
            try:
                others = int(json.loads(payload)["sessions"])
            except (ValueError, KeyError, TypeError):
                others = 0
            farewell.callback(others)

    # --- sending -----------------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """So much is asked already, and waits for the road, that no more should be."""
        return self._endpoint.crowded

    def wake(self) -> None:
        """Send what is queued before the reactor sleeps: one turn's writes share a message."""
        if not self._flushing:
            self._flushing = True
            self._reactor.callLater(0, self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._state is not _State.ATTACHED:
            return
        while (carrier := self._carrier) is not None and carrier.writable:
            message = self._endpoint.next_message()
            if message is None:
                break
            carrier.send(message)

    # --- for the SSH side --------------------------------------------------------------------

    def open(self, parameters: dict[str, Any], receiver: Any) -> KernelStream:
        """Open a stream.

        :param parameters: what its OPEN says.
        :param receiver: its :class:`~conchkernel.interfaces.IStreamReceiver`.
        """
        return self._begin(KernelStream(self, receiver), parameters)

    def _begin(self, stream: _Stream, parameters: dict[str, Any]) -> _Stream:
        if self._state is _State.CLOSED:
            stream.lostSoon(LinkLost("the gateway is stopping"))
            return stream
        # An OPEN waits whole even where it was closed meanwhile. Those that answer the agent are as
        # few as it lets wait.
        if self.crowded and parameters["kind"] != "accepted":
            stream.lostSoon(tooMuch())
            return stream
        try:
            stream.wire = self._endpoint.open(parameters, stream)
        except ValueError:
            stream.lostSoon(
                StreamRefused(RefusalCode.RESOURCE_SHORTAGE, "the command is too long")
            )
        else:
            self._streams.add(stream)
            if self._state is _State.DETACHED:
                self._expectSoon()
            self.wake()
        return stream

    def openProcess(self, request: ProcessRequest, receiver: Any) -> KernelStream:
        """See :meth:`conchkernel.interfaces.IKernelLink.openProcess`."""
        stream = self.open({**openings.process(request), **self._defaults}, receiver)
        if request.pty is not None and stream.wire is not None:
            stream.wire.of_terminal = True
        return stream

    def openFiles(self, root: bytes | None, readOnly: bool) -> AgentFileStore:
        """Files on the kernel's host; the store fires its ``ready`` when it can be used.

        See :meth:`conchkernel.interfaces.IKernelLink.openFiles`.
        """
        parameters: dict[str, Any] = {"kind": "files", "read_only": readOnly}
        if "directory" in self._defaults:
            parameters["directory"] = self._defaults["directory"]
        if root is not None:
            parameters["root"] = root.decode("latin-1")
        store = AgentFileStore(self._reactor, self)
        stream = self._begin(FilesStream(self, store), parameters)
        store.began(stream)
        if stream.wire is not None:
            stream.wire.floor = wirestream.CAP_FLOOR_OF_FILES
        # What comes is taken at once: those who ask bound it.
        stream.grant(EVERYTHING)
        return store

    def soon(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call it when the caller has returned to the reactor."""
        self._reactor.callLater(0, call, *arguments)

    def forget(self, stream: KernelStream) -> None:
        """The stream is over."""
        self._streams.discard(stream)

    @property
    def busy(self) -> bool:
        """Whether any stream is open."""
        return bool(self._streams)

    @property
    def attached(self) -> bool:
        """Whether there is a road to the agent right now."""
        return self._state is _State.ATTACHED

    async def _attached(self) -> None:
        """Wait for the end of an attempt to attach, but not for long."""
        over: Deferred[None] = Deferred()

        def tell(result: Any) -> Any:
            if not over.called:
                over.callback(None)
            return result

        if self._attaching is not None:
            self._attaching.addBoth(tell)
            try:
                await over.addTimeout(FAREWELL_SECONDS, self._reactor)
            except TimeoutError:
                pass

    async def stop(self) -> int:
        """End the session: say goodbye, close every stream and the carrier. An attempt to attach
        that is under way is waited for: it may just have started an agent.

        :returns: how many other sessions the agent still has; 0 means that it ends. ``-1`` if it
            could not be asked: then it ends by its orphan timeout.
        """
        others = -1
        await self._attached()
        if self._state is _State.ATTACHED and self._carrier is not None:
            farewell: Deferred[int] = Deferred()
            self._farewell = farewell
            farewell.addTimeout(FAREWELL_SECONDS, self._reactor)
            self._endpoint.control(frames.GOODBYE, 0)
            self._flush()
            try:
                others = await farewell
            except (TimeoutError, JupyterError):
                pass
            finally:
                self._farewell = None
        self._state = _State.CLOSED
        for name in ("_retry", "_giveUp", "_ping"):
            self._cancel(name)
        if self._attaching is not None:
            self._attaching.cancel()
        self._dropCarrier()
        self._abandon(LinkLost("the gateway is stopping"))
        return others
