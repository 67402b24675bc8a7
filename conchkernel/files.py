"""Where files are: what the SFTP server asks of a store, whichever it is.

Like :mod:`conchkernel.interfaces` a meeting place of the two columns: the SSH column serves an
:class:`IFileStore`, the kernel column brings two of them (the Contents API, the agent). Paths are
bytes as SFTP has them, absolute and separated by ``/``; a store may understand them differently
(the host's real paths, or below the Jupyter root), so one session stays with one store.

Flow control: a caller has a bounded number of requests under way, each of bounded size (the SFTP
server's limits). A store keeps no more than those, whatever the size of a file.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zope.interface import Attribute, Interface

from conchkernel.errors import ConchKernelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twisted.internet.defer import Deferred


#: READs and WRITEs under way, where a store has no reason for less: 32 of the largest size, which
#: is 400 MB/s over 20 ms.
BYTES_UNDER_WAY = 8 * 1024 * 1024


class FileProblem(enum.Enum):
    """Why a store would not do something; the SSH side maps it to SFTP status codes once."""

    NOT_FOUND = "no such file"
    PERMISSION = "permission denied"
    EXISTS = "file exists"
    NOT_DIRECTORY = "not a directory"
    IS_DIRECTORY = "is a directory"
    NOT_EMPTY = "directory not empty"
    NO_SPACE = "no space left"
    QUOTA = "quota exceeded"
    READ_ONLY = "read-only"
    NAME_TOO_LONG = "file name too long"
    LOOP = "too many levels of symbolic links"
    INVALID = "invalid argument"
    UNSUPPORTED = "not supported here"
    CONNECTION_LOST = "connection lost"
    FAILURE = "failure"


class FileStoreError(ConchKernelError):
    """A store could not do what it was asked; the file is as it was unless the text says else."""

    def __init__(self, problem: FileProblem, message: str = "") -> None:
        super().__init__(message or problem.value)
        self.problem = problem


class OpenFlag(enum.IntFlag):
    """How to open a file; the numbers are SFTP v3's (draft-ietf-secsh-filexfer-02 section 6.3)."""

    READ = 0x01
    WRITE = 0x02
    APPEND = 0x04
    CREATE = 0x08
    TRUNCATE = 0x10
    EXCLUSIVE = 0x20


@dataclass(frozen=True, slots=True)
class Attributes:
    """What is known of a file, or what is to be set; ``None`` for what is not."""

    size: int | None = None
    """Bytes."""
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    """With the file's type in it when told by a store; only the permissions when set."""
    atime: float | None = None
    """Seconds since the epoch; with mtime or not at all."""
    mtime: float | None = None
    owner: str | None = None
    """Names, for long listings, where the store knows them."""
    group: str | None = None
    links: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a directory."""

    name: bytes
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Filesystem:
    """statvfs(2): what ``df`` shows; the fields and units of statvfs@openssh.com."""

    block_size: int
    fragment_size: int
    blocks: int
    free_blocks: int
    available_blocks: int
    files: int
    free_files: int
    available_files: int
    id: int
    flags: int
    name_max: int


class IOpenFile(Interface):
    """One open file. Requests may overlap; the caller orders what must be ordered."""

    def read(offset: int, length: int) -> bytes | Deferred[bytes]:
        """At most ``length`` bytes from ``offset``; ``b""`` only at or behind the end.

        Fewer bytes may come than were asked for. Bytes at once, where the store has them.
        """

    def write(offset: int, data: bytes) -> Deferred[None] | None:
        """All of ``data`` at ``offset`` (at the end, for a file opened with APPEND)."""

    def stat() -> Deferred[Attributes]:
        """Of the open file."""

    def setAttributes(attributes: Attributes) -> Deferred[None]:
        """On the open file; ``size`` truncates or extends."""

    def sync() -> Deferred[None]:
        """fsync(2)."""

    def filesystem() -> Deferred[Filesystem]:
        """The file system it is on."""

    def close() -> Deferred[None]:
        """Close it. Fails if what was written could not be kept: then the file is not whole."""


class IListing(Interface):
    """A directory being read."""

    def next() -> Deferred[Sequence[Entry]]:
        """Some more entries, ``.`` and ``..`` among them where the store has them; empty at the
        end. One call at a time."""

    def close() -> Deferred[None]:
        """Stop reading."""


class IFileStore(Interface):
    """Files. Each method returns a Deferred, cancellable, failing with :class:`FileStoreError`."""

    home = Attribute("The directory in which a session begins: bytes, absolute.")
    bytesUnderWay = Attribute(
        "int: how many bytes of READs and WRITEs may be under way; more would only fill memory."
    )
    features = Attribute(
        "frozenset of str: which of 'modes', 'links', 'hardlinks', 'statvfs', 'sync', 'times', "
        "'offset-writes' the store can do; the rest fails with FileProblem.UNSUPPORTED."
    )

    def open(path: bytes, flags: OpenFlag, attributes: Attributes) -> Deferred[IOpenFile]:
        """Open or create a file; ``attributes.mode`` for a new one."""

    def stat(path: bytes, *, follow: bool = True) -> Deferred[Attributes]:
        """stat(2), or lstat(2) with ``follow`` false."""

    def setAttributes(
        path: bytes, attributes: Attributes, *, follow: bool = True
    ) -> Deferred[None]:
        """Change what is given in ``attributes``."""

    def listDirectory(path: bytes) -> Deferred[IListing]:
        """Read a directory."""

    def remove(path: bytes) -> Deferred[None]:
        """Remove a file or link, never a directory."""

    def makeDirectory(path: bytes, attributes: Attributes) -> Deferred[None]:
        """mkdir(2)."""

    def removeDirectory(path: bytes) -> Deferred[None]:
        """rmdir(2): an empty one only."""

    def rename(old: bytes, new: bytes, *, overwrite: bool) -> Deferred[None]:
        """rename(2) with ``overwrite``; without it, EXISTS where ``new`` is there."""

    def readLink(path: bytes) -> Deferred[bytes]:
        """Where a symbolic link points, as it was made."""

    def symbolicLink(target: bytes, path: bytes) -> Deferred[None]:
        """Make ``path`` a link to ``target``, which is not interpreted."""

    def hardLink(existing: bytes, path: bytes) -> Deferred[None]:
        """link(2)."""

    def realPath(path: bytes) -> Deferred[bytes]:
        """The canonical absolute form, relative to :attr:`home` if it is not absolute; the last
        component need not exist."""

    def filesystem(path: bytes) -> Deferred[Filesystem]:
        """The file system a path is on."""

    def names(
        uids: Sequence[int], gids: Sequence[int]
    ) -> Deferred[tuple[Sequence[str], Sequence[str]]]:
        """The names of accounts and groups; empty strings for unknown ones."""

    def copy(
        source: IOpenFile, offset: int, length: int, target: IOpenFile, target_offset: int
    ) -> Deferred[None]:
        """copy-data: ``length`` 0 means to the end of the source."""

    def homeOf(user: bytes) -> Deferred[bytes]:
        """The home directory of a login name (``~user``); empty for the store's own account."""

    def close() -> Deferred[None]:
        """Give up every open file and the store's road."""
