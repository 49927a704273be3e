"""Predictions in memory are those of .npy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradrun
from gradrun.engines.objects import Inference
from gradrun.output.formats.memory import MemoryWriter, PredictionArrays
from gradrun.output.formats.npy import NpyWriter

SIZES = [4, 4, 4, 3]


def batches(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    values = torch.randn(sum(SIZES), 2, 3, generator=torch.Generator().manual_seed(0)) * 9
    values[5, 1] = torch.inf if dtype.is_floating_point else 0
    return [{"a": part.to(dtype), "b": part[:, 0, 0]} for part in values.split(SIZES)]


@pytest.mark.parametrize("samples", [sum(SIZES), None], ids=["known", "unknown"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_arrays_in_memory_equal_those_of_npy_files(
    tmp_path: Path, dtype: torch.dtype, samples: int | None
) -> None:
    target = PredictionArrays()
    writers: list[Any] = [MemoryWriter(target, samples), NpyWriter(tmp_path, samples)]
    for writer in writers:
        parts, start = batches(dtype), 0
        writer.open(parts[0])
        for number, (part, size) in enumerate(zip(parts, SIZES, strict=True)):
            valid = torch.tensor([True, True, False, True]) if number == 2 else None
            writer.write(part, range(start, start + size), valid)
            start += size
            if number == 1:
                writer.commit()
        part["a"].zero_()  # a model may return the same memory with every batch
        writer.close()
    memory, files = writers
    assert memory.written == files.written == sum(SIZES)
    assert memory.nonfinite == files.nonfinite
    for name, array in target.arrays.items():
        saved = np.load(tmp_path / f"predictions.{name}.npy")
        assert array.dtype == saved.dtype
        np.testing.assert_array_equal(array, saved)
        assert array.base is None, "no spare memory behind it"
    (rows, read), *more = target.read()
    assert not more
    assert rows.tolist() == [*range(sum(SIZES))]
    np.testing.assert_array_equal(read["b"], target.arrays["b"])


def test_a_batch_of_another_layout_is_refused() -> None:
    writer = MemoryWriter(PredictionArrays(), 4)
    writer.open({"a": torch.zeros(2, 3)})
    with pytest.raises(
        ValueError, match=r"output a has torch.float32 rows of shape \[3\], but the next"
    ):
        writer.write({"a": torch.zeros(2, 4)}, range(2))
    with pytest.raises(ValueError, match="the outputs were"):
        writer.write({"b": torch.zeros(2, 3)}, range(2))


def test_metrics_of_a_run_in_memory_are_those_of_its_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows, labels = np.random.default_rng(0).normal(size=(90, 4)), np.arange(90) % 3
    keys: dict[str, Any] = {"model": nn.Linear(4, 3), "data": rows, "labels": labels}
    keys["metrics"] = [{"name": "accuracy"}]
    for transform in ("none", "classify"):
        output = {"transform": transform}
        found = gradrun.infer(**keys, output=output)
        saved = gradrun.infer(**keys, output=output | {"path": str(tmp_path / transform)})
        assert isinstance(found, Inference)
        assert isinstance(saved, Inference)
        assert found.result.metrics == saved.result.metrics != ()
        assert found.predictions.keys() == saved.predictions.keys()
        for name, array in found.predictions.items():
            np.testing.assert_array_equal(array, saved.predictions[name])
