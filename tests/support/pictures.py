"""The bundled digits as files of pictures, some of them broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = np.load(CONFIGS / "digits.npz")
LABELS = DIGITS["labels"]
BROKEN = {7: b"", 130: b"no picture at all", 412: None}
"""Number of a digit to what its file holds; None: the first half of what it should."""


def lay_out(folder: Path, count: int = 500, broken: dict[int, bytes | None] = BROKEN) -> list[Path]:
    """Each digit in the folder of its class, PNG and JPEG by turns; returns the files in order."""
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
