"""Dtype, scale, axis order and shape of inputs, compared with NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gradrun
from tests.support.sources import data, data_error, joined

PICTURES = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)


def stored(folder: Path, form: str, rows: np.ndarray) -> dict[str, Any]:
    """Keys of a data section over `rows`, stored in one of the formats that can be permuted."""
    path = folder / f"x.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps({"p": row.tolist()}) + "\n" for row in rows))
        return {"source": "records", "path": path, "spec": {"columns": ["p"]}}
    if form == "npy":
        np.save(path, rows)
    elif form == "npz":
        np.savez(path, x=rows)
    else:
        save_file({"x": torch.from_numpy(rows.copy())}, path)
    return {"source": "arrays", "path": path, "spec": {}}


def section(given: dict[str, Any], **spec: Any) -> dict[str, Any]:
    keys = {key: value for key, value in given.items() if key != "spec"}
    return keys | {"inputs": {"x": given["spec"] | spec}}


FORMS = ["npy", "npz", "safetensors", "jsonl"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [[2, 0, 1], [2, 1, 0], [1, 0, 2], [0, 1, 2]])
def test_permute_moves_the_axes_of_each_sample(tmp_path: Path, form: str, order: list[int]) -> None:
    keys = section(stored(tmp_path, form, PICTURES), permute=order, dtype="float32", scale=0.5)
    found = joined(data(**keys, batch_size=4).batches())
    expected = PICTURES.transpose(0, *(axis + 1 for axis in order)).astype(np.float32) * 0.5
    assert np.array_equal(found.numpy(), expected)
    assert found.is_contiguous()


REFUSED = [
    ([8, 10, 3], [3, 8, 10], "[2, 0, 1]"),
    ([8, 8, 3], [3, 8, 8], "[2, 0, 1]"),
    ([3, 8, 8], [8, 8, 3], "[1, 2, 0]"),
    ([8, 4], [4, 8], "[1, 0]"),
    ([64, 3], [3, 8, 8], "[1, 0] before shape: [3, 8, 8]"),
    ([8, 8, 3], [3, 64], "[2, 0, 1] before shape: [3, 64]"),
    ([1, 4, 6], [6, 4], "[0, 2, 1] before shape: [6, 4]"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("before", "after", "permute"), REFUSED)
def test_a_shape_that_would_mix_the_axes_is_refused_with_the_permute_that_fits(
    tmp_path: Path, form: str, before: list[int], after: list[int], permute: str
) -> None:
    rows = np.arange(2 * np.prod(before), dtype=np.float32).reshape(2, *before)
    given = stored(tmp_path, form, rows)
    message = data_error(**section(given, shape=after))
    assert f"stored with the shape {before}" in message
    assert f"set permute: {permute}" in message
    order = json.loads(permute.split(" before")[0])
    found = joined(data(**section(given, shape=after, permute=order)).batches())
    moved = rows.transpose(0, *(axis + 1 for axis in order)).reshape(2, *after)
    assert np.array_equal(found.numpy(), moved)
    same = [*range(len(before))]  # the way to reshape nevertheless
    found = joined(data(**section(given, shape=after, permute=same)).batches())
    assert np.array_equal(found.numpy(), rows.reshape(2, *after))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([8, 8], [1, 8, 8]),
        ([1, 8, 8], [8, 8, 1]),
        ([8, 8], [64]),
        ([192], [3, 8, 8]),
        ([3, 64], [3, 8, 8]),
        ([2, 8], [4, 4]),
        ([6, 4], [8, 3]),
        ([8, 8], [8, 8]),
    ],
)
def test_a_shape_that_keeps_the_order_of_the_axes_is_a_plain_reshape(
    tmp_path: Path, form: str, before: list[int], after: list[int]
) -> None:
    rows = np.arange(2 * np.prod(before), dtype=np.float32).reshape(2, *before)
    found = joined(data(**section(stored(tmp_path, form, rows), shape=after)).batches())
    assert np.array_equal(found.numpy(), rows.reshape(2, *after))


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 3], [0, 0, 1]])
def test_a_permute_that_is_no_order_of_the_axes_is_an_error(
    tmp_path: Path, order: list[int]
) -> None:
    message = data_error(**section(stored(tmp_path, "npy", PICTURES), permute=order))
    assert "permute must list each axis from 0 to 2 once" in message


def test_rows_of_another_nested_shape_are_errors_if_their_axes_are_moved(tmp_path: Path) -> None:
    lines = ["[[1, 2], [3, 4]]", "[1, 2, 3, 4]", "[[5, 6], [7, 8]]"]
    (tmp_path / "t.jsonl").write_text("".join(f'{{"p": {line}}}\n' for line in lines))
    inputs = {"x": {"columns": ["p"], "permute": [1, 0]}}
    (batch,) = data("records", path=tmp_path / "t.jsonl", inputs=inputs).batches()
    assert [*batch.errors] == [1]
    assert "t.jsonl:2  input 'x' has lists of the shapes p [4]" in str(batch.errors[1])
    assert batch.args[0].tolist() == [[[1, 3], [2, 4]], [[0, 0], [0, 0]], [[5, 7], [6, 8]]]


# --- values that a dtype cannot represent --------------------------------------------------------

CASTS = [
    ("uint8", np.array([0, 255, 300, -1], np.int64), [2, 3]),
    ("uint8", np.array([0.0, 255.0, 1.5, np.nan]), [2, 3]),
    ("int8", np.array([0, 127, 128, 255], np.uint8), [2, 3]),
    ("int64", np.array([1.0, -(2.0**62), 1.5, 2.0**63]), [2, 3]),
    ("int64", np.array([np.inf, -np.inf, 3, 4], np.float32), [0, 1]),
    ("int32", np.array([2**31 - 1, 2**31, -(2**31), -(2**31) - 1]), [1, 3]),
    ("int32", np.array([1, 2**31, 2**32 - 1, 5], np.uint32), [1, 2]),
    ("float16", np.array([1.0, 65504, 1e5, np.inf], np.float32), [2]),
    ("float32", np.array([1.0, 1e38, 1e39, np.nan]), [2]),
    ("bfloat16", np.array([1.0, 1e38, -1e300, 2.0]), [2]),
    ("bool", np.array([0, 1, 2, -1]), [2, 3]),
    ("bool", np.array([0.0, 1.0, 0.5, np.nan]), [2, 3]),
    ("int16", np.array([True, False, True, True]), []),
    ("float32", np.array([2**24 + 1, 1, 2, 3]), []),  # rounding is no error
]


@pytest.mark.parametrize(("dtype", "values", "wrong"), CASTS)
@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_values_that_a_dtype_cannot_represent_are_errors_of_their_samples(
    tmp_path: Path, form: str, dtype: str, values: np.ndarray, wrong: list[int]
) -> None:
    keys = section(stored(tmp_path, form, values[:, None]), dtype=dtype)
    batches = list(data(**keys, batch_size=3).batches())
    errors = {i * 3 + row: str(e) for i, b in enumerate(batches) for row, e in b.errors.items()}
    assert [*errors] == wrong
    for sample, text in errors.items():
        assert text.startswith(f"sample {sample}, input x: the value ")
        assert text.endswith(f"does not fit in {dtype}")
    found, kind = joined(batches)[:, 0], getattr(torch, dtype)
    assert found.dtype == kind
    right = [i for i in range(4) if i not in wrong]
    expected = torch.tensor(values[right].tolist(), dtype=kind)
    assert torch.equal(found[right].nan_to_num(9), expected.nan_to_num(9))


def test_a_sample_that_does_not_fit_is_quarantined_and_all_others_are_predicted(
    tmp_path: Path,
) -> None:
    values = np.arange(10, dtype=np.int64)
    values[6] = 300
    np.save(tmp_path / "x.npy", values[:, None])
    config: dict[str, Any] = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {
            "source": "arrays",
            "path": str(tmp_path / "x.npy"),
            "inputs": {"x": {"dtype": "uint8"}},
            "batch_size": 4,
        },
        "run": {"on_error": "quarantine", "warmup": 0},
        "output": {"path": str(tmp_path / "out"), "format": "jsonl"},
    }
    assert gradrun.infer(config).quarantined == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").open()]
    found = [line["prediction"] for line in lines]
    assert found == [None if i == 6 else [i] for i in range(10)]
    (entry,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert "sample 6, input x: the value 300 does not fit in uint8" in entry


def test_a_scale_of_an_integer_dtype_is_an_error_and_of_stored_integers_gives_float32(
    tmp_path: Path,
) -> None:
    given = stored(tmp_path, "npy", PICTURES)
    assert "scale needs a floating-point dtype" in data_error(
        **section(given, dtype="uint8", scale=0.5)
    )
    found = joined(data(**section(given, scale=0.5)).batches())
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), PICTURES.astype(np.float32) * np.float32(0.5))
    deep = PICTURES.astype(np.uint16) * 257
    found = joined(data(**section(stored(tmp_path, "npy", deep), scale=1 / 65535)).batches())
    assert np.array_equal(found.numpy(), deep.astype(np.float32) * np.float32(1 / 65535))
    given = stored(tmp_path, "npy", np.array([[1j], [2 + 0j]]))
    (batch,) = data(**section(given, scale=0.5)).batches()
    assert (batch.args[0].tolist(), [*batch.errors]) == ([[0], [1]], [0])


def test_the_conversions_of_an_input_are_stated(tmp_path: Path) -> None:
    keys = section(
        stored(tmp_path, "npy", PICTURES), dtype="float32", scale=0.00392, permute=[2, 0, 1]
    )
    statements = {one.topic: one.text for one in data(**keys).statements()}
    assert statements["input x"] == (
        "x.npy, float32 [3, 8, 10], from uint8, x 0.00392, axes [2, 0, 1] of [8, 10, 3]"
    )
    assert statements["order"] == "samples as stored; ids: row numbers, from 0"
