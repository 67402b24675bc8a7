"""Answers in the order of their questions."""

from __future__ import annotations

import pytest
from twisted.internet.defer import Deferred, succeed

from conchkernel.ssh.fields import ProtocolError
from conchkernel.ssh.replies import MAX_WAITING, Replies


def test_atOnceWhereNothingWaits() -> None:
    """An answer that is known, and owes nothing to others, is sent."""
    sent: list[str] = []
    replies = Replies(sent.append, "no")
    replies.add("a")
    replies.add(succeed("b"))
    assert sent == ["a", "b"]


def test_lateAnswersHoldBackOthers() -> None:
    """Whatever the order of the answers, the order of the questions is kept."""
    sent: list[str] = []
    replies = Replies(sent.append, "no")
    first: Deferred[str] = Deferred()
    second: Deferred[str] = Deferred()
    replies.add(first)
    replies.add("b")
    replies.add(second)
    replies.add("d")
    second.callback("c")
    assert sent == []
    first.callback("a")
    assert sent == ["a", "b", "c", "d"]


def test_failureIsARefusal(loggedFailures: object) -> None:
    """An answer that fails is logged, and refuses."""
    sent: list[str] = []
    replies = Replies(sent.append, "no")
    answer: Deferred[str] = Deferred()
    replies.add(answer)
    answer.errback(ZeroDivisionError())
    assert sent == ["no"]
    assert loggedFailures.flush(ZeroDivisionError)  # type: ignore[attr-defined]


@pytest.mark.parametrize("late", [True, False])
def test_bounded(late: bool) -> None:
    """Questions that cannot be answered yet do not pile up for ever."""
    replies = Replies(lambda _: None, "no")
    for _ in range(MAX_WAITING):
        replies.add(Deferred())
    with pytest.raises(ProtocolError):
        replies.add(Deferred() if late else "known")


def test_nobodyIsThere() -> None:
    """After the end late answers go nowhere."""
    sent: list[str] = []
    replies = Replies(sent.append, "no")
    answer: Deferred[str] = Deferred()
    replies.add(answer)
    replies.close()
    answer.callback("a")
    assert sent == []
