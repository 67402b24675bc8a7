"""The encoded terminal modes of a ``pty-req`` (RFC 4254 section 8).

Only the encoding is known here. What an opcode means for a terminal is known where the terminal
is, so that modes of other systems travel untouched.
"""

from __future__ import annotations

from conchkernel.ssh.fields import ProtocolError

#: Ends the list.
TTY_OP_END = 0
#: Opcodes from here on have no defined argument, so parsing stops at the first of them.
FIRST_UNDEFINED = 160
#: Every defined opcode once; a client that repeats itself more than this is not serious.
MAX_MODES = 256


def parseModes(data: bytes) -> tuple[tuple[int, int], ...]:
    """The modes as (opcode, argument), in the client's order.

    :raises ProtocolError: if an argument is cut short or the list is endless.
    """
    modes: list[tuple[int, int]] = []
    offset = 0
    while offset < len(data):
        opcode = data[offset]
        if opcode == TTY_OP_END or opcode >= FIRST_UNDEFINED:
            break
        argument = data[offset + 1 : offset + 5]
        if len(argument) != 4:
            raise ProtocolError("truncated terminal modes")
        if len(modes) == MAX_MODES:
            raise ProtocolError("too many terminal modes")
        modes.append((opcode, int.from_bytes(argument, "big")))
        offset += 5
    return tuple(modes)
