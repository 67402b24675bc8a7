"""``--sftp-root`` and ``--sftp-read-only`` against clients that try."""

from __future__ import annotations

import contextlib
import getpass
import os
import threading
from typing import TYPE_CHECKING

import paramiko
import pytest

from ..jupyters import start_jupyter
from .conftest import running
from .filetrees import BULK, Far, seen
from .test_paramiko import transport

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import Host

STORES = ["agent", "contents"]
SECRET = b"what nobody may read"


@contextlib.contextmanager
def limited(
    store: str, client_home: Path, factory: pytest.TempPathFactory, *options: str
) -> Iterator[Far]:  # fmt: skip
    """A gateway of a jail named ``in``; ``out`` is beside it."""
    server = start_jupyter("current")
    base = server.root_dir / "base"
    for name in ("in", "out", "in2"):
        (base / name).mkdir(parents=True)
        (base / name / "secret").write_bytes(SECRET)
    (base / "in" / "secret").unlink()
    (base / "in" / "file").write_bytes(b"allowed")
    (base / "in" / "sub").mkdir()
    root = str(base / "in") if store == "agent" else f"/{base.name}/in"
    given = ["--files", store, "--sftp-root", root, *options]
    given += ["--authorized-keys", str(client_home / "key.pub")]
    directory = factory.mktemp(f"jail-{store}")
    try:
        # A name of its own: the client's files are called after it.
        name = f"{store}-showcase" if options else f"{store}-jail"
        with running(name, directory, client_home, server, *given) as made:
            yield Far(made, store, base / "in", "/")
    finally:
        server.stop()


@pytest.fixture(scope="module", params=STORES)
def jail(
    request: pytest.FixtureRequest, client_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Far]:  # fmt: skip
    """One whose files may be changed."""
    with limited(request.param, client_home, tmp_path_factory) as made:
        yield made


@pytest.fixture(scope="module", params=STORES)
def showcase(
    request: pytest.FixtureRequest, client_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Far]:  # fmt: skip
    """One whose files may only be looked at."""
    with limited(request.param, client_home, tmp_path_factory, "--sftp-read-only") as made:
        yield made


@contextlib.contextmanager
def client_of(host: Host) -> Iterator[paramiko.SFTPClient]:
    """paramiko's, which sends paths as they are."""
    with transport(host) as line:
        line.auth_publickey(getpass.getuser(), paramiko.Ed25519Key(filename=str(host.key)))
        with paramiko.SFTPClient.from_transport(line) as client:  # type: ignore[union-attr]
            yield client


def test_no_way_out(jail: Far) -> None:
    """Every path and link that leads out, by every request that takes one."""
    outside = jail.root.parent / "out"
    links = {
        "absolute": str(outside), "relative": "../out", "up": "..", "sub/up": "../../out",
        "secret": str(outside / "secret"), "deep": "sub/up", "proc": "/proc/self/root",
        "neighbour": "../in2",
    }  # fmt: skip
    if jail.store == "contents":
        # Its server follows links, tells nothing of them, and lets nobody make any.
        links = {}
    for name, target in links.items():
        (jail.root / name).symlink_to(target)
    before = seen(outside), seen(jail.root.parent / "in2")
    whole = str(outside)
    ways = [
        "../out", "/../out", "sub/../../out", "//..//out", "./../out/.", "sub/./../../out",
        whole, "/" + "../" * 40 + whole.lstrip("/"), "absolute", "relative", "up/out", "sub/up",
        "deep", f"proc{whole}", "neighbour", "../in2", "file/../../out",
    ]  # fmt: skip
    with client_of(jail.host) as client:
        assert client.normalize(".") == "/"
        assert client.normalize("/../..") == "/"
        for way in ways:
            secret = f"{way}/secret"
            attempts = [
                lambda secret=secret: client.open(secret).read(),
                lambda secret=secret: client.open(secret, "r+"),
                lambda way=way: client.open(f"{way}/made", "w"),
                lambda secret=secret: client.stat(secret),
                lambda secret=secret: client.lstat(secret),
                lambda way=way: client.mkdir(f"{way}/made"),
                lambda secret=secret: client.remove(secret),
                lambda secret=secret: client.rename("file", secret + "2"),
                lambda secret=secret: client.posix_rename("file", secret),
                lambda secret=secret: client.posix_rename(secret, "stolen"),
                lambda secret=secret: client.chmod(secret, 0o777),
                lambda secret=secret: client.truncate(secret, 0),
                lambda secret=secret: client.utime(secret, (1, 1)),
                lambda way=way: client.symlink("x", f"{way}/made"),
            ]
            for attempt in attempts:
                try:
                    attempt()
                except OSError:
                    continue
                pytest.fail(f"{way}: {attempts.index(attempt)}")
        names = set(client.listdir("/"))
        assert "file" in names
        for way in ("..", "/..", "sub/../.."):
            # As at the root of a host: up from there is the same place.
            assert set(client.listdir(way)) == names
    assert (seen(outside), seen(jail.root.parent / "in2")) == before
    assert (jail.root / "file").read_bytes() == b"allowed"
    assert not (jail.root / "stolen").exists()


def test_openssh_stays_within(jail: Far, tmp_path: Path) -> None:
    """A session as people have it, and what would lead out of it."""
    (tmp_path / "up").write_bytes(BULK)
    words = ["sftp", "-F", str(jail.host.config), "-b", "-", jail.host.name]
    ran = jail.host.run(
        words, given=f"pwd\nput {tmp_path}/up there\ncd ..\ncd /sub/../..\npwd\n"
        f"get there {tmp_path}/back\nls -l /\n".encode(),
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert ran.text.count("Remote working directory: /\n") == 2
    assert (tmp_path / "back").read_bytes() == (jail.root / "there").read_bytes() == BULK
    for command in (
        f"get {jail.root.parent}/out/secret {tmp_path}/stolen",
        f"get ../out/secret {tmp_path}/stolen",
        "cd ../out",
        f"cd {jail.root}",
        "cd ~root",
        "ln ../out/secret hard",
    ):
        assert jail.host.run(words, given=f"{command}\n".encode()).status == 1, command
    assert not (tmp_path / "stolen").exists()
    assert not (jail.root / "hard").exists()


def test_a_race_out(jail: Far) -> None:
    """A directory becomes a link while it is being walked; nobody inside can do that by SFTP of
    the Contents API, so it is the agent's affair."""
    if jail.store != "agent":
        return
    door, real = jail.root / "door", jail.root / "real"
    real.mkdir()
    (real / "secret").write_bytes(b"harmless")
    door.symlink_to("real")
    over = threading.Event()

    def turn() -> None:
        number = 0
        while not over.is_set():
            number += 1
            fresh = jail.root / "fresh"
            fresh.symlink_to("real" if number % 2 else str(jail.root.parent / "out"))
            fresh.rename(door)

    turning = threading.Thread(target=turn)
    turning.start()
    read = 0
    try:
        with client_of(jail.host) as client:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    with client.open("door/secret") as file:
                        assert file.read() == b"harmless"
                        read += 1
    finally:
        over.set()
        turning.join()
    assert read


def test_read_only(showcase: Far, tmp_path: Path) -> None:
    """All can be read and nothing changed."""
    before = seen(showcase.root, {"modes", "times"})
    with client_of(showcase.host) as client:
        assert client.open("file").read() == b"allowed"
        assert client.stat("file").st_size == 7
        assert set(client.listdir(".")) == {"file", "sub"}
        for change in (
            lambda: client.open("new", "w"),
            lambda: client.open("file", "r+"),
            lambda: client.open("file", "a"),
            lambda: client.open("file", "w"),
            lambda: client.open("new", "wx"),
            lambda: client.mkdir("new"),
            lambda: client.rmdir("sub"),
            lambda: client.remove("file"),
            lambda: client.rename("file", "new"),
            lambda: client.posix_rename("file", "new"),
            lambda: client.chmod("file", 0o777),
            lambda: client.utime("file", (1, 1)),
            lambda: client.truncate("file", 0),
            lambda: client.symlink("file", "new"),
        ):
            with pytest.raises(PermissionError):
                change()
        with client.open("file") as file:
            with pytest.raises(OSError, match=r"."):
                file.chmod(0o777)
            with pytest.raises(OSError, match=r"."):
                file.truncate(0)
    (tmp_path / "up").write_bytes(BULK)
    config = str(showcase.host.config)
    to = f"{showcase.host.name}:/up"
    ran = showcase.host.run(["scp", "-q", "-F", config, str(tmp_path / "up"), to])
    assert ran.status == 1
    assert "denied" in ran.err
    ran = showcase.host.run(
        ["scp", "-q", "-F", config, f"{showcase.host.name}:/file", str(tmp_path)]
    )
    assert (ran.status, ran.err) == (0, "")
    assert seen(showcase.root, {"modes", "times"}) == before
    assert os.listdir(showcase.root.parent / "out") == ["secret"]
