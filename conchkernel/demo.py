"""``conchkernel demo``: a Jupyter server, a gateway before it, and the line to type.

Everything is real but the scale: the server is a child process on loopback, the gateway is this
process, and what they need lies in one temporary directory that goes with them. Keys and
known_hosts are its own, so it works on a clean account and leaves no trace in ``~/.ssh``.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from twisted.cred.portal import Portal
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import ProcessExitedAlready, ReactorNotRunning
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.internet.utils import getProcessOutput
from twisted.logger import (
    FilteringLogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)

from conchkernel.allocator import keepLargeBuffers
from conchkernel.avatars import KernelRealm
from conchkernel.errors import ConchKernelError, ConfigurationError
from conchkernel.jupyter.backends import JupyterBackend
from conchkernel.service import GatewayService
from conchkernel.ssh import hostkeys
from conchkernel.ssh.checkers import AuthorizedKeysChecker
from conchkernel.ssh.factory import GatewayFactory
from conchkernel.sshconfig import plain
from conchkernel.stores import StoreChoice

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.python.failure import Failure

DEFAULT_PORT = 2222

#: Seconds for the Jupyter server to come up; a cold disk needs some.
JUPYTER_TIME_LIMIT = 30.0

#: Seconds for a child to end by itself before it is killed.
STOP_LIMIT = 5.0

#: Jupyter's configuration is a file and not arguments, for argv is public and holds no token.
#: Its stdin is a pipe from us: when that closes, however we ended, the server ends too.
JUPYTER_CONFIG = """\
import os, signal, threading

# The terminal's Ctrl-C is the demo's alone, which ends things in order.
os.setsid()

def end_with_the_demo():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_the_demo, daemon=True).start()

c = get_config()
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.port = 0
c.IdentityProvider.token = {token!r}
c.ServerApp.root_dir = {root!r}
c.ServerApp.open_browser = False
c.ServerApp.allow_root = True
c.ServerApp.jpserver_extensions = {{"jupyter_server_terminals": False}}
"""

#: A Jupyter server without the one of its optional imports that takes 2 s: jsonschema's, to check
#: the syntax of IRIs.
JUPYTER = """\
import sys
sys.modules["rfc3987_syntax"] = None
from jupyter_server.serverapp import main
main()
"""


class _Child(ProcessProtocol):
    """A process of ours. Its status is as a shell has it: 128 + N where signal N ended it."""

    def __init__(self, log: Callable[[bytes], object] | None = None) -> None:
        self.running = True
        self._status = 0
        self._waiting: list[Deferred[int]] = []
        self._log = log

    def whenEnded(self) -> Deferred[int]:
        """Fires with the status. Each caller has a Deferred of its own, and may cancel it."""
        waiting: Deferred[int] = Deferred()
        if self.running:
            self._waiting.append(waiting)
        else:
            waiting.callback(self._status)
        return waiting

    def outReceived(self, data: bytes) -> None:
        if self._log is not None:
            self._log(data)

    errReceived = outReceived

    def processEnded(self, reason: Failure) -> None:
        self.running = False
        value: Any = reason.value
        self._status = 128 + value.signal if value.signal else value.exitCode or 0
        for waiting in self._waiting:
            waiting.callback(self._status)

    def kill(self, name: str) -> None:
        """Send a signal, if there is still somebody to take it."""
        try:
            if self.running and self.transport is not None:
                self.transport.signalProcess(name)
        except ProcessExitedAlready:
            pass


class Demo:
    """One run of the demo. :meth:`stop` undoes all that :meth:`run` began, at any moment.

    :ivar fingerprint: the host key's, as ssh shows it, once there is one.
    """

    fingerprint = ""

    def __init__(self, reactor: Any, port: int, command: str | None) -> None:
        self._reactor = reactor
        self._port = port
        self._command = command
        self._begun = AsyncExitStack()
        self._directory = Path(
            self._begun.enter_context(tempfile.TemporaryDirectory(prefix="conchkernel-demo-"))
        )
        log = open(self._directory / "jupyter.log", "wb", buffering=0)  # noqa: SIM115
        self._log = self._begun.enter_context(log)

    async def run(self, say: Callable[[str], object]) -> int | None:
        """Start everything; then run the command, if there is one, and return its status.

        :param say: told what is being waited for.
        """
        say("Starting Jupyter")
        url = await self._startJupyter()
        say("Starting a kernel")
        await self._startGateway(url)
        if self._command is None:
            return None
        arguments = [*self.sshCommand("-F", "none", "-o", "BatchMode=yes"), self._command]
        ssh = self._spawn(_Child(), arguments, env=None, childFDs={0: 0, 1: 1, 2: 2})
        return await ssh.whenEnded()

    async def stop(self) -> None:
        """Undo what was begun, in reverse order."""
        await self._begun.aclose()

    def sshCommand(self, *options: str, program: str = "ssh") -> list[str]:
        """The ssh command for this gateway, with ``options`` before its destination.

        :param program: ``sftp`` for files.
        :raises conchkernel.errors.ConfigurationError: if ssh could not read its paths.
        """
        directory = Path(plain(self._directory))
        known = str(directory / "known_hosts")
        if " " in known:
            known = f'"{known}"'  # else ssh takes it for two files
        return [
            program,
            *("-p" if program == "ssh" else "-P", str(self._port)),
            *("-i", str(directory / "id_ed25519")),
            *("-o", "IdentitiesOnly=yes"),
            *("-o", f"UserKnownHostsFile={known}"),
            *options,
            "demo@127.0.0.1",
        ]

    async def _startJupyter(self) -> str:
        config = self._directory / "jupyter_server_config.py"
        token = secrets.token_hex(24)
        text = JUPYTER_CONFIG.format(token=token, root=os.getcwd())
        config.touch(mode=0o600)
        config.write_text(text, encoding="utf-8")
        runtime = self._directory / "runtime"
        # Neither the account's configuration in, nor Jupyter's and IPython's files out.
        environment = {
            **os.environ,
            "JUPYTER_CONFIG_DIR": str(self._directory / "config"),
            "JUPYTER_DATA_DIR": str(self._directory / "data"),
            "JUPYTER_RUNTIME_DIR": str(runtime),
            "IPYTHONDIR": str(self._directory / "ipython"),
        }
        arguments = [sys.executable, "-P", "-c", JUPYTER, f"--config={config}"]
        jupyter = self._spawn(_Child(self._log.write), arguments, env=environment)
        deadline = self._reactor.seconds() + JUPYTER_TIME_LIMIT
        while True:
            if not jupyter.running or self._reactor.seconds() > deadline:
                raise ConfigurationError(f"Jupyter did not start: {self._lastWords()}")
            for file in runtime.glob("jpserver-*.json"):
                try:
                    return f"{json.loads(file.read_bytes())['url']}?token={token}"
                except ValueError:
                    pass  # half written
            await deferLater(self._reactor, 0.05)

    def _spawn(self, child: _Child, arguments: list[str], **options: Any) -> _Child:
        self._reactor.spawnProcess(child, arguments[0], arguments, **options)
        self._begun.push_async_callback(self._end, child)
        return child

    async def _end(self, child: _Child) -> None:
        if not child.running:
            return
        child.kill("TERM")
        kill = self._reactor.callLater(STOP_LIMIT, child.kill, "KILL")
        await child.whenEnded()
        if kill.active():
            kill.cancel()

    def _lastWords(self) -> str:
        lines = (self._directory / "jupyter.log").read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    async def _startGateway(self, url: str) -> None:
        state = self._directory / "state"
        hostKey = hostkeys.loadOrCreate(state)
        self.fingerprint = hostkeys.fingerprint(hostKey)
        backend = JupyterBackend(self._reactor, url, state_dir=state)
        checker = AuthorizedKeysChecker([await self._authorizedKeys()])
        factory = GatewayFactory(
            Portal(KernelRealm(backend, files=StoreChoice(backend.contents)), [checker]),
            [hostKey],
            reactor=self._reactor,
        )
        endpoint = TCP4ServerEndpoint(self._reactor, self._port, interface="127.0.0.1")
        service = GatewayService(
            self._reactor, backend, factory, [(f"127.0.0.1 port {self._port}", endpoint)]
        )
        self._begun.push_async_callback(service.stopService)
        started = service.whenStarted()
        service.startService()
        try:
            await started
        except ConfigurationError as error:
            raise ConfigurationError(f"{error} Try --port 0, which takes a free one.") from None
        self._port = service.ports[0].getHost().port  # type: ignore[attr-defined]
        host = "127.0.0.1" if self._port == 22 else f"[127.0.0.1]:{self._port}"
        public = hostKey.public().toString("OPENSSH")
        (self._directory / "known_hosts").write_bytes(b"%s %s\n" % (host.encode(), public))

    async def _authorizedKeys(self) -> Path:
        """A file with the key made for this demo and, for a person, with the person's own."""
        key = Ed25519PrivateKey.generate()
        private = self._directory / "id_ed25519"
        private.touch(mode=0o600)
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
        )
        keys = [
            key.public_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            )
        ]
        if self._command is None:
            for path in sorted(Path.home().glob(".ssh/*.pub")):
                try:
                    keys.append(path.read_bytes().strip())
                except OSError:
                    pass  # not readable: not this person's
            keys.append(await self._agentKeys())
        path = self._directory / "authorized_keys"
        path.touch(mode=0o600)
        path.write_bytes(b"\n".join([*keys, b""]))
        return path

    async def _agentKeys(self) -> bytes:
        """What the person's ssh-agent holds; nothing if there is none or it does not answer."""
        program = shutil.which("ssh-add")
        if program is None or "SSH_AUTH_SOCK" not in os.environ:
            return b""
        listing = getProcessOutput(program, ["-L"], env=os.environ, reactor=self._reactor)
        try:
            output = await listing.addTimeout(2, self._reactor)
        except (OSError, TimeoutError):
            return b""
        return output if output.startswith((b"ssh-", b"ecdsa-", b"sk-")) else b""


def main(*, port: int | None, command: str | None, verbose: bool = False) -> int:
    """Run the demo until it is interrupted, or ``command`` until it ends.

    :param port: 0 for a free one, ``None`` for the usual one.
    :returns: the exit status.
    """
    try:
        import jupyter_server  # noqa: F401
        from rich.console import Console
    except ImportError:
        return _complain("the demo needs more: pip install 'conchkernel[demo]'")
    if shutil.which("ssh") is None:
        return _complain("there is no ssh client here; on Debian: sudo apt install openssh-client")

    from twisted.internet import reactor as installed

    reactor: Any = installed
    keepLargeBuffers()
    level = LogLevel.debug if verbose else LogLevel.critical
    globalLogBeginner.beginLoggingTo(
        [
            FilteringLogObserver(
                textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(level)]
            )
        ],
        redirectStandardIO=False,
    )
    if port is None:
        port = DEFAULT_PORT if command is None else 0
    console = Console(stderr=True, highlight=False, quiet=command is not None and not verbose)
    demo = Demo(reactor, port, command)
    status = 0
    running: Deferred[None] | None = None

    async def show() -> None:
        nonlocal status
        with console.status("") as spinner:
            result = await demo.run(spinner.update)
        if result is not None:
            status = result
            _stop(reactor)
            return
        console.print(f"\nHost key {demo.fingerprint}. In another terminal:\n")
        # Not by the console, which would wrap the line that is to be copied.
        sys.stdout.write(f"  {shlex.join(demo.sshCommand())}\n")
        sys.stdout.write(f"  {shlex.join(demo.sshCommand(program='sftp'))}\n")
        sys.stdout.flush()
        console.print("\nCtrl-C here ends it and leaves nothing behind.")

    def failed(failure: Failure) -> None:
        nonlocal status
        if failure.check(CancelledError) is not None:
            return  # by end
        if failure.check(ConchKernelError) is None:
            failure.printTraceback()
        status = _complain(failure.getErrorMessage())
        _stop(reactor)

    def begin() -> None:
        nonlocal running
        running = Deferred.fromCoroutine(show())
        running.addErrback(failed)

    async def end() -> None:
        if running is not None:
            running.cancel()
        await demo.stop()

    def catchSignals() -> None:
        # The reactor's own handlers complain about the second Ctrl-C, and know no closed terminal.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: reactor.callFromThread(_stop, reactor))

    reactor.callWhenRunning(catchSignals)
    reactor.callWhenRunning(begin)
    reactor.addSystemEventTrigger("before", "shutdown", lambda: Deferred.fromCoroutine(end()))
    reactor.run()
    return status


def _stop(reactor: Any) -> None:
    try:
        reactor.stop()
    except ReactorNotRunning:
        pass  # a signal came first


def _complain(message: str) -> int:
    sys.stderr.write(f"conchkernel demo: {message}\n")
    return 1
