"""Writing so that it stays: whole writes, syncs, checksums, on raw file descriptors.

Knows the operating system's calls and nothing of formats. Everything that must survive goes through
here, so that tests can let each call fail.
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

_PIECE = 1024 * 1024
_LONGEST_LINE = 16 * 1024 * 1024
_GUARDS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""A link is not followed, and a pipe not waited for; of a plain file neither changes anything."""


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a plain file of a run's folder, and of nothing that lies elsewhere.

    Raises:
        OSError: it cannot be opened, or is a link, a pipe or a device.
    """
    try:
        descriptor = os.open(path, flags | _GUARDS, 0o666)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise _not_plain(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_plain(path)
    return descriptor


def open_binary(path: Path) -> IO[bytes]:
    """A regular file of a run folder, open for reading.

    Raises:
        OSError: as open_regular does.
    """
    return os.fdopen(open_regular(path, os.O_RDONLY), "rb")


def _not_plain(path: Path) -> OSError:
    return OSError(errno.EINVAL, "no plain file, but a link, a pipe or the like", path)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it: the system may take less at a time.

    Raises:
        OSError: the disk is full or broken; part of it may have been written.
    """
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it to a place in the file.

    Raises:
        OSError: as write_all does.
    """
    left = memoryview(data).cast("B")
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def sync(descriptor: int) -> None:
    """Return when the file's data are on the disk.

    Raises:
        OSError: they may not be; what was written since the last sync must not be counted on.
    """
    os.fsync(descriptor)


def replace_file(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all: what was there stays until the new one is on the disk.

    Raises:
        OSError: it cannot be written.
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
    """Return when the names in a folder are on the disk; systems without that have no need."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size(descriptor: int) -> int:
    """Bytes of a file."""
    return os.fstat(descriptor).st_size


def check_size(descriptor: int, least: int, path: Path) -> None:
    """Check that a file has at least so many bytes.

    Raises:
        OSError: it is shorter.
    """
    if size(descriptor) < least:
        raise OSError(errno.EIO, "the file is shorter than the journal says", path)


def read_chunks(descriptor: int, begin: int, end: int, step: int = _PIECE) -> Iterator[bytes]:
    """The bytes from begin to end, a MiB at a time; fewer where the file is shorter."""
    while begin < end:
        piece = os.pread(descriptor, min(step, end - begin), begin)
        if not piece:
            return
        yield piece
        begin += len(piece)


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends; the last may have none.

    Raises:
        OSError: it cannot be read, or a line is longer than any of gradrun's.
    """
    descriptor, rest = open_regular(path, os.O_RDONLY), b""
    try:
        for piece in read_chunks(descriptor, 0, size(descriptor)):
            *whole, rest = (rest + piece).split(b"\n")
            yield from (line + b"\n" for line in whole)
            if len(rest) > _LONGEST_LINE:
                raise OSError(errno.EFBIG, "it has a line that gradrun did not write", path)
        if rest:
            yield rest
    finally:
        os.close(descriptor)


def checksum(descriptor: int, begin: int, end: int, before: int = 0) -> int:
    """CRC-32 of the bytes from begin to end, continued from `before`."""
    for piece in read_chunks(descriptor, begin, end):
        before = zlib.crc32(piece, before)
    return before


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that the disk has no room left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        error = error.__cause__
    return False


def ensure_free_space(folder: Path, needed: int, file: str) -> None:
    """See that about so many bytes can still be written below a folder.

    Raises:
        OSError: they cannot; says how many are needed and how many are free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{file} needs about {format_bytes(needed)}, and {format_bytes(free)} of disk are free",
        )
