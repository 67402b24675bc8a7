"""asyncssh against the running gateway: what OpenSSH's client does not show, or cannot ask for."""

from __future__ import annotations

import asyncio
import getpass
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import asyncssh
import pytest

from .conftest import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from .conftest import GatewayHost, Host

#: A loop that signals interrupt soon.
LOOP = "while :; do sleep 0.02; done"


def connected(
    host: Host, script: Callable[[asyncssh.SSHClientConnection], Awaitable[Any]], **options: Any
) -> Any:
    """Run a script over a connection of its own; what it returns."""
    usual = {"client_keys": [str(host.key)], "username": getpass.getuser(), "agent_path": None}

    async def run() -> Any:
        async with asyncssh.connect(
            "127.0.0.1",
            host.port,
            known_hosts=str(host.home / f"{host.name}.known"),
            config=None,
            **(usual | options),
        ) as connection:
            return await script(connection)

    return asyncio.run(asyncio.wait_for(run(), PATIENCE))


# --- how it ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["KILL", "TERM", "HUP", "INT", "PIPE", "USR1", "SEGV", "ABRT"])
def test_exit_signals(host: Host, name: str, tmp_path: Path) -> None:
    """The signal that ended the command, by its name, and whether it left a core."""
    command = f"cd {tmp_path}; ulimit -c unlimited 2> /dev/null; kill -{name} $$"
    here = subprocess.Popen(["bash", "-c", command])
    _, status = os.waitpid(here.pid, 0)
    here.returncode = status
    assert os.WTERMSIG(status) == signal.Signals[f"SIG{name}"]
    done = connected(host, lambda connection: connection.run(command))
    assert done.exit_signal[:2] == (name, os.WCOREDUMP(status))
    assert done.returncode == -os.WTERMSIG(status)


def test_exit_status_and_streams(host: Host) -> None:
    """Apart, and every byte as it is."""
    every = bytes(range(256))
    done = connected(
        host,
        lambda connection: connection.run(
            "tee /dev/stderr; exit 42", input=every * 300, encoding=None
        ),
    )
    assert (done.exit_status, done.stdout, done.stderr) == (42, every * 300, every * 300)


def test_output_after_half_close(host: Host) -> None:
    """EOF ends the input; the answer still comes, and then more."""

    async def script(connection: asyncssh.SSHClientConnection) -> tuple[str, int | None]:
        process = await connection.create_process("wc -c; echo after; exit 3")
        process.stdin.write("x" * 100_000)
        process.stdin.write_eof()
        out = await process.stdout.read()
        await process.wait_closed()
        return out, process.exit_status

    out, status = connected(host, script)
    assert (out.split(), status) == (["100000", "after"], 3)


# --- what a client may ask of a running process ----------------------------------------------


@pytest.mark.parametrize("terminal", [None, "vt100"])
def test_signals_are_delivered(gateway: GatewayHost, terminal: str | None) -> None:
    """To the whole process group; one that is caught does what the command says."""

    async def script(connection: asyncssh.SSHClientConnection) -> tuple[str, Any]:
        command = f"trap 'echo caught' USR1; echo ready; {LOOP}"
        process = await connection.create_process(command, term_type=terminal)
        await process.stdout.readline()
        process.send_signal("USR1")
        # On a terminal the shell also tells of its child's end.
        heard = await process.stdout.readuntil("caught")
        process.send_signal("TERM")
        await process.wait_closed()
        return heard, process.exit_signal

    heard, ended = connected(gateway, script)
    assert heard.endswith("caught")
    assert ended[0] == "TERM"


def test_signals_reach_the_children(gateway: GatewayHost) -> None:
    """As if they were typed."""

    async def script(connection: asyncssh.SSHClientConnection) -> int:
        process = await connection.create_process("sleep 1000 & echo $!; wait")
        child = int(await process.stdout.readline())
        process.kill()
        await process.wait_closed()
        assert process.exit_signal is not None
        assert process.exit_signal[0] == "KILL"
        return child

    child = connected(gateway, script)
    until(lambda: not os.path.exists(f"/proc/{child}/exe"), "the child has ended")


def test_a_break_is_sent(gateway: GatewayHost) -> None:
    """It is taken, and with BRKINT it would be an interrupt; the session goes on."""

    async def script(connection: asyncssh.SSHClientConnection) -> tuple[str, int | None]:
        process = await connection.create_process("echo ready; read x; exit 4", term_type="vt100")
        heard = await process.stdout.readline()
        process.send_break(500)
        process.stdin.write("go on\n")
        await process.wait_closed()
        return heard, process.exit_status

    assert connected(gateway, script) == ("ready\r\n", 4)


def test_terminal_size_and_its_change(host: Host) -> None:
    """Columns and rows in their order, at the start and after a change; also the pixels."""

    async def script(connection: asyncssh.SSHClientConnection) -> tuple[str, int | None]:
        pixels = (
            "python3 -c 'import fcntl, termios, struct;"
            'print(*struct.unpack("4H", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))))\''
        )
        command = f"changed() {{ stty size; {pixels}; exit 5; }}; trap changed WINCH; "
        command += f"stty size; {pixels}; echo ready; {LOOP}"
        process = await connection.create_process(
            command, term_type="xterm", term_size=(101, 33, 808, 528)
        )
        heard = await process.stdout.readuntil("ready\r\n")
        process.change_terminal_size(132, 50, 1056, 800)
        heard += await process.stdout.read()
        await process.wait_closed()
        return heard, process.exit_status

    heard, status = connected(host, script)
    assert heard.split("\r\n") == [
        "33 101", "33 101 808 528", "ready", "50 132", "50 132 1056 800", "",
    ]  # fmt: skip
    assert status == 5


def test_terminal_modes(host: Host) -> None:
    """Characters and flags that the client names are set; those that it does not name are not
    touched."""
    modes = {
        asyncssh.PTY_VINTR: 5,
        asyncssh.PTY_VKILL: 255,
        asyncssh.PTY_ECHO: 0,
        asyncssh.PTY_OPOST: 0,
        asyncssh.PTY_IUTF8: 1,
        asyncssh.PTY_OP_ISPEED: 9600,
        asyncssh.PTY_OP_OSPEED: 9600,
    }
    done = connected(
        host,
        lambda connection: connection.run("stty -a", term_type="vt100", term_modes=modes),
    )
    for part in ("speed 9600 baud", "intr = ^E", "kill = <undef>", "quit = ^\\"):
        assert part in done.stdout
    words = done.stdout.replace(";", "").split()
    assert {"-echo", "-opost", "iutf8", "icanon", "isig"} <= set(words)
    assert "\r" not in done.stdout


# --- leaving ---------------------------------------------------------------------------------


def test_closing_one_channel_leaves_the_others(host: Host, tmp_path: Path) -> None:
    """A terminal that is closed hangs up; its neighbour on the connection hears nothing."""
    told = tmp_path / "told"

    async def script(connection: asyncssh.SSHClientConnection) -> str:
        other = await connection.create_process("cat")
        process = await connection.create_process(
            f"trap 'echo hup > {told}; exit' HUP; echo ready; {LOOP}", term_type="vt100"
        )
        await process.stdout.readline()
        process.close()
        while not (told.exists() and told.read_text()):
            await asyncio.sleep(0.01)
        other.stdin.write("still here\n")
        return await other.stdout.readline()

    assert connected(host, script) == "still here\n"
    assert told.read_text() == "hup\n"


def test_closing_pipes_leaves_the_command(host: Host, tmp_path: Path) -> None:
    """A command without a terminal goes on after its channel is closed, and its connection."""
    gone, gate, told = (tmp_path / name for name in ("gone", "gate", "told"))
    os.mkfifo(gate)

    async def script(connection: asyncssh.SSHClientConnection) -> None:
        process = await connection.create_process(
            f"trap 'echo hup > {told}' HUP; echo ready; cat > /dev/null; echo > {gone}; "
            f"read x < {gate}; echo alive > {told}"
        )
        await process.stdout.readline()
        process.close()
        while not gone.exists():
            await asyncio.sleep(0.01)

    connected(host, script)
    gate.write_text("go\n")
    until(lambda: told.exists() and told.read_text(), "the command goes on")
    assert told.read_text() == "alive\n"


def test_what_was_sent_before_closing_arrives(host: Host, tmp_path: Path) -> None:
    """All of it, however late the command reads; then the channel closes with its status."""
    gate, taken = tmp_path / "gate", tmp_path / "taken"
    os.mkfifo(gate)
    sent = os.urandom(1_900_000)

    async def script(connection: asyncssh.SSHClientConnection) -> int | None:
        process = await connection.create_process(
            f"read x < {gate}; cat > {taken}; exit 5", encoding=None
        )
        process.stdin.write(sent)
        process.close()
        gate.write_text("go\n")
        await process.wait_closed()
        return process.exit_status

    connected(host, script)
    assert taken.read_bytes() == sent


def test_many_sessions_on_one_connection(gateway: GatewayHost) -> None:
    """Ten at once, each with its own bytes; an eleventh is refused, and the ten go on."""

    async def script(connection: asyncssh.SSHClientConnection) -> list[str]:
        processes = [await connection.create_process("cat") for _ in range(10)]
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.create_process("cat")
        for turn in range(20):
            for number, process in enumerate(processes):
                process.stdin.write(f"{turn}-{number};")
        for process in reversed(processes):
            process.stdin.write_eof()
        return [await process.stdout.read() for process in processes]

    assert connected(gateway, script) == [
        "".join(f"{turn}-{number};" for turn in range(20)) for number in range(10)
    ]


# --- who gets in -----------------------------------------------------------------------------


def test_password(gateway: GatewayHost) -> None:
    """The token, under any name; anything else is refused."""
    options = {"client_keys": None, "preferred_auth": "password", "username": "anybody"}
    token = gateway.jupyter.token
    done = connected(gateway, lambda one: one.run("echo in"), password=token, **options)
    assert done.stdout == "in\n"
    for wrong in ("guess", token + "\N{SNOWMAN}"):
        with pytest.raises(asyncssh.PermissionDenied):
            connected(
                gateway,
                lambda one: one.run("echo in"),
                password=wrong,
                # Failures are held against an address; this one is nobody else's.
                local_addr=(f"127.0.1.{len(wrong)}", 0),
                **options,
            )


def test_none(gateway: GatewayHost) -> None:
    """No way in without a proof."""
    with pytest.raises(asyncssh.PermissionDenied):
        connected(
            gateway, lambda one: one.run("echo in"), client_keys=None, local_addr=("127.0.2.1", 0)
        )
