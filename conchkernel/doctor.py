"""``conchkernel doctor NAME``: each hop from ssh to the kernel's host, tried one after another.

What is found is one line each on stdout. The first hop that does not work is the last line, with
what is wrong and what to do; what lies behind it cannot be tried.
"""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred, TimeoutError
from zope.interface import implementer

from conchkernel import configssh, foreground, sshconfig
from conchkernel.attachment import Attachment
from conchkernel.errors import (
    ConchKernelError,
    ConfigurationError,
    JupyterUnreachable,
    KernelRefused,
    KernelUnsupported,
    LinkLost,
    NotJupyter,
    TLSRefused,
    TokenRefused,
)
from conchkernel.interfaces import IStreamReceiver, ProcessRequest
from conchkernel.jupyter.discovery import discover
from conchkernel.jupyter.proxy import make_agent, proxy_for
from conchkernel.jupyter.urls import candidates, redact
from conchkernel.names import defaultStateDir, named
from conchkernel.ssh import hostkeys

if TYPE_CHECKING:
    from conchkernel.interfaces import IKernelLink
    from conchkernel.names import Name, Settings

#: Round trips of one byte; enough that one hiccup does not count.
_ECHOES = 21
_ECHO_SECONDS = 15.0
_SSH_SECONDS = 10.0


class _Sick(Exception):
    """A hop does not work."""

    def __init__(self, hop: str, sentence: str) -> None:
        super().__init__(sentence)
        self.hop = hop


def main(name: str, stateDir: Path | None, sshConfig: Path | None) -> int:
    """Look, and tell.

    :returns: the exit status: 0 where everything works.
    """
    try:
        chosen = named(name, stateDir or defaultStateDir())
    except ConfigurationError as error:
        return foreground.complain("conchkernel doctor", str(error))

    async def work(reactor: Any) -> int:
        try:
            await _examine(reactor, chosen, sshConfig)
        except _Sick as sick:
            _tell("NO", sick.hop, str(sick))
            return foreground.FAILURE
        return 0

    return foreground.run("conchkernel doctor", work)


def _tell(verdict: str, hop: str, finding: str) -> None:
    sys.stdout.write(f"{verdict:<3} {hop:<8} {finding}\n")
    sys.stdout.flush()


async def _examine(reactor: Any, name: Name, sshConfig: Path | None) -> None:
    """:raises _Sick: at the first hop that does not work."""
    try:
        settings = name.load()
    except ConfigurationError as error:
        raise _Sick("name", str(error)) from None
    _tell("ok", "name", f"{name.directory}")
    _tell("ok", "ssh", _askSSH(name, sshConfig))
    try:
        base = candidates(settings.url)[0].base
        parts = urlsplit(base)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        proxy = proxy_for(parts.scheme, parts.hostname or "", port, os.environ)
    except ConfigurationError as error:
        raise _Sick("URL", str(error)) from None
    _tell("ok", "URL", redact(base) + (f", by way of {proxy.host}:{proxy.port}" if proxy else ""))
    await _askServer(reactor, settings)
    try:
        attachment = Attachment(reactor, name, settings)
    except ConfigurationError as error:
        raise _Sick("name", str(error)) from None
    try:
        link = await _attach(attachment)
        _tell("ok", "echo", await _echo(reactor, link))
    finally:
        attachment.hurry()
        await attachment.leave()


def _askSSH(name: Name, sshConfig: Path | None) -> str:
    """What ssh itself makes of its configuration."""
    ssh = shutil.which("ssh")
    if ssh is None:
        raise _Sick("ssh", "there is none here; on Debian: sudo apt install openssh-client")
    option = ["-F", str(sshConfig)] if sshConfig is not None else []
    again = f"run: conchkernel config-ssh {name.text} URL"
    try:
        told = subprocess.run(
            [ssh, *option, "-G", name.text],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SSH_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        raise _Sick("ssh", "ssh -G does not run or does not end; is it OpenSSH?") from None
    if told.returncode:
        why = (told.stderr.strip().splitlines() or [f"status {told.returncode}"])[-1]
        raise _Sick("ssh", f"ssh does not take its configuration: {why}")
    values = dict(line.partition(" ")[::2] for line in told.stdout.splitlines())
    try:
        command = shlex.split(values.get("proxycommand", ""))
    except ValueError:
        command = []
    if "conchkernel.cli" not in command or command[-1] != name.text:
        raise _Sick("ssh", f"its configuration does not lead {name.text} to us; {again}")
    if not Path(command[0]).is_file():
        raise _Sick("ssh", f"it would run {command[0]}, which is not there any more; {again}")
    _lookAtHostKey(name, again)
    return f"would run {command[0]}"


def _lookAtHostKey(name: Name, again: str) -> None:
    """Whether ssh will believe that it is us."""
    try:
        key = hostkeys.load(name.directory / hostkeys.FILE_NAME).public().toString("OPENSSH")
        known = configssh.read(name.directory / sshconfig.KNOWN_HOSTS_FILE)
    except ConfigurationError as error:
        raise _Sick("ssh", f"{error} To mend it {again}") from None
    if known != sshconfig.knownHosts(name.text, key):
        raise _Sick("ssh", f"it has not been told of our host key; {again}")


async def _askServer(reactor: Any, settings: Settings) -> None:
    """The hops that need no kernel."""
    url = candidates(settings.url)[0].base
    secure = urlsplit(url).scheme == "https"
    try:
        agent = make_agent(reactor, Path(settings.jupyterCA) if settings.jupyterCA else None)
    except ConfigurationError as error:
        raise _Sick("TLS", str(error)) from None
    try:
        client = await discover(reactor, settings.url, agent=agent)
        _tell("ok", "server", f"{urlsplit(url).netloc} answers")
        _tell("ok", "TLS", "with a certificate that we believe" if secure else "none, by the URL")
        base = redact(client.location.base)
        _tell("ok", "Jupyter", f"{await client.version()} at {base}")
        specs = await client.kernelspecs()
    except TLSRefused as error:
        _tell("ok", "server", f"{urlsplit(url).netloc} answers")
        raise _Sick("TLS", str(error)) from None
    except JupyterUnreachable as error:
        raise _Sick("server", str(error)) from None
    except TokenRefused as error:
        _tell("ok", "server", f"{urlsplit(url).netloc} answers")
        raise _Sick("token", f"{error}, and give it to conchkernel config-ssh") from None
    except (NotJupyter, KernelRefused) as error:
        _tell("ok", "server", f"{urlsplit(url).netloc} answers")
        raise _Sick("Jupyter", str(error)) from None
    finally:
        await agent.close()
    _tell("ok", "token", "accepted" if client.location.token else "none needed")
    chosen = settings.kernelName or specs.default
    _tell("ok", "kernels", f"{', '.join(sorted(specs.languages)) or 'none'}; {chosen} is ours")


async def _attach(attachment: Attachment) -> IKernelLink:
    """The kernel, and the carrier to its host."""
    try:
        link = await attachment.attach()
    except (KernelRefused, KernelUnsupported) as error:
        raise _Sick("kernel", str(error)) from None
    except ConchKernelError as error:
        raise _Sick("carrier", str(error)) from None
    _tell("ok", "kernel", "runs, and took the relay")
    _tell("ok", "carrier", "the agent on the kernel's host answers")
    return link


async def _echo(reactor: Any, link: IKernelLink) -> str:
    """One byte there and back, some times."""
    mirror = _Mirror()
    stream = link.openProcess(ProcessRequest(b"cat"), mirror)
    stream.grant(_ECHOES)
    times = []
    try:
        for _ in range(_ECHOES):
            began = reactor.seconds()
            back = mirror.next()
            back.addTimeout(_ECHO_SECONDS, reactor)
            stream.write(b".")
            await back
            times.append(reactor.seconds() - began)
    except TimeoutError:
        raise _Sick("echo", "what is typed does not come back; is the host overloaded?") from None
    except ConchKernelError as error:
        raise _Sick("echo", str(error)) from None
    finally:
        stream.close()
    milliseconds = statistics.median(times) * 1000
    return f"{milliseconds:.1f} ms from a key to its echo"


@implementer(IStreamReceiver)
class _Mirror:
    """What a command that repeats everything says."""

    def __init__(self) -> None:
        self._expected: Deferred[None] | None = None
        self._over: Exception | None = None

    def next(self) -> Deferred[None]:
        """Fires with the next byte.

        :raises ConchKernelError: (as failure) when there will be none.
        """
        expected: Deferred[None] = Deferred()
        if self._over is not None:
            expected.errback(self._over)
        else:
            self._expected = expected
        return expected

    def _settle(self, over: Exception | None) -> None:
        expected, self._expected = self._expected, None
        if expected is None:
            return
        if over is None:
            expected.callback(None)
        else:
            expected.errback(over)

    def streamOpened(self, info: object) -> None:
        """It runs."""

    def streamData(self, data: bytes | memoryview) -> None:
        """One byte."""
        self._settle(None)

    def streamExtendedData(self, data: bytes | memoryview) -> None:
        """A complaint of the shell's; the command will not have run."""

    def streamConsumed(self, count: int) -> None:
        """It has read."""

    def streamEOF(self) -> None:
        """No more."""

    def streamExited(self, exit: object) -> None:
        """It has ended, which :meth:`streamClosed` makes of consequence."""

    def streamClosed(self, reason: Exception | None) -> None:
        """Nothing comes any more."""
        self._over = reason or LinkLost("the shell over there does not run `cat`; is it right?")
        self._settle(self._over)
