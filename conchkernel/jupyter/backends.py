"""Kernels for users: who shares which, when one starts, and when it goes.

:class:`JupyterBackend` gives each user one kernel, shared by that user's connections, and takes it
away a grace time after the last use. Everything it made it removes when it stops.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import uuid
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList, fail, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from conchkernel.errors import (
    ConfigurationError,
    JupyterError,
    KernelRefused,
    KernelUnsupported,
    LinkLost,
)
from conchkernel.files import IFileStore
from conchkernel.interfaces import IBackend, IKernelLink
from conchkernel.jupyter.contents import ContentsFileStore
from conchkernel.jupyter.discovery import discover
from conchkernel.jupyter.kernel import KernelRoad
from conchkernel.jupyter.link import Link
from conchkernel.jupyter.proof import proveShell
from conchkernel.jupyter.proxy import RoadAgent, make_agent
from conchkernel.jupyter.rest import JupyterClient
from conchkernel.jupyter.sharing import Sharing, Unshared
from conchkernel.jupyter.uses import LinkUse

_IDENTITY = "identity"
_IDENTITY_BYTES = 32
#: The name under which a single owner's kernel is kept; the realm uses the same.
OWNER = "owner"
#: What is said while nobody knows more.
_ABSENT = "the gateway has no Jupyter server now; try again in a moment"


def identity(stateDir: Path) -> bytes:
    """The gateway's own secret, made on first use; kernel ids and agents' secrets follow from it.

    So a gateway that starts again finds its kernel and its agent.

    :raises ConfigurationError: if the state directory cannot be used.
    """
    path = stateDir / _IDENTITY
    try:
        stateDir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            fresh = stateDir / f".{_IDENTITY}.{os.getpid()}"
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(secrets.token_hex(_IDENTITY_BYTES) + "\n")
            try:
                os.link(fresh, path)  # whoever comes first, all use the same
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        key = bytes.fromhex(path.read_text("ascii").strip())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the state directory {stateDir} cannot be used: {error}"
        ) from None
    if len(key) != _IDENTITY_BYTES:
        raise ConfigurationError(f"{path} is damaged; remove it, and a new one is made")
    return key


class UserKernel:
    """The kernel of one user: its road, its link, how many use it."""

    _log = Logger()

    def __init__(self, backend: JupyterBackend, user: str) -> None:
        self._backend = backend
        self._user = user
        self._uses = 0
        self._waiting: list[Deferred[None]] = []
        self._starting: Deferred[None] | None = None
        self._ready = False
        self._grace: IDelayedCall | None = None
        self._road, self.link = backend.build(user)

    def connect(self) -> Deferred[IKernelLink]:
        """One more use, as soon as the kernel is there."""
        self._uses += 1
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        use = LinkUse(self.link, self.released)
        ready: Deferred[None] = self.ready()
        ready.addErrback(self._unused)
        return ready.addCallback(lambda _: use)

    def _unused(self, failure: Failure) -> Failure:
        self.released()
        return failure

    def ready(self) -> Deferred[None]:
        """Fires when the link is attached for the first time; several may wait."""
        if self._ready:
            return succeed(None)
        waiting: Deferred[None] = Deferred(self._cancelled)
        self._waiting.append(waiting)
        if self._starting is None:
            self._starting = Deferred.fromCoroutine(self._start())
            self._starting.addBoth(self._started)
        return waiting

    async def _start(self) -> None:
        # A kernel of the same id may be on its way out.
        await self._backend.ended(self._user)
        async with self._backend.sharing.turn:
            await self.link.start()

    def _cancelled(self, waiting: Deferred[None]) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)

    def _started(self, result: Failure | None) -> None:
        self._starting = None
        self._ready = not isinstance(result, Failure)
        waiting, self._waiting = self._waiting, []
        if isinstance(result, Failure) and result.check(CancelledError):
            result = Failure(LinkLost("the gateway is stopping"))
        elif isinstance(result, Failure) and result.check(JupyterError) is None:
            self._log.failure("starting a kernel", result)
            result = Failure(LinkLost("the kernel could not be started; the gateway's log has why"))
        for deferred in waiting:
            if isinstance(result, Failure):
                deferred.errback(result)
            else:
                deferred.callback(None)

    def released(self) -> None:
        """One use less; after the last one the grace time begins."""
        self._uses -= 1
        if self._uses == 0 and not self._backend.stopping:
            self._grace = self._backend.reactor.callLater(self._backend.grace, self._expired)

    def _expired(self) -> None:
        self._grace = None
        self._backend.end(self._user, self)

    async def stop(self) -> int:
        """End agent and kernel, unless another gateway uses them too.

        :returns: how many others do, by the agent's count.
        """
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        others = await self.link.stop()
        if self._starting is not None:
            self._starting.cancel()
        if self._backend.sharing.isLast(others):
            try:
                await self._road.remove()
            except JupyterError as error:
                self._log.warn("a kernel may be left behind: {error}", error=str(error))
        return others


@implementer(IBackend)
class JupyterBackend:
    """Kernels on one Jupyter server.

    :param urlText: the URL as it was pasted, with its token.
    :param stateDir: where the gateway's identity is kept.
    :param prestart: whose kernel :meth:`start` starts, to see that it can; ``None`` for nobody's.
    :param grace: seconds from the last use of a kernel to its end.
    :param sharing: how to agree with other processes that have this identity; ``None`` where there
        should be none. Each start takes its turn; a stop is its caller's turn.
    :ivar sessionsLeft: after a stop, how many sessions of others agents have told of.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        urlText: str,
        *,
        state_dir: Path,
        kernel_name: str | None = None,
        shell: str | None = None,
        working_dir: str | None = None,
        ca_file: Path | None = None,
        orphan_timeout: float = 120.0,
        grace: float = 60.0,
        prestart: str | None = OWNER,
        sharing: Sharing | None = None,
    ) -> None:
        self.reactor = reactor
        self.grace = grace
        unshared = Unshared(Path(state_dir))
        self._unshared = unshared if sharing is None else None
        self.sharing: Sharing = unshared if sharing is None else sharing
        self.stopping = False
        self.sessionsLeft = 0
        self._urlText = urlText
        self._stateDir = Path(state_dir)
        self._kernelName = kernel_name
        self._shell = shell
        self._workingDir = working_dir
        self._caFile = ca_file
        self._orphanTimeout = orphan_timeout
        self._prestart = prestart
        self._absence = _ABSENT
        self._agent: RoadAgent | None = None
        self._client: JupyterClient | None = None
        self._identity = b""
        self._kernels: dict[str, UserKernel] = {}
        self._ending: dict[str, Deferred[Any]] = {}

    async def start(self) -> None:
        """Find the server, check the token, start the first kernel. May be tried again.

        :raises JupyterError: with a sentence.
        :raises ConfigurationError: if the state directory cannot be used.
        """
        self.stopping = False
        self._identity = identity(self._stateDir)
        if self._unshared is not None:
            self._unshared.open()
        if self._client is None:
            if self._agent is None:
                self._agent = make_agent(self.reactor, self._caFile)
            try:
                client = await discover(self.reactor, self._urlText, agent=self._agent)
                await self._checkName(client)
            except JupyterError as error:
                self._absence = str(error)
                raise
            self._client, self._absence = client, _ABSENT
        if self._prestart is not None:
            try:
                # A use that is over at once: a gateway that nobody needs keeps no kernel, and so
                # no server from being culled.
                use = await self._kernel(self._prestart).connect()
                try:
                    if self._shell is not None or self._workingDir is not None:
                        await proveShell(use)
                finally:
                    use.release()
            except KernelUnsupported as error:
                # Files can be had all the same; whoever wants a shell is told this sentence.
                self._log.warn("no shells: {reason}", reason=str(error))

    async def _checkName(self, client: JupyterClient) -> None:
        if self._kernelName is not None:
            known = (await client.kernelspecs()).languages
            if self._kernelName not in known:
                raise KernelRefused(
                    f"the Jupyter server has no kernel named {self._kernelName}; "
                    f"it has {', '.join(sorted(known)[:20]) or 'none'}"
                )

    async def stop(self) -> None:
        """End every kernel and agent that was started here, and every connection."""
        self.stopping = True
        kernels, self._kernels = self._kernels, {}
        endings = [Deferred.fromCoroutine(self.ended(user)) for user in self._ending]
        stops = [Deferred.fromCoroutine(kernel.stop()) for kernel in kernels.values()]
        await DeferredList(endings, consumeErrors=True)
        ended = await DeferredList(stops, consumeErrors=True)
        self.sessionsLeft = sum(max(0, others) for success, others in ended if success)
        if self._unshared is not None:
            self._unshared.close()
        self._client = None
        agent, self._agent = self._agent, None
        if agent is not None:
            await agent.close()

    def connect(self, user: str) -> Deferred[IKernelLink]:
        """See :class:`IBackend`."""
        if self._client is None or self.stopping:
            return fail(LinkLost(self._absence))
        return self._kernel(user).connect()

    def contents(self) -> IFileStore:
        """A file store over the Contents API, which needs no kernel.

        :raises LinkLost: while there is no server.
        """
        if self._client is None or self.stopping:
            raise LinkLost(self._absence)
        return ContentsFileStore(self.reactor, self._client)

    def _kernel(self, user: str) -> UserKernel:
        kernel = self._kernels.get(user)
        if kernel is None:
            kernel = self._kernels[user] = UserKernel(self, user)
        return kernel

    def end(self, user: str, kernel: UserKernel) -> None:
        """The user's kernel goes; the next use gets a new one, after this one's end."""
        self._kernels.pop(user, None)
        done: Deferred[Any] = Deferred.fromCoroutine(kernel.stop())
        done.addErrback(lambda failure: self._log.failure("removing a kernel", failure))
        self._ending[user] = done

        def ended(_: object) -> None:
            if self._ending.get(user) is done:
                del self._ending[user]

        done.addBoth(ended)

    async def ended(self, user: str) -> None:
        """Wait for the end of a former kernel of this user, if there is one on its way."""
        ending = self._ending.get(user)
        if ending is not None:
            over: Deferred[None] = Deferred()
            ending.addBoth(lambda _: over.callback(None))
            await over

    def build(self, user: str) -> tuple[KernelRoad, Link]:
        """The road and the link for a user's kernel."""
        assert self._client is not None
        base = self._client.location.base

        def derive(purpose: str) -> bytes:
            text = f"{purpose}\0{base}\0{self._kernelName or ''}\0{user}"
            return hmac.digest(self._identity, text.encode(), hashlib.sha256)

        agentId = derive("agent").hex()[:16]
        secret = derive("secret").hex()
        road = KernelRoad(
            self.reactor,
            self._client,
            kernelId=str(uuid.UUID(bytes=derive("kernel")[:16], version=4)),
            kernelName=self._kernelName,
            agentId=agentId,
            secret=secret,
            orphanTimeout=self._orphanTimeout,
            memory=self._stateDir / f"kernel-{agentId}",
            creation=self.sharing.creation,
        )
        link = Link(
            self.reactor,
            road.carry,
            secret,
            defaults={"shell": self._shell, "directory": self._workingDir},
            pingSeconds=min(5.0, self._orphanTimeout / 4),
        )
        return road, link
