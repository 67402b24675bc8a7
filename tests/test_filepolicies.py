"""Stores around stores: nothing is changed, and nothing outside is reached."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, maybeDeferred
from zope.interface.verify import verifyObject

from conchkernel.filepolicies import JailedFileStore, ReadOnlyFileStore
from conchkernel.files import (
    Attributes,
    FileProblem,
    FileStoreError,
    IFileStore,
    IOpenFile,
    OpenFlag,
)
from conchkernel.localfiles import DirectoryFileStore
from conchkernel.memoryfiles import MemoryFileStore

if TYPE_CHECKING:
    from pathlib import Path

NONE = Attributes()
R, W = OpenFlag.READ, OpenFlag.WRITE


async def refused(doing: Deferred[Any], *problems: FileProblem) -> None:
    """It fails for one of these reasons."""
    with pytest.raises(FileStoreError) as caught:
        await doing
    assert caught.value.problem in problems


@pytest_twisted.ensureDeferred
async def test_readOnly() -> None:
    """Every change is refused, everything else works."""
    memory = MemoryFileStore()
    memory.put(b"/file", b"data")
    store = ReadOnlyFileStore(memory)
    verifyObject(IFileStore, store)
    for flags in (W, R | W, R | OpenFlag.CREATE, R | OpenFlag.TRUNCATE, OpenFlag.APPEND):
        await refused(store.open(b"/file", flags, NONE), FileProblem.READ_ONLY)
    file = await store.open(b"/file", R, NONE)
    verifyObject(IOpenFile, file)
    assert file.read(0, 10) == b"data"
    assert (await file.stat()).size == 4
    changes = [
        file.write(0, b"x"), file.setAttributes(Attributes(size=0)), file.sync(),
        store.setAttributes(b"/file", Attributes(size=0)), store.remove(b"/file"),
        store.makeDirectory(b"/d", NONE), store.removeDirectory(b"/home"),
        store.rename(b"/file", b"/f", overwrite=True), store.symbolicLink(b"a", b"/b"),
        store.hardLink(b"/file", b"/b"), store.copy(file, 0, 0, file, 0),
    ]  # fmt: skip
    for change in changes:
        assert change is not None
        await refused(change, FileProblem.READ_ONLY)
    assert memory.get(b"/file") == b"data"
    assert await store.realPath(b".") == store.home == memory.home
    listing = await store.listDirectory(b"/")
    assert len(await listing.next()) == 4
    assert (await store.filesystem(b"/")).flags == 1
    assert (await file.filesystem()).flags == 1
    await file.close()
    await store.close()
    assert memory.isClosed


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, JailedFileStore]:
    """A directory with secrets, and a jail in it whose inmate could make links."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"secret")
    jail = tmp_path / "jail"
    (jail / "d").mkdir(parents=True)
    (jail / "file").write_bytes(b"mine")
    (jail / "up").symlink_to("..")
    (jail / "d/up").symlink_to("../..")
    (jail / "absolute").symlink_to(tmp_path)
    (jail / "toFile").symlink_to(tmp_path / "secret")
    (jail / "chain").symlink_to("d/up")
    (jail / "dangling").symlink_to(tmp_path / "outside/new")
    (jail / "inside").symlink_to("d/../file")
    (tmp_path / "jail2").mkdir()
    (tmp_path / "jail2/secret").write_bytes(b"secret")
    (jail / "neighbour").symlink_to("../jail2")
    return tmp_path, JailedFileStore(DirectoryFileStore(jail), os.fsencode(jail))


OUT = (FileProblem.PERMISSION, FileProblem.NOT_FOUND)
ESCAPES = [
    b"/up/secret", b"/d/up/secret", b"/absolute/secret", b"/toFile", b"/chain/secret",
    b"/up/outside/file", b"/neighbour/secret", b"/d/../up/secret", b"/../secret",
    b"../secret", b"../../../../../../etc/passwd", b"/d/../../secret", b"//../secret",
    b"/./../secret", b"/up/jail2/secret", b"/absolute/jail/../secret", b"/dangling",
    b"/../jail2/secret",
]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES)
@pytest_twisted.ensureDeferred
async def test_escapes(places: tuple[Path, JailedFileStore], path: bytes) -> None:
    """No way of naming what is outside leads there, whatever is to be done."""
    root, store = places
    before = sorted(str(one) for one in root.rglob("*"))
    await refused(store.open(path, R, NONE), *OUT)
    await refused(store.open(path, W | OpenFlag.TRUNCATE, NONE), *OUT)
    await refused(store.stat(path), *OUT)
    await refused(store.setAttributes(path, Attributes(mode=0o777)), *OUT)
    await refused(store.listDirectory(path), *OUT)
    await refused(store.filesystem(path), *OUT)
    if b".." not in path:
        await refused(store.realPath(path), *OUT)
        await refused(store.open(path, W | OpenFlag.CREATE, NONE), *OUT)
    if path.count(b"/") > 1 and b".." not in path:
        # Also what is done to the name itself.
        await refused(store.stat(path, follow=False), *OUT)
        await refused(store.remove(path), *OUT)
        await refused(store.rename(b"/file", path, overwrite=True), *OUT)
        await refused(store.rename(path, b"/mine", overwrite=True), *OUT)
        await refused(store.hardLink(path, b"/mine"), *OUT)
        await refused(store.hardLink(b"/file", path), *OUT)
        await refused(store.symbolicLink(b"x", path + b"2"), *OUT)
        await refused(store.makeDirectory(path + b"2", NONE), *OUT)
        await refused(store.readLink(path), *OUT)
    assert sorted(str(one) for one in root.rglob("*")) == before
    assert (root / "secret").read_bytes() == b"secret"
    assert (root / "secret").stat().st_mode & 0o777 != 0o777


@pytest_twisted.ensureDeferred
async def test_insideTheJail(places: tuple[Path, JailedFileStore]) -> None:
    """What is inside is used as ever, and paths tell nothing of what is above."""
    root, store = places
    assert store.home == b"/"
    for path, real in ((b"/", b"/"), (b"/..", b"/"), (b".", b"/"), (b"inside", b"/file"),
                       (b"/d/..", b"/"), (b"/d/new", b"/d/new")):  # fmt: skip
        assert await store.realPath(path) == real
    file = await store.open(b"/inside", R, NONE)
    assert await maybeDeferred(file.read, 0, 10) == b"mine"
    await store.rename(b"/file", b"/d/file", overwrite=False)
    await store.remove(b"/toFile")
    assert (root / "secret").exists()
    assert await store.readLink(b"/up") == b".."
    for doing in (store.removeDirectory(b"/"), store.remove(b"/d/.."),
                  store.rename(b"/", b"/x", overwrite=True)):  # fmt: skip
        await refused(doing, FileProblem.PERMISSION)
    await store.close()


@pytest_twisted.ensureDeferred
async def test_homesInAJail() -> None:
    """One that is inside has its place, others are not there."""
    memory = MemoryFileStore()
    wide = JailedFileStore(memory, b"/home")
    assert (wide.home, await wide.homeOf(b"joe"), await wide.homeOf(b"")) == (
        b"/joe", b"/joe", b"/joe",
    )  # fmt: skip
    assert await wide.realPath(b"new") == b"/joe/new"
    memory.do(memory._makeDirectory, b"/other", NONE)
    other = JailedFileStore(memory, b"/other")
    assert (other.home, await other.homeOf(b"joe")) == (b"/", b"")
    whole = JailedFileStore(memory, b"/")
    assert (whole.home, await whole.homeOf(b"joe")) == (b"/home/joe", b"/home/joe")
    assert await whole.realPath(b"/home/joe") == b"/home/joe"
    missing = JailedFileStore(memory, b"/no/such")
    await refused(missing.stat(b"/"), FileProblem.NOT_FOUND)


@pytest_twisted.ensureDeferred
async def test_policiesAddUp(places: tuple[Path, JailedFileStore]) -> None:
    """A jail that is only looked at."""
    _, jail = places
    store = ReadOnlyFileStore(jail)
    await refused(store.open(b"/up/secret", R, NONE), *OUT)
    await refused(store.remove(b"/file"), FileProblem.READ_ONLY)
    file = await store.open(b"/file", R, NONE)
    assert await maybeDeferred(file.read, 0, 10) == b"mine"
    await store.close()
