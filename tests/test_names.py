"""Names for servers: which there can be, and what is kept of them and how."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from typing import TYPE_CHECKING

import pytest

from conchkernel.errors import ConfigurationError
from conchkernel.names import Settings, defaultStateDir, named

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = Settings("http://jupyter.example.org/?token=secret", kernelName="python3", linger=5)


@pytest.mark.parametrize("text", ["a", "lab", "gpu-1", "my_lab", "7", "x" * 63])
def test_names(text: str, tmp_path: Path) -> None:
    """A word that is one to ssh, to a shell and in a path."""
    assert named(text, tmp_path).directory == tmp_path / "names" / text


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "a/b", "../a", "-a", "a-", "_a", "A", "a b", "a\n", "a*", "!a", "a,b", "a;b",
     "$a", "%h", "'a'", "github.com", "127.0.0.1", "::1", "localhost", "ä", "x" * 64, "a\x00"],
)  # fmt: skip
def test_noNames(text: str, tmp_path: Path) -> None:
    """Everything else, patterns and what some host may be called among it."""
    with pytest.raises(ConfigurationError, match=r"cannot be a name") as caught:
        named(text, tmp_path)
    assert str(caught.value).isprintable()


def test_kept(tmp_path: Path) -> None:
    """What was saved comes back; nobody else can read it, or go where it is."""
    name = named("lab", tmp_path / "state")
    name.save(SETTINGS)
    assert name.load() == SETTINGS
    assert "secret" not in repr(name.load())
    (file,) = name.directory.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for directory in (name.directory, name.directory.parent, tmp_path / "state"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    name.forget()
    name.forget()
    assert not name.directory.exists()


def test_removedWhileOthersEnd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that come and go there meanwhile do not keep it; what cannot be removed is said."""
    name = named("lab", tmp_path)
    name.save(SETTINGS)
    problems = [errno.ENOTEMPTY, errno.ENOENT]
    remove = shutil.rmtree

    def meddled(path: Path) -> None:
        if problems:
            raise OSError(problems[0], os.strerror(problems.pop(0)))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", meddled)
    name.forget()
    assert not name.directory.exists()
    name.save(SETTINGS)
    for kept in ([errno.ENOTEMPTY] * 1000, [errno.EACCES]):
        problems = kept
        with pytest.raises(ConfigurationError, match=os.strerror(kept[0])):
            name.forget()


def test_whatIsNotThere(tmp_path: Path) -> None:
    """Says how to make it."""
    with pytest.raises(ConfigurationError, match="config-ssh lab URL"):
        named("lab", tmp_path).load()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"url": 1}', '{"url": "u", "linger": "x"}', '{"url": "u", "linger": NaN}',
     '{"url": "u", "orphanTimeout": -1}', '{"url": "u", "kernelName": []}', '{"url": "u", "x": 1}',
     "\xff"],
)  # fmt: skip
def test_damaged(content: str, tmp_path: Path) -> None:
    """Nothing is guessed."""
    name = named("lab", tmp_path)
    name.save(SETTINGS)
    (file,) = name.directory.iterdir()
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"damaged.*config-ssh lab URL"):
        name.load()


def test_openToOthers(tmp_path: Path) -> None:
    """A token that others can read is not used."""
    name = named("lab", tmp_path)
    name.save(SETTINGS)
    (file,) = name.directory.iterdir()
    file.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        name.load()


def test_theStateDirectory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Follows HOME, and XDG_STATE_HOME where that is absolute."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", ignored)
        assert defaultStateDir() == tmp_path / ".local" / "state" / "conchkernel"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert defaultStateDir() == tmp_path / "xdg" / "conchkernel"
