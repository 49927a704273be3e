"""A run spread over workers writes the bytes of a run in one process, whatever happens."""

from __future__ import annotations

import json
import random
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import gradrun
from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError, RunFailed
from gradrun.core.progress import Progress, ignore
from gradrun.engines.engine import EngineRequest
from gradrun.engines.infer import explain
from gradrun.engines.messages import Ready
from gradrun.results.result import InferResult, RunResult
from tests.support.engine_runs import BATCH, COUNT, DATA, FORMATS, config_for, write_inputs
from tests.support.engines import InlineEngines

NET = """
import torch
from torch import nn

class Net(nn.Module):
    bad, infinite, fits = {bad}, {infinite}, {fits}

    def forward(self, x):
        if len(x) > self.fits:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: "
                               "can't allocate memory: you tried to allocate 8 bytes.")
        if torch.isin(x[:, 0], torch.tensor(self.bad, dtype=torch.float32)).any():
            raise ValueError("a bad sample")
        y = x * 3 + 1
        y[torch.isin(x[:, 0], torch.tensor(self.infinite, dtype=torch.float32))] = float("nan")
        return y
"""


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> InlineEngines:
    return InlineEngines(monkeypatch)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of all data sources."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def net_config(folder: Path, output: Path, **net: Any) -> dict[str, Any]:
    """A model that fails on some samples, over the numbers from 0."""
    folder.mkdir(exist_ok=True)
    options = {"bad": [], "infinite": [], "fits": 99, **net}
    (folder / "net.py").write_text(NET.format(**options))
    np.save(folder / "n.npy", np.arange(40, dtype=np.float32)[:, None])
    return {
        "model": {"source": "python", "target": f"{folder / 'net.py'}:Net"},
        "data": {"source": "arrays", "path": str(folder / "n.npy"), "batch_size": BATCH},
        "run": {"threads": 1},
        "output": {"path": str(output)},
        "measure": {"memory": False},
    }


def spread(config: dict[str, Any], workers: int = 2, **options: Any) -> InferResult:
    engine = {"source": "processes", "workers": workers}
    return gradrun.infer(config | {"engine": engine}, trust_code=True, **options)


def files(folder: Path) -> dict[str, bytes]:
    """The predictions and the quarantine of a run, without the traceback's stack."""
    found = {
        path.name: path.read_bytes() for path in folder.rglob("predictions*") if path.is_file()
    }
    quarantine = folder / "quarantine.jsonl"
    if quarantine.exists():
        lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
        found["quarantine"] = json.dumps([_without_stack(line) for line in lines]).encode()
    return found


def _without_stack(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a quarantine, with the last line of its traceback only."""
    return {
        key: value.splitlines()[-1] if key == "traceback" and value else value
        for key, value in line.items()
    }


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("source", DATA)
def test_workers_write_the_bytes_of_one_process(
    source: str, form: str, inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    gradrun.infer(config_for(source, inputs, tmp_path / "one", form))
    counts = (1, 2, 4) if form == "npy" else (2,)
    for workers in counts:
        folder = tmp_path / f"of {workers}"
        result = spread(config_for(source, inputs, folder, form), workers)
        assert files(folder) == files(tmp_path / "one")
        (measured,) = result.measurements
        # 150 texts in groups of 64 are work for three workers.
        grouped = DATA[source]["source"] == "text"
        assert len(measured.workers) == (min(workers, 3) if grouped else workers)
        assert sum(worker.samples for worker in measured.workers) == measured.samples
        assert gradrun.verify(folder).complete
    assert len(inline.engines) == len(counts)


@pytest.mark.parametrize(
    ("net", "run"),
    [
        ({"bad": [0.0, 13.0, 14.0, 39.0]}, {"on_error": "quarantine"}),
        ({"infinite": [5.0, 22.0]}, {"on_nonfinite": "quarantine"}),
        ({"infinite": [5.0, 22.0]}, {}),
        ({"fits": 2}, {}),
        ({"fits": 1, "bad": [17.0]}, {"on_error": "quarantine"}),
    ],
)
def test_failing_samples_are_handled_as_in_one_process(
    net: dict[str, Any], run: dict[str, Any], tmp_path: Path, inline: InlineEngines
) -> None:
    config = net_config(tmp_path / "net", tmp_path / "one", **net)
    config["run"] |= run
    one = gradrun.infer(config, trust_code=True)
    config["output"]["path"] = str(tmp_path / "two")
    two = spread(config, 3)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert two.quarantined == one.quarantined
    assert _failure_warnings(two, "two") == _failure_warnings(one, "one")


def _failure_warnings(result: InferResult, folder: str) -> dict[str, str]:
    codes = {"out_of_memory", "quarantined", "nonfinite"}
    return {w.code: w.text.replace(folder, "FOLDER") for w in result.warnings if w.code in codes}


def test_unreadable_images_are_quarantined_as_in_one_process(
    inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    shutil.copytree(inputs / "images", tmp_path / "images")
    for number in (0, 33, 34, COUNT - 1):
        (tmp_path / "images" / f"{number:03}.png").write_bytes(b"not an image")
    for name in ("one", "two"):
        config = config_for("images", tmp_path, tmp_path / name, "csv")
        config["run"] |= {"on_error": "quarantine"}
        spread(config, 3) if name == "two" else gradrun.infer(config)
    found = files(tmp_path / "one")
    assert [line["sample"] for line in json.loads(found["quarantine"])] == [0, 33, 34, COUNT - 1]
    assert files(tmp_path / "two") == found


@pytest.mark.parametrize(
    ("net", "run"),
    [
        ({"bad": [21.0, 30.0]}, {}),
        ({"bad": [5.0, 6.0, 21.0, 30.0]}, {"on_error": "quarantine", "max_errors": 2}),
        ({"infinite": [21.0, 35.0]}, {"on_nonfinite": "stop"}),
    ],
)
def test_a_run_stops_at_the_same_sample_with_the_same_words(
    net: dict[str, Any], run: dict[str, Any], tmp_path: Path, inline: InlineEngines
) -> None:
    messages = []
    for name in ("one", "two"):
        config = net_config(tmp_path / "net", tmp_path / name, **net)
        config["run"] |= run
        if name == "two":
            config["engine"] = {"source": "processes", "workers": 3}
        with pytest.raises(RunFailed) as caught:
            gradrun.infer(config, trust_code=True)
        messages.append(str(caught.value).replace(str(tmp_path / name), "FOLDER"))
    assert messages[0] == messages[1]
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.parametrize("source", ["arrays", "texts"])
@pytest.mark.parametrize("seed", range(4))
def test_deaths_at_random_places_change_no_byte(
    source: str, seed: int, inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    chance, died = random.Random(seed), set[int]()

    def dies(worker: int, task: Any) -> bool:
        # Twice with one batch would divide it into single samples, whose bits may differ.
        again = task.stop - task.start <= BATCH and task.start in died
        if again or chance.random() > 0.3:
            return False
        died.add(task.start)
        return True

    inline.dies = dies
    gradrun.infer(config_for(source, inputs, tmp_path / "one", "jsonl"))
    result = spread(config_for(source, inputs, tmp_path / "two", "jsonl"), 3)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    lost = [worker for worker in result.measurements[0].workers if worker.lost]
    assert len(lost) >= inline.engines[-1].started - 3
    assert all("SIGKILL" in worker.lost for worker in lost)


@pytest.mark.parametrize("policy", ["quarantine", "stop"])
def test_a_sample_that_ends_its_workers_is_isolated(
    policy: str, inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    inline.dies = lambda worker, task: task.start <= 30 < task.stop
    config = config_for("arrays", inputs, tmp_path / "two")
    config["run"] |= {"on_error": policy}
    gradrun.infer(config_for("arrays", inputs, tmp_path / "one"))
    expected = np.load(tmp_path / "one" / "predictions.npy")
    if policy == "stop":
        with pytest.raises(RunFailed, match=r"sample 30 failed: its worker process was killed by"):
            spread(config)
        written = np.load(tmp_path / "two" / "predictions.npy")[:28]
        assert np.array_equal(written, expected[:28]), "everything before its batch is there"
        return
    result = spread(config)
    found = np.load(tmp_path / "two" / "predictions.npy")
    assert np.isnan(found[30]).all()
    others = [row for row in range(COUNT) if row != 30]
    np.testing.assert_allclose(found[others], expected[others], rtol=1e-6)
    (line,) = (tmp_path / "two" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == 30
    assert "SIGKILL" in json.loads(line)["error"]
    assert result.quarantined == 1


@pytest.mark.parametrize(
    ("form", "workers"),
    [
        ("npy", (2, 0)),
        ("safetensors", (2, 3)),
        ("jsonl", (0, 2)),
        ("csv", (3, 1)),
        ("parquet", (1, 0, 2)),
    ],
)
def test_an_interrupted_run_is_resumed_by_another_number_of_workers_and_by_none(
    form: str,
    workers: tuple[int, ...],
    inputs: Path,
    tmp_path: Path,
    inline: InlineEngines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0 workers: in one process, without an engine."""
    monkeypatch.setattr("gradrun.inference.timed_loop._CALLBACK_NS", 0)
    gradrun.infer(config_for("texts", inputs, tmp_path / "one", form))
    config = config_for("texts", inputs, tmp_path / "two", form)
    rows: list[int] = []

    def interrupt(progress: Progress) -> None:
        if progress.stage.startswith("predicting") and progress.done > max(rows, default=0):
            rows.append(progress.done)
            raise KeyboardInterrupt

    for attempt, count in enumerate(workers):
        last = attempt == len(workers) - 1
        options: dict[str, Any] = {"resume": attempt > 0, "progress": ignore if last else interrupt}
        with nullcontext() if last else pytest.raises(gradrun.Interrupted):
            spread(config, count, **options) if count else gradrun.infer(config, **options)
    assert len(rows) == len(workers) - 1
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_worker_that_predicts_differently_is_refused_by_name(
    inputs: Path, tmp_path: Path, inline: InlineEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradrun.engines.range_runner.outputs_checksum", lambda outputs: 1)
    config = config_for("arrays", inputs, tmp_path / "out")
    with pytest.raises(RunFailed, match=r"worker \d on .* cannot take part: its predictions of"):
        spread(config)
    allowed = {"source": "processes", "workers": 2, "mixed": "allow"}
    gradrun.infer(config | {"engine": allowed}, overwrite=True)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"gradrun": "0.0.1"}, r"its version of gradrun is 0\.0\.1, and \S+ in the driver"),
        ({"torch": "1.13.1"}, r"its version of torch is 1\.13\.1, and \S+ in the driver"),
        ({"threads": 64}, r"its number of threads is 64, and 1 in the driver"),
        (
            {"cpu": "another processor"},
            "its predictions of the first batch differ; its processor is another processor, and",
        ),
    ],
)
def test_a_worker_of_another_kind_is_refused_by_name_and_the_others_continue(
    environment: dict[str, Any],
    sentence: str,
    inputs: Path,
    tmp_path: Path,
    inline: InlineEngines,
) -> None:
    everywhere = False

    def change(worker: int, ready: Ready) -> Ready:
        if worker > 1 and not everywhere:
            return ready
        checksum = ready.checksum + ("cpu" in environment)
        there = ready.environment.replace(**environment)
        return msgspec.structs.replace(ready, environment=there, checksum=checksum)

    inline.change = change
    config = config_for("arrays", inputs, tmp_path / "one")
    gradrun.infer(config)
    config["output"]["path"] = str(tmp_path / "two")
    first, second = spread(config, 2).measurements[0].workers
    assert first.rejected
    assert re.match(sentence, first.lost)
    assert (first.samples, second.samples) == (0, COUNT)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    everywhere = True
    with pytest.raises(RunFailed, match=rf"worker 2 on \S+ cannot take part: {sentence}") as caught:
        spread(config, 2, overwrite=True)
    assert "engine.mixed: allow accepts this" in str(caught.value)
    assert "\n" not in str(caught.value)
    engine = {"source": "processes", "workers": 2, "mixed": "allow"}
    result = gradrun.infer(config | {"engine": engine}, overwrite=True)
    assert all(w.samples and not w.lost for w in result.measurements[0].workers)


def test_a_worker_that_sees_other_files_is_refused_even_if_mixed_workers_are_allowed(
    inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    def change(worker: int, ready: Ready) -> Ready:
        files = {path: described | {"size": 1} for path, described in ready.files.items()}
        return msgspec.structs.replace(ready, files=files)

    inline.change = change
    engine = {"source": "processes", "workers": 2, "mixed": "allow"}
    with pytest.raises(RunFailed, match=r"cannot take part: its data\.path differs from that of"):
        gradrun.infer(config_for("arrays", inputs, tmp_path / "out") | {"engine": engine})


def test_the_progress_has_the_whole_run_and_each_worker(
    inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    inline.dies = lambda worker, task: worker == 1 and task.start >= 20
    shown: list[Progress] = []
    spread(config_for("arrays", inputs, tmp_path / "out"), 2, progress=shown.append)
    predicting = [p for p in shown if p.stage == "predicting on inline workers"]
    assert [p.done for p in predicting] == sorted(p.done for p in predicting)
    assert {p.total for p in predicting} == {COUNT}
    assert "1 starting" in {p.other_workers for p in predicting}
    last = predicting[-1]
    assert [worker.name for worker in last.workers] == ["worker 2", "worker 3"]
    assert last.other_workers == "1 lost"
    assert all(worker.rate > 0 for worker in last.workers if worker.done)
    assert sum(worker.done for worker in last.workers) <= last.done == COUNT


@pytest.mark.parametrize(("source", "batch_size"), [("arrays", 32), ("texts", BATCH)])
def test_no_more_workers_are_used_than_there_is_work_for(
    source: str, batch_size: int, inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    config = config_for(source, inputs, tmp_path / "out")
    config["data"] |= {"batch_size": batch_size}
    result = spread(config, 6)
    assert len(result.measurements[0].workers) == 3
    assert inline.engines[0].started == 6
    assert len(inline.engines[0].opened) == 3, "the others were ended before they loaded"
    noun = {"arrays": r"batches \(data.batch_size\)", "texts": "length groups"}[source]
    (warning,) = [w.text for w in result.warnings if w.code == "fewer_workers"]
    assert re.match(rf"3 of 6 workers used: 3 {noun}", warning)


def test_a_model_that_raises_keyboard_interrupt_interrupts_the_run_as_in_one_process(
    tmp_path: Path, inline: InlineEngines
) -> None:
    found = []
    for workers in (0, 2):
        config = net_config(tmp_path / "net", tmp_path / f"of {workers}")
        net = tmp_path / "net" / "net.py"
        net.write_text(INTERRUPTING)
        with pytest.raises(gradrun.Interrupted) as caught:
            spread(config, workers) if workers else gradrun.infer(config, trust_code=True)
        text = str(caught.value).replace(f"of {workers}", "FOLDER")
        found.append((text, caught.value.exit_code, files(tmp_path / f"of {workers}")))
    assert found[0] == found[1]
    assert "20 of 40 predictions are saved" in found[0][0]


INTERRUPTING = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        if 20 in x:
            raise KeyboardInterrupt
        return x + 1
"""


def test_a_worker_that_cannot_start_ends_the_run_with_its_reason(
    inputs: Path, tmp_path: Path, inline: InlineEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise OSError("no space left for the model")

    monkeypatch.setattr("gradrun.engines.range_runner.RangeRunner.prepare", fail)
    with pytest.raises(RunFailed, match=r"worker \d cannot start: OSError: no space left"):
        spread(config_for("arrays", inputs, tmp_path / "out"))


def test_a_replacement_that_cannot_start_is_a_warning_while_others_run(
    inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    def change(worker: int, ready: Ready) -> Ready:
        if worker > 2:
            raise OSError("the accelerator is full")
        return ready

    inline.change = change
    inline.dies = lambda worker, task: worker == 1
    gradrun.infer(config_for("arrays", inputs, tmp_path / "one"))
    result = spread(config_for("arrays", inputs, tmp_path / "two"), 2)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert inline.engines[0].opened == [1, 2, 3, 4, 5], "three attempts"
    assert [w.text for w in result.warnings if w.code == "worker_failed"] == [
        f"worker {number} could not start, and the others continued: OSError: the accelerator is "
        "full"
        for number in (3, 4, 5)
    ]


def test_the_result_has_the_ranges_of_each_worker(
    inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    spread(config_for("arrays", inputs, tmp_path / "out"), 2)
    result = RunResult.load(tmp_path / "out")
    workers = result.measurements[0].workers
    ranges = sorted((r.start, r.stop) for worker in workers for r in worker.ranges)
    assert ranges == [(start, min(start + BATCH, COUNT)) for start in range(0, COUNT, BATCH)]
    assert all(r.ended >= r.began >= 0 for worker in workers for r in worker.ranges)
    assert all(worker.cold_start > 0 and worker.process_peak for worker in workers)


def test_metrics_and_counts_of_workers_equal_those_of_one_process(
    inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    numbers = np.arange(COUNT)
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(COUNT, 3)), y=numbers % 2)
    config = config_for("arrays", inputs, tmp_path / "one")
    config["data"] |= {
        "path": str(tmp_path / "d.npz"),
        "inputs": {"x": {"key": "x", "dtype": "float32"}},
        "labels": {"key": "y"},
    }
    config["output"] |= {"transform": "argmax"}
    config["metrics"] = ["accuracy", "f1", {"name": "auroc"}]
    one = gradrun.infer(config)
    config["output"]["path"] = str(tmp_path / "two")
    two = spread(config, 3)
    assert two.metrics == one.metrics
    assert two.class_distribution == one.class_distribution


@pytest.mark.parametrize("source", DATA)
def test_workers_state_the_same_interpretation(
    source: str, inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    one = gradrun.infer(config_for(source, inputs, tmp_path / "one"))
    two = spread(config_for(source, inputs, tmp_path / "two"), 2)
    assert [s for s in two.interpretation if s.topic != "engine"] == [*one.interpretation]
    assert two.examples == one.examples
    texts = " ".join(statement.text for statement in one.interpretation)
    if source == "csv":
        assert "NaN in 8 rows" in texts
    if source == "images":
        assert "14 of 70 images" in texts


def test_validate_explains_the_engine(inputs: Path, tmp_path: Path) -> None:
    engine = {"source": "processes", "workers": 3}
    loaded = load_config(config_for("arrays", inputs, tmp_path / "out") | {"engine": engine})
    (text,) = [s.text for s in explain(loaded).statements if s.topic == "engine"]
    assert text.startswith("3 processes; this machine has ")


STATEFUL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += len(x)
        return x + self.seen
"""


TWO_HEADS = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        return {"sent": x @ torch.ones(1, 3), "topic": x @ torch.arange(4.0)[None]}
"""


def test_each_output_of_workers_has_its_own_transforms(
    tmp_path: Path, inline: InlineEngines
) -> None:
    config = net_config(tmp_path / "net", tmp_path / "one")
    (tmp_path / "net" / "net.py").write_text(TWO_HEADS)
    config["output"]["transform"] = {"sent": "softmax", "topic": "argmax"}
    gradrun.infer(config, trust_code=True)
    config["output"]["path"] = str(tmp_path / "two")
    spread(config)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    config["output"]["transform"] = {"sent": "none", "topic": "softmax"}
    with pytest.raises(ConfigError, match=r"output\.transform"):
        gradrun.infer(config, trust_code=True, resume=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_advises_the_option_with_which_a_resume_finishes(
    workers: int, tmp_path: Path, inline: InlineEngines
) -> None:
    cases = [
        ({"bad": [13.0]}, {}, "run.on_error=quarantine"),
        ({"bad": [13.0, 14.0]}, {"on_error": "quarantine", "max_errors": 1}, "run.max_errors=null"),
        ({"infinite": [13.0]}, {"on_nonfinite": "stop"}, "run.on_nonfinite=quarantine"),
    ]
    for number, (net, run, option) in enumerate(cases):
        config = net_config(tmp_path / "net", tmp_path / f"out{number}", **net)
        config["run"] |= run
        if workers:
            config["engine"] = {"source": "processes", "workers": workers}
        with pytest.raises(RunFailed) as caught:
            gradrun.infer(config, trust_code=True)
        assert caught.value.resume_options == f"--set {option}"
        changed = load_config(config, [option])
        result = gradrun.infer(changed, trust_code=True, resume=True)
        assert result.quarantined == len(next(iter(net.values())))


def test_a_model_that_carries_state_is_refused(tmp_path: Path, inline: InlineEngines) -> None:
    config = net_config(tmp_path / "net", tmp_path / "out")
    (tmp_path / "net" / "net.py").write_text(STATEFUL)
    with pytest.raises(ConfigError, match="each worker would have its own; run it without an eng"):
        spread(config)


@pytest.mark.parametrize(("variable", "threads"), [("3", 3), ("", 1)])
def test_threads_of_workers_follow_the_variable_of_openmp(
    variable: str, threads: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    config = load_config(config_for("arrays", inputs, tmp_path) | {"run": {}}).config
    assert EngineRequest(config, None, False, ignore).threads(1) == threads
    assert EngineRequest(config, 7, False, ignore).threads(1) == 7


def test_numbers_of_workers_are_compared_by_whole_runs(
    inputs: Path, tmp_path: Path, inline: InlineEngines
) -> None:
    config = config_for("arrays", inputs, tmp_path / "out")
    config |= {
        "engine": {"source": "processes", "workers": 1},
        "measure": {"memory": False, "processes": 3, "budget": 5, "precision": 1.0},
    }
    compared = gradrun.compare(config, over=("engine.workers", [1, 2])).result
    assert [m.variant for m in compared.measurements[:2]] == [
        "engine.workers=1",
        "engine.workers=2",
    ]
    (comparison,) = compared.comparisons
    seconds = {
        (m.variant, m.process): m.batch_seconds[0] / m.samples for m in compared.measurements
    }
    rounds = [
        seconds["engine.workers=1", number] / seconds["engine.workers=2", number]
        for number in range(len(compared.measurements) // 2)
    ]
    assert comparison.ratio == pytest.approx(np.exp(np.mean(np.log(rounds))))
    (outputs,) = compared.equivalence
    assert outputs.bitwise
    assert {m.samples for m in compared.measurements} == {COUNT}


def test_numbers_of_workers_that_all_fail_are_all_named(
    inputs: Path, tmp_path: Path, inline: InlineEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RunFailed("the model failed")

    monkeypatch.setattr("gradrun.comparison.whole_runs.infer", fail)
    config = config_for("arrays", inputs, tmp_path / "out")
    config |= {"engine": {"source": "processes", "workers": 1}}
    with pytest.raises(RunFailed, match=r"workers=1.*the model failed\n.*workers=2") as caught:
        gradrun.compare(config, over=("engine.workers", [1, 2]))
    assert caught.value.result is None
