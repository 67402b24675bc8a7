"""The options of ``twistd conchkernel``: what each may be, and one line for what it may not.

Judged is what can be judged without the network, Jupyter or the state directory. No line holds a
token.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from twisted.cred.checkers import (
    AllowAnonymousAccess,
    InMemoryUsernamePasswordDatabaseDontUse,
)
from twisted.cred.credentials import IAnonymous, ISSHPrivateKey, IUsernamePassword
from twisted.cred.strcred import AuthOptionMixin
from twisted.logger import InvalidLogLevelError, LogLevel
from twisted.python import usage

from conchkernel import __version__
from conchkernel.errors import ConfigurationError
from conchkernel.jupyter.urls import candidates
from conchkernel.names import URL_VARIABLE, defaultStateDir
from conchkernel.ssh.algorithms import Algorithms
from conchkernel.ssh.checkers import AnonymousOwnerChecker
from conchkernel.ssh.ciphers import CIPHERS, MACS
from conchkernel.ssh.kex import METHODS as KEX_METHODS
from conchkernel.ssh.limits import Limits
from conchkernel.ssh.permissions import Permissions
from conchkernel.ssh.userauth import METHODS as AUTHENTICATION_METHODS
from conchkernel.values import (
    LIMITS,
    PERMISSIONS,
    Value,
    absolutePath,
    algorithms,
    methods,
    oneOf,
    seconds,
    wholeNumber,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

#: Where a gateway listens if it is not told: OpenSSH's alternative port, this host only.
DEFAULT_PORT = 2222


def _helpText(option: Callable[..., None]) -> Callable[..., None]:
    """Let ``--help`` fill the lines of a docstring, which it prints with its indentation."""
    option.__doc__ = " ".join((option.__doc__ or "").split())
    return option


def _listed(names: Iterable[bytes]) -> str:
    return ", ".join(name.decode("ascii") for name in names)


#: Options that say what may be negotiated, and what there is of each.
_ALGORITHMS: dict[str, Collection[bytes]] = {
    "kex-algorithms": KEX_METHODS,
    "ciphers": CIPHERS,
    "macs": MACS,
}

#: What checkers judge, by their interfaces.
_JUDGED = {
    IUsernamePassword: "passwords",
    ISSHPrivateKey: "keys",
    IAnonymous: "those who prove nothing",
}


class Options(usage.Options, AuthOptionMixin):
    """What ``twistd conchkernel`` understands.

    :raises twisted.python.usage.UsageError: from ``parseOptions``, with one line; it never holds
        the token.
    """

    synopsis = "[options]"
    longdesc = (
        "Lets any SSH client into the machine where a Jupyter kernel runs, with nothing installed "
        "there. By default it listens on 127.0.0.1:2222, lets in the keys of "
        "~/.ssh/authorized_keys and takes the Jupyter token as password."
    )
    supportedInterfaces = (IUsernamePassword, ISSHPrivateKey, IAnonymous)

    optParameters = [  # noqa: RUF012 - usage.Options reads it per class
        ["jupyter-url", "u", None, "The Jupyter server, as its own page or log shows it; "
         f"better in the environment as {URL_VARIABLE} if it holds a token."],
        ["jupyter-url-file", None, None, "A file whose first line is that URL."],
        ["jupyter-ca", None, None, "PEM file of the authority that signed Jupyter's certificate."],
        ["state-dir", None, None, "Where the host key is kept "
         "(default: $XDG_STATE_HOME/conchkernel or ~/.local/state/conchkernel)."],
        ["kernel-name", None, None, "Kernel spec to start (default: the server's own)."],
        ["kernel-per", None, "user", "Who shares a kernel: all connections of a 'user', or each "
         "'connection' has its own.", Value("kernel-per", oneOf("user", "connection"))],
        ["shell", None, None, "Shell on the kernel's host (default: its account's login shell).",
         Value("shell", absolutePath)],
        ["working-dir", None, None, "Where shells and commands start "
         "(default: Jupyter's root directory).", Value("working-dir", absolutePath)],
        ["files", None, "auto", "Where sftp and scp find files: on the kernel's host through the "
         "'agent', below Jupyter's root through its 'contents' API, or 'auto': the one that "
         "works.", Value("files", oneOf("auto", "agent", "contents"))],
        ["sftp-root", None, None, "A directory that sftp sessions see as / and cannot leave; but "
         "through the 'contents' API they follow links that are there.",
         Value("sftp-root", absolutePath)],
        ["orphan-timeout", None, 120.0, "Time that shells survive a gateway that has died.",
         Value("orphan-timeout", seconds)],
        ["log-level", None, "info", "Least level that is logged: debug, info, warn, error or "
         "critical."],
        ["banner", None, None, "A file whose text clients show before the login."],
        ["authentication-methods", None, None, "Methods that must succeed one after the other, "
         "with commas between them; several such lists, of which one is enough, with spaces. "
         "(default: any)",
         Value("authentication-methods", methods(AUTHENTICATION_METHODS))],
        *[[name, None, None, f"What may be agreed upon, of {_listed(known)}; after - what may "
           "not. (default: all)",
           Value(name, algorithms(known))]
          for name, known in _ALGORITHMS.items()],
        *[[name, None, None, description, Value(name, judge)]
          for name, (_, judge, description) in {**PERMISSIONS, **LIMITS}.items()],
    ]  # fmt: skip

    optFlags = [  # noqa: RUF012
        ["sftp-read-only", None, "Let sftp sessions change nothing."],
        ["wait-for-jupyter", None, "Keep trying while Jupyter cannot be used, instead of giving "
         "up at the start."],
        ["i-know-this-is-open", None, "Let --auth anonymous listen on other than loopback."],
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        for name in ("listen", "host-key", "host-certificate", "authorized-keys", "accept-env"):
            self[name] = []

    @_helpText
    def opt_listen(self, description: str) -> None:
        """Where to listen, as a Twisted endpoint; may be given more than once.
        (default: tcp:2222:interface=127.0.0.1)
        """
        self["listen"].append(description)

    def opt_port(self, text: str) -> None:
        """Short for --listen tcp:PORT:interface=127.0.0.1; 0 takes a free one."""
        port = Value("port", wholeNumber(0, 65535))(text)
        self["listen"].append(f"tcp:{port}:interface=127.0.0.1")

    opt_p = opt_port

    @_helpText
    def opt_host_key(self, path: str) -> None:
        """Private host key file; may be given more than once.
        (default: an ed25519 key in the state directory, made at the first start)
        """
        self["host-key"].append(Path(path).absolute())

    @_helpText
    def opt_host_certificate(self, path: str) -> None:
        """Certificate of a host key, by ssh-keygen -h; may be given more than once."""
        self["host-certificate"].append(Path(path).absolute())

    @_helpText
    def opt_authorized_keys(self, path: str) -> None:
        """File of public keys that may log in; may be given more than once.
        (default: ~/.ssh/authorized_keys)
        """
        self["authorized-keys"].append(Path(path).absolute())

    @_helpText
    def opt_accept_env(self, pattern: str) -> None:
        """Variable, or pattern such as MY_*, that clients may set; may be given more than once.
        (LANG, LC_* and COLORTERM always may)
        """
        if not re.fullmatch(r"[A-Za-z0-9_*?]+", pattern):
            raise usage.UsageError(f"--accept-env: {pattern!r} is not a variable's name")
        self["accept-env"].append(pattern)

    @_helpText
    def opt_auth(self, description: str) -> None:
        """Who gets in, by a checker of Twisted's or another package's instead of the default
        keys and token; may be given once for keys and once for passwords. See --help-auth.
        """
        kind, _, argument = description.partition(":")
        if kind == "file" and argument.strip() and not os.path.isfile(argument):
            raise usage.UsageError(f"--auth: there is no file {argument}")  # Twisted warns only
        if kind in ("anonymous", "unix") and argument:
            # Twisted's factories pass over it, and it might have been meant to keep others out.
            raise usage.UsageError(f"--auth: {kind} takes no argument")
        super().opt_auth(description)
        for interface, checkers in self["credInterfaces"].items():
            if len(checkers) > 1:
                # A portal asks the last one only, and whom the others know would be shut out.
                raise usage.UsageError(
                    f"--auth: {kind} judges {_JUDGED[interface]}, and so does another one that is "
                    "given; only one of them can"
                )
        checker = self["credCheckers"][-1]
        if isinstance(checker, AllowAnonymousAccess):
            self["credCheckers"][-1] = AnonymousOwnerChecker()
        elif isinstance(checker, InMemoryUsernamePasswordDatabaseDontUse):
            # strcred's factory fills it with str, and its own lookup wants bytes.
            checker.users = {_asBytes(name): _asBytes(word) for name, word in checker.users.items()}
            if not checker.users:
                raise usage.UsageError("--auth: memory needs users, as memory:NAME:PASSWORD")

    def parseArgs(self, *arguments: str) -> None:
        """There are none; what is there is not repeated, for it may be a URL with its token."""
        if arguments:
            raise usage.UsageError("a value without an option; a URL goes after --jupyter-url")

    def opt_version(self) -> NoReturn:
        """Display version and exit."""
        sys.stdout.write(f"conchkernel {__version__}\n")
        sys.exit(0)

    def postOptions(self) -> None:
        """What can be judged without touching the network, Jupyter or the state directory."""
        self["url"] = self._findURL()
        _checkURL(self["url"])
        if not self["listen"]:
            self.opt_port(str(DEFAULT_PORT))
        try:
            self["level"] = LogLevel.levelWithName(self["log-level"])
        except InvalidLogLevelError:
            raise usage.UsageError(
                f"--log-level: {self['log-level']!r} is none of debug, info, warn, error, critical"
            ) from None
        for name in ("jupyter-ca", "jupyter-url-file", "state-dir", "banner"):
            if self[name] is not None:
                self[name] = Path(self[name]).absolute()
        self["state-dir"] = self["state-dir"] or defaultStateDir()
        named = (self["jupyter-ca"], self["banner"], *self["host-certificate"])
        for path in (*named, *self["host-key"], *self["authorized-keys"]):
            if path is not None and not path.is_file():
                raise usage.UsageError(f"there is no file {path}")
        self._checkOpenness()

    def limits(self) -> Limits:
        """The bounds on clients that were asked for."""
        given: dict[str, Any] = {}
        for name, (fields, _, _) in LIMITS.items():
            value = self[name]
            if value is not None:
                given.update(zip(fields, value if len(fields) > 1 else [value], strict=True))
        return Limits(**given)

    def permissions(self) -> Permissions:
        """What everybody may ask for."""
        given = {field: self[name] for name, (field, _, _) in PERMISSIONS.items()}
        return Permissions(**{field: value for field, value in given.items() if value is not None})

    def algorithms(self) -> Algorithms:
        """What may be negotiated."""
        names = (self["kex-algorithms"], self["ciphers"], self["macs"])
        known = map(tuple, _ALGORITHMS.values())
        return Algorithms(*(name or all_ for name, all_ in zip(names, known, strict=True)))

    def _findURL(self) -> str:
        url, path = self["jupyter-url"], self["jupyter-url-file"]
        if url is not None and path is not None:
            raise usage.UsageError("give --jupyter-url or --jupyter-url-file, not both")
        if path is not None:
            try:
                text = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not text"
                raise usage.UsageError(f"--jupyter-url-file: {path}: {reason}") from None
            url = text.strip().split("\n", 1)[0]
            if not url:
                raise usage.UsageError(f"--jupyter-url-file: {path} is empty")
        if url is None:
            url = os.environ.get(URL_VARIABLE)
        if not url or not url.strip():
            raise usage.UsageError(
                f"which Jupyter? Give its URL with --jupyter-url, or in {URL_VARIABLE}"
            )
        return str(url).strip()

    def _checkOpenness(self) -> None:
        if not any(IAnonymous in it.credentialInterfaces for it in self.get("credCheckers", ())):
            return
        for description in self["listen"]:
            if not _staysOnThisHost(description) and not self["i-know-this-is-open"]:
                raise usage.UsageError(
                    f"--auth anonymous on {description} would let the whole network in; "
                    "listen on 127.0.0.1, or add --i-know-this-is-open"
                )


def _checkURL(text: str) -> None:
    try:
        candidates(text)
    except ConfigurationError as error:
        raise usage.UsageError(str(error)) from None


def _asBytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _staysOnThisHost(description: str) -> bool:
    """Whether an endpoint is known to take connections from this host only."""
    kind, *arguments = re.split(r"(?<!\\):", description)
    if kind == "haproxy" and arguments:
        kind, *arguments = arguments
    if kind == "unix":
        return True
    if kind not in ("tcp", "tcp6"):
        return False
    named = dict(part.split("=", 1) for part in arguments if "=" in part)
    positional = [part for part in arguments if "=" not in part]
    interface = named.get("interface", positional[1] if len(positional) > 1 else "")
    try:
        return ipaddress.ip_address(interface.replace("\\", "")).is_loopback
    except ValueError:
        return False
