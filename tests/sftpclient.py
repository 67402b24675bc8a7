"""An SFTP client in memory, that counts answers: upon a gateway's session channel, no network."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from twisted.internet.defer import Deferred, succeed

from conchkernel.avatars import KernelAvatar
from conchkernel.ssh.fields import Fields, string
from conchkernel.ssh.sftp_packets import Kind, Status, frame, packAttributes
from conchkernel.testing import MemoryBackend, MemoryClient

if TYPE_CHECKING:
    from conchkernel.files import Attributes, IFileStore


class Answer(NamedTuple):
    """A packet of the server's; for VERSION the id is the version."""

    kind: int
    id: int
    rest: bytes

    @property
    def fields(self) -> Fields:
        return Fields(self.rest, "answer")

    @property
    def status(self) -> tuple[int, str]:
        """Code and sentence."""
        assert self.kind == Kind.STATUS, self
        fields = self.fields
        code, text = fields.uint32(), fields.string().decode()
        assert fields.string() == b""
        fields.end()
        return code, text

    @property
    def code(self) -> int:
        return self.status[0]

    @property
    def data(self) -> bytes:
        """Of DATA or HANDLE."""
        assert self.kind in (Kind.DATA, Kind.HANDLE), self
        fields = self.fields
        data = fields.string()
        fields.end()
        return data

    @property
    def names(self) -> list[tuple[bytes, bytes, Attributes]]:
        """Of NAME."""
        from conchkernel.ssh.sftp_packets import parseAttributes

        assert self.kind == Kind.NAME, self
        fields = self.fields
        entries = [
            (fields.string(), fields.string(), parseAttributes(fields))
            for _ in range(fields.uint32())
        ]
        fields.end()
        return entries


class SftpClient:
    """A client's session with its ``sftp`` subsystem on a store."""

    def __init__(
        self, store: IFileStore | Deferred[IFileStore], *, window: int = 1 << 30, init: bool = True
    ) -> None:
        avatar = KernelAvatar(MemoryBackend(), "joe")
        avatar.serveFiles(lambda _: store if isinstance(store, Deferred) else succeed(store))
        self.client = MemoryClient(avatar)
        self.channel = self.client.open(window=window)
        self.client.request(self.channel, b"subsystem", string(b"sftp"))
        self.server = self.client.connection.channels[0]._subsystem  # type: ignore[attr-defined]
        self.extensions: dict[bytes, bytes] = {}
        self._id = 0
        if init:
            self.send(frame(Kind.INIT, 3, b""))
            (answer,) = self.take()
            assert answer[:2] == (Kind.VERSION, 3)
            fields = answer.fields
            while fields.left():
                name = fields.string()
                self.extensions[name] = fields.string()

    def send(self, data: bytes) -> None:
        """Any bytes."""
        self.client.write(self.channel, data)

    def take(self) -> list[Answer]:
        """All whole answers since the last time."""
        answers = []
        output = self.channel.output
        while len(output) >= 9:
            length, kind, number = struct.unpack_from(">LBL", output)
            assert length <= 256 * 1024
            if len(output) < length + 4:
                break
            answers.append(Answer(kind, number, bytes(output[9 : length + 4])))
            del output[: length + 4]
        return answers

    def request(self, kind: int | bytes, *fields: bytes) -> int:
        """Send a request; its id."""
        self._id += 1
        if isinstance(kind, bytes):
            fields = (string(kind), *fields)
            kind = Kind.EXTENDED
        self.send(frame(kind, self._id, b"".join(fields)))
        return self._id

    def ask(self, kind: int | bytes, *fields: bytes) -> Answer:
        """Send a request, which is answered at once."""
        number = self.request(kind, *fields)
        answers = self.take()
        assert [answer.id for answer in answers] == [number]
        return answers[0]

    def open(self, path: bytes, flags: int = 1, attributes: bytes = b"\0\0\0\0") -> bytes:
        """Open a file; its handle, as a field."""
        answer = self.ask(Kind.OPEN, string(path), flags.to_bytes(4, "big"), attributes)
        return string(answer.data)


def uint32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def uint64(value: int) -> bytes:
    return value.to_bytes(8, "big")


__all__ = ["Answer", "SftpClient", "Status", "packAttributes", "uint32", "uint64"]
