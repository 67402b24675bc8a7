"""Stores for Conch, and Conch's for us; each way with the real protocol upon it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.conch.interfaces import ISFTPFile, ISFTPServer
from twisted.conch.ssh import filetransfer
from twisted.conch.ssh.filetransfer import FileTransferClient, FileTransferServer, SFTPError
from twisted.internet.defer import Deferred, succeed
from twisted.internet.testing import StringTransport
from zope.interface import implementer
from zope.interface.verify import verifyClass, verifyObject

from conchkernel.files import Attributes, FileProblem, FileStoreError, IFileStore, OpenFlag
from conchkernel.memoryfiles import MemoryFileStore
from conchkernel.sftp import StoreServer, StoreServerFile, storeOf
from conchkernel.ssh.fields import string
from conchkernel.ssh.sftp_packets import Kind, Status, packAttributes

from .sftpclient import SftpClient, uint32, uint64

if TYPE_CHECKING:
    from .conftest import LoggedFailures

R, W, CREATE = 1, 2, 8


class Pair:
    """Conch's client and Conch's server, with one of our stores behind it."""

    def __init__(self, store: IFileStore) -> None:
        self.client = FileTransferClient()
        self.server = FileTransferServer(avatar=StoreServer(store))
        self.client.makeConnection(StringTransport())
        self.server.makeConnection(StringTransport())
        self.pump()

    def pump(self) -> None:
        """Let them talk until they have nothing to say."""
        ends = (self.client, self.server)
        while any(end.transport.value() for end in ends):
            for end, other in (ends, ends[::-1]):
                data = end.transport.value()
                end.transport.clear()
                if data:
                    other.dataReceived(data)

    def ask(self, asking: Deferred[Any]) -> Any:
        """What comes of a request."""
        self.pump()
        found: list[Any] = []
        asking.addBoth(found.append)
        (result,) = found
        if hasattr(result, "raiseException"):
            result.raiseException()
        return result


@pytest.fixture
def store() -> MemoryFileStore:
    return MemoryFileStore()


@pytest.fixture
def pair(store: MemoryFileStore) -> Pair:
    return Pair(store)


def test_conchsInterfaces(store: MemoryFileStore) -> None:
    """Are provided whole."""
    verifyObject(ISFTPServer, StoreServer(store))
    verifyClass(ISFTPFile, StoreServerFile)


def test_filesThroughConch(pair: Pair, store: MemoryFileStore) -> None:
    """Bytes and attributes there and back."""
    client, ask = pair.client, pair.ask
    file = ask(client.openFile(b"file", R | W | CREATE, {"permissions": 0o600}))
    ask(file.writeChunk(5, b"world"))
    ask(file.writeChunk(0, b"hello"))
    assert ask(file.readChunk(0, 100)) == b"helloworld"
    with pytest.raises(EOFError):
        ask(file.readChunk(10, 1))
    # Conch's client asks for FSTAT here, so its server is told directly.
    (opened,) = pair.server.openFiles.values()
    ask(opened.setAttrs({"size": 4, "atime": 1, "mtime": 2}))
    told = ask(file.getAttrs())
    assert (told["size"], told["permissions"], told["mtime"]) == (4, 0o100600, 2)
    ask(file.close())
    assert not store.opened
    assert store.get(b"/home/joe/file") == b"hell"


def test_namesThroughConch(pair: Pair, store: MemoryFileStore) -> None:
    """Every request that Conch's client has."""
    client, ask = pair.client, pair.ask
    ask(client.makeDirectory(b"/d", {}))
    store.put(b"/d/file", b"12345")
    assert ask(client.realPath(b"/d/../d")) == "/d"
    directory = ask(client.openDirectory(b"/d"))
    names = ask(directory.read())
    assert [name for name, _, _ in names] == [b".", b"..", b"file"]
    assert names[2][1].startswith(b"-rw-r--r--   1 joe      users ")
    assert names[2][2]["size"] == 5
    with pytest.raises(EOFError):
        ask(directory.read())
    ask(directory.close())
    ask(client.renameFile(b"/d/file", b"/d/other"))
    ask(client.makeLink(b"/link", b"d/other"))
    assert ask(client.readLink(b"/link")) == "d/other"
    assert ask(client.getAttrs(b"/link", True))["size"] == 5
    assert ask(client.getAttrs(b"/link"))["permissions"] == 0o120777
    ask(client.setAttrs(b"/d/other", {"size": 1}))
    assert store.get(b"/d/other") == b"1"
    ask(client.removeFile(b"/d/other"))
    ask(client.removeDirectory(b"/d"))


def test_errorsThroughConch(pair: Pair, store: MemoryFileStore) -> None:
    """Codes of version 3, with sentences that Conch can send."""
    store.put(b"/one", b"")
    store.put(b"/two", b"")
    with pytest.raises(SFTPError) as caught:
        pair.ask(pair.client.getAttrs(b"/no", True))
    assert (caught.value.code, caught.value.message) == (2, "no such file")
    with pytest.raises(SFTPError) as caught:
        pair.ask(pair.client.renameFile(b"/one", b"/two"))
    assert caught.value.code == Status.FAILURE
    store.delayed = True
    asking = pair.client.removeFile(b"/one")
    pair.pump()
    store.waiting.pop()[0].errback(FileStoreError(FileProblem.QUOTA, "kein Plätzchen"))
    with pytest.raises(SFTPError) as caught:
        pair.ask(asking)
    assert caught.value.message == "kein Pl\\xe4tzchen"


def test_extensionsThroughConch(pair: Pair, store: MemoryFileStore) -> None:
    """Those that need no handle; a mere success, too."""
    store.put(b"/one", b"1")
    store.put(b"/two", b"2")
    ask, request = pair.ask, pair.client.extendedRequest
    ask(request(b"posix-rename@openssh.com", string(b"/one") + string(b"/two")))
    assert store.get(b"/two") == b"1"
    assert len(ask(request(b"statvfs@openssh.com", string(b"/")))) == 88
    assert len(ask(request(b"limits@openssh.com", b""))) == 32
    for name, data, code in (
        (b"statvfs@openssh.com", b"\0", Status.BAD_MESSAGE),
        (b"statvfs@openssh.com", string(b"/no"), Status.NO_SUCH_FILE),
    ):
        with pytest.raises(SFTPError) as caught:
            ask(request(name, data))
        assert caught.value.code == code
    for name in (b"fsync@openssh.com", b"nonsense"):
        with pytest.raises(NotImplementedError):
            ask(request(name, b""))
    announced = StoreServer(store).gotVersion(3, {})
    assert b"fsync@openssh.com" not in announced
    assert announced[b"statvfs@openssh.com"] == b"2"


# --- Conch's for us --------------------------------------------------------------------------


@implementer(ISFTPFile)
class _File:
    """An open file of somebody who answers at once, and knows errno only."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.closed = 0

    def close(self) -> None:
        self.closed += 1

    def readChunk(self, offset: int, length: int) -> bytes:
        if offset >= len(self.data):
            raise EOFError
        return bytes(self.data[offset : offset + length])

    def writeChunk(self, offset: int, data: bytes) -> int:
        if offset > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.data[offset:] = data
        return len(data)

    def getAttrs(self) -> dict[str, int]:
        return {"size": len(self.data)}

    def setAttrs(self, attrs: dict[str, int]) -> None:
        raise NotImplementedError


@implementer(ISFTPServer)
class _Server:
    """As people write them."""

    avatar = None

    def __init__(self) -> None:
        self.file = _File()
        self.entries: list[Any] = []

    def gotVersion(self, otherVersion: int, extData: dict[str, str]) -> dict[str, str]:
        return {}

    def realPath(self, path: bytes) -> bytes:
        return b"/start" if path == b"." else path

    def openFile(self, filename: bytes, flags: int, attrs: dict[str, int]) -> _File:
        if filename == b"/broken":
            raise ZeroDivisionError
        return self.file

    def openDirectory(self, path: bytes) -> list[Any]:
        return self.entries

    def getAttrs(self, path: bytes, followLinks: bool) -> dict[str, int]:
        if path == b"/no":
            raise OSError(errno.ENOENT, "No such file or directory")
        if path == b"/exists":
            raise SFTPError(filetransfer.FX_FILE_ALREADY_EXISTS, "there")
        return {"size": 5, "permissions": 0o120777, "uid": 1, "gid": 2, "atime": 3, "mtime": 4}

    def renameFile(self, oldpath: bytes, newpath: bytes) -> None:
        self.renamed = oldpath, newpath

    def setAttrs(self, path: bytes, attrs: dict[str, int]) -> None:
        self.set = path, attrs

    def makeLink(self, linkPath: bytes, targetPath: bytes) -> None:
        self.link = linkPath, targetPath

    def readLink(self, path: bytes) -> bytes:
        return b"target"

    def removeFile(self, filename: bytes) -> None:
        raise NotImplementedError

    def makeDirectory(self, path: bytes, attrs: dict[str, int]) -> None:
        pass

    def removeDirectory(self, path: bytes) -> None:
        pass

    def extendedRequest(self, extendedName: bytes, extendedData: bytes) -> bytes:
        raise NotImplementedError


@pytest.fixture
def server() -> _Server:
    return _Server()


@pytest.fixture
def sftp(server: _Server) -> SftpClient:
    return SftpClient(storeOf(server))


def test_somebodysFiles(sftp: SftpClient, server: _Server) -> None:
    """What answers at once, and raises, is served as any store."""
    handle = sftp.open(b"file", R | W | CREATE)
    assert sftp.ask(Kind.WRITE, handle, uint64(0), string(b"hello")).code == Status.OK
    assert sftp.ask(Kind.READ, handle, uint64(1), uint32(100)).data == b"ello"
    assert sftp.ask(Kind.READ, handle, uint64(5), uint32(100)).code == Status.EOF
    answer = sftp.ask(Kind.WRITE, handle, uint64(101), string(b"x"))
    assert answer.status == (4, "No space left on device")
    assert sftp.ask(Kind.FSTAT, handle).rest == packAttributes(Attributes(size=5))
    assert sftp.ask(Kind.FSETSTAT, handle, uint32(0)).code == Status.OP_UNSUPPORTED
    assert sftp.ask(b"fsync@openssh.com", handle).code == Status.OP_UNSUPPORTED
    assert sftp.ask(b"fstatvfs@openssh.com", handle).code == Status.OP_UNSUPPORTED
    assert sftp.ask(Kind.CLOSE, handle).code == Status.OK
    assert server.file.closed == 1
    assert b"fsync@openssh.com" not in sftp.extensions


def test_somebodysNames(sftp: SftpClient, server: _Server) -> None:
    """Links the right way round, no replacing by RENAME, and relative paths from the start."""
    assert sftp.ask(Kind.SYMLINK, string(b"target"), string(b"link")).code == Status.OK
    assert server.link == (b"/start/link", b"target")
    assert sftp.ask(Kind.RENAME, string(b"/a"), string(b"/b")).code == Status.FAILURE
    assert sftp.ask(Kind.RENAME, string(b"/a"), string(b"/exists")).code == Status.FAILURE
    assert sftp.ask(Kind.RENAME, string(b"/a"), string(b"/no")).code == Status.OK
    names = string(b"/a"), string(b"/b")
    assert sftp.ask(b"posix-rename@openssh.com", *names).code == Status.OK
    assert server.renamed == (b"/a", b"/b")
    wanted = packAttributes(Attributes(size=3))
    assert sftp.ask(Kind.SETSTAT, string(b"/a"), wanted).code == Status.OK
    assert server.set == (b"/a", {"size": 3})
    link = sftp.ask(b"lsetstat@openssh.com", string(b"/a"), wanted)
    assert link.code == Status.OP_UNSUPPORTED
    assert sftp.ask(Kind.REMOVE, string(b"/a")).code == Status.OP_UNSUPPORTED
    assert sftp.ask(Kind.STAT, string(b"/no")).code == Status.NO_SUCH_FILE


def test_somebodysDirectories(sftp: SftpClient, server: _Server) -> None:
    """Also where some of the entries come later; a list without close() is one."""
    later: Deferred[Any] = Deferred()
    line = b"-rw-r--r--    7 jim      staff           5 Jan  1  1970 b"
    server.entries = [(b"a", b"", {}), later, (b"c", b"whatever it is", {"size": 1})]
    handle = string(sftp.ask(Kind.OPENDIR, string(b"/")).data)
    sftp.request(Kind.READDIR, handle)
    assert sftp.take() == []
    later.callback((b"b", line, {"size": 5, "permissions": 0o100644, "mtime": 0, "atime": 0}))
    (answer,) = sftp.take()
    assert [name for name, _, _ in answer.names] == [b"a", b"b", b"c"]
    assert answer.names[1][1].startswith(b"-rw-r--r--   7 jim      staff           5 ")
    assert sftp.ask(Kind.READDIR, handle).code == Status.EOF
    assert sftp.ask(Kind.CLOSE, handle).code == Status.OK


def test_somebodysMistakes(sftp: SftpClient, loggedFailures: LoggedFailures) -> None:
    """Are answered and logged."""
    answer = sftp.ask(Kind.OPEN, string(b"/broken"), uint32(R), uint32(0))
    assert answer.status == (4, "internal error")
    assert len(loggedFailures.flush(ZeroDivisionError)) == 1


def test_whatSomebodyHasOpenIsClosed(sftp: SftpClient, server: _Server) -> None:
    """When the client leaves."""
    sftp.open(b"file")
    sftp.client.lose()
    assert server.file.closed == 1


@pytest_twisted.ensureDeferred
async def test_thereAndBackAgain(store: MemoryFileStore) -> None:
    """A store for Conch for us still has the extensions that can be said."""
    again = await storeOf(StoreServer(store))
    verifyObject(IFileStore, again)
    assert again.features == {"modes", "links", "times", "offset-writes", "statvfs", "hardlinks"}
    sftp = SftpClient(succeed(again))
    store.put(b"/one", b"1")
    store.put(b"/two", b"2")
    names = string(b"/one"), string(b"/two")
    assert sftp.ask(Kind.RENAME, *names).code == Status.FAILURE
    assert sftp.ask(b"posix-rename@openssh.com", *names).code == Status.OK
    assert sftp.ask(b"hardlink@openssh.com", *reversed(names)).code == Status.OK
    assert len(sftp.ask(b"statvfs@openssh.com", string(b"/")).rest) == 88
    file = await again.open(b"/one", OpenFlag.READ, Attributes())
    assert await file.read(0, 9) == b"1"
    assert await again.names([1], [2]) == ([""], [""])
