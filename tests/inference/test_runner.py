"""The one loop, driven with tiny modules and a clock that moves only when it is told to."""

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
from gradrun.inference import runner as the_runner
from gradrun.inference.meters import clock as the_clock
from gradrun.inference.runner import Runner, TimedPass
from gradrun.results.result import Measurement

CPU = torch.device("cpu")
MODES = {"grad": (True, False), "no_grad": (False, False), "inference_mode": (False, True)}
"""mode -> what torch says inside it: (is_grad_enabled, is_inference_mode_enabled)."""


def nothing() -> None:
    pass


@dataclass
class FakeTime:
    """Stands in for the time module."""

    now: int = 0

    def perf_counter_ns(self) -> int:
        return self.now

    def perf_counter(self) -> float:
        return self.now * 1e-9

    def passes(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(the_runner, "time", fake)
    monkeypatch.setattr(the_clock, "time", fake)
    return fake


@dataclass
class Numbers:
    """0, 1, 2, ... as data: one float a sample, in batches of two."""

    samples: int = 9
    batch_size: int = 2
    sample_bytes: int = 4
    reading: Callable[[], None] = nothing

    def __post_init__(self) -> None:
        self.rows = torch.arange(float(self.samples)).unsqueeze(1)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        for first in range(start, self.samples, self.batch_size):
            rows = self.rows[first : first + self.batch_size]
            self.reading()
            yield Batch((rows,), {}, len(rows), range(first, first + len(rows)))


@dataclass
class JournalState:
    """A sink that keeps its rows in a list."""

    rows: list[float] = field(default_factory=list)
    ids: list[int | str] = field(default_factory=list)
    writing: Callable[[], None] = nothing

    @property
    def written(self) -> int:
        return len(self.ids)

    def open(self, outputs: dict[str, torch.Tensor]) -> None: ...

    def write(
        self, outputs: dict[str, torch.Tensor], ids: Sequence[int | str], missing: Any = ()
    ) -> None:
        self.locked()
        self.rows += outputs["prediction"].flatten().tolist()
        self.ids += ids

    def close(self) -> None: ...

    def files(self) -> list[str]:
        return []


class Model(nn.Module):
    """x times a weight of one; counts its calls and does `during` inside each of them."""

    def __init__(self, during: Callable[[], None] = nothing) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = SimpleNamespace(calls=0)  # not an attribute, which warm-up would put back
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


def done(runner: Runner, sink: JournalState | None = None) -> tuple[TimedPass, Measurement]:
    """The three passes, one after the other."""
    runner.prepare()
    gathered = runner.run(sink or JournalState())
    return gathered, runner.finish(gathered, 0.5, 0.25)


# --- the passes --------------------------------------------------------------------------------


def test_the_passes_follow_one_another_and_only_run_writes() -> None:
    model, sink = Model(), JournalState()
    runner = make(model, warmup=3)
    outputs = runner.prepare()
    assert outputs["prediction"].tolist() == [[0.0], [1.0]]
    assert (model.calls, sink.written) == (1 + 3, 0)
    gathered = runner.run(sink)
    assert (model.calls, sink.written) == (1 + 3 + 5, 9)
    measured = runner.finish(gathered, 0.5, 0.25)
    assert (model.calls, sink.written) == (1 + 3 + 5 + 1, 9)
    assert sink.rows == [float(i) for i in range(9)]
    assert sink.ids == list(range(9))
    assert measured.batch_sizes == (2, 2, 2, 2, 1)
    assert len(measured.batch_seconds) == 5
    assert (measured.phases.load_model, measured.phases.open_data) == (0.5, 0.25)
    assert gathered.stopped is None


def test_data_forward_and_output_add_up_to_the_whole(time: FakeTime) -> None:
    data = Numbers(reading=lambda: time.passes(0.0005))
    sink = JournalState(writing=lambda: time.passes(0.125))
    runner = make(Model(lambda: time.passes(0.25)), data)
    runner.prepare()
    began = time.now
    gathered = runner.run(sink)
    whole = (time.now - began) * 1e-9
    measured = runner.finish(gathered, 0, 0)
    assert measured.batch_seconds == pytest.approx((0.25,) * 5)
    assert measured.phases.data == pytest.approx(5 * 0.0005)
    assert measured.phases.forward == pytest.approx(5 * 0.25)
    assert measured.phases.output == pytest.approx(5 * 0.125)
    assert measured.seconds == pytest.approx(whole)


def test_the_first_batch_and_the_warm_up_are_timed_apart(time: FakeTime) -> None:
    seconds = iter([3.0, 0.5, 0.5] + [0.25] * 6)
    _, measured = done(make(Model(lambda: time.passes(next(seconds))), warmup=2))
    assert measured.phases.first_batch == pytest.approx(3.0)
    assert measured.phases.warm_up == pytest.approx(1.0)
    assert measured.cold_start == pytest.approx(3.75)
    assert measured.batch_seconds == pytest.approx((0.25,) * 5)


def test_a_model_that_changes_its_input_in_place_still_sees_every_sample_once() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(100)

    sink = JournalState()
    done(make(InPlace(), warmup=4), sink)
    assert sink.rows == [100.0 + i for i in range(9)]


def test_dropout_repeats_with_the_seed() -> None:
    def rows(seed: int) -> list[float]:
        sink = JournalState()
        done(make(nn.Dropout(0.5), Numbers(samples=64), seed=seed), sink)
        return sink.rows

    assert rows(1) == rows(1) != rows(2)


def test_a_model_that_refuses_the_first_batch_is_a_config_error_with_both_shapes() -> None:
    with pytest.raises(ConfigError, match=r"\[2, 1\].*weight \[2, 3\]") as caught:
        make(nn.Linear(3, 2)).prepare()
    assert caught.value.key == "data.inputs"


def test_a_model_that_goes_back_without_a_graph_is_told_its_mode_and_line() -> None:
    with pytest.raises(
        ConfigError, match=r"backward\(\) at .*test_runner.py:\d+.*no_grad"
    ) as caught:
        make(Model(lambda: torch.ones(1).backward()), mode="no_grad").prepare()
    assert caught.value.key == "run.mode"


# --- warm-up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 1, 7])
def test_warm_up_runs_as_often_as_asked(time: FakeTime, asked: int) -> None:
    model = Model(lambda: time.passes(0.5))
    make(model, warmup=asked).prepare()
    assert model.calls == 1 + asked


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
def test_warm_up_ends_when_steady_or_when_its_time_is_spent(
    time: FakeTime, seconds: Callable[[int], float], calls: int
) -> None:
    model = Model(lambda: time.passes(seconds(model.calls - 1)))
    make(model, warmup="auto").prepare()
    assert model.calls == calls


class Counting(nn.Module):
    """Buffers of each kind that a model may change while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.register_buffer("in_place", torch.zeros(1))
        self.register_buffer("nan", torch.tensor([float("nan")]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.in_place += 1
        return self.norm(x)


@pytest.mark.parametrize("mode", MODES)
def test_only_the_timed_pass_leaves_its_mark_on_buffers(mode: str) -> None:
    def buffers() -> dict[str, torch.Tensor]:
        return {name: buffer.clone() for name, buffer in model.named_buffers()}

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)

    model = Counting().train()
    runner = make(model, Numbers(samples=8), mode=mode, warmup=4)
    before = buffers()
    runner.prepare()
    assert same(buffers(), before)
    gathered = runner.run(JournalState())
    after = buffers()
    assert (after["in_place"].item(), after["norm.num_batches_tracked"].item()) == (4, 4)
    runner.finish(gathered, 0, 0)
    assert same(buffers(), after)


def test_warm_up_leaves_no_mark_on_buffers_that_are_replaced() -> None:
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


# --- the end comes early -----------------------------------------------------------------------


def stops_at(batch: int, error: BaseException) -> Callable[[], None]:
    """Raises in the call for that batch of the timed pass, which follows the first batch's."""
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
        (ValueError("no\nmore"), RunFailed, "begins at sample {first}, failed: ValueError: no"),
        (ConfigError("a bad row", "data"), RunFailed, "a bad row"),
        (
            OSError(28, "No space left on device"),
            RunFailed,
            "the predictions cannot be written: No space left",
        ),
    ],
    ids=["Ctrl-C", "model", "data", "disk"],
)
def test_what_stops_the_run_keeps_the_batches_before_it(
    batch: int, error: BaseException, kind: type[GradrunError], text: str
) -> None:
    sink = JournalState()
    runner = make(Model(stops_at(batch, error)))
    gathered, measured = done(runner, sink)
    assert type(gathered.stopped) is kind
    assert text.format(first=2 * batch) in str(gathered.stopped)
    assert list(gathered.sizes) == [2] * batch
    assert sink.rows == [float(i) for i in range(2 * batch)]
    assert len(measured.batch_seconds) == len(measured.batch_sizes) == batch
    assert (measured.memory.forward_peak, measured.memory.retained) == (None, None)
    assert torch.is_grad_enabled()


def test_a_backward_without_a_graph_is_told_as_one_in_later_batches_too() -> None:
    model = Model(lambda: model.calls == 3 and torch.ones(1).backward())
    gathered, _ = done(make(model, mode="inference_mode"))
    text = str(gathered.stopped)
    assert text.startswith("batch 1, which begins at sample 2, failed: backward() at ")
    assert "the model ran in inference_mode" in text


@pytest.mark.parametrize("where", ["reading", "writing"])
def test_a_fault_outside_the_model_stops_the_run_too(where: str) -> None:
    data, sink = Numbers(), JournalState()
    runner = make(Model(), data)
    runner.prepare()
    setattr(data if where == "reading" else sink, where, stops_at(2, KeyboardInterrupt()))
    gathered = runner.run(sink)
    assert isinstance(gathered.stopped, Interrupted)
    gathered.trim(sink.written)
    measured = runner.finish(gathered, 0, 0)
    assert measured.samples == sink.written == 6
    assert len(measured.batch_seconds) == len(measured.batch_sizes) == 3


def test_the_split_of_a_stopped_run_is_that_of_its_whole_batches(time: FakeTime) -> None:
    stop = stops_at(2, KeyboardInterrupt())

    def during() -> None:
        time.passes(0.25)
        stop()

    data = Numbers(reading=lambda: time.passes(0.0005))
    _, measured = done(make(Model(during), data), JournalState(writing=lambda: time.passes(0.125)))
    assert measured.phases.data == pytest.approx(2 * 0.0005)
    assert measured.phases.output == pytest.approx(2 * 0.125)


def test_ctrl_c_while_memory_is_counted_is_no_traceback() -> None:
    runner = make(Model(stops_at(5, KeyboardInterrupt())))
    gathered, measured = done(runner)
    assert isinstance(gathered.stopped, Interrupted)
    assert measured.samples == 9
    assert measured.memory.forward_peak is None


# --- the mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "inside"), MODES.items())
@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_the_mode_holds_inside_every_forward_and_nowhere_else(
    mode: str, inside: tuple[bool, bool], outside: Any
) -> None:
    seen = []

    def look() -> None:
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    with outside():
        before = torch.is_grad_enabled()
        done(make(Model(look), mode=mode, warmup=2))
        assert torch.is_grad_enabled() is before
    assert not torch.is_inference_mode_enabled()
    assert seen == [inside] * (1 + 2 + 5 + 1)


def test_autocast_holds_inside_every_forward() -> None:
    seen = []
    model = Model(lambda: seen.append(torch.is_autocast_enabled("cpu")))
    done(make(model, autocast="bfloat16", warmup=1))
    assert seen == [True] * (1 + 1 + 5 + 1)
    assert not torch.is_autocast_enabled("cpu")


def test_the_graph_of_a_batch_is_gone_before_the_next_forward() -> None:
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
    runner.prepare()
    model.refs.clear()
    model.alive.clear()
    runner.run(JournalState())
    assert model.alive == [0] * 5


# --- progress ----------------------------------------------------------------------------------


def test_the_beat_is_told_rising_counts_a_few_times_a_second(time: FakeTime) -> None:
    model = Model(lambda: time.passes(0.06))
    runner = make(model, Numbers(samples=40))
    runner.prepare()
    beats: list[tuple[int, float]] = []
    began = time.perf_counter()
    runner.run(
        JournalState(), None, lambda count: beats.append((count, time.perf_counter() - began))
    )
    assert [count for count, _ in beats] == [8, 16, 24, 32, 40]
    gaps = [after - before for (_, before), (_, after) in itertools.pairwise(beats)]
    assert min(gaps) > 0.2


# --- meters ------------------------------------------------------------------------------------


def test_memory_is_of_the_first_batch_and_of_the_model() -> None:
    _, measured = done(make(Model()))
    memory = measured.memory
    assert (memory.weights, memory.inputs) == (4, 8)
    assert (memory.forward_peak, memory.retained) == (8, 8)
    assert memory.process_peak
    assert memory.process_peak > 2**20
    assert (memory.device_allocated, memory.device_reserved) == (None, None)


def test_memory_is_not_counted_where_it_is_not_wanted() -> None:
    model = Model()
    _, measured = done(make(model, memory=False))
    assert (measured.memory.forward_peak, measured.memory.retained) == (None, None)
    assert model.calls == 1 + 5


def test_meters_that_cannot_run_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_runner.process_memory, "peak_resident", lambda: (None, "unavailable"))
    runner = make(Model(stops_at(5, RuntimeError("not here"))))
    gathered, measured = done(runner)
    assert gathered.stopped is None
    assert (measured.memory.process_peak, measured.memory.forward_peak) == (None, None)
    warned = {warning.code: warning.text for warning in runner.warnings}
    assert warned.keys() == {"no_process_peak", "no_tensor_memory"}
    assert "RuntimeError: not here" in warned["no_tensor_memory"]
    assert "measure.memory: false" in warned["no_tensor_memory"]


def test_a_device_whose_memory_cannot_be_counted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_runner, "FORWARD_MEMORY", {})
    runner = make(Model())
    _, measured = done(runner)
    assert (measured.memory.forward_peak, measured.memory.retained) == (None, None)
    assert [warning.code for warning in runner.warnings] == ["no_tensor_memory"]
