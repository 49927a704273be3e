"""Results: statistics, saving and loading, and the upgrade from format 1."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from gradrun.core.errors import GradrunError
from gradrun.core.grad_mode import GradMode
from gradrun.report import tables
from gradrun.results.result import (
    CompareResult,
    Compilation,
    Memory,
    Phases,
    RunInfo,
    RunResult,
    Warning,
    WorkerStats,
)
from tests.support.run_results import MEMORY, PHASES, measurement, run_result

FORMAT_1 = Path(__file__).parents[1] / "golden" / "result-of-0.1.0.json"


def test_a_saved_result_is_loaded_unchanged(tmp_path: Path) -> None:
    result = run_result(warnings=(Warning(code="few_batches", text="µ – [bold] \x1b"),))
    result.save(tmp_path / "result.json")
    assert RunResult.load(tmp_path / "result.json") == result
    assert RunResult.load(str(tmp_path)) == result
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_floats_are_saved_exactly(tmp_path: Path) -> None:
    rng = random.Random(7)
    times = [rng.random() * 10.0 ** rng.randint(-12, 4) for _ in range(5_000)]
    times += [0.1 + 0.2, 5e-324, 1e9, 1 / 3, 0.0]
    sizes = (1,) * len(times)
    result = run_result(measurement(batch_seconds=tuple(times), batch_sizes=sizes))
    result.save(tmp_path / "result.json")
    back = RunResult.load(tmp_path).measurements[0].batch_seconds
    assert struct.pack(f"{len(times)}d", *back) == struct.pack(f"{len(times)}d", *times)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text.replace('"format": 2', '"format": "3"'), "format"),
        (lambda text: text.replace('"kind": "infer"', '"kind": "tea"'), "kind"),
        (lambda text: text[: len(text) // 2], "JSON"),
        (lambda text: text.replace('"forward": 0.09', '"forward": "long"'), "forward"),
        (lambda text: text.replace('"inference_mode"', '"nograd"'), "mode"),
        (lambda text: "", "JSON"),
        (lambda text: "[]", ""),
        (lambda text: "{}", "'config'"),
        (lambda text: text.replace('"kind"', '"\\ud800": 1, "kind"'), "surrogates"),
        (lambda text: text.replace('"infer"', '"modes"'), "Invalid value 'modes'"),
        (lambda text: text.replace('"weights": 263464', '"weights": -5'), "weights"),
        (lambda text: text.replace('"forward": 0.09', '"forward": 1.7e308'), "forward"),
    ],
    ids=[
        "version", "kind", "cut off", "type", "mode", "empty", "list", "no keys", "no UTF-8",
        "another command", "below 0", "longer than a life",
    ],
)  # fmt: skip
def test_an_invalid_result_is_an_error_with_the_file_name(
    tmp_path: Path, change, complaint: str
) -> None:
    file = tmp_path / "result.json"
    text = run_result().to_json()
    assert change(text) != text
    file.write_text(change(text))
    with pytest.raises(GradrunError, match="is not a gradrun result") as caught:
        RunResult.load(file)
    assert str(file) in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "nowhere/result.json", "."])
def test_a_missing_result_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(GradrunError, match="No such file"):
        RunResult.load(tmp_path / name)


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    data = json.loads(run_result().to_json())
    data["weather"] = data["measurements"][0]["moon"] = "full"
    (tmp_path / "result.json").write_text(json.dumps(data))
    assert RunResult.load(tmp_path) == run_result()


def test_a_result_of_format_1_is_upgraded() -> None:
    result = RunResult.from_json(FORMAT_1.read_text(encoding="utf-8"))
    assert isinstance(result, CompareResult)
    assert result.format == 2
    assert result.info == RunInfo(
        model="layers",
        mode=GradMode.GRAD,
        output_path="runs/layers-compare",
        batch_size=64,
        precision=0.01,
    )
    assert RunResult.from_json(result.to_json()) == result


def test_the_renamed_count_of_quarantined_samples_of_format_1_is_upgraded() -> None:
    run = json.loads(run_result(quarantined=3).to_json())
    run["apart"], run["format"] = run.pop("quarantined"), 1
    del run["info"]
    assert RunResult.from_json(json.dumps(run)).quarantined == 3


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    run_result().save(file)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        run_result(started_at="later").save(file)
    assert RunResult.load(file) == run_result()


def test_the_json_has_the_documented_keys() -> None:
    data = json.loads(run_result().to_json())
    assert {
        "format", "kind", "gradrun", "started_at", "info", "config", "environment", "measurements",
        "warnings",
    } <= data.keys()  # fmt: skip
    assert (data["format"], data["kind"]) == (2, "infer")
    assert {"torch", "python", "cpu", "cores", "threads", "device"} <= data["environment"].keys()
    assert {"model", "data", "run", "output"} <= data["config"].keys()
    (measured,) = data["measurements"]
    assert measured.keys() == {
        "mode", "process", "variant", "batch_seconds", "batch_sizes", "batch_elements",
        "phases", "memory", "batch_limit", "padding", "generation", "compilation", "workers",
            "work", "peaks",
    }  # fmt: skip
    assert {
        "load_model", "open_data", "first_batch", "data", "forward", "output"
    } <= measured["phases"].keys()  # fmt: skip
    assert {
        "weights", "inputs", "forward_peak", "retained", "process_peak", "device_allocated",
        "device_reserved",
    } <= measured["memory"].keys()  # fmt: skip
    assert measured["memory"]["device_allocated"] is None


def test_statistics_are_computed_from_raw_samples() -> None:
    measured = measurement()
    times = list(measured.batch_seconds)
    for q in (0.5, 0.9, 0.95, 0.99):
        estimate = measured.latency(q)
        assert estimate
        assert estimate.value == pytest.approx(np.quantile(times, q), rel=1e-12)
    doubled = measurement(batch_seconds=tuple(2 * t for t in times)).latency(0.5)
    median = measured.latency(0.5)
    assert doubled
    assert median
    assert doubled.value == 2 * median.value
    assert measured.samples == 124 * 4 + 2
    assert measured.seconds == pytest.approx(0.006 + 0.09 + 0.0042)
    assert measured.throughput == pytest.approx(498 / 0.1002)
    assert measured.cold_start == pytest.approx(0.0123 + 0.0004 + 0.0042)


@pytest.mark.parametrize("phase", ["data", "forward", "output"])
def test_a_run_is_bound_by_the_phase_that_took_longest(phase: str) -> None:
    times = {"data": 0.1, "forward": 0.1, "output": 0.1} | {phase: 0.3}
    bound, shares = measurement(phases=PHASES.replace(**times)).bound_by
    assert bound == phase
    assert shares[phase] == pytest.approx(0.6)
    assert sum(shares.values()) == pytest.approx(1)


def test_an_empty_run_has_zero_throughput() -> None:
    nothing = Phases(**dict.fromkeys(Phases.__struct_fields__, 0.0))
    measured = measurement(0, phases=nothing)
    assert (measured.throughput, measured.samples, measured.latency(0.5)) == (0.0, 0, None)
    assert measured.bound_by[1] == {"data": 0.0, "forward": 0.0, "output": 0.0}


def test_an_unmeasured_value_is_none_and_not_zero() -> None:
    memory = Memory(weights=1, inputs=1)
    told = {"weights": 1, "inputs": 1, "process_method": "unavailable", "shape": ()}
    assert memory.as_dict() == told | dict.fromkeys(
        "batch first_batch forward_peak retained timeline peak_module process_peak "
        "device_allocated device_reserved".split()
    )


def test_results_are_immutable() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        run_result().kind = "infer"  # type: ignore[misc]
    with pytest.raises(AttributeError, match="immutable"):
        MEMORY.weights = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("eager", "compiled", "workers", "samples"),
    [
        # 0.1 s per sample; eager would take 0.15 s, so 10 s are saved after 200 samples.
        (0.375, 0.25, 1, 200),
        (0.375, 0.25, 2, 400),
        (0.2, 0.2, 1, None),
        (0.1, 0.2, 1, None),
    ],
)
def test_compiling_is_repaid_once_the_saved_time_exceeds_it(
    eager: float, compiled: float, workers: int, samples: int | None
) -> None:
    measured = measurement().replace(
        batch_seconds=(1.0, 1.0),
        batch_sizes=(10, 10),
        compilation=Compilation(seconds=10.0, graphs=1, eager=eager, compiled=compiled),
        workers=tuple(
            WorkerStats(worker=i, node="a", cold_start=1.0, samples=10) for i in range(workers)
        ),
    )
    assert measured.samples_to_repay_compilation == samples
    timing = {row[0]: [*map(str, row[1:])] for row in tables.timing(measured).rows}
    pays = f"pays after {samples} samples" if samples else "does not pay"
    gain = f"{eager / compiled:.2f} x" if eager != 0.1 else "0.500 x"
    assert timing["compile"] == ["10.0 s", f"{gain} as fast as eager on the first batch: {pays}"]
