"""Pythons of other ages, where the machine has some."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def oldest() -> str:
    """The oldest that what is sent to kernels' hosts must run on; else our own."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in range(8, sys.version_info.minor):
        named = shutil.which(f"python3.{minor}")
        for python in [*([named] if named else []), *kept.glob(f"3.{minor}.*/bin/python")]:
            # It may be a stand-in for one that is not there.
            if subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
                return str(python)
    return sys.executable
