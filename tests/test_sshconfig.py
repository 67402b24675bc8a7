"""ssh's configuration before and after, and what ssh itself makes of it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conchkernel import sshconfig
from conchkernel.errors import ConfigurationError

NAMES = Path("/home/ann/my state/names")
INCLUDE = sshconfig.includeLine(NAMES)
PROGRAM = ("/opt/my python/bin/python", "-m", "conchkernel.cli")
KEY = b"ssh-ed25519 AAAA comment"

CONFIGS = [
    b"",
    b"\n",
    b"# nothing\n",
    b"Host other\n  Port 3\n",
    b"Host other\n  Port 3",
    b"ForwardAgent yes\r\nHost other\r\n",
    b"Include ~/.ssh/more\nMatch all\n",
    b"\xff\xfe latin\n",
]


@pytest.mark.parametrize("config", CONFIGS)
def test_includedAndTakenBack(config: bytes) -> None:
    """The Include comes first and once, and every byte comes back."""
    changed = sshconfig.withInclude(config, INCLUDE)
    assert changed.split(b"\n")[1] + b"\n" == INCLUDE
    assert changed.endswith(config)
    assert sshconfig.withInclude(changed, INCLUDE) == changed
    assert sshconfig.withoutInclude(changed, INCLUDE) == config


@given(st.binary())
def test_anyConfiguration(config: bytes) -> None:
    """The same for whatever bytes somebody has there."""
    if INCLUDE.strip() not in config:
        changed = sshconfig.withInclude(config, INCLUDE)
        assert sshconfig.withoutInclude(changed, INCLUDE) == config
        assert sshconfig.withoutInclude(config, INCLUDE) == config


def test_aFileOfOurs() -> None:
    """Where there was none it goes again, unless somebody has written into it."""
    made = sshconfig.withInclude(None, INCLUDE)
    assert sshconfig.withInclude(made, INCLUDE) == made
    assert sshconfig.withoutInclude(made, INCLUDE) is None
    assert sshconfig.withoutInclude(made + b"Host x\n", INCLUDE) == b"Host x\n"
    assert sshconfig.withoutInclude(None, INCLUDE) is None


def test_anIncludeBehindAHost() -> None:
    """Would belong to that host: it is brought to the front."""
    config = b"Host other\n  Port 3\n" + INCLUDE
    changed = sshconfig.withInclude(config, INCLUDE)
    assert changed.count(INCLUDE) == 1
    assert changed.index(INCLUDE) < changed.index(b"Host other")
    assert changed.endswith(b"\nHost other\n  Port 3\n")


def test_anIncludeThatSomebodyMoved() -> None:
    """Among the first lines it may stay, and is found there to be removed."""
    config = b"ForwardAgent yes\n" + INCLUDE + b"Host other\n"
    assert sshconfig.withInclude(config, INCLUDE) == config
    assert sshconfig.withoutInclude(config, INCLUDE) == b"ForwardAgent yes\nHost other\n"


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (b"Host lab\n", True),
        (b"  host=lab\n", True),
        (b"HOST a lab b\n", True),
        (b'Host "lab"\n', True),
        (b"Host lab\r\n", True),
        (b"# Host lab\n", False),
        (b"Host lab2\n", False),
        (b"Host *\n", False),
        (b"HostName lab\n", False),
        (b"", False),
        (None, False),
    ],
)
def test_hasHost(config: bytes | None, known: bool) -> None:
    """A name that is taken is seen, however it is written."""
    assert sshconfig.hasHost(config, "lab") is known


@pytest.mark.parametrize("character", ["'", '"', "\\", "*", "?", "[", "%", "$", "{", "\n", "\x7f"])
def test_impossiblePaths(character: str) -> None:
    """What means something to ssh is refused, not escaped in three ways."""
    with pytest.raises(ConfigurationError, match="cannot hold the path"):
        sshconfig.includeLine(Path(f"/home/a{character}b"))


def test_aLongPath(tmp_path: Path) -> None:
    """Where the socket would not fit connections are not shared, and all the rest works."""
    long = Path("/") / ("x" * 90) / "lab"
    text, _ = sshconfig.block("lab", long, Path("/s"), PROGRAM, KEY)
    assert b"ControlMaster" not in text
    assert b"not shared" in text


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Short enough for a socket's path, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="ck") as directory:
        yield Path(directory)


def test_whatSSHMakesOfIt(short_path: Path) -> None:
    """Paths with spaces arrive whole, by an Include whose directory has a space too; other hosts
    are as they were."""
    names = short_path / "my state" / "names"
    directory = names / "lab"
    directory.mkdir(parents=True)
    text, known = sshconfig.block("lab", directory, short_path / "my state", PROGRAM, KEY)
    (directory / sshconfig.BLOCK_FILE).write_bytes(text)
    before = b"Port 77\nHost other\n  User bob\nHost *\n  User eve\n  ControlMaster no\n"
    config = short_path / "config"
    config.write_bytes(sshconfig.withInclude(before, sshconfig.includeLine(names)))

    def told(host: str) -> dict[str, str]:
        done = subprocess.run(
            ["ssh", "-G", "-F", config, host], capture_output=True, text=True, check=True
        )
        return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())

    lab = told("lab")
    assert lab["proxycommand"] == (
        "'/opt/my python/bin/python' -m conchkernel.cli proxy "
        f"--state-dir '{short_path}/my state' lab"
    )
    assert lab["user"] == "owner"
    assert lab["stricthostkeychecking"] == "true"
    assert lab["userknownhostsfile"] == str(directory / "known_hosts")
    assert lab["hostkeyalias"] == "lab"
    assert (lab["controlmaster"], lab["controlpersist"]) == ("auto", "600")
    assert lab["controlpath"] == str(directory / "master")
    assert known == b"lab ssh-ed25519 AAAA\n"
    other = told("other")
    assert (other["user"], other["port"], other["controlmaster"]) == ("bob", "77", "false")
    assert "proxycommand" not in other
