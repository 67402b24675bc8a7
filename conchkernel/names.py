"""Names for Jupyter servers, as ``conchkernel config-ssh`` keeps them in the state directory.

Each has a directory of its own, of mode 0700: what leads to the server, token included; the
identity from which its kernel follows; the host key that ssh has pinned; and the locks of those
who use it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conchkernel.errors import ConfigurationError

URL_VARIABLE = "CONCHKERNEL_JUPYTER_URL"

_SETTINGS = "settings.json"
#: One word to ssh, to a shell and in a path; no dot, lest it be some host's real name.
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?")
#: A directory is removed so often, while those who end take and leave files in it.
_REMOVALS = 100
#: What is nobody's to take.
_RESERVED = {"localhost"}


def defaultStateDir() -> Path:
    """Where keys, identities and names are kept unless another place is named."""
    home = os.environ.get("XDG_STATE_HOME", "")
    # The specification says to ignore a relative path.
    base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    return base / "conchkernel"


@dataclass(frozen=True)
class Settings:
    """What is known of one name's server."""

    url: str
    """As it was pasted, with its token."""
    kernelName: str | None = None
    jupyterCA: str | None = None
    linger: float = 60.0
    """Seconds that the kernel outlives its last use."""
    orphanTimeout: float = 120.0
    """Seconds that shells outlive a process of ours that has died."""

    def __repr__(self) -> str:
        return "<Settings of a Jupyter server>"


@dataclass(frozen=True)
class Name:
    """A name and where its things are, whether or not it is in use."""

    text: str
    directory: Path

    def load(self) -> Settings:
        """What :meth:`save` has kept.

        :raises ConfigurationError: where nothing is, or what is cannot be used.
        """
        path = self.directory / _SETTINGS
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigurationError(
                    f"{path} holds a token and is open to other users; run: chmod 600 {path}"
                )
            return _settings(json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            raise ConfigurationError(
                f"no Jupyter server is called {self.text}; "
                f"run: conchkernel config-ssh {self.text} URL"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError):
            raise ConfigurationError(
                f"{path} is damaged; run: conchkernel config-ssh {self.text} URL"
            ) from None

    def save(self, settings: Settings) -> None:
        """Keep settings, in a file that others cannot read, and make the directory.

        :raises ConfigurationError: if that does not work.
        """
        path = self.directory / _SETTINGS
        fresh = self.directory / f".{_SETTINGS}.{os.getpid()}"
        try:
            self.make()
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(asdict(settings), file)
            fresh.replace(path)
        except OSError as error:
            raise ConfigurationError(
                f"the state directory {self.directory} cannot be used: {error.strerror}"
            ) from None

    def make(self) -> None:
        """Have the directory, closed to others as is all of ours above it.

        :raises OSError: if that does not work.
        """
        for directory in (self.directory.parent.parent, self.directory.parent, self.directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def forget(self) -> None:
        """Remove everything that is kept for this name; nothing is fine too.

        :raises ConfigurationError: if something stays.
        """
        reason = ""
        for _ in range(_REMOVALS):
            try:
                shutil.rmtree(self.directory)
                return
            except OSError as error:
                if error.errno == errno.ENOENT and not os.path.lexists(self.directory):
                    return
                reason = str(error.strerror)
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    break
        raise ConfigurationError(f"{self.directory} cannot be removed: {reason}")


def named(text: str, stateDir: Path) -> Name:
    """The name that somebody has typed.

    :raises ConfigurationError: if it can be none.
    """
    if not _NAME.fullmatch(text) or text in _RESERVED:
        shown = text[:63].encode("ascii", "backslashreplace").decode()
        raise ConfigurationError(
            f"{shown!r} cannot be a name; take up to 63 lower-case letters, digits, - and _"
        )
    return Name(text, stateDir.absolute() / "names" / text)


def _settings(told: Any) -> Settings:
    """:raises TypeError, ValueError: for anything but what :meth:`Name.save` writes."""
    settings = Settings(**told)
    texts = (settings.kernelName, settings.jupyterCA)
    if not isinstance(settings.url, str) or not all(isinstance(it, str | None) for it in texts):
        raise TypeError("not text")
    for number in (settings.linger, settings.orphanTimeout):
        if not isinstance(number, int | float) or not 0 <= number <= 86400 * 366:
            raise ValueError("not a time")
    return settings
