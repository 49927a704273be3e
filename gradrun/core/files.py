"""Durable writes, syncs and checksums on raw file descriptors (POSIX).

Every write that must survive a crash goes through this module, so that tests can make each fail.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gradrun.core.units import format_bytes

_CHUNK = 1024 * 1024
_LONGEST_LINE = 16 * 1024 * 1024
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK
"""Do not follow a link or wait for a pipe; without effect on regular files."""


def cache_folder() -> Path:
    """Return the folder of caches: `GRADRUN_CACHE`, else `gradrun` in `XDG_CACHE_HOME`."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("GRADRUN_CACHE") or Path(home) / "gradrun")


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file and return its descriptor.

    Raises:
        OSError: it cannot be opened, or is a link, pipe or device.
    """
    try:
        descriptor = os.open(path, flags | _FLAGS, 0o666)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise _not_regular(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def open_binary(path: Path) -> IO[bytes]:
    """A regular file of a run folder, open for reading.

    Raises:
        OSError: as open_regular does.
    """
    return os.fdopen(open_regular(path, os.O_RDONLY), "rb")


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file, but a link, a pipe or a device", path)


_WRITE_BYTES = 128 * 1024
"""Bytes per call. One call with megabytes takes large folios of the page cache, which a virtual
machine may first have to get from its host: 512 MiB cost 2.0 s of CPU time instead of 0.1 s."""


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all data; the system may accept less per call.

    Raises:
        OSError: the write failed; part of the data may be written.
    """
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(descriptor, left[:_WRITE_BYTES]) :]


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all data at an offset.

    Raises:
        OSError: the write failed; part of the data may be written.
    """
    left = memoryview(data).cast("B")
    while left:
        count = os.pwrite(descriptor, left[:_WRITE_BYTES], offset)
        left, offset = left[count:], offset + count


def sync(descriptor: int) -> None:
    """Wait until the file's data is on the disk.

    Raises:
        OSError: data written since the last sync may be lost.
    """
    os.fsync(descriptor)


def replace_file(path: Path, data: str | bytes) -> None:
    """Write a file atomically: the old content stays until the new one is on the disk.

    Raises:
        OSError: the write failed.
    """
    draft = path.with_name(f"{path.name}.tmp")
    descriptor = open_regular(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        try:
            write_all(descriptor, data.encode() if isinstance(data, str) else data)
            sync(descriptor)
        finally:
            os.close(descriptor)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size(descriptor: int) -> int:
    """Return the size in bytes."""
    return os.fstat(descriptor).st_size


def check_size(descriptor: int, least: int, path: Path) -> None:
    """Check that a file has at least so many bytes.

    Raises:
        OSError: it is shorter.
    """
    if size(descriptor) < least:
        raise OSError(errno.EIO, "the file is shorter than its committed range", path)


def read_chunks(descriptor: int, begin: int, end: int, step: int = _CHUNK) -> Iterator[bytes]:
    """Yield the bytes from begin to end, or to the end of the file, 1 MiB at a time."""
    while begin < end:
        chunk = os.pread(descriptor, min(step, end - begin), begin)
        if not chunk:
            return
        yield chunk
        begin += len(chunk)


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends, which the last line may lack.

    Raises:
        OSError: the file cannot be read, or a line is longer than gradrun writes.
    """
    descriptor, rest = open_regular(path, os.O_RDONLY), b""
    try:
        for chunk in read_chunks(descriptor, 0, size(descriptor)):
            *complete, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in complete)
            if len(rest) > _LONGEST_LINE:
                raise OSError(errno.EFBIG, "a line is longer than gradrun writes", path)
        if rest:
            yield rest
    finally:
        os.close(descriptor)


def checksum(descriptor: int, begin: int, end: int, before: int = 0) -> int:
    """Return the CRC-32 of the bytes from begin to end, continued from `before`."""
    for chunk in read_chunks(descriptor, begin, end):
        before = zlib.crc32(chunk, before)
    return before


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes is a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        error = error.__cause__
    return False


def ensure_free_space(folder: Path, needed: int, file: str) -> None:
    """Check that about `needed` bytes are free on the disk of a folder.

    Raises:
        OSError: fewer are free; names both sizes.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{file} needs about {format_bytes(needed)}; the disk has {format_bytes(free)} free",
        )
