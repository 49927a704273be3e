"""Image files, decoded by threads ahead of the model, in the order of their names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from gradrun.config.data import ImagesData
from gradrun.core.errors import SampleError, first_line
from gradrun.core.units import pluralize
from gradrun.data.batch import Batch
from gradrun.data.dataset_rows import open_samples
from gradrun.data.decoded_files import DecodedFiles
from gradrun.data.image_decoding import ImageDecoder, Trait, trait_statements
from gradrun.data.image_presets import preprocessing_of
from gradrun.data.image_transforms import Pixels, eight_bit
from gradrun.data.source import InputBatcher, OpeningFacts, Preview
from gradrun.data.thumbnails import thumbnail_of_image
from gradrun.results.result import Statement

_IMAGES_PER_TASK = 8


class _Page(NamedTuple):
    """The image of one sample."""

    file: int
    """Position in the list of files."""
    page: int
    """From 1."""
    id: str


_Rows = torch.Tensor | list[Pixels]
"""The images [n, channels, height, width], or one by one if their sizes may differ."""
_Errors = dict[int, SampleError]
_Decoding = tuple[_Rows, list[Future[_Errors]]]


class Images(DecodedFiles[_Decoding]):
    """The images that a config names, of which the first is decoded to get their shape."""

    config: ImagesData
    noun = "image"

    def __init__(self, config: ImagesData, facts: OpeningFacts) -> None:
        self._preprocessing = preprocessing_of(config, facts.model)
        self._decoder = ImageDecoder(config, self._preprocessing.mode)
        self._listed = open_samples(config, self._decoder.suffixes(), "images")
        self._pages = self._list_pages() if config.page == "all" else None
        samples = len(self._listed.names if self._pages is None else self._pages)
        super().__init__(config, self._listed, samples, facts.classes)
        self._new_batch = InputBatcher(config.call, 1)
        self._shape = self._first().shape
        self.sample_bytes = 4 * math.prod(self._shape)

    def _list_pages(self) -> list[_Page]:
        """Open all files, and return their pages."""
        pages = []
        for number, name in enumerate(self._listed.names):
            count = self._decoder.pages(partial(self._listed.open, number))
            pages += [
                _Page(number, page, f"{name}#{page}" if count > 1 else name)
                for page in range(1, count + 1)
            ]
        return pages

    def _page(self, number: int) -> _Page:
        """Return the page of a sample."""
        if self._pages is not None:
            return self._pages[number]
        page = self.config.page
        return _Page(number, 1 if page == "all" else page, self._listed.names[number])

    def statements(self) -> Iterator[Statement]:
        files = len(self._listed.names)
        yield from self._listed.statements("image")
        yield from self._preprocessing.statements
        if self.config.call == "list":
            text = "a list of tensors [channels, height, width], each in its own size"
            yield Statement(topic="call", text=text)
        else:
            channels, height, width = self._shape
            text = f"{pluralize(channels, 'channel')}, {height} x {width} pixels"
            yield Statement(topic="images", text=text)
        yield from trait_statements(self.flags, self.config)
        if self.samples > files:
            text = f"{self.samples:,} pages of {pluralize(files, 'file')}, each is a sample"
            yield Statement(topic="pages", text=text)
        if self.config.labels:
            yield self._listed.describe_labels(self.classes)

    def previews(self, positions: Sequence[int]) -> Iterator[Preview]:
        for position in positions:
            try:
                image, _ = self._open(position)
                thumbnail = thumbnail_of_image(eight_bit(image, "RGB"))
            except SampleError:
                thumbnail = b""
            yield Preview(self._page(position).id, thumbnail)

    def labels(self) -> Iterator[torch.Tensor]:
        files = [self._page(number).file for number in range(self.samples)]
        return self._listed.label_numbers(files, self.classes)

    # --- decoding ------------------------------------------------------------------------------

    def _decode(self, pool: ThreadPoolExecutor, numbers: range) -> _Decoding:
        rows: _Rows
        if self.config.call == "list":
            rows = [np.zeros((self._shape[0], 1, 1), np.float32)] * len(numbers)
        else:
            rows = torch.zeros((len(numbers), *self._shape))
        tasks = [
            pool.submit(self._fill, rows, numbers, start, start + _IMAGES_PER_TASK)
            for start in range(0, len(numbers), _IMAGES_PER_TASK)
        ]
        return rows, tasks

    def _collate(self, numbers: range, decoding: _Decoding) -> Batch:
        rows, tasks = decoding
        errors = {row: error for task in tasks for row, error in task.result().items()}
        ids = [self._page(number).id for number in numbers]
        inputs = _padded(rows) if isinstance(rows, list) else (rows,)
        names = (self.config.input, "sizes")
        return self._new_batch(dict(zip(names, inputs, strict=False)), ids, errors)

    def _fill(self, rows: _Rows, numbers: range, start: int, stop: int) -> _Errors:
        """Decode images into rows start to stop of a batch; return the errors by row."""
        errors = {}
        for row in range(start, min(stop, len(numbers))):
            try:
                pixels = self._read(numbers[row])
                if isinstance(rows, list):
                    rows[row] = pixels
                    continue
                if pixels.shape != self._shape:
                    height, width = pixels.shape[1:]
                    raise SampleError(
                        f"{self._page(numbers[row]).id} is {height} x {width} pixels, but the "
                        f"first image is {self._shape[1]} x {self._shape[2]}; set data.resize and "
                        "data.crop to bring all images to one size, or data.call: list for a "
                        "model that takes a list of images"
                    )
                rows.numpy()[row] = pixels  # torch would start its own threads in each thread
            except SampleError as error:
                errors[row] = error
        return errors

    def _open(self, number: int) -> tuple[Any, Trait]:
        """Return the decoded image of a sample, and what had to be interpreted."""
        file, page, name = self._page(number)
        return self._decoder.decode(partial(self._listed.open, file), name, page)

    def _read(self, number: int) -> Pixels:
        """Return one image, float32 [channels, height, width]."""
        image, self.flags[number] = self._open(number)
        try:
            return self._preprocessing.transform(image)
        except MemoryError:
            raise
        except Exception as error:  # the libraries raise many types of error for odd sizes
            name = self._page(number).id
            raise SampleError(f"{name} cannot be preprocessed: {first_line(error)}") from error


def _padded(images: list[Pixels]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of several sizes padded with 0 to the largest, and their sizes [n, 2]."""
    sizes = torch.tensor([image.shape[1:] for image in images])
    rows = torch.zeros((len(images), len(images[0]), *sizes.max(0).values.tolist()))
    for row, image in zip(rows.numpy(), images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return rows, sizes
