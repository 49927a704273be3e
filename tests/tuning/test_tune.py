"""`gradrun tune` and `gradrun.tune` with workers in the test's process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradrun
from gradrun.comparison import turns
from gradrun.config.load import load_config
from gradrun.report import render
from gradrun.results.result import RunResult, TuneResult
from gradrun.tuning import moves, search
from gradrun.tuning import tune as tune_module
from tests.conftest import Command
from tests.support.lanes import inline_lanes

SAMPLES = 256

CONFIG = """\
# A network that sleeps.
model: {source: python, target: "net.py:Net"}
data:
  source: arrays
  path: x.npy
  batch_size: 1   # one by one
output: {path: out}
run: {threads: 1, warmup: 1}
measure: {processes: 2, precision: 0.5, memory: false, batch_independence: false}
"""


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Run workers in this process, short blocks, and one move."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _make_small(monkeypatch)
        yield


def _make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    inline_lanes(monkeypatch)
    monkeypatch.setattr(turns, "BLOCK_SECONDS", 0.01)
    monkeypatch.setattr(search, "CALIBRATION_SECONDS", 0.01)
    monkeypatch.setattr(search, "ROUNDS", 3)
    # One move, whose gain is large on any machine.
    chosen = tuple(move for move in moves.MOVES if move.name == "larger batches")[:1]
    monkeypatch.setattr(search, "MOVES", chosen)


# Two milliseconds a batch, whatever its size, so that larger batches gain on any machine.
NET = """
import time
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        time.sleep(0.002)
        return self.layer(x)
"""


def _write(folder: Path) -> Path:
    np.save(folder / "x.npy", np.random.default_rng(0).random((SAMPLES, 8), np.float32))
    (folder / "net.py").write_text(NET)
    path = folder / "c.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return _write(tmp_path)


def _tune(config: Path, **overrides: Any) -> TuneResult:
    return gradrun.tune(config, trust_code=True, tune={"budget": 400, "steady": True} | overrides)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, small: None) -> TuneResult:
    return _tune(_write(tmp_path_factory.mktemp("tuned")))


def test_larger_batches_are_found_written_and_run(tuned: TuneResult) -> None:
    assert tuned.status == "faster"
    (key,) = tuned.keys
    assert (key.key, key.before) == ("data.batch_size", 1)
    assert key.value >= 8
    (comparison,) = tuned.comparisons
    assert comparison.low > 2
    written = Path(tuned.file)
    config = written.with_name("c.yaml")
    assert written.name == "c-tuned.yaml"
    lines = written.read_text().splitlines()
    assert lines[0].startswith(f"# gradrun tune {gradrun.__version__}: {comparison.ratio:.2f} x")
    assert lines[1] == "# A network that sleeps."
    assert f"  batch_size: {key.value}   # one by one" in lines
    loaded = load_config(written).config
    assert loaded.data.batch_size == key.value
    assert loaded.tune.machine
    assert loaded.tune.machine.torch == tuned.environment.torch
    result = gradrun.infer(written, trust_code=True)
    assert result.predictions == SAMPLES
    assert not [w for w in result.warnings if w.code == "tuned_elsewhere"]
    # The outputs are those of a plain loop over single samples.
    gradrun.infer(config, overwrite=True, trust_code=True)
    one = np.load(config.with_name("out") / "predictions.npy")
    gradrun.infer(written, overwrite=True, trust_code=True)
    assert np.allclose(one, np.load(config.with_name("out") / "predictions.npy"), atol=1e-5)


def test_the_command_takes_the_limits_and_writes_the_named_file(config: Path, cli: Command) -> None:
    target = config.with_name("fast.yaml")
    words = ["--output", target, "--within", "max_abs=0.001", "--budget", "400", "--steady"]
    answer = cli("tune", config, "--trust-code", *words, "--keep", "run.threads")
    assert answer.code == 0, answer.err
    assert "times as fast" in answer.out
    assert load_config(target).config.data.batch_size >= 8
    section = load_config(target).config.tune
    assert section.machine
    answer = cli("tune", config, "--trust-code", "--budget", "0.01")
    assert answer.code == 4
    assert "Inconclusive" in answer.out


def test_the_result_is_saved_and_reported(tuned: TuneResult) -> None:
    folder = Path(tuned.file).with_name("out-tune")
    loaded = RunResult.load(folder)
    assert loaded == tuned
    table, page = (render([("r", loaded)], form) for form in ("table", "html"))
    assert "data.batch_size" in table
    assert "times as fast" in table
    assert "Speed and memory" in page
    assert "Speed and error" in page
    rows = render([("r", loaded)], "csv")
    assert "trial_ratio" in rows
    assert json.loads(render([("r", loaded)], "json"))["reports"][0]["kind"] == "tune"


def test_another_machine_is_named_by_infer(tuned: TuneResult) -> None:
    written = Path(tuned.file)
    text = written.read_text()
    written.write_text(text.replace(tuned.environment.torch, "1.0.0"))
    result = gradrun.infer(written, overwrite=True, trust_code=True)
    (warning,) = [w for w in result.warnings if w.code == "tuned_elsewhere"]
    assert "torch 1.0.0 (here" in warning.text


def test_nothing_to_change_keeps_the_config(config: Path) -> None:
    result = _tune(config, keep=["data.batch_size"])
    assert result.status == "nothing_helps"
    assert not result.file
    assert not config.with_name("c-tuned.yaml").exists()
    assert result.skipped == ("larger batches: data.batch_size is kept",)
    text = render([("r", result)], "table")
    assert "Nothing helps" in text
    assert "would have been seen" in " ".join(text.split())


def test_a_budget_that_is_too_small_is_inconclusive(config: Path) -> None:
    result = _tune(config, budget=0.01)
    assert result.status == "inconclusive"
    assert {trial.outcome for trial in result.trials} == {"not_tried"}
    assert "Inconclusive" in render([("r", result)], "table")


def test_ctrl_c_writes_the_best_so_far_as_unconfirmed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(facts: Any) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    stop = moves.Move("stop", "last", "none", interrupt)
    monkeypatch.setattr(search, "MOVES", (*search.MOVES, stop))
    with pytest.raises(gradrun.Interrupted) as caught:
        _tune(config)
    result = caught.value.result
    assert caught.value.exit_code == 130
    assert result == RunResult.load(config.with_name("out-tune"))
    assert (result.status, result.comparisons) == ("inconclusive", ())
    (key,) = result.keys
    assert key.value >= 8
    assert result.unconfirmed.changes == {"data.batch_size": key.value}
    assert not config.with_name("c-tuned.yaml").exists()
    written = config.with_name("c-tuned-unconfirmed.yaml")
    assert result.file == str(written)
    first = written.read_text().splitlines()[0]
    assert f"NOT CONFIRMED, {result.unconfirmed.ratio:.2f} x as fast as c.yaml" in first
    assert load_config(written).config.data.batch_size == key.value
    text = " ".join(render([("r", result)], "table").split())
    assert "(interrupted). The best so far was" in text
    assert "not confirmed: data.batch_size" in text


def test_a_tuning_that_was_killed_continues_with_what_it_tried(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(facts: Any) -> list[dict[str, Any]]:
        changes = {"model.dtype": "bfloat16"}
        return [] if facts.config.model.dtype else [changes]

    def kill(facts: Any) -> list[dict[str, Any]]:
        raise SystemExit  # as a SIGKILL: nothing is written after it

    fails = moves.Move("wrong", "process", "none", wrong)
    batches = search.MOVES
    stop = moves.Move("kill", "last", "none", kill)
    monkeypatch.setattr(search, "MOVES", (fails, *batches, stop))
    with pytest.raises(SystemExit):
        _tune(config)
    assert not (config.with_name("out-tune") / "result.json").exists()

    monkeypatch.setattr(search, "MOVES", (fails, *batches))
    opened: list[str | None] = []
    open_lane = tune_module.open_lane
    monkeypatch.setattr(
        tune_module, "open_lane",
        lambda c, **keys: (opened.append(c.model.dtype), open_lane(c, **keys))[1],
    )  # fmt: skip
    limits = {"budget": 500, "steady": True}
    with pytest.raises(gradrun.ConfigError, match=r"config changed since.*resume=True"):
        gradrun.tune(config, trust_code=True, resume=True, tune=limits, run={"seed": 3})
    result = gradrun.tune(config, trust_code=True, resume=True, tune=limits)
    assert result.status == "faster"
    assert result.trials[0].outcome == "differs"
    assert "bfloat16" not in opened

    (config.with_name("out-tune") / "tune-journal.json").write_text("{")
    with pytest.raises(gradrun.ConfigError, match=r"tune-journal.json cannot be read"):
        gradrun.tune(config, trust_code=True, resume=True, tune=limits)


def test_a_metric_may_not_drop(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradrun.results.result import Metric
    from gradrun.tuning import tune as module

    np.save(config.with_name("y.npy"), np.zeros(SAMPLES, np.int64))
    with config.open("a") as file:
        file.write("metrics: [accuracy]\n")
    text = config.read_text().replace("path: x.npy", "path: x.npy\n  labels: {path: y.npy}")
    config.write_text(text)

    def planted(changed: Any, trust_code: bool) -> tuple[Metric, ...]:
        value = 0.9 if changed.data.batch_size == 1 else 0.89
        return (Metric(name="accuracy", value=value, samples=SAMPLES),)

    monkeypatch.setattr(module, "_metrics", planted)
    result = _tune(config, within={"metric": "accuracy", "drop": 0.002})
    assert result.status == "nothing_helps"
    assert result.trials[0].reason == "accuracy is 0.8900 instead of 0.9000"
    with pytest.raises(gradrun.ConfigError, match="unknown metric 'f1'; the config has accuracy"):
        _tune(config, within={"metric": "f1"})


def test_an_unknown_kept_key_is_an_error(config: Path) -> None:
    with pytest.raises(gradrun.ConfigError, match=r"unknown key 'data.batchsize'.*batch_size"):
        _tune(config, keep=["data.batchsize"])


def test_the_config_itself_is_not_replaced(config: Path) -> None:
    with pytest.raises(gradrun.ConfigError, match="is the config itself"):
        gradrun.tune(config, config)
    with pytest.raises(gradrun.ConfigError, match="does not exist"):
        gradrun.tune(config, config.parent / "none" / "t.yaml")
