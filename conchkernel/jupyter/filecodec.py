"""What an agent tells of files, in the store's words, and the other way (wire.md section 7)."""

from __future__ import annotations

import math

from conchkernel.files import Attributes, Entry, Filesystem
from conchkernel.remote import filewire as fw

#: Owners whose names are remembered.
_MAX_OWNERS = 4096


class Owners:
    """The names of accounts and groups, as far as listings have told them."""

    def __init__(self) -> None:
        self._accounts: dict[int, str] = {}
        self._groups: dict[int, str] = {}

    def attributes(self, body: memoryview, position: int = 0) -> Attributes:
        """Attributes as they were told, with names where they are known."""
        given, size, uid, gid, mode, atime, mtime, links = fw.ATTRIBUTES.unpack_from(
            body, position
        )
        if given != fw.HAS_ALL:
            raise ValueError("attributes are missing")
        return Attributes(
            size, uid, gid, mode, _seconds(atime), _seconds(mtime),
            self._accounts.get(uid), self._groups.get(gid), links,
        )  # fmt: skip

    def learn(self, body: memoryview) -> bytes:
        """Remember the names before a piece of a listing; returns the entries behind them."""
        counts = fw.COUNTS.unpack_from(body)
        position = fw.COUNTS.size
        for count, known in zip(counts, (self._accounts, self._groups), strict=True):
            for _ in range(count):
                (number,) = fw.U32.unpack_from(body, position)
                name, position = take_name(body, position + 4)
                if name and len(known) < _MAX_OWNERS:
                    known[number] = name.decode("utf-8", "replace")
        return bytes(body[position:])

    def entries(self, piece: bytes) -> list[Entry]:
        """The entries of a piece."""
        body = memoryview(piece)
        position, end = 0, len(body)
        entries = []
        while position < end:
            name, position = take_name(body, position)
            entries.append(Entry(name, self.attributes(body, position)))
            position += fw.ATTRIBUTES.size
        return entries


def take_name(body: memoryview, position: int) -> tuple[bytes, int]:
    """A name with its length before it, and where it ends."""
    (length,) = fw.U16.unpack_from(body, position)
    start = position + fw.U16.size
    end = start + length
    if end > len(body):
        raise ValueError("a name is cut short")
    return bytes(body[start:end]), end


def filesystem(body: memoryview) -> Filesystem:
    """The answer to a question for a file system."""
    return Filesystem(*fw.FILESYSTEM.unpack(body))


def _seconds(nanoseconds: int) -> float:
    # Not rounded up into the next second, as one division would now and then.
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return seconds + rest // 1000 / 1e6


def _nanoseconds(seconds: float) -> int:
    whole = math.floor(seconds)
    return min(max(whole, -(2**33)), 2**33) * 1_000_000_000 + round((seconds - whole) * 1e9)


def pack_attributes(attributes: Attributes) -> bytes:
    """Attributes to set, as they travel."""
    given = 0
    uid = gid = fw.SAME
    atime = mtime = 0
    if attributes.size is not None:
        given |= fw.HAS_SIZE
    if attributes.uid is not None or attributes.gid is not None:
        given |= fw.HAS_OWNER
        uid = fw.SAME if attributes.uid is None else attributes.uid
        gid = fw.SAME if attributes.gid is None else attributes.gid
    if attributes.mode is not None:
        given |= fw.HAS_MODE
    if attributes.mtime is not None or attributes.atime is not None:
        given |= fw.HAS_TIMES
        first = attributes.mtime if attributes.atime is None else attributes.atime
        second = attributes.atime if attributes.mtime is None else attributes.mtime
        atime, mtime = _nanoseconds(first or 0), _nanoseconds(second or 0)
    return fw.ATTRIBUTES.pack(
        given, attributes.size or 0, uid, gid, attributes.mode or 0, atime, mtime, 0
    )
