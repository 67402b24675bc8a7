"""What ``ssh NAME`` reads: one block for each name, and the line by which ssh finds them.

Pure text and paths. The user's own configuration gets one Include, before everything else, since
ssh takes the first value that it finds; what it includes lies with the names. Taking the Include
out again gives back every byte.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from conchkernel.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

#: Of each name's directory.
BLOCK_FILE = "ssh_config"
KNOWN_HOSTS_FILE = "known_hosts"
#: The master's socket, where connections are shared.
CONTROL_FILE = "master"

#: A master's socket must fit into ``sun_path`` (104 bytes on macOS), and while it is made ssh adds
#: 17 characters and a NUL.
_LONGEST_CONTROL_PATH = 104 - 17 - 1

#: What means something to ssh_config, to its globs and tokens, or to a shell within quotes.
_SPECIAL = re.compile(r"""["'\\*?\[\]%${}\x00-\x1f\x7f]""")

_COMMENT = b"# By conchkernel config-ssh; first, for ssh takes the first value that it finds.\n"
_COMMENT_OF_A_NEW_FILE = b"# By conchkernel config-ssh, which has made this file.\n"


def plain(path: Path | str) -> str:
    """A path that can be quoted wherever one stands in ssh's configuration.

    :raises ConfigurationError: if it cannot.
    """
    text = str(path)
    if _SPECIAL.search(text) or not text.isprintable():
        raise ConfigurationError(
            f"ssh's configuration cannot hold the path {text!r}; "
            "use one without quotes, backslashes, or any of * ? [ ] { } % $"
        )
    return text


def block(
    name: str, directory: Path, stateDir: Path, program: Sequence[str], hostKey: bytes
) -> tuple[bytes, bytes]:
    """The block for a name, and its known_hosts.

    :param program: runs ``conchkernel``; the first word is an absolute path.
    :param hostKey: the public key in OpenSSH's form.
    :raises ConfigurationError: if a path is in no form for it.
    """
    words = [plain(word) for word in program]
    command = [f"'{words[0]}'", *map(shlex.quote, words[1:])]
    known = plain(directory / KNOWN_HOSTS_FILE)
    lines = [
        f"# Written by conchkernel config-ssh {name}, which writes it anew.",
        f"Host {name}",
        "    User owner",
        f"    ProxyCommand {' '.join(command)} proxy --state-dir '{plain(stateDir)}' {name}",
        f"    HostKeyAlias {name}",
        f'    UserKnownHostsFile "{known}"',
        "    GlobalKnownHostsFile /dev/null",
        "    StrictHostKeyChecking yes",
        "    UpdateHostKeys no",
    ]
    control = plain(directory / CONTROL_FILE)
    if len(control.encode()) <= _LONGEST_CONTROL_PATH:
        lines += [
            "    ControlMaster auto",
            "    ControlPersist 10m",
            f'    ControlPath "{control}"',
        ]
    else:
        lines += ["    # Connections are not shared: the path of their socket would be too long."]
    return "\n".join([*lines, ""]).encode(), knownHosts(name, hostKey)


def knownHosts(name: str, hostKey: bytes) -> bytes:
    """The one line by which ssh knows our host key.

    :param hostKey: as for :func:`block`.
    """
    return b" ".join([name.encode("ascii"), *hostKey.split()[:2]]) + b"\n"


def includeLine(names: Path) -> bytes:
    """What leads from the user's configuration to the blocks of all names.

    :param names: the directory that has a directory for each.
    """
    return f'Include "{plain(names)}/*/{BLOCK_FILE}"\n'.encode()


def withInclude(config: bytes | None, include: bytes) -> bytes:
    """The user's configuration with the Include before any host.

    :param config: ``None`` where there is no file.
    """
    if config is None:
        return _COMMENT_OF_A_NEW_FILE + include
    for keyword, line in _directives(config):
        if keyword in (b"host", b"match"):
            break
        if line.strip() == include.strip():
            return config
    return _COMMENT + include + b"\n" + (withoutInclude(config, include) or b"")


def withoutInclude(config: bytes | None, include: bytes) -> bytes | None:
    """The user's configuration as it was before.

    :returns: ``None`` where the file has been ours and nothing else is in it.
    """
    if config is None or config == _COMMENT_OF_A_NEW_FILE + include:
        return None
    for ours in (
        _COMMENT + include + b"\n",
        _COMMENT + include,
        _COMMENT_OF_A_NEW_FILE + include,
        include,
    ):
        before, found, after = config.partition(ours)
        if found and (not before or before.endswith(b"\n")):
            return before + after
    return config


def hasHost(config: bytes | None, name: str) -> bool:
    """Whether the user's configuration has this very host already."""
    wanted = name.encode("ascii")
    return any(
        keyword == b"host" and wanted in re.split(rb'[\s"=]+', line)[1:]
        for keyword, line in _directives(config or b"")
    )


def _directives(config: bytes) -> Iterable[tuple[bytes, bytes]]:
    """Each line that is no comment, with its keyword in lower case."""
    for line in config.split(b"\n"):
        words = re.split(rb'[\s"=]+', line.strip(), maxsplit=1)
        if words[0] and not words[0].startswith(b"#"):
            yield words[0].lower(), line.strip()
