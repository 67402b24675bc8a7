"""The real VS Code server, for tests: what Remote-SSH starts on a host.

It comes from npm as part of code-server. Its native modules are not built: what they do (terminals,
log files, watching) is not asked of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import nodejs
from .jupyters import made_once

if TYPE_CHECKING:
    from pathlib import Path

REQUIREMENT = "code-server@4.139.1"


@dataclass(frozen=True)
class VSCode:
    """Where it is."""

    node: Path
    directory: Path
    """The server's own."""

    @property
    def main(self) -> Path:
        """What Node.js is to run."""
        return self.directory / "out" / "server-main.js"

    @property
    def commit(self) -> str:
        """Which it is; client and server must agree."""
        product = json.loads((self.directory / "product.json").read_bytes())
        return str(product["commit"])


def installed() -> VSCode:
    """The server, which is installed if need be."""
    return _found(made_once("vscode", [REQUIREMENT], _install))


def _found(made: Path) -> VSCode:
    return VSCode(nodejs.node(), made / "node_modules" / "code-server" / "lib" / "vscode")


def _install(made: Path) -> None:
    nodejs.install(made, REQUIREMENT)
    nodejs.install(_found(made).directory)
