"""The peak resident set of this process, with the way it was read.

Knows the operating system's counters; not which part of the process is whose.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil


def peak_resident() -> tuple[int | None, str]:
    """(bytes or None, method): the highest resident set since the process began."""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024, "VmHWM"
        except OSError:
            pass
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset), "peak working set"
    try:
        import resource
    except ImportError:
        return None, "unavailable"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "ru_maxrss"
