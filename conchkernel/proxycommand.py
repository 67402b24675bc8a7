"""``conchkernel proxy NAME``: SSH on stdin and stdout, as OpenSSH's ProxyCommand has it.

There is no port and no login: whoever holds the pipe is the user whose ssh started us. Two
processes share the work. ssh knows the **front**, which does nothing but wait; it ends when the
connection does, so nobody waits for what comes after. The **worker** has left the terminal and
speaks. After its connection it may be the last one out, and then stays behind for the grace time
before it takes kernel and agent away.

Nothing but SSH is written to stdout. What there is to say goes to stderr, in one line, and as the
reason of the disconnect too: where connections are shared, ssh gives us no other stderr than
/dev/null.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from conchkernel.errors import ConchKernelError

if TYPE_CHECKING:
    from pathlib import Path

    from conchkernel.names import Name, Settings

#: What ssh itself ends with where there is no connection.
FAILURE = 255


def main(name: str, stateDir: Path | None, *, verbose: bool = False) -> int:
    """Serve one connection.

    :returns: the exit status, in the front; the worker never returns.
    """
    from conchkernel.names import defaultStateDir, named

    if sys.stdin.isatty():
        return _complain(name, f"this is for ssh to run; type: ssh {name}")
    try:
        chosen = named(name, stateDir or defaultStateDir())
        settings = chosen.load()
    except ConchKernelError as error:
        return _complain(name, str(error))
    front, worker = socket.socketpair()
    if os.fork():
        worker.close()
        return _waitAtTheFront(name, front)
    front.close()
    os.setsid()
    status = FAILURE
    try:
        status = _work(chosen, settings, worker, verbose)
    finally:
        os._exit(status)


def _waitAtTheFront(name: str, worker: socket.socket) -> int:
    """Be there for whoever has started us, until the worker says that the connection is over."""
    # It is typed for what runs over there or for ssh, whose end we notice.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _letGo(0, 1)
    status = worker.recv(1)
    return status[0] if status else _complain(name, "it has ended without a word")


def _letGo(*fds: int) -> None:
    """Hold nothing any more that somebody may wait for."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)


def _complain(name: str, sentence: str) -> int:
    sys.stderr.write(f"conchkernel proxy {name}: {sentence}\n")
    sys.stderr.flush()
    return FAILURE


def _work(name: Name, settings: Settings, front: socket.socket, verbose: bool) -> int:
    """The worker's whole life."""
    from twisted.internet import reactor as installed
    from twisted.internet.defer import Deferred
    from twisted.logger import globalLogBeginner, textFileLogObserver

    from conchkernel.allocator import keepLargeBuffers
    from conchkernel.attachment import Attachment

    reactor: Any = installed
    keepLargeBuffers()
    observers = [textFileLogObserver(sys.stderr)] if verbose else []
    globalLogBeginner.beginLoggingTo(observers, redirectStandardIO=False)
    # Descriptors of their own, so that those of the process can be let go of.
    incoming, outgoing = os.dup(0), os.dup(1)
    _letGo(0, 1)
    attachment = Attachment(reactor, name, settings)
    status = FAILURE

    async def live() -> None:
        nonlocal status
        problem = await attachment.serve(incoming, outgoing, front)
        if problem is not None:
            _complain(name.text, problem)
        status = 0 if problem is None else FAILURE
        if not verbose:
            _letGo(2)
        try:
            front.sendall(bytes([status]))
        except OSError:
            pass  # it was ended, and nobody waits
        front.close()
        await attachment.leave()

    def over(result: Any) -> None:
        if result is not None:
            result.printTraceback(sys.stderr)
        reactor.callWhenRunning(reactor.stop)

    def catchSignals() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: reactor.callFromThread(attachment.hurry))

    reactor.callWhenRunning(catchSignals)
    reactor.callWhenRunning(lambda: Deferred.fromCoroutine(live()).addBoth(over))
    reactor.run(installSignalHandlers=False)
    return status
