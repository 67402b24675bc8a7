"""The Contents store over real Jupyter servers: what comes back is what went in."""

from __future__ import annotations

import os
import random
import stat
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
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
from conchkernel.jupyter import contents_spool, contents_writing
from conchkernel.jupyter.contents import ContentsFileStore, clean
from conchkernel.jupyter.contents_rest import quoted
from conchkernel.jupyter.proxy import make_agent
from conchkernel.jupyter.rest import discover

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator
    from pathlib import Path

    from tests.jupyters import Jupyters, RunningJupyter

READ, WRITE = OpenFlag.READ, OpenFlag.WRITE
#: As sftp's put opens a file, and as scp does.
PUT = OpenFlag.WRITE | OpenFlag.CREATE | OpenFlag.TRUNCATE
SCP = OpenFlag.WRITE | OpenFlag.CREATE
NONE = Attributes()
MIB = 1024 * 1024

NAMES = [
    "plain.txt",
    "with space  two",
    "per%20cent%",
    "a#b?c=d&e+f;g",
    "quote'\"`\\back",
    "ünïcødé 文件 🐍",
    "checkpoints",
    "trust",
    "note.ipynb",
    "[x]{y}~$!*(),:@|<>^",
    "-dash",
    " leading and trailing ",
    "new\nline",
]


@pytest.fixture(params=["current", "v6", "s1"])
def server(request: pytest.FixtureRequest, jupyters: Jupyters) -> Iterator[RunningJupyter]:
    """Every stack that has files, empty again afterwards."""
    running = jupyters[request.param]
    yield running
    empty(running.root_dir)


@pytest.fixture
def current(jupyters: Jupyters) -> Iterator[RunningJupyter]:
    """The stack beside us, empty again afterwards."""
    running = jupyters["current"]
    yield running
    empty(running.root_dir)


def empty(directory: Path) -> None:
    """Remove what is in a directory."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            empty(path)
            path.rmdir()
        else:
            path.unlink()


@asynccontextmanager
async def opened(server: RunningJupyter, **options: Any) -> AsyncIterator[ContentsFileStore]:
    """A store on a server."""
    agent = make_agent(reactor)
    client = await discover(reactor, server.pasted, agent=agent)
    store = ContentsFileStore(reactor, client, **options)
    try:
        yield store
    finally:
        await store.close()
        await agent.close()
        assert store.budget.used == 0


async def put(
    store: ContentsFileStore, path: bytes, data: bytes, flags: OpenFlag = PUT, step: int = 32768
) -> None:
    """Write as a client does: many requests, in order, some before the answers to others."""
    file = await store.open(path, flags, NONE)
    under_way: list[Deferred[None]] = []
    for start in range(0, len(data), step):
        waiting = file.write(start, data[start : start + step])
        if waiting is not None:
            under_way.append(waiting)
        if len(under_way) >= 64:
            await under_way.pop(0)
    await gatherResults(under_way)
    await file.close()


async def get(store: ContentsFileStore, path: bytes, step: int = 32768) -> bytes:
    """Read as a client does: up to 64 requests at a time, until the end."""
    file = await store.open(path, READ, NONE)
    try:
        parts: list[bytes] = []
        under_way: list[bytes | Deferred[bytes]] = []
        asked = 0
        while True:
            while len(under_way) < 64:
                under_way.append(file.read(asked, step))
                asked += step
            part = under_way.pop(0)
            if isinstance(part, Deferred):
                part = await part
            parts.append(part)
            if len(part) < step:
                break
        for rest in under_way:
            if isinstance(rest, Deferred):
                assert await rest == b""
        return b"".join(parts)
    finally:
        await file.close()


async def names(store: ContentsFileStore, path: bytes) -> dict[bytes, Attributes]:
    """What is in a directory."""
    listing = await store.listDirectory(path)
    assert verifyObject(IListing, listing)
    found: dict[bytes, Attributes] = {}
    while entries := await listing.next():
        found.update((entry.name, entry.attributes) for entry in entries)
    await listing.close()
    return found


async def problem(work: Awaitable[Any]) -> FileProblem:
    """Why something is not done."""
    with pytest.raises(FileStoreError) as caught:
        await work
    assert str(caught.value)
    return caught.value.problem


# --- paths -------------------------------------------------------------------------------------


def test_quoting() -> None:
    """Every byte of a name is the name's, and the API's own words are disguised."""
    assert quoted(b"/a b/%/#?+") == "/a%20b/%25/%23%3F%2B"
    assert quoted("/ü".encode()) == "/%C3%BC"
    assert quoted(b"/checkpoints/x/trust") == "/%63heckpoints/x/%74rust"
    assert quoted(b"/checkpoints2") == "/checkpoints2"


def test_clean() -> None:
    """Nothing leads above the root."""
    assert clean(b"") == clean(b".") == clean(b"/../..") == b"/"
    assert clean(b"a/./b//../c/") == b"/a/c"
    for bad, why in ((b"/\xff", FileProblem.INVALID), (b"/a\0b", FileProblem.INVALID)):
        with pytest.raises(FileStoreError) as caught:
            clean(bad)
        assert caught.value.problem is why
    with pytest.raises(FileStoreError):
        clean(b"/a" * 3000)


# --- real servers ------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_names(server: RunningJupyter) -> None:
    """Files and directories of every name: made, listed, read, renamed, removed."""
    async with opened(server) as store:
        assert verifyObject(IFileStore, store)
        for name in NAMES:
            raw = name.encode()
            await store.makeDirectory(b"/" + raw, NONE)
            inside = b"/" + raw + b"/" + raw
            data = os.urandom(100)
            await put(store, inside, data)
            assert (server.root_dir / name / name).read_bytes() == data
            assert await get(store, inside) == data
            assert (await store.stat(inside)).size == 100
            assert list(await names(store, b"/" + raw)) == [raw]
            await store.rename(inside, inside + b"2", overwrite=False)
            # Whoever renames or removes, the server makes a place for checkpoints.
            left = set(os.listdir(server.root_dir / name)) - {".ipynb_checkpoints"}
            assert left == {name + "2"}
            assert await problem(store.removeDirectory(b"/" + raw)) is FileProblem.NOT_EMPTY
            await store.remove(inside + b"2")
        assert sorted(await names(store, b"/")) == sorted(name.encode() for name in NAMES)
        for name in NAMES:
            await store.removeDirectory(b"/" + name.encode())
        assert await names(store, b"/") == {}


@pytest_twisted.ensureDeferred
async def test_bytesAreNotText(server: RunningJupyter) -> None:
    """Line ends, byte order marks, notebooks that are none: nothing is understood or altered."""
    async with opened(server) as store:
        for name, data in {
            b"/crlf.txt": b"a\r\nb\rc\n",
            b"/bom.txt": b"\xef\xbb\xbfhello",
            b"/utf16.csv": "text".encode("utf-16"),
            b"/no.ipynb": b"{not json\xff",
            b"/old.ipynb": b'{"nbformat": 2,  "worksheets": []}\r\n',
            b"/all.bin": bytes(range(256)) * 5,
            b"/base64.txt": b"aGVsbG8=",
            b"/empty": b"",
        }.items():
            await put(store, name, data)
            assert (server.root_dir / name.decode()[1:]).read_bytes() == data
            assert await get(store, name) == data
        assert not [name for name in os.listdir(server.root_dir) if name.startswith(".")]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("size", [0, 1, 4096, MIB - 1, MIB, MIB + 1, 2 * MIB, 7 * MIB + 12345])
async def test_sizes(server: RunningJupyter, size: int) -> None:
    """Around a chunk's and a block's edges."""
    data = random.Random(size).randbytes(size)
    async with opened(server) as store:
        for flags in (PUT, SCP):
            await put(store, b"/file", data, flags)
            assert (server.root_dir / "file").read_bytes() == data
            assert await get(store, b"/file") == data
        assert await get(store, b"/file", 261120) == data


@pytest_twisted.ensureDeferred
async def test_attributes(server: RunningJupyter) -> None:
    """Sizes and times are true, to the microsecond; a link is what it leads to."""
    file = server.root_dir / "file"
    file.write_bytes(b"x" * 10000)
    os.utime(file, (1, 1234567890.25))
    (server.root_dir / "directory").mkdir()
    (server.root_dir / "link").symlink_to("file")
    (server.root_dir / "alias").symlink_to("directory")
    async with opened(server) as store:
        told = await store.stat(b"/file")
        assert (told.size, told.mtime) == (10000, 1234567890.25)
        assert told.mode is not None
        assert stat.S_ISREG(told.mode)
        for path in (b"/", b"/directory", b"/alias"):
            told = await store.stat(path)
            assert told.mode is not None
            assert stat.S_ISDIR(told.mode)
        told = await store.stat(b"/link")
        assert (told.size, told.mtime) == (10000, 1234567890)
        assert await get(store, b"/link") == b"x" * 10000
        listed = await names(store, b"/")
        assert listed[b"file"] == await store.stat(b"/file")
        assert await problem(store.stat(b"/nothing")) is FileProblem.NOT_FOUND
        # lstat's error is told or not, as the server is old or new.
        below = await problem(store.stat(b"/file/below"))
        assert below in (FileProblem.NOT_DIRECTORY, FileProblem.NOT_FOUND)
        assert await problem(store.listDirectory(b"/file")) is FileProblem.NOT_DIRECTORY
        assert await problem(store.listDirectory(b"/nothing")) is FileProblem.NOT_FOUND


@pytest_twisted.ensureDeferred
async def test_openFlags(server: RunningJupyter) -> None:
    """Creating, not creating, truncating, insisting, appending."""
    file = server.root_dir / "file"
    async with opened(server) as store:
        assert await problem(store.open(b"/file", READ, NONE)) is FileProblem.NOT_FOUND
        assert await problem(store.open(b"/file", WRITE, NONE)) is FileProblem.NOT_FOUND
        assert await problem(store.open(b"/no/file", PUT, NONE)) is FileProblem.NOT_FOUND
        made = await store.open(b"/file", SCP | OpenFlag.EXCLUSIVE, NONE)
        assert verifyObject(IOpenFile, made)
        assert file.read_bytes() == b""
        await made.close()
        excluded = store.open(b"/file", SCP | OpenFlag.EXCLUSIVE, NONE)
        assert await problem(excluded) is FileProblem.EXISTS
        file.write_bytes(b"0123456789")
        appended = await store.open(b"/file", WRITE | OpenFlag.APPEND, NONE)
        appended.write(0, b"abc")
        appended.write(0, b"def")
        assert (await appended.stat()).size == 16
        await appended.close()
        assert file.read_bytes() == b"0123456789abcdef"
        await (await store.open(b"/file", PUT, NONE)).close()
        assert file.read_bytes() == b""
        (server.root_dir / "directory").mkdir()
        for flags in (READ, PUT, SCP):
            opening = store.open(b"/directory", flags, NONE)
            assert await problem(opening) is FileProblem.IS_DIRECTORY
        assert await problem(store.remove(b"/directory")) is FileProblem.IS_DIRECTORY


# --- writing out of order ----------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, blocks and bounds so small that a small file meets every edge."""
    monkeypatch.setattr(contents_writing, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(contents_writing, "_HIGH", 2000)
    monkeypatch.setattr(contents_writing, "_FETCH_BYTES", 700)
    monkeypatch.setattr(contents_spool, "MAX_RANGES", 6)


class Twin:
    """A file of the store's, and what it must hold."""

    def __init__(self, file: IOpenFile, content: bytes) -> None:
        self.file = file
        self.content = bytearray(content)
        self.under_way: list[Deferred[None]] = []

    def write(self, offset: int, data: bytes) -> None:
        """Write, without waiting."""
        waiting = self.file.write(offset, data)
        if waiting is not None:
            self.under_way.append(waiting)
        if len(self.content) < offset:
            self.content.extend(bytes(offset - len(self.content)))
        self.content[offset : offset + len(data)] = data

    async def resize(self, size: int) -> None:
        """Truncate or extend."""
        await self.settle()
        await self.file.setAttributes(Attributes(size=size))
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))

    async def settle(self) -> None:
        """Wait for the writes."""
        await gatherResults(self.under_way)
        self.under_way.clear()

    async def check(self, offset: int, length: int) -> None:
        """Read what was written."""
        await self.settle()
        assert (await self.file.stat()).size == len(self.content)
        data = self.file.read(offset, length)
        if isinstance(data, Deferred):
            data = await data
        assert data == self.content[offset : offset + length]


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(40))
async def test_anyOrder(current: RunningJupyter, seed: int) -> None:
    """Whatever is written, cut, extended, read and synced in whatever order is what is there."""
    chance = random.Random(seed)
    path = current.root_dir / "file"
    before = chance.randbytes(chance.choice([0, 0, 500, 5000]))
    path.write_bytes(before)
    async with opened(current) as store:
        file = await store.open(b"/file", SCP | READ, NONE)
        twin = Twin(file, before)
        for _ in range(chance.choice([5, 40])):
            size = len(twin.content)
            kind = chance.choices("srhocxfz", [6, 6, 3, 3, 1, 2, 1, 1])[0]
            data = chance.randbytes(chance.choice([1, 100, 999, 1000, 3500]))
            if kind == "s":
                twin.write(size, data)
            elif kind == "r":
                await twin.check(chance.randrange(size + 100), chance.randrange(4000))
            elif kind == "h":
                twin.write(size + chance.randrange(3000), data)
            elif kind == "o":
                twin.write(chance.randrange(size + 1), data)
            elif kind == "c":
                await twin.resize(chance.randrange(size + 1))
            elif kind == "x":
                for start in reversed(range(0, len(data), 100)):
                    twin.write(size + start, data[start : start + 100])
            elif kind == "f":
                await twin.settle()
                await file.sync()
                assert path.read_bytes() == twin.content
                assert (await store.stat(b"/file")).size == len(twin.content)
            else:
                await twin.resize(size + chance.randrange(3000))
        await twin.settle()
        await file.close()
        assert path.read_bytes() == twin.content
        assert store.budget.used == 0


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("small")
async def test_manyHoles(current: RunningJupyter) -> None:
    """More separate ranges than a spool may have are joined."""
    path = current.root_dir / "file"
    before = os.urandom(9000)
    path.write_bytes(before)
    async with opened(current) as store:
        for flags in (SCP, PUT):
            file = await store.open(b"/file", flags, NONE)
            twin = Twin(file, before if flags == SCP else b"")
            for offset in [*range(200, 8000, 300), *range(20000, 30000, 500)]:
                twin.write(offset, b"x" * 50)
                await twin.settle()
            await file.close()
            assert path.read_bytes() == twin.content


@pytest_twisted.ensureDeferred
async def test_asScp(server: RunningJupyter) -> None:
    """scp opens without truncating, writes all of it, then sets the size: longer and shorter."""
    path = server.root_dir / "file"
    async with opened(server) as store:
        for old, new in ((3 * MIB, 2 * MIB + 5), (10, 3 * MIB), (3 * MIB, 7), (5, 0)):
            path.write_bytes(b"o" * old)
            path.chmod(0o750)
            inode = path.stat().st_ino
            data = os.urandom(new)
            file = await store.open(b"/file", SCP, NONE)
            for start in range(0, new, 32768):
                waiting = file.write(start, data[start : start + 32768])
                if waiting is not None:
                    await waiting
            await file.setAttributes(Attributes(size=new))
            await file.close()
            assert path.read_bytes() == data
            assert (path.stat().st_mode & 0o777, path.stat().st_ino) == (0o750, inode)


@pytest_twisted.ensureDeferred
async def test_resumed(server: RunningJupyter) -> None:
    """reput: what is there is not fetched, and what was cut off is as it was."""
    path = server.root_dir / "file"
    data = os.urandom(3 * MIB)
    path.write_bytes(data[:MIB])
    async with opened(server, spoolBytes=0) as store:
        file = await store.open(b"/file", SCP, NONE)
        for start in range(MIB, 3 * MIB, 65536):
            waiting = file.write(start, data[start : start + 65536])
            if waiting is not None:
                await waiting
        await file.close()
        assert path.read_bytes() == data


@pytest_twisted.ensureDeferred
async def test_spoolIsBounded(current: RunningJupyter, tmp_path: Path) -> None:
    """What is too large to be written anew is refused before anything is lost."""
    path = current.root_dir / "file"
    path.write_bytes(b"o" * 100_000)
    async with opened(current, spoolDirectory=tmp_path, spoolBytes=50_000) as store:
        file = await store.open(b"/file", SCP, NONE)
        assert await problem(Deferred.fromCoroutine(tried(file, 5, b"x"))) is FileProblem.NO_SPACE
        shorter = file.setAttributes(Attributes(size=60_000))
        assert await problem(shorter) is FileProblem.NO_SPACE
        await file.close()
        assert path.read_bytes() == b"o" * 100_000
        file = await store.open(b"/new", PUT, NONE)
        longer = file.setAttributes(Attributes(size=60_000))
        assert await problem(longer) is FileProblem.NO_SPACE
        far = tried(file, 10, b"x" * 50_001)
        assert await problem(Deferred.fromCoroutine(far)) is FileProblem.NO_SPACE
        file.write(10, b"x" * 1000)
        assert store.budget.used == 1000
        assert os.listdir(tmp_path) == []
        await file.close()
        assert (current.root_dir / "new").read_bytes() == bytes(10) + b"x" * 1000
    missing = tmp_path / "missing"
    async with opened(current, spoolDirectory=missing) as store:
        file = await store.open(b"/new", PUT, NONE)
        assert await problem(Deferred.fromCoroutine(tried(file, 9, b"x"))) is FileProblem.NO_SPACE
        await file.close()


async def tried(file: IOpenFile, offset: int, data: bytes) -> None:
    """Write, and wait."""
    waiting = file.write(offset, data)
    if waiting is not None:
        await waiting
