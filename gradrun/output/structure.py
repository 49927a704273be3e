"""Read the model's output of a batch: outputs with one row per sample, or one item per sample.

A detector returns a list with one dict of tensors per sample. It becomes a column per key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gradrun.core.errors import ConfigError
from gradrun.output.columns import ValueColumn

_NUMBERS = (bool, int, float)


class OutputReader:
    """Finds lists with one item per sample in what a model returns, and makes columns of them.

    The first batch decides how a list is read, so that a short batch is not read in another way.
    """

    def __init__(self, source: str = "the model", key: str = "model") -> None:
        """Store the subject of error messages, and the config key that it belongs to."""
        self.source, self.key = source, key
        self._per_sample: dict[str, bool] = {}

    def __call__(self, returned: Any, size: int) -> Any:
        """Return tensors as they are, and structures with columns in place of lists of samples.

        Raises:
            ConfigError: a list can be read in two ways, or its items cannot be written.
        """
        return returned if _is_dense(returned) else self._read("", returned, size)

    def _read(self, name: str, value: Any, size: int) -> Any:
        if isinstance(value, ValueColumn) or _is_dense(value):
            return value
        if isinstance(value, torch.Tensor):
            # A nested tensor is split into samples; other layouts are refused later.
            return ValueColumn(map(_own, value.unbind())) if value.is_nested else value
        if fields := fields_of(value):
            items = list(fields)
        elif isinstance(value, list | tuple):
            if self._is_per_sample(name, value, size):
                return self._columns(name, value)
            items = [(str(i), item) for i, item in enumerate(value)]
        else:
            items = []
        read = {key: self._read(_join(name, key), item, size) for key, item in items}
        columns = {key: item for key, item in read.items() if _has_columns(item)}
        return columns or value

    def _is_per_sample(self, name: str, items: Sequence[Any], size: int) -> bool:
        if name not in self._per_sample:
            self._per_sample[name] = self._decide(name, items, size)
        if self._per_sample[name] and len(items) != size:
            raise ConfigError(
                f"{self._subject(name)} is a list of {len(items)} items for a batch of {size}; "
                "return one item per sample",
                self.key,
            )
        return self._per_sample[name]

    def _decide(self, name: str, items: Sequence[Any], size: int) -> bool:
        tensors = [tensor for item in items for tensor in _tensors_in(item)]
        if not tensors:
            texts = isinstance(items, list) or all(isinstance(item, str) for item in items)
            return bool(items) and texts and (not name or len(items) == size)
        if len(items) != size or not isinstance(items, list) or not _alike(items):
            return False
        outputs = all(tensor.shape[:1] == (size,) for tensor in tensors)
        records = fields_of(items[0]) is not None
        if outputs and size > 1 and not records:
            raise ConfigError(
                f"{self._subject(name)} is a list of {size} tensors with {size} rows for a batch "
                f"of {size}: each may be an output, or belong to a sample. Return a tuple of "
                "outputs, a list of dicts of samples, or change data.batch_size",
                self.key,
            )
        return records or not outputs

    def _columns(self, name: str, items: Sequence[Any]) -> Any:
        """Return a column of the items of all samples, or one per key if they are dicts."""
        fields = [fields_of(item) for item in items]
        if all(fields):
            records = [dict(pairs) for pairs in fields if pairs]
            keys = [*records[0]]
            for row, record in enumerate(records):
                if record.keys() != records[0].keys():
                    raise ConfigError(
                        f"{self._subject(name)} has the keys {', '.join(keys)} for one sample and "
                        f"{', '.join(record)} for another (row {row} of the batch); return the "
                        "same keys for every sample",
                        self.key,
                    )
            return {
                key: self._columns(_join(name, key), [record[key] for record in records])
                for key in keys
            }
        if all(isinstance(item, torch.Tensor) and item.ndim == 0 for item in items):
            return torch.stack([item.detach() for item in items])
        if all(isinstance(item, _NUMBERS) for item in items):
            kind = torch.float64 if any(isinstance(item, float) for item in items) else None
            return torch.tensor(items, dtype=kind)
        return ValueColumn(self._value(name, item) for item in items)

    def _value(self, name: str, item: Any) -> Any:
        if isinstance(item, np.ndarray) and item.dtype.kind in "biuf":
            item = torch.from_numpy(item)
        if isinstance(item, torch.Tensor):
            if item.is_complex():
                raise ConfigError(
                    f"{self._subject(name)} has complex numbers of one size per sample; return "
                    "their real and imaginary parts",
                    self.key,
                )
            return _own(item if item.layout == torch.strided else item.to_dense())
        return self._json(name, item)

    def _json(self, name: str, item: Any) -> Any:
        if item is None or isinstance(item, str | bool | int | float):
            return item
        if isinstance(item, torch.Tensor | np.ndarray | np.generic):
            return self._json(name, item.tolist())
        if pairs := fields_of(item):
            return {key: self._json(name, value) for key, value in pairs}
        if isinstance(item, list | tuple):
            return [self._json(name, value) for value in item]
        raise ConfigError(
            f"{self._subject(name)} contains {type(item).__name__}; return tensors, texts, "
            "numbers, or lists and dicts of them",
            self.key,
        )

    def _subject(self, name: str) -> str:
        return f"output {name!r} of {self.source}" if name else f"the output of {self.source}"


def fields_of(value: Any) -> list[tuple[str, Any]] | None:
    """Return the names and values of a mapping, dataclass or named tuple; None for other types."""
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(item.name, getattr(value, item.name)) for item in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    return None


def _alike(items: Sequence[Any]) -> bool:
    """Report whether items have the same type, with the same keys or number of dimensions."""

    def form(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item.ndim
        pairs = fields_of(item)
        return list if pairs is None else [key for key, _ in pairs]

    return all(form(item) == form(items[0]) for item in items)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    pairs = fields_of(value)
    listed = value if isinstance(value, list | tuple) else ()
    for item in [item for _, item in pairs] if pairs else listed:
        yield from _tensors_in(item)


def _has_columns(read: Any) -> bool:
    return isinstance(read, torch.Tensor | ValueColumn) or (isinstance(read, dict) and bool(read))


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_nested


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the CPU, because the model may reuse its memory or keep a larger one."""
    return tensor.detach().to("cpu", copy=True).resolve_conj().resolve_neg().contiguous()


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
