"""Trees of files that go across and back, and the places where clients put them.

A :class:`Far` is a directory at the other end, on this machine in truth, so that a test looks at
what a client has made there without any client.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from .conftest import Host

BULK = random.Random(4).randbytes(3_000_017)

#: Path -> content. Names that have to be quoted somewhere on the road; sizes around what one
#: request carries; what a server that knows text, or notebooks, could alter.
FILES: dict[str, bytes] = {
    "empty": b"",
    "one": b"1",
    "a name with spaces": BULK[:32767],
    "naïve 名前": BULK[:32768],
    "100% %41 sure": BULK[:32769],
    "#hash": b"#\n",
    "what?": b"?\n",
    "a+b&c=d;e": b"+\n",
    "it's": b"'\n",
    "dos.txt": b"one\r\ntwo\rthree\n\xef\xbb\xbffour",
    "latin.txt": b"na\xefve\n",
    "note.ipynb": b'{"nbformat":4,"cells":[], "metadata":{} }',
    "broken.ipynb": b'{"nbformat":',
    "page.html": b"<html>\0</html>",
    "large": BULK,
    "sub dir/deeper %#?/leaf": BULK[:100_000],
    "sub dir/script": b"#!/bin/sh\n",
}
MODES = {"one": 0o600, "sub dir/script": 0o755, "large": 0o444, "sub dir": 0o750}
LINKS = {"link": "large", "dangling": "no/where"}
EVERYTHING = frozenset({"modes", "times", "links"})


@dataclass
class Far:
    """A directory at the other end, and what the store there keeps beside bytes."""

    host: Host
    store: str
    root: Path
    """On the disk."""
    path: str
    """The same as a client says it."""
    kept: frozenset[str] = EVERYTHING

    @property
    def url_path(self) -> str:
        """As part of a URL whose host it follows; the names of tests need no quoting."""
        return self.path


def far_on(host: Host, store: str, directory: Path) -> Far:
    """A new directory: below ``directory``, or Jupyter's root where the store sees nothing else."""
    if store == "contents":
        root = Path(tempfile.mkdtemp(prefix="far-", dir=host.jupyter.root_dir))  # type: ignore[attr-defined]
        root.chmod(0o755)
        return Far(host, store, root, f"/{root.name}", frozenset())
    root = directory / "far"
    root.mkdir()
    return Far(host, store, root, str(root))


def make_tree(root: Path, kept: Collection[str] = EVERYTHING) -> None:
    """A tree with what a store keeps: modes, times and links are only made if it does.

    What it does not keep is as new files have it.
    """
    for name, content in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if "modes" in kept:
        for name, mode in MODES.items():
            (root / name).chmod(mode)
    if "links" in kept:
        for name, target in LINKS.items():
            (root / name).symlink_to(target)
    if "times" in kept:
        for number, name in enumerate(sorted(FILES)):
            os.utime(root / name, (1_300_000_000 + number, 1_200_000_000 + number))


def seen(root: Path, kept: Collection[str] = ()) -> dict[str, Any]:
    """A tree as it can be compared: kinds and digests, and what else is said to be kept."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.name == ".ipynb_checkpoints" and not any(path.iterdir()):
            # Jupyter makes it whenever anybody renames or removes something.
            continue
        told = path.lstat()
        if stat.S_ISLNK(told.st_mode):
            found[name] = os.readlink(path) if "links" in kept else "link"
            continue
        fact: list[Any] = ["directory"]
        if stat.S_ISREG(told.st_mode):
            fact = [told.st_size, digest(path)]
            if "times" in kept:
                fact.append(int(told.st_mtime))
        if "modes" in kept:
            fact.append(oct(stat.S_IMODE(told.st_mode)))
        found[name] = tuple(fact)
    return found


def digest(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def empty(root: Path) -> None:
    """Remove what is in a directory."""
    for path in root.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
