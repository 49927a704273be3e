"""Fingerprint of a run: config, content of the input files and number of samples."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.core.input_files import is_pattern
from gradrun.core.remote import RemotePath
from gradrun.output.class_labels import writes_names
from gradrun.output.formats import FORMATS
from gradrun.output.journal import JournalHeader

_BLOCKS, _BLOCK_BYTES = 1024, 64 * 1024
"""Blocks of a file for its checksum; a file of up to 64 MiB is read whole."""

_LISTED_FILES, _LISTED_BLOCKS, _LISTED_BLOCK_BYTES = 1024, 16, 4096
"""Of a list of files, and blocks of each, for the checksum of their content; of fewer files more
blocks are read, up to the same total."""

_MISSING = "missing"
_UNCOMPARED = {"path", "time", "sampled"}
"""Of the description of a file: its content decides."""

_UNREAD = (
    *("output.", "check.", "data.labels", "data.classes"),
    *("model.root", "data.root"),
)
"""Keys of files that do not affect predictions, or of folders that contain other files."""

_IRRELEVANT_SECTIONS = {"engine", "measure", "check", "metrics", "tune"}
_IRRELEVANT = {
    "data": ("labels", "classes", "workers"),
    "output": ("path", "examples"),
    "run": ("allocator", "in_flight", "warmup", "on_error", "max_errors"),
}
"""Keys that change no committed prediction; a folder may be moved."""

_IDS, _CLASS_NAMES = "the type of the ids", "class names"
_KEPT_TYPES = "the type of the kept column"

_ADVICE = {
    "run.threads": "predictions depend on it, so set run.threads to {}",
    _IDS: "all ids of a run have one type, numbers if the whole column has them",
}


def fingerprint(
    config: RunConfig,
    samples: int | None,
    version: str,
    *,
    listed: Sequence[Path] = (),
    by_rows: bool = False,
    classes: Sequence[str] = (),
    id_type: str = "",
    identity: Mapping[str, Any] | None = None,
    kept_types: Mapping[str, str] | None = None,
    code: Mapping[str, Path] | None = None,
    resolved: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> JournalHeader:
    """The journal header of a run, with checksums of its input files.

    Files are identified by their content and by the config key that names them, so a project may be
    copied or moved.

    Args:
        listed: input files that no config key names, for example the images of a folder.
        by_rows: whether the committed ranges have checksums of the rows in data.path instead.
        classes: class names, which some formats write.
        id_type: type of the ids in data.id, which may change with a row behind the committed ones.
        identity: properties of the data source that the config and files do not determine.
        kept_types: types of the columns of output.keep, which may change in the same way.
        resolved: values of the section `run` that replace "auto".
        versions: versions of libraries, and of weights that are not in a file.

    Raises:
        ConfigError: a file cannot be read.
    """
    paths: dict[str, Path] = {}
    dumped = _take_paths(config.model_dump(mode="json"), config.model_dump(), "", paths)
    dumped = {name: value for name, value in dumped.items() if name not in _IRRELEVANT_SECTIONS}
    for section, keys in _IRRELEVANT.items():
        for key in keys:
            dumped[section].pop(key, None)
    dumped["data"].update(identity or {})
    if target := config.output.decoder:  # the content of the file is compared
        steps = config.output.transforms_of("")
        dumped["output"]["transform"] = [Path(target).name, *steps]
    if classes and writes_names(config.output):
        dumped[_CLASS_NAMES] = zlib.crc32("\n".join(classes).encode())
    if id_type and FORMATS[config.output.format].typed_ids:
        dumped[_IDS] = id_type
    if kept_types:
        dumped[_KEPT_TYPES] = {**kept_types}
    dumped["run"].update(resolved or {})
    dumped.update(versions or {})
    for key, target in config.targets().items():
        section, _, name = key.partition(".")
        dumped[section].pop("root", None)
        dumped[section][name] = Path(target).name
    files = _describe_inputs(paths, listed, by_rows=by_rows) | describe_code(code or {})
    return JournalHeader(gradrun=version, samples=samples, config=dumped, files=files)


def _describe_inputs(
    paths: Mapping[str, Path], listed: Sequence[Path], *, by_rows: bool
) -> dict[str, dict[str, Any]]:
    """Describe the files of config keys and the listed ones, by key or file name."""
    folders = {file.parent for file in listed}
    files = {
        name: _describe(file)
        for key, path in paths.items()
        if not key.startswith(_UNREAD)
        if not (by_rows and key == "data.path")
        # The listed files cover a folder that contains them.
        if not any(folder.is_relative_to(path) for folder in folders)
        for name, file in _files_in(key, path)
    }
    if listed and not by_rows and [*listed] != [paths.get("data.path")]:
        folder = paths.get("data.path") or Path(os.path.commonpath([f.parent for f in listed]))
        files["the files in data.path"] = _describe_list(listed, folder)
    return files


def describe_code(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Describe files of the user's code, by name, for JournalHeader.files.

    Raises:
        ConfigError: a file cannot be read.
    """
    return {name: _describe(path) for name, path in files.items()}


def differences(before: JournalHeader, now: JournalHeader) -> list[str]:
    """Describe each change in a few words, for example "run.mode changed from grad to no_grad"."""
    changes = [
        _change(key, old, new)
        for key, old, new in _changed(before.config, now.config)
        if (key, old) != ("run.on_nonfinite", "stop")  # no committed prediction is affected
    ]
    if before.samples != now.samples:
        old_count, new_count = (
            "unknown" if count is None else f"{count:,}" for count in (before.samples, now.samples)
        )
        text = f"the number of samples changed from {old_count} to {new_count}"
        skip = "to skip a row, keep it and set run.on_error: quarantine"
        fewer = (before.samples or 0) > (now.samples or 0)
        changes.append(f"{text} ({skip})" if fewer else text)
    for name, described in now.files.items():
        known = before.files.get(name)
        if known is None:
            continue  # its config key changed, which is in the list already, or it is new code
        changed = changed_properties(known, described)
        old, new = known.get("path"), described.get("path", name)
        if changed and old and Path(old).name != Path(new).name:
            changes.append(f"{name} changed from {old} to {new}")
        elif changed:
            changes.append(f"{new} changed ({', '.join(changed)})")
    return changes


def changed_properties(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the properties, such as the size, in which two descriptions of a file differ."""
    return [key for key in now if key not in _UNCOMPARED and before.get(key) != now[key]]


def assumed_unchanged(before: JournalHeader, now: JournalHeader) -> list[str]:
    """The files with another modification time whose content was compared in part only."""
    return [
        described.get("path", name)
        for name, described in now.files.items()
        if described.get("sampled")
        and before.files.get(name, {}).get("time") not in {None, described["time"]}
    ]


def _change(key: str, old: Any, new: Any) -> str:
    if key == _CLASS_NAMES:  # checksums
        return "the class names changed (data.classes, or those of the model)"
    advice = f" ({_ADVICE[key].format(old)})" if key in _ADVICE else ""
    return f"{key} changed from {old} to {new}{advice}"


def _take_paths(dumped: Any, typed: Any, key: str, paths: dict[str, Path]) -> Any:
    """Return a dumped config without its paths, which are added to `paths` by their dotted key.

    Lists and glob patterns are not added: their files are listed by the data source.
    """
    if isinstance(typed, tuple) and typed and isinstance(typed[0], Path):
        return "files"
    if isinstance(typed, Path) and is_pattern(typed):
        return "files"
    if isinstance(typed, Path):
        paths[key] = typed
        return "a folder" if typed.is_dir() else "a file"
    if not isinstance(typed, dict):
        return dumped
    dot = key and "."
    return {
        name: _take_paths(dumped[name], value, f"{key}{dot}{name}", paths)
        for name, value in typed.items()
    }


def _files_in(key: str, path: Path) -> Iterator[tuple[str, Path]]:
    """Yield a file under its key, or the visible files below a folder."""
    if not path.is_dir():
        yield key, path
        return
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield f"{key}/{relative.as_posix()}", file


def _describe(path: Path) -> dict[str, Any]:
    try:
        if isinstance(path, RemotePath):
            return {"path": str(path), "version": path.version()}
        status = path.stat()
        return {
            "path": str(path),
            "size": status.st_size,
            "time": status.st_mtime_ns,
            "content": _checksum(path, status.st_size, _BLOCKS, _BLOCK_BYTES),
            "sampled": status.st_size > _BLOCKS * _BLOCK_BYTES,
        }
    except OSError as error:  # the file existed when it was opened
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _describe_list(files: Sequence[Path], path: Path) -> dict[str, Any]:
    """Number of files in or beside `path`, and checksums of their names, sizes and content."""
    folder = str(path if path.is_dir() else path.parent)
    step = -(-len(files) // _LISTED_FILES)
    blocks = max(_LISTED_BLOCKS, _LISTED_BLOCKS * _LISTED_FILES // len(files))
    names = times = content = 0
    sampled = step > 1
    for number, file in enumerate(files):
        size: Any = _MISSING  # a broken link, or an invalid file name
        try:
            if isinstance(file, RemotePath):
                size = file.version()  # identifies the content, so that nothing is read
            else:
                status = file.stat()
                size, time = status.st_size, status.st_mtime_ns
                times = zlib.crc32(b"%d " % time, times)
            if number % step == 0 and not isinstance(file, RemotePath):
                part = _checksum(file, size, blocks, _LISTED_BLOCK_BYTES)
                content = zlib.crc32(b"%d " % part, content)
                sampled |= size > blocks * _LISTED_BLOCK_BYTES
        except (OSError, ValueError):
            pass
        line = f"{str(file).removeprefix(folder)}\0{size}\n"
        names = zlib.crc32(line.encode("utf-8", "surrogateescape"), names)
    return {
        "files": len(files),
        "names and sizes": names,
        "time": times,
        "content": content,
        "sampled": sampled,
    }


def _checksum(path: Path, size: int, blocks: int, block_bytes: int) -> int:
    """CRC-32 of a file, or of evenly spaced blocks from its start to its end if it is larger."""
    offsets = list(range(0, size, block_bytes))
    if len(offsets) > blocks:
        offsets = [(size - block_bytes) * i // (blocks - 1) for i in range(blocks)]
    crc = 0
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            crc = zlib.crc32(file.read(block_bytes), crc)
    return crc


def _changed(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every leaf that differs."""
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key, _MISSING), now.get(key, _MISSING)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changed(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new
