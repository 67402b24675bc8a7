"""The only module that may end a process: what ``twistd conchkernel`` and ``twist`` run.

:mod:`conchkernel.tap` builds the same service for other applications and leaves their process
alone. Here it is ours, so a wrong value or a failed start is told in one line on stderr and ends
the process with status 1, after everything that was begun has been undone.

Twisted's runners take no exit status from a service: ``twistd`` catches whatever leaves
``reactor.run`` and exits with 0, ``twist`` has no hook, and raising during start-up prints a
traceback and leaves the pid file. So the reactor is stopped in the ordinary way, the runner
finishes in the ordinary way, and the status is given at the interpreter's very end.

A daemon's status is that of the foreground process, which is gone before Jupyter has answered.
So before ``twistd`` forks, one rehearsal in a child process starts and stops everything for real.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.logger import FilteringLogObserver, ILogObserver, LogLevel, LogLevelFilterPredicate
from twisted.python import usage
from twisted.scripts._twistd_unix import UnixAppLogger

from conchkernel import tap
from conchkernel.allocator import keepLargeBuffers
from conchkernel.errors import ConchKernelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from constantly import NamedConstant
    from twisted.python.failure import Failure

    from conchkernel.service import GatewayService

#: Exit status of everything that was refused or failed.
FAILURE = 1


class Options(tap.Options):
    """The options of :class:`conchkernel.tap.Options`; a wrong value ends the process."""

    _arguments: Sequence[str] = ()

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse ``options`` or leave with one line: ``twistd`` would print the whole help."""
        self._arguments = list(sys.argv[1:] if options is None else options)
        try:
            super().parseOptions(self._arguments)
        except usage.UsageError as error:
            raise SystemExit(f"conchkernel: {error}") from None
        self._setRunnersLogLevel()

    def _setRunnersLogLevel(self) -> None:
        """Have the runner drop what is below ``--log-level``.

        ``twist`` has that option itself; ``twistd`` logs all, so it gets an observer that
        filters, unless the operator chose one.
        """
        runner = self.parent
        if runner is None:
            return
        if "logLevel" in runner:
            runner["logLevel"] = self["level"]
        elif runner.get("logger", "") is None:
            global _twistdOptions, _leastLevel  # twistd takes a name only
            _twistdOptions, _leastLevel = runner, self["level"]
            runner["logger"] = "conchkernel.process.makeLogObserver"


_twistdOptions: usage.Options | None = None
_leastLevel: NamedConstant = LogLevel.info


def makeLogObserver() -> ILogObserver:
    """What ``twistd`` would log to by its own options, without the events of lower levels."""
    options = {**(_twistdOptions or {}), "logger": None}
    return FilteringLogObserver(
        UnixAppLogger(options)._getLogObserver(), [LogLevelFilterPredicate(_leastLevel)]
    )


def makeService(options: Options) -> GatewayService:
    """The service for the command line ``options``, in a process of its own."""
    if _becomesDaemon(options):
        _rehearse(options)
    keepLargeBuffers()
    service = _makeService(options)
    service.whenStarted().addErrback(_failed)
    return service


def _makeService(options: Options) -> GatewayService:
    try:
        return tap.makeService(options)
    except ConchKernelError as error:
        raise SystemExit(f"conchkernel: {error}") from None


def _becomesDaemon(options: Options) -> bool:
    """Whether the runner is ``twistd`` and is going to leave the foreground."""
    runner = options.parent
    return runner is not None and "nodaemon" in runner and not runner["nodaemon"]


def _rehearse(options: Options) -> None:
    """Start and stop everything once, in a child; it has said on stderr what did not work."""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "conchkernel.process"],
            # Through a pipe, for the URL may hold a token and argv is public.
            input=json.dumps(list(options._arguments)),
            text=True,
            check=False,
        )
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    if child.returncode:
        raise SystemExit(FAILURE)


def _failed(failure: Failure) -> None:
    """The service could not start: say why, stop as usual, leave with status 1."""
    if failure.check(CancelledError):
        return  # a signal came first, and is being obeyed
    # The runner has redirected sys.stderr to its log.
    stderr = sys.__stderr__
    if stderr is not None:
        stderr.write(f"conchkernel: {failure.getErrorMessage()}\n")
        stderr.flush()
    # From here on nothing but the interpreter's end is left to do when this is called; handlers
    # registered before it would be skipped, and so the buffers are flushed by hand.
    atexit.register(_leave, FAILURE)

    def stop() -> None:
        try:
            reactor.stop()
        except ReactorNotRunning:
            pass  # on its way out already

    reactor.callWhenRunning(stop)


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
    os._exit(status)


def _main() -> None:
    """The rehearsal: options as JSON on stdin, start, stop, and the status tells."""
    options = Options()
    options.parseOptions(json.load(sys.stdin))
    service = _makeService(options)
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    service.privilegedStartService()
    if options["wait-for-jupyter"]:
        # Then Jupyter's state now is no reason not to start; a port that is taken is.
        rehearsed = Deferred.fromCoroutine(service.listening())
    else:
        service.startService()
        rehearsed = service.whenStarted()
    started = False

    def enough(_: object) -> None:
        nonlocal started
        started = True
        reactor.callWhenRunning(reactor.stop)

    rehearsed.addCallbacks(enough, _failed)
    reactor.run()
    if not started:  # a signal came first
        raise SystemExit(FAILURE)


if __name__ == "__main__":
    _main()
