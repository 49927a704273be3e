"""Write predictions in the order of the input if batches are grouped by length."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradrun.data.source import BatchSource, LengthGrouped
from gradrun.output.formats import PredictionWriter
from gradrun.output.journal import CommittedRange
from gradrun.output.transforms import Outputs


def commit_unit(data: BatchSource) -> int:
    """Return the number of samples committed together: a batch, or a chunk of grouped batches.

    A resume starts at a multiple of it, so that batches are cut at the same samples.
    """
    return data.chunk_size if isinstance(data, LengthGrouped) and data.grouped else data.batch_size


def restore_input_order(writer: PredictionWriter, data: BatchSource) -> PredictionWriter:
    """Put a buffer that restores the input order before the writer, if batches are grouped."""
    if isinstance(data, LengthGrouped) and data.grouped:
        return ReorderBuffer(writer, data, data.samples)
    return writer


class ReorderBuffer:
    """A writer that sorts each complete chunk; an incomplete chunk is predicted again."""

    def __init__(self, writer: PredictionWriter, data: LengthGrouped, samples: int) -> None:
        self.writer, self.data, self.samples = writer, data, samples
        self._outputs: list[Outputs] = []
        self._ids: list[int | str] = []
        self._valid: list[torch.Tensor] = []

    @property
    def written(self) -> int:
        return self.writer.written

    @property
    def nonfinite(self) -> int:
        return self.writer.nonfinite

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        self.writer.open(outputs, committed)

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        # A copy, because a model may return the same memory with every batch.
        self._outputs.append({name: tensor.clone() for name, tensor in outputs.items()})
        self._valid.append(torch.ones(len(ids), dtype=torch.bool) if valid is None else valid)
        self._ids += ids
        stop = self.written + len(self._ids)
        if len(self._ids) >= self.data.chunk_size or stop >= self.samples:
            self._flush(stop)

    def _flush(self, stop: int) -> None:
        positions = self.data.input_positions(self.written, stop)
        order = sorted(range(len(positions)), key=positions.__getitem__)
        ids, valid = [self._ids[i] for i in order], torch.cat(self._valid)[order]
        batches, self._outputs, self._ids, self._valid = self._outputs, [], [], []
        if all(_row_shapes(batch) == _row_shapes(batches[0]) for batch in batches):
            outputs = {name: torch.cat([b[name] for b in batches])[order] for name in batches[0]}
            self.writer.write(outputs, ids, None if valid.all() else valid)
            return
        # Sequences are as long as the longest of their batch, so rows are written one by one.
        rows = [
            {name: tensor[i : i + 1] for name, tensor in batch.items()}
            for batch in batches
            for i in range(len(next(iter(batch.values()))))
        ]
        for new, (old, sample_id) in enumerate(zip(order, ids, strict=True)):
            self.writer.write(rows[old], [sample_id], valid[new : new + 1])

    def commit(self) -> list[CommittedRange]:
        return self.writer.commit()

    def close(self) -> list[CommittedRange]:
        return self.writer.close()

    def files(self) -> list[str]:
        return self.writer.files()


def _row_shapes(outputs: Outputs) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape[1:]) for name, tensor in outputs.items()]
