"""Encoded terminal modes."""

from __future__ import annotations

import pytest

from conchkernel.ssh.fields import ProtocolError
from conchkernel.ssh.ttymodes import MAX_MODES, parseModes


@pytest.mark.parametrize(
    ("data", "modes"),
    [
        (b"", ()),
        (b"\0", ()),
        (b"\x01\0\0\0\x03", ((1, 3),)),
        (b"\x01\0\0\0\x03\x80\0\0\x96\0\x00", ((1, 3), (128, 38400))),
        (b"\x01\0\0\0\x03\x00\x02\0\0\0\x04", ((1, 3),)),
        (b"\x9f\xff\xff\xff\xff\xa0what follows", ((159, 2**32 - 1),)),
    ],
)
def test_modes(data: bytes, modes: tuple[tuple[int, int], ...]) -> None:
    """Pairs up to the end, or to the first opcode that has no meaning yet."""
    assert parseModes(data) == modes


@pytest.mark.parametrize("data", [b"\x01", b"\x01\0\0\0", b"\x01\0\0\0\1" * (MAX_MODES + 1)])
def test_badModes(data: bytes) -> None:
    """What is cut short, or has no end, is a violation."""
    with pytest.raises(ProtocolError):
        parseModes(data)
