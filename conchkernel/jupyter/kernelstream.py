"""One stream to the kernel's host: :class:`~conchkernel.interfaces.IStream` over the wire.

A :class:`~conchkernel.jupyter.link.Link` makes them; they outlive its carriers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from zope.interface import implementer

from conchkernel import frames
from conchkernel.errors import LinkLost, RefusalCode, StreamRefused
from conchkernel.interfaces import ExitSignal, ExitStatus, IStream, WindowSize

if TYPE_CHECKING:
    from conchkernel import wirestream

#: A limit that no stream reaches.
EVERYTHING = 2**63


class Owner(Protocol):
    """What a stream asks of its link."""

    stirred: int
    """Grows with what is said here."""

    @property
    def crowded(self) -> bool:
        """Whether no more should be asked for now."""

    def wake(self) -> None:
        """Something was written."""

    def forget(self, stream: KernelStream) -> None:
        """The stream is over."""

    def soon(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call it when the caller has returned to the reactor."""


@implementer(IStream)
class KernelStream:
    """One stream of a link: Twisted's words on one side, the wire's on the other.

    :param link: woken when something was written, told to forget what is over.
    :ivar wire: the wire's stream; ``None`` if it could not be opened.
    :ivar over: nothing more is told.
    """

    #: By how much what is said here makes its link's ``stirred`` grow.
    _stirs = 1

    def __init__(self, link: Owner, receiver: Any) -> None:
        self.wire: wirestream.Stream | None = None
        self._link = link
        self._receiver = receiver
        self.over = False

    @property
    def number(self) -> int:
        """The wire's number of the stream; 0 if it could not be opened."""
        return 0 if self.wire is None else self.wire.id

    # --- IStream -----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """See :meth:`IStream.write`."""
        if not self.over and self.wire is not None:
            self.wire.write(data)
            self._link.wake()

    def writeEOF(self) -> None:
        """See :meth:`IStream.writeEOF`."""
        if not self.over and self.wire is not None:
            self.wire.append(frames.EOF)
            self._link.wake()

    def grant(self, limit: int) -> None:
        """See :meth:`IStream.grant`."""
        if not self.over and self.wire is not None:
            self.wire.grant(limit)
            self._link.wake()

    def resize(self, size: WindowSize) -> None:
        """See :meth:`IStream.resize`."""
        payload = frames.SIZE.pack(size.columns, size.rows, size.width_pixels, size.height_pixels)
        self._control(frames.RESIZE, payload)

    def signal(self, name: str) -> None:
        """See :meth:`IStream.signal`."""
        self._control(frames.SIGNAL, name.encode("ascii", "replace")[:64])

    def sendBreak(self, milliseconds: int) -> None:
        """See :meth:`IStream.sendBreak`."""
        self._control(frames.BREAK, frames.U32.pack(milliseconds & 0xFFFFFFFF))

    def stopReading(self) -> None:
        """See :meth:`IStream.stopReading`."""
        self._control(frames.STOP, b"")

    def _control(self, frame_type: int, payload: bytes) -> None:
        if not self.over and self.wire is not None:
            if self._link.crowded:
                raise tooMuch()
            self.wire.control(frame_type, payload)
            self._link.wake()

    def close(self) -> None:
        """See :meth:`IStream.close`."""
        if not self.over and self.wire is not None:
            self.wire.close()
            self._link.wake()
            self.lostSoon(None)

    # --- the wire's receiver -----------------------------------------------------------------

    def wire_opened(self, info: dict[str, Any]) -> None:
        """The process runs."""
        self._receiver.streamOpened(info)

    def wire_refused(self, code: Any, message: Any) -> None:
        """It does not."""
        try:
            known = RefusalCode(code)
        except ValueError:
            known = RefusalCode.UNKNOWN_KIND
        self.lost(StreamRefused(known, str(message)[:1000]))

    def wire_data(self, data: bytes | memoryview, extended: int) -> None:
        """Output. The view is of a message of ours alone, so it may be kept."""
        if self.over:
            return
        self._link.stirred += self._stirs
        if extended:
            self._receiver.streamExtendedData(data)
        else:
            self._receiver.streamData(data)

    def wire_sent(self, count: int) -> None:
        """Input left our queue."""
        if not self.over:
            self._receiver.streamConsumed(count)

    def wire_credit(self) -> None:
        """Said by wire_sent already."""

    def wire_eof(self) -> None:
        """Output is complete."""
        if not self.over:
            self._receiver.streamEOF()

    def wire_exit(self, info: dict[str, Any]) -> None:
        """The process has ended."""
        if self.over:
            return
        self._link.stirred += self._stirs
        if "signal" in info:
            self._receiver.streamExited(
                ExitSignal(str(info["signal"])[:64], bool(info.get("core")))
            )
        elif isinstance(info.get("status"), int):
            self._receiver.streamExited(ExitStatus(info["status"] & 0xFF))

    def wire_control(self, frame_type: int, payload: bytes) -> None:
        """Not sent to a gateway."""

    def wire_closed(self, reason: str) -> None:
        """The far side closed."""
        self.lost(LinkLost(reason[:1000]) if reason else None)

    def lost(self, reason: Exception | None) -> None:
        """The stream is over, for this reason."""
        if not self.over:
            self.over = True
            self._link.forget(self)
            self._receiver.streamClosed(reason)

    def lostSoon(self, reason: Exception | None) -> None:
        """The same, but not while our caller is still at work."""
        self._link.soon(self.lost, reason)


def tooMuch() -> StreamRefused:
    """What is said while so much waits for the road that no more may be asked."""
    return StreamRefused(
        RefusalCode.RESOURCE_SHORTAGE,
        "more is asked of the kernel's host than can be sent there",
    )


class FilesStream(KernelStream):
    """A stream of files, whose store tells by itself when it stirs something."""

    _stirs = 0
