"""The content of a file for one sample, read back by Pillow, NumPy and json."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.output.class_labels import ClassLabels
from gradrun.output.columns import ValueColumn
from gradrun.output.formats.sample_encoders import SampleEncoder, open_encoder
from gradrun.output.missing import MISSING_CLASS


def encoder_of(column: Any, classes: int = 0, **keys: Any) -> SampleEncoder:
    """Return the encoder of the output `prediction` with a number of classes."""
    config = OutputSection(path=Path("x"), format="files", **keys)
    return open_encoder(ClassLabels(config, (), {"prediction": classes}), "prediction", column)


def pixels(encoder: SampleEncoder, value: torch.Tensor) -> np.ndarray[Any, Any]:
    assert encoder.suffix == ".png"
    return np.asarray(Image.open(io.BytesIO(encoder.encode(value))))


def test_more_classes_than_a_byte_has_are_gray_levels_of_16_bits() -> None:
    column = torch.tensor([[[0, 255, 256], [999, 7, MISSING_CLASS]]])
    encoder = encoder_of(column, 1000, transform="argmax")
    assert encoder.text == "class numbers as gray levels of 16 bits"
    found = pixels(encoder, column[0])
    assert found.tolist() == [[0, 255, 256], [999, 7, 65535]]


@pytest.mark.parametrize(
    ("dtype", "classes", "value"),
    [(torch.int64, 0, 256), (torch.int64, 0, -1), (torch.int32, 300, 65536)],
)
def test_a_class_without_a_pixel_value_is_an_error(dtype: Any, classes: int, value: int) -> None:
    column = torch.tensor([[[0, value]]], dtype=dtype)
    text = f"class numbers from {min(0, value)} to {max(0, value)}, and a pixel has 0 to "
    with pytest.raises(ValueError, match=text):
        encoder_of(column, classes).encode(column[0])


def test_numbers_from_0_to_1_are_gray_levels() -> None:
    column = torch.tensor([[[[0.0, 0.25], [0.501, 1.0]]]], dtype=torch.float16)  # [n, 1, 2, 2]
    encoder = encoder_of(column, file_type="png")
    assert pixels(encoder, column[0]).tolist() == [[0, 64], [128, 255]]
    for wrong in (1.01, -0.01, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="values outside of 0 to 1, which have no gray level"):
            encoder.encode(torch.full((1, 2, 2), wrong))


def test_bytes_are_gray_levels_or_colors_and_classes_only_after_such_a_step() -> None:
    gray = torch.tensor([[[[0], [200]], [[3], [255]]]], dtype=torch.uint8)  # [n, 2, 2, 1]
    encoder = encoder_of(gray, file_type="png")
    assert encoder.text == "gray levels"
    assert pixels(encoder, gray[0]).tolist() == [[0, 200], [3, 255]]
    colors = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).reshape(2, 3, 2, 2)
    found = pixels(encoder_of(colors, file_type="png"), colors[1])
    assert np.array_equal(found, np.moveaxis(colors[1].numpy(), 0, 2))
    mask = torch.tensor([[[0, 1], [1, 0]]], dtype=torch.uint8)
    thresholded = encoder_of(mask, transform="threshold", threshold=0.5)
    assert thresholded.text == "class numbers with a palette, 255: no class"
    assert pixels(thresholded, mask[0]).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("shape", [(2,), (2, 4, 4), (0, 3)])
def test_other_shapes_have_no_picture(shape: tuple[int, ...]) -> None:
    column = torch.zeros((1, *shape))
    with pytest.raises(ValueError, match=r"has the shape .* and a \.png file needs"):
        encoder_of(column, file_type="png").encode(column[0])


def test_records_and_values_of_several_types_are_json() -> None:
    values: list[Any] = [{"boxes": [[1.5, 2.0]], "name": "ä"}, ["a", 1], 3]
    encoder = encoder_of(ValueColumn(values))
    assert encoder.suffix == ".json"
    assert [json.loads(encoder.encode(value)) for value in values] == values
    numbers = torch.tensor([[1, 2], [3, 4]])
    assert json.loads(encoder_of(numbers, file_type="json").encode(numbers)) == [[1, 2], [3, 4]]
    with pytest.raises(ConfigError, match=r"a \.png file cannot contain output 'prediction'"):
        encoder_of(ValueColumn(values), file_type="png")


def test_arrays_keep_dtype_and_values() -> None:
    column = torch.tensor([[[0.5, 2.0]]], dtype=torch.float64)
    encoder = encoder_of(column)
    assert (encoder.suffix, encoder.text) == (".npy", "an array, float64")
    found = np.load(io.BytesIO(encoder.encode(column[0])))
    assert found.dtype == np.float64
    assert found.tolist() == [[0.5, 2.0]]
    several = ValueColumn([None, torch.zeros((2, 3), dtype=torch.uint8)])  # of any size
    assert encoder_of(several).suffix == ".png"
    assert encoder_of(ValueColumn([None, torch.zeros(3, dtype=torch.uint8)])).suffix == ".npy"
