"""journal.jsonl: a header that identifies the run, then the committed sample ranges.

Each line is appended after the predictions that it describes are synced, so every range in the
journal is on the disk.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt

from gradrun.core import files
from gradrun.core.errors import GradrunError

FILE_NAME = "journal.jsonl"
DRAFT_NAME = f"{FILE_NAME}.tmp"

FORMAT = 3
_READABLE = {1, 2, FORMAT}
"""Formats 1 and 2, of development versions, are verified but not resumed: format 1 has incomplete
shards in files that this version does not write, format 2 has no checksums of the input."""


InputChecksum = Callable[[int], int | None]
"""Returns the checksum of the input before a sample; None if the data source provides none."""


def no_checksum(stop: int) -> None:
    """The InputChecksum of data that provide none."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class JournalHeader(_Line):
    """First line: all properties of the run that a resume must share."""

    journal: int = FORMAT
    gradrun: str
    samples: NonNegativeInt
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    """Path of each input file to its size in bytes, modification time and checksum."""


SUBFOLDER = "predictions"
"""Folder of prediction files in a run folder, in formats whose readers read whole folders."""


def _validate_file_name(name: str) -> str:
    if name not in {Path(name).name, f"{SUBFOLDER}/{Path(name).name}"}:
        raise ValueError("a range refers to a file outside the run folder")
    return name


class CommittedRange(_Line):
    """Samples start to stop, which are on the disk."""

    start: NonNegativeInt
    stop: NonNegativeInt
    files: dict[Annotated[str, AfterValidator(_validate_file_name)], int]
    """File name to the CRC-32 of these samples in it, as the format computes it."""
    end: NonNegativeInt | None = None
    """Offset of their end in bytes, in text formats."""
    nonfinite: NonNegativeInt = 0
    """Number of samples with a NaN or an infinity, without the quarantined ones."""
    input: NonNegativeInt | None = None
    """CRC-32 of the input from its start to sample `stop`, if the data source provides one."""


class JournalState:
    """The content of a journal."""

    def __init__(
        self,
        header: JournalHeader,
        ranges: Sequence[CommittedRange],
        ends: Sequence[int],
        torn: bool,
    ) -> None:
        """Store the parsed lines.

        Args:
            header: first line.
            ranges: the other lines.
            ends: offset of the end of each line, in bytes.
            torn: the file ends with an incomplete line.
        """
        self.header, self.ranges, self.torn = header, list(ranges), torn
        self._ends = list(ends)

    @property
    def size(self) -> int:
        """Bytes up to the end of the last range."""
        return self._ends[-1]

    @property
    def committed(self) -> int:
        """Number of committed samples."""
        return self.ranges[-1].stop if self.ranges else 0

    @property
    def complete(self) -> bool:
        """Whether all samples are committed."""
        return self.committed == self.header.samples

    def whole_batches(self, batch_size: int) -> JournalState:
        """The state up to the last range that ends with a whole batch.

        A resume continues from there, so that batches are cut at the same samples.
        """
        count = len(self.ranges)
        while count and self.ranges[count - 1].stop % batch_size and not self.complete:
            count -= 1
        return JournalState(self.header, self.ranges[:count], self._ends[: count + 1], self.torn)


def read(path: Path) -> JournalState:
    """Read a journal; an incomplete or damaged last line is ignored.

    Raises:
        GradrunError: the file cannot be read, an earlier line is damaged, or the format is unknown.
    """
    try:
        lines = [*files.read_lines(path)]
    except OSError as error:
        raise GradrunError(f"{path} cannot be read: {error.strerror}") from error
    size = sum(map(len, lines))
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    parsed: list[Any] = []
    ends: list[int] = []
    for number, line in enumerate(lines):
        try:
            # pydantic's JSON parser rejects file names that are not UTF-8.
            data = json.loads(line)
            if not parsed:
                _check_format(data, path)
            kind: type[_Line] = CommittedRange if parsed else JournalHeader
            parsed.append(kind.model_validate(data))
            _check_order(parsed)
        except (ValueError, RecursionError) as error:
            if number == len(lines) - 1 and number > 0:
                break  # a torn sector may contain any bytes
            raise GradrunError(
                f"{path}:{number + 1}  the journal is damaged; start over with --overwrite"
            ) from error
        ends.append((ends[-1] if ends else 0) + len(line))
    if not parsed:
        raise GradrunError(f"{path} is not a journal of a run: its first line is incomplete")
    return JournalState(parsed[0], parsed[1:], ends, torn=ends[-1] < size)


def _check_format(header: Any, path: Path) -> None:
    number = header.get("journal", FORMAT) if isinstance(header, dict) else FORMAT
    if not isinstance(number, int) or number not in _READABLE:
        raise GradrunError(
            f"{path} has journal format {number!r:.60}; this version of gradrun reads formats up "
            f"to {FORMAT}. Use the version that started the run, or start over with --overwrite"
        )


def _check_order(parsed: list[Any]) -> None:
    if len(parsed) == 1:
        return
    before = parsed[-2].stop if len(parsed) > 2 else 0
    last = parsed[-1]
    if last.start != before or last.stop <= last.start or last.stop > parsed[0].samples:
        parsed.pop()
        raise ValueError("the ranges are not consecutive")


class Journal:
    """A journal that is open for appending."""

    def __init__(
        self, path: Path, header: JournalHeader, previous: JournalState | None = None
    ) -> None:
        """Create a journal, or continue a previous one and cut off all bytes after its last range.

        Raises:
            OSError: the file cannot be written.
        """
        self.path = path
        # The header is written under another name, so that a journal always has one.
        target = path if previous else path.with_name(DRAFT_NAME)
        flags = os.O_WRONLY | os.O_APPEND | (0 if previous else os.O_CREAT)
        self._descriptor = files.open_regular(target, flags)
        self._size = previous.size if previous else 0
        try:
            os.ftruncate(self._descriptor, self._size)
            if previous is None:
                self._append(header)
                target.replace(path)
                files.sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, committed: CommittedRange) -> None:
        """Append a range whose samples are synced.

        Raises:
            OSError: the line was not written; append nothing more.
        """
        self._append(committed)

    def _append(self, line: _Line) -> None:
        # pydantic's JSON writer rejects file names that are not UTF-8.
        data = json.dumps(line.model_dump(mode="python", exclude_none=True), default=str)
        encoded = data.encode() + b"\n"
        if os.fstat(self._descriptor).st_nlink == 0:
            text = "the output folder was removed while the run was writing to it"
            raise FileNotFoundError(errno.ENOENT, text, str(self.path))
        try:
            files.write_all(self._descriptor, encoded)
            files.sync(self._descriptor)
        except BaseException:  # after Ctrl-C, the line is appended again
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(encoded)

    def close(self) -> None:
        """Close the file; closing twice has no effect."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
