"""Run by a test: a kernel on another host by sshpyk, from its start to its end.

Prints a line for each thing that worked.
"""

from __future__ import annotations

import sys
from queue import Empty
from typing import Any

from jupyter_client.manager import KernelManager

PATIENCE = 60


def output(client: Any, message_id: str) -> str:
    """What a request printed or failed with, until the kernel is idle again."""
    said = ""
    while True:
        message = client.get_iopub_msg(timeout=PATIENCE)
        if message["parent_header"].get("msg_id") != message_id:
            continue
        content = message["content"]
        said += content.get("text", "") + content.get("ename", "")
        if content.get("execution_state") == "idle":
            return said


def ready(manager: KernelManager) -> Any:
    """A client of a kernel that answers."""
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=PATIENCE)
    return client


def main() -> None:
    manager = KernelManager(kernel_name=sys.argv[1])
    manager.start_kernel()
    try:
        client = ready(manager)
        code = "import os; here = 42; print(os.getpid(), os.environ.get('SSH_CONNECTION'))"
        print("started", output(client, client.execute(code)).strip(), flush=True)
        looping = client.execute("print('loops', flush=True)\nwhile True: pass")
        while client.get_iopub_msg(timeout=PATIENCE)["content"].get("text") != "loops\n":
            pass
        manager.interrupt_kernel()
        print("interrupted", output(client, looping), flush=True)
        print("kept", output(client, client.execute("print(here)")).strip(), flush=True)
        client.stop_channels()
        manager.restart_kernel()
        client = ready(manager)
        said = output(client, client.execute("import os; print(os.getpid()); print(here)"))
        print("restarted", *said.split(), flush=True)
        client.stop_channels()
    except Empty:
        print("no answer", flush=True)
    finally:
        manager.shutdown_kernel()
    print("ended", flush=True)


main()
