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


def test_weak(tmp_path: Path) -> None:
    """DSA, and RSA below 2048 bits."""
    for key, sentence in (
        (Key(dsa.generate_private_key(1024)), "DSA"),
        (Key(rsa.generate_private_key(65537, 1024)), "1024 bits"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            hostkeys.load(write(tmp_path / "key", key))
