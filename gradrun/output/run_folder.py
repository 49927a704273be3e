"""A run's folder: what lies in it under which name, who writes it, and what a resume goes on with.

Knows files and names; not what the figures in them mean.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from gradrun.core.errors import ConfigError, GradrunError, RunFailed
from gradrun.core.units import format_bytes, pluralize
from gradrun.output import journal, readback
from gradrun.output.fingerprint import differences
from gradrun.output.journal import CommittedRange, Journal, JournalHeader, JournalState
from gradrun.output.lock import NAME as LOCK
from gradrun.output.lock import FolderLock, check_free
from gradrun.results.result import InferResult, RunResult

RESULT = "result.json"
JOURNAL = "journal.jsonl"
CHECKED = ".gradrun.check"
"""In the folder of a check, from its beginning on."""

_BEGINNING = {LOCK, journal.draft(Path(JOURNAL)).name}
"""What a process leaves behind that died before its run had begun."""

_PARTS = [f"predictions-{'[0-9]' * 5}.{suffix}" for suffix in ("safetensors", "parquet")]
_OURS = (
    *(RESULT, f"{RESULT}.tmp", "quarantine.jsonl", "quarantine.jsonl.tmp"),
    *("predictions.npy", "predictions.*.npy", "predictions.jsonl", "predictions.csv"),
    *(f"{part}{ending}" for part in _PARTS for ending in ("", ".tmp", ".rest")),
    *(f"{JOURNAL}.tmp", JOURNAL),  # last: it says whose the others are
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
        check_free(path)
        self.kept = self._look()
        """What an earlier run has left to go on with."""
        doomed = {file.resolve() for file in self._ours()} if overwrite else set()
        if eaten := [file for file in inputs if file.resolve() in doomed]:
            raise ConfigError(
                f"--overwrite would remove {eaten[0]}, which this run reads; choose another "
                "output.path",
                "output.path",
            )

    def _check_plain(self) -> None:
        """Refuse a folder where a name of ours is a link or a pipe: what it leads to is not ours.

        Raises:
            ConfigError: something lies there that no run has made.
        """
        for file in (self.path / LOCK, *self._ours()):
            if file.is_symlink() or (file.exists() and not file.is_file()):
                kind = "a link" if file.is_symlink() else "a folder" if file.is_dir() else "a pipe"
                raise ConfigError(
                    f"{file} is {kind}, which no run has made and none writes to; remove it, or "
                    "choose another output.path",
                    "output.path",
                )

    def _look(self) -> JournalState | None:
        """Find what is kept of an earlier run, or say why it cannot be gone on with."""
        path = self.path
        try:
            if path.exists() and not path.is_dir():
                raise ConfigError(f"{path} is a file, where a folder is wanted", "output.path")
            self._check_plain()
            there = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        except OSError as error:
            raise RunFailed(f"{path} cannot be read: {error.strerror}") from error
        there -= _BEGINNING
        if self.resume:  # what is not ours stays, so it is no reason not to begin
            there &= {file.name for file in self._ours()}
        if self.overwrite or not there:
            return None
        kept = journal.read(path / JOURNAL) if JOURNAL in there else None
        if kept and self.resume:
            return kept
        if kept and not (kept.complete and RESULT in there):
            raise ConfigError(
                f"{path} holds an unfinished run ({kept.stop:,} of "
                f"{pluralize(kept.head.samples, 'sample')}); --resume goes on with it, "
                "--overwrite begins anew",
                "output.path",
            )
        raise ConfigError(
            f"{path} exists already; --overwrite replaces the run in it, and another "
            "output.path keeps both",
            "output.path",
        )

    def finished(self) -> InferResult | None:
        """The result of the earlier run, where that came to its end.

        Raises:
            GradrunError: it cannot be read.
        """
        if not (self.kept and self.kept.complete and (self.path / RESULT).exists()):
            return None
        try:
            result = RunResult.load(self.path)
        except GradrunError as error:
            text = f"{error}; the predictions are whole: remove that file, and --resume writes it"
            raise GradrunError(text) from error
        if damaged := next(readback.faults(self.path, self.kept), None):
            raise GradrunError(
                f"{self.path / damaged.file} is not what this finished run wrote ({damaged.what}); "
                "--overwrite makes it anew, and gradrun verify tells what is left"
            )
        # It tells of fewer where a resume was killed between its last commit and its result.
        if not isinstance(result, InferResult):
            return None
        whole = result.predictions == self.kept.head.samples
        return result if whole else None

    def check_same(self, head: JournalHeader) -> None:
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
        # By name alone: a glob does not see a link to nowhere, and writing through it makes a file.
        there = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [file for pattern in _OURS for file in there if fnmatchcase(file.name, pattern)]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it.

        Raises:
            ConfigError: another process holds it, or has run in it since it was looked at.
            RunFailed: it cannot be written.
        """
        with _held(FolderLock(self.path)):
            self.kept = self._look()
            yield

    def journal(self, head: JournalHeader, batch_size: int) -> tuple[Journal, list[CommittedRange]]:
        """The journal, open, and what it tells of an earlier run; only inside `writing`.

        Where there is nothing to go on with, files of an earlier run are removed. What is not ours
        stays.

        Raises:
            ConfigError: the earlier run is another one.
            OSError: it cannot be written.
        """
        self.check_same(head)
        kept = self.kept.without_part_of_a_batch(batch_size) if self.kept else None
        if kept and kept.commits:
            return Journal(self.path / JOURNAL, head, kept), kept.commits
        # First, and in one step: from here on the files of another run count for nothing.
        begun = Journal(self.path / JOURNAL, head)
        try:
            self.clear(begun.path)
        except BaseException:
            begun.close()
            raise
        return begun, []

    def clear(self, but: Path | None = None) -> None:
        """Remove the files of a run, or all but one; only inside `writing`.

        Raises:
            OSError: one of them cannot be removed.
        """
        for file in self._ours():
            if file != but:
                file.unlink(missing_ok=True)

    def disk_space_hint(self, kept: int, samples: int) -> str:
        """How much of the disk the rest of a run wants, as what is kept of it tells, in words."""
        free = format_bytes(shutil.disk_usage(self.path).free)
        held = sum(file.stat().st_size for file in self.path.glob("predictions*"))
        if not kept:
            return f"{free} are free"
        left = format_bytes(held * (samples - kept) // kept)
        return f"{free} are free, and about {left} more are wanted"

    def save(self, result: RunResult) -> None:
        """Write result.json.

        Raises:
            RunFailed: it cannot be written; the predictions are not touched.
        """
        try:
            result.save(self.path / RESULT)
        except OSError as error:
            text = f"{self.path / RESULT} cannot be written: {error.strerror}"
            raise RunFailed(text, resumable=True) from error


@contextmanager
def checking(folder: Path) -> Iterator[None]:
    """Hold the folder of a check over all of its runs, and mark it as one.

    Raises:
        ConfigError: another check holds it, or what lies there is no check's.
        RunFailed: it cannot be written.
    """
    _see_whose(folder)
    with _held(FolderLock(folder, CHECKED, stays=True)):
        yield


def _see_whose(folder: Path) -> None:
    """Refuse a folder whose result another command has written."""
    # A check that was ended early leaves its infer's result, or none.
    if (folder / CHECKED).exists() or not (folder / RESULT).exists():
        return
    with suppress(GradrunError):
        if RunResult.load(folder).kind == "check":
            return
    raise ConfigError(
        f"{folder} holds a run that is no check's, and a check would overwrite it; choose another "
        "output.path",
        "output.path",
    )


@contextmanager
def _held(lock: FolderLock) -> Iterator[None]:
    folder = lock.path.parent
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.take()
        except OSError as error:
            raise RunFailed(f"{folder} cannot be written: {error.strerror}") from error
        yield
    finally:
        lock.release()
