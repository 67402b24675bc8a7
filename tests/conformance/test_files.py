"""What every store of files does, whichever it is: the same behaviour on each of them.

A store joins by a line in ``ROADS`` and says by its features what it cannot do.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    DeferredList,
    gatherResults,
    maybeDeferred,
)
from zope.interface.verify import verifyObject

from conchkernel.files import (
    Attributes,
    FileProblem,
    FileStoreError,
    IFileStore,
    IListing,
    IOpenFile,
    OpenFlag,
)
from conchkernel.interfaces import ProcessRequest
from conchkernel.jupyter.backends import JupyterBackend
from conchkernel.loopback import LoopbackBackend

from ..collector import Collector
from ..pythons import oldest
from .poorhost import PRELUDE

READ = OpenFlag.READ
WRITE = OpenFlag.WRITE
NEW = OpenFlag.WRITE | OpenFlag.CREATE | OpenFlag.TRUNCATE
NOTHING = Attributes()
ROADS = ["agent-loopback", "agent-old", "agent-poor", "agent-jupyter"]
MIB = 1024 * 1024


@dataclass
class Place:
    """A store and an empty directory in it.

    :ivar base: its path in the store.
    :ivar host: the same directory, seen from here.
    :ivar backend: where the store comes from.
    :ivar link: the use of it that gave the store.
    """

    store: Any
    base: bytes
    host: Path
    backend: Any
    link: Any

    def path(self, name: bytes) -> bytes:
        return self.base + b"/" + name

    async def put(self, name: bytes, data: bytes) -> bytes:
        """Make a file; returns its path."""
        file = await self.store.open(self.path(name), NEW, NOTHING)
        for start in range(0, len(data), 32768):
            await file.write(start, data[start : start + 32768])
        await file.close()
        return self.path(name)

    async def get(self, name: bytes) -> bytes:
        """The content of a file."""
        file = await self.store.open(self.path(name), READ, NOTHING)
        data = b""
        while piece := await read(file, len(data), 200_000):
            data += piece
        await file.close()
        return data

    async def names(self, name: bytes = b"") -> list[bytes]:
        """What a directory holds, sorted, without itself and the one above."""
        return sorted(entry.name for entry in await self.entries(name))

    async def entries(self, name: bytes = b"") -> list[Any]:
        listing = await self.store.listDirectory(self.path(name))
        found = []
        while piece := await listing.next():
            found += piece
        assert not await listing.next()
        await listing.close()
        return [entry for entry in found if entry.name not in (b".", b"..")]


async def read(file, offset, length):
    """What a file gives, at once or later."""
    return await maybeDeferred(file.read, offset, length)


@contextmanager
def problem(*expected: FileProblem):
    """What is inside fails with one of these, and with a text."""
    with pytest.raises(FileStoreError) as caught:
        yield
    assert caught.value.problem in expected, caught.value
    assert str(caught.value)


@pytest.fixture(params=ROADS, scope="module")
def road(request, tmp_path_factory):
    """A started backend."""
    if request.param == "agent-loopback":
        made: Any = LoopbackBackend(reactor)
    elif request.param == "agent-old":
        made = LoopbackBackend(reactor, python=oldest())
    elif request.param == "agent-poor":
        made = LoopbackBackend(reactor, prelude=PRELUDE)
    else:
        server = request.getfixturevalue("jupyters")["current"]
        made = JupyterBackend(reactor, server.pasted, state_dir=tmp_path_factory.mktemp("state"))
    pytest_twisted.blockon(Deferred.fromCoroutine(made.start()))
    yield made
    pytest_twisted.blockon(Deferred.fromCoroutine(made.stop()))


@pytest.fixture
def place(road, tmp_path):
    """A store of the road's, and a fresh directory in it."""
    link = pytest_twisted.blockon(road.connect("owner"))
    store = pytest_twisted.blockon(link.openFiles(None, False))
    yield Place(store, os.fsencode(tmp_path), tmp_path, road, link)
    pytest_twisted.blockon(store.close())
    link.release()


@pytest_twisted.ensureDeferred
async def test_it_is_what_the_interfaces_say(place):
    """Stores, files and listings have what the contract names."""
    verifyObject(IFileStore, place.store)
    file = await place.store.open(place.path(b"f"), NEW | READ, NOTHING)
    verifyObject(IOpenFile, file)
    await file.close()
    listing = await place.store.listDirectory(place.base)
    verifyObject(IListing, listing)
    await listing.close()
    assert place.store.home.startswith(b"/")


@pytest.mark.parametrize("size", [0, 1, 4096, 32768, 261_120, 1_000_001])
@pytest_twisted.ensureDeferred
async def test_bytes_come_back_as_they_went(place, size):
    """Every byte value, at sizes around the edges."""
    data = random.Random(size).randbytes(size)
    await place.put(b"file", data)
    assert (place.host / "file").read_bytes() == data
    assert await place.get(b"file") == data
    assert (await place.store.stat(place.path(b"file"))).size == size


@pytest_twisted.ensureDeferred
async def test_one_large_write_and_one_large_read(place):
    """A write is whole whatever its size; a read may be short but is not empty before the end."""
    data = os.urandom(3 * MIB)
    file = await place.store.open(place.path(b"file"), NEW | READ, NOTHING)
    await file.write(0, data)
    assert data.startswith(await read(file, 0, len(data)) or b"nothing")
    assert await read(file, len(data), 10) == b""
    assert await read(file, len(data) + 10**9, 10) == b""
    assert await read(file, len(data) - 3, 10) == data[-3:]
    await file.close()
    assert (place.host / "file").read_bytes() == data


@pytest_twisted.ensureDeferred
async def test_requests_overlap_and_keep_their_order(place):
    """Hundreds of writes and reads of one file under way at once."""
    file = await place.store.open(place.path(b"file"), NEW | READ, NOTHING)
    pieces = [bytes([n % 256]) * 1000 for n in range(500)]
    order = list(range(500))
    random.Random(1).shuffle(order)
    waiting = [file.write(n * 1000, pieces[n]) for n in order]
    waiting += [file.write(0, b"last" * 250)]
    reads = [file.read(n * 1000, 1000) for n in range(500)]
    await gatherResults(waiting)
    pieces[0] = b"last" * 250
    assert b"".join(await gatherResults(reads)) == b"".join(pieces)
    await file.close()


@pytest_twisted.ensureDeferred
async def test_appending(place):
    """With APPEND each write goes to the end, whatever its offset says."""
    await place.put(b"log", b"one\n")
    file = await place.store.open(place.path(b"log"), WRITE | OpenFlag.APPEND, NOTHING)
    await file.write(0, b"two\n")
    (place.host / "log").open("ab").write(b"other\n")
    await file.write(0, b"three\n")
    await file.close()
    assert await place.get(b"log") == b"one\ntwo\nother\nthree\n"


@pytest_twisted.ensureDeferred
async def test_creating_and_truncating(place):
    """EXCLUSIVE makes a file once; TRUNCATE empties; neither WRITE alone does."""
    exclusive = WRITE | OpenFlag.CREATE | OpenFlag.EXCLUSIVE
    with problem(FileProblem.NOT_FOUND):
        await place.store.open(place.path(b"file"), WRITE, NOTHING)
    await (await place.store.open(place.path(b"file"), exclusive, NOTHING)).close()
    with problem(FileProblem.EXISTS):
        await place.store.open(place.path(b"file"), exclusive, NOTHING)
    await place.put(b"file", b"long content")
    file = await place.store.open(place.path(b"file"), WRITE, NOTHING)
    await file.write(0, b"LONG")
    await file.setAttributes(Attributes(size=6))
    assert (await file.stat()).size == 6
    await file.close()
    assert await place.get(b"file") == b"LONG c"
    await place.store.setAttributes(place.path(b"file"), Attributes(size=8))
    assert await place.get(b"file") == b"LONG c\0\0"
    await place.store.setAttributes(place.path(b"file"), Attributes(size=0))
    assert await place.get(b"file") == b""


@pytest_twisted.ensureDeferred
async def test_reading_what_is_open_for_writing_only(place):
    """And the other way round: refused, not done."""
    await place.put(b"file", b"content")
    file = await place.store.open(place.path(b"file"), WRITE, NOTHING)
    with problem(FileProblem.PERMISSION, FileProblem.INVALID):
        await read(file, 0, 10)
    await file.close()
    file = await place.store.open(place.path(b"file"), READ, NOTHING)
    with problem(FileProblem.PERMISSION, FileProblem.INVALID):
        await file.write(0, b"x")
    await file.close()
    with problem(*FileProblem):
        await read(file, 0, 10)


@pytest_twisted.ensureDeferred
async def test_large_offsets_and_holes(place):
    """Beyond 4 GiB, with a hole that takes no space; offsets that no file has are an error."""
    offset = 5 * 2**30 + 7
    file = await place.store.open(place.path(b"sparse"), NEW | READ, NOTHING)
    await file.write(offset, b"far")
    assert await read(file, offset - 4, 100) == b"\0\0\0\0far"
    assert (await file.stat()).size == offset + 3
    with problem(*FileProblem):
        await read(file, 2**64 - 1, 10)
    with problem(*FileProblem):
        await file.write(2**63, b"x")
    await file.close()
    assert (place.host / "sparse").stat().st_blocks < 2**20


ODD_NAMES = [
    b" ", b" leading and trailing ", b"new\nline", b"tab\there", b"%2e%2e%2f", b"#?&=;", b"-rf",
    b"*", b"~", b"back\\slash", b'"quotes"', b"...", "Grüße 漢字 🦆".encode(),
    b"\xff\xfe latin \xe9",
    bytes(range(1, 47)) + bytes(range(48, 128)), bytes(range(128, 256)), b"n" * 255,
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest_twisted.ensureDeferred
async def test_names_are_bytes(place, name):
    """A name is any bytes but NUL and slash, in every operation."""
    await place.put(name, b"content")
    host = os.fsencode(place.host)
    assert os.listdir(host) == [name]
    assert await place.names() == [name]
    assert await place.get(name) == b"content"
    path = place.path(name)
    assert await place.store.realPath(path) == path
    await place.store.rename(path, place.path(b"x"), overwrite=False)
    await place.store.rename(place.path(b"x"), path, overwrite=False)
    if "links" in place.store.features:
        await place.store.symbolicLink(name, place.path(b"link"))
        assert await place.store.readLink(place.path(b"link")) == name
        assert await place.get(b"link") == b"content"
        await place.store.remove(place.path(b"link"))
    await place.store.remove(path)
    await place.store.makeDirectory(path, NOTHING)
    await place.put(name + b"/inner", b"")
    assert await place.names(name) == [b"inner"]


@pytest_twisted.ensureDeferred
async def test_names_that_are_too_long(place):
    """A component of 256 bytes, a path of many thousands: told as such."""
    for path in (place.path(b"n" * 256), place.base + b"/d" * 30_000):
        with problem(FileProblem.NAME_TOO_LONG):
            await place.store.stat(path)
        with problem(FileProblem.NAME_TOO_LONG):
            await place.store.open(path, NEW, NOTHING)
        with problem(FileProblem.NAME_TOO_LONG):
            await place.store.makeDirectory(path, NOTHING)
        with problem(FileProblem.NAME_TOO_LONG):
            await place.store.rename(path, place.path(b"x"), overwrite=True)
    with problem(FileProblem.NAME_TOO_LONG):
        await place.store.rename(b"/" * 100_000, b"/" * 200_000, overwrite=True)
    with problem(FileProblem.NAME_TOO_LONG):
        await place.store.stat(b"/" * 300_000)
    with problem(FileProblem.INVALID, FileProblem.NOT_FOUND):
        await place.store.stat(place.path(b"a\0b"))


@pytest_twisted.ensureDeferred
async def test_problems_are_named(place):
    """Each mistake has its own name, not one for all."""
    store, path = place.store, place.path
    await place.put(b"file", b"")
    await store.makeDirectory(path(b"full"), NOTHING)
    await place.put(b"full/inner", b"")
    for request, expected in (
        (lambda: store.stat(path(b"none")), FileProblem.NOT_FOUND),
        (lambda: store.open(path(b"none"), READ, NOTHING), FileProblem.NOT_FOUND),
        (lambda: store.open(path(b"none/x"), NEW, NOTHING), FileProblem.NOT_FOUND),
        (lambda: store.remove(path(b"none")), FileProblem.NOT_FOUND),
        (lambda: store.removeDirectory(path(b"none")), FileProblem.NOT_FOUND),
        (lambda: store.listDirectory(path(b"none")), FileProblem.NOT_FOUND),
        (lambda: store.rename(path(b"none"), path(b"x"), overwrite=True), FileProblem.NOT_FOUND),
        (lambda: store.realPath(path(b"none/x")), FileProblem.NOT_FOUND),
        (lambda: store.setAttributes(path(b"none"), Attributes(size=1)), FileProblem.NOT_FOUND),
        (lambda: store.makeDirectory(path(b"file"), NOTHING), FileProblem.EXISTS),
        (lambda: store.makeDirectory(path(b"full"), NOTHING), FileProblem.EXISTS),
        (lambda: store.stat(path(b"file/x")), FileProblem.NOT_DIRECTORY),
        (lambda: store.listDirectory(path(b"file")), FileProblem.NOT_DIRECTORY),
        (lambda: store.removeDirectory(path(b"file")), FileProblem.NOT_DIRECTORY),
        (lambda: store.open(path(b"full"), READ, NOTHING), FileProblem.IS_DIRECTORY),
        (lambda: store.open(path(b"full"), WRITE, NOTHING), FileProblem.IS_DIRECTORY),
        (lambda: store.removeDirectory(path(b"full")), FileProblem.NOT_EMPTY),
    ):
        with problem(expected):
            await request()
    with problem(FileProblem.IS_DIRECTORY, FileProblem.PERMISSION, FileProblem.FAILURE):
        await store.remove(path(b"full"))
    assert await place.names() == [b"file", b"full"]


@pytest_twisted.ensureDeferred
async def test_what_nobody_may_do(place):
    """Permission denied is told, and by root's account too."""
    with problem(FileProblem.PERMISSION):
        await place.store.remove(b"/proc/version")
    if os.geteuid() == 0:
        sealed = b"/sys/kernel/uevent_seqnum"
    else:
        sealed = await place.put(b"sealed", b"")
        (place.host / "sealed").chmod(0)
    with problem(FileProblem.PERMISSION):
        await place.store.open(sealed, WRITE, NOTHING)


@pytest_twisted.ensureDeferred
async def test_a_full_device(place):
    """No space is an error of the write that met it."""
    file = await place.store.open(b"/dev/full", WRITE, NOTHING)
    with problem(FileProblem.NO_SPACE):
        await file.write(0, b"x")
    await file.close()


@pytest_twisted.ensureDeferred
async def test_a_full_file_system(place):
    """What fitted is there, what did not is an error, and with space again it goes on."""
    target = place.host / "small"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(target)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        return  # only root can; /dev/full has shown the same
    try:
        file = await place.store.open(place.path(b"small/file"), NEW, NOTHING)
        with problem(FileProblem.NO_SPACE):
            for index in range(20):
                await file.write(index * 100_000, bytes(100_000))
        with problem(FileProblem.NO_SPACE):
            await place.store.copy(
                await place.store.open(b"/dev/zero", READ, NOTHING), 0, 4 * MIB, file, 0
            )
        await file.setAttributes(Attributes(size=0))
        await file.write(0, b"fits")
        await file.close()
        assert (target / "file").read_bytes() == b"fits"
        found = await place.store.filesystem(place.path(b"small/file"))
        assert found.blocks * found.fragment_size == MIB
    finally:
        # The handle of the failed copy's source is on another file system.
        subprocess.run(["umount", str(target)], check=True)


@pytest_twisted.ensureDeferred
async def test_attributes_are_the_files(place):
    """Size, type, mode, owner, links and times as the system has them, to the microsecond."""
    path = await place.put(b"file", b"12345")
    os.utime(place.host / "file", ns=(1_500_000_000_123_456_000, 1_234_567_890_999_999_999))
    told = await place.store.stat(path)
    real = (place.host / "file").stat()
    assert (told.size, told.mode, told.uid, told.gid) == (
        5, real.st_mode, real.st_uid, real.st_gid,
    )  # fmt: skip
    assert told.atime == 1_500_000_000.123456
    assert int(told.mtime) == 1_234_567_890
    assert told.links == 1
    assert stat.S_ISDIR((await place.store.stat(place.base)).mode)
    os.mkfifo(place.host / "fifo")
    assert stat.S_ISFIFO((await place.store.stat(place.path(b"fifo"))).mode)
    assert stat.S_ISCHR((await place.store.stat(b"/dev/null")).mode)


@pytest_twisted.ensureDeferred
async def test_attributes_can_be_set(place):
    """By path and by handle; what is not given stays as it is."""
    path = await place.put(b"file", b"12345")
    await place.store.setAttributes(path, Attributes(mode=0o640, atime=1000.5, mtime=2000.25))
    found = (place.host / "file").stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_500_000_000, 2_000_250_000_000)
    file = await place.store.open(path, READ, NOTHING)
    await file.setAttributes(Attributes(mode=stat.S_IFREG | 0o4711))
    await file.setAttributes(Attributes(atime=5.0, mtime=-5.0))
    await file.setAttributes(NOTHING)
    await file.setAttributes(Attributes(uid=found.st_uid))
    told = await file.stat()
    assert stat.S_IMODE(told.mode) in (0o4711, 0o711)  # chown may clear the bit
    assert (told.atime, told.mtime, told.size) == (5.0, -5.0, 5)
    await file.close()
    await place.store.setAttributes(path, Attributes(gid=found.st_gid))
    await place.store.setAttributes(path, Attributes(size=2, mode=0o600, atime=1.0, mtime=2.0))
    told = await place.store.stat(path)
    assert (told.size, stat.S_IMODE(told.mode), told.mtime) == (2, 0o600, 2.0)


@pytest_twisted.ensureDeferred
async def test_modes_of_what_is_made(place):
    """The mode asked for, under the account's umask; without one, the usual."""
    umask = os.umask(0)
    os.umask(umask)
    file = await place.store.open(place.path(b"private"), NEW, Attributes(mode=0o600))
    await file.close()
    await place.put(b"usual", b"")
    await place.store.makeDirectory(place.path(b"closed"), Attributes(mode=0o700))
    await place.store.makeDirectory(place.path(b"open"), NOTHING)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in place.host.iterdir()}
    assert modes["private"] == 0o600
    assert modes["closed"] == 0o700
    assert modes["usual"] & 0o600 == 0o600
    assert modes["open"] & 0o700 == 0o700


@pytest_twisted.ensureDeferred
async def test_symbolic_links(place):
    """Made as written, told as written, followed or not as asked."""
    store, path = place.store, place.path
    await place.put(b"file", b"content")
    await store.symbolicLink(b"file", path(b"link"))
    await store.symbolicLink(b"/none/at all", path(b"dangling"))
    assert os.readlink(place.host / "link") == "file"
    assert await store.readLink(path(b"dangling")) == b"/none/at all"
    assert (await store.stat(path(b"link"))).size == 7
    assert stat.S_ISLNK((await store.stat(path(b"link"), follow=False)).mode)
    assert stat.S_ISLNK((await store.stat(path(b"dangling"), follow=False)).mode)
    with problem(FileProblem.NOT_FOUND):
        await store.stat(path(b"dangling"))
    with problem(FileProblem.INVALID):
        await store.readLink(path(b"file"))
    with problem(FileProblem.EXISTS):
        await store.symbolicLink(b"x", path(b"link"))
    await store.symbolicLink(b"loop", path(b"loop"))
    with problem(FileProblem.LOOP):
        await store.stat(path(b"loop"))
    with problem(FileProblem.LOOP, FileProblem.NOT_FOUND):
        await store.realPath(path(b"loop"))
    assert await store.realPath(path(b"link")) == path(b"file")
    await store.setAttributes(path(b"link"), Attributes(atime=7.0, mtime=8.0), follow=False)
    assert (place.host / "link").lstat().st_mtime == 8.0
    assert (place.host / "file").stat().st_mtime != 8.0
    await store.setAttributes(path(b"link"), Attributes(mode=0o604))
    assert stat.S_IMODE((place.host / "file").stat().st_mode) == 0o604
    await store.remove(path(b"link"))
    assert await place.names() == [b"dangling", b"file", b"loop"]


@pytest_twisted.ensureDeferred
async def test_hard_links(place):
    """Two names for one file."""
    await place.put(b"one", b"content")
    await place.store.hardLink(place.path(b"one"), place.path(b"two"))
    assert (await place.store.stat(place.path(b"two"))).links == 2
    with problem(FileProblem.EXISTS):
        await place.store.hardLink(place.path(b"one"), place.path(b"two"))
    await place.store.remove(place.path(b"one"))
    assert await place.get(b"two") == b"content"


@pytest_twisted.ensureDeferred
async def test_renaming(place):
    """Without overwriting nothing is ever lost; with it the new takes the old one's place."""
    store, path = place.store, place.path
    await place.put(b"one", b"1")
    await place.put(b"two", b"2")
    with problem(FileProblem.EXISTS):
        await store.rename(path(b"one"), path(b"two"), overwrite=False)
    with problem(FileProblem.EXISTS):
        await store.rename(path(b"one"), path(b"one"), overwrite=False)
    await store.rename(path(b"one"), path(b"two"), overwrite=True)
    assert await place.names() == [b"two"]
    assert await place.get(b"two") == b"1"
    await store.makeDirectory(path(b"directory"), NOTHING)
    await store.rename(path(b"two"), path(b"directory/moved"), overwrite=False)
    await store.makeDirectory(path(b"empty"), NOTHING)
    with problem(FileProblem.EXISTS):
        await store.rename(path(b"directory"), path(b"empty"), overwrite=False)
    await store.rename(path(b"directory"), path(b"empty"), overwrite=True)
    assert await place.names(b"empty") == [b"moved"]
    await store.makeDirectory(path(b"full"), NOTHING)
    await place.put(b"full/x", b"")
    with problem(FileProblem.NOT_EMPTY, FileProblem.EXISTS):
        await store.rename(path(b"empty"), path(b"full"), overwrite=True)
    await store.symbolicLink(b"nowhere", path(b"link"))
    with problem(FileProblem.EXISTS):
        await store.rename(path(b"full"), path(b"link"), overwrite=False)
    await store.rename(path(b"link"), path(b"link2"), overwrite=False)
    assert await store.readLink(path(b"link2")) == b"nowhere"


@pytest_twisted.ensureDeferred
async def test_an_open_file_outlives_its_name(place):
    """Renamed and removed underneath, it is still read and written."""
    await place.put(b"file", b"content")
    file = await place.store.open(place.path(b"file"), READ | WRITE, NOTHING)
    await place.store.rename(place.path(b"file"), place.path(b"other"), overwrite=True)
    await place.store.remove(place.path(b"other"))
    await file.write(7, b" and more")
    assert await read(file, 0, 100) == b"content and more"
    assert (await file.stat()).links == 0
    await file.close()
    assert await place.names() == []


@pytest_twisted.ensureDeferred
async def test_a_small_file_comes_with_its_open(place):
    """Read once from its beginning it is there at once; then its bytes are those of the moment."""
    await place.put(b"file", b"content")
    file = await place.store.open(place.path(b"file"), READ, NOTHING)
    told = await file.stat()
    assert (told.size, stat.S_ISREG(told.mode)) == (7, True)
    assert file.read(0, 4) == b"cont"
    assert file.read(4, 100) == b"ent"
    assert file.read(7, 100) == b""
    (place.host / "file").write_bytes(b"other and longer")
    assert (await file.stat()).size == 16
    assert await file.read(7, 100) == b"nd longer"
    assert await file.read(0, 100) == b"other and longer"
    await file.close()
    with problem(FileProblem.INVALID):
        await file.read(0, 1)


@pytest.mark.parametrize("way", ["written", "set", "by-another", "by-a-process"])
@pytest_twisted.ensureDeferred
async def test_what_came_with_an_open_is_not_told_after_a_change(place, way):
    """Whoever has changed the file by this gateway, in whatever way, reads what is in it."""
    store, path = place.store, await place.put(b"file", b"content")
    writer = await store.open(path, WRITE, NOTHING)
    other = await place.link.openFiles(None, False)
    file = await store.open(path, READ, NOTHING)
    if way == "written":
        changed = writer.write(0, b"C")
    elif way == "set":
        changed = store.setAttributes(path, Attributes(size=3))
    elif way == "by-another":
        changed = Deferred.fromCoroutine(_emptied(other, path))
    else:
        collector = Collector()
        command = b"echo else >" + path + b"; echo done"
        collector.start(place.link, ProcessRequest(command=command))
        changed = collector.untilOutput(b"done")
    await changed
    expected = {"written": b"Content", "set": b"con", "by-another": b"", "by-a-process": b"else\n"}
    assert (await file.stat()).size == len(expected[way])
    assert await read(file, 0, 100) == expected[way]
    for opened in (file, writer, other):
        await opened.close()


async def _emptied(store, path):
    await (await store.open(path, NEW, NOTHING)).close()


@pytest.mark.parametrize("names", ["listed", "sorted"])
@pytest_twisted.ensureDeferred
async def test_files_of_a_listing_one_after_another(place, names):
    """Each is what it is, changed meanwhile by this gateway or not, and closed in the end."""
    store, agent = place.store, await agent_of(place.link)
    for number in range(40):
        await place.put(b"%02d" % number, b"content of %d" % number)
    listing = await store.listDirectory(place.base)
    listed = []
    while entries := await listing.next():
        listed += [entry.name for entry in entries if entry.name[:1] != b"."]
    await listing.close()
    other = await place.link.openFiles(None, False)
    order = listed if names == "listed" else sorted(listed)
    for name in order:
        told = await store.stat(place.path(name), follow=False)
        assert told.size == len(b"content of %d" % int(name))
    for turn, name in enumerate(order):
        expected = b"content of %d" % int(name)
        if turn in (10, 20):
            expected = b"changed"
            through = store if turn == 10 else other
            changing = await through.open(place.path(name), NEW, NOTHING)
            await changing.write(0, expected)
            await changing.close()
        if turn == 30:
            await store.remove(place.path(name))
            with problem(FileProblem.NOT_FOUND):
                await store.stat(place.path(name))
            with problem(FileProblem.NOT_FOUND):
                await store.open(place.path(name), READ, NOTHING)
            continue
        assert (await store.stat(place.path(name))).size == len(expected)
        file = await store.open(place.path(name), READ, NOTHING)
        assert await read(file, 0, 100) + await read(file, len(expected), 100) == expected
        await file.close()
    await other.close()
    # A change closes whatever was opened early.
    await store.setAttributes(place.path(order[0]), Attributes(mode=0o600))
    opened = [os.readlink(f"/proc/{agent}/fd/{fd}") for fd in os.listdir(f"/proc/{agent}/fd")]
    assert not [path for path in opened if path.startswith(os.fsdecode(place.base))]


@pytest.mark.parametrize("path", [b"/proc/version", b"/sys/kernel/mm/transparent_hugepage/enabled"])
@pytest_twisted.ensureDeferred
async def test_files_whose_size_is_not_what_can_be_read(place, path):
    """What the system makes up as it is read comes whole."""
    file = await place.store.open(path, READ, NOTHING)
    with open(path, "rb") as here:
        assert await read(file, 0, 10_000) == here.read()
    await file.close()


@pytest_twisted.ensureDeferred
async def test_closing_what_was_read_is_not_waited_for_and_done(place):
    """More files than a stream may have open, one after another, each closed without waiting."""
    path = await place.put(b"file", b"content")
    agent = await agent_of(place.link)
    for _ in range(300):
        file = await place.store.open(path, READ, NOTHING)
        assert file.close().called
    await place.store.stat(path)
    opened = [os.readlink(f"/proc/{agent}/fd/{fd}") for fd in os.listdir(f"/proc/{agent}/fd")]
    assert os.fsdecode(path) not in opened


@pytest_twisted.ensureDeferred
async def test_small_files_one_after_another(place, request):
    """Each is there when its CLOSE is answered, though that need not be waited for; whoever goes
    on with the handle is waited for again."""
    store = place.store

    async def opened(name):
        return await store.open(place.path(name), NEW | READ, NOTHING)

    for number in range(5):
        file = await opened(b"%d" % number)
        await file.write(0, b"content of %d" % number)
        closing = file.close()
        # Without O_PATH a file that is closed early could not be found again.
        early = number > 0 and "agent-poor" not in request.node.name
        assert closing.called is early
        await closing
        assert (place.host / str(number)).read_bytes() == b"content of %d" % number
    ways = {
        "read": lambda file: maybeDeferred(file.read, 0, 10),
        "written": lambda file: file.write(1, b"i"),
        "set": lambda file: file.setAttributes(Attributes(mode=0o600)),
        "looked at": lambda file: file.stat(),
        "copied": lambda file: store.copy(file, 0, 2, target, 0),
    }
    target = await opened(b"target")
    for way in ways.values():
        for again in (b"one", b"two"):
            file = await opened(again)
            await file.write(0, b"hallo")
            if again == b"two":
                await way(file)
                closing = file.close()
                assert not closing.called
                await closing
            else:
                await file.close()
    assert (place.host / "two").read_bytes() == b"hallo"
    assert (place.host / "target").read_bytes() == b"ha"
    file, other = await opened(b"a"), await opened(b"b")
    await gatherResults([file.write(n, b"%d" % n) for n in range(10)])
    await gatherResults([other.write(0, b"x"), other.close(), file.close(), target.close()])
    assert (place.host / "a").read_bytes() == b"0123456789"
    assert (place.host / "b").read_bytes() == b"x"


@pytest_twisted.ensureDeferred
async def test_listing_ten_thousand(place):
    """Each once, with its attributes, in pieces; the owners' names come along."""
    for index in range(10_000):
        (place.host / f"file {index:05}").write_bytes(b"x" * (index % 7))
    listing = await place.store.listDirectory(place.base)
    found, pieces = [], 0
    while piece := await listing.next():
        found += piece
        pieces += 1
        assert len(piece) <= 2500
    await listing.close()
    entries = {entry.name: entry.attributes for entry in found}
    assert len(entries) == len(found)
    assert pieces > 3
    assert {entries.pop(b"."), entries.pop(b"..")} if b"." in entries else True
    assert sorted(entries) == [b"file %05d" % index for index in range(10_000)]
    assert all(entries[b"file %05d" % n].size == n % 7 for n in range(10_000))
    assert {one.owner for one in entries.values()} == {place.host.owner()}
    again = await place.entries()
    assert {entry.attributes.group for entry in again} == {place.host.group()}


@pytest_twisted.ensureDeferred
async def test_listings_side_by_side(place):
    """Several at once, one given up in the middle, one emptied underneath."""
    for index in range(3000):
        (place.host / f"{index:04}").touch()
    first = await place.store.listDirectory(place.base)
    second = await place.store.listDirectory(place.base)
    seen = list(await first.next())
    await second.next()
    await second.close()
    for path in place.host.iterdir():
        path.unlink()
    while piece := await first.next():
        seen += piece
    names = [entry.name for entry in seen]
    assert len(set(names)) == len(names)
    await first.close()
    assert await place.names() == []


@pytest_twisted.ensureDeferred
async def test_many_files_at_once(place):
    """A hundred open files, written and read in turns."""
    files = await gatherResults(
        [place.store.open(place.path(b"%d" % n), NEW | READ, NOTHING) for n in range(100)]
    )
    for turn in range(5):
        await gatherResults(
            [file.write(turn * 10, b"%10d" % (n * turn)) for n, file in enumerate(files)]
        )
    contents = await gatherResults([maybeDeferred(file.read, 0, 1000) for file in files])
    await gatherResults([file.close() for file in files])
    for n, content in enumerate(contents):
        assert content == b"".join(b"%10d" % (n * turn) for turn in range(5))
        assert (place.host / str(n)).read_bytes() == content


@pytest_twisted.ensureDeferred
async def test_copying_on_the_far_side(place):
    """Whole, in part, to the end, over what is there, and not beyond the end."""
    data = os.urandom(20 * MIB + 3)
    (place.host / "source").write_bytes(data)
    source = await place.store.open(place.path(b"source"), READ, NOTHING)
    target = await place.store.open(place.path(b"target"), NEW | READ, NOTHING)
    await place.store.copy(source, 0, 0, target, 0)
    assert (place.host / "target").read_bytes() == data
    await place.store.copy(source, 10, 5, target, 100)
    await place.store.copy(source, len(data) - 3, 0, target, len(data))
    expected = bytearray(data + data[-3:])
    expected[100:105] = data[10:15]
    assert (place.host / "target").read_bytes() == expected
    with problem(FileProblem.FAILURE):
        await place.store.copy(source, len(data) - 3, 100, target, 0)
    with problem(FileProblem.INVALID):
        await place.store.copy(target, 0, 10, target, 5)
    with problem(FileProblem.PERMISSION):
        await place.store.copy(target, 0, 10, source, 5)
    special = await place.store.open(b"/proc/version", READ, NOTHING)
    await place.store.copy(special, 0, 0, target, 0)
    version = Path("/proc/version").read_bytes()
    assert (place.host / "target").read_bytes()[: len(version)] == version
    await gatherResults([file.close() for file in (source, target, special)])


@pytest_twisted.ensureDeferred
async def test_file_systems(place):
    """statvfs by path and by handle."""
    await place.put(b"file", b"")
    real = os.statvfs(place.host)
    file = await place.store.open(place.path(b"file"), READ, NOTHING)
    for found in (await place.store.filesystem(place.base), await file.filesystem()):
        assert (found.block_size, found.fragment_size) == (real.f_bsize, real.f_frsize)
        assert (found.blocks, found.files) == (real.f_blocks, real.f_files)
        assert found.name_max == real.f_namemax
        assert found.id == real.f_fsid
    await file.sync()
    await file.close()
    with problem(FileProblem.NOT_FOUND):
        await place.store.filesystem(place.path(b"none"))


@pytest_twisted.ensureDeferred
async def test_accounts(place):
    """Names of numbers, homes of names."""
    users, groups = await place.store.names([0, 4_000_000_000], [0])
    assert (list(users), list(groups)) == (["root", ""], ["root"])
    users, groups = await place.store.names([], [])
    assert not users
    assert not groups
    home = await place.store.homeOf(b"")
    assert home.startswith(b"/")
    assert (await place.store.homeOf(b"root")).startswith(b"/")
    with problem(FileProblem.NOT_FOUND):
        await place.store.homeOf(b"nobody of this name")


@pytest_twisted.ensureDeferred
async def test_canonical_paths(place):
    """Absolute, without dots, links resolved; what does not exist is fine at the end only."""
    store, base = place.store, os.path.realpath(place.base)
    await store.makeDirectory(place.path(b"d"), NOTHING)
    await store.symbolicLink(b"d", place.path(b"link"))
    assert await store.realPath(b"") == await store.realPath(b".") == store.home
    assert await store.realPath(b"/") == b"/"
    assert await store.realPath(b"/../..") == b"/"
    assert await store.realPath(place.base + b"/./d//../link/") == base + b"/d"
    assert await store.realPath(place.base + b"/link/new") == base + b"/d/new"


@pytest_twisted.ensureDeferred
async def test_cancelling(place):
    """Whoever does not wait any more hears nothing more; what was opened for it is closed."""
    await place.put(b"file", b"content")
    for _ in range(600):  # more than there are handles
        for request in (
            place.store.open(place.path(b"file"), READ, NOTHING),
            place.store.stat(place.path(b"file")),
            place.store.listDirectory(place.base),
        ):
            request.addErrback(lambda failure: failure.trap(CancelledError))
            request.cancel()
            await request
    file = await place.store.open(place.path(b"file"), READ, NOTHING)
    assert await read(file, 3, 100) == b"tent"
    given_up = file.read(0, 100)
    given_up.addErrback(lambda failure: failure.trap(CancelledError))
    given_up.cancel()
    assert await read(file, 0, 100) == b"content"
    listing = await place.store.listDirectory(place.base)
    given_up = listing.next()
    given_up.addErrback(lambda failure: failure.trap(CancelledError))
    given_up.cancel()
    await listing.close()
    await file.close()


@pytest_twisted.ensureDeferred
async def test_closing_in_the_middle(place):
    """What is under way fails as a lost connection, and so does what comes after."""
    store = await place.link.openFiles(None, False)
    file = await store.open(place.path(b"file"), NEW | READ, NOTHING)
    waiting = [file.write(n * 100_000, bytes(100_000)) for n in range(50)]
    waiting += [store.stat(place.base), store.listDirectory(place.base)]
    closed = store.close()
    results = await DeferredList(waiting, consumeErrors=True)
    await closed
    lost = [result for good, result in results if not good]
    assert lost
    assert {failure.value.problem for failure in lost} == {FileProblem.CONNECTION_LOST}
    for request in (
        lambda: file.read(0, 1), lambda: store.stat(b"/"), file.close,
        lambda: store.listDirectory(b"/"), lambda: file.write(0, bytes(300_000)),
    ):  # fmt: skip
        with problem(FileProblem.CONNECTION_LOST):
            await request()
    await store.close()
    assert await place.names() in ([b"file"], [])


@pytest_twisted.ensureDeferred
async def test_releasing_the_link_closes_its_stores(place):
    """A connection that ends leaves no store open, and none that was still being opened."""
    use = await place.backend.connect("owner")
    store = await use.openFiles(None, False)
    opening = use.openFiles(None, False)
    use.release()
    results = await DeferredList([opening], consumeErrors=True)
    assert not results[0][0]
    with problem(FileProblem.CONNECTION_LOST):
        await store.stat(b"/")


@pytest_twisted.ensureDeferred
async def test_a_store_outlives_its_stream(place):
    """What was open is lost; what names a path is done as soon as there is a stream again."""
    path = await place.put(b"file", bytes(100_000))
    use = await place.backend.connect("owner")
    store = await use.openFiles(None, False)
    file = await store.open(path, READ | WRITE, NOTHING)
    await file.write(0, b"x")
    store._store.stream.write(bytes(9))  # which is no request
    with problem(FileProblem.CONNECTION_LOST):
        await store.stat(path)
    for request in (lambda: read(file, 0, 1), lambda: file.write(0, b"y"), file.close):
        with problem(FileProblem.CONNECTION_LOST):
            await request()
    assert (await store.stat(path)).size == 100_000
    with problem(FileProblem.CONNECTION_LOST):
        await read(file, 0, 1)
    again = await store.open(path, READ, NOTHING)
    assert await read(again, 0, 2) == b"x\0"
    await again.close()
    use.release()
    await DeferredList([store.stat(path)], consumeErrors=True)
    with problem(FileProblem.CONNECTION_LOST):
        await store.stat(path)


@pytest_twisted.ensureDeferred
async def test_jailed_and_read_only(place):
    """A root that is not left, and files that are not changed."""
    (place.host / "jail").mkdir()
    (place.host / "secret").write_bytes(b"secret")
    (place.host / "jail" / "file").write_bytes(b"inside")
    (place.host / "jail" / "link").symlink_to("../secret")
    store = await place.link.openFiles(place.path(b"jail"), True)
    try:
        assert store.home == b"/"
        file = await store.open(b"/file", READ, NOTHING)
        assert await read(file, 0, 100) == b"inside"
        with problem(FileProblem.READ_ONLY):
            await store.open(b"/file", WRITE, NOTHING)
        with problem(FileProblem.NOT_FOUND):
            await store.open(b"/link", READ, NOTHING)
        with problem(FileProblem.NOT_FOUND):
            await store.stat(b"/../secret")
        with problem(FileProblem.READ_ONLY):
            await store.remove(b"/file")
        with problem(FileProblem.UNSUPPORTED):
            await place.store.copy(file, 0, 0, file, 0)
    finally:
        await store.close()


def carrier_of(backend: Any) -> Any:
    """What a link hangs on at the moment; ``None`` between two of them."""
    if isinstance(backend, LoopbackBackend):
        return backend.link._carrier
    return backend._kernels["owner"].link._carrier


def cut(carrier: Any) -> None:
    """Take the road away under a link."""
    channels = getattr(carrier, "_channels", None)
    transport = carrier.transport if channels is None else channels.transport
    transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_cut_carriers_lose_nothing(place):
    """The socket is cut again and again in the midst of both directions."""
    data = os.urandom(16 * MIB)
    piece = 64 * 1024
    file = await place.store.open(place.path(b"file"), NEW | READ, NOTHING)
    other = await place.put(b"other", data)
    source = await place.store.open(other, READ, NOTHING)
    former = None
    waiting: list[Any] = []
    got = []
    for index, start in enumerate(range(0, len(data), piece)):
        waiting.append(file.write(start, data[start : start + piece]))
        waiting.append(source.read(start, piece))
        waiting[-1].addCallback(got.append)
        if index % 50 == 25:
            carrier = carrier_of(place.backend)
            if carrier is not None and carrier is not former:
                former = carrier
                cut(carrier)
        if len(waiting) > 40:
            await waiting.pop(0)
    await gatherResults(waiting)
    await file.close()
    await source.close()
    assert former is not None
    assert hashlib.sha256(b"".join(got)).digest() == hashlib.sha256(data).digest()
    assert (place.host / "file").read_bytes() == data


def resident(pid: Any) -> int:
    """Bytes that a process has in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def agent_of(link: Any) -> int:
    """The process behind a link: the parent of what it starts."""
    collector = Collector()
    collector.start(link, ProcessRequest(b"echo $PPID"))
    await collector.untilClosed()
    return int(collector.out)


@pytest_twisted.ensureDeferred
async def test_memory_stays_flat(place):
    """500 MB up and down: neither agent nor gateway holds more than requests under way."""
    agent = await agent_of(place.link)
    piece, ahead = 256_000, 8
    data = os.urandom(piece)
    peaks = {agent: 0, "self": 0}

    def watch() -> None:
        for pid, peak in list(peaks.items()):
            peaks[pid] = max(peak, resident(pid))

    async def transfer(count: int) -> None:
        file = await place.store.open(place.path(b"large"), NEW | READ, NOTHING)
        waiting: list[Any] = []
        for index in range(count):
            waiting.append(file.write(index * piece, data))
            if len(waiting) > ahead:
                await waiting.pop(0)
            if index % 16 == 0:
                watch()
        await gatherResults(waiting)
        waiting.clear()
        for index in range(count):
            waiting.append(file.read(index * piece, piece))
            if len(waiting) > ahead:
                assert await waiting.pop(0) == data
            if index % 16 == 0:
                watch()
        assert all(one == data for one in await gatherResults(waiting))
        watch()
        await file.close()

    await transfer(200)
    before = dict(peaks)
    await transfer(2000)
    assert (place.host / "large").stat().st_size == 2000 * piece
    assert all(peaks[pid] - before[pid] <= 16 * MIB for pid in peaks), (before, peaks)
    (place.host / "large").unlink()
