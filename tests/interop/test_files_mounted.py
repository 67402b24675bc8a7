"""sshfs: the far directory as one of this machine's, with the programs that people use there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from .conftest import PATIENCE, until
from .filetrees import BULK, FILES, LINKS, Far, digest, make_tree, seen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def mounted(far: Far, directory: Path, *options: str) -> Iterator[Path]:
    """``sshfs``, which ends with the test whatever it is doing."""
    directory.mkdir()
    words = ["sshfs", "-f", "-F", str(far.host.config), f"{far.host.name}:{far.path}"]
    words += [str(directory), *options]
    with subprocess.Popen(
        words, env=far.host.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:

            def is_there() -> bool:
                assert process.poll() is None, process.stderr and process.stderr.read()
                return os.path.ismount(directory)

            until(is_there, "it is mounted")
            yield directory
        finally:
            if subprocess.run(["fusermount", "-u", directory], check=False, timeout=20).returncode:
                subprocess.run(["umount", "-l", directory], check=False, timeout=20)
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()


@pytest.fixture
def mount(far: Far, tmp_path: Path) -> Iterator[Path]:
    """The far directory here."""
    with mounted(far, tmp_path / "mount") as directory:
        yield directory


def test_editing(far: Far, mount: Path) -> None:
    """What editors and shells do: save over by a rename, append, truncate, write in the middle."""
    file = mount / "a %#? ü"
    file.write_bytes(BULK)
    assert file.stat().st_size == len(BULK)
    assert digest(far.root / file.name) == digest(file)
    beside = mount / "saved~"
    beside.write_bytes(BULK[:100_000])
    beside.rename(file)
    assert (far.root / file.name).read_bytes() == BULK[:100_000] == file.read_bytes()
    with file.open("ab") as opened:
        opened.write(b"more")
    os.truncate(file, 50_000)
    with file.open("r+b") as opened:
        opened.seek(20_000)
        opened.write(b"here")
        opened.flush()
        os.fsync(opened.fileno())
    wanted = BULK[:20_000] + b"here" + BULK[20_004:50_000]
    assert (far.root / file.name).read_bytes() == wanted == file.read_bytes()
    (mount / "d" / "e").mkdir(parents=True)
    file.rename(mount / "d" / "e" / "f")
    assert os.listdir(mount / "d" / "e") == ["f"]
    with pytest.raises(OSError, match=r"."):
        (mount / "d" / "e").rmdir()
    shutil.rmtree(mount / "d")
    assert seen(far.root) == {}


def test_trees(far: Far, mount: Path, tmp_path: Path) -> None:
    """``cp -r`` there and back, ``tar x``, ``du`` and ``find``."""
    tree, down = tmp_path / "tree", tmp_path / "down"
    make_tree(tree, far.kept)
    # sshfs follows links whose owner or time is to be set.
    for name in LINKS:
        (tree / name).unlink(missing_ok=True)
    keep = "-a" if far.kept else "-r"
    subprocess.run(["cp", keep, tree, mount / "up"], check=True, timeout=PATIENCE)
    # What sshfs writes late changes the time again that was set before.
    kept = far.kept - {"times"}
    wanted = seen(tree, kept)
    assert seen(far.root / "up", kept) == wanted
    subprocess.run(["cp", keep, mount / "up", down], check=True, timeout=PATIENCE)
    assert seen(down, kept) == wanted
    archive = tmp_path / "tree.tar"
    subprocess.run(["tar", "-C", tree, "-cf", archive, "."], check=True, timeout=PATIENCE)
    (mount / "untarred").mkdir()
    extracting = ["tar", "-C", mount / "untarred", "-xf", archive]
    if not far.kept:
        extracting += ["--touch", "--no-same-permissions", "--no-same-owner"]
    untarred = subprocess.run(extracting, check=False, timeout=PATIENCE, capture_output=True)
    assert seen(far.root / "untarred", kept) == wanted
    if far.kept:
        assert untarred.returncode == 0, untarred.stderr
    found = subprocess.run(
        ["find", "up", "-type", "f"], cwd=mount, check=True, timeout=PATIENCE, capture_output=True
    )
    assert len(found.stdout.splitlines()) == len(FILES)


def test_git_clone(far: Far, mount: Path, tmp_path: Path) -> None:
    """A clone on the mount, a commit in it, and a check of every object."""
    if not far.kept:
        # Needs modes that stay: git's lock files are made read-only.
        (mount / "file").write_bytes(b"x")
        with pytest.raises(OSError, match=r"."):
            (mount / "file").chmod(0o400)
        return
    source = tmp_path / "source"
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]

    def git(*words: str | Path) -> bytes:
        return subprocess.run(
            ["git", *identity, *words], check=True, timeout=PATIENCE, capture_output=True,
            env=far.host.environment,
        ).stdout  # fmt: skip

    git("init", "-q", "-b", "main", source)
    make_tree(source, {"modes", "links"})
    git("-C", source, "add", ".")
    git("-C", source, "commit", "-qm", "one")
    git("clone", "-q", "--no-local", source, mount / "clone")
    assert git("-C", mount / "clone", "status", "--porcelain") == b""
    (mount / "clone" / "new").write_text("new")
    git("-C", mount / "clone", "add", "new")
    git("-C", mount / "clone", "commit", "-qm", "two")
    git("-C", far.root / "clone", "fsck", "--full")
    assert git("-C", far.root / "clone", "log", "--format=%s").split() == [b"two", b"one"]


def test_links_and_space(far: Far, mount: Path) -> None:
    """``ln -s`` and ``ln``, modes, times, ``df``: or an error that a program understands."""
    file = mount / "file"
    file.write_bytes(b"x")
    if not far.kept:
        for change in (
            lambda: (mount / "soft").symlink_to("file"),
            lambda: (mount / "hard").hardlink_to(file),
            lambda: file.chmod(0o600),
        ):
            with pytest.raises(OSError, match=r"."):
                change()
        assert seen(far.root).keys() == {"file"}
        return
    (mount / "soft").symlink_to("file")
    (mount / "hard").hardlink_to(file)
    assert os.readlink(far.root / "soft") == "file"
    assert (far.root / "hard").samefile(far.root / "file")
    file.chmod(0o640)
    os.utime(file, (1_000_000_000, 1_100_000_000))
    told = (far.root / "file").stat()
    assert (told.st_mode & 0o777, told.st_mtime) == (0o640, 1_100_000_000)
    here, there = os.statvfs(mount), os.statvfs(far.root)
    assert here.f_blocks * here.f_frsize == there.f_blocks * there.f_frsize
