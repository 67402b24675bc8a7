"""Bringing written bytes up to the server, by an API that can only append.

What is written straight on goes up in chunks, each of what has come while the last one was under
way, and counts as written when the server has it: many programs do not look at the answer to a
close. What is written elsewhere waits in a spool: behind the end until the gap is filled, before
the end until the whole file can be written anew - at once when the spool has all of it, else by
fetching the rest when the file is synced or closed. Each answer tells the file's size, so a lost or
doubled chunk does not go unseen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import CancelledError, Deferred, DeferredLock
from twisted.logger import Logger
from twisted.python.failure import Failure

from conchkernel.files import FileProblem, FileStoreError
from conchkernel.jupyter.contents_rest import TooLarge
from conchkernel.jupyter.contents_spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable

    from conchkernel.jupyter.contents_rest import Contents, Model
    from conchkernel.jupyter.contents_spool import Budget

#: Bytes in one request, which then has less than 1 MiB: more some proxies take only when told to.
#: A server decodes a request in one go, and its kernels wait meanwhile.
CHUNK_BYTES = 720 * 1024
#: A server that takes less than this at once takes no files.
_LEAST_CHUNK = 16 * 1024
#: How often and how long a chunk without an answer is waited for, before it is sent once more:
#: perhaps the server has read it all before the connection broke, and writes it just now.
_LOOKS = 8
_LOOK_SECONDS = 0.25
#: Bytes fetched at once of a file that is written anew.
_FETCH_BYTES = 1024 * 1024


class Uploader:
    """What is written to one file.

    :param size: of the file on the server now.
    """

    _log = Logger()

    def __init__(self, contents: Contents, path: bytes, size: int, budget: Budget) -> None:
        self._contents = contents
        self.path = path
        self.problem: FileStoreError | None = None
        """Why nothing more goes up; once set it stays."""
        self.model: Model | None = None
        """What the server told last."""
        self._budget = budget
        self._chunk = CHUNK_BYTES
        self._lock = DeferredLock()
        # The file is, in this order of precedence: the spool; ``_sent`` bytes of the server's;
        # the buffer behind those; zeros. The server's may have more, that does not count.
        self._spool: Spool | None = None
        self._sent = size
        self._remote = size
        self._buffer = bytearray()
        # Chunk 1 truncates: right for a file that begins here. 0 before that, else appending.
        self._number = 0 if size == 0 else 1
        self._unfinished = False
        self._pumping: Deferred[None] | None = None
        # Where the bytes of each writer who waits end.
        self._waiting: list[tuple[int, Deferred[None]]] = []

    @property
    def size(self) -> int:
        """Of the file as its writer sees it."""
        return max(self._end, self._spool.end if self._spool is not None else 0)

    @property
    def clean(self) -> bool:
        """Whether the server has all of it."""
        return self._spool is None and not self._buffer and self._remote == self._sent

    @property
    def _end(self) -> int:
        """Where what goes up in order ends."""
        return self._sent + len(self._buffer)

    @property
    def _anew(self) -> bool:
        """Whether the file must be written anew."""
        if self._number and self._remote > self._sent:
            return True
        return self._spool is not None and self._spool.start < self._end

    @property
    def _ready(self) -> int:
        """How many bytes could go up now."""
        spool = self._spool
        count = len(self._buffer)
        if spool is not None and spool.start == self._end and not self._anew:
            count += spool.run - spool.start
        return count

    # --- taking ------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes) -> Deferred[None] | None:
        """Take ``data``; the Deferred fires when the server has it, ``None`` is for what must wait
        in the spool.

        :raises FileStoreError: if it cannot be kept; a failed upload stays so.
        """
        if self.problem is not None:
            raise self.problem
        if not data:
            return None
        if offset == self._end and not self._anew:
            self._buffer += data
            self._drop(offset, offset + len(data))
            return self._pushed(offset + len(data))
        if offset < self._end and max(self.size, offset + len(data)) > self._budget.limit:
            raise self._budget.full()
        spool = self._spool or Spool(self._budget)
        spool.write(offset, data)
        self._spool = spool
        self._supersede()
        if spool.crowded:
            return Deferred.fromCoroutine(self._uncrowd())
        return self._pushed(offset + len(data))

    def extend(self, size: int) -> Deferred[None] | None:
        """Make it longer, with zeros.

        :raises FileStoreError: see :meth:`write`.
        """
        if self.problem is not None:
            raise self.problem
        spool = self._spool or Spool(self._budget)
        spool.zeros(self.size, size)
        self._spool = spool
        return self._pushed(size)

    async def shorten(self, size: int) -> None:
        """Make it shorter."""
        await self._lock.acquire()
        try:
            if self.problem is not None:
                raise self.problem
            if size == 0:
                self._discard()
                await self._empty()
                return
            if self._budget.limit < size < self._sent:
                raise self._budget.full()
            self._spill()
            if self._spool is not None:
                self._spool.cut(size)
                self._drop(0, 0)
            self._sent = min(self._sent, size)
            if self.size < size:
                # The cut went through a hole.
                self._spool = self._spool or Spool(self._budget)
                self._spool.zeros(self.size, size)
        finally:
            self._lock.release()
        self._supersede()
        self._pump()

    def _drop(self, start: int, end: int) -> None:
        spool = self._spool
        if spool is not None:
            spool.drop(start, end)
            if not spool:
                self._spool = None
                spool.close()

    def _spill(self) -> None:
        """Move the buffer into the spool, below what is there."""
        if self._buffer:
            spool = self._spool or Spool(self._budget)
            view = memoryview(self._buffer)
            for start, end, kept in spool.pieces(self._sent, self._end):
                if not kept:
                    spool.write(start, view[start - self._sent : end - self._sent])
            view.release()
            self._buffer.clear()
            self._spool = spool
            self._progress()

    def _supersede(self) -> None:
        """Where the spool has the whole file, what the server has does not count."""
        spool = self._spool
        if spool is None or spool.start > 0 or self._lock.locked or self._buffer:
            return
        if spool.run >= self._sent:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._sent, self._number, self._unfinished = 0, 0, False

    def _pump(self) -> None:
        """Begin to send, where there is something and nobody does."""
        if self._pumping is None and self._ready and self.problem is None:
            self._pumping = Deferred.fromCoroutine(self._upload(last=False, rest=False))
            self._pumping.addBoth(self._pumped)

    def _pushed(self, end: int) -> Deferred[None] | None:
        self._pump()
        if not self._on_the_way(end):
            return None
        waiting: Deferred[None] = Deferred(
            lambda _: self._waiting.remove(entry) if entry in self._waiting else None
        )
        entry = (end, waiting)
        self._waiting.append(entry)
        return waiting

    def _on_the_way(self, end: int) -> bool:
        """Whether bytes that end there are not on the server, but go there without more ado."""
        return self._sent < end <= self._sent + self._ready

    def _pumped(self, result: Failure | None) -> None:
        self._pumping = None
        if isinstance(result, Failure) and not result.check(FileStoreError):
            self._log.failure("uploading", result)
        self._progress()
        # More may have come since it looked last.
        self._pump()

    def _progress(self) -> None:
        """Let writers go on, or tell them."""
        waiting = self._waiting
        self._waiting = []
        over = []
        for end, one in waiting:
            if self.problem is None and self._on_the_way(end):
                self._waiting.append((end, one))
            else:
                over.append(one)
        for one in over:
            if self.problem is None:
                one.callback(None)
            else:
                one.errback(self.problem)

    # --- reading -----------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """What was written, over what was there before."""
        await self._lock.acquire()
        try:
            if self.problem is not None:
                raise self.problem
            end = min(offset + length, self.size)
            parts = []
            for start, stop, kept in self._pieces(offset, end):
                if kept and self._spool is not None:
                    parts.append(self._spool.read(start, stop - start))
                else:
                    parts.append(await self._fetched(start, min(stop, self._sent)))
                    first = max(start, self._sent)
                    parts.append(bytes(self._buffer[first - self._sent : stop - self._sent]))
                    parts.append(bytes(max(0, stop - max(first, self._end))))
            return b"".join(parts)
        finally:
            self._lock.release()

    def _pieces(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        if self._spool is not None:
            return self._spool.pieces(start, end)
        return [(start, end, False)] if start < end else []

    async def _fetched(self, start: int, end: int) -> bytes:
        """What the server has."""
        if start >= end:
            return b""
        piece = await self._contents.read(self.path, start, end - start)
        if self.problem is not None:
            raise self.problem
        if piece is None or piece.total != self._remote:
            raise self._changed()
        return piece.data

    # --- giving ------------------------------------------------------------------------------

    async def hold(self) -> Callable[[], None]:
        """Wait for what is going up, and let nothing follow until the answer is called."""
        await self._lock.acquire()
        return self._lock.release

    async def flush(self) -> None:
        """Have it all on the server."""
        await self._upload(last=False, rest=True)

    async def finish(self) -> None:
        """Have it all on the server, as one file. The uploader is of no use afterwards."""
        try:
            await self._upload(last=True, rest=True)
        finally:
            self.abandon()

    def abandon(self, why: str = "the file is closed") -> None:
        """Give up what did not go up."""
        if self.problem is None:
            self.problem = FileStoreError(FileProblem.FAILURE, why)
        if self._pumping is not None:
            self._pumping.cancel()
        self._discard()
        self._progress()

    def _discard(self) -> None:
        self._buffer.clear()
        spool, self._spool = self._spool, None
        if spool is not None:
            spool.close()

    async def _upload(self, *, last: bool, rest: bool) -> None:
        """Send what is ready.

        :param rest: all of it, also what waits in the spool for what is before it.
        :param last: tell the server that this was all.
        """
        await self._lock.acquire()
        try:
            if rest:
                if self.problem is not None:
                    raise self.problem
                await self._complete()
            else:
                # What else has come with it goes with it.
                await self._contents.pause(0)
            if self.problem is not None:
                raise self.problem
            while self._ready:
                self._top_up()
                data = bytes(memoryview(self._buffer)[: self._chunk])
                await self._send(data, last=last and self.size == self._sent + len(data))
                self._progress()
            if last and self._unfinished:
                await self._send(b"", last=True)
        except (FileStoreError, CancelledError) as error:
            if self.problem is None:
                given_up = FileStoreError(FileProblem.FAILURE, "the upload was given up")
                self.problem = error if isinstance(error, FileStoreError) else given_up
            self._progress()
            raise self.problem from None
        finally:
            self._lock.release()

    def _top_up(self) -> None:
        """What is next in the spool is written no more where it is: into the buffer with it."""
        spool = self._spool
        if spool is not None and spool.start == self._end and not self._anew:
            start = spool.start
            count = min(self._chunk - len(self._buffer), spool.run - start)
            if count > 0:
                self._buffer += spool.read(start, count)
                self._drop(start, start + count)

    async def _complete(self) -> None:
        """Fill the gaps, so that all can go up in order."""
        if self._anew:
            await self._fill()
            self._begin_anew()
        if self._spool is not None:
            self._fill_zeros()

    async def _uncrowd(self) -> None:
        """Fill gaps because there are too many."""
        await self._lock.acquire()
        try:
            if self._spool is not None and self._spool.crowded:
                if self._anew:
                    await self._fill()
                self._fill_zeros()
        finally:
            self._lock.release()
        self._supersede()
        self._pump()

    async def _fill(self) -> None:
        """Fetch what the spool has not of the server's bytes."""
        self._spill()
        spool = self._spool = self._spool or Spool(self._budget)
        for first, stop, had in spool.pieces(0, self._sent):
            for start in () if had else range(first, stop, _FETCH_BYTES):
                data = await self._fetched(start, min(start + _FETCH_BYTES, stop))
                # What was written meanwhile is newer.
                for a, b, kept in spool.pieces(start, start + len(data)):
                    if not kept:
                        spool.write(a, memoryview(data)[a - start : b - start])

    def _fill_zeros(self) -> None:
        if self._spool is not None:
            for start, end, kept in self._spool.pieces(self._end, self._spool.end):
                if not kept:
                    self._spool.zeros(start, end)

    # --- requests ----------------------------------------------------------------------------

    async def _empty(self) -> None:
        """Make the server's file empty."""
        self.model = await self._contents.put(self.path, b"")
        self._begin_anew()
        self._remote = 0

    async def _send(self, data: bytes, *, last: bool) -> None:
        """One chunk, which is what the buffer begins with."""
        # As far as is known this may be all, and then nothing more has to be said at the end.
        whole = last or self.size == self._sent + len(data)
        if self._number == 0:
            chunk, before = (None if whole else 1), 0
        else:
            chunk, before = (-1 if last else self._number + 1), self._sent
        try:
            told = await self._contents.put(self.path, data, chunk)
        except TooLarge:
            if len(data) <= _LEAST_CHUNK:
                raise
            half = len(data) // 2
            self._chunk = min(self._chunk, half)
            await self._send(data[:half], last=False)
            await self._send(data[half:], last=last)
            return
        except FileStoreError as error:
            if error.problem is not FileProblem.CONNECTION_LOST or chunk in (None, 1):
                raise
            told = await self._again(data, chunk, before)
        after = before + len(data)
        if told.size not in (None, after) and await self._real_size() != after:
            raise self._changed()
        self.model = told
        self._number = max(1, self._number) + (chunk != 1)
        self._unfinished = not last and chunk is not None
        self._sent = self._remote = after
        del self._buffer[: len(data)]

    async def _again(self, data: bytes, chunk: int | None, before: int) -> Model:
        """The answer to a chunk did not come: did the chunk?"""
        for look in range(_LOOKS):
            if look:
                await self._contents.pause(_LOOK_SECONDS)
            size = await self._real_size()
            if size == before + len(data):
                return await self._contents.stat(self.path)
            if size != before:
                raise self._changed()
        return await self._contents.put(self.path, data, chunk)

    async def _real_size(self) -> int:
        return (await self._contents.size(self.path))[0]

    @staticmethod
    def _changed() -> FileStoreError:
        return FileStoreError(
            FileProblem.FAILURE,
            "the file on the server is not what was written: somebody else writes it, too, or "
            "the server takes no files in parts; write it again",
        )
