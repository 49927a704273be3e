"""A run's folder: what lies in it under which name, and when it may be written.

Knows files and names; not what the figures in them mean.
"""

from __future__ import annotations

from pathlib import Path

from gradrun.errors import ConfigError, RunFailed
from gradrun.result import RunResult

RESULT = "result.json"
JOURNAL = "journal.jsonl"
"""The name kept for the journal of committed ranges, which a later resume reads."""

_PART = "predictions-[0-9][0-9][0-9][0-9][0-9].safetensors"
_OURS = (
    *(RESULT, f"{RESULT}.tmp", JOURNAL, "quarantine.jsonl"),
    *("predictions.npy", "predictions.*.npy", "predictions.jsonl", _PART, f"{_PART}.tmp"),
)


class RunFolder:
    """The folder of one run; looked at when it is made, written from begin() on."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        """Raises ConfigError where something lies there that the user did not give up."""
        self.path = path
        try:
            taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        except OSError as error:
            raise RunFailed(f"{path} cannot be read: {error.strerror}") from error
        if taken and not path.is_dir():
            raise ConfigError(f"{path} is a file, where a folder is wanted", "output.path")
        if taken and not overwrite:
            raise ConfigError(
                f"{path} exists already; --overwrite replaces the run in it, and another "
                "output.path keeps both",
                "output.path",
            )

    def begin(self) -> None:
        """Make the folder, without the files of an earlier run; what is not ours stays.

        Raises:
            RunFailed: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for pattern in _OURS:
                for file in self.path.glob(pattern):
                    file.unlink()
        except OSError as error:
            raise RunFailed(f"{self.path} cannot be written: {error.strerror}") from error

    def save(self, result: RunResult) -> None:
        """Write result.json.

        Raises:
            RunFailed: it cannot be written; the predictions are not touched.
        """
        try:
            result.save(self.path / RESULT)
        except OSError as error:
            text = f"{self.path / RESULT} cannot be written: {error.strerror}"
            raise RunFailed(text) from error
