"""The bytes of the wire: kinds of messages, types of frames, their layout and their bounds.

``docs/wire.md`` in numbers. Gateway and agent run this same file (it is sent to the kernel's host),
so it imports the standard library only.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Buffer = bytes | bytearray | memoryview
    Frames = list[Buffer]

VERSION = 1

# Kinds of messages (wire.md section 2).
BYTES, ATTACH, ATTACHED, START, STARTED, LOST, HANDOVER, CLAIM, TAKEN, PADDING = range(10)

# Types of frames (wire.md section 5).
OPEN, OPENED, REFUSED, DATA, CREDIT, EOF, EXIT, CLOSE, RESIZE, SIGNAL, BREAK, STOP = range(1, 13)
PING, PONG, GOODBYE, FAREWELL = range(16, 20)

EXTENDED = 1  # flag of DATA: stderr

MESSAGE = struct.Struct(">BQQ")  # kind, offset, acknowledged
FRAME = struct.Struct(">BBII")  # type, flags, stream, length
U64 = struct.Struct(">Q")
U32 = struct.Struct(">I")
SIZE = struct.Struct(">IIII")

# Bounds (wire.md section 4).
MAX_MESSAGE = 256 * 1024
MAX_DATA = MAX_MESSAGE
MAX_FRAME = 192 * 1024  # an OPEN with the longest argument that Linux takes, and its environment
MAX_UNACKED_BYTES = 4 * 1024 * 1024
MAX_UNACKED_MESSAGES = 500
DATA_UNACKED_BYTES = MAX_UNACKED_BYTES - MAX_MESSAGE
DATA_UNACKED_MESSAGES = 400
ACK_BYTES = 1536 * 1024
ACK_MESSAGES = 32
MAX_STREAMS = 4096
MAX_CONTROL = 65536  # frames queued: more than any honest peer needs while a carrier is away

INITIAL_CREDIT = 64 * 1024  # towards the process
#: What a PADDING carries (wire.md section 2).
PADDING_BYTES = 2 * 1024 * 1024


class WireViolation(Exception):
    """The peer broke the protocol; the session cannot go on."""


class WireGap(Exception):
    """Bytes are missing: the carrier lost a message. Attach again; nothing is lost."""


def message_of(kind: int, body: dict[str, Any]) -> bytes:
    """A message whose body is JSON (kinds ATTACH to STARTED)."""
    return bytes([kind]) + json.dumps(body).encode()


def body_of(message: Buffer) -> dict[str, Any]:
    """The JSON object of such a message.

    :raises WireViolation: if it is none.
    """
    return object_of(bytes(message[1:]))


def object_of(data: bytes) -> dict[str, Any]:
    """The JSON object that a frame's payload is.

    :raises WireViolation: if it is none.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise WireViolation("not JSON where JSON must be") from None
    if not isinstance(value, dict):
        raise WireViolation("not a JSON object where one must be")
    return value
