"""The package as installed by a user: the wheel, in a separate environment and folder."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

import gradrun
from gradrun.results.result import RunResult
from tests.conftest import ROOT, Command


def run(*words: object, **settings: Any) -> str:
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, check=False, **settings
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FOLDERS = ("gradrun", "configs", "models")


# --- the wheel ---------------------------------------------------------------------------------


LEFTOVERS = (
    "configs/runs/digits/result.json",
    "models/__pycache__/mlp.pyc",
    "gradrun/core/__pycache__/units.pyc",
)
"""Files that runs and tools leave in a checkout."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources that also contains leftovers."""
    checkout = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        clean = shutil.ignore_patterns("runs", "__pycache__")
        shutil.copytree(ROOT / folder, checkout / folder, ignore=clean)
    for file in (".gitignore", "LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, checkout)
    for leftover in LEFTOVERS:
        (checkout / leftover).parent.mkdir(parents=True, exist_ok=True)
        (checkout / leftover).touch()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=checkout)
    (built,) = checkout.glob("dist/gradrun-*.whl")
    return built


def test_the_wheel_contains_the_sources_and_no_leftovers(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        str(file.relative_to(ROOT))
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and not {"runs", "__pycache__"} & set(file.parts)
    }
    assert {"gradrun/py.typed", "configs/digits.yaml", "models/digits_cnn.py"} <= sources
    assert names == {
        name if name.startswith("gradrun/") else f"gradrun/_bundled/{name}" for name in sources
    }
    assert wheel.stat().st_size < 2 * 2**20


def test_the_metadata_of_the_wheel_is_complete(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    folder = f"gradrun-{gradrun.__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("gradrun", gradrun.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"Operating System :: POSIX", "Typing :: Typed"} <= {*metadata.get_all("Classifier", [])}
    targets = re.findall(r"\]\(([^)]*)\)", metadata.get_payload())
    assert len(targets) > 20
    assert all(target.startswith("https://") for target in targets), "PyPI has no other files"
    links = [line.partition(", ")[2] for line in metadata.get_all("Project-URL", [])]
    assert "https://github.com/gradrun/gradrun" in links
    commands, plugins = (
        re.findall(rf"\[{group}\]\n(.*)", archive.read(f"{folder}/entry_points.txt").decode())
        for group in ("console_scripts", "pytest11")
    )
    assert commands == ["gradrun = gradrun.cli.app:main"]
    assert plugins == ["gradrun = gradrun.checks.pytest_plugin"]


def required(name: str, extras: tuple[str, ...], seen: set[str]) -> set[str]:
    """Add the names of the installed distributions that one requires, directly or indirectly."""
    for line in distribution(name).requires or ():
        wanted = Requirement(line)
        marker = wanted.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        if wanted.name not in seen:
            seen.add(wanted.name)
            required(wanted.name, tuple(wanted.extras), seen)
    return seen


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel beside links to what it requires only; return the bin folder."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder)
    commands = folder / "bin"
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in required("gradrun", (), set()):
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top not in {"..", "__pycache__"} and not (packages / top).exists():
                (packages / top).symlink_to(distribution(name).locate_file(top))
    pip = (sys.executable, "-m", "pip", "--python", commands / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return commands


def test_the_installed_wheel_classifies_digits_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shown = run(
        installed / "gradrun", "infer", "--example", "digits", cwd=tmp_path, env=environment
    )
    assert "500 predictions" in shown
    assert [file.name for file in tmp_path.iterdir()] == ["runs"]
    folder = tmp_path / "runs" / "digits"
    answers = np.load(folder / "predictions.npy")
    labels = np.load(ROOT / "configs" / "digits.npz")["labels"]
    assert answers.shape == labels.shape == (500,)
    assert (answers == labels).mean() >= 0.97
    assert RunResult.load(folder).measurements[0].samples == 500


# --- the public names --------------------------------------------------------------------------


def test_importing_gradrun_imports_neither_torch_nor_pydantic() -> None:
    heavy = ("torch", "pydantic", "numpy", "rich", "typer", "yaml")
    script = f"import sys, gradrun; print([name for name in {heavy} if name in sys.modules])"
    assert run(sys.executable, "-c", script, cwd=ROOT) == "[]\n"


@pytest.mark.parametrize("name", gradrun.__all__)
def test_a_public_name_can_be_imported_and_is_listed_by_dir(name: str) -> None:
    assert getattr(gradrun, name).__name__.removeprefix("gradrun.") == name
    assert name in dir(gradrun)


def test_every_public_name_has_a_module() -> None:
    assert set(gradrun._MODULES) == set(gradrun.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'infr'"):
        _ = gradrun.infr  # type: ignore[attr-defined]


def test_python_m_gradrun_is_the_command(process: Command) -> None:
    answer = process("--version")
    assert (answer.code, answer.out, answer.err) == (0, f"gradrun {gradrun.__version__}\n", "")
