"""A listener on the kernel's host, whose agent may say anything."""

from __future__ import annotations

from typing import Any

import pytest
from zope.interface import implementer

from conchkernel.interfaces import IListenerReceiver, Incoming
from conchkernel.jupyter.listener import KernelListener


class Stream:
    """The listener's stream, of which only its number counts."""

    number = 1


@implementer(IListenerReceiver)
class Receiver:
    """Who is told."""

    def __init__(self) -> None:
        self.accepted: list[Incoming] = []

    def connectionAccepted(self, incoming: Incoming) -> None:
        self.accepted.append(incoming)

    def listenerLost(self, reason: Exception) -> None: ...


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def listener(receiver: Receiver) -> KernelListener:
    opened: Any = Stream()
    made = KernelListener(receiver, lambda parameters, receiver: opened)
    made.stream = opened
    return made


def test_whoConnectsIsTold(receiver: Receiver, listener: KernelListener) -> None:
    """One line for each, cut anywhere."""
    listener.streamOpened({"port": 8080})
    said = b'{"number": 1, "host": "::1", "port": 65535}\n{"number": 2}\n'
    for position in range(len(said)):
        listener.streamData(said[position : position + 1])
    assert listener.port == 8080
    assert receiver.accepted == [Incoming(1, "::1", 65535), Incoming(2)]


@pytest.mark.parametrize("port", ["-1", "65536", "1e99", '"http"', "null", "[]", "true"])
def test_aPortThatIsNone(receiver: Receiver, listener: KernelListener, port: str) -> None:
    """What goes on to a client is a number that can be written."""
    listener.streamOpened({"port": -1})
    listener.streamData(b'{"number": 1, "host": "x", "port": %s}\n' % port.encode())
    (incoming,) = receiver.accepted
    assert incoming.port.to_bytes(2, "big") is not None
    assert (listener.port, incoming.host) == (0, "x")


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"{}", b'{"number": "x"}', b"[" * 5000])
def test_linesThatAreNone(receiver: Receiver, listener: KernelListener, line: bytes) -> None:
    """They are passed over; the next one counts."""
    listener.streamData(line + b'\n{"number": 7}\n')
    assert receiver.accepted == [Incoming(7)]
