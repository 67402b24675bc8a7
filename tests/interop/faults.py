"""What breaks behind a gateway, on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import urllib.request
from typing import TYPE_CHECKING

import psutil

from .conftest import PATIENCE

if TYPE_CHECKING:
    from .conftest import GatewayHost


def kernels_of(host: GatewayHost) -> list[psutil.Process]:
    """The processes that a Jupyter server has started."""
    return psutil.Process(host.jupyter.pid).children(recursive=True)


def stop_for_a_while(host: GatewayHost) -> None:
    """Jupyter stands still, and goes on."""
    pid = host.jupyter.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["sleep", "1.5"], check=True, timeout=PATIENCE)
    finally:
        os.kill(pid, signal.SIGCONT)


def _ask(host: GatewayHost, method: str, path: str) -> bytes:
    request = urllib.request.Request(
        f"{host.jupyter.url}{path}",
        method=method,
        headers={"Authorization": f"token {host.jupyter.token}"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return bytes(answer.read())


def restart_the_kernel(host: GatewayHost) -> None:
    """As a notebook's button does."""
    for kernel in json.loads(_ask(host, "GET", "api/kernels")):
        _ask(host, "POST", f"api/kernels/{kernel['id']}/restart")


def delete_the_kernel(host: GatewayHost) -> None:
    """As the button beside it does."""
    for kernel in json.loads(_ask(host, "GET", "api/kernels")):
        _ask(host, "DELETE", f"api/kernels/{kernel['id']}")


def kill_the_kernel(host: GatewayHost) -> None:
    """And all that it has started."""
    for process in kernels_of(host):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_the_agent(host: GatewayHost) -> None:
    """With all that it runs."""
    host.road().processes["agent"].kill()


def kill_jupyter(host: GatewayHost) -> None:
    """And all that it has started."""
    children = kernels_of(host)
    os.kill(host.jupyter.pid, signal.SIGKILL)
    for process in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
