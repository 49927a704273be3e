"""What makes two runs the same run: config, files read, number of samples; and what differs.

Reads a sample of each file, never all of it. Knows no torch and no format.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradrun.config import PythonModel, RunConfig
from gradrun.errors import ConfigError
from gradrun.journal import Head

_BLOCKS, _BLOCK_BYTES = 64, 4096


def fingerprint(config: RunConfig, samples: int, version: str) -> Head:
    """The head of the journal of a run of this config over so many samples.

    Raises:
        ConfigError: a file cannot be read any more.
    """
    dumped = config.model_dump(mode="json")
    dumped.pop("measure")  # how a run is measured changes no prediction
    dumped.pop("check")
    dumped.pop("metrics")
    for key in ("labels", "classes"):
        dumped["data"].pop(key, None)
    dumped["output"].pop("path")  # a folder may be moved
    dumped["run"].pop("warmup")
    files = config.input_files()
    if isinstance(config.model, PythonModel):
        place = Path(config.model.target.rpartition(":")[0])
        files += [place] if place.suffix == ".py" else []
    return Head(
        gradrun=version,
        samples=samples,
        config=dumped,
        files={
            os.fspath(path): _described(path) for place in sorted(files) for path in _within(place)
        },
    )


def differences(before: Head, now: Head) -> list[str]:
    """What is not as it was, each in a few words: "run.mode was grad and is no_grad"."""
    found = [
        f"{key} was {old} and is {new}" for key, old, new in _changed(before.config, now.config)
    ]
    if before.samples != now.samples:
        found.append(f"there were {before.samples:,} samples and are {now.samples:,}")
    for path, described in now.files.items():
        known = before.files.get(path)
        if known is None:
            continue  # another path is another key of the config, told above
        changed = [key for key, value in described.items() if known.get(key) != value]
        if changed:
            found.append(f"{path} has changed ({', '.join(changed)})")
    return found


def _within(place: Path) -> list[Path]:
    """A file itself; of a folder the files that lie in it."""
    if not place.is_dir():
        return [place]
    return sorted(path for path in place.iterdir() if path.is_file())


def _described(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            return _listing(path)
        status = path.stat()
        return {
            "size": status.st_size,
            "time": status.st_mtime_ns,
            "content": _sampled_checksum(path, status.st_size),
        }
    except OSError as error:  # it was there when it was opened
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _listing(folder: Path) -> dict[str, Any]:
    """How many files there are below a folder, and a checksum of their names, sizes and times."""
    count = found = 0
    for here, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(here, name)
            status = path.stat()
            line = f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n"
            count, found = count + 1, zlib.crc32(os.fsencode(line), found)
    return {"files": count, "names, sizes and times": found}


def _sampled_checksum(path: Path, size: int) -> int:
    """CRC-32 of blocks spread evenly over the file, its beginning and end among them."""
    last = max(0, size - _BLOCK_BYTES)
    places = sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)})
    found = 0
    with path.open("rb") as file:
        for place in places:
            file.seek(place)
            found = zlib.crc32(file.read(_BLOCK_BYTES), found)
    return found


def _changed(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every leaf that differs."""
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key, "not there"), now.get(key, "not there")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changed(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new
