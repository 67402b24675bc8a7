"""What is made of answers in which a JupyterHub may have had a part, also odd ones.

A real one is asked in :mod:`tests.interop.test_jupyterhub`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted

from conchkernel.errors import JupyterUnreachable, KernelRefused, NotJupyter, TokenRefused
from conchkernel.jupyter import hub
from conchkernel.jupyter.rest import Answer, Headers
from conchkernel.jupyter.urls import JupyterLocation

from .test_rest import found, refused, serving, status

if TYPE_CHECKING:
    from collections.abc import Callable

HUB = b"<html><title>JupyterHub</title></html>"
SEEN = {"X-JupyterHub-Version": "6.1.1"}


@pytest.mark.parametrize(
    ("base", "status", "headers", "body", "root"),
    [
        ("", 302, {"Location": "/hub/api"}, b"", ""),
        ("/pre/fix", 302, {"Location": "/pre/fix/hub/api"}, b"", "/pre/fix"),
        ("/pre/user/a/x", 302, {"Location": "http://h:8000/pre/hub/user/a/x/api"}, b"", "/pre"),
        ("/user/a", 302, {"Location": "/hub/login?next=%2Fhub%2F"}, b"", ""),
        ("/user/a", 302, {"Location": "/pre/hub/user/a/api"}, b"", ""),
        ("/user/a", 302, {"Location": "http://[/hub/"}, b"", ""),
        ("/user/a", 302, {"Location": "/login"}, b"", None),
        ("/user/a", 302, {"Location": "/hub"}, b"", None),
        ("/pre/user/a/lab", 404, SEEN, b"", "/pre"),
        ("/hub/spawn/a", 404, SEEN, b"", ""),
        ("/user/a", 200, SEEN, b'{"version": "2"}', ""),
        ("/elsewhere", 200, SEEN, b'{"version": "2"}', None),
        ("/user/a", 200, {}, b'{"version": "2"}', None),
        ("/user/a", 404, {}, b"<a href='https://github.com'>", None),
        ("/user/a", 404, {}, HUB, ""),
        ("/user/a", 503, {}, b"503", None),
        ("/lab", 503, {}, HUB, None),
    ],
)
def test_rootOf(
    base: str, status: int, headers: dict[str, str], body: bytes, root: str | None
) -> None:
    """A hub is known by where it leads, or by its name; a server behind it by a header."""
    raw = Headers({name.encode(): [value.encode()] for name, value in headers.items()})
    told = hub.root_of(Answer(status, raw, body), JupyterLocation(f"http://h:8000{base}"))
    assert told == (None if root is None else f"http://h:8000{root}")


def answering(**told: tuple[int, bytes] | tuple[int, bytes, str]) -> Callable[[Any], bytes]:
    """A hub that says this of ``server``, of a server's ``page``, of ``stopped`` servers and of
    the token's ``owner``; else it knows of nothing."""

    def answer(request: Any) -> bytes:
        path = request.path.decode()
        request.setHeader("X-JupyterHub-Version", "6.1.1")
        kind = (
            "owner" if path == "/hub/api/user"
            else "stopped" if path.startswith("/hub/user/")
            else "server" if path in ("/user/ann/api", "/user/ann/api/kernelspecs")
            else "page" if path == "/user/ann/x"
            else ""
        )  # fmt: skip
        code, body, *location = told.get(kind, (404, HUB))
        request.setResponseCode(code)
        for one in location:
            request.setHeader("Location", one)
        return body

    return answer


SERVER = (200, b'{"version": "2", "kernelspecs": {}}')
ANN = (200, b'{"name": "ann"}')
LOGIN = (302, b"", "/hub/login?next=x")
RUNS = (302, b"", "/user/ann/api?redirects=1")
#: A server that is called like a page.
_TOLD = f"JupyterHub server no longer running {'x' * 300} at http://h/hub/spawn/ann/tree"
TREE = (424, json.dumps({"message": _TOLD}).encode())
#: A name that would be two lines.
EVE = (200, b'{"name": "e\\nve\\u009b"}')


@pytest.mark.parametrize(
    ("path", "told", "error", "sentence"),
    [
        ("/user/ann/x", {"server": SERVER}, KernelRefused, "ann has no server x at"),
        ("/user/ann/x", {"server": SERVER, "page": (503, b"")}, None, ""),
        ("/user/ann/tree/y", {"server": SERVER}, None, ""),
        ("/user/ann/tree", {"server": SERVER, "stopped": TREE}, KernelRefused, "of ann/tree is"),
        ("/user/ann/x", {"stopped": (424, HUB)}, KernelRefused, "server of ann is not running"),
        ("/user/ann", {"stopped": (503, b"")}, KernelRefused, "/hub/spawn/ann and try again"),
        ("/user/ann", {"server": (502, b"")}, JupyterUnreachable, "cannot reach its Jupyter"),
        ("/user/ann", {"stopped": RUNS}, JupyterUnreachable, "does not answer"),
        ("/user/ann", {"stopped": LOGIN}, TokenRefused, "no Jupyter server of ann answers, and"),
        ("/user/ann", {"stopped": (500, b"")}, JupyterUnreachable, "does not work (HTTP 500)"),
        ("/user/ann", {}, KernelRefused, "has no server of ann that the token may reach"),
        ("/user/ann", {"owner": (200, b"[]")}, KernelRefused, "that the token may reach"),
        ("/user/ann", {"owner": (200, b"<html>")}, KernelRefused, "that the token may reach"),
        ("/user/ann", {"owner": EVE}, KernelRefused, "that e%0Ave%C2%9B's token may reach"),
        ("/user/ann", {"owner": ANN}, TokenRefused, "lacks the scope access:servers"),
        ("/hub/home", {}, NotJupyter, "this is a page of the JupyterHub"),
        ("/hub/home", {"owner": ANN, "server": SERVER}, None, ""),
        ("/hub/home", {"owner": (403, b"")}, TokenRefused, "does not know the token"),
        ("/hub/admin", {"owner": ANN, "server": SERVER}, NotJupyter, "/user/NAME/"),
    ],
)  # fmt: skip
@pytest_twisted.ensureDeferred
async def test_whatIsSaid(
    path: str, told: dict[str, Any], error: type[Exception] | None, sentence: str
) -> None:
    """Never another server than the one that was meant, and each trouble in its own words."""
    async with serving(answering(**told)) as (root, _):
        url = f"{root}{path}?token=hunter2"
        if error is None:
            async with found(url) as client:
                assert client.location.base == f"{root}/user/ann"
        else:
            problem = await refused(url)
            assert type(problem) is error
            assert sentence in str(problem)


@pytest_twisted.ensureDeferred
async def test_aServerThatForbids() -> None:
    """Where the hub cannot be asked why, it is the server's own word that counts."""

    def answer(request: Any) -> bytes:
        request.setHeader("X-JupyterHub-Version", "6.1.1")
        if request.path == b"/user/ann/api":
            return b'{"version": "2"}'
        request.setResponseCode(403 if request.path.startswith(b"/user/") else 500)
        return b""

    async with serving(answer) as (root, _):
        assert "the token is wrong" in str(await refused(f"{root}/user/ann/lab?token=hunter2"))
        assert "the token is missing" in str(await refused(f"{root}/user/ann/lab"))


@pytest_twisted.ensureDeferred
async def test_aHubThatIsDown() -> None:
    """Its proxy has nobody to ask."""
    async with serving(status(503, b"Service Unavailable")) as (root, _):
        problem = await refused(f"{root}/user/ann/lab?token=hunter2")
    assert isinstance(problem, JupyterUnreachable)
