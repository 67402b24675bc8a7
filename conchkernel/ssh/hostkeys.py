"""Host keys on disk: the gateway's own, made on first start, and those the operator names.

Nothing here knows of a connection. What cannot be used is a
:class:`~conchkernel.errors.ConfigurationError` with one sentence.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from twisted.conch.ssh.keys import EncryptedKeyError, FingerprintFormats, Key

from conchkernel.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

#: The name that sshd gives it too.
FILE_NAME = "ssh_host_ed25519_key"

_MINIMUM_RSA_BITS = 2048
#: A key file is a few KiB; more is not one.
_MAXIMUM_FILE_BYTES = 64 * 1024


def loadOrCreate(stateDir: Path) -> Key:
    """The gateway's own ed25519 key, stable from the first start on.

    :param stateDir: made with mode 0700 where it is missing.
    :raises ConfigurationError: the directory or the key cannot be used.
    """
    path = stateDir / FILE_NAME
    try:
        stateDir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _create(path)
    except OSError as error:
        raise ConfigurationError(
            f"No host key can be kept in {stateDir}: {error.strerror}; choose another --state-dir."
        ) from error
    return load(path)


def load(path: Path) -> Key:
    """The private key in a file, of a kind that clients of today accept.

    :raises ConfigurationError: it cannot be read, is not a private key, or is too weak.
    """
    try:
        with open(path, "rb") as file:
            # As sshd: a key that others on this machine can read is not a secret.
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise ConfigurationError(
                    f"The host key {path} is open to other users; run: chmod 600 {path}"
                )
            data = file.read(_MAXIMUM_FILE_BYTES)
    except OSError as error:
        raise ConfigurationError(
            f"The host key {path} cannot be read: {error.strerror}."
        ) from error
    try:
        key = Key.fromString(data)
    except EncryptedKeyError:
        raise ConfigurationError(
            f"The host key {path} has a passphrase; make one without by ssh-keygen -p."
        ) from None
    except Exception:
        # Conch's parser lets whatever its pieces raise through.
        raise ConfigurationError(f"{path} is not a private key that can be used.") from None
    if key.isPublic():
        raise ConfigurationError(f"{path} is a public key; name the private one beside it.")
    check(key, str(path))
    return key


def check(key: Key, name: str) -> None:
    """Refuse a host key that clients refuse.

    :raises ConfigurationError: the kind is outdated or the size too small.
    """
    kind = key.type()
    if kind == "DSA":
        raise ConfigurationError(f"The host key {name} is a DSA key, which no client accepts.")
    if kind == "RSA" and key.size() < _MINIMUM_RSA_BITS:
        raise ConfigurationError(
            f"The host key {name} has {key.size()} bits; RSA keys need {_MINIMUM_RSA_BITS}."
        )


def fingerprint(key: Key) -> str:
    """What a client shows of the key: ``SHA256:`` and base64, as by ``ssh-keygen -l``."""
    text = key.public().fingerprint(format=FingerprintFormats.SHA256_BASE64)
    return "SHA256:" + str(text).rstrip("=")


def _create(path: Path) -> None:
    """Write a new key so that nobody ever sees half of it, and the first of two starts wins."""
    text = Key(Ed25519PrivateKey.generate()).toString(
        "OPENSSH", subtype="v1", comment="conchkernel"
    )
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=FILE_NAME)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
