"""Proof that shells can be had on a kernel's host, in the way the operator has said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from zope.interface import implementer

from conchkernel.errors import KernelRefused, StreamRefused
from conchkernel.interfaces import IStreamReceiver, ProcessRequest

if TYPE_CHECKING:
    from conchkernel.interfaces import IKernelLink

#: What every shell can do.
_NOTHING = b"exit"


async def proveShell(link: IKernelLink) -> None:
    """Start a shell that ends at once.

    :raises KernelRefused: where there is none, with the agent's sentence.
    """
    witness = _Witness()
    stream = link.openProcess(ProcessRequest(_NOTHING), witness)
    try:
        await witness.opened
    except StreamRefused as error:
        raise KernelRefused(str(error)) from None
    finally:
        stream.close()


@implementer(IStreamReceiver)
class _Witness:
    """Whether a process begins. What it does then is of no interest.

    :ivar opened: fires when it has begun, or fails with the reason why it cannot.
    """

    def __init__(self) -> None:
        self.opened: Deferred[None] = Deferred()
        self._told = False

    def streamOpened(self, info: object) -> None:
        """It runs."""
        self._told = True
        self.opened.callback(None)

    def streamData(self, data: bytes | memoryview) -> None:
        """Nothing was granted."""

    def streamExtendedData(self, data: bytes | memoryview) -> None:
        """As :meth:`streamData`."""

    def streamConsumed(self, count: int) -> None:
        """Nothing was written."""

    def streamEOF(self) -> None:
        """It has nothing to say."""

    def streamExited(self, exit: object) -> None:
        """In whichever way."""

    def streamClosed(self, reason: Exception | None) -> None:
        """The end, and the first that is heard of one that was refused."""
        if not self._told:
            self._told = True
            self.opened.errback(reason or KernelRefused("no shell could be started"))
