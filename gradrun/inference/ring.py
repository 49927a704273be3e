"""Batches in flight: started on a device, with outputs that are not written yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from gradrun.data.batch import Batch
from gradrun.inference.transfers import Copied
from gradrun.output.transforms import Outputs


class InFlight(NamedTuple):
    """A batch whose forward pass and copies have been started."""

    batch: Batch
    """On the host."""
    outputs: Outputs
    """In host memory, complete after `copied.wait()`."""
    copied: Copied
    """Also references the memory of the copies, which must not be reused before."""


class Ring:
    """At most `size` batches in flight, finished in their order."""

    def __init__(self, size: int, finish: Callable[[InFlight], None]) -> None:
        """Start empty; `finish` waits for the copies of a batch and writes its outputs."""
        self.size, self._finish = size, finish
        self._batches: deque[InFlight] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, entry: InFlight) -> None:
        """Add a batch that has been started."""
        self._batches.append(entry)

    def busy(self) -> bool:
        """Return whether the device has work left."""
        return bool(self._batches) and not self._batches[-1].copied.done()

    def make_room(self) -> None:
        """Finish the first batches, until another one may start; also all that are complete."""
        while self._batches and (len(self._batches) >= self.size or self._batches[0].copied.done()):
            self._finish_first()

    def drain(self) -> None:
        """Finish all batches."""
        while self._batches:
            self._finish_first()

    @contextmanager
    def drained_on_error(self) -> Iterator[None]:
        """Finish all batches before an error of the block, or Ctrl-C in it, is raised."""
        try:
            yield
        except BaseException:
            self.drain()
            raise

    def discard(self) -> None:
        """Wait for the copies of all batches and drop their outputs."""
        for entry in self._batches:
            with suppress(Exception):  # the error that ended the run is reported
                entry.copied.wait()
        self._batches.clear()

    def _finish_first(self) -> None:
        # Removed first, so that a batch whose finish fails is not written twice.
        entry = self._batches.popleft()
        self._finish(entry)
