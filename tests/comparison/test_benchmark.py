"""run_task: interleaved blocks, exact memory and failing variants.

Most tests run in the test process, with a clock that only the model advances.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradrun.comparison import benchmark
from gradrun.comparison.protocol import Job, Marker, VariantTask, WorkerReport
from gradrun.comparison.worker import Worker
from gradrun.config.load import load_config
from gradrun.models.loaded import LoadedModel
from tests.support.fake_time import FakeTime
from tests.support.workers import keep_gc_unfrozen

MODES = ("grad", "no_grad", "inference_mode")


@pytest.fixture(autouse=True)
def real_gc_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_gc_unfrozen(monkeypatch)


def variants(folder: Path, *modes: str, **changes: Any) -> tuple[VariantTask, ...]:
    written = {
        "model": {"source": "zoo", "name": "mlp", "args": {"width": 4, "depth": 1}},
        "data": {
            "source": "synthetic",
            "inputs": {"x": {"shape": [4]}},
            "samples": 40,
            "batch_size": 8,
        },
        "run": {"threads": 1},
        "output": {"path": str(folder / "out")},
    }
    made = []
    for number, mode in enumerate(modes or MODES):
        config = load_config(written | changes, {"run.mode": mode}).config.model_dump(mode="json")
        again = " again" * (modes or MODES)[:number].count(mode)
        made.append(VariantTask(name=mode + again, config=config))
    return tuple(made)


def job(folder: Path, *modes: str, **changes: Any) -> Job:
    marker = folder / "marker"
    marker.write_bytes(bytes(Marker.SIZE))
    settings = {
        "kind": "time",
        "variants": variants(folder, *modes, **changes.pop("config", {})),
        "seed": 1,
        "seconds": 0.05,
        "marker": str(marker),
    }
    return Job(**(settings | changes))


# --- timing blocks, with a fake clock ------------------------------------------------------------


def current_mode() -> str:
    if torch.is_inference_mode_enabled():
        return "inference_mode"
    return "grad" if torch.is_grad_enabled() else "no_grad"


@dataclass
class Call:
    """One call of the model."""

    mode: str
    batch: int
    model: int


@dataclass
class Bench:
    """A model with a given duration per mode that records its calls."""

    time: FakeTime
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MODES, 0.004))
    calls: list[Call] = field(default_factory=list)
    before: Callable[[Call], None] = lambda call: None
    models: list[nn.Module] = field(default_factory=list)

    def load(self, *_: Any, **__: Any) -> LoadedModel:
        bench = self

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                call = Call(current_mode(), hash(x.numpy().tobytes()), id(self))
                bench.before(call)
                bench.calls.append(call)
                bench.time.now += round(bench.seconds[call.mode] * 1e9)
                self.calls += 1
                return x + 1.0

        self.models.append(Model())
        return LoadedModel(self.models[-1])

    def blocks(self, count: int, rounds: int, sides: int = 3) -> list[list[Call]]:
        """Find the calls of the timed rounds, block by block."""
        timed = count * rounds * sides
        for start in range(len(self.calls) - timed):
            found = [self.calls[start + i : start + i + count] for i in range(0, timed, count)]
            turns = [found[i : i + sides] for i in range(0, len(found), sides)]
            if all(len({c.mode for c in block}) == 1 for block in found) and all(
                len({block[0].mode for block in turn}) == sides for turn in turns
            ):
                return found
        raise AssertionError("found no interleaved blocks")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(FakeTime())
    monkeypatch.setattr(benchmark, "time", made.time)
    monkeypatch.setattr(benchmark, "load_model", made.load)
    return made


def rounds_of(report: WorkerReport) -> dict[str, tuple[float, ...]]:
    assert not report.failures
    return {found.variant: found.batch_seconds for found in report.measurements}


def test_each_variant_gets_its_own_seconds_per_batch(bench: Bench, tmp_path: Path) -> None:
    bench.seconds = {"grad": 0.006, "no_grad": 0.005, "inference_mode": 0.004}
    found = rounds_of(benchmark.run_task(job(tmp_path)))
    for mode, seconds in bench.seconds.items():
        assert found[mode] == pytest.approx([seconds] * len(found[mode]))
    assert len({len(rounds) for rounds in found.values()}) == 1, "a round has a block of each"


@pytest.mark.parametrize(
    ("fastest", "count"), [(0.004, 3), (0.005, 2), (0.0101, 1), (0.5, 1), (0.0007, 15)]
)
def test_every_block_takes_at_least_ten_milliseconds(
    bench: Bench, tmp_path: Path, fastest: float, count: int
) -> None:
    bench.seconds = {"grad": 2 * fastest, "no_grad": 1.5 * fastest, "inference_mode": fastest}
    found = rounds_of(benchmark.run_task(job(tmp_path)))
    rounds = len(found["grad"])
    for block in bench.blocks(count, rounds):
        assert sum(bench.seconds[call.mode] for call in block) >= benchmark.BLOCK_SECONDS


def test_all_variants_run_the_same_model_over_the_same_batches(
    bench: Bench, tmp_path: Path
) -> None:
    found = rounds_of(benchmark.run_task(job(tmp_path, seconds=0.5)))
    blocks = bench.blocks(3, len(found["grad"]))
    assert len({call.model for call in bench.calls}) == 1
    assert len(bench.models) == 1
    batches = {
        mode: [call.batch for block in blocks for call in block if call.mode == mode]
        for mode in MODES
    }
    assert batches["grad"] == batches["no_grad"] == batches["inference_mode"]
    assert len(set(batches["grad"])) == 5, "every batch is used"


def test_variants_with_different_models_load_both(bench: Bench, tmp_path: Path) -> None:
    one, other = variants(tmp_path, "grad", "no_grad")
    other.config["model"]["args"]["depth"] = 2
    benchmark.run_task(job(tmp_path, variants=(one, other)))
    assert len(bench.models) == 2
    assert {(c.mode, c.model) for c in bench.calls} == {
        ("grad", id(bench.models[0])),
        ("no_grad", id(bench.models[1])),
    }


def order_of(bench: Bench, report: WorkerReport) -> list[list[str]]:
    blocks = bench.blocks(3, len(rounds_of(report)["grad"]))
    names = [block[0].mode for block in blocks]
    return [names[i : i + 3] for i in range(0, len(names), 3)]


def test_the_seed_determines_the_random_order_of_blocks(bench: Bench, tmp_path: Path) -> None:
    orders = []
    for seed in (1, 1, 2):
        bench.calls.clear()
        orders.append(order_of(bench, benchmark.run_task(job(tmp_path, seed=seed, seconds=1.0))))
    assert orders[0] == orders[1] != orders[2]
    assert len({tuple(turn) for turn in orders[0]}) == 6, "every order occurs"


def test_grad_is_warmed_up_first_in_any_order_of_variants(bench: Bench, tmp_path: Path) -> None:
    report = benchmark.run_task(job(tmp_path, "inference_mode", "no_grad", "grad"))
    firsts = list(dict.fromkeys(call.mode for call in bench.calls))
    assert firsts == ["grad", "no_grad", "inference_mode"]
    assert [m.variant for m in report.measurements] == ["inference_mode", "no_grad", "grad"]
    assert [(e.baseline, e.candidate) for e in report.equivalence] == [
        ("inference_mode", "no_grad"),
        ("inference_mode", "grad"),
    ]


def test_rounds_continue_for_the_requested_seconds(bench: Bench, tmp_path: Path) -> None:
    found = rounds_of(benchmark.run_task(job(tmp_path, seconds=1.0)))
    assert len(found["grad"]) == 28  # of 3 blocks of 12 ms each; 27 take less than a second


def test_a_slow_model_runs_fewer_rounds_but_at_least_one(bench: Bench, tmp_path: Path) -> None:
    bench.seconds = dict.fromkeys(MODES, 0.02)
    assert len(rounds_of(benchmark.run_task(job(tmp_path)))["grad"]) == 3  # 3 x 60 ms > 3 x 50 ms
    bench.seconds = dict.fromkeys(MODES, 20.0)
    assert len(rounds_of(benchmark.run_task(job(tmp_path)))["grad"]) == 1


def test_a_mode_named_twice_is_measured_twice(bench: Bench, tmp_path: Path) -> None:
    found = rounds_of(benchmark.run_task(job(tmp_path, "grad", "grad")))
    assert list(found) == ["grad", "grad again"]
    assert len(found["grad"]) == len(found["grad again"]) >= 3


def test_buffers_are_restored(bench: Bench, tmp_path: Path) -> None:
    benchmark.run_task(job(tmp_path))
    assert len(bench.calls) > 30
    assert bench.models[0].calls == 0


def test_only_full_batches_are_timed(bench: Bench, tmp_path: Path) -> None:
    data = {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 43, "batch_size": 8}
    report = benchmark.run_task(job(tmp_path, config={"data": data}))
    assert {size for found in report.measurements for size in found.batch_sizes} == {8}
    assert len({call.batch for call in bench.calls}) == 5


def test_a_short_batch_is_timed_if_it_is_the_only_one(bench: Bench, tmp_path: Path) -> None:
    data = {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 3, "batch_size": 8}
    report = benchmark.run_task(job(tmp_path, config={"data": data}))
    assert set(report.measurements[0].batch_sizes) == {3}


def test_at_most_eight_batches_of_large_data_are_loaded(bench: Bench, tmp_path: Path) -> None:
    data = {
        "source": "synthetic",
        "inputs": {"x": {"shape": [4]}},
        "samples": 8_000_000,
        "batch_size": 8,
    }
    benchmark.run_task(job(tmp_path, config={"data": data}))
    assert len({call.batch for call in bench.calls}) == 8


def test_threads_of_each_variant_are_set_while_it_runs(bench: Bench, tmp_path: Path) -> None:
    one, two = variants(tmp_path, "grad", "no_grad")
    two.config["run"]["threads"] = 2
    seen: set[tuple[str, int]] = set()
    bench.before = lambda call: seen.add((call.mode, torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        benchmark.run_task(job(tmp_path, variants=(one, two)))
    finally:
        torch.set_num_threads(before)
    assert seen == {("grad", 1), ("no_grad", 2)}


# --- failing variants ----------------------------------------------------------------------------


def test_an_exception_in_a_round_removes_only_that_variant(bench: Bench, tmp_path: Path) -> None:
    def fail_late(call: Call) -> None:
        if call.mode == "no_grad" and sum(c.mode == "no_grad" for c in bench.calls) > 40:
            raise ValueError("enough\nof this")

    bench.before = fail_late
    report = benchmark.run_task(job(tmp_path, seconds=1.0))
    assert [found.variant for found in report.measurements] == ["grad", "inference_mode"]
    rounds = {len(found.batch_seconds) for found in report.measurements}
    assert len(rounds) == 1
    assert rounds.pop() > 28, "the others get its time"
    (failure,) = report.failures
    assert failure.variant == "no_grad"
    assert failure.error.startswith("ValueError: enough (")
    assert [e.candidate for e in report.equivalence] == ["inference_mode"]


def test_a_failing_first_batch_is_a_config_error(bench: Bench, tmp_path: Path) -> None:
    def fail(call: Call) -> None:
        if call.mode == "grad":
            raise ValueError("not this")

    bench.before = fail
    report = benchmark.run_task(job(tmp_path))
    (failure,) = report.failures
    assert (failure.variant, failure.batch, failure.config_key) == ("grad", 0, "data.inputs")
    assert "not this" in failure.error
    assert [e.baseline for e in report.equivalence] == ["no_grad"]


@pytest.mark.parametrize("batch", [0, 3])
def test_a_backward_without_a_graph_names_the_mode_of_its_variant(
    bench: Bench, tmp_path: Path, batch: int
) -> None:
    def go_back(call: Call) -> None:
        if sum(c.mode == call.mode for c in bench.calls) >= 10 * batch:
            (torch.ones(1, requires_grad=True) * 2).backward()

    bench.before = go_back
    report = benchmark.run_task(job(tmp_path, seconds=1.0))
    assert [found.variant for found in report.measurements] == ["grad"]
    for failure in report.failures:
        assert failure.error.startswith(f"backward() at {__file__}:")
        assert f"the model ran in {failure.variant}," in failure.error
        assert failure.config_key == (None if batch else "run.mode")
    assert {failure.variant for failure in report.failures} == {"no_grad", "inference_mode"}


def test_a_report_is_returned_even_if_all_variants_fail(bench: Bench, tmp_path: Path) -> None:
    def fail(call: Call) -> None:
        raise ValueError("no")

    bench.before = fail
    report = benchmark.run_task(job(tmp_path))
    assert [failure.variant for failure in report.failures] == list(MODES)
    assert (report.measurements, report.equivalence, report.environment) == ((), (), None)


def test_the_marker_names_every_batch_while_memory_is_measured(
    bench: Bench, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    bench.before = lambda call: seen.append(Marker.read(tmp_path / "marker"))
    benchmark.run_task(job(tmp_path, "grad", kind="measure_memory"))
    *timed, last = seen[-6:]
    assert timed == [(0, number) for number in range(5)]
    assert last == timed[-1], "the largest batch, which runs once more"
    assert {variant for variant, _ in seen} == {0}


def test_the_marker_names_the_variant_while_its_model_is_built(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> nn.Module:
        seen.append(Marker.read(tmp_path / "marker"))
        raise ValueError("no weights")

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(benchmark, "load_model", fail)
    benchmark.run_task(job(tmp_path, "inference_mode", "grad"))
    assert seen == [(1, 0), (0, 0)]


# --- memory --------------------------------------------------------------------------------------

WIDE = {
    "model": {"source": "zoo", "name": "mlp", "args": {"width": 256}},
    "data": {
        "source": "synthetic",
        "inputs": {"x": {"shape": [256]}},
        "samples": 64,
        "batch_size": 64,
    },
}
ACTIVATION = 64 * 256 * 4
EXACT = {"grad": 9 * ACTIVATION, "no_grad": 3 * ACTIVATION, "inference_mode": 3 * ACTIVATION}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> WorkerReport:
    folder = tmp_path_factory.mktemp("wide")
    with Worker(job(folder, seconds=0.01, config=WIDE), threads=1) as worker:
        return worker.report(300)


def test_tensor_memory_is_exact_to_the_byte(wide: WorkerReport) -> None:
    assert {found.variant: found.memory.forward_peak for found in wide.measurements} == EXACT
    retained = {found.variant: found.memory.retained for found in wide.measurements}
    # In grad the output of every ReLU is saved; those of Linear are not needed.
    assert retained == {"grad": 8 * ACTIVATION, "no_grad": ACTIVATION, "inference_mode": ACTIVATION}


def test_tensor_memory_is_equal_from_process_to_process(wide: WorkerReport, tmp_path: Path) -> None:
    here = benchmark.run_task(job(tmp_path, seconds=0.01, config=WIDE))
    assert [(m.memory.forward_peak, m.memory.retained) for m in here.measurements] == [
        (m.memory.forward_peak, m.memory.retained) for m in wide.measurements
    ]


def test_weights_and_inputs_are_counted_separately(wide: WorkerReport) -> None:
    for found in wide.measurements:
        assert found.memory.weights == 8 * (256 * 256 + 256) * 4
        assert found.memory.inputs == ACTIVATION


def test_the_process_peak_comes_from_a_process_with_one_variant(
    wide: WorkerReport, tmp_path: Path
) -> None:
    assert {found.memory.process_peak for found in wide.measurements} == {None}
    (alone,) = benchmark.run_task(job(tmp_path, "grad", kind="measure_memory")).measurements
    assert alone.memory.process_peak
    assert (alone.memory.forward_peak, alone.batch_seconds) == (None, ())


def test_tensor_memory_is_not_measured_if_disabled(tmp_path: Path) -> None:
    config = {"measure": {"memory": False}}
    report = benchmark.run_task(job(tmp_path, config=config, seconds=0.01))
    assert {found.memory.forward_peak for found in report.measurements} == {None}


# --- outputs -------------------------------------------------------------------------------------


def test_the_fused_path_of_the_transformer_is_named_and_within_tolerance(tmp_path: Path) -> None:
    encoder = {
        "model": {
            "source": "zoo",
            "name": "transformer_encoder",
            "args": {"d_model": 32, "heads": 2, "layers": 2, "feedforward": 64},
        },
        "data": {
            "source": "synthetic",
            "inputs": {"tokens": {"shape": [8, 32]}},
            "samples": 8,
            "batch_size": 8,
        },
    }
    report = benchmark.run_task(job(tmp_path, seconds=0.01, config=encoder))
    off, inference = report.equivalence
    assert off.first_module == inference.first_module
    assert str(off.first_module).endswith("layers.0 (TransformerEncoderLayer)")
    assert not off.bitwise
    assert off.equal
    assert 0 < off.max_abs_diff < 1e-5


def test_modes_with_the_same_arithmetic_are_bitwise_equal(wide: WorkerReport) -> None:
    assert [(e.candidate, e.bitwise, e.first_module) for e in wide.equivalence] == [
        ("no_grad", True, None),
        ("inference_mode", True, None),
    ]


def test_the_global_random_state_is_not_used(bench: Bench, tmp_path: Path) -> None:
    before = random.getstate()
    benchmark.run_task(job(tmp_path))
    assert random.getstate() == before


@pytest.mark.parametrize("scripted", ["model", "part"])
def test_torchscript_runs_in_every_mode(tmp_path: Path, scripted: str) -> None:
    """Scripted code that compiles in grad mode fails in inference_mode afterwards."""
    torch.manual_seed(0)
    # Another number of layers than in other tests, because equal scripted types share programs.
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5 if scripted == "model" else 6)])
    torch.jit.script(layers.eval()).save(tmp_path / "net.pt")
    model = {"source": "torchscript", "path": str(tmp_path / "net.pt")}
    if scripted == "part":
        (tmp_path / "net.py").write_text(
            "import torch\n"
            "class Net(torch.nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            f"        self.part = torch.jit.load({str(tmp_path / 'net.pt')!r})\n"
            "    def forward(self, x):\n"
            "        return self.part(x) + 1\n"
        )
        model = {"source": "python", "target": f"{tmp_path / 'net.py'}:Net"}
    report = benchmark.run_task(job(tmp_path, config={"model": model}, trust_code=True))
    assert [failure.error for failure in report.failures] == []
    assert len(report.measurements) == 3
    assert [(e.candidate, e.equal) for e in report.equivalence] == [
        ("no_grad", True),
        ("inference_mode", True),
    ]
