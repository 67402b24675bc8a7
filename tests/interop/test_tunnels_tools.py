"""What people tunnel, by the programs they use: curl, psql, autossh, mosh, Ansible."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest

from ..peers import dial, echo, exchange
from .conftest import PATIENCE, free_port, quoted, read_until, until
from .test_openssh import terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..peers import Peer
    from .conftest import Host

BULK = os.urandom(8_000_000)


# --- the web ---------------------------------------------------------------------------------


@pytest.fixture
def site(host: Host, tmp_path: Path) -> Iterator[int]:
    """The port of a web server that was started over there, as one would."""
    (tmp_path / "bulk").write_bytes(BULK)
    for number in range(20):
        (tmp_path / f"page-{number}").write_text(f"this is page {number}\n")
    command = quoted(sys.executable, "-u", "-m", "http.server", "-d", tmp_path, "-b", "127.0.0.1")
    # A command without a terminal outlives its ssh, but reads the end of its input.
    with host.started(f"{command} 0 2> /dev/null & cat; kill $!") as client:
        said = read_until(client.stdout, b"\n").decode()
        yield int(said.split(" port ")[1].split()[0])


def test_web_pages_through_a_port(host: Host, site: int) -> None:
    """``-L`` and curl: one large page, and many at once."""
    port = free_port()
    with host.forwarding(f"-L{port}:localhost:{site}"):
        curl = ["curl", "-sS", "--fail", "--noproxy", "*"]
        assert host.run([*curl, f"http://127.0.0.1:{port}/bulk"]) == (0, BULK, "")
        many = [*curl, "--parallel", f"http://127.0.0.1:{port}/page-[0-19]"]
        ran = host.run(many)
        wanted = sorted(f"this is page {number}" for number in range(20))
        assert (ran.status, sorted(ran.text.splitlines())) == (0, wanted)


@pytest.mark.parametrize("version", ["socks5-hostname", "socks5", "socks4", "socks4a"])
def test_web_pages_through_socks(host: Host, site: int, version: str) -> None:
    """``-D`` and curl, by each version; names are resolved where the version says."""
    port = free_port()
    with host.forwarding(f"-D{port}"):
        curl = ["curl", "-sS", "--fail", f"--{version}", f"127.0.0.1:{port}"]
        name = "127.0.0.1" if version == "socks4" else "localhost"
        assert host.run([*curl, "-4", f"http://{name}:{site}/bulk"]) == (0, BULK, "")
        missing = host.run([*curl, "-4", f"http://{name}:{free_port()}/"])
        assert missing.status in (7, 97)


# --- a database ------------------------------------------------------------------------------


class Database(NamedTuple):
    """A PostgreSQL server."""

    programs: Path
    directory: Path
    port: int


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """A cluster of its own. The server refuses to be root, so root is somebody else here."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    assert found, "these tests talk to a database: apt install postgresql"
    programs = found[-1].parent
    directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    account = []
    if os.getuid() == 0:
        shutil.chown(directory, "postgres")
        account = ["runuser", "-u", "postgres", "--"]
    port = free_port()
    cluster = directory / "cluster"
    made = ["-D", cluster, "-U", "me", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run(
        [*account, programs / "initdb", *made], check=True, cwd="/", timeout=60, capture_output=True
    )
    options = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": str(directory),
        "fsync": "off",
    }
    words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(
            [*account, programs / "postgres", "-D", cluster, *words], cwd="/", stderr=log
        )
    try:

        def is_ready() -> bool:
            assert server.poll() is None, (directory / "log").read_text()
            return "ready to accept connections" in (directory / "log").read_text()

        until(is_ready, "the database is ready")
        yield Database(programs, directory, port)
    finally:
        stop = [programs / "pg_ctl", "-D", cluster, "-m", "fast", "stop"]
        subprocess.run([*account, *stop], cwd="/", check=False, capture_output=True, timeout=60)
        server.wait(PATIENCE)
        shutil.rmtree(directory)


@pytest.mark.parametrize("way", ["port", "socket"])
def test_a_database(host: Host, database: Database, tmp_path: Path, way: str) -> None:
    """A session of PostgreSQL's client: statements, an error, and a table in and out."""
    rows = tmp_path / "rows"
    with rows.open("w") as file:
        file.writelines(
            f"{number}\t{BULK[number : number + 30].hex()}\n" for number in range(60_000)
        )
    script = tmp_path / "script"
    script.write_text(
        f"""\
SELECT version() LIKE 'PostgreSQL%';
DROP TABLE IF EXISTS many;
CREATE TABLE many (number integer PRIMARY KEY, word text);
\\copy many FROM '{rows}'
SELECT count(*) FROM many;
\\copy (SELECT * FROM many ORDER BY number) TO '{tmp_path}/back'
SELECT 1/0;
"""
    )
    psql = [str(database.programs / "psql"), "-XAtq", "-U", "me", "-d", "postgres"]
    if way == "port":
        port = free_port()
        spec = f"-L{port}:127.0.0.1:{database.port}"
        psql += ["-h", "127.0.0.1", "-p", str(port)]
    else:
        spec = f"-L{tmp_path}/.s.PGSQL.5432:{database.directory}/.s.PGSQL.{database.port}"
        psql += ["-h", str(tmp_path), "-p", "5432"]
    with host.forwarding(spec):
        ran = host.run([*psql, "-v", "ON_ERROR_STOP=1", "-f", str(script)])
    assert (ran.status, ran.text.split()) == (3, ["t", "60000"]), ran.err
    assert "division by zero" in ran.err
    assert (tmp_path / "back").read_bytes() == rows.read_bytes()


# --- tunnels that are kept -------------------------------------------------------------------


def test_autossh(host: Host, serving: Callable[..., Peer], tmp_path: Path) -> None:
    """It watches its connection by an echo over there; when its ssh has ended, the tunnel comes
    back by another one."""
    port, monitor, there = free_port(), free_port(), serving(echo).port
    log = tmp_path / "log"
    tunnel = host.words("-N", f"-L{port}:127.0.0.1:{there}")[1:]
    environment = {
        "AUTOSSH_GATETIME": "0", "AUTOSSH_FIRST_POLL": "1",
        "AUTOSSH_LOGLEVEL": "7", "AUTOSSH_LOGFILE": str(log),
    }  # fmt: skip

    def stands() -> bool:
        try:
            with dial(port) as connection:
                return exchange(connection, BULK[:100_000]) == BULK[:100_000]
        except OSError:
            return False

    with subprocess.Popen(
        ["autossh", "-M", f"{monitor}:{there}", *tunnel],
        env=host.environment | environment, cwd=host.home, stderr=subprocess.DEVNULL,
    ) as autossh:  # fmt: skip
        try:
            until(stands, "the tunnel stands")
            until(lambda: "connection ok" in log.read_text(), "it is watched")
            (client,) = psutil.Process(autossh.pid).children()
            client.send_signal(signal.SIGHUP)
            until(lambda: not client.is_running(), "the client has ended")
            until(stands, "the tunnel stands again")
        finally:
            autossh.terminate()


def test_mosh(host: Host) -> None:
    """Its server is started by a command with a terminal; what follows is UDP."""
    environment = host.environment | {"LC_ALL": "C.UTF-8", "TERM": "xterm"}
    words = ["mosh", "--no-init", f"--ssh={quoted('ssh', '-F', host.config)}", host.name]
    words += ["--", "sh", "-c", "read x; echo $((x*7)); read x"]
    with terminal(80, 24) as (ours, theirs):
        with subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
            start_new_session=True,
        ) as client:  # fmt: skip
            try:
                os.write(ours, b"6\n")
                read_until(ours, b"42")
                os.write(ours, b"\n")
                read_until(ours, b"mosh is exiting")
                assert client.wait(PATIENCE) == 0
            finally:
                client.kill()


def test_ansible_over_one_connection(host: Host, tmp_path: Path) -> None:
    """ControlPersist and pipelining: modules come on stdin, by a connection that stays."""
    play, control = tmp_path / "play.yml", tmp_path / "control"
    (tmp_path / "source").write_bytes(BULK)
    play.write_text(
        f"""\
- hosts: all
  gather_facts: false
  tasks:
    - ping:
    - shell: "cat; exit 3"
      args: {{stdin: "given", stdin_add_newline: false}}
      register: ran
      failed_when: ran.rc != 3 or ran.stdout != "given"
    - copy: {{src: "{tmp_path}/source", dest: "{tmp_path}/far"}}
"""
    )
    shared = f"-F {host.config} -o ControlMaster=auto -o ControlPersist=60 -o ControlPath={control}"
    environment = {
        "ANSIBLE_SSH_ARGS": shared,
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        "ANSIBLE_REMOTE_TMP": str(tmp_path / "remote"),
        "ANSIBLE_LOCAL_TEMP": str(tmp_path / "local"),
        "ANSIBLE_NOCOWS": "1",
        "LC_ALL": "C.UTF-8",
    }
    words = [str(Path(sys.executable).with_name("ansible-playbook"))]
    words += ["-i", f"{host.name},", str(play)]
    ran = host.run(words, environment=environment)
    assert ran.status == 0, ran.text + ran.err
    assert "ok=3" in ran.text
    assert (tmp_path / "far").read_bytes() == BULK
    assert "Master running" in host.ssh(f"-S{control}", "-Ocheck").err
    assert host.ssh(f"-S{control}", "-Oexit").status == 0
