"""The SFTP server over a store in memory, and a client that counts."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock

from conchkernel.errors import JupyterUnreachable
from conchkernel.files import Attributes, FileProblem, FileStoreError, IFileStore, OpenFlag
from conchkernel.memoryfiles import MemoryFileStore
from conchkernel.ssh import sftp_server
from conchkernel.ssh.fields import string
from conchkernel.ssh.sftp_handles import MAX_HANDLES
from conchkernel.ssh.sftp_packets import MAX_DATA_BYTES, Kind, Status, frame, packAttributes

from .sftpclient import SftpClient, uint32, uint64

if TYPE_CHECKING:
    from .conftest import LoggedFailures

R, W, APPEND, CREATE, TRUNCATE, EXCLUSIVE = (int(flag) for flag in OpenFlag)
NONE = uint32(0)
OPENSSH = {
    b"posix-rename@openssh.com": b"1", b"statvfs@openssh.com": b"2",
    b"fstatvfs@openssh.com": b"2", b"hardlink@openssh.com": b"1", b"fsync@openssh.com": b"1",
    b"lsetstat@openssh.com": b"1", b"limits@openssh.com": b"1",
    b"expand-path@openssh.com": b"1", b"copy-data": b"1", b"home-directory": b"1",
    b"users-groups-by-id@openssh.com": b"1",
}  # fmt: skip


@pytest.fixture
def store() -> MemoryFileStore:
    return MemoryFileStore()


@pytest.fixture
def sftp(store: MemoryFileStore) -> SftpClient:
    return SftpClient(store)


# --- beginning and end -----------------------------------------------------------------------


def test_versionAndExtensions(sftp: SftpClient) -> None:
    """Everything that sftp-server announces, in its order, for a store that can do it."""
    assert list(sftp.extensions.items()) == list(OPENSSH.items())


def test_extensionsThatTheStoreCannotDo() -> None:
    """Are not announced."""
    sftp = SftpClient(MemoryFileStore(frozenset()))
    assert set(sftp.extensions) == {
        b"posix-rename@openssh.com", b"limits@openssh.com", b"expand-path@openssh.com",
        b"home-directory",
    }  # fmt: skip


def test_requestsWaitForTheStore(store: MemoryFileStore) -> None:
    """A client begins at once; the store comes when it comes."""
    finding: Deferred[IFileStore] = Deferred()
    sftp = SftpClient(finding, init=False)
    sftp.send(frame(Kind.INIT, 3, b""))
    sftp.request(Kind.STAT, string(b"/"))
    assert sftp.take() == []
    finding.callback(store)
    assert [answer.kind for answer in sftp.take()] == [Kind.VERSION, Kind.ATTRS]


def test_endOfInput(sftp: SftpClient, store: MemoryFileStore) -> None:
    """The session ends well after the last answer, with status 0, and nothing stays open."""
    sftp.open(b"file", W | CREATE)
    store.delayed = True
    sftp.request(Kind.STAT, string(b"/"))
    sftp.client.eof(sftp.channel)
    assert not sftp.channel.closed
    store.release()
    assert [answer.kind for answer in sftp.take()] == [Kind.ATTRS]
    assert sftp.channel.events[-3:] == [("exit-status", b"\0\0\0\0"), "eof", "close"]
    assert store.isClosed


def test_endOfInputBeforeTheStore(store: MemoryFileStore) -> None:
    """What was asked is still answered."""
    finding: Deferred[IFileStore] = Deferred()
    sftp = SftpClient(finding, init=False)
    sftp.send(frame(Kind.INIT, 3, b""))
    sftp.client.eof(sftp.channel)
    finding.callback(store)
    assert [answer.kind for answer in sftp.take()] == [Kind.VERSION]
    assert sftp.channel.events[-3] == ("exit-status", b"\0\0\0\0")


def test_noStore() -> None:
    """A sentence, and no exit status."""
    sftp = SftpClient(fail(JupyterUnreachable("Nobody answers.")), init=False)
    assert bytes(sftp.channel.errors) == b"conchkernel: Nobody answers.\r\n"
    assert sftp.channel.closed
    assert not any(isinstance(event, tuple) for event in sftp.channel.events)


def test_noStoreByMistake(loggedFailures: LoggedFailures) -> None:
    """Ours is logged."""
    sftp = SftpClient(fail(ZeroDivisionError()), init=False)
    assert b"internal error" in sftp.channel.errors
    assert len(loggedFailures.flush(ZeroDivisionError)) == 1


def test_clientLeavesWhileTheStoreIsFound() -> None:
    """Finding it is given up."""
    cancelled = []
    finding: Deferred[IFileStore] = Deferred(cancelled.append)
    sftp = SftpClient(finding, init=False)
    sftp.client.close(sftp.channel)
    assert cancelled == [finding]


@pytest.mark.parametrize("how", ["close", "lose"])
def test_clientLeaves(sftp: SftpClient, store: MemoryFileStore, how: str) -> None:
    """What was under way is cancelled, what was open is closed."""
    handle = sftp.open(b"file", R | W | CREATE)
    store.delayed = True
    sftp.request(Kind.READ, handle, uint64(0), uint32(10))
    sftp.request(Kind.CLOSE, handle)
    sftp.request(Kind.STAT, string(b"/other"))
    if how == "close":
        sftp.client.close(sftp.channel)
    else:
        sftp.client.lose()
    assert store.isClosed
    assert not store.waiting
    assert store.cancelled == 2


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (uint32(1 << 30), b"an SFTP packet of 1073741824 bytes"),
        (uint32(3) + b"abc", b"without a request id"),
    ],
)
def test_nonsense(sftp: SftpClient, store: MemoryFileStore, data: bytes, sentence: bytes) -> None:
    """What cannot be answered ends the session, with sftp-server's status and a sentence."""
    sftp.send(frame(Kind.STAT, 5, string(b"/")) + data + b"x" * 100)
    assert [answer.id for answer in sftp.take()] == [5]
    assert sentence in sftp.channel.errors
    assert ("exit-status", b"\0\0\0\x0b") in sftp.channel.events
    assert sftp.channel.closed
    assert store.isClosed


# --- files -----------------------------------------------------------------------------------


def test_writeAndRead(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Bytes there and back, in pieces, with a hole."""
    handle = sftp.open(b"/home/joe/file", R | W | CREATE, packAttributes(Attributes(mode=0o600)))
    assert sftp.ask(Kind.WRITE, handle, uint64(10), string(b"world")).code == Status.OK
    assert sftp.ask(Kind.WRITE, handle, uint64(0), string(b"hello")).code == Status.OK
    whole = b"hello" + bytes(5) + b"world"
    assert sftp.ask(Kind.READ, handle, uint64(0), uint32(100)).data == whole
    assert sftp.ask(Kind.READ, handle, uint64(12), uint32(2)).data == b"rl"
    assert sftp.ask(Kind.READ, handle, uint64(0), uint32(0)).data == b""
    assert sftp.ask(Kind.READ, handle, uint64(15), uint32(1)).status == (1, "End of file")
    assert sftp.ask(Kind.FSTAT, handle).kind == Kind.ATTRS
    assert sftp.ask(Kind.CLOSE, handle).status == (0, "Success")
    assert store.get(b"/home/joe/file") == whole
    assert not store.opened


def test_readsAreCapped(sftp: SftpClient, store: MemoryFileStore) -> None:
    """A READ of four gigabytes gets what fits a packet."""
    store.put(b"/big", bytes(400_000))
    handle = sftp.open(b"/big")
    data = sftp.ask(Kind.READ, handle, uint64(0), uint32(2**32 - 1)).data
    assert len(data) == MAX_DATA_BYTES
    assert max(sftp.channel.packets) <= 32768


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Kind.READ, (uint64(0), uint32(1))), (Kind.WRITE, (uint64(0), string(b"x"))),
        (Kind.CLOSE, ()), (Kind.FSTAT, ()), (Kind.FSETSTAT, (NONE,)), (Kind.READDIR, ()),
        (b"fsync@openssh.com", ()), (b"fstatvfs@openssh.com", ()),
        (b"copy-data", (uint64(0), uint64(0), string(b"x"), uint64(0))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("handle", [b"", b"\0\0\0\0", b"x" * 256])
def test_handlesThatAreNone(
    sftp: SftpClient, kind: int | bytes, fields: tuple[bytes, ...], handle: bytes
) -> None:
    """Are answered, whatever is asked of them."""
    assert sftp.ask(kind, string(handle), *fields).status == (4, "no such handle")


def test_closedHandles(sftp: SftpClient) -> None:
    """Are none any more from CLOSE on, also for what is behind it in the same packet."""
    handle = sftp.open(b"file", W | CREATE)
    sftp.send(
        frame(Kind.CLOSE, 1, handle)
        + frame(Kind.WRITE, 2, handle + uint64(0) + string(b"x"))
        + frame(Kind.CLOSE, 3, handle)
    )
    assert [(answer.id, answer.code) for answer in sftp.take()] == [(1, 0), (2, 4), (3, 4)]


def test_handlesOfTheOtherKind(sftp: SftpClient) -> None:
    """A directory is not read as a file, nor a file as a directory."""
    file = sftp.open(b"file", R | W | CREATE)
    directory = string(sftp.ask(Kind.OPENDIR, string(b"/")).data)
    assert sftp.ask(Kind.READ, directory, uint64(0), uint32(1)).code == Status.FAILURE
    assert sftp.ask(Kind.WRITE, directory, uint64(0), string(b"")).code == Status.FAILURE
    assert sftp.ask(Kind.FSTAT, directory).code == Status.FAILURE
    assert sftp.ask(Kind.READDIR, file).code == Status.FAILURE
    copy = (file, uint64(0), uint64(0), directory, uint64(0))
    assert sftp.ask(b"copy-data", *copy).code == Status.FAILURE
    assert sftp.ask(Kind.CLOSE, directory).code == Status.OK


def test_handlesAreRandomAndBounded(sftp: SftpClient, store: MemoryFileStore) -> None:
    """None says anything of another, and there are not too many; one closed makes room for one."""
    store.put(b"/file", b"")
    handles = [sftp.open(b"/file") for _ in range(MAX_HANDLES)]
    assert len({handle[:8] for handle in handles}) == MAX_HANDLES
    assert {len(handle) for handle in handles} == {20}
    answer = sftp.ask(Kind.OPEN, string(b"/file"), uint32(R), NONE)
    assert answer.status == (4, "no more than 256 files may be open at once")
    assert sftp.ask(Kind.OPENDIR, string(b"/")).code == Status.FAILURE
    assert sftp.ask(Kind.CLOSE, handles[5]).code == Status.OK
    assert sftp.ask(Kind.OPENDIR, string(b"/")).kind == Kind.HANDLE


def test_handlesThatAreBeingOpenedCount(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Many at once are not more than one after another; those that fail do not count."""
    store.delayed = True
    for number in range(MAX_HANDLES + 50):
        sftp.request(Kind.OPEN, string(b"/%d" % number), uint32(R), NONE)
        if store.waiting:
            store.release()
    assert all(answer.code == Status.NO_SUCH_FILE for answer in sftp.take())
    store.delayed = False
    sftp.open(b"file", W | CREATE)


def test_openFlags(sftp: SftpClient, store: MemoryFileStore) -> None:
    """As open(2) has them; without any, it is for reading."""
    store.put(b"/file", b"data")
    ask = lambda flags: sftp.ask(Kind.OPEN, string(b"/file"), uint32(flags), NONE)  # noqa: E731
    assert ask(W | CREATE | EXCLUSIVE).status == (4, "file exists")
    handle = string(ask(0).data)
    assert sftp.ask(Kind.READ, handle, uint64(0), uint32(9)).data == b"data"
    assert sftp.ask(Kind.WRITE, handle, uint64(0), string(b"x")).code == Status.FAILURE
    handle = string(ask(W | APPEND).data)
    assert sftp.ask(Kind.WRITE, handle, uint64(0), string(b" more")).code == Status.OK
    assert store.get(b"/file") == b"data more"
    ask(W | TRUNCATE)
    assert store.get(b"/file") == b""
    ask(W | 0xFFFFFF00)


def test_offsetsThatCannotBe(sftp: SftpClient) -> None:
    """Beyond what any system has."""
    handle = sftp.open(b"file", R | W | CREATE)
    far = uint64(2**64 - 1)
    assert sftp.ask(Kind.READ, handle, far, uint32(1)).code == Status.BAD_MESSAGE
    assert sftp.ask(Kind.WRITE, handle, far, string(b"x")).code == Status.BAD_MESSAGE


# --- names -----------------------------------------------------------------------------------


def test_statAndAttributes(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Of a link and of what it leads to; the type among the permissions does no harm."""
    store.put(b"/file", b"data")
    assert sftp.ask(Kind.SYMLINK, string(b"/file"), string(b"/link")).code == Status.OK
    wanted = packAttributes(Attributes(size=2, mode=0o100600, atime=5.0, mtime=6.0))
    assert sftp.ask(Kind.SETSTAT, string(b"/link"), wanted).code == Status.OK
    stat, link = sftp.ask(Kind.STAT, string(b"/link")), sftp.ask(Kind.LSTAT, string(b"/link"))
    told = Attributes(
        size=2, uid=1000, gid=1000, mode=0o100600, atime=5.0, mtime=6.0
    )
    assert stat.rest == packAttributes(told)
    assert struct.unpack_from(">LQLLL", link.rest)[1:] == (5, 1000, 1000, 0o120777)
    wanted = packAttributes(Attributes(atime=7.0, mtime=8.0))
    assert sftp.ask(b"lsetstat@openssh.com", string(b"/link"), wanted).code == Status.OK
    assert sftp.ask(Kind.STAT, string(b"/link")).rest == stat.rest
    assert store.get(b"/file") == b"da"


def test_symlinkOrderIsOpenSSHs(sftp: SftpClient, store: MemoryFileStore) -> None:
    """The target comes first, whatever the draft says, and is as it was given."""
    assert sftp.ask(Kind.SYMLINK, string(b"../where ever"), string(b"name")).code == Status.OK
    ((target, longname, _),) = sftp.ask(Kind.READLINK, string(b"/home/joe/name")).names
    assert target == longname == b"../where ever"


def test_relativePaths(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Begin at the store's home, and an empty one is it."""
    store.put(b"/home/joe/file", b"")
    assert sftp.ask(Kind.STAT, string(b"file")).kind == Kind.ATTRS
    for path, real in ((b".", b"/home/joe"), (b"", b"/home/joe"), (b"..", b"/home"),
                       (b"/..", b"/"), (b"new", b"/home/joe/new")):  # fmt: skip
        ((name, _, attributes),) = sftp.ask(Kind.REALPATH, string(path)).names
        assert (name, attributes) == (real, Attributes())


def test_renames(sftp: SftpClient, store: MemoryFileStore) -> None:
    """RENAME does not replace; posix-rename does."""
    store.put(b"/one", b"1")
    store.put(b"/two", b"2")
    names = string(b"/one"), string(b"/two")
    assert sftp.ask(Kind.RENAME, *names).status == (4, "file exists")
    assert store.get(b"/two") == b"2"
    assert sftp.ask(b"posix-rename@openssh.com", *names).code == Status.OK
    assert store.get(b"/two") == b"1"
    assert sftp.ask(Kind.RENAME, *names).code == Status.NO_SUCH_FILE
    assert sftp.ask(Kind.RENAME, *reversed(names)).code == Status.OK


def test_directories(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Made, listed with their long names, refused while they hold something, removed."""
    assert sftp.ask(Kind.MKDIR, string(b"/d"), NONE).code == Status.OK
    assert sftp.ask(Kind.MKDIR, string(b"/d"), NONE).status == (4, "file exists")
    store.put(b"/d/\xff name", b"12345")
    handle = string(sftp.ask(Kind.OPENDIR, string(b"/d")).data)
    names = sftp.ask(Kind.READDIR, handle).names
    assert [name for name, _, _ in names] == [b".", b"..", b"\xff name"]
    assert names[2][1].startswith(b"-rw-r--r--   1 joe      users           5 ")
    assert names[2][2].size == 5
    for _ in range(2):
        assert sftp.ask(Kind.READDIR, handle).status == (1, "End of file")
    assert sftp.ask(Kind.CLOSE, handle).code == Status.OK
    assert sftp.ask(Kind.RMDIR, string(b"/d")).status == (4, "directory not empty")
    assert sftp.ask(Kind.REMOVE, string(b"/d")).code == Status.FAILURE
    assert sftp.ask(Kind.REMOVE, string(b"/d/\xff name")).code == Status.OK
    assert sftp.ask(Kind.RMDIR, string(b"/d")).code == Status.OK
    assert sftp.ask(Kind.OPENDIR, string(b"/d")).status == (2, "no such file")


def test_listingsAreBoundedInBytes(sftp: SftpClient, store: MemoryFileStore) -> None:
    """However long the names are and however many the store gives at once."""
    store.listedAtOnce = 10_000
    names = {b"%05d" % number + b"n" * 200 for number in range(2000)}
    for name in names:
        store.put(b"/home/joe/" + name, b"")
    handle = string(sftp.ask(Kind.OPENDIR, string(b".")).data)
    found = []
    for _ in range(100):
        answer = sftp.ask(Kind.READDIR, handle)
        if answer.kind == Kind.STATUS:
            break
        assert len(answer.rest) <= 64 * 1024 + 4
        found += [name for name, _, _ in answer.names]
    assert (answer.code, len(found), set(found) - {b".", b".."}) == (Status.EOF, 2002, names)


def test_oneNameThatIsTooLong(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Comes alone."""
    store.put(b"/home/joe/" + b"x" * 70_000, b"")
    handle = string(sftp.ask(Kind.OPENDIR, string(b".")).data)
    sizes = [len(sftp.ask(Kind.READDIR, handle).names) for _ in range(2)]
    assert sizes == [2, 1]


# --- extensions ------------------------------------------------------------------------------


def test_limits(sftp: SftpClient) -> None:
    """A packet, a READ, a WRITE, and how many handles."""
    answer = sftp.ask(b"limits@openssh.com")
    assert answer.kind == Kind.EXTENDED_REPLY
    assert struct.unpack(">4Q", answer.rest) == (262144, 261120, 261120, 256)


def test_filesystems(sftp: SftpClient) -> None:
    """By path and by handle the same."""
    handle = sftp.open(b"file", W | CREATE)
    answer = sftp.ask(b"statvfs@openssh.com", string(b"/"))
    assert struct.unpack(">11Q", answer.rest)[:3] == (4096, 4096, 1000)
    assert sftp.ask(b"fstatvfs@openssh.com", handle).rest == answer.rest


def test_linksAndSync(sftp: SftpClient, store: MemoryFileStore) -> None:
    """hardlink and fsync."""
    handle = sftp.open(b"file", W | CREATE)
    assert sftp.ask(b"fsync@openssh.com", handle).code == Status.OK
    assert sftp.ask(b"hardlink@openssh.com", string(b"file"), string(b"hard")).code == Status.OK
    sftp.ask(Kind.WRITE, handle, uint64(0), string(b"x"))
    assert store.get(b"/home/joe/hard") == b"x"


@pytest.mark.parametrize(
    ("path", "real"),
    [
        (b"~", b"/home/joe"), (b"~/a", b"/home/joe/a"), (b"~joe/a", b"/home/joe/a"),
        (b"a", b"/home/joe/a"), (b"/a", b"/a"), (b"~joe", b"/home/joe"),
    ],
)  # fmt: skip
def test_expandPath(sftp: SftpClient, path: bytes, real: bytes) -> None:
    """As the shell does with a tilde."""
    ((name, _, _),) = sftp.ask(b"expand-path@openssh.com", string(path)).names
    assert name == real


def test_homes(sftp: SftpClient) -> None:
    """One's own, by the empty name too; nobody's is an error."""
    for user in (b"joe", b""):
        ((name, _, _),) = sftp.ask(b"home-directory", string(user)).names
        assert name == b"/home/joe"
    assert sftp.ask(b"home-directory", string(b"jim")).status == (2, "no such user")
    assert sftp.ask(b"expand-path@openssh.com", string(b"~jim/x")).code == Status.NO_SUCH_FILE


def test_accounts(sftp: SftpClient) -> None:
    """Their names, and empty ones for those that nobody knows."""
    answer = sftp.ask(
        b"users-groups-by-id@openssh.com", string(uint32(1000) + uint32(5)), string(uint32(1000))
    )
    assert answer.rest == string(string(b"joe") + string(b"")) + string(string(b"users"))


def test_copies(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Part of a file, all of it, and not over itself."""
    store.put(b"/a", b"0123456789")
    one, two = sftp.open(b"/a", R | W), sftp.open(b"/b", W | CREATE)
    copy = lambda a, at, size, b, to: sftp.ask(  # noqa: E731
        b"copy-data", a, uint64(at), uint64(size), b, uint64(to)
    ).code
    assert copy(one, 2, 3, two, 1) == Status.OK
    assert store.get(b"/b") == b"\x00234"
    assert copy(one, 0, 0, two, 0) == Status.OK
    assert store.get(b"/b") == b"0123456789"
    assert copy(one, 0, 5, one, 5) == Status.OK
    assert copy(one, 0, 6, one, 5) == Status.BAD_MESSAGE
    assert copy(one, 0, 0, one, 50) == Status.BAD_MESSAGE


def test_copiesWhereTheStoreCannot(store: MemoryFileStore) -> None:
    """Are read and written here."""
    store._copy = lambda *arguments: (_ for _ in ()).throw(  # type: ignore[method-assign]
        FileStoreError(FileProblem.UNSUPPORTED)
    )
    sftp = SftpClient(store)
    store.put(b"/a", bytes(range(250)) * 4000)
    one, two = sftp.open(b"/a", R), sftp.open(b"/b", W | CREATE)
    answer = sftp.ask(b"copy-data", one, uint64(1), uint64(0), two, uint64(0))
    assert answer.code == Status.OK
    assert store.get(b"/b") == store.get(b"/a")[1:]
    store.delayed = True
    sftp.request(b"copy-data", one, uint64(0), uint64(10), two, uint64(5))
    while store.waiting:
        store.release()
    assert sftp.take()[0].code == Status.OK
    assert store.get(b"/b")[5:15] == bytes(range(10))


def test_unknownRequests(sftp: SftpClient) -> None:
    """Are answered."""
    assert sftp.ask(99, b"whatever").status == (8, "unknown request")
    assert sftp.ask(b"check-file\xff", b"x").status == (8, "unknown extension check-file\\xff")
    assert sftp.ask(Kind.DATA, string(b"x")).code == Status.OP_UNSUPPORTED


# --- order -----------------------------------------------------------------------------------


def test_readsAndWritesRunTogether(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Up to where what they do meets."""
    store.put(b"/file", b"0123456789")
    handle = sftp.open(b"/file", R | W)
    store.delayed = True
    for offset in range(3):
        sftp.request(Kind.WRITE, handle, uint64(offset), string(b"x"))
    assert len(store.waiting) == 3
    again = sftp.request(Kind.WRITE, handle, uint64(1), string(b"yy"))
    reading = sftp.request(Kind.READ, handle, uint64(0), uint32(4))
    assert len(store.waiting) == 3
    # Only the two that it meets are waited for.
    store.release(2)
    store.release(1)
    assert len(store.waiting) == 2
    store.release()
    store.release()
    assert [answer.id for answer in sftp.take()][-1] == again
    store.release()
    (answer,) = sftp.take()
    assert (answer.id, answer.data) == (reading, b"xyy3")


def test_appendsKeepTheirOrder(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Whatever their offsets say."""
    handle = sftp.open(b"/log", W | CREATE | APPEND)
    store.delayed = True
    for number in range(5):
        sftp.request(Kind.WRITE, handle, uint64(number), string(b"%d" % number))
        assert len(store.waiting) == 1
    for _ in range(5):
        store.release()
    assert store.get(b"/log") == b"01234"


def test_closeWaitsForWrites(sftp: SftpClient, store: MemoryFileStore) -> None:
    """And what is done with the name then waits for the close; others do not."""
    handle = sftp.open(b"/home/joe/file", W | CREATE)
    store.delayed = True
    for number in range(3):
        sftp.request(Kind.WRITE, handle, uint64(number), string(b"%d" % number))
    sftp.request(Kind.FSETSTAT, handle, packAttributes(Attributes(mode=0o600)))
    sftp.request(Kind.CLOSE, handle)
    sftp.request(Kind.RENAME, string(b"./file"), string(b"/other"))
    sftp.request(Kind.STAT, string(b"/other"))
    sftp.request(Kind.STAT, string(b"/elsewhere"))
    assert len(store.waiting) == 4
    store.release(3)
    assert sftp.take() == []
    for _ in range(3):
        assert len(store.waiting) > 0
        store.release(-1)
    for _ in range(4):
        assert len(store.waiting) == 1
        store.release()
    answers = sftp.take()
    assert [answer.id for answer in answers] == sorted(answer.id for answer in answers)
    assert answers[-2].kind == Kind.ATTRS
    assert answers[-1].code == Status.NO_SUCH_FILE
    assert store.get(b"/other") == b"012"


def test_namesKeepTheirOrder(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Making a directory, a file in it, looking at it; two looks are together."""
    store.delayed = True
    sftp.request(Kind.MKDIR, string(b"/d"), NONE)
    sftp.request(Kind.OPEN, string(b"/d/f"), uint32(W | CREATE), NONE)
    sftp.request(Kind.OPEN, string(b"/d/g"), uint32(W | CREATE), NONE)
    sftp.request(Kind.STAT, string(b"/d"))
    sftp.request(Kind.LSTAT, string(b"/d/f"))
    sftp.request(Kind.REMOVE, string(b"/dd"))
    counts = []
    while store.waiting:
        counts.append(len(store.waiting))
        store.release()
    assert counts == [2, 3, 2, 2, 2, 1]
    assert [answer.kind for answer in sftp.take()] == [
        Kind.STATUS, Kind.HANDLE, Kind.HANDLE, Kind.ATTRS, Kind.ATTRS, Kind.STATUS,
    ]  # fmt: skip


def test_answersKeepTheOrderOfRequests(sftp: SftpClient, store: MemoryFileStore) -> None:
    """A READ that is done early waits for those before it: OpenSSH's client cuts a file where
    replies overtake each other."""
    handle = sftp.open(b"/home/joe/file", W | CREATE | R)
    for number in range(4):
        sftp.request(Kind.WRITE, handle, uint64(number), string(b"%d" % number))
    sftp.take()
    store.delayed = True
    for number in range(4):
        sftp.request(Kind.READ, handle, uint64(number), uint32(1))
    for _ in range(3):
        store.release(-1)
        assert sftp.take() == []
    sftp.request(Kind.READ, b"\0\0\0\0", uint64(0), uint32(1))
    assert sftp.take() == []
    store.release()
    answers = sftp.take()
    assert [answer.kind for answer in answers] == [Kind.DATA] * 4 + [Kind.STATUS]
    assert [answer.id for answer in answers] == sorted(answer.id for answer in answers)


def test_aLongRowOfWaitingRequests(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Is done one after another, not one within another."""
    handle = sftp.open(b"/log", W | CREATE | APPEND)
    store.delayed = True
    for number in range(127):
        sftp.request(Kind.WRITE, handle, uint64(0), string(b"%d," % number))
    store.delayed = False
    store.release()
    assert [answer.code for answer in sftp.take()] == [0] * 127
    assert store.get(b"/log").split(b",")[:-1] == [b"%d" % number for number in range(127)]


def test_listingsAreReadInOrder(sftp: SftpClient, store: MemoryFileStore) -> None:
    """READDIRs that are sent together, as by sshfs."""
    store.listedAtOnce = 2
    handle = string(sftp.ask(Kind.OPENDIR, string(b"/home")).data)
    store.delayed = True
    for _ in range(4):
        sftp.request(Kind.READDIR, handle)
    sftp.request(Kind.CLOSE, handle)
    while store.waiting:
        assert len(store.waiting) == 1
        store.release()
    assert [answer.kind for answer in sftp.take()] == [Kind.NAME] * 2 + [Kind.STATUS] * 3


# --- bounds ----------------------------------------------------------------------------------


def test_requestsUnderWayAreBounded(sftp: SftpClient, store: MemoryFileStore) -> None:
    """In number; the rest is done when there is room."""
    store.delayed = True
    for number in range(1000):
        sftp.request(Kind.STAT, string(b"/%d" % number))
    assert len(store.waiting) == sftp_server.MAX_UNDER_WAY
    while store.waiting:
        store.release()
    assert len(sftp.take()) == 1000


def test_bytesUnderWayAreBounded(sftp: SftpClient, store: MemoryFileStore) -> None:
    """And the client's window stays closed meanwhile."""
    handle = sftp.open(b"/file", R | W | CREATE)
    store.delayed = True
    data = bytes(MAX_DATA_BYTES)
    sent = 0
    while sftp.channel.remoteWindow > len(data) + 100:
        sftp.request(Kind.WRITE, handle, uint64(sent), string(data))
        sent += len(data)
    assert sent < sftp_server.MAX_BYTES_UNDER_WAY + (4 << 20)
    held = sum(len(one[2][1]) for one in store.waiting)
    assert held < sftp_server.MAX_BYTES_UNDER_WAY + len(data)
    while store.waiting:
        store.release()
    assert {answer.code for answer in sftp.take()} == {Status.OK}
    assert len(store.get(b"/file")) == sent
    assert sftp.channel.remoteWindow > 1_900_000


def test_aStoreMayWantLessUnderWay(store: MemoryFileStore) -> None:
    """What a store does not want yet waits with the client."""
    store.bytesUnderWay = 500_000
    sftp = SftpClient(store)
    handle = sftp.open(b"/file", R | W | CREATE)
    store.delayed = True
    data = bytes(100_000)
    for number in range(10):
        sftp.request(Kind.WRITE, handle, uint64(number * len(data)), string(data))
    assert len(store.waiting) == 5
    while store.waiting:
        store.release()
    assert {answer.code for answer in sftp.take()} == {Status.OK}


def test_answersWaitForTheClient(store: MemoryFileStore) -> None:
    """A client that takes nothing makes us read no further, and gets all when it does."""
    sftp = SftpClient(store, window=1 << 16)
    store.put(b"/file", bytes(range(256)) * 4096)
    handle = sftp.open(b"/file")
    reads = [
        sftp.request(Kind.READ, handle, uint64(number * 1000), uint32(32768))
        for number in range(1000)
    ]
    assert sftp.server._answers.bytes < sftp_server.MAX_ANSWER_BYTES + 40_000
    got = sftp.take()
    while len(got) < len(reads):
        before = len(sftp.channel.output)
        sftp.client.adjust(sftp.channel, 10_007)
        assert len(sftp.channel.output) - before <= 10_007
        got += sftp.take()
    assert [answer.id for answer in got] == reads
    assert all(
        answer.data == store.get(b"/file")[number * 1000 :][:32768]
        for number, answer in enumerate(got)
    )


def test_aFullTransport(sftp: SftpClient, store: MemoryFileStore) -> None:
    """Nothing is lost when the transport takes none."""
    store.put(b"/file", bytes(3_000_000))
    handle = sftp.open(b"/file")
    sftp.client.pause()
    for number in range(90):
        sftp.request(Kind.READ, handle, uint64(number * 32768), uint32(32768))
    got = []
    for _ in range(200):
        sftp.client.resume(capacity=3)
        got += sftp.take()
    assert len(got) == 90


def test_answersOfATurnLeaveTogether(store: MemoryFileStore) -> None:
    """With a clock: also those that come one by one from the store."""
    clock = Clock()
    sftp = SftpClient(store)
    sftp.server._clock = clock
    store.delayed = True
    for number in range(20):
        sftp.request(Kind.STAT, string(b"/%d" % number))
    packets = len(sftp.channel.packets)
    for _ in range(20):
        store.release()
    assert sftp.take() == []
    clock.advance(0)
    assert len(sftp.take()) == 20
    assert len(sftp.channel.packets) == packets + 1
    assert not clock.getDelayedCalls()


# --- mistakes and attacks --------------------------------------------------------------------


def test_aStoreThatBreaks(
    sftp: SftpClient, store: MemoryFileStore, loggedFailures: LoggedFailures
) -> None:
    """Its mistakes are answered, and logged, and the session lives."""
    handle = sftp.open(b"/file", R | W | CREATE)

    def broken(*arguments: Any) -> Any:
        raise ZeroDivisionError

    (file,) = store.opened
    file.read = file.write = file.stat = broken  # type: ignore[union-attr,method-assign]
    store._node = broken  # type: ignore[method-assign]
    assert sftp.ask(Kind.READ, handle, uint64(0), uint32(5)).status == (4, "internal error")
    assert sftp.ask(Kind.WRITE, handle, uint64(0), string(b"x")).status == (4, "internal error")
    assert sftp.ask(Kind.FSTAT, handle).status == (4, "internal error")
    assert sftp.ask(Kind.STAT, string(b"/")).status == (4, "internal error")
    assert len(loggedFailures.flush(ZeroDivisionError)) == 4


def test_aStoreThatGivesTooMuch(sftp: SftpClient, store: MemoryFileStore) -> None:
    """A client never sees more than it asked for: most end the session for it."""
    handle = sftp.open(b"/file", R | W | CREATE)
    (file,) = store.opened
    file.read = lambda offset, length: b"x" * (length + 5)  # type: ignore[union-attr,method-assign]
    assert sftp.ask(Kind.READ, handle, uint64(0), uint32(5)).data == b"x" * 5


def test_aStoreThatAnswersWithSomethingElse(
    sftp: SftpClient, store: MemoryFileStore, loggedFailures: LoggedFailures
) -> None:
    """At once or later: a request has an answer all the same."""
    handle = sftp.open(b"/file", R | W | CREATE)
    (file,) = store.opened
    file.read = lambda offset, length: 5  # type: ignore[union-attr,method-assign]
    assert sftp.ask(Kind.READ, handle, uint64(0), uint32(5)).status == (4, "internal error")
    later: Deferred[Any] = Deferred()
    file.read = lambda offset, length: later  # type: ignore[union-attr,method-assign]
    sftp.request(Kind.READ, handle, uint64(0), uint32(5))
    later.callback(5)
    assert [answer.status for answer in sftp.take()] == [(4, "internal error")]
    assert len(loggedFailures.flush(TypeError)) == 2
    assert sftp.ask(Kind.CLOSE, handle).code == Status.OK


@pytest.mark.parametrize("problem", list(FileProblem))
def test_lateProblems(sftp: SftpClient, store: MemoryFileStore, problem: FileProblem) -> None:
    """Any, from READ and from WRITE, with their sentences."""
    handle = sftp.open(b"/file", R | W | CREATE)
    store.delayed = True
    sftp.request(Kind.READ, handle, uint64(0), uint32(5))
    store.waiting.pop()[0].errback(FileStoreError(problem, "why"))
    sftp.request(Kind.WRITE, handle, uint64(0), string(b"x"))
    store.waiting.pop()[0].errback(FileStoreError(problem))
    told = [answer.status for answer in sftp.take()]
    assert [text for _, text in told] == ["why", problem.value]
    assert all(code in set(Status) - {Status.OK, Status.EOF} for code, _ in told)


HANDLES = 4
PATHS = st.sampled_from([b"", b"/", b"a", b"/home/joe/a", b"b/c", b"../joe/b", b"/link", b"\xff\0"])
FIELD = st.one_of(
    PATHS.map(string),
    st.integers(0, HANDLES).map(lambda number: b"HANDLE%d" % number),
    st.integers(0, 40).map(uint32),
    st.integers(0, 70).map(uint64),
    st.sampled_from([uint32(2**32 - 1), uint64(2**64 - 1), NONE]),
    st.binary(max_size=20),
    st.binary(max_size=20).map(string),
)
WELL_MADE = st.one_of(
    st.tuples(st.just(Kind.OPEN), st.tuples(PATHS.map(string), st.integers(0, 63).map(uint32),
                                            st.just(NONE))),
    st.tuples(st.just(Kind.OPENDIR), st.tuples(PATHS.map(string))),
    st.tuples(st.sampled_from([Kind.CLOSE, Kind.READDIR, Kind.FSTAT]),
              st.tuples(st.integers(0, HANDLES).map(lambda number: b"HANDLE%d" % number))),
    st.tuples(st.sampled_from([Kind.WRITE, Kind.READ]),
              st.tuples(st.integers(0, HANDLES).map(lambda number: b"HANDLE%d" % number),
                        st.integers(0, 70).map(uint64), st.binary(max_size=50).map(string))),
    st.tuples(st.sampled_from([Kind.RENAME, Kind.SYMLINK, b"posix-rename@openssh.com"]),
              st.tuples(PATHS.map(string), PATHS.map(string))),
)  # fmt: skip
REQUESTS = st.lists(
    st.one_of(
        WELL_MADE,
        st.tuples(
            st.one_of(
                st.sampled_from([*(k for k in Kind if k != Kind.INIT), *OPENSSH, 0, 99, 255]),
                st.binary(max_size=10),
            ),
            st.lists(FIELD, max_size=5),
        ),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(REQUESTS, st.booleans(), st.randoms(use_true_random=False), st.integers(1, 70_000))
def test_oneAnswerForEachRequest(requests: Any, delayed: bool, random: Any, window: int) -> None:
    """Whatever is asked, in whatever order the store answers, whatever the client's window: each
    request has one answer, of a kind that belongs to it, and the session ends with status 0."""
    store = MemoryFileStore()
    sftp = SftpClient(store, window=4096)
    sftp.client.adjust(sftp.channel, window)
    for name in b"abcd":
        store.put(b"/home/joe/" + bytes([name]), b"0123456789" * 4)
    handles = [sftp.open(b"/home/joe/" + bytes([name]), R | W) for name in b"abc"]
    handles += [string(sftp.ask(Kind.OPENDIR, string(b"/")).data), string(b"no handle")]
    store.delayed = delayed
    sent: dict[int, int | bytes] = {}
    answers = []
    for kind, fields in requests:
        body = [
            handles[int(field[6:])] if field.startswith(b"HANDLE") else field for field in fields
        ]
        sent[sftp.request(kind, *body)] = kind
        if store.waiting and random.random() < 0.4:
            store.release(random.randrange(len(store.waiting)))
        answers += sftp.take()
    sftp.client.eof(sftp.channel)
    while not sftp.channel.closed:
        if store.waiting:
            store.release(random.randrange(len(store.waiting)))
        else:
            sftp.client.adjust(sftp.channel, 5000)
        answers += sftp.take()
    answers += sftp.take()
    assert sorted(answer.id for answer in answers) == sorted(sent)
    for answer in answers:
        kind = sent[answer.id]
        if answer.kind == Kind.STATUS:
            assert answer.code in set(Status)
        else:
            assert {
                Kind.OPEN: Kind.HANDLE, Kind.OPENDIR: Kind.HANDLE, Kind.READ: Kind.DATA,
                Kind.READDIR: Kind.NAME, Kind.READLINK: Kind.NAME, Kind.REALPATH: Kind.NAME,
                Kind.STAT: Kind.ATTRS, Kind.LSTAT: Kind.ATTRS, Kind.FSTAT: Kind.ATTRS,
                b"expand-path@openssh.com": Kind.NAME, b"home-directory": Kind.NAME,
            }.get(kind, Kind.EXTENDED_REPLY) == answer.kind  # fmt: skip
    assert ("exit-status", b"\0\0\0\0") in sftp.channel.events
    assert not sftp.channel.output
    assert not sftp.channel.errors


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 50))
def test_anyBytes(data: bytes, step: int) -> None:
    """End the session in order, or leave it waiting for more; never in an exception."""
    sftp = SftpClient(MemoryFileStore())
    for start in range(0, len(data), step):
        if not sftp.channel.closed:
            sftp.send(data[start : start + step])
    if not sftp.channel.closed:
        sftp.client.eof(sftp.channel)
    statuses = [event[1] for event in sftp.channel.events if isinstance(event, tuple)]
    assert statuses in ([b"\0\0\0\0"], [b"\0\0\0\x0b"])


class Turns(Clock):
    """A clock on which what is called later is not called in the same turn."""

    def callLater(self, when: float, *call: Any, **options: Any) -> Any:
        return super().callLater(when + 1, *call, **options)

    def turn(self) -> None:
        self.advance(1)


def test_othersHaveTheirTurn(store: MemoryFileStore) -> None:
    """A window full of small requests is begun in portions, and ends as any."""
    clock = Turns()
    sftp = SftpClient(store)
    sftp.server._clock = clock
    count = sftp_server.MAX_BEGUN_AT_ONCE
    sftp.client.pause()
    store.delayed = True
    sftp.request(Kind.STAT, string(b"/"))
    for _ in range(2):
        sftp.send(frame(200, 5, string(b"limits@openssh.com")) * (2 * count))
    sftp.client.resume()
    store.delayed = False
    store.release()
    sftp.client.eof(sftp.channel)
    portions = []
    while clock.getDelayedCalls():
        clock.turn()
        portions.append(len(sftp.take()))
    assert sum(portions) == 4 * count + 1
    # The answers that had waited, those of the turn at the end of input, and of one more.
    assert max(portions) <= 3 * count
    assert sftp.channel.closed


def test_longCopiesGiveWay(store: MemoryFileStore) -> None:
    """One that never ends does not keep others waiting, and ends with the client."""
    clock = Turns()
    sftp = SftpClient(store)
    sftp.server._requests._clock = clock
    store._copy = lambda *arguments: (_ for _ in ()).throw(  # type: ignore[method-assign]
        FileStoreError(FileProblem.UNSUPPORTED)
    )
    one, two = sftp.open(b"/a", R | CREATE), sftp.open(b"/b", W | CREATE)
    (zero,) = [file for file in store.opened if file.flags & R]  # type: ignore[union-attr]
    zero.read = lambda offset, length: b"x" * 10  # type: ignore[union-attr,method-assign]
    sftp.request(b"copy-data", one, uint64(0), uint64(0), two, uint64(0))
    for _ in range(10):
        clock.turn()
    assert sftp.take() == []
    sftp.client.close(sftp.channel)
    assert not clock.getDelayedCalls()
    assert len(store.get(b"/b")) == 110
