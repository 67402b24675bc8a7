"""What a client has open, under names that it cannot guess.

A handle is random, so that a client which sends another session's, or an old one of its own, gets
an error and never a file. There is a bound, because each costs a descriptor or a buffer somewhere.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from conchkernel.files import FileProblem, FileStoreError

if TYPE_CHECKING:
    from conchkernel.files import Entry
    from conchkernel.ssh.sftp_order import Mode, Task

#: Open files and directories of a session. sftp-server says what its descriptors allow, 1024 less
#: some; paramiko, sshfs and rclone have a handful, an eager asyncssh program 128.
MAX_HANDLES = 256

_TOKEN_BYTES = 16


class Handle:
    """One open file or directory.

    :param opened: what the store gave: an ``IOpenFile`` or an ``IListing``.
    :param isListing: which of them.
    :param place: where it was opened, for the order of requests.
    :ivar tasks: what is under way or waits on it, for the order of requests.
    :ivar mode: what all the tasks do, if they do the same.
    :ivar end: behind the last byte that they read or write.
    :ivar entries: of a listing: what was read and not sent yet, the next one last.
    :ivar isAtEnd: of a listing: nothing is left to read.
    """

    __slots__ = (
        "appends", "end", "entries", "isAtEnd", "isListing", "mode", "opened", "place", "tasks",
        "writes",
    )  # fmt: skip

    def __init__(
        self,
        opened: Any,
        place: bytes,
        *,
        isListing: bool = False,
        writes: bool = False,
        appends: bool = False,
    ) -> None:
        self.opened = opened
        self.isListing = isListing
        self.place = place
        #: It was opened for writing.
        self.writes = writes
        #: Writes go to the end, so that they have an order whatever their offsets.
        self.appends = appends
        self.tasks: dict[Task, None] = {}
        self.mode: Mode | None = None
        self.end = 0
        self.entries: list[Entry] = []
        self.isAtEnd = False


class Handles:
    """The open ones of one session."""

    def __init__(self, limit: int = MAX_HANDLES) -> None:
        self.limit = limit
        self._open: dict[bytes, Handle] = {}
        # Being opened: counted, so that many at once do not get past the limit.
        self._promised = 0

    def __len__(self) -> int:
        return len(self._open)

    def reserve(self) -> None:
        """Promise a place to what is being opened.

        :raises FileStoreError: there is none.
        """
        if len(self._open) + self._promised >= self.limit:
            raise FileStoreError(
                FileProblem.FAILURE, f"no more than {self.limit} files may be open at once"
            )
        self._promised += 1

    def unreserve(self) -> None:
        """It was not, or is not any more, being opened."""
        self._promised -= 1

    def add(self, handle: Handle) -> bytes:
        """Its name for the client."""
        token = secrets.token_bytes(_TOKEN_BYTES)
        self._open[token] = handle
        return token

    def get(self, token: bytes) -> Handle | None:
        """What a client means, if it is open."""
        return self._open.get(token)

    def remove(self, token: bytes) -> Handle | None:
        """It is being closed: no later request can mean it."""
        return self._open.pop(token, None)

    def clear(self) -> list[Handle]:
        """The session is over; what was open."""
        handles = list(self._open.values())
        self._open.clear()
        return handles
