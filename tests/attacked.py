"""The servers that the tests attack, each a process of its own: ours, and stock Conch's.

``python -m tests.attacked gateway|conch`` prints its port and serves the programs and files of this
host, as whoever runs it, to who has the password. Both have Twisted's own log on stderr, both get
the same clients. Conch's is what its documentation and ``twisted.conch.unix`` make of it; only
``home`` is a path there that SFTP needs to work at all. At SIGTERM it prints what it has seen.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from twisted.conch.avatar import ConchUser
from twisted.conch.checkers import InMemorySSHKeyDB, SSHPublicKeyChecker
from twisted.conch.interfaces import ISession, ISFTPServer
from twisted.conch.ssh.factory import SSHFactory
from twisted.conch.ssh.filetransfer import FileTransferServer
from twisted.conch.ssh.keys import Key
from twisted.conch.ssh.session import SSHSession
from twisted.conch.unix import SFTPServerForUnixConchUser
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernamePassword
from twisted.cred.error import UnauthorizedLogin
from twisted.cred.portal import IRealm, Portal
from twisted.internet import reactor as _reactor
from twisted.logger import (
    FilteringLogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogPublisher,
    textFileLogObserver,
)
from twisted.python.components import registerAdapter
from twisted.python.filepath import FilePath
from zope.interface import implementer

from conchkernel.avatars import KernelRealm
from conchkernel.localbackend import LocalBackend
from conchkernel.ssh.checkers import truthful
from conchkernel.ssh.factory import GatewayFactory

reactor: Any = _reactor
PASSWORD = b"sesame"
USER = b"joe"
#: Seconds between two looks at the clock.
_TICK = 0.01


@implementer(ICredentialsChecker)
class PasswordChecker:
    """Knows one password, and how many were tried."""

    credentialInterfaces = (IUsernamePassword,)

    def __init__(self) -> None:
        self.judged = 0

    def requestAvatarId(self, credentials: Any) -> bytes:
        self.judged += 1
        if not credentials.checkPassword(PASSWORD):
            raise UnauthorizedLogin
        return USER


class ConchAvatar(ConchUser):
    """As ``twisted.conch.unix.UnixConchUser``, without the changes of uid that need root."""

    def __init__(self) -> None:
        super().__init__()
        self.channelLookup[b"session"] = SSHSession
        self.subsystemLookup[b"sftp"] = FileTransferServer

    def getHomeDir(self) -> FilePath[str]:
        return FilePath("/")

    def _runAsUser(self, function: Any, *args: Any) -> Any:
        calls = [(function, args)] if callable(function) else function
        return [call(*rest) for call, rest in calls][-1]


@implementer(ISession)
class ConchSession:
    """As ``twisted.conch.unix.SSHSessionForUnixConchUser``, commands only."""

    def __init__(self, avatar: ConchAvatar) -> None:
        self.process: Any = None

    def execCommand(self, protocol: Any, command: bytes) -> None:
        self.process = reactor.spawnProcess(
            protocol, "/bin/sh", ["sh", "-c", command], {"PATH": os.environ["PATH"]}
        )

    def eofReceived(self) -> None:
        if self.process:
            self.process.closeStdin()

    def closed(self) -> None:
        if self.process:
            self.process.loseConnection()

    getPty = openShell = windowChanged = None


registerAdapter(ConchSession, ConchAvatar, ISession)
registerAdapter(SFTPServerForUnixConchUser, ConchAvatar, ISFTPServer)


@implementer(IRealm)
class ConchRealm:
    """Everybody's avatar."""

    def requestAvatar(self, avatarId: Any, mind: Any, *interfaces: Any) -> Any:
        return interfaces[0], ConchAvatar(), lambda: None


def conch(checkers: Any, hostKey: Key) -> SSHFactory:
    """Twisted's own server."""
    factory: Any = SSHFactory()
    factory.portal = Portal(ConchRealm(), checkers)
    factory.publicKeys = {hostKey.sshType(): hostKey.public()}
    factory.privateKeys = {hostKey.sshType(): hostKey}
    factory.getPublicKeys = lambda: factory.publicKeys
    factory.getPrivateKeys = lambda: factory.privateKeys
    return factory


def gateway(checkers: Any, hostKey: Key) -> SSHFactory:
    """Ours."""
    realm = KernelRealm(
        LocalBackend(reactor),
        files=lambda avatar: avatar.link().addCallback(lambda link: link.openFiles(None, False)),
    )
    checkers = [truthful(checker) for checker in checkers]
    return GatewayFactory(Portal(realm, checkers), [hostKey], reactor=reactor)


def say(something: Any) -> None:
    """Tell whoever has started this process."""
    sys.stdout.write(json.dumps(something) + "\n")
    sys.stdout.flush()


def main(kind: str) -> None:
    """Serve until SIGTERM."""
    passwords = PasswordChecker()
    keys = SSHPublicKeyChecker(
        InMemorySSHKeyDB({USER: [Key(Ed25519PrivateKey.generate()).public()]})
    )
    make = {"conch": conch, "gateway": gateway}[kind]
    factory = make([passwords, keys], Key(Ed25519PrivateKey.generate()))
    globalLogPublisher.addObserver(
        FilteringLogObserver(
            textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(LogLevel.info)]
        )
    )
    port = reactor.listenTCP(0, factory, interface="127.0.0.1", backlog=500)
    say(port.getHost().port)
    longest = last = 0.0

    def tick() -> None:
        nonlocal longest, last
        now = time.thread_time()
        longest, last = max(longest, now - last), now
        reactor.callLater(_TICK, tick)

    def start() -> None:
        nonlocal last
        last = time.thread_time()
        tick()

    reactor.callWhenRunning(start)
    reactor.run()
    say({"longest": longest, "judged": passwords.judged})


if __name__ == "__main__":
    main(sys.argv[1])
