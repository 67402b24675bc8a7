"""Files by the clients people have: what sshd keeps the gateway keeps, on either store.

Each client takes the same tree there and back. ``far`` is a directory at sshd, at a gateway with
the agent's store and at one with the Contents API's; there a client's status is what sshd's is,
unless its manual lets it fail for modes, times or links that cannot be set.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import asyncssh
import paramiko
import pytest
from sshfs import SSHFileSystem

from .conftest import quoted
from .filetrees import BULK, LINKS, Far, digest, far_on, make_tree, seen
from .test_paramiko import transport

if TYPE_CHECKING:
    from .conftest import GatewayHost, Host, Ran

FILES_AND_MODES = frozenset({"modes"})
WITHOUT_LINKS = frozenset({"modes", "times"})


@pytest.fixture
def tree(tmp_path: Path, far: Far) -> Path:
    """What the far store can keep."""
    root = tmp_path / "tree"
    make_tree(root, far.kept)
    return root


@pytest.fixture
def unlinked(tree: Path) -> Path:
    """The tree without symbolic links, for clients that follow or refuse them."""
    for name in LINKS:
        (tree / name).unlink(missing_ok=True)
    return tree


@pytest.fixture
def down(tmp_path: Path) -> Path:
    """Where it comes back to."""
    path = tmp_path / "down"
    path.mkdir()
    return path


def sftp(far: Far, *commands: str, options: tuple[str, ...] = ()) -> Ran:
    """One session of OpenSSH's client; its status is 1 as soon as a command fails."""
    words = ["sftp", "-F", str(far.host.config), *options, "-b", "-", far.host.name]
    return far.host.run(words, given="\n".join(commands).encode() + b"\n")


def at(far: Far, path: str) -> str:
    """A path at ``far`` for the command line of scp and rsync."""
    return f"{far.host.name}:{far.path}/{path}"


# --- OpenSSH ---------------------------------------------------------------------------------


def test_sftp_trees(far: Far, unlinked: Path, down: Path) -> None:
    """``put -R``, ``get -R``, with modes and times where there are any."""
    flags = "-R" if not far.kept else "-pR"
    ran = sftp(
        far,
        f'put {flags} "{unlinked}" "{far.path}/up"',
        f'get {flags} "{far.path}/up" "{down}/tree"',
    )
    assert ran.status == 0, ran.err
    wanted = seen(unlinked, far.kept)
    assert seen(far.root / "up", far.kept) == wanted
    assert seen(down / "tree", far.kept) == wanted


def test_sftp_commands(far: Far, tmp_path: Path) -> None:
    """What a person types."""
    local = tmp_path / "local"
    local.write_bytes(BULK)
    (far.root / "there").write_bytes(BULK[:50_000])
    ran = sftp(
        far,
        f"cd {far.path}",
        "pwd",
        f'put {local} "one ?"',
        'rename "one ?" two',
        "mkdir dir",
        "rename two dir/three",
        "rename there dir/three",
        f"put {local} there",
        "ls -l dir",
        "ls -1",
        "cp there four",
        "rm there",
        "mkdir gone",
        "rmdir gone",
        f"get four {tmp_path}/back",
    )
    assert ran.status == 0, ran.err
    assert f"Remote working directory: {far.path}" in ran.text
    assert re.search(r" 50000 .* dir/three$|^-.* 50000 .*three *$", ran.text, re.M)
    assert seen(far.root).keys() == {"dir", "dir/three", "four"}
    assert digest(far.root / "four") == digest(tmp_path / "back") == digest(local)
    assert (far.root / "dir/three").read_bytes() == BULK[:50_000]
    for command, sentence in (
        (f"rmdir {far.path}/dir", "Failure"),
        (f"get {far.path}/none {tmp_path}/none", "not found"),
        (f"cd {far.path}/four", "not a directory"),
        (f"mkdir {far.path}/dir", "Failure"),
        (f"rm {far.path}/none", "No such file"),
    ):
        failed = sftp(far, command)
        assert failed.status == 1, command
        assert sentence.lower() in (failed.text + failed.err).lower()


def test_sftp_resumes(far: Far, tmp_path: Path) -> None:
    """``reget`` and ``reput`` go on where they stopped."""
    (far.root / "down").write_bytes(BULK)
    (tmp_path / "down").write_bytes(BULK[:1_000_000])
    (far.root / "up").write_bytes(BULK[:1_234_567])
    (tmp_path / "up").write_bytes(BULK)
    ran = sftp(
        far,
        f"reget {far.path}/down {tmp_path}/down",
        f"reput {tmp_path}/up {far.path}/up",
    )
    assert ran.status == 0, ran.err
    assert (tmp_path / "down").read_bytes() == (far.root / "up").read_bytes() == BULK


def test_sftp_links_modes_and_space(far: Far) -> None:
    """Links of both kinds, modes and free space; the Contents store says that it has none."""
    (far.root / "file").write_bytes(b"x")
    commands = ["ln file hard", "ln -s file soft", "chmod 640 file", "df", "ln -s no/where no"]
    if far.kept:
        ran = sftp(far, f"cd {far.path}", *commands, "rm soft")
        assert ran.status == 0, ran.err
        assert (far.root / "hard").samefile(far.root / "file")
        assert os.readlink(far.root / "no") == "no/where"
        assert not (far.root / "soft").is_symlink()
        assert (far.root / "file").stat().st_mode & 0o7777 == 0o640
        vfs = os.statvfs(far.root)
        kibibytes = str(vfs.f_blocks * vfs.f_frsize // 1024)
        assert ran.text.split("%Capacity")[1].split()[0] == kibibytes
        return
    for command in commands:
        ran = sftp(far, f"cd {far.path}", command)
        assert ran.status == 1, command
        assert "support" in ran.err.lower(), ran.err
    assert seen(far.root).keys() == {"file"}


@pytest.mark.parametrize("protocol", ["-s", "-O"])
def test_scp(far: Far, unlinked: Path, down: Path, protocol: str) -> None:
    """Both protocols of scp; the old one is a command, that knows the host's own paths."""
    if protocol == "-O":
        far.path = str(far.root)
        kept = WITHOUT_LINKS
    else:
        kept = far.kept
    flags = "-r" if not kept else "-pr"
    scp = ["scp", protocol, "-q", flags, "-F", str(far.host.config)]
    for source, target in ((str(unlinked), at(far, "up")), (at(far, "up"), f"{down}/tree")):
        ran = far.host.run([*scp, source, target])
        assert (ran.status, ran.err) == (0, "")
    wanted = seen(unlinked, kept)
    assert seen(far.root / "up", kept) == wanted
    assert seen(down / "tree", kept) == wanted
    ran = far.host.run([*scp, at(far, "none"), str(down)])
    assert ran.status == 1
    assert "No such file" in ran.err


def test_scp_between_two_hosts(far: Far, sshd: Host, tmp_path: Path, down: Path) -> None:
    """``scp -3`` from the gateway to sshd and back."""
    other = tmp_path / "other"
    (far.root / "from").write_bytes(BULK)
    config = tmp_path / "both"
    names = {host.name: host.config.read_text() for host in (far.host, sshd)}
    config.write_text("".join(names.values()))
    scp = ["scp", "-3", "-q", "-F", str(config)]
    for source, target in (
        (at(far, "from"), f"{sshd.name}:{other}"),
        (f"{sshd.name}:{other}", at(far, "to")),
    ):
        ran = far.host.run([*scp, source, target])
        assert (ran.status, ran.err) == (0, "")
    assert other.read_bytes() == (far.root / "to").read_bytes() == BULK


def test_what_cannot_be_kept_is_told(contents_gateway: GatewayHost, tmp_path: Path) -> None:
    """``scp -p`` to the Contents API: the file is there, and the client tells of the times."""
    far = far_on(contents_gateway, "contents", tmp_path)
    source = tmp_path / "source"
    source.write_bytes(BULK)
    os.utime(source, (1_000_000_000, 1_000_000_000))
    ran = far.host.run(["scp", "-p", "-F", str(far.host.config), str(source), at(far, "up")])
    assert "remote setstat" in ran.err or "remote fsetstat" in ran.err
    assert (far.root / "up").read_bytes() == BULK
    ran = far.host.run(["scp", "-F", str(far.host.config), str(source), at(far, "again")])
    assert (ran.status, ran.err) == (0, "")


# --- curl, lftp, rclone, PuTTY ---------------------------------------------------------------


def test_curl(far: Far, tmp_path: Path) -> None:
    """There, back, a part of it, more behind it, a listing, and a rename."""
    host = far.host
    base = f"sftp://127.0.0.1:{host.port}{far.path}"
    curl = ["curl", "-sS", "--fail", "--key", str(host.key), "--pubkey", f"{host.key}.pub"]
    curl += ["--insecure", "-u", f"{os.environ.get('USER', 'root')}:"]
    source = tmp_path / "source"
    source.write_bytes(BULK)

    def run(*words: str, status: int = 0) -> bytes:
        ran = host.run([*curl, *words])
        assert ran.status == status, ran.err
        return ran.out

    url = f"{base}/{quote('sub %#? ü/a file')}"
    run("--ftp-create-dirs", "-T", str(source), url)
    assert (far.root / "sub %#? ü/a file").read_bytes() == BULK
    assert run(url) == BULK
    assert run("-r", "1000000-1099999", url) == BULK[1_000_000:1_100_000]
    (tmp_path / "more").write_bytes(b"more")
    run("-a", "-T", str(tmp_path / "more"), url)
    assert (far.root / "sub %#? ü/a file").read_bytes() == BULK + b"more"
    assert b"a file" in run(f"{base}/{quote('sub %#? ü')}/")
    (far.root / "x").touch()
    run("-o", os.devnull, "-Q", f"rename {far.path}/x {far.path}/y", f"{base}/")
    assert (far.root / "y").exists()
    run(f"{base}/none", status=78)


def test_lftp_mirror(far: Far, unlinked: Path, down: Path) -> None:
    """A mirror there, and one of that mirror here; then there is nothing more to do."""
    connect = quoted("ssh", "-a", "-x", "-F", far.host.config)
    script = [
        "set cmd:fail-exit yes",
        "set net:max-retries 2",
        "set sftp:charset UTF-8",
        "set file:charset UTF-8",
        f'set sftp:connect-program "{connect}"',
        f"open sftp://{far.host.name}",
        f"mirror -R {unlinked} {far.path}/up",
        f"mirror {far.path}/up {down}/tree",
        f"mirror --dry-run {far.path}/up {down}/tree",
    ]
    ran = far.host.run(["lftp", "-c", "; ".join(script)], environment={"LC_ALL": "C.UTF-8"})
    assert (ran.status, ran.text) == (0, ""), ran.err
    wanted = seen(unlinked, far.kept)
    assert seen(far.root / "up", far.kept) == wanted
    assert seen(down / "tree", far.kept) == wanted


def test_rclone(far: Far, unlinked: Path, down: Path) -> None:
    """There and back, checked by rclone byte for byte; the second time nothing is copied."""
    host = far.host
    kept = {"times"} & far.kept
    options = {
        "HOST": "127.0.0.1",
        "PORT": str(host.port),
        "USER": getpass.getuser(),
        "KEY_FILE": str(host.key),
        "KNOWN_HOSTS_FILE": str(host.home / f"{host.name}.known"),
        "SET_MODTIME": "true" if kept else "false",
    }
    if not kept:
        # A command would not find what is below another root.
        options |= {"DISABLE_HASHCHECK": "true", "SHELL_TYPE": "none"}
    environment = {f"RCLONE_SFTP_{name}": value for name, value in options.items()}
    environment["RCLONE_CONFIG"] = str(host.home / "rclone.conf")
    up = f":sftp:{far.path}/up"

    def rclone(*words: str) -> Ran:
        ran = host.run(["rclone", "--retries=1", *words], environment=environment)
        assert ran.status == 0, ran.err
        return ran

    how = [] if kept else ["--size-only"]
    rclone("copy", *how, str(unlinked), up)
    assert seen(far.root / "up", kept) == seen(unlinked, kept)
    rclone("check", "--download", str(unlinked), up)
    rclone("copy", *how, up, str(down / "tree"))
    assert seen(down / "tree", kept) == seen(unlinked, kept)
    again = rclone("copy", *how, "-v", str(unlinked), up)
    assert "Copied" not in again.err
    rclone("purge", up)
    assert not (far.root / "up").exists()


def test_putty(far: Far, unlinked: Path, down: Path, tmp_path: Path) -> None:
    """psftp's and pscp's trees."""
    host = far.host
    key = tmp_path / "key.ppk"
    subprocess.run(
        ["puttygen", host.key, "-o", key], check=True, timeout=20, env=host.environment
    )
    printed = host.run(["ssh-keygen", "-lf", str(host.home / f"{host.name}.known")]).text.split()[1]
    login = ["-batch", "-P", str(host.port), "-i", str(key), "-hostkey", printed]
    login += ["-l", getpass.getuser()]
    utf8 = {"LC_ALL": "C.UTF-8"}
    script = tmp_path / "script"
    script.write_text(
        f'cd {far.path}\nput -r "{unlinked}" up\nget -r up "{down}/tree"\n'
        "mkdir dir\nmkdir again\nmv up/one dir/1\nls dir\n"
        + ("chmod 640 dir/1\n" if far.kept else "")
    )
    ran = host.run(["psftp", *login, "-b", str(script), "127.0.0.1"], environment=utf8)
    assert ran.status == 0, ran.text + ran.err
    assert seen(down / "tree") == seen(unlinked)
    (far.root / "dir/1").rename(far.root / "up/one")
    if far.kept:
        assert (far.root / "up/one").stat().st_mode & 0o777 == 0o640
    assert seen(far.root / "up") == seen(unlinked)
    again = down / "again"
    again.mkdir()
    words = ["pscp", *login, "-sftp", "-q", "-r"] + (["-p"] if far.kept else [])
    for source, target in (
        (str(unlinked), f"127.0.0.1:{far.path}/again"),
        (f"127.0.0.1:{far.path}/again/tree", str(again)),
    ):
        ran = host.run([*words, source, target], environment=utf8)
        assert ran.status == 0, ran.text + ran.err
    kept = {"times"} & far.kept
    assert seen(far.root / "again/tree", kept) == seen(unlinked, kept)
    assert seen(again / "tree", kept) == seen(unlinked, kept)
    ran = host.run(["pscp", *login, "-sftp", f"127.0.0.1:{far.path}/none", str(down)])
    assert ran.status == 1


# --- in Python -------------------------------------------------------------------------------


def test_paramiko(far: Far, tmp_path: Path) -> None:
    """Its file objects: written and read in any order, and at once."""
    with transport(far.host) as line:
        line.auth_publickey(getpass.getuser(), paramiko.Ed25519Key(filename=str(far.host.key)))
        with paramiko.SFTPClient.from_transport(line) as client:
            assert client is not None
            source = tmp_path / "source"
            source.write_bytes(BULK)
            client.chdir(far.path)
            assert client.put(str(source), "a %#? ü").st_size == len(BULK)
            client.get("a %#? ü", str(tmp_path / "back"))
            assert digest(far.root / "a %#? ü") == digest(tmp_path / "back") == digest(source)
            with client.open("a %#? ü", "r+") as file:
                assert file.readv([(0, 10), (2_000_000, 70_000)]).__next__() == BULK[:10]
                file.seek(1_000_000)
                file.write(b"here")
                file.seek(-4, os.SEEK_END)
                assert file.read() == BULK[-4:]
                file.truncate(2_000_000)
            wanted = BULK[:1_000_000] + b"here" + BULK[1_000_004:2_000_000]
            assert (far.root / "a %#? ü").read_bytes() == wanted
            with client.open("a %#? ü", "a") as file:
                file.write(b"behind")
            assert (far.root / "a %#? ü").read_bytes() == wanted + b"behind"
            client.posix_rename("a %#? ü", "b")
            for number in range(30):
                client.open(f"n{number}", "wx").close()
            with pytest.raises(OSError, match=r".*"):
                client.open("n1", "wx")
            attributes = {one.filename: one for one in client.listdir_attr(".")}
            assert len(attributes) == 31
            assert attributes["b"].st_size == len(wanted) + 6
            with pytest.raises(FileNotFoundError):
                client.stat("none")
            if far.kept:
                client.chmod("b", 0o604)
                client.utime("b", (1_000_000_000, 1_100_000_000))
                client.symlink("b", "link")
                assert client.readlink("link") == "b"
                told = (far.root / "b").stat()
                assert (told.st_mode & 0o777, told.st_mtime) == (0o604, 1_100_000_000)
                assert client.stat("link").st_mode == client.lstat("b").st_mode == told.st_mode
            else:
                for call in (
                    lambda: client.chmod("b", 0o604),
                    lambda: client.utime("b", (1_000_000_000, 1_100_000_000)),
                    lambda: client.symlink("b", "link"),
                ):
                    with pytest.raises(OSError, match="Contents API"):
                        call()


def test_asyncssh(far: Far, tree: Path, down: Path) -> None:
    """Trees with all there is to keep, random reads, and the extensions it knows."""

    async def talk() -> None:
        known = str(far.host.home / f"{far.host.name}.known")
        async with (
            asyncssh.connect(
                "127.0.0.1", far.host.port, username=getpass.getuser(), config=None,
                agent_path=None, client_keys=[str(far.host.key)], known_hosts=known,
            ) as line,
            line.start_sftp_client() as client,
        ):  # fmt: skip
            keep = bool(far.kept)
            up = f"{far.path}/up"
            await client.put(str(tree), up, recurse=True, preserve=keep, follow_symlinks=False)
            await client.get(
                up, str(down / "tree"), recurse=True, preserve=keep, follow_symlinks=False
            )
            async with client.open(f"{up}/large", "rb") as file:
                parts = [file.read(5000, offset) for offset in range(2_900_000, 0, -97_531)]
                for offset, part in zip(
                    range(2_900_000, 0, -97_531), await asyncio.gather(*parts), strict=True
                ):
                    assert part == BULK[offset : offset + 5000]
            names = await client.glob(f"{up}/sub*/*")
            assert {Path(str(name)).name for name in names} == {"deeper %#?", "script"}
            # By :meth:`remote_copy` with paths it would leave the copy open.
            await client.copy(f"{up}/large", f"{far.path}/copy", remote_only=True)
            await client.rename(f"{far.path}/copy", f"{far.path}/renamed")
            assert (far.root / "renamed").read_bytes() == BULK
            if keep:
                vfs = await client.statvfs(far.path)
                assert vfs.blocks == os.statvfs(far.root).f_blocks
            await client.rmtree(f"{up}/sub dir")

    if far.store == "sshd":
        # It tries to change the mode of a link, and fails.
        for name in LINKS:
            (tree / name).unlink()
    wanted = seen(tree, far.kept)
    asyncio.run(asyncio.wait_for(talk(), 30))
    assert seen(down / "tree", far.kept) == wanted
    left = {name: fact for name, fact in wanted.items() if not name.startswith("sub dir")}
    assert seen(far.root / "up", far.kept) == left


def test_fsspec(far: Far, unlinked: Path, down: Path) -> None:
    """As pandas and others open files."""
    files = SSHFileSystem(
        "127.0.0.1", port=far.host.port, username=getpass.getuser(),
        client_keys=[str(far.host.key)], known_hosts=str(far.host.home / f"{far.host.name}.known"),
        skip_instance_cache=True,
    )  # fmt: skip
    try:
        up = f"{far.path}/up"
        files.mkdir(up)
        files.put(f"{unlinked}/", up, recursive=True)
        assert seen(far.root / "up") == seen(unlinked)
        # One by one: its get of a whole tree does not know this asyncssh, whatever the server.
        for path in sorted(unlinked.rglob("*")):
            if path.is_file():
                name = path.relative_to(unlinked)
                (down / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
                files.get_file(f"{up}/{name}", str(down / "tree" / name))
        assert seen(down / "tree") == seen(unlinked)
        with files.open(f"{up}/large", "rb") as file:
            file.seek(2_000_000)
            assert file.read(100_000) == BULK[2_000_000:2_100_000]
        with files.open(f"{up}/written", "wb") as file:
            for start in range(0, 1_000_000, 100_000):
                file.write(BULK[start : start + 100_000])
        assert (far.root / "up/written").read_bytes() == BULK[:1_000_000]
        assert {Path(one).name for one in files.ls(up, detail=False)} == {
            path.name for path in (far.root / "up").iterdir()
        }
        assert files.info(f"{up}/large")["size"] == len(BULK)
        files.mv(f"{up}/written", f"{up}/moved")
        files.rm(up, recursive=True)
        assert not (far.root / "up").exists()
    finally:
        files._finalize(files.loop, files._pool, files._stack)


# --- what needs commands too -----------------------------------------------------------------


def test_rsync_by_checksum(host: Host, tmp_path: Path, down: Path) -> None:
    """There and back; then the sums say that there is nothing to do."""
    tree, up = tmp_path / "tree", tmp_path / "up"
    make_tree(tree)
    rsync = ["rsync", "-a", "--checksum", "--itemize-changes", "--timeout=20"]
    rsync += ["-e", quoted("ssh", "-F", host.config)]
    for source, target in ((f"{tree}/", f"{host.name}:{up}"), (f"{host.name}:{up}/", f"{down}")):
        assert host.run([*rsync, source, target]).status == 0
        assert host.run([*rsync, source, target]) == (0, b"", "")
    everything = {"modes", "times", "links"}
    assert seen(up, everything) == seen(down, everything) == seen(tree, everything)


def test_ansible_copy(gateway: GatewayHost, tmp_path: Path) -> None:
    """``copy`` and ``fetch`` by sftp: commands and files hand in hand."""
    source, far = tmp_path / "source", tmp_path / "fär %#?"
    source.write_bytes(BULK)
    play = tmp_path / "play.yml"
    play.write_text(
        f"""\
- hosts: all
  gather_facts: false
  tasks:
    - copy: {{src: "{source}", dest: "{far}", mode: "0640"}}
    - fetch: {{src: "{far}", dest: "{tmp_path}/back", flat: true}}
"""
    )
    environment = {
        "ANSIBLE_SSH_ARGS": f"-F {gateway.config}",
        "ANSIBLE_SSH_TRANSFER_METHOD": "sftp",
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        "ANSIBLE_REMOTE_TMP": str(tmp_path / "remote"),
        "ANSIBLE_LOCAL_TEMP": str(tmp_path / "local"),
        "ANSIBLE_NOCOWS": "1",
        "LC_ALL": "C.UTF-8",
    }
    words = [str(Path(sys.executable).with_name("ansible-playbook"))]
    words += ["-i", f"{gateway.name},", str(play)]
    ran = gateway.run(words, environment=environment)
    assert ran.status == 0, ran.text + ran.err
    assert "changed=2" in ran.text
    assert digest(far) == digest(tmp_path / "back") == digest(source)
    assert far.stat().st_mode & 0o777 == 0o640

