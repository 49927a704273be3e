"""Clocks for the forward pass: of the processor, or of the device that runs it behind our back.

Knows start, stop and seconds; not what ran between them.
"""

from __future__ import annotations

import time
from array import array
from typing import Any, Protocol

import torch

_HELD_EVENTS = 256


class Clock(Protocol):
    """Times one forward after the other."""

    seconds: array[float]
    """One entry a forward, complete after finish()."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def finish(self) -> None:
        """Wait for what still runs on the device and read its times."""


class HostClock:
    """time.perf_counter_ns, for work that is done when the call returns."""

    def __init__(self) -> None:
        self.seconds = array("d")
        self._started = 0

    def start(self) -> None:
        self._started = time.perf_counter_ns()

    def stop(self) -> None:
        self.seconds.append((time.perf_counter_ns() - self._started) * 1e-9)

    def finish(self) -> None:
        """Nothing runs on."""


class MpsClock(HostClock):
    """The host's clock around work that is waited for: MPS has no events with a common base."""

    def stop(self) -> None:
        torch.mps.synchronize()
        super().stop()


class CudaClock:
    """CUDA events on the current stream, read in groups so that the host seldom waits for them."""

    def __init__(self) -> None:
        self.seconds = array("d")
        self._pairs: list[tuple[Any, Any]] = []
        self._begin: Any = None

    def start(self) -> None:
        timed_event: Any = torch.cuda.Event  # torch leaves it without types
        self._begin = timed_event(enable_timing=True)
        self._begin.record()

    def stop(self) -> None:
        timed_event: Any = torch.cuda.Event
        end = timed_event(enable_timing=True)
        end.record()
        self._pairs.append((self._begin, end))
        if len(self._pairs) >= _HELD_EVENTS:
            self.finish()

    def finish(self) -> None:
        if self._pairs:
            self._pairs[-1][1].synchronize()
        self.seconds.extend(begin.elapsed_time(end) * 1e-3 for begin, end in self._pairs)
        self._pairs.clear()


def clock_for(device: torch.device) -> Clock:
    """The clock that tells the truth about forwards on `device`."""
    clocks: dict[str, type[Clock]] = {"cuda": CudaClock, "mps": MpsClock}
    return clocks.get(device.type, HostClock)()
