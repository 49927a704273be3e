"""Folder locks, which end with the process that took them."""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from gradrun.core import files
from gradrun.core.errors import ConfigError

FILE_NAME = ".gradrun.output.lock"
_MAX_OWNER = 200


class FolderLock:
    """An flock on a file in the folder, which the system releases when the process ends.

    On network file systems without flock, two machines can lock the same folder.
    """

    def __init__(self, folder: Path, name: str = FILE_NAME, *, keep_file: bool = False) -> None:
        """Set up; `keep_file` leaves the file in the folder after the release, empty."""
        self.path, self._keep_file = folder / name, keep_file
        self._descriptor = -1

    def acquire(self) -> None:
        """Lock the folder; the lock file of a dead process has no effect.

        Raises:
            ConfigError: another process has the lock; the message names its host and process id.
            OSError: the folder is not writable.
        """
        while self._descriptor < 0:
            descriptor = files.open_regular(self.path, os.O_RDWR | os.O_CREAT)
            try:
                if not _try_lock(descriptor):
                    raise _in_use(self.path)
                # The previous owner may have removed the file after we opened it.
                if not _is_same_file(descriptor, self.path):
                    continue
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                self._descriptor, descriptor = descriptor, -1
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def release(self) -> None:
        """Unlock the folder; has no effect if it is not locked."""
        if self._descriptor < 0:
            return
        try:
            with suppress(OSError):  # the folder may be gone; a remaining file blocks nobody
                if self._keep_file:
                    os.ftruncate(self._descriptor, 0)
                else:
                    self.path.unlink()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1


def check_unlocked(folder: Path) -> None:
    """Check that no process writes to a folder, without locking it.

    Raises:
        ConfigError: a process does; the message names its host and process id.
    """
    path = folder / FILE_NAME
    try:
        descriptor = files.open_regular(path, os.O_RDWR)
    except OSError:
        return
    try:
        if not _try_lock(descriptor):
            raise _in_use(path)
    finally:
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool:
    """Lock a file until its descriptor is closed; false if another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _in_use(path: Path) -> ConfigError:
    owner = ""
    with suppress(OSError):
        owner = path.read_text(errors="replace")[:_MAX_OWNER]
    return ConfigError(
        f"{owner or 'another process'} is writing to {path.parent}; wait for it, or choose another "
        "output.path",
        "output.path",
    )
