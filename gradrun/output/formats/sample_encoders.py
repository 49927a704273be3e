"""The content of a file for one sample: .png for masks, .npy for arrays, .txt and .json."""

from __future__ import annotations

import colorsys
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional
from gradrun.core.value_types import TypeMismatch, ValueType
from gradrun.output.class_labels import ClassLabels
from gradrun.output.columns import ValueColumn
from gradrun.output.formats.npy import with_numpy_dtype
from gradrun.output.missing import MISSING_CLASS

if TYPE_CHECKING:
    from gradrun.output.columns import Column

Array = np.ndarray[Any, Any]

_NO_CLASS = 255
"""Pixel value of a pixel whose scores are NaN or infinite."""
_GOLDEN = 0.618033988749895
_CLASS_STEPS = {"argmax", "classify", "threshold", "topk"}


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes the value of one output for one sample."""

    suffix: str
    text: str
    """What the files contain, in a few words."""
    encode: Callable[[Any], bytes]
    """Return the content of a file; raise ValueError if the value does not fit the kind of file."""


def open_encoder(labels: ClassLabels, name: str, column: Column) -> SampleEncoder:
    """Return the encoder of an output, given its values for some batch.

    Raises:
        ConfigError: the kind of file in the config cannot contain the output.
    """
    wanted: str = labels.config.file_type
    kind = _kind(column)
    classes = _has_classes(kind, {*labels.config.transforms_as(_source(name))})
    if wanted == "auto":
        image = _is_plane(column) and (classes or kind.dtype == "uint8")
        texts = {"text": "txt", "tensor": "png" if image else "npy"}
        wanted = texts.get(kind.kind, "json")
    if wanted == "txt" and kind.kind == "text":
        return SampleEncoder(".txt", "the text", lambda text: str(text).encode("utf-8", "replace"))
    if wanted == "npy" and kind.kind == "tensor":
        return SampleEncoder(".npy", f"an array, {kind.dtype}", _to_npy)
    if wanted == "json":
        return SampleEncoder(".json", "a JSON value", _to_json)
    if wanted == "png" and kind.kind == "tensor":
        return _png_encoder(labels, name, kind, classes)
    raise ConfigError(
        f"a .{wanted} file cannot contain output {name!r} ({kind}); set output.file_type: auto",
        "output.file_type",
    )


def _is_plane(column: Column) -> bool:
    """Whether the values are images [height, width] or [1, height, width]."""
    if isinstance(column, ValueColumn):
        value = next((value for value in column.values if hasattr(value, "shape")), None)
        shape = () if value is None else tuple(value.shape)
    else:
        shape = tuple(column.shape[1:])
    return len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)


def _source(name: str) -> str:
    output, _, suffix = name.rpartition(".")
    return (output or "prediction") if suffix in {"class", "indices"} else name


def _kind(column: Column) -> ValueType:
    if isinstance(column, ValueColumn):
        try:
            return column.type
        except TypeMismatch:
            return ValueType("list", ValueType())
    dtype = str(column.dtype).removeprefix("torch.")
    return ValueType("tensor", dtype=dtype, ndim=column.ndim - 1)


def _has_classes(kind: ValueType, steps: set[str]) -> bool:
    """Whether the numbers of an output are classes: whole ones, of uint8 after such a step."""
    if kind.dtype == "uint8":
        return bool(steps & _CLASS_STEPS)
    return "int" in kind.dtype or kind.dtype == "bool"


def _png_encoder(labels: ClassLabels, name: str, kind: ValueType, classes: bool) -> SampleEncoder:
    pillow = import_optional("PIL", "output.file_type", "Image")
    chosen = labels.config.palette
    if not classes:
        if isinstance(chosen, tuple):
            raise ConfigError(
                f"a palette needs class numbers, and output {name!r} is {kind.dtype}; use "
                "output.transform: argmax or threshold, or remove output.palette",
                "output.palette",
            )
        text = "gray levels" if kind.dtype == "uint8" else "gray levels: 0 to 1 as 0 to 255"
        return SampleEncoder(".png", text, lambda value: _gray(pillow, name, value))
    count = labels.counts.get(name) or len(labels.classes)
    if count > _NO_CLASS + 1:
        text = "class numbers as gray levels of 16 bits"
        return SampleEncoder(".png", text, lambda value: _classes(pillow, name, value, np.uint16))
    if chosen is False:
        text = "class numbers as gray levels, 255: no class"
        return SampleEncoder(".png", text, lambda value: _classes(pillow, name, value, np.uint8))
    colors = palette(chosen if isinstance(chosen, tuple) else ())
    text = "class numbers with a palette, 255: no class"
    return SampleEncoder(
        ".png", text, lambda value: _classes(pillow, name, value, np.uint8, colors)
    )


def palette(first: Sequence[tuple[int, int, int]] = ()) -> bytes:
    """Return the colors of 256 classes as RGB: the given ones, black for 0, then spread hues."""
    colors = [*first]
    for number in range(len(colors), 256):
        if number in {0, _NO_CLASS}:
            colors.append((0, 0, 0) if number == 0 else (255, 255, 255))
            continue
        value = (1.0, 0.75, 0.5)[number // 12 % 3]
        red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.85, value)
        colors.append((round(red * 255), round(green * 255), round(blue * 255)))
    return bytes(channel for color in colors for channel in color)


def _plane(name: str, value: Any) -> Array:
    """Return the image [height, width] of a sample, without a channel dimension of size 1."""
    array: Array = value.numpy()
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array.squeeze(0 if array.shape[0] == 1 else 2)
    if array.ndim != 2 or not array.size:
        raise ValueError(
            f"output {name!r} has the shape {list(value.shape)} per sample, and a .png file needs "
            "[height, width], or [3, height, width] of uint8; set output.file_type: npy"
        )
    return array


def _classes(
    pillow: Any, name: str, value: Any, dtype: type[np.unsignedinteger[Any]], colors: bytes = b""
) -> bytes:
    """Return class numbers as pixels of a type; its greatest value stands for no class."""
    most, array = int(np.iinfo(dtype).max), _plane(name, value).astype(np.int64)
    array = np.where(array == MISSING_CLASS, most, array)
    if array.min() < 0 or array.max() > most:
        raise ValueError(
            f"output {name!r} has class numbers from {array.min()} to {array.max()}, and a pixel "
            f"has 0 to {most}; set output.file_type: npy"
        )
    image = pillow.fromarray(array.astype(dtype))
    if colors:
        image.putpalette(colors)
    return _to_png(image)


def _gray(pillow: Any, name: str, value: Any) -> bytes:
    if value.ndim == 3 and value.shape[0] == 3 and str(value.dtype) == "torch.uint8":
        return _to_png(pillow.fromarray(value.permute(1, 2, 0).contiguous().numpy()))
    array = _plane(name, value)
    if array.dtype != np.uint8:
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"output {name!r} has values outside of 0 to 1, which have no gray level; use "
                "output.transform: sigmoid, or output.file_type: npy"
            )
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    return _to_png(pillow.fromarray(array))


def _to_png(image: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _to_npy(value: Any) -> bytes:
    data = io.BytesIO()
    np.save(data, with_numpy_dtype(value).contiguous().numpy(), allow_pickle=False)
    return data.getvalue()


def _to_json(value: Any) -> bytes:
    plain = value.tolist() if hasattr(value, "tolist") else value
    return json.dumps(plain).encode() + b"\n"
