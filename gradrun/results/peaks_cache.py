"""The measured peaks of a machine, cached per machine and version of torch.

The cache is the folder `GRADRUN_CACHE`, else `gradrun` in `XDG_CACHE_HOME` or in `~/.cache`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from gradrun.core.files import cache_folder, replace_file
from gradrun.core.record import Record
from gradrun.results.bounds import Count
from gradrun.results.work import MachinePeaks

_MAX_BYTES = 2**20


class Machine(Record, frozen=True, kw_only=True):
    """The properties on which peaks depend."""

    cpu: str
    cores: Count
    cpus: Count
    """Available to the process."""
    instructions: str
    """The instruction set that torch uses."""
    torch: str
    device: str
    """Device type, with the name of an accelerator."""

    @property
    def fingerprint(self) -> str:
        """A short name of the machine, which contains no text of it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


class CachedPeaks(Record, frozen=True, kw_only=True):
    """The content of a cache file: peaks per number of threads."""

    format: Literal[1] = 1
    machine: Machine
    peaks: tuple[MachinePeaks, ...]
    notes: tuple[str, ...] = ()
    """Why peaks may be too low, or were not kept."""


def cache_path(machine: Machine) -> Path:
    """Return the file with the peaks of a machine."""
    return cache_folder() / f"peaks-{machine.fingerprint}.json"


def load_peaks(machine: Machine) -> tuple[MachinePeaks, ...]:
    """Return the cached peaks of a machine; () if there are none, or the file is damaged."""
    path = cache_path(machine)
    try:
        if path.stat().st_size > _MAX_BYTES:
            return ()
        cached = CachedPeaks.from_json(path.read_bytes())
    except (OSError, ValueError):
        return ()
    return cached.peaks if cached.machine == machine else ()


def cached_peaks(machine: Machine, threads: int) -> MachinePeaks | None:
    """Return the cached peaks for a number of threads."""
    return next((peaks for peaks in load_peaks(machine) if peaks.threads == threads), None)


def save_peaks(machine: Machine, peaks: MachinePeaks) -> bool:
    """Replace the peaks for their number of threads; return whether they could be written."""
    others = [known for known in load_peaks(machine) if known.threads != peaks.threads]
    ordered = sorted([*others, peaks], key=lambda known: known.threads)
    path = cache_path(machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, CachedPeaks(machine=machine, peaks=tuple(ordered)).to_json() + "\n")
    except OSError:
        return False
    return True
