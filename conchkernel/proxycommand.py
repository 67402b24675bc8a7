"""``conchkernel proxy NAME``: SSH on stdin and stdout, as OpenSSH's ProxyCommand has it.

There is no port and no login: whoever holds the pipe is the user whose ssh started us. Two
processes share the work. ssh knows the **front**, which does nothing but wait; it ends when the
connection does, so nobody waits for what comes after. The **worker** has left the terminal and
speaks. After its connection it may be the last one out, and then stays behind for the grace time
before it takes kernel and agent away. Where the worker is killed the front has another one do that.

Nothing but SSH is written to stdout. What there is to say goes to stderr, in one line, and as the
reason of the disconnect too: where connections are shared, ssh gives us no other stderr than
/dev/null.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from conchkernel.errors import ConchKernelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conchkernel.names import Name, Settings

#: What ssh itself ends with where there is no connection.
FAILURE = 255
#: For ssh to read why, and to go.
_HEAR_SECONDS = 3.0


def main(name: str, stateDir: Path | None, *, verbose: bool = False) -> int:
    """Serve one connection.

    :returns: the exit status, in the front; the worker never returns.
    """
    from conchkernel.names import defaultStateDir, named

    _haveStandardDescriptors()
    if os.isatty(0):
        return _complain(name, f"this is for ssh to run; type: ssh {name}")
    try:
        chosen = named(name, stateDir or defaultStateDir())
    except ConchKernelError as error:
        return _complain(name, str(error))
    try:
        settings = chosen.load()
    except ConchKernelError as error:
        return _turnAway(name, str(error), 0, 1)
    front, worker = socket.socketpair()
    if _detached():
        front.close()
        _leaveFor(lambda: _work(chosen, settings, worker, verbose=verbose))
    worker.close()
    status = _waitAtTheFront(front)
    if status is not None:
        return status
    if _detached():
        _leaveFor(lambda: _work(chosen, settings, None, verbose=False))
    return _complain(name, "the process that spoke has been killed")


def _detached() -> bool:
    """Whether this is the child, in a session of its own, of the two that we are from now on."""
    if os.fork():
        return False
    os.setsid()
    return True


def _leaveFor(work: Callable[[], int]) -> NoReturn:
    """What a child has to do, and nothing of what its parent has begun."""
    status = FAILURE
    try:
        status = work()
    finally:
        os._exit(status)


def _waitAtTheFront(worker: socket.socket) -> int | None:
    """Be there for whoever has started us, until the worker says that the connection is over.

    :returns: the status that it has told; ``None`` where it could not.
    """
    # Ctrl-C is typed for what runs over there, or for ssh; and when ssh hangs up on us it has
    # closed the pipe too. Both are for the worker to notice.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _letGo(0, 1)
    status = worker.recv(1)
    return status[0] if status else None


def _letGo(*fds: int) -> None:
    """Hold nothing any more that somebody may wait for."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)


def _haveStandardDescriptors() -> None:
    """Where one was closed, what we open first would be taken for it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _complain(name: str, sentence: str) -> int:
    if sys.stderr is not None:
        sys.stderr.write(f"conchkernel proxy {name}: {sentence}\n")
        sys.stderr.flush()
    return FAILURE


def _turnAway(name: str, sentence: str, incoming: int, outgoing: int) -> int:
    """Complain, and tell ssh the same as the reason of a disconnect, before any key exchange."""
    from conchkernel.ssh.exchange import MSG_DISCONNECT
    from conchkernel.ssh.fields import DisconnectCode, string
    from conchkernel.ssh.packets import Outbound
    from conchkernel.ssh.transport import GatewayTransport

    status = _complain(name, sentence)
    reason = string(sentence.encode("ascii", "backslashreplace")) + string(b"")
    head = struct.pack(">BL", MSG_DISCONNECT, DisconnectCode.BY_APPLICATION)
    packet = b"".join(Outbound().seal(head, reason))
    try:
        os.write(outgoing, GatewayTransport.ourVersionString + b"\r\n" + packet)
        # Until ssh has gone: it would not read that if we were gone when it writes.
        while select.select([incoming], [], [], _HEAR_SECONDS)[0] and os.read(incoming, 65536):
            pass
    except OSError:
        pass  # it has gone before
    return status


def _work(name: Name, settings: Settings, front: socket.socket | None, *, verbose: bool) -> int:
    """The worker's whole life.

    :param front: ``None`` for one that only leaves, in the place of another that was killed.
    """
    from twisted.internet import reactor as installed
    from twisted.internet.defer import Deferred
    from twisted.logger import globalLogBeginner, textFileLogObserver

    from conchkernel.allocator import keepLargeBuffers
    from conchkernel.attachment import Attachment
    from conchkernel.pipedconnection import PipedConnection

    reactor: Any = installed
    keepLargeBuffers()
    observers = [textFileLogObserver(sys.stderr)] if verbose and sys.stderr else []
    globalLogBeginner.beginLoggingTo(observers, redirectStandardIO=False)
    # Descriptors of their own, so that those of the process can be let go of.
    incoming, outgoing = os.dup(0), os.dup(1)
    _letGo(0, 1)
    try:
        attachment = Attachment(reactor, name, settings)
        connection = PipedConnection(reactor, name, attachment)
    except ConchKernelError as error:
        if front is not None:
            _tell(front, _turnAway(name.text, str(error), incoming, outgoing))
        return FAILURE
    status = FAILURE

    async def live() -> None:
        nonlocal status
        if front is None:
            _letGo(2)
            await attachment.attach()
        else:
            complain = partial(_complain, name.text)
            served = await connection.serve(incoming, outgoing, front, complain)
            status = 0 if served else FAILURE
            if not verbose:
                _letGo(2)
            _tell(front, status)
        await attachment.leave()

    def over(result: Any) -> None:
        if result is not None:
            result.printTraceback(sys.stderr)
        reactor.callWhenRunning(reactor.stop)

    def hurry() -> None:
        connection.end()
        attachment.hurry()

    def catchSignals() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: reactor.callFromThread(hurry))

    reactor.callWhenRunning(catchSignals)
    reactor.callWhenRunning(lambda: Deferred.fromCoroutine(live()).addBoth(over))
    reactor.run(installSignalHandlers=False)
    return status


def _tell(front: socket.socket | None, status: int) -> int:
    """The connection is over, and with this status."""
    if front is not None:
        try:
            front.sendall(bytes([status]))
        except OSError:
            pass  # it was ended, and nobody waits
        front.close()
    return status
