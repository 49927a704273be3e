"""List the files of a config, with the labels that their folders or a table give."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import torch

from gradrun.config.data import FilesData, FolderLabels
from gradrun.core.errors import ConfigError
from gradrun.core.input_files import (
    FileList,
    InputPaths,
    common_folder,
    describe_left_out,
    files_below,
    format_suffix,
    is_pattern,
    list_files,
    open_input,
)
from gradrun.core.remote import RemoteError, is_remote
from gradrun.core.suggest import suggest
from gradrun.core.units import list_names, pluralize
from gradrun.data import tar_files
from gradrun.data.rows import (
    BEGINNING,
    SEPARATORS,
    TABLE_READERS,
    LineFiles,
    Record,
    describe_absence,
)
from gradrun.data.source import class_number, missing_labels
from gradrun.data.tar_files import TarMembers
from gradrun.results.result import Statement

_LABELS_CHUNK = 4096
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class SampleFiles:
    """Files in the order of the samples."""

    root: Path
    """The folder that the names are relative to."""
    names: list[str]
    order: str
    """A description of the order."""
    labels: list[str]
    """The label of each file as text; empty without `data.labels`."""
    left_out: str = ""
    """A description of the folder's files whose suffix is not read."""
    members: TarMembers | None = None
    """The places of the files if they are in archives."""

    @property
    def repeated(self) -> int:
        """Number of files that are listed before with the same name."""
        return len(self.names) - len(set(self.names))

    @property
    def paths(self) -> list[Path]:
        """The files that are read: those of the samples, or archives."""
        if self.members:
            return [*self.members.archives]
        return [self.root / name for name in self.names]

    def open(self, number: int) -> IO[bytes]:
        """Open a file for reading; a remote one is read whole, before a decoder gets it.

        Raises:
            OSError: it cannot be opened.
            ConfigError: the store or the web server fails, which is not the fault of the sample.
        """
        name = self.names[number]
        path = self.root / name
        try:
            if self.members:
                return self.members.open(number)
            if is_remote(path):
                with open_input(path) as file:
                    return io.BytesIO(file.read())
            return open_input(path)
        except RemoteError as error:
            raise ConfigError(f"{name} cannot be read: {error}", "data.path") from error

    def class_names(self, model_classes: Sequence[str]) -> tuple[str, ...]:
        """Return the model's class names if they contain all labels, else the labels, sorted.

        Labels that are numbers have no names: ().

        Raises:
            ConfigError: some labels are numbers, and others are not.
        """
        names = sorted(set(self.labels))
        others = [name for name in names if not _NUMBER.fullmatch(name)]
        if not others:
            return ()
        if {*names} <= {*model_classes}:
            return tuple(model_classes)
        if len(others) < len(names):
            number = next(name for name in names if name not in others)
            raise ConfigError(
                f"the label {others[0]!r:.60} of {self.names[self.labels.index(others[0])]} is not "
                f"a number, but others are, such as {number}; correct it, or list the names of all "
                "classes in data.classes",
                "data.labels",
            )
        return tuple(names)

    def label_numbers(self, files: Sequence[int], classes: Sequence[str]) -> Iterator[torch.Tensor]:
        """Yield the labels of some files as numbers, in float64 chunks [n].

        Raises:
            ConfigError: there are no labels, or one is neither a number nor one of the classes.
        """
        if not self.labels:
            raise missing_labels()
        for start in range(0, len(files), _LABELS_CHUNK):
            chunk = files[start : start + _LABELS_CHUNK]
            numbers = [self._label_number(number, classes) for number in chunk]
            yield torch.tensor(numbers, dtype=torch.float64)

    def _label_number(self, number: int, classes: Sequence[str]) -> float:
        text = self.labels[number]
        try:
            return class_number(text, classes) if classes else float(text)
        except ValueError:
            raise ConfigError(
                f"{self.names[number]}: the label {text!r:.60} is neither a number nor one of "
                "data.classes",
                "data.labels",
            ) from None

    def statements(self, noun: str) -> Iterator[Statement]:
        """Yield the number of files, their order, and the files that were left out."""
        count = len(self.names)
        distinct = f" ({count - self.repeated:,} distinct)" if self.repeated else ""
        yield Statement(topic="files", text=f"{pluralize(count, noun)}{distinct}, {self.order}")
        if self.left_out:
            yield Statement(topic="files", text=f"{self.left_out} not read")

    def describe_labels(self, classes: Sequence[str]) -> Statement:
        """Return the statement of the classes or of the numbers."""
        found = {*self.labels}
        if classes:
            missing = f" ({len(found)} found)" if len(found) != len(classes) else ""
            text = f"{len(classes):,} classes{missing}: {list_names(classes)}"
        else:
            numbers = {*map(float, found)}
            text = f"{pluralize(len(numbers), 'number')} from {min(numbers):g} to {max(numbers):g}"
        return Statement(topic="labels", text=text)


def list_samples(config: FilesData, suffixes: Collection[str], kind: str) -> SampleFiles:
    """Find the files that a config names; open none of them.

    Args:
        suffixes: the lower-case suffixes of such files, used below a folder without `data.pattern`.
        kind: the plural noun of the files.

    Raises:
        ConfigError: the list cannot be read, contains no files, or lacks a column or a label.
    """
    path = config.path
    assert path
    direct = {*suffixes, tar_files.SUFFIX}
    if not isinstance(path, Path) or is_pattern(path) or format_suffix(path) in direct:
        return _in_list(config, path, suffixes, kind)
    if path.is_dir():
        return _in_folder(config, path, suffixes, kind)
    try:
        match path.suffix.lower():
            case ".csv" | ".tsv":
                names, labels = _read_table(config, path)
            case ".txt":
                lines = path.read_text(encoding="utf-8-sig").splitlines()
                names = [line for line in map(str.strip, lines) if line]
                labels = _folder_labels(config, names, PurePosixPath(_common_folder(names)))
            case _:
                raise ConfigError(
                    f"{path.name} is not a folder, or a .txt, .csv or .tsv list of {kind}",
                    "data.path",
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "data.path") from error
    if not names:
        raise ConfigError(f"{path} contains no {kind}", "data.path")
    return SampleFiles(path.parent, names, f"in the order of {path.name}", labels)


# --- folders -----------------------------------------------------------------------------------


def _in_folder(config: FilesData, path: Path, suffixes: Collection[str], kind: str) -> SampleFiles:
    left_out = ""
    if config.pattern is None:
        names, others = [], Counter[str]()
        for name in (file.relative_to(path).as_posix() for file in files_below(path)):
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in suffixes:
                names.append(name)
            else:
                others[suffix or "no suffix"] += 1
        left_out = describe_left_out(others)
        if others[tar_files.SUFFIX]:
            if not names:
                return _in_list(config, path, suffixes, kind)
            raise ConfigError(
                f"{path} has {pluralize(len(names), 'file')} of {kind} and .tar files; select "
                f"those with data.pattern, or these with path: {path}/*.tar",
                "data.path",
            )
    else:
        try:
            found = [file for file in path.glob(config.pattern) if file.is_file()]
        except (ValueError, NotImplementedError, IndexError) as error:
            raise ConfigError(
                f"invalid pattern {config.pattern!r:.60}: {error}", "data.pattern"
            ) from error
        names = [file.relative_to(path).as_posix() for file in found]
    names.sort()
    labels = _folder_labels(config, names, PurePosixPath())
    if not names:
        rest = f"; it has {left_out}" if left_out else ""
        raise ConfigError(f"{path} contains no {kind}{rest}", "data.path")
    return SampleFiles(path, names, "sorted by path as text", labels, left_out)


def _in_list(
    config: FilesData, path: InputPaths, suffixes: Collection[str], kind: str
) -> SampleFiles:
    """Find the files, or the members of the archives, that a pattern or a list names."""
    known = {*suffixes, tar_files.SUFFIX}
    listed = list_files(path, "data.path", known, one_format=False)
    found = {format_suffix(file) for file in listed.files}
    if unknown := next((f for f in listed.files if format_suffix(f) not in known), None):
        raise ConfigError(
            f"{unknown.name} does not have a suffix of {kind} or archives (.tar); use a pattern "
            f"that matches only {kind}, such as {unknown.parent}/*{min(suffixes)}, or set "
            "data.path to the folder and data.pattern to take files of any suffix",
            "data.path",
        )
    for key in ("pattern", "column"):
        if getattr(config, key) is not None:
            raise ConfigError("it does not apply to files that data.path names", f"data.{key}")
    if found == {tar_files.SUFFIX}:
        return _in_archives(config, listed, suffixes, kind)
    if tar_files.SUFFIX in found:
        raise ConfigError(f"data.path names {kind} and .tar files; choose one kind", "data.path")
    root = common_folder(path, "data.path")
    names = [file.relative_to(root).as_posix() for file in listed.files]
    labels = _folder_labels(config, names, PurePosixPath())
    order = f"{listed.order or 'as named'}; ids: paths in {root.name or root}"
    return SampleFiles(root, names, order, labels, listed.left_out)


def _in_archives(
    config: FilesData, listed: FileList, suffixes: Collection[str], kind: str
) -> SampleFiles:
    beside = config.labels if isinstance(config.labels, str) and config.labels[:1] == "." else ""
    members, names, labels, left_out = tar_files.list_members(listed.files, suffixes, kind, beside)
    if not beside:
        labels = _folder_labels(config, names, PurePosixPath())
    order = f"as in {pluralize(len(listed.files), 'archive')}"
    if listed.order:
        order += f", {listed.order}, first {listed.files[0].name}, last {listed.files[-1].name}"
    return SampleFiles(listed.files[0].parent, names, order, labels, left_out, members)


# --- labels ------------------------------------------------------------------------------------


def _folder_labels(config: FilesData, names: list[str], root: PurePosixPath) -> list[str]:
    """Return the name of one folder in the path of each file, counted from `root`."""
    if config.labels is None:
        return []
    if isinstance(config.labels, str) and config.labels != "folder":
        raise ConfigError(
            "files in a folder, an archive or a .txt list can only have the label of their folder "
            "(labels: folder), or in .tar files that of a member beside them (labels: .cls); use a "
            ".csv list for columns",
            "data.labels",
        )
    level = config.labels.folder if isinstance(config.labels, FolderLabels) else 1
    labels = [_folder_name(name, root, level) for name in names]
    if config.classes is None and len(set(labels)) == 1 and not labels[0].isdecimal():
        raise ConfigError(
            f"all files are in the folder {labels[0]!r:.60}, which gives a single class; set "
            "labels: {folder: N} to use the N-th folder of the path, or data.classes",
            "data.labels",
        )
    return labels


def _folder_name(name: str, root: PurePosixPath, level: int) -> str:
    folders = PurePosixPath(name).parts[len(root.parts) : -1]
    index = level - 1 if level > 0 else level
    try:
        return folders[index]
    except IndexError:
        raise ConfigError(
            f"{name} has no label, because it has no folder number {level}; move it into the "
            "folder of its class, or choose files with data.pattern",
            "data.labels",
        ) from None


def _common_folder(names: list[str]) -> str:
    """Return the folder that contains the folders of all files of a list."""
    parents = {str(PurePosixPath(name).parent) for name in names}
    common = (
        os.path.commonpath(parents) if len({name.startswith("/") for name in names}) == 1 else ""
    )
    return str(PurePosixPath(common).parent) if common in parents else common


def _read_table(config: FilesData, path: Path) -> tuple[list[str], list[str]]:
    if isinstance(config.labels, FolderLabels):
        raise ConfigError("the labels of a .csv list are a column; set its name", "data.labels")
    suffix = path.suffix.lower()
    names: list[str] = []
    labels: list[str] = []
    with closing(TABLE_READERS[suffix](LineFiles(), path, BEGINNING, SEPARATORS[suffix])) as rows:
        for record in rows:
            if record.error:
                raise ConfigError(f"{record.place}  {record.error}", "data.path")
            fields = record.fields
            column = next(iter(fields)) if config.column is None else config.column
            for key, name in (("column", column), ("labels", config.labels)):
                if name is not None and name not in fields:
                    hint = suggest(name, fields)
                    raise ConfigError(f"{path.name} has no column {name!r}; {hint}", f"data.{key}")
            names.append(_filled(record, column, "data.column"))
            if config.labels is not None:
                labels.append(_filled(record, config.labels, "data.labels"))
    return names, labels


def _filled(record: Record, column: str, key: str) -> str:
    value: str | None = record.fields[column]
    if not value:
        absence = describe_absence(record, column)
        raise ConfigError(f"{record.place}  the column {column!r} is {absence}", key)
    return value
