"""The default checkers: one owner, keys from files, the token, and nobody else."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from twisted.conch.checkers import InMemorySSHKeyDB, SSHPublicKeyChecker
from twisted.conch.error import ValidPublicKey
from twisted.conch.ssh.keys import Key
from twisted.cred.checkers import InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.credentials import Anonymous, SSHPrivateKey, UsernamePassword
from twisted.cred.error import UnauthorizedLogin
from twisted.logger import globalLogPublisher

from conchkernel.ssh.checkers import (
    AnonymousOwnerChecker,
    AuthorizedKeysChecker,
    TokenChecker,
    truthful,
)
from conchkernel.ssh.permissions import Directions, Permissions, Place

ED25519 = Key(ed25519.Ed25519PrivateKey.generate())
ECDSA = Key(ec.generate_private_key(ec.SECP256R1()))
RSA = Key(rsa.generate_private_key(65537, 2048))


def line(key: Key, comment: str = "joe@home") -> str:
    return key.public().toString("OPENSSH", comment=comment).decode()


def probe(key: Key, user: bytes = b"joe") -> SSHPrivateKey:
    return SSHPrivateKey(user, key.sshType(), key.blob(), None, None)


def proof(key: Key, user: bytes = b"joe") -> SSHPrivateKey:
    return SSHPrivateKey(user, key.sshType(), key.blob(), b"data", key.sign(b"data"))


@pytest.fixture
def warnings() -> Any:
    """The texts of what was logged as a warning."""
    found: list[Any] = []

    def observe(event: Any) -> None:
        if event["log_level"].name == "warn":
            found.append(event)

    globalLogPublisher.addObserver(observe)
    yield found
    globalLogPublisher.removeObserver(observe)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "authorized_keys"


@pytest.mark.parametrize("key", [ED25519, ECDSA, RSA])
def test_authorizedKey(path: Path, key: Key) -> None:
    """Confirmed without a signature, let in with a good one, under any name."""
    path.write_text("\n# a comment\n  \n" + line(key) + "\n")
    checker = AuthorizedKeysChecker([path])
    with pytest.raises(ValidPublicKey):
        checker.requestAvatarId(probe(key, b"anybody"))
    assert checker.requestAvatarId(proof(key, b"anybody")) == "owner"


def test_tabs(path: Path) -> None:
    """They separate as blanks do; a line that ends behind its options is none."""
    path.write_text("no-pty\n" + "no-pty\t" + line(ED25519).replace(" ", "\t") + "\n")
    found = AuthorizedKeysChecker([path]).requestAvatarId(proof(ED25519))
    assert found.permissions == Permissions(pty=False)


def test_unknownKey(path: Path) -> None:
    """Neither confirmed nor let in."""
    path.write_text(line(ED25519))
    checker = AuthorizedKeysChecker([path])
    for credentials in (probe(ECDSA), proof(ECDSA)):
        with pytest.raises(UnauthorizedLogin) as caught:
            checker.requestAvatarId(credentials)
        assert caught.type is UnauthorizedLogin


@pytest.mark.parametrize(
    "signature",
    [b"", b"x", ECDSA.sign(b"data"), ED25519.sign(b"other")],
    ids=["none", "short", "of another key", "of other data"],
)
def test_badSignature(path: Path, signature: bytes) -> None:
    """A known key with anything but its own signature of this data."""
    path.write_text(line(ED25519))
    credentials = SSHPrivateKey(b"joe", ED25519.sshType(), ED25519.blob(), b"data", signature)
    with pytest.raises(UnauthorizedLogin) as caught:
        AuthorizedKeysChecker([path]).requestAvatarId(credentials)
    assert caught.type is UnauthorizedLogin


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ("restrict", Permissions(Directions.NONE, Directions.NONE, agent=False, pty=False)),
        ("restrict,pty", Permissions(Directions.NONE, Directions.NONE, agent=False)),
        ("restrict,Port-Forwarding,agent-forwarding,pty", Permissions()),
        ("no-pty,no-X11-forwarding,no-user-rc", Permissions(pty=False)),
        ("no-port-forwarding", Permissions(Directions.NONE, Directions.NONE)),
        ("no-agent-forwarding", Permissions(agent=False)),
        (
            'permitopen="db:5432",permitopen="[::1]:*"',
            Permissions(opens=((Place("db", 5432), Place("::1", None)),)),
        ),
        (
            'permitlisten="8080",permitlisten="*.example:1"',
            Permissions(listens=((Place("*", 8080), Place("*.example", 1)),)),
        ),
    ],
)
def test_optionsTakeBack(path: Path, options: str, left: Permissions, warnings: Any) -> None:
    """What a key's options forbid is known of its login."""
    path.write_text(f"{options} {line(ED25519)}\n{line(ED25519)}\n")
    found = AuthorizedKeysChecker([path]).requestAvatarId(proof(ED25519))
    assert (found, found.permissions) == ("owner", left)
    assert not warnings


def test_filesAreReadAnew(path: Path) -> None:
    """A key added or taken away counts from the next attempt on."""
    checker = AuthorizedKeysChecker(lambda: [path])
    with pytest.raises(UnauthorizedLogin):
        checker.requestAvatarId(proof(ED25519))
    path.write_text(line(ED25519))
    assert checker.requestAvatarId(proof(ED25519)) == "owner"
    path.write_text(line(ECDSA))
    with pytest.raises(UnauthorizedLogin):
        checker.requestAvatarId(proof(ED25519))


@pytest.mark.parametrize(
    "options",
    [
        'restrict,command="echo hi"',
        'from="10.0.0.0/8",no-pty',
        "cert-authority",
        "no-touch-required",
        'permitopen="nowhere"',
        'permitlisten="[::1:80"',
        'permitopen="half',
        "permitopen",
    ],
)
def test_linesWithOptionsThatAreNotHonoured(path: Path, options: str, warnings: Any) -> None:
    """Refused, and logged once: an option that is not honoured would give too much."""
    path.write_text(f"{options} {line(ED25519)}\n{line(ECDSA)}\n")
    checker = AuthorizedKeysChecker([path])
    for _ in range(3):
        with pytest.raises(UnauthorizedLogin):
            checker.requestAvatarId(proof(ED25519))
    assert len(warnings) == 1
    assert warnings[0]["path"] == str(path)
    assert warnings[0]["end"].endswith("joe@home")
    assert checker.requestAvatarId(proof(ECDSA)) == "owner"


@pytest.mark.parametrize(
    "text",
    ["ssh-ed25519", "ssh-ed25519 not!base64", "ssh-dss AAAA", "\udcff\udcfe", "ssh-rsa A", "\0"],
)
def test_linesThatAreNoKeys(path: Path, text: str, warnings: Any) -> None:
    """They harm nobody else's line."""
    path.write_bytes(text.encode("utf-8", "surrogateescape") + b"\n" + line(ED25519).encode())
    checker = AuthorizedKeysChecker([path])
    assert checker.requestAvatarId(proof(ED25519)) == "owner"
    assert len(warnings) == 1


def test_unreadableFile(tmp_path: Path, path: Path, warnings: Any) -> None:
    """Logged once; other files count."""
    path.write_text(line(ED25519))
    checker = AuthorizedKeysChecker([tmp_path, path])
    for _ in range(2):
        assert checker.requestAvatarId(proof(ED25519)) == "owner"
    assert len(warnings) == 1


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_fileThatOthersMayWrite(
    path: Path, mode: int, warnings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with sshd it lets nobody in, until it is put right."""
    monkeypatch.setattr(pwd, "getpwall", lambda: [SimpleNamespace(pw_name="x", pw_gid=os.getgid())])
    path.write_text(line(ED25519))
    path.chmod(mode)
    checker = AuthorizedKeysChecker([path])
    for _ in range(3):
        with pytest.raises(UnauthorizedLogin):
            checker.requestAvatarId(proof(ED25519))
    assert len(warnings) == 1
    path.chmod(0o644)
    assert checker.requestAvatarId(proof(ED25519)) == "owner"


def test_fileThatAGroupOfOneMayWrite(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Debian's sshd: such are the files of an account with a group of its own."""
    owner = pwd.getpwuid(os.getuid()).pw_name
    group = SimpleNamespace(gr_mem=[])
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    monkeypatch.setattr(
        pwd, "getpwall", lambda: [SimpleNamespace(pw_name=owner, pw_gid=path.stat().st_gid)]
    )
    path.write_text(line(ED25519))
    path.chmod(0o664)
    checker = AuthorizedKeysChecker([path])
    assert checker.requestAvatarId(proof(ED25519)) == "owner"
    group.gr_mem.append("somebody")
    with pytest.raises(UnauthorizedLogin):
        checker.requestAvatarId(proof(ED25519))



def test_hugeFile(path: Path) -> None:
    """Only its beginning is read."""
    path.write_text(line(ED25519) + "\n" + "# filler\n" * 200_000 + line(ECDSA))
    checker = AuthorizedKeysChecker([path])
    assert checker.requestAvatarId(proof(ED25519)) == "owner"
    with pytest.raises(UnauthorizedLogin):
        checker.requestAvatarId(proof(ECDSA))


def test_agentKeys() -> None:
    """Keys that come from no file, as keys or as blobs; and another owner's name."""
    checker = AuthorizedKeysChecker([], agentKeys=[ED25519, ECDSA.blob()], owner="joe")
    assert checker.requestAvatarId(proof(ED25519)) == "joe"
    assert checker.requestAvatarId(proof(ECDSA)) == "joe"
    with pytest.raises(UnauthorizedLogin):
        checker.requestAvatarId(proof(RSA))


def test_token() -> None:
    """The token itself, and nothing near it."""
    checker = TokenChecker("töken")
    assert checker.requestAvatarId(UsernamePassword(b"any", "töken".encode())) == "owner"
    for guess in (b"", b"t", "töke".encode(), "tökenn".encode(), b"\xff", os.urandom(1000)):
        with pytest.raises(UnauthorizedLogin):
            checker.requestAvatarId(UsernamePassword(b"any", guess))


def test_emptyToken() -> None:
    """Would let everybody in, so it is no token."""
    with pytest.raises(ValueError, match="everybody"):
        TokenChecker("")


def test_anonymous() -> None:
    """Everybody is the owner."""
    assert AnonymousOwnerChecker().requestAvatarId(Anonymous()) == "owner"


def test_truthfulLeavesOthersAlone() -> None:
    """Only Conch's own key checker is replaced."""
    passwords = InMemoryUsernamePasswordDatabaseDontUse(joe=b"x")
    ours = AuthorizedKeysChecker([])
    assert truthful(passwords) is passwords
    assert truthful(ours) is ours


def test_truthful(loggedFailures: Any) -> None:
    """Yes to a known key, no to another, and the signature still counts."""
    checker = truthful(SSHPublicKeyChecker(InMemorySSHKeyDB({b"joe": [ED25519.public()]})))
    wrong = SSHPrivateKey(b"joe", ED25519.sshType(), ED25519.blob(), b"x", ED25519.sign(b"y"))
    for credentials, expected in (
        (probe(ED25519), ValidPublicKey),
        (probe(ECDSA), UnauthorizedLogin),
        (probe(ED25519, b"jim"), UnauthorizedLogin),
        (proof(ECDSA), UnauthorizedLogin),
        (wrong, UnauthorizedLogin),
    ):
        results: list[Any] = []
        checker.requestAvatarId(credentials).addBoth(results.append)
        assert results[0].type is expected
    results = []
    checker.requestAvatarId(proof(ED25519)).addBoth(results.append)
    assert results == [b"joe"]
