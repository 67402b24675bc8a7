"""Every error conchkernel raises on purpose, in one tree.

The text of an error is one sentence for a person: what is wrong and what to do about it. It never
holds a token. Mapping to SSH and SFTP codes happens once, at the edge (:mod:`conchkernel.ssh`).
"""

from __future__ import annotations

import enum


class ConchKernelError(Exception):
    """Something conchkernel can explain in one sentence.

    Part of it may be a peer's words, and it is read in logs and on terminals: so what does not
    print, and might move a cursor there, becomes a space or a question mark.
    """

    def __init__(self, sentence: str = "") -> None:
        if not sentence.isprintable():
            sentence = "".join(map(_shown, sentence))
        super().__init__(sentence)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else "?"


class ConfigurationError(ConchKernelError):
    """An option or a file that the operator gave cannot be used."""


# --- the kernel column -----------------------------------------------------------------------


class JupyterError(ConchKernelError):
    """The Jupyter server could not be used."""


class JupyterUnreachable(JupyterError):
    """Nothing answers at the URL: no such host, connection refused, TLS failure, time out."""


class TLSRefused(JupyterUnreachable):
    """Something answers at the URL, but we would not, or could not, speak TLS with it."""


class NotJupyter(JupyterError):
    """Something answers at the URL, but it is not a Jupyter server."""


class TokenRefused(JupyterError):
    """The server did not accept the token (HTTP 401 or 403)."""


class KernelRefused(JupyterError):
    """The server would not create, or no longer has, the kernel."""


class KernelSilent(KernelRefused):
    """The server has the kernel, but has not heard a word of it."""


class KernelUnsupported(JupyterError):
    """The kernel cannot carry an agent: it is not Python, or is no ipykernel."""


class LinkLost(JupyterError):
    """The connection to the kernel's host was lost and did not come back in time."""


# --- the wire --------------------------------------------------------------------------------


class RefusalCode(enum.IntEnum):
    """Why the agent would not open a stream; ``docs/wire.md`` gives the numbers."""

    PROHIBITED = 1
    CONNECT_FAILED = 2
    UNKNOWN_KIND = 3
    RESOURCE_SHORTAGE = 4


class StreamRefused(ConchKernelError):
    """The far side would not open this stream; other streams are not concerned."""

    def __init__(self, code: RefusalCode, message: str) -> None:
        super().__init__(message)
        self.code = code
