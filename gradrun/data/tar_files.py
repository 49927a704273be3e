"""List the members of .tar files, whose content can then be read in any order."""

from __future__ import annotations

import io
import tarfile
from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from gradrun.core.errors import ConfigError
from gradrun.core.input_files import compression, describe_left_out, open_input

SUFFIX = ".tar"
_LONGEST_LABEL = 200
_END_BYTES = 1024 * 1024
"""Bytes behind the end of an archive that are checked."""


class TarMembers:
    """The places of the members of some archives, in 20 bytes each."""

    def __init__(self, archives: Sequence[Path]) -> None:
        self.archives = archives
        self._archive, self._offset, self._size = array("I"), array("Q"), array("Q")

    def add(self, archive: int, offset: int, size: int) -> None:
        """Add a member."""
        self._archive.append(archive)
        self._offset.append(offset)
        self._size.append(size)

    def open(self, number: int) -> IO[bytes]:
        """Return the content of a member.

        Raises:
            OSError: the archive cannot be read, or became shorter.
        """
        with open_input(self.archives[self._archive[number]]) as file:
            file.seek(self._offset[number])
            content = file.read(self._size[number])
        if len(content) < self._size[number]:
            raise OSError(f"{self.archives[self._archive[number]]} is truncated")
        return io.BytesIO(content)


def list_members(
    archives: Sequence[Path], suffixes: Collection[str], kind: str, labels: str = ""
) -> tuple[TarMembers, list[str], list[str], str]:
    """Return the members with one of some suffixes, their paths, labels, and what was left out.

    Nothing is extracted, and links are not followed.

    Args:
        kind: the plural noun of the members.
        labels: the suffix of members with the label of the member of the same name, as text.

    Raises:
        ConfigError: an archive is compressed or damaged, or there are no such members or labels.
    """
    members, names, others = TarMembers(archives), list[str](), Counter[str]()
    texts: list[str] = []
    for number, path in enumerate(archives):
        if compression(path):
            raise ConfigError(
                f"{path.name}: {kind} are read from archives without compression; decompress it",
                "data.path",
            )
        try:
            beside = _list_archive(path, number, suffixes, members, names, others, labels)
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"{path} cannot be read as an archive: {error}", "data.path") from (
                error
            )
        if labels:
            texts += [_label_of(name, path, labels, beside) for name in names[len(texts) :]]
    left_out = describe_left_out(others)
    if not names:
        rest = f"; they have {left_out}" if left_out else ""
        raise ConfigError(f"the archives contain no {kind}{rest}", "data.path")
    return members, names, texts, left_out


def _label_of(name: str, archive: Path, suffix: str, beside: Mapping[str, str]) -> str:
    try:
        return beside[_key(name)]
    except KeyError:
        raise ConfigError(
            f"{name} in {archive.name} has no label, because {_key(name)}{suffix} is missing",
            "data.labels",
        ) from None


def _key(name: str) -> str:
    """Return what the members of a sample have in common: the path up to the name's first dot."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _list_archive(
    path: Path,
    number: int,
    suffixes: Collection[str],
    members: TarMembers,
    names: list[str],
    others: Counter[str],
    labels: str,
) -> dict[str, str]:
    """Add the members of one archive; return the labels by the key of the sample."""
    beside: dict[str, str] = {}
    with open_input(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            # A million of them would need a gigabyte. typeshed lacks the attribute.
            archive.members.clear()  # type: ignore[attr-defined]
            if member.isdir():
                continue
            name = PurePosixPath(member.name.lstrip("/"))
            suffix = name.suffix.lower()
            if labels and member.isreg() and str(name) == f"{_key(str(name))}{labels}":
                beside[_key(str(name))] = _text_of(file, member, path)
                continue
            hidden = any(part.startswith(".") for part in name.parts)
            if hidden or not member.isreg() or member.issparse() or suffix not in suffixes:
                others[suffix or "no suffix"] += 1
                continue
            members.add(number, member.offset_data, member.size)
            names.append(str(name))
        file.seek(archive.offset)
        end = file.read(_END_BYTES)
        if not end or end.strip(b"\0"):  # tarfile takes both for the end
            raise tarfile.ReadError(
                f"it has no end mark at byte {archive.offset:,}: it is truncated or damaged, or "
                "consists of several archives"
            )
    return beside


def _text_of(file: IO[bytes], member: tarfile.TarInfo, archive: Path) -> str:
    """Return the content of a label; tarfile finds its place again."""
    file.seek(member.offset_data)
    content = file.read(min(member.size, _LONGEST_LABEL + 1))
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(content) > _LONGEST_LABEL:
        problem = f"{member.name} in {archive.name} is not a label"
        raise ConfigError(f"{problem}: a text of at most {_LONGEST_LABEL} bytes", "data.labels")
    return text
