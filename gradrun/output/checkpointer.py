"""When predictions are made safe: a sink's commits and the journal that tells of them, together.

Knows the clock and the order of the two; not how either writes.
"""

from __future__ import annotations

import time

from gradrun.output.formats import PredictionWriter
from gradrun.output.journal import CommittedRange, Journal

SECONDS = 1.0
BYTES = 64 * 1024 * 1024

_SHARE = 0.01
"""Of the time that commits may take: on a slow disk they come less often."""


class Checkpointer:
    """Commits what a sink has written, about once a second."""

    def __init__(
        self, sink: PredictionWriter, journal: Journal, batch_size: int, row_bytes: int
    ) -> None:
        self.sink, self.journal = sink, journal
        self.batch_size = batch_size
        self._most_rows = max(1, BYTES // max(1, row_bytes))
        self.kept = sink.written
        """Samples that the journal tells of."""
        self._due = time.monotonic() + SECONDS
        self._broken = False
        self._untold: list[CommittedRange] = []

    def look(self) -> None:
        """Commit if it is time to.

        Raises:
            OSError: what was written since the last commit may not be on the disk.
        """
        written = self.sink.written
        # A resume begins with a whole batch, so that batches are cut as they were.
        whole = written % self.batch_size == 0
        late = time.monotonic() >= self._due or written - self.kept >= self._most_rows
        if late and whole:
            self.commit()

    def commit(self) -> None:
        """Bring what was written to the disk, and say so in the journal."""
        began = time.monotonic()
        try:
            self._untold += self.sink.commit()
            self._tell()
        except OSError:
            # A disk that failed to sync may have dropped what it held: nothing more is promised.
            self._broken = True
            raise
        self._due = time.monotonic() + max(SECONDS, (time.monotonic() - began) / _SHARE)

    def close(self) -> None:
        """End the files, with the last commit.

        Raises:
            OSError: they are not whole; what the journal says is there nevertheless.
        """
        try:
            commits = self.sink.close()
            if not self._broken:
                self._untold += commits
                self._tell()
        finally:
            self.journal.close()

    def _tell(self) -> None:
        while self._untold:
            self.journal.add(self._untold[:1])
            self.kept = self._untold.pop(0).stop
