"""Tests of the source `synthetic`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.sources import data, data_error, joined


@pytest.mark.parametrize("distribution", ["normal", "uniform", "randint"])
@pytest.mark.parametrize("width", [3, 40_000])  # many samples per block, and one
def test_a_sample_depends_neither_on_the_batch_size_nor_on_the_start(
    distribution: str, width: int
) -> None:
    spec = {"shape": [width], "distribution": distribution, "high": 9}

    def drawn(batch_size: int, start: int = 0) -> torch.Tensor:
        opened = data("synthetic", inputs={"x": spec}, samples=25, batch_size=batch_size)
        return joined(opened.batches(start))

    whole = drawn(25)
    assert len(torch.unique(whole[:, 0])) > 5, "samples differ"
    assert all(torch.equal(drawn(size), whole) for size in (1, 7, 64))
    assert all(torch.equal(drawn(4, start), whole[start:]) for start in (1, 4, 24))


def test_a_sample_does_not_depend_on_the_number_of_samples() -> None:
    few, many = (
        joined(data("synthetic", inputs={"x": {"shape": [2]}}, samples=n).batches())
        for n in (10, 100_000)
    )
    assert torch.equal(many[:10], few)
    assert len(torch.unique(many, dim=0)) == 100_000, "blocks differ"


def test_seeds_and_inputs_give_independent_values() -> None:
    inputs = {"a": {"shape": [8]}, "b": {"shape": [8]}}
    first, other = (
        next(iter(data("synthetic", seed=s, inputs=inputs, samples=4).batches())).kwargs
        for s in (0, 1)
    )
    drawn = [first["a"], first["b"], other["a"], other["b"]]
    assert len({tuple(tensor.flatten().tolist()) for tensor in drawn}) == 4


@pytest.mark.parametrize(
    ("spec", "low", "high", "mean"),
    [
        ({"distribution": "normal"}, -7, 7, 0.0),
        ({"distribution": "uniform"}, 0, 1, 0.5),
        ({"distribution": "uniform", "low": -4, "high": -2, "dtype": "float64"}, -4, -2, -3.0),
        ({"distribution": "randint", "high": 5, "dtype": "int64"}, 0, 4, 2.0),
        ({"distribution": "randint", "low": -3, "high": 4, "dtype": "int8"}, -3, 3, 0.0),
        ({"distribution": "randint", "high": 256, "dtype": "uint8"}, 0, 255, 127.5),
        ({"distribution": "randint", "high": 2, "dtype": "bool"}, 0, 1, 0.5),
        ({"distribution": "zeros", "dtype": "bfloat16"}, 0, 0, 0.0),
        ({"distribution": "ones", "dtype": "float16"}, 1, 1, 1.0),
    ],
)
def test_a_distribution_has_its_range_mean_and_dtype(
    spec: dict[str, Any], low: float, high: float, mean: float
) -> None:
    opened = data("synthetic", inputs={"x": {"shape": [100]} | spec}, samples=1000)
    drawn = joined(opened.batches())
    assert drawn.dtype == getattr(torch, spec.get("dtype", "float32"))
    values = drawn.double()
    assert low <= values.min()
    assert values.max() <= high
    assert abs(values.mean() - mean) <= 0.01 * (high - low)
    if spec["distribution"] == "normal":
        assert abs(values.std() - 1) < 0.01
    elif spec["distribution"] == "randint":
        assert len(torch.unique(drawn)) == high - low + 1, "every number occurs"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"distribution": "normal", "dtype": "int64"}, "use distribution: randint"),
        ({"distribution": "uniform", "low": 2, "high": 2}, "low 2 must be below high 2"),
        ({"distribution": "randint", "low": 3, "high": 1, "dtype": "int64"}, "must be below"),
        ({"distribution": "randint", "high": 257, "dtype": "uint8"}, "between 0 and 256"),
        ({"distribution": "randint", "low": -129, "dtype": "int8"}, "between -128 and 128"),
        ({"distribution": "randint", "high": 3, "dtype": "bool"}, "between 0 and 2"),
        ({"distribution": "randint", "high": 1e300}, "randint numbers of float32 must be"),
        ({"distribution": "randint", "high": 2.0**63, "dtype": "int64"}, "must be between"),
        ({"distribution": "uniform", "low": -3e38, "high": 3e38}, "must be between"),
        ({"distribution": "uniform", "high": 1e6, "dtype": "float16"}, "and 65504"),
    ],
)
def test_an_impossible_distribution_is_an_error(spec: dict[str, Any], words: str) -> None:
    assert words in data_error("synthetic", inputs={"x": {"shape": [2]} | spec}, samples=3)


def test_a_batch_larger_than_memory_is_an_error_before_it_is_allocated() -> None:
    inputs = {"x": {"shape": [2**38]}}
    assert "choose a smaller batch" in data_error("synthetic", inputs=inputs, samples=2**30)
