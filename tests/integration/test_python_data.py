"""Whole runs over data of the user's own code, compared with a plain loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import gradrun
from gradrun.core.errors import ConfigError, RunFailed
from gradrun.core.imports import import_file
from gradrun.core.progress import Progress
from gradrun.output.formats import FORMATS
from gradrun.results.result import InferResult
from tests.conftest import Command
from tests.support.engines import InlineEngines

COUNT, SIZE = 50, 4

CODE = """
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset


class Series(Dataset):
    '''Series of 1 to 7 steps with a class; an item raises while its file exists.'''

    def __init__(self, count=50, scale=1.0, bad=()):
        self.count, self.scale, self.bad = count, scale, bad

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad or Path(__file__).with_name(f"break-{i}").exists():
            raise ValueError(f"item {i} is broken")
        generator = torch.Generator().manual_seed(i)
        steps = torch.randn(1 + i * 5 % 7, 3, generator=generator)
        return steps * self.scale, i * i % 2


class Stream(IterableDataset):
    def __init__(self, **args):
        self.series = Series(**args)

    def __iter__(self):
        return (self.series[i] for i in range(len(self.series)))


def pad(items):
    lengths = torch.tensor([len(steps) for steps, _ in items])
    steps = nn.utils.rnn.pad_sequence([steps for steps, _ in items], batch_first=True)
    return steps, lengths, torch.tensor([label for _, label in items])


def loader():
    return DataLoader(Series(), batch_size=4, collate_fn=pad, shuffle=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, series, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            series, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.lstm(packed)[1][0][0])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


def run(folder: Path, target: str, *, out: str = "out", **changes: Any) -> InferResult:
    options = {key: changes.pop(key) for key in ("resume", "overwrite") if key in changes}
    config = {
        "model": {"source": "python", "target": str(folder / "mine.py:Net")},
        "data": {
            "source": "python",
            "target": f"{folder}/mine.py:{target}",
            "collate": f"{folder}/mine.py:pad",
            "inputs": {"series": 0, "lengths": 1},
            "labels": 2,
            "batch_size": SIZE,
        },
        "run": {"threads": 1, "warmup": 0},
        "measure": {"memory": False},
        "output": {"path": str(folder / out)},
    }
    return gradrun.infer(config, trust_code=True, **options, **changes)


def by_hand(folder: Path, bad: tuple[int, ...] = ()) -> torch.Tensor:
    """The predictions of a plain loop over a DataLoader, zero for bad items."""
    code: Any = import_file(folder / "mine.py")
    model = code.Net().eval()
    rows = torch.zeros(COUNT, 2)
    kept = [i for i in range(COUNT) if i not in bad]
    with torch.inference_mode():
        for numbers in torch.tensor(range(COUNT)).split(SIZE):
            own = [i for i in numbers.tolist() if i in kept]
            if own:
                series, lengths, _ = code.pad([code.Series()[i] for i in own])
                rows[own] = model(series, lengths)
    return rows


def labels() -> torch.Tensor:
    return torch.tensor([i * i % 2 for i in range(COUNT)])


def predictions(folder: Path, out: str = "out") -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = np.load(folder / out / "predictions.npy")
    return array


def saved(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*predictions*"))
        if path.is_file()
    }


@pytest.mark.parametrize("target", ["Series", "Stream", "loader"])
def test_a_network_over_ragged_series_predicts_as_in_a_plain_loop(
    folder: Path, target: str
) -> None:
    loader = {"data.collate": None, "data.batch_size": None} if target == "loader" else {}
    result = run(folder, target, **loader)
    assert result.predictions == COUNT
    assert np.array_equal(predictions(folder), by_hand(folder).numpy())


def test_the_plain_loop_is_that_of_a_dataloader(folder: Path) -> None:
    code: Any = import_file(folder / "mine.py")
    batches: Iterator[Any] = iter(DataLoader(code.Series(), SIZE, collate_fn=code.pad))
    with torch.inference_mode():
        rows = torch.cat([code.Net().eval()(series, n) for series, n, _ in batches])
    assert torch.equal(rows, by_hand(folder))


# The names in format `files` have as many digits as the count, which is unknown, needs.
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "files"])
def test_an_iterable_gives_the_same_files_as_a_map_style_dataset(folder: Path, form: str) -> None:
    for target in ("Series", "Stream"):
        run(folder, target, out=target, **{"output.format": form})
    assert saved(folder / "Series") == saved(folder / "Stream") != {}


def test_progress_over_an_iterable_has_a_count_without_a_total(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradrun.inference.timed_loop._CALLBACK_NS", 0)
    seen: list[Progress] = []
    run(folder, "Stream", progress=seen.append)
    counts = [(step.done, step.total) for step in seen if step.stage == "predicting"]
    assert counts == [(0, 0), *((min(done, COUNT), 0) for done in range(SIZE, COUNT + SIZE, SIZE))]


# --- failures and resumes ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_items_that_raise_are_quarantined(folder: Path, workers: int) -> None:
    bad = (0, 17, 48, 49)
    result = run(
        folder,
        "Series",
        metrics=[{"name": "accuracy"}],
        **{"data.args": {"bad": bad}, "data.workers": workers, "run.on_error": "quarantine"},
    )
    assert result.quarantined == len(bad)
    lines = (folder / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [*bad]
    expected, found = by_hand(folder, bad), predictions(folder)
    good = [i for i in range(COUNT) if i not in bad]
    assert np.array_equal(found[good], expected.numpy()[good])
    assert np.isnan(found[[*bad]]).all()
    hits = (expected.argmax(1) == labels())[good]
    assert result.metrics[0].value == pytest.approx(hits.float().mean().item())


@pytest.mark.parametrize(
    ("target", "form"), [("Series", "npy"), ("Stream", "npy"), ("Stream", "parquet")]
)
def test_a_stopped_run_is_resumed_to_the_same_bytes(folder: Path, target: str, form: str) -> None:
    output = {"output.format": form, "metrics": [{"name": "accuracy"}]}
    whole = run(folder, target, out="whole", **output)
    (folder / "break-30").touch()
    with pytest.raises(RunFailed, match="item 30 is broken"):
        run(folder, target, out="cut", **output)
    state = json.loads((folder / "cut" / "journal.jsonl").read_text().splitlines()[-1])
    assert state["stop"] == 28
    (folder / "break-30").unlink()
    resumed = run(folder, target, out="cut", resume=True, **output, **{"data.workers": 1})
    assert resumed.resumed_at == 28
    assert saved(folder / "cut") == saved(folder / "whole")
    assert resumed.metrics[0].value == whole.metrics[0].value
    again = run(folder, target, out="cut", resume=True, **output)
    assert again.predictions == COUNT


@pytest.mark.parametrize("target", ["Series", "Stream"])
def test_a_resume_refuses_other_data(folder: Path, target: str) -> None:
    (folder / "break-30").touch()
    with pytest.raises(RunFailed):
        run(folder, target)
    for changes, problem in (
        ({"data.args": {"scale": 2.0}}, "data.args.scale changed"),
        ({"data.batch_size": 2}, "data.batch_size changed from 4 to 2"),
        ({"data.labels": None}, "data.saved_labels changed"),
    ):
        with pytest.raises(ConfigError, match=problem):
            run(folder, target, resume=True, **changes)
    (folder / "mine.py").write_text(CODE.replace("manual_seed(i)", "manual_seed(i + 1)"))
    with pytest.raises(ConfigError, match=r"data.first_batch changed.*mine.py changed"):
        run(folder, target, resume=True)


def test_a_resume_of_an_iterable_notices_that_it_became_shorter(folder: Path) -> None:
    (folder / "break-30").touch()
    with pytest.raises(RunFailed):
        run(folder, "Stream")
    (folder / "length").write_text("10")
    code = CODE.replace("range(len(self.series))", "range(10)")
    journal = folder / "out" / "journal.jsonl"
    head, *lines = journal.read_text().splitlines()
    known = json.loads(head)
    (folder / "mine.py").write_text(code)
    known["files"] = {}
    journal.write_text("\n".join([json.dumps(known), *lines]) + "\n")
    with pytest.raises(RunFailed, match="the data end after 10 samples, and 28 are predicted"):
        run(folder, "Stream", resume=True)


# --- metrics, engines, other commands ----------------------------------------------------------


@pytest.mark.parametrize("target", ["Series", "Stream"])
def test_metrics_compare_predictions_with_the_labels_of_the_items(
    folder: Path, target: str
) -> None:
    result = run(folder, target, metrics=[{"name": "accuracy"}])
    hits = by_hand(folder).argmax(1) == labels()
    assert result.metrics[0].value == pytest.approx(hits.float().mean().item())
    metrics = [{"name": "accuracy"}, {"name": "f1", "average": "macro"}]
    more = run(folder, target, metrics=metrics, resume=True)
    assert more.metrics[0].value == result.metrics[0].value
    assert len(more.metrics) == 2


def test_metrics_need_labels_that_the_run_saved(folder: Path) -> None:
    run(folder, "Series")
    with pytest.raises(ConfigError, match="the run in this folder did not save"):
        run(folder, "Series", metrics=[{"name": "accuracy"}], resume=True)
    with pytest.raises(ConfigError, match=r"data\.labels is not set"):
        run(folder, "Series", out="b", metrics=[{"name": "accuracy"}], **{"data.labels": None})


def test_two_workers_write_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"metrics": [{"name": "accuracy"}]}
    alone = run(folder, "Series", out="alone", **metrics)
    InlineEngines(monkeypatch)
    engine = {"source": "processes", "workers": 2}
    spread = run(folder, "Series", out="spread", engine=engine, **metrics)
    assert saved(folder / "spread") == saved(folder / "alone")
    assert spread.metrics[0].value == alone.metrics[0].value
    with pytest.raises(ConfigError, match=r"the number of samples is unknown.*map-style"):
        run(folder, "Stream", out="none", engine=engine)
    assert not (folder / "none").exists()


YAML = """\
model: {source: python, target: mine.py:Net}
data:
  source: python
  target: mine.py:Stream
  collate: mine.py:pad
  inputs: {series: 0, lengths: 1}
  batch_size: 4
output: {path: out, format: jsonl}
"""


def test_the_commands_accept_data_of_unknown_length(
    folder: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "c.yaml").write_text(YAML)
    assert cli("validate", "c.yaml").code == 0
    explained = cli("validate", "c.yaml", "--explain", "--trust-code")
    text = " ".join(explained.out.split())
    assert "mine.py:Stream: iterable Stream, read once and in order" in text
    assert "input series 0 of an item, float32 [6, 3] in the first batch" in text
    assert cli("infer", "c.yaml", "--trust-code").code == 0
    lines = (folder / "out" / "predictions.jsonl").read_text().splitlines()
    rows = torch.tensor([json.loads(line)["prediction"] for line in lines])
    assert torch.equal(rows, by_hand(folder))
    assert "50 of 50 samples verified" in cli("verify", "out").out
    refused = cli("infer", "c.yaml", "--overwrite")
    assert refused.code == 2
    assert "mine.py:Net is Python code and was not loaded" in refused.err
