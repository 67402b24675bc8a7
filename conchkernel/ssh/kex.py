"""Key exchange: KEXINIT, the shared secret, the exchange hash and the keys from it.

Sans-IO, server side only. Three methods, all over X25519 and SHA-256:
mlkem768x25519-sha256 (draft-ietf-sshm-mlkem-hybrid-kex) and curve25519-sha256 under its two names
(RFC 8731). The order of messages is the transport's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from conchkernel.ssh.ciphers import CIPHERS, Derive, KeyMaterial
from conchkernel.ssh.fields import DisconnectCode, Fields, ProtocolError, mpint, names, string

if TYPE_CHECKING:
    from collections.abc import Sequence

try:
    from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
except ImportError:  # cryptography before 48, or built on an OpenSSL without ML-KEM
    _HYBRID: tuple[bytes, ...] = ()
else:
    _HYBRID = (b"mlkem768x25519-sha256",)

_CLASSICAL = (b"curve25519-sha256", b"curve25519-sha256@libssh.org")

#: In our order of preference.
METHODS = _HYBRID + _CLASSICAL

#: Markers in the list of methods, which can never be chosen.
EXT_INFO_CLIENT = b"ext-info-c"
EXT_INFO_SERVER = b"ext-info-s"
STRICT_CLIENT = b"kex-strict-c-v00@openssh.com"
STRICT_SERVER = b"kex-strict-s-v00@openssh.com"

_COOKIE_BYTES = 16
_X25519_BYTES = 32
_MLKEM768_PUBLIC_BYTES = 1184


class KeyExchangeFailed(ProtocolError):
    """Nothing in common, or a public key that is none."""

    def __init__(self, message: str) -> None:
        super().__init__(message, DisconnectCode.KEY_EXCHANGE_FAILED)


@dataclass(frozen=True, slots=True)
class KexInit:
    """A SSH_MSG_KEXINIT (RFC 4253 section 7.1) without its cookie and languages."""

    methods: tuple[bytes, ...]
    host_key_algorithms: tuple[bytes, ...]
    ciphers_in: tuple[bytes, ...]
    """From client to server, as all ``_in``."""
    ciphers_out: tuple[bytes, ...]
    macs_in: tuple[bytes, ...]
    macs_out: tuple[bytes, ...]
    compressions_in: tuple[bytes, ...]
    compressions_out: tuple[bytes, ...]
    guessed: bool = False
    """A packet for the sender's first choice of method follows."""

    @classmethod
    def parse(cls, payload: bytes) -> KexInit:
        """Read what follows the message number.

        :raises ProtocolError: it is malformed.
        """
        fields = Fields(payload, "KEXINIT")
        fields.raw(_COOKIE_BYTES)
        lists = [fields.names() for _ in range(8)]
        fields.string()
        fields.string()
        guessed = fields.boolean()
        fields.uint32()
        fields.end()
        return cls(
            lists[0], lists[1], lists[2], lists[3], lists[4], lists[5], lists[6], lists[7], guessed
        )

    def encode(self) -> bytes:
        """What follows the message number, with a fresh cookie."""
        return b"".join(
            (
                os.urandom(_COOKIE_BYTES),
                names(self.methods),
                names(self.host_key_algorithms),
                names(self.ciphers_in),
                names(self.ciphers_out),
                names(self.macs_in),
                names(self.macs_out),
                names(self.compressions_in),
                names(self.compressions_out),
                names(()),
                names(()),
                b"\1" if self.guessed else b"\0",
                bytes(4),
            )
        )


@dataclass(frozen=True, slots=True)
class Agreement:
    """What both sides will use. A MAC is empty beside an AEAD cipher."""

    method: bytes
    host_key_algorithm: bytes
    cipher_in: bytes
    mac_in: bytes
    cipher_out: bytes
    mac_out: bytes


def agree(client: KexInit, server: KexInit) -> Agreement:
    """Choose: the client's first of what the server has too.

    :raises KeyExchangeFailed: there is none for something.
    """

    def first(what: str, wanted: Sequence[bytes], had: Sequence[bytes]) -> bytes:
        for name in wanted:
            if name in had:
                return name
        raise KeyExchangeFailed(f"no {what} in common")

    # The markers stand in both lists only if a client echoes ours; then they must not be chosen.
    methods = [name for name in server.methods if name in METHODS]
    method = first("key exchange method", client.methods, methods)
    host_key = first("host key type", client.host_key_algorithms, server.host_key_algorithms)
    cipher_in = first("cipher", client.ciphers_in, server.ciphers_in)
    cipher_out = first("cipher", client.ciphers_out, server.ciphers_out)
    mac_in = mac_out = b""
    if not CIPHERS[cipher_in].authenticated:
        mac_in = first("MAC", client.macs_in, server.macs_in)
    if not CIPHERS[cipher_out].authenticated:
        mac_out = first("MAC", client.macs_out, server.macs_out)
    first("compression", client.compressions_in, server.compressions_in)
    first("compression", client.compressions_out, server.compressions_out)
    return Agreement(method, host_key, cipher_in, mac_in, cipher_out, mac_out)


def signature_algorithm(host_key_algorithm: bytes) -> bytes:
    """By what a host key signs: a certificate's key as the key alone would."""
    return host_key_algorithm.replace(b"-cert-v01@openssh.com", b"")


def guess_was_right(client: KexInit, server: KexInit) -> bool:
    """Whether the packet after a guessing KEXINIT counts (RFC 4253 section 7)."""
    return (
        client.methods[:1] == server.methods[:1]
        and client.host_key_algorithms[:1] == server.host_key_algorithms[:1]
    )


def respond(method: bytes, client_public: bytes) -> tuple[bytes, bytes]:
    """The server's half of a method.

    :param client_public: what the client's KEX_ECDH_INIT or KEX_HYBRID_INIT carries.
    :returns: what our reply carries, and the shared secret K as it is hashed.
    :raises KeyExchangeFailed: the client's value is not a public key, or a degenerate one.
    """
    own = X25519PrivateKey.generate()
    own_public = own.public_key().public_bytes_raw()
    try:
        if method in _CLASSICAL:
            secret = own.exchange(X25519PublicKey.from_public_bytes(client_public))
            return own_public, mpint(int.from_bytes(secret, "big"))
        if len(client_public) != _MLKEM768_PUBLIC_BYTES + _X25519_BYTES:
            raise ValueError
        kem_public = MLKEM768PublicKey.from_public_bytes(client_public[:_MLKEM768_PUBLIC_BYTES])
        curve_public = X25519PublicKey.from_public_bytes(client_public[_MLKEM768_PUBLIC_BYTES:])
        classical = own.exchange(curve_public)
        kem_secret, ciphertext = kem_public.encapsulate()
    except ValueError:
        raise KeyExchangeFailed("unusable public key in the key exchange") from None
    return ciphertext + own_public, string(sha256(kem_secret + classical).digest())


def exchange_hash(*fields: bytes, secret: bytes) -> bytes:
    """H of RFC 5656 section 4.

    :param fields: V_C, V_S, I_C, I_S, K_S, Q_C and Q_S, without their lengths.
    :param secret: K, encoded.
    """
    return sha256(b"".join(map(string, fields)) + secret).digest()


def key_material(secret: bytes, digest: bytes, session_id: bytes, letters: bytes) -> Derive:
    """What derives one direction's keys (RFC 4253 section 7.2).

    :param letters: of the IV, the key and the MAC key: ``ACE`` from the client, ``BDF`` to it.
    """

    def stretch(letter: bytes, size: int) -> bytes:
        if not size:
            return b""
        base = secret + digest
        key = sha256(base + letter + session_id).digest()
        while len(key) < size:
            key += sha256(base + key).digest()
        return key[:size]

    def derive(iv_bytes: int, key_bytes: int, mac_key_bytes: int) -> KeyMaterial:
        return KeyMaterial(
            stretch(letters[0:1], iv_bytes),
            stretch(letters[1:2], key_bytes),
            stretch(letters[2:3], mac_key_bytes),
        )

    return derive
