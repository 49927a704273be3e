"""One writer at a time in a folder: a lock that ends with the process that holds it.

Knows file locks, hosts and process ids; not what is written.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from gradrun.core import files
from gradrun.core.errors import ConfigError

NAME = ".gradrun.output.lock"


class FolderLock:
    """Held from `take` to `release`, and no longer than the process lives."""

    def __init__(self, folder: Path, name: str = NAME, *, stays: bool = False) -> None:
        """`stays`: the file does, empty, to say whose the folder is."""
        self.path, self._stays = folder / name, stays
        self._descriptor = -1

    def take(self) -> None:
        """Hold the folder, or take over from a process that died holding it.

        Raises:
            ConfigError: another process holds it; names its host and process id.
            OSError: the folder cannot be written.
        """
        while self._descriptor < 0:
            descriptor = files.open_regular(self.path, os.O_RDWR | os.O_CREAT)
            try:
                if not _locked(descriptor, self.path):
                    raise _held(self.path)
                # Whoever held it may have removed the file that we opened.
                if not _same_file(descriptor, self.path):
                    continue
                os.ftruncate(descriptor, 0)
                owner = {"host": socket.gethostname(), "pid": os.getpid()}
                os.write(descriptor, json.dumps(owner).encode())
                self._descriptor, descriptor = descriptor, -1
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def release(self) -> None:
        """Let others in; does nothing where it is not held."""
        if self._descriptor < 0:
            return
        try:
            with suppress(OSError):  # the folder may be gone; a file that stays holds nobody up
                if self._stays:
                    os.ftruncate(self._descriptor, 0)
                else:
                    self.path.unlink()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1


def check_free(folder: Path) -> None:
    """See that nobody writes into a folder, without holding it.

    Raises:
        ConfigError: another process does; names its host and process id.
    """
    path = folder / NAME
    try:
        descriptor = files.open_regular(path, os.O_RDWR)
    except OSError:
        return
    try:
        if not _locked(descriptor, path):
            raise _held(path)
    finally:
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _locked(descriptor: int, path: Path) -> bool:
    """Whether the lock is ours now; it is given back when the descriptor is closed."""
    if sys.platform == "win32":
        owner = _owner(path)
        return owner.get("host") != socket.gethostname() or not psutil.pid_exists(
            int(owner.get("pid", 0))
        )
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _held(path: Path) -> ConfigError:
    owner = _owner(path)
    by = (
        f"process {owner['pid']} on {owner['host']}"
        if {"pid", "host"} <= owner.keys()
        else "another process"
    )
    return ConfigError(
        f"{by} is writing into {path.parent}; wait for it, or choose another output.path",
        "output.path",
    )


def _owner(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
