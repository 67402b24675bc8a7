"""Where the two columns meet: what the SSH side asks for and what the kernel side gives.

The SSH column (:mod:`conchkernel.ssh`) knows Conch and nothing of Jupyter; the kernel column
(:mod:`conchkernel.jupyter`) knows Jupyter and nothing of SSH. Both import this module and neither
imports the other.

Flow control is part of the contract. Towards the process, the caller of :meth:`IStream.write`
never has more bytes outstanding than the window it gave its own peer, and gives that window back
only as :meth:`IStreamReceiver.streamConsumed` says the process took them. From the process,
nothing arrives beyond the limit of :meth:`IStream.grant`. So nothing between needs an unbounded
queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zope.interface import Attribute, Interface

if TYPE_CHECKING:
    from collections.abc import Mapping

    from twisted.internet.defer import Deferred

    from conchkernel.files import IFileStore


@dataclass(frozen=True, slots=True)
class WindowSize:
    """A terminal's size (RFC 4254 section 6.2); each value 0 to 65535, 0 where not known."""

    columns: int
    rows: int
    width_pixels: int = 0
    height_pixels: int = 0


@dataclass(frozen=True, slots=True)
class PtyRequest:
    """The terminal a client asked for (RFC 4254 section 6.2)."""

    term: bytes
    """The value of ``TERM``."""
    size: WindowSize
    modes: tuple[tuple[int, int], ...] = ()
    """Encoded terminal modes as (opcode, argument), in the client's order (section 8)."""


@dataclass(frozen=True, slots=True)
class ProcessRequest:
    """A shell or a command to run on the kernel's host."""

    command: bytes | None = None
    """What the shell gets after ``-c``; ``None`` asks for an interactive login shell."""
    pty: PtyRequest | None = None
    """``None``: plain pipes, stdout and stderr apart."""
    environment: tuple[tuple[bytes, bytes], ...] = ()
    """Variables to add, accepted already by the SSH side's policy. ``SSH_TTY`` is the agent's."""


@dataclass(frozen=True, slots=True)
class TCPAddress:
    """A TCP port as the kernel's host sees it."""

    host: str
    """A name, resolved over there, or an address. To listen: empty for every address there is."""
    port: int
    """1 to 65535; to listen, 0 takes a free one."""


@dataclass(frozen=True, slots=True)
class SocketPath:
    """A Unix socket on the kernel's host."""

    path: bytes
    """Absolute."""


@dataclass(frozen=True, slots=True)
class PrivateSocket:
    """A Unix socket at a path of the far side's own choice, in a directory that only the account
    there can enter. Both go when nobody listens any more."""

    name: str
    """What the file's name begins with."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """Somebody has connected to a :class:`IListener` and waits."""

    number: int
    """The listener's own."""
    host: str = ""
    """The address it comes from; empty for a Unix socket."""
    port: int = 0


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """The process ended by itself (RFC 4254 section 6.10)."""

    status: int
    """0 to 255."""


@dataclass(frozen=True, slots=True)
class ExitSignal:
    """The process was ended by a signal (RFC 4254 section 6.10)."""

    name: str
    """Without the ``SIG``: ``TERM``, ``KILL``..."""
    core_dumped: bool = False
    message: str = ""


Exit = ExitStatus | ExitSignal


class IStreamReceiver(Interface):
    """Whoever opened a stream. Calls come in this order, each group optional but the last:

    ``streamOpened``, any data and ``streamConsumed``, ``streamEOF``, ``streamExited``,
    ``streamClosed``. Nothing comes after ``streamClosed``. A receiver must not raise.

    What is said of a process holds for a connection too, which is one process's stdin and stdout
    in all but name; it has no stderr and no exit.
    """

    def streamOpened(info: Mapping[str, object]) -> None:
        """The process runs, the connection stands. ``info`` has what the agent tells of it, the
        ``pid`` of a process among it."""

    def streamData(data: bytes | memoryview) -> None:
        """Bytes of stdout (of the terminal, if there is one); never beyond the granted limit.

        They may be kept; a view may be of a larger message.
        """

    def streamExtendedData(data: bytes | memoryview) -> None:
        """Bytes of stderr; they count against the same limit as :meth:`streamData`."""

    def streamConsumed(count: int) -> None:
        """The process took ``count`` more of the bytes given to :meth:`IStream.write`."""

    def streamEOF() -> None:
        """No byte of stdout or stderr comes after this."""

    def streamExited(exit: Exit) -> None:
        """The process ended in this way. Not called where nobody knows how it ended."""

    def streamClosed(reason: Exception | None) -> None:
        """The stream is gone: ``None`` in the ordinary way, else why.

        :class:`~conchkernel.errors.StreamRefused` when it could not be opened,
        :class:`~conchkernel.errors.LinkLost` when the road was cut.
        """


class IStream(Interface):
    """One process or connection on the kernel's host, seen from the gateway.

    What is asked beside the bytes (:meth:`resize`, :meth:`signal`, :meth:`sendBreak`,
    :meth:`stopReading`) raises :class:`~conchkernel.errors.StreamRefused` while thousands of the
    like wait for the road already.
    """

    def write(data: bytes) -> None:
        """Give bytes to the process's stdin or terminal. ``data`` is kept, not copied."""

    def writeEOF() -> None:
        """Close the process's stdin after all that was written; output goes on."""

    def grant(limit: int) -> None:
        """Allow the far side to send up to byte ``limit`` of output.

        ``limit`` is absolute: it counts every byte of stdout and stderr since the start. A lower
        limit than one given before changes nothing. Before the first grant nothing arrives.
        """

    def resize(size: WindowSize) -> None:
        """The client's window has changed. No effect without a terminal."""

    def signal(name: str) -> None:
        """Deliver a signal, named without its ``SIG`` (RFC 4254 section 6.9)."""

    def sendBreak(milliseconds: int) -> None:
        """Send a break to the terminal (RFC 4335). No effect without one."""

    def stopReading() -> None:
        """The client wants no more output (``eow@openssh.com``): the process's next write fails
        as if its reader were gone. Its exit is still told."""

    def close() -> None:
        """Give the stream up: a terminal hangs up, pipes close. Idempotent.

        :meth:`IStreamReceiver.streamClosed` is still called, once.
        """


class IListenerReceiver(Interface):
    """Whoever listens on the kernel's host. A receiver must not raise."""

    def connectionAccepted(incoming: Incoming) -> None:
        """Somebody connected. It waits for :meth:`IListener.accept` or :meth:`IListener.refuse`;
        while many wait, others are not taken from the system's own queue."""

    def listenerLost(reason: Exception) -> None:
        """Nobody listens any more, and not because of :meth:`IListener.close`. The last call."""


class IListener(Interface):
    """An address on the kernel's host at which somebody listens."""

    port: int = Attribute("The TCP port; 0 for a Unix socket.")
    path: bytes = Attribute("The Unix socket; empty for a TCP port.")

    def accept(incoming: Incoming, receiver: IStreamReceiver) -> IStream:
        """Have the connection. It may be gone already: that comes as ``streamClosed``."""

    def refuse(incoming: Incoming) -> None:
        """Close the connection."""

    def close() -> None:
        """Listen no more; connections that wait are closed, others live on. Idempotent."""


class IKernelLink(Interface):
    """One use of the road to a kernel's host."""

    def openProcess(request: ProcessRequest, receiver: IStreamReceiver) -> IStream:
        """Start a process. Bytes may be written at once; a refusal comes as ``streamClosed``."""

    def openConnection(address: TCPAddress | SocketPath, receiver: IStreamReceiver) -> IStream:
        """Connect to an address of the kernel's host, or one that can be reached from it.

        ``streamOpened`` is called when the connection stands. One that cannot be made comes as
        ``streamClosed`` with a :class:`~conchkernel.errors.StreamRefused` that says why.
        """

    def listen(
        address: TCPAddress | SocketPath | PrivateSocket, receiver: IListenerReceiver
    ) -> Deferred[IListener]:
        """Listen at an address of the kernel's host.

        :returns: a Deferred :class:`IListener`, to be closed by its user. Cancellable.
        :raises conchkernel.errors.StreamRefused: (as failure) where that cannot be.
        :raises conchkernel.errors.LinkLost: (as failure) when the road was cut.
        """

    def openFiles(root: bytes | None, readOnly: bool) -> Deferred[IFileStore]:
        """Files on the kernel's host.

        :param root: a directory that is the store's ``/`` and that no path leaves; ``None`` for
            the whole host, paths as they are there.
        :returns: a Deferred :class:`~conchkernel.files.IFileStore`, to be closed by its user.
            Cancellable.
        :raises conchkernel.errors.StreamRefused: (as failure) where there cannot be one.
        :raises conchkernel.errors.LinkLost: (as failure) when the road was cut.
        """

    def release() -> None:
        """This use is over; its remaining streams, listeners and stores close. Idempotent."""


class IBackend(Interface):
    """Where kernels come from."""

    def connect(user: str) -> Deferred[IKernelLink]:
        """A use of the kernel of ``user``, which is started if need be.

        :returns: a Deferred :class:`IKernelLink`, to be given back by
            :meth:`IKernelLink.release`. Cancellable.
        :raises conchkernel.errors.JupyterError: (as failure) with a sentence for the user.
        """
