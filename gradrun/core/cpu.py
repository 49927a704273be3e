"""Number of CPUs available to this process, and of threads to use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_MAX_THREADS = 4096


def available_cpus() -> int:
    """Return the smaller of the process's CPU affinity and its cgroup quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cpus, int(quota))) if quota else cpus


def thread_count(threads: Literal["auto"] | int) -> int:
    """Return the number of threads for `run.threads`.

    "auto" is the number that OMP_NUM_THREADS or MKL_NUM_THREADS sets, else one per available CPU.
    """
    if threads != "auto":
        return threads
    variable = thread_variable()
    return _variable_count(variable) if variable else available_cpus()


def thread_variable() -> str:
    """Return the environment variable that sets the number of threads, or ""."""
    return next(filter(_variable_count, _THREAD_VARIABLES), "")


def _variable_count(name: str) -> int:
    # OMP_NUM_THREADS may have a number per nesting level.
    first = os.environ.get(name, "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and 0 < int(first) <= _MAX_THREADS else 0


def _cgroup_quota() -> float | None:
    """Return the smallest quota of this process's cgroup and its ancestors, in CPUs (v2 and v1)."""
    quotas = [
        _quota(folder / "cpu.max", None) for folder in _cgroup_folders(Path("/sys/fs/cgroup"))
    ]
    v1 = Path("/sys/fs/cgroup/cpu")
    quotas.append(_quota(v1 / "cpu.cfs_quota_us", v1 / "cpu.cfs_period_us"))
    return min((quota for quota in quotas if quota), default=None)


def _cgroup_folders(root: Path) -> list[Path]:
    """Return the folder of this process's cgroup and its ancestors, up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = root / own.lstrip("/")
    return [folder, *(above for above in folder.parents if above.is_relative_to(root))]


def _quota(quota_file: Path, period_file: Path | None) -> float | None:
    try:
        words = quota_file.read_text().split()
        if period_file:
            words += period_file.read_text().split()
        return None if words[0] in {"max", "-1"} else float(words[0]) / float(words[1])
    except (OSError, ValueError, IndexError):
        return None
