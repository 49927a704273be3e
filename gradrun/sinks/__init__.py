"""Predictions to files: the contract of the shelf and its table.

Knows named tensors and a folder; not which model they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from gradrun.config import OutputSection
from gradrun.sinks import jsonl, npy, safetensors


class Sink(Protocol):
    """Takes the outputs of one batch after the other, in the order of the input."""

    written: int
    """Samples that are in the files, whole."""

    def open(self, outputs: dict[str, torch.Tensor]) -> None:
        """Make room for the run, given the first batch's outputs [size, ...] (written later).

        Raises:
            OSError: the folder cannot be written, or the disk has too little room.
        """

    def write(self, outputs: dict[str, torch.Tensor], ids: Sequence[int | str]) -> None:
        """Add one batch.

        Raises:
            OSError: the disk is full; what was written before stays valid.
            ValueError: an output changed its shape.
        """

    def close(self) -> None:
        """End the files so that they hold the samples written, and no more."""

    def files(self) -> list[str]:
        """The names of the files in the folder."""


SINKS: dict[str, Callable[[Path, int], Any]] = {
    "npy": npy.NpySink,
    "safetensors": safetensors.SafetensorsSink,
    "jsonl": jsonl.JsonlSink,
}
"""format -> (folder, samples) to Sink."""


def open_sink(config: OutputSection, samples: int) -> Sink:
    """The sink that a config names; nothing is written before its `open`."""
    sink: Sink = SINKS[config.format](config.path, samples)
    return sink
