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
from gradrun.output.columns import ValueColumn
from gradrun.output.missing import MISSING_CLASS, count_nonfinite
from gradrun.output.output_facts import ReturnedOutputs
from gradrun.output.transforms import (
    Outputs,
    OutputSelector,
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
    return OutputSelector(OutputSection(path=Path("x"), **keys))(returned, size)


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
    assert error.key == "model", "no other output can be selected"


@pytest.mark.parametrize(
    ("returned", "way"),
    [
        ({"states": torch.zeros(2, 4, 3), "logits": torch.zeros(4, 3)}, "Choose logits"),
        (torch.zeros(3, 4), "dimension 1 may be the batch: transpose the output"),
        (torch.zeros(3, 5), "return one row per sample"),
        (tuple(torch.zeros(n, 2) for n in (1, 2, 3, 5)), "return them as a list"),
    ],
)
def test_the_error_for_other_rows_gives_a_way(returned: Any, way: str) -> None:
    assert way in str(refused(returned))
    assert "output.select" not in str(refused(returned)), "where no output fits, none is offered"


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_the_samples_of_a_nested_tensor_are_values(layout: torch.layout) -> None:
    rows = [torch.full((n, 2), float(n)) for n in (1, 2, 3, 4)]
    column = outputs_of(torch.nested.nested_tensor(rows, layout=layout))[DEFAULT_OUTPUT]
    assert isinstance(column, ValueColumn)
    assert all(map(torch.equal, column.values, rows))


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
    assert count_nonfinite({DEFAULT_OUTPUT: outputs}) == 1


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
        (LOGITS[:, 0], {"transform": "argmax"}, "has shape [4], one value", "output.transform"),
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
    read = OutputSelector(OutputSection(path=Path("x"), transform=words))
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
    read = OutputSelector(OutputSection(path=Path("x"), transform=("mean_pool", "normalize")))
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


# --- classes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["softmax", "argmax", "classify", "topk"])
@pytest.mark.parametrize("shape", [(SIZE,), (SIZE, 1), (SIZE, 1, 3, 3)])
def test_transforms_over_classes_refuse_one_value_and_name_sigmoid(
    transform: str, shape: tuple[int, ...]
) -> None:
    error = refused(torch.randn(shape), transform=transform, k=1)
    assert f"{transform} needs the scores of several classes" in str(error)
    assert "sigmoid" in str(error)
    assert error.key == "output.transform"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sigmoid_and_softmax_equal_numpy_in_at_least_float32(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    values = logits.double().numpy()
    exponents = np.exp(values)
    right = {
        "sigmoid": 1 / (1 + np.exp(-values)),
        "softmax": exponents / exponents.sum(1, keepdims=True),
    }
    for transform, expected in right.items():
        found = outputs_of(logits, transform=transform)[DEFAULT_OUTPUT]
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert np.allclose(found.numpy(), expected, atol=1e-7)
    score = outputs_of(logits, transform="classify")["score"]
    assert np.allclose(score.numpy(), right["softmax"].max(1), atol=1e-7)


@pytest.mark.parametrize("transform", ["softmax", "sigmoid", "classify"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_transforms_of_scores_refuse_integers(transform: str, dtype: torch.dtype) -> None:
    error = refused(torch.ones(SIZE, 3, dtype=dtype), transform=transform)
    assert "needs floating-point scores" in str(error)
    assert str(dtype).removeprefix("torch.") in str(error)


@pytest.mark.parametrize("shape", [(SIZE, 5, 6, 7), (SIZE, 5, 2, 6, 7)])
def test_the_classes_of_images_and_volumes_are_in_dimension_1(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    array = values.numpy()
    classes = outputs_of(values, transform="argmax")[DEFAULT_OUTPUT].numpy()
    assert np.array_equal(classes, array.argmax(1))
    exponents = np.exp(array)
    right = exponents / exponents.sum(1, keepdims=True)
    assert np.allclose(outputs_of(values, transform="softmax")[DEFAULT_OUTPUT], right, atol=1e-6)
    best = outputs_of(values, transform="topk", k=2)["indices"].numpy()
    assert np.array_equal(best, np.argsort(-array, axis=1)[:, :2])
    assert np.array_equal(outputs_of(values, transform="classify")["class"], array.argmax(1))
    last = outputs_of(values, transform="argmax", dim=-1)[DEFAULT_OUTPUT].numpy()
    assert np.array_equal(last, array.argmax(-1))


def test_three_dimensions_without_tokens_need_the_dimension_of_the_classes() -> None:
    values = torch.randn(SIZE, 5, 6)
    error = refused(values, transform="argmax")
    assert "its classes may be in dimension 1 (5) or 2 (6): set output.dim to 1 or 2" in str(error)
    assert np.array_equal(of_tokens(values, MASK, "argmax"), values.numpy().argmax(-1))


def test_threshold_gives_1_above_it_and_no_class_for_nan() -> None:
    logits = torch.tensor([[-1.0, 0.2, 3.0], [0.0, 1.0, math.nan]])
    found = outputs_of(logits, size=2, transform=["sigmoid", "threshold"])[DEFAULT_OUTPUT]
    assert found.tolist() == [[0, 1, 1], [0, 1, MISSING_CLASS]]
    found = outputs_of(logits, size=2, transform="threshold", threshold=0.5)[DEFAULT_OUTPUT]
    assert found.tolist() == [[0, 0, 1], [0, 1, MISSING_CLASS]]
    with pytest.raises(ValueError, match=r"0\.5 for probabilities, 0 for logits"):
        OutputSection(path=Path("x"), transform="threshold")


def test_uint8_keeps_whole_numbers_of_one_byte_and_refuses_others() -> None:
    values = torch.randn(SIZE, 256, 3, 3)
    found = outputs_of(values, transform=["argmax", "uint8"])[DEFAULT_OUTPUT]
    assert found.dtype == torch.uint8
    assert np.array_equal(found, values.numpy().argmax(1))
    for odd in (-1.0, 0.5, 256.0, math.nan):
        assert "represents only whole numbers from 0 to 255" in str(
            refused(torch.full((SIZE, 2), odd), transform="uint8")
        )
    values[0] = math.nan
    assert "NaN or infinite" in str(refused(values, transform=["argmax", "uint8"]))


def test_each_output_has_its_own_transforms() -> None:
    returned = {"sentiment": OTHER, "topic": LOGITS, "embedding": STATES[:, 0]}
    transform = {"sentiment": "softmax", "topic": ["topk"]}
    outputs = outputs_of(returned, transform=transform, k=2)
    assert list(outputs) == ["sentiment", "topic.values", "topic.indices", "embedding"]
    exponents = np.exp(OTHER.numpy())
    assert np.allclose(outputs["sentiment"], exponents / exponents.sum(1, keepdims=True), atol=1e-6)
    assert np.array_equal(outputs["topic.indices"], np.argsort(-LOGITS.numpy(), axis=1)[:, :2])
    assert torch.equal(outputs["embedding"], STATES[:, 0])
    error = refused(returned, transform={"topics": "softmax"})
    assert "did you mean topic?" in str(error)


def test_one_output_is_written_under_the_name_of_the_config() -> None:
    returned = {"logits": LOGITS, "other": OTHER}
    assert list(outputs_of(returned, select="logits", name="logits")) == ["logits"]
    outputs = outputs_of(returned, select="logits", name="logits", transform={"logits": "classify"})
    assert list(outputs) == ["logits.class", "logits.score"]
    error = refused(returned, name="logits")
    assert "output.name names one output, and there are 2: logits, other" in str(error)


def test_the_dimension_of_the_classes_and_the_precision_are_stated() -> None:
    def stated(returned: Any, **keys: Any) -> list[tuple[str, str]]:
        config = OutputSection(path=Path("x"), **keys)
        facts = ReturnedOutputs(config, returned, {}, None)
        return [(s.topic, s.text) for s in facts.statements()]

    images = torch.randn(SIZE, 3, 8, 9).half()
    assert stated(images, transform=["softmax", "argmax"]) == [
        (
            "output",
            "[n, 3, 8, 9]: softmax over dimension 1 (3 classes), then argmax over dimension "
            "1 (3 classes), in float32",
        )
    ]
    assert stated(LOGITS[:, :1], transform=["sigmoid", "threshold"]) == [
        ("output", "[n, 1]: sigmoid, then above 0.5")
    ]
    assert stated({"a": LOGITS, "b": OTHER}, transform={"a": "argmax"}) == [
        ("output a", "[n, 6]: argmax over dimension 1 (6 classes)"),
        ("output b", "[n, 2]: as returned"),
    ]
    assert stated(LOGITS) == []
