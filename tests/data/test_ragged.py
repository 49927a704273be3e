"""Columns of lists of different length, padded per batch, with their lengths as an input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import gradrun
from gradrun.core.errors import ConfigError
from gradrun.data.source import BatchSource
from tests.support.sources import data

CHANCE = np.random.default_rng(0)
SERIES = [CHANCE.normal(size=(length, 2)).round(3).tolist() for length in (3, 1, 7, 2, 5, 4, 6)]


def write(path: Path, rows: list[Any], **columns: list[Any]) -> Path:
    table = pandas.DataFrame({"x": rows, **columns})
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table.to_dict("records")))
    return path


def ragged(path: Path, rows: list[Any], batch_size: int = 3, **keys: Any) -> BatchSource:
    spec = {"columns": ["x"], "pad": 0, **keys}
    return data("records", path=write(path, rows), inputs={"x": spec}, batch_size=batch_size)


def padded(rows: list[Any], value: float = 0) -> list[Any]:
    """Pad nested lists in a plain loop."""
    longest = max(map(len, rows))
    width = len(rows[0][0]) if isinstance(rows[0][0], list) else 0
    filler: Any = [value] * width if width else value
    return [row + [filler] * (longest - len(row)) for row in rows]


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_lists_are_padded_to_the_longest_of_their_batch(tmp_path: Path, name: str) -> None:
    source = ragged(tmp_path / name, SERIES, lengths="n")
    for number, batch in enumerate(source.batches()):
        rows = SERIES[3 * number : 3 * number + 3]
        assert batch.kwargs["x"].dtype == torch.float32
        assert torch.equal(batch.kwargs["x"], torch.tensor(padded(rows)))
        assert batch.kwargs["n"].tolist() == [*map(len, rows)]
    (text,) = [s.text for s in source.statements() if s.topic == "input x"]
    assert text == (
        "x, float32 [length, 2], lists of 1 to 7 items, padded at the end with 0 to the longest of "
        "each batch; lengths: input n"
    )
    assert source.sample_bytes == 7 * 2 * 4


def test_without_lengths_the_statement_tells_that_the_model_gets_none(tmp_path: Path) -> None:
    source = ragged(tmp_path / "t.jsonl", [[4, 2], [9]], pad=1, dtype="int64")
    (batch,) = source.batches()
    assert batch.args[0].tolist() == [[4, 2], [9, 1]]
    (text,) = [s.text for s in source.statements() if s.topic == "input x"]
    assert text.endswith("padded at the end with 1 to the longest of each batch; lengths: not "
                         "passed to the model")  # fmt: skip


def test_several_columns_are_the_features_of_an_item(tmp_path: Path) -> None:
    a, b = [[1, 2, 3], [4]], [[10, 20, 30], [40]]
    path = write(tmp_path / "t.parquet", a, y=b)
    inputs = {"x": {"columns": ["x", "y"], "pad": 0}}
    (batch,) = data("records", path=path, inputs=inputs, batch_size=3).batches()
    assert batch.args[0].tolist() == [[[1, 10], [2, 20], [3, 30]], [[4, 40], [0, 0], [0, 0]]]


def test_shape_is_that_of_an_item_and_permute_moves_the_axes_of_a_sample(tmp_path: Path) -> None:
    (batch,) = ragged(tmp_path / "t.jsonl", [[1, 2], [3]], shape=[1], scale=2).batches()
    assert batch.args[0].tolist() == [[[2], [4]], [[6], [0]]]
    (batch,) = ragged(tmp_path / "t.jsonl", SERIES[:2], permute=[1, 0]).batches()
    assert torch.equal(batch.args[0], torch.tensor(padded(SERIES[:2])).transpose(1, 2))


def test_rows_without_a_list_of_numbers_are_errors_of_their_own(tmp_path: Path) -> None:
    rows = [[1.5, 2], [], None, 3, [1, None], [1, [2]], [2.5], ["a"]]
    (batch,) = ragged(tmp_path / "t.jsonl", rows, batch_size=8, lengths="n").batches()
    assert {row: str(error).partition("  ")[2] for row, error in batch.errors.items()} == {
        1: "column 'x' is an empty list",
        2: "column 'x' is null",
        3: "column 'x' is 3, not a list",
        4: "column 'x' is [1, None], not a number of type float32",
        5: "column 'x' is a list of lists of different lengths, or contains more than numbers",
        7: "column 'x' is ['a'], not a number of type float32",
    }
    assert batch.kwargs["x"][[0, 6]].tolist() == [[1.5, 2], [2.5, 0]]


def test_lists_of_one_row_have_one_length(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [[1], [2, 3], [4]], y=[[5], [6], [7]])
    source = data(
        "records", path=path, inputs={"x": {"columns": ["x", "y"], "pad": 0}}, batch_size=3
    )
    (batch,) = source.batches()
    assert {row: str(error) for row, error in batch.errors.items()} == {
        1: f"{path}:2  the lists in x, y have different lengths: 2, 1"
    }
    assert batch.args[0][[0, 2]].tolist() == [[[1, 5]], [[4, 7]]]


def test_items_of_another_shape_are_an_error_of_their_row(tmp_path: Path) -> None:
    (batch,) = ragged(tmp_path / "t.jsonl", [*SERIES[:2], [[1, 2, 3]]]).batches()
    assert "has the shape [3], but those of most rows [2]" in str(batch.errors[2])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pad": None, "lengths": "n"}, "lengths needs pad"),
        ({"shape": [1], "permute": [1, 0]}, "set either shape (of one item) or permute"),
        ({"lengths": "x"}, "there is another input 'x'"),
        ({"dtype": "int64", "pad": 0.5}, "0.5 is not a number of type int64"),
    ],
)
def test_keys_that_exclude_each_other_are_an_error(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ragged(tmp_path / "t.jsonl", [[1], [2, 3]], **keys)
    assert message in str(caught.value)


NET = """
import torch
from torch.nn.utils.rnn import pack_padded_sequence


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.lstm = torch.nn.LSTM(2, 4, batch_first=True)

    def forward(self, series, lengths):
        packed = pack_padded_sequence(series, lengths, batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][0][0]
"""


def test_an_lstm_over_shards_of_series_predicts_as_on_each_series_alone(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    bad: list[Any] = []
    write(tmp_path / "part-9.jsonl", SERIES[:4])
    write(tmp_path / "part-10.jsonl", [*SERIES[4:], bad])
    config = {
        "model": {"source": "python", "target": "net.py:Net"},
        "data": {
            "source": "records",
            "path": str(tmp_path / "part-*.jsonl"),
            "batch_size": 3,
            "inputs": {"series": {"columns": ["x"], "pad": 0, "lengths": "lengths"}},
        },
        "run": {"on_error": "quarantine", "threads": 1},
        "measure": {"memory": False},
        "output": {"path": "out"},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    result = gradrun.infer(tmp_path / "c.yaml", trust_code=True)
    assert (result.predictions, result.quarantined) == (8, 1)
    scope: dict[str, Any] = {}
    exec(NET, scope)
    net = scope["Net"]()
    with torch.inference_mode():
        alone = [net(torch.tensor([row]), torch.tensor([len(row)]))[0] for row in SERIES]
    found = np.load(tmp_path / "out" / "predictions.npy")
    np.testing.assert_allclose(found[:7], torch.stack(alone).numpy(), rtol=1e-5, atol=1e-6)
    quarantined = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert "part-10.jsonl:4  column 'x' is an empty list" in json.dumps(quarantined)
