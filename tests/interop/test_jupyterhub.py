"""A real JupyterHub: which server a URL means, and what becomes of sessions when parts of it go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_twisted

from conchkernel.errors import KernelRefused, NotJupyter, TokenRefused

from ..jupyterhubs import start_hub
from ..test_rest import found, refused

if TYPE_CHECKING:

    from ..jupyterhubs import RunningHub


# --- which server a URL means ------------------------------------------------------------------


@dataclass(frozen=True)
class Pasted:
    """URLs of a hub: ``TOKEN@path``, where a token is called after who may what."""

    hub: RunningHub
    tokens: dict[str, str]

    def url(self, text: str) -> str:
        """The URL that is pasted."""
        token, _, path = text.partition("@")
        return f"{self.hub.url}{path}" + (f"?token={self.tokens[token]}" if token else "")


@pytest.fixture(scope="module")
def pasted(jupyterhub: RunningHub) -> Pasted:
    """Ann has a server, one called gpu, and one called cold that is stopped, as is Eve's."""
    for name in ("ann", "bob", "eve"):
        jupyterhub.add_user(name)
    jupyterhub.start_servers("ann", "ann/gpu", "ann/cold", "bob")
    jupyterhub.stop_server("ann/cold")
    tokens = {name: jupyterhub.token_of(name) for name in ("ann", "bob", "eve")}
    tokens["mute"] = jupyterhub.token_of("ann", "read:users!user")
    tokens["all"] = jupyterhub.token_of("ann", "inherit")
    tokens["wrong"] = "hunter2"
    return Pasted(jupyterhub, tokens)


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("ann@user/ann", "user/ann"),
        ("ann@user/ann/", "user/ann"),
        ("all@user/ann/lab", "user/ann"),
        ("ann@user/ann/tree/x/y.txt", "user/ann"),
        ("ann@user/ann/lab/tree/x/y.ipynb", "user/ann"),
        ("ann@user/ann/gpu", "user/ann/gpu"),
        ("ann@user/ann/gpu/lab/tree/x", "user/ann/gpu"),
        ("ann@hub/user/ann/lab", "user/ann"),
        ("ann@hub/user/ann/gpu/", "user/ann/gpu"),
        ("ann@hub/spawn-pending/ann/gpu", "user/ann/gpu"),
        ("ann@hub/spawn/ann", "user/ann"),
        ("ann@", "user/ann"),
        ("ann@hub/", "user/ann"),
        ("ann@hub/home", "user/ann"),
        ("bob@hub/token", "user/bob"),
        ("ann@user-redirect/lab/tree/x", "user/ann"),
        ("ann@hub/user-redirect/lab", "user/ann"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_a_url_means(pasted: Pasted, text: str, server: str) -> None:
    """A page of a server's is of that server; pages of the hub are of the token's owner."""
    async with found(pasted.url(text)) as client:
        assert client.location.base == f"{pasted.hub.url}{server}"


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("ann@user/ann/nosuch/", KernelRefused, "ann has no server nosuch at the JupyterHub"),
        ("ann@user/ann/nosuch/lab", KernelRefused, "ann has no server nosuch"),
        ("ann@user/ann/cold/", KernelRefused, "start it at {hub}hub/spawn/ann/cold and"),
        ("ann@user/ann/cold/lab", KernelRefused, "server of ann/cold is not running"),
        ("ann@hub/spawn/ann/cold", KernelRefused, "server of ann/cold is not running"),
        ("ann@hub/spawn/ann/new", KernelRefused, "start it at {hub}hub/spawn/ann/new and"),
        ("eve@hub/spawn/eve/new", KernelRefused, "start it at {hub}hub/spawn/eve/new and"),
        ("eve@user/eve/lab", KernelRefused, "start it at {hub}hub/spawn/eve and"),
        ("eve@hub/home", KernelRefused, "server of eve is not running"),
        ("ann@user/nobody/lab", KernelRefused, "no server of nobody that ann's token may reach"),
        ("ann@user/eve/lab", KernelRefused, "no server of eve that ann's token may reach"),
        ("ann@user/bob/lab", TokenRefused, "ann's token may not reach the Jupyter server of bob"),
        ("mute@user/ann/lab", TokenRefused, "lacks the scope access:servers"),
        ("wrong@user/ann/lab", TokenRefused, "does not know the token; make another one at {hub}"),
        ("wrong@user/eve/lab", TokenRefused, "no Jupyter server of eve answers, and the"),
        ("wrong@hub/home", TokenRefused, "does not know the token"),
        ("@user/ann/lab", TokenRefused, "wants a token; make one at {hub}hub/token"),
        ("@hub/home", TokenRefused, "wants a token"),
        ("ann@services/tests/x", NotJupyter, "no server of the JupyterHub"),
        ("ann@hub/admin", NotJupyter, "paste the URL of your server: {hub}user/NAME/"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_is_refused(
    pasted: Pasted, text: str, error: type[Exception], sentence: str
) -> None:
    """Each in words of its own, which say what to do; never another server than was meant."""
    problem = await refused(pasted.url(text))
    assert type(problem) is error
    assert sentence.format(hub=pasted.hub.url) in str(problem)
    assert not [token for token in pasted.tokens.values() if token in str(problem)]


@pytest_twisted.ensureDeferred
async def test_below_a_path() -> None:
    """A hub that has a site to share."""
    hub = start_hub("/of/science/")
    try:
        hub.add_user("ann")
        token = hub.token_of("ann")
        for path in ("user/ann/lab", "hub/spawn-pending/ann", "hub/home", ""):
            stopped = await refused(f"{hub.url}{path}?token={token}")
            assert f"start it at {hub.url}hub/spawn/ann and" in str(stopped)
        hub.start_servers("ann")
        for path in ("user/ann/lab", "hub/user/ann", "hub/spawn/ann", "hub/token", ""):
            async with found(f"{hub.url}{path}?token={token}") as client:
                assert client.location.base == f"{hub.url}user/ann"
    finally:
        hub.stop()
