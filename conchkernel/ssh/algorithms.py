"""What an operator allows: sshd's KexAlgorithms, Ciphers and MACs.

The defaults are all that is implemented, and nothing weak is. So these are for those who want
less: only post-quantum key exchange, or only keys of 256 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conchkernel.errors import ConfigurationError
from conchkernel.ssh.ciphers import CIPHERS, MACS, Offer
from conchkernel.ssh.kex import METHODS

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True, slots=True)
class Algorithms:
    """Names that may be negotiated.

    :raises ConfigurationError: one is not known, or none is left.
    """

    kexAlgorithms: tuple[bytes, ...] = METHODS
    """In our order of preference, which matters only to a client that has guessed."""
    ciphers: tuple[bytes, ...] = tuple(CIPHERS)
    macs: tuple[bytes, ...] = tuple(MACS)
    """For ciphers that have no integrity check of their own."""

    def __post_init__(self) -> None:
        _check("key exchange method", self.kexAlgorithms, METHODS)
        _check("cipher", self.ciphers, CIPHERS)
        _check("MAC", self.macs, MACS)

    @property
    def offer(self) -> Offer:
        """The ciphers and MACs, as what may be offered."""
        return Offer(self.ciphers, self.macs)


def _check(what: str, names: Collection[bytes], known: Collection[bytes]) -> None:
    if not names:
        raise ConfigurationError(f"No {what} is left; name one at least.")
    for name in names:
        if name not in known:
            text = name.decode("ascii", "backslashreplace")
            choice = ", ".join(one.decode("ascii") for one in known)
            raise ConfigurationError(f"There is no {what} {text}; choose of {choice}.")
