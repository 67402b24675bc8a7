"""A few lines in a kernel that answer carriers, where the real relay is not the matter.

Each carrier's buffer comes back, but for those that begin with a word of :data:`WORDS`.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from conchkernel.jupyter.channels import KernelChannels

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conchkernel.jupyter.rest import JupyterClient

#: ``send COUNT SIZE``: so many carriers of that size, counted in their first eight bytes;
#: ``sink``: this and all before it are answered with the number of bytes that came since;
#: ``quiet``: count and do not answer.
WORDS = (b"send", b"sink", b"quiet")

SOURCE = '''
def _install():
    import zmq
    kernel = get_ipython().kernel
    stream, session = kernel.control_stream, kernel.session
    state = {"n": 0, "sunk": 0}
    before = stream._recv_callback
    def tell(identity, *buffers):
        state["n"] += 1
        header = session.msg_header("conchkernel")
        session.send(stream.socket, "conchkernel", content={}, header=header, parent={},
                     ident=identity, buffers=list(buffers), metadata={})
    def received(frames):
        if len(frames) != 8 or b'"conchkernel"' not in frames[3].bytes:
            return before(frames)
        message, identity = frames[7].bytes, frames[0].bytes
        word = message[:20].split(b" ")[0]
        if word == b"send":
            _, count, size = message.split()
            body = bytes(int(size) - 8)
            for index in range(int(count)):
                tell(identity, index.to_bytes(8, "big") + body)
        elif word == b"sink":
            tell(identity, str(state.pop("sunk")).encode())
            state["sunk"] = 0
        elif word == b"quiet":
            state["sunk"] += len(message)
        else:
            tell(identity, message)
    stream.io_loop.add_callback(stream.on_recv, received, copy=False)
_install()
del _install
'''


async def installEcho(channels: KernelChannels) -> None:
    """Put the lines into the kernel."""
    content = {
        "code": SOURCE,
        "silent": True,
        "store_history": False,
        "user_expressions": {},
        "allow_stdin": False,
        "stop_on_error": True,
    }
    reply = await channels.request("shell", "execute_request", content, 60)
    assert reply["status"] == "ok", reply
    # The control loop does what it was given before it answers this.
    await channels.request("control", "kernel_info_request", {}, 60)


@asynccontextmanager
async def kernelOn(client: JupyterClient) -> AsyncIterator[str]:
    """A kernel of one's own; its id."""
    model = await client.create_kernel()
    try:
        yield model.id
    finally:
        await client.delete_kernel(model.id)


class Carriers:
    """What came, and a way to wait for it."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.lost: list[Exception] = []
        self._waiting: list[tuple[int, Any]] = []

    def received(self, buffer: bytes) -> None:
        """One more."""
        self.got.append(buffer)
        due = [one for one in self._waiting if len(self.got) >= one[0]]
        self._waiting = [one for one in self._waiting if one not in due]
        for _, deferred in due:
            deferred.callback(None)

    def hasLost(self, reason: Exception) -> None:
        """The connection is gone."""
        self.lost.append(reason)

    async def count(self, reactor: Any, number: int, seconds: float = 30) -> list[bytes]:
        """The first ``number`` of them, and they are taken out."""
        from twisted.internet.defer import Deferred

        if len(self.got) < number:
            enough: Deferred[None] = Deferred()
            enough.addTimeout(seconds, reactor)
            self._waiting.append((number, enough))
            await enough
        taken, self.got = self.got[:number], self.got[number:]
        return taken
