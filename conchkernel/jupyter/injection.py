"""What is sent to a kernel so that it can carry an agent: one ``execute_request``.

The sources in :mod:`conchkernel.remote` and :mod:`conchkernel.wire` travel as they are; the first
16 hex digits of their SHA-256 are their version. In the kernel only the relay is run; what it
starts as the agent gets the rest through a pipe.
"""

from __future__ import annotations

import ast
import base64
import functools
import hashlib
import json
import zlib
from importlib import resources
from typing import Any

from conchkernel.errors import KernelUnsupported

_RELAY = "_conchkernel_relay"

#: The agent's modules, in an order in which each finds what it imports.
_AGENT_MODULES = (
    ("conchkernel.frames", "conchkernel", "frames.py"),
    ("conchkernel.wirestream", "conchkernel", "wirestream.py"),
    ("conchkernel.wire", "conchkernel", "wire.py"),
    ("conchkernel.remote.service", "conchkernel.remote", "service.py"),
    ("conchkernel.remote.door", "conchkernel.remote", "door.py"),
    ("conchkernel.remote.pool", "conchkernel.remote", "pool.py"),
    ("conchkernel.remote.addresses", "conchkernel.remote", "addresses.py"),
    ("conchkernel.remote.intake", "conchkernel.remote", "intake.py"),
    ("conchkernel.remote.connection", "conchkernel.remote", "connection.py"),
    ("conchkernel.remote.listening", "conchkernel.remote", "listening.py"),
    ("conchkernel.remote.ttymodes", "conchkernel.remote", "ttymodes.py"),
    ("conchkernel.remote.pump", "conchkernel.remote", "pump.py"),
    ("conchkernel.remote.spawn", "conchkernel.remote", "spawn.py"),
    ("conchkernel.remote.process", "conchkernel.remote", "process.py"),
    ("conchkernel.remote.filewire", "conchkernel.remote", "filewire.py"),
    ("conchkernel.remote.paths", "conchkernel.remote", "paths.py"),
    ("conchkernel.remote.filecalls", "conchkernel.remote", "filecalls.py"),
    ("conchkernel.remote.directory", "conchkernel.remote", "directory.py"),
    ("conchkernel.remote.fileops", "conchkernel.remote", "fileops.py"),
    ("conchkernel.remote.files", "conchkernel.remote", "files.py"),
    ("conchkernel.remote.zmtp", "conchkernel.remote", "zmtp.py"),
    ("conchkernel.remote.carriers", "conchkernel.remote", "carriers.py"),
    ("conchkernel.remote.stdinport", "conchkernel.remote", "stdinport.py"),
    ("conchkernel.remote.home", "conchkernel.remote", "home.py"),
    ("conchkernel.remote.agent", "conchkernel.remote", "agent.py"),
)

#: Runs in the fresh process: makes the modules, takes the compiled pump if it fits, serves.
_BOOT = """
import sys, types
for name in ("conchkernel", "conchkernel.remote"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
sys.modules["conchkernel"].remote = sys.modules["conchkernel.remote"]
for name, source in given.pop("modules"):
    module = sys.modules[name] = types.ModuleType(name)
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, module)
    exec(compile(source, name, "exec"), module.__dict__)
fastpty = given.pop("fastpty", None)
if fastpty:
    try:
        from importlib.machinery import ExtensionFileLoader, ModuleSpec
        from importlib.util import module_from_spec
        loader = ExtensionFileLoader("conchkernel._fastpty", fastpty)
        fast = module_from_spec(ModuleSpec("conchkernel._fastpty", loader, origin=fastpty))
        loader.exec_module(fast)
        pump = sys.modules["conchkernel.remote.pump"]
        if fast.ABI == pump.ABI:
            pump.drain = fast.drain
    except Exception:
        pass
sys.modules["conchkernel.remote.agent"].main(given)
"""

_INSTALL = """
import sys, types, json, zlib, base64
def install(packed, version):
    sources = json.loads(zlib.decompress(base64.b85decode(packed)))
    name = "_conchkernel_relay"
    module = sys.modules.get(name)
    relay = getattr(module, "relay", None)
    if relay is None or not relay.installed or relay.version != version:
        fresh = types.ModuleType(name)
        fresh.relay = relay
        for part in ("starter", "handover"):
            setattr(fresh, part, types.ModuleType(name + "_" + part))
            exec(compile(sources.pop(part), name, "exec"), getattr(fresh, part).__dict__)
        exec(compile(sources.pop("relay"), name, "exec"), fresh.__dict__)
        sys.modules[name] = fresh
        fresh.install(sources, version)
"""


def _source(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text("utf-8")


@functools.cache
def agent_sources() -> dict[str, Any]:
    """What an agent is started with: ``boot`` and ``modules``."""
    modules = [(name, _source(package, file)) for name, package, file in _AGENT_MODULES]
    return {"boot": _BOOT, "modules": modules}


def _everything() -> dict[str, Any]:
    in_the_kernel = {
        name: _source("conchkernel.remote", f"{name}.py")
        for name in ("relay", "starter", "handover")
    }
    return {**in_the_kernel, **agent_sources()}


@functools.cache
def version() -> str:
    """The version of the sources."""
    return hashlib.sha256(json.dumps(_everything()).encode()).hexdigest()[:16]


@functools.cache
def injection() -> dict[str, Any]:
    """The content of the ``execute_request`` that puts the relay into a kernel.

    It leaves no name behind and is idempotent; a relay of another version is replaced.
    """
    packed = base64.b85encode(zlib.compress(json.dumps(_everything()).encode(), 9)).decode()
    code = (
        f"(lambda scope: (exec({_INSTALL!r}, scope), scope['install']({packed!r}, {version()!r})))"
        f"({{'__name__': {_RELAY!r}}}) and None"
    )
    probe = f"__import__('sys').modules[{_RELAY!r}].relay.version"
    return {
        "code": code,
        "silent": True,
        "store_history": False,
        "user_expressions": {"version": probe},
        "allow_stdin": False,
        "stop_on_error": True,
    }


def check(reply: dict[str, Any]) -> None:
    """Read the ``execute_reply`` to :func:`injection`.

    :raises KernelUnsupported: with a sentence, if no relay of our version is in place.
    """
    if reply.get("status") != "ok":
        why = str(reply.get("evalue") or reply.get("ename") or "no reason given")[:300]
        raise KernelUnsupported(
            f"this kernel cannot carry a shell ({why}); choose a Python kernel with --kernel-name"
        )
    try:
        text = reply["user_expressions"]["version"]["data"]["text/plain"]
        found = ast.literal_eval(text)
    except (KeyError, TypeError, ValueError, SyntaxError):
        found = None
    if found != version():
        raise KernelUnsupported(
            "this kernel did not take the relay; choose a Python kernel with --kernel-name"
        )
