"""A run's folder: what lies in it under which name, and when it may be written.

Knows files and names; not what the figures in them mean.
"""

from __future__ import annotations

from collections.abc import Iterable
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

    def __init__(self, path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
        """Look at the folder.

        Raises:
            ConfigError: something lies there that the user did not give up, or a file of `inputs`
                would be overwritten.
        """
        self.path, self.overwrite = path, overwrite
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
        doomed = {file.resolve() for file in self._ours()}
        if eaten := [file for file in inputs if file.resolve() in doomed]:
            raise ConfigError(
                f"--overwrite would remove {eaten[0]}, which this run reads; choose another "
                "output.path",
                "output.path",
            )

    def _ours(self) -> list[Path]:
        return [file for pattern in _OURS for file in self.path.glob(pattern)]

    def begin(self) -> None:
        """Make the folder, without the files of an earlier run; what is not ours stays.

        Raises:
            RunFailed: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.overwrite:
                for file in self._ours():
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
