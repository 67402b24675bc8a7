"""The Contents store over real Jupyter servers: what comes back is what went in."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import stat
import tracemalloc
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
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
from conchkernel.jupyter import contents_http, contents_spool, contents_writing
from conchkernel.jupyter.contents import ContentsFileStore, clean
from conchkernel.jupyter.contents_rest import quoted
from conchkernel.jupyter.discovery import discover
from conchkernel.jupyter.proxy import make_agent
from conchkernel.jupyter.rest import JupyterClient
from conchkernel.jupyter.urls import JupyterLocation
from tests.jupyters import start_jupyter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from twisted.web.server import Request

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
    parts: list[bytes] = []
    under_way: list[bytes | Deferred[bytes]] = []
    asked = 0
    try:
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
        for rest in under_way:
            if isinstance(rest, Deferred):
                rest.addErrback(lambda _: None)
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
        assert listed[b"link"] == await store.stat(b"/link")
        for absent in (b"/nothing", b"/jupyterhub_config.py", b"/JupyterHub/x"):
            assert await problem(store.stat(absent)) is FileProblem.NOT_FOUND
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
    monkeypatch.setattr(contents_writing, "_FETCH_BYTES", 700)
    monkeypatch.setattr(contents_writing, "_LOOK_SECONDS", 0.01)
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


# --- renaming, removing, hiding ----------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_rename(server: RunningJupyter) -> None:
    """Over a file only when asked to, and then as rename(2) would; open files follow."""
    root = server.root_dir
    async with opened(server) as store:
        (root / "old").write_bytes(b"old")
        (root / "new").write_bytes(b"new")
        moving = store.rename(b"/old", b"/new", overwrite=False)
        assert await problem(moving) is FileProblem.EXISTS
        assert (root / "new").read_bytes() == b"new"
        await store.rename(b"/old", b"/new", overwrite=True)
        assert (root / "new").read_bytes() == b"old"
        assert set(os.listdir(root)) - {".ipynb_checkpoints"} == {"new"}
        await store.rename(b"/new", b"/new", overwrite=True)
        gone = store.rename(b"/gone", b"/new", overwrite=True)
        assert await problem(gone) is FileProblem.NOT_FOUND
        lost = store.rename(b"/new", b"/no/where", overwrite=True)
        assert await problem(lost) is FileProblem.NOT_FOUND
        for name in ("full", "empty", "other"):
            (root / name).mkdir()
        (root / "full" / "file").write_bytes(b"")
        for old, new, why in (
            (b"/new", b"/empty", FileProblem.IS_DIRECTORY),
            (b"/empty", b"/new", FileProblem.NOT_DIRECTORY),
            (b"/other", b"/full", FileProblem.NOT_EMPTY),
            (b"/other", b"/other/below", FileProblem.INVALID),
            (b"/", b"/root", FileProblem.INVALID),
        ):
            assert await problem(store.rename(old, new, overwrite=True)) is why
        await store.rename(b"/full", b"/empty", overwrite=True)
        assert (root / "empty" / "file").exists()
        file = await store.open(b"/empty/late", PUT, NONE)
        file.write(0, b"written")
        await store.rename(b"/empty", b"/moved", overwrite=False)
        await file.close()
        assert (root / "moved" / "late").read_bytes() == b"written"


@pytest_twisted.ensureDeferred
async def test_longNames(server: RunningJupyter) -> None:
    """A name of 255 bytes can be replaced; one of 256 is too long."""
    name = "ü" * 127 + "x"
    async with opened(server) as store:
        for data in (b"1", b"2"):
            await put(store, b"/new", data)
            await store.rename(b"/new", b"/" + name.encode(), overwrite=True)
        assert (server.root_dir / name).read_bytes() == b"2"
        too_long = b"/" + b"x" * 256
        assert await problem(store.open(too_long, PUT, NONE)) is FileProblem.NAME_TOO_LONG
        assert await problem(store.stat(too_long)) is FileProblem.NAME_TOO_LONG


@pytest_twisted.ensureDeferred
async def test_hidden(server: RunningJupyter) -> None:
    """What the server hides is not there, and cannot be made: with a sentence."""
    root = server.root_dir
    (root / ".secret").write_bytes(b"secret")
    (root / ".directory").mkdir()
    (root / "file").write_bytes(b"file")
    async with opened(server) as store:
        assert list(await names(store, b"/")) == [b"file"]
        assert await problem(store.stat(b"/.secret")) is FileProblem.NOT_FOUND
        assert await problem(store.open(b"/.secret", READ, NONE)) is FileProblem.NOT_FOUND
        for refused in (
            store.open(b"/.new", PUT, NONE),
            store.open(b"/.secret", PUT, NONE),
            store.open(b"/.directory/new", SCP, NONE),
            store.makeDirectory(b"/.new", NONE),
            store.rename(b"/file", b"/.file", overwrite=True),
        ):
            with pytest.raises(FileStoreError, match="hides names") as caught:
                await refused
            assert caught.value.problem is FileProblem.PERMISSION
        assert (root / ".secret").read_bytes() == b"secret"
        assert (root / "file").read_bytes() == b"file"


@pytest_twisted.ensureDeferred
async def test_directories(server: RunningJupyter) -> None:
    """Made once, removed when empty."""
    async with opened(server) as store:
        await store.makeDirectory(b"/a", NONE)
        await store.makeDirectory(b"/a/b", NONE)
        assert await problem(store.makeDirectory(b"/a", NONE)) is FileProblem.EXISTS
        assert await problem(store.makeDirectory(b"/x/y", NONE)) is FileProblem.NOT_FOUND
        assert await problem(store.removeDirectory(b"/a")) is FileProblem.NOT_EMPTY
        assert await problem(store.removeDirectory(b"/")) is FileProblem.PERMISSION
        await put(store, b"/file", b"data")
        assert await problem(store.removeDirectory(b"/file")) is FileProblem.NOT_DIRECTORY
        assert await problem(store.removeDirectory(b"/none")) is FileProblem.NOT_FOUND
        assert await problem(store.remove(b"/none")) is FileProblem.NOT_FOUND
        await store.removeDirectory(b"/a/b")
        await store.removeDirectory(b"/a")
        assert (server.root_dir / "file").read_bytes() == b"data"


@pytest_twisted.ensureDeferred
async def test_directories_where_nothing_is_hidden() -> None:
    """Jupyter's directory for checkpoints, which it makes beside what it removes, is in nobody's
    way and listing; one in which something is, is something."""
    server = start_jupyter("current", options=["--ContentsManager.allow_hidden=True"])
    try:
        async with opened(server) as store:
            await store.makeDirectory(b"/d", NONE)
            await put(store, b"/d/file", b"data")
            await store.remove(b"/d/file")
            kept = server.root_dir / "d" / ".ipynb_checkpoints"
            assert kept.is_dir()
            assert await names(store, b"/d") == {}
            (kept / "note-checkpoint.ipynb").write_bytes(b"{}")
            assert list(await names(store, b"/d")) == [b".ipynb_checkpoints"]
            assert await problem(store.removeDirectory(b"/d")) is FileProblem.NOT_EMPTY
            await store.makeDirectory(b"/e", NONE)
            over = store.rename(b"/e", b"/d", overwrite=True)
            assert await problem(over) is FileProblem.NOT_EMPTY
            # Which makes another one within.
            await store.remove(b"/d/.ipynb_checkpoints/note-checkpoint.ipynb")
            await store.rename(b"/e", b"/d", overwrite=True)
            await put(store, b"/d/file", b"data")
            await store.remove(b"/d/file")
            await store.removeDirectory(b"/d")
            assert not (server.root_dir / "d").exists()
    finally:
        server.stop()


@pytest_twisted.ensureDeferred
async def test_unsupported(current: RunningJupyter) -> None:
    """What Jupyter cannot do fails with a sentence; what is so already may be set again."""
    file = current.root_dir / "file"
    file.write_bytes(b"0123456789")
    async with opened(current) as store:
        now = await store.stat(b"/file")
        assert now.mtime is not None
        same = Attributes(mode=now.mode, mtime=int(now.mtime), atime=0.0)
        await store.setAttributes(b"/file", same)
        await store.setAttributes(b"/file", Attributes(size=4))
        assert file.read_bytes() == b"0123"
        await store.setAttributes(b"/file", Attributes(size=6))
        assert file.read_bytes() == b"0123\0\0"
        for work in (
            store.setAttributes(b"/file", Attributes(mode=0o600, size=0)),
            store.setAttributes(b"/file", Attributes(mtime=1.0, atime=1.0)),
            store.setAttributes(b"/file", Attributes(uid=0, gid=0)),
            store.readLink(b"/file"),
            store.symbolicLink(b"file", b"/link"),
            store.hardLink(b"/file", b"/link"),
            store.filesystem(b"/"),
            store.homeOf(b"somebody"),
        ):
            with pytest.raises(FileStoreError, match="Contents API") as caught:
                await work
            assert caught.value.problem is FileProblem.UNSUPPORTED
        assert file.read_bytes() == b"0123\0\0"
        assert await store.homeOf(b"") == await store.realPath(b".") == b"/"
        assert await store.names([0], [0, 1]) == ([""], ["", ""])


@pytest_twisted.ensureDeferred
async def test_copyData(current: RunningJupyter) -> None:
    """copy-data: all of it, and a part."""
    data = os.urandom(700_000)
    (current.root_dir / "from").write_bytes(data)
    async with opened(current) as store:
        source = await store.open(b"/from", READ, NONE)
        target = await store.open(b"/to", PUT, NONE)
        await store.copy(source, 0, 0, target, 0)
        await store.copy(source, 10, 20, target, 700_000)
        await target.close()
        await source.close()
    assert (current.root_dir / "to").read_bytes() == data + data[10:30]


# --- a file that changes -----------------------------------------------------------------------


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("change", ["grown", "shrunk", "rewritten", "replaced", "gone"])
async def test_changedWhileRead(current: RunningJupyter, change: str) -> None:
    """A reader gets one version of a file, or an error; never the end as if nothing were."""
    path = current.root_dir / "file"
    path.write_bytes(b"a" * (12 * MIB))
    os.utime(path, (1000, 1000))
    async with opened(current) as store:
        file = await store.open(b"/file", READ, NONE)
        first = file.read(0, 32768)
        assert await first if isinstance(first, Deferred) else first
        if change == "grown":
            with open(path, "ab") as more:
                more.write(b"more")
        elif change == "shrunk":
            os.truncate(path, 5 * MIB)
        elif change == "rewritten":
            path.write_bytes(b"b" * (12 * MIB))
        elif change == "replaced":
            other = current.root_dir / "other"
            other.write_bytes(b"b" * (12 * MIB))
            other.rename(path)
        else:
            path.unlink()

        async def rest() -> None:
            offset = 32768
            while True:
                data = file.read(offset, 261120)
                data = await data if isinstance(data, Deferred) else data
                if not data:
                    return
                assert set(data) == {ord("a")}
                offset += len(data)

        with pytest.raises(FileStoreError, match="changed while it was read") as caught:
            await rest()
        assert caught.value.problem is FileProblem.FAILURE
        await file.close()


@pytest_twisted.ensureDeferred
async def test_followed(current: RunningJupyter) -> None:
    """tail -f: who read to the end sees what is added after."""
    path = current.root_dir / "log"
    path.write_bytes(b"one\n")
    async with opened(current) as store:
        file = await store.open(b"/log", READ, NONE)

        async def read(offset: int) -> bytes:
            data = file.read(offset, 1000)
            return await data if isinstance(data, Deferred) else data

        assert (await read(0), await read(4), await read(4)) == (b"one\n", b"", b"")
        for text in (b"two\n", b"three\n"):
            with open(path, "ab") as log:
                log.write(text)
            size = path.stat().st_size
            assert await read(size - len(text)) == text
            assert await read(size) == b""
        await file.close()


@pytest_twisted.ensureDeferred
async def test_changedWhileWritten(current: RunningJupyter) -> None:
    """Two who write one file: that fails, and what fails once does not go on."""
    path = current.root_dir / "file"
    async with opened(current) as store:
        file = await store.open(b"/file", PUT, NONE)
        for start in range(0, 2 * MIB, 32768):
            await tried(file, start, b"x" * 32768)
        await file.sync()
        with open(path, "ab") as other:
            other.write(b"other")
        writing = Deferred.fromCoroutine(tried(file, 2 * MIB, b"x"))
        assert await problem(writing) is FileProblem.FAILURE
        assert await problem(file.close()) is FileProblem.FAILURE


@pytest_twisted.ensureDeferred
async def test_writersSeeEachOther(current: RunningJupyter) -> None:
    """Within a session, what one has written and not closed another sees."""
    async with opened(current) as store:
        file = await store.open(b"/file", PUT, NONE)
        file.write(0, b"hello")
        told = await store.stat(b"/file")
        assert told == await file.stat()
        assert told.size == 5
        assert await get(store, b"/file") == b"hello"
        file.write(5, b" there")
        await file.close()
        assert await get(store, b"/file") == b"hello there"


@pytest_twisted.ensureDeferred
async def test_removedWhileOpen(current: RunningJupyter) -> None:
    """A file that is removed or replaced does not come back with what is written later."""
    async with opened(current) as store:
        whole = await store.open(b"/file", PUT, NONE)
        await tried(whole, 0, b"x" * 100)
        await whole.sync()
        part = await store.open(b"/other", PUT, NONE)
        # Behind a gap: it waits for the close.
        assert part.write(50, b"part") is None
        await store.remove(b"/file")
        await put(store, b"/new", b"new")
        await store.rename(b"/new", b"/other", overwrite=True)
        for file in (whole, part):
            late = Deferred.fromCoroutine(tried(file, 100, b"late"))
            assert await problem(late) is FileProblem.FAILURE
        await whole.close()
        assert await problem(part.close()) is FileProblem.FAILURE
        assert set(os.listdir(current.root_dir)) - {".ipynb_checkpoints"} == {"other"}
        assert (current.root_dir / "other").read_bytes() == b"new"


@pytest_twisted.ensureDeferred
async def test_memory(current: RunningJupyter) -> None:
    """What a file costs does not grow with it."""
    path = current.root_dir / "file"
    size = 40 * MIB
    async with opened(current) as store:
        tracemalloc.start()
        try:
            file = await store.open(b"/file", PUT, NONE)
            for start in range(0, size, 256 * 1024):
                await tried(file, start, bytes(256 * 1024))
            await file.close()
            assert path.stat().st_size == size
            file = await store.open(b"/file", READ, NONE)
            for start in range(0, size, 256 * 1024):
                data = file.read(start, 256 * 1024)
                assert len(await data if isinstance(data, Deferred) else data) == 256 * 1024
            await file.close()
            assert tracemalloc.get_traced_memory()[1] < 16 * MIB
        finally:
            tracemalloc.stop()


# --- what goes wrong ---------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_noToken(current: RunningJupyter) -> None:
    """No request carries the token where a log would keep it."""
    async with opened(current) as store:
        await put(store, b"/file", b"data")
        assert await get(store, b"/file") == b"data"
        assert await problem(store.stat(b"/none")) is FileProblem.NOT_FOUND
    assert "/none" in current.log
    assert current.token not in current.log


@pytest_twisted.ensureDeferred
async def test_noContents(jupyters: Jupyters) -> None:
    """A kernel gateway has no files, and that is what is said."""
    async with opened(jupyters["kg"]) as store:
        for work in (
            store.probe(),
            store.stat(b"/"),
            store.stat(b"/file"),
            store.listDirectory(b"/"),
            store.open(b"/file", READ, NONE),
            store.open(b"/file", PUT, NONE),
            store.makeDirectory(b"/file", NONE),
        ):
            with pytest.raises(FileStoreError, match="no Contents API") as caught:
                await work
            assert caught.value.problem is FileProblem.UNSUPPORTED


@pytest_twisted.ensureDeferred
async def test_serverDies() -> None:
    """In the middle of a put and a get: an error on every handle, and what went up is there."""
    server = start_jupyter("current")
    try:
        data = os.urandom(4 * MIB)
        async with opened(server) as store:
            await put(store, b"/whole", data)
            reading = await store.open(b"/whole", READ, NONE)
            first = reading.read(0, 100)
            assert (await first if isinstance(first, Deferred) else first) == data[:100]
            writing = await store.open(b"/part", PUT, NONE)
            for start in range(0, 3 * MIB, 32768):
                await tried(writing, start, data[start : start + 32768])
            await writing.sync()
            kept = (server.root_dir / "part").read_bytes()
            os.kill(server.pid, signal.SIGKILL)
            server._process.wait()
            last = reading.read(4 * MIB - 100, 100)
            assert isinstance(last, Deferred)
            assert await problem(last) is FileProblem.CONNECTION_LOST
            next_ = Deferred.fromCoroutine(tried(writing, 3 * MIB, b"more"))
            assert await problem(next_) is FileProblem.CONNECTION_LOST
            assert await problem(writing.sync()) is FileProblem.CONNECTION_LOST
            more = Deferred.fromCoroutine(tried(writing, 3 * MIB + 4, b"more"))
            assert await problem(more) is FileProblem.CONNECTION_LOST
            assert await problem(writing.close()) is FileProblem.CONNECTION_LOST
            await reading.close()
            assert await problem(store.stat(b"/whole")) is FileProblem.CONNECTION_LOST
            assert kept == (server.root_dir / "part").read_bytes() == data[: 3 * MIB]
    finally:
        server.stop()


@pytest_twisted.ensureDeferred
async def test_diskFull(server: RunningJupyter) -> None:
    """The server's reason comes through, on the write already, and again on close."""
    (server.root_dir / "full").symlink_to("/dev/full")
    async with opened(server) as store:
        file = await store.open(b"/full", WRITE, NONE)
        # The link's own size is all that the API tells.
        writing = Deferred.fromCoroutine(tried(file, len("/dev/full"), b"x" * 100))
        assert await problem(writing) is FileProblem.NO_SPACE
        assert await problem(file.close()) is FileProblem.NO_SPACE


# --- a server with whims -----------------------------------------------------------------------


class Whimsical(Resource):
    """Some of the Contents API, over a dict, with what may go wrong on the way."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.names: list[str] = []
        self.requests: list[str] = []
        self.limit = 1 << 30
        self.lose: list[str] = []
        """For each of the next PUTs: ``before`` or ``after`` it is done, or ``late``, when it is
        done after the next question, or neither."""
        self.late: list[Callable[[], None]] = []
        self.silent = False
        self.unreadable: set[str] = set()

    def render(self, request: Request) -> bytes | int:
        """One request."""
        path = unquote(request.path.decode())
        self.requests.append(f"{request.method.decode()} {request.uri.decode()}")
        if self.silent:
            return NOT_DONE_YET
        if path.startswith("/files/"):
            data = self.files.get(path.removeprefix("/files/"))
            if path.removeprefix("/files/") in self.unreadable:
                request.setResponseCode(500)
                return b"<html>"
            if data is None:
                request.setResponseCode(404)
                return b"<html>"
            request.setHeader(b"Last-Modified", b"Thu, 01 Jan 1970 00:16:40 GMT")
            while self.late:
                self.late.pop()()
            return data
        path = path.removeprefix("/api/contents").lstrip("/")
        if request.method == b"PUT":
            return self.put(request, path)
        if path and path not in self.files:
            request.setResponseCode(404)
            return b'{"message": "no such file"}'
        return self.model(path)

    def put(self, request: Request, path: str) -> bytes | int:
        """Write."""
        body = request.content.read()
        if len(body) > self.limit:
            request.setResponseCode(413)
            return b"<html>413 Request Entity Too Large</html>"
        lose = self.lose.pop(0) if self.lose else ""
        if lose != "before":
            told = json.loads(body)
            data = base64.b64decode(told["content"])

            def write() -> None:
                before = b"" if told.get("chunk", 1) == 1 else self.files.get(path, b"")
                self.files[path] = before + data

            if lose == "late":
                self.late.append(write)
            else:
                write()
        if lose:
            request.transport.abortConnection()
            return NOT_DONE_YET
        return self.model(path)

    def model(self, path: str) -> bytes:
        """What a file is."""
        if path:
            size = len(self.files[path])
            return json.dumps({"name": path, "type": "file", "size": size}).encode()
        content = [{"name": name, "type": "file", "size": -5} for name in self.names]
        return json.dumps({"name": "", "type": "directory", "content": content}).encode()


@asynccontextmanager
async def whimsical() -> AsyncIterator[tuple[Whimsical, ContentsFileStore]]:
    """Such a server, and a store on it."""
    resource = Whimsical()
    listening = reactor.listenTCP(0, Site(resource), interface="127.0.0.1")
    agent = make_agent(reactor)
    location = JupyterLocation(f"http://127.0.0.1:{listening.getHost().port}", "hunter2")
    store = ContentsFileStore(reactor, JupyterClient(reactor, location, agent))
    try:
        yield resource, store
    finally:
        await store.close()
        await agent.close()
        await listening.stopListening()


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("lose", ["before", "after", "late"])
async def test_lostAnswers(lose: str) -> None:
    """A connection that ends under a chunk: it is neither lost nor doubled, also if the server
    writes it only when it was asked whether it has."""
    data = os.urandom(9500)
    async with whimsical() as (server, store):
        file = await store.open(b"/file", PUT, NONE)
        server.lose = [lose, "", lose, "", lose]
        for start in range(0, len(data), 500):
            await tried(file, start, data[start : start + 500])
        server.lose.append(lose)
        await file.close()
        assert server.files["file"] == data
        server.lose = [lose]
        file = await store.open(b"/file", PUT, NONE)
        assert server.files["file"] == b""
        server.lose = ["before", "before"]
        writing = Deferred.fromCoroutine(tried(file, 0, b"x"))
        assert await problem(writing) is FileProblem.CONNECTION_LOST
        assert await problem(file.close()) is FileProblem.CONNECTION_LOST


@pytest_twisted.ensureDeferred
async def test_smallRequests() -> None:
    """A proxy that takes no large bodies gets small ones; one that takes none is an error."""
    data = os.urandom(2 * MIB)
    async with whimsical() as (server, store):
        server.limit = 100_000
        await put(store, b"/file", data)
        assert server.files["file"] == data
        server.limit = 10_000
        file = await store.open(b"/file", PUT, NONE)
        with pytest.raises(FileStoreError, match="413"):
            await tried(file, 0, data)
        with pytest.raises(FileStoreError, match="413"):
            await file.close()


@pytest_twisted.ensureDeferred
async def test_noParts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends only whole files: small ones are read, large ones refused."""
    data = os.urandom(5 * MIB)
    async with whimsical() as (server, store):
        server.files["file"] = data
        assert await get(store, b"/file") == data
        monkeypatch.setattr(contents_http, "MAX_WHOLE_BYTES", 4 * MIB)
        with pytest.raises(FileStoreError, match="only whole") as caught:
            await get(store, b"/file")
        assert caught.value.problem is FileProblem.UNSUPPORTED


@pytest_twisted.ensureDeferred
async def test_evilNames() -> None:
    """Names that lead elsewhere are not handed on."""
    async with whimsical() as (server, store):
        server.names = ["good", "..", ".", "", "a/b", "/etc/passwd", "a\0b", "raw\udcff", "x\ud800"]
        assert list(await names(store, b"/")) == [b"good", b"raw\xff"]
        assert not [uri for uri in server.requests if "hunter2" in uri]


@pytest_twisted.ensureDeferred
async def test_givenUp() -> None:
    """What is cancelled or closed leaves no request behind, and no one waiting."""
    async with whimsical() as (server, store):
        server.files["file"] = b"x" * 5 * MIB
        reading = await store.open(b"/file", READ, NONE)
        writing = await store.open(b"/new", PUT, NONE)
        server.silent = True
        stat = store.stat(b"/file")
        stat.cancel()
        with pytest.raises((CancelledError, FileStoreError)):
            await stat
        waiting = reading.read(0, 1000)
        assert isinstance(waiting, Deferred)
        await reading.close()
        assert await problem(waiting) is FileProblem.FAILURE
        writes = [writing.write(n * 100_000, b"x" * 100_000) for n in range(40)]
        blocked = [one for one in writes if one is not None]
        assert len(blocked) == len(writes)
        closing = writing.close()
        closing.cancel()
        with pytest.raises((CancelledError, FileStoreError)):
            await closing
        for one in blocked:
            assert await problem(one) is FileProblem.FAILURE
        assert store.budget.used == 0


@pytest_twisted.ensureDeferred
async def test_unreadable() -> None:
    """A file that Jupyter's account may not read is there, and fails when it is read."""
    async with whimsical() as (server, store):
        server.files["file"] = b"secret"
        server.unreadable.add("file")
        assert (await store.stat(b"/file")).size == 6
        file = await store.open(b"/file", READ, NONE)
        reading = file.read(0, 6)
        assert isinstance(reading, Deferred)
        assert await problem(reading) is FileProblem.FAILURE
