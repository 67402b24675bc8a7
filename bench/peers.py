"""The other SSH servers in Python, each as its documentation has it, for this account's commands.

Arguments: ``asyncssh``, ``paramiko`` or ``conch``, a port, a host key, an authorized_keys file.
Processes are read in large pieces where that is the caller's choice, so that SSH is compared.
"""

from __future__ import annotations

import getpass
import os
import pty
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_PIECE = 64 * 1024


def _terminal(command: str) -> tuple[subprocess.Popen[bytes], int]:
    """The command on a new terminal, and our end of that."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "sh", "-c", command], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    return process, ours


def _piped(command: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(["sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)


# --- asyncssh ------------------------------------------------------------------------------------


def serve_asyncssh(port: int, host_key: str, authorized: str) -> None:
    """asyncssh's own redirection between channels and pipes."""
    import asyncio

    import asyncssh

    async def serve(process: Any) -> None:
        if process.term_type is None:
            child = _piped(process.command)
            # With EOF sent both ways it would close, and never send the exit status.
            await process.redirect(
                child.stdin, child.stdout, child.stderr, bufsize=_PIECE, send_eof=False
            )
        else:
            child, ours = _terminal(process.command)
            await process.redirect(os.dup(ours), ours, bufsize=_PIECE, send_eof=False)
        await process.stdout.drain()
        process.exit(await asyncio.to_thread(child.wait))

    async def run() -> None:
        await asyncssh.listen(
            "127.0.0.1",
            port,
            server_host_keys=[host_key],
            authorized_client_keys=authorized,
            process_factory=serve,
            sftp_factory=True,
            encoding=None,
            line_editor=False,
        )
        await asyncio.Event().wait()

    asyncio.run(run())


# --- paramiko ------------------------------------------------------------------------------------


def serve_paramiko(port: int, host_key: str, authorized: str) -> None:
    """A thread for each connection, and one for each direction of a channel."""
    import paramiko

    key = paramiko.Ed25519Key.from_private_key_file(host_key)
    known = Path(authorized).read_text().split()[1]

    class Server(paramiko.ServerInterface):
        def __init__(self) -> None:
            self.terminals: set[int] = set()

        def check_auth_publickey(self, username: str, key: Any) -> int:
            good = key.get_base64() == known
            return paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED

        def get_allowed_auths(self, username: str) -> str:
            return "publickey"

        def check_channel_request(self, kind: str, chanid: int) -> int:
            return paramiko.OPEN_SUCCEEDED

        def check_channel_pty_request(self, channel: Any, *ignored: object) -> bool:
            self.terminals.add(channel.get_id())
            return True

        def check_channel_exec_request(self, channel: Any, command: bytes) -> bool:
            terminal = channel.get_id() in self.terminals
            threading.Thread(
                target=run, args=(channel, command.decode(), terminal), daemon=True
            ).start()
            return True

    def run(channel: Any, command: str, terminal: bool) -> None:
        if terminal:
            child, ours = _terminal(command)
            entrance = outlet = ours
        else:
            child = _piped(command)
            assert child.stdin is not None
            assert child.stdout is not None
            entrance, outlet = child.stdin.fileno(), child.stdout.fileno()
        threading.Thread(target=feed, args=(channel, child, entrance), daemon=True).start()
        try:
            while data := os.read(outlet, _PIECE):
                channel.sendall(data)
        except OSError:
            pass
        status = child.wait()
        channel.send_exit_status(status & 0xFF)
        channel.close()

    def feed(channel: Any, child: subprocess.Popen[bytes], entrance: int) -> None:
        try:
            while data := channel.recv(_PIECE):
                view = memoryview(data)
                while view:
                    view = view[os.write(entrance, view) :]
        except OSError:
            pass
        if child.stdin is not None:
            child.stdin.close()

    def connection(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport = paramiko.Transport(sock)
        transport.add_server_key(key)
        try:
            transport.start_server(server=Server())
        except (paramiko.SSHException, EOFError):
            transport.close()

    with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=connection, args=(sock,), daemon=True).start()


# --- stock Conch ---------------------------------------------------------------------------------


def serve_conch(port: int, host_key: str, authorized: str) -> None:
    """Conch as it comes, with its own Unix sessions."""
    from twisted.conch.checkers import InMemorySSHKeyDB, SSHPublicKeyChecker
    from twisted.conch.ssh.factory import SSHFactory
    from twisted.conch.ssh.keys import Key
    from twisted.conch.unix import UnixSSHRealm
    from twisted.cred.portal import Portal
    from twisted.internet import reactor as installed

    reactor: Any = installed
    factory = SSHFactory()
    key = Key.fromFile(host_key)
    factory.publicKeys = {key.sshType(): key.public()}
    factory.privateKeys = {key.sshType(): key}
    users = {getpass.getuser().encode(): [Key.fromFile(authorized)]}
    factory.portal = Portal(UnixSSHRealm(), [SSHPublicKeyChecker(InMemorySSHKeyDB(users))])
    reactor.listenTCP(port, factory, interface="127.0.0.1")
    reactor.run()


SERVERS = {"asyncssh": serve_asyncssh, "paramiko": serve_paramiko, "conch": serve_conch}

if __name__ == "__main__":
    SERVERS[sys.argv[1]](int(sys.argv[2]), *sys.argv[3:])
