"""Fingerprint of a run: config, input files and number of samples."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrun.config.model import PythonModel
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.output.class_labels import writes_names
from gradrun.output.journal import JournalHeader

_BLOCKS, _BLOCK_BYTES = 64, 4096
_MISSING = "missing"


def fingerprint(
    config: RunConfig,
    samples: int,
    version: str,
    listed: Sequence[Path] = (),
    by_rows: Sequence[Path] = (),
    classes: Sequence[str] = (),
) -> JournalHeader:
    """The journal header of a run, with a checksum of a sample of each input file.

    Args:
        config: config of the run.
        samples: number of samples.
        version: version of gradrun.
        listed: input files that no config key names, for example the images of a folder.
        by_rows: input files whose checksums are in the committed ranges instead.
        classes: class names, which some formats write.

    Raises:
        ConfigError: a file cannot be read.
    """
    dumped = config.model_dump(mode="json")
    for key in ("engine", "measure", "check", "metrics"):  # do not affect predictions
        dumped.pop(key)
    for key in ("labels", "classes"):
        dumped["data"].pop(key, None)
    dumped["output"].pop("path")  # a folder may be moved
    dumped["output"].pop("examples")
    # Error handling may change: samples after the last commit run again.
    for key in ("warmup", "on_error", "max_errors"):
        dumped["run"].pop(key)
    if classes and writes_names(config.output):
        dumped["class names"] = zlib.crc32("\n".join(classes).encode())
    paths = config.input_files()
    if isinstance(config.model, PythonModel):
        source = Path(config.model.target.rpartition(":")[0])
        paths += [source] if source.suffix == ".py" else []
    paths = [path for path in paths if path not in by_rows]
    # The listed files cover a folder that contains them.
    paths = [path for path in paths if not (listed and listed[0].is_relative_to(path))]
    described = {
        os.fspath(file): _describe(file) for path in sorted(paths) for file in _files_in(path)
    }
    if listed:
        described["the files in data.path"] = _describe_list(listed)
    return JournalHeader(gradrun=version, samples=samples, config=dumped, files=described)


def differences(before: JournalHeader, now: JournalHeader) -> list[str]:
    """Describe each change in a few words, for example "run.mode changed from grad to no_grad"."""
    changes = [
        f"{key} changed from {old} to {new}"
        for key, old, new in _changed(before.config, now.config)
    ]
    if before.samples != now.samples:
        text = f"the number of samples changed from {before.samples:,} to {now.samples:,}"
        skip = "to skip a row, keep it and set run.on_error: quarantine"
        changes.append(text if before.samples < now.samples else f"{text} ({skip})")
    for path, described in now.files.items():
        known = before.files.get(path)
        if known is None:
            continue  # its config key changed, which is in the list already
        changed = [key for key, value in described.items() if known.get(key) != value]
        if changed:
            changes.append(f"{path} changed ({', '.join(changed)})")
    return changes


def _files_in(path: Path) -> list[Path]:
    """The file itself, or the files directly in a folder."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file())


def _describe(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
        return {
            "size": status.st_size,
            "time": status.st_mtime_ns,
            "content": _sampled_checksum(path, status.st_size),
        }
    except OSError as error:  # the file existed when it was opened
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _describe_list(paths: Iterable[Path]) -> dict[str, Any]:
    """Number of files, and a checksum of their names, sizes and times."""
    count = crc = 0
    for path in paths:
        try:
            status = path.stat()
            line = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except (OSError, ValueError):  # a broken link, or an invalid file name
            line = f"{path}\0{_MISSING}\n"
        count, crc = count + 1, zlib.crc32(line.encode("utf-8", "surrogateescape"), crc)
    return {"files": count, "names, sizes and times": crc}


def _sampled_checksum(path: Path, size: int) -> int:
    """CRC-32 of 64 blocks of 4 KiB, evenly spaced from the start to the end of the file."""
    last = max(0, size - _BLOCK_BYTES)
    offsets = sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)})
    crc = 0
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            crc = zlib.crc32(file.read(_BLOCK_BYTES), crc)
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
