"""Write predictions in the order of the input if batches are grouped by length."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from gradrun.data.source import BatchSource, require_length
from gradrun.output.columns import join, layout
from gradrun.output.formats import RowWriter
from gradrun.output.transforms import Outputs


def commit_unit(data: BatchSource) -> int:
    """Return the number of samples committed together: a batch, or a chunk of grouped batches.

    A resume starts at a multiple of it, so that batches are cut at the same samples.
    """
    return data.chunk_size if data.grouped else data.batch_size


def restore_input_order(writer: RowWriter, data: BatchSource) -> RowWriter:
    """Put a buffer that restores the input order before the writer, if batches are grouped."""
    if data.grouped:
        return ReorderBuffer(writer, data.input_positions, data.chunk_size, require_length(data))
    return writer


class ReorderBuffer:
    """A writer that sorts each complete chunk; an incomplete chunk is predicted again."""

    def __init__(
        self,
        writer: RowWriter,
        input_positions: Callable[[int, int], Sequence[int]],
        chunk_size: int,
        samples: int,
    ) -> None:
        """Sort the rows of each chunk.

        Args:
            writer: receives the rows in the order of the input.
            input_positions: maps samples start to stop of a chunk to their input positions.
            chunk_size: samples per chunk; the last one may be shorter.
            samples: number of samples of the run.
        """
        self.writer, self.samples = writer, samples
        self._input_positions, self._chunk_size = input_positions, chunk_size
        self._outputs: list[Outputs] = []
        self._ids: list[int | str] = []
        self._valid: list[torch.Tensor] = []

    @property
    def written(self) -> int:
        return self.writer.written

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        # A copy, because a model may return the same memory with every batch.
        self._outputs.append({name: column.clone() for name, column in outputs.items()})
        self._valid.append(torch.ones(len(ids), dtype=torch.bool) if valid is None else valid)
        self._ids += ids
        stop = self.written + len(self._ids)
        if len(self._ids) >= self._chunk_size or stop >= self.samples:
            self._flush(stop)

    def _flush(self, stop: int) -> None:
        positions = self._input_positions(self.written, stop)
        order = sorted(range(len(positions)), key=positions.__getitem__)
        ids, valid = [self._ids[i] for i in order], torch.cat(self._valid)[order]
        batches, self._outputs, self._ids, self._valid = self._outputs, [], [], []
        if all(_layouts(batch) == _layouts(batches[0]) for batch in batches):
            outputs = {name: join([b[name] for b in batches])[order] for name in batches[0]}
            self.writer.write(outputs, ids, None if valid.all() else valid)
            return
        # Sequences are as long as the longest of their batch, so rows are written one by one.
        rows = [
            {name: column[i : i + 1] for name, column in batch.items()}
            for batch in batches
            for i in range(len(next(iter(batch.values()))))
        ]
        for new, (old, sample_id) in enumerate(zip(order, ids, strict=True)):
            self.writer.write(rows[old], [sample_id], valid[new : new + 1])


def _layouts(outputs: Outputs) -> list[tuple[str, Hashable]]:
    return [(name, layout(column)) for name, column in outputs.items()]
