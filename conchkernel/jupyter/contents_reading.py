"""Reading one file by parts, ahead of a reader that goes straight on.

Bounded whatever the file's size: :data:`BLOCKS` blocks of :data:`BLOCK_BYTES` are kept, of which
:data:`AHEAD` are asked for ahead. Who reads here and there is sent just what was asked for.

A file that changes while it is read gives an error, never a mixture, as far as that can be seen:
each part tells size and time of the whole, and at the end the server is asked once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.python.failure import Failure

from conchkernel.files import FileProblem, FileStoreError

if TYPE_CHECKING:
    from conchkernel.jupyter.contents_rest import Contents, Model, Piece

BLOCK_BYTES = 1024 * 1024
#: Blocks asked for ahead of a reader that has shown to go straight on.
AHEAD = 3
#: Blocks kept: those, the one being read, and one behind for requests out of their order.
BLOCKS = AHEAD + 3
#: How far from the expected offset a request still belongs to a straight reader.
_NEAR = BLOCK_BYTES
#: Bytes read straight on for each block asked for ahead.
_TRUST = 128 * 1024


class _Block:
    """A block that is there or on its way."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.fetching: Deferred[Any] | None = None
        self.waiting: list[Deferred[None]] = []

    def wait(self) -> Deferred[None]:
        """Fires when it is there or has failed; several may wait, and give up."""
        waiting: Deferred[None] = Deferred(
            lambda one: self.waiting.remove(one) if one in self.waiting else None
        )
        self.waiting.append(waiting)
        return waiting

    def settle(self, failure: Failure | None) -> None:
        """Tell who waits."""
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            if failure is None:
                one.callback(None)
            else:
                one.errback(failure)


class Reader:
    """The bytes of a file as it was when it was opened.

    :param size: of what one reads there.
    :param seen: what the API told then, which is compared at the end.
    """

    def __init__(self, contents: Contents, path: bytes, size: int, seen: Model) -> None:
        self._contents = contents
        self.path = path
        self.size = size
        self._seen = seen
        self._mark: tuple[int, str] | None = None
        self._answers = 0
        self._problem: FileStoreError | None = None
        self._blocks: dict[int, _Block] = {}
        self._expected = 0
        self._straight = 0
        self._whole = False
        self._checking: _Block | None = None

    @property
    def seen(self) -> Model:
        """What the API told of the file that is being read."""
        return self._seen

    def read(self, offset: int, length: int) -> bytes | Deferred[bytes]:
        """``length`` bytes from ``offset``; fewer only at the end."""
        if self._problem is not None:
            return fail(self._problem)
        if length <= 0:
            return b""
        if offset >= self.size:
            if self._answers <= 1 and not self._whole:
                # One answer had all of it (or there was nothing to ask for).
                self._whole = True
                return b""
            return Deferred.fromCoroutine(self._at_end(offset, length))
        length = min(length, self.size - offset)
        near = abs(offset - self._expected) <= _NEAR
        self._straight = self._straight + length if near else 0
        self._expected = offset + length
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        wanted = range(first, last + 1)
        if last - first >= AHEAD or not (near or all(i in self._blocks for i in wanted)):
            return Deferred.fromCoroutine(self._exactly(offset, length))
        self._ahead(first, last)
        if all(self._blocks[i].data is not None for i in wanted):
            return self._cut(offset, length, [self._blocks[i] for i in wanted])
        blocks = [self._blocks[i] for i in wanted]
        return Deferred.fromCoroutine(self._assembled(offset, length, blocks))

    def close(self) -> None:
        """Ask for nothing more, and forget what came."""
        self._forget_all()
        if self._checking is not None and self._checking.fetching is not None:
            self._checking.fetching.cancel()

    def _forget_all(self) -> None:
        blocks, self._blocks = self._blocks, {}
        for block in blocks.values():
            if block.fetching is not None:
                block.fetching.cancel()

    # --- blocks ------------------------------------------------------------------------------

    def _ahead(self, first: int, last: int) -> None:
        """Have the blocks that are read, and some that will be."""
        more = min(AHEAD, self._straight // _TRUST)
        upto = min(last + more, (self.size - 1) // BLOCK_BYTES)
        for index in range(first, upto + 1):
            if index not in self._blocks:
                self._forget(first, upto)
                self._fetch(index)

    def _forget(self, first: int, upto: int) -> None:
        """Make place for one more block: those behind go first, then those far ahead."""
        while len(self._blocks) >= BLOCKS:
            idle = [i for i in self._blocks if not first <= i <= upto]
            if not idle:
                return
            behind = [i for i in idle if i < first]
            block = self._blocks.pop(min(behind) if behind else max(idle))
            if block.fetching is not None and not block.waiting:
                block.fetching.cancel()

    def _fetch(self, index: int) -> None:
        block = self._blocks[index] = _Block()
        offset = index * BLOCK_BYTES
        fetching = Deferred.fromCoroutine(
            self._asked(offset, min(BLOCK_BYTES, self.size - offset))
        )

        def fetched(result: bytes | Failure) -> None:
            block.fetching = None
            if isinstance(result, Failure):
                # The next who reads there may try again, where that can help.
                if self._blocks.get(index) is block:
                    del self._blocks[index]
                block.settle(_told(result))
            else:
                block.data = result
                block.settle(None)

        block.fetching = fetching
        fetching.addBoth(fetched)

    async def _assembled(self, offset: int, length: int, blocks: list[_Block]) -> bytes:
        # All at once: a block for which nobody waits is given up where others need its place.
        waiting = [block.wait() for block in blocks if block.data is None]
        try:
            for one in waiting:
                await one
        finally:
            for one in waiting:
                one.cancel()
                one.addErrback(lambda _: None)
        if self._problem is not None:
            raise self._problem
        return self._cut(offset, length, blocks)

    @staticmethod
    def _cut(offset: int, length: int, blocks: list[_Block]) -> bytes:
        start = offset % BLOCK_BYTES
        data = blocks[0].data or b""
        if len(blocks) == 1:
            return data[start : start + length]
        parts = [memoryview(data)[start:]]
        left = length - len(parts[0])
        for block in blocks[1:]:
            parts.append(memoryview(block.data or b"")[:left])
            left -= len(parts[-1])
        return b"".join(parts)

    # --- asking ------------------------------------------------------------------------------

    async def _exactly(self, offset: int, length: int) -> bytes:
        return await self._asked(offset, length)

    async def _asked(self, offset: int, length: int) -> bytes:
        """A part; asked for twice, since a connection may end under the first."""
        try:
            piece = await self._contents.read(self.path, offset, length)
        except FileStoreError as error:
            if error.problem is FileProblem.NOT_FOUND:
                raise self._changed() from None
            if error.problem is not FileProblem.CONNECTION_LOST:
                raise
            piece = await self._contents.read(self.path, offset, length)
        self._check(piece)
        assert piece is not None
        if len(piece.data) != length:
            raise self._changed()
        return piece.data

    def _check(self, piece: Piece | None) -> None:
        if self._problem is not None:
            raise self._problem
        if piece is None or piece.total != self.size:
            raise self._changed()
        self._answers += 1
        mark = (piece.total, piece.modified)
        if self._mark is None:
            self._mark = mark
        elif mark != self._mark:
            raise self._changed()

    def _changed(self) -> FileStoreError:
        if self._problem is None:
            self._problem = FileStoreError(
                FileProblem.FAILURE, "the file changed while it was read; get it again"
            )
        return self._problem

    # --- the end -----------------------------------------------------------------------------

    async def _at_end(self, offset: int, length: int) -> bytes:
        """``b""`` if what was read is still what is there.

        Who goes on reading behind the end (``tail -f``) then sees what was added since.
        """
        again = self._whole
        if self._checking is None:
            self._checking = check = _Block()
            check.fetching = Deferred.fromCoroutine(self._compare(again))

            def compared(result: Failure | None) -> None:
                check.fetching = self._checking = None
                check.settle(_told(result) if isinstance(result, Failure) else None)

            waiting = check.wait()
            check.fetching.addBoth(compared)
        else:
            waiting = self._checking.wait()
        await waiting
        if again and offset < self.size:
            return await self._exactly(offset, min(length, self.size - offset))
        return b""

    async def _compare(self, again: bool) -> None:
        seen = self._seen
        now = await self._contents.stat(self.path)
        if (now.size, now.mtime) == (seen.size, seen.mtime):
            self._whole = True
            return
        if not again:
            raise self._changed()
        size, _ = await true_size(self._contents, self.path, now)
        self._forget_all()
        self._seen, self.size = now, size
        self._mark, self._answers = None, 2


def _told(failure: Failure) -> Failure:
    """What goes to a reader: an error of a store's, always."""
    if failure.check(FileStoreError):
        return failure
    if failure.check(CancelledError):
        return Failure(FileStoreError(FileProblem.FAILURE, "the file was closed"))
    return failure


#: The longest a symbolic link can be, whose size the API tells instead of its file's.
_LINK_BYTES = 4096
#: What is there but opens for nobody: a link that leads out of the root, and a file that Jupyter's
#: account may not read, of which servers say only that something went wrong.
_UNTOLD = (
    FileProblem.UNSUPPORTED,
    FileProblem.PERMISSION,
    FileProblem.NOT_FOUND,
    FileProblem.FAILURE,
)


def may_be_link(seen: Model) -> bool:
    """Whether a model may be a symbolic link's."""
    return seen.size is None or 0 < seen.size < _LINK_BYTES


async def true_size(
    contents: Contents, path: bytes, seen: Model
) -> tuple[int, float | None]:
    """Size and time of what one reads at a path, which for a symbolic link the API does not tell.

    :param seen: what it tells.
    """
    if seen.size is not None and not may_be_link(seen):
        return seen.size, seen.mtime
    try:
        size, mtime = await contents.size(path)
    except FileStoreError as error:
        if error.problem not in _UNTOLD or seen.size is None:
            raise
        return seen.size, seen.mtime
    return size, seen.mtime if size == seen.size else mtime
