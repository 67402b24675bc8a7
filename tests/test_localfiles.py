"""One set of expectations for every store that is on this machine, alone and wrapped."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, maybeDeferred
from zope.interface.verify import verifyObject

from conchkernel.filepolicies import JailedFileStore
from conchkernel.files import (
    Attributes,
    FileProblem,
    FileStoreError,
    IFileStore,
    IListing,
    IOpenFile,
    OpenFlag,
)
from conchkernel.localfiles import DirectoryFileStore
from conchkernel.memoryfiles import MemoryFileStore
from conchkernel.sftp import _PROBLEMS, ServerStore, StoreServer, storeOf
from conchkernel.ssh.sftp_status import CODES

if TYPE_CHECKING:
    from pathlib import Path

R, W = OpenFlag.READ, OpenFlag.WRITE
NEW = W | OpenFlag.CREATE
NONE = Attributes()


@pytest.fixture(params=["disk", "threads", "memory", "jail", "jailed memory", "conch"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Each kind, with its home empty."""
    if request.param == "memory":
        return MemoryFileStore()
    if request.param == "jailed memory":
        memory = MemoryFileStore()
        return JailedFileStore(memory, memory.home)
    if request.param == "conch":
        # There and back again.
        return storeOf(StoreServer(MemoryFileStore())).result
    disk = DirectoryFileStore(tmp_path, reactor if request.param == "threads" else None)
    return JailedFileStore(disk, os.fsencode(tmp_path)) if request.param == "jail" else disk


def at(store: Any, name: bytes) -> bytes:
    """A path in the store's home."""
    return store.home.rstrip(b"/") + b"/" + name


class Problem:
    """What a store said."""

    def __init__(self, problem: FileProblem) -> None:
        self._problem = problem

    def among(self, *wanted: FileProblem) -> bool:
        """Whether it is one of these, or what is left of one after a trip through a code of
        version 3."""
        codes = {CODES[one] for one in wanted}
        return self._problem in wanted or self._problem in {
            _PROBLEMS.get(code, FileProblem.FAILURE) for code in codes
        }


async def problem(doing: Deferred[Any]) -> Problem:
    """What a store said."""
    with pytest.raises(FileStoreError) as caught:
        await doing
    return Problem(caught.value.problem)


async def put(store: Any, name: bytes, data: bytes) -> None:
    """Have a file."""
    file = await store.open(at(store, name), NEW | OpenFlag.TRUNCATE, NONE)
    await maybeDeferred(file.write, 0, data)
    await file.close()


async def get(store: Any, name: bytes) -> bytes:
    """A file's bytes."""
    file = await store.open(at(store, name), R, NONE)
    data = await maybeDeferred(file.read, 0, 1 << 16)
    await file.close()
    return bytes(data)


@pytest_twisted.ensureDeferred
async def test_interfaces(store: Any) -> None:
    """Are provided whole."""
    verifyObject(IFileStore, store)
    await put(store, b"file", b"")
    file = await store.open(at(store, b"file"), R, NONE)
    verifyObject(IOpenFile, file)
    verifyObject(IListing, await store.listDirectory(store.home))
    await store.close()


@pytest_twisted.ensureDeferred
async def test_readingAndWriting(store: Any) -> None:
    """At any offset, also behind the end."""
    file = await store.open(at(store, b"file"), R | NEW, Attributes(mode=0o640))
    await maybeDeferred(file.write, 5, b"world")
    await maybeDeferred(file.write, 0, b"hello")
    assert await maybeDeferred(file.read, 0, 100) == b"helloworld"
    assert await maybeDeferred(file.read, 8, 1) == b"l"
    assert await maybeDeferred(file.read, 10, 5) == b""
    assert await maybeDeferred(file.read, 1 << 40, 5) == b""
    told = await file.stat()
    assert told.size == 10
    assert stat.S_ISREG(told.mode)
    assert stat.S_IMODE(told.mode) == 0o640
    await file.setAttributes(Attributes(size=4, mode=0o600, atime=5.0, mtime=6.0))
    told = await file.stat()
    assert (told.size, stat.S_IMODE(told.mode), told.mtime) == (4, 0o600, 6.0)
    if "sync" in store.features:
        await file.sync()
    if "statvfs" in store.features:
        assert (await file.filesystem()).name_max == 255
    await file.close()
    assert await get(store, b"file") == b"hell"


@pytest_twisted.ensureDeferred
async def test_openFlags(store: Any) -> None:
    """As open(2) has them."""
    path = at(store, b"file")
    assert (await problem(store.open(path, R, NONE))).among(FileProblem.NOT_FOUND)
    await put(store, b"file", b"data")
    exclusive = NEW | OpenFlag.EXCLUSIVE
    assert (await problem(store.open(path, exclusive, NONE))).among(FileProblem.EXISTS)
    assert (await problem(store.open(store.home, R, NONE))).among(FileProblem.IS_DIRECTORY)
    below = at(store, b"file/below")
    assert (await problem(store.open(below, R, NONE))).among(FileProblem.NOT_DIRECTORY)
    file = await store.open(path, W | OpenFlag.APPEND, NONE)
    await maybeDeferred(file.write, 0, b" more")
    await file.close()
    assert await get(store, b"file") == b"data more"
    file = await store.open(path, W | OpenFlag.TRUNCATE, NONE)
    assert (await problem(maybeDeferred(file.read, 0, 1))).among(FileProblem.FAILURE)
    await file.close()
    assert await get(store, b"file") == b""


@pytest_twisted.ensureDeferred
async def test_listing(store: Any) -> None:
    """Every name once, whatever its bytes, with its attributes."""
    names = {b"%d" % number for number in range(450)} | {b"\xff\xfe", "ä ö".encode(), b"a\nb"}
    for name in names:
        await put(store, name, name)
    await store.makeDirectory(at(store, b"directory"), Attributes(mode=0o700))
    listing = await store.listDirectory(store.home)
    found = {}
    while entries := await listing.next():
        for entry in entries:
            assert entry.name not in found
            found[entry.name] = entry.attributes
    assert not await listing.next()
    await listing.close()
    assert set(found) == names | {b".", b"..", b"directory"}
    assert all(found[name].size == len(name) for name in names)
    assert stat.S_ISDIR(found[b"directory"].mode)
    assert found[b"0"].owner
    assert (await problem(store.listDirectory(at(store, b"no")))).among(FileProblem.NOT_FOUND)
    assert (await problem(store.listDirectory(at(store, b"0")))).among(FileProblem.NOT_DIRECTORY)


@pytest_twisted.ensureDeferred
async def test_directories(store: Any) -> None:
    """Made once, removed when they are empty, and by nothing else."""
    path = at(store, b"d")
    await store.makeDirectory(path, NONE)
    assert (await problem(store.makeDirectory(path, NONE))).among(FileProblem.EXISTS)
    await put(store, b"d/file", b"")
    assert (await problem(store.removeDirectory(path))).among(FileProblem.NOT_EMPTY)
    assert (await problem(store.remove(path))).among(FileProblem.IS_DIRECTORY)
    removing = store.removeDirectory(at(store, b"d/file"))
    assert (await problem(removing)).among(FileProblem.NOT_DIRECTORY)
    await store.remove(at(store, b"d/file"))
    await store.removeDirectory(path)
    assert (await problem(store.stat(path))).among(FileProblem.NOT_FOUND)


@pytest_twisted.ensureDeferred
async def test_renaming(store: Any) -> None:
    """With and without replacing; files and directories."""
    one, two = at(store, b"one"), at(store, b"two")
    await put(store, b"one", b"1")
    await put(store, b"two", b"2")
    assert (await problem(store.rename(one, two, overwrite=False))).among(FileProblem.EXISTS)
    assert await get(store, b"two") == b"2"
    await store.rename(one, two, overwrite=True)
    assert await get(store, b"two") == b"1"
    await store.rename(two, one, overwrite=False)
    assert await get(store, b"one") == b"1"
    missing = await problem(store.rename(two, one, overwrite=False))
    assert missing.among(FileProblem.NOT_FOUND, FileProblem.EXISTS)
    await store.makeDirectory(two, NONE)
    assert (await problem(store.rename(one, two, overwrite=False))).among(FileProblem.EXISTS)
    await store.rename(two, at(store, b"three"), overwrite=False)


@pytest_twisted.ensureDeferred
async def test_links(store: Any) -> None:
    """Are as they were made; what is done goes to where they lead, or to them."""
    link = at(store, b"link")
    await put(store, b"file", b"data")
    await store.symbolicLink(b"./file", link)
    assert await store.readLink(link) == b"./file"
    assert stat.S_ISLNK((await store.stat(link, follow=False)).mode)
    assert (await store.stat(link)).size == 4
    assert await get(store, b"link") == b"data"
    assert await store.realPath(link) == at(store, b"file")
    await store.setAttributes(link, Attributes(size=2))
    assert await get(store, b"file") == b"da"
    assert (await problem(store.readLink(at(store, b"file")))).among(FileProblem.INVALID)
    await store.hardLink(at(store, b"file"), at(store, b"hard"))
    await store.remove(at(store, b"file"))
    assert await get(store, b"hard") == b"da"
    assert (await problem(store.stat(link))).among(FileProblem.NOT_FOUND)
    await store.symbolicLink(b"loop", at(store, b"loop"))
    assert (await problem(store.stat(at(store, b"loop")))).among(FileProblem.LOOP)
    await store.remove(link)


@pytest_twisted.ensureDeferred
async def test_realPath(store: Any) -> None:
    """From the home on; the last name may be missing, others not."""
    home = store.home.rstrip(b"/")
    await store.makeDirectory(at(store, b"d"), NONE)
    for path, real in (
        (b".", home or b"/"), (b"d/..", home or b"/"), (b"d/./new", home + b"/d/new"),
        (b"/", b"/"), (b"/..", b"/"), (home + b"//d/", home + b"/d"),
    ):  # fmt: skip
        assert await store.realPath(path) == real
    assert (await problem(store.realPath(b"no/such"))).among(FileProblem.NOT_FOUND)


@pytest_twisted.ensureDeferred
async def test_timesAndModes(store: Any) -> None:
    """By path."""
    await put(store, b"file", b"data")
    path = at(store, b"file")
    await store.setAttributes(path, Attributes(mode=0o4711, atime=5.0, mtime=1e9))
    told = await store.stat(path)
    assert (stat.S_IMODE(told.mode), told.atime, told.mtime) == (0o4711, 5.0, 1e9)
    await store.setAttributes(path, Attributes(uid=told.uid, gid=told.gid))
    if "statvfs" in store.features:
        assert (await store.filesystem(path)).blocks > 0


@pytest_twisted.ensureDeferred
async def test_copies(store: Any) -> None:
    """Whole or in part, if the store has a way of its own."""
    await put(store, b"a", bytes(range(200)))
    source = await store.open(at(store, b"a"), R, NONE)
    target = await store.open(at(store, b"b"), NEW, NONE)
    if isinstance(store, ServerStore):
        # Conch has no words for it.
        copying = store.copy(source, 10, 5, target, 2)
        assert (await problem(copying)).among(FileProblem.UNSUPPORTED)
        return
    await store.copy(source, 10, 5, target, 2)
    await store.copy(source, 100, 0, target, 7)
    await store.close()
    data = bytes(range(200))
    assert await get(store, b"b") == b"\0\0" + data[10:15] + data[100:]


@pytest_twisted.ensureDeferred
async def test_accounts(store: Any) -> None:
    """As many names as were asked for; one's own home."""
    users, groups = await store.names([0, 2**32 - 2], [0, 1, 2**32 - 2])
    assert (len(users), len(groups)) == (2, 3)
    assert (users[1], groups[2]) == ("", "")
    assert await store.homeOf(b"") == store.home
    assert await store.homeOf(b"nobody of this name \xff") == b""


@pytest_twisted.ensureDeferred
async def test_closeLeavesNothingOpen(tmp_path: Path) -> None:
    """No descriptor, whatever was open."""
    before = len(os.listdir("/proc/self/fd"))
    store = DirectoryFileStore(tmp_path)
    await put(store, b"file", b"")
    for _ in range(5):
        await store.open(at(store, b"file"), R, NONE)
        await store.listDirectory(store.home)
    await store.close()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert not store.opened


@pytest_twisted.ensureDeferred
async def test_pipesDoNotBlock(tmp_path: Path) -> None:
    """A FIFO without another end does not stop the gateway."""
    os.mkfifo(tmp_path / "fifo")
    store = DirectoryFileStore(tmp_path)
    file = await store.open(at(store, b"fifo"), R, NONE)
    assert (await problem(maybeDeferred(file.read, 0, 1))).among(FileProblem.FAILURE)
    await file.close()
    assert (await problem(store.open(at(store, b"fifo"), W, NONE))).among(FileProblem.FAILURE)
    await store.close()


@pytest.mark.parametrize("threads", [False, True])
@pytest_twisted.ensureDeferred
async def test_numbersThatTheSystemDoesNotHave(threads: bool, tmp_path: Path) -> None:
    """SFTP's numbers have more bits than the system's: such a one is refused, and is no failure
    of ours."""
    store = DirectoryFileStore(tmp_path, reactor if threads else None)
    path = os.fsencode(tmp_path / "file")
    file = await store.open(path, R | NEW, NONE)
    before = os.stat(path)
    for doing in (
        lambda: store.setAttributes(path, Attributes(size=2**64 - 1)),
        lambda: file.setAttributes(Attributes(size=2**63)),
        lambda: store.copy(file, 2**64 - 1, 1, file, 0),
        lambda: store.copy(file, 0, 1, file, 2**64 - 1),
        lambda: maybeDeferred(file.read, 2**63, 1),
        lambda: maybeDeferred(file.write, 2**63, b"x"),
    ):
        with pytest.raises(FileStoreError) as caught:
            await doing()
        assert caught.value.problem is FileProblem.INVALID
    # chown(2) takes this one for "as it is".
    await store.setAttributes(path, Attributes(uid=2**32 - 1, gid=2**32 - 1))
    after = os.stat(path)
    assert (after.st_uid, after.st_gid, after.st_size) == (before.st_uid, before.st_gid, 0)
    await file.close()
