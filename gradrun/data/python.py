"""The user's own data: a Dataset, DataLoader, iterable or sequence of Python code."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from gradrun.config.data import PythonData
from gradrun.config.model import PythonModel
from gradrun.config.objects import ObjectItems
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.imports import describe_user_error, import_target, target_root
from gradrun.core.units import list_names, pluralize
from gradrun.data.batch import Batch
from gradrun.data.items import (
    Batches,
    Collated,
    Collation,
    ItemStream,
    Layout,
    StreamDataset,
    find_layout,
    worker_batches,
)
from gradrun.data.objects import is_frame
from gradrun.data.source import BatchSource, OpeningFacts, class_number, missing_labels
from gradrun.data.stream import StreamedBatches
from gradrun.results.result import Statement

_KEY = "data.target"
_BATCH_SIZE = 64


class UserData(NamedTuple):
    """What a target returned, with the settings that a DataLoader brings."""

    items: Any
    """A map-style Dataset or sequence, or an iterable."""
    streamed: bool
    """Whether the items can only be read once, in order."""
    collate: Callable[[list[Any]], Any] = default_collate
    batch_size: int = _BATCH_SIZE
    workers: int = 0
    start_worker: Callable[[int], None] | None = None
    ignored: str = ""
    """The settings of a DataLoader that have no effect."""


def open_data(config: PythonData, facts: OpeningFacts) -> BatchSource:
    """Call the target, which the user trusts, and read the first batch.

    Raises:
        ConfigError: the target cannot be called, or its items cannot be used.
    """
    beside: set[Path] = set()
    """Folders that the import of data.collate keeps importable."""
    if isinstance(config, ObjectItems):
        items = config.value
    else:
        model = facts.model
        if isinstance(model, PythonModel):
            beside.add(target_root(model.target, model.root))
        target = import_target(config.target, config.root, _KEY, beside=beside)
        items = _call(target, config)
        beside.add(target_root(config.target, config.root))
    data = examine(items, config.target)
    collate = data.collate
    if config.collate:
        collate = import_target(config.collate, config.root, "data.collate", beside=beside)
    data = data._replace(
        collate=collate,
        batch_size=config.batch_size or data.batch_size,
        workers=data.workers if config.workers is None else config.workers,
    )
    if data.streamed and data.workers > 1:
        if config.workers is not None:
            raise ConfigError(
                f"{config.target} is iterable, and {data.workers} workers would each read all of "
                "its items; use workers: 1, or return a Dataset with __len__ and __getitem__",
                "data.workers",
            )
        data = data._replace(workers=1)
    source = _Streamed if data.streamed else _MapStyle
    return source(config, data, facts)


def _call(target: Any, config: PythonData) -> Any:
    """Return the target, or its result if it is a function or class."""
    if not callable(target) or isinstance(target, Dataset | DataLoader):
        if config.args:
            raise ConfigError(
                f"{config.target} is an object, which takes no arguments; remove data.args",
                "data.args",
            )
        return target
    try:
        return target(**config.args)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(
            f"calling {config.target} failed: {describe_user_error(error)}", _KEY
        ) from error


def examine(data: Any, name: str) -> UserData:
    """Return the kind of the data, and what a DataLoader brings.

    Raises:
        ConfigError: it has no samples, or no order of them.
    """
    if isinstance(data, DataLoader):
        return _examine_loader(data, name)
    if isinstance(data, IterableDataset):
        return UserData(data, streamed=True)
    if isinstance(data, tuple):
        raise ConfigError(
            f"{name} returns a tuple, which may be one sample or several arrays; return "
            "TensorDataset(*arrays), or a list of samples",
            _KEY,
        )
    if is_frame(data):
        raise ConfigError(
            f"{name} returns a DataFrame, whose items are columns; return frame.to_numpy() or "
            "frame.to_dict('records') for its rows",
            _KEY,
        )
    if hasattr(data, "iloc"):
        data = data.array  # a Series finds items by their labels, in another order
    if not isinstance(data, str | bytes | dict) and hasattr(data, "__getitem__"):
        try:
            len(data)
        except Exception as error:  # user code; torch's Dataset has no __len__
            raise ConfigError(
                f"{name} returns a {type(data).__name__} without a length "
                f"({describe_user_error(error)}); add __len__, or return an IterableDataset",
                _KEY,
            ) from error
        return UserData(data, streamed=False)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | dict):
        return UserData(data, streamed=True)
    raise ConfigError(
        f"{name} returns a {type(data).__name__}, from which no samples can be read; return a "
        "Dataset, a DataLoader, an iterable, an array or a list",
        _KEY,
    )


def _examine_loader(loader: DataLoader[Any], name: str) -> UserData:
    if loader.batch_size is None:
        kind = "no batch size" if loader.batch_sampler is None else "a batch_sampler"
        raise ConfigError(
            f"{name} returns a DataLoader with {kind}, so its batches may leave out or reorder "
            "samples; return its dataset, and set data.batch_size",
            _KEY,
        )
    data = examine(loader.dataset, f"the dataset of {name}")
    sampler = loader.sampler
    shuffled = isinstance(sampler, RandomSampler)
    complete = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(data.items)
    )
    if not (data.streamed or complete):
        raise ConfigError(
            f"{name} returns a DataLoader with a {type(sampler).__name__}, which may leave out or "
            "repeat samples; return its dataset, or torch.utils.data.Subset(dataset, indices)",
            _KEY,
        )
    ignored = (["shuffle"] if shuffled else []) + (["drop_last"] if loader.drop_last else [])
    return data._replace(
        collate=loader.collate_fn,
        batch_size=loader.batch_size,
        workers=loader.num_workers,
        start_worker=loader.worker_init_fn,
        ignored=" and ".join(ignored),
    )


class _UserSource(BatchSource):
    """What both kinds of data share: inputs, labels and ids of collated batches."""

    main_thread_only = True
    labels_in_batches = True

    def __init__(self, config: PythonData, data: UserData, facts: OpeningFacts) -> None:
        self.config, self.data = config, data
        self.batch_size, self.has_ids = data.batch_size, config.id is not None
        self._collation = Collation(data.collate)
        self._layout: Layout
        self._classes = config.classes or facts.classes
        self.classes = config.classes or ()
        self.sample_bytes = 0
        self._checksum = 0
        self._labels: torch.Tensor | None = None
        """Labels of the first batch."""
        self._label_names: Sequence[str] = ()
        """Names that were replaced by their positions; () if the labels are numbers."""
        self._id_type = ""
        self._worker_settings = (data.workers, data.start_worker, facts.seed)

    def _decide_layout(self, items: Sequence[Any], first: Collated) -> int:
        """Decide on the inputs by the usable samples of the first batch; return the first row."""
        rows = [row for row in range(first.size) if row not in first.errors]
        usable = [items[row] for row in rows]
        if first.errors:  # labels and ids of these samples are missing
            first = self._collation(usable, {})
        self._layout = find_layout(first, usable[0], self.config)
        self._collation = self._collation._replace(layout=self._layout)
        if self.config.id is not None:
            name = self._layout.select(first.elements, first.size)[self.config.id][0]
            self._id_type = "text" if isinstance(name, str) else "whole numbers"
        return rows[0]

    def _describe_first(self, batch: Batch) -> None:
        tensors = batch.tensors()
        self.sample_bytes = sum(tensor.nbytes for tensor in tensors) // batch.size
        self._checksum = checksum(tensors)
        self._labels = batch.labels

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the data for a resume, besides code and arguments."""
        return {
            "batch_size": self.batch_size,
            "saved_labels": self.config.labels,
            "first_batch": self._checksum,
            **({"saved_label_names": [*self._label_names]} if self._label_names else {}),
        }

    @property
    def id_type(self) -> str:
        return self._id_type

    def labels(self) -> Iterator[torch.Tensor]:
        """Yield the labels of the first batch; a run saves those of all samples."""
        if self._labels is None:
            raise missing_labels()
        yield self._labels

    def _batch(self, first: int, collated: Collated) -> Batch:
        """Return a batch for the model, of samples from number `first` on."""
        if collated.problem:
            raise ConfigError(collated.problem, _KEY)
        errors = {
            row: SampleError(f"sample {first + row}: {text}")
            for row, text in collated.errors.items()
        }
        labels = self._label_numbers(first, collated, errors)
        ids: Sequence[int | str] = range(first, first + collated.size)
        if self.has_ids:
            ids = self._checked_ids(first, collated, errors)
        args, kwargs = self._layout.arguments(collated.elements)
        return Batch(args, kwargs, collated.size, ids, errors, labels)

    def _label_numbers(
        self, first: int, collated: Collated, errors: dict[int, SampleError]
    ) -> torch.Tensor | None:
        if self.config.labels is None or not collated.elements:
            return None
        names = collated.elements[self.config.labels]
        if isinstance(names, torch.Tensor):
            return names.double()
        if not self._classes:
            raise ConfigError(
                "the labels are names; set data.classes to the names of the classes in the order "
                "of the model's",
                "data.labels",
            )
        self._label_names = self.classes = self.classes or self._classes
        numbers = torch.zeros(collated.size, dtype=torch.float64)
        for row, name in enumerate(names):
            if row in errors:
                continue
            try:
                numbers[row] = class_number(str(name), self._classes)
            except ValueError as error:
                errors[row] = SampleError(f"sample {first + row}: {error}")
        return numbers

    def _checked_ids(
        self, first: int, collated: Collated, errors: dict[int, SampleError]
    ) -> list[int | str]:
        ids: list[int | str] = []
        given = collated.elements.get(self.config.id) if self.config.id is not None else None
        for row, name in enumerate(given or [None] * collated.size):
            usable = isinstance(name, int | str) and row not in errors
            if usable and isinstance(name, str) != (self._id_type == "text"):
                errors[row] = SampleError(
                    f"sample {first + row}: its id {name!r:.60} is not {self._id_type}, as the "
                    "first"
                )
                usable = False
            ids.append(name if usable else f"row {first + row}")
        return ids

    def statements(self) -> Iterator[Statement]:
        data, config = self.data, self.config
        target = Path(config.target).name
        yield Statement(topic="data", text=f"{target}: {self._describe()}")
        for name, text in self._layout.describe():
            yield Statement(topic=f"input {name}", text=text)
        collate = "torch's default_collate"
        if config.collate:
            collate = Path(config.collate).name
        elif data.collate is not default_collate:
            collate = "collate_fn of the DataLoader"
        size = pluralize(self.batch_size, "sample")
        yield Statement(topic="batches", text=f"of {size}, by {collate}")
        ids = "row numbers, from 0" if config.id is None else f"{config.id!r} of an item"
        order = f"that of the items; ids: {ids}"
        if data.ignored:
            order += f"; {data.ignored} of the DataLoader: not used"
        yield Statement(topic="order", text=order)
        if config.labels is not None:
            names = f", by name: {list_names(self.classes)}" if self.classes else ""
            yield Statement(topic="labels", text=f"{config.labels!r} of an item{names}")
        yield Statement(topic="resume", text=self._describe_resume())

    def _describe(self) -> str:
        raise NotImplementedError

    def _describe_resume(self) -> str:
        raise NotImplementedError


class _MapStyle(_UserSource):
    """A map-style Dataset or a sequence, of which any range can be read."""

    samples: int

    def __init__(self, config: PythonData, data: UserData, facts: OpeningFacts) -> None:
        super().__init__(config, data, facts)
        self.samples = len(data.items)
        self._repeats = True
        self._spans: list[tuple[int, int]] = []
        self._workers: Iterable[Collated] | None = None
        if self.samples:
            self._open()

    def _open(self) -> None:
        """Read the first batch that has a readable sample."""
        reader = Batches(self.data.items, self._collation)
        for first in range(0, self.samples, self.batch_size):
            span = (first, min(first + self.batch_size, self.samples))
            items, errors = reader.items(*span)
            collated = self._collation(items, errors)
            if len(collated.errors) < collated.size:
                break
        else:
            problem = next(iter(collated.errors.values()))
            raise ConfigError(f"no item can be used, for example sample {first}: {problem}", _KEY)
        readable = self._decide_layout(items, collated)
        self._reader = Batches(self.data.items, self._collation)
        self._describe_first(self._batch(first, self._reader[span]))
        one = (first + readable, first + readable + 1)
        once, twice = (self._batch(first, self._reader[one]).tensors() for _ in range(2))
        self._repeats = checksum(once) == checksum(twice)

    @property
    def identity(self) -> dict[str, Any]:
        known = super().identity
        return known if self._repeats else {**known, "first_batch": "random"}

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        end = self.samples if stop is None else stop
        firsts = range(start, end, self.batch_size)
        spans = [(first, min(first + self.batch_size, end)) for first in firsts]
        # One batch is read here: another iterator may be in use, as when a failed batch is read
        # again, and the workers have one order at a time.
        if self.data.workers == 0 or len(spans) < 2:
            collated: Iterable[Collated] = map(self._reader.__getitem__, spans)
        else:
            self._spans[:] = spans
            if self._workers is None:
                self._workers = worker_batches(
                    self._reader, *self._worker_settings, spans=self._spans
                )
            collated = self._workers
        for first, batch in zip(firsts, collated, strict=False):
            yield self._batch(first, batch)

    def _describe(self) -> str:
        kind = "map-style Dataset" if isinstance(self.data.items, Dataset) else "sequence"
        name = type(self.data.items).__name__
        text = f"{kind} {name} of {pluralize(self.samples, 'sample')}"
        where = f", read by {pluralize(self.data.workers, 'process')}" if self.data.workers else ""
        return text + where

    def _describe_resume(self) -> str:
        compared = "code, arguments, length and first batch are compared; other changes of the data"
        if not self._repeats:
            compared = (
                "an item differs when it is read again (random transforms?), so predictions are "
                "not reproducible; code, arguments and length are compared; changes of the data"
            )
        return f"{compared} are not detected"


class _Streamed(_UserSource):
    """An iterable, whose items are read once, in order."""

    def __init__(self, config: PythonData, data: UserData, facts: OpeningFacts) -> None:
        super().__init__(config, data, facts)
        stream = ItemStream(data.items, data.batch_size, config.target)
        items, problem = stream.next_items()
        if problem:
            raise ConfigError(problem, _KEY)
        batches: Iterator[Batch] = iter(())
        if items:
            batches = self._all(self._open(items), stream)
        self._stream = StreamedBatches(batches, data.batch_size, _KEY)
        if len(items) < data.batch_size:
            next(self._stream.batches(), None)  # now the number of samples is known

    def _open(self, items: list[Any]) -> Batch:
        """Return the first batch, which decides on the inputs."""
        collated = self._collation(items, {})
        if len(collated.errors) == collated.size:
            problem = next(iter(collated.errors.values()))
            raise ConfigError(f"no item of the first batch can be used, such as: {problem}", _KEY)
        self._decide_layout(items, collated)
        first = self._batch(0, self._collation(items, {}))
        self._describe_first(first)
        return first

    @property
    def samples(self) -> int | None:  # type: ignore[override]  # unknown before the end
        return self._stream.samples

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        return self._stream.batches(start, stop)

    def _all(self, first: Batch, stream: ItemStream) -> Iterator[Batch]:
        yield first
        start = first.size
        left = stream.batches(self._collation)
        others: Iterable[Collated] = left
        if self.data.workers:
            others = worker_batches(StreamDataset(left), *self._worker_settings)
        for collated in others:
            batch = self._batch(start, collated)
            start += batch.size
            yield batch

    def _describe(self) -> str:
        name = type(self.data.items).__name__
        return f"iterable {name}, read once and in order; its length is unknown before its end"

    def _describe_resume(self) -> str:
        return (
            "calls the target again, and reads and skips the samples before; code, arguments and "
            "first batch are compared; other changes of the data or of their order are not detected"
        )


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Return the CRC-32 of the values of some tensors."""
    crc = 0
    for tensor in tensors:
        if tensor.numel():
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            crc = zlib.crc32(values.numpy().data, crc)
    return crc
