"""Which kernel is whose, and what is said when there is none."""

from __future__ import annotations

import stat
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.logger import globalLogPublisher
from twisted.protocols.portforward import ProxyFactory

from conchkernel.errors import (
    ConfigurationError,
    KernelRefused,
    KernelUnsupported,
    LinkLost,
    StreamRefused,
)
from conchkernel.interfaces import ProcessRequest
from conchkernel.jupyter import injection, link
from conchkernel.jupyter.backends import JupyterBackend, identity
from conchkernel.jupyter.proxy import make_agent
from conchkernel.jupyter.rest import JupyterClient

from .collector import Collector
from .conformance.test_survival import agent, until
from .jupyters import start_jupyter


async def run(link, command):
    """Run a command to its end, and give what came of it."""
    collector = Collector()
    collector.start(link, ProcessRequest(command)).writeEOF()
    await collector.untilClosed()
    return collector


def test_an_identity_is_made_once_and_private(tmp_path):
    """Mode 0600 in a directory of mode 0700; the second time it is the same."""
    state = tmp_path / "a" / "state"
    first = identity(state)
    assert identity(state) == first
    assert len(first) == 32
    assert stat.S_IMODE((state / "identity").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert [path.name for path in state.iterdir()] == ["identity"]


@pytest.mark.parametrize("content", ["", "zz", "00" * 31])
def test_a_damaged_identity_is_a_sentence(tmp_path, content):
    """It is not replaced behind the operator's back: kernels hang on it."""
    (tmp_path / "identity").write_text(content)
    with pytest.raises(ConfigurationError, match=r"state directory|damaged"):
        identity(tmp_path)


@pytest_twisted.ensureDeferred
async def test_an_unknown_kernel_name_is_answered_with_the_known_ones(currentJupyter, tmp_path):
    """Before anything is started."""
    backend = JupyterBackend(
        reactor, currentJupyter.pasted, state_dir=tmp_path, kernel_name="fortran"
    )
    with pytest.raises(KernelRefused, match=r"no kernel named fortran; it has .*python3"):
        await backend.start()
    # Who comes while the start is tried again and again is told why.
    with pytest.raises(LinkLost, match="no kernel named fortran"):
        await backend.connect("owner")
    await backend.stop()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"shell": "/no/such/shell"}, "the shell /no/such/shell is not an executable file"),
        ({"shell": "/tmp"}, "the shell /tmp is not an executable file"),
        ({"working_dir": "/no/such/é"}, "the directory /no/such/é cannot be entered"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_shell_that_is_not_there_is_no_start(currentJupyter, tmp_path, options, complaint):
    """The operator is told at once, not the first client; and the kernel goes again."""
    backend = JupyterBackend(reactor, currentJupyter.pasted, state_dir=tmp_path, **options)
    with pytest.raises(KernelRefused, match=complaint):
        await backend.start()
    # Who comes while the start is tried again and again is told the same.
    use = await backend.connect("owner")
    done = await run(use, b"pwd")
    assert isinstance(done.reason, StreamRefused)
    assert complaint in str(done.reason)
    assert done.out == b""
    use.release()
    await backend.stop()


@pytest_twisted.ensureDeferred
async def test_a_shell_and_a_directory_that_are_there(currentJupyter, tmp_path):
    """Whatever letters are in their names."""
    place = tmp_path / "Küche 日本"
    place.mkdir()
    shell = place / "schäl"
    shell.symlink_to("/bin/sh")
    backend = JupyterBackend(
        reactor,
        currentJupyter.pasted,
        state_dir=tmp_path,
        shell=str(shell),
        working_dir=str(place),
    )
    await backend.start()
    use = await backend.connect("owner")
    done = await run(use, b'pwd; echo "$SHELL"')
    assert done.out.decode() == f"{place}\n{shell}\n"
    use.release()
    await backend.stop()


async def said(backend, command):
    """What a command says on a backend that is started for it."""
    await backend.start()
    use = await backend.connect("owner")
    done = await run(use, command)
    use.release()
    await backend.stop()
    return done.out


#: A gateway with the same state directory, in a process of its own, and in use.
ANOTHER = """\
import sys
from pathlib import Path
from twisted.internet.defer import Deferred
from twisted.internet.task import react
from conchkernel.jupyter.backends import JupyterBackend

async def main(reactor, url, state):
    backend = JupyterBackend(reactor, url, state_dir=Path(state))
    await backend.start()
    await backend.connect("owner")
    print("in use", flush=True)
    await Deferred()

react(lambda *arguments: Deferred.fromCoroutine(main(*arguments)), sys.argv[1:])
"""


@pytest.mark.parametrize("killed", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_killed_gateway_holds_no_kernel(currentJupyter, tmp_path, killed):
    """The agent counts it until the orphan timeout, but whoever comes after it takes the kernel
    away. One that lives keeps it."""
    command = [sys.executable, "-c", ANOTHER, currentJupyter.pasted, str(tmp_path)]
    another = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert another.stdout.readline() == b"in use\n"
        if killed:
            another.kill()
            another.wait()
        backend = JupyterBackend(reactor, currentJupyter.pasted, state_dir=tmp_path)
        await backend.start()
        client, used = backend._client, backend._kernels["owner"]._road._wantedId
        await backend.stop()
        assert backend.sessionsLeft == 1
        agent = make_agent(reactor)
        asking = JupyterClient(reactor, client.location, agent)
        assert (await asking.kernel(used) is None) == killed
        if not killed:
            await asking.delete_kernel(used)
        await agent.close()
    finally:
        another.kill()
        another.wait()
        another.stdout.close()


@pytest_twisted.ensureDeferred
async def test_a_server_at_an_ipv6_address(currentJupyter, tmp_path):
    """Its brackets go through REST and WebSocket."""
    where = urlsplit(currentJupyter.pasted)
    road = reactor.listenTCP(0, ProxyFactory("127.0.0.1", where.port), interface="::1")
    url = currentJupyter.pasted.replace(where.netloc, f"[::1]:{road.getHost().port}")
    assert await said(JupyterBackend(reactor, url, state_dir=tmp_path), b"echo six") == b"six\n"
    await road.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_server_without_a_token(tmp_path):
    """It guards itself against foreign pages instead, and we are none."""
    server = start_jupyter("current", options=["--IdentityProvider.token="])
    try:
        backend = JupyterBackend(reactor, server.url, state_dir=tmp_path)
        assert await said(backend, b"echo open") == b"open\n"
    finally:
        server.stop()


@pytest_twisted.ensureDeferred
async def test_a_backend_that_has_not_started_says_so(tmp_path):
    """Not a hang, not a traceback."""
    backend = JupyterBackend(reactor, "http://127.0.0.1:1/", state_dir=tmp_path)
    with pytest.raises(LinkLost, match="try again"):
        await backend.connect("owner")
    await backend.stop()


@pytest.mark.parametrize(
    "reply",
    [
        {"status": "error", "ename": "ImportError", "evalue": "no zmq here"},
        {"status": "aborted"},
        {"status": "ok"},
        {"status": "ok", "user_expressions": {"version": {"status": "error"}}},
        {"status": "ok", "user_expressions": {"version": {"data": {"text/plain": "'old'"}}}},
        {"status": "ok", "user_expressions": {"version": {"data": {"text/plain": "1 +"}}}},
        {"status": "ok", "user_expressions": []},
    ],
)
def test_an_injection_that_failed_is_a_sentence(reply):
    """Whatever a kernel answers."""
    with pytest.raises(KernelUnsupported, match="--kernel-name"):
        injection.check(reply)


def test_the_injection_is_bounded_and_versioned():
    """One request of modest size; the sources' digest is their version."""
    content = injection.injection()
    assert len(content["code"]) < 200_000
    assert content["silent"] is True
    assert content["store_history"] is False
    assert len(injection.version()) == 16
    compile(content["code"], "cell", "exec")


@pytest_twisted.ensureDeferred
async def test_a_backend_that_was_stopped_can_be_started_again(currentJupyter, tmp_path):
    """An application may stop its gateway for a while."""
    backend = JupyterBackend(reactor, currentJupyter.pasted, state_dir=tmp_path)
    await backend.start()
    await backend.stop()
    await backend.start()
    try:
        use = await backend.connect("owner")
        use.release()
    finally:
        await backend.stop()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("patience", [0, link.FAREWELL_SECONDS], ids=["given up", "waited for"])
async def test_a_stop_while_a_kernel_starts_is_no_failure(
    currentJupyter, tmp_path, monkeypatch, patience
):
    """It is asked for, leaves no kernel, and no agent where there was time to say so to it, and is
    not in the log as a defect."""
    monkeypatch.setattr(link, "FAREWELL_SECONDS", patience)
    seen = []
    globalLogPublisher.addObserver(seen.append)
    backend = JupyterBackend(reactor, currentJupyter.pasted, state_dir=tmp_path)
    create = JupyterClient.create_kernel
    asked: Deferred[None] = Deferred()

    def asking(self, *arguments):
        reactor.callLater(0.01, asked.callback, None)
        return create(self, *arguments)

    monkeypatch.setattr(JupyterClient, "create_kernel", asking)
    starting = Deferred.fromCoroutine(backend.start())
    await asked
    client = backend._client
    wanted, directory = backend._kernels["owner"]._road._wantedId, agent(backend)
    await backend.stop()
    globalLogPublisher.removeObserver(seen.append)
    if patience:
        await starting
        await until(lambda: not directory.exists())
    else:
        with pytest.raises(LinkLost):
            await starting
    assert not [event for event in seen if "log_failure" in event]
    roads = make_agent(reactor)
    again = JupyterClient(reactor, client.location, roads)
    assert await again.kernel(wanted) is None
    await roads.close()
