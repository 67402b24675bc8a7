"""The one table of ciphers and MACs: what their names stand for, and which are offered to whom.

Sans-IO. What a cipher does is in :mod:`conchkernel.ssh.sealing`.

Client order decides in SSH (RFC 4253 section 7.1), and OpenSSH prefers chacha20-poly1305 and
aes-ctr to AES-GCM although both cost a server like this one several times more. So :func:`offer`
looks at what the client has and offers only the fastest family that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conchkernel.ssh.sealing import (
    ChaChaOpener,
    ChaChaSealer,
    CtrEtmOpener,
    CtrEtmSealer,
    CtrOpener,
    CtrSealer,
    GcmOpener,
    GcmSealer,
    Opener,
    Sealer,
)


@dataclass(frozen=True, slots=True)
class KeyMaterial:
    """One direction's keys (RFC 4253 section 7.2)."""

    iv: bytes
    key: bytes
    mac_key: bytes


#: Gives key material for the wanted sizes of IV, key and MAC key.
Derive = Callable[[int, int, int], KeyMaterial]


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """What a cipher name stands for."""

    key_bytes: int
    iv_bytes: int
    sealer: Callable[[bytes, bytes], Sealer] | None = None
    """``None``: AES-CTR, which needs a MAC."""
    opener: Callable[[bytes, bytes], Opener] | None = None

    @property
    def authenticated(self) -> bool:
        """Whether the cipher brings its own integrity check and the MAC's name means nothing."""
        return self.sealer is not None


@dataclass(frozen=True, slots=True)
class MacSpec:
    """What a MAC name stands for."""

    key_bytes: int
    digest: str
    etm: bool
    """Whether it covers the ciphertext."""


CIPHERS: dict[bytes, CipherSpec] = {
    b"aes128-gcm@openssh.com": CipherSpec(16, 12, GcmSealer, GcmOpener),
    b"aes256-gcm@openssh.com": CipherSpec(32, 12, GcmSealer, GcmOpener),
    b"chacha20-poly1305@openssh.com": CipherSpec(64, 0, ChaChaSealer, ChaChaOpener),
    b"aes128-ctr": CipherSpec(16, 16),
    b"aes192-ctr": CipherSpec(24, 16),
    b"aes256-ctr": CipherSpec(32, 16),
}
MACS: dict[bytes, MacSpec] = {
    b"hmac-sha2-256-etm@openssh.com": MacSpec(32, "sha256", True),
    b"hmac-sha2-512-etm@openssh.com": MacSpec(64, "sha512", True),
    b"hmac-sha2-256": MacSpec(32, "sha256", False),
    b"hmac-sha2-512": MacSpec(64, "sha512", False),
}

_GCM = (b"aes128-gcm@openssh.com", b"aes256-gcm@openssh.com")
_CHACHA = (b"chacha20-poly1305@openssh.com",)
_CTR = (b"aes128-ctr", b"aes192-ctr", b"aes256-ctr")
_ETM = tuple(name for name, mac in MACS.items() if mac.etm)


#: What clients may choose from, the cheapest for us first.
_FAMILIES = (_GCM, _CHACHA + _CTR)


@dataclass(frozen=True, slots=True)
class Offer:
    """What our KEXINIT lists, for both directions."""

    ciphers: tuple[bytes, ...]
    macs: tuple[bytes, ...]


#: All that there is.
EVERYTHING = Offer(tuple(CIPHERS), tuple(MACS))


def offer(
    ciphers: Sequence[bytes] | None, macs: Sequence[bytes] = (), allowed: Offer = EVERYTHING
) -> Offer:
    """The fastest safe offer to a client.

    :param ciphers: the names in the client's KEXINIT, or ``None`` while it has sent none.
    :param macs: likewise. Those that cover only the plaintext are offered to nobody who has
        anything better.
    :param allowed: what may be offered at all.
    """
    etm = tuple(name for name in _ETM if name in allowed.macs)
    if ciphers is None:
        return Offer(allowed.ciphers, etm)
    offered_macs = etm if any(name in macs for name in etm) else allowed.macs
    for family in _FAMILIES:
        usable = tuple(name for name in family if name in allowed.ciphers)
        if any(name in ciphers for name in usable):
            return Offer(usable, offered_macs)
    return Offer(allowed.ciphers, offered_macs)


def make_sealer(cipher: bytes, mac: bytes, derive: Derive) -> Sealer:
    """The sealer for a negotiated pair of names; ``mac`` is not looked at for an AEAD cipher."""
    spec = CIPHERS[cipher]
    if spec.sealer is not None:
        material = derive(spec.iv_bytes, spec.key_bytes, 0)
        return spec.sealer(material.key, material.iv)
    mac_spec = MACS[mac]
    material = derive(spec.iv_bytes, spec.key_bytes, mac_spec.key_bytes)
    sealer = CtrEtmSealer if mac_spec.etm else CtrSealer
    return sealer(material.key, material.iv, material.mac_key, mac_spec.digest)


def make_opener(cipher: bytes, mac: bytes, derive: Derive) -> Opener:
    """The opener for a negotiated pair of names; as :func:`make_sealer`."""
    spec = CIPHERS[cipher]
    if spec.opener is not None:
        material = derive(spec.iv_bytes, spec.key_bytes, 0)
        return spec.opener(material.key, material.iv)
    mac_spec = MACS[mac]
    material = derive(spec.iv_bytes, spec.key_bytes, mac_spec.key_bytes)
    opener = CtrEtmOpener if mac_spec.etm else CtrOpener
    return opener(material.key, material.iv, material.mac_key, mac_spec.digest)
