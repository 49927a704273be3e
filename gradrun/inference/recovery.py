"""What becomes of a batch whose forward fails: cut smaller where memory ran out, or taken apart
until the samples at fault stand alone.

Knows errors, batches and the file of those samples; not how a batch is timed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator

import torch

from gradrun.config.run import RunSection
from gradrun.core.errors import GradrunError, RunFailed, SampleError, first_line
from gradrun.core.units import pluralize
from gradrun.data.batch import Batch
from gradrun.inference.diagnosis import memory_asked, ran_out_of_memory
from gradrun.output.missing import count_nonfinite
from gradrun.output.quarantine import Quarantine
from gradrun.output.transforms import Outputs


class BatchRecovery:
    """Makes of a failed batch what can be made of it, as `run.on_error` asks."""

    def __init__(
        self,
        run: RunSection,
        predict: Callable[[Batch], Outputs],
        again: Callable[[int, int], Batch],
        quarantine: Quarantine,
    ) -> None:
        """Set up.

        Args:
            run: what is asked of it.
            predict: the model's outputs for a batch.
            again: a batch anew by its first sample and size, since a failed forward may have
                written into the one it got.
            quarantine: takes the samples at fault.
        """
        self.run, self.predict, self.again = run, predict, again
        self.quarantine = quarantine
        self.like: Outputs = {}
        """Outputs of some batch, for their names, shapes and types."""
        self.most: int | None = None
        """Samples that fit in memory at once, where a batch did not."""
        self.place: Callable[[int], int] = lambda at: at
        """Where in the input the sample stands that is run as the at-th."""
        self.cut_at = 0
        """The sample from which on batches are no larger than that."""

    def cut(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, in pieces that fit once one did not."""
        for batch in batches:
            if self.most is None or batch.size <= self.most:
                yield batch
            else:
                for begin in range(0, batch.size, self.most):
                    yield batch.slice(begin, min(begin + self.most, batch.size))

    def failed(self, at: int, size: int, error: Exception) -> tuple[Outputs, set[int]]:
        """Outputs for the batch that begins at sample `at`, and the positions that have none.

        Raises:
            Exception: the run is to end: `error` itself, or a RunFailed that says why.
        """
        if not self._goes_on(error):
            raise error
        pieces: list[tuple[int, Outputs]] = []
        missing: set[int] = set()
        self._apart(at, at, size, error, pieces, missing)
        return self._whole(size, pieces), missing

    def unreadable(self, at: int, batch: Batch) -> tuple[Outputs, set[int]]:
        """Outputs for a batch of which some samples could not be read, and their positions.

        Raises:
            Exception: as `failed` does.
        """
        if self.run.on_error != "quarantine":
            batch.raise_errors()
        sound = [row for row in range(batch.size) if row not in batch.errors]
        try:
            outputs = self.predict(batch.select(sound)) if sound else {}
        except Exception as error:  # others fail for another reason, or are too many
            return self.failed(at, batch.size, error)
        for row in sorted(batch.errors):
            self._set_apart(at + row, batch.ids[row], str(batch.errors[row]), "")
        pieces = [
            (row, {name: tensor[i : i + 1] for name, tensor in outputs.items()})
            for i, row in enumerate(sound)
        ]
        return self._whole(batch.size, pieces), set(batch.errors)

    def check(self, at: int, batch: Batch, outputs: Outputs) -> tuple[Outputs, set[int]]:
        """The outputs, and the positions where one of them is NaN or infinite.

        Raises:
            RunFailed: there are such, and `run.on_nonfinite` is stop.
        """
        if not count_nonfinite(outputs.values()):
            return outputs, set()
        missing = {row for row in range(batch.size) if count_nonfinite(_row(outputs, row))}
        for row in sorted(missing):
            text = f"sample {batch.ids[row]} has an output that is NaN or infinite"
            if self.run.on_nonfinite == "stop":
                raise RunFailed(f"{text}; run.on_nonfinite: warn or quarantine goes on")
            self._set_apart(at + row, batch.ids[row], text, "")
        good = [row for row in range(batch.size) if row not in missing]
        pieces = [(row, {name: t[row : row + 1] for name, t in outputs.items()}) for row in good]
        return self._whole(batch.size, pieces), missing

    def healthy(self, batch: Batch, error: Exception) -> Batch | None:
        """What the model can be run on of a batch that failed; None where it is nothing."""
        if not self._goes_on(error):
            return None
        if ran_out_of_memory(error):
            if batch.size == 1:
                return None
            half = batch.slice(0, batch.size // 2)
            failure = self._failure(half)
            self.most = half.size
            return self.healthy(half, failure) if failure else half
        rows = [
            row for row in range(batch.size) if self._failure(batch.slice(row, row + 1)) is None
        ]
        return batch.select(rows) if rows else None

    def _failure(self, batch: Batch) -> Exception | None:
        try:
            self.predict(batch)
        except GradrunError:
            raise
        except Exception as error:
            return error
        return None

    # --- taking apart --------------------------------------------------------------------------

    def _goes_on(self, error: Exception) -> bool:
        if isinstance(error, GradrunError):
            return False
        return ran_out_of_memory(error) or self.run.on_error == "quarantine"

    def _apart(
        self,
        first: int,
        at: int,
        size: int,
        error: Exception,
        pieces: list[tuple[int, Outputs]],
        missing: set[int],
    ) -> None:
        """Halve what failed until what is left runs, or is a single sample."""
        details = "".join(traceback.format_exception(error, chain=False))
        error.__traceback__ = None  # its frames hold the tensors that memory is short of
        if not self._goes_on(error):
            raise error
        if ran_out_of_memory(error):
            if size == 1:
                raise _too_large(self.place(at), error)
            if self.most is None or size // 2 < self.most:
                self.most, self.cut_at = size // 2, self.place(at)
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.empty_cache()
        elif size == 1:
            batch = self.again(at, 1)
            said = f"{type(error).__name__}: {first_line(error)}"
            if isinstance(error, SampleError):
                said, details = str(error), ""
            self._set_apart(at, batch.ids[0], said, details)
            missing.add(at - first)
            return
        half = (size + 1) // 2
        for begin, count in ((at, half), (at + half, size - half)):
            failure = self._try(first, begin, count, pieces)
            if failure:
                self._apart(first, begin, count, failure, pieces, missing)

    def _try(
        self, first: int, at: int, size: int, pieces: list[tuple[int, Outputs]]
    ) -> Exception | None:
        try:
            pieces.append((at - first, self.predict(self.again(at, size))))
        except Exception as error:
            return error
        return None

    def _set_apart(self, at: int, name: int | str, error: str, details: str) -> None:
        self.quarantine.add(self.place(at), name, error, details)
        most = self.run.max_errors
        if most is not None and self.quarantine.count > most:
            raise RunFailed(
                f"{pluralize(self.quarantine.count, 'sample')} failed, more than run.max_errors "
                f"allows ({most}); the last: {error}; all are in {self.quarantine.path}"
            )

    def _whole(self, size: int, pieces: list[tuple[int, Outputs]]) -> Outputs:
        """Pieces put together; zeros where there is none."""
        whole = {}
        for name, like in (pieces[0][1] if pieces else self.like).items():
            made = torch.zeros((size, *like.shape[1:]), dtype=like.dtype)
            for begin, piece in pieces:
                made[begin : begin + len(piece[name])] = piece[name]
            whole[name] = made
        return whole


def _row(outputs: Outputs, row: int) -> list[torch.Tensor]:
    return [tensor[row : row + 1] for tensor in outputs.values()]


def _too_large(at: int, error: Exception) -> RunFailed:
    return RunFailed(
        f"sample {at:,} alone does not fit in memory ({memory_asked(error)}); a smaller "
        "model.dtype or run.autocast takes less"
    )
