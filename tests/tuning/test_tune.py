"""`gradrun tune` and `gradrun.tune` with workers in the test's process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import gradrun
from gradrun.comparison import turns
from gradrun.config.load import load_config
from gradrun.config.schema import RunConfig
from gradrun.report import render
from gradrun.results.result import RunResult, TuneResult
from gradrun.tuning import moves, search
from gradrun.tuning import tune as tune_module
from tests.conftest import Command
from tests.support.lanes import Planted, inline_lanes
from tests.support.planted_search import BASE, PlantedSearch, move
from tests.support.workers import in_process_workers

SAMPLES = 64

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


# Ten milliseconds a batch, whatever its size, so that larger batches gain on any machine.
NET = """
import time
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        time.sleep(0.01)
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


def _interrupt(*_: Any, **__: Any) -> Any:
    """Do as Ctrl-C does."""
    raise KeyboardInterrupt


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
    assert "would have been seen" not in " ".join(text.split())  # nothing was timed


def test_a_budget_that_is_too_small_is_inconclusive(config: Path) -> None:
    result = _tune(config, budget=0.01)
    assert result.status == "inconclusive"
    assert {trial.outcome for trial in result.trials} == {"not_tried"}
    assert "Inconclusive" in render([("r", result)], "table")


def test_ctrl_c_writes_the_best_so_far_as_unconfirmed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = moves.Move("stop", "last", "none", _interrupt)
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


def test_only_a_tuned_config_is_replaced(config: Path) -> None:
    """And that is known before the search."""
    target = config.with_name("c-tuned.yaml")
    target.write_text("# mine\n" + CONFIG)
    with pytest.raises(gradrun.ConfigError, match=r"c-tuned.yaml exists and was not written by"):
        _tune(config)
    assert target.read_text().startswith("# mine\n")
    target.write_text("# gradrun tune 0.1: an earlier one\n" + CONFIG)
    assert _tune(config, keep=["data.batch_size"]).status == "nothing_helps"
    with pytest.raises(gradrun.ConfigError, match="is not a regular file"):
        gradrun.tune(config, config.parent)


def test_a_target_that_cannot_be_written_keeps_the_result(
    config: Path, tuned: TuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is removed during the search."""
    folder = config.with_name("away")
    folder.mkdir()
    found = tuned.replace(file="")
    monkeypatch.setattr(tune_module, "_search", lambda *_: (folder.rmdir(), found)[1])
    with pytest.raises(gradrun.GradrunError, match=r"t.yaml cannot be written: No such") as caught:
        gradrun.tune(config, folder / "t.yaml", trust_code=True)
    assert caught.value.result == found
    assert RunResult.load(config.with_name("out-tune")) == found


def test_a_config_that_needs_overrides_is_written_whole(
    config: Path, tuned: TuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(config.read_text().replace("  path: x.npy\n", ""))
    monkeypatch.setattr(tune_module, "_search", lambda *_: tuned.replace(file=""))
    result = gradrun.tune(config, trust_code=True, **{"data.path": "x.npy"})
    written = load_config(result.file).config
    assert written.data.batch_size == tuned.keys[0].value
    assert written.input_files()[0].samefile(config.with_name("x.npy"))


def test_a_folder_that_cannot_be_written_is_an_error(config: Path) -> None:
    config.with_name("file").write_text("")
    with pytest.raises(gradrun.GradrunError, match=r"cannot be written: Not a directory"):
        gradrun.tune(config, trust_code=True, output={"path": "file/out"})


def test_a_config_over_the_limit_of_memory_is_named(config: Path) -> None:
    result = _tune(config, memory="1 MiB")
    assert (result.status, result.detectable) == ("nothing_helps", 0)
    assert result.baseline_over.startswith("process peak ")
    text = " ".join(render([("r", result)], "table").split())
    assert f"The config itself exceeds a limit: {result.baseline_over}." in text
    assert "would have been seen" not in text


def test_an_unknown_kept_key_is_an_error(config: Path) -> None:
    with pytest.raises(gradrun.ConfigError, match=r"unknown key 'data.batchsize'.*batch_size"):
        _tune(config, keep=["data.batchsize"])


def test_the_config_itself_is_not_replaced(config: Path) -> None:
    with pytest.raises(gradrun.ConfigError, match="is the config itself"):
        gradrun.tune(config, config)
    with pytest.raises(gradrun.ConfigError, match="does not exist"):
        gradrun.tune(config, config.parent / "none" / "t.yaml")


# --- the second best setting ---------------------------------------------------------------------

SEED = move("seed", "kernels", {"run.seed": 1})
WARMUP = move("warmup", "kernels", {"run.warmup": 3})


def _wrong_when_confirmed(config: RunConfig) -> Planted:
    """Seed 1 is the fastest and wrong behind the calibration; three warm-ups are twice as fast."""
    seed = config.run.seed == 1
    seconds = 0.0001 if seed else 0.0005 if config.run.warmup == 3 else 0.001
    return Planted(
        seconds, output=lambda i: 1.0 + i % 7 + (5 if seed and i > 2000 and i % 10 == 0 else 0)
    )


def test_the_second_best_is_confirmed_if_the_best_is_refused(tmp_path: Path) -> None:
    found = PlantedSearch(_wrong_when_confirmed, (SEED, WARMUP))
    result = tune_module._search(found.search, "2026-01-01", tmp_path)
    assert result.status == "faster"
    assert [(key.key, key.before, key.value) for key in result.keys] == [("run.warmup", "auto", 3)]
    (comparison,) = result.comparisons
    assert comparison.ratio == pytest.approx(2)
    (reason,) = result.refused
    assert reason.startswith("outputs differ by 5, over measure.rtol")
    best = [trial for trial in result.trials if trial.changes == {"run.seed": 1}][-1]
    assert (best.outcome, best.reason) == ("no_gain", reason)
    # Not one with both keys, which would be refused for the same reason.
    assert any(trial.changes == {"run.seed": 1, "run.warmup": 3} for trial in result.trials)


def test_without_a_second_best_nothing_helps(tmp_path: Path) -> None:
    found = PlantedSearch(_wrong_when_confirmed, (SEED,))
    result = tune_module._search(found.search, "2026-01-01", tmp_path)
    assert (result.status, result.keys, result.unconfirmed) == ("nothing_helps", (), None)


def test_ctrl_c_while_confirming_keeps_the_best_as_unconfirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_module, "confirm", _interrupt)
    found = PlantedSearch(lambda c: Planted(0.0005 if c.run.seed else 0.001), (SEED,))
    result = tune_module._search(found.search, "2026-01-01", tmp_path)
    assert (result.status, result.interrupted, result.comparisons) == ("inconclusive", True, ())
    assert result.unconfirmed.changes == {"run.seed": 1}
    assert [key.key for key in result.keys] == ["run.seed"]


def test_ctrl_c_before_the_baseline_has_no_result(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_module, "open_lane", _interrupt)
    with pytest.raises(gradrun.Interrupted) as caught:
        _tune(config)
    assert caught.value.result is None
    assert not (config.with_name("out-tune") / "result.json").exists()


def test_a_job_with_a_longer_start_is_shown_with_it(tmp_path: Path) -> None:
    """200,000 samples take 2 + 200 s, and with the change 30 + 100 s."""

    def plan(config: RunConfig) -> Planted:
        return Planted(0.0005, start=30.0) if config.run.seed else Planted(0.001, start=2.0)

    tune = {"steady": False, "samples": 200_000, "budget": 2000}
    found = PlantedSearch(plan, (SEED,), tune)
    result = tune_module._search(found.search, "2026-01-01", tmp_path)
    text = render([("r", result)], "table")
    assert result.comparisons[0].ratio == pytest.approx(2)
    (line,) = (line for line in text.splitlines() if line.startswith("job "))
    assert line.split() == "job 130 s of 200,000 samples, with the start; 202 s before".split()
    assert "Ratios of the search of jobs with their start" in text


# --- the tuned file ------------------------------------------------------------------------------


def _planted_result(tmp_path: Path) -> TuneResult:
    """Seed 1 is twice as fast, and three warm-ups gain another quarter."""

    def plan(config: RunConfig) -> Planted:
        return Planted(0.001 / (1 + config.run.seed) / (1.25 if config.run.warmup == 3 else 1))

    found = PlantedSearch(plan, (SEED, WARMUP))
    return tune_module._search(found.search, "2026-01-01", tmp_path)


def test_a_config_in_code_is_written_with_the_changed_keys(tmp_path: Path) -> None:
    result, target = _planted_result(tmp_path), tmp_path / "t.yaml"
    written = tune_module._write(result, load_config(BASE), None, target)
    assert written.file == str(target)
    assert target.read_text().startswith(f"# gradrun tune {result.gradrun}: 2.50 x as fast as the")
    machine = {"torch": result.environment.torch, "cpu": result.environment.cpu}
    changed = {"run.seed": 1, "run.warmup": 3, "tune.machine": machine}
    assert load_config(target).config == load_config(BASE, changed).config


def test_values_of_set_are_written_to_the_tuned_file(tmp_path: Path) -> None:
    source, target = tmp_path / "c.yaml", tmp_path / "t.yaml"
    source.write_text("# Mine.\n" + yaml.safe_dump(BASE, sort_keys=False))
    engine = {"source": "processes", "workers": 2}
    changed = {"data.batch_size": 16, "engine": engine, "tune.budget": 7}
    tune_module._write(_planted_result(tmp_path), load_config(source, changed), source, target)
    text, found = target.read_text(), load_config(target).config
    assert "# Mine." in text
    assert (found.data.batch_size, found.engine.workers, found.run.seed) == (16, 2, 1)
    assert found.tune.budget == BASE["tune"]["budget"]  # of the search, not of the config
    assert "seed: 1" in text
    assert "tune: 0 before; 2.00 x as fast with it (2.00 to 2.00)" in text


def test_a_file_that_cannot_be_written_keeps_the_result(tmp_path: Path) -> None:
    result = _planted_result(tmp_path)
    (tmp_path / "t.yaml").mkdir()
    with pytest.raises(gradrun.GradrunError, match=r"t\.yaml cannot be written: ") as caught:
        tune_module._write(result, load_config(BASE), None, tmp_path / "t.yaml")
    assert caught.value.result == result


# --- metrics -------------------------------------------------------------------------------------

ERRORS = """
from torch import nn

class Plus(nn.Module):
    def __init__(self, offset=0.0):
        super().__init__()
        self.offset = offset

    def forward(self, x):
        return x + self.offset
"""


def test_an_error_measured_over_all_data_may_not_grow(tmp_path: Path) -> None:
    """The mean absolute error of x + offset against x is the offset."""
    rows = np.arange(12, dtype=np.float32).reshape(12, 1)
    np.save(tmp_path / "x.npy", rows)
    (tmp_path / "plus.py").write_text(ERRORS)
    base = load_config({
        "model": {"source": "python", "target": f"{tmp_path}/plus.py:Plus"},
        "data": {
            "source": "arrays", "path": f"{tmp_path}/x.npy", "batch_size": 5,
            "labels": {"path": f"{tmp_path}/x.npy"},
        },
        "run": {"warmup": 0},
        "metrics": ["mae"],
        "output": {"path": f"{tmp_path}/out"},
        "tune": {"within": {"metric": "mae", "drop": 0.25}},
    }).config  # fmt: skip
    with in_process_workers():
        gate = tune_module._metric_gate(base, trust_code=True)
        assert gate(base.replace({"model.args": {"offset": 0.25}})) == ""
        grown = "mae is 0.5000 instead of 0.0000"
        assert gate(base.replace({"model.args": {"offset": 0.5}})) == grown
        reversed_gate = tune_module._metric_gate(
            base.replace({"model.args": {"offset": 0.5}}), trust_code=True
        )
        assert reversed_gate(base) == ""
    assert tune_module._metric_gate(base.replace({"tune.within": None}), trust_code=True) is None


def test_an_unknown_kept_section_names_the_sections(config: Path) -> None:
    with pytest.raises(gradrun.ConfigError, match=r"unknown key 'dat'; did you mean data"):
        _tune(config, keep=["dat"])
