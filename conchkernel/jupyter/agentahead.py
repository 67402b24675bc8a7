"""A small file that came whole with the answer to its OPEN, for those who read it at once.

A client reads a small file by FSTAT, READ, READ at its end and CLOSE, and waits for each of them:
on this road a millisecond a time. What the agent has read while it opened the file answers them
here. It is what an open of NFS promises: the file as it was when it was opened.

It must not be told to somebody who could know better. So it is served once, from the first byte on
without a gap, for a short time, and no more as soon as anything happened that could have changed
the file as far as this gateway can tell: see :attr:`conchkernel.jupyter.link.Link.stirred`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conchkernel.files import Attributes

#: For so long after the OPEN was sent. A client far away takes a round trip of its own for each.
AHEAD_SECONDS = 1.0
#: Files of a store that are kept so; of more, the first are read anew.
MAX_FILES = 32


class Ahead:
    """All of a file.

    :ivar attributes: as they were at the OPEN; ``None`` once they were told.
    :param stirred: the link's count when the OPEN was sent.
    :param until: when nobody is told of it any more.
    """

    __slots__ = ("_data", "_position", "_stirred", "_until", "attributes")

    def __init__(self, attributes: Attributes, data: bytes, stirred: int, until: float) -> None:
        self.attributes: Attributes | None = attributes
        self._data: bytes | None = data
        self._position = 0
        self._stirred = stirred
        self._until = until

    def isFresh(self, stirred: int, now: float) -> bool:
        """Whether it may still be told; once it may not, it is forgotten."""
        if self._data is not None and stirred == self._stirred and now <= self._until:
            return True
        self.forget()
        return False

    def forget(self) -> None:
        """Tell no more of it."""
        self._data = self.attributes = None

    def stat(self) -> Attributes | None:
        """The attributes, once."""
        attributes, self.attributes = self.attributes, None
        return attributes

    def read(self, offset: int, length: int) -> bytes | None:
        """The next piece, ``b""`` once at the end; ``None`` for everything else."""
        data = self._data
        if data is None or offset != self._position:
            self.forget()
            return None
        piece = data[offset : offset + length]
        self._position += len(piece)
        if not piece:
            self.forget()
        return piece
