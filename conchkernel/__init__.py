"""SSH to any Jupyter: what other applications import.

Nothing is loaded before it is asked for, and this module does not import the reactor. Conch's
own modules do, so an application that wants another reactor installs it before the first name of
the SSH side. ``docs/embedding.md`` shows the parts at work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conchkernel.avatars import KernelRealm
    from conchkernel.errors import ConchKernelError, ConfigurationError, JupyterError
    from conchkernel.jupyter.backends import JupyterBackend
    from conchkernel.service import GatewayService
    from conchkernel.ssh.checkers import AuthorizedKeysChecker, TokenChecker
    from conchkernel.ssh.factory import GatewayFactory
    from conchkernel.ssh.limits import Limits

__version__ = "0.1.0"

_HOMES = {
    "AuthorizedKeysChecker": "conchkernel.ssh.checkers",
    "ConchKernelError": "conchkernel.errors",
    "ConfigurationError": "conchkernel.errors",
    "GatewayFactory": "conchkernel.ssh.factory",
    "GatewayService": "conchkernel.service",
    "JupyterBackend": "conchkernel.jupyter.backends",
    "JupyterError": "conchkernel.errors",
    "KernelRealm": "conchkernel.avatars",
    "Limits": "conchkernel.ssh.limits",
    "TokenChecker": "conchkernel.ssh.checkers",
}

__all__ = [  # noqa: RUF022 - in the order of use
    "JupyterBackend",
    "KernelRealm",
    "AuthorizedKeysChecker",
    "TokenChecker",
    "GatewayFactory",
    "GatewayService",
    "Limits",
    "ConchKernelError",
    "ConfigurationError",
    "JupyterError",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Load the home of ``name`` at its first use (PEP 562)."""
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
