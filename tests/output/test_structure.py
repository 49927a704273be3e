"""Lists with one item per sample in what a model returns become columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from gradrun.core.errors import ConfigError
from gradrun.output.columns import ValueColumn
from gradrun.output.structure import OutputReader
from gradrun.output.transforms import iter_columns


@dataclass
class Found:
    boxes: torch.Tensor
    text: str


def columns_of(returned: Any, size: int) -> dict[str, Any]:
    read = iter_columns(OutputReader()(returned, size))
    return {
        name: [v.tolist() if isinstance(v, torch.Tensor) else v for v in column.values]
        if isinstance(column, ValueColumn)
        else column
        for name, column in read
    }


def boxes(*counts: int) -> list[torch.Tensor]:
    return [torch.arange(count * 4.0).reshape(count, 4) for count in counts]


def test_a_list_of_dicts_becomes_a_column_per_key() -> None:
    found = [
        {"boxes": rows, "labels": torch.arange(len(rows)), "score": torch.tensor(0.5 * i)}
        for i, rows in enumerate(boxes(2, 0, 1))
    ]
    columns = columns_of(found, 3)
    assert columns["boxes"] == [[[0, 1, 2, 3], [4, 5, 6, 7]], [], [[0, 1, 2, 3]]]
    assert columns["labels"] == [[0, 1], [], [0]]
    assert columns["score"].tolist() == [0, 0.5, 1], "one number per sample is a tensor [n]"


@pytest.mark.parametrize("counts", [(1,), (2, 2)])
def test_a_list_of_dicts_belongs_to_samples_even_if_all_tensors_have_a_row_per_sample(
    counts: tuple[int, ...],
) -> None:
    columns = columns_of([{"boxes": rows} for rows in boxes(*counts)], len(counts))
    assert columns == {"boxes": [rows.tolist() for rows in boxes(*counts)]}


def test_dataclasses_and_nested_dicts_have_dotted_names() -> None:
    items = [Found(rows, "a") for rows in boxes(1, 2)]
    assert [*columns_of(items, 2)] == ["boxes", "text"]
    nested = [{"found": {"text": "a", "n": 1}}, {"found": {"text": "b", "n": 2}}]
    columns = columns_of(nested, 2)
    assert columns["found.text"] == ["a", "b"]
    assert columns["found.n"].dtype == torch.int64


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (["a", "b"], {"0": ["a", "b"]}),
        (("a", "b"), {"0": ["a", "b"]}),
        ({"text": ["a", None], "logits": torch.zeros(2)}, {"text": ["a", None]}),
        ([["x"], []], {"0": [["x"], []]}),
        (
            [[{"word": "x", "score": np.float32(0.5)}], []],
            {"0": [[{"word": "x", "score": 0.5}], []]},
        ),
        ([np.zeros((1, 2)), np.zeros((0, 2))], {"0": [[[0, 0]], []]}),
    ],
)
def test_texts_and_json_values_are_columns(returned: Any, expected: dict[str, Any]) -> None:
    columns = columns_of(returned, 2)
    assert {name: columns[name] for name in expected} == expected


def test_a_list_is_read_as_in_the_first_batch() -> None:
    read = OutputReader()
    read(boxes(2, 1, 3), 3)
    column = read(boxes(1), 1)
    assert isinstance(column, ValueColumn), "one row in a batch of one sample fits two readings"
    outputs = OutputReader()
    outputs([torch.zeros(4, 2), torch.zeros(4, 2)], 4)
    assert [*outputs([torch.zeros(2, 2), torch.zeros(2, 2)], 2)] == ["0", "1"]


def test_lists_of_several_outputs_stay_outputs() -> None:
    states = [torch.zeros(2, 3), torch.zeros(2)]
    assert [*columns_of(states, 2)] == ["0", "1"], "their dimensions differ"
    assert [*columns_of({"parts": [{"x": states[0]}, states[1]]}, 2)] == ["parts.0.x", "parts.1"]
    assert [*columns_of((states[0], states[0]), 2)] == ["0", "1"], "a tuple has outputs"


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (boxes(2, 2), "a list of 2 tensors with 2 rows for a batch of 2"),
        (["a"], "a list of 1 items for a batch of 2"),
        ([{"a": 1}, {"b": 1}], "the keys a for one sample and b for another"),
        ([{"a": object()}, {"a": object()}], "contains object; return tensors, texts"),
        ([torch.zeros(1, dtype=torch.complex64), torch.zeros(3, dtype=torch.complex64)], "complex"),
    ],
)
def test_other_lists_are_refused(returned: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        columns_of(returned, 2)


def test_values_are_not_shared_with_the_model() -> None:
    rows = boxes(3, 1)
    column = OutputReader()([row[:2] for row in rows], 2)
    rows[0].zero_()
    assert column.values[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert column.values[0].untyped_storage().nbytes() == 32, "without the rows that were cut off"
