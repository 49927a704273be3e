"""Data of the user's own code, for bench.py: a Dataset of pictures, and a long iterable."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

BATCH, WORKERS = 32, 2


class Pictures(Dataset[torch.Tensor]):
    """JPEGs of 256 x 256 in memory, decoded and reduced to 64 x 64."""

    def __init__(self, count: int) -> None:
        drawn = np.random.default_rng(0)
        self.count, self.files = count, []
        for _ in range(64):
            coarse = drawn.integers(0, 256, (32, 32, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(coarse).resize((256, 256)).save(file, "JPEG")
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(io.BytesIO(self.files[index % 64])) as picture:
            pixels = np.array(picture.resize((64, 64)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


class Numbers(IterableDataset[torch.Tensor]):
    """Many small items, made as they are needed."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[torch.Tensor]:
        for block in range(0, self.count, 10_000):
            generator = torch.Generator().manual_seed(block)
            yield from torch.randn(min(10_000, self.count - block), 4, generator=generator)


def run(model: nn.Module, pictures: Pictures, target: Path) -> float:
    """Write predictions as a script would; return the seconds."""
    started = time.perf_counter()
    loader = DataLoader(pictures, BATCH, num_workers=WORKERS)
    with torch.inference_mode():
        rows = [model(batch).numpy() for batch in loader]
    np.save(target, np.concatenate(rows))
    return time.perf_counter() - started
