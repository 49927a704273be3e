"""Commit predictions about once per second: flush the writer, then append to the journal."""

from __future__ import annotations

import time

from gradrun.output.formats import PredictionWriter
from gradrun.output.journal import CommittedRange, InputChecksum, Journal, no_checksum

SECONDS = 1.0
BYTES = 64 * 1024 * 1024

_TIME_SHARE = 0.01
"""Greatest share of the run's time for commits; on a slow disk they become less frequent."""


class Checkpointer:
    """Commits the output of a writer at regular intervals."""

    def __init__(
        self,
        writer: PredictionWriter,
        journal: Journal,
        batch_size: int,
        row_bytes: int,
        input_checksum: InputChecksum = no_checksum,
    ) -> None:
        """Commit multiples of `batch_size` samples, each of `row_bytes` bytes."""
        self.writer, self.journal = writer, journal
        self._input_checksum = input_checksum
        self.batch_size = batch_size
        self._max_rows = max(1, BYTES // max(1, row_bytes))
        self.committed = writer.written
        """Samples in the journal."""
        self.pending: list[CommittedRange] = []
        """Synced ranges that are not in the journal yet."""
        self._due = time.monotonic() + SECONDS
        self._failed = False

    def commit_if_due(self) -> None:
        """Commit once a second, or after BYTES of predictions, at the end of a batch.

        Raises:
            OSError: predictions since the last commit may be lost.
        """
        written = self.writer.written
        due = time.monotonic() >= self._due or written - self.committed >= self._max_rows
        # A resume starts with a whole batch, so that batches are cut at the same samples.
        if due and written % self.batch_size == 0:
            self.commit()

    def commit(self) -> None:
        """Sync the predictions and append their ranges to the journal."""
        started = time.monotonic()
        try:
            self.pending += self.writer.commit()
            self._record()
        except OSError:
            # After a failed sync, the system may have dropped the data: commit nothing more.
            self._failed = True
            raise
        self._due = time.monotonic() + max(SECONDS, (time.monotonic() - started) / _TIME_SHARE)

    def close(self, *, finished: bool = False) -> None:
        """Close the writer, and commit its last rows; `finished`: no sample of the run is missing.

        Raises:
            OSError: the files are incomplete; ranges in the journal are valid nevertheless.
        """
        try:
            ranges = self.writer.close()
            if not self._failed:
                self.pending += ranges
                self._record()
                if finished:
                    self.journal.end(self.committed)
        finally:
            self.journal.close()

    def _record(self) -> None:
        while self.pending:
            stop = self.pending[0].stop
            checksum = self._input_checksum(stop)
            self.journal.append(self.pending[0].model_copy(update={"input": checksum}))
            self.committed = self.pending.pop(0).stop
