"""Every seed of the fuzzer's, without it: what was once found stays found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

SEEDS = Path(__file__).parent / "fuzz" / "seeds"


def test_everyTargetHasSeeds() -> None:
    """A target without any starts from nothing, and a seed without a target is never run."""
    assert {path.name for path in SEEDS.iterdir()} == set(TARGETS)


@pytest.mark.parametrize(
    "path", sorted(SEEDS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_seed(path: Path) -> None:
    """Its whole, and cut anywhere."""
    target, data = TARGETS[path.parent.name], path.read_bytes()
    target(data)
    for end in range(0, len(data), max(1, len(data) // 20)):
        target(data[:end])
