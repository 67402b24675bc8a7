"""What every test stands on: nothing that failed goes unheard.

Twisted logs a failure that nobody asked about and goes on; a test that passes above such a
failure has seen half of what happened.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from twisted.logger import globalLogPublisher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twisted.logger import LogEvent
    from twisted.python.failure import Failure

#: Servers of other ages and kinds than the one that is installed beside us, and a JupyterHub; what
#: tunnels lead to; and who is attacked.
pytest_plugins = ("tests.jupyters", "tests.jupyterhubs", "tests.peers", "tests.underattack")


# A shell ignores it for what it starts with "&", and our children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


class LoggedFailures:
    """The failures that were logged during a test."""

    def __init__(self) -> None:
        self._failures: list[Failure] = []

    def observe(self, event: LogEvent) -> None:
        """A log observer: keep the event's failure, if it has one."""
        failure = event.get("log_failure")
        if failure is not None:
            self._failures.append(failure)

    def flush(self, *types: type[Exception]) -> list[Failure]:
        """Failures of these types so far (of any, if none is given); they are not held against
        the test. An unhandled Deferred tells only when it is collected."""
        gc.collect()
        wanted = [one for one in self._failures if not types or one.check(*types)]
        self._failures = [one for one in self._failures if one not in wanted]
        return wanted


@pytest.fixture(autouse=True)
def loggedFailures() -> Iterator[LoggedFailures]:
    """Fails the test if it logged a failure and did not :meth:`~LoggedFailures.flush` it."""
    failures = LoggedFailures()
    globalLogPublisher.addObserver(failures.observe)
    yield failures
    # The youngest generations hold what one test has dropped; a full collection of this heap
    # would take longer than most tests.
    gc.collect(1)
    globalLogPublisher.removeObserver(failures.observe)
    unheard = failures._failures
    if unheard:
        pytest.fail(
            "\n".join(["failures were logged:", *(one.getTraceback() for one in unheard)]),
            pytrace=False,
        )


@dataclass(frozen=True)
class LocalJupyter:
    """A real Jupyter server on loopback, of the packages that the tests run with."""

    base: str
    token: str
    root: Path

    @property
    def url(self) -> str:
        """What its log shows, and people paste."""
        return f"{self.base}?token={self.token}"

    def ask(self, path: str) -> Any:
        """The answer of its REST API to a GET."""
        request = urllib.request.Request(
            self.base + path, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)


@pytest.fixture(scope="session")
def localJupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalJupyter]:
    """One server for the whole run: a test must leave it as it was."""
    from conchkernel.demo import JUPYTER_CONFIG

    directory = tmp_path_factory.mktemp("jupyter")
    root = directory / "root"
    root.mkdir()
    token = "sesame"
    config = directory / "jupyter_server_config.py"
    config.write_text(JUPYTER_CONFIG.format(token=token, root=str(root)))
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", f"--config={config}"],
            env={**os.environ, **{name: str(directory / word) for name, word in places.items()}},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    try:
        while not (found := list(directory.glob("runtime/jpserver-*.json"))):
            assert server.poll() is None, (directory / "log").read_text()
            time.sleep(0.05)
        yield LocalJupyter(json.loads(found[0].read_bytes())["url"], token, root)
    finally:
        server.terminate()
        server.wait()
        if server.stdin is not None:
            server.stdin.close()
