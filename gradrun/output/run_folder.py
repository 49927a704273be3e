"""Layout of a run folder: the files of a run, its lock, and the state that a resume continues."""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gradrun.core.errors import ConfigError, GradrunError, RunFailed
from gradrun.core.options import option
from gradrun.core.remote import is_remote
from gradrun.core.units import count_of, format_bytes
from gradrun.output import class_labels, evidence_writer, journal, lock, quarantine
from gradrun.output.fingerprint import differences
from gradrun.output.formats import FORMATS, ids_file
from gradrun.output.journal import (
    CommittedRange,
    InputChecksum,
    Journal,
    JournalHeader,
    JournalState,
    no_checksum,
)
from gradrun.output.lock import FolderLock, check_unlocked
from gradrun.output.verification import damaged_ranges
from gradrun.results.result import InferResult, RunResult

RESULT = "result.json"
CHECK_LOCK = ".gradrun.check"
"""Marks the folder of a check, from its start on."""

_STARTUP_FILES = {lock.FILE_NAME, journal.DRAFT_NAME}
"""Left by a process that died before its run started."""

_ENDINGS = ("", ".tmp", ".rest")
_RUN_FILES = (
    *(RESULT, f"{RESULT}.tmp", quarantine.FILE_NAME, f"{quarantine.FILE_NAME}.tmp"),
    *(f"{file}{end}" for form in FORMATS.values() for file in form.files for end in _ENDINGS),
    *(ids_file.FILE_NAME, class_labels.FILE_NAME, f"{class_labels.FILE_NAME}.tmp"),
    evidence_writer.FILES,
)
"""Patterns of a run's files; .rest files come from journal format 1."""

_JOURNAL = (journal.DRAFT_NAME, journal.FILE_NAME)
"""Removed last, because it identifies the others."""

_RUN_FILE = re.compile("|".join(map(fnmatch.translate, (*_RUN_FILES, *_JOURNAL))))


def is_run_file(name: str) -> bool:
    """Return whether a path below a folder is a name of a run's files."""
    return _RUN_FILE.fullmatch(name) is not None


def check_local(path: Path) -> None:
    """Check that an output folder is not in an object store, to which only `infer` writes.

    Raises:
        ConfigError: it is.
    """
    if is_remote(path):
        text = f"this command cannot write to {path}; set output.path to a local folder"
        raise ConfigError(text, "output.path")


def removes_input(file: Path) -> ConfigError:
    """Return the error for an overwrite that would remove an input file of the run."""
    return ConfigError(
        f"{option('overwrite')} would remove {file}, which is an input of this run; choose another "
        "output.path",
        "output.path",
    )


class RunFolder:
    """The folder of one run, inspected at construction and written inside `locked`."""

    def __init__(
        self,
        path: Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        inputs: Iterable[Path] = (),
    ) -> None:
        """Inspect the folder.

        Raises:
            ConfigError: the folder is in use, may not be overwritten or cannot be resumed, or an
                overwrite would remove one of `inputs`.
        """
        check_local(path)
        self.path, self.overwrite, self.resume = path, overwrite, resume
        check_unlocked(path)
        self.previous = self._inspect()
        """Journal of the earlier run to resume, if any."""
        files = self._run_files() if overwrite else []
        # With a folder of inputs, such as the images that format: files has written.
        folders = {file.parent for file in files} - {path}
        removed = {file.resolve() for file in (*files, *folders)}
        if needed := [file for file in inputs if file.resolve() in removed]:
            raise removes_input(needed[0])

    def _check_regular(self) -> None:
        """Refuse links and pipes in place of a run's files, which lead out of the folder."""
        folder = self.path / journal.SUBFOLDER
        if folder.is_symlink():
            raise ConfigError(
                f"{folder} is a link, not a folder; remove it, or choose another output.path",
                "output.path",
            )
        for file in (self.path / lock.FILE_NAME, *self._run_files()):
            if file.is_symlink() or (file.exists() and not file.is_file()):
                kind = "a link" if file.is_symlink() else "a folder" if file.is_dir() else "a pipe"
                raise ConfigError(
                    f"{file} is {kind}, not a regular file; remove it, or choose another "
                    "output.path",
                    "output.path",
                )

    def _inspect(self) -> JournalState | None:
        """Read the journal of an earlier run; raises if this run cannot use the folder."""
        path = self.path
        try:
            if path.exists() and not path.is_dir():
                raise ConfigError(f"{path} is a file, not a folder", "output.path")
            self._check_regular()
            names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        except OSError as error:
            raise RunFailed(f"{path} cannot be read: {error.strerror}") from error
        names -= _STARTUP_FILES
        if self.resume:  # files of other programs do not prevent a resume
            names &= {file.name for file in self._run_files()}
        if self.overwrite or not names:
            return None
        state = journal.read(path / journal.FILE_NAME) if journal.FILE_NAME in names else None
        unfinished = state and not (state.complete and RESULT in names)
        if state and (self.resume or unfinished) and state.header.journal != journal.FORMAT:
            raise ConfigError(
                f"{path} has a run of an earlier version of gradrun (journal format "
                f"{state.header.journal}), which this version cannot resume; choose another "
                f"output.path, or start over with {option('overwrite')}",
                "output.path",
            )
        if state and self.resume:
            return state
        if state and unfinished:
            raise ConfigError(
                f"{path} has an unfinished run ({count_of(state.committed, state.samples)}); "
                f"use {option('resume')} to continue it, or {option('overwrite')} to replace it",
                "output.path",
            )
        raise ConfigError(
            f"output folder {path} already exists; use {option('overwrite')} to replace it, or "
            "choose another output.path",
            "output.path",
        )

    def finished_result(self) -> InferResult | None:
        """The result of the earlier run, if it is complete.

        Raises:
            GradrunError: the result cannot be read, or predictions are damaged.
        """
        if not (self.previous and self.previous.complete and (self.path / RESULT).exists()):
            return None
        try:
            result = RunResult.load(self.path)
        except GradrunError as error:
            raise GradrunError(
                f"{error}; the predictions are complete: remove this file, and "
                f"{option('resume')} writes it again"
            ) from error
        if damaged := next(damaged_ranges(self.path, self.previous), None):
            raise GradrunError(
                f"{self.path / damaged.file} changed after the run finished ({damaged.problem}); "
                f"list the damage with gradrun verify, or start over with {option('overwrite')}"
            )
        # The result has fewer if a resume was killed between its last commit and its result.
        if not isinstance(result, InferResult):
            return None
        return result if result.predictions == self.previous.samples else None

    def check_resumable(
        self, header: JournalHeader, input_checksum: InputChecksum = no_checksum
    ) -> None:
        """Check that the earlier run, if any, is the same as this one, which `header` identifies.

        Raises:
            ConfigError: it is not; the message lists the differences.
        """
        if self.previous is None:
            return
        changes = differences(self.previous.header, header)
        last = self.previous.ranges[-1] if self.previous.ranges else None
        if last and not changes and last.input != input_checksum(last.stop):
            changes = [
                f"the data changed in the first {last.stop:,} samples, which are predicted or "
                "quarantined already (samples after them may change)"
            ]
        if changes:
            raise ConfigError(
                f"cannot resume {self.path}: since the run started, {'; '.join(changes)}. Undo the "
                f"change, or start over with {option('overwrite')}",
                "output.path",
            )

    def _run_files(self) -> list[Path]:
        # iterdir, because glob omits broken links, and a write through one creates a file.
        folders = (self.path, self.path / journal.SUBFOLDER)
        files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
        names = {file: file.relative_to(self.path).as_posix() for file in files}
        found = [file for file in files if _RUN_FILE.fullmatch(names[file])]
        return sorted(found, key=lambda file: file.name in _JOURNAL)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create and lock the folder.

        Raises:
            ConfigError: another process has the lock, or has run here since the inspection.
            RunFailed: the folder is not writable.
        """
        with _locked(FolderLock(self.path)):
            self.previous = self._inspect()
            yield

    def open_journal(
        self,
        header: JournalHeader,
        batch_size: int,
        input_checksum: InputChecksum = no_checksum,
    ) -> tuple[Journal, list[CommittedRange]]:
        """Open the journal; call only inside `locked`.

        Returns:
            The journal and the ranges of the earlier run to continue. Without an earlier run, its
            leftover files are removed; files of other programs stay.

        Raises:
            ConfigError: the earlier run differs from this one.
            OSError: the journal cannot be written.
        """
        self.check_resumable(header, input_checksum)
        previous = self.previous.whole_batches(batch_size) if self.previous else None
        if previous and previous.ranges:
            return Journal(self.path / journal.FILE_NAME, header, previous), previous.ranges
        # Replace the journal first, in one step: after that, older files have no meaning.
        created = Journal(self.path / journal.FILE_NAME, header)
        try:
            self.clear(keep=created.path)
        except BaseException:
            created.close()
            raise
        return created, []

    def clear(self, keep: Path | None = None) -> None:
        """Remove the files of a run, except `keep`; call only inside `locked`.

        Raises:
            OSError: a file cannot be removed.
        """
        for file in self._run_files():
            if file != keep:
                file.unlink(missing_ok=True)
        with suppress(OSError):  # it is absent, or has files of other programs
            (self.path / journal.SUBFOLDER).rmdir()

    def disk_space_hint(self, committed: int, samples: int | None) -> str:
        """Free disk space, and an estimate for the other samples based on the committed ones."""
        free = format_bytes(shutil.disk_usage(self.path).free)
        names = {journal.SUBFOLDER, "predictions"}
        predictions = (
            file
            for file in self._run_files()
            if names & {file.parent.name, file.name.partition(".")[0].partition("-")[0]}
        )
        used = sum(file.stat().st_size for file in predictions)
        if not committed or samples is None:
            return f"{free} are free"
        needed = format_bytes(used * (samples - committed) // committed)
        return f"{free} are free, and the run needs about {needed} more"

    def save(self, result: RunResult) -> None:
        """Write result.json.

        Raises:
            RunFailed: the file cannot be written; the predictions are not affected.
        """
        try:
            result.save(self.path / RESULT)
        except OSError as error:
            text = f"{self.path / RESULT} cannot be written: {error.strerror}"
            raise RunFailed(text, resumable=True) from error


@contextmanager
def locked_check_folder(folder: Path) -> Iterator[None]:
    """Lock the folder of a check during all of its runs.

    Raises:
        ConfigError: another check has the lock, or the folder has the result of another command.
        RunFailed: the folder is not writable.
    """
    check_local(folder)
    _refuse_other_result(folder)
    with _locked(FolderLock(folder, CHECK_LOCK, keep_file=True)):
        yield


def _refuse_other_result(folder: Path) -> None:
    # A check that stopped early leaves the result of its infer run, or none.
    if (folder / CHECK_LOCK).exists() or not (folder / RESULT).exists():
        return
    with suppress(GradrunError):
        if RunResult.load(folder).kind == "check":
            return
    raise ConfigError(
        f"{folder} has the output of another command, which a check would replace; choose another "
        "output.path",
        "output.path",
    )


@contextmanager
def _locked(folder_lock: FolderLock) -> Iterator[None]:
    folder = folder_lock.path.parent
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder_lock.acquire()
        except OSError as error:
            raise RunFailed(f"{folder} cannot be written: {error.strerror}") from error
        yield
    finally:
        folder_lock.release()
