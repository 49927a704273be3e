"""Write what metrics need beside the predictions, committed together with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradrun.output.formats import PredictionWriter, npy
from gradrun.output.journal import CommittedRange

if TYPE_CHECKING:
    import torch

    from gradrun.output.transforms import Outputs

_KEY = "metrics:"
"""Starts the names of evidence among the outputs of a batch; no output has a colon in its name."""

_STEM = "_metrics"
"""Starts the file names: readers of data sets ignore files with an underscore."""

FILES = f"{_STEM}.*.npy"
"""Pattern of the file names."""


LABELS = "labels"
"""Name of the evidence with the labels that were read with the inputs."""


def evidence_key(name: str) -> str:
    """Return the name of some evidence among the outputs of a batch."""
    return f"{_KEY}{name}"


def is_evidence(name: str) -> bool:
    """Report whether an entry of the outputs of a batch is evidence, not a prediction."""
    return name.startswith(_KEY)


def evidence_file(name: str) -> str:
    """Return the file name of some evidence."""
    return f"{_STEM}.{name}.npy"


def lacks_evidence(name: str, committed: Iterable[CommittedRange]) -> bool:
    """Report whether any committed range was written without some evidence."""
    return any(evidence_file(name) not in part.files for part in committed)


class EvidenceWriter:
    """A writer that puts evidence into .npy files of its own, and the rest into another writer.

    The ranges of the other writer list the checksums of the evidence, so that a range in the
    journal is complete in all files.
    """

    def __init__(self, writer: PredictionWriter, folder: Path, samples: int | None) -> None:
        self.writer, self.folder = writer, folder
        self.evidence = npy.NpyWriter(folder, samples, stem=_STEM)

    @property
    def written(self) -> int:
        return min(self.writer.written, self.evidence.written)

    @property
    def nonfinite(self) -> int:
        return self.writer.nonfinite

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        predictions, evidence = _split(outputs)
        self.writer.open(predictions, committed)
        self.evidence.open(evidence, committed)

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        predictions, evidence = _split(outputs)
        # First, so that after Ctrl-C between the two no prediction lacks evidence.
        self.evidence.write(evidence, ids, valid)
        self.writer.write(predictions, ids, valid)

    def commit(self) -> list[CommittedRange]:
        self.evidence.commit()
        return [self._with_evidence(part) for part in self.writer.commit()]

    def close(self) -> list[CommittedRange]:
        try:
            self.evidence.close()
        finally:
            ranges = self.writer.close()
        return [self._with_evidence(part) for part in ranges]

    def files(self) -> list[str]:
        return self.writer.files()

    def _with_evidence(self, part: CommittedRange) -> CommittedRange:
        checksums = {
            file: npy.checksum(self.folder / file, part, 0) for file in self.evidence.files()
        }
        return part.model_copy(update={"files": part.files | checksums})


def _split(outputs: Outputs) -> tuple[Outputs, Outputs]:
    predictions = {name: tensor for name, tensor in outputs.items() if not is_evidence(name)}
    evidence = {
        name.removeprefix(_KEY): tensor for name, tensor in outputs.items() if is_evidence(name)
    }
    return predictions, evidence
