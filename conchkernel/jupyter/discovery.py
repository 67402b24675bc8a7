"""Which Jupyter server a pasted URL means: found by asking, and opened with its token.

The path is walked upwards until something answers as Jupyter. Where a JupyterHub turns up on the
way, :mod:`conchkernel.jupyter.hub` takes over: there the path itself says whose server it is, and
anything else that happens to answer would be somebody's other server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from twisted.internet.defer import Deferred, TimeoutError

from conchkernel.errors import (
    JupyterError,
    JupyterUnreachable,
    KernelRefused,
    NotJupyter,
    TokenRefused,
)
from conchkernel.jupyter import hub
from conchkernel.jupyter.rest import JupyterClient, from_hub, refusal, version_of
from conchkernel.jupyter.urls import JupyterLocation, candidates

if TYPE_CHECKING:
    from conchkernel.jupyter.proxy import RoadAgent
    from conchkernel.jupyter.rest import Answer

#: For all probes together: below the 30 s after which a start has failed.
DISCOVER_SECONDS = 25.0


async def discover(reactor: Any, text: str, *, agent: RoadAgent) -> JupyterClient:
    """Find the server that a pasted URL means, and prove its token.

    :param text: see :func:`~conchkernel.jupyter.urls.candidates`.
    :raises ConfigurationError: if ``text`` is no URL.
    :raises JupyterError: in under 30 s, saying what is wrong.
    """
    searching = Deferred.fromCoroutine(_discover(reactor, candidates(text), agent))
    searching.addTimeout(DISCOVER_SECONDS, reactor)
    try:
        return await searching
    except TimeoutError:
        host = urlsplit(candidates(text)[0].base).netloc
        raise JupyterUnreachable(f"{host} does not answer in time; check the URL") from None


async def _discover(
    reactor: Any, locations: list[JupyterLocation], agent: RoadAgent, *, upgraded: bool = False
) -> JupyterClient:
    refused: list[JupyterError] = []
    for location in locations:
        client = JupyterClient(reactor, location, agent)
        answer = await client.call("GET", "/api")
        root = hub.root_of(answer, location)
        if root is not None:
            path = locations[0].base.removeprefix(root)
            return await hub.Hub(reactor, JupyterLocation(root, location.token), agent).find(path)
        if version_of(answer) is not None:
            await client.kernelspecs()
            return client
        if not upgraded and _moved_to_https(answer, location):
            secure = [
                JupyterLocation(one.base.replace("http://", "https://", 1), one.token)
                for one in locations
            ]
            return await _discover(reactor, secure, agent, upgraded=True)
        if from_hub(answer) or answer.status in (401, 403, 424, 502, 503, 504):
            refused.append(refusal(answer, location))
    for kind in (KernelRefused, TokenRefused, JupyterUnreachable):
        # What is said of a server weighs more than what is said above it of us.
        for error in refused:
            if isinstance(error, kind):
                raise error
    host = urlsplit(locations[0].base).netloc
    raise NotJupyter(
        f"{host} answers, but not as a Jupyter server; paste the URL that a browser shows for it"
    )


def _moved_to_https(answer: Answer, location: JupyterLocation) -> bool:
    """Whether the host says that it wants TLS. (With a port in the URL there is another one.)"""
    if answer.status not in (301, 302, 307, 308) or not location.base.startswith("http://"):
        return False
    try:
        target = urlsplit(urljoin(location.base, answer.header("Location")))
        port = target.port
    except ValueError:
        return False
    here = urlsplit(location.base)
    return (
        target.scheme == "https"
        and target.hostname == here.hostname
        and here.port is None
        and port in (None, 443)
    )
