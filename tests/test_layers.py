"""Who may import whom, as a table, and the source tree held against it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import conchkernel

PACKAGE = Path(__file__).parent.parent / "conchkernel"

#: The wire is three modules: bytes, one stream, a session of many.
WIRE = {"frames", "wirestream", "wire"}

#: Part of the house -> the other parts it may name. The two columns, ``ssh`` and ``jupyter``,
#: never name each other. A new module needs a line here, which is the moment to think about it.
MAY_IMPORT: dict[str, set[str]] = {
    # shared ground
    "errors": set(),
    "interfaces": {"errors", "files"},
    "files": {"errors"},
    "allocator": set(),
    "frames": set(),
    "wirestream": {"frames"},
    "wire": {"frames", "wirestream"},
    "tcp": set(),
    # what is sent to the kernel's host
    "remote": {*WIRE, "_fastpty"},
    # the columns
    "ssh": {"errors", "interfaces", "files", "tcp"},
    "jupyter": {"errors", "interfaces", "files", "tcp", *WIRE, "remote"},
    # the joints
    "avatars": {"errors", "interfaces", "files", "ssh"},
    "sftp": {"errors", "interfaces", "files", "localfiles", "ssh"},
    # files of this machine, and stores around stores
    "localfiles": {"errors", "files"},
    "memoryfiles": {"errors", "files"},
    "filepolicies": {"errors", "files"},
    "stores": {"errors", "files", "filepolicies", "avatars"},
    # a backend without Jupyter, on the kernel column's own link
    "loopback": {
        "allocator", "errors", "interfaces", "files", *WIRE, "remote", "jupyter", "_fastpty",
    },
    # a backend without a kernel: the agent's programs on the gateway's own reactor
    "localbackend": {
        "errors", "interfaces", "files", "localfiles", "filepolicies", *WIRE, "remote", "jupyter",
        "_fastpty",
    },
    # the public test kit
    "testing": {"errors", "interfaces", "files", "avatars", "ssh"},
    # the edges
    "service": {"errors"},
    "values": {"ssh"},
    "names": {"errors"},
    "options": {"errors", "names", "values", "ssh", "jupyter"},
    "tap": {"errors", "stores", "options", "service", "avatars", "ssh", "jupyter"},
    "process": {"allocator", "errors", "service", "tap"},
    "demo": {
        "allocator", "errors", "stores", "service", "avatars", "sshconfig", "ssh", "jupyter",
    },
    # one user's own ssh, without a daemon
    "pipes": set(),
    "attachment": {"errors", "interfaces", "names", "jupyter"},
    "pipedconnection": {"errors", "names", "pipes", "stores", "attachment", "avatars", "ssh"},
    "proxycommand": {"allocator", "errors", "names", "attachment", "pipedconnection", "ssh"},
    "foreground": {"errors"},
    "sshconfig": {"errors"},
    "configssh": {"errors", "names", "foreground", "sshconfig", "ssh", "jupyter"},
    "doctor": {
        "errors", "interfaces", "names", "foreground", "attachment", "sshconfig", "configssh",
        "ssh", "jupyter",
    },
    "cli": {"demo", "proxycommand", "configssh", "doctor"},
    "": {"errors", "service", "avatars", "ssh", "jupyter"},
}

#: Parts that are sent to a host where nothing is installed, or could be.
STANDARD_LIBRARY_ONLY = {*WIRE, "remote", "errors"}

#: Parts that are sent there.
SENT = {*WIRE, "remote"}

#: The edges: whoever else needs the reactor is given it.
MAY_IMPORT_THE_REACTOR = {"tap", "process", "demo", "proxycommand", "foreground", "cli"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def part(name: str) -> str:
    """``conchkernel.ssh.channel`` -> ``ssh``; the package itself -> the empty string."""
    return [*name.split("."), ""][1]


def moduleName(path: Path) -> str:
    """The dotted name of a source file."""
    words = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def importsOf(path: Path) -> list[tuple[str, int]]:
    """Every module that a file names in an import, wherever it stands, with its line."""
    own = moduleName(path).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name == "conchkernel" or name in ("twisted.internet", "conchkernel.remote"):
                # `from package import module` names the module, unless it is a plain name. The
                # version is everybody's.
                found += [
                    (_resolve(name, alias.name), node.lineno)
                    for alias in node.names
                    if alias.name != "__version__"
                ]
            else:
                found.append((name, node.lineno))
    return found


def _resolve(package: str, name: str) -> str:
    if package == "twisted.internet":
        return f"{package}.{name}"
    home = PACKAGE.parent.joinpath(*package.split("."), name)
    known = home.is_dir() or home.with_suffix(".py").exists() or home.with_suffix(".pyx").exists()
    return f"{package}.{name}" if known else package


@pytest.mark.parametrize("path", MODULES, ids=moduleName)
def test_importsAreAllowed(path: Path) -> None:
    """A module names only its own part of the house, what the table allows, and other packages."""
    own = part(moduleName(path))
    assert own in MAY_IMPORT, f"{moduleName(path)} has no line in the table"
    wrong = [
        f"{path.name}:{line} imports {name}"
        for name, line in importsOf(path)
        if name.split(".")[0] == "conchkernel" and part(name) not in MAY_IMPORT[own] | {own}
    ]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=moduleName)
def test_onlyEdgesImportTheReactor(path: Path) -> None:
    """The reactor is a parameter everywhere but at the edges."""
    if part(moduleName(path)) in MAY_IMPORT_THE_REACTOR:
        return
    assert "twisted.internet.reactor" not in [name for name, _ in importsOf(path)]


@pytest.mark.parametrize("path", MODULES, ids=moduleName)
def test_sentModulesUseTheStandardLibraryOnly(path: Path) -> None:
    """What runs on the kernel's host imports nothing that would have to be installed there."""
    if part(moduleName(path)) not in STANDARD_LIBRARY_ONLY:
        return
    foreign = {name.split(".")[0] for name, _ in importsOf(path)}
    # The relay lives inside ipykernel, which brings these.
    allowed = sys.stdlib_module_names | {"conchkernel", "ipykernel", "zmq", "IPython", "tornado"}
    assert foreign <= allowed


def test_sentModulesRunOnAnOldPython() -> None:
    """Kernels are not as new as gateways: what is sent to them is content with Python 3.8."""
    sent = [path for path in MODULES if part(moduleName(path)) in SENT]
    # Each is looked for before it is used.
    beyond = ["--exclude", "os.pidfd_open", "--exclude", "fcntl.F_SETPIPE_SZ"]
    vermin = Path(sys.executable).with_name("vermin")
    command = [vermin, "-t=3.8-", "--no-tips", "-vvv", *beyond, *sent]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert not [
        f"{path.name}:{node.lineno}"
        for path in sent
        for node in _evaluated(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Subscript) and generic(node)
    ]


def _evaluated(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of what runs: no annotations, and nothing that is for type checkers alone."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            yield node
            yield from _evaluated(node)


def generic(node: ast.Subscript) -> bool:
    """Whether it is ``list[int]`` or its like, which is an error before Python 3.9."""
    types = {"dict", "frozenset", "list", "set", "tuple", "type", "Callable", "deque"}
    return ast.unparse(node.value) in types


def test_tableNamesWhatExists() -> None:
    """The table keeps no line for a part that is gone, but for those that are announced."""
    existing = {part(moduleName(path)) for path in MODULES}
    assert set(MAY_IMPORT) - existing <= {"sftp"}


@pytest.mark.parametrize("name", ["__version__", "JupyterBackend", "Limits", "JupyterError"])
def test_importingThePackageInstallsNoReactor(name: str) -> None:
    """An application that embeds us may still choose its reactor. (Conch's own modules import
    it, and so does what subclasses them; hence nothing is loaded before it is asked for.)"""
    program = (
        "import sys, conchkernel\n"
        f"conchkernel.{name}\n"
        "sys.exit('twisted.internet.reactor' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_everyPublicNameIsThere() -> None:
    """What the package offers can be had."""
    assert all(getattr(conchkernel, name) for name in conchkernel.__all__)
    assert set(conchkernel.__all__) <= set(dir(conchkernel))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = conchkernel.nonsense
