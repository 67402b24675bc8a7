"""The ``conchkernel`` command: one subcommand per thing a person wants to do.

The service itself is ``twistd conchkernel``; here is what runs in the foreground for somebody who
looks at it. A wrong word is told in one line on stderr, with status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from conchkernel import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage and a line."""
        self.exit(1, f"{self.prog}: {message}\n")


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 1 <= number <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 86400")
    return number


def _file(text: str) -> str:
    if not text:
        return ""
    path = Path(text).absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return str(path)


def parser() -> argparse.ArgumentParser:
    """The command line, without anything that it does."""
    top = _Parser(
        prog="conchkernel",
        description="SSH to any Jupyter. The gateway itself is run by `twistd -n conchkernel`.",
    )
    top.add_argument("--version", action="version", version=f"conchkernel {__version__}")
    commands = top.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="start a Jupyter server and a gateway here, and say what to type",
        description="Starts a Jupyter server and a gateway on 127.0.0.1, with keys of their own in "
        "a temporary directory, and prints the ssh command to paste. Ctrl-C ends and removes all "
        "of it.",
    )
    demo.add_argument(
        "--port",
        type=_port,
        metavar="N",
        help="port of the gateway; 0 takes a free one (default: 2222, with --run 0)",
    )
    demo.add_argument(
        "--run",
        metavar="COMMAND",
        help="run COMMAND once by the ssh client, and exit with its status",
    )
    demo.add_argument("--verbose", action="store_true", help="log to stderr")

    proxy = commands.add_parser(
        "proxy",
        help="speak SSH on stdin and stdout, for ssh to run",
        description="What `conchkernel config-ssh NAME URL` has ssh run as its ProxyCommand. It "
        "speaks SSH on stdin and stdout.",
    )
    _addName(proxy)
    proxy.add_argument("--verbose", action="store_true", help="log to stderr")

    config = commands.add_parser(
        "config-ssh",
        help="have `ssh NAME` lead to a Jupyter server",
        description="Tries the URL, keeps it in a file that only you can read, and tells ssh of "
        "it, after showing what would change in its configuration. Then ssh, scp, sftp and all "
        "that use them know NAME.",
    )
    _addName(config)
    config.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help="the Jupyter server, as its own page or log shows it; - reads it from stdin; "
        "without it the one in CONCHKERNEL_JUPYTER_URL, or you are asked",
    )
    config.add_argument(
        "--remove", action="store_true", help="undo: ssh and we forget NAME, and its token"
    )
    config.add_argument("--yes", action="store_true", help="do not ask")
    config.add_argument(
        "--ssh-config",
        type=Path,
        metavar="FILE",
        help="ssh's configuration (default: ~/.ssh/config of your account)",
    )
    config.add_argument(
        "--kernel-name",
        metavar="NAME",
        help="kernel to start (default: the server's own). This and the options below keep what "
        "they were for NAME when they are left out; '' is the default again",
    )
    config.add_argument(
        "--jupyter-ca",
        type=_file,
        metavar="FILE",
        help="PEM file of the authority that signed Jupyter's certificate",
    )
    config.add_argument(
        "--linger",
        type=_seconds,
        metavar="SECONDS",
        help="how long the kernel outlives its last use (default: 60)",
    )
    config.add_argument(
        "--orphan-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="how long shells outlive a connection that was cut off (default: 120)",
    )

    doctor = commands.add_parser(
        "doctor",
        help="find out what keeps `ssh NAME` from working",
        description="Goes the whole way from ssh's configuration to an echo from the kernel's "
        "host, and says of each part whether it works, and what to do where it does not.",
    )
    _addName(doctor)
    doctor.add_argument(
        "--ssh-config",
        type=Path,
        metavar="FILE",
        help="ssh's configuration (default: ~/.ssh/config of your account)",
    )
    return top


def _addName(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="what ssh calls the server")
    command.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIRECTORY",
        help="where names are kept "
        "(default: $XDG_STATE_HOME/conchkernel or ~/.local/state/conchkernel)",
    )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: parse, run, exit."""
    options = parser().parse_args(arguments)
    sys.exit(_COMMANDS[options.subcommand](options))


# What a command needs is imported for that command only.


def _demo(options: argparse.Namespace) -> int:
    from conchkernel import demo

    return demo.main(port=options.port, command=options.run, verbose=options.verbose)


def _proxy(options: argparse.Namespace) -> int:
    from conchkernel import proxycommand

    return proxycommand.main(options.name, options.state_dir, verbose=options.verbose)


def _configSSH(options: argparse.Namespace) -> int:
    from conchkernel import configssh

    said = {
        "kernelName": options.kernel_name,
        "jupyterCA": options.jupyter_ca,
        "linger": options.linger,
        "orphanTimeout": options.orphan_timeout,
    }
    return configssh.main(
        configssh.Request(
            name=options.name,
            url=options.url,
            options={key: value or None for key, value in said.items() if value is not None},
            stateDir=options.state_dir,
            sshConfig=options.ssh_config,
            yes=options.yes,
            remove=options.remove,
        )
    )


def _doctor(options: argparse.Namespace) -> int:
    from conchkernel import doctor

    return doctor.main(options.name, options.state_dir, options.ssh_config)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "proxy": _proxy,
    "config-ssh": _configSSH,
    "doctor": _doctor,
}


if __name__ == "__main__":
    main()
