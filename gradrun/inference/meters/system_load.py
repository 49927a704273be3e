"""Load on the machine by other processes during a measurement. Zero except on Linux."""

from __future__ import annotations

import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

from gradrun.results.result import SystemNoise


class SystemLoadMeter:
    """A context manager that compares the kernel's counters before and after its block."""

    def __enter__(self) -> SystemLoadMeter:
        self._before = _counters()
        return self

    def __exit__(self, *_: object) -> None:
        self._after = _counters()

    def noise(self) -> SystemNoise:
        """Return the load during the block."""
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


def waiting_threads() -> dict[str, int]:
    """Return the nanoseconds that each thread of this process could run but waited for a CPU.

    The second field of schedstat (Linux kernel documentation, "Scheduler Statistics"); empty
    except on Linux.
    """
    waits = {}
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError, ValueError, IndexError):  # the thread ended; no such statistics
            waits[task.name] = int((task / "schedstat").read_text().split()[1])
    return waits


def waited(before: dict[str, int], nanoseconds: int) -> float:
    """Return the share of a duration that the thread which waited longest was waiting."""
    longest = max((ns - before.get(task, 0) for task, ns in waiting_threads().items()), default=0)
    return longest / nanoseconds if nanoseconds else 0.0


def _counters() -> tuple[float, float, float, float, float]:
    """Return (now, busy and stolen CPU seconds of all, own CPU seconds, own preemptions)."""
    if sys.platform != "linux":
        return time.perf_counter(), 0.0, 0.0, 0.0, 0.0
    tick = 1.0 / os.sysconf("SC_CLK_TCK")
    # cpu user nice system idle iowait irq softirq steal (proc(5), /proc/stat)
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, soft, steal = (int(word) * tick for word in words)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    own = usage.ru_utime + usage.ru_stime
    return time.perf_counter(), user + nice + system + irq + soft, steal, own, usage.ru_nivcsw
