"""What was written to a file and cannot go up yet, in a temporary file without a name.

Sans-IO but for that file. A spool knows which of its bytes count; all spools of a store share a
:class:`Budget`, so neither one large file nor many small ones fill the gateway's disk.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from conchkernel.files import FileProblem, FileStoreError

if TYPE_CHECKING:
    from pathlib import Path

#: Bytes that the spools of one store may hold together.
SPOOL_BYTES = 4 * 1024 * 1024 * 1024
#: Separate ranges in one spool; each costs memory, and time on every write.
MAX_RANGES = 4096


class Budget:
    """How much all spools of a store may hold.

    :param directory: where the temporary files are; the system's choice if not given.
    """

    def __init__(self, limit: int = SPOOL_BYTES, directory: Path | None = None) -> None:
        self.limit = limit
        self.directory = directory
        self.used = 0

    def take(self, count: int) -> None:
        """Use ``count`` more bytes.

        :raises FileStoreError: NO_SPACE if that is too much.
        """
        if count > 0 and self.used + count > self.limit:
            raise self.full()
        self.used += count

    def full(self) -> FileStoreError:
        """Why not."""
        return FileStoreError(
            FileProblem.NO_SPACE,
            "Jupyter's API cannot write into the middle of a file, and the gateway's spool for "
            f"that ({self.limit >> 20} MiB) is full; remove the file first, or write it in order",
        )


class Spool:
    """Ranges of a file's bytes.

    Ranges neither touch nor overlap. Bytes of a range that were never written are zeros.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._starts: list[int] = []
        self._ends: list[int] = []
        try:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115
                dir=budget.directory, buffering=0
            )
        except OSError as error:
            raise _problem(error) from None

    def __bool__(self) -> bool:
        return bool(self._starts)

    @property
    def start(self) -> int:
        """Where the first range begins; the spool must not be empty."""
        return self._starts[0]

    @property
    def run(self) -> int:
        """Where the first range ends."""
        return self._ends[0]

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return self._ends[-1] if self._ends else 0

    @property
    def crowded(self) -> bool:
        """Whether there are too many ranges: fill some gaps."""
        return len(self._starts) > MAX_RANGES

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Keep ``data``."""
        self._cover(offset, offset + len(data))
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._file.fileno(), view, offset)
                offset += written
                view = view[written:]
        except OSError as error:
            raise _problem(error) from None

    def zeros(self, start: int, end: int) -> None:
        """Keep zeros, where nothing has been written before."""
        self._cover(start, end)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes within one range."""
        parts = []
        try:
            while length > 0:
                part = os.pread(self._file.fileno(), length, offset)
                if not part:
                    part = bytes(length)  # behind the temporary file's end
                parts.append(part)
                offset += len(part)
                length -= len(part)
        except OSError as error:
            raise _problem(error) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pieces(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """What is between two offsets, in order: from, to, and whether it is kept here."""
        found = []
        index = bisect_right(self._ends, start)
        while start < end:
            first = self._starts[index] if index < len(self._starts) else end
            if start < first:
                found.append((start, min(first, end), False))
                start = min(first, end)
            else:
                upto = min(self._ends[index], end)
                found.append((start, upto, True))
                start = upto
                index += 1
        return found

    def drop(self, start: int, end: int) -> None:
        """Forget what is between two offsets."""
        if start >= end or not self._starts:
            return
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end)
        if low >= high:
            return
        starts, ends = [], []
        if self._starts[low] < start:
            starts.append(self._starts[low])
            ends.append(start)
        if self._ends[high - 1] > end:
            starts.append(end)
            ends.append(self._ends[high - 1])
        self._replace(low, high, starts, ends)

    def cut(self, size: int) -> None:
        """Forget what is behind ``size``, so that what comes there later begins as zeros."""
        self.drop(size, max(size, self.end))
        try:
            if os.fstat(self._file.fileno()).st_size > size:
                os.ftruncate(self._file.fileno(), size)
        except OSError as error:
            raise _problem(error) from None

    def close(self) -> None:
        """Give everything back."""
        self._budget.used -= sum(self._ends) - sum(self._starts)
        self._starts.clear()
        self._ends.clear()
        self._file.close()

    def _cover(self, start: int, end: int) -> None:
        if start >= end:
            return
        low = bisect_left(self._ends, start)
        high = bisect_right(self._starts, end)
        first = min(start, self._starts[low]) if low < high else start
        last = max(end, self._ends[high - 1]) if low < high else end
        self._replace(low, high, [first], [last])

    def _replace(self, low: int, high: int, starts: list[int], ends: list[int]) -> None:
        before = sum(self._ends[low:high]) - sum(self._starts[low:high])
        self._budget.take(sum(ends) - sum(starts) - before)
        self._starts[low:high] = starts
        self._ends[low:high] = ends


def _problem(error: OSError) -> FileStoreError:
    return FileStoreError(
        FileProblem.NO_SPACE, f"the gateway's spool cannot be written: {error.strerror}"
    )
