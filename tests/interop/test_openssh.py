"""Shells and commands by OpenSSH's client: what works with sshd works with the gateway."""

from __future__ import annotations

import fcntl
import getpass
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .conftest import PATIENCE, GatewayHost, Ran, quoted, read_until, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Host

#: termios has no name for it before Python 3.14.
IUTF8 = 0x4000
EVERY_BYTE = bytes(range(256))


@contextmanager
def terminal(columns: int, rows: int) -> Iterator[tuple[int, int]]:
    """A terminal of this size on this side: the user's end and the client's."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def processes_with(word: str) -> list[int]:
    """Processes that have this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# --- how it ends -----------------------------------------------------------------------------


def test_every_exit_status(host: Host) -> None:
    """0 to 255 arrive as they are."""
    with host.master() as option, ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(lambda n: host.ssh(option, "-n", f"exit {n}").status, range(256)))
    assert ended == list(range(256))


@pytest.mark.parametrize("name", ["KILL", "TERM", "HUP", "SEGV"])
def test_a_command_that_a_signal_ended(host: Host, name: str) -> None:
    """The client has no status to give, and gives 255."""
    assert host.ssh(f"echo before; kill -{name} $$") == (255, b"before\n", "")


def test_no_such_command(host: Host) -> None:
    """The shell's own words and status."""
    ran = host.ssh("/no/such/command")
    assert (ran.status, ran.out) == (127, b"")
    assert "/no/such/command: No such file or directory" in ran.err


def test_output_and_error_apart(host: Host) -> None:
    """Each on its own stream, not a byte added."""
    ran = host.ssh("printf 'out\\r\\n\\0'; printf 'err\\n' >&2; exit 3")
    assert ran == (3, b"out\r\n\0", "err\n")


def test_the_end_waits_for_whoever_holds_the_pipes(host: Host, tmp_path: Path) -> None:
    """The session lasts until output is at its end, also that of a child left behind; the
    status is the command's."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with host.started(f"(read x < {gate}; echo late) & echo early; exit 4") as client:
        assert read_until(client.stdout, b"early\n") == b"early\n"
        gate.write_text("go\n")
        out, _ = client.communicate(timeout=PATIENCE)
        assert (out, client.returncode) == (b"late\n", 4)


def test_a_terminal_ends_with_its_command(host: Host) -> None:
    """A process left behind on a terminal does not keep the session."""
    ran = host.ssh("-tt", "trap '' HUP; sleep 100 & echo $!; exit 4")
    assert ran.status == 4
    os.kill(int(ran.out), signal.SIGKILL)


def test_a_command_that_outlives_its_output(host: Host, tmp_path: Path) -> None:
    """Both directions may end long before the command does; its status still comes."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with host.started(f"echo x; exec >&- 2>&-; read x < {gate}; exit 3") as client:
        client.stdin.close()
        while os.read(client.stdout.fileno(), 100):
            pass
        gate.write_text("go\n")
        assert client.wait(PATIENCE) == 3


def test_a_command_that_leaves_its_input(host: Host) -> None:
    """What it does not want does not keep it, however much there is."""
    ran = host.ssh("head -c 5; exec <&-; echo; exit 7", given=b"x" * 8_000_000)
    assert ran == (7, b"xxxxx\n", "")


# --- what goes in and out --------------------------------------------------------------------


def test_half_close(host: Host) -> None:
    """The end of stdin is the end of stdin alone."""
    ran = host.ssh("wc -c; echo after; exit 5", given=b"x" * 100_001)
    assert (ran.status, ran.out.split()) == (5, [b"100001", b"after"])


def test_no_input_at_all(host: Host) -> None:
    """``ssh -n``: stdin is at its end from the start."""
    assert host.ssh("-n", "cat; echo done") == (0, b"done\n", "")


def test_every_byte_value(host: Host) -> None:
    """Through pipes nothing is text."""
    assert host.ssh("cat", given=EVERY_BYTE * 100) == (0, EVERY_BYTE * 100, "")
    assert host.ssh("cat >&2", given=b"\0\r\n\x1a\x7f").err == "\0\r\n\x1a\x7f"


@pytest.mark.parametrize("size", [60_000, 120_000])
def test_long_commands(host: Host, size: int) -> None:
    """As long as the system lets an argument be, all but its last few kilobytes."""
    assert host.ssh(f"printf %s {'x' * size} | wc -c").out.split() == [b"%d" % size]


def test_odd_commands(host: Host) -> None:
    """Lines, quotes and bytes that are no text reach the shell as they are."""
    words = [os.fsencode(word) for word in host.words()]
    command = b"printf '%s\\n' \"\xff \xc3\xa9\t$((1+1))\"\n# '\necho \\'; exit 2"
    done = subprocess.run(
        [*words, command], env=host.environment, capture_output=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (2, b"\xff \xc3\xa9\t2\n'\n")


def test_much_on_both_outputs(host: Host) -> None:
    """5 MB on each at once."""
    command = "seq 700000 & seq 700000 >&2; wait"
    ran = host.ssh(command)
    wanted = "".join(f"{number}\n" for number in range(1, 700_001))
    assert ran.status == 0
    assert ran.text == wanted
    assert ran.err == wanted


def test_much_through_a_terminal(host: Host) -> None:
    """A raw terminal echoes a megabyte, at the pace of the slowest."""
    data = os.urandom(1_000_000)
    with host.started("-tt", "-enone", "stty raw -echo; printf ready; head -c 1000000") as client:
        assert read_until(client.stdout, b"ready") == b"ready"
        out, _ = client.communicate(data, timeout=PATIENCE)
        assert out == data
        assert client.returncode == 0


def test_every_byte_value_through_a_terminal(host: Host) -> None:
    """A raw terminal is as clean as a pipe, both ways."""
    command = "stty raw -echo; printf ready; head -c 2560"
    with host.started("-tt", "-enone", command) as client:
        assert read_until(client.stdout, b"ready") == b"ready"
        client.stdin.write(EVERY_BYTE * 10)
        out = client.stdout.read()
        while more := client.stdout.read():
            out += more
        assert out == EVERY_BYTE * 10
        assert client.wait(PATIENCE) == 0


def test_a_long_last_word_on_a_terminal(host: Host) -> None:
    """What a terminal holds at its command's exit still comes, and then the status."""
    ran = host.ssh("-tt", "stty -opost; seq 1 100000; exit 6")
    assert ran.status == 6
    assert ran.text == "".join(f"{n}\n" for n in range(1, 100_001))


def test_a_terminal_rewrites_what_terminals_do(host: Host) -> None:
    """CR before LF comes from the terminal's own modes and nowhere else."""
    assert host.ssh("-tt", "echo a; stty -onlcr; echo b").out == b"a\r\nb\n"


# --- terminals -------------------------------------------------------------------------------


def test_terminals_on_request_only(host: Host) -> None:
    """A command has none without ``-t``, and with it knows its name."""
    assert host.ssh("-T", "tty; echo ${SSH_TTY-none}") == (0, b"not a tty\nnone\n", "")
    name, told = host.ssh("-tt", 'tty; echo "$SSH_TTY"').text.split()
    assert name == told
    assert name.startswith("/dev/")


def test_terminal_size_and_modes(sshd: Host, gateway: GatewayHost) -> None:
    """Every mode is the user's own terminal's, as under sshd."""
    said = {}
    for host in (sshd, gateway):
        with terminal(101, 33) as (_, theirs):
            modes = termios.tcgetattr(theirs)
            modes[0] ^= termios.IXON | IUTF8 | termios.ICRNL | termios.IMAXBEL
            modes[1] ^= termios.OPOST
            modes[3] ^= termios.ECHOK | termios.ECHOE | termios.ECHOCTL | termios.TOSTOP
            modes[4] = modes[5] = termios.B19200
            modes[6][termios.VINTR] = b"\x05"
            modes[6][termios.VERASE] = b"\x08"
            modes[6][termios.VSUSP] = b"\0"
            termios.tcsetattr(theirs, termios.TCSANOW, modes)
            with host.started("-tt", 'echo "$TERM"; stty -a', stdin=theirs) as client:
                said[host.name] = client.communicate(timeout=PATIENCE)[0].decode()
    text = said["gateway"]
    assert text == said["sshd"]
    for part in ("dumb\n", "rows 33; columns 101", "intr = ^E", "erase = ^H", "susp = <undef>"):
        assert part in text
    for part in ("-ixon", "-opost", "tostop", "speed 19200"):
        assert part in text


def test_default_terminal(sshd: Host, gateway: GatewayHost) -> None:
    """Where the client has no terminal to tell of, ours is as sshd's."""
    assert gateway.ssh("-tt", "stty -a").out == sshd.ssh("-tt", "stty -a").out


def test_window_change(host: Host) -> None:
    """The user's window changes, and the program hears of it."""
    command = "trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.02; done"
    with terminal(80, 24) as (ours, theirs):
        with host.started("-tt", command, stdin=theirs, start_new_session=True) as client:
            read_until(client.stdout, b"ready\r\n")
            fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
            client.send_signal(signal.SIGWINCH)
            assert read_until(client.stdout, b"50 132\r\n")
            assert client.wait(PATIENCE) == 7


def test_typed_control_characters(host: Host) -> None:
    """Ctrl-C interrupts the program, Ctrl-D ends its input."""
    command = "trap go=on INT; echo ready; until [ $go ]; do sleep 0.02; done; cat; echo done"
    with host.started("-tt", command) as client:
        read_until(client.stdout, b"ready\r\n")
        client.stdin.write(b"\x03")
        client.stdin.write(b"word\n\x04")
        assert read_until(client.stdout, b"done\r\n") == b"^Cword\r\nword\r\ndone\r\n"
        assert client.wait(PATIENCE) == 0


def test_an_interrupt_in_a_flood(host: Host) -> None:
    """It overtakes nothing, and need not: little is on the way at any time."""
    with ThreadPoolExecutor(1) as pool, host.started("-tt", "yes") as client:
        read_until(client.stdout, b"y\r\n" * 1000)
        drain = pool.submit(lambda: sum(iter(lambda: len(client.stdout.read(1 << 16)), 0)))
        client.stdin.write(b"\x03")
        assert client.wait(PATIENCE) == 255
        drain.result(PATIENCE)


def test_the_controlling_terminal(host: Host) -> None:
    """A terminal is the session's own: ``/dev/tty``, job control, and a session to itself."""
    command = "echo here > /dev/tty; set -m; sleep 0 & fg > /dev/null; set +m; "
    command += "ps -o sid=,tpgid= -p $$; echo $$"
    here, ids, pid = host.ssh("-tt", command).text.split("\r\n")[:3]
    assert (here, ids.split()) == ("here", [pid, pid])
    ran = host.ssh("echo here > /dev/tty; ps -o sid=,tty= -p $$; echo $$")
    ids, pid = ran.text.splitlines()
    assert ids.split() == [pid, "?"]
    assert "/dev/tty" in ran.err


def test_nothing_is_inherited(host: Host) -> None:
    """No signal is ignored or blocked, and no file open but the usual three."""
    for how in ("-T", "-tt"):
        ran = host.ssh(how, "grep -E '^Sig(Blk|Ign)' /proc/self/status; echo /proc/self/fd/*")
        *signals, files = ran.text.split("\r\n" if how == "-tt" else "\n")[:3]
        # 32 and 33 are glibc's own, which no program can set; its posix_spawn ignores them.
        own = 1 << 31 | 1 << 32
        assert [int(line.split()[1], 16) & ~own for line in signals] == [0, 0]
        # The last is the shell's own, for its look into the directory.
        assert files.split() == [f"/proc/self/fd/{number}" for number in range(4)]


def test_leaving_a_terminal_hangs_up(host: Host, tmp_path: Path) -> None:
    """A program on a terminal hears that its user has gone."""
    told = tmp_path / "told"
    command = f"trap 'echo hup > {told}; exit' HUP; echo ready; while :; do sleep 0.02; done"
    with host.started("-tt", command) as client:
        read_until(client.stdout, b"ready")
        client.kill()
        until(lambda: told.exists() and told.read_text(), "the program is told")
    assert told.read_text() == "hup\n"


def test_leaving_pipes_leaves_the_command(host: Host, tmp_path: Path) -> None:
    """A command without a terminal only sees its input end."""
    gone, gate, told = (tmp_path / name for name in ("gone", "gate", "told"))
    os.mkfifo(gate)
    command = (
        f"trap 'echo hup > {told}' HUP; echo ready; cat > /dev/null; echo > {gone}; "
        f"read x < {gate}; echo alive > {told}"
    )
    with host.started(command) as client:
        read_until(client.stdout, b"ready")
        client.kill()
        until(gone.exists, "the command's input is at its end")
        gate.write_text("go\n")
        until(lambda: told.exists() and told.read_text(), "the command goes on")
    assert told.read_text() == "alive\n"


# --- the environment -------------------------------------------------------------------------


def variables(ran: bytes) -> dict[str, str]:
    """What ``env -0`` printed."""
    return dict(one.split("=", 1) for one in ran.decode().split("\0") if one)


def test_environment_by_request(host: Host) -> None:
    """LANG, LC_*, COLORTERM and what the operator named may be set; other names may not."""
    given = {"LANG": "en_GB.UTF-8", "LC_TIME": "C", "COLORTERM": "truecolor", "MY_WORD": "a b"}
    refused = {"LD_PRELOAD_": "x", "OTHER": "x", "SSH_TTY": "x", "MYWORD": "x"}
    pairs = " ".join(f'"{name}={value}"' for name, value in (given | refused).items())
    found = variables(host.ssh(f"-oSetEnv={pairs}", "env -0").out)
    assert {name: found.get(name) for name in given} == given
    assert not found.keys() & refused.keys()


def test_addresses_in_the_environment(host: Host) -> None:
    """SSH_CLIENT and SSH_CONNECTION name both ends."""
    found = variables(host.ssh("env -0").out)
    port = found["SSH_CLIENT"].split()[1]
    assert found["SSH_CLIENT"] == f"127.0.0.1 {port} {host.port}"
    assert found["SSH_CONNECTION"] == f"127.0.0.1 {port} 127.0.0.1 {host.port}"
    assert "SSH_TTY" not in found


@pytest.mark.parametrize("how", ["-T", "-tt"])
def test_environment_is_the_servers(gateway: GatewayHost, how: str) -> None:
    """The Jupyter server's, without the kernel's own variables, and sane: who, where, which
    shell; the kernel's Python comes first."""
    server = variables(Path(f"/proc/{gateway.jupyter.pid}/environ").read_bytes())
    found = variables(gateway.ssh(how, "env -0").out)
    ours = {"USER", "LOGNAME", "SHELL", "PWD", "SHLVL", "_", "SSH_CLIENT", "SSH_CONNECTION"}
    if how == "-tt":
        ours |= {"SSH_TTY", "TERM"}
        assert found["TERM"] == "dumb"
    unlike = {"PATH", "TERM", "COLUMNS", "LINES", "OLDPWD"} | ours
    assert {name for name in found if name not in unlike} == server.keys() - unlike
    assert all(found[name] == server[name] for name in server.keys() - unlike)
    assert ours <= found.keys()
    assert found["USER"] == found["LOGNAME"] == getpass.getuser()
    assert found["HOME"] == server["HOME"]
    assert found["PWD"] == str(gateway.jupyter.root_dir)
    assert found["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert not [name for name in found if name.startswith(("JPY_", "MPL", "PYDEVD", "MALLOC"))]


def test_starts_in_jupyters_root(gateway: GatewayHost) -> None:
    """Where a notebook's files are."""
    (gateway.jupyter.root_dir / "notebook.ipynb").touch()
    ran = gateway.ssh("pwd; ls; rm notebook.ipynb")
    assert ran.text == f"{gateway.jupyter.root_dir}\nnotebook.ipynb\n"


# --- login shells ----------------------------------------------------------------------------


def test_login_shell_on_a_terminal(host: Host) -> None:
    """``ssh host``: a login shell that ends with its own status."""
    ran = host.ssh("-tt", given=b"echo $0; shopt login_shell; echo $((6*7)); exit 9\n")
    assert ran.status == 9
    for line in (r"-bash", r"login_shell\s+on", r"42"):
        assert re.search(rf"^{line}\r$", ran.text, re.MULTILINE), ran.text


def test_login_shell_without_a_terminal(host: Host) -> None:
    """``ssh -T host < script``: a login shell that reads its commands from stdin."""
    ran = host.ssh("-T", given=b"echo $0; shopt login_shell; tty; exit 9\n")
    assert (ran.status, ran.text.split()) == (9, ["-bash", "login_shell", "on", "not", "a", "tty"])


def test_login_shell_has_the_kernels_python(gateway: GatewayHost) -> None:
    """First on PATH also after the profiles, and nothing of how that came is left."""
    script = b"PS1=\ncommand -v python\nset | grep -i -e _conchkernel -e PROMPT_COMM\nexit 0\n"
    lines = gateway.ssh("-tt", given=script).text.splitlines()
    assert str(Path(sys.executable).parent / "python") in lines
    assert not [line for line in lines if re.match(r"(_CONCHKERNEL|PROMPT_COMMAND=)", line)]


def test_nothing_but_the_shell_speaks(gateway: GatewayHost) -> None:
    """No banner, no greeting: an interactive shell's bytes are its own."""
    command = quoted("bash", "--norc", "--noprofile", "-i")
    with gateway.started("-tt", f"PS1='> ' exec {command}") as client:
        assert read_until(client.stdout, b"> ") == b"> "
        client.stdin.write(b"exit 2\n")
        assert client.communicate(timeout=PATIENCE)[0] == b"exit 2\r\nexit\r\n"
        assert client.returncode == 2


# --- pressure --------------------------------------------------------------------------------


def test_a_reader_that_leaves(host: Host) -> None:
    """``ssh host yes | head -1``: the client and the writer end by themselves."""
    mark = f"mark-{host.name}"
    words = quoted(*host.words(f"exec yes {mark}"))
    ran = host.run(["bash", "-c", f"{words} | head -1; echo ${{PIPESTATUS[0]}}"])
    assert ran.text.split() == [mark, "255"]
    until(lambda: not processes_with(mark), "yes has ended")


def test_a_reader_that_leaves_a_terminal(host: Host) -> None:
    """``ssh -t host yes | head -1``: the writer stands still, and can be interrupted."""
    with host.started("-tt", "yes") as client:
        read_until(client.stdout, b"y\r\n")
        client.stdout.close()
        if isinstance(host, GatewayHost):
            host.road().until_quiet()
        client.stdin.write(b"\x03")
        assert client.wait(PATIENCE) == 255


@pytest.fixture(scope="module")
def bulk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 20 MB that no compression and no repetition helps with."""
    path = tmp_path_factory.mktemp("bulk") / "bulk"
    path.write_bytes(os.urandom(20_000_000))
    return path


@pytest.mark.parametrize("options", [(), ("-oRekeyLimit=1M",)], ids=["", "rekeying"])
def test_a_slow_reader_gets_all(gateway: GatewayHost, options: tuple[str, ...]) -> None:
    """Everything stands still while nobody reads; then every byte comes, and then the end."""
    road = gateway.road()
    with gateway.started(*options, "head -c 30000000 /dev/zero") as client:
        count = len(os.read(client.stdout.fileno(), 1000))
        road.until_quiet()
        while data := os.read(client.stdout.fileno(), 1 << 20):
            count += len(data)
        assert (count, client.wait(PATIENCE)) == (30_000_000, 0)


@pytest.mark.parametrize("options", [(), ("-oRekeyLimit=1M",)], ids=["", "rekeying"])
def test_transfers_are_exact(gateway: GatewayHost, bulk: Path, options: tuple[str, ...]) -> None:
    """20 MB down, up, and both at once."""
    data = bulk.read_bytes()
    assert gateway.ssh(*options, quoted("cat", bulk)) == (0, data, "")
    copy = bulk.with_name("copy")
    assert gateway.ssh(*options, quoted("dd", "status=none", f"of={copy}"), given=data).status == 0
    assert copy.read_bytes() == data
    assert gateway.ssh(*options, "cat", given=data).out == data


def test_a_stopped_client(gateway: GatewayHost) -> None:
    """It stops the flood and costs nobody memory or work; when it goes on, not a byte is
    missing."""
    road = gateway.road()
    road.until_quiet()
    before = road.resident()
    with gateway.started("head -c 60000000 /dev/zero") as client:
        count = len(os.read(client.stdout.fileno(), 1000))
        client.send_signal(signal.SIGSTOP)
        road.until_quiet()
        stalled = road.resident()
        client.send_signal(signal.SIGCONT)
        while data := os.read(client.stdout.fileno(), 1 << 20):
            count += len(data)
        assert (count, client.wait(PATIENCE)) == (60_000_000, 0)
    assert_within(before, stalled)


def test_a_command_that_does_not_read(gateway: GatewayHost, tmp_path: Path) -> None:
    """100 MB for a command that never takes them stay with the client."""
    road = gateway.road()
    road.until_quiet()
    before = road.resident()
    given = tmp_path / "given"
    with given.open("wb") as file:
        file.truncate(100_000_000)
    with given.open("rb") as file:
        with gateway.started("echo $$; exec sleep 1000", stdin=file) as client:
            pid = int(read_until(client.stdout, b"\n"))
            road.until_quiet()
            stalled = road.resident()
            assert client.poll() is None
            os.kill(pid, signal.SIGTERM)
            assert client.wait(PATIENCE) == 255
    assert_within(before, stalled)


def assert_within(before: dict[str, int], stalled: dict[str, int]) -> None:
    """No process has grown by more than a stall may cost."""
    grown = {name: (stalled[name] - size) >> 10 for name, size in before.items()}
    assert max(grown.values()) <= 8 * 1024, f"KiB: {grown}"


# --- many at once ----------------------------------------------------------------------------


def echo_beside_a_flood(host: Host, *options: str) -> None:
    """Eight shells each echo what is typed while one floods; in turns, many times."""
    with ThreadPoolExecutor(8) as pool, host.started(*options, "yes") as flood:
        read_until(flood.stdout, b"y\n")
        drain = pool.submit(lambda: sum(iter(lambda: len(flood.stdout.read(1 << 16)), 0)))
        shells = [host.started(*options, "cat") for _ in range(7)]
        clients = [shell.__enter__() for shell in shells]
        try:
            for turn in range(20):
                for number, client in enumerate(clients):
                    client.stdin.write(b"%d-%d\n" % (turn, number))
                for number, client in enumerate(clients):
                    wanted = b"%d-%d\n" % (turn, number)
                    assert read_until(client.stdout, b"\n") == wanted
            assert flood.poll() is None
            for client in clients:
                client.stdin.close()
                assert client.wait(PATIENCE) == 0
        finally:
            for shell in shells:
                shell.__exit__(None, None, None)
            flood.kill()
        drain.result(PATIENCE)


def test_sessions_on_one_connection(host: Host) -> None:
    """ControlMaster: eight sessions of one connection, one of them a flood."""
    with host.master() as option:
        echo_beside_a_flood(host, option)


def test_connections_at_once(host: Host) -> None:
    """Eight connections, one of them a flood."""
    echo_beside_a_flood(host)


# --- programs that speak over ssh ------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree with what trees have: modes, links, odd names, an empty and a large file."""
    root = tmp_path / "tree"
    (root / "sub dir").mkdir(parents=True)
    (root / "empty").touch()
    (root / "large").write_bytes(os.urandom(3_000_000))
    (root / "sub dir" / "naïve $name").write_bytes(EVERY_BYTE)
    (root / "script").write_text("#!/bin/sh\n")
    (root / "script").chmod(0o750)
    (root / "link").symlink_to("large")
    return root


def contents(root: Path) -> dict[str, object]:
    """A tree's files, links and modes."""
    return {
        str(path.relative_to(root)): (
            os.readlink(path)
            if path.is_symlink()
            else (path.stat().st_mode, path.is_dir() or path.read_bytes())
        )
        for path in root.rglob("*")
    }


def test_rsync(host: Host, tree: Path, tmp_path: Path) -> None:
    """Up and down again, whole."""
    shell = quoted("ssh", "-F", host.config)
    up, down = tmp_path / "up", tmp_path / "down"
    for source, target in ((f"{tree}/", f"{host.name}:{up}"), (f"{host.name}:{up}/", str(down))):
        ran = host.run(["rsync", "-a", "--timeout=20", "-e", shell, source, target])
        assert (ran.status, ran.err) == (0, "")
    assert contents(up) == contents(down) == contents(tree)
    missing = [f"{host.name}:{tmp_path}/none", str(down)]
    assert host.run(["rsync", "-a", "-e", shell, *missing]).status == 23


def test_scp_by_the_old_protocol(host: Host, tree: Path, tmp_path: Path) -> None:
    """``scp -O`` both ways; it tells of what is not there by its status."""
    scp = ["scp", "-O", "-q", "-r", "-p", "-F", str(host.config)]
    (tree / "link").unlink()
    up, down = tmp_path / "up", tmp_path / "down"
    for source, target in ((str(tree), f"{host.name}:{up}"), (f"{host.name}:{up}", str(down))):
        ran = host.run([*scp, source, target])
        assert (ran.status, ran.err) == (0, "")
    assert contents(up) == contents(down) == contents(tree)
    ran = host.run([*scp, f"{host.name}:{tmp_path}/none", str(down)])
    assert ran.status == 1
    assert "No such file" in ran.err


def test_tar(host: Host, tree: Path, tmp_path: Path) -> None:
    """Through a pipe, both ways."""
    up, down = tmp_path / "up", tmp_path / "down"
    up.mkdir()
    down.mkdir()
    ssh = quoted(*host.words())
    ran = host.run(
        ["bash", "-ec", f"tar -C {tree} -c . | {ssh} tar -C {up} -x; "
         f"{ssh} tar -C {up} -c . | tar -C {down} -x"]
    )  # fmt: skip
    assert ran == (0, b"", "")
    assert contents(up) == contents(down) == contents(tree)


def test_git(host: Host, tree: Path, tmp_path: Path) -> None:
    """Clone, push, fetch."""
    bare, clone, other = (tmp_path / name for name in ("bare.git", "clone", "other"))
    url = f"ssh://{host.name}{bare}"
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    environment = {"GIT_SSH_COMMAND": quoted("ssh", "-F", host.config), "LC_ALL": "C"}

    def git(*words: str | Path) -> Ran:
        ran = host.run(["git", *identity, *map(str, words)], environment=environment)
        assert ran.status == 0, ran.err
        return ran

    git("init", "-q", "--bare", "-b", "main", bare)
    git("clone", "-q", url, clone)
    (tree / "empty").rename(clone / "empty")
    (tree / "large").rename(clone / "large")
    git("-C", clone, "add", ".")
    git("-C", clone, "commit", "-qm", "one")
    git("-C", clone, "push", "-q", "origin", "HEAD:main")
    git("clone", "-q", url, other)
    assert (other / "large").read_bytes() == (clone / "large").read_bytes()
    git("-C", clone, "commit", "-q", "--allow-empty", "-m", "two")
    git("-C", clone, "push", "-q", "origin", "HEAD:main")
    git("-C", other, "pull", "-q")
    assert git("-C", other, "log", "--format=%s").text.split() == ["two", "one"]
    with_wrong_path = ["git", "clone", "-q", f"{url}.not", str(tmp_path / "not")]
    assert host.run(with_wrong_path, environment=environment).status == 128


# --- who gets in -----------------------------------------------------------------------------
# Failures come from addresses of their own: they are punished by address.


def test_any_name_is_the_owner(gateway: GatewayHost) -> None:
    """The login name makes no difference to who one is over there."""
    ran = gateway.ssh("-lsomebody", 'echo "$USER"')
    assert (ran.status, ran.text) == (0, f"{getpass.getuser()}\n")


def test_a_strangers_key(host: Host) -> None:
    """Refused, and told what else there is."""
    words = host.words("-b127.0.0.2", "true")
    strangers = host.config.read_text().replace(str(host.key), f"{host.home}/stranger")
    words[2] = str(host.config.with_suffix(".stranger"))
    Path(words[2]).write_text(strangers)
    ran = host.run(words)
    assert (ran.status, ran.out) == (255, b"")
    assert "Permission denied (publickey" in ran.err


def test_none_is_refused(gateway: GatewayHost) -> None:
    """Without a key or a word nobody gets in; these ways there are."""
    ran = gateway.ssh("-oPreferredAuthentications=none", "-b127.0.0.2", "true")
    assert ran.status == 255
    assert "Permission denied (publickey,keyboard-interactive,password)" in ran.err


@pytest.mark.parametrize("method", ["password", "keyboard-interactive"])
def test_the_token_is_the_password(gateway: GatewayHost, method: str) -> None:
    """In either way of asking for it; a wrong one is refused."""
    askpass = gateway.home / "askpass"
    askpass.write_text('#!/bin/sh\nprintf "%s\\n" "$WORD"\n')
    askpass.chmod(0o700)
    words = ["-oBatchMode=no", f"-oPreferredAuthentications={method}", "-b127.0.0.3"]
    words = gateway.words(*words, "-oNumberOfPasswordPrompts=1", "echo in")

    def try_with(word: str) -> Ran:
        environment = {"SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force", "WORD": word}
        return gateway.run(words, environment=environment)

    assert try_with(gateway.jupyter.token) == (0, b"in\n", "")
    refused = try_with(gateway.jupyter.token[:-1])
    assert (refused.status, refused.out) == (255, b"")
    assert "Permission denied" in refused.err


def test_no_secret_is_logged(gateway: GatewayHost) -> None:
    """The token is not in the gateway's log, nor on its command line."""
    command_line = subprocess.run(
        ["ps", "-o", "args=", "-p", str(gateway.pid)],
        capture_output=True,
        check=True,
        timeout=20,
    ).stdout
    for text in (gateway.log.read_bytes(), command_line):
        assert gateway.jupyter.token.encode() not in text
