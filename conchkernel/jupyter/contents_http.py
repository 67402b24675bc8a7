"""Requests to a Jupyter server for files: a few at a time, each with a deadline and a bounded body.

Beside :mod:`conchkernel.jupyter.rest`, which asks for kernels, because here bodies are large: they
are taken by parts up to what was asked for, and connections are kept for the next part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, succeed
from twisted.internet.protocol import Protocol, connectionDone
from twisted.web.client import Agent, HTTPConnectionPool, ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from conchkernel.errors import ConchKernelError
from conchkernel.files import FileProblem, FileStoreError
from conchkernel.jupyter.reasons import unreachable
from conchkernel.jupyter.urls import redact

if TYPE_CHECKING:
    from twisted.internet.interfaces import IConsumer
    from twisted.python.failure import Failure
    from twisted.web.iweb import IResponse

    from conchkernel.jupyter.rest import JupyterClient

#: Requests under way for one store: what keeps a server's one thread busy, and no more memory.
MAX_REQUESTS = 8
#: For an answer; a piece of a file on a slow road included.
REQUEST_SECONDS = 120.0
#: For what may take the server long: before it overwrites a file it copies it, a listing blocks.
PATIENT_SECONDS = 600.0
#: A connection that was idle longer is not used again: proxies close theirs after 5 s and more.
KEEP_SECONDS = 4
#: Any other answer in JSON.
MAX_ANSWER_BYTES = 1024 * 1024
#: A file behind a server that sends no parts is read from its beginning for every part.
MAX_WHOLE_BYTES = 16 * 1024 * 1024
#: How much of the server's words goes into an error.
_MAX_WORDS = 200

_ONLY_WHOLE = "this Jupyter server sends files only whole, and this one is too large for that"



@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said."""

    status: int
    headers: Headers
    length: int | None
    """Of the body as it was sent, which is not always taken whole."""
    body: bytes

    def header(self, name: str) -> str:
        """A header, empty if there is none."""
        values = self.headers.getRawHeaders(name.encode("ascii"), [b""])
        return values[0].decode("latin-1") if values else ""

    def json(self) -> Any:
        """The body."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise FileStoreError(
                FileProblem.FAILURE, "the server's answer is not Jupyter's"
            ) from None

    def words(self) -> str:
        """The server's own, for one line."""
        try:
            told = json.loads(self.body)
            text = str(told.get("message") or told.get("reason") or "")
        except (ValueError, AttributeError, RecursionError):
            text = ""
        text = " ".join(redact(text).split())[:_MAX_WORDS]
        return "".join(c if c.isprintable() else "?" for c in text) or f"HTTP {self.status}"


@implementer(IBodyProducer)
class _Bytes:
    """A body that is there already; at most a piece of a file, so written at once."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.length = len(body)

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """Write it."""
        consumer.write(self._body)
        return succeed(None)

    def pauseProducing(self) -> None:
        """There is nothing to pause."""

    def resumeProducing(self) -> None:
        """Nor to go on with."""

    def stopProducing(self) -> None:
        """Nor to stop."""


class _Collector(Protocol):
    """Takes ``limit`` bytes of a body after the first ``skip``, and waits for no more.

    :param exact: whether a body that goes on behind them is as good as one that ends.
    """

    def __init__(self, done: Deferred[bytes], skip: int, limit: int, *, exact: bool) -> None:
        self._done: Deferred[bytes] | None = done
        self._skip = skip
        self._left = limit
        self._exact = exact
        self._parts: list[bytes] = []

    def dataReceived(self, data: bytes) -> None:
        """Some of the body."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        if len(data) > self._left:
            if not self._exact:
                self._finish(FileStoreError(FileProblem.FAILURE, "the answer is too long"))
            else:
                self._parts.append(data[: self._left])
                self._finish(None)
            self.abandon()
        elif self._done is not None:
            self._left -= len(data)
            self._parts.append(data)

    def abandon(self) -> None:
        """Do not wait for the rest."""
        self._done = None
        self._parts.clear()
        if self.transport is not None:
            self.transport.loseConnection()

    def _finish(self, problem: Exception | None) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        if problem is None:
            done.callback(b"".join(self._parts))
        else:
            done.errback(problem)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The end of the body, or of the connection."""
        whole = reason.check(ResponseDone, PotentialDataLoss) is not None
        self._finish(None if whole else ResponseFailed([reason]))


class FileRequests:
    """A server, asked for files.

    :param client: names the server and opens it. Its kept connections are not used: a store has
        its own, so many as it has requests, and closes them.
    """

    def __init__(self, reactor: Any, client: JupyterClient) -> None:
        self._reactor = reactor
        self._client = client
        self._pool = HTTPConnectionPool(reactor, persistent=True)
        self._pool.maxPersistentPerHost = MAX_REQUESTS
        self._pool.cachedConnectionTimeout = KEEP_SECONDS
        self._agent = Agent.usingEndpointFactory(reactor, client.agent, self._pool)
        self._turns = DeferredSemaphore(MAX_REQUESTS)

    def close(self) -> Deferred[None]:
        """Close the connections that were kept."""
        return self._pool.closeCachedConnections()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        span: tuple[int, int] | None = None,
        limit: int = MAX_ANSWER_BYTES,
        seconds: float = REQUEST_SECONDS,
    ) -> Answer:
        """Ask once, whatever the answer's status.

        :param span: offset and length of what is wanted of a file.
        :raises FileStoreError: CONNECTION_LOST if there is no whole answer in time.
        """
        headers = Headers({b"User-Agent": [b"conchkernel"], b"Accept": [b"*/*"]})
        for name, value in self._client.authorization_headers.items():
            headers.setRawHeaders(name, [value])
        if body is not None:
            headers.setRawHeaders(b"Content-Type", [b"application/json"])
        if span is not None:
            headers.setRawHeaders(b"Range", [b"bytes=%d-%d" % (span[0], sum(span) - 1)])
        await self._turns.acquire()
        given_up = False

        def give_up(_: object) -> None:
            # Twisted's client tells of this as of any lost connection.
            nonlocal given_up
            given_up = True
            asking.cancel()

        try:
            asking = self._agent.request(
                method.encode("ascii"),
                (self._client.location.base + path).encode("ascii"),
                headers,
                None if body is None else _Bytes(body),
            )
            asking.addTimeout(seconds, self._reactor)
            asked: Deferred[IResponse] = Deferred(give_up)
            asking.chainDeferred(asked)
            response = await asked
            told = response.length
            length = None if told is UNKNOWN_LENGTH else int(told)
            whole = span is not None and response.code == 200
            if span is not None and response.code in (200, 206):
                limit = span[1]
            collector: _Collector
            collected: Deferred[bytes] = Deferred(lambda _: collector.abandon())
            skip = span[0] if span is not None and whole else 0
            collector = _Collector(collected, skip, limit, exact=whole)
            response.deliverBody(collector)
            if whole and (length is None or length > max(MAX_WHOLE_BYTES, limit)):
                collector.abandon()
                raise FileStoreError(FileProblem.UNSUPPORTED, _ONLY_WHOLE)
            collected.addTimeout(seconds, self._reactor)
            return Answer(response.code, response.headers, length, await collected)
        except (ConchKernelError, CancelledError):
            raise
        except Exception as error:
            if given_up:
                raise CancelledError from None
            problem = unreachable(error, self._client.location.base)
            raise FileStoreError(FileProblem.CONNECTION_LOST, str(problem)) from None
        finally:
            self._turns.release()
