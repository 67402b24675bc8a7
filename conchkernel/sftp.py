"""Between file stores and Conch's own idea of them, :class:`twisted.conch.interfaces.ISFTPServer`.

For embedders: :class:`StoreServer` lets Conch's ``FileTransferServer`` serve a store, and
:func:`storeOf` lets our protocol server serve what somebody wrote for Conch. ISFTPServer cannot
say everything: it knows no fsync, no request about two files, and no directory that comes in
pieces; what is lost is told where it is lost.
"""

from __future__ import annotations

import stat
import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from twisted.conch.interfaces import ISFTPFile, ISFTPServer
from twisted.conch.ssh.filetransfer import SFTPError
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from zope.interface import implementer

from conchkernel.files import (
    BYTES_UNDER_WAY,
    Attributes,
    Entry,
    FileProblem,
    FileStoreError,
    Filesystem,
    IFileStore,
    IListing,
    IOpenFile,
    OpenFlag,
)
from conchkernel.localfiles import problemOf
from conchkernel.ssh.fields import Fields, ProtocolError, string
from conchkernel.ssh.sftp_handles import MAX_HANDLES, Handles
from conchkernel.ssh.sftp_longname import longname
from conchkernel.ssh.sftp_packets import (
    MAX_DATA_BYTES,
    Kind,
    Status,
    packAttributes,
    parseAttributes,
    parseFields,
)
from conchkernel.ssh.sftp_requests import RULES, Requests, extensionsFor
from conchkernel.ssh.sftp_status import statusOf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from twisted.python.failure import Failure

#: What ISFTPServer calls the fields of :class:`Attributes`.
_NAMES = {
    "size": "size", "uid": "uid", "gid": "gid", "permissions": "mode", "atime": "atime",
    "mtime": "mtime",
}  # fmt: skip
#: Extensions that ISFTPServer can have: about paths, and not answered by NAME.
_EXTENSIONS = {
    b"posix-rename@openssh.com", b"statvfs@openssh.com", b"hardlink@openssh.com",
    b"lsetstat@openssh.com", b"limits@openssh.com", b"users-groups-by-id@openssh.com",
}  # fmt: skip
#: Entries of somebody's iterable that are taken in one go.
_LISTED_AT_ONCE = 100


def _toConch(attributes: Attributes) -> dict[str, int]:
    # By way of the packet, so that numbers which do not fit are cut in one place.
    cut = parseAttributes(Fields(packAttributes(attributes), "attributes"))
    values = {name: getattr(cut, ours) for name, ours in _NAMES.items()}
    return {name: int(value) for name, value in values.items() if value is not None}


def _fromConch(attributes: dict[str, Any]) -> Attributes:
    values = {ours: attributes.get(name) for name, ours in _NAMES.items()}
    return Attributes(**values)


# --- a store for Conch -----------------------------------------------------------------------


def _raiseForConch(reason: Failure) -> Any:
    reply = statusOf(reason.value)
    if reply is None:
        return reason
    fields = Fields(reply[1], "status")
    code, text = fields.uint32(), fields.string().decode("utf-8", "replace")
    # Conch sends ASCII only, and fails where it cannot.
    raise SFTPError(code, text.encode("ascii", "backslashreplace").decode("ascii"))


def _forConch(result: Any) -> Any:
    return result.addErrback(_raiseForConch) if isinstance(result, Deferred) else result


@implementer(ISFTPFile)
class StoreServerFile:
    """An open file of a store, as Conch has it."""

    def __init__(self, file: IOpenFile) -> None:
        self._file = file

    def close(self) -> Deferred[None]:
        return _forConch(self._file.close())

    def readChunk(self, offset: int, length: int) -> Deferred[bytes]:
        """Empty at the end. No more than fits a packet, whatever is asked for."""
        return _forConch(maybeDeferred(self._file.read, offset, min(length, MAX_DATA_BYTES)))

    def writeChunk(self, offset: int, data: bytes) -> Deferred[None]:
        return _forConch(maybeDeferred(self._file.write, offset, data))

    def getAttrs(self) -> Deferred[dict[str, int]]:
        return _forConch(self._file.stat().addCallback(_toConch))

    def setAttrs(self, attrs: dict[str, Any]) -> Deferred[None]:
        return _forConch(self._file.setAttributes(_fromConch(attrs)))


class _Directory:
    """A whole directory: Conch's server breaks on one whose entries come later."""

    def __init__(self, entries: list[tuple[bytes, bytes, dict[str, int]]]) -> None:
        self._entries = entries

    def __iter__(self) -> Iterator[tuple[bytes, bytes, dict[str, int]]]:
        return iter(self._entries)

    def close(self) -> None:
        self._entries = []


@implementer(ISFTPServer)
class StoreServer:
    """A store, for Conch: ``FileTransferServer(avatar=StoreServer(store, avatar))``.

    :param store: closed by whoever made it.
    """

    def __init__(self, store: IFileStore, avatar: object = None) -> None:
        self.avatar = avatar
        self._store = store
        # Nothing is open by a handle here.
        self._requests = Requests(store, Handles(MAX_HANDLES))

    def gotVersion(self, otherVersion: int, extData: dict[Any, Any]) -> dict[bytes, bytes]:
        announced = extensionsFor(self._store.features)
        return {name: value for name, value in announced if name in _EXTENSIONS}

    def openFile(
        self, filename: bytes, flags: int, attrs: dict[str, Any]
    ) -> Deferred[StoreServerFile]:
        wanted = OpenFlag(flags & sum(OpenFlag)) or OpenFlag.READ
        opening = self._store.open(self._path(filename), wanted, _fromConch(attrs))
        return _forConch(opening.addCallback(StoreServerFile))

    def removeFile(self, filename: bytes) -> Deferred[None]:
        return _forConch(self._store.remove(self._path(filename)))

    def renameFile(self, oldpath: bytes, newpath: bytes) -> Deferred[None]:
        paths = self._path(oldpath), self._path(newpath)
        return _forConch(self._store.rename(*paths, overwrite=False))

    def makeDirectory(self, path: bytes, attrs: dict[str, Any]) -> Deferred[None]:
        return _forConch(self._store.makeDirectory(self._path(path), _fromConch(attrs)))

    def removeDirectory(self, path: bytes) -> Deferred[None]:
        return _forConch(self._store.removeDirectory(self._path(path)))

    def openDirectory(self, path: bytes) -> Deferred[_Directory]:
        return _forConch(Deferred.fromCoroutine(self._list(self._path(path))))

    async def _list(self, path: bytes) -> _Directory:
        listing = await self._store.listDirectory(path)
        found = []
        try:
            while entries := await listing.next():
                now = time.time()
                for entry in entries:
                    line = longname(entry.name, entry.attributes, now)
                    found.append((entry.name, line, _toConch(entry.attributes)))
        finally:
            await listing.close()
        return _Directory(found)

    def getAttrs(self, path: bytes, followLinks: bool) -> Deferred[dict[str, int]]:
        telling = self._store.stat(self._path(path), follow=bool(followLinks))
        return _forConch(telling.addCallback(_toConch))

    def setAttrs(self, path: bytes, attrs: dict[str, Any]) -> Deferred[None]:
        return _forConch(self._store.setAttributes(self._path(path), _fromConch(attrs)))

    def readLink(self, path: bytes) -> Deferred[bytes]:
        return _forConch(self._store.readLink(self._path(path)))

    def makeLink(self, linkPath: bytes, targetPath: bytes) -> Deferred[None]:
        """As documented. Conch's server takes the two from a client in the draft's order, which
        no client of today uses."""
        return _forConch(self._store.symbolicLink(targetPath, self._path(linkPath)))

    def realPath(self, path: bytes) -> Deferred[bytes]:
        return _forConch(self._store.realPath(self._path(path)))

    def extendedRequest(self, extendedName: bytes, extendedData: bytes) -> Deferred[bytes]:
        """Conch answers all that is returned by EXTENDED_REPLY, so that a mere success must be
        raised."""
        if extendedName not in _EXTENSIONS:
            raise NotImplementedError
        try:
            parsed = parseFields(extendedName, extendedData)
        except ProtocolError as error:
            raise SFTPError(Status.BAD_MESSAGE, str(error)) from None
        rule, fields = RULES[extendedName], list(parsed or ())
        for index in rule.paths:
            fields[index] = self._path(fields[index])

        def answered(reply: tuple[int, bytes]) -> bytes:
            if reply[0] == Kind.STATUS:
                raise SFTPError(Status.OK, "Success")
            return reply[1]

        doing: Deferred[Any] = maybeDeferred(rule.operation, self._requests, *fields)
        return _forConch(doing).addCallback(answered)

    def _path(self, path: bytes) -> bytes:
        return self._requests.absolute(path)


# --- Conch's for us --------------------------------------------------------------------------

_PROBLEMS = {
    Status.NO_SUCH_FILE: FileProblem.NOT_FOUND,
    Status.PERMISSION_DENIED: FileProblem.PERMISSION,
    Status.BAD_MESSAGE: FileProblem.INVALID,
    Status.NO_CONNECTION: FileProblem.CONNECTION_LOST,
    Status.CONNECTION_LOST: FileProblem.CONNECTION_LOST,
    Status.OP_UNSUPPORTED: FileProblem.UNSUPPORTED,
    # Not version 3's, but Conch has it.
    11: FileProblem.EXISTS,
}


def _raiseForUs(reason: Failure) -> Any:
    """What somebody's server raises, as Conch understands it."""
    error = reason.value
    if isinstance(error, SFTPError):
        raise FileStoreError(
            _PROBLEMS.get(error.code, FileProblem.FAILURE), str(error.message)
        ) from None
    if isinstance(error, NotImplementedError):
        raise FileStoreError(FileProblem.UNSUPPORTED) from None
    if isinstance(error, OSError):
        raise problemOf(error) from None
    return reason


def _forUs(call: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
    return maybeDeferred(call, *arguments).addErrback(_raiseForUs)


def _nothing(result: object) -> None:
    return None


def storeOf(server: ISFTPServer) -> Deferred[IFileStore]:
    """A store of what was written for Conch, when it has told where a session begins."""
    return Deferred.fromCoroutine(_storeOf(server))


async def _storeOf(server: ISFTPServer) -> IFileStore:
    extensions = await _forUs(server.gotVersion, 3, {})
    home = await _forUs(server.realPath, b".")
    return ServerStore(server, home, frozenset(extensions or ()))


@implementer(IOpenFile)
class ServerFile:
    """An open file of somebody's server."""

    def __init__(self, store: ServerStore, path: bytes, file: Any) -> None:
        self._store = store
        self._path = path
        self._file = file

    def read(self, offset: int, length: int) -> Deferred[bytes]:
        return _forUs(self._file.readChunk, offset, length).addErrback(_end)

    def write(self, offset: int, data: bytes) -> Deferred[None]:
        return _forUs(self._file.writeChunk, offset, data).addCallback(_nothing)

    def stat(self) -> Deferred[Attributes]:
        return _forUs(self._file.getAttrs).addCallback(_fromConch)

    def setAttributes(self, attributes: Attributes) -> Deferred[None]:
        return _forUs(self._file.setAttrs, _toConch(attributes)).addCallback(_nothing)

    def sync(self) -> Deferred[None]:
        return _unsupported()

    def filesystem(self) -> Deferred[Filesystem]:
        return self._store.filesystem(self._path)

    def close(self) -> Deferred[None]:
        self._store.opened.discard(self)
        return _forUs(self._file.close).addCallback(_nothing)


def _end(reason: Failure) -> bytes:
    reason.trap(EOFError)
    return b""


def _unsupported() -> Deferred[Any]:
    return fail(FileStoreError(FileProblem.UNSUPPORTED))


@implementer(IListing)
class ServerListing:
    """A directory of somebody's server: an iterable of entries, or of Deferreds of them."""

    def __init__(self, store: ServerStore, directory: Any) -> None:
        self._store = store
        self._directory = directory
        self._entries: Iterator[Any] = iter(directory)

    def next(self) -> Deferred[Sequence[Entry]]:
        return Deferred.fromCoroutine(self._next()).addErrback(_raiseForUs)

    async def _next(self) -> list[Entry]:
        entries: list[Entry] = []
        for one in self._entries:
            name, line, attributes = await one if isinstance(one, Deferred) else one
            entries.append(Entry(name, _withNames(line, _fromConch(attributes))))
            if len(entries) == _LISTED_AT_ONCE:
                break
        return entries

    def close(self) -> Deferred[None]:
        self._store.opened.discard(self)
        close = getattr(self._directory, "close", None)
        return succeed(None) if close is None else _forUs(close).addCallback(_nothing)


def _withNames(line: bytes, attributes: Attributes) -> Attributes:
    """What only the long name tells, if it is one."""
    words = line.decode("utf-8", "replace").split(None, 4)
    if len(words) < 5 or len(words[0]) < 10 or not words[1].isdecimal() or len(words[1]) > 9:
        return attributes
    return replace(attributes, links=int(words[1]), owner=words[2], group=words[3])


@implementer(IFileStore)
class ServerStore:
    """Somebody's ISFTPServer as a store; :func:`storeOf` makes one.

    Renaming without replacing looks first and renames then, since ISFTPServer does not say what
    its own does. Nothing can be set on a link.
    """

    bytesUnderWay = BYTES_UNDER_WAY

    def __init__(self, server: Any, home: bytes, extensions: frozenset[Any]) -> None:
        self.home = home
        features = {"modes", "links", "times", "offset-writes"}
        self._extensions = frozenset(
            name.encode() if isinstance(name, str) else name for name in extensions
        )
        for name, feature in (
            (b"statvfs@openssh.com", "statvfs"), (b"hardlink@openssh.com", "hardlinks"),
        ):  # fmt: skip
            if name in self._extensions:
                features.add(feature)
        self.features = frozenset(features)
        self.opened: set[ServerFile | ServerListing] = set()
        self._server = server

    def open(self, path: bytes, flags: OpenFlag, attributes: Attributes) -> Deferred[IOpenFile]:
        def opened(file: Any) -> IOpenFile:
            ours = ServerFile(self, path, file)
            self.opened.add(ours)
            return ours

        opening = _forUs(self._server.openFile, path, int(flags), _toConch(attributes))
        return opening.addCallback(opened)

    def stat(self, path: bytes, *, follow: bool = True) -> Deferred[Attributes]:
        return _forUs(self._server.getAttrs, path, follow).addCallback(_fromConch)

    def setAttributes(
        self, path: bytes, attributes: Attributes, *, follow: bool = True
    ) -> Deferred[None]:
        return Deferred.fromCoroutine(self._setAttributes(path, attributes, follow))

    async def _setAttributes(self, path: bytes, attributes: Attributes, follow: bool) -> None:
        if not follow and stat.S_ISLNK((await self.stat(path, follow=False)).mode or 0):
            raise FileStoreError(FileProblem.UNSUPPORTED)
        await _forUs(self._server.setAttrs, path, _toConch(attributes))

    def listDirectory(self, path: bytes) -> Deferred[IListing]:
        def opened(directory: Any) -> IListing:
            listing = ServerListing(self, directory)
            self.opened.add(listing)
            return listing

        return _forUs(self._server.openDirectory, path).addCallback(opened)

    def remove(self, path: bytes) -> Deferred[None]:
        return _forUs(self._server.removeFile, path).addCallback(_nothing)

    def makeDirectory(self, path: bytes, attributes: Attributes) -> Deferred[None]:
        making = _forUs(self._server.makeDirectory, path, _toConch(attributes))
        return making.addCallback(_nothing)

    def removeDirectory(self, path: bytes) -> Deferred[None]:
        return _forUs(self._server.removeDirectory, path).addCallback(_nothing)

    def rename(self, old: bytes, new: bytes, *, overwrite: bool) -> Deferred[None]:
        return Deferred.fromCoroutine(self._rename(old, new, overwrite))

    async def _rename(self, old: bytes, new: bytes, overwrite: bool) -> None:
        if overwrite:
            name = b"posix-rename@openssh.com"
            if name in self._extensions:
                await self._extended(name, string(old) + string(new))
                return
        else:
            try:
                await self.stat(new, follow=False)
            except FileStoreError as error:
                if error.problem is not FileProblem.NOT_FOUND:
                    raise
            else:
                raise FileStoreError(FileProblem.EXISTS)
        await _forUs(self._server.renameFile, old, new)

    def readLink(self, path: bytes) -> Deferred[bytes]:
        return _forUs(self._server.readLink, path)

    def symbolicLink(self, target: bytes, path: bytes) -> Deferred[None]:
        return _forUs(self._server.makeLink, path, target).addCallback(_nothing)

    def hardLink(self, existing: bytes, path: bytes) -> Deferred[None]:
        fields = string(existing) + string(path)
        return self._extended(b"hardlink@openssh.com", fields).addCallback(_nothing)

    def realPath(self, path: bytes) -> Deferred[bytes]:
        return _forUs(self._server.realPath, path)

    def filesystem(self, path: bytes) -> Deferred[Filesystem]:
        def told(reply: bytes) -> Filesystem:
            if len(reply) != 88:
                raise FileStoreError(FileProblem.FAILURE, "not what statvfs answers")
            return Filesystem(*struct.unpack(">11Q", reply))

        return self._extended(b"statvfs@openssh.com", string(path)).addCallback(told)

    def names(
        self, uids: Sequence[int], gids: Sequence[int]
    ) -> Deferred[tuple[Sequence[str], Sequence[str]]]:
        return succeed(([""] * len(uids), [""] * len(gids)))

    def copy(
        self, source: IOpenFile, offset: int, length: int, target: IOpenFile, target_offset: int
    ) -> Deferred[None]:
        return _unsupported()

    def homeOf(self, user: bytes) -> Deferred[bytes]:
        return succeed(b"" if user else self.home)

    def close(self) -> Deferred[None]:
        for one in list(self.opened):
            one.close().addErrback(_nothing)
        return succeed(None)

    def _extended(self, name: bytes, data: bytes) -> Deferred[bytes]:
        if name not in self._extensions:
            return _unsupported()

        def succeeded(reason: Failure) -> bytes:
            reason.trap(SFTPError)
            if reason.value.code != Status.OK:  # type: ignore[union-attr]
                return reason  # type: ignore[return-value]
            return b""

        asking = maybeDeferred(self._server.extendedRequest, name, data)
        return asking.addErrback(succeeded).addErrback(_raiseForUs)
