"""The calls of Jupyter's Contents API and of ``/files``, each bounded and each with a deadline.

Knows URLs, bodies and what a refusal means (:class:`~conchkernel.files.FileStoreError`), nothing
of open files. Bytes go up as base64 in JSON and come down raw from ``/files``: neither is ever
taken for text. Tokens go into the ``Authorization`` header and nowhere else.
"""

from __future__ import annotations

import errno
import json
import re
import stat
from binascii import b2a_base64
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, succeed
from twisted.internet.protocol import Protocol, connectionDone
from twisted.web.client import Agent, HTTPConnectionPool, ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer
from zope.interface import implementer

from conchkernel.errors import ConchKernelError, JupyterError
from conchkernel.files import Attributes, FileProblem, FileStoreError
from conchkernel.jupyter.reasons import unreachable
from conchkernel.jupyter.rest import refusal_of
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
#: The list of a directory: some 120 000 names.
MAX_LISTING_BYTES = 32 * 1024 * 1024
#: Any other answer in JSON.
MAX_ANSWER_BYTES = 1024 * 1024
#: A file behind a server that sends no parts is read from its beginning for every part.
MAX_WHOLE_BYTES = 16 * 1024 * 1024
#: Of every usual file system.
MAX_NAME_BYTES = 255
#: How much of the server's words goes into an error.
_MAX_WORDS = 200

#: Components after which Jupyter's URLs go on with something else than a path.
_RESERVED = {b"checkpoints", b"trust"}

_ERRNO = re.compile(rb"\[Errno (\d{1,3})\]")
_PROBLEMS = {
    errno.ENOENT: FileProblem.NOT_FOUND,
    errno.EACCES: FileProblem.PERMISSION,
    errno.EPERM: FileProblem.PERMISSION,
    errno.EEXIST: FileProblem.EXISTS,
    errno.ENOTDIR: FileProblem.NOT_DIRECTORY,
    errno.EISDIR: FileProblem.IS_DIRECTORY,
    errno.ENOTEMPTY: FileProblem.NOT_EMPTY,
    errno.ENOSPC: FileProblem.NO_SPACE,
    errno.EFBIG: FileProblem.NO_SPACE,
    errno.EDQUOT: FileProblem.QUOTA,
    errno.EROFS: FileProblem.READ_ONLY,
    errno.ENAMETOOLONG: FileProblem.NAME_TOO_LONG,
    errno.ELOOP: FileProblem.LOOP,
}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class TooLarge(FileStoreError):
    """The server, or a proxy before it, takes no request of this size."""


def quoted(path: bytes) -> str:
    """A path of ours, absolute and without ``.`` and ``..``, as it stands in Jupyter's URLs.

    A directory called ``checkpoints`` needs disguise: the server would list a file's checkpoints.
    """
    parts = []
    for part in path.split(b"/"):
        text = quote(part, safe="")
        parts.append(f"%{part[0]:02X}{text[1:]}" if part in _RESERVED else text)
    return "/".join(parts)


def api_path(path: bytes) -> str:
    """The same for a request's body."""
    return path.decode("utf-8").lstrip("/")


def hidden(path: bytes) -> bool:
    """Whether a server may hide this path, as most do with names that begin with a dot."""
    return b"/." in path


@dataclass(frozen=True, slots=True)
class Model:
    """What the server tells of a file or directory."""

    name: str
    directory: bool
    size: int | None
    """Of a symbolic link the link's own; ``None`` for directories."""
    mtime: float | None
    writable: bool

    @property
    def attributes(self) -> Attributes:
        """For SFTP. The permissions are a guess that says only who may write at all."""
        if self.directory:
            mode = stat.S_IFDIR | (0o755 if self.writable else 0o555)
        else:
            mode = stat.S_IFREG | (0o644 if self.writable else 0o444)
        return Attributes(size=self.size, mode=mode, atime=self.mtime, mtime=self.mtime)


def model(told: Any) -> Model:
    """The model in an answer, believed only as far as its types are right.

    :raises FileStoreError: if it is none.
    """
    name = told.get("name") if isinstance(told, dict) else None
    kind = told.get("type") if isinstance(told, dict) else None
    if not isinstance(name, str) or not isinstance(kind, str):
        raise FileStoreError(FileProblem.FAILURE, "the server's answer is not Jupyter's")
    size = told.get("size")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 63:
        size = None
    directory = kind == "directory"
    return Model(
        name,
        directory,
        None if directory else size,
        _seconds(told.get("last_modified")),
        told.get("writable") is not False,
    )


def _seconds(told: object) -> float | None:
    try:
        return max(0.0, datetime.fromisoformat(str(told)).timestamp())
    except (ValueError, OverflowError, OSError):
        return None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file."""

    data: bytes
    total: int
    """Of the whole file, when this was sent."""
    modified: str
    """``Last-Modified``, as it was told."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Headers
    length: int | None
    body: bytes

    def header(self, name: str) -> str:
        values = self.headers.getRawHeaders(name.encode("ascii"), [b""])
        return values[0].decode("latin-1") if values else ""

    def json(self) -> Any:
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


class Contents:
    """A server's files over HTTP.

    :param client: names the server and opens it; its connections are not used, since a store has
        its own limit and closes what it opened.
    """

    def __init__(self, reactor: Any, client: JupyterClient) -> None:
        self._reactor = reactor
        self._client = client
        self._pool = HTTPConnectionPool(reactor, persistent=True)
        self._pool.maxPersistentPerHost = MAX_REQUESTS
        self._pool.cachedConnectionTimeout = KEEP_SECONDS
        self._agent = Agent.usingEndpointFactory(reactor, client.agent, self._pool)
        self._turns = DeferredSemaphore(MAX_REQUESTS)
        self._proved = False

    def close(self) -> Deferred[None]:
        """Close the connections that were kept."""
        return self._pool.closeCachedConnections()

    # --- one request -------------------------------------------------------------------------

    async def _exchange(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        span: tuple[int, int] | None = None,
        limit: int = MAX_ANSWER_BYTES,
        seconds: float = REQUEST_SECONDS,
    ) -> _Answer:
        """Ask once, whatever the answer's status.

        :param span: offset and length of what is wanted of a file.
        :raises FileStoreError: CONNECTION_LOST if there is no whole answer in time.
        """
        headers = Headers({b"User-Agent": [b"conchkernel"], b"Accept": [b"*/*"]})
        for name, value in self._client.authorization_headers.items():
            headers.setRawHeaders(name, [value])
        if not self._client.location.token:
            # Without a token a server wants proof that no foreign page asks: that both agree.
            headers.setRawHeaders(b"Cookie", [b"_xsrf=conchkernel"])
            headers.setRawHeaders(b"X-XSRFToken", [b"conchkernel"])
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
            skip, exact = 0, False
            if span is not None and response.code in (200, 206):
                limit, exact = span[1], response.code == 200
                if response.code == 200:
                    skip = span[0]
                    self._insist_on_parts(response.length, span)
            collector: _Collector
            collected: Deferred[bytes] = Deferred(lambda _: collector.abandon())
            collected.addTimeout(seconds, self._reactor)
            collector = _Collector(collected, skip, limit, exact=exact)
            told = response.length
            length = None if told is UNKNOWN_LENGTH else int(told)
            response.deliverBody(collector)
            return _Answer(response.code, response.headers, length, await collected)
        except (ConchKernelError, CancelledError):
            raise
        except Exception as error:
            if given_up:
                raise CancelledError from None
            problem = unreachable(error, self._client.location.base)
            raise FileStoreError(FileProblem.CONNECTION_LOST, str(problem)) from None
        finally:
            self._turns.release()

    @staticmethod
    def _insist_on_parts(length: object, span: tuple[int, int]) -> None:
        """A whole file came where a part was asked for."""
        small = isinstance(length, int) and length <= max(MAX_WHOLE_BYTES, span[1])
        if not small:
            raise FileStoreError(
                FileProblem.UNSUPPORTED,
                "this Jupyter server sends files only whole, and this one is too large for that",
            )

    async def _refused(
        self, answer: _Answer, path: bytes, creating: bytes | None = None
    ) -> FileStoreError:
        """What a status means that is no success.

        :param creating: what there would be, had it been one.
        """
        if answer.status in (404, 405) and not self._proved and path != b"/":
            # Is it the file that is not there, or all of this API?
            await self.stat(b"/")
        return self._refusal(answer, path, creating)

    def _refusal(self, answer: _Answer, path: bytes, creating: bytes | None) -> FileStoreError:
        status, words = answer.status, answer.words()
        hub = b"jupyterhub" in answer.body[:65536].lower()
        if status in (401, 424, 502, 503, 504) or 300 <= status < 400 or (status == 404 and hub):
            told: JupyterError = refusal_of(status, self._client.location, hub=hub)
            lost = status not in (401, 302, 303)
            return FileStoreError(
                FileProblem.CONNECTION_LOST if lost else FileProblem.PERMISSION, str(told)
            )
        if status == 413:
            return TooLarge(
                FileProblem.FAILURE, "the server takes no upload of this size (HTTP 413)"
            )
        if path == b"/" and status in (404, 405):
            return FileStoreError(
                FileProblem.UNSUPPORTED,
                "this Jupyter server has no Contents API (is it a kernel gateway?)",
            )
        if any(len(part) > MAX_NAME_BYTES for part in (creating or path).split(b"/")):
            # Servers say so, or that it is not there, or that something happened.
            return FileStoreError(FileProblem.NAME_TOO_LONG)
        if creating is not None and hidden(creating) and status in (400, 403, 404):
            return FileStoreError(
                FileProblem.PERMISSION,
                "the Jupyter server hides names that begin with a dot and takes none "
                "(ContentsManager.allow_hidden)",
            )
        found = _ERRNO.findall(answer.body)
        problem = _PROBLEMS.get(int(found[-1])) if found else None
        if problem is None:
            problem = {
                403: FileProblem.PERMISSION,
                404: FileProblem.NOT_FOUND,
                409: FileProblem.EXISTS,
                507: FileProblem.NO_SPACE,
            }.get(status, FileProblem.FAILURE)
        if status == 400 and words.endswith("not empty"):
            problem = FileProblem.NOT_EMPTY
        elif status == 400 and "ot a directory" in words:
            problem = FileProblem.NOT_DIRECTORY
        return FileStoreError(problem, f"{problem.value} ({words})")

    # --- what there is -----------------------------------------------------------------------

    async def stat(self, path: bytes) -> Model:
        """What the API tells of a path."""
        answer = await self._exchange("GET", f"/api/contents{_below(path)}?content=0")
        if answer.status != 200:
            refused = await self._refused(answer, path)
            above = path.rpartition(b"/")[0]
            if answer.status == 500 and above and not (await self.stat(above)).directory:
                # What is below a file, servers since 2 call an unhandled error.
                raise FileStoreError(FileProblem.NOT_DIRECTORY)
            raise refused
        told = model(answer.json())
        self._proved = True
        return told

    async def list(self, path: bytes) -> list[Model]:
        """What is in a directory, without what the server hides."""
        answer = await self._exchange(
            "GET",
            f"/api/contents{_below(path)}?type=directory&content=1",
            limit=MAX_LISTING_BYTES,
            seconds=PATIENT_SECONDS,
        )
        if answer.status != 200:
            raise await self._refused(answer, path)
        told = answer.json()
        content = told.get("content") if isinstance(told, dict) else None
        if not isinstance(content, list):
            raise FileStoreError(FileProblem.NOT_DIRECTORY, "not a directory")
        return [model(one) for one in content]

    async def size(self, path: bytes) -> tuple[int, float | None]:
        """Size and time (to the second) of what one reads there: behind a symbolic link, too."""
        # Not HEAD, whose Content-Length Twisted's client keeps to itself.
        piece = await self.read(path, 0, 1)
        if piece is None:
            return 0, None
        try:
            return piece.total, parsedate_to_datetime(piece.modified).timestamp()
        except (ValueError, TypeError, OverflowError):
            return piece.total, None

    async def read(self, path: bytes, offset: int, length: int) -> Piece | None:
        """A part of a file, shorter only at its end; ``None`` if it ends before ``offset``."""
        span = (offset, length)
        answer = await self._exchange("GET", f"/files{quoted(path)}", span=span)
        if answer.status == 416:
            return None
        data, modified = answer.body, answer.header("Last-Modified")
        if answer.status == 200:
            total = len(data) + offset if answer.length is None else answer.length
        elif answer.status == 206:
            told = _CONTENT_RANGE.fullmatch(answer.header("Content-Range"))
            if told is None or int(told[1]) != offset:
                raise FileStoreError(FileProblem.FAILURE, "the server sent another part")
            total = int(told[3])
        else:
            raise await self._refused(answer, path)
        if len(data) != max(0, min(length, total - offset)):
            raise FileStoreError(FileProblem.CONNECTION_LOST, "the server's answer is cut off")
        return Piece(data, total, modified)

    # --- changes -----------------------------------------------------------------------------

    async def _change(
        self,
        method: str,
        path: bytes,
        body: bytes | None,
        *,
        creating: bytes | None = None,
        seconds: float = PATIENT_SECONDS,
    ) -> _Answer:
        answer = await self._exchange(
            method, f"/api/contents{quoted(path)}", body=body, seconds=seconds
        )
        if not 200 <= answer.status < 300:
            raise await self._refused(answer, path, creating)
        return answer

    async def put(self, path: bytes, data: bytes, chunk: int | None = None) -> Model:
        """Write a file whole, or the next part of one.

        :param chunk: 1 truncates, a larger number appends, -1 appends the last part. What
            appends is not repeated if the connection is lost: it may have come.
        """
        number = b"" if chunk is None else b'"chunk":%d,' % chunk
        body = b"".join(
            (
                b'{"type":"file","format":"base64",',
                number,
                b'"content":"',
                b2a_base64(data, newline=False),
                b'"}',
            )
        )
        # What is there already the server first copies, however much that is.
        seconds = PATIENT_SECONDS if chunk in (None, 1) else REQUEST_SECONDS
        try:
            answer = await self._change("PUT", path, body, creating=path, seconds=seconds)
        except FileStoreError as error:
            if error.problem is not FileProblem.CONNECTION_LOST or chunk not in (None, 1):
                raise
            # A kept connection may end under a request; this one may be repeated.
            answer = await self._change("PUT", path, body, creating=path, seconds=seconds)
        return model(answer.json())

    async def make_directory(self, path: bytes) -> None:
        """Make a directory; one that is there already is no error to the server."""
        await self._change("PUT", path, b'{"type":"directory"}', creating=path)

    async def rename(self, old: bytes, new: bytes) -> None:
        """Rename; EXISTS if there is something already."""
        body = json.dumps({"path": api_path(new)}).encode("ascii")
        try:
            await self._change("PATCH", old, body, creating=new)
        except FileStoreError as error:
            if error.problem is FileProblem.FAILURE:
                # Few servers say which of the two is not there.
                await self.stat(old)
                await self.stat(new.rpartition(b"/")[0] or b"/")
            raise

    async def delete(self, path: bytes) -> None:
        """Delete a file, or a directory with all that is in it."""
        await self._change("DELETE", path, None)


def _below(path: bytes) -> str:
    return "" if path == b"/" else quoted(path)
