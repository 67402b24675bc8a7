"""A JupyterHub: whose server a path below it means, and why that cannot be used.

A hub gives each user a server at ``/user/NAME``, and others with names of their own at
``/user/NAME/SERVER``; at ``/hub`` it has its pages and its API. All of it may lie below a prefix.
Where no server runs the hub answers itself, and its proxy leads what is below a name that is no
running server to the user's default one. So nothing here is taken for a server only because it
answers: another server than the one that was pasted would be the wrong machine.

The hub is asked with the user's own token. It needs no other scope than the server does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from conchkernel.errors import (
    JupyterError,
    JupyterUnreachable,
    KernelRefused,
    NotJupyter,
    TokenRefused,
)
from conchkernel.jupyter.rest import JupyterClient, from_hub, refusal, version_of
from conchkernel.jupyter.urls import JupyterLocation, redact, spawn_page

if TYPE_CHECKING:
    from conchkernel.jupyter.proxy import RoadAgent
    from conchkernel.jupyter.rest import Answer

#: What a path has first below the hub's root.
_FIRST = ("hub", "user", "services", "user-redirect")
#: Pages of the hub from which it leads on to the default server of whoever has logged in, or which
#: lie where somebody who has just made a token copies a URL.
_OWN_PAGES = ("", "home", "login", "spawn", "token", "user-redirect")
#: Pages of a server that are not asked for: one that lacks JupyterLab has no ``/lab``, and is meant
#: all the same.
_SERVER_PAGES = {
    *("api", "consoles", "doc", "edit", "files", "lab", "nbclassic", "nbconvert", "notebooks"),
    *("proxy", "retro", "static", "terminals", "tree", "view", "voila"),
}


def root_of(answer: Answer, location: JupyterLocation) -> str | None:
    """The URL below which a JupyterHub has its servers, if one had a part in an answer.

    :param location: who was asked for ``/api``.
    """
    parts = urlsplit(location.base)
    segments = parts.path.split("/")[1:]
    origin = f"{parts.scheme}://{parts.netloc}"
    if answer.status in (302, 303, 307):
        # The hub's default route: the same path below /hub, and seldom with the host before it.
        above, separator, _ = answer.header("Location").removeprefix(origin).partition("/hub/")
        if separator and (parts.path + "/").startswith(above + "/"):
            return origin + above
    # Servers that run under a hub send this header too.
    if answer.header("X-JupyterHub-Version") or from_hub(answer):
        for depth, segment in enumerate(segments):
            if segment in _FIRST:
                return "/".join([origin, *segments[:depth]])
    return None


class Hub:
    """A JupyterHub and a user's token.

    :param location: where it has its servers, and the token.
    """

    def __init__(self, reactor: Any, location: JupyterLocation, agent: RoadAgent) -> None:
        self._reactor = reactor
        self._agent = agent
        self._location = location
        self._client = JupyterClient(reactor, location, agent)
        self._host = urlsplit(location.base).netloc
        self._shown = redact(location.base)

    async def find(self, path: str) -> JupyterClient:
        """The server that a path means.

        :param path: below the root, of a page of a server's or of the hub's own.
        :raises JupyterError: if it cannot be used, saying why.
        """
        words = path.strip("/").split("/")
        if words[0] == "hub":
            words = words[1:] or [""]
        page, user, below = (*words, "", "")[:3]
        if user and page == "user":
            return await self._server(user, below)
        if user and page in ("spawn", "spawn-pending"):
            return await self._server(user, below, named=bool(below))
        if page not in _OWN_PAGES:
            raise NotJupyter(f"this is no server of the JupyterHub {self._host}; {self._hint}")
        owner = await self._owner()
        if owner is None:
            raise NotJupyter(f"this is a page of the JupyterHub {self._host}; {self._hint}")
        if not owner:
            raise self._unknown_token()
        return await self._server(quote(owner, safe="@~"), "")

    @property
    def _hint(self) -> str:
        return f"paste the URL of your server: {self._shown}/user/NAME/?token=..."

    async def _server(self, user: str, below: str, *, named: bool = False) -> JupyterClient:
        """A user's server.

        :param user: as a path has it.
        :param below: what follows in the path: a server's name, or a page of the default one's.
        :param named: whether it can only be a name.
        """
        own = f"{self._location.base}/user/{user}"
        client = await self._answering(f"{own}/{below}") if below else None
        if client is None and not named:
            client = await self._answering(own)
            if client is not None and below:
                await self._must_be_a_page(client, user, below)
        if client is None:
            raise await self._why_silent(user, below, named=named)
        try:
            await client.kernelspecs()
        except TokenRefused as error:
            raise await self._why_refused(user) or error from None
        return client

    async def _answering(self, base: str) -> JupyterClient | None:
        """A server, if one answers for itself.

        :raises JupyterError: if there is one, which does not answer.
        """
        location = JupyterLocation(base, self._location.token)
        client = JupyterClient(self._reactor, location, self._agent)
        answer = await client.call("GET", "/api")
        if version_of(answer) is not None:
            return client
        if answer.status in (502, 503, 504):
            raise refusal(answer, location)
        return None

    async def _must_be_a_page(self, client: JupyterClient, user: str, below: str) -> None:
        """
        :raises KernelRefused: if what is below the default server in a path is none of its pages,
            but the name of a server that does not run.
        """
        stopped = self._stopped(await self._asked(user, below), user, below)
        if stopped is not None:
            raise stopped
        if below in _SERVER_PAGES:
            return
        if (await client.call("GET", f"/{below}")).status == 404:
            raise KernelRefused(
                f"{user} has no server {below} at the JupyterHub {self._host}, nor has the default "
                f"server a page of that name; check the URL"
            )

    # --- what the hub says -------------------------------------------------------------------

    async def _asked(self, user: str, below: str) -> Answer:
        """Its answer in the place of a server's."""
        return await self._client.call("GET", f"/hub/user/{user}{below and '/'}{below}/api")

    def _stopped(self, answer: Answer, user: str, below: str) -> KernelRefused | None:
        """The error of a server that does not run, if the hub says so."""
        if answer.status not in (424, 503) or not from_hub(answer):
            return None
        # The hub takes what is below for a page, unless the user has a server of that name.
        named = below and answer.body.rstrip(b'"} \n').endswith(f"/spawn/{user}/{below}".encode())
        return self._not_running(f"{user}/{below}" if named else user)

    def _not_running(self, path: str) -> KernelRefused:
        page = redact(spawn_page(f"{self._location.base}/user/{path}"))
        return KernelRefused(
            f"the Jupyter server of {path} is not running; start it at {page} and try again"
        )

    async def _why_silent(self, user: str, below: str, *, named: bool) -> JupyterError:
        """Why no server answers."""
        answer = await self._asked(user, below)
        if answer.status == 404:
            return await self._why_hidden(user)
        if answer.status in (302, 303) and "/hub/login" in answer.header("Location"):
            return self._unknown_token(f"no Jupyter server of {user} answers, and ")
        stopped = self._stopped(answer, user, below)
        if stopped is None and answer.status >= 500:
            # Servers ask the hub about tokens, and fail with it.
            return JupyterUnreachable(
                f"the JupyterHub {self._host} does not work ({answer.reason()}), and without it no "
                "server of its users lets anybody in"
            )
        if named:
            return self._not_running(f"{user}/{below}")
        return stopped or JupyterUnreachable(
            f"the JupyterHub {self._host} has a server of {user}, but it does not answer; "
            "look at it in a browser"
        )

    async def _why_hidden(self, user: str) -> JupyterError:
        """Why the hub has nothing to say about a user's servers."""
        owner = await self._owner()
        if owner == unquote(user):
            return self._forbidden(user, owner)
        whose = f"{_plain(owner)}'s" if owner else "the"
        return KernelRefused(
            f"the JupyterHub {self._host} has no server of {user} that {whose} token may reach; "
            "check the URL"
        )

    async def _why_refused(self, user: str) -> TokenRefused | None:
        """Why a server is closed to the token, if the hub knows."""
        owner = await self._owner()
        if owner is None:
            return None
        return self._forbidden(user, owner) if owner else self._unknown_token()

    def _forbidden(self, user: str, owner: str) -> TokenRefused:
        refused = f"{_plain(owner)}'s token may not reach the Jupyter server of {user}"
        if owner != unquote(user):
            return TokenRefused(f"{refused}; check the URL, or use a token of {user}'s")
        return TokenRefused(
            f"{refused}: it lacks the scope access:servers; "
            f"make one that has it at {self._shown}/hub/token"
        )

    def _unknown_token(self, before: str = "") -> TokenRefused:
        told = f"{before}the JupyterHub {self._host}"
        page = f"{self._shown}/hub/token"
        if self._location.token:
            return TokenRefused(f"{told} does not know the token; make another one at {page}")
        return TokenRefused(f"{told} wants a token; make one at {page} and add ?token=...")

    async def _owner(self) -> str | None:
        """Whose the token is: empty if it is nobody's, ``None`` if the hub does not say."""
        answer = await self._client.call("GET", "/hub/api/user")
        if answer.status in (401, 403):
            return ""
        try:
            told = answer.json() if answer.status == 200 else None
        except NotJupyter:
            told = None
        name = told.get("name") if isinstance(told, dict) else None
        return name if isinstance(name, str) and name else None


def _plain(name: str) -> str:
    """A name that somebody else has chosen, for one line."""
    return quote(name, safe="@~ ")[:80]
