"""The kernel has no part in what a gateway says to the agent, and loses nothing by it."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from conchkernel.jupyter import framing, kernel
from conchkernel.jupyter.channels import connect_channels
from conchkernel.jupyter.framing import Message

from .test_survival import carrier, gateway, proves_alive, road, shell, until

__all__ = ["gateway"]

PORT = (
    "__import__('json').load(open(__import__('ipykernel').get_connection_file()))['stdin_port']"
)
RELAY = "__import__('sys').modules['_conchkernel_relay'].relay"


class Notebook:
    """Somebody else's connection to the kernel, who answers questions."""

    def __init__(self, channels):
        self.channels = channels
        #: Where questions wait, if they are not answered at once.
        self.holds = None
        self._usual = channels.messageReceived
        channels.messageReceived = self._received

    def _received(self, data, start, end, isBinary):
        message = framing.unpack(data[start:end])
        if b'"input_request"' in message.header:
            if self.holds is None:
                self.answer(message)
            else:
                self.holds.append(message)
        self._usual(data, start, end, isBinary)

    def answer(self, question):
        """Say it backwards."""
        header = {**json.loads(question.header), "msg_type": "input_reply"}
        content = {"value": json.loads(question.content)["prompt"][::-1]}
        parts = (json.dumps(part).encode() for part in (header, {}, {}, content))
        self.channels.sendParts((framing.pack(Message("stdin", *parts)),))

    async def asks(self, first="pass"):
        """The kernel asks, and has its answer."""
        code = f"{first}\nanswer = input('palindrome')"
        assert await self.evaluate("answer", code) == "'emordnilap'"

    async def evaluate(self, expression, code=""):
        """What an expression is in the kernel."""
        asked = {"code": code, "silent": False, "user_expressions": {"x": expression}}
        content = {**asked, "allow_stdin": True, "store_history": False}
        reply = await self.channels.request("shell", "execute_request", content, 30)
        assert reply["status"] == "ok", reply
        return reply["user_expressions"]["x"]["data"]["text/plain"]


@asynccontextmanager
async def notebook(made):
    """A notebook at the gateway's kernel."""
    channels = await connect_channels(
        reactor,
        road(made)._client,
        road(made)._kernel,
        on_carrier=lambda _: None,
        on_lost=lambda _: None,
    )
    try:
        yield Notebook(channels)
    finally:
        channels.close()
        await channels.when_closed()


def direct(made):
    """Whether the link's messages go to the agent itself."""
    return carrier(made)._channels.carrierChannel == b"stdin"


@pytest_twisted.ensureDeferred
async def test_the_kernel_has_no_part(gateway):
    """Its relay sees no message more, while a shell is talked to."""
    collector = await shell(gateway)
    assert direct(gateway)
    async with notebook(gateway) as other:
        before = await other.evaluate(f"{RELAY}._sent")
        collector.stream.write(b"seq 100000 | tail -1\n")
        await collector.untilOutput(b"100000\r\n")
        assert await other.evaluate(f"{RELAY}._sent") == before
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_questions_are_asked_as_ever(gateway):
    """By ``input()``, of whoever ran the cell, also when the agent goes and another comes."""
    collector = await shell(gateway)
    async with notebook(gateway) as early:
        await early.asks()
        former = carrier(gateway)
        os.kill(await agent_pid(collector), signal.SIGKILL)
        await until(lambda: carrier(gateway) not in (None, former))
        await early.asks()
        async with notebook(gateway) as late:
            await late.asks()
            await early.asks()


@pytest_twisted.ensureDeferred
async def test_a_question_waits_for_who_answers_it(gateway, tmp_path):
    """The kernel asks before the connection that the agent leads through to it is there."""
    collector = await shell(gateway)
    pid = await agent_pid(collector)
    try:
        os.kill(pid, signal.SIGSTOP)
        async with notebook(gateway) as other:
            asking = tmp_path / "asking"
            answered = Deferred.fromCoroutine(other.asks(f"open({str(asking)!r}, 'w').close()"))
            await until(asking.exists)
            os.kill(pid, signal.SIGCONT)
            await answered
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest_twisted.ensureDeferred
async def test_an_answer_outlives_the_agent(gateway):
    """Who was asked answers when the agent that led the question through is gone."""
    collector = await shell(gateway)
    async with notebook(gateway) as other:
        former = carrier(gateway)
        pid = await agent_pid(collector)
        port = int(await other.evaluate(PORT))
        other.holds = asked = []
        answered = Deferred.fromCoroutine(other.asks())
        await until(lambda: asked)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: ended(pid))
        # The server's ZeroMQ connects again by itself, at the port that the kernel has again.
        await until(lambda: connections(port))
        other.answer(asked.pop())
        await answered
        await until(lambda: carrier(gateway) not in (None, former))


@pytest_twisted.ensureDeferred
async def test_a_cell_that_runs_keeps_no_shell_waiting(gateway, monkeypatch):
    """When the link is lost, it comes back by the relay that the kernel has, whose main thread
    waits for an answer; and again, when there is a new agent to be started."""
    monkeypatch.setattr(kernel, "BUSY_SECONDS", 0.5)
    collector, another = await shell(gateway), await shell(gateway)
    pid = await agent_pid(collector)
    async with notebook(gateway) as other:
        other.holds = asked = []
        answered = Deferred.fromCoroutine(other.asks())
        await until(lambda: asked)
        former = carrier(gateway)
        former._channels.transport.abortConnection()
        await until(lambda: carrier(gateway) not in (None, former))
        assert direct(gateway)
        await proves_alive(collector)
        os.kill(pid, signal.SIGKILL)
        await another.untilClosed()  # as soon as there is another agent, which has it not
        await proves_alive(await shell(gateway))
        other.answer(asked.pop())
        await answered


@pytest_twisted.ensureDeferred
async def test_a_kernel_that_holds_the_interpreters_lock(gateway, monkeypatch):
    """Nothing in it answers; it is asked again and again, and nothing else comes of that."""
    monkeypatch.setattr(kernel, "BUSY_SECONDS", 0.25)
    road(gateway)._patience = 0.5
    collector = await shell(gateway)
    async with notebook(gateway) as other:
        held = "import ctypes; ctypes.PyDLL(None).sleep(3)"
        computed = Deferred.fromCoroutine(other.evaluate("1", held))
        former = carrier(gateway)
        former._channels.transport.abortConnection()
        await computed
        await until(lambda: carrier(gateway) not in (None, former))
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_what_was_for_an_agent_is_no_answer(gateway):
    """A gateway's messages arrive at the kernel, as when the agent has just gone."""
    await shell(gateway)
    async with notebook(gateway) as other:
        other.holds = asked = []
        answered = Deferred.fromCoroutine(other.asks())
        await until(lambda: asked)
        other.channels.carrierChannel = b"stdin"
        for size in (1, 1000, 200_000):
            other.channels.send_carrier([bytes(size)])
        other.answer(asked.pop())  # behind them, by the same connection
        await answered


FORK = """
import os, signal
child = os.fork()
if not child:
    signal.pause()
    os._exit(0)
"""


async def reaped(other, child):
    """A kernel that ends looks for its children for seconds, and takes zombies for alive."""
    assert await other.evaluate(f"__import__('os').waitpid({child}, 0)[0]") == str(child)


@pytest_twisted.ensureDeferred
async def test_a_child_of_a_cell_is_in_nobodys_way(gateway):
    """It has a copy of every socket that the kernel had when it was forked."""
    collector = await shell(gateway)
    async with notebook(gateway) as early:
        former = carrier(gateway)
        port = int(await early.evaluate(PORT))
        pid = await agent_pid(collector)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: ended(pid))
        await until(lambda: connections(port))  # of the server, with the kernel itself
        child = int(await early.evaluate("child", FORK))
        try:
            await until(lambda: carrier(gateway) not in (None, former))
            assert direct(gateway)
            await early.asks()
            async with notebook(gateway) as late:
                await late.asks()
        finally:
            os.kill(child, signal.SIGKILL)
        await reaped(early, child)


FORKS = """
import os, signal
children, spawn = [], os.posix_spawn
def fork():
    children.append(os.fork())
    if not children[-1]:
        signal.pause()
        os._exit(0)
def forking(*args, **kwargs):
    fork()
    pid = spawn(*args, **kwargs)
    fork()
    return pid
os.posix_spawn = forking
"""
NO_MEMFD = "memfd = os.__dict__.pop('memfd_create')\n"


@pytest.mark.parametrize("without", ["", NO_MEMFD], ids=["by memory", "by a pipe"])
@pytest_twisted.ensureDeferred
async def test_a_child_forked_while_an_agent_is_started(gateway, without):
    """What the agent is told by, and what it complains by, is not held open by that child."""
    collector = await shell(gateway)
    back = "os.posix_spawn = spawn" + ("; os.memfd_create = memfd" if without else "")
    async with notebook(gateway) as other:
        await other.evaluate("1", FORKS + without)
        os.kill(await agent_pid(collector), signal.SIGKILL)
        await collector.untilClosed()
        children = json.loads(await other.evaluate("children", back))
        for child in children:
            os.kill(child, signal.SIGKILL)
            await reaped(other, child)
        assert len(children) == 2  # it was started at the first attempt


@pytest_twisted.ensureDeferred
async def test_an_agent_starts_where_there_are_no_files_in_memory(gateway):
    """Its secret comes by a pipe then, and is in no file that the kernel makes."""
    collector = await shell(gateway)
    written = """
import os, stat
given, spawn = [], os.posix_spawn
def telling(*args, **kwargs):
    (action, source, target), *_ = kwargs["file_actions"]
    given.append(target == 0 and stat.S_ISFIFO(os.fstat(source).st_mode))
    return spawn(*args, **kwargs)
os.posix_spawn = telling
"""
    async with notebook(gateway) as other:
        await other.evaluate("1", written + NO_MEMFD)
        os.kill(await agent_pid(collector), signal.SIGKILL)
        await collector.untilClosed()
        assert await agent_pid(await shell(gateway))
        back = "os.posix_spawn, os.memfd_create = spawn, memfd"
        assert await other.evaluate("given", back) == "[True]"


@pytest_twisted.ensureDeferred
async def test_a_cells_sockets_are_left_alone(gateway):
    """They block as before while the port is lent, also with a timeout for new ones."""
    made = "import socket; one, two = socket.socketpair(); socket.setdefaulttimeout(100)"
    async with notebook(gateway) as other:
        await other.evaluate("1", made)
        collector = await shell(gateway)
        former = carrier(gateway)
        os.kill(await agent_pid(collector), signal.SIGKILL)
        await until(lambda: carrier(gateway) not in (None, former))
        assert direct(gateway)
        blocks = "[__import__('os').get_blocking(it.fileno()) for it in (one, two)]"
        assert await other.evaluate(blocks) == "[True, True]"


@contextmanager
def thief(port):
    """Somebody who wants the port, and tries all the time."""
    over = threading.Event()
    had = []

    def steal():
        while not over.is_set():
            with socket.socket() as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    other.bind(("127.0.0.1", port))
                    other.listen()
                    had.append(port)
                    over.wait()
                except OSError:
                    pass

    thread = threading.Thread(target=steal)
    thread.start()
    try:
        yield had
    finally:
        over.set()
        thread.join()


@pytest_twisted.ensureDeferred
async def test_nobody_else_gets_the_port(gateway):
    """Neither when the kernel has it back nor when it is lent again."""
    async with notebook(gateway) as early:
        port = int(await early.evaluate(PORT))
        with thief(port) as stolen:
            for _ in range(3):
                collector = await shell(gateway)
                former = carrier(gateway)
                os.kill(await agent_pid(collector), signal.SIGKILL)
                await until(lambda former=former: carrier(gateway) not in (None, former))
                await early.asks()
                assert direct(gateway)
        assert not stolen


async def at_home(other):
    """Whether the kernel listens for its stdin channel where its server looks for it."""
    endpoint = await other.evaluate(
        "get_ipython().kernel.stdin_socket.getsockopt(__import__('zmq').LAST_ENDPOINT)"
    )
    port = await other.evaluate(PORT)
    return f":{port}" in endpoint


def connections(port):
    """How many there are at a port of 127.0.0.1."""
    ends = [line.split()[1:4:2] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return ends.count([f"0100007F:{port:04X}", "01"])


def ended(pid):
    """Whether a process has closed all that it had open."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def agent_pid(collector):
    """The agent: what the session's first shell was started by."""
    collector.stream.write(b"echo pa''rent=$(ps -o ppid= -p $$).\n")
    await collector.untilOutput(b".\r\n")
    return int(bytes(collector.out).split(b"parent=")[1].split(b".")[0])


@pytest_twisted.ensureDeferred
async def test_another_kernel_gets_the_port(gateway):
    """After a restart it listens where the server looks for it, and lends the port again."""
    collector = await shell(gateway)
    for _ in range(2):
        former = carrier(gateway)
        await road(gateway)._client.restart(road(gateway)._kernel)
        await until(lambda former=former: carrier(gateway) not in (None, former))
        assert direct(gateway)
        async with notebook(gateway) as other:
            await other.asks()
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_the_kernel_has_its_port_back(gateway):
    """When the relay goes, and so do the questions' answers; what was connected stays so."""
    collector = await shell(gateway)
    async with notebook(gateway) as early:
        former = carrier(gateway)
        await early.evaluate(
            "1", f"{RELAY}._loop.add_callback({RELAY}.uninstall); {RELAY}.handover.end()"
        )
        assert await at_home(early)
        await until(lambda: carrier(gateway) not in (None, former))
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_a_kernel_that_cannot_lend_its_port_carries_itself(gateway):
    """Where the channel is another than the agent can stand in for, all goes on as before."""
    collector = await shell(gateway)
    async with notebook(gateway) as other:
        await other.evaluate("1", f"{RELAY}.handover.end()")
        former = carrier(gateway)
        former._channels.transport.abortConnection()
        await until(lambda: carrier(gateway) not in (None, former))
        assert not direct(gateway)
        async with notebook(gateway) as late:
            await late.asks()
        collector.stream.write(b"seq 100000 | tail -1\n")
        await collector.untilOutput(b"100000\r\n")
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_two_gateways_share_it(gateway, jupyter, tmp_path):
    """Each has its own connection; one that goes takes nothing from the other."""
    from conchkernel.jupyter.backends import JupyterBackend

    collector = await shell(gateway)
    second = JupyterBackend(reactor, jupyter.pasted, state_dir=tmp_path / "state")
    await Deferred.fromCoroutine(second.start())
    other = await shell(second)
    assert direct(gateway)
    assert direct(second)
    await proves_alive(other)
    await second.stop()
    await proves_alive(collector)


@pytest_twisted.ensureDeferred
async def test_an_agent_that_is_stopped_has_the_port_still(gateway):
    """A newer relay does not move the channel too: all goes by itself, until the port is back."""
    collector = await shell(gateway)
    pid = await agent_pid(collector)
    async with notebook(gateway) as other:
        await other.evaluate("1", f"{RELAY}.version = 'an older one'")
        former = carrier(gateway)
        os.kill(pid, signal.SIGSTOP)
        former._channels.transport.abortConnection()
        await until(lambda: carrier(gateway) not in (None, former))
        assert await other.evaluate(f"{RELAY}.handover") == "None"
        os.kill(pid, signal.SIGCONT)
        await proves_alive(collector)
        assert not direct(gateway)
        for _ in range(1000):  # the port comes back by itself, as soon as it is free
            if await at_home(other):
                break
        async with notebook(gateway) as late:
            await late.asks()
