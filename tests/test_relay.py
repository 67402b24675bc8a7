"""The relay before a dispatcher of our own making: what it takes, and what it must not."""

from __future__ import annotations

import json
import logging
import socket
from types import SimpleNamespace

import pytest

from conchkernel.remote import relay as module
from conchkernel.remote import starter


class Frame:
    """A frame as ZeroMQ gives it."""

    def __init__(self, data):
        self.bytes = data
        self.buffer = memoryview(data)


class Stream:
    """A control stream: its callback, and what was sent."""

    def __init__(self):
        self.sent = []
        self.waiting = []
        self.io_loop = SimpleNamespace(add_callback=lambda *call: None)
        self.socket = SimpleNamespace(
            send_multipart=lambda parts, flags: self.sent.append(parts),
            recv_multipart=self._recv,
            EVENTS=0,
        )
        self._recv_callback = None
        self._recv_copy = False

    def _recv(self, flags, copy):
        import zmq

        if not self.waiting:
            raise zmq.Again
        return self.waiting.pop(0)

    def on_recv(self, callback, copy=True):
        self._recv_callback, self._recv_copy = callback, copy


@pytest.fixture
def kernel():
    """A kernel whose dispatcher writes down what reaches it."""
    stream = Stream()
    dispatched = []
    stream.on_recv(dispatched.append, copy=False)
    session = SimpleNamespace(auth=object(), sign=lambda parts: b"signed:%d" % len(b"".join(parts)))
    return SimpleNamespace(
        control_stream=stream,
        session=session,
        log=logging.getLogger("kernel"),
        dispatched=dispatched,
    )


@pytest.fixture
def relay(kernel):
    """A relay in place."""
    made = module.Relay(kernel, {"boot": "", "modules": []}, "0" * 16, starter)
    made.install()
    return made


def message(header, content=b"{}", buffers=(b"\0data",), signature=None):
    """The frames of one message."""
    parts = [header, b"{}", b"{}", content]
    signature = b"signed:%d" % len(b"".join(parts)) if signature is None else signature
    return [Frame(part) for part in (b"me", b"<IDS|MSG>", signature, *parts, *buffers)]


OURS = b'{"msg_id":"1","msg_type":"conchkernel"}'


def receive(kernel, frames):
    """What the control stream does with a message."""
    return kernel.control_stream._recv_callback(frames)


@pytest.mark.parametrize(
    "frames",
    [
        message(b'{"msg_type":"interrupt_request"}'),
        message(b'{"msg_type":"shutdown_request"}', buffers=()),
        message(b'{"msg_type":"execute_request","x":"conchkernel"}'),
        message(b"not json, but \"conchkernel\""),
        message(OURS, signature=b"forged"),
        message(OURS, buffers=()),
        message(OURS, buffers=(b"a", b"b")),
        [Frame(b"")],
        [],
        [None] * 8,
    ],
)
def test_what_is_not_ours_reaches_the_dispatcher(kernel, relay, frames):
    """Foreign, malformed and forged messages are the kernel's affair, untouched."""
    receive(kernel, frames)
    assert kernel.dispatched == [frames]


def test_a_message_of_ours_does_not(kernel, relay):
    """It is taken; without an agent behind this client the answer is LOST."""
    receive(kernel, message(OURS))
    assert kernel.dispatched == []
    (answer,) = kernel.control_stream.sent
    assert answer[0] == b"me"
    assert answer[-1] == bytes([module.LOST])
    header = json.loads(answer[3])
    assert header["msg_type"] == "conchkernel"
    assert answer[2] == b"signed:%d" % len(b"".join(answer[3:7]))


def test_what_the_agent_told_last_is_told_again(kernel, relay):
    """Later: it may have gone down with the agent's connection to the server."""
    later = []
    relay._loop = SimpleNamespace(
        READ=1,
        WRITE=2,
        ERROR=4,
        add_handler=lambda *_: None,
        remove_handler=lambda *_: None,
        call_later=lambda _, *call: later.append(call),
    )
    ours, agents = socket.socketpair()
    with agents:
        client = module._Client(relay, relay._loop, b"me", ours, True)
        relay._clients[b"me"] = client
        agents.sendall(bytes([0, 0, 0, 2, 8, 0]))
        client._event(ours, 1)
    client._event(ours, 1)
    assert kernel.control_stream.sent == []
    ((call, *arguments),) = later
    call(*arguments)
    (answer,) = kernel.control_stream.sent
    assert answer[0] == b"me"
    assert answer[-1] == bytes([module.LOST])


def test_a_port_that_cannot_be_lent_is_nobodys_affair(kernel, relay, caplog):
    """Whatever goes wrong there, the client's messages go through the relay."""
    assert relay._claim("", b"me") is None
    relay.handover = SimpleNamespace(connection=lambda *_: 1 / 0)
    assert relay._claim("", b"me") is None
    assert "stdin" in caplog.text


def test_each_answer_has_an_id_of_its_own(kernel, relay):
    """Two messages alike would be taken for a replay by the server."""
    receive(kernel, message(OURS))
    receive(kernel, message(OURS))
    first, second = (json.loads(parts[3])["msg_id"] for parts in kernel.control_stream.sent)
    assert first != second


def test_a_burst_ends_at_the_first_foreign_message(kernel, relay):
    """What waits behind one of ours is taken in order, and a foreign one among it passes on."""
    foreign = message(b'{"msg_type":"interrupt_request"}')
    kernel.control_stream.waiting = [message(OURS), foreign, message(OURS)]
    receive(kernel, message(OURS))
    assert kernel.dispatched == [foreign]
    assert len(kernel.control_stream.waiting) == 1


def test_a_defect_of_ours_is_not_the_kernels(kernel, relay, caplog):
    """An exception in the relay is logged, and the stream's callback returns."""
    relay._take = lambda *_: 1 / 0
    receive(kernel, message(OURS))
    assert kernel.dispatched == []
    assert "relay" in caplog.text


def test_uninstalling_restores_the_dispatcher(kernel, relay):
    """As if it had never been there; and twice is once."""
    relay.uninstall()
    relay.uninstall()
    assert kernel.control_stream._recv_callback == kernel.dispatched.append
    assert not relay.installed


@pytest.mark.parametrize("name", ["", "../../etc", "0" * 15, "0" * 17, "ABCDEFABCDEFABCD"])
def test_a_socket_is_named_by_sixteen_digits(name):
    """No id leads out of the private directory."""
    with pytest.raises(ValueError, match="id"):
        starter.path_of(name)


def test_the_environment_is_without_the_kernels_own(monkeypatch):
    """What Jupyter gives a kernel for itself does not reach a shell."""
    environment = starter._environment()
    assert not {name for name in environment if name.startswith(("JPY_", "MPLBACKEND"))}
    assert "PATH" in environment
