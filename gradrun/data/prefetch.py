"""Reading the next batches in a thread while the model works on this one, where that pays.

Knows iterators of batches and times; not what is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

from gradrun.core.errors import GradrunError
from gradrun.data.batch import Batch
from gradrun.data.source import BatchSource

WORTH_SECONDS = 0.001
"""Handing a batch from thread to thread costs about a tenth of this; less is not worth it."""

_TRIAL_SECONDS = 0.05
_TRIAL_BATCHES = 4096
_DEPTH = 2
_PATIENCE = 0.05


def should_prefetch(data: BatchSource, forward_seconds: float) -> bool:
    """Whether reading beside the forward saves more than threads cost: both must take a while."""
    if forward_seconds < WORTH_SECONDS:
        return False
    began = time.perf_counter()
    read = 0
    with suppress(GradrunError):  # data that is broken further on is found by the run itself
        for read, _ in enumerate(data.batches(), 1):
            if read >= _TRIAL_BATCHES or time.perf_counter() - began > _TRIAL_SECONDS:
                break
    return read > 0 and (time.perf_counter() - began) / read >= WORTH_SECONDS


def prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, in order, read by a thread that keeps two of them ready.

    What reading raises is raised here, after the batches before it; closing ends the thread.
    """
    ready: Queue[Any] = Queue(maxsize=_DEPTH)
    closed = Event()

    def hand_over(item: Any) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=_PATIENCE)
                return
            except Full:
                continue

    def read() -> None:
        try:
            for batch in batches:
                hand_over(batch)
                if closed.is_set():
                    return
            hand_over(None)
        except BaseException as error:  # it belongs to whoever asks for the next batch
            hand_over(error)

    thread = Thread(target=read, name="gradrun-read-ahead", daemon=True)
    thread.start()
    try:
        while (item := _next(ready)) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()


def _next(ready: Queue[Any]) -> Any:
    """The next item; waits in short steps so that Ctrl-C is heard on every system."""
    while True:
        try:
            return ready.get(timeout=1.0)
        except Empty:
            continue
