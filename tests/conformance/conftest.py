"""The backends on which the suite runs: this host, the agent alone, and every Jupyter stack."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from conchkernel.jupyter.backends import JupyterBackend
from conchkernel.localbackend import LocalBackend
from conchkernel.loopback import LoopbackBackend

from ..jupyters import STACKS
from ..pythons import oldest
from .poorhost import PRELUDE

LOOPBACK = ["loopback-pure", "loopback-compiled", "loopback-old", "loopback-poor"]


@pytest.fixture(params=["local", *LOOPBACK, *STACKS], scope="module")
def backend(request, tmp_path_factory):
    """A started backend; one for a module's tests, as one gateway serves many sessions."""
    name = request.param
    environment = dict(os.environ, CONCHKERNEL_TEST="yes")
    if name == "local":
        made = LocalBackend(reactor, environment=environment)
    elif name in LOOPBACK:
        made = LoopbackBackend(
            reactor,
            environment=environment,
            compiled=name == "loopback-compiled",
            python=oldest() if name == "loopback-old" else sys.executable,
            prelude=PRELUDE if name == "loopback-poor" else "",
        )
    else:
        server = request.getfixturevalue("jupyters")[name]
        state = tmp_path_factory.mktemp("state")
        made = JupyterBackend(reactor, server.pasted, state_dir=state)
    # As under a server that a script started in its background.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pytest_twisted.blockon(Deferred.fromCoroutine(made.start()))
    finally:
        signal.signal(signal.SIGINT, before)
    yield made
    pytest_twisted.blockon(Deferred.fromCoroutine(made.stop()))


@pytest.fixture
def link(backend):
    """One use of the backend's kernel."""
    use = pytest_twisted.blockon(backend.connect("owner"))
    yield use
    use.release()
