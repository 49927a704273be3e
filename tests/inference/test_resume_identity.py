"""A resume continues the same run only: the same code, data, threads, and no carried state."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradrun
from gradrun.core import cpu
from gradrun.core.errors import ConfigError, RunFailed
from gradrun.results.result import InferResult

NET = """
from pathlib import Path

import torch
from torch import nn

from pack.blocks import FACTOR

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(256, 200)

    def forward(self, x):
        from pack import late
        if x[0, 0] == 6 and Path(__file__).with_name("stop").exists():
            raise ValueError("stopped")
        return self.linear(x) * FACTOR * late.FACTOR

class Counter(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x) + self.seen

class Memory(Net):
    hidden = 0.0

    def forward(self, x):
        self.hidden = super().forward(x).mean() + 0.5 * self.hidden
        return self.hidden + x

class Cache(Net):
    table = None
    calls = 0

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(200.0)
        self.calls += 1
        return super().forward(x) + self.table

class Noise(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(1)
"""


class Project:
    """A project folder with code, data and a config; a first run stops after 6 of 10 samples."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = "pack/net.py:Net"

    def create(self) -> None:
        (self.folder / "pack").mkdir(parents=True)
        (self.folder / "pack" / "net.py").write_text(NET)
        for name in ("blocks", "late"):
            (self.folder / "pack" / f"{name}.py").write_text("FACTOR = 1.0\n")
        rows = np.random.default_rng(0).normal(size=(10, 256)).astype(np.float32)
        rows[:, 0] = np.arange(10)
        np.save(self.folder / "x.npy", rows)

    def infer(self, output: str = "out", **keys: Any) -> InferResult:
        for name in [name for name in sys.modules if name.split(".")[0] == "pack"]:
            del sys.modules[name]
        config = {
            "model": {"source": "python", "target": self.target, "root": "."},
            "data": {"source": "arrays", "path": "x.npy", "batch_size": 2},
            "run": {"warmup": 0},
            "measure": {"memory": False},
            "output": {"path": output},
        }
        (self.folder / "c.yaml").write_text(json.dumps(config))
        overrides = {"run.on_error": "stop"} | keys
        resume = (self.folder / output).exists()
        return gradrun.infer(self.folder / "c.yaml", trust_code=True, resume=resume, **overrides)

    def stop(self, **keys: Any) -> None:
        (self.folder / "pack" / "stop").touch()
        with pytest.raises(RunFailed, match="stopped"):
            self.infer(**keys)
        (self.folder / "pack" / "stop").unlink()

    def predictions(self, output: str = "out") -> np.ndarray:
        return np.load(self.folder / output / "predictions.npy")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    made = Project(tmp_path / "project")
    made.create()
    yield made
    for name in [name for name in sys.modules if name.split(".")[0] == "pack"]:
        del sys.modules[name]


def refusal(project: Project, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        project.infer(**keys)
    return str(caught.value)


@pytest.mark.parametrize("target", ["pack/net.py:Net", "pack.net:Net"])
@pytest.mark.parametrize("file", ["net.py", "blocks.py", "late.py"])
def test_a_resume_refuses_an_edited_file_of_the_model_and_names_it(
    project: Project, target: str, file: str
) -> None:
    project.target = target
    project.stop()
    path = project.folder / "pack" / file
    original = path.read_text()
    # Another size, because Python's bytecode cache compares sizes and times in whole seconds.
    path.write_text(original.replace("1.0", "5.00") if file != "net.py" else original + "\n")
    assert f"pack/{file} changed (" in refusal(project)
    path.write_text(original)
    result = project.infer()
    assert result.resumed_at == 6
    project.infer(output="whole")
    assert np.array_equal(project.predictions(), project.predictions("whole"))


def test_a_resume_accepts_data_of_the_same_content_with_another_time(project: Project) -> None:
    project.stop()
    os.utime(project.folder / "x.npy", (1, 1))
    assert project.infer().resumed_at == 6


def test_a_project_that_moved_is_the_same_run(project: Project, tmp_path: Path) -> None:
    project.stop()
    shutil.copytree(project.folder, tmp_path / "moved", copy_function=shutil.copy)
    moved = Project(tmp_path / "moved")
    shutil.rmtree(project.folder)
    assert moved.infer().resumed_at == 6
    moved.infer(output="whole")
    assert np.array_equal(moved.predictions(), moved.predictions("whole"))


def test_a_project_that_moved_and_changed_is_refused(project: Project, tmp_path: Path) -> None:
    project.stop()
    project.folder.rename(tmp_path / "moved")
    moved = Project(tmp_path / "moved")
    rows = np.load(moved.folder / "x.npy")
    np.save(moved.folder / "x.npy", rows + 1)
    assert "x.npy changed (content)" in refusal(moved)


def test_a_resume_with_another_number_of_threads_is_refused_with_both_numbers(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(cpu, "available_cpus", lambda: 1)
    project.stop()
    header = json.loads((project.folder / "out" / "journal.jsonl").read_text().splitlines()[0])
    assert header["config"]["run"]["threads"] == 1
    monkeypatch.setattr(cpu, "available_cpus", lambda: 2)
    assert (
        "run.threads changed from 1 to 2 (predictions depend on it, so set run.threads to 1)"
        in refusal(project)
    )
    assert project.infer(**{"run.threads": 1}).resumed_at == 6


def test_a_resume_with_another_version_of_torch_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.stop()
    installed = torch.__version__
    monkeypatch.setattr("torch.__version__", "1.0.0")
    assert f"torch changed from {installed} to 1.0.0" in refusal(project)


def test_a_variable_of_openmp_sets_the_threads_and_is_stated(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = project.infer()
    assert result.environment.threads == 1
    assert [one.text for one in result.interpretation if one.topic == "threads"] == [
        "1 thread (OMP_NUM_THREADS)"
    ]
    explicit = project.infer(output="other", **{"run.threads": 2})
    assert [one.text for one in explicit.interpretation if one.topic == "threads"] == ["2 threads"]


@pytest.mark.parametrize(("name", "state"), [("Counter", "(seen)"), ("Memory", "(hidden)")])
def test_state_from_batch_to_batch_is_warned_of_and_a_resume_is_refused(
    project: Project, name: str, state: str
) -> None:
    project.target = f"pack/net.py:{name}"
    project.stop()
    text = refusal(project)
    assert f"the model carries state from batch to batch {state}" in text
    assert "overwrite=True" in text
    result = project.infer(output="whole")
    (warning,) = [one for one in result.warnings if one.code == "carries_state"]
    assert state in warning.text
    if name == "Counter":
        rows = project.predictions("whole")
        project.target = "pack/net.py:Net"
        project.infer(output="plain")
        seen = np.repeat([2, 4, 6, 8, 10], 2)[:, None]
        assert np.allclose(rows, project.predictions("plain") + seen, atol=1e-5)


@pytest.mark.parametrize("name", ["Net", "Cache", "Noise"])
def test_caches_counters_and_random_numbers_are_not_state(project: Project, name: str) -> None:
    project.target = f"pack/net.py:{name}"
    project.stop()
    result = project.infer()
    assert result.resumed_at == 6
    assert not [one for one in result.warnings if one.code == "carries_state"]
