"""``conchkernel config-ssh NAME URL``: from then on ``ssh NAME`` works.

The URL is tried, and kept where only its user can read it; what is to change in ssh's
configuration is shown, and done when the user says yes. ``--remove`` takes all of it back.
"""

from __future__ import annotations

import difflib
import getpass
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from conchkernel import foreground, sshconfig
from conchkernel.errors import ConfigurationError, KernelRefused
from conchkernel.names import URL_VARIABLE, Settings, defaultStateDir, named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conchkernel.names import Name

#: What ssh runs: this interpreter, wherever it is started from.
PROGRAM = (sys.executable, "-P", "-m", "conchkernel.cli")

_SSH_SECONDS = 10.0


@dataclass(frozen=True)
class Request:
    """What the command line says."""

    name: str
    url: str | None
    """``-`` for stdin."""
    options: Mapping[str, Any]
    """Fields of :class:`~conchkernel.names.Settings`; what is not said stays as it is."""
    stateDir: Path | None
    sshConfig: Path | None
    """``None`` for the account's own."""
    yes: bool
    remove: bool


@dataclass(frozen=True)
class Change:
    """A file before and after; ``None`` where it is not."""

    path: Path
    before: bytes | None
    after: bytes | None

    def diff(self) -> str:
        """As ``diff -u`` has it."""
        old, new = (
            (content or b"").decode("utf-8", "replace").splitlines(keepends=True)
            for content in (self.before, self.after)
        )
        names = [
            str(self.path) if content is not None else os.devnull
            for content in (self.before, self.after)
        ]
        lines = difflib.unified_diff(old, new, names[0], names[1])
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines)

    def make(self) -> None:
        """Write, whole or not at all, with the mode that the file has had.

        :raises ConfigurationError: if that fails, or somebody else has changed it meanwhile.
        """
        path = Path(os.path.realpath(self.path))  # a link stays one
        try:
            if read(path) != self.before:
                raise ConfigurationError(f"{path} has changed meanwhile; try again")
            if self.after is None:
                path.unlink(missing_ok=True)
                return
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(fd, "wb") as file:
                    if self.before is not None:
                        known = path.stat()
                        os.fchmod(fd, known.st_mode & 0o7777)
                        os.fchown(fd, known.st_uid, known.st_gid)
                    file.write(self.after)
                    file.flush()
                    os.fsync(fd)
                os.replace(fresh, path)
            except BaseException:
                os.unlink(fresh)
                raise
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be changed: {error.strerror}") from None


def read(path: Path) -> bytes | None:
    """What is in a file; ``None`` where there is none.

    :raises ConfigurationError: where it cannot be told.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None


def accountConfig() -> Path:
    """Where ssh looks: in the account's home, whatever HOME says."""
    return Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh" / "config"


def main(request: Request) -> int:
    """Do what is asked.

    :returns: the exit status.
    """
    program = "conchkernel config-ssh"
    try:
        stateDir = (request.stateDir or defaultStateDir()).absolute()
        name = named(request.name, stateDir)
        config = (request.sshConfig or accountConfig()).absolute()
        if not request.yes and not sys.stdin.isatty():
            raise ConfigurationError("there is no terminal to ask on; add --yes to go ahead")
        if request.remove:
            return _remove(name, config, yes=request.yes)
        sshconfig.plain(name.directory)
        settings = replace(_known(name), **request.options, url=_url(request.url))
        if sshconfig.hasHost(read(config), name.text):
            raise ConfigurationError(
                f"{config} has a Host {name.text} already; take another name, or remove that"
            )
    except ConfigurationError as error:
        return foreground.complain(program, str(error))

    async def work(reactor: Any) -> int:
        found = await _try(reactor, settings)
        return _add(name, found, stateDir, config, yes=request.yes)

    return foreground.run(program, work)


def _known(name: Name) -> Settings:
    """What was kept before, if that can be used."""
    try:
        return name.load()
    except ConfigurationError:
        return Settings(url="")


def _url(given: str | None) -> str:
    if given == "-":
        text = sys.stdin.readline()
    elif given is not None:
        text = given
    elif os.environ.get(URL_VARIABLE, "").strip():
        text = os.environ[URL_VARIABLE]
    elif sys.stdin.isatty():
        text = getpass.getpass("URL of the Jupyter server, with its token (it is not shown): ")
    else:
        raise ConfigurationError(
            f"which Jupyter? Give its URL, or - and the URL on stdin, or set {URL_VARIABLE}"
        )
    if not text.strip():
        raise ConfigurationError("the Jupyter URL is empty")
    return text.strip()


async def _try(reactor: Any, settings: Settings) -> Settings:
    """Ask the server that a URL means.

    :returns: the same with the URL of the server's root.
    :raises ConchKernelError: if it cannot be used.
    """
    from conchkernel.jupyter.discovery import discover
    from conchkernel.jupyter.proxy import make_agent

    authorities = Path(settings.jupyterCA) if settings.jupyterCA else None
    agent = make_agent(reactor, authorities)
    try:
        client = await discover(reactor, settings.url, agent=agent)
        version = await client.version()
        specs = await client.kernelspecs()
    finally:
        await agent.close()
    kernel = settings.kernelName or specs.default
    if settings.kernelName is not None and settings.kernelName not in specs.languages:
        raise KernelRefused(
            f"the Jupyter server has no kernel named {settings.kernelName}; "
            f"it has {', '.join(sorted(specs.languages)[:20]) or 'none'}"
        )
    language = specs.languages.get(kernel, "")
    _say(f"Jupyter {version} at {client.location.base}, kernel {kernel}.")
    if language and language != "python":
        _say(f"That kernel speaks {language}: there will be files, but no shell without a "
             "Python kernel, chosen by --kernel-name.")  # fmt: skip
    token = client.location.token
    return replace(
        settings,
        url=f"{client.location.base}/" + (f"?token={quote(token, safe='')}" if token else ""),
    )


def _add(name: Name, settings: Settings, stateDir: Path, config: Path, *, yes: bool) -> int:
    from conchkernel.ssh import hostkeys

    fresh = not name.directory.exists()
    done = False
    try:
        if fresh:
            name.save(settings)  # taken back where the answer is no
        hostKey = hostkeys.loadOrCreate(name.directory).public().toString("OPENSSH")
        text, known = sshconfig.block(name.text, name.directory, stateDir, PROGRAM, hostKey)
        before, path = read(config), name.directory / sshconfig.BLOCK_FILE
        include = sshconfig.includeLine(name.directory.parent)
        changes = [
            Change(path, read(path), text),
            Change(config, before, sshconfig.withInclude(before, include)),
        ]
        if not _agreed(changes, yes=yes):
            return foreground.FAILURE
        knownHosts = name.directory / sshconfig.KNOWN_HOSTS_FILE
        Change(knownHosts, read(knownHosts), known).make()
        name.save(settings)
        for change in changes:
            change.make()
        done = True
        _stopSharing(name)
    finally:
        if fresh and not done:
            name.forget()
    option = [] if config == accountConfig() else ["-F", str(config)]
    _say(f"Now: {shlex.join(['ssh', *option, name.text])}")
    return 0


def _remove(name: Name, config: Path, *, yes: bool) -> int:
    if not name.directory.exists():
        raise ConfigurationError(f"no Jupyter server is called {name.text}")
    path = name.directory / sshconfig.BLOCK_FILE
    changes = [Change(path, read(path), None)]
    others = [other for other in name.directory.parent.iterdir() if other != name.directory]
    if not others:
        before = read(config)
        include = sshconfig.includeLine(name.directory.parent)
        changes.append(Change(config, before, sshconfig.withoutInclude(before, include)))
    if not _agreed(changes, yes=yes):
        return foreground.FAILURE
    for change in changes:
        change.make()
    _stopSharing(name)
    name.forget()
    return 0


def _stopSharing(name: Name) -> None:
    """Have nobody join a connection that leads where the name has led. It goes on for those who
    use it, and ends at once where nobody does."""
    control, ssh = name.directory / sshconfig.CONTROL_FILE, shutil.which("ssh")
    if ssh is None or not control.exists():
        return
    try:
        subprocess.run(
            [ssh, "-F", "none", "-S", str(control), "-O", "stop", name.text],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SSH_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        pass  # then what there is lasts until nobody has used it for some minutes


def _agreed(changes: list[Change], *, yes: bool) -> bool:
    """Show what would change, and ask unless the answer is known."""
    sys.stdout.write("".join(change.diff() for change in changes))
    sys.stdout.flush()
    if yes:
        return True
    sys.stderr.write("Make these changes? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    _say("Nothing was changed.")
    return False


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
