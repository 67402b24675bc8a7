"""One process's use of a named server's kernel, from its coming to its going.

Any number of these share the kernel of a name. Arriving and leaving are done in turns
(:mod:`conchkernel.jupyter.sharing`), and what is decided in a turn is carried out in it, so that
nobody attaches to an agent that has just been told to end.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.task import deferLater
from twisted.logger import Logger

from conchkernel.errors import ConchKernelError, ConfigurationError
from conchkernel.jupyter.backends import OWNER, JupyterBackend
from conchkernel.jupyter.sharing import SharedState

if TYPE_CHECKING:
    from conchkernel.interfaces import IKernelLink
    from conchkernel.names import Name, Settings

#: For a stop; whoever is shutting down the machine does not wait for longer.
_STOP_SECONDS = 14.0
#: Between two looks whether the name is still there, while one stays behind for it.
_LOOK_SECONDS = 1.0


class Attachment:
    """Be there, then leave nothing behind that nobody uses.

    :param name: whose directory has the identity and the locks.
    :raises ConfigurationError: if that cannot be used.
    :ivar backend: for a realm.
    """

    _log = Logger()

    def __init__(self, reactor: Any, name: Name, settings: Settings) -> None:
        self._reactor = reactor
        self._linger = settings.linger
        self._orphanTimeout = settings.orphanTimeout
        self._sharing = SharedState(reactor, name.directory)
        self._waiting: Deferred[None] | None = None
        self._hurried = False
        self.backend = JupyterBackend(
            reactor,
            settings.url,
            state_dir=name.directory,
            kernel_name=settings.kernelName,
            ca_file=Path(settings.jupyterCA) if settings.jupyterCA else None,
            orphan_timeout=settings.orphanTimeout,
            prestart=None,
            sharing=self._sharing,
        )

    async def attach(self) -> IKernelLink:
        """Find the server and its kernel, or start one.

        :returns: a use of it that is not to be released: it holds the kernel until we leave.
        :raises ConchKernelError: with a sentence.
        """
        await self.backend.start()
        return await self.backend.connect(OWNER)

    def hurry(self) -> None:
        """Do not stay behind, and do not go on with it."""
        self._hurried = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def leave(self) -> None:
        """Stay behind for the grace time, where nobody else does; then stop."""
        sharing = self._sharing
        try:
            async with sharing.turn:
                if self._hurried or not sharing.takeLingering():
                    # Whoever lingers already waits anew from now on, and has been counted.
                    await self._stop()
                    return
            while not await self._lingered(sharing):
                pass
        except ConfigurationError:
            # The name has been removed; those who still use the kernel are in the agent's count.
            await self._stop()
        except ConchKernelError as error:
            self._log.warn("not left in order: {reason}", reason=str(error))
        finally:
            sharing.close()

    async def _lingered(self, sharing: SharedState) -> bool:
        """Wait until the last use is long enough ago, and stop; whether that was all."""
        left = self._linger - sharing.secondsSinceLastUse()
        while left > 0 and not self._hurried and not sharing.isRemoved():
            await self._sleep(min(left, _LOOK_SECONDS))
            left = self._linger - sharing.secondsSinceLastUse()
        async with sharing.turn:
            if not self._hurried and sharing.secondsSinceLastUse() < self._linger:
                return False
            await self._stop()
            crashed = self.backend.sessionsLeft > 0 and sharing.alone()
            if self._hurried or not crashed:
                sharing.stopLingering()
                return True
        # The agent still counts processes that are gone. It forgets them by its orphan rule, and
        # somebody has to be there to hear that.
        await self.attach()
        self._linger = self._orphanTimeout
        sharing.touch()
        return False

    async def _sleep(self, seconds: float) -> None:
        self._waiting = deferLater(self._reactor, seconds)
        try:
            await self._waiting
        except CancelledError:
            pass
        finally:
            self._waiting = None

    async def _stop(self) -> None:
        stopping = Deferred.fromCoroutine(self.backend.stop())
        try:
            await stopping.addTimeout(_STOP_SECONDS, self._reactor)
        except TimeoutError:
            self._log.warn("Jupyter did not confirm in time that all was ended")
