"""Keep freed memory in the process, so that the next batch reuses it: `run.allocator`.

By default glibc returns large freed blocks to the kernel, which maps and clears their pages again
at the next batch. The settings belong to the process, not to a thread or a model.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

from gradrun.config.run import Allocator

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt (malloc.h of glibc)."""

_RETAIN = ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
_OLDER_LIMIT = (_MMAP_THRESHOLD, 2**25)
"""The largest threshold that older versions of glibc accept."""

_RELEASE = ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**26), (_TOP_PAD, 2**17))
"""The state that glibc reaches by itself after large blocks were freed; it cannot be read."""

_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_TUNABLES = "GLIBC_TUNABLES"

_active: list[str] = []
"""Descriptions of the settings of the blocks that are running, innermost last."""


@contextmanager
def allocator_settings(allocator: Allocator) -> Iterator[None]:
    """Apply `run.allocator` to this process; at the end, return the retained memory to the system.

    "retain" changes only glibc's own malloc, and only if no environment variable sets it.
    """
    retain = allocator == "retain" and not describe_obstacle()
    _active.append("retain" if retain else " ".join(filter(None, ("system", describe_obstacle()))))
    try:
        if retain:
            _retain()
        yield
    finally:
        _active.pop()
        if retain and "retain" not in _active:
            _release()


def current_allocator() -> str:
    """Return "retain", or "system" with the allocator or variable that prevents retaining."""
    return _active[-1] if _active else "system"


def describe_obstacle() -> str:
    """Return why memory cannot be retained, such as "(libjemalloc.so.2)"; empty if it can."""
    if sys.platform != "linux":
        return f"({sys.platform})"
    library = _malloc_library()
    if not library.startswith("libc.") or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return f"({library})"
    names = [name for name in _VARIABLES if name in os.environ]
    if "glibc.malloc." in os.environ.get(_TUNABLES, ""):
        names.append(_TUNABLES)
    return f"({', '.join(names)})" if names else ""


class _SymbolInfo(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _malloc_library() -> str:
    """Return the file name of the library whose malloc this process uses."""
    process, info = ctypes.CDLL(None), _SymbolInfo()
    address = ctypes.cast(process.malloc, ctypes.c_void_p)
    found = process.dladdr(address, ctypes.byref(info))
    return PurePath(os.fsdecode(info.file)).name if found and info.file else "unknown malloc"


def _retain() -> None:
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in _RETAIN:
        if not mallopt(parameter, value) and parameter == _MMAP_THRESHOLD:
            mallopt(*_OLDER_LIMIT)


def _release() -> None:
    process = ctypes.CDLL(None)
    for parameter, value in _RELEASE:
        process.mallopt(parameter, value)
    process.malloc_trim(ctypes.c_size_t(0))
