"""Image files, decoded by threads ahead of the model, in the order of their names."""

from __future__ import annotations

import csv
import itertools
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from gradrun.config.data import ImagesData
from gradrun.config.model import ModelConfig
from gradrun.core.cpu import available_cpus
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.optional import import_optional
from gradrun.core.suggest import suggest
from gradrun.data.batch import Batch
from gradrun.data.image_transforms import ImageTransform, Pixels, image_transform
from gradrun.data.source import (
    BatchSource,
    InputBatcher,
    Preview,
    class_number,
    missing_labels,
)
from gradrun.data.thumbnails import thumbnail_of_file
from gradrun.results.result import Statement

_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm"),
}
"""Formats that Pillow decodes itself. For others it starts programs, controlled by the file."""

_BATCHES_AHEAD = 2
_IMAGES_PER_TASK = 8
_LABELS_CHUNK = 4096


def open_data(config: ImagesData, seed: int, model: ModelConfig | None) -> BatchSource:
    """List the images that a config names, and decode the first one to get their shape."""
    return _Images(config, image_transform(config, model))


class _Decoding(NamedTuple):
    """A batch that is being decoded."""

    numbers: range
    rows: torch.Tensor
    tasks: list[Future[dict[int, SampleError]]]


class _Images:
    has_ids = True

    def __init__(self, config: ImagesData, transform: ImageTransform) -> None:
        self._image = import_optional("PIL", "data.source", "Image")
        self.config, self._transform = config, transform
        self._root, self._names, self._label_texts = _list_images(config)
        self.classes = config.classes or _class_names(self._label_texts)
        self.batch_size, self.samples = config.batch_size, len(self._names)
        self._new_batch = InputBatcher(config.call, 1)
        self._shape = self._first_shape()
        self.sample_bytes = 4 * math.prod(self._shape)

    @property
    def files(self) -> list[Path]:
        return [self._root / name for name in self._names]

    def _first_shape(self) -> tuple[int, ...]:
        last: SampleError | None = None
        for number in range(self.samples):
            try:
                channels, height, width = self._read(number).shape
                return channels, height, width
            except SampleError as error:
                last = error
        if last is None:
            raise ConfigError(f"{self.config.path} contains no images", "data.path")
        raise ConfigError(f"no image can be read; the last error: {last}", "data.path") from last

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        firsts = iter(range(start, self.samples if stop is None else stop, self.batch_size))
        ahead: deque[_Decoding] = deque()
        wanted = 1  # often only the first batch is read, for example after an error
        pool = ThreadPoolExecutor(available_cpus(), "gradrun-decode")
        try:
            while True:
                for first in itertools.islice(firsts, wanted - len(ahead)):
                    ahead.append(self._decode(pool, first))
                if not ahead:
                    return
                numbers, rows, tasks = ahead.popleft()
                errors = {row: error for task in tasks for row, error in task.result().items()}
                ids = [self._names[number] for number in numbers]
                yield self._new_batch({self.config.input: rows}, ids, errors)
                wanted = 1 + _BATCHES_AHEAD
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def statements(self) -> Iterator[Statement]:
        yield from ()

    def previews(self, positions: Sequence[int]) -> Iterator[Preview]:
        for position in positions:
            name = self._names[position]
            yield Preview(name, thumbnail_of_file(self._root / name, tuple(_FORMATS)))

    def labels(self) -> Iterator[torch.Tensor]:
        if self.config.labels is None:
            raise missing_labels()
        for start in range(0, self.samples, _LABELS_CHUNK):
            numbers = range(start, min(start + _LABELS_CHUNK, self.samples))
            yield torch.tensor([self._label(number) for number in numbers])

    def _label(self, number: int) -> float:
        text = self._label_texts[number]
        try:
            return class_number(text, self.classes) if self.classes else float(text)
        except ValueError:
            raise ConfigError(
                f"{self._names[number]}: the label {text!r:.60} is neither a number nor one of "
                "data.classes",
                "data.labels",
            ) from None

    # --- decoding ------------------------------------------------------------------------------

    def _decode(self, pool: ThreadPoolExecutor, first: int) -> _Decoding:
        numbers = range(first, min(first + self.batch_size, self.samples))
        rows = torch.zeros((len(numbers), *self._shape))
        tasks = [
            pool.submit(self._fill, rows, numbers, start, start + _IMAGES_PER_TASK)
            for start in range(0, len(numbers), _IMAGES_PER_TASK)
        ]
        return _Decoding(numbers, rows, tasks)

    def _fill(
        self, rows: torch.Tensor, numbers: range, start: int, stop: int
    ) -> dict[int, SampleError]:
        """Decode images into rows start to stop of a batch; return the errors by row."""
        errors = {}
        for row in range(start, min(stop, len(numbers))):
            try:
                pixels = self._read(numbers[row])
                if pixels.shape != self._shape:
                    height, width = pixels.shape[1:]
                    raise SampleError(
                        f"{self._names[numbers[row]]} is {height} x {width} pixels, but the first "
                        f"image is {self._shape[1]} x {self._shape[2]}; set data.resize and "
                        "data.crop to bring all images to one size"
                    )
                rows.numpy()[row] = pixels  # torch would start its own threads in each thread
            except SampleError as error:
                errors[row] = error
        return errors

    def _read(self, number: int) -> Pixels:
        """Return one image, float32 [channels, height, width].

        Raises:
            SampleError: the file cannot be decoded.
        """
        name = self._names[number]
        try:
            with self._image.open(self._root / name, formats=list(_FORMATS)) as image:
                limit = self._image.MAX_IMAGE_PIXELS
                if limit is not None and image.width * image.height > limit:
                    raise ValueError(f"more than {limit:,} pixels")
                return self._transform(image)
        except self._image.UnidentifiedImageError as error:
            raise SampleError(
                f"{name} is not an image of a supported format ({', '.join(_FORMATS)})"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many types of error for a damaged image
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SampleError(f"{name} cannot be read: {reason}") from error


# --- lists of images ---------------------------------------------------------------------------


def _list_images(config: ImagesData) -> tuple[Path, list[str], list[str]]:
    """Return the base folder, the paths of images relative to it, and their labels if any."""
    path = config.path
    if path.is_dir():
        names = sorted(_files_below(path, config.pattern))
        return path, names, _folder_labels(config, names)
    try:
        if path.suffix == ".csv":
            return path.parent, *_read_table(config)
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            names = [line for line in map(str.strip, lines) if line]
            return path.parent, names, _folder_labels(config, names)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "data.path") from error
    raise ConfigError(f"{path.name} is not a folder, or a .txt or .csv list of images", "data.path")


def _files_below(folder: Path, pattern: str | None) -> Iterator[str]:
    """Yield the paths of images relative to a folder, in no particular order."""
    if pattern is None:
        suffixes = tuple(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            relative = Path(parent).relative_to(folder)
            for name in files:
                if name.lower().endswith(suffixes) and not name.startswith("."):
                    yield (relative / name).as_posix()
        return
    try:
        matches = [path for path in folder.glob(pattern) if path.is_file()]
    except (ValueError, NotImplementedError, IndexError) as error:
        raise ConfigError(f"invalid pattern {pattern!r:.60}: {error}", "data.pattern") from error
    yield from (path.relative_to(folder).as_posix() for path in matches)


def _folder_labels(config: ImagesData, names: list[str]) -> list[str]:
    if config.labels not in {None, "folder"}:
        raise ConfigError(
            "images in a folder or a .txt list can only have the label of their folder (labels: "
            "folder); use a .csv list for columns",
            "data.labels",
        )
    return [PurePosixPath(name).parent.name for name in names] if config.labels else []


def _read_table(config: ImagesData) -> tuple[list[str], list[str]]:
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
        rows: list[dict[str, Any]] = list(reader)
    names = [row[config.column or columns[0]] or "" for row in rows]
    return names, [str(row[config.labels]) for row in rows] if config.labels else []


def _class_names(labels: list[str]) -> tuple[str, ...]:
    """Return the names of labels in alphabetical order, or () if all are whole numbers."""
    names = sorted(set(labels))
    return () if all(name.isdecimal() and name.isascii() for name in names) else tuple(names)
