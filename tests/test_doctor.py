"""The last hop that doctor tries; the others are tried on the real thing in ``tests/interop``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from conchkernel import doctor
from conchkernel.errors import LinkLost
from conchkernel.testing import MemoryLink, MemoryStream

if TYPE_CHECKING:
    from collections.abc import Callable


def silent(stream: MemoryStream) -> None:
    """It runs, and nothing comes back."""
    stream.opened()


def ended(stream: MemoryStream) -> None:
    """The account's shell is one that runs nothing."""
    stream.opened()
    stream.end()


def lost(stream: MemoryStream) -> None:
    """The host is gone."""
    stream.lose(LinkLost("the kernel's host does not answer"))


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (silent, "is the host overloaded?"),
        (ended, "does not run `cat`"),
        (lost, "the kernel's host does not answer"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_noEcho(program: Callable[[MemoryStream], None], sentence: str) -> None:
    """What does not come back is told with what to think of, and not waited for without end."""
    clock = Clock()
    streams: list[MemoryStream] = []

    def begin(stream: MemoryStream) -> None:
        streams.append(stream)
        program(stream)

    link: Any = MemoryLink(begin)
    asked = Deferred.fromCoroutine(doctor._echo(clock, link))
    clock.advance(60)
    with pytest.raises(doctor._Sick, match=sentence) as caught:
        await asked
    assert caught.value.hop == "echo"
    assert len(streams) == 1
