"""Writing so that it stays: whole writes, syncs, checksums, on raw file descriptors.

Knows the operating system's calls and nothing of formats. Everything that must survive goes through
here, so that tests can let each call fail.
"""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from gradrun.units import bytes_text

_PIECE = 1024 * 1024


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


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all: what was there stays until the new one is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():  # a device or a pipe takes what it is given
        path.write_text(text, encoding="utf-8")
        return
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
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
    """See that a file holds what the journal says of it.

    Raises:
        OSError: it is shorter.
    """
    if size(descriptor) < least:
        raise OSError(errno.EIO, "the file holds less than the journal says", path)


def pieces(descriptor: int, begin: int, end: int, step: int = _PIECE) -> Iterator[bytes]:
    """The bytes from begin to end, a MiB at a time; fewer where the file is shorter."""
    while begin < end:
        piece = os.pread(descriptor, min(step, end - begin), begin)
        if not piece:
            return
        yield piece
        begin += len(piece)


def checksum(descriptor: int, begin: int, end: int, before: int = 0) -> int:
    """CRC-32 of the bytes from begin to end, continued from `before`."""
    for piece in pieces(descriptor, begin, end):
        before = zlib.crc32(piece, before)
    return before


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that the disk has no room left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        error = error.__cause__
    return False


def check_room(folder: Path, needed: int, file: str) -> None:
    """See that about so many bytes can still be written below a folder.

    Raises:
        OSError: they cannot; says how many are needed and how many are free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{file} needs about {bytes_text(needed)}, and {bytes_text(free)} of disk are free",
        )
