"""A small file that came with its OPEN: when it is told, and when it is read anew."""

from __future__ import annotations

import pytest

from conchkernel.files import Attributes
from conchkernel.jupyter.agentahead import Ahead

ATTRIBUTES = Attributes(size=7)


@pytest.fixture
def ahead() -> Ahead:
    return Ahead(ATTRIBUTES, b"content", stirred=3, until=10.0)


def test_once_from_the_first_byte_to_the_end(ahead: Ahead) -> None:
    """Each piece is told once, and the end once."""
    assert [ahead.read(0, 4), ahead.read(4, 4), ahead.read(7, 4)] == [b"cont", b"ent", b""]
    assert ahead.read(7, 4) is None
    assert not ahead.isFresh(3, 1.0)


@pytest.mark.parametrize("offsets", [[1], [7], [0, 0], [0, 5], [2**63]])
def test_anything_else_is_read_anew(ahead: Ahead, offsets: list[int]) -> None:
    """A gap, a step back or a second time: nothing is told from then on."""
    *before, last = offsets
    for offset in before:
        assert ahead.read(offset, 4) == b"cont"
    assert ahead.read(last, 4) is None
    assert ahead.read(0, 4) is None


def test_attributes_are_told_once(ahead: Ahead) -> None:
    """Who asks again wants to know whether they have changed."""
    assert ahead.stat() is ATTRIBUTES
    assert ahead.stat() is None
    assert ahead.read(0, 10) == b"content"


@pytest.mark.parametrize(
    ("stirred", "now", "fresh"), [(3, 10.0, True), (4, 9.0, False), (3, 10.1, False)]
)
def test_it_gets_old(ahead: Ahead, stirred: int, now: float, fresh: bool) -> None:
    """By time, and by whatever may have changed the file; it does not become fresh again."""
    assert ahead.isFresh(stirred, now) is fresh
    assert ahead.isFresh(3, 9.0) is fresh
    assert ahead.read(0, 10) == (b"content" if fresh else None)
