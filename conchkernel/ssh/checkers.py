"""The gateway's own credentials checkers: it has one owner, who is let in under any name.

They are ordinary :class:`~twisted.cred.checkers.ICredentialsChecker` for any portal. A key
without a signature asks whether it would do: the answer is
:class:`~twisted.conch.error.ValidPublicKey`, as Conch has it, but only for keys that would.
Checkers of Twisted's own that say yes to every key are put right by :func:`truthful`.
"""

from __future__ import annotations

import grp
import hashlib
import hmac
import os
import pwd
import stat
from typing import TYPE_CHECKING, Any

from twisted.conch.checkers import SSHPublicKeyChecker
from twisted.conch.error import ValidPublicKey
from twisted.conch.ssh.keys import Key
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IAnonymous, ISSHPrivateKey, IUsernamePassword
from twisted.cred.error import UnauthorizedLogin
from twisted.logger import Logger
from zope.interface import implementer

from conchkernel.ssh import authorizedkeys, userkeys
from conchkernel.ssh.permissions import Permissions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from conchkernel.ssh.authorizedkeys import AuthorizedKey

#: The avatar of everybody whom the default checkers let in.
OWNER = "owner"

#: An authorized_keys file is read at each attempt, so it must not be endless.
_MAXIMUM_FILE_BYTES = 1024 * 1024


class LimitedId(str):
    """An avatar's id whose login may ask for less than others: see :class:`KernelRealm`.

    :ivar permissions: what it may ask for.
    """

    permissions: Permissions

    def __new__(cls, name: str, permissions: Permissions) -> LimitedId:
        self = super().__new__(cls, name)
        self.permissions = permissions
        return self


def _writableByOthers(status: os.stat_result) -> bool:
    """Whether somebody else than its owner may write a file, and so let anybody in.

    As sshd's StrictModes, and as Debian's a group whose only member is the owner does not count:
    where each account has a group of its own, files are made writable by it.
    """
    if not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    if status.st_mode & stat.S_IWOTH:
        return True
    try:
        names = set(grp.getgrgid(status.st_gid).gr_mem)
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        return True
    names.update(one.pw_name for one in pwd.getpwall() if one.pw_gid == status.st_gid)
    return names != {owner}


@implementer(ICredentialsChecker)
class AuthorizedKeysChecker:
    """Lets in who has the private half of a key in one of some files, under any name.

    The files are read at each attempt. One that does not exist has no keys, nor has one that
    others than its owner may write. Lines with options
    that are not honoured are refused, because they would give more than they were written for; the
    log says so, once for each line. Of several lines with the same key the first counts.

    :param paths: files as of sshd's ``authorized_keys``, or what gives them.
    :param agentKeys: further keys, each a :class:`~twisted.conch.ssh.keys.Key` or its blob.
    """

    _log = Logger()

    credentialInterfaces = (ISSHPrivateKey,)

    def __init__(
        self,
        paths: Callable[[], Iterable[Path]] | Sequence[Path],
        agentKeys: Iterable[Key | bytes] = (),
        owner: str = OWNER,
    ) -> None:
        self._paths = paths if callable(paths) else lambda: paths
        self._blobs = frozenset(key.blob() if isinstance(key, Key) else key for key in agentKeys)
        self._owner = owner
        self._told: set[tuple[str, str]] = set()

    def requestAvatarId(self, credentials: Any) -> Any:
        """The owner, where the key is known and the signature good.

        :raises ValidPublicKey: the key is known, and there is no signature to judge.
        :raises UnauthorizedLogin: otherwise.
        """
        blob = credentials.blob
        permissions = self._permissions(blob)
        if permissions is None:
            raise UnauthorizedLogin("unknown key")
        if credentials.signature is None:
            raise ValidPublicKey
        key = Key.fromString(blob, type="BLOB")
        if not userkeys.verify(key, credentials.signature, credentials.sigData):
            raise UnauthorizedLogin("bad signature")
        return LimitedId(self._owner, permissions)

    def _permissions(self, blob: bytes) -> Permissions | None:
        """What a key may ask for; ``None`` if it is not known."""
        if blob in self._blobs:
            return Permissions()
        return next((known.permissions for known in self._known() if known.blob == blob), None)

    def _known(self) -> Iterator[AuthorizedKey]:
        """All usable keys in the files."""
        for path in self._paths():
            try:
                with open(path, "rb") as file:
                    status = os.fstat(file.fileno())
                    data = file.read(_MAXIMUM_FILE_BYTES)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._tell(path, "", f"cannot be read: {error.strerror}")
                continue
            if _writableByOthers(status):
                self._tell(path, "", "is not used: others may write it; run: chmod go-w")
                continue
            for line in data.decode("utf-8", "replace").splitlines():
                try:
                    key = authorizedkeys.parse(line)
                except ValueError as error:
                    self._tell(path, line, str(error))
                    continue
                if key is not None:
                    yield key

    def _tell(self, path: Path, line: str, why: str) -> None:
        """Log what is not used, once; the line itself is named by a digest."""
        digest = hashlib.sha256(line.encode()).hexdigest()[:12] if line else ""
        seen = (str(path), digest)
        if seen in self._told:
            return
        self._told.add(seen)
        if line:
            # The end of a line is its comment, by which its owner finds it.
            self._log.warn(
                "{path}: the line that ends in {end!r} is not used: it {why}",
                path=str(path),
                end=line.rstrip()[-24:],
                why=why,
            )
        else:
            self._log.warn("{path} {why}", path=str(path), why=why)


@implementer(ICredentialsChecker)
class TokenChecker:
    """Lets in who knows the token, under any name.

    :param token: the Jupyter server's.
    """

    credentialInterfaces = (IUsernamePassword,)

    def __init__(self, token: str | bytes, owner: str = OWNER) -> None:
        if not token:
            raise ValueError("an empty token would let everybody in")
        self._digest = _digest(token)
        self._owner = owner

    def requestAvatarId(self, credentials: Any) -> Any:
        """The owner, where the password is the token.

        Both are hashed before they are compared, so that neither their length nor the place of
        the first difference can be measured.

        :raises UnauthorizedLogin: otherwise.
        """
        if not hmac.compare_digest(_digest(credentials.password), self._digest):
            raise UnauthorizedLogin("wrong token")
        return self._owner


@implementer(ICredentialsChecker)
class AnonymousOwnerChecker:
    """Lets everybody in, as the owner. For gateways that nobody else can reach."""

    credentialInterfaces = (IAnonymous,)

    def __init__(self, owner: str = OWNER) -> None:
        self._owner = owner

    def requestAvatarId(self, credentials: Any) -> Any:
        """The owner, whoever asks."""
        return self._owner


class _TruthfulPublicKeyChecker(SSHPublicKeyChecker):
    """Conch's checker, which says yes to a key without a signature only if it knows the key."""

    def _sanityCheckKey(self, credentials: Any) -> Key:
        return Key.fromString(credentials.blob, type="BLOB")

    def _verifyKey(self, pubKey: Key, credentials: Any) -> Any:
        if not credentials.signature:
            raise ValidPublicKey
        return super()._verifyKey(pubKey, credentials)


def truthful(checker: Any) -> Any:
    """``checker``, or one in its place that does not lie about keys.

    :class:`~twisted.conch.checkers.SSHPublicKeyChecker` confirms any key that is offered without
    a signature, so that users are asked for passphrases in vain.
    """
    if type(checker) is SSHPublicKeyChecker:
        return _TruthfulPublicKeyChecker(checker._keydb)
    return checker


def _digest(secret: str | bytes) -> bytes:
    return hashlib.sha256(secret.encode() if isinstance(secret, str) else secret).digest()
