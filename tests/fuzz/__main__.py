"""``python -m tests.fuzz TARGET [libFuzzer's options]``: search with atheris, from the seeds on.

New finds go to a directory that is thrown away; a crash is written to the current directory, and
belongs into ``seeds/TARGET`` once it is understood.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["conchkernel"]):
    from tests.fuzz.targets import TARGETS

SEEDS = Path(__file__).with_name("seeds")


def main() -> None:
    """Never returns: libFuzzer ends the process."""
    name, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as found:
        atheris.Setup([sys.argv[0], *options, found, str(SEEDS / name)], TARGETS[name])
        atheris.Fuzz()


main()
