"""The targets: each takes any bytes, and lets nothing out but what is a defect of ours."""

from __future__ import annotations

import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from twisted.logger import globalLogPublisher

from conchkernel.avatars import KernelAvatar
from conchkernel.ssh import hostkeys, userkeys
from conchkernel.ssh.checkers import AnonymousOwnerChecker, TokenChecker
from conchkernel.ssh.fields import ProtocolError, string
from conchkernel.ssh.kex import KexInit
from conchkernel.ssh.userkeys import KeyRefused
from conchkernel.testing import MemoryBackend, MemoryClient
from tests.rawclient import HOST_KEY, VERSION, RawClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: A fuzzer that has found how to send more finds nothing new by it.
MAXIMUM_MESSAGES = 20


@contextmanager
def _nothingFails() -> Iterator[None]:
    """A failure that is only logged is one."""
    failures: list[Any] = []

    def observe(event: dict[str, Any]) -> None:
        if event.get("log_failure") is not None:
            failures.append(event["log_failure"])

    globalLogPublisher.addObserver(observe)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observe)
    if failures:
        failures[0].raiseException()


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Message number, two bytes of length, payload; again and again."""
    for _ in range(MAXIMUM_MESSAGES):
        if len(data) < 3:
            return
        number, size = struct.unpack_from(">BH", data)
        yield number, data[3 : 3 + size]
        data = data[3 + size :]


def hello(data: bytes) -> None:
    """From the first byte on."""
    with _nothingFails():
        raw = RawClient((AnonymousOwnerChecker(),))
        raw.write(data)
        raw.drop()


def clear(data: bytes) -> None:
    """Messages before there are keys."""
    with _nothingFails():
        raw = RawClient((AnonymousOwnerChecker(),))
        raw.write(VERSION + b"\r\n")
        for number, payload in _messages(data):
            raw.send(number, payload)
        raw.drop()


def stranger(data: bytes) -> None:
    """Messages under keys, by who may log in."""
    with _nothingFails():
        raw = RawClient((TokenChecker("token"),)).start()
        raw.send(5, string(b"ssh-userauth"))
        for number, payload in _messages(data):
            # Its answers are not read: the client that we have here believes them.
            raw.send(number, payload)
        raw.drop()


class _Silent(MemoryClient):
    """Takes what it gets without a look."""

    def sendPacket(self, message: int, payload: bytes) -> None:
        self.sent.append((message, payload))


def user(data: bytes) -> None:
    """Messages of a user, who has a command running on channel 0."""
    backend = MemoryBackend(lambda stream: stream.opened())
    with _nothingFails():
        client = _Silent(KernelAvatar(backend, "joe"))
        client.receive(90, string(b"session") + struct.pack(">3L", 0, 1000, 32768))
        client.receive(98, struct.pack(">L", 0) + string(b"exec") + b"\1" + string(b"cat"))
        for number, payload in _messages(data):
            client.receive(number, payload)
        client.lose()
    assert all(link.released for link in backend.links)


def keys(data: bytes) -> None:
    """Public keys of users, signatures of theirs, and questions about ours."""
    for algorithm in userkeys.SIGNATURE_ALGORITHMS:
        try:
            key = userkeys.parse(algorithm, data, 2048)
            userkeys.signed(key, algorithm, data[-80:], b"message")
        except KeyRefused:
            pass
    ours = hostkeys.algorithms([HOST_KEY])
    hostkeys.proof(ours, data, b"session", next(iter(ours)))


def offers(data: bytes) -> None:
    """A KEXINIT."""
    try:
        KexInit.parse(data)
    except ProtocolError:
        pass


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (hello, clear, stranger, user, keys, offers)
}
