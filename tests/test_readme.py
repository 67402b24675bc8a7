"""What README.md and the guides show is what works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a language in a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_linksLeadSomewhere(path: Path) -> None:
    """A relative link names a file that exists."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_readmeAndGuideShowTheSame() -> None:
    """The six lines in the README are those of the guide, which a test runs."""
    (lines,) = blocks(ROOT / "README.md", "python")
    assert lines.strip() in blocks(ROOT / "docs" / "embedding.md", "python")[0]
    assert len(lines.strip().splitlines()) == 6


def test_makeTargetsExist() -> None:
    """Every ``make`` word in the README is a target."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {
        word
        for block in blocks(ROOT / "README.md", "sh")
        for word in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)
    }
    assert used == {"demo", "test"}
    assert used <= targets
