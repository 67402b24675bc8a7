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


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "proxy": _proxy,
}


if __name__ == "__main__":
    main()
