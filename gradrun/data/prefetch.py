"""Read the next batches in a thread while the model runs, if that saves time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from gradrun.core.errors import GradrunError
from gradrun.data.batch import Batch
from gradrun.data.source import BatchSource

MIN_SECONDS = 0.001
"""Passing a batch between threads costs about a tenth of this."""

_TRIAL_SECONDS = 0.05
_TRIAL_BATCHES = 4096
_BATCHES_AHEAD = 2


def should_prefetch(data: BatchSource, forward_seconds: float) -> bool:
    """Return whether reading a batch and its forward pass both take at least MIN_SECONDS.

    Data of unknown length are read in one thread, because they are read once; so are those that
    run the user's code.
    """
    once = data.samples is None or data.main_thread_only
    if forward_seconds < MIN_SECONDS or once:
        return False
    start = time.perf_counter()
    count = 0
    with suppress(GradrunError):  # the run itself reports broken data
        for count, _ in enumerate(data.batches(), 1):
            if count >= _TRIAL_BATCHES or time.perf_counter() - start > _TRIAL_SECONDS:
                break
    return count > 0 and (time.perf_counter() - start) / count >= MIN_SECONDS


def prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the same batches in order, read by a thread that keeps two of them ready.

    Errors from reading are raised here, after the batches before them. Closing ends the thread.
    """
    pool = ThreadPoolExecutor(1, "gradrun-prefetch")
    try:
        ahead = deque(pool.submit(next, batches, None) for _ in range(1 + _BATCHES_AHEAD))
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, batches, None))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
