"""Finding a server and having kernels: real servers of every age, and answers of what is none."""

from __future__ import annotations

import json
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from conchkernel.errors import (
    ConfigurationError,
    JupyterError,
    JupyterUnreachable,
    KernelRefused,
    NotJupyter,
    TokenRefused,
)
from conchkernel.jupyter import discovery, rest
from conchkernel.jupyter.discovery import discover
from conchkernel.jupyter.proxy import make_agent
from conchkernel.jupyter.rest import JupyterClient
from conchkernel.jupyter.urls import JupyterLocation
from tests.jupyters import start_jupyter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from twisted.web.iweb import IRequest

    from tests.jupyters import RunningJupyter


@asynccontextmanager
async def found(text: str) -> AsyncIterator[JupyterClient]:
    """The server that a URL means."""
    agent = make_agent(reactor)
    try:
        yield await discover(reactor, text, agent=agent)
    finally:
        await agent.close()


async def refused(text: str) -> JupyterError:
    """The error of a URL that leads to nothing."""
    with pytest.raises(JupyterError) as caught:
        async with found(text):
            pass
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


# --- real servers ------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_kernels(jupyter: RunningJupyter) -> None:
    """A kernel's life: made, seen, interrupted, restarted, deleted, gone."""
    async with found(jupyter.pasted) as client:
        assert await client.version()
        specs = await client.kernelspecs()
        assert specs.languages[specs.default] == "python"
        wanted = str(uuid.uuid4())
        kernel = await client.create_kernel(specs.default, wanted)
        try:
            assert kernel.name == specs.default
            assert await client.kernel(kernel.id) == kernel
            if jupyter.stack in ("current", "kg"):
                assert kernel.id == wanted
                assert await client.create_kernel(specs.default, wanted) == kernel
            else:
                assert kernel.id != wanted
            await client.interrupt(kernel.id)
            await client.restart(kernel.id)
            assert await client.kernel(kernel.id) == kernel
        finally:
            await client.delete_kernel(kernel.id)
        assert await client.kernel(kernel.id) is None
        await client.delete_kernel(kernel.id)
        with pytest.raises(KernelRefused, match="gone"):
            await client.interrupt(kernel.id)


@pytest_twisted.ensureDeferred
async def test_sessions(jupyter: RunningJupyter) -> None:
    """The same path gives the same kernel; a kernel gateway gives a plain one instead."""
    async with found(jupyter.pasted) as client:
        path = f"conchkernel-{uuid.uuid4()}"
        first = await client.create_session(path, "python3")
        second = await client.create_session(path)
        try:
            assert first.session is not None
            if jupyter.stack == "kg":
                assert (second.session, second.id != first.id) == (None, True)
                await client.delete_kernel(second.id)
            else:
                assert second == first
        finally:
            await client.delete_session(first.session)
        assert await client.kernel(first.id) is None
        await client.delete_session(first.session)
        assert list(jupyter.root_dir.iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_noSuchKernelspec(jupyter: RunningJupyter) -> None:
    """A kernel that the server does not know, in the server's own words."""
    async with found(jupyter.pasted) as client:
        with pytest.raises(KernelRefused, match="would not start a kernel"):
            await client.create_kernel("fortran77")


@pytest_twisted.ensureDeferred
async def test_wrongToken(jupyter: RunningJupyter) -> None:
    """A token that is wrong and one that is missing have each their sentence."""
    assert "is wrong" in str(await refused(f"{jupyter.url}lab?token=hunter2"))
    missing = await refused(jupyter.url)
    assert isinstance(missing, TokenRefused)
    assert "is missing" in str(missing)


@pytest_twisted.ensureDeferred
async def test_pastedUrls(currentJupyter: RunningJupyter) -> None:
    """Whatever page of it was copied, the root is found."""
    root = currentJupyter.url.rstrip("/")
    token = currentJupyter.token
    for text in (
        f"{root}?token={token}",
        f" '{root}/lab/tree/a/b.ipynb?token={token}' ",
        f"{root}/tree/#token={token}",
        f"{root}/user/nobody/lab?token={token}",
        f"{root.removeprefix('http://')}/?token={token}",
        f"{root}/api/kernels?token={token}",
    ):
        async with found(text) as client:
            assert client.location == JupyterLocation(root, token)


@pytest_twisted.ensureDeferred
async def test_belowAPath() -> None:
    """A server whose root is not the host's, as under a hub or a proxy."""
    server = start_jupyter("current", base_url="/user/al%40b/", token="to+ken")
    try:
        for page in ("", "lab", "lab/tree/x.ipynb"):
            async with found(f"{server.url}{page}?token=to%2Bken") as client:
                assert client.location.base == server.url.rstrip("/")
                kernel = await client.create_kernel()
                await client.delete_kernel(kernel.id)
    finally:
        server.stop()


@pytest_twisted.ensureDeferred
async def test_aServerThatIsGone() -> None:
    """It stops between two requests: the kept connection is no excuse, the next error is told."""
    server = start_jupyter("current")
    try:
        async with found(server.pasted) as client:
            server.stop()
            with pytest.raises(JupyterUnreachable, match=r"nothing listens|closed the connection"):
                await client.create_kernel()
        assert "nothing listens" in str(await refused(server.pasted))
    finally:
        server.stop()


# --- what is not Jupyter -----------------------------------------------------------------------


class Answers(Resource):
    """A web server made of one function."""

    isLeaf = True

    def __init__(self, answer: Callable[[Any], bytes | int]) -> None:
        super().__init__()
        self._answer = answer
        self.asked: list[str] = []

    def render(self, request: IRequest) -> bytes | int:
        """Any method."""
        self.asked.append(f"{request.method.decode()} {request.uri.decode()}")
        return self._answer(request)


@asynccontextmanager
async def serving(answer: Callable[[Any], bytes | int]) -> AsyncIterator[tuple[str, Answers]]:
    """Such a server's root."""
    answers = Answers(answer)
    site = Site(answers)
    site.noisy = False
    listening = reactor.listenTCP(0, site, interface="127.0.0.1")
    try:
        yield f"http://127.0.0.1:{listening.getHost().port}", answers
    finally:
        await listening.stopListening()


def status(code: int, body: bytes = b"", **headers: str) -> Callable[[Any], bytes]:
    """The same answer to everything."""

    def answer(request: Any) -> bytes:
        request.setResponseCode(code)
        for name, value in headers.items():
            request.setHeader(name, value)
        return body

    return answer


@pytest.mark.parametrize(
    ("answer", "error", "sentence"),
    [
        (status(200, b"<html>a wiki</html>"), NotJupyter, "not as a Jupyter server"),
        (status(200, b"[1]"), NotJupyter, "not as a Jupyter server"),
        (status(200, b'{"version": 3}'), NotJupyter, "not as a Jupyter server"),
        (status(200, b"[" * 100_000), NotJupyter, "not as a Jupyter server"),
        (status(404), NotJupyter, "not as a Jupyter server"),
        (status(301, Location="http://127.0.0.1:1/"), NotJupyter, "not as a Jupyter server"),
        (status(403), TokenRefused, "token is wrong"),
        (status(401), TokenRefused, "token is wrong"),
        (status(502), JupyterUnreachable, "cannot reach its Jupyter server"),
        (status(404, b"<a href='https://github.com'>"), NotJupyter, "not as a Jupyter server"),
        (status(200, b"x" * 17_000_000), NotJupyter, "too long"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_whatAnswersOtherwise(
    answer: Callable[[Any], bytes], error: type[Exception], sentence: str
) -> None:
    """Each its own error with what to do about it."""
    async with serving(answer) as (root, _):
        problem = await refused(f"{root}/user/a/lab?token=hunter2")
    assert type(problem) is error
    assert sentence in str(problem)


@pytest_twisted.ensureDeferred
async def test_probes() -> None:
    """The path is walked upwards, and the token is only ever in a header."""
    tokens: list[str | None] = []

    def answer(request: Any) -> bytes:
        tokens.append(request.getHeader("authorization"))
        if request.uri == b"/a/api":
            return b'{"version": "9"}'
        if request.uri == b"/a/api/kernelspecs":
            return b'{"default": "x", "kernelspecs": {"x": {"spec": {"language": "Python"}}}}'
        request.setResponseCode(404)
        return b""

    async with serving(answer) as (root, answers), found(f"{root}/a/b/c?token=hunter2") as client:
        assert client.location.base == f"{root}/a"
        assert (await client.kernelspecs()).languages == {"x": "python"}
        assert answers.asked == [
            "GET /a/b/c/api",
            "GET /a/b/api",
            "GET /a/api",
            "GET /a/api/kernelspecs",
            "GET /a/api/kernelspecs",
        ]
        assert tokens == ["token hunter2"] * 5


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"kernelspecs": []}', b'{"kernelspecs": {"x": 3}}', b'"x"']
)
@pytest_twisted.ensureDeferred
async def test_oddKernelspecs(body: bytes) -> None:
    """A list of kernels that is none."""

    def answer(request: Any) -> bytes:
        return b'{"version": "9"}' if request.uri == b"/api" else body

    async with serving(answer) as (root, _):
        assert isinstance(await refused(root), NotJupyter)


@pytest.mark.parametrize(
    ("code", "body", "error", "sentence"),
    [
        (201, b"{}", NotJupyter, "names no kernel"),
        (201, b'{"id": 3}', NotJupyter, "names no kernel"),
        (201, b"[]", NotJupyter, "names no kernel"),
        (200, b"<html>", NotJupyter, "not Jupyter's"),
        (403, json.dumps({"message": "Resource\nLimit " + "x" * 999}).encode(), KernelRefused,
         "HTTP 403: Resource Limit x"),
        (500, b'{"message": "see http://h/?token=hunter2"}', KernelRefused, r"token=\*\*\*"),
        (500, b"[]", KernelRefused, "HTTP 500"),
        (401, b"", TokenRefused, "token"),
        (424, b"{\"message\": \"JupyterHub\"}", KernelRefused, "start it at http"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_kernelRefused(code: int, body: bytes, error: type[Exception], sentence: str) -> None:
    """A server that starts no kernel, with its reason in one bounded line without secrets."""
    async with serving(status(code, body)) as (root, _):
        agent = make_agent(reactor)
        client = JupyterClient(reactor, JupyterLocation(root, "hunter2"), agent)
        with pytest.raises(error, match=sentence) as caught:
            await client.create_kernel()
        with pytest.raises(JupyterError):
            await client.create_session("path")
        await agent.close()
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest_twisted.ensureDeferred
async def test_partsThatAreMissing() -> None:
    """A 404 is about the kernel where a kernel was asked for, else about the server."""
    async with serving(status(404)) as (root, _):
        agent = make_agent(reactor)
        client = JupyterClient(reactor, JupyterLocation(root), agent)
        assert await client.kernel("k") is None
        with pytest.raises(KernelRefused, match="gone"):
            await client.interrupt("k")
        for ask in (client.version, client.kernelspecs):
            with pytest.raises(NotJupyter, match="has no /api"):
                await ask()
        await agent.close()


@pytest_twisted.ensureDeferred
async def test_noSessions() -> None:
    """A server without sessions gives a plain kernel."""

    def answer(request: Any) -> bytes:
        if request.uri == b"/api/sessions":
            request.setResponseCode(404)
            return b""
        request.setResponseCode(201)
        return b'{"id": "k", "name": "python3"}'

    async with serving(answer) as (root, _):
        agent = make_agent(reactor)
        client = JupyterClient(reactor, JupyterLocation(root), agent)
        model = await client.create_session("path", "python3")
        assert (model.id, model.session) == ("k", None)
        await agent.close()


@pytest_twisted.ensureDeferred
async def test_cookiesAreNotKept() -> None:
    """A server's cookies would be a second identity beside the token."""

    def answer(request: Any) -> bytes:
        assert request.getHeader("cookie") == "_xsrf=conchkernel"  # our own: there is no token
        request.addCookie("username-127-0-0-1", "somebody")
        return b'{"version": "9", "kernelspecs": {}}'

    async with serving(answer) as (root, answers), found(root) as client:
        await client.version()
        assert len(answers.asked) == 3


@pytest_twisted.ensureDeferred
async def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer is given up; so is one that does not end its answer."""
    monkeypatch.setattr(discovery, "DISCOVER_SECONDS", 0.2)

    def unended(request: Any) -> int:
        request.write(b'{"version"')
        return NOT_DONE_YET

    for answer in (lambda request: NOT_DONE_YET, unended):
        async with serving(answer) as (root, _):
            assert "in time" in str(await refused(root))
            agent = make_agent(reactor)
            client = JupyterClient(reactor, JupyterLocation(root), agent)
            with pytest.raises(JupyterUnreachable, match="in time"):
                await client.call("GET", "/api", seconds=0.2)
            await agent.close()


@pytest_twisted.ensureDeferred
async def test_nowhere() -> None:
    """No such host, and no URL at all."""
    problem = await refused("http://conchkernel.invalid/?token=hunter2")
    assert isinstance(problem, JupyterUnreachable)
    assert str(problem) == "no host is called conchkernel.invalid; check the URL"
    with pytest.raises(ConfigurationError):
        await discover(reactor, "", agent=make_agent(reactor))


@pytest.mark.parametrize(
    ("location", "base", "moved"),
    [
        ("https://host/api", "http://host", True),
        ("https://host:443/api", "http://host", True),
        ("https://other/api", "http://host", False),
        ("https://host:8443/api", "http://host", False),
        ("https://host/api", "http://host:8888", False),
        ("http://host/x", "http://host", False),
        ("/login", "http://host", False),
        ("https://host:port/", "http://host", False),
        ("https://host/api", "https://host", False),
    ],
)
def test_movedToHttps(location: str, base: str, moved: bool) -> None:
    """Only the same host's own TLS is followed: the token goes there too."""
    headers = rest.Headers({b"Location": [location.encode()]})
    answer = rest.Answer(301, headers, b"")
    assert discovery._moved_to_https(answer, JupyterLocation(base)) is moved


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://host:8888", "ws://host:8888/api/kernels/a%2Fb/channels?session_id=s"),
        ("https://host/user/a", "wss://host/user/a/api/kernels/a%2Fb/channels?session_id=s"),
    ],
)
def test_websocketUrl(base: str, url: str) -> None:
    """Beside the API, with the kernel's id made harmless."""
    client = JupyterClient(reactor, JupyterLocation(base, "t"), make_agent(reactor))
    assert client.websocket_url("a/b", "s") == url
    assert client.authorization_headers == {"Authorization": "token t"}
