"""Whether the tensors of a TorchScript archive lie within the bytes that the archive holds.

torch.jit believes sizes, strides and lengths, and reads beyond what is there. Goes through a pickle
opcode by opcode: nothing that it names is imported or called.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch


class OutOfBoundsError(Exception):
    """What is wrong with a tensor, as the end of a sentence that begins with the path."""


def check_storages(archive: Any) -> None:
    """Look through the pickles of an archive.

    Args:
        archive: torch's reader of it.

    Raises:
        OutOfBoundsError: a tensor claims more than there is.
        Exception: a pickle is damaged, in any of a dozen ways.
    """
    members = set(archive.get_all_records())
    for member in sorted(members):
        if member.endswith(".pkl"):
            folder = member.removesuffix(".pkl")

            def held(key: object, folder: str = folder) -> int:
                return int(archive.get_record_size(f"{folder}/{key}"))

            _Reader(archive.get_record(member), held).load()


class _Inert:
    """Stands in for every object of a pickle; takes whatever is done to it and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...

    def __setitem__(self, *_: object) -> None: ...

    def append(self, _: object) -> None: ...

    def extend(self, _: object) -> None: ...


# In Python, where a memo is a dict: that in C makes room for any index that a pickle names.
class _Reader(pickle._Unpickler):
    def __init__(self, data: bytes, held: Callable[[object], int]) -> None:
        super().__init__(io.BytesIO(data))
        self.held = held

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return name
        if module == "torch._utils" and name.startswith("_rebuild_"):
            return _BOUNDS.get(name) or _unknown(name)
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> int:
        """The number of elements of a storage, which its bytes must make."""
        _, kind, key, _, count = pid
        width = getattr(torch, kind).dtype.itemsize
        if not isinstance(count, int) or count < 0 or count * width > self.held(key):
            raise OutOfBoundsError(f"claims {count!r:.30} values in a {kind} that holds fewer")
        return count


def _check_bounds(count: int, offset: int, size: Any, stride: Any, *_: object) -> _Inert:
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise OutOfBoundsError(f"claims a tensor of shape {size!r:.60}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if all(size) and last >= count:
        raise OutOfBoundsError(f"claims a tensor of shape {size!r:.60} in {count:,} values")
    return _Inert()


def _unknown(name: str) -> Any:
    raise OutOfBoundsError(f"holds a tensor of a kind whose bounds cannot be seen ({name})")


_BOUNDS: dict[str, Any] = {
    **dict.fromkeys(("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_qtensor"), _check_bounds),
    **dict.fromkeys(("_rebuild_parameter", "_rebuild_parameter_v2"), _Inert),
}
