"""A gateway without Jupyter: over the agent alone, or over nothing but its own processes.

Arguments: port, state directory, authorized_keys file, and ``compiled`` or ``pure`` for an agent
with that pump, or ``local`` for :class:`conchkernel.localbackend.LocalBackend`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.cred.portal import Portal
from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.python.failure import Failure

from conchkernel import AuthorizedKeysChecker, GatewayFactory, KernelRealm
from conchkernel.allocator import keepLargeBuffers
from conchkernel.localbackend import LocalBackend
from conchkernel.loopback import LoopbackBackend
from conchkernel.ssh import hostkeys

if TYPE_CHECKING:
    from conchkernel.avatars import KernelAvatar
    from conchkernel.files import IFileStore


def main(port: str, state: str, keys: str, kind: str) -> None:
    """Serve until SIGTERM."""
    keepLargeBuffers()
    reactor: Any = installed
    backend: LocalBackend | LoopbackBackend
    if kind == "local":
        backend = LocalBackend(reactor)
    else:
        backend = LoopbackBackend(reactor, compiled=kind == "compiled")

    async def files(avatar: KernelAvatar) -> IFileStore:
        link = await avatar.link()
        return await link.openFiles(None, False)

    realm = KernelRealm(backend, files=lambda avatar: Deferred.fromCoroutine(files(avatar)))
    portal = Portal(realm, [AuthorizedKeysChecker([Path(keys)])])
    factory = GatewayFactory(portal, [hostkeys.loadOrCreate(Path(state))], reactor=reactor)

    async def serve() -> None:
        await backend.start()
        await TCP4ServerEndpoint(reactor, int(port), interface="127.0.0.1").listen(factory)

    def failed(failure: Failure) -> None:
        failure.printTraceback()
        reactor.stop()

    def begin() -> None:
        Deferred.fromCoroutine(serve()).addErrback(failed)

    reactor.callWhenRunning(begin)
    reactor.addSystemEventTrigger(
        "before", "shutdown", lambda: Deferred.fromCoroutine(backend.stop())
    )
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
