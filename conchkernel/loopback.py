"""A backend without Jupyter: the agent on this host, over a Unix socket.

The same wire, the same agent and the same :class:`~conchkernel.jupyter.link.Link` as over a kernel;
only the carrier differs. Tests and benchmarks compare with it, and an application that wants an SSH
door to its own host can use it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from zope.interface import implementer

from conchkernel import frames
from conchkernel.allocator import ENVIRONMENT
from conchkernel.errors import JupyterUnreachable, LinkLost
from conchkernel.interfaces import IBackend, IKernelLink
from conchkernel.jupyter import injection
from conchkernel.jupyter.carrier import CarrierUser
from conchkernel.jupyter.link import Link
from conchkernel.jupyter.uses import LinkUse

_LENGTH = struct.Struct(">I")
_BOOT = "import json,sys;g=json.loads(sys.stdin.buffer.read());exec(g.pop('boot'),{'given':g})"


@implementer(IPushProducer)
class SocketCarrier(Protocol):
    """Messages with a length before them, to and from an agent's socket."""

    def __init__(self, user: CarrierUser) -> None:
        self._user: CarrierUser | None = user
        #: A message that has begun to come: its pieces, the first with the length in front.
        self._pieces: list[bytes] = []
        self._held = 0
        self.writable = True

    def connectionMade(self) -> None:
        """Read in large pieces and learn when to stop writing."""
        transport: Any = self.transport
        transport.bufferSize = transport.SEND_LIMIT = 256 * 1024
        transport.registerProducer(self, True)

    def send(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Send one message."""
        transport: Any = self.transport
        transport.write(b"".join((_LENGTH.pack(sum(map(len, parts))), *parts)))

    def dataReceived(self, data: bytes) -> None:
        """Cut what came into messages, each copied once."""
        if self._pieces:
            self._pieces.append(data)
            self._held += len(data)
            if self._held < self._wanted():
                return
            data = b"".join(self._pieces)
            self._pieces = []
        position, end = 0, len(data)
        view = memoryview(data)
        while end - position >= 4 and self._user is not None:
            (length,) = _LENGTH.unpack_from(data, position)
            if not 0 < length <= frames.MAX_MESSAGE:
                self._end(LinkLost(f"the agent sent a message of {length} bytes"))
                return
            start = position + 4
            if end - start < length:
                break
            position = start + length
            self._user.received(bytes(view[start:position]))
        if position < end:
            self._pieces.append(bytes(view[position:]))
            self._held = end - position

    def _wanted(self) -> int:
        """So many bytes make a whole message, as far as can be told."""
        first = self._pieces[0]
        if len(first) < 4:
            return 0
        # One that is too long is refused as soon as it could be whole.
        return 4 + min(int(_LENGTH.unpack_from(first)[0]), frames.MAX_MESSAGE)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The socket is gone."""
        self._end(LinkLost("the agent's socket has closed"))

    def _end(self, reason: Exception) -> None:
        user, self._user = self._user, None
        if user is not None:
            self.close()
            user.lost(reason)

    def close(self) -> None:
        """Give the socket up."""
        self._user = None
        transport: Any = self.transport
        transport.unregisterProducer()
        transport.abortConnection()

    def pauseProducing(self) -> None:
        """The socket is full."""
        self.writable = False

    def resumeProducing(self) -> None:
        """The socket takes more."""
        self.writable = True
        if self._user is not None:
            self._user.resumed()

    def stopProducing(self) -> None:
        """The socket is gone; connectionLost says so."""


@implementer(IBackend)
class LoopbackBackend:
    """One agent on this host, shared by every user.

    :param orphanTimeout: seconds after which the agent of a dead gateway ends.
    :param compiled: whether the agent takes the compiled pump, where there is one.
    :param python: what the agent runs in; this process's own interpreter if not given.
    :param prelude: code for the agent's process to run first.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        environment: dict[str, str] | None = None,
        directory: str | None = None,
        shell: str | None = None,
        orphanTimeout: float = 120.0,
        pathPrefix: str = "",
        survivalSeconds: float = 60.0,
        compiled: bool = True,
        python: str = sys.executable,
        prelude: str = "",
    ) -> None:
        self._reactor = reactor
        self._python = python
        self._prelude = prelude
        self._secret = secrets.token_hex(32)
        self._options = {
            "environment": dict(os.environ if environment is None else environment),
            "directory": directory or os.getcwd(),
            "path_prefix": pathPrefix,
            "orphan_timeout": orphanTimeout,
            "version": injection.version(),
        }
        self._fastpty = _fastpty() if compiled else None
        self._path = ""
        self.carrier: SocketCarrier | None = None
        self.link = Link(
            reactor,
            self._carry,
            self._secret,
            defaults={"shell": shell},
            pingSeconds=min(15.0, orphanTimeout / 4),
            survivalSeconds=survivalSeconds,
        )

    async def start(self) -> None:
        """Start the agent and attach to it."""
        directory = tempfile.mkdtemp(prefix="conchkernel-")
        self._path = str(Path(directory) / "s")
        try:
            await deferToThreadPool(self._reactor, self._reactor.getThreadPool(), self._spawn)
        except BaseException:
            # There is no agent that would take it away.
            shutil.rmtree(directory, ignore_errors=True)
            raise
        await self.link.start()

    async def stop(self) -> None:
        """End the agent and all it runs."""
        await self.link.stop()

    def _spawn(self) -> None:
        sources = injection.agent_sources()
        given = {
            "path": self._path,
            "secret": self._secret,
            "options": self._options,
            "fastpty": self._fastpty,
            **sources,
            "boot": self._prelude + sources["boot"],
        }
        done = subprocess.run(
            [self._python, "-I", "-S", "-c", _BOOT],
            input=json.dumps(given).encode(),
            capture_output=True,
            env=ENVIRONMENT,
            timeout=20,
            check=False,
        )
        if done.returncode != 0:
            raise JupyterUnreachable(f"the agent did not start: {done.stderr.decode()[-300:]}")

    async def _carry(self, user: CarrierUser) -> SocketCarrier:
        factory = Factory.forProtocol(lambda: SocketCarrier(user))
        try:
            carrier: Any = await UNIXClientEndpoint(self._reactor, self._path).connect(factory)
        except Exception as error:
            raise LinkLost(f"the agent cannot be reached: {error}") from error
        self.carrier = carrier
        return carrier

    def connect(self, user: str) -> Deferred[IKernelLink]:
        """See :class:`IBackend`."""
        use: Deferred[IKernelLink] = Deferred()
        use.callback(LinkUse(self.link))
        return use


def _fastpty() -> str | None:
    try:
        from conchkernel import _fastpty
    except ImportError:
        return None
    return _fastpty.__file__
