"""Host keys: the gateway's own, made on first start, those the operator names, and what clients
are told of them.

Nothing here knows of a connection. What cannot be used is a
:class:`~conchkernel.errors.ConfigurationError` with one sentence.
"""

from __future__ import annotations

import base64
import contextlib
import os
import tempfile
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from twisted.conch.ssh.keys import EncryptedKeyError, FingerprintFormats, Key

from conchkernel.errors import ConfigurationError
from conchkernel.ssh.fields import Fields, ProtocolError, string

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

#: By signature algorithm the public blob and the private key, the preferred one first.
HostKeys = dict[bytes, tuple[bytes, Key]]

#: The name that sshd gives it too.
FILE_NAME = "ssh_host_ed25519_key"

#: OpenSSH's PROTOCOL 2.5: which keys a host has, and the question whether it has them.
ANNOUNCE = b"hostkeys-00@openssh.com"
PROVE = b"hostkeys-prove-00@openssh.com"

_CERTIFICATE = b"-cert-v01@openssh.com"
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
            # As sshd: a key of ours that others on this machine can read is not a secret. Who may
            # read another account's, such as what a container is given, is that account's affair.
            status = os.fstat(file.fileno())
            if status.st_uid == os.getuid() and status.st_mode & 0o077:
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


def loadCertificate(path: Path) -> bytes:
    """A host certificate made by ``ssh-keygen -s CA -h``, as sshd's HostCertificate.

    :returns: its blob, for :func:`algorithms`.
    :raises ConfigurationError: it cannot be read, or is no host certificate.
    """
    try:
        data = path.read_bytes()[:_MAXIMUM_FILE_BYTES]
    except OSError as error:
        raise ConfigurationError(
            f"The host certificate {path} cannot be read: {error.strerror}."
        ) from error
    try:
        certificate = serialization.load_ssh_public_identity(data)
        if not isinstance(certificate, serialization.SSHCertificate):
            raise ConfigurationError(f"{path} is a key; name the certificate beside it.")
        if certificate.type is not serialization.SSHCertificateType.HOST:
            raise ConfigurationError(f"{path} is a user's certificate; make one by ssh-keygen -h.")
        certificate.verify_cert_signature()
        return base64.b64decode(data.split(None, 2)[1])
    except ConfigurationError:
        raise
    except Exception:
        raise ConfigurationError(f"{path} is not a host certificate that can be used.") from None


def algorithms(keys: Iterable[Key], certificates: Iterable[bytes] = ()) -> HostKeys:
    """By which algorithms a host proves itself: by certificates first, and never with SHA-1.

    Of several keys of a type the first counts.

    :param certificates: blobs of :func:`loadCertificate`, each for one of the keys.
    :raises ConfigurationError: a certificate is for none of them.
    """
    plain: HostKeys = {}
    certified: HostKeys = {}
    blobs: dict[bytes, tuple[bytes, Key]] = {}
    for key in keys:
        blob = key.public().blob()
        blobs[blob] = (blob, key)
        for algorithm in key.supportedSignatureAlgorithms():
            if algorithm != b"ssh-rsa":
                plain.setdefault(algorithm, (blob, key))
    for certificate in certificates:
        text = b" ".join((Fields(certificate, "").string(), base64.b64encode(certificate)))
        identity = serialization.load_ssh_public_identity(text)
        assert isinstance(identity, serialization.SSHCertificate)
        public: object = identity.public_key()
        for _, key in blobs.values():
            if public == key.public()._keyObject:
                for algorithm, (_, other) in plain.items():
                    if other is key:
                        certified.setdefault(algorithm + _CERTIFICATE, (certificate, key))
                break
        else:
            raise ConfigurationError("A host certificate is for none of the host keys.")
    return {**certified, **plain}


def announcement(hostKeys: Mapping[bytes, tuple[bytes, Key]]) -> bytes:
    """What tells a client all our keys, so that it knows the next one before it is needed."""
    return b"".join(map(string, _plainBlobs(hostKeys)))


def proof(
    hostKeys: Mapping[bytes, tuple[bytes, Key]],
    data: bytes,
    sessionID: bytes,
    agreed: bytes,
) -> bytes | None:
    """Signatures by the keys that a client asks about.

    :param data: the question: blobs.
    :param agreed: the host key algorithm of the connection, by which an RSA key signs.
    :returns: the answer, ``None`` where we do not have all of these keys.
    """
    blobs = _plainBlobs(hostKeys)
    fields = Fields(data, "hostkeys-prove")
    asked: list[bytes] = []
    try:
        while fields.left():
            asked.append(fields.string())
            # Each signature costs; nobody needs one twice.
            if asked[-1] not in blobs or len(asked) > len(blobs):
                return None
    except ProtocolError:
        return None
    signatures = []
    for blob in asked:
        names = [name for name, (other, _) in hostKeys.items() if other == blob]
        algorithm = agreed if agreed in names else names[0]
        _, key = hostKeys[algorithm]
        message = string(PROVE) + string(sessionID) + string(blob)
        signatures.append(string(key.sign(message, signatureType=algorithm)))
    return b"".join(signatures)


def _plainBlobs(hostKeys: Mapping[bytes, tuple[bytes, Key]]) -> Sequence[bytes]:
    """The blobs of the keys themselves, without certificates."""
    return list(
        dict.fromkeys(
            blob for name, (blob, _) in hostKeys.items() if not name.endswith(_CERTIFICATE)
        )
    )


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
