"""Several batches in flight give the files of one batch after the other, whatever happens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradrun
from gradrun.core.errors import ConfigError, GradrunError, Interrupted, RunFailed
from gradrun.data.batch import Batch
from gradrun.engines.messages import Open, Rows, Task, unpack_rows
from gradrun.engines.range_runner import RangeRunner
from gradrun.inference import transfers
from gradrun.inference.ring import InFlight, Ring
from gradrun.inference.transfers import Transfers
from gradrun.output.formats.npy import NpyWriter
from gradrun.results.result import RunResult
from tests.support.delayed_transfers import DelayedTransfers

SAMPLES, BATCH = 50, 8
CODES = {"out_of_memory", "quarantined", "nonfinite"}

MODEL = '''
import os

import torch
from torch import nn


class Net(nn.Module):
    """Doubles the input; `kind` selects how it returns, or where it fails."""

    def __init__(self, kind="plain", at=24.0, fits=5):
        super().__init__()
        self.kind, self.at, self.fits = kind, at, fits
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.same = []

    def forward(self, x):
        has = (x[:, 0] == self.at).any()
        if os.environ.get("INTERRUPT_AT") in [f"{n:.0f}" for n in x[:, 0]]:
            raise KeyboardInterrupt
        if self.kind == "exit" and has:
            raise SystemExit("enough")
        if self.kind in ("raise", "writes") and has:
            x.fill_(-1.0)
            raise ValueError("a bad sample")
        if self.kind == "memory" and x[:, 0].max() >= self.at and len(x) > self.fits:
            torch.empty(len(x), 2**45)
        if self.kind == "broken" and has:
            kind = getattr(torch, "AcceleratorError", RuntimeError)  # from torch 2.8 on
            raise kind("CUDA error: device-side assert triggered")
        if self.kind == "same memory":
            if not self.same:
                self.same.append(torch.zeros(8, 2, device=x.device))
            return torch.mul(x.detach(), 2, out=self.same[0][: len(x)])
        if self.kind == "input":
            return x.mul_(2)
        if self.kind == "tuple":
            return {"double": 2 * x, "row": x[:, 0] * self.weight, "class": x[:, 0].long()}
        if self.kind == "texts":
            return [f"sample {number:.0f}" for number in x[:, 0]]
        if self.kind == "ragged":
            return [torch.arange(int(n) % 3 + 1) for n in x[:, 0]]
        if self.kind == "transposed":
            return torch.stack([2 * x[:, 0], x[:, 0]]).T
        if self.kind == "nan":
            return torch.where(x == self.at, torch.nan, 2 * x)
        return x * self.weight
'''

Infer = Callable[..., RunResult]


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(DelayedTransfers, "made", [])
    monkeypatch.setitem(transfers.TRANSFERS, "cpu", DelayedTransfers)
    return DelayedTransfers


@pytest.fixture
def infer(tmp_path: Path) -> Infer:
    np.save(tmp_path / "x.npy", np.arange(SAMPLES, dtype=np.float32).repeat(2).reshape(-1, 2))
    file = tmp_path / "net.py"
    file.write_text(MODEL)

    def run(kind: str = "plain", in_flight: int = 3, folder: str = "", **changes: Any) -> RunResult:
        given: dict[str, Any] = {
            "model": {"source": "python", "target": f"{file}:Net", "args": {"kind": kind}},
            "data": {"source": "arrays", "path": str(tmp_path / "x.npy"), "batch_size": BATCH},
            "run": {"device": "cpu", "warmup": 0, "in_flight": in_flight},
            "measure": {"memory": False, "batch_independence": False},
            "output": {"path": str(tmp_path / (folder or f"run-{in_flight}"))},
        }
        return gradrun.infer(given, trust_code=True, **changes)

    return run


def content(folder: Path) -> dict[str, Any]:
    """The files of a run without its measurements; the journal without times of commits."""
    found: dict[str, Any] = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name not in {"result.json", "journal.jsonl", "quarantine.jsonl"}
    }
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    found["committed"] = [line["stop"] for line in lines if "stop" in line][-1:]
    if (folder / "quarantine.jsonl").exists():
        lines = [json.loads(x) for x in (folder / "quarantine.jsonl").read_text().splitlines()]
        found["quarantine"] = [{**line, "traceback": ""} for line in lines]
    return found


def outcome(infer: Infer, *args: Any, **changes: Any) -> RunResult | GradrunError:
    try:
        return infer(*args, **changes)
    except GradrunError as error:
        return error


def same_as_one_by_one(infer: Infer, tmp_path: Path, kind: str, **changes: Any) -> Any:
    """Run a model both ways, compare the files and the outcome, and return the outcome."""
    one, more = outcome(infer, kind, 1, **changes), outcome(infer, kind, 3, **changes)
    assert content(tmp_path / "run-3") == content(tmp_path / "run-1")
    assert type(more) is type(one)
    if isinstance(more, GradrunError):
        assert str(more).replace("run-3", "run-1") == str(one)
        return more
    assert isinstance(one, RunResult)
    found, expected = ([w.text for w in r.warnings if w.code in CODES] for r in (more, one))
    assert found == expected
    a, b = one.measurements[0], more.measurements[0]
    assert (b.batch_sizes, b.batch_limit) == (a.batch_sizes, a.batch_limit)
    assert len(b.batch_seconds) == len(a.batch_seconds)
    return more


# --- outputs -----------------------------------------------------------------------------------


def test_the_double_gives_other_rows_if_outputs_are_read_too_early(
    delayed: Any, infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DelayedTransfers, "wait", lambda self, number: None)
    infer("plain", 1)
    infer("plain", 3)
    assert content(tmp_path / "run-3") != content(tmp_path / "run-1")


def test_the_double_gives_other_rows_if_memory_is_released_too_early(
    delayed: Any, infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = DelayedTransfers.mark

    def forget(self: DelayedTransfers) -> Any:
        self._memory.clear()
        return keep(self)

    monkeypatch.setattr(DelayedTransfers, "mark", forget)
    infer("plain", 1)
    infer("plain", 3)
    assert content(tmp_path / "run-3") != content(tmp_path / "run-1")


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("plain", {}),
        ("same memory", {}),
        ("input", {}),
        ("transposed", {"format": "csv"}),
        ("tuple", {"format": "safetensors"}),
        ("tuple", {"format": "parquet"}),
        ("texts", {"format": "jsonl"}),
        ("ragged", {"format": "jsonl"}),
        ("plain", {"transform": ["softmax", "topk"], "k": 1}),
    ],
)
def test_the_files_are_those_of_one_batch_after_the_other(
    delayed: Any, infer: Infer, tmp_path: Path, kind: str, output: dict[str, Any]
) -> None:
    changes = {f"output.{key}": value for key, value in output.items()}
    same_as_one_by_one(infer, tmp_path, kind, **changes)
    (made,) = delayed.made
    assert made.most == 3
    assert kind in {"texts", "ragged"} or made.pool.reused > 0


@pytest.mark.parametrize(("mode", "in_flight"), [("grad", 2), ("no_grad", 4)])
def test_copies_that_end_at_any_time_give_the_same_files(
    delayed: Any,
    infer: Infer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    in_flight: int,
) -> None:
    monkeypatch.setattr(delayed, "when", "any time")
    infer("tuple", 1, **{"run.mode": mode, "output.format": "jsonl"})
    infer("tuple", in_flight, **{"run.mode": mode, "output.format": "jsonl"})
    assert content(tmp_path / f"run-{in_flight}") == content(tmp_path / "run-1")
    assert 1 <= delayed.made[0].most <= in_flight


def test_inputs_are_cast_to_the_dtype_of_the_model(
    delayed: Any, infer: Infer, tmp_path: Path
) -> None:
    same_as_one_by_one(infer, tmp_path, "plain", **{"model.dtype": "bfloat16"})
    written = np.load(tmp_path / "run-3" / "predictions.npy")[:, 0]
    assert written.tolist() == [2.0 * i for i in range(SAMPLES)]


def test_metrics_are_computed_from_evidence_of_the_right_rows(
    delayed: Any, infer: Infer, tmp_path: Path
) -> None:
    np.save(tmp_path / "y.npy", np.arange(SAMPLES) % 2)
    changes = {
        "data.labels": {"path": str(tmp_path / "y.npy")},
        "output.transform": "argmax",
        "metrics": [{"name": "auroc", "input": "logits"}, "accuracy"],
    }
    result = same_as_one_by_one(infer, tmp_path, "plain", **changes)
    (accuracy,) = [metric.value for metric in result.metrics if metric.name == "accuracy"]
    assert accuracy == 0.5  # both scores of a sample are equal, so that each has class 0


def test_the_ranges_of_a_worker_have_the_same_rows(
    delayed: Any, infer: Infer, tmp_path: Path
) -> None:
    result = infer("same memory", 1)
    written = np.load(tmp_path / "run-1" / "predictions.npy")
    config = result.config | {"run": result.config["run"] | {"in_flight": 3, "threads": 1}}
    with RangeRunner(Open(config=config, trust_code=True)) as worker:
        worker.prepare()
        for start, stop in ((0, 24), (24, SAMPLES)):
            done = worker.run(Task(start=start, stop=stop))
            parts = [unpack_rows(event) for event in done.events if isinstance(event, Rows)]
            rows = b"".join(outputs["prediction"].numpy().tobytes() for outputs, _, _ in parts)
            assert rows == written[start:stop].tobytes()
            assert [i for _, ids, _ in parts for i in ids] == [*range(start, stop)]
    assert [made.most for made in delayed.made] == [3, 3]


# --- errors ------------------------------------------------------------------------------------

QUARANTINE = {"run.on_error": "quarantine"}


@pytest.mark.parametrize(
    ("kind", "at"), [("raise", 8.0), ("writes", 24.0), ("exit", 33.0), ("broken", 49.0)]
)
def test_an_error_stops_the_run_at_its_batch_and_earlier_batches_are_written(
    delayed: Any, infer: Infer, tmp_path: Path, kind: str, at: float
) -> None:
    error = same_as_one_by_one(infer, tmp_path, kind, **{"model.args.at": at})
    assert isinstance(error, RunFailed)
    first = int(at) // BATCH * BATCH
    assert f"starts at sample {first}, failed" in str(error)
    assert f"{first} of 50 predictions are saved" in str(error)


@pytest.mark.parametrize("at", [9.0, 49.0])
def test_bad_samples_are_quarantined_in_order(
    delayed: Any, infer: Infer, tmp_path: Path, at: float
) -> None:
    same_as_one_by_one(infer, tmp_path, "writes", **QUARANTINE, **{"model.args.at": at})
    (line,) = content(tmp_path / "run-3")["quarantine"]
    assert line["id"] == at


@pytest.mark.parametrize("policy", ["stop", "quarantine"])
def test_nonfinite_outputs_are_handled_in_the_order_of_the_batches(
    delayed: Any, infer: Infer, tmp_path: Path, policy: str
) -> None:
    same_as_one_by_one(infer, tmp_path, "nan", **{"run.on_nonfinite": policy})


def records(path: Path, unreadable: int) -> dict[str, Any]:
    """Write a table with one row that is not a number; return its data section."""
    lines = [f"{i},{i if i != unreadable else 'x'}" for i in range(SAMPLES)]
    path.write_text("\n".join(["a,b", *lines]) + "\n")
    inputs = {"x": {"columns": ["a", "b"]}}
    return {"source": "records", "path": str(path), "batch_size": BATCH, "inputs": inputs}


def test_unreadable_samples_are_quarantined_in_order(
    delayed: Any, infer: Infer, tmp_path: Path
) -> None:
    data = records(tmp_path / "x.csv", unreadable=21)
    same_as_one_by_one(infer, tmp_path, "plain", data=data, **QUARANTINE)
    (line,) = content(tmp_path / "run-3")["quarantine"]
    assert line["id"] == 21


def test_a_failed_read_stops_the_run_after_the_batches_before_it(
    delayed: Any, infer: Infer, tmp_path: Path
) -> None:
    data = records(tmp_path / "x.csv", unreadable=30)
    error = same_as_one_by_one(infer, tmp_path, "plain", data=data)
    assert "24 of 50 predictions are saved" in str(error)


def test_a_device_that_fails_late_stops_the_run_and_quarantines_nothing(
    delayed: Any, infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delayed, "fails_at", 4)
    with pytest.raises(RunFailed) as caught:
        infer("plain", 3, **QUARANTINE)
    text = str(caught.value)
    assert "the device failed in the batch that starts at sample 24, or in one of the 2" in text
    assert "after it: CUDA error: device-side assert triggered" in text
    assert "24 of 50 predictions are saved" in text
    assert "quarantine" not in content(tmp_path / "run-3")
    monkeypatch.setattr(delayed, "fails_at", None)
    infer("plain", 3, resume=True)
    infer("plain", 1)
    assert content(tmp_path / "run-3") == content(tmp_path / "run-1")


def test_a_broken_device_is_no_bad_sample(infer: Infer, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="device-side assert triggered"):
        infer("broken", 1, **QUARANTINE)
    assert "quarantine" not in content(tmp_path / "run-1")


# --- interruption and memory -------------------------------------------------------------------


@pytest.mark.parametrize(("where", "batch"), [("forward", 4), ("wait", 1), ("write", 3)])
def test_after_ctrl_c_a_resume_gives_the_same_bytes(
    delayed: Any,
    infer: Infer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    batch: int,
) -> None:
    infer("plain", 1)

    calls = itertools.count(1)

    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(calls) == batch:
                raise KeyboardInterrupt
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setenv("INTERRUPT_AT", str(batch * BATCH))
        elif where == "wait":
            patch.setattr(delayed, "wait", interrupted(delayed.wait))
        else:
            patch.setattr(NpyWriter, "write", interrupted(NpyWriter.write))
        with pytest.raises(Interrupted):
            infer("plain", 3, folder="run")
    kept = np.load(tmp_path / "run" / "predictions.npy")
    assert kept[:, 0].tolist() == [2.0 * i for i in range(len(kept))]
    # A batch whose own wait or write is interrupted is not written, as in a run without others.
    assert len(kept) == {"forward": batch, "wait": batch - 1, "write": batch - 1}[where] * BATCH
    infer("plain", 3, folder="run", resume=True)
    assert content(tmp_path / "run") == content(tmp_path / "run-1")


def test_a_batch_without_room_beside_others_runs_alone(
    delayed: Any, infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delayed, "fits", 2)
    infer("plain", 1)
    result = infer("plain", 4)
    assert content(tmp_path / "run-4") == content(tmp_path / "run-1")
    assert result.measurements[0].batch_limit is None
    assert not [w for w in result.warnings if w.code == "out_of_memory"]
    assert delayed.made[0].most == 2


def test_a_batch_that_is_too_large_is_split_after_those_before_it(
    delayed: Any, infer: Infer, tmp_path: Path
) -> None:
    result = same_as_one_by_one(infer, tmp_path, "memory")
    assert result.measurements[0].batch_limit == 4


# --- the ring alone ----------------------------------------------------------------------------


class Steps:
    """The end of copies, which are complete once `number` steps were made."""

    def __init__(self, ring: list[str], name: str) -> None:
        self.ring, self.name, self.complete = ring, name, False

    def wait(self) -> None:
        self.ring.append(f"wait {self.name}")
        self.complete = True

    def done(self) -> bool:
        return self.complete


@pytest.fixture
def ring() -> tuple[Ring, list[str], list[Steps]]:
    log: list[str] = []

    def finish(entry: InFlight) -> None:
        entry.copied.wait()
        log.append(f"write {entry.batch.ids[0]}")

    ring, steps = Ring(3, finish), [Steps(log, str(number)) for number in range(5)]
    for number in range(3):
        ring.make_room()
        ring.add(InFlight(Batch((), {}, 1, [number]), {}, steps[number]))
    return ring, log, steps


def test_a_full_ring_waits_for_its_first_batch_before_another_starts(ring: Any) -> None:
    batches, log, _ = ring
    assert log == []
    assert len(batches) == 3
    batches.make_room()
    assert log == ["wait 0", "write 0"]
    batches.drain()
    assert log == ["wait 0", "write 0", "wait 1", "write 1", "wait 2", "write 2"]


def test_complete_batches_are_written_before_the_ring_is_full(ring: Any) -> None:
    batches, log, steps = ring
    steps[1].complete = True  # a later batch is not written before an earlier one
    batches.make_room()
    assert log == ["wait 0", "write 0", "wait 1", "write 1"]
    assert batches.busy()
    steps[2].complete = True
    assert not batches.busy()


def test_discarded_batches_are_waited_for_and_not_written(ring: Any) -> None:
    batches, log, _ = ring
    batches.discard()
    assert log == ["wait 0", "wait 1", "wait 2"]
    assert len(batches) == 0
    batches.drain()
    assert log == ["wait 0", "wait 1", "wait 2"]


def test_synchronous_transfers_return_memory_of_their_own() -> None:
    copies = Transfers(torch.device("cpu"), "bfloat16")
    batch = copies.to_device(Batch((torch.ones(2),), {"n": torch.ones(2).long()}, 2, range(2)))
    assert [tensor.dtype for tensor in batch.tensors()] == [torch.bfloat16, torch.int64]
    tensor = torch.ones(2, requires_grad=True)
    host = copies.to_host(tensor)
    with torch.no_grad():
        tensor.zero_()
    assert host.tolist() == [1, 1]
    assert not host.requires_grad
    assert copies.mark().done()


def test_more_than_four_batches_in_flight_are_refused(infer: Infer) -> None:
    with pytest.raises(ConfigError, match="in_flight"):
        infer("plain", 5)
