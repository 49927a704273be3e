"""How much of the machine others took while we measured.

Knows the kernel's counters (Linux; elsewhere it sees nothing); not what was measured.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradrun.results.result import SystemNoise


class Watch:
    """The counters at the start; `found` compares them with the counters when it ended."""

    def __init__(self) -> None:
        self._before = _counters()
        self._after = self._before

    def stop(self) -> None:
        """Read the counters for the last time."""
        self._after = _counters()

    def found(self) -> SystemNoise:
        """What happened between start and stop."""
        seconds, busy, steal, own, switches = (
            after - before for before, after in zip(self._before, self._after, strict=True)
        )
        if seconds <= 0:
            return SystemNoise()
        return SystemNoise(
            steal=steal / seconds / (os.cpu_count() or 1),
            others=max(0.0, busy - own) / seconds,
            preemptions=switches / seconds,
        )


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch the machine during the block."""
    watch = Watch()
    try:
        yield watch
    finally:
        watch.stop()


def _counters() -> tuple[float, float, float, float, float]:
    """(now, busy and stolen processor seconds of all, ours, involuntary switches of ours)."""
    if sys.platform != "linux":
        return time.perf_counter(), 0.0, 0.0, 0.0, 0.0
    import resource

    tick = 1.0 / os.sysconf("SC_CLK_TCK")
    # cpu user nice system idle iowait irq softirq steal (proc(5), /proc/stat)
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, soft, steal = (int(word) * tick for word in words)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    own = usage.ru_utime + usage.ru_stime
    return time.perf_counter(), user + nice + system + irq + soft, steal, own, usage.ru_nivcsw
