"""Decide which worker runs which samples, what is repeated after a loss, and in which order.

Pure logic without processes, clocks or tensors: events come in, assignments go out.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_QUEUED = 2
"""Ranges per worker: one that it runs and one that waits, so that it never idles."""

RANGES_AHEAD = 4
"""Ranges of full size per worker between the first unwritten sample and the last assigned one."""

_LEAST_PART = 50
"""The shortest span is this part of a full one; handling a span costs a few milliseconds."""


@dataclass(frozen=True, order=True)
class Span:
    """Samples start to stop, in the order in which they are run."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.stop - self.start


class Schedule:
    """The samples of a run, divided into spans that workers run and the driver writes in order.

    A span whose worker dies is repeated. After a second death it is divided, first into units,
    then into batches, then into single samples; a sample that ends two workers is `poisonous`.
    """

    def __init__(
        self, start: int, stop: int, *, unit: int, batch_size: int, workers: int = 1
    ) -> None:
        """Plan samples start to stop.

        Args:
            start: a multiple of `unit`.
            unit: samples after which a span may end; a multiple of the batch size.
            workers: those that are expected; the first one that is ready leaves samples for
                the others.
        """
        self.written, self.stop = start, stop
        self.unit, self.batch_size, self.workers = unit, batch_size, workers
        self._fresh = start
        self._open: set[Span] = set()
        """Spans that are assigned or wait to be repeated, and have no result."""
        self._retries: list[Span] = []
        self._sizes: dict[int, int] = {}
        """Samples of a span of full size, by worker."""
        self._running: dict[int, list[Span]] = {}
        """Spans of each worker, in the order in which it runs them."""
        self._finished: dict[int, Span] = {}
        """Spans with a result, by first sample, until the samples before them are written."""
        self._deaths: Counter[Span] = Counter()
        self.repeated: Counter[int] = Counter()
        """Spans of each worker that another one had before."""

    # --- state ---------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all samples are written."""
        return self.written >= self.stop

    @property
    def unassigned(self) -> bool:
        """Whether some samples have no worker."""
        return bool(self._retries) or self._fresh < self.stop

    def running(self, worker: int) -> list[Span]:
        """Return the spans of a worker; it runs the first one."""
        return list(self._running.get(worker, ()))

    # --- events --------------------------------------------------------------------------------

    def add_worker(self, worker: int) -> None:
        """Add a worker that can run spans."""
        self._running[worker] = []

    def assign(self, worker: int, size: int = 1) -> Span | None:
        """Return the next span for a worker, or None if it should wait.

        Args:
            size: samples of a new span, which has whole units, and at least one.
        """
        mine = self._running[worker]
        if len(mine) >= _QUEUED:
            return None
        self._sizes[worker] = max(size, self.unit)
        begin = self._fresh
        span = self._next_retry() or self._next_fresh(size)
        if span is None and not mine:
            span = self._span_of_another()
        if span:
            mine.append(span)
            self.repeated[worker] += span.start < begin
        return span

    def complete(self, worker: int, span: Span) -> bool:
        """Record the result of a span; return whether it is the first one and is needed."""
        mine = self._running.get(worker, [])
        if span in mine:
            mine.remove(span)
        if span not in self._open:
            return False
        self._finish(span)
        return True

    def lose_worker(self, worker: int) -> list[Span]:
        """Remove a worker that died, and repeat its spans.

        Returns:
            The single sample that ended its second worker, as a span, if there is one. It counts
            as finished, without a result.
        """
        spans = self._running.pop(worker, [])
        self._sizes.pop(worker, None)
        poisonous: list[Span] = []
        for number, span in enumerate(spans):
            if span not in self._open:
                continue
            # Only the first one ran; the others waited.
            self._deaths[span] += number == 0
            elsewhere = any(span in others for others in self._running.values())
            if self._deaths[span] >= 2:
                poisonous += self._divide(span)
            elif not elsewhere:
                heapq.heappush(self._retries, span)
        return poisonous

    def end_at(self, span: Span) -> None:
        """Plan nothing after a span whose result ends the run."""
        self.stop = min(self.stop, span.stop)

    def release(self) -> Iterator[Span]:
        """Yield the finished spans that come next in the input, each once."""
        while span := self._finished.pop(self.written, None):
            self.written = span.stop
            yield span

    # --- spans ---------------------------------------------------------------------------------

    def _next_retry(self) -> Span | None:
        while self._retries:
            span = heapq.heappop(self._retries)
            if span in self._open and span.start < self.stop:
                return span
        return None

    def _next_fresh(self, size: int) -> Span | None:
        workers = max(self.workers, len(self._running))
        ahead = self._fresh - self.written
        if self._fresh >= self.stop or ahead >= RANGES_AHEAD * workers * max(self._sizes.values()):
            return None
        # Shorter spans towards the end, so that all workers finish at about the same time.
        share = max((self.stop - self._fresh) // (2 * workers), size // _LEAST_PART)
        units = max(1, min(size, share) // self.unit)
        span = Span(self._fresh, min(self._fresh + units * self.unit, self.stop))
        self._fresh = span.stop
        self._open.add(span)
        return span

    def _span_of_another(self) -> Span | None:
        """Return a span of one other worker for an idle worker; the first result counts.

        One that only waits comes before one that runs.
        """
        copies = Counter(span for spans in self._running.values() for span in spans)
        running = {spans[0] for spans in self._running.values() if spans}
        candidates = [s for s in self._open if copies[s] == 1 and not self._deaths[s]]
        return min(candidates, key=lambda span: (span in running, span), default=None)

    def _finish(self, span: Span) -> None:
        self._open.discard(span)
        self._finished[span.start] = span

    def _divide(self, span: Span) -> list[Span]:
        """Divide a span that ended two workers; return it if it is a single sample."""
        if span.size == 1:
            self._finish(span)
            return [span]
        size = next(size for size in (self.unit, self.batch_size, 1) if size < span.size)
        self._open.discard(span)
        for start in range(span.start, span.stop, size):
            part = Span(start, min(start + size, span.stop))
            self._open.add(part)
            heapq.heappush(self._retries, part)
        return []
