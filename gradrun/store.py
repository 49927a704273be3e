"""A run's folder: what lies in it under which name, who writes it, and what a resume goes on with.

Knows files and names; not what the figures in them mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gradrun import journal
from gradrun.errors import ConfigError, RunFailed
from gradrun.fingerprint import differences
from gradrun.journal import Committed, Head, Journal, Kept
from gradrun.lock import NAME as LOCK
from gradrun.lock import FolderLock, check_free
from gradrun.result import RunResult
from gradrun.units import count_text

RESULT = "result.json"
JOURNAL = "journal.jsonl"

_PART = "predictions-[0-9][0-9][0-9][0-9][0-9].safetensors"
_OURS = (
    *(RESULT, f"{RESULT}.tmp", JOURNAL, "quarantine.jsonl"),
    *("predictions.npy", "predictions.*.npy", "predictions.jsonl"),
    *(_PART, f"{_PART}.tmp", f"{_PART}.rest"),
)


class RunFolder:
    """The folder of one run; looked at when it is made, written inside `writing`."""

    def __init__(
        self,
        path: Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        inputs: Iterable[Path] = (),
    ) -> None:
        """Look at the folder.

        Raises:
            ConfigError: something lies there that the user did not give up, another process writes
                there, or a file of `inputs` would be overwritten.
        """
        self.path, self.overwrite, self.resume = path, overwrite, resume
        self.kept: Kept | None = None
        """What an earlier run has left to go on with."""
        try:
            there = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
            taken = path.exists() and (not path.is_dir() or bool(there - {LOCK}))
        except OSError as error:
            raise RunFailed(f"{path} cannot be read: {error.strerror}") from error
        if taken and not path.is_dir():
            raise ConfigError(f"{path} is a file, where a folder is wanted", "output.path")
        check_free(path)
        if taken and not overwrite:
            self._look_back(JOURNAL in there)
        doomed = {file.resolve() for file in self._ours()} if overwrite else set()
        if eaten := [file for file in inputs if file.resolve() in doomed]:
            raise ConfigError(
                f"--overwrite would remove {eaten[0]}, which this run reads; choose another "
                "output.path",
                "output.path",
            )

    def _look_back(self, has_journal: bool) -> None:
        """Find what is kept of an earlier run, or say why it cannot be gone on with."""
        kept = journal.read(self.path / JOURNAL) if has_journal else None
        if kept and self.resume:
            self.kept = kept
            return
        if kept and not kept.complete:
            raise ConfigError(
                f"{self.path} holds an unfinished run ({kept.stop:,} of "
                f"{count_text(kept.head.samples, 'sample')}); --resume goes on with it, "
                "--overwrite begins anew",
                "output.path",
            )
        raise ConfigError(
            f"{self.path} exists already; --overwrite replaces the run in it, and another "
            "output.path keeps both",
            "output.path",
        )

    def finished(self) -> RunResult | None:
        """The result of the earlier run, where that came to its end."""
        if self.kept and self.kept.complete and (self.path / RESULT).exists():
            return RunResult.load(self.path)
        return None

    def check_same(self, head: Head) -> None:
        """See that a resume would go on with the same run.

        Raises:
            ConfigError: it would not; says what differs.
        """
        if self.kept is None:
            return
        if found := differences(self.kept.head, head):
            raise ConfigError(
                f"{self.path} cannot be resumed, because this is another run: {'; '.join(found)}. "
                "Put that back as it was, or begin anew with --overwrite",
                "output.path",
            )

    def _ours(self) -> list[Path]:
        return [file for pattern in _OURS for file in self.path.glob(pattern)]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make the folder and hold it; files of an earlier run are removed unless it goes on.

        What is not ours stays.

        Raises:
            ConfigError: another process holds it.
            RunFailed: it cannot be written.
        """
        lock = FolderLock(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.take()
            if self.kept is None:
                for file in self._ours():
                    file.unlink()
        except OSError as error:
            lock.release()
            raise RunFailed(f"{self.path} cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def journal(self, head: Head, batch_size: int) -> tuple[Journal, list[Committed]]:
        """The journal, open, and what it tells of an earlier run; only inside `writing`.

        Raises:
            OSError: it cannot be written.
        """
        kept = None
        if self.kept:
            # Read again, now that nobody else can write.
            kept = journal.read(self.path / JOURNAL).without_part_of_a_batch(batch_size)
        return Journal(self.path / JOURNAL, head, kept), kept.commits if kept else []

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
