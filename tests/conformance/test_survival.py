"""Kernels come and go underneath; what runs on their host goes on. On every Jupyter stack."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from conchkernel.errors import LinkLost
from conchkernel.interfaces import ExitStatus, ProcessRequest, PtyRequest, WindowSize
from conchkernel.jupyter import kernel
from conchkernel.jupyter.backends import JupyterBackend
from conchkernel.jupyter.channels import connect_channels

from ..collector import Collector

TERMINAL = PtyRequest(b"vt100", WindowSize(80, 24))


async def until(condition, seconds=30.0):
    """Wait for a condition outside the reactor's sight; fails after ``seconds``."""
    deadline = reactor.seconds() + seconds
    while not condition():
        assert reactor.seconds() < deadline, "it did not come to pass"
        await deferLater(reactor, 0.05)


def agent(gateway, user="owner"):
    """The private directory of a user's agent."""
    name = gateway.build(user)[0]._start["id"]
    return Path(tempfile.gettempdir()) / f"conchkernel-{os.getuid()}-{name}"


def ask(jupyter, path, method="GET"):
    """A REST call by another road than the gateway's; ``None`` where the server answers 403."""
    request = urllib.request.Request(f"{jupyter.url}{path}", method=method)
    request.add_header("Authorization", f"token {jupyter.token}")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        if error.code == 403:
            return None
        raise


@pytest.fixture
def gateway(jupyter, tmp_path):
    """A started backend on one stack, and its stop."""
    made = JupyterBackend(
        reactor, jupyter.pasted, state_dir=tmp_path / "state", grace=0.5, orphan_timeout=8
    )
    pytest_twisted.blockon(Deferred.fromCoroutine(made.start()))
    directory = agent(made)
    assert directory.is_dir()
    yield made
    pytest_twisted.blockon(Deferred.fromCoroutine(made.stop()))
    pytest_twisted.blockon(Deferred.fromCoroutine(until(lambda: not directory.exists())))
    assert ask(jupyter, "api/kernels") in ([], None)
    assert ask(jupyter, "api/sessions") in ([], None)


async def shell(gateway):
    """A terminal with a shell that has a variable to lose."""
    collector = Collector()
    use = await gateway.connect("owner")
    stream = collector.start(use, ProcessRequest(b"stty -echo; exec bash --norc", TERMINAL))
    stream.write(b"here=$$; echo re''ady\n")
    await collector.untilOutput(b"ready")
    return collector


async def proves_alive(collector):
    """The shell is the one it was, and nothing it said was lost or said twice."""
    collector.stream.write(b'[ "$here" = $$ ] && echo sa""me; exit 5\n')
    await collector.untilClosed()
    assert collector.out.count(b"same") == 1
    assert collector.exit == ExitStatus(5)


def road(gateway):
    """The road of the owner's kernel."""
    return gateway._kernels["owner"]._road


def carrier(gateway):
    """Its carrier of the moment."""
    return gateway._kernels["owner"].link._carrier


@pytest_twisted.ensureDeferred
async def test_a_cut_websocket_loses_nothing(gateway):
    """The socket is cut in the midst of both directions, several times."""
    use = await gateway.connect("owner")
    data = os.urandom(4_000_000)
    collector = Collector()
    stream = collector.start(use, ProcessRequest(b"cat; exit 3"))
    for part in range(4):
        stream.write(data[part * 1_000_000 : (part + 1) * 1_000_000])
        await collector.until(lambda part=part: collector.count > part * 1_000_000 + 100_000)
        former = carrier(gateway)
        former._channels.transport.abortConnection()
        await until(lambda former=former: carrier(gateway) not in (None, former))
    stream.writeEOF()
    await collector.untilClosed()
    assert hashlib.sha256(collector.out).digest() == hashlib.sha256(data).digest()
    assert collector.exit == ExitStatus(3)


@pytest_twisted.ensureDeferred
async def test_a_shell_survives_the_kernels_restart(gateway, jupyter):
    """Somebody restarts the kernel; the agent is its own process, and the link finds back."""
    collector = await shell(gateway)
    former = carrier(gateway)
    await road(gateway)._client.restart(road(gateway)._kernel)
    await until(lambda: carrier(gateway) not in (None, former))
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_a_shell_survives_the_kernels_deletion(gateway):
    """Somebody deletes the kernel; another one takes its place."""
    collector = await shell(gateway)
    former = carrier(gateway)
    await road(gateway)._client.delete_kernel(road(gateway)._kernel)
    await until(lambda: carrier(gateway) not in (None, former))
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_foreign_messages_reach_the_kernel(gateway, tmp_path):
    """With the relay in place a notebook's requests and interrupts work as before."""
    collector = await shell(gateway)
    client, kernel = road(gateway)._client, road(gateway)._kernel
    channels = await connect_channels(
        reactor, client, kernel, on_carrier=lambda _: None, on_lost=lambda _: None
    )
    try:
        for channel in ("shell", "control"):
            info = await channels.request(channel, "kernel_info_request", {}, 30)
            assert info["language_info"]["name"] == "python"
        begun = tmp_path / "begun"
        code = f"import time\nopen({str(begun)!r}, 'w')\nwhile True: time.sleep(0.01)"
        loop = {"code": code, "silent": True}
        running = channels.request("shell", "execute_request", loop, 60)
        probe = channels.request("shell", "kernel_info_request", {}, 60)
        await until(begun.exists)
        await client.interrupt(kernel)
        assert (await running)["ename"] == "KeyboardInterrupt"
        await probe
        asked = {"code": "", "silent": True, "user_expressions": {"names": "sorted(globals())"}}
        reply = await channels.request("shell", "execute_request", asked, 30)
        names = reply["user_expressions"]["names"]["data"]["text/plain"]
        assert "conchkernel" not in names
    finally:
        channels.close()
        await channels.when_closed()
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_a_second_injection_changes_nothing_and_the_relay_can_go(gateway):
    """The relay guards against itself; taken out, the dispatcher is what it was; the link notices
    and puts it back."""
    collector = await shell(gateway)
    former = carrier(gateway)
    client, kernel = road(gateway)._client, road(gateway)._kernel
    channels = await connect_channels(
        reactor, client, kernel, on_carrier=lambda _: None, on_lost=lambda _: None
    )

    async def evaluate(code, expression):
        asked = {"code": code, "silent": True, "user_expressions": {"x": expression}}
        reply = await channels.request("shell", "execute_request", asked, 30)
        return reply["user_expressions"]["x"]["data"]["text/plain"]

    from conchkernel.jupyter import injection

    relay = "__import__('sys').modules['_conchkernel_relay'].relay"
    stream = "get_ipython().kernel.control_stream"
    try:
        before = await evaluate("", f"id({relay})")
        await channels.request("shell", "execute_request", injection.injection(), 30)
        assert await evaluate("", f"id({relay})") == before
        out = f"""
import threading as _t
_done = _t.Event()
{stream}.io_loop.add_callback(lambda: ({relay}.uninstall(), _done.set()))
_done.wait(10)
"""
        name = await evaluate(out, f"{stream}._recv_callback.__name__")
        assert name in ("'dispatch_control'", "'dispatch'")
        info = await channels.request("control", "kernel_info_request", {}, 30)
        assert info["status"] == "ok"
    finally:
        channels.close()
        await channels.when_closed()
    await until(lambda: carrier(gateway) not in (None, former))
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_the_last_use_and_a_grace_time_end_the_kernel(gateway, jupyter):
    """Nothing is left after the last use; the next one gets a fresh kernel."""
    directory = agent(gateway, "guest")
    use = await gateway.connect("guest")
    collector = Collector()
    collector.start(use, ProcessRequest(b"echo one"))
    await collector.untilClosed()
    assert directory.is_dir()
    use.release()
    await until(lambda: not directory.exists())
    again = await gateway.connect("guest")
    collector = Collector()
    collector.start(again, ProcessRequest(b"echo two"))
    await collector.untilClosed()
    assert bytes(collector.out) == b"two\n"
    again.release()


@pytest_twisted.ensureDeferred
async def test_a_gateway_that_starts_again_finds_its_kernel(gateway, jupyter, tmp_path):
    """The same identity gives the same kernel and agent; the first to stop leaves them alone."""
    second = JupyterBackend(reactor, jupyter.pasted, state_dir=tmp_path / "state")
    collector = await shell(gateway)
    await second.start()
    assert second._kernels["owner"]._road._kernel == road(gateway)._kernel
    await second.stop()
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_a_kernel_in_use_looks_active(gateway, jupyter, monkeypatch):
    """Its server, and a culler that asks it, see it being used, though no cell is executed."""
    monkeypatch.setattr(kernel, "KEEP_ALIVE_SECONDS", 0.3)
    use = await gateway.connect("owner")
    carrier(gateway).lost(LinkLost("the test wants another one"))
    await until(lambda: carrier(gateway) is not None and gateway._kernels["owner"].link.attached)
    path = f"api/kernels/{road(gateway)._kernel}"
    seen = {ask(jupyter, path)["last_activity"]}
    await until(lambda: len(seen.add(ask(jupyter, path)["last_activity"]) or seen) > 4)
    use.release()


@pytest_twisted.ensureDeferred
async def test_a_gateway_that_nobody_uses_keeps_no_kernel(gateway, jupyter):
    """What was started to see that it works goes like any other, and is there again when needed."""
    await until(lambda: not gateway._kernels)
    await gateway.ended("owner")
    assert ask(jupyter, "api/kernels") in ([], None)
    collector = await shell(gateway)
    await proves_alive(collector)
