"""From options to a service: how the parts of a gateway are joined.

The module that names both columns. What it makes never ends a process; :mod:`conchkernel.process`
does that for the runners, and ``docs/embedding.md`` joins the parts without any command line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.cred.credentials import IAnonymous
from twisted.cred.portal import Portal
from twisted.internet.endpoints import serverFromString
from twisted.logger import Logger

from conchkernel.avatars import KernelRealm
from conchkernel.errors import ConfigurationError
from conchkernel.jupyter.backends import JupyterBackend
from conchkernel.jupyter.urls import candidates
from conchkernel.options import Options
from conchkernel.service import GatewayService
from conchkernel.ssh import hostkeys
from conchkernel.ssh.checkers import (
    OWNER,
    AnonymousOwnerChecker,
    AuthorizedKeysChecker,
    TokenChecker,
    truthful,
)
from conchkernel.ssh.factory import GatewayFactory
from conchkernel.ssh.sessions import ACCEPT_ENV
from conchkernel.stores import Files, StoreChoice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twisted.cred.checkers import ICredentialsChecker

__all__ = ["Options", "makeService"]

_log = Logger()

#: A banner goes out in one packet before anybody has logged in, and clients take no larger one.
_MAXIMUM_BANNER_BYTES = 32 * 1024


def makeService(options: Options, *, reactor: Any = None) -> GatewayService:
    """A service for ``options`` that have been parsed. Touches the state directory only.

    The service tells its failures by :meth:`~conchkernel.service.GatewayService.whenStarted`.

    :param reactor: the installed one if not given.
    :raises conchkernel.errors.ConfigurationError: where a value cannot be used.
    """
    if reactor is None:
        from twisted.internet import reactor
    endpoints = [(text, _endpoint(reactor, text)) for text in options["listen"]]
    keys = _hostKeys(options)
    backend = JupyterBackend(
        reactor,
        options["url"],
        state_dir=options["state-dir"],
        kernel_name=options["kernel-name"],
        shell=options["shell"],
        working_dir=options["working-dir"],
        ca_file=options["jupyter-ca"],
        orphan_timeout=options["orphan-timeout"],
        prestart=OWNER if _hasOneKernel(options) else None,
    )
    realm = KernelRealm(
        backend,
        acceptEnv=(*ACCEPT_ENV, *options["accept-env"]),
        kernelPer=options["kernel-per"],
        permissions=options.permissions(),
        files=StoreChoice(
            backend.contents,
            files=Files(options["files"]),
            root=os.fsencode(options["sftp-root"]) if options["sftp-root"] else None,
            readOnly=bool(options["sftp-read-only"]),
        ),
    )
    factory = GatewayFactory(
        Portal(realm, _checkers(options)),
        keys,
        reactor=reactor,
        limits=options.limits(),
        banner=_banner(options["banner"]),
        hostCertificates=[hostkeys.loadCertificate(path) for path in options["host-certificate"]],
        authenticationMethods=options["authentication-methods"] or (),
        algorithms=options.algorithms(),
    )
    for key in keys:
        _log.info("Host key {fingerprint}", fingerprint=hostkeys.fingerprint(key))
    return GatewayService(
        reactor, backend, factory, endpoints, waitForBackend=bool(options["wait-for-jupyter"])
    )


def _checkers(options: Options) -> Sequence[ICredentialsChecker]:
    chosen = options.get("credCheckers")
    if chosen:
        if any(IAnonymous in checker.credentialInterfaces for checker in chosen):
            _log.warn("Anybody who can reach the port gets in: --auth anonymous")
        return [truthful(checker) for checker in chosen]
    paths = options["authorized-keys"] or [Path.home() / ".ssh" / "authorized_keys"]
    checkers: list[Any] = [AuthorizedKeysChecker(paths)]
    token = candidates(options["url"])[0].token
    if token:
        checkers.append(TokenChecker(token))
    return checkers


def _hostKeys(options: Options) -> list[Any]:
    paths = options["host-key"]
    return [hostkeys.load(path) for path in paths] or [hostkeys.loadOrCreate(options["state-dir"])]


def _banner(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            text = file.read(_MAXIMUM_BANNER_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"The banner {path} cannot be read: {error.strerror}.") from error
    if len(text) > _MAXIMUM_BANNER_BYTES:
        raise ConfigurationError(
            f"The banner {path} has more than {_MAXIMUM_BANNER_BYTES} bytes, which is too much."
        )
    return text


def _endpoint(reactor: Any, description: str) -> Any:
    try:
        return serverFromString(reactor, description)
    except Exception as error:  # each kind of endpoint has its own way to complain
        # A TypeError is about the arguments of Twisted's own function, whose name tells nothing.
        reason = re.sub(r"^\w+\(\) ", "", str(error))
        raise ConfigurationError(
            f"--listen {description}: {reason}; one looks like tcp:2222:interface=127.0.0.1"
        ) from error


def _hasOneKernel(options: Options) -> bool:
    """Whether everybody shares one kernel, so that it is known which to start ahead."""
    chosen = options.get("credCheckers", ())
    owned = all(isinstance(checker, AnonymousOwnerChecker) for checker in chosen)
    return owned and options["kernel-per"] == "user"
