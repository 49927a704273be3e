"""The bundled digits as image files, some of them broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gradrun.config.data import ImagesData
from gradrun.data import open_data
from gradrun.data.source import BatchSource

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = np.load(CONFIGS / "digits.npz")
LABELS = DIGITS["labels"]
BROKEN = {7: b"", 130: b"no picture at all", 412: None}
"""Number of a digit -> content of its file; None: the first half of the correct content."""


def lay_out(folder: Path, count: int = 500, broken: dict[int, bytes | None] = BROKEN) -> list[Path]:
    """Write each digit into the folder of its class, alternately as PNG and JPEG.

    Returns:
        The files in order.
    """
    files = []
    for number in range(count):
        pixels = np.minimum(DIGITS["images"][number].reshape(8, 8).astype(int) * 16, 255)
        ending = "png" if number % 2 else "jpg"
        file = folder / str(LABELS[number]) / f"{number:03}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(
            file, **({"quality": 95} if number % 2 == 0 else {})
        )
        if number in broken:
            content = broken[number]
            file.write_bytes(
                file.read_bytes()[: file.stat().st_size // 2] if content is None else content
            )
        files.append(file)
    return files


def save_noise(file: Path, height: int, width: int, mode: str = "RGB") -> Path:
    """Write an image of random pixels, which depend on the length of the path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(file))).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)
    return file


def section(path: Path, **changes: Any) -> ImagesData:
    return ImagesData.model_validate({"source": "images", "path": path, "batch_size": 8} | changes)


def opened(path: Path, **changes: Any) -> BatchSource:
    return open_data(section(path, **changes), seed=0)
