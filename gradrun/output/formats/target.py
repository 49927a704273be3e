"""What a writer must know about a run before its first outputs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gradrun.output.class_labels import ClassLabels


class WriterTarget(NamedTuple):
    """The folder of a run, and the properties of the run on which its files depend."""

    folder: Path
    samples: int | None
    """None if their number is unknown, which makes the files grow."""
    batch_size: int
    """Samples between two points at which a run can be resumed."""
    labels: ClassLabels
