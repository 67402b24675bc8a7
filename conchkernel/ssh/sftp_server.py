"""The SFTP subsystem of a session: flow control around :mod:`conchkernel.ssh.sftp_requests`.

Every request is answered once. What is under way is bounded in number and in bytes; beyond that
requests stay unread, the channel's window is not given back, and the client waits. READ and WRITE
of a store that answers at once cost a parsed header and a call. Answers of one turn leave together.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred, maybeDeferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from conchkernel.errors import ConchKernelError
from conchkernel.files import BYTES_UNDER_WAY
from conchkernel.interfaces import ExitStatus
from conchkernel.ssh import sftp_packets as packets
from conchkernel.ssh.fields import ProtocolError, printable
from conchkernel.ssh.sftp_answers import Answers
from conchkernel.ssh.sftp_handles import Handles
from conchkernel.ssh.sftp_order import Mode, Order, Task, place
from conchkernel.ssh.sftp_packets import (
    MALFORMED,
    MAX_DATA_BYTES,
    UNKNOWN_EXTENSION,
    Kind,
    RequestReader,
    Status,
)
from conchkernel.ssh.sftp_requests import RULES, Requests, extensionsFor
from conchkernel.ssh.sftp_status import statusOf

if TYPE_CHECKING:
    from collections.abc import Callable

    from conchkernel.files import IFileStore
    from conchkernel.ssh.sessions import SessionChannel
    from conchkernel.ssh.sftp_handles import Handle

#: Requests under way in a session. OpenSSH's clients send up to 64, sshfs and asyncssh 128.
MAX_UNDER_WAY = 128
#: Requests whose answers wait for that of an earlier one.
MAX_ROW = 1024
#: Bytes under way, whatever a store says: of WRITEs, of READs as they asked for.
MAX_BYTES_UNDER_WAY = BYTES_UNDER_WAY
#: Answers that wait for the client, beyond which no request is begun: more of them would make
#: nothing faster.
MAX_ANSWER_BYTES = 1024 * 1024
#: Requests that are begun before others than this session have their turn: a window full of the
#: smallest ones is 160 000.
MAX_BEGUN_AT_ONCE = 1024
#: A task is charged this much for its objects, beside its bytes.
_TASK_BYTES = 512
#: What sftp-server exits with when its client talks nonsense.
_NONSENSE_STATUS = 11
_MAX_OFFSET = 2**63 - 1


class ServedFiles:
    """A store, served on a session channel.

    :param channel: it is attached to at once, and what comes before the store is there waits.
    :param findStore: called once; may be answered late.
    :param clock: for answers to leave together; without one they leave as they come.
    """

    _log = Logger()

    def __init__(
        self,
        channel: SessionChannel,
        findStore: Callable[[], Deferred[IFileStore]],
        clock: Any = None,
    ) -> None:
        self._channel = channel
        self._clock = clock
        self._reader = RequestReader()
        self._handles = Handles()
        self._order = Order()
        self._store: IFileStore | None = None
        self._requests: Requests | None = None
        self._tasks: dict[Task, None] = {}
        self._bytesUnderWay = 0
        self._maxBytesUnderWay = MAX_BYTES_UNDER_WAY
        self._answers = Answers(channel.write)
        self._taken = 0
        # What need not wait any more, while others are being begun.
        self._ready: deque[Task] = deque()
        self._running = False
        self._inTurn = self._turnCalled = False
        self._inputEnded = self._stopped = False
        finding = self._finding = maybeDeferred(findStore)
        channel.attach(self._receive, self._endInput, self._grant)
        finding.addCallbacks(self._begin, self._noStore)
        finding.addErrback(self._noStore)

    # --- beginning and end -------------------------------------------------------------------

    def _begin(self, store: IFileStore) -> None:
        if self._stopped:
            _forget(maybeDeferred(store.close))
            return
        self._store = store
        self._maxBytesUnderWay = min(MAX_BYTES_UNDER_WAY, store.bytesUnderWay)
        self._requests = Requests(store, self._handles, self._clock)
        self._turn()

    def _noStore(self, reason: Failure) -> None:
        if self._stopped:
            return
        error = reason.value
        if not isinstance(error, ConchKernelError):
            if not isinstance(error, CancelledError):
                self._log.failure("no files for a session", reason)
            error = ConchKernelError("files are not available (internal error)")
        # Before any turn: it would answer with what is not there.
        self._stop()
        if self._clock is None:
            self._channel.streamClosed(error)
        else:
            # The request for the subsystem is answered first: only then stderr is read.
            self._clock.callLater(0, self._channel.streamClosed, error)

    def _endInput(self) -> None:
        self._inputEnded = True
        self._turn()

    def _nonsense(self, error: ProtocolError) -> None:
        """The client's stream cannot be followed any more."""
        self._answers.flush()
        self._stop()
        self._channel.writeError(str(error))
        self._channel.streamExited(ExitStatus(_NONSENSE_STATUS))

    def channelClosed(self) -> None:
        """The channel is gone: so is all that is under way or open. Called once."""
        self._stop()

    def _stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        if self._store is None:
            self._finding.cancel()
        tasks, self._tasks = self._tasks, {}
        for task in tasks:
            if task.deferred is not None:
                task.deferred.cancel()
        self._handles.clear()
        self._answers.clear()
        if self._store is not None:
            _forget(maybeDeferred(self._store.close))

    # --- turns -------------------------------------------------------------------------------

    def _receive(self, data: bytes) -> None:
        self._reader.feed(data)
        self._turn()

    def _grant(self, limit: int) -> None:
        self._answers.granted = limit
        if self._answers:
            self._turn()

    def _turn(self) -> None:
        """Begin what may be begun and send what may be sent, until neither goes on."""
        if self._inTurn or self._stopped or self._requests is None:
            return
        self._inTurn = True
        left = MAX_BEGUN_AT_ONCE
        try:
            left = self._beginRequests(left)
            while self._answers.flush() and not self._stopped:
                left = self._beginRequests(left)
                if not left and self._clock is None:
                    left = MAX_BEGUN_AT_ONCE
        except ProtocolError as error:
            self._nonsense(error)
        finally:
            self._inTurn = False
        if self._stopped:
            return
        taken = self._reader.taken
        if taken != self._taken:
            taken, self._taken = taken - self._taken, taken
            self._channel.consumed(taken)
        if not left:
            self._turnSoon()
        elif self._inputEnded and not self._tasks and not self._answers and not self._stopped:
            self._stop()
            self._channel.streamExited(ExitStatus(0))

    def _turnSoon(self) -> None:
        if self._clock is None:
            self._turn()
        elif not self._turnCalled:
            self._turnCalled = True
            self._clock.callLater(0, self._calledTurn)

    def _calledTurn(self) -> None:
        self._turnCalled = False
        self._turn()

    # --- requests ----------------------------------------------------------------------------

    def _beginRequests(self, count: int) -> int:
        """Begin what may be begun, up to ``count`` requests; how many more it could have been."""
        nextRequest = self._reader.next
        tasks = self._tasks
        while (
            count
            and self._answers.bytes < MAX_ANSWER_BYTES
            and len(tasks) < MAX_UNDER_WAY
            and len(self._answers.row) < MAX_ROW
            and self._bytesUnderWay < self._maxBytesUnderWay
        ):
            request = nextRequest()
            if request is None:
                break
            count -= 1
            what, requestId, arguments = request
            if what == Kind.READ:
                self._read(requestId, *arguments)
            elif what == Kind.WRITE:
                self._write(requestId, *arguments)
            else:
                self._beginOther(what, requestId, arguments)
        return count

    def _read(self, requestId: int, token: bytes, offset: int, length: int) -> None:
        handle = self._handles.get(token)
        if handle is None or handle.isListing:
            self._noHandle(requestId)
            return
        if offset > _MAX_OFFSET:
            self._answers.reply(requestId, packets.status(Status.BAD_MESSAGE, "no such offset"))
            return
        length = min(length, MAX_DATA_BYTES)
        task = None
        if self._order.isFree(handle, Mode.READING, offset):
            try:
                data = handle.opened.read(offset, length)
                if not isinstance(data, Deferred):
                    self._answers.data(requestId, data, length)
                    return
            except Exception as error:
                self._fail(requestId, error)
                return
            task = self._readTask(requestId, handle, offset, length)
            self._take(task)
            self._order.join(task)
            self._await(task, data)
        else:
            task = self._readTask(requestId, handle, offset, length)
            self._admit(task)

    def _readTask(self, requestId: int, handle: Handle, offset: int, length: int) -> Task:
        return Task(
            requestId, handle.opened.read, (offset, length), Mode.READING,
            handles=(handle,), span=(offset, offset + length), cost=length,
        )  # fmt: skip

    def _write(self, requestId: int, token: bytes, offset: int, data: bytes) -> None:
        handle = self._handles.get(token)
        if handle is None or handle.isListing:
            self._noHandle(requestId)
            return
        end = offset + len(data)
        if end > _MAX_OFFSET:
            self._answers.reply(requestId, packets.status(Status.BAD_MESSAGE, "no such offset"))
            return
        mode = Mode.ALONE if handle.appends else Mode.WRITING
        if self._order.isFree(handle, mode, offset):
            try:
                written = handle.opened.write(offset, data)
            except Exception as error:
                self._fail(requestId, error)
                return
            if written is None:
                self._answers.reply(requestId, packets.OK)
                return
            task = self._writeTask(requestId, handle, offset, data, mode)
            # The store has them now; it is the bytes that count here, not who holds them.
            task.arguments = ()
            self._take(task)
            self._order.join(task)
            self._await(task, written)
        else:
            self._admit(self._writeTask(requestId, handle, offset, data, mode))

    def _writeTask(
        self, requestId: int, handle: Handle, offset: int, data: bytes, mode: Mode
    ) -> Task:
        return Task(
            requestId, handle.opened.write, (offset, data), mode,
            changes=True, handles=(handle,), span=(offset, offset + len(data)), cost=len(data),
        )  # fmt: skip

    def _beginOther(self, what: int | bytes, requestId: int, arguments: tuple[Any, ...]) -> None:
        """Any request but READ and WRITE."""
        rule = RULES.get(what)
        requests = self._requests
        assert requests is not None
        if rule is None:
            self._answerUnusual(what, requestId, arguments)
            return
        fields = list(arguments)
        cost = sum(len(field) for field in fields if type(field) is bytes)
        for index in rule.paths:
            fields[index] = requests.absolute(fields[index])
        handles = []
        for index in rule.handles:
            handle = self._handles.get(fields[index])
            if handle is None or not (rule.ofEither or handle.isListing is rule.ofListing):
                self._noHandle(requestId)
                return
            fields[index] = handle
            handles.append(handle)
        if what == Kind.CLOSE:
            self._handles.remove(arguments[0])
        task = Task(
            requestId, rule.operation, (requests, *fields), Mode.ALONE,
            paths=tuple([place(fields[index]) for index in rule.paths]),
            handles=tuple(handles), cost=cost,
            changes=rule.changes and (not handles or any(handle.writes for handle in handles)),
        )  # fmt: skip
        self._admit(task)

    def _answerUnusual(self, what: int | bytes, requestId: int, arguments: tuple[Any, ...]) -> None:
        if what == MALFORMED:
            self._answers.reply(requestId, packets.status(Status.BAD_MESSAGE, arguments[0]))
        elif what == Kind.INIT:
            assert self._store is not None
            self._answers.send((packets.version(extensionsFor(self._store.features)),))
        elif what == UNKNOWN_EXTENSION:
            sentence = f"unknown extension {printable(arguments[0])}"
            self._answers.reply(requestId, packets.status(Status.OP_UNSUPPORTED, sentence))
        else:
            self._answers.reply(requestId, packets.status(Status.OP_UNSUPPORTED, "unknown request"))

    # --- tasks -------------------------------------------------------------------------------

    def _take(self, task: Task) -> None:
        task.cost += _TASK_BYTES
        self._tasks[task] = None
        self._answers.expect(task)
        self._bytesUnderWay += task.cost

    def _admit(self, task: Task) -> None:
        self._take(task)
        if self._order.add(task):
            self._run(task)

    def _run(self, task: Task) -> None:
        self._ready.append(task)
        if self._running:
            # One after another, however long the row: not one within another.
            return
        self._running = True
        try:
            while self._ready and not self._stopped:
                self._call(self._ready.popleft())
        finally:
            self._running = False

    def _call(self, task: Task) -> None:
        try:
            result = task.operation(*task.arguments)
        except Exception as error:
            self._fail(task.requestId, error, task)
            self._finish(task)
            return
        if not isinstance(result, Deferred):
            result = succeed(result)
        self._await(task, result)

    def _await(self, task: Task, deferred: Deferred[Any]) -> None:
        task.deferred = deferred
        deferred.addCallbacks(
            self._succeed, self._failed, callbackArgs=(task,), errbackArgs=(task,)
        )
        # Where the store answered with something else.
        deferred.addErrback(self._failed, task)

    def _succeed(self, result: Any, task: Task) -> None:
        task.deferred = None
        if self._stopped:
            return
        if result is None:
            self._answers.reply(task.requestId, packets.OK, task)
        elif type(result) is tuple:
            self._answers.reply(task.requestId, result, task)
        else:
            self._answers.data(task.requestId, result, task.span[1] - task.span[0], task)
        self._finish(task)

    def _failed(self, reason: Failure, task: Task) -> None:
        task.deferred = None
        if self._stopped:
            return
        if task.answer is None:
            self._fail(task.requestId, reason.value, task)
        else:
            self._log.failure("an SFTP request failed after its answer", reason)
        self._finish(task)

    def _finish(self, task: Task) -> None:
        if self._tasks.pop(task, self) is self:
            # Stopped meanwhile.
            return
        self._bytesUnderWay -= task.cost
        for follower in self._order.remove(task):
            self._run(follower)
        if not self._inTurn:
            self._turnSoon()

    # --- answers -----------------------------------------------------------------------------

    def _noHandle(self, requestId: int) -> None:
        self._answers.reply(requestId, packets.status(Status.FAILURE, "no such handle"))

    def _fail(
        self, requestId: int, error: BaseException | None, task: Task | None = None
    ) -> None:
        reply = statusOf(error)
        if reply is None:
            self._log.failure("an SFTP request failed unexpectedly", Failure(error))
            reply = packets.status(Status.FAILURE, "internal error")
        self._answers.reply(requestId, reply, task)


def _forget(closing: Deferred[Any]) -> None:
    """Nobody is left who could be told how it went."""
    closing.addErrback(lambda reason: None)

