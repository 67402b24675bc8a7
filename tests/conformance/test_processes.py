"""Shells and commands, to the byte and to the signal, on every backend."""

from __future__ import annotations

import hashlib
import os

import pytest
import pytest_twisted

from conchkernel.errors import StreamRefused
from conchkernel.interfaces import (
    ExitSignal,
    ExitStatus,
    ProcessRequest,
    PtyRequest,
    WindowSize,
)

from ..collector import Collector

TERMINAL = PtyRequest(b"vt100", WindowSize(100, 40, 800, 600))
EVERY_BYTE = bytes(range(256)) * 17


async def run(link, command, given=b"", pty=None, environment=()):
    """Run a command to its end."""
    collector = Collector()
    stream = collector.start(link, ProcessRequest(command, pty, environment))
    if given:
        stream.write(given)
    if pty is None:
        stream.writeEOF()
    await collector.untilClosed()
    assert collector.reason is None
    return collector


@pytest_twisted.ensureDeferred
async def test_output_error_and_status_are_apart_and_true(link):
    """stdout, stderr and the exit status each arrive as they are, in the promised order."""
    done = await run(link, b"echo out; echo err >&2; exit 7")
    assert (bytes(done.out), bytes(done.err), done.exit) == (b"out\n", b"err\n", ExitStatus(7))
    assert done.order == ["opened", "data", "eof", "exited", "closed"]


@pytest_twisted.ensureDeferred
async def test_every_byte_value_goes_through_both_ways(link):
    """Pipes carry bytes, not text."""
    done = await run(link, b"cat", EVERY_BYTE)
    assert bytes(done.out) == EVERY_BYTE


@pytest_twisted.ensureDeferred
async def test_end_of_input_does_not_end_output(link):
    """Half-close: what a filter says after its input's end still comes."""
    done = await run(link, b"wc -c; echo after", b"x" * 12345)
    assert done.out.split() == [b"12345", b"after"]


@pytest_twisted.ensureDeferred
async def test_a_signal_that_ends_the_process_is_named(link):
    """The exit is told as the signal it was."""
    done = await run(link, b"kill -KILL $$")
    assert isinstance(done.exit, ExitSignal)
    assert done.exit.name == "KILL"


@pytest_twisted.ensureDeferred
async def test_a_signal_is_delivered_to_the_process_group(link):
    """SIGTERM reaches the command and its children."""
    collector = Collector()
    stream = collector.start(link, ProcessRequest(b"echo ready; sleep 1000; echo never"))
    await collector.untilOutput(b"ready")
    stream.signal("TERM")
    await collector.untilClosed()
    assert collector.exit == ExitSignal("TERM")


@pytest_twisted.ensureDeferred
async def test_a_shell_that_cannot_be_found_is_a_sentence(link):
    """What cannot start is refused in words, or says why on stderr with a true status."""
    done = await run(link, b"/no/such/command")
    assert done.exit == ExitStatus(127)
    assert b"/no/such/command" in done.err


@pytest_twisted.ensureDeferred
async def test_large_output_arrives_whole(link):
    """15 MB, by their digest."""
    done = await run(link, b"seq 1 2000000")
    expected = b"".join(b"%d\n" % n for n in range(1, 2000001))
    assert hashlib.sha256(done.out).digest() == hashlib.sha256(expected).digest()


@pytest_twisted.ensureDeferred
async def test_large_input_arrives_whole(link):
    """8 MB in, its digest back."""
    data = os.urandom(8_000_000)
    done = await run(link, b"sha256sum", data)
    assert done.out.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert done.consumed == len(data)


@pytest_twisted.ensureDeferred
async def test_nothing_comes_beyond_the_grant(link):
    """The process waits when the client does; what was granted comes, and no byte more."""
    collector = Collector(limit=100_000)
    stream = collector.start(link, ProcessRequest(b"head -c 1000000 /dev/zero"))
    await collector.until(lambda: collector.count >= 100_000)
    assert collector.count == 100_000
    other = await run(link, b"echo meanwhile")
    assert bytes(other.out) == b"meanwhile\n"
    assert collector.count == 100_000
    assert collector.exit is None
    stream.grant(10_000_000)
    await collector.untilClosed()
    assert collector.count == 1_000_000
    assert collector.exit == ExitStatus(0)


@pytest_twisted.ensureDeferred
async def test_input_that_nobody_reads_is_not_taken(link):
    """A process that never reads its stdin takes what pipe and credit hold, no more."""
    collector = Collector()
    stream = collector.start(link, ProcessRequest(b"echo ready; exec sleep 1000"))
    await collector.untilOutput(b"ready")
    stream.write(b"x" * 6_000_000)
    await run(link, b"true")
    assert collector.consumed < 4_000_000
    stream.signal("KILL")
    await collector.untilClosed()


@pytest_twisted.ensureDeferred
async def test_stop_reading_ends_an_endless_writer(link):
    """The reader's end is felt as a broken pipe."""
    collector = Collector()
    stream = collector.start(link, ProcessRequest(b"yes"))
    await collector.until(lambda: collector.count > 1000)
    stream.stopReading()
    await collector.untilClosed()
    assert collector.exit == ExitSignal("PIPE")


@pytest_twisted.ensureDeferred
async def test_a_terminal_has_size_type_and_modes(link):
    """TERM, the window and the encoded modes are the client's, also for a command."""
    modes = ((53, 0), (70, 0), (1, 5), (42, 1))  # ECHO off, OPOST off, VINTR ^E, IUTF8
    pty = PtyRequest(b"vt220", WindowSize(132, 50), modes)
    done = await run(link, b'tty; stty size; stty -a; echo "$TERM $SSH_TTY"', pty=pty)
    text = done.out.decode()
    assert "50 132" in text
    assert "intr = ^E" in text
    assert "-echo " in text
    assert "-opost" in text
    assert "iutf8" in text
    assert "\r" not in text
    tty = text.splitlines()[0]
    assert text.splitlines()[-1] == f"vt220 {tty}"
    assert done.exit == ExitStatus(0)


@pytest_twisted.ensureDeferred
async def test_the_window_changes_at_once(link):
    """A resize is a SIGWINCH and a new size."""
    collector = Collector()
    script = b"trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.02; done"
    stream = collector.start(link, ProcessRequest(script, TERMINAL))
    await collector.untilOutput(b"ready")
    stream.resize(WindowSize(77, 33))
    await collector.untilClosed()
    assert b"33 77" in collector.out
    assert collector.exit == ExitStatus(3)


@pytest_twisted.ensureDeferred
async def test_control_c_reaches_the_foreground(link):
    """A typed interrupt character is a SIGINT."""
    collector = Collector()
    stream = collector.start(link, ProcessRequest(b"echo ready; exec sleep 1000", TERMINAL))
    await collector.untilOutput(b"ready")
    stream.write(b"\x03")
    await collector.untilClosed()
    assert collector.exit == ExitSignal("INT")


@pytest.mark.parametrize("pty", [None, TERMINAL])
@pytest_twisted.ensureDeferred
async def test_no_signal_is_ignored(link, pty):
    """Whatever the server, the kernel and the agent ignore, a program begins with the defaults."""
    done = await run(link, b"grep SigIgn /proc/self/status; trap", pty=pty)
    ignored = int(done.out.split()[1], 16)
    # 32 and 33 are glibc's own, and no program can set them.
    assert ignored & ~(1 << 31 | 1 << 32) == 0
    assert b"trap --" not in done.out


@pytest_twisted.ensureDeferred
async def test_closing_a_terminal_hangs_up(link, tmp_path):
    """The process behind a closed terminal gets SIGHUP; one behind pipes is left alone."""
    mark = tmp_path / "mark"
    os.mkfifo(mark)
    collector = Collector()
    script = f"trap 'echo hup > {mark}; exit' HUP; echo ready; while :; do read x || :; done"
    stream = collector.start(link, ProcessRequest(script.encode(), TERMINAL))
    await collector.untilOutput(b"ready")
    stream.close()
    await collector.untilClosed()
    assert collector.reason is None
    seen = await run(link, f"cat {mark}".encode())
    # Linux tells the session's leader and the foreground's group, and this is both.
    assert bytes(seen.out) in (b"hup\n", b"hup\n" * 2)


@pytest_twisted.ensureDeferred
async def test_closing_pipes_leaves_the_process_alone(link, tmp_path):
    """As under sshd, a command without a terminal is not killed by its client's leaving."""
    mark = tmp_path / "mark"
    os.mkfifo(mark)
    collector = Collector()
    script = (
        f"trap '' PIPE; echo ready; read x < {mark}; "
        f"echo $x > {mark}.done; mv {mark}.done {mark}.ok"
    )
    stream = collector.start(link, ProcessRequest(script.encode()))
    await collector.untilOutput(b"ready")
    stream.close()
    await collector.untilClosed()
    wait = f"echo alive > {mark}; while [ ! -e {mark}.ok ]; do :; done; cat {mark}.ok"
    done = await run(link, wait.encode())
    assert bytes(done.out) == b"alive\n"


@pytest_twisted.ensureDeferred
async def test_the_childs_exit_ends_a_terminal(link):
    """A background process that keeps the terminal open does not keep the session."""
    done = await run(link, b"sleep 20 & echo last words; exit 4", pty=TERMINAL)
    assert b"last words" in done.out
    assert done.exit == ExitStatus(4)


@pytest_twisted.ensureDeferred
async def test_all_of_a_terminals_output_comes_before_its_end(link):
    """A large last output on a terminal is not cut short by the exit behind it."""
    done = await run(link, b"stty -opost; seq 1 200000; exit 5", pty=TERMINAL)
    assert done.out.endswith(b"\n200000\n")
    assert done.out.count(b"\n") == 200000
    assert done.exit == ExitStatus(5)


@pytest_twisted.ensureDeferred
async def test_a_login_shell_is_one(link):
    """Without a command: the account's shell, as a login shell, from what is typed."""
    collector = Collector()
    stream = collector.start(link, ProcessRequest(None, TERMINAL))
    stream.write(b"shopt login_shell; echo \"0=$0\"; exit 9\n")
    await collector.untilClosed()
    assert (collector.reason, collector.exit) == (None, ExitStatus(9))
    assert b"0=-bash" in collector.out


@pytest_twisted.ensureDeferred
async def test_the_environment_is_the_accounts(link):
    """HOME, USER and PWD are sane, given variables are there, the kernel's own are not."""
    done = await run(
        link,
        b'echo "$HOME|$USER|$PWD|$SHELL|$LANG"; env; pwd',
        environment=((b"LANG", b"C.UTF-8"), (b"ODD", b"\xff=x")),
    )
    first, *rest = bytes(done.out).split(b"\n")
    home, user, directory, shell, lang = first.split(b"|")
    assert home.startswith(b"/")
    assert user
    assert shell.startswith(b"/")
    assert lang == b"C.UTF-8"
    assert directory == rest[-2]
    assert b"ODD=\xff=x" in rest
    names = {line.partition(b"=")[0] for line in rest}
    assert not names & {b"JPY_PARENT_PID", b"MPLBACKEND", b"TERM", b"MALLOC_MMAP_THRESHOLD_"}


@pytest_twisted.ensureDeferred
async def test_many_processes_at_once(link):
    """Forty commands interleave and each gets its own answer."""
    collectors = []
    for number in range(40):
        collector = Collector()
        collector.start(link, ProcessRequest(b"cat; exit %d" % number)).write(b"%d" % number)
        collectors.append(collector)
    for collector in reversed(collectors):
        collector.stream.writeEOF()
    for number, collector in enumerate(collectors):
        await collector.untilClosed()
        assert (bytes(collector.out), collector.exit) == (b"%d" % number, ExitStatus(number))


@pytest_twisted.ensureDeferred
async def test_a_command_too_long_is_refused(link):
    """A request beyond the wire's frame is refused on its own stream."""
    collector = Collector()
    collector.start(link, ProcessRequest(b"true " + b"x" * 200_000))
    await collector.untilClosed()
    assert isinstance(collector.reason, StreamRefused)
    assert (await run(link, b"echo fine")).exit == ExitStatus(0)


@pytest.mark.parametrize("pty", [None, TERMINAL])
@pytest_twisted.ensureDeferred
async def test_a_refused_shell_says_why(backend, link, pty):
    """NUL bytes cannot reach execve; the stream says so, the session goes on."""
    collector = Collector()
    collector.start(link, ProcessRequest(b"echo a\0b", pty))
    await collector.untilClosed()
    assert isinstance(collector.reason, StreamRefused)
