"""A real JupyterHub for tests: its hub, its proxy, and the users' servers, all on loopback.

The hub lives in a venv of its own, the proxy comes from npm; both are kept beside the venvs of
:mod:`tests.jupyters`. The proxy is a process by itself, as in a cluster, so that the hub can be
restarted while the users' servers go on.
"""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from . import nodejs
from .jupyters import COMMON, MARK, environment_in, kill_marked, made_once, venv_of
from .ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUIREMENTS = ["jupyterhub==6.1.1", "jupyter_server==2.21.1", "ipykernel==7.4.0", *COMMON]
PROXY = "configurable-http-proxy@5.3.0"
#: What a token must be allowed for us: its user's own servers.
SCOPES = ["access:servers!user"]
_START_SECONDS = 60.0
_STOP_SECONDS = 15.0

_CONFIG = """\
c.JupyterHub.bind_url = "http://127.0.0.1:{public}{base_url}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{hub}/"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api}"
c.ConfigurableHTTPProxy.should_start = False
c.JupyterHub.cleanup_servers = False
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = "{home}/users/{{username}}"
c.Spawner.args = ["--allow-root"]
c.Spawner.environment = {{
    "JUPYTERHUB_SINGLEUSER_APP": "jupyter_server.serverapp.ServerApp",
    "{MARK}": "{mark}",
}}
c.JupyterHub.allow_named_servers = True
# A POST that starts a server need not wait for it.
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 0.05}}
c.JupyterHub.services = [{{"name": "tests", "api_token": "{token}"}}]
c.JupyterHub.load_roles = [{{
    "name": "tests",
    "services": ["tests"],
    "scopes": ["admin:users", "admin:servers", "access:servers", "tokens", "proxy"],
}}]
"""


@dataclass
class RunningHub:
    """A JupyterHub of ours."""

    url: str
    """Its root, with a slash at the end."""
    _token: str = field(repr=False)
    _home: Path = field(repr=False)
    _environment: dict[str, str] = field(repr=False)
    _mark: str = field(repr=False)
    _proxy_command: list[str | Path] = field(repr=False)
    _proxy: subprocess.Popen[bytes] = field(repr=False)
    _hub: subprocess.Popen[bytes] = field(repr=False)

    @property
    def log(self) -> str:
        """What its processes have printed."""
        return (self._home / "log").read_text(errors="replace")

    # --- by its REST API ---------------------------------------------------------------------

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request as an administrator: the answer's status and what it tells."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"token {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}hub/api{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                told = answer.read()
                return answer.status, json.loads(told) if told else None
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def add_user(self, name: str) -> None:
        """Make a user, whose server does not run yet."""
        status, told = self.ask("POST", f"/users/{name}")
        assert status == 201, told
        (self._home / "users" / name).mkdir(parents=True)

    def token_of(self, name: str, *scopes: str) -> str:
        """A new token of a user's.

        :param scopes: :data:`SCOPES` if none are given.
        """
        wanted = {"scopes": list(scopes) or SCOPES}
        status, told = self.ask("POST", f"/users/{name}/tokens", wanted)
        assert status == 201, told
        return str(told["token"])

    def start_servers(self, *servers: str) -> None:
        """Start servers, ``NAME`` or ``NAME/SERVER``, and wait until they are ready."""
        for server in servers:
            status, told = self.ask("POST", _server_path(server))
            assert status in (201, 202), (told, self.log)
        for server in servers:
            self._wait_for_server(server, running=True)

    def stop_server(self, server: str) -> None:
        """Stop a server, and wait until it has ended."""
        status, told = self.ask("DELETE", _server_path(server))
        assert status in (202, 204), (told, self.log)
        self._wait_for_server(server, running=False)

    def _wait_for_server(self, server: str, *, running: bool) -> None:
        name, _, server = server.partition("/")
        deadline = time.monotonic() + _START_SECONDS
        while True:
            _, told = self.ask("GET", f"/users/{name}")
            model = told["servers"].get(server) or {"ready": False, "pending": None}
            if model["ready"] == running and not model["pending"]:
                return
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    # --- its processes -----------------------------------------------------------------------

    def restart(self) -> None:
        """End the hub and start it again; its proxy and the users' servers go on."""
        self._hub.terminate()
        self._hub.wait(_STOP_SECONDS)
        self._hub = _spawn_hub(self._home, self._environment)
        self.wait()

    def restart_proxy(self) -> None:
        """Kill the proxy and start it again; what it led to is told to it by the hub."""
        self._proxy.kill()
        self._proxy.wait()
        self._proxy = _spawn(self._home, self._environment, self._proxy_command)
        self.wait()
        # The hub would look by itself only after minutes.
        status, told = self.ask("POST", "/proxy")
        assert status == 200, (told, self.log)

    def pid_of(self, server: str) -> int:
        """The process of a server that runs."""
        environment = {"JUPYTERHUB_SERVICE_PREFIX": f"/user/{server}/", MARK: self._mark}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_server = any(word.endswith("singleuser") for word in process.cmdline())
                if is_server and environment.items() <= process.environ().items():
                    return process.pid
        raise LookupError(f"no server of {server} runs")

    def wait(self) -> None:
        """Until the hub answers through its proxy."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            for process in (self._hub, self._proxy):
                assert process.poll() is None, self.log
            try:
                if self.ask("GET", "/users")[0] == 200:
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def stop(self) -> None:
        """End all of it, and remove its files."""
        for process in (self._hub, self._proxy):
            process.send_signal(signal.SIGTERM)
        for process in (self._hub, self._proxy):
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        kill_marked(self._mark)
        shutil.rmtree(self._home, ignore_errors=True)


def _server_path(server: str) -> str:
    name, _, server = server.partition("/")
    return f"/users/{name}/servers/{server}" if server else f"/users/{name}/server"


def _python() -> Path:
    return venv_of("hub", REQUIREMENTS)


def _proxy_program() -> Path:
    made = made_once("hub-proxy", [PROXY], lambda made: nodejs.install(made, PROXY))
    return made / "node_modules" / "configurable-http-proxy" / "bin" / "configurable-http-proxy"


def start_hub(base_url: str = "/", *lines: str) -> RunningHub:
    """Start a hub without users and wait until it answers.

    :param base_url: the path of its root.
    :param lines: more of its configuration.
    """
    home = Path(tempfile.mkdtemp(prefix="conchkernel-hub-"))
    public, hub, api = (free_port() for _ in range(3))
    token, mark = secrets.token_hex(16), secrets.token_hex(8)
    config = home / "jupyterhub_config.py"
    values = {"public": public, "hub": hub, "api": api, "home": home, "base_url": base_url}
    values |= {"token": token, "mark": mark, "MARK": MARK}
    config.write_text(_CONFIG.format(**values) + "".join(f"{line}\n" for line in lines))
    environment = environment_in(home, _python())
    environment |= {"CONFIGPROXY_AUTH_TOKEN": secrets.token_hex(16), MARK: mark}
    command: list[str | Path] = [nodejs.node(), _proxy_program()]
    command += ["--ip=127.0.0.1", f"--port={public}", "--api-ip=127.0.0.1", f"--api-port={api}"]
    command += [f"--default-target=http://127.0.0.1:{hub}", "--error-target"]
    command += [f"http://127.0.0.1:{hub}{base_url}hub/error"]
    made = RunningHub(
        f"http://127.0.0.1:{public}{base_url}",
        token,
        home,
        environment,
        mark,
        command,
        _spawn(home, environment, command),
        _spawn_hub(home, environment),
    )
    try:
        made.wait()
    except BaseException:
        made.stop()
        raise
    return made


def pytest_collection_finish(session: pytest.Session) -> None:
    """Install what is missing before the first test: it takes longer than a test may."""
    items = session.items if not session.config.option.collectonly else []
    if any("jupyterhub" in getattr(item, "fixturenames", ()) for item in items):
        _python()
        _proxy_program()


@pytest.fixture(scope="session")
def jupyterhub() -> Iterator[RunningHub]:
    """One for the whole run; each test has users of its own."""
    made = start_hub()
    yield made
    made.stop()


def _spawn_hub(home: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return _spawn(home, environment, [_python(), "-m", "jupyterhub", "-f", "jupyterhub_config.py"])


def _spawn(
    home: Path, environment: dict[str, str], command: list[str | Path]
) -> subprocess.Popen[bytes]:
    with open(home / "log", "ab") as log:
        return subprocess.Popen(
            command,
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
