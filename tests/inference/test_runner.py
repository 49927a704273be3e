"""The passes of a run, with small modules and a fake clock."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, GradrunError, Interrupted, RunFailed
from gradrun.data.batch import Batch
from gradrun.data.source import BatchSource
from gradrun.inference import first_batch, timed_loop, transfers
from gradrun.inference import runner as the_runner
from gradrun.inference.first_batch import PreparedRun
from gradrun.inference.meters import clock as the_clock
from gradrun.inference.runner import Runner
from gradrun.inference.timed_loop import TimedPass
from gradrun.results.result import Measurement
from tests.support.delayed_transfers import DelayedTransfers
from tests.support.fake_time import FakeTime

CPU = torch.device("cpu")
MODES = {"grad": (True, False), "no_grad": (False, False), "inference_mode": (False, True)}
"""Mode -> (is_grad_enabled, is_inference_mode_enabled) inside it."""


def nothing() -> None:
    pass


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    for module in (first_batch, timed_loop, the_clock):
        monkeypatch.setattr(module, "time", fake)
    return fake


@dataclass
class Numbers(BatchSource):
    """A source of the numbers 0, 1, 2, ...: one float per sample, in batches of two."""

    samples: int = 9
    batch_size: int = 2
    sample_bytes: int = 4
    has_ids: bool = False
    reading: Callable[[], None] = nothing

    def __post_init__(self) -> None:
        self.rows = torch.arange(float(self.samples)).unsqueeze(1)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        for first in range(start, self.samples, self.batch_size):
            rows = self.rows[first : first + self.batch_size]
            self.reading()
            yield Batch((rows,), {}, len(rows), range(first, first + len(rows)))


@dataclass
class ListWriter:
    """A writer that appends rows to a list."""

    rows: list[float] = field(default_factory=list)
    ids: list[int | str] = field(default_factory=list)
    writing: Callable[[], None] = nothing

    @property
    def written(self) -> int:
        return len(self.ids)

    def open(self, outputs: dict[str, torch.Tensor]) -> None: ...

    def write(
        self, outputs: dict[str, torch.Tensor], ids: Sequence[int | str], valid: Any = None
    ) -> None:
        self.writing()
        self.rows += outputs["prediction"].flatten().tolist()
        self.ids += ids

    def close(self) -> None: ...

    def files(self) -> list[str]:
        return []


class Model(nn.Module):
    """x times a weight of one; counts its calls and runs `during` in each of them."""

    def __init__(self, during: Callable[[], None] = nothing) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = SimpleNamespace(calls=0)  # warm-up restores attributes
        self.during = during

    @property
    def calls(self) -> int:
        return self.seen.calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.calls += 1
        self.during()
        return x * self.weight


def config(memory: bool = True, **run: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"source": "layers", "layers": ("Identity",)},
            "data": {"source": "synthetic", "samples": 1, "inputs": {"x": {"shape": (1,)}}},
            "run": {"warmup": 0, "mode": "grad"} | run,
            "measure": {"memory": memory},
            "output": {"path": "out"},
        },
        strict=False,
    )


def make(model: nn.Module, data: Numbers | None = None, **settings: Any) -> Runner:
    return Runner(model, data or Numbers(), config(**settings), CPU)


def run_all(runner: Runner, writer: ListWriter | None = None) -> tuple[TimedPass, Measurement]:
    """Run all passes."""
    prepared = runner.prepare()
    timed = runner.run_timed_pass(prepared, writer or ListWriter())
    return timed, measure(runner, prepared, timed)


def measure(runner: Runner, prepared: PreparedRun, timed: TimedPass) -> Measurement:
    memory = runner.measure_memory(prepared, timed)
    return runner.measurement(prepared, timed, memory, 0.5, 0.25)


# --- the passes --------------------------------------------------------------------------------


def test_only_the_timed_pass_writes_predictions() -> None:
    model, writer = Model(), ListWriter()
    runner = make(model, warmup=3)
    prepared = runner.prepare()
    assert prepared.outputs["prediction"].tolist() == [[0.0], [1.0]]
    assert (model.calls, writer.written) == (1 + 3, 0)
    timed = runner.run_timed_pass(prepared, writer)
    assert (model.calls, writer.written) == (1 + 3 + 5, 9)
    measured = measure(runner, prepared, timed)
    assert (model.calls, writer.written) == (1 + 3 + 5 + 1, 9)
    assert writer.rows == [float(i) for i in range(9)]
    assert writer.ids == list(range(9))
    assert measured.batch_sizes == (2, 2, 2, 2, 1)
    assert len(measured.batch_seconds) == 5
    assert (measured.phases.load_model, measured.phases.open_data) == (0.5, 0.25)
    assert timed.stopped is None


def test_data_forward_and_output_add_up_to_the_total(time: FakeTime) -> None:
    data = Numbers(reading=lambda: time.passes(0.0005))
    writer = ListWriter(writing=lambda: time.passes(0.125))
    runner = make(Model(lambda: time.passes(0.25)), data)
    prepared = runner.prepare()
    began = time.now
    timed = runner.run_timed_pass(prepared, writer)
    total = (time.now - began) * 1e-9
    measured = measure(runner, prepared, timed)
    assert measured.batch_seconds == pytest.approx((0.25,) * 5)
    assert measured.phases.data == pytest.approx(5 * 0.0005)
    assert measured.phases.forward == pytest.approx(5 * 0.25)
    assert measured.phases.output == pytest.approx(5 * 0.125)
    assert measured.seconds == pytest.approx(total)


def test_reading_beside_work_of_the_device_is_not_counted(
    time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches are in flight, with copies that are complete once they are waited for."""
    monkeypatch.setitem(transfers.TRANSFERS, "cpu", DelayedTransfers)
    data = Numbers(reading=lambda: time.passes(0.0005))
    writer = ListWriter(writing=lambda: time.passes(0.125))
    runner = make(Model(lambda: time.passes(0.25)), data, in_flight=3)
    prepared = runner.prepare()
    began = time.now
    timed = runner.run_timed_pass(prepared, writer)
    total = (time.now - began) * 1e-9
    measured = measure(runner, prepared, timed)
    assert writer.rows == [float(i) for i in range(9)]
    assert measured.batch_seconds == pytest.approx((0.25,) * 5)
    assert measured.phases.data == pytest.approx(0.0005)  # that of the first batch
    assert measured.seconds == pytest.approx(total)


def test_the_first_batch_and_the_warm_up_are_timed_separately(time: FakeTime) -> None:
    seconds = iter([3.0, 0.5, 0.5] + [0.25] * 6)
    _, measured = run_all(make(Model(lambda: time.passes(next(seconds))), warmup=2))
    assert measured.phases.first_batch == pytest.approx(3.0)
    assert measured.phases.warm_up == pytest.approx(1.0)
    assert measured.cold_start == pytest.approx(3.75)
    assert measured.batch_seconds == pytest.approx((0.25,) * 5)


def test_a_model_that_writes_into_its_input_still_gets_every_sample_once() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(100)

    writer = ListWriter()
    run_all(make(InPlace(), warmup=4), writer)
    assert writer.rows == [100.0 + i for i in range(9)]


def test_dropout_repeats_with_the_seed() -> None:
    def rows(seed: int) -> list[float]:
        writer = ListWriter()
        run_all(make(nn.Dropout(0.5), Numbers(samples=64), seed=seed), writer)
        return writer.rows

    assert rows(1) == rows(1) != rows(2)


def test_a_failure_on_the_first_batch_is_a_config_error_with_both_shapes() -> None:
    with pytest.raises(ConfigError, match=r"\[2, 1\].*weight \[2, 3\]") as caught:
        make(nn.Linear(3, 2)).prepare()
    assert caught.value.key == "data.inputs"


def test_a_backward_without_a_graph_is_reported_with_the_mode_and_the_line() -> None:
    with pytest.raises(
        ConfigError, match=r"backward\(\) at .*test_runner.py:\d+.*no_grad"
    ) as caught:
        make(Model(lambda: torch.ones(1).backward()), mode="no_grad").prepare()
    assert caught.value.key == "run.mode"


# --- warm-up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_warm_up_runs_the_configured_number_of_times(time: FakeTime, warmup: int) -> None:
    model = Model(lambda: time.passes(0.5))
    make(model, warmup=warmup).prepare()
    assert model.calls == 1 + warmup


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [
        (lambda i: 0.001, 1 + 10),
        (lambda i: 0.001 if i > 4 else 0.02 / 2**i, 1 + 12),
        (lambda i: 0.01 * 1.15**i, 1 + 12),
        (lambda i: 0.2, 1 + 2),
        (lambda i: 1.5, 1),
    ],
    ids=["steady at once", "falls, then steady", "never steady", "half a budget", "over a second"],
)
def test_warm_up_ends_when_steady_or_at_its_time_limit(
    time: FakeTime, seconds: Callable[[int], float], calls: int
) -> None:
    model = Model(lambda: time.passes(seconds(model.calls - 1)))
    make(model, warmup="auto").prepare()
    assert model.calls == calls


class Counting(nn.Module):
    """Changes buffers of each kind while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.register_buffer("in_place", torch.zeros(1))
        self.register_buffer("nan", torch.tensor([float("nan")]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.in_place += 1
        return self.norm(x)


@pytest.mark.parametrize("mode", MODES)
def test_only_the_timed_pass_changes_buffers(mode: str) -> None:
    def buffers() -> dict[str, torch.Tensor]:
        return {name: buffer.clone() for name, buffer in model.named_buffers()}

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)

    model = Counting().train()
    runner = make(model, Numbers(samples=8), mode=mode, warmup=4)
    before = buffers()
    prepared = runner.prepare()
    assert same(buffers(), before)
    timed = runner.run_timed_pass(prepared, ListWriter())
    after = buffers()
    assert (after["in_place"].item(), after["norm.num_batches_tracked"].item()) == (4, 4)
    measure(runner, prepared, timed)
    assert same(buffers(), after)


def test_warm_up_restores_replaced_buffers() -> None:
    class Replacing(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count = self.count + 1
            return super().forward(x)

    model = Replacing()
    make(model, warmup=4).prepare()
    assert model.count.item() == 0


# --- early stops -------------------------------------------------------------------------------


def stops_at(batch: int, error: BaseException) -> Callable[[], None]:
    """Raise in the call for this batch of the timed pass, which follows the first batch's."""
    calls = 0

    def during() -> None:
        nonlocal calls
        calls += 1
        if calls == 1 + batch + 1:
            raise error

    return during


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (KeyboardInterrupt(), Interrupted, "interrupted"),
        (ValueError("no\nmore"), RunFailed, "starts at sample {first}, failed: ValueError: no"),
        (ConfigError("a bad row", "data"), RunFailed, "a bad row"),
        (
            OSError(28, "No space left on device"),
            RunFailed,
            "the predictions cannot be written: No space left",
        ),
    ],
    ids=["Ctrl-C", "model", "data", "disk"],
)
def test_after_a_stop_the_earlier_batches_are_kept(
    batch: int, error: BaseException, kind: type[GradrunError], text: str
) -> None:
    writer = ListWriter()
    runner = make(Model(stops_at(batch, error)))
    timed, measured = run_all(runner, writer)
    assert type(timed.stopped) is kind
    assert text.format(first=2 * batch) in str(timed.stopped)
    assert list(timed.sizes) == [2] * batch
    assert writer.rows == [float(i) for i in range(2 * batch)]
    assert len(measured.batch_seconds) == len(measured.batch_sizes) == batch
    assert (measured.memory.forward_peak, measured.memory.retained) == (None, None)
    assert torch.is_grad_enabled()


def test_a_backward_without_a_graph_in_a_later_batch_is_reported_with_the_mode() -> None:
    model = Model(lambda: model.calls == 3 and torch.ones(1).backward())
    timed, _ = run_all(make(model, mode="inference_mode"))
    text = str(timed.stopped)
    assert text.startswith("batch 1, which starts at sample 2, failed: backward() at ")
    assert "the model ran in inference_mode" in text


@pytest.mark.parametrize("where", ["reading", "writing"])
def test_an_interrupt_outside_the_model_stops_the_run_too(where: str) -> None:
    data, writer = Numbers(), ListWriter()
    runner = make(Model(), data)
    prepared = runner.prepare()
    setattr(data if where == "reading" else writer, where, stops_at(2, KeyboardInterrupt()))
    timed = runner.run_timed_pass(prepared, writer)
    assert isinstance(timed.stopped, Interrupted)
    timed.trim(writer.written)
    measured = measure(runner, prepared, timed)
    assert measured.samples == writer.written == 6
    assert len(measured.batch_seconds) == len(measured.batch_sizes) == 3


def test_the_phases_of_a_stopped_run_cover_its_complete_batches(time: FakeTime) -> None:
    stop = stops_at(2, KeyboardInterrupt())

    def during() -> None:
        time.passes(0.25)
        stop()

    data = Numbers(reading=lambda: time.passes(0.0005))
    _, measured = run_all(make(Model(during), data), ListWriter(writing=lambda: time.passes(0.125)))
    assert measured.phases.data == pytest.approx(2 * 0.0005)
    assert measured.phases.output == pytest.approx(2 * 0.125)


def test_ctrl_c_during_the_memory_pass_stops_the_run() -> None:
    runner = make(Model(stops_at(5, KeyboardInterrupt())))
    timed, measured = run_all(runner)
    assert isinstance(timed.stopped, Interrupted)
    assert measured.samples == 9
    assert measured.memory.forward_peak is None


# --- the mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "inside"), MODES.items())
@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_the_mode_applies_only_inside_forwards(
    mode: str, inside: tuple[bool, bool], outside: Any
) -> None:
    seen = []

    def look() -> None:
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    with outside():
        before = torch.is_grad_enabled()
        run_all(make(Model(look), mode=mode, warmup=2))
        assert torch.is_grad_enabled() is before
    assert not torch.is_inference_mode_enabled()
    assert seen == [inside] * (1 + 2 + 5 + 1)


def test_autocast_applies_inside_every_forward() -> None:
    seen = []
    model = Model(lambda: seen.append(torch.is_autocast_enabled("cpu")))
    run_all(make(model, autocast="bfloat16", warmup=1))
    assert seen == [True] * (1 + 1 + 5 + 1)
    assert not torch.is_autocast_enabled("cpu")


def test_the_graph_of_a_batch_is_freed_before_the_next_forward() -> None:
    class Remembering(Model):
        def __init__(self) -> None:
            super().__init__()
            self.refs: list[Any] = []
            self.alive: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.alive.append(sum(ref() is not None for ref in self.refs))
            returned = super().forward(x)
            assert returned.grad_fn is not None
            self.refs.append(weakref.ref(returned))
            return returned

    model = Remembering()
    runner = make(model, mode="grad")
    prepared = runner.prepare()
    model.refs.clear()
    model.alive.clear()
    runner.run_timed_pass(prepared, ListWriter())
    assert model.alive == [0] * 5


# --- progress ----------------------------------------------------------------------------------


def test_progress_is_reported_a_few_times_per_second(time: FakeTime) -> None:
    model = Model(lambda: time.passes(0.06))
    runner = make(model, Numbers(samples=40))
    prepared = runner.prepare()
    reports: list[tuple[int, float]] = []
    began = time.perf_counter()
    runner.run_timed_pass(
        prepared,
        ListWriter(),
        progress=lambda progress: reports.append((progress.done, time.perf_counter() - began)),
    )
    assert [count for count, _ in reports] == [8, 16, 24, 32, 40]
    gaps = [after - before for (_, before), (_, after) in itertools.pairwise(reports)]
    assert min(gaps) > 0.2


# --- meters ------------------------------------------------------------------------------------


def test_memory_is_measured_for_the_first_batch() -> None:
    _, measured = run_all(make(Model()))
    memory = measured.memory
    assert (memory.weights, memory.inputs) == (4, 8)
    assert (memory.forward_peak, memory.retained) == (8, 8)
    assert memory.process_peak
    assert memory.process_peak > 2**20
    assert (memory.device_allocated, memory.device_reserved) == (None, None)


def test_the_memory_pass_is_skipped_if_disabled() -> None:
    model = Model()
    _, measured = run_all(make(model, memory=False))
    assert (measured.memory.forward_peak, measured.memory.retained) == (None, None)
    assert model.calls == 1 + 5


def test_a_failed_memory_pass_is_a_warning() -> None:
    runner = make(Model(stops_at(5, RuntimeError("not here"))))
    timed, measured = run_all(runner)
    assert timed.stopped is None
    assert measured.memory.forward_peak is None
    (warning,) = runner.warnings
    assert warning.code == "no_tensor_memory"
    assert "RuntimeError: not here" in warning.text
    assert "measure.memory: false" in warning.text


def test_a_device_without_a_memory_meter_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_runner, "FORWARD_MEMORY", {})
    runner = make(Model())
    _, measured = run_all(runner)
    assert (measured.memory.forward_peak, measured.memory.retained) == (None, None)
    assert [warning.code for warning in runner.warnings] == ["no_tensor_memory"]
