"""Clocks for forward passes on the host and on devices that run asynchronously."""

from __future__ import annotations

import time
from array import array
from typing import Any

import torch

_MAX_PENDING_EVENTS = 256


class Clock:
    """Times forward passes one at a time, for devices whose work ends when the call returns."""

    def __init__(self) -> None:
        self.seconds = array("d")
        """One entry per forward pass, complete after finish()."""
        self._started = 0

    def start(self) -> None:
        """Start timing a forward pass."""
        self._started = time.perf_counter_ns()

    def stop(self) -> None:
        """Stop timing it."""
        self.seconds.append((time.perf_counter_ns() - self._started) * 1e-9)

    def finish(self) -> None:
        """Wait for the device and read the pending times."""


class MpsClock(Clock):
    """The host clock with a synchronization: MPS events share no time base."""

    def stop(self) -> None:
        torch.mps.synchronize()
        super().stop()


class CudaClock(Clock):
    """CUDA events on the current stream; those of the last batches are read later, without wait."""

    def __init__(self) -> None:
        super().__init__()
        self._pairs: list[tuple[Any, Any]] = []
        self._begin: Any = None

    def start(self) -> None:
        self._begin = _record_event()

    def stop(self) -> None:
        self._pairs.append((self._begin, _record_event()))
        if len(self._pairs) >= _MAX_PENDING_EVENTS:
            self._read(_MAX_PENDING_EVENTS // 2)  # the device has passed these long ago

    def finish(self) -> None:
        self._read(len(self._pairs))

    def _read(self, count: int) -> None:
        if count:
            self._pairs[count - 1][1].synchronize()
        self.seconds.extend(begin.elapsed_time(end) * 1e-3 for begin, end in self._pairs[:count])
        del self._pairs[:count]


def _record_event() -> Any:
    event_type: Any = torch.cuda.Event  # not typed in torch
    event = event_type(enable_timing=True)
    event.record()
    return event


def clock_for(device: torch.device) -> Clock:
    """Return the clock for forward passes on `device`."""
    return {"cuda": CudaClock, "mps": MpsClock}.get(device.type, Clock)()
