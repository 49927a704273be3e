"""`gradrun.verify`: compare the files of a run with the checksums in its journal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gradrun.core.errors import ConfigError, GradrunError
from gradrun.output import journal
from gradrun.output.formats import checksum, text_writer
from gradrun.output.journal import CommittedRange, JournalState
from gradrun.results.result import DamagedRange, Verification


def verify(folder: str | Path) -> Verification:
    """Compare all committed ranges of a run with their checksums.

    Raises:
        ConfigError: the folder has no journal, or pyarrow is needed and missing.
        GradrunError: the journal cannot be read or is damaged.
    """
    folder = Path(folder)
    path = folder / journal.FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{folder} has no {path.name}: it is not the output of gradrun infer")
    state = journal.read(path)
    return Verification(
        folder=folder,
        samples=state.samples,
        committed=state.committed,
        ranges=len(state.ranges),
        damaged=tuple(damaged_ranges(folder, state)),
        torn=state.torn,
        resumable=state.header.journal == journal.FORMAT,
    )


def damaged_ranges(folder: Path, state: JournalState) -> Iterator[DamagedRange]:
    """Yield the committed ranges that are missing or changed, per file."""
    previous: CommittedRange | None = None
    for committed in state.ranges:
        for file, expected in committed.files.items():
            # Offset of the range in a text file, and in the incomplete shard of journal format 1.
            begin = (previous.end or 0) if previous and file in previous.files else 0
            try:
                problem = "" if _checksum(folder, file, committed, begin) == expected else _CHANGED
            except OSError as error:
                problem = error.strerror or str(error)
            except GradrunError:  # pyarrow is missing
                raise
            except Exception:  # a damaged file causes any of a dozen exceptions
                problem = "the file is damaged"
            if problem:
                yield DamagedRange(committed.start, committed.stop, file, problem)
        previous = committed


_CHANGED = "the checksum differs"


def _checksum(folder: Path, file: str, committed: CommittedRange, begin: int) -> int:
    path = folder / file
    rest = folder / f"{file}.rest"  # rows of an incomplete shard in journal format 1
    if not path.exists() and rest.exists():
        return text_writer.checksum(rest, committed, begin)
    return checksum(path, committed, begin)
