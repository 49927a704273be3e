"""Small JPEG pictures of inputs, for reports."""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any

import torch

_SIDE = 96
"""Greatest width and height of a thumbnail, in pixels."""
_MIN_SIDE = 48
"""Smaller pictures are enlarged to about this size."""
_CHANNELS = {1, 3}


def thumbnail_of_image(image: Any) -> bytes:
    """Return a thumbnail of a decoded Pillow image."""
    picture = image.convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    if (factor := -(-_MIN_SIDE // max(picture.size))) > 1:
        picture = picture.resize([side * factor for side in picture.size], resample=0)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()


def thumbnail_of_array(values: torch.Tensor) -> bytes:
    """Return a thumbnail of numbers [1 or 3, height, width] or [height, width, 1 or 3].

    The least value becomes black, the greatest white. For other shapes, and without Pillow, the
    result is b"".
    """
    if values.ndim != 3 or values.is_complex() or min(values.shape) < 1:
        return b""
    if values.shape[0] in _CHANNELS:
        values = values.permute(1, 2, 0)
    if values.shape[2] not in _CHANNELS or min(values.shape[:2]) < 4:
        return b""
    try:
        image = import_module("PIL.Image")
    except ImportError:
        return b""
    values = values.float().nan_to_num()
    low, high = values.min(), values.max()
    pixels = ((values - low) / (high - low).clamp(min=1e-30) * 255).round().to(torch.uint8)
    return thumbnail_of_image(image.fromarray(pixels.expand(-1, -1, 3).contiguous().numpy()))
