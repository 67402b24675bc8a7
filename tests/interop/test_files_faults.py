"""What breaks in the middle of a transfer: nothing that looks whole may be left, on either side.

Where a store is full, forbids, or has no such name, the client is told so in words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import subprocess
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import paramiko
import pytest

from ..jupyters import start_jupyter
from ..peers import Detour
from .conftest import PATIENCE, running, until
from .faults import (
    kill_jupyter,
    kill_the_agent,
    kill_the_kernel,
    restart_the_kernel,
    stop_for_a_while,
)
from .filetrees import BULK, Far, far_on
from .test_paramiko import transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .conftest import GatewayHost, Host

LARGE = BULK * 7
#: Kbit/s: the transfer takes some seconds if nothing ends it.
SLOWLY = "-l40000"


@pytest.fixture(scope="module", params=["agent", "contents"])
def frail(
    request: pytest.FixtureRequest, client_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Far]:
    """A gateway whose kernel is killed, and in the end its Jupyter."""
    server = start_jupyter("current")
    directory = tmp_path_factory.mktemp("frail")
    options = ["--files", request.param]
    options += ["--authorized-keys", str(client_home / "key.pub")]
    try:
        with contextlib.suppress(_Ended), running(
            f"frail-{request.param}", directory, client_home, server, *options
        ) as made:
            yield far_on(made, request.param, directory)
            # There is no Jupyter any more in which nothing could be left.
            raise _Ended
    finally:
        server.stop()


class _Ended(Exception):
    """Without a look at what is left."""


@contextlib.contextmanager
def transfer(far: Far, tmp_path: Path, way: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A slow put or get that is under way: the client and what it makes."""
    local, remote = tmp_path / f"local-{way}", far.root / f"{tmp_path.name}-{way}"
    source, target = (local, remote) if way == "put" else (remote, local)
    source.write_bytes(LARGE)
    named = f"{far.path}/{remote.name}"
    command = f"put {local} {named}" if way == "put" else f"get {named} {local}"
    process = subprocess.Popen(
        ["sftp", "-F", str(far.host.config), SLOWLY, "-b", "-", far.host.name],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=far.host.environment,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.write(command.encode() + b"\n")
        process.stdin.close()
        until(lambda: target.exists() and target.stat().st_size > 1_000_000, "it has begun")
        yield process, target
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def is_begun(path: Path) -> bool:
    """Whether a file is the beginning of what was sent, and not all of it."""
    data = path.read_bytes()
    return len(data) < len(LARGE) and LARGE.startswith(data)


@pytest.mark.parametrize("way", ["put", "get"])
def test_the_client_is_killed(far: Far, tmp_path: Path, way: str) -> None:
    """What came is there and no more; the same file can be written anew."""
    with transfer(far, tmp_path, way) as (process, target):
        process.kill()
        process.wait()
    assert is_begun(target)
    again = tmp_path / "again"
    again.write_bytes(b"again")
    name = f"{far.host.name}:{far.path}/{tmp_path.name}-{way}"
    assert far.host.run(["scp", "-q", "-F", str(far.host.config), str(again), name]).status == 0
    assert (far.root / f"{tmp_path.name}-{way}").read_bytes() == b"again"


@pytest.mark.parametrize(
    "fault", [stop_for_a_while, restart_the_kernel, kill_the_kernel, kill_jupyter]
)
def test_the_road_breaks(frail: Far, tmp_path: Path, fault: Callable[[GatewayHost], None]) -> None:
    """Success means that all is there; otherwise there is an error, and a beginning at most."""
    with transfer(frail, tmp_path, "put") as put, transfer(frail, tmp_path, "get") as get:
        fault(frail.host)  # type: ignore[arg-type]
        for process, target in (put, get):
            if fault is kill_jupyter and frail.store == "agent":
                # It may come back, and is waited for: a minute, and then the client hears of it.
                process.kill()
            status = process.wait(PATIENCE)
            assert target.read_bytes() == LARGE if status == 0 else is_begun(target)
            if fault is kill_jupyter:
                assert status != 0
            if fault is stop_for_a_while:
                assert status == 0
    if fault is not kill_jupyter:
        small = tmp_path / "small"
        small.write_bytes(b"small")
        words = ["scp", "-q", "-F", str(frail.host.config), str(small)]
        words.append(f"{frail.host.name}:{frail.path}/small")
        until(lambda: frail.host.run(words).status == 0, "files are served again")
        assert (frail.root / "small").read_bytes() == b"small"


@pytest.mark.parametrize("fault", [kill_the_agent, stop_for_a_while])
def test_a_store_that_comes_back_is_used_again(
    gateway: GatewayHost, tmp_path: Path, fault: Callable[[GatewayHost], None]
) -> None:
    """By the same connection, in the session that it was lost under and in a new one."""
    far = far_on(gateway, "agent", tmp_path)
    (far.root / "file").write_bytes(BULK)
    with client_of(gateway) as client, gateway.master() as option:
        lost = client.open(f"{far.path}/file")
        fault(gateway)
        if fault is kill_the_agent:
            with pytest.raises(OSError, match=r"."):
                lost.read(100)
        assert until(lambda: listed(client, far.path), "there are files again") == ["file"]
        with client.open(f"{far.path}/file") as file:
            assert file.read() == BULK
        with client.open(f"{far.path}/new", "w") as file:
            file.write(BULK)
        assert (far.root / "new").read_bytes() == BULK
        batch = f"get {far.path}/new {tmp_path}/back\n".encode()
        path = f"-oControlPath={option.removeprefix('-S')}"
        words = ["sftp", "-F", str(gateway.config), path, "-b", "-", gateway.name]
        assert gateway.run(words, given=batch).status == 0
        assert (tmp_path / "back").read_bytes() == BULK


def listed(client: paramiko.SFTPClient, path: str) -> list[str] | None:
    """What is in a directory; ``None`` where nobody can tell."""
    try:
        return client.listdir(path)
    except OSError:
        return None


def test_jupyter_comes_back_within_a_minute(client_home: Path, tmp_path: Path) -> None:
    """The agent has kept the files open: the same transfers go on and are whole."""
    server = start_jupyter("current")
    options = ["--files", "agent", "--authorized-keys", str(client_home / "key.pub")]
    try:
        with running("returning", tmp_path, client_home, server, *options) as made:
            far = far_on(made, "agent", tmp_path)
            with transfer(far, tmp_path, "put") as put, transfer(far, tmp_path, "get") as get:
                kill_jupyter(far.host)  # type: ignore[arg-type]
                server.restart()
                for process, target in (put, get):
                    assert process.wait(2 * PATIENCE) == 0
                    assert target.read_bytes() == LARGE
    finally:
        server.stop()


def await_progress(process: subprocess.Popen[bytes], target: Path) -> None:
    """Until a transfer has gone on from here, or has ended."""
    before = target.stat().st_size
    until(lambda: process.poll() is not None or target.stat().st_size > before, "it goes on")


@pytest.mark.parametrize("store", ["agent", "contents"])
def test_the_websocket_is_cut(client_home: Path, tmp_path: Path, store: str) -> None:
    """Whatever goes to Jupyter is cut, more than once: through the agent transfers go on and are
    whole, through the Contents API they are whole or end with an error."""
    server = start_jupyter("current")
    detour = Detour(urlsplit(server.url).port or 0)
    url = server.url.replace(f":{urlsplit(server.url).port}", f":{detour.port}")
    options = ["--files", store, "--authorized-keys", str(client_home / "key.pub")]
    try:
        around = dataclasses.replace(server, url=url)
        with running("cut", tmp_path, client_home, around, *options) as made:
            far = far_on(made, store, tmp_path)
            with transfer(far, tmp_path, "put") as put, transfer(far, tmp_path, "get") as get:
                for _ in range(3):
                    detour.cut()
                    detour.mend()
                    await_progress(*get)
                for process, target in (put, get):
                    status = process.wait(2 * PATIENCE)
                    assert target.read_bytes() == LARGE if status == 0 else is_begun(target)
                    assert status == 0 or store == "contents"
    finally:
        detour.close()
        server.stop()


# --- what a store refuses --------------------------------------------------------------------


@contextlib.contextmanager
def client_of(host: Host) -> Iterator[paramiko.SFTPClient]:
    """paramiko's, which gives the server's words."""
    with transport(host) as line:
        line.auth_publickey(getpass.getuser(), paramiko.Ed25519Key(filename=str(host.key)))
        with paramiko.SFTPClient.from_transport(line) as client:  # type: ignore[union-attr]
            yield client


@contextlib.contextmanager
def small_disk(directory: Path, *options: str) -> Iterator[None]:
    """A file system of one mebibyte."""
    directory.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", ",".join(["size=1m", *options]), "tmpfs", directory]
    subprocess.run(words, check=True, timeout=20)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True, timeout=20)


def fill(client: paramiko.SFTPClient, path: str) -> None:
    """Write one piece after another, as a program does that looks at every answer."""
    with client.open(path, "w") as file:
        for start in range(0, len(BULK), 32768):
            file.write(BULK[start : start + 32768])


def test_a_full_disk(far: Far, tmp_path: Path) -> None:
    """An error by the end of the put, never a short file and success; then there is room."""
    (tmp_path / "up").write_bytes(BULK)
    with small_disk(far.root / "disk"):
        scp = ["scp", "-q", "-F", str(far.host.config)]
        to = f"{far.host.name}:{far.path}/disk"
        ran = far.host.run([*scp, str(tmp_path / "up"), f"{to}/up"])
        assert ran.status == 1
        assert ran.err
        if far.store != "sshd":
            with client_of(far.host) as client:
                with pytest.raises(OSError, match=r"(?i)space"):
                    fill(client, f"{far.path}/disk/other")
        for name in os.listdir(far.root / "disk"):
            (far.root / "disk" / name).unlink()
        (tmp_path / "up").write_bytes(BULK[:500_000])
        assert far.host.run([*scp, str(tmp_path / "up"), f"{to}/up"]).status == 0
        assert (far.root / "disk/up").read_bytes() == BULK[:500_000]


@contextlib.contextmanager
def rationed(directory: Path, image: Path) -> Iterator[None]:
    """A file system on which not even root may have more than a mebibyte."""
    with image.open("wb") as file:
        file.truncate(128 << 20)
    directory.mkdir()

    def do(*words: str | Path) -> None:
        subprocess.run(words, check=True, timeout=20, capture_output=True)

    do("mkfs.btrfs", "-q", image)
    do("mount", "-o", "loop", image, directory)
    try:
        do("btrfs", "quota", "enable", directory)
        do("btrfs", "qgroup", "limit", "1M", directory)
        yield
    finally:
        do("umount", "-l", directory)
        image.unlink()


def test_a_quota(far: Far, tmp_path: Path) -> None:
    """An error that names it, by the end of the put."""
    (tmp_path / "up").write_bytes(BULK)
    with rationed(far.root / "disk", tmp_path / "image"):
        words = ["scp", "-q", "-F", str(far.host.config), str(tmp_path / "up")]
        ran = far.host.run([*words, f"{far.host.name}:{far.path}/disk/up"])
        assert (ran.status, ran.out) == (1, b"")
        assert ran.err
        if far.store != "sshd":
            assert "quota" in ran.err.lower()
            with client_of(far.host) as client:
                with pytest.raises(OSError, match=r"(?i)quota"):
                    fill(client, f"{far.path}/disk/other")


def rest_of(file: paramiko.SFTPFile) -> bytes | str:
    """What is left to read of a file, or that it has changed."""
    try:
        return file.read()
    except OSError as error:
        return "changed" if "changed" in str(error) else str(error)


def test_a_file_that_changes_underneath(far: Far) -> None:
    """What is read is of the old or of the new file, or there is an error; then it is the new."""
    path = far.root / "file"
    old, new = bytes(len(BULK)), b"\xff" * len(BULK)
    path.write_bytes(old)
    with client_of(far.host) as client:
        with client.open(f"{far.path}/file") as file:
            assert file.read(100_000) == old[:100_000]
            (far.root / "new").write_bytes(new)
            (far.root / "new").rename(path)
            rest = rest_of(file)
        assert rest == old[100_000:] or (far.store == "contents" and rest == "changed")
        with client.open(f"{far.path}/file") as file:
            assert file.read() == new


@pytest.mark.parametrize("size", [7, 100_000])
def test_a_file_that_gets_shorter_underneath(far: Far, size: int) -> None:
    """The end is where it is now, or there is an error: nothing is made up."""
    path = far.root / "file"
    path.write_bytes(BULK[:size])
    with client_of(far.host) as client, client.open(f"{far.path}/file") as file:
        assert file.read(3) == BULK[:3]
        os.truncate(path, 5)
        rest = rest_of(file)
        # paramiko may have read on, and a small file came whole with its OPEN.
        known = rest in (BULK[3:5], BULK[3:size])
        assert known or (far.store == "contents" and rest == "changed")
        with client.open(f"{far.path}/file") as again:
            assert again.read() == BULK[:5]


def test_a_read_only_disk(far: Far) -> None:
    """Permission denied."""
    with small_disk(far.root / "disk", "ro"), client_of(far.host) as client:
        for change in (
            lambda: client.open(f"{far.path}/disk/new", "w"),
            lambda: client.mkdir(f"{far.path}/disk/new"),
        ):
            with pytest.raises(OSError, match=r"."):
                change()


def test_a_name_too_long(far: Far) -> None:
    """No file, and the reason."""
    with client_of(far.host) as client:
        sentence = "." if far.store == "sshd" else "too long"
        with pytest.raises(OSError, match=sentence):
            client.open(f"{far.path}/{'n' * 256}", "w")
        # Jupyter writes a file by way of another one, whose name is longer by two.
        longest = "n" * (253 if far.store == "contents" else 255)
        with client.open(f"{far.path}/{longest}", "w") as file:
            file.write(b"x")
    assert os.listdir(far.root) == [longest]
    assert (far.root / longest).read_bytes() == b"x"


def test_no_permission(gateway: GatewayHost) -> None:
    """What even root may not."""
    with client_of(gateway) as client, pytest.raises(PermissionError):
        client.remove("/proc/version")
