"""Pictures in files, decoded by threads that work ahead of the model, in the order of their names.

Knows Pillow and where pictures lie; holds three batches of them. A file that is no picture is the
fault of one sample, not of the run.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from gradrun.config.data import ImagesData
from gradrun.config.model import ModelConfig
from gradrun.core.cpu import available_cpus
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.optional import import_optional
from gradrun.core.suggest import suggest
from gradrun.data.batch import Batch
from gradrun.data.image_transforms import Steps, steps
from gradrun.data.source import BatchSource, InputBatcher, class_number, missing_labels

_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm"),
}
"""Those that Pillow decodes by itself: for others it starts programs, with orders from the file."""

_AHEAD = 2
"""Batches that are decoded while the model works on the one before."""

_CHUNK = 8
"""Pictures that a thread decodes at a time."""

_LABELS = 4096


def open_data(config: ImagesData, seed: int, model: ModelConfig | None) -> BatchSource:
    """The pictures that a config names, listed; the first one is decoded."""
    return _Images(config, steps(config, model))


class _Images:
    def __init__(self, config: ImagesData, steps: Steps) -> None:
        self.image = import_optional("PIL", "data.source", "Image")
        # It warns of pictures that would fill the memory, and here a warning is as good as a fault.
        warnings.simplefilter("error", self.image.DecompressionBombWarning)
        self.config, self.steps = config, steps
        self.root, self.names, self.said = _listed(config)
        self.classes = config.classes or _classes(self.said)
        self.batch_size, self.samples = config.batch_size, len(self.names)
        self.batch = InputBatcher(config.call, 1)
        self.shape = self._first_shape()
        self.sample_bytes = 4 * math.prod(self.shape)

    @property
    def files(self) -> list[Path]:
        return [self.root / name for name in self.names]

    def _first_shape(self) -> tuple[int, ...]:
        fault: Exception | None = None
        for number in range(self.samples):
            try:
                height, width = self._read(number).shape[1:]
                return len(self.steps.mode), height, width
            except SampleError as error:
                fault = error
        if fault is None:
            raise ConfigError(f"there are no pictures in {self.config.path}", "data.path")
        raise ConfigError(f"no picture can be read; the last: {fault}", "data.path") from fault

    def batches(self, start: int = 0) -> Iterator[Batch]:
        firsts = iter(range(start, self.samples, self.batch_size))
        ahead: deque[_Decoding] = deque()
        wanted = 1  # a batch that is read anew is asked for alone
        pool = ThreadPoolExecutor(available_cpus(), "gradrun-decode")
        try:
            while True:
                ahead.extend(
                    self._begun(pool, first)
                    for first in itertools.islice(firsts, wanted - len(ahead))
                )
                if not ahead:
                    return
                yield self._batch(ahead.popleft())
                wanted = 1 + _AHEAD
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def labels(self) -> Iterator[torch.Tensor]:
        if self.config.labels is None:
            raise missing_labels()
        for begin in range(0, self.samples, _LABELS):
            numbers = range(begin, min(begin + _LABELS, self.samples))
            yield torch.tensor([self._label(number) for number in numbers])

    def _label(self, number: int) -> float:
        said = self.said[number]
        try:
            return class_number(said, self.classes) if self.classes else float(said)
        except ValueError:
            raise ConfigError(
                f"{self.names[number]}: the label {said!r:.60} is no number, and none of "
                "data.classes",
                "data.labels",
            ) from None

    # --- decoding ------------------------------------------------------------------------------

    def _begun(self, pool: ThreadPoolExecutor, first: int) -> _Decoding:
        numbers = range(first, min(first + self.batch_size, self.samples))
        rows = torch.zeros((len(numbers), *self.shape))
        chunks = [
            pool.submit(self._fill, rows, numbers, range(begin, min(begin + _CHUNK, len(numbers))))
            for begin in range(0, len(numbers), _CHUNK)
        ]
        return numbers, rows, chunks

    def _fill(self, rows: torch.Tensor, numbers: range, places: range) -> dict[int, SampleError]:
        faults = {}
        for place in places:
            try:
                picture = self._read(numbers[place])
                if picture.shape != self.shape:
                    height, width = picture.shape[1:]
                    raise SampleError(
                        f"{self.names[numbers[place]]} is {height} pixels high and {width} wide, "
                        f"and the first is {self.shape[1]} and {self.shape[2]}; data.resize and "
                        "data.crop bring all to one size"
                    )
                rows.numpy()[place] = picture  # torch would start threads of its own in each
            except SampleError as fault:
                faults[place] = fault
        return faults

    def _batch(self, decoding: _Decoding) -> Batch:
        numbers, rows, chunks = decoding
        faults: dict[int, SampleError] = {}
        for chunk in chunks:
            faults |= chunk.result()
        ids = [self.names[number] for number in numbers]
        return self.batch({self.config.input: rows}, ids, faults)

    def _read(self, number: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One picture [channels, height, width].

        Raises:
            SampleError: it cannot be read.
        """
        name = self.names[number]
        try:
            with self.image.open(self.root / name, formats=list(_FORMATS)) as picture:
                return self.steps(picture)
        except self.image.UnidentifiedImageError as error:
            what = f"is no picture of the formats {', '.join(_FORMATS)}"
            raise SampleError(f"{name} {what}") from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged picture fails in any of a dozen ways
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SampleError(f"{name} cannot be read: {reason}") from error


_Decoding = tuple[range, torch.Tensor, list["Future[dict[int, SampleError]]"]]
"""Samples, their rows, and those who fill these."""


# --- where pictures lie ------------------------------------------------------------------------


def _listed(config: ImagesData) -> tuple[Path, list[str], list[str]]:
    """The folder that names start from, the names, and what is said of each picture's label."""
    if config.path.is_dir():
        names = sorted(_below(config.path, config.pattern))
        return config.path, names, _folders(config, names)
    try:
        if config.path.suffix == ".csv":
            names, said = _in_table(config)
        elif config.path.suffix == ".txt":
            text = config.path.read_text(encoding="utf-8-sig")
            names = [line for line in map(str.strip, text.splitlines()) if line]
            said = _folders(config, names)
        else:
            text = f"{config.path.name} is no folder, and no .txt or .csv list of pictures"
            raise ConfigError(text, "data.path")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{config.path} cannot be read: {error}", "data.path") from error
    return config.path.parent, names, said


def _below(folder: Path, pattern: str | None) -> Iterator[str]:
    """The files of a folder and those below it, as paths from there on, in no order."""
    if pattern is None:
        endings = tuple(ending for endings in _FORMATS.values() for ending in endings)
        for here, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            within = Path(here).relative_to(folder)
            for name in files:
                if name.lower().endswith(endings) and not name.startswith("."):
                    yield (within / name).as_posix()
        return
    try:
        found = [path for path in folder.glob(pattern) if path.is_file()]
    except (ValueError, NotImplementedError, IndexError) as error:
        raise ConfigError(f"{pattern!r:.60} is no pattern: {error}", "data.pattern") from error
    yield from (path.relative_to(folder).as_posix() for path in found)


def _folders(config: ImagesData, names: list[str]) -> list[str]:
    if config.labels not in {None, "folder"}:
        raise ConfigError(
            "a folder of pictures and a .txt list have labels by folder alone (labels: folder); "
            "a .csv list has columns",
            "data.labels",
        )
    return [PurePosixPath(name).parent.name for name in names] if config.labels else []


def _in_table(config: ImagesData) -> tuple[list[str], list[str]]:
    with config.path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        if not columns:
            raise ConfigError(f"{config.path} is empty", "data.path")
        for key, column in (("column", config.column), ("labels", config.labels)):
            if column is not None and column not in columns:
                raise ConfigError(
                    f"{config.path.name} has no column {column!r}; {suggest(column, columns)}",
                    f"data.{key}",
                )
        rows = list(reader)
    names = [row[config.column or columns[0]] or "" for row in rows]
    return names, [str(row[config.labels]) for row in rows] if config.labels else []


def _classes(said: list[str]) -> tuple[str, ...]:
    """Names in alphabetical order; none where every label is a whole number."""
    names = sorted(set(said))
    return () if all(name.isdecimal() and name.isascii() for name in names) else tuple(names)
