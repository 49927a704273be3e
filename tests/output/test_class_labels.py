"""Label columns and class names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradrun.config.output import OutputSection
from gradrun.output.class_labels import ClassLabels
from gradrun.output.missing import MISSING_CLASS


def labels(transform: str, **keys: int) -> ClassLabels:
    return ClassLabels(OutputSection(path=Path("x"), transform=transform, **keys), ["cat", "dog"])


@pytest.mark.parametrize(
    ("transform", "outputs", "columns"),
    [
        ("argmax", ["prediction"], {"prediction": "label"}),
        ("argmax", ["a", "b"], {"a": "a.label", "b": "b.label"}),
        ("topk", ["values", "indices"], {"indices": "labels"}),
        ("classify", ["class", "score"], {"class": "label"}),
        ("classify", ["a.class", "a.score"], {"a.class": "a.label"}),
        ("softmax", ["prediction"], {}),
    ],
)
def test_outputs_of_class_numbers_have_a_label_column(
    transform: str, outputs: list[str], columns: dict[str, str]
) -> None:
    tensors = dict.fromkeys(outputs, torch.zeros(2))
    assert labels(transform).columns(tensors) == columns


def test_without_class_names_there_are_no_labels() -> None:
    config = OutputSection(path=Path("x"), transform="argmax")
    assert ClassLabels(config).columns({"prediction": torch.zeros(2)}) == {}


def test_numbers_without_a_name_stay_numbers() -> None:
    assert labels("topk").names_of([[1, 0], [7, MISSING_CLASS]]) == [["dog", "cat"], ["7", ""]]
