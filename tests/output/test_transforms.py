"""Model outputs are selected, checked and transformed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.output.class_labels import DEFAULT_OUTPUT
from gradrun.output.missing import MISSING_CLASS, count_nonfinite
from gradrun.output.transforms import (
    Outputs,
    output_selector,
)

SIZE = 4
LOGITS = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(0))
OTHER = LOGITS[:, :2] * 2


@dataclasses.dataclass
class BatchSource:
    logits: torch.Tensor
    other: Any = None


class Pair(NamedTuple):
    logits: torch.Tensor
    other: torch.Tensor


def outputs_of(returned: Any, size: int = SIZE, **keys: Any) -> Outputs:
    return output_selector(OutputSection(path=Path("x"), **keys))(returned, size)


def refused(returned: Any, size: int = SIZE, **keys: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        outputs_of(returned, size, **keys)
    return caught.value


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (LOGITS, [DEFAULT_OUTPUT]),
        ((LOGITS,), [DEFAULT_OUTPUT]),
        ({"logits": LOGITS}, [DEFAULT_OUTPUT]),
        ({"logits": LOGITS, "cache": None, "flag": True}, [DEFAULT_OUTPUT]),
        (BatchSource(LOGITS), [DEFAULT_OUTPUT]),
        ((LOGITS, OTHER), ["0", "1"]),
        ([LOGITS, OTHER], ["0", "1"]),
        ({"logits": LOGITS, "other": OTHER}, ["logits", "other"]),
        ({7: LOGITS, 8: OTHER}, ["7", "8"]),
        (BatchSource(LOGITS, OTHER), ["logits", "other"]),
        (Pair(LOGITS, OTHER), ["logits", "other"]),
        (BatchSource(LOGITS, (OTHER, {"deep": OTHER})), ["logits", "other.0", "other.1.deep"]),
    ],
)
def test_every_tensor_in_a_nested_output_is_named_by_its_path(
    returned: Any, names: list[str]
) -> None:
    outputs = outputs_of(returned)
    assert list(outputs) == names
    assert torch.equal(outputs[names[0]], LOGITS)
    assert all(torch.equal(outputs[name], OTHER) for name in names[1:])


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (("other",), [DEFAULT_OUTPUT]),
        (("states.1",), [DEFAULT_OUTPUT]),
        (("states.0", "other"),) * 2,
    ],
)
def test_select_returns_the_named_outputs_in_its_order(
    select: tuple[str, ...], names: tuple[str, ...]
) -> None:
    returned = {"logits": LOGITS, "other": OTHER, "states": [OTHER + 1, OTHER + 2]}
    outputs = outputs_of(returned, select=select)
    values = {"other": OTHER, "states.0": OTHER + 1, "states.1": OTHER + 2}
    assert list(outputs) == list(names)
    assert all(torch.equal(outputs[n], values[s]) for n, s in zip(names, select, strict=True))


def test_select_may_exclude_outputs_without_a_row_per_sample() -> None:
    returned = {"logits": LOGITS, "loss": torch.tensor(1.0), "weights": torch.ones(9, 2)}
    assert "shape [] for a batch of 4" in str(refused(returned))
    assert torch.equal(outputs_of(returned, select=("logits",))[DEFAULT_OUTPUT], LOGITS)


def test_select_finds_a_single_tensor_by_its_position() -> None:
    assert torch.equal(outputs_of(LOGITS, select=("0",))[DEFAULT_OUTPUT], LOGITS)


def test_an_unknown_name_is_an_error_with_a_suggestion() -> None:
    error = refused({"logits": LOGITS, "other": OTHER}, select=("logit",))
    assert "did you mean" in str(error)
    assert "logits" in str(error)
    assert error.key == "output.select"


@pytest.mark.parametrize("returned", [None, 3, "text", [], {}, (None, 1.5), object()])
def test_a_model_without_a_tensor_output_is_refused(returned: Any) -> None:
    assert f"the model returned {type(returned).__name__}" in str(refused(returned))


@pytest.mark.parametrize("shape", [(), (3, 4), (5,), (0, 4)])
def test_outputs_without_a_row_per_sample_are_refused(shape: tuple[int, ...]) -> None:
    error = refused(torch.zeros(shape))
    assert f"{list(shape)} for a batch of 4" in str(error)
    assert error.key == "output.select"


def test_a_sparse_output_is_refused() -> None:
    assert "to_dense()" in str(refused(LOGITS.to_sparse()))


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "..", ".hidden", "a b", "x\0y"])
def test_a_model_cannot_name_a_file_outside_the_folder(name: str) -> None:
    assert "not a safe file name" in str(refused({name: LOGITS, "fine": OTHER}))
    assert list(outputs_of({name: LOGITS, "fine": OTHER}, select=("fine",))) == [DEFAULT_OUTPUT]


@pytest.mark.parametrize("dim", [-1, 1, 2, -2])
def test_transforms_match_torch_over_the_given_dimension(dim: int) -> None:
    values = torch.randn(SIZE, 5, 7)
    assert torch.equal(
        outputs_of(values, transform="softmax", dim=dim)[DEFAULT_OUTPUT], torch.softmax(values, dim)
    )
    assert torch.equal(
        outputs_of(values, transform="argmax", dim=dim)[DEFAULT_OUTPUT], torch.argmax(values, dim)
    )
    best = torch.topk(values, 3, dim)
    outputs = outputs_of(values, transform="topk", dim=dim, k=3)
    assert list(outputs) == ["values", "indices"]
    assert torch.equal(outputs["values"], best.values)
    assert torch.equal(outputs["indices"], best.indices)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nonfinite_scores_have_no_class(odd: float, dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 2.0], [odd, 1.0], [-math.inf, 0.0]], dtype=dtype)
    outputs = outputs_of(values, size=3, transform="argmax")[DEFAULT_OUTPUT]
    assert outputs.tolist() == [1, MISSING_CLASS, 1], "-inf excludes a class"
    assert count_nonfinite([outputs]) == 1


def test_classify_returns_the_most_likely_class_and_its_probability() -> None:
    outputs = outputs_of({"a": LOGITS, "b": OTHER}, transform="classify")
    assert list(outputs) == ["a.class", "a.score", "b.class", "b.score"]
    outputs = outputs_of(LOGITS, transform="classify")
    assert torch.equal(outputs["class"], LOGITS.argmax(1))
    assert torch.equal(outputs["score"], LOGITS.softmax(1).amax(1))


def test_transforms_apply_to_every_output() -> None:
    outputs = outputs_of({"a": LOGITS, "b": OTHER}, transform="topk", k=2)
    assert list(outputs) == ["a.values", "a.indices", "b.values", "b.indices"]
    assert torch.equal(outputs["b.values"], OTHER.sort(descending=True).values)
    outputs = outputs_of({"a": LOGITS, "b": OTHER}, transform="argmax")
    assert torch.equal(outputs["b"], OTHER.argmax(1))


@pytest.mark.parametrize(
    ("returned", "keys", "words", "key"),
    [
        (LOGITS, {"transform": "softmax", "dim": 2}, "over dimension 2", "output.dim"),
        (LOGITS, {"transform": "softmax", "dim": 0}, "dimension 0 is the batch", "output.dim"),
        (LOGITS, {"transform": "argmax", "dim": -2}, "dimension 0 is the batch", "output.dim"),
        (LOGITS, {"transform": "topk", "k": 7}, "k=7 exceeds the 6 classes", "output.k"),
        (LOGITS[:, 0], {"transform": "argmax"}, "with shape [4]", "output.transform"),
    ],
)
def test_an_impossible_transform_is_refused(
    returned: torch.Tensor, keys: dict[str, Any], words: str, key: str
) -> None:
    error = refused(returned, **keys)
    assert words in str(error)
    assert error.key == key


def test_outputs_are_detached() -> None:
    leaf = LOGITS.clone().requires_grad_()
    for transform in ("none", "softmax", "topk"):
        outputs = outputs_of(leaf * 2, transform=transform, k=2)
        assert not any(tensor.requires_grad for tensor in outputs.values())


# --- sequences ---------------------------------------------------------------------------------

STATES = torch.randn(SIZE, 5, 6, generator=torch.Generator().manual_seed(1))
LENGTHS = [5, 3, 1, 4]
MASK = torch.tensor([[int(i < length) for i in range(5)] for length in LENGTHS])


def of_tokens(returned: Any, mask: torch.Tensor, *words: str) -> torch.Tensor:
    read = output_selector(OutputSection(path=Path("x"), transform=words))
    return read(returned, SIZE, {"attention_mask": mask})[DEFAULT_OUTPUT]


def test_mean_pool_ignores_padding() -> None:
    outputs = of_tokens(STATES, MASK, "mean_pool")
    expected = [row[:length].mean(0) for row, length in zip(STATES, LENGTHS, strict=True)]
    assert torch.allclose(outputs, torch.stack(expected), atol=1e-7)


def test_cls_takes_the_first_token_after_any_padding() -> None:
    assert torch.equal(of_tokens(STATES, MASK, "cls"), STATES[:, 0])
    outputs = of_tokens(STATES, MASK.flip(1), "cls")
    expected = [row[5 - length] for row, length in zip(STATES, LENGTHS, strict=True)]
    assert torch.equal(outputs, torch.stack(expected))


def test_last_token_takes_the_last_token_before_any_padding() -> None:
    expected = torch.stack([row[n - 1] for row, n in zip(STATES, LENGTHS, strict=True)])
    assert torch.equal(of_tokens(STATES, MASK, "last_token"), expected)
    assert torch.equal(of_tokens(STATES, MASK.flip(1), "last_token"), STATES[:, -1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_are_pooled_and_normalized_in_float32(dtype: torch.dtype) -> None:
    states = torch.randn(2, 400, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    read = output_selector(OutputSection(path=Path("x"), transform=("mean_pool", "normalize")))
    outputs = read(states, 2, {"attention_mask": torch.ones(2, 400)})[DEFAULT_OUTPUT]
    assert outputs.dtype == torch.float32
    mean = states.double().numpy().mean(1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.abs(outputs.numpy() - expected).max() < 1e-6


def test_transforms_are_applied_in_order() -> None:
    outputs = of_tokens(STATES, MASK, "mean_pool", "normalize")
    assert torch.allclose(outputs.norm(dim=1), torch.ones(SIZE))
    assert torch.allclose(
        of_tokens(STATES, MASK, "mean_pool", "softmax", "argmax"),
        of_tokens(STATES, MASK, "mean_pool").argmax(1),
    )
    assert torch.equal(
        outputs_of(LOGITS, transform=("softmax", "topk"), k=2)["indices"], LOGITS.topk(2).indices
    )


@pytest.mark.parametrize("word", ["mean_pool", "cls", "last_token"])
def test_pooling_without_a_mask_or_tokens_is_an_error(word: str) -> None:
    error = refused(STATES, transform=(word,))
    assert "attention_mask" in str(error)
    assert error.key == "output.transform"
    with pytest.raises(ConfigError, match=r"one row per token, shape \[4, 5\] plus a width"):
        of_tokens(LOGITS, MASK, word)
