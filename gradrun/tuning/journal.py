"""The journal of a tuning: the settings that were tried, that another run continues."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch

from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, RunFailed
from gradrun.core.files import replace_file
from gradrun.core.options import option
from gradrun.core.record import Record
from gradrun.core.version import __version__
from gradrun.inference.environment import cpu_model
from gradrun.results.trials import Trial

FILE_NAME = "tune-journal.json"

_BUDGET = {"budget", "samples", "steady"}
"""Keys of the section `tune` that a second run may change: they change no output."""


class Origin(Record, frozen=True, kw_only=True):
    """What a tuning depends on; a second run must have the same."""

    config: str
    """SHA-256 of the config without its budget."""
    gradrun: str
    torch: str
    cpu: str


class _Content(Record, frozen=True, kw_only=True):
    origin: Origin
    trials: dict[str, Trial]


class TuneJournal:
    """The file with all trials by the identity of their configs; replaced after each trial."""

    def __init__(self, folder: Path, base: RunConfig, *, resume: bool = False) -> None:
        """Open the journal; with `resume`, read the trials of an earlier run, if there is one.

        Raises:
            ConfigError: the earlier run is of another config or machine, or cannot be read.
        """
        self.path, self._origin = folder / FILE_NAME, _origin(base)
        self.known: dict[str, Trial] = self._read() if resume and self.path.exists() else {}
        """Trials of the earlier run; empty without one."""

    def _read(self) -> dict[str, Trial]:
        try:
            content = msgspec.json.decode(self.path.read_bytes(), type=_Content)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{self.path} cannot be read: {error}") from error
        for name, before in content.origin.as_dict().items():
            if before != getattr(self._origin, name):
                raise ConfigError(
                    f"cannot continue the tuning in {self.path.parent}: {name} changed since. "
                    f"Start over without {option('resume')}"
                )
        return content.trials

    def write(self, trials: Mapping[str, Trial]) -> None:
        """Save the trials so far.

        Raises:
            RunFailed: the folder cannot be written.
        """
        content = _Content(origin=self._origin, trials=self.known | dict(trials))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, msgspec.json.encode(content))
        except OSError as error:
            raise RunFailed(f"{self.path} cannot be written: {error.strerror}") from error


def _origin(base: RunConfig) -> Origin:
    dumped = base.model_dump_json(exclude={"tune": _BUDGET})
    return Origin(
        config=hashlib.sha256(dumped.encode()).hexdigest(),
        gradrun=__version__,
        torch=str(torch.__version__),
        cpu=cpu_model(),
    )
