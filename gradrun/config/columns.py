"""The preparation of table columns: `data.columns`, in the config or in a JSON or .npz file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from gradrun.config.base import Section

Value = bool | int | float | str


class ColumnSection(Section):
    """How the values of one column become numbers: fill, then categories, then mean and std."""

    example: ClassVar[str] = "{fill: 0, mean: 38.5, std: 12.1}"

    fill: Value | None = Field(
        None, description="value of rows without one (empty, null, NaN); default: such rows fail"
    )
    gaps: tuple[Value, ...] = Field(
        (), description="more values that `fill` replaces, such as NA or -999"
    )
    categories: Annotated[tuple[Value, ...], Field(min_length=1)] | None = Field(
        None, description="the categories, in the order of the training"
    )
    encode: Literal["one_hot", "index"] = Field(
        "one_hot", description="a category becomes one number per category, or its index from 0"
    )
    unknown: Literal["error", "zeros"] | int = Field(
        "error", description="of another category: error, zeros (one_hot), or a number (index)"
    )
    mean: float | None = Field(None, description="subtracted from the number")
    std: float | None = Field(None, description="divides the number, after `mean`")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := "; ".join(self._problems()):
            raise ValueError(problems)
        return self

    def _problems(self) -> Iterator[str]:
        if self.std is not None and self.std <= 0:
            yield (
                f"std {self.std:g} is not more than 0; for a column that was constant in the "
                "training, scikit-learn uses 1"
            )
        if self.gaps and self.fill is None:
            yield "gaps has no effect without fill"
        if self.categories is None:
            for key in ("encode", "unknown"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    yield f"{key} has no effect without categories"
            if isinstance(self.fill, str):
                yield (
                    f"fill {self.fill!r:.40} is not a number, and statistics are not computed from "
                    "the data to predict; write the value of the training"
                )
            return
        kinds = {type(value) for value in self.categories}
        if len({float if kind is int else kind for kind in kinds}) > 1:
            yield "categories must be texts, numbers or booleans, not several of these"
        elif len({*self.categories}) < len(self.categories):
            twice = next(value for value in self.categories if self.categories.count(value) > 1)
            yield f"the category {twice!r:.40} is listed twice"
        if self.encode == "one_hot" and isinstance(self.unknown, int):
            yield "unknown of encode: one_hot is error or zeros; a number needs encode: index"
        if self.encode == "index" and self.unknown == "zeros":
            yield "unknown of encode: index is error or a number, such as the number of categories"
        if self.encode == "one_hot" and not (self.mean is None and self.std is None):
            yield "mean and std cannot be combined with encode: one_hot"
        if self.fill is not None and self.fill not in self.categories:
            yield f"fill {self.fill!r:.40} is not one of the categories"


def _read_columns(value: object, info: ValidationInfo) -> object:
    """Replace files by their content, and join the parts of a list column by column."""
    parts = value if isinstance(value, list) else [value]
    joined: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, str | Path):
            path = info.context.input_file(Path(part)) if info.context else Path(part)
            part = _read_file(path)
        if not isinstance(part, Mapping):
            return value  # for the error of pydantic
        for column, settings in part.items():
            if not isinstance(settings, Mapping):
                joined[column] = settings
                continue
            before = joined.get(column, {})
            if not isinstance(before, Mapping):
                continue  # for the error of pydantic
            if both := before.keys() & settings.keys():
                raise ValueError(f"{min(both)} of column {column!r} is set twice")
            # Strict validation of Python values accepts only tuples.
            listed = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
            joined[column] = {**before, **listed}
    return joined


Columns = Annotated[
    dict[str, ColumnSection],
    BeforeValidator(
        _read_columns,
        json_schema_input_type=str
        | dict[str, ColumnSection]
        | list[str | dict[str, ColumnSection]],
    ),
]


# --- files -------------------------------------------------------------------------------------

_NAMES = ("feature_names_in_", "columns")
_ATTRIBUTES = {
    "mean_": "mean",
    "center_": "mean",
    "mean": "mean",
    "scale_": "std",
    "std": "std",
    "statistics_": "fill",
    "fill": "fill",
    "categories_": "categories",
    "categories": "categories",
}
"""Attribute of a fitted scikit-learn transformer, or own name -> key of ColumnSection."""


def _read_file(path: Path) -> dict[str, Any]:
    """Return column -> settings.

    A file has the columns of the config, or lists in the order of `feature_names_in_`, which are
    the attributes of fitted scikit-learn transformers.
    """
    try:
        if path.suffix.lower() == ".npz":
            content = _read_npz(path)
        elif path.suffix.lower() == ".json":
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        else:
            raise ValueError("it is neither a .json nor an .npz file")
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a map of columns")
    names_key = next((key for key in _NAMES if isinstance(content.get(key), list)), None)
    listed = [key for key, value in content.items() if isinstance(value, list)]
    if names_key is None and not listed:
        return content
    try:
        return _from_lists(content, names_key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    import numpy as np  # as heavy as torch, which a check of the config does not need

    if not zipfile.is_zipfile(path):
        raise ValueError("it is not an .npz archive")
    content = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            try:
                content[name] = arrays[name].tolist()
            except ValueError as error:
                raise ValueError(
                    f"the array {name!r} contains Python objects, which could run code; save "
                    f"{name}.astype(str)"
                ) from error
    return content


def _from_lists(content: Mapping[str, Any], names_key: str | None) -> dict[str, Any]:
    """Return column -> settings from the lists of a file, in the order of its column names."""
    if names_key is None:
        raise ValueError(
            f"{min(content)} is a list, but {_NAMES[0]} is missing: the names of the columns, in "
            "the order of the lists"
        )
    if "min_" in content or "data_min_" in content:
        raise ValueError(
            "a MinMaxScaler multiplies by scale_; write mean = -min_ / scale_ and std = 1 / scale_"
        )
    if unknown := content.keys() - {names_key, *_ATTRIBUTES}:
        raise ValueError(
            f"unknown key {min(unknown)!r:.40}; allowed: {names_key}, {', '.join(_ATTRIBUTES)}"
        )
    if "scale_" in content and not {"mean_", "center_", "mean"} & content.keys():
        raise ValueError(
            "scale_ without mean_ is ambiguous, because some scalers multiply by it; write std "
            "for a divisor"
        )
    names = content[names_key]
    if not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise ValueError(f"{names_key} is not a list of different names")
    columns: dict[str, Any] = {name: {} for name in names}
    for attribute, values in content.items():
        if attribute == names_key:
            continue
        if not isinstance(values, list) or len(values) != len(names):
            size = len(values) if isinstance(values, list) else 1
            raise ValueError(
                f"{attribute} has {size} values for the {len(names)} columns of {names_key}"
            )
        key = _ATTRIBUTES[attribute]
        for name, value in zip(names, values, strict=True):
            if key in columns[name]:
                raise ValueError(f"{attribute} sets {key}, which another list sets too")
            if value is not None:
                columns[name][key] = value
    return columns
