"""`gradrun.verify`: a run's folder against its journal.

Knows where the journal lies; how files are read back stands in readback.py. Needs no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradrun.core.errors import ConfigError
from gradrun.output import journal
from gradrun.output.readback import faults
from gradrun.output.run_folder import JOURNAL
from gradrun.results.result import DamagedRange


@dataclass(frozen=True)
class Verification:
    """What a folder holds of its run."""

    folder: Path
    samples: int
    """That the run is of."""
    committed: int
    """That the journal says are there."""
    ranges: int
    faults: tuple[DamagedRange, ...]
    torn: bool
    """Whether the journal's last line was cut off."""

    @property
    def complete(self) -> bool:
        """Whether every sample of the run is there, as it was written."""
        return not self.faults and self.committed == self.samples

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"folder": str(self.folder), "complete": self.complete}


def verify(folder: str | Path) -> Verification:
    """Read back everything that a run's journal says is in its files.

    Raises:
        ConfigError: there is no journal.
        GradrunError: the journal cannot be read, or is damaged.
    """
    folder = Path(folder)
    if not (folder / JOURNAL).is_file():
        raise ConfigError(f"{folder} holds no {JOURNAL}, so no run of gradrun infer to verify")
    kept = journal.read(folder / JOURNAL)
    return Verification(
        folder=folder,
        samples=kept.head.samples,
        committed=kept.stop,
        ranges=len(kept.commits),
        faults=tuple(faults(folder, kept)),
        torn=kept.torn,
    )
