"""Which requests may be under way together, so that the result is as if there was one at a time.

A client sends many requests before the first answer, and means them in order: WRITE before CLOSE,
CLOSE before RENAME. What does not concern the same file runs together, and so do READs, and WRITEs
to different places of a file. Nothing here knows what a request does, only what it concerns.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twisted.internet.defer import Deferred

    from conchkernel.ssh.sftp_handles import Handle


class Mode(enum.IntEnum):
    """What a request does with a handle."""

    #: Nothing is changed: runs beside its like.
    READING = 1
    #: A piece is written: runs beside writing of other pieces.
    WRITING = 2
    #: Everything else, alone.
    ALONE = 3


class Task:
    """One request that is under way or waits for others.

    :param mode: what it does with its handles.
    :param changes: whether others would see a file, or a directory, differently after it.
    :param paths: what it concerns by name, as :func:`place` gives them.
    :param handles: what it concerns that is open.
    :param span: from where to where it reads or writes.
    """

    __slots__ = (
        "answer", "arguments", "changes", "cost", "deferred", "followers", "handles", "mode",
        "operation", "paths", "requestId", "span", "waitsFor",
    )  # fmt: skip

    def __init__(
        self,
        requestId: int,
        operation: Callable[..., Any],
        arguments: tuple[Any, ...],
        mode: Mode,
        *,
        changes: bool = False,
        paths: tuple[bytes, ...] = (),
        handles: tuple[Handle, ...] = (),
        span: tuple[int, int] = (0, 0),
        cost: int = 0,
    ) -> None:
        self.requestId = requestId
        self.operation = operation
        self.arguments = arguments
        self.mode = mode
        self.changes = changes
        self.paths = paths
        self.handles = handles
        self.span = span
        #: Bytes that are held for it.
        self.cost = cost
        #: The answer's packets once there is one; it waits for those to earlier requests.
        self.answer: Sequence[bytes | memoryview] | None = None
        self.waitsFor = 0
        self.followers: list[Task] = []
        self.deferred: Deferred[Any] | None = None


def place(path: bytes) -> bytes:
    """A path in the form in which places are compared: with a slash at the end.

    Links are not known here: two names of one file are two places. ``..`` may be anywhere.
    """
    words = [word for word in path.split(b"/") if word and word != b"."]
    if b".." in words or not words:
        return b"/"
    return b"/" + b"/".join(words) + b"/"


class Order:
    """The tasks of a session.

    :ivar byPath: those that concern a path; while there is none, a handle's own are enough.
    """

    def __init__(self) -> None:
        self.byPath: dict[Task, None] = {}
        # Open files with tasks.
        self._busy: dict[Handle, None] = {}

    def isFree(self, handle: Handle, mode: Mode, start: int) -> bool:
        """Whether a READ or WRITE, of what begins at ``start``, need not wait for anything."""
        if self.byPath:
            return False
        if not handle.tasks:
            return True
        return handle.mode is mode and (
            mode is Mode.READING or (mode is Mode.WRITING and start >= handle.end)
        )

    def add(self, task: Task) -> bool:
        """Take a task in; whether it may start now."""
        for handle in task.handles:
            for earlier in handle.tasks:
                if _collide(earlier, task):
                    _follow(earlier, task)
        if self.byPath:
            places = task.paths + tuple([handle.place for handle in task.handles])
            for earlier in self.byPath:
                if _isShared(earlier, task):
                    continue
                if _touch(places, earlier.paths) and task not in earlier.followers:
                    _follow(earlier, task)
        if task.paths:
            for handle in self._busy:
                if _touch((handle.place,), task.paths):
                    for earlier in handle.tasks:
                        if not _isShared(earlier, task) and task not in earlier.followers:
                            _follow(earlier, task)
        self.join(task)
        return not task.waitsFor

    def join(self, task: Task) -> None:
        """Take in a task that need not wait, as :meth:`isFree` said."""
        if task.paths:
            self.byPath[task] = None
        for handle in task.handles:
            handle.mode = task.mode if not handle.tasks or handle.mode is task.mode else None
            handle.tasks[task] = None
            handle.end = max(handle.end, task.span[1])
            self._busy[handle] = None

    def remove(self, task: Task) -> list[Task]:
        """A task is done; those that need not wait any more, in their order."""
        self.byPath.pop(task, None)
        for handle in task.handles:
            handle.tasks.pop(task, None)
            if not handle.tasks:
                handle.mode, handle.end = None, 0
                self._busy.pop(handle, None)
        free = []
        for follower in task.followers:
            follower.waitsFor -= 1
            if not follower.waitsFor:
                free.append(follower)
        return free


def _follow(earlier: Task, later: Task) -> None:
    earlier.followers.append(later)
    later.waitsFor += 1


def _isShared(earlier: Task, later: Task) -> bool:
    return not (earlier.changes or later.changes)


def _collide(earlier: Task, later: Task) -> bool:
    """Whether two tasks on one handle must keep their order."""
    if earlier.mode is not later.mode or later.mode is Mode.ALONE:
        return True
    return (
        later.mode is Mode.WRITING
        and earlier.span[0] < later.span[1]
        and later.span[0] < earlier.span[1]
    )


def _touch(ones: tuple[bytes, ...], others: tuple[bytes, ...]) -> bool:
    """Whether a place of these is, or is within, or holds a place of those."""
    return any(
        one.startswith(other) or other.startswith(one) for one in ones for other in others
    )
