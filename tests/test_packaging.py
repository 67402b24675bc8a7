"""What is installed is what was written: the plugin found from anywhere, the extension optional."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import conchkernel

ROOT = Path(__file__).parent.parent

#: What a build reads. A copy keeps build/ and *.egg-info out of the working tree.
SOURCES = ("conchkernel", "twisted", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, directory: Path, **environment: str) -> str:
    """What a command says; if it fails, that is what the test says."""
    result = subprocess.run(
        command,
        cwd=directory,
        env={"PATH": os.environ["PATH"], "HOME": str(directory), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        pytest.fail(result.stdout, pytrace=False)
    return result.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree without what was built in it."""
    tree = tmp_path_factory.mktemp("sources")
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.c", "dropin.cache")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, tree / name, ignore=built)
        else:
            shutil.copy(path, tree / name)
    return tree


def build(sources: Path, out: Path, **environment: str) -> Path:
    """Build a wheel with what is installed here; that needs no network."""
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"),
        *("--no-build-isolation", "--wheel-dir", out, sources),
        directory=sources,
        **environment,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def pureWheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built where there is no compiler."""
    return build(sources, tmp_path_factory.mktemp("pure"), CC="/bin/false", CXX="/bin/false")


def makeEnvironment(directory: Path) -> Path:
    """The python of a new venv that sees our dependencies, and not our own installation."""
    run(sys.executable, "-m", "venv", "--without-pip", directory, directory=directory.parent)
    place = Path(
        sysconfig.get_path("purelib", "venv", vars={"base": str(directory)})
    )
    # An editable installation is a .pth file, and those are not read by way of another .pth.
    (place / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    """pip install, into the venv of ``python``, without looking at an index."""
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", *what),
        directory=python.parent,
    )


def assertCommandsWork(python: Path, elsewhere: Path) -> None:
    """``twistd``, ``twist`` and our own command know us, from a directory with nothing in it."""
    elsewhere.mkdir()
    for module, runner in (("scripts.twistd", "run"), ("application.twist._twist", "Twist.main")):
        name = runner.split(".", 1)[0]
        program = f"from twisted.{module} import {name}; import sys; sys.argv[0] = 'it'; {runner}()"
        shown = run(python, "-P", "-c", program, "conchkernel", "--help", directory=elsewhere)
        assert "--jupyter-url" in shown
    shown = run(python.with_name("conchkernel"), "--version", directory=elsewhere)
    assert shown.startswith("conchkernel ")
    assert not list(elsewhere.iterdir())


def test_wheelWithoutACompiler(pureWheel: Path) -> None:
    """The wheel is whole but for the extension, and adds one file to Twisted's directory."""
    names = zipfile.ZipFile(pureWheel).namelist()
    assert not [name for name in names if name.endswith((".so", ".c"))]
    assert [name for name in names if name.startswith("twisted/")] == [
        "twisted/plugins/conchkernel_plugin.py"
    ]
    for path in ROOT.joinpath("conchkernel").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert "conchkernel/py.typed" in names
    assert conchkernel.__version__ in pureWheel.name


def test_wheelInstalled(pureWheel: Path, tmp_path: Path) -> None:
    """From a wheel, everything is found, and the pure twin serves."""
    python = makeEnvironment(tmp_path / "venv")
    install(python, pureWheel)
    assertCommandsWork(python, tmp_path / "elsewhere")
    program = "import importlib.util as u; print(u.find_spec('conchkernel._fastpty'))"
    assert run(python, "-P", "-c", program, directory=tmp_path) == "None\n"


def test_editableInstalled(sources: Path, tmp_path: Path) -> None:
    """From a working tree, everything is found too."""
    tree = tmp_path / "tree"
    shutil.copytree(sources, tree)
    python = makeEnvironment(tmp_path / "venv")
    install(python, "-e", tree)
    assertCommandsWork(python, tmp_path / "elsewhere")
