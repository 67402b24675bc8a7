"""How IDEs and notebooks work over ssh: a long script on stdin, a server that it leaves behind,
many streams to that; and kernels by sshpyk."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .conftest import PATIENCE, free_port, quoted, read_until, until
from .test_tunnels_libraries import by_socks, through

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .conftest import GatewayHost, Host

#: What the script leaves running; echoes until its peer ends. Told where to listen, or nothing.
SERVER = """
import asyncio, os, sys

async def serve(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def main():
    if len(sys.argv) > 1:
        server = await asyncio.start_unix_server(serve, sys.argv[1], backlog=128)
        where = sys.argv[1]
    else:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=128)
        where = server.sockets[0].getsockname()[1]
    print(f"server {os.getpid()} listens on {where}", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
BULK = os.urandom(1_000_000)


def echoing(directory: Path, *listen: str) -> str:
    """The command of :data:`SERVER`."""
    (directory / "server.py").write_text(SERVER)
    return quoted(sys.executable, directory / "server.py", *listen)


def install_script(directory: Path, server: str) -> bytes:
    """As an IDE's: long, chatty, between markers, and what it starts outlives it.

    :param server: a command that says where it ``listens on`` or is ``listening on``.
    """
    # Functions for other systems, which are read and never called.
    unused = "".join(
        f"""
install_for_system_{number}() {{
  # Neither curl nor wget where the system has none; what was there is kept until it is replaced.
  if [ "$PLATFORM" = "system-{number}" ]; then
    DOWNLOAD_URL="https://update.example.org/commit:$COMMIT/server-system-{number}/$QUALITY"
    echo "mark-7: downloading $DOWNLOAD_URL" 1>&2
    tar -xf server.tar.gz --strip-components 1 || {{ echo "mark-7: failed"; return 1; }}
  fi
}}
"""
        for number in range(50)
    )
    script = f"""
COMMIT=0123456789abcdef0123456789abcdef01234567
PLATFORM=$(uname -s); ARCH=$(uname -m); LOG={quoted(directory / "server.log")}
echo "mark-7: running"
{unused}
(umask 077; : > "$LOG")
nohup {server} > "$LOG" 2>&1 < /dev/null &
SERVER_PID=$!
for attempt in $(seq 1 2000); do
  grep -q "listen[a-z]* on" "$LOG" && break
  kill -0 $SERVER_PID || break
  sleep 0.01
done
echo "mark-7: start"
echo "listeningOn==$(sed -n 's/.*listen[a-z]* on //p' "$LOG")=="
echo "serverPid==$SERVER_PID=="
echo "platform==$PLATFORM=="
echo "connection==$SSH_CONNECTION=="
echo "mark-7: end"
"""
    assert len(script) > 20_000
    return script.encode()


def told(said: bytes) -> dict[str, str]:
    """What the script said between its markers."""
    between = said.decode().split("mark-7: start\n")[1].split("mark-7: end")[0]
    return dict(line.strip("=").split("==") for line in between.splitlines())


async def many(connect: Callable[[bytes], Awaitable[bytes]], count: int) -> None:
    """So many streams at once, each with bytes of its own."""
    sent = [b"%d " % number + BULK[: 20_000 + number] for number in range(count - 1)] + [BULK]
    came = await asyncio.wait_for(asyncio.gather(*map(connect, sent)), PATIENCE)
    assert came == sent


def test_a_remote_ides_server(host: Host, tmp_path: Path) -> None:
    """``ssh -T -D PORT host bash`` with the script on stdin, as VS Code's Remote-SSH does it: the
    markers come while stdin stays open, a hundred streams reach the server, and the server is
    there for the next connection."""
    socks = free_port()
    with host.started("-T", f"-D{socks}", "bash") as client:
        client.stdin.write(install_script(tmp_path, echoing(tmp_path)))
        said = told(read_until(client.stdout, b"mark-7: end\n"))
        port, pid = int(said["listeningOn"]), int(said["serverPid"])
        asyncio.run(many(lambda data: by_socks(socks, "localhost", port, data), 100))
        # The connection goes on as a shell that can be told more.
        client.stdin.write(b"echo still $((6*7))\n")
        assert read_until(client.stdout, b"\n") == b"still 42\n"
        client.stdin.close()
        assert client.wait(PATIENCE) == 0
    with host.started("-T", f"-D{socks}", "bash") as client:
        client.stdin.write(b"echo mark-8\n")
        read_until(client.stdout, b"mark-8\n")
        asyncio.run(many(lambda data: by_socks(socks, "127.0.0.1", port, data), 3))
        client.stdin.write(b"kill %d\n" % pid)
        until(lambda: not Path(f"/proc/{pid}/exe").exists(), "the server has ended")


def test_a_remote_ides_server_on_a_socket(host: Host, tmp_path: Path) -> None:
    """The same where the server listens on a Unix socket (remoteServerListenOnSocket)."""
    there, local = tmp_path / "there", free_port()
    with host.started("-T", f"-L{local}:{there}", "bash") as client:
        client.stdin.write(install_script(tmp_path, echoing(tmp_path, str(there))))
        said = told(read_until(client.stdout, b"mark-7: end\n"))
        assert said["listeningOn"] == str(there)
        asyncio.run(many(lambda data: through(local, data), 50))
    os.kill(int(said["serverPid"]), signal.SIGTERM)


def test_sshpyk(gateway: GatewayHost, tmp_path: Path) -> None:
    """A kernel on the host by sshpyk, unmodified: start, execute, interrupt, restart, end."""
    config, runtime = tmp_path / "config", tmp_path / "runtime"
    runtime.mkdir()
    shared = f"  ControlMaster auto\n  ControlPath {tmp_path}/master\n  ControlPersist 60\n"
    config.write_text(gateway.config.read_text() + shared)
    environment = {"JUPYTER_DATA_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(runtime)}
    words = [str(Path(sys.executable).with_name("sshpyk")), "add"]
    words += ["--kernel-name", "far", "--display-name", "Far", "--language", "python"]
    words += ["--ssh-host-alias", gateway.name, "--ssh-config", str(config)]
    words += ["--remote-python", sys.executable, "--remote-kernel-name", "python3"]
    made = gateway.run(words, environment=environment)
    assert made.status == 0, made.text + made.err
    words = [sys.executable, str(Path(__file__).with_name("sshpyk_kernel.py")), "far"]
    ran = gateway.run(words, environment=environment, patience=3 * PATIENCE)
    gateway.run(["ssh", "-F", str(config), "-Oexit", gateway.name])
    started, *rest = [line.split() for line in ran.text.splitlines()]
    assert started[0::5] == ["started", str(gateway.port)], ran.err
    assert rest[0] == ["interrupted", "KeyboardInterrupt"]
    assert rest[1] == ["kept", "42"]
    assert (rest[2][0], rest[2][2]) == ("restarted", "NameError")
    assert rest[3] == ["ended"]
    assert not [pid for pid in (started[1], rest[2][1]) if Path(f"/proc/{pid}/exe").exists()]
