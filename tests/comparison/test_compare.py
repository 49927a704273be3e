"""`gradrun compare` and `gradrun.compare`: arguments, errors and results.

Most tests replace the workers; two real comparisons cover the rest.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradrun
from gradrun.comparison import session
from gradrun.comparison.session import SessionData
from gradrun.core.errors import ConfigError
from gradrun.report.document import describe
from gradrun.results.ratios import compare_measured
from gradrun.results.result import RunResult
from tests.conftest import ROOT, Answer, Command, run_cli
from tests.support.forked import forked_children
from tests.support.run_results import MACHINE, measurement
from tests.support.workers import in_process_workers

ALL = ["grad", "no_grad", "inference_mode"]

YAML = """\
model: {source: zoo, name: mlp, args: {width: 4, depth: 1}}
data: {source: synthetic, inputs: {x: {shape: [4]}}, samples: 64, batch_size: 8}
run: {threads: 1}
measure: {processes: 2, budget: 2}
output: {path: runs/out}
"""


@dataclass
class Requests:
    """The sessions that would have been run."""

    sessions: list[Any]

    @property
    def names(self) -> list[str]:
        (session,) = self.sessions
        return [variant.name for variant in session.variants]

    @property
    def configs(self) -> list[dict[str, Any]]:
        return [variant.config.model_dump(mode="json") for variant in self.sessions[0].variants]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    """Replace the workers by fixed measurements."""
    requests = Requests([])

    def run(session: Any, progress: Any = None) -> SessionData:
        requests.sessions.append(session)
        measured = [
            measurement(5, last=4, variant=v.name, mode=v.config.run.mode, process=process)
            for v in session.variants
            for process in range(2)
        ]
        return SessionData(
            measurements=measured,
            comparisons=compare_measured(measured, 0.01),
            environment=MACHINE,
        )

    monkeypatch.setattr(session.Session, "run", run)
    return requests


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which contains only c.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(YAML)
    return tmp_path


# --- forms of the command ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("c.yaml", ALL),
        ("c.yaml --modes", ALL),
        ("--modes c.yaml", ALL),
        ("c.yaml --modes grad,inference_mode", ["grad", "inference_mode"]),
        ("--modes grad,inference_mode c.yaml", ["grad", "inference_mode"]),
        ("c.yaml --modes=no_grad,grad", ["no_grad", "grad"]),
        ("c.yaml --modes grad --modes no_grad", ["grad", "no_grad"]),
        ("--modes grad c.yaml --modes no_grad", ["grad", "no_grad"]),
        ("c.yaml --modes --quiet", ALL),
        ("--modes --set run.threads=1 c.yaml", ALL),
        ("c.yaml --modes grad,grad", ["grad", "grad again"]),
        ("c.yaml --modes no_grad,no_grad,no_grad", ["no_grad", "no_grad again"]),
        ("c.yaml --over run.threads=1,2", ["run.threads=1", "run.threads=2"]),
        ("--over run.threads=1,1 c.yaml", ["run.threads=1", "run.threads=1 again"]),
        ("c.yaml --over run.mode=grad,no_grad", ["grad", "no_grad"]),
        ("c.yaml --over model.args.width=4,8", ["model.args.width=4", "model.args.width=8"]),
    ],
)
def test_every_form_compares_the_named_variants_in_order(
    cli: Command, requests: Requests, words: str, names: list[str]
) -> None:
    answer = cli("compare", *words.split())
    assert answer.code == 0, answer.text
    assert requests.names[: len(names)] == names
    assert len(set(requests.names)) == len(requests.names)
    assert all(config["model"]["name"] == "mlp" for config in requests.configs)


@pytest.mark.parametrize("words", ["--modes", ""])
def test_the_bundled_digits_are_compared_without_a_config(
    cli: Command, requests: Requests, folder: Path, words: str
) -> None:
    (folder / "c.yaml").unlink()
    answer = cli("compare", *words.split())
    assert answer.code == 0, answer.text
    assert requests.names == ALL
    assert {config["model"]["name"] for config in requests.configs} == {"digits_cnn"}
    assert (folder / "runs" / "digits-compare" / "result.json").is_file()


def test_variants_differ_only_in_the_compared_key(cli: Command, requests: Requests) -> None:
    cli("compare", "c.yaml", "--over", "run.threads=1,2", "--set", "run.seed=5")
    one, two = requests.configs
    assert (one["run"].pop("threads"), two["run"].pop("threads")) == (1, 2)
    assert one == two
    assert one["run"]["seed"] == 5


def test_the_first_is_the_baseline(cli: Command, requests: Requests) -> None:
    answer = cli("compare", "c.yaml", "--modes", "no_grad,grad,inference_mode", "--json", "-")
    found = json.loads(answer.out)["comparisons"]
    assert [(c["baseline"], c["candidate"]) for c in found] == [
        ("no_grad", "grad"),
        ("no_grad", "inference_mode"),
    ]


# --- invalid requests ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("c.yaml --modes grad,no_gard", ["no_gard", "did you mean", "no_grad"]),
        ("c.yaml --modes inference", ["inference", "did you mean", "inference_mode"]),
        ("c.yaml --modes grad", ["two values of run.mode"]),
        ("c.yaml --over output.path=a,b", ["output.path", "does not affect the measurement"]),
        ("c.yaml --over run.threads=1,2 --over run.seed=1,2", ["only once"]),
        ("c.yaml --over run.thread=1,2", ["run.thread", "did you mean", "threads"]),
        ("c.yaml --over run.threads=1,two", ["run.threads", "two"]),
        ("c.yaml --over run.threads", ["--over run.threads", "run.threads=1,2"]),
        ("c.yaml --over run.threads=1", ["--over", "key=a,b"]),
        ("c.yaml --over run.threads=1,2 --modes grad,no_grad", ["--over", "--modes", "one"]),
        ("c.yaml --set run.thread=1", ["run.thread", "did you mean"]),
        ("c.yaml --set measure.processes=1", ["measure.processes", "2"]),
        ("missing.yaml --modes", ["missing.yaml"]),
        ("c.yaml --json no/such/folder.json", ["no/such"]),
    ],
)
def test_an_invalid_request_is_reported_before_anything_runs(
    cli: Command, requests: Requests, folder: Path, words: str, expected: list[str]
) -> None:
    answer = cli("compare", *words.split())
    assert answer.code == 2
    assert answer.out == ""
    assert all(word in answer.err.lower() for word in expected), answer.err
    assert "Traceback" not in answer.err
    assert not requests.sessions
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("run", [gradrun.compare, gradrun.check, gradrun.infer])
def test_a_model_of_the_running_program_is_reported_before_anything_runs(
    requests: Requests, folder: Path, run: Any
) -> None:
    """Worker processes cannot import it; infer without an engine can."""
    written = {
        "model": {"source": "python", "target": "__main__:Net"},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 8},
        "output": {"path": "runs/out"},
    }
    if run is gradrun.infer:
        written["engine"] = {"source": "processes", "workers": 2}
    with pytest.raises(ConfigError) as caught:
        run(written, trust_code=True)
    assert "model.target" in str(caught.value)
    assert "exists only in the running program" in str(caught.value)
    assert "set model.target to net.py:Net" in str(caught.value)
    assert not requests.sessions
    assert not (folder / "runs").exists()


def test_a_file_at_the_path_of_the_result_folder_is_reported_before_anything_runs(
    cli: Command, requests: Requests, folder: Path
) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "out-compare").touch()
    assert cli("compare", "c.yaml").code == 2
    assert not requests.sessions


# --- results -------------------------------------------------------------------------------------


def test_stdout_contains_only_json_with_json_dash(
    cli: Command, requests: Requests, folder: Path
) -> None:
    answer = cli("compare", "c.yaml", "--json", "-")
    result = RunResult.from_json(answer.out)
    assert result == RunResult.load(folder / "runs" / "out-compare")
    assert (result.kind, len(result.comparisons)) == ("compare", 2)
    assert "inference_mode" in answer.err


def test_json_is_written_to_a_file(cli: Command, requests: Requests, folder: Path) -> None:
    answer = cli("compare", "c.yaml", "--json", "here.json")
    assert RunResult.load(folder / "here.json").kind == "compare"
    assert "inference_mode" in answer.out


def test_quiet_prints_nothing(cli: Command, requests: Requests, folder: Path) -> None:
    assert cli("compare", "c.yaml", "--quiet").text == ""
    assert (folder / "runs" / "out-compare" / "result.json").is_file()


def test_an_earlier_run_of_infer_is_not_modified(
    cli: Command, requests: Requests, folder: Path
) -> None:
    assert cli("infer", "c.yaml", "--quiet").code == 0
    before = {path: path.read_bytes() for path in (folder / "runs" / "out").iterdir()}
    assert cli("compare", "c.yaml").code == 0
    assert cli("compare", "c.yaml").code == 0, "compare can be repeated"
    assert {path: path.read_bytes() for path in (folder / "runs" / "out").iterdir()} == before


def test_the_function_takes_modes_and_overrides(requests: Requests, folder: Path) -> None:
    compared = gradrun.compare("c.yaml", ["no_grad", gradrun.GradMode.GRAD], run={"seed": 3})
    assert requests.names == ["no_grad", "grad"]
    assert {config["run"]["seed"] for config in requests.configs} == {3}
    assert [type(c) for c in compared] == [gradrun.Comparison]
    assert compared.result.comparisons == tuple(compared)


def test_the_function_compares_along_any_key_with_values_of_any_type(requests: Requests) -> None:
    written = gradrun.load_config("c.yaml").config
    gradrun.compare(written, over=("model.args", [{"width": 8}, {"width": 4, "depth": 2}]))
    assert [config["model"]["args"] for config in requests.configs] == [
        {"width": 8, "depth": 1},  # a mapping is merged with the values of c.yaml
        {"width": 4, "depth": 2},
    ]


def test_the_function_rejects_an_unknown_mode(requests: Requests) -> None:
    with pytest.raises(ConfigError, match="no_grad"):
        gradrun.compare("c.yaml", ["grad", "nograd"])
    assert not requests.sessions


# --- real workers --------------------------------------------------------------------------------

SCRIPT = """\
import json, sys, time
import gradrun
gradrun.compare, gradrun.RunConfig  # imported before the clock starts
began, used = time.perf_counter(), time.process_time()
compared = gradrun.compare("c.yaml", ["grad", "inference_mode"])
wall, cpu = time.perf_counter() - began, time.process_time() - used
print(json.dumps({
    "torch": "torch" in sys.modules, "wall": wall, "cpu": cpu,
    "kinds": [type(c).__name__ for c in compared],
    "processes": compared.result.measurements[-1].process,
}))
"""


@dataclass
class Real:
    """A comparison with real workers, run in a separate process."""

    printed: dict[str, Any]
    result: RunResult


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    (folder / "c.yaml").write_text(YAML)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Real(json.loads(done.stdout), RunResult.load(folder / "runs" / "out-compare"))


def test_the_parent_does_not_import_torch_and_uses_little_cpu(
    real: Real,
) -> None:
    assert real.printed["torch"] is False
    assert real.printed["cpu"] < 0.2 * real.printed["wall"]


def test_a_real_comparison_is_complete(real: Real) -> None:
    assert real.printed["kinds"] == ["Comparison"]
    result = real.result
    (compared,) = result.comparisons
    assert compared.low <= compared.ratio <= compared.high
    assert compared.verdict in {"faster", "slower", "no_difference", "inconclusive"}
    assert [(e.bitwise, e.equal) for e in result.equivalence] == [(True, True)]
    assert {m.variant for m in result.measurements} == {"grad", "inference_mode"}
    assert {m.process for m in result.measurements} == set(range(real.printed["processes"] + 1))
    assert len({m.process for m in result.measurements}) >= 2
    for measured in result.measurements:
        assert measured.batch_seconds, "raw samples of every process"
        assert measured.memory.process_peak
        assert measured.memory.retained == (8 * 4 * 4)
    assert len({m.memory.process_peak for m in result.measurements}) <= 2
    assert result.environment.threads == 1


FATAL = """\
import os, signal, torch
from torch import nn


class Net(nn.Module):
    def forward(self, x):
        print("a line on stdout", flush=True)
        if torch.is_grad_enabled() and x[0, 0] == 16.0:
            raise ValueError("no 16 in grad")
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            if x[0, 0] == 24.0:
                os.kill(os.getpid(), signal.SIGKILL)
        return x * 2
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, RunResult]:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "nets.py").write_text(FATAL)
    (folder / "x.csv").write_text("a,b\n" + "".join(f"{i},0\n" for i in range(48)))
    (folder / "c.yaml").write_text(
        "model: {source: python, target: nets.py:Net}\n"
        "data: {source: records, path: x.csv, inputs: {x: {columns: [a, b]}}, batch_size: 8}\n"
        "run: {threads: 1}\n"
        "measure: {processes: 2, budget: 5}\n"
        "output: {path: out}\n"
    )
    modes = "grad,no_grad,inference_mode,inference_mode"
    with forked_children():
        answer = run_cli("compare", folder / "c.yaml", "--trust-code", "--modes", modes)
    return answer, RunResult.load(folder / "out-compare")


def test_each_failed_mode_is_reported_in_one_line_with_its_batch(
    broken: tuple[Answer, RunResult],
) -> None:
    answer, result = broken
    assert answer.code == 1
    assert "Traceback" not in answer.err
    raised, killed = answer.err.strip().splitlines()
    expected = r"error: grad, batch 2: ValueError: no 16 in grad \(/.*/nets\.py:9\)"
    assert re.fullmatch(expected, raised)
    assert killed.startswith("no_grad, batch 3: was killed by SIGKILL")
    assert list(result.failures) == [raised.removeprefix("error: "), killed]


def test_the_other_modes_are_shown_and_saved(
    broken: tuple[Answer, RunResult],
) -> None:
    answer, result = broken
    assert "inference_mode again" in answer.out
    assert "bitwise equal" in answer.out
    assert "a line on stdout" not in answer.out
    assert {m.variant for m in result.measurements} == {"inference_mode", "inference_mode again"}
    assert [c.baseline for c in result.comparisons] == ["inference_mode"]


def test_a_missing_device_is_reported(cli: Command, folder: Path) -> None:
    with in_process_workers():
        answer = cli("compare", "c.yaml", "--over", "run.device=cpu,cuda:99")
    assert answer.code in {1, 2}
    assert "device cuda:99 is not available" in answer.err


def test_ctrl_c_shows_and_saves_the_data_so_far(
    cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(data: Any, measure: Any, done: int, *_: float) -> bool:
        if done == 2:
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(session.SessionData, "is_enough", stop)
    with in_process_workers():
        answer = cli("compare", "c.yaml", "--modes", "grad,no_grad")
    assert answer.code == 130, answer.text
    assert "error: interrupted" in answer.err
    assert "in 2 fresh processes" in answer.out
    saved = RunResult.load(next(folder.rglob("result.json")))
    assert len(saved.comparisons) == 1
    assert not any("budget" in warning.text for warning in saved.warnings), "it was not spent"


def test_metrics_of_each_variant_are_computed_over_all_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.chdir(tmp_path)
    labels = np.random.default_rng(0).integers(0, 3, 60)
    poor = np.eye(3, dtype=np.float32)[labels]
    poor[:6] = poor[:6, [1, 2, 0]]  # 6 of 60 wrong
    np.savez("good.npz", x=np.eye(3, dtype=np.float32)[labels], y=labels)
    np.savez("poor.npz", x=poor, y=labels)
    data = {"source": "arrays", "path": "good.npz", "inputs": {"x": {"key": "x"}}}
    with in_process_workers():
        result = gradrun.compare(
            {
                "model": {"source": "layers", "layers": ["Identity"]},
                "data": data | {"labels": {"key": "y"}, "batch_size": 4},
                "run": {"threads": 1},
                "metrics": ["accuracy"],
                "measure": {"processes": 2, "budget": 0.1},
                "output": {"path": "out"},
            },
            over=("data.path", ["good.npz", "poor.npz"]),
        ).result
    (change,) = result.metric_changes
    assert (change.name, change.before, change.value) == ("accuracy", 1.0, pytest.approx(54 / 60))
    assert {s.topic for s in result.interpretation} >= {"weights", "input x", "labels", "threads"}
    text = describe(result)
    assert "accuracy" in str(text.predictions)
    assert "-0.1" in str(text.predictions)
    assert not list(tmp_path.glob("out-compare-*")), "the predictions are removed"


def test_a_variant_that_reads_its_data_otherwise_states_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.ones((8, 2, 3), dtype=np.float32))
    data = {"source": "arrays", "path": "x.npy", "batch_size": 4}
    with in_process_workers():
        result = gradrun.compare(
            {
                "model": {"source": "layers", "layers": ["Identity"]},
                "data": data | {"inputs": {"x": {"permute": [0, 1]}}},
                "measure": {"processes": 2, "budget": 0.1},
                "output": {"path": "out"},
            },
            over=("data.inputs.x.permute", ["[0, 1]", "[1, 0]"]),
        ).result
    topics = [s.topic for s in result.interpretation]
    assert topics.count("input x") == 1
    assert [t for t in topics if t.startswith("input x (")] == [
        "input x (data.inputs.x.permute=[1, 0])"
    ]


def test_batches_in_flight_are_compared_by_whole_runs(tmp_path: Path) -> None:
    result = gradrun.compare(
        {
            "model": {"source": "zoo", "name": "mlp", "args": {"width": 4, "depth": 1}},
            "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 64},
            "run": {"threads": 1, "warmup": 0, "device": "cpu"},
            "measure": {"processes": 2, "budget": 0.1, "precision": 0.5},
            "output": {"path": str(tmp_path / "out")},
        },
        over=("run.in_flight", [1, 3]),
    ).result
    assert {m.batch_sizes for m in result.measurements} == {(64,)}
    (equal,) = result.equivalence
    assert equal.bitwise
