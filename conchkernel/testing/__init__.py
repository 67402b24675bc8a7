"""The public test kit: a kernel's road, and an SSH client, in memory.

:class:`MemoryBackend` gives :class:`MemoryLink`, whose processes are scripted by the test.
:class:`MemoryClient` stands on the other side of a
:class:`~conchkernel.ssh.connection.GatewayConnection` and fails where that breaks the protocol.
Nothing here needs a reactor or a network.
"""

from conchkernel.testing.backend import (
    MemoryBackend,
    MemoryLink,
    MemoryListener,
    MemoryStream,
)
from conchkernel.testing.client import AskedChannel, ClientChannel, MemoryClient

__all__ = [
    "AskedChannel",
    "ClientChannel",
    "MemoryBackend",
    "MemoryClient",
    "MemoryLink",
    "MemoryListener",
    "MemoryStream",
]
