"""A real JupyterHub: which server a URL means, and what becomes of sessions when parts of it go."""

from __future__ import annotations

import io
import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_twisted

from conchkernel.errors import KernelRefused, NotJupyter, TokenRefused

from ..jupyterhubs import start_hub
from ..peers import echo
from ..test_rest import found, refused
from .conftest import PATIENCE, free_port, read_until, running, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ..jupyterhubs import RunningHub
    from ..peers import Peer
    from .conftest import GatewayHost


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


# --- sessions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A user's default server, as a gateway is told of it."""

    hub: RunningHub
    user: str
    pasted: str

    @property
    def pid(self) -> int:
        """Its process of the moment."""
        return self.hub.pid_of(self.user)


@pytest.fixture(scope="module")
def server(jupyterhub: RunningHub) -> Server:
    """Sue's, which begins to run when a gateway waits for it."""
    jupyterhub.add_user("sue")
    token = jupyterhub.token_of("sue")
    return Server(jupyterhub, "sue", f"{jupyterhub.url}user/sue/lab?token={token}")


@pytest.fixture(scope="module")
def gateway(
    server: Server, client_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayHost]:
    """A gateway that was started before the server was."""
    directory = tmp_path_factory.mktemp("hub")
    log = directory / "log"
    waiting = "Waiting for Jupyter: the Jupyter server of sue is not running; start it at http"

    def start_the_server() -> None:
        until(lambda: log.exists() and waiting in log.read_text(), "the gateway waits")
        server.hub.start_servers("sue")

    starting = threading.Thread(target=start_the_server)
    starting.start()
    options = ["--wait-for-jupyter", "--authorized-keys", str(client_home / "key.pub")]
    with running("hub", directory, client_home, server, *options) as made:
        starting.join()
        yield made
    status, told = server.hub.ask("GET", "/users/sue")
    assert (status, told["servers"][""]["ready"]) == (200, True)


def test_commands_files_and_tunnels(
    gateway: GatewayHost, tmp_path: Path, serving: Callable[..., Peer]
) -> None:
    """All of it by way of the hub's proxy."""
    assert gateway.ssh("echo out; echo err >&2; exit 7") == (7, b"out\n", "err\n")
    data = os.urandom(20_000_000)
    (tmp_path / "up").write_bytes(data)
    scp = ["scp", "-q", "-F", str(gateway.config)]
    assert gateway.run([*scp, str(tmp_path / "up"), f"hub:{tmp_path}/there"]).status == 0
    assert gateway.run([*scp, f"hub:{tmp_path}/there", str(tmp_path / "down")]).status == 0
    assert (tmp_path / "down").read_bytes() == data
    peer = serving(echo)
    with gateway.forwarding(f"-R0:127.0.0.1:{peer.port}") as there:
        local, option = free_port(), f"-S{gateway.home}/hub.master"
        # To the server's host, and from there back to this one.
        assert gateway.ssh(option, "-Oforward", f"-L{local}:127.0.0.1:{there}").status == 0
        with socket.create_connection(("127.0.0.1", local), PATIENCE) as connection:
            connection.sendall(b"there and back")
            connection.shutdown(socket.SHUT_WR)
            assert b"".join(iter(lambda: connection.recv(65536), b"")) == b"there and back"


FAULTS = {
    "the server": lambda hub: (hub.stop_server("sue"), hub.start_servers("sue")),
    "the hub": lambda hub: hub.restart(),
    "the proxy": lambda hub: hub.restart_proxy(),
}


@pytest.mark.parametrize("part", FAULTS)
def test_restarted_beneath_sessions(gateway: GatewayHost, server: Server, part: str) -> None:
    """Shells live on, and what is under way loses nothing and repeats nothing."""
    data = os.urandom(3_000_000)
    with (
        gateway.started("-tt", "stty -echo; exec bash --norc") as shell,
        gateway.started("cat; exit 3") as cat,
    ):
        shell.stdin.write(b"here=$$; echo re''ady\n")
        read_until(shell.stdout, b"ready")
        came = bytearray()
        reading = threading.Thread(target=lambda: came.extend(cat.stdout.readall()))
        reading.start()
        # The pipe itself would take a part only, where a child's end interrupts the write.
        with io.BufferedWriter(cat.stdin) as into:
            into.write(data[:1_000_000])
            restarting = threading.Thread(target=FAULTS[part], args=[server.hub])
            restarting.start()
            into.write(data[1_000_000:])
            restarting.join()
        shell.stdin.write(b'[ "$here" = $$ ] && echo sa""me; exit 5\n')
        read_until(shell.stdout, b"same")
        reading.join()
        assert (shell.wait(PATIENCE), cat.wait(PATIENCE)) == (5, 3)
        assert len(came) == len(data)
        assert bytes(came) == data
