"""The peak resident set of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_resident() -> tuple[int, str]:
    """Return the peak resident set since the process started, in bytes, and the method used."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, "VmHWM"
    except OSError:  # not Linux
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "ru_maxrss"
