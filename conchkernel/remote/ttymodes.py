"""Encoded terminal modes (RFC 4254 section 8, RFC 8160) put to a terminal. Runs in the agent."""

from __future__ import annotations

import sys
import termios
from collections.abc import Iterable

# Linux has these; Python's termios module names only some of them.
_LINUX = {"IUCLC": 0o1000, "IUTF8": 0o40000, "OLCUC": 0o2, "XCASE": 0o4}

_CHARACTERS = {
    1: "VINTR", 2: "VQUIT", 3: "VERASE", 4: "VKILL", 5: "VEOF", 6: "VEOL", 7: "VEOL2",
    8: "VSTART", 9: "VSTOP", 10: "VSUSP", 11: "VDSUSP", 12: "VREPRINT", 13: "VWERASE",
    14: "VLNEXT", 16: "VSWTC", 17: "VSTATUS", 18: "VDISCARD",
}  # fmt: skip
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _ISPEED, _OSPEED, _CC = range(7)
_FLAGS = {
    **{30 + n: (_IFLAG, name) for n, name in enumerate((
        "IGNPAR", "PARMRK", "INPCK", "ISTRIP", "INLCR", "IGNCR", "ICRNL", "IUCLC", "IXON",
        "IXANY", "IXOFF", "IMAXBEL", "IUTF8"))},
    **{50 + n: (_LFLAG, name) for n, name in enumerate((
        "ISIG", "ICANON", "XCASE", "ECHO", "ECHOE", "ECHOK", "ECHONL", "NOFLSH", "TOSTOP",
        "IEXTEN", "ECHOCTL", "ECHOKE", "PENDIN"))},
    **{70 + n: (_OFLAG, name) for n, name in enumerate((
        "OPOST", "OLCUC", "ONLCR", "OCRNL", "ONOCR", "ONLRET"))},
    92: (_CFLAG, "PARENB"),
    93: (_CFLAG, "PARODD"),
}  # fmt: skip
_TTY_OP_ISPEED, _TTY_OP_OSPEED, _CS7, _CS8 = 128, 129, 90, 91
_DISABLED = 255  # section 8: "255 if any of these is disabled"


def apply(fd: int, modes: Iterable[tuple[int, int]]) -> None:
    """Set the modes on a terminal; unknown opcodes and speeds are ignored, as section 8 says."""
    attributes = termios.tcgetattr(fd)
    for opcode, value in modes:
        if opcode in _CHARACTERS:
            index = getattr(termios, _CHARACTERS[opcode], None)
            if index is not None:
                character = 0 if value == _DISABLED else value & 0xFF
                attributes[_CC][index] = bytes([character])
        elif opcode in _FLAGS:
            word, name = _FLAGS[opcode]
            bit = getattr(termios, name, None)
            if bit is None:
                bit = _LINUX.get(name, 0) if sys.platform.startswith("linux") else 0
            attributes[word] = attributes[word] | bit if value else attributes[word] & ~bit
        elif opcode in (_CS7, _CS8):
            if value:
                size = termios.CS7 if opcode == _CS7 else termios.CS8
                attributes[_CFLAG] = attributes[_CFLAG] & ~termios.CSIZE | size
        elif opcode in (_TTY_OP_ISPEED, _TTY_OP_OSPEED):
            speed = getattr(termios, f"B{value}", None)
            if speed is not None:
                attributes[_ISPEED if opcode == _TTY_OP_ISPEED else _OSPEED] = speed
    try:
        termios.tcsetattr(fd, termios.TCSANOW, attributes)
    except termios.error:
        pass  # a combination that this system has not; a terminal without it is better than none
