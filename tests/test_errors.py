"""What errors say can be shown to anybody."""

from __future__ import annotations

import pytest

from conchkernel.errors import ConchKernelError, LinkLost, RefusalCode, StreamRefused


@pytest.mark.parametrize("said", ["plain", "zwölf 文件", "quote ' and \\ backslash", ""])
def test_asSaid(said: str) -> None:
    """What prints is left alone."""
    assert str(ConchKernelError(said)) == said


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("one\ntwo\tthree\r", "one two three "),
        ("\x1b]0;title\x07\x1b[2J", "?]0;title??[2J"),
        ("\x9b31m \u202e raw\udcff", "?31m ? raw?"),
    ],
)
def test_aPeersWordsMoveNoCursor(said: str, shown: str) -> None:
    """Whatever the agent, the kernel or the server says."""
    assert str(LinkLost(said)) == shown
    assert str(StreamRefused(RefusalCode.PROHIBITED, said)) == shown
