"""Users' public keys: which algorithms count, and what their signatures must look like.

Sans-IO. Conch's :class:`~twisted.conch.ssh.keys.Key` parses and verifies; it does not compare the
algorithm that the client names with the key and with the signature, takes SHA-1 and RSA keys of
any size, and ignores the flags of a security key. That is done here, before anything is verified.
"""

from __future__ import annotations

from hashlib import sha256

from cryptography.exceptions import UnsupportedAlgorithm
from twisted.conch.ssh.keys import BadKeyError, Key

from conchkernel.errors import ConchKernelError
from conchkernel.ssh.fields import Fields, ProtocolError

_SECURITY_KEYS = (b"sk-ssh-ed25519@openssh.com", b"sk-ecdsa-sha2-nistp256@openssh.com")

#: Signature algorithm to key type, in the order that we announce (RFC 8308 section 3.1).
SIGNATURE_ALGORITHMS: dict[bytes, bytes] = {
    b"ssh-ed25519": b"ssh-ed25519",
    **{name: name for name in _SECURITY_KEYS},
    b"ecdsa-sha2-nistp256": b"ecdsa-sha2-nistp256",
    b"ecdsa-sha2-nistp384": b"ecdsa-sha2-nistp384",
    b"ecdsa-sha2-nistp521": b"ecdsa-sha2-nistp521",
    b"rsa-sha2-512": b"ssh-rsa",
    b"rsa-sha2-256": b"ssh-rsa",
}

#: OpenSSH's bound; verifying takes the square of the size.
_MAXIMUM_RSA_BITS = 16384
_USER_PRESENT = 0x01


class KeyRefused(ConchKernelError):
    """The key or its signature is none that we take; the text is for our log only."""


def parse(algorithm: bytes, blob: bytes, requiredRSASize: int) -> Key:
    """The public key that a client offers.

    :raises KeyRefused: of a kind or size that does not count, or malformed.
    """
    try:
        keyType = SIGNATURE_ALGORITHMS[algorithm]
    except KeyError:
        raise KeyRefused("the signature algorithm is not accepted") from None
    try:
        if Fields(blob, "public key").string() != keyType:
            raise KeyRefused("the key is not of the type that the algorithm names")
        key = Key.fromString(blob, type="BLOB")
        bits = key.size()
    except (ProtocolError, BadKeyError, UnsupportedAlgorithm, ValueError, LookupError) as error:
        raise KeyRefused("malformed public key") from error
    except Exception as error:
        # Conch's parser lets whatever its pieces raise through: struct.error, TypeError.
        raise KeyRefused("malformed public key") from error
    if keyType == b"ssh-rsa" and not requiredRSASize <= bits <= _MAXIMUM_RSA_BITS:
        raise KeyRefused(f"an RSA key of {bits} bits is not accepted")
    return key


def signed(key: Key, algorithm: bytes, signature: bytes, message: bytes) -> bytes:
    """What the signature must have been made over.

    For most keys that is ``message``; a security key signs a digest with its flags and counter
    (OpenSSH's PROTOCOL.u2f).

    :param signature: what the client sent, as a whole.
    :raises KeyRefused: it is not by the algorithm that the client names, malformed, or made
        without somebody touching the key.
    """
    try:
        fields = Fields(signature, "signature")
        if fields.string() != algorithm:
            raise KeyRefused("the signature is not by the algorithm that was named")
        fields.string()
        if algorithm not in _SECURITY_KEYS:
            fields.end()
            return message
        flags = fields.raw(1)
        counter = fields.raw(4)
        fields.end()
    except ProtocolError as error:
        raise KeyRefused("malformed signature") from error
    if not flags[0] & _USER_PRESENT:
        raise KeyRefused("nobody touched the security key")
    application = key.application
    return sha256(application).digest() + flags + counter + sha256(message).digest()


def verify(key: Key, signature: bytes, message: bytes) -> bool:
    """Whether ``signature`` is by ``key`` over ``message``; false for what is malformed."""
    try:
        return bool(key.verify(signature, message))
    except Exception:
        # struct.error, ValueError, TypeError...: Conch's verifier trusts its input to be shaped.
        return False
