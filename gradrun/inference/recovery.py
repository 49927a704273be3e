"""Recover from failed batches: split them after an out-of-memory error, or isolate bad samples."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gradrun.config.run import RunSection
from gradrun.core.errors import GradrunError, RunFailed, SampleError, first_line
from gradrun.core.units import pluralize
from gradrun.data.batch import Batch
from gradrun.inference.diagnosis import describe_allocation, device_failed, ran_out_of_memory
from gradrun.output.columns import ValueColumn, blank, layout, values_of
from gradrun.output.evidence_writer import is_evidence
from gradrun.output.missing import finite_rows
from gradrun.output.quarantine import SampleLog
from gradrun.output.transforms import Outputs

Recovered = tuple[Outputs, torch.Tensor | None]
"""Outputs [size, ...] and a mask [size] of the samples with a prediction; None if all have one."""


@dataclass(frozen=True)
class SampleFailure:
    """A sample that gets no prediction."""

    sample_id: int | str
    error: str
    traceback: str = ""


@dataclass
class BatchRecovery:
    """Predicts the samples of a failed batch that can be predicted, as `run.on_error` asks."""

    run: RunSection
    quarantine: SampleLog
    template: Outputs
    """Outputs of any batch, for names and layouts."""
    predict: Callable[[Batch], Outputs]
    read_batch: Callable[[int, int], Batch]
    """Reads the batch with this first sample and size again: a failed forward may alter it."""
    input_position: Callable[[int], int]
    """Maps the number of a sample in the order of the run to its position in the input."""
    batch_limit: int | None = None
    """Size of the largest batch known to fit in memory, after a larger one did not."""
    limited_from: int = 0
    """Input position of the first sample to which the batch limit applies."""

    def split_to_fit(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Split batches that exceed the current batch limit."""
        for batch in batches:
            if self.batch_limit is None or batch.size <= self.batch_limit:
                yield batch
            else:
                for begin in range(0, batch.size, self.batch_limit):
                    yield batch.slice(begin, min(begin + self.batch_limit, batch.size))

    def recover(self, start: int, size: int, error: Exception) -> Recovered:
        """Predict what is possible of the batch whose first sample is `start`.

        Raises:
            Exception: the run must stop, with `error` or with a RunFailed.
        """
        return self._assemble(start, size, *self._bisect(start, size, error))

    def repeat(self, start: int, size: int, error: Exception) -> Recovered:
        """Predict a batch that ran out of memory while others were in flight again, alone.

        Raises:
            Exception: the run must stop, as in `recover`.
        """
        error.__traceback__ = None  # its frames reference tensors that occupy memory
        _empty_cache()
        outputs, failure = _attempt(self._predict_again, start, size)
        return self.recover(start, size, failure) if failure else (outputs, None)

    def recover_unreadable(self, start: int, batch: Batch) -> Recovered:
        """Predict the readable samples of a batch together, and quarantine the others.

        Raises:
            Exception: the run must stop, as in `recover`.
        """
        if self.run.on_error != "quarantine":
            batch.raise_errors()
        rows = [row for row in range(batch.size) if row not in batch.errors]
        outputs, error = _attempt(self.predict, batch.select(rows)) if rows else ({}, None)
        if error:
            return self.recover(start, batch.size, error)
        pieces = {
            start + row: {name: tensor[i : i + 1] for name, tensor in outputs.items()}
            for i, row in enumerate(rows)
        }
        failures = {
            start + row: SampleFailure(batch.ids[row], str(error))
            for row, error in batch.errors.items()
        }
        return self._assemble(start, batch.size, pieces, failures)

    def check_finite(
        self, start: int, batch: Batch, outputs: Outputs, valid: torch.Tensor | None = None
    ) -> Recovered:
        """Apply `run.on_nonfinite` to outputs with NaN or infinity of valid samples.

        Raises:
            RunFailed: the policy is stop, or too many samples failed.
        """
        finite = finite_rows(t for name, t in outputs.items() if not is_evidence(name))
        if valid is not None:
            finite |= ~valid
        if finite.all():
            return outputs, valid
        for row in (~finite).nonzero().flatten().tolist():
            text = f"the output of sample {batch.ids[row]} contains NaN or infinity"
            if self.run.on_nonfinite == "stop":
                raise RunFailed(
                    f"{text}; to continue, set run.on_nonfinite to warn or quarantine",
                    resume_options="--set run.on_nonfinite=quarantine",
                )
            self._quarantine(start + row, SampleFailure(batch.ids[row], text))
        return outputs, finite if valid is None else finite & valid

    def _bisect(
        self, start: int, size: int, error: Exception
    ) -> tuple[dict[int, Outputs], dict[int, SampleFailure]]:
        """Halve a failed range until each part runs or is a single sample.

        Returns:
            The outputs by first sample of each part, and the failures by sample.
        """
        if not _is_recoverable(error, self.run):
            raise error
        details = "".join(traceback.format_exception(error, chain=False))
        error.__traceback__ = None  # its frames reference tensors that occupy memory
        if ran_out_of_memory(error):
            if size == 1:
                raise RunFailed(
                    f"sample {self.input_position(start):,} alone does not fit in memory "
                    f"({describe_allocation(error)}); a smaller model.dtype or run.autocast needs "
                    "less"
                )
            self.limit_batches(size // 2, self.input_position(start))
            _empty_cache()
        elif size == 1:
            message = f"{type(error).__name__}: {first_line(error)}"
            if isinstance(error, SampleError):
                message, details = str(error), ""
            sample_id = self.read_batch(start, 1).ids[0]
            return {}, {start: SampleFailure(sample_id, message, details)}
        pieces: dict[int, Outputs] = {}
        failures: dict[int, SampleFailure] = {}
        half = (size + 1) // 2
        for first, count in ((start, half), (start + half, size - half)):
            outputs, failure = _attempt(self._predict_again, first, count)
            if failure is None:
                pieces[first] = outputs
            else:
                more_pieces, more_failures = self._bisect(first, count, failure)
                pieces |= more_pieces
                failures |= more_failures
        return pieces, failures

    def _predict_again(self, start: int, size: int) -> Outputs:
        return self.predict(self.read_batch(start, size))

    def limit_batches(self, size: int, position: int) -> None:
        """Lower the batch limit to `size` from the sample at this input position on."""
        if self.batch_limit is None or size < self.batch_limit:
            self.batch_limit, self.limited_from = size, position

    def _assemble(
        self,
        start: int,
        size: int,
        pieces: dict[int, Outputs],
        failures: dict[int, SampleFailure],
    ) -> Recovered:
        """Join the outputs, with zeros for the samples that failed, and quarantine these.

        Outputs whose rows differ in shape or dtype become values of any size.
        """
        for sample, failure in sorted(failures.items()):
            self._quarantine(sample, failure)
        template = next(iter(pieces.values()), self.template)
        outputs: Outputs = {}
        for name, column in template.items():
            parts = {first - start: piece[name] for first, piece in pieces.items()}
            if len({layout(part) for part in parts.values()}) > 1:  # such as padding to the longest
                parts = {row: ValueColumn(values_of(part)) for row, part in parts.items()}
            rows: Any = blank(next(iter(parts.values()), column), size)
            for row, part in parts.items():
                rows[row : row + len(part)] = part
            outputs[name] = rows
        if not failures:
            return outputs, None
        valid = torch.tensor([start + row not in failures for row in range(size)])
        return outputs, valid

    def _quarantine(self, sample: int, failure: SampleFailure) -> None:
        position = self.input_position(sample)
        self.quarantine_sample(position, failure.sample_id, failure.error, failure.traceback)

    def quarantine_sample(
        self, position: int, sample_id: int | str, error: str, details: str
    ) -> None:
        """Record a sample without a prediction, by its position in the input.

        Raises:
            RunFailed: run.max_errors is exceeded.
        """
        self.quarantine.add(position, sample_id, error, details)
        limit = self.run.max_errors
        if limit is not None and self.quarantine.count > limit:
            raise RunFailed(
                f"{pluralize(self.quarantine.count, 'sample')} failed, more than run.max_errors "
                f"allows ({limit}); the last error: {error}; see {self.quarantine.path} "
                "for all of them",
                resume_options="--set run.max_errors=null",
            )


def runnable_subset(
    run: RunSection, predict: Callable[[Batch], Outputs], batch: Batch, error: Exception
) -> tuple[Batch | None, int | None]:
    """Find samples of a failed batch on which the model runs.

    Returns:
        The batch of these samples, or None; and the batch limit found after an out-of-memory
        error, or None.
    """
    limit = None
    while ran_out_of_memory(error) and batch.size > 1:
        batch = batch.slice(0, batch.size // 2)
        limit = batch.size
        _, failure = _attempt(predict, batch)
        if failure is None:
            return batch, limit
        error = failure
    if ran_out_of_memory(error) or not _is_recoverable(error, run):
        return None, limit
    samples = (batch.slice(row, row + 1) for row in range(batch.size))
    rows = [row for row, sample in enumerate(samples) if _attempt(predict, sample)[1] is None]
    return (batch.select(rows) if rows else None), limit


def _attempt(predict: Callable[..., Outputs], *args: Any) -> tuple[Outputs, Exception | None]:
    """Return the outputs or the error; a returned error's frames can be freed."""
    try:
        return predict(*args), None
    except GradrunError:
        raise
    except Exception as error:
        return {}, error


def _empty_cache() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _is_recoverable(error: Exception, run: RunSection) -> bool:
    if isinstance(error, GradrunError) or device_failed(error):
        return False
    return ran_out_of_memory(error) or run.on_error == "quarantine"
