"""Reading ahead, over an API that answers when the test says so."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from conchkernel.jupyter.contents_reading import BLOCK_BYTES, Reader
from conchkernel.jupyter.contents_rest import Piece

SIZE = 40 * BLOCK_BYTES


class SlowContents:
    """Every part that is asked for waits for :meth:`answer`."""

    def __init__(self) -> None:
        self.asked: dict[int, tuple[Deferred[Piece], int]] = {}

    def read(self, path: bytes, offset: int, length: int) -> Deferred[Piece]:
        asked: Deferred[Piece] = Deferred()
        self.asked[offset] = (asked, length)
        return asked

    def answer(self, offset: int) -> None:
        asked, length = self.asked.pop(offset)
        if not asked.called:
            asked.callback(Piece(bytes(length), SIZE, "then"))


def test_a_read_over_two_blocks_is_answered_though_others_need_their_place() -> None:
    contents = SlowContents()
    seen: Any = None
    reader = Reader(contents, b"/file", SIZE, seen)  # type: ignore[arg-type]
    both = reader.read(BLOCK_BYTES - 100, 200)
    others = [reader.read(step * BLOCK_BYTES + 10, 100) for step in range(2, 15)]
    answers: list[bytes] = []
    for one in (both, *others):
        assert isinstance(one, Deferred)
        one.addCallback(answers.append)
    while contents.asked:
        for offset in tuple(contents.asked):
            contents.answer(offset)
    assert sorted(map(len, answers)) == [100] * 13 + [200]
