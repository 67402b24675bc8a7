"""One use of a link by one SSH connection: what it opened is closed with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from conchkernel.interfaces import IKernelLink
from conchkernel.jupyter import openings
from conchkernel.jupyter.kernelstream import EVERYTHING
from conchkernel.jupyter.lastingfiles import LastingFileStore
from conchkernel.jupyter.listener import KernelListener

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.defer import Deferred

    from conchkernel.files import IFileStore
    from conchkernel.interfaces import (
        IListener,
        PrivateSocket,
        ProcessRequest,
        SocketPath,
        TCPAddress,
    )
    from conchkernel.jupyter.agentfiles import AgentFileStore
    from conchkernel.jupyter.kernelstream import KernelStream
    from conchkernel.jupyter.link import Link


@implementer(IKernelLink)
class LinkUse:
    """See :class:`IKernelLink`.

    :param released: called once, when the use is over.
    """

    def __init__(self, link: Link, released: Callable[[], None] = lambda: None) -> None:
        self._link = link
        self._whenReleased: Callable[[], None] | None = released
        self._streams: set[KernelStream] = set()
        self._toForget = 64

    def openProcess(self, request: ProcessRequest, receiver: Any) -> KernelStream:
        """See :class:`IKernelLink`."""
        return self._kept(self._link.openProcess(request, receiver))

    def openConnection(self, address: TCPAddress | SocketPath, receiver: Any) -> KernelStream:
        """See :class:`IKernelLink`."""
        return self._open(openings.connection(address), receiver)

    def listen(
        self, address: TCPAddress | SocketPath | PrivateSocket, receiver: Any
    ) -> Deferred[IListener]:
        """See :class:`IKernelLink`."""
        listener = KernelListener(receiver, self._open)
        listener.stream = self._open(openings.listening(address), listener)
        # A line for each that waits, and no more wait than the agent lets.
        listener.stream.grant(EVERYTHING)
        return listener.ready

    def openFiles(self, root: bytes | None, readOnly: bool) -> Deferred[IFileStore]:
        """See :class:`IKernelLink`."""

        def begin() -> AgentFileStore:
            store = self._link.openFiles(root, readOnly)
            self._kept(store.stream)
            return store

        def again() -> AgentFileStore | None:
            return None if self._whenReleased is None else begin()

        first = begin()
        return first.ready.addCallback(lambda _: LastingFileStore(first, again))

    def _open(self, parameters: dict[str, Any], receiver: Any) -> KernelStream:
        return self._kept(self._link.open(parameters, receiver))

    def _kept(self, stream: KernelStream) -> KernelStream:
        streams = self._streams
        streams.add(stream)
        # Those that are over are looked for now and then: each time would be quadratic.
        if len(streams) >= self._toForget:
            self._streams = {other for other in streams if not other.over}
            self._toForget = max(64, 2 * len(self._streams))
        return stream

    def release(self) -> None:
        """See :class:`IKernelLink`."""
        released, self._whenReleased = self._whenReleased, None
        if released is not None:
            streams, self._streams = self._streams, set()
            for stream in streams:
                stream.close()
            released()
