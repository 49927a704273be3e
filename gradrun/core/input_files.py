"""Input files: the files that a path of the config names, and their content without compression.

The only module that lists and opens files of data: `list_files` and `open_input`.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional
from gradrun.core.remote import RemoteError, RemotePath
from gradrun.core.units import pluralize

InputPaths = Path | Sequence[Path]
"""A file, a folder or a glob pattern, or a list of them."""

_MAX_SUFFIXES = 4
_BUFFER = 256 * 1024
_HIDDEN = (".", "_")
"""Starts of names that a folder's listing leaves out: .DS_Store, _SUCCESS."""
_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True)
class FileList:
    """The files that a path names, in the order in which they are read."""

    files: tuple[Path, ...]
    order: str
    """A description of the order; "" for a single file."""
    left_out: str = ""
    """A description of the files of a folder that are not read."""


# --- which files -------------------------------------------------------------------------------


def list_files(
    paths: InputPaths, key: str, suffixes: Collection[str] = (), *, one_format: bool = True
) -> FileList:
    """Return the files of a path, which may be a folder, a glob or a list, in natural order.

    A list keeps its order. Hidden files of a folder, and those with other suffixes, are left out.

    Args:
        suffixes: formats that are read, in lower case and without compression; default: all.
        one_format: refuse files of several formats.

    Raises:
        ConfigError: a path names no file, files are repeated, or they have several formats.
    """
    given = [paths] if isinstance(paths, Path) else list(paths)
    files: list[Path] = []
    others = Counter[str]()
    for path in given:
        try:
            files += _expand(path, key, suffixes, others)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}", key) from error
    left_out = describe_left_out(others)
    if not files:
        rest = f"; it has {left_out}" if left_out else ""
        listed = ", ".join(sorted(suffixes))
        wanted = f"files to read ({listed})" if listed else "files"
        raise ConfigError(f"{_join(given)} has no {wanted}{rest}", key)
    if lost := next((file for file in files if not file.is_file()), None):
        raise ConfigError(f"{lost} is not a regular file, but a broken link or a pipe", key)
    if len(files) > 1:
        _check_distinct(files, key)
        if one_format:
            _check_one_format(files, key)
    order = "in the order of the list" if len(given) > 1 else "in natural order"
    return FileList(tuple(files), order if len(files) > 1 else "", left_out)


def common_folder(paths: InputPaths, key: str) -> Path:
    """Return the folder that contains all files, folders and patterns of a path.

    That of a pattern is the part before its first wildcard.

    Raises:
        ConfigError: there is none, for example because one is on another host.
    """
    given = [paths] if isinstance(paths, Path) else list(paths)
    folders = [_folder_of(path) for path in given]
    common = folders[0]
    for folder in folders:
        while not folder.is_relative_to(common):
            if common == common.parent:
                raise ConfigError(f"{folders[0]} and {folder} have no common folder", key)
            common = common.parent
    return common


def _folder_of(path: Path) -> Path:
    if is_pattern(path):
        return next(folder for folder in path.parents if not glob.has_magic(str(folder)))
    return path if path.is_dir() else path.parent


def describe_left_out(suffixes: Counter[str]) -> str:
    """Describe files that are not read by their suffixes."""
    if not suffixes:
        return ""
    ordered = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count} {suffix}" for suffix, count in ordered[:_MAX_SUFFIXES])
    more = ", ..." if len(suffixes) > _MAX_SUFFIXES else ""
    return f"{pluralize(suffixes.total(), 'other file')} ({listed}{more})"


def natural_order(path: Path) -> tuple[list[list[str | int]], Path]:
    """Return a sort key by which shard2 comes before shard10."""
    numbered = [
        [int(text) if at % 2 else text for at, text in enumerate(_DIGITS.split(part))]
        for part in path.parts
    ]
    return numbered, path


def is_pattern(path: Path) -> bool:
    """Return whether a path is a glob pattern, and not a file or folder with such a name."""
    return glob.has_magic(str(path)) and not path.exists()


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder whose names do not start with a dot, in no order.

    Links to folders are followed, except to a folder that contains the link.

    Raises:
        ConfigError: a folder cannot be read, so that its files would be missing.
    """
    if isinstance(folder, RemotePath):
        try:
            for file in folder.files():
                if not any(part.startswith(".") for part in file.relative_to(folder).parts):
                    yield file
        except OSError as error:
            _refuse_folder(error)
        return
    for parent, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        here = Path(parent)
        folders[:] = [
            name for name in folders if not name.startswith(".") and not _is_loop(here / name)
        ]
        yield from (here / name for name in files if not name.startswith("."))


def _refuse_folder(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be read: {error.strerror}", "data.path") from error


def _is_loop(folder: Path) -> bool:
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _expand(path: Path, key: str, suffixes: Collection[str], others: Counter[str]) -> list[Path]:
    """Return the files of one path; count those of a folder that are not read in `others`."""
    if path.is_dir():
        found = []
        for file in files_below(path):
            hidden = any(part.startswith(_HIDDEN) for part in file.relative_to(path).parts)
            suffix = format_suffix(file)
            if hidden or (suffixes and suffix not in suffixes):
                others[suffix or (file.name if hidden else "no suffix")] += 1
            else:
                found.append(file)
        return sorted(found, key=natural_order)
    if not is_pattern(path):
        if path == Path("-"):
            raise ConfigError("only the command `gradrun infer` reads standard input (-)", key)
        if not path.exists():
            raise ConfigError(f"file {path} does not exist", key)
        if isinstance(path, RemotePath):
            path.note_version()
        return [path]
    if isinstance(path, RemotePath):
        matches: list[Path] = [*path.matches()]
    else:
        found_names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - pathlib matches hidden files
        matches = [Path(name) for name in found_names]
    files = sorted((match for match in matches if not match.is_dir()), key=natural_order)
    if not files:
        found_folders = " (only folders: append /*)" if matches else ""
        raise ConfigError(f"no file matches {path}{found_folders}", key)
    return files


def _check_distinct(files: Sequence[Path], key: str) -> None:
    seen: dict[Path, Path] = {}
    for file in files:
        other = seen.setdefault(file.resolve(), file)
        if other is not file:
            text = "is listed twice" if other == file else f"is the same file as {other}"
            raise ConfigError(f"{file} {text}; its samples would be repeated", key)
    contents: dict[Path, Path] = {}
    for file in files:
        plain = file.with_suffix("") if compression(file) else file
        other = contents.setdefault(plain, file)
        if other is not file:
            raise ConfigError(
                f"{other.name} and {file.name} in {file.parent} seem to have the same content; "
                "remove one of them, or use a pattern that matches only one",
                key,
            )


def _check_one_format(files: Sequence[Path], key: str) -> None:
    first = files[0]
    for file in files:
        if format_suffix(file) != format_suffix(first):
            raise ConfigError(
                f"the files have several formats, such as {first.name} and {file.name}; select "
                f"one, for example with the pattern {first.parent}/*.{format_name(first)}",
                key,
            )


def _join(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")


# --- content -----------------------------------------------------------------------------------


class _Compression(NamedTuple):
    name: str
    magic: bytes
    """First bytes of each compressed file."""
    open: Callable[[IO[bytes]], Any]


def _open_zstd(file: IO[bytes]) -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = import_optional("backports", "data.path", "zstd")
    return zstd.open(file, "rb")


class _Streams(io.RawIOBase):
    """A reader of compressed streams, one after another, with zeros between them or at the end.

    Those of Python take a second stream that is damaged for the end of the file.
    """

    def __init__(self, file: IO[bytes], create: Callable[[], Any]) -> None:
        super().__init__()
        self._file, self._create = file, create
        self._decoder = create()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            packed = b""
            if self._decoder.eof:
                if not (packed := self._next_stream()):
                    return 0
                self._decoder = self._create()
            elif self._decoder.needs_input and not (packed := self._file.read(_BUFFER)):
                raise EOFError
            data = self._decoder.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bytes:
        """Return the first bytes after a stream that are not 0; empty at the end of the file."""
        packed: bytes = self._decoder.unused_data
        while not (rest := packed.lstrip(b"\0")):
            if not (packed := self._file.read(_BUFFER)):
                return b""
        return rest


_COMPRESSIONS = {
    ".gz": _Compression("gzip", b"\x1f\x8b", lambda file: gzip.open(file, "rb")),  # noqa: SIM115
    ".bz2": _Compression("bzip2", b"BZh", lambda file: _Streams(file, bz2.BZ2Decompressor)),
    ".xz": _Compression("xz", b"\xfd7zXZ\x00", lambda file: _Streams(file, lzma.LZMADecompressor)),
    ".zst": _Compression("zstd", b"\x28\xb5\x2f\xfd", _open_zstd),
}
"""Suffix in lower case -> the compression."""

_MAGIC_BYTES = 6
_HTML = (b"<!doct", b"<html")


def compression(path: Path) -> str:
    """Return the suffix of a compressed file, such as ".gz"; "" for other files."""
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else ""


def format_suffix(path: Path) -> str:
    """Return the suffix of a file's format in lower case: ".jsonl" for a.JSONL.gz."""
    return (path.with_suffix("") if compression(path) else path).suffix.lower()


def format_name(path: Path) -> str:
    """Return the format and compression of a file for people: "jsonl.gz"."""
    return f"{format_suffix(path)}{compression(path)}".removeprefix(".")


def open_input(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed if its suffix names a compression.

    A compressed file can only be read forward: its `seekable()` is False.

    Raises:
        OSError: it cannot be opened, or suffix and content do not match.
        ConfigError: the library of its compression is missing.
    """
    file = path.open("rb")
    try:
        head = file.read(_MAGIC_BYTES)
        file.seek(0)
        suffix = compression(path)
        _check_suffix(path, suffix, head)
        web = isinstance(path, RemotePath) and path.parts[0].startswith("http")
        if web and head.lower().startswith(_HTML):
            raise OSError("its server sent an HTML page, not a file; check the address")
        if not suffix:
            return file
    except BaseException:
        file.close()
        raise
    return io.BufferedReader(_Decompressed(_COMPRESSIONS[suffix].open(file), file), _BUFFER)


def _check_suffix(path: Path, suffix: str, head: bytes) -> None:
    for known, (name, magic, _) in _COMPRESSIONS.items():
        if suffix == known and not head.startswith(magic):
            found = "it is not" if head else "it is empty (0 bytes)"
            raise OSError(f"its name ends with {path.suffix}, for {name} data, but {found}")
        if not suffix and head.startswith(magic) and not magic.isascii():
            raise OSError(f"it is compressed with {name}; add {known} to its name")


class _Decompressed(io.RawIOBase):
    """A decompressed stream whose errors are OSErrors for people."""

    def __init__(self, stream: IO[bytes], file: IO[bytes]) -> None:
        super().__init__()
        self._stream, self._file = stream, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)  # type: ignore[attr-defined, no-any-return]
        except EOFError as error:
            raise OSError("the compressed data end too early; the file is truncated") from error
        except (MemoryError, RemoteError):
            raise
        except Exception as error:  # each compression has its own types of error
            raise OSError(f"the compressed data are damaged: {error}") from error

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()
