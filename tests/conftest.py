"""What every test stands on: nothing that failed goes unheard.

Twisted logs a failure that nobody asked about and goes on; a test that passes above such a
failure has seen half of what happened.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
from twisted.logger import globalLogPublisher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twisted.logger import LogEvent
    from twisted.python.failure import Failure


class LoggedFailures:
    """The failures that were logged during a test."""

    def __init__(self) -> None:
        self._failures: list[Failure] = []

    def observe(self, event: LogEvent) -> None:
        """A log observer: keep the event's failure, if it has one."""
        failure = event.get("log_failure")
        if failure is not None:
            self._failures.append(failure)

    def flush(self, *types: type[Exception]) -> list[Failure]:
        """Failures of these types so far (of any, if none is given); they are not held against
        the test. An unhandled Deferred tells only when it is collected."""
        gc.collect()
        wanted = [one for one in self._failures if not types or one.check(*types)]
        self._failures = [one for one in self._failures if one not in wanted]
        return wanted


@pytest.fixture(autouse=True)
def loggedFailures() -> Iterator[LoggedFailures]:
    """Fails the test if it logged a failure and did not :meth:`~LoggedFailures.flush` it."""
    failures = LoggedFailures()
    globalLogPublisher.addObserver(failures.observe)
    yield failures
    # The youngest generations hold what one test has dropped; a full collection of this heap
    # would take longer than most tests.
    gc.collect(1)
    globalLogPublisher.removeObserver(failures.observe)
    unheard = failures._failures
    if unheard:
        pytest.fail(
            "\n".join(["failures were logged:", *(one.getTraceback() for one in unheard)]),
            pytrace=False,
        )
