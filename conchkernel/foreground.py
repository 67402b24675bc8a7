"""For commands that do one thing over the network: the reactor for as long as that takes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from conchkernel.errors import ConchKernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from twisted.python.failure import Failure

FAILURE = 1
INTERRUPTED = 130


def complain(program: str, sentence: str) -> int:
    """Say in one line what went wrong.

    :returns: the exit status for that.
    """
    sys.stderr.write(f"{program}: {sentence}\n")
    return FAILURE


def run(program: str, work: Callable[[Any], Coroutine[Any, Any, int]]) -> int:
    """Run ``work`` with the reactor, once in a process.

    :param program: for the line on stderr that an error of ours becomes.
    :returns: its exit status.
    """
    from twisted.internet import reactor as installed
    from twisted.internet.defer import CancelledError, Deferred
    from twisted.logger import globalLogBeginner

    reactor: Any = installed
    globalLogBeginner.beginLoggingTo([], redirectStandardIO=False)
    status = INTERRUPTED
    working: Deferred[int] | None = None

    def done(result: int | Failure) -> None:
        nonlocal status, working
        working = None
        if isinstance(result, int):
            status = result
        elif not result.check(CancelledError):
            if result.check(ConchKernelError) is None:
                result.printTraceback()
            status = complain(program, result.getErrorMessage())
        reactor.callWhenRunning(_stop)

    def _stop() -> None:
        if reactor.running:
            reactor.stop()

    def begin() -> None:
        nonlocal working
        working = Deferred.fromCoroutine(work(reactor))
        working.addBoth(done)

    def interrupted() -> Any:
        if working is not None:
            # What it began it undoes.
            working.cancel()
        return working

    reactor.callWhenRunning(begin)
    reactor.addSystemEventTrigger("before", "shutdown", interrupted)
    reactor.run()
    return status
