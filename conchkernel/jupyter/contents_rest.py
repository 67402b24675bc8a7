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

from twisted.internet.task import deferLater

from conchkernel.errors import JupyterError
from conchkernel.files import Attributes, FileProblem, FileStoreError
from conchkernel.jupyter.contents_http import PATIENT_SECONDS, REQUEST_SECONDS, FileRequests
from conchkernel.jupyter.rest import refusal_of

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from conchkernel.jupyter.contents_http import Answer
    from conchkernel.jupyter.rest import JupyterClient

#: The list of a directory: some 120 000 names.
MAX_LISTING_BYTES = 32 * 1024 * 1024
#: Of every usual file system.
MAX_NAME_BYTES = 255
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


class Contents:
    """A server's files over HTTP.

    :param client: names the server and opens it.
    """

    def __init__(self, reactor: Any, client: JupyterClient) -> None:
        self._reactor = reactor
        self._client = client
        self._http = FileRequests(reactor, client)
        self._proved = False

    def pause(self, seconds: float) -> Deferred[None]:
        """Fires after a while."""
        return deferLater(self._reactor, seconds)

    def close(self) -> Deferred[None]:
        """Close the connections that were kept."""
        return self._http.close()

    async def _refused(
        self, answer: Answer, path: bytes, creating: bytes | None = None
    ) -> FileStoreError:
        """What a status means that is no success.

        :param creating: what there would be, had it been one.
        """
        if answer.status in (404, 405) and not self._proved and path != b"/":
            # Is it the file that is not there, or all of this API?
            await self.stat(b"/")
        return self._refusal(answer, path, creating)

    def _refusal(self, answer: Answer, path: bytes, creating: bytes | None) -> FileStoreError:
        status, words = answer.status, answer.words()
        # A file of that name is not there without being the hub's.
        named = b"jupyterhub" in (path + (creating or b"")).lower()
        hub = not named and b"jupyterhub" in answer.body[:65536].lower()
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
        answer = await self._http.ask("GET", f"/api/contents{_below(path)}?content=0")
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
        answer = await self._http.ask(
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
        answer = await self._http.ask("GET", f"/files{quoted(path)}", span=span)
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
    ) -> Answer:
        answer = await self._http.ask(
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
