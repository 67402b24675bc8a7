"""The agent's directory and socket, and what killed agents have left of theirs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conchkernel.remote import home


def path(parent: Path, number: int) -> Path:
    """The socket of some agent."""
    return parent / f"conchkernel-{os.getuid()}-{number:016x}" / "s"


def aged(directory: Path) -> None:
    """As it would be after two minutes."""
    seconds = directory.stat().st_mtime - 120
    os.utime(directory, (seconds, seconds))


def test_a_directory_of_somebody_elses_is_refused(tmp_path):
    """A planted link, or a file, is not taken for ours."""
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(OSError, match="not a directory"):
            home.private_directory(str(tmp_path / name))


def test_a_dead_socket_is_replaced_and_a_live_one_is_not(tmp_path):
    """What a killed agent left behind does not stand in the way of the next."""
    mine = str(tmp_path / "d" / "s")
    home.listen(mine).close()
    listener = home.listen(mine)
    with pytest.raises(OSError, match="in use"):
        home.listen(mine)
    listener.close()


def test_leaving_takes_everything_away(tmp_path):
    """Also if somebody was faster."""
    mine = tmp_path / "d" / "s"
    home.listen(str(mine)).close()
    home.leave(str(mine))
    assert not mine.parent.exists()
    home.leave(str(mine))


def test_the_next_agents_socket_is_left_alone(tmp_path):
    """Somebody has removed ours, and another agent listens in its place."""
    mine = tmp_path / "d" / "s"
    ours = home.listen(str(mine))
    inode = mine.stat().st_ino
    mine.unlink()
    theirs = home.listen(str(mine))
    home.leave(str(mine), inode)
    assert mine.is_socket()
    home.leave(str(mine), mine.stat().st_ino)
    assert not mine.parent.exists()
    ours.close()
    theirs.close()


def test_what_killed_agents_left_is_swept(tmp_path):
    """The live, the young and what only looks alike are left alone."""
    mine, dead, empty, live, young = (path(tmp_path, number) for number in range(5))
    listeners = [home.listen(str(socket)) for socket in (mine, live)]
    for socket in (dead, young):
        home.listen(str(socket)).close()
    home.private_directory(str(empty.parent))
    other = tmp_path / "conchkernel-demo-00000000"
    link = path(tmp_path, 5).parent
    full = path(tmp_path, 6).parent
    other.mkdir()
    link.symlink_to(other)
    full.mkdir()
    (full / "kept").touch()
    for directory in (mine.parent, dead.parent, empty.parent, live.parent, other, full):
        aged(directory)
    home.sweep(str(mine))
    assert not dead.parent.exists()
    assert not empty.parent.exists()
    left = {mine.parent, live.parent, young.parent, other, link, full}
    assert set(tmp_path.iterdir()) == left
    assert all(kept.exists() for kept in (mine, live, young, full / "kept"))
    for listener in listeners:
        listener.close()


def test_an_agent_of_another_name_sweeps_nothing(tmp_path):
    """One that a program embeds has a directory of that program's choice."""
    dead = path(tmp_path, 1)
    home.listen(str(dead)).close()
    aged(dead.parent)
    home.sweep(str(tmp_path / "conchkernel-abc" / "s"))
    assert dead.exists()
