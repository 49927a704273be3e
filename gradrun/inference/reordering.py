"""A sink for samples that are run in another order than that of the input: files keep the input's.

Holds the outputs of one window until the window is whole. Knows no file and no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradrun.data.source import BatchSource, LengthGrouped
from gradrun.output.formats import PredictionWriter
from gradrun.output.journal import CommittedRange
from gradrun.output.transforms import Outputs


def commit_unit(data: BatchSource) -> int:
    """Number of samples that are committed together: a batch, or a window of grouped batches.

    A resume starts at a multiple of it, so that batches are cut at the same samples.
    """
    return data.chunk_size if isinstance(data, LengthGrouped) and data.grouped else data.batch_size


def restore_input_order(writer: PredictionWriter, data: BatchSource) -> PredictionWriter:
    """The writer, behind a buffer that restores the input order of grouped batches."""
    if isinstance(data, LengthGrouped) and data.grouped:
        return ReorderBuffer(writer, data, data.samples)
    return writer


class ReorderBuffer:
    """Passes whole windows on, sorted; what a fault cuts off of a window is made again."""

    def __init__(self, sink: PredictionWriter, data: LengthGrouped, samples: int) -> None:
        self.sink, self.data, self.samples = sink, data, samples
        self.written = self.nonfinite = 0
        self._held: list[Outputs] = []
        self._ids: list[int | str] = []
        self._valid: list[torch.Tensor] = []

    def open(self, outputs: Outputs, kept: Sequence[CommittedRange] = ()) -> None:
        self.sink.open(outputs, kept)
        self._look()

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        # A copy: a model may return the same memory with every batch.
        self._held.append({name: tensor.clone() for name, tensor in outputs.items()})
        self._valid.append(torch.ones(len(ids), dtype=torch.bool) if valid is None else valid)
        self._ids += ids
        stop = self.written + len(self._ids)
        if len(self._ids) >= self.data.chunk_size or stop >= self.samples:
            self._pass_on(stop)

    def _pass_on(self, stop: int) -> None:
        places = self.data.input_positions(self.written, stop)
        order = sorted(range(len(places)), key=places.__getitem__)
        ids, valid = [self._ids[i] for i in order], torch.cat(self._valid)[order]
        held, self._held, self._ids, self._valid = self._held, [], [], []
        alike = all(_row_shapes(part) == _row_shapes(held[0]) for part in held)
        if alike:
            whole = {name: torch.cat([part[name] for part in held])[order] for name in held[0]}
            self.sink.write(whole, ids, None if valid.all() else valid)
        else:  # sequences as long as the longest of their batch
            rows = [_row(part, i) for part in held for i in range(len(next(iter(part.values()))))]
            for new, (old, name) in enumerate(zip(order, ids, strict=True)):
                self.sink.write(rows[old], [name], valid[new : new + 1])
        self._look()

    def commit(self) -> list[CommittedRange]:
        commits = self.sink.commit()
        self._look()
        return commits

    def close(self) -> list[CommittedRange]:
        try:
            return self.sink.close()
        finally:
            self._look()

    def files(self) -> list[str]:
        return self.sink.files()

    def _look(self) -> None:
        self.written, self.nonfinite = self.sink.written, self.sink.nonfinite


def _row_shapes(outputs: Outputs) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape[1:]) for name, tensor in outputs.items()]


def _row(outputs: Outputs, row: int) -> Outputs:
    return {name: tensor[row : row + 1] for name, tensor in outputs.items()}
