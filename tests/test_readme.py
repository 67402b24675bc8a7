"""What README.md and the guides show is what works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.task import deferLater
from twisted.internet.utils import getProcessOutputAndValue

if TYPE_CHECKING:
    from tests.conftest import LocalJupyter

ROOT = Path(__file__).parent.parent

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a language in a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_linksLeadSomewhere(path: Path) -> None:
    """A relative link names a file that exists."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_readmeAndGuideShowTheSame() -> None:
    """The six lines in the README are those of the guide, which a test runs."""
    (lines,) = blocks(ROOT / "README.md", "python")
    assert lines.strip() in blocks(ROOT / "docs" / "embedding.md", "python")[0]
    assert len(lines.strip().splitlines()) == 6


def test_makeTargetsExist() -> None:
    """Every ``make`` word in the README is a target."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {
        word
        for block in blocks(ROOT / "README.md", "sh")
        for word in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)
    }
    assert used == {"demo", "test"}
    assert used <= targets


def shown(path: Path) -> dict[str, Any]:
    """What the Python blocks of a file define, one after another."""
    names: dict[str, Any] = {}
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), names)
    return names


def sshKey(directory: Path) -> tuple[Path, Path]:
    """A new client key: the private file, and one that authorizes it."""
    private = directory / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", private], check=True)
    return private, private.with_suffix(".pub")


async def sshSays(port: int, key: Path, command: str) -> tuple[bytes, bytes, int]:
    """What a command says through the real client, and its status."""
    arguments = [
        *("-F", "none", "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"),
        *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
        *("-o", "LogLevel=ERROR", "-p", str(port), "anybody@127.0.0.1", command),
    ]
    return await getProcessOutputAndValue("/usr/bin/env", ["ssh", *arguments], os.environ)


@pytest_twisted.ensureDeferred
async def test_embeddingExample(tmp_path: Path, localJupyter: LocalJupyter) -> None:
    """The guide's lines make a gateway that lets its owner in, and take it away again."""
    names = shown(ROOT / "docs" / "embedding.md")
    private, authorized = sshKey(tmp_path)
    endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1")
    backend, port = await names["serveKernels"](
        reactor, localJupyter.url, tmp_path / "state", authorized, endpoint
    )
    try:
        said = await sshSays(port.getHost().port, private, "echo here; exit 3")
        assert said == (b"here\n", b"", 3)
    finally:
        await names["stopServing"](backend, port)
    assert not localJupyter.ask("api/kernels")


@pytest_twisted.ensureDeferred
async def test_serviceExample(tmp_path: Path, localJupyter: LocalJupyter) -> None:
    """So does the service of the guide, which owns both."""
    names = shown(ROOT / "docs" / "embedding.md")
    private, authorized = sshKey(tmp_path)
    backend = names["JupyterBackend"](reactor, localJupyter.url, state_dir=tmp_path / "state")
    portal = names["Portal"](
        names["KernelRealm"](backend), [names["AuthorizedKeysChecker"]([authorized])]
    )
    hostKey = names["hostkeys"].loadOrCreate(tmp_path / "state")
    factory = names["GatewayFactory"](portal, [hostKey], reactor=reactor)
    endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1")
    service = names["makeGateway"](reactor, backend, factory, endpoint)
    service.startService()
    try:
        await service.whenStarted()
        (port,) = service.ports
        assert await sshSays(port.getHost().port, private, "true") == (b"", b"", 0)
    finally:
        await service.stopService()
    assert not localJupyter.ask("api/kernels")


@pytest_twisted.ensureDeferred
async def test_hostExample(tmp_path: Path) -> None:
    """And the door to this host leads to it."""
    names = shown(ROOT / "docs" / "embedding.md")
    private, authorized = sshKey(tmp_path)
    endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1")
    backend, port = await names["serveThisHost"](reactor, tmp_path / "state", authorized, endpoint)
    try:
        said = await sshSays(port.getHost().port, private, "echo here; exit 3")
        assert said == (b"here\n", b"", 3)
    finally:
        await names["stopServing"](backend, port)


async def shell(program: str, environment: dict[str, str]) -> tuple[bytes, bytes, int]:
    """What a shell makes of some lines, each of which must work."""
    return await getProcessOutputAndValue("/bin/sh", ["-ec", program], environment)


@pytest_twisted.ensureDeferred
async def test_twoCommandsWithoutADaemon(localJupyter: LocalJupyter) -> None:
    """README's lines for a name, as they stand: then ``ssh lab`` is a shell over there, doctor is
    content, and ``--remove`` takes everything back. (Only the account's ``~/.ssh`` is spared.)"""
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## For yourself alone")[2].partition("\n## ")[0]
    (lines,) = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    doctor, remove = re.findall(r"`(\.venv/bin/conchkernel [^`]+)`", section)
    home = Path(tempfile.mkdtemp(prefix="ck-"))
    config = home / "config"
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    wrapper = home / ".venv" / "bin" / "conchkernel"
    wrapper.parent.mkdir(parents=True)
    installed = Path(sys.executable).with_name("conchkernel")
    wrapper.write_text(
        f"#!/bin/sh\ncase $1 in config-ssh) yes=--yes;; esac\n"
        f'exec {installed} "$@" $yes --ssh-config {config}\n'
    )
    wrapper.chmod(0o700)
    begin = f'cd {home}\nssh() {{ command ssh -F {config} "$@"; }}\n'
    url = re.search(r"'(http[^']*)'", lines)
    assert url is not None
    lines = lines.replace(url[1], localJupyter.url)
    try:
        assert "ssh lab\n" in lines
        typed = "printf 'echo $PPID is the agent\\n' | ("
        out, err, status = await shell(f"{begin}{typed}\n{lines})\n", environment)
        assert (status, b"is the agent" in out) == (0, True), err
        out, err, status = await shell(f"{begin}{doctor}\n", environment)
        assert (status, err) == (0, b""), out
        out, err, status = await shell(f"{begin}{remove}\n", environment)
        assert status == 0, err
        assert not config.exists()
        assert not list(home.rglob("lab"))
        while localJupyter.ask("api/kernels"):
            await deferLater(reactor, 0.1)
    finally:
        shutil.rmtree(home)
