"""Variants in processes of their own: differences of outputs, alternating blocks, comparisons."""

from __future__ import annotations

import itertools
import random
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

import gradrun
from gradrun.comparison import turns
from gradrun.comparison.lanes import _divide, deviation, lane_workers, open_lane
from gradrun.comparison.turns import common_samples, take_turns
from gradrun.config.load import load_config
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, RunFailed
from tests.support.engines import InlineEngine
from tests.support.lanes import Clock, Planted, PlantedLane, inline_lanes, planted_ready

BASE: dict[str, Any] = {
    "model": {"source": "layers", "layers": [{"Linear": [8, 4]}]},
    "data": {
        "source": "synthetic", "inputs": {"x": {"shape": [8]}}, "samples": 96, "batch_size": 8,
    },
    "output": {"path": "out"},
}  # fmt: skip


def _config(**changes: Any) -> RunConfig:
    return load_config(BASE, changes).config


def _rows(*values: list[float]) -> list[dict[str, torch.Tensor]]:
    return [{"y": torch.tensor(value)} for value in values]


def _compare(one: Any, two: Any) -> Any:
    return deviation(one, two, rtol=1.3e-6, atol=1e-5)


def test_equal_outputs_are_bitwise_equal_even_with_nan() -> None:
    found = _compare(_rows([1.0, float("nan")]), _rows([1.0, float("nan")]))
    assert found.bitwise
    assert (found.max_abs, found.max_rel, found.cosine, found.top1) == (0, 0, 1, 1)


def test_differences_are_those_of_a_plain_loop() -> None:
    one, two = [[3.0, -4.0], [1.0, 2.0]], [[3.0, -4.5], [2.5, 2.0]]
    found = _compare(_rows(*one), _rows(*two))
    assert not found.bitwise
    assert not found.close
    assert found.max_abs == 1.5
    assert found.max_rel == 1.5 / 4.0
    expected = min(
        float(cosine_similarity(torch.tensor(a), torch.tensor(b), dim=0))
        for a, b in zip(one, two, strict=True)
    )
    assert found.cosine == pytest.approx(expected)
    assert found.top1 == 0.5


def test_a_new_nan_is_an_infinite_difference() -> None:
    found = _compare(_rows([1.0, 2.0]), _rows([1.0, float("nan")]))
    assert found.max_abs == float("inf")
    assert not found.close


def test_impossible_classes_do_not_hide_the_difference_of_the_others() -> None:
    masked = -float("inf")
    found = _compare(_rows([masked, 4.0, 3.0]), _rows([masked, 5.0, 3.0]))
    assert (found.max_abs, found.max_rel) == (1.0, 0.25)
    assert found.cosine == pytest.approx((20 + 9) / (5 * 34**0.5))
    opened = _compare(_rows([masked, 4.0]), _rows([0.0, 4.0]))
    assert (opened.max_abs, opened.max_rel, opened.cosine) == (-masked, -masked, -1)


def test_a_complex_value_counts_as_two_numbers() -> None:
    one, two = ([{"y": torch.tensor([value, 1.0])}] for value in (3 + 4j, 3 + 6j))
    found = _compare(one, two)
    assert (found.max_abs, found.max_rel, found.close) == (2.0, 0.5, False)


def test_outputs_without_values_are_equal() -> None:
    assert _compare(_rows([], []), _rows([], [])).bitwise


def test_negative_zero_is_close_but_not_bitwise_equal() -> None:
    found = _compare(_rows([0.0, 1.0]), _rows([-0.0, 1.0]))
    assert not found.bitwise
    assert found.close


def test_another_dtype_is_never_bitwise_equal() -> None:
    two = [{"y": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}]
    found = _compare(_rows([1.0, 2.0]), two)
    assert not found.bitwise
    assert found.max_abs == 0


def test_padding_of_texts_is_left_out_but_another_shape_is_an_error() -> None:
    padded = _compare(_rows([1.0, 2.0], [3.0, 4.0, 0.0]), _rows([1.0, 2.0, 9.0], [3.0, 4.0, 9.0]))
    assert padded.max_abs == 9.0  # of the second sample, whose third value both have
    assert _compare(_rows([1.0], [3.0, 4.0]), _rows([1.0, 9.0], [3.0, 4.0])).max_abs == 0
    with pytest.raises(RunFailed, match=r"shape \[3\], not \[2\]"):
        _compare(_rows([1.0, 2.0]), _rows([1.0, 2.0, 3.0]))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 20), st.integers(1, 400), st.integers(1, 8), st.integers(1, 32))
def test_parts_of_workers_cover_a_range_at_multiples_of_the_unit(
    first: int, length: int, workers: int, unit: int
) -> None:
    start = first * unit
    parts = _divide(start, start + length, workers, unit)
    assert [n for a, b in parts for n in range(a, b)] == [*range(start, start + length)]
    assert all(a % unit == 0 and a < b for a, b in parts)
    assert len(parts) <= workers


def _lane(config: RunConfig, clock: Clock, planted: Planted, **ready: Any) -> PlantedLane:
    made = planted_ready(config, **ready)
    return PlantedLane(config, planted, made, clock, random.Random(1))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_lanes_of_other_batch_sizes_run_whole_batches(one: int, two: int, varies: bool) -> None:
    clock = Clock()
    lanes = [
        _lane(_config(**{"data.batch_size": size}), clock, Planted(seconds), varies=varies)
        for size, seconds in ((one, 0.001), (two, 0.0001))
    ]
    window = common_samples(lanes, 40, start=10)
    taken = take_turns(lanes, window, rounds=3, seconds=0.02)
    ratio = taken[0].seconds_per_sample[0] / taken[1].seconds_per_sample[0]
    assert ratio == pytest.approx(10)
    assert all(len(turn.blocks) == 3 for turn in taken)
    if varies:
        assert len({block.samples for turn in taken for block in turn.blocks}) <= 2


@pytest.mark.parametrize("varies", [False, True])
def test_the_blocks_are_spread_over_data_that_are_sorted(varies: bool) -> None:
    """Ten times as fast in the first eighth of the samples, and as fast elsewhere."""
    clock, runs = Clock(), list[tuple[int, int]]()
    config = _config(**{"data.samples": 9600})

    def cost(sample: int) -> float:
        return 0.1 if sample < 1200 else 1.0

    base = _lane(config, clock, Planted(0.001), varies=varies)
    other = _lane(
        config, clock, Planted(0.001, cost=cost, check=lambda *run: runs.append(run)), varies=varies
    )
    taken = take_turns([base, other], (0, 9600))
    ratios = [a / b for a, b in zip(*(t.seconds_per_sample for t in taken), strict=True)]
    assert median(ratios) == pytest.approx(1)
    starts = sorted(start for start, _ in runs)
    assert starts[0] == 0
    assert max(b - a for a, b in itertools.pairwise([*starts, 9600])) < 9600 / 2


def test_data_that_are_invalid_are_an_error_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_lanes(monkeypatch)
    config = _config(**{"data.inputs": {"x": {"shape": [9]}}})
    with pytest.raises(ConfigError, match=r"^the model failed on the input \[8, 9\]"):
        open_lane(config, trust_code=False, timeout=60)


def test_a_lane_whose_process_ends_in_a_block_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = inline_lanes(monkeypatch)
    with closing(open_lane(_config(), trust_code=False, timeout=60)) as lane:
        engines[0].dies = lambda worker, task: True
        with pytest.raises(RunFailed, match=r"^worker 1 was killed by SIGKILL$"):
            lane.run(0, 96)


def test_a_sample_without_a_prediction_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_lanes(monkeypatch)
    (tmp_path / "a.jsonl").write_text('{"x": [1, 2]}\n{"x": [1, 2]}\n{"x": "no"}\n')
    changes = {
        "model": {"source": "layers", "layers": [{"Linear": [2, 1]}]},
        "data": {
            "source": "records", "path": f"{tmp_path}/a.jsonl",
            "inputs": {"x": {"columns": ["x"]}}, "batch_size": 1,
        },
        "run": {"on_error": "quarantine", "warmup": 0},
    }  # fmt: skip
    lane = open_lane(load_config(BASE | changes).config, trust_code=False, timeout=60)
    with (
        closing(lane),
        pytest.raises(RunFailed, match=r"sample 2 has no prediction, so that outputs cannot"),
    ):
        lane.run(0, 3, rows=True)


def test_a_lane_gives_the_rows_of_a_plain_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_lanes(monkeypatch)
    config = _config(**{"output.path": str(tmp_path / "out")})
    expected = gradrun.infer(config).predictions
    import numpy as np

    saved = np.load(tmp_path / "out" / "predictions.npy")
    lane = open_lane(config, trust_code=False, timeout=60)
    try:
        block = lane.run(0, 96, rows=True)
    finally:
        lane.close()
    assert expected == block.samples == 96
    assert np.array_equal(torch.stack([row["prediction"] for row in block.rows]).numpy(), saved)
    assert block.process_peak
    assert lane.ready.modules["Linear"] == 1
    assert lane.ready.memory.weights == (8 * 4 + 4) * 4


def test_lanes_with_workers_give_the_rows_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    inline_lanes(monkeypatch)
    alone = open_lane(_config(), trust_code=False, timeout=60)
    both = open_lane(
        _config(engine={"source": "processes", "workers": 2}, **{"run.threads": 1}),
        trust_code=False,
        timeout=60,
    )
    try:
        one, two = (lane.run(8, 88, rows=True).rows for lane in (alone, both))
    finally:
        alone.close()
        both.close()
    assert len(both.workers) == 2
    assert deviation(one, two, rtol=1e-6, atol=1e-6).close


def _texts(*lengths: int, width: int = 2) -> list[dict[str, torch.Tensor]]:
    """Rows [length, width] whose numbers follow from their place."""
    return [{"y": torch.arange(float(length * width)).reshape(length, width)} for length in lengths]


def test_a_single_value_has_another_class_beyond_one_half() -> None:
    found = _compare(_rows([1.0], [2.0], [3.0]), _rows([1.4], [2.6], [3.0]))
    assert found.top1 == pytest.approx(2 / 3)
    assert found.max_abs == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (_texts(3, 1), "outputs of 2 samples instead of 3"),
        ([{"z": row["y"]} for row in _texts(3, 1, 2)], "the outputs are z instead of y"),
        ([{"y": torch.zeros(4)}] * 3, "an output has shape [4], not [3, 2]"),
        (
            [*_texts(3), {"y": torch.zeros(2)}, *_texts(2)],
            "an output has shape [2], not [1, 2]",
        ),
    ],
)
def test_outputs_of_another_layout_cannot_be_compared(other: Any, problem: str) -> None:
    with pytest.raises(RunFailed) as caught:
        _compare(_texts(3, 1, 2), other)
    assert str(caught.value) == problem


def test_a_cluster_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"other machines.*engine\.source: processes"):
        lane_workers(_config(engine={"source": "ray"}))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[InlineEngine]:
    """The engines of lanes in this process, which run short blocks."""
    monkeypatch.setattr(turns, "BLOCK_SECONDS", 0.01)
    return inline_lanes(monkeypatch)


def test_a_setting_of_the_process_is_compared_in_processes_of_its_own(
    tmp_path: Path, engines: list[InlineEngine]
) -> None:
    config = _config(**{"output.path": str(tmp_path / "out"), "measure.processes": 2})
    found = gradrun.compare(
        config, over=("run.allocator", ["system", "retain"]), **{"measure.budget": 0.01}
    )
    assert [engine.opening.config["run"]["allocator"] for engine in engines] == [
        "system", "retain", "system", "retain",
    ]  # fmt: skip
    assert [c.candidate for c in found] == ["run.allocator=retain"]
    (equivalence,) = found.result.equivalence
    assert equivalence.bitwise
    assert {m.process for m in found.result.measurements} == {0, 1}
    assert all(m.memory.process_peak for m in found.result.measurements)


def test_a_variant_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inline_lanes(monkeypatch)
    config = _config(**{"output.path": str(tmp_path / "out"), "data.inputs": {"x": {"shape": [9]}}})
    with pytest.raises(RunFailed, match=r"run\.allocator=system"):
        gradrun.compare(config, over=("run.allocator", ["system", "retain"]))


def test_two_configs_are_compared_by_their_file_names(
    tmp_path: Path, engines: list[InlineEngine]
) -> None:
    (tmp_path / "base.yaml").write_text(_yaml("batch_size: 8"))
    (tmp_path / "fast.yaml").write_text(_yaml("batch_size: 32"))
    found = gradrun.compare(
        tmp_path / "fast.yaml",
        against=tmp_path / "base.yaml",
        **{"measure.processes": 2, "measure.budget": 0.01},
    )
    assert [(c.baseline, c.candidate) for c in found] == [("base.yaml", "fast.yaml")]
    sizes = [engine.opening.config["data"]["batch_size"] for engine in engines]
    assert sizes == [8, 32, 8, 32]
    (equivalence,) = found.result.equivalence
    assert equivalence.equal
    assert not engines[0].runners


def test_a_config_is_compared_with_itself_under_two_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: list[InlineEngine]
) -> None:
    (tmp_path / "mine.yaml").write_text(_yaml("batch_size: 8"))
    monkeypatch.chdir(tmp_path)
    path = Path("mine.yaml")
    found = gradrun.compare(path, against=path, **{"measure.processes": 2, "measure.budget": 0.01})
    assert [(c.baseline, c.candidate) for c in found] == [("mine.yaml", "mine.yaml again")]


def test_an_unknown_peak_of_a_process_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    inline_lanes(monkeypatch)
    monkeypatch.setattr("gradrun.inference.meters.process_memory.peak_resident", lambda: (None, ""))
    lane = open_lane(_config(), trust_code=False, timeout=60.0)
    assert lane.run(0, 8).process_peak is None
    lane.close()


def _yaml(size: str) -> str:
    return f"""
model: {{source: layers, layers: [{{Linear: [8, 4]}}]}}
data: {{source: synthetic, inputs: {{x: {{shape: [8]}}}}, samples: 96, {size}}}
output: {{path: out}}
"""
