"""What makes two runs the same run: config, files read, number of samples; and what differs.

Reads a sample of each file, never all of it. Knows no torch and no format.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrun.config.model import PythonModel
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.output.journal import JournalHeader

_BLOCKS, _BLOCK_BYTES = 64, 4096


def fingerprint(
    config: RunConfig, samples: int, version: str, listed: Sequence[Path] = ()
) -> JournalHeader:
    """The head of the journal of a run of this config over so many samples.

    Args:
        config: the run's.
        samples: how many there are.
        version: of gradrun.
        listed: files that the run reads and no key of the config names.

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
    # Neither is what is done about a sample that fails: those behind the last commit are run anew.
    for key in ("warmup", "on_error", "max_errors"):
        dumped["run"].pop(key)
    files = config.input_files()
    if isinstance(config.model, PythonModel):
        place = Path(config.model.target.rpartition(":")[0])
        files += [place] if place.suffix == ".py" else []
    # A folder that the files listed lie in is told by them.
    told = [place for place in files if not (listed and listed[0].is_relative_to(place))]
    described = {
        os.fspath(path): _described(path) for place in sorted(told) for path in _within(place)
    }
    if listed:
        described["what data.path names"] = _listing(listed)
    return JournalHeader(
        gradrun=version,
        samples=samples,
        config=dumped,
        files=described,
    )


def differences(before: JournalHeader, now: JournalHeader) -> list[str]:
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
        status = path.stat()
        return {
            "size": status.st_size,
            "time": status.st_mtime_ns,
            "content": _sampled_checksum(path, status.st_size),
        }
    except OSError as error:  # it was there when it was opened
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _listing(paths: Iterable[Path]) -> dict[str, Any]:
    """How many files there are, and a checksum of their names, sizes and times."""
    count = found = 0
    for path in paths:
        try:
            status = path.stat()
            line = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except (OSError, ValueError):  # a link to nowhere, or no name of a file
            line = f"{path}\0not there\n"
        count, found = count + 1, zlib.crc32(line.encode("utf-8", "surrogateescape"), found)
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
