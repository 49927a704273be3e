"""The journal of a run: which samples are safely in its files, and whose run they are.

Knows lines of JSON that are written once and synced; not how predictions are laid out. What it says
is there, is there: a line is added when the data behind it are on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt

from gradrun.core import files
from gradrun.core.errors import GradrunError

FORMAT = 1


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class JournalHeader(_Line):
    """The first line: what must be the same for another run to go on with these files."""

    journal: Literal[1] = 1
    gradrun: str
    samples: NonNegativeInt
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    """Of each file that the run reads: its size in bytes, time of change and a checksum."""


def _beside(name: str) -> str:
    """The name of a file that lies beside the journal, and nowhere else."""
    if name != Path(name).name:
        raise ValueError("a journal tells of the files beside it")
    return name


class CommittedRange(_Line):
    """Samples start to stop, which are on the disk."""

    start: NonNegativeInt
    stop: NonNegativeInt
    files: dict[Annotated[str, AfterValidator(_beside)], int]
    """File name to the CRC-32 of what it holds of these samples."""
    end: NonNegativeInt | None = None
    """Where they end, in bytes, in a file whose rows differ in length."""
    nonfinite: NonNegativeInt = 0
    """How many of them hold a NaN or an infinity."""


class JournalState:
    """What a journal says: its head and its commits in order."""

    def __init__(
        self,
        head: JournalHeader,
        commits: Sequence[CommittedRange],
        ends: Sequence[int],
        torn: bool,
    ) -> None:
        self.head, self.commits = head, list(commits)
        self._ends = list(ends)
        self.torn = torn
        """Whether a line that was cut off follows."""

    @property
    def size(self) -> int:
        """Bytes of the journal up to the last commit's end."""
        return self._ends[-1]

    def without_part_of_a_batch(self, batch_size: int) -> JournalState:
        """Up to the last commit that ends with a whole batch, so that batches are cut as before."""
        count = len(self.commits)
        while count and self.commits[count - 1].stop % batch_size and not self.complete:
            count -= 1
        return JournalState(self.head, self.commits[:count], self._ends[: count + 1], self.torn)

    @property
    def stop(self) -> int:
        """The first sample that is not there."""
        return self.commits[-1].stop if self.commits else 0

    @property
    def complete(self) -> bool:
        """Whether every sample is there."""
        return self.stop == self.head.samples


def read(path: Path) -> JournalState:
    """What the journal says; a last line that was cut off does not count.

    Raises:
        GradrunError: it cannot be read, is damaged elsewhere than at its end, or another gradrun
            has written it in a format of its own.
    """
    try:
        lines = [*files.lines(path)]
    except OSError as error:
        raise GradrunError(f"{path} cannot be read: {error.strerror}") from error
    size = sum(map(len, lines))
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # it was cut off
    parsed: list[Any] = []
    ends: list[int] = []
    for number, line in enumerate(lines):
        try:
            # Not pydantic's own reader, which takes no file name that is no UTF-8.
            said = json.loads(line)
            if not parsed:
                _check_format(said, path)
            kind: type[_Line] = CommittedRange if parsed else JournalHeader
            parsed.append(kind.model_validate(said))
            _check_order(parsed)
        except (ValueError, RecursionError) as error:
            if number == len(lines) - 1 and number > 0:
                break  # a torn sector may end in anything
            raise GradrunError(
                f"{path}:{number + 1}  the journal is damaged here; --overwrite begins anew"
            ) from error
        ends.append((ends[-1] if ends else 0) + len(line))
    if not parsed:
        raise GradrunError(f"{path} is no journal of a run: its first line was cut off")
    return JournalState(parsed[0], parsed[1:], ends, torn=ends[-1] < size)


def _check_format(head: Any, path: Path) -> None:
    found = head.get("journal", FORMAT) if isinstance(head, dict) else FORMAT
    if found != FORMAT:
        raise GradrunError(
            f"{path} is a journal of format {found!r:.60}, and this gradrun reads format {FORMAT}; "
            "go on with the gradrun that began it, or begin anew with --overwrite"
        )


def _check_order(parsed: list[Any]) -> None:
    if len(parsed) == 1:
        return
    before = parsed[-2].stop if len(parsed) > 2 else 0
    last = parsed[-1]
    if last.start != before or last.stop <= last.start or last.stop > parsed[0].samples:
        parsed.pop()
        raise ValueError("the ranges do not follow one another")


def draft(path: Path) -> Path:
    """Where a journal is begun."""
    return path.with_name(f"{path.name}.tmp")


class Journal:
    """The file, open for adding lines."""

    def __init__(self, path: Path, head: JournalHeader, kept: JournalState | None = None) -> None:
        """Begin a journal, or go on with what is kept of one: what follows that is cut off.

        Raises:
            OSError: it cannot be written.
        """
        self.path = path
        # Under another name until its head is whole: a journal always says whose it is.
        place = path if kept else draft(path)
        flags = os.O_RDWR | os.O_APPEND | (0 if kept else os.O_CREAT)
        self._descriptor = files.open_regular(place, flags)
        self._size = kept.size if kept else 0
        try:
            os.ftruncate(self._descriptor, self._size)
            if kept is None:
                self._add(head)
                place.replace(path)
                files.sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def add(self, commits: Sequence[CommittedRange]) -> None:
        """Say that samples are on the disk.

        Raises:
            OSError: the line is not there, and nothing after it will be.
        """
        for committed in commits:
            self._add(committed)

    def _add(self, line: _Line) -> None:
        # JSON of json's own: it may hold a file name that is no UTF-8, which pydantic refuses.
        data = json.dumps(line.model_dump(mode="python", exclude_none=True), default=str)
        encoded = data.encode() + b"\n"
        try:
            files.write_all(self._descriptor, encoded)
            files.sync(self._descriptor)
        except BaseException:  # Ctrl-C too: the line will be added once more
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(encoded)

    def close(self) -> None:
        """Nothing more will be said."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
