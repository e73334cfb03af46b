"""The wheel holds the package, once and whole, and works away from the repository."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import hbat_lightning

ROOT = Path(__file__).parents[1]

DATA = {"hbat_lightning/py.typed", *(f"hbat_lightning/comparison/page.{kind}" for kind in ("css", "js"))}

# Imports every module, says where each came from, and loads the command. Runs with the wheel's folder in front of
# site-packages, where an editable install may offer the same names: hence the question where they came from.
_IMPORT = """
import importlib, importlib.metadata, json, sys
folder, modules = sys.argv[1], sys.argv[2:]
sys.path.insert(0, folder)
files = {name: importlib.import_module(name).__file__ for name in modules}
(found,) = importlib.metadata.distributions(path=[folder])
command = next(point for point in found.entry_points if point.name == "hbat").load()
print(json.dumps({"files": files, "command": command.__module__ + ":" + command.__qualname__}))
"""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def source_modules() -> set[str]:
    """Paths inside an installation of every module in the tree."""
    package, callbacks = (
        {path.relative_to(ROOT).as_posix() for path in (ROOT / name).rglob("*.py")}
        for name in ("hbat_lightning", "callbacks")
    )
    package = {name for name in package if not name.startswith("hbat_lightning/callbacks/")}  # the link for editors
    return package | {f"hbat_lightning/{name}" for name in callbacks}


def module_name(path: str) -> str:
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


@pytest.fixture(scope="module", params=["as cloned", "with the link for editors"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the tree: a build writes into the tree, and stale files there end in the next wheel."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "callbacks", tree / "callbacks", ignore=ignore)
    shutil.copytree(ROOT / "hbat_lightning", tree / "hbat_lightning", ignore=ignore, symlinks=True)
    link = tree / "hbat_lightning" / "callbacks"
    link.unlink(missing_ok=True)
    if request.param != "as cloned":
        link.symlink_to("../callbacks")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return zipfile.ZipFile(built)


def test_wheel_holds_every_module_once_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert len(names) == len(set(names))
    info = f"hbat_lightning-{hbat_lightning.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"hbat_lightning", info}  # no callbacks/, no tests/
    package = {name for name in names if not name.startswith(info)}
    assert package == source_modules() | DATA
    assert [name for name in names if name.endswith("/ewc.py")] == ["hbat_lightning/callbacks/ewc.py"]
    assert f"{info}/licenses/LICENSE" in names
    assert b"hbat = hbat_lightning.cli:main" in wheel.read(f"{info}/entry_points.txt")


def test_every_module_of_the_wheel_imports_elsewhere(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    wheel.extractall(folder)
    # __main__ is imported like the rest: it must do nothing unless it is run.
    modules = sorted(module_name(name) for name in wheel.namelist() if name.endswith(".py"))
    command = [sys.executable, "-I", "-c", _IMPORT, str(folder), *modules]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["command"] == "hbat_lightning.cli:main"
    assert set(told["files"]) == set(modules)
    for name, file in told["files"].items():
        assert Path(file).is_relative_to(folder), f"{name} was imported from {file}"


def test_listed_packages_are_those_of_the_tree() -> None:
    settings = project()["tool"]["setuptools"]
    folders = {str(PurePosixPath(path).parent).replace("/", ".") for path in source_modules()}
    assert sorted(settings["packages"]) == sorted(folders)
    for folder in folders:
        assert f"{folder.replace('.', '/')}/__init__.py" in source_modules(), f"{folder} has no __init__.py"


def test_callbacks_cannot_be_imported_under_a_second_name() -> None:
    done = subprocess.run([sys.executable, "-c", "import callbacks"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("ImportError: import hbat_lightning.callbacks;")


def test_version_stands_in_one_piece() -> None:
    version = project()["project"]["version"]
    assert version == hbat_lightning.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
