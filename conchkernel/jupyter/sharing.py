"""Processes that share one kernel: whose turn it is, and whether anybody else is there.

Each of several gateways with the same identity finds the same kernel and agent. The agent counts
them, and the last one out takes both away. So that nobody comes in between a last farewell and the
kernel's end, arriving and leaving are done in turns. Locks are flock(2): they end with the process
that holds them, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import TYPE_CHECKING, Any, Protocol

from twisted.internet.task import deferLater

from conchkernel.errors import ConfigurationError, LinkLost

if TYPE_CHECKING:
    from pathlib import Path

#: Between two looks at a lock that somebody else has.
_LOOK_SECONDS = 0.02
#: Has a shared lock of each process that uses the directory.
_USERS = "users.lock"
#: Longer than a kernel may take to start; who has a lock for longer does not run any more.
_PATIENCE_SECONDS = 90.0


class Sharing(Protocol):
    """How the users of one kernel agree with those in other processes."""

    @property
    def turn(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """To be had from before looking for the agent until attached to it."""

    @property
    def creation(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """To be had while a kernel is looked for and made; taken within a turn, or without one."""

    def isLast(self, others: int) -> bool:
        """Whether the kernel is to go with whoever leaves now, in its turn.

        :param others: sessions that the agent still counts; -1 where it could not be asked. Those
            of a process that was killed are among them until the orphan timeout.
        """


class Unshared:
    """Nobody else should have this identity. Who has it all the same, with the same state
    directory, is in the agent's count, and known from those that were killed by a lock.

    :param directory: where the identity is kept; it may be one that cannot be written to.
    """

    turn: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
    creation: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._users: int | None = None

    def open(self) -> None:
        """Be one who uses the directory. Idempotent."""
        try:
            if self._users is None:
                self._users = _open(self._directory / _USERS)
                fcntl.flock(self._users, fcntl.LOCK_SH)
        except ConfigurationError:
            pass  # then the agent's count is all there is

    def close(self) -> None:
        """No user any more. Idempotent."""
        users, self._users = self._users, None
        if users is not None:
            os.close(users)

    def isLast(self, others: int) -> bool:
        """Also where those whom the agent counts are dead: it goes by itself, and no kernel."""
        if self._users is None:
            return others <= 0
        return others == 0 or _alone(self._users)


class FileLock:
    """A lock between processes, for ``async with``."""

    def __init__(self, reactor: Any, path: Path) -> None:
        self._reactor = reactor
        self._path = path
        self._held: int | None = None

    async def __aenter__(self) -> None:
        """:raises LinkLost: if it cannot be had for very long."""
        fd = _open(self._path)
        deadline = self._reactor.seconds() + _PATIENCE_SECONDS
        try:
            while not _lock(fd, fcntl.LOCK_EX):
                if self._reactor.seconds() > deadline:
                    raise LinkLost(
                        f"another process has kept {self._path} locked for "
                        f"{_PATIENCE_SECONDS:.0f} s; if it hangs, end it and try again"
                    )
                await deferLater(self._reactor, _LOOK_SECONDS)
        except BaseException:
            os.close(fd)
            raise
        self._held = fd

    async def __aexit__(self, *_: object) -> None:
        fd, self._held = self._held, None
        assert fd is not None
        os.close(fd)


class SharedState:
    """What processes with the same state directory tell each other by files in it.

    Made, it counts as a user until :meth:`close`.

    :raises ConfigurationError: if the directory cannot be used.
    """

    def __init__(self, reactor: Any, directory: Path) -> None:
        self.turn = FileLock(reactor, directory / "turn.lock")
        self.creation = FileLock(reactor, directory / "creation.lock")
        self._lingering = directory / "lingering.lock"
        self._lingerer: int | None = None
        self._users = _open(directory / _USERS)
        # Waits for no longer than somebody's question whether there are others.
        fcntl.flock(self._users, fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Whether no other process uses this directory. Asked while having the :attr:`turn`."""
        return _alone(self._users)

    def isLast(self, others: int) -> bool:
        """See :meth:`Sharing.isLast`. Whom the agent counts without reason is waited for."""
        return others == 0 or (others < 0 and self.alone())

    def takeLingering(self) -> bool:
        """Become the one process that stays behind. Asked while having the :attr:`turn`.

        :returns: false where there is one already; it then begins its waiting anew.
        """
        fd = _open(self._lingering)
        os.utime(fd)
        if not _lock(fd, fcntl.LOCK_EX):
            os.close(fd)
            return False
        self._lingerer = fd
        return True

    def secondsSinceLastUse(self) -> float:
        """For whoever lingers: since the last process asked whether it should."""
        assert self._lingerer is not None
        return max(0.0, time.time() - os.fstat(self._lingerer).st_mtime)

    def isRemoved(self) -> bool:
        """For whoever lingers: whether the directory is gone, so that nobody will come."""
        assert self._lingerer is not None
        return os.fstat(self._lingerer).st_nlink == 0

    def touch(self) -> None:
        """For whoever lingers: begin the waiting anew."""
        assert self._lingerer is not None
        os.utime(self._lingerer)

    def stopLingering(self) -> None:
        """Another process may stay behind. Idempotent."""
        fd, self._lingerer = self._lingerer, None
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """No user any more."""
        self.stopLingering()
        os.close(self._users)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be used: {error.strerror}") from None


def _alone(users: int) -> bool:
    """Whether nobody else has a shared lock."""
    alone = _lock(users, fcntl.LOCK_EX)
    # Either way the shared lock is gone for a moment. Who takes turns has not missed it; where
    # there are none, only somebody who leaves too could have.
    fcntl.flock(users, fcntl.LOCK_SH)
    return alone


def _lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
