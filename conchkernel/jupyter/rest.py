"""A Jupyter server's REST API, as far as a gateway needs it: to have kernels.

Every request has a deadline and a bounded answer, follows no redirect (it would carry the token to
a place nobody named), and every failure becomes one sentence of :mod:`conchkernel.errors` that says
what to do. Tokens go into the ``Authorization`` header and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from hyperlink import EncodedURL
from treq.client import HTTPClient
from treq.cookies import IndexableCookieJar
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.web.client import ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers

from conchkernel.errors import (
    ConchKernelError,
    JupyterError,
    JupyterUnreachable,
    KernelRefused,
    NotJupyter,
    TokenRefused,
)
from conchkernel.jupyter.reasons import unreachable
from conchkernel.jupyter.urls import JupyterLocation, redact, spawn_page

if TYPE_CHECKING:
    from twisted.python.failure import Failure

    from conchkernel.jupyter.proxy import RoadAgent

#: For an ordinary answer.
REQUEST_SECONDS = 15.0
#: For a kernel to start; the server's own patience is 60 s.
START_SECONDS = 65.0
#: No answer that a gateway asks for is longer; icons in a kernelspec are links.
MAX_BODY_BYTES = 16 * 1024 * 1024
#: How much of a server's own words goes into an error.
MAX_REASON_LENGTH = 200


@dataclass(frozen=True, slots=True)
class KernelModel:
    """A kernel of the server's."""

    id: str
    name: str
    """Of its kernelspec."""
    session: str | None = None
    """The session it was made for, where there is one: deleting that deletes the kernel."""
    state: str = field(default="", compare=False)
    """What the server believed that it did: ``starting``, ``idle``, ..."""


@dataclass(frozen=True, slots=True)
class KernelSpecs:
    """The kernels a server can start."""

    default: str
    languages: Mapping[str, str]
    """Name of the kernelspec -> its language in lower case, empty where not told."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer to one request, whatever it says."""

    status: int
    headers: Headers
    body: bytes

    def header(self, name: str) -> str:
        """The first value of a header, or nothing."""
        values = self.headers.getRawHeaders(name.encode("ascii"), [b""])
        return values[0].decode("latin-1") if values else ""

    def json(self) -> Any:
        """What it tells.

        :raises NotJupyter: if that is not JSON.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise NotJupyter("the server's answer is not Jupyter's; check the URL") from None

    def reason(self) -> str:
        """The server's own words, for one line."""
        try:
            told = json.loads(self.body)
            text = str(told.get("message") or told.get("reason") or "")
        except (ValueError, AttributeError, RecursionError):
            text = ""
        text = " ".join(redact(text).split())
        return f"HTTP {self.status}: {text[:MAX_REASON_LENGTH]}" if text else f"HTTP {self.status}"


class _Body(Protocol):
    """Collects a body up to a limit."""

    def __init__(self, done: Deferred[bytes], limit: int) -> None:
        self._done: Deferred[bytes] | None = done
        self._left = limit
        self._parts: list[bytes] = []

    def dataReceived(self, data: bytes) -> None:
        """A part of it, decompressed. (One part cannot inflate beyond 64 KiB x 1032.)"""
        self._left -= len(data)
        if self._left < 0:
            self._finish(NotJupyter("the server's answer is too long to be Jupyter's"))
            self.abandon()
        else:
            self._parts.append(data)

    def abandon(self) -> None:
        """Do not wait for the rest."""
        self._done = None
        self._parts.clear()
        if self.transport is not None:
            self.transport.loseConnection()

    def _finish(self, result: bytes | Exception) -> None:
        done, self._done = self._done, None
        if done is not None:
            if isinstance(result, bytes):
                done.callback(result)
            else:
                done.errback(result)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The end of the body, or of the connection."""
        if reason.check(ResponseDone, PotentialDataLoss):
            self._finish(b"".join(self._parts))
        else:
            self._finish(ResponseFailed([reason]))


class _ReadyURL(EncodedURL):
    """A URL that can go out as it is. By itself hyperlink seeks letters in an IPv6 address."""

    def to_uri(self) -> _ReadyURL:
        """Itself."""
        return self


class JupyterClient:
    """A Jupyter server whose root is known.

    :param location: its root and token.
    :param agent: makes the connections; closing it is its owner's duty.
    """

    def __init__(self, reactor: Any, location: JupyterLocation, agent: RoadAgent) -> None:
        self._reactor = reactor
        self.location = location
        self.agent = agent
        # The server's cookies would be a second, older identity beside the token.
        cookies = IndexableCookieJar(policy=DefaultCookiePolicy(allowed_domains=[]))
        self._http = HTTPClient(agent, cookiejar=cookies)

    def __repr__(self) -> str:
        return f"<JupyterClient {redact(self.location.base)}>"

    @property
    def authorization_headers(self) -> dict[str, str]:
        """What opens the server, for REST and WebSocket. Not for logs."""
        token = self.location.token
        if token:
            return {"Authorization": f"token {token}"}
        # Without a token a server wants proof that no foreign page asks: that both agree.
        return {"Cookie": "_xsrf=conchkernel", "X-XSRFToken": "conchkernel"}

    def websocket_url(self, kernel_id: str, session_id: str) -> str:
        """Where the channels of a kernel are.

        :param session_id: ASCII without spaces, at most 255 characters; fresh for each connection.
        """
        scheme, rest = self.location.base.split("://", 1)
        scheme = "wss" if scheme == "https" else "ws"
        kernel = quote(kernel_id, safe="")
        return f"{scheme}://{rest}/api/kernels/{kernel}/channels?session_id={session_id}"

    # --- requests ----------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        path: str,
        body: object | None = None,
        *,
        seconds: float = REQUEST_SECONDS,
    ) -> Answer:
        """One request, whatever the answer's status.

        :raises JupyterUnreachable: if there is no whole answer in time.
        """
        headers = Headers({b"Accept": [b"application/json"], b"User-Agent": [b"conchkernel"]})
        for name, value in self.authorization_headers.items():
            headers.setRawHeaders(name, [value])
        extra: dict[str, Any] = {} if body is None else {"json": body}
        try:
            response = await self._http.request(
                method,
                _ReadyURL.from_text(self.location.base + path),
                headers=headers,
                allow_redirects=False,
                unbuffered=True,
                reactor=self._reactor,
                timeout=seconds,
                **extra,
            )
            collector: _Body
            collected: Deferred[bytes] = Deferred(lambda _: collector.abandon())
            collected.addTimeout(seconds, self._reactor)
            collector = _Body(collected, MAX_BODY_BYTES)
            response.deliverBody(collector)
            return Answer(response.code, response.headers, await collected)
        except (ConchKernelError, GeneratorExit):
            raise
        except Exception as error:
            raise unreachable(error, self.location.base) from None

    async def _ask(
        self,
        method: str,
        path: str,
        body: object | None = None,
        *,
        seconds: float = REQUEST_SECONDS,
        absent: bool = False,
    ) -> Answer | None:
        """One request that must succeed; ``None`` for what is gone if ``absent`` allows it.

        Gone is 404, and 410 for a session whose kernel went before it.
        """
        answer = await self.call(method, path, body, seconds=seconds)
        if 200 <= answer.status < 300:
            return answer
        if absent and answer.status in (404, 410) and not from_hub(answer):
            return None
        if answer.status == 404 and not path.startswith("/api/kernels/") and not from_hub(answer):
            raise NotJupyter(f"the Jupyter server has no {path}; check the URL")
        raise refusal(answer, self.location)

    # --- what there is -----------------------------------------------------------------------

    async def version(self) -> str:
        """The server's version.

        :raises NotJupyter: if it tells none.
        """
        answer = await self._ask("GET", "/api")
        version = version_of(answer)
        if version is None:
            raise NotJupyter("the server tells no Jupyter version; check the URL")
        return version

    async def kernelspecs(self) -> KernelSpecs:
        """The kernels it can start. Needs the token, so it also proves that."""
        answer = await self._ask("GET", "/api/kernelspecs")
        assert answer is not None
        told = answer.json()
        try:
            languages = {
                str(name): str((model.get("spec") or {}).get("language") or "").lower()
                for name, model in told["kernelspecs"].items()
            }
            return KernelSpecs(str(told.get("default") or ""), languages)
        except (KeyError, TypeError, AttributeError):
            raise NotJupyter("the server's list of kernels is not Jupyter's") from None

    async def kernel(self, kernel_id: str) -> KernelModel | None:
        """A kernel by its id, ``None`` if it is gone."""
        answer = await self._ask("GET", _kernel_path(kernel_id), absent=True)
        return None if answer is None else _kernel(answer.json())

    # --- kernels -----------------------------------------------------------------------------

    async def create_kernel(
        self, name: str | None = None, kernel_id: str | None = None
    ) -> KernelModel:
        """Start a kernel.

        :param name: its kernelspec; the server's default if not given.
        :param kernel_id: a UUID for it, with which asking twice gives one kernel. Servers before
            2.15 ignore it: the model then has another id, and its kernel is a new one each time.
        :raises KernelRefused: with the server's reason.
        """
        # The empty path is the server's root directory, where notebooks begin too.
        body: dict[str, str] = {"path": ""}
        if name is not None:
            body["name"] = name
        if kernel_id is not None:
            body["kernel_id"] = kernel_id
        answer = await self.call("POST", "/api/kernels", body, seconds=START_SECONDS)
        return _kernel(self._created(answer).json())

    async def create_session(self, path: str, name: str | None = None) -> KernelModel:
        """Start a kernel for a console session, or have the one that its path has already.

        A server that has no sessions starts a plain kernel, each time anew; so does a kernel
        gateway when asked for the same path again (3.0 answers that with a 500 of its own).

        :param path: any text; no file of that name is made.
        """
        kernel = {} if name is None else {"name": name}
        body = {"path": path, "name": path, "type": "console", "kernel": kernel}
        answer = await self.call("POST", "/api/sessions", body, seconds=START_SECONDS)
        if answer.status in (404, 405, 500) and not from_hub(answer):
            return await self.create_kernel(name)
        told = self._created(answer).json()
        if not isinstance(told, dict) or not isinstance(told.get("id"), str):
            raise NotJupyter("the server's answer is not Jupyter's; check the URL")
        return _kernel(told.get("kernel"), told["id"])

    def _created(self, answer: Answer) -> Answer:
        if answer.status in (200, 201):
            return answer
        if answer.status == 401 or from_hub(answer):
            raise refusal(answer, self.location)
        # The token has been proved before; a 403 here is about kernels (a gateway's limit).
        raise KernelRefused(f"the Jupyter server would not start a kernel ({answer.reason()})")

    async def delete_session(self, session: str) -> None:
        """End a session and its kernel; one that is gone already is no error."""
        await self._ask("DELETE", f"/api/sessions/{quote(session, safe='')}", absent=True)

    async def delete_kernel(self, kernel_id: str) -> None:
        """End a kernel; one that is gone already is no error."""
        await self._ask("DELETE", _kernel_path(kernel_id), absent=True)

    async def interrupt(self, kernel_id: str) -> None:
        """Interrupt what the kernel executes."""
        await self._ask("POST", _kernel_path(kernel_id) + "/interrupt")

    async def restart(self, kernel_id: str) -> None:
        """Restart the kernel under the same id."""
        await self._ask("POST", _kernel_path(kernel_id) + "/restart", seconds=START_SECONDS)


def _kernel_path(kernel_id: str) -> str:
    return f"/api/kernels/{quote(kernel_id, safe='')}"


def _kernel(told: Any, session: str | None = None) -> KernelModel:
    if not isinstance(told, dict) or not isinstance(told.get("id"), str) or not told["id"]:
        raise NotJupyter("the server's answer names no kernel; check the URL")
    name, state = (str(told.get(key) or "") for key in ("name", "execution_state"))
    return KernelModel(told["id"], name, session, state)


def version_of(answer: Answer | None) -> str | None:
    """The version that an answer of ``/api`` tells, if it is one."""
    if answer is None or answer.status != 200:
        return None
    try:
        told = answer.json()
    except NotJupyter:
        return None
    version = told.get("version") if isinstance(told, dict) else None
    return version if isinstance(version, str) and version else None


def from_hub(answer: Answer) -> bool:
    """Whether a JupyterHub answers in the place of somebody's server."""
    if answer.status in (302, 303, 307) and "/hub/" in answer.header("Location"):
        return True
    # Servers that run under a hub have this header too, but no reason for a 503.
    if answer.status == 503 and answer.header("X-JupyterHub-Version"):
        return True
    return answer.status in (404, 424, 503) and b"jupyterhub" in answer.body[:65536].lower()


def refusal(answer: Answer, location: JupyterLocation) -> JupyterError:
    """What a failed request means."""
    return refusal_of(answer.status, location, hub=from_hub(answer), reason=answer.reason())


def refusal_of(
    status: int, location: JupyterLocation, *, hub: bool = False, reason: str = ""
) -> JupyterError:
    """What a status means that is no success.

    :param hub: whether a JupyterHub answered in the server's place.
    """
    host = urlsplit(location.base).netloc
    if hub or status == 424:
        page = redact(spawn_page(location.base))
        return KernelRefused(
            f"the Jupyter server at {host} is not running; start it at {page} and try again"
        )
    if status in (401, 403) or status in (301, 302, 303, 307):
        # Older servers send who is not logged in to their login page.
        hint = "is wrong; copy the URL again" if location.token else "is missing; add ?token=..."
        return TokenRefused(f"the Jupyter server at {host} refused us: the token {hint}")
    if status == 404:
        return KernelRefused(f"the kernel at {host} is gone")
    if status in (502, 503, 504):
        return JupyterUnreachable(
            f"the proxy at {host} cannot reach its Jupyter server (HTTP {status})"
        )
    return KernelRefused(f"the Jupyter server at {host} failed ({reason or f'HTTP {status}'})")
