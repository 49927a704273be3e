"""Items of the user's data: read, collated to batches, and divided into inputs, labels and ids."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from gradrun.config.data import ItemKey, PythonData
from gradrun.core.errors import ConfigError, first_line
from gradrun.core.imports import describe_user_error
from gradrun.core.suggest import suggest

Elements = dict[ItemKey, Any]
"""Position or key of an element of all items -> its tensor [n, ...], or a list of n texts."""

Shapes = dict[ItemKey, tuple[tuple[int, ...], str]]
"""Key of an element -> shape of one sample and dtype."""


class Collated(NamedTuple):
    """A batch of items, as a worker process returns it."""

    elements: Elements
    """Zero in the rows of errors; empty if no item is usable."""
    size: int
    errors: Mapping[int, str]
    """Row -> why its item cannot be used."""
    problem: str = ""
    """Why no more items can be read."""


class Layout(NamedTuple):
    """Which elements of an item are inputs, label and id."""

    inputs: dict[str, ItemKey]
    """Name of an input -> its element, in the order of the model's arguments."""
    positional: bool
    label: ItemKey | None
    id: ItemKey | None
    shapes: Shapes
    """Of the elements in the first batch."""
    single: bool
    """Whether an item is one tensor, not a collection of elements."""

    def select(self, elements: Elements, size: int) -> Elements:
        """Return the used elements of a collated batch, checked.

        Raises:
            ValueError: an element is missing, or cannot be used.
        """
        selected: Elements = {}
        for name, key in self.inputs.items():
            selected[key] = _input(_element(elements, key), name, size)
            dtype, expected = str(selected[key].dtype), self.shapes[key][1]
            if dtype != expected:
                raise ValueError(
                    f"input {name} is {_short(dtype)}, and in the first batch it is "
                    f"{_short(expected)}"
                )
        if self.label is not None:
            selected[self.label] = _label(_element(elements, self.label), size)
        if self.id is not None:
            selected[self.id] = _ids(_element(elements, self.id), size)
        return selected

    def arguments(
        self, elements: Elements
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """Return the positional and the keyword arguments of the model."""
        if not elements:
            return (), {}
        if self.positional:
            return tuple(elements[key] for key in self.inputs.values()), {}
        return (), {name: elements[key] for name, key in self.inputs.items()}

    def describe(self) -> Iterator[tuple[str, str]]:
        """Yield name and description of each input."""
        for name, key in self.inputs.items():
            shape, dtype = self.shapes[key]
            place = "the item" if self.single else f"{key!r} of an item"
            yield name, f"{place}, {_short(dtype)} {list(shape)} in the first batch"


def find_layout(first: Collated, item: Any, config: PythonData) -> Layout:
    """Decide which elements are inputs, by the config and the first batch.

    Args:
        first: the first batch, with all elements.
        item: one of its items.

    Raises:
        ConfigError: an element is missing or cannot be used, or there are several choices.
    """
    elements, keys = first.elements, [*first.elements]
    roles = {"labels": config.labels, "id": config.id}
    used = [key for key in roles.values() if key is not None]
    others = [key for key in keys if key not in used]
    named = any(isinstance(key, str) for key in keys)
    if config.inputs is None:
        inputs = {str(key): key for key in others}
        if len(others) > 1 and not named and not used:
            raise ConfigError(_several(first, item), "data.inputs")
    elif isinstance(config.inputs, dict):
        inputs, named = config.inputs, True
    else:
        inputs = {str(key): key for key in config.inputs}
        named = all(isinstance(key, str) for key in config.inputs)
    if not inputs:
        raise ConfigError(
            f"no element of an item is an input; it has {_describe(first)}", "data.inputs"
        )
    for role, key in [*roles.items(), *(("inputs", key) for key in inputs.values())]:
        if key is not None and key not in elements:
            raise ConfigError(
                f"an item has no element {key!r}, but {_describe(first)}; "
                f"{suggest(str(key), [str(known) for known in keys])}",
                f"data.{role}",
            )
    positional = config.call == "positional" or (
        config.call == "auto" and (len(inputs) == 1 or not named)
    )
    if not positional and not named:
        example = ", ".join(f"NAME{key}: {key}" for key in inputs.values())
        raise ConfigError(
            f"call: {config.call} needs names for the inputs: data.inputs: {{{example}}}",
            "data.call",
        )
    single = not isinstance(item, Mapping | list | tuple)
    layout = Layout(inputs, positional, config.labels, config.id, {}, single)
    try:
        chosen: Elements = {
            key: _input(elements[key], name, first.size) for name, key in inputs.items()
        }
        if config.labels is not None:
            _label(elements[config.labels], first.size)
        if config.id is not None:
            _ids(elements[config.id], first.size)
    except ValueError as error:
        key = "data.collate" if config.collate else "data.inputs"
        raise ConfigError(f"{error}; an item has {_describe(first)}", key) from error
    return layout._replace(shapes=_shapes(chosen))


def _several(first: Collated, item: Any) -> str:
    if isinstance(item, str | bytes):  # collated to a list of them
        return (
            f"an item is a {type(item).__name__}, and inputs are tensors: convert it in the "
            "dataset or in data.collate"
        )
    hint = "set data.inputs: [0]"
    if len(first.elements) == 2:
        hint += ", and data.labels: 1 for metrics"
    if isinstance(item, list | tuple) and all(isinstance(value, int | float) for value in item):
        hint += "; if an item is one row of numbers, make it a tensor or an array"
    return (
        f"an item has {len(first.elements)} elements ({_describe(first)}), and the inputs among "
        f"them are not known; {hint}"
    )


def _describe(first: Collated) -> str:
    return ", ".join(f"{key!r}: {_kind(value)}" for key, value in first.elements.items())


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_short(str(value.dtype))} {list(value.shape[1:])}"
    if isinstance(value, list) and value and isinstance(value[0], str):
        return "text"
    return type(value).__name__


def _short(dtype: str) -> str:
    return dtype.removeprefix("torch.")


def _element(elements: Elements, key: ItemKey) -> Any:
    if key not in elements:
        raise ValueError(f"the item has no element {key!r}")
    return elements[key]


def _input(value: Any, name: str, size: int) -> torch.Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"input {name} is a {type(value).__name__}, not a tensor; select tensors with "
            "data.inputs, or make them in data.collate"
        )
    _check_rows(value, f"input {name}", size)
    return value


def _label(value: Any, size: int) -> Any:
    """Return labels as a tensor, or as a list of names."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value)
    names = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    if not (names or isinstance(value, torch.Tensor)):
        raise ValueError(f"the labels are a {type(value).__name__}, not numbers or names")
    _check_rows(value, "the labels", size)
    return [*value] if names else value


def _ids(value: Any, size: int) -> list[int | str]:
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(isinstance(i, int | str) for i in value):
        raise ValueError("the ids are neither whole numbers nor texts")
    _check_rows(value, "the ids", size)
    return [*value]


def _check_rows(value: Any, name: str, size: int) -> None:
    rows = len(value) if not isinstance(value, torch.Tensor) or value.ndim else 0
    if rows != size:
        raise ValueError(
            f"collated, {name} have {rows} rows for {size} samples; the first dimension of a batch "
            "counts its samples"
        )


def _shapes(elements: Elements) -> Shapes:
    return {
        key: (tuple(value.shape[1:]), str(value.dtype))
        for key, value in elements.items()
        if isinstance(value, torch.Tensor)
    }


# --- collation -----------------------------------------------------------------------------------


class Collation(NamedTuple):
    """Collates items, and finds those at fault if that fails."""

    function: Callable[[list[Any]], Any]
    layout: Layout | None = None
    """None for the first batch, which decides it."""

    def __call__(self, items: Sequence[Any], errors: Mapping[int, str]) -> Collated:
        """Collate the items without an error.

        Args:
            items: one per row; any value for those with an error.
            errors: row -> why its item could not be read.
        """
        found, size = dict(errors), len(items)
        rows = [row for row in range(size) if row not in found]
        elements: Elements = {}
        try:
            elements = self._elements([items[row] for row in rows]) if rows else {}
        except Exception as error:  # the user's code may raise anything
            found |= self._isolate(items, rows, error)
            rows = [row for row in rows if row not in found]
            try:
                elements = self._elements([items[row] for row in rows]) if rows else {}
            except Exception as again:
                found |= dict.fromkeys(rows, self._describe(again))
        if found and elements:
            elements = {key: _spread(value, rows, size) for key, value in elements.items()}
        return Collated(elements, size, found)

    def _elements(self, items: list[Any]) -> Elements:
        batch = self.function(items)
        if isinstance(batch, Mapping):
            elements = dict(batch)
        elif isinstance(batch, list | tuple):
            elements = dict(enumerate(batch))
        elif isinstance(batch, torch.Tensor | np.ndarray):
            elements = {0: batch}
        else:
            raise TypeError(
                f"the batch is a {type(batch).__name__}, not a tensor, list, tuple or dict"
            )
        return elements if self.layout is None else self.layout.select(elements, len(items))

    def _isolate(
        self, items: Sequence[Any], rows: Sequence[int], error: Exception
    ) -> dict[int, str]:
        """Return the items that cannot be collated alone, or that have an unusual shape.

        All rows are returned if there are none.
        """
        found: dict[int, str] = {}
        shapes: dict[int, Shapes] = {}
        for row in rows:
            try:
                shapes[row] = _shapes(self._elements([items[row]]))
            except Exception as alone:  # the user's code may raise anything
                found[row] = self._describe(alone)
        if self.function is default_collate and shapes:
            usual = self._usual(shapes.values())
            for row, own in shapes.items():
                if text := _difference(own, usual):
                    found[row] = text
        return found or dict.fromkeys(rows, self._describe(error))

    def _usual(self, shapes: Iterable[Shapes]) -> Shapes:
        if self.layout:
            return self.layout.shapes
        counted = Counter(tuple(own.items()) for own in shapes)
        return dict(counted.most_common(1)[0][0])

    def _describe(self, error: Exception) -> str:
        if isinstance(error, ValueError) and self.layout:
            return str(error)
        if self.function is default_collate:
            text = f"{type(error).__name__}: {first_line(error)}"
            return f"{text}; data.collate can convert or pad items"
        return describe_user_error(error)


def _difference(own: Shapes, usual: Shapes) -> str:
    for key, (shape, dtype) in usual.items():
        if key in own and own[key] != (shape, dtype):
            has, name = own[key], f"element {key!r}"
            return (
                f"{name} is {_short(has[1])} {list(has[0])}, and in most items {_short(dtype)} "
                f"{list(shape)}; data.collate can pad or convert them"
            )
    return ""


def _spread(value: Any, rows: Sequence[int], size: int) -> Any:
    """Return values [size, ...] with the given ones in `rows`, and zero or None elsewhere."""
    if isinstance(value, torch.Tensor):
        if not value.ndim or len(value) != len(rows):
            return value
        spread = value.new_zeros((size, *value.shape[1:]))
        spread[list(rows)] = value
        return spread
    if not isinstance(value, list) or len(value) != len(rows):
        return value
    values: list[Any] = [None] * size
    for row, own in zip(rows, value, strict=True):
        values[row] = own
    return values


# --- reading -------------------------------------------------------------------------------------


class Batches(Dataset[Collated]):
    """Map-style items as batches, by first sample and end."""

    def __init__(self, items: Any, collation: Collation) -> None:
        self._items, self._collation = items, collation

    def __getitem__(self, span: tuple[int, int]) -> Collated:
        return self._collation(*self.items(*span))

    def items(self, start: int, stop: int) -> tuple[list[Any], dict[int, str]]:
        """Return the items, with None for those that cannot be read, and the errors by row."""
        if hasattr(self._items, "__getitems__"):  # as torch's DataLoader does
            with suppress(Exception):  # one of them is at fault: see below
                found = [*self._items.__getitems__([*range(start, stop)])]
                if len(found) == stop - start:
                    return found, {}
        items: list[Any] = []
        errors: dict[int, str] = {}
        for number in range(start, stop):
            try:
                items.append(self._items[number])
            except Exception as error:  # the user's code may raise anything
                errors[number - start] = describe_user_error(error)
                items.append(None)
        return items, errors


class ItemStream:
    """The items of an iterable, some at a time."""

    def __init__(self, items: Iterable[Any], size: int, name: str) -> None:
        """Start to iterate.

        Args:
            items: the iterable.
            size: items per batch.
            name: the target, for errors.
        """
        self._size, self._name, self._read = size, name, 0
        try:
            self._iterator = iter(items)
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                f"{name} cannot be iterated: {describe_user_error(error)}", "data.target"
            ) from error

    def next_items(self) -> tuple[list[Any], str]:
        """Return the next items, fewer only at the end; or the reason why there are no more."""
        items: list[Any] = []
        try:
            for item in self._iterator:
                items.append(item)
                if len(items) == self._size:
                    break
        except Exception as error:  # the user's code may raise anything
            at = self._read + len(items)
            return [], (
                f"{self._name} failed at sample {at:,}: {describe_user_error(error)}; an iterable "
                "has no items after an error, so skip such items in its code"
            )
        self._read += len(items)
        return items, ""

    def batches(self, collation: Collation) -> Iterator[Collated]:
        """Yield the next batches, in order; an error is the `problem` of the last."""
        while True:
            items, problem = self.next_items()
            if problem:
                yield Collated({}, 0, {}, problem)
            if not items:
                return
            yield collation(items, {})


class StreamDataset(IterableDataset[Collated]):
    """The batches of a stream, for a DataLoader with one worker."""

    def __init__(self, batches: Iterator[Collated]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Collated]:
        return self._batches


def worker_batches(
    dataset: Batches | IterableDataset[Collated],
    workers: int,
    start_worker: Callable[[int], None] | None,
    seed: int,
    spans: list[tuple[int, int]] | None = None,
) -> Iterable[Collated]:
    """Return the batches of a dataset, read ahead by worker processes.

    Args:
        dataset: yields whole batches, or returns those of `spans`.
        spans: the batches to read, a list that can be changed between two passes; None for a
            dataset that yields them.
    """
    # Forked, whatever the default: another process could not import a module that was read from a
    # file by its name, and an iterator keeps its position.
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=spans,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=partial(_start_worker, start_worker),
        persistent_workers=spans is not None,
        generator=torch.Generator().manual_seed(seed),
        multiprocessing_context="fork",
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(start: Callable[[int], None] | None, number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends its workers
    if start:
        start(number)
