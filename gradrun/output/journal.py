"""journal.jsonl: a header that identifies the run, then the committed sample ranges.

Each line is appended after the predictions that it describes are synced, so every range in the
journal is on the disk.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt

from gradrun.core import files
from gradrun.core.errors import GradrunError
from gradrun.core.options import option

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
    samples: NonNegativeInt | None = None
    """None if their number is unknown before the end."""
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


class JournalEnd(_Line):
    """Last line of a finished run whose header lacks the number of samples."""

    samples: NonNegativeInt


@dataclass(frozen=True)
class JournalState:
    """The content of a journal."""

    header: JournalHeader
    ranges: list[CommittedRange]
    ends: list[int]
    """Offset of the end of the header and of each range, in bytes."""
    torn: bool
    """Whether the file ends with an incomplete line."""
    end: JournalEnd | None = None

    @property
    def samples(self) -> int | None:
        """Number of samples of the run; None if it is unknown, because the run is unfinished."""
        return self.end.samples if self.end else self.header.samples

    @property
    def size(self) -> int:
        """Bytes up to the end of the last range."""
        return self.ends[-1]

    @property
    def committed(self) -> int:
        """Number of committed samples."""
        return self.ranges[-1].stop if self.ranges else 0

    @property
    def complete(self) -> bool:
        """Whether all samples are committed."""
        return self.committed == self.samples

    def whole_batches(self, batch_size: int) -> JournalState:
        """The state up to the last range that ends with a whole batch.

        A resume continues from there, so that batches are cut at the same samples.
        """
        count = len(self.ranges)
        while count and self.ranges[count - 1].stop % batch_size and not self.complete:
            count -= 1
        return replace(self, ranges=self.ranges[:count], ends=self.ends[: count + 1])


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
            parsed.append(_kind_of(data, parsed).model_validate(data))
            _check_order(parsed)
        except (ValueError, RecursionError) as error:
            if number == len(lines) - 1 and number > 0:
                break  # a torn sector may contain any bytes
            raise GradrunError(
                f"{path}:{number + 1}  the journal is damaged; start over with "
                f"{option('overwrite')}"
            ) from error
        ends.append((ends[-1] if ends else 0) + len(line))
    if not parsed:
        raise GradrunError(f"{path} is not a journal of a run: its first line is incomplete")
    torn = ends[-1] < size
    end = parsed.pop() if isinstance(parsed[-1], JournalEnd) else None
    return JournalState(parsed[0], parsed[1:], ends[: len(parsed)], torn=torn, end=end)


def _kind_of(data: Any, parsed: list[Any]) -> type[_Line]:
    """Return the type of the next line."""
    if not parsed:
        return JournalHeader
    grows = parsed[0].samples is None and isinstance(data, dict) and "samples" in data
    return JournalEnd if grows else CommittedRange


def _check_format(header: Any, path: Path) -> None:
    number = header.get("journal", FORMAT) if isinstance(header, dict) else FORMAT
    if not isinstance(number, int) or number not in _READABLE:
        raise GradrunError(
            f"{path} has journal format {number!r:.60}; this version of gradrun reads formats up "
            f"to {FORMAT}. Use the version that started the run, or start over with "
            f"{option('overwrite')}"
        )


def _check_order(parsed: list[Any]) -> None:
    if len(parsed) == 1:
        return
    before = getattr(parsed[-2], "stop", None) if len(parsed) > 2 else 0
    last, samples = parsed[-1], parsed[0].samples
    if isinstance(last, JournalEnd):
        ordered = last.samples == before
    else:
        ordered = last.start == before and last.stop > last.start
        ordered = ordered and (samples is None or last.stop <= samples)
    if not ordered:
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
        self.path, self._header = path, header
        # The header is written under another name, so that a journal always has one.
        target = path if previous else path.with_name(DRAFT_NAME)
        flags = os.O_WRONLY | os.O_APPEND | (0 if previous else os.O_CREAT)
        self._descriptor = files.open_regular(target, flags)
        self._size = previous.size if previous else 0
        try:
            os.ftruncate(self._descriptor, self._size)
            if previous is None:
                self.append(header)
                target.replace(path)
                files.sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def end(self, samples: int) -> None:
        """Append the number of samples of the finished run, if the header lacks it."""
        if self._header.samples is None:
            self.append(JournalEnd(samples=samples))

    def append(self, line: _Line) -> None:
        """Append a range whose samples are synced, or another line.

        Raises:
            OSError: the line was not written; append nothing more.
        """
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
