"""Host keys on disk: made once, kept safe, and refused with a sentence."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, rsa
from twisted.conch.ssh.keys import Key

from conchkernel.errors import ConfigurationError
from conchkernel.ssh import hostkeys
from conchkernel.ssh.fields import Fields, string


def write(path: Path, key: Key, **options: object) -> Path:
    path.write_bytes(key.toString("OPENSSH", **options))
    path.chmod(0o600)
    return path


def test_madeOnceAndStable(tmp_path: Path) -> None:
    """The directory and the file are private; the second start finds the same key."""
    state = tmp_path / "deep" / "state"
    key = hostkeys.loadOrCreate(state)
    path = state / "ssh_host_ed25519_key"
    assert key.sshType() == b"ssh-ed25519"
    assert state.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert hostkeys.loadOrCreate(state).blob() == key.blob()
    assert os.listdir(state) == ["ssh_host_ed25519_key"]


def test_firstOfTwoStartsWins(tmp_path: Path) -> None:
    """A key that appeared in the meantime is not overwritten."""
    key = hostkeys.loadOrCreate(tmp_path)
    hostkeys._create(tmp_path / hostkeys.FILE_NAME)
    assert hostkeys.loadOrCreate(tmp_path).blob() == key.blob()
    assert os.listdir(tmp_path) == [hostkeys.FILE_NAME]


def test_fingerprint(tmp_path: Path) -> None:
    """As ssh-keygen shows it, which can read the file too."""
    key = hostkeys.loadOrCreate(tmp_path)
    shown = subprocess.run(
        ["ssh-keygen", "-lf", tmp_path / hostkeys.FILE_NAME],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert shown.split()[1] == hostkeys.fingerprint(key)


def test_opensshsKeys(tmp_path: Path) -> None:
    """Keys that ssh-keygen made are taken, of each kind that counts."""
    for kind in ("ed25519", "ecdsa", "rsa"):
        path = tmp_path / kind
        subprocess.run(["ssh-keygen", "-qt", kind, "-N", "", "-f", path], check=True)
        assert not hostkeys.load(path).isPublic()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not a private key"),
        (b"\xff" * 100, "not a private key"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----", "not a"),
    ],
)
def test_garbage(tmp_path: Path, content: bytes, sentence: str) -> None:
    """A file that is no key."""
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match=sentence):
        hostkeys.load(path)


def test_noFile(tmp_path: Path) -> None:
    """No such file, and no such place for one."""
    with pytest.raises(ConfigurationError, match="cannot be read"):
        hostkeys.load(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="state-dir"):
        hostkeys.loadOrCreate(tmp_path / "file")


def test_publicKey(tmp_path: Path) -> None:
    """The wrong half."""
    path = write(tmp_path / "key.pub", hostkeys.loadOrCreate(tmp_path).public())
    with pytest.raises(ConfigurationError, match="public key"):
        hostkeys.load(path)


def test_passphrase(tmp_path: Path) -> None:
    """A server cannot type."""
    key = hostkeys.loadOrCreate(tmp_path)
    path = write(tmp_path / "key", key, subtype="v1", passphrase=b"secret")
    with pytest.raises(ConfigurationError, match="passphrase"):
        hostkeys.load(path)


def test_openToOthers(tmp_path: Path) -> None:
    """As with sshd, a key that others can read is none."""
    hostkeys.loadOrCreate(tmp_path)
    path = tmp_path / hostkeys.FILE_NAME
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        hostkeys.load(path)


def test_openedToUs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with sshd, another account's key may be readable by us: so a container's secrets are."""
    key = hostkeys.loadOrCreate(tmp_path)
    path = tmp_path / hostkeys.FILE_NAME
    path.chmod(0o440)
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    assert hostkeys.load(path).blob() == key.blob()


def test_weak(tmp_path: Path) -> None:
    """DSA, and RSA below 2048 bits."""
    for key, sentence in (
        (Key(dsa.generate_private_key(1024)), "DSA"),
        (Key(rsa.generate_private_key(65537, 1024)), "1024 bits"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            hostkeys.load(write(tmp_path / "key", key))


# --- what clients are told -------------------------------------------------------------------


def key(tmp_path: Path, name: str, kind: str) -> Key:
    """A key by ssh-keygen."""
    subprocess.run(["ssh-keygen", "-qt", kind, "-N", "", "-f", tmp_path / name], check=True)
    return hostkeys.load(tmp_path / name)


def certificate(tmp_path: Path, name: str, *options: str) -> bytes:
    """A certificate for that key, by a CA that is made with it."""
    subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", tmp_path / "ca"], check=True)
    command = ["ssh-keygen", "-qs", tmp_path / "ca", "-I", "gw", *options, tmp_path / f"{name}.pub"]
    subprocess.run(command, check=True)
    return hostkeys.loadCertificate(tmp_path / f"{name}-cert.pub")


def test_algorithms(tmp_path: Path) -> None:
    """In the operator's order; RSA by SHA-2 only; the first of a kind."""
    first, second = key(tmp_path, "a", "ed25519"), key(tmp_path, "b", "ed25519")
    rsaKey = key(tmp_path, "c", "rsa")
    found = hostkeys.algorithms([rsaKey, first, second])
    assert list(found) == [b"rsa-sha2-512", b"rsa-sha2-256", b"ssh-ed25519"]
    assert found[b"ssh-ed25519"] == (first.blob(), first)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("ed25519", [b"ssh-ed25519-cert-v01@openssh.com", b"ssh-ed25519"]),
        (
            "rsa",
            [
                b"rsa-sha2-512-cert-v01@openssh.com",
                b"rsa-sha2-256-cert-v01@openssh.com",
                b"rsa-sha2-512",
                b"rsa-sha2-256",
            ],
        ),
    ],
)
def test_certificates(tmp_path: Path, kind: str, names: list[bytes]) -> None:
    """A certificate comes before its key."""
    private = key(tmp_path, "key", kind)
    blob = certificate(tmp_path, "key", "-h")
    found = hostkeys.algorithms([private], [blob])
    assert list(found) == names
    assert found[names[0]] == (blob, private)
    with pytest.raises(ConfigurationError, match="none of the host keys"):
        hostkeys.algorithms([key(tmp_path, "other", "ed25519")], [blob])


def test_noCertificates(tmp_path: Path) -> None:
    """A user's, a key's, and no file at all."""
    key(tmp_path, "key", "ed25519")
    with pytest.raises(ConfigurationError, match="user's certificate"):
        certificate(tmp_path, "key", "-n", "joe")
    with pytest.raises(ConfigurationError, match="is a key"):
        hostkeys.loadCertificate(tmp_path / "key.pub")
    with pytest.raises(ConfigurationError, match="not a host certificate"):
        hostkeys.loadCertificate(tmp_path / "key")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        hostkeys.loadCertificate(tmp_path / "missing")


def test_announcementAndProof(tmp_path: Path) -> None:
    """A client hears of all keys, and gets a signature by each that it asks about."""
    keys = [key(tmp_path, "a", "ed25519"), key(tmp_path, "b", "rsa")]
    found = hostkeys.algorithms(keys, [certificate(tmp_path, "a", "-h")])
    blobs = [one.public().blob() for one in keys]
    assert hostkeys.announcement(found) == b"".join(map(string, blobs))
    answer = hostkeys.proof(found, hostkeys.announcement(found), b"session", b"ssh-ed25519")
    assert answer is not None
    fields = Fields(answer, "proof")
    for one, blob in zip(keys, blobs, strict=True):
        signature = fields.string()
        message = string(b"hostkeys-prove-00@openssh.com") + string(b"session") + string(blob)
        assert one.public().verify(signature, message)
    fields.end()
    agreed = hostkeys.proof(found, string(blobs[1]), b"session", b"rsa-sha2-256")
    assert agreed is not None
    assert b"rsa-sha2-256" in agreed


def test_proofOfWhatWeDoNotHave(tmp_path: Path) -> None:
    """Refused: another key, half a question, and the same key again and again."""
    found = hostkeys.algorithms([key(tmp_path, "a", "ed25519")])
    blob = string(found[b"ssh-ed25519"][0])
    for data in (string(b"unknown"), blob + string(b"unknown"), blob[:-1], blob * 2, b"\xff" * 4):
        assert hostkeys.proof(found, data, b"session", b"ssh-ed25519") is None
    assert hostkeys.proof(found, b"", b"session", b"ssh-ed25519") == b""
