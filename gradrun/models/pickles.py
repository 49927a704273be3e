"""Pickles in files of torch's, gone through before torch does: do they claim what is not there?

torch.jit believes sizes and lengths and reads beyond the end of memory, and a few hundred bytes of
tuples within tuples keep torch.load busy for ever. Nothing that a pickle names is imported or
called.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import IO, Any, ClassVar, Self

from gradrun.models.archives import HostileError, opened

_MOST_VALUES = 20_000_000
"""In a pickle, each counted as often as it is referred to."""


def check_storages(archive: Any) -> None:
    """See that the tensors of a TorchScript archive lie within the bytes that it holds.

    Args:
        archive: torch's reader of it.

    Raises:
        HostileError: a tensor claims more than there is.
        Exception: a pickle is damaged, in any of a dozen ways.
    """
    for member in archive.get_all_records():
        # torch.jit.trace leaves the shapes of its example inputs without their bytes; nothing runs
        # on them.
        if member.endswith(".pkl") and member != "traced_inputs.pkl":
            folder = member.removesuffix(".pkl")

            def held(key: str, folder: str = folder) -> int:
                return int(archive.get_record_size(f"{folder}/{key}"))

            _Storages(archive.get_record(member), held).load()


def check_checkpoint(file: IO[bytes]) -> None:
    """See that torch.load takes a time and a memory that the size of a file tells of.

    Raises:
        HostileError: it grows without end.
        Exception: it is damaged, in any of a dozen ways.
    """
    packed = file.read(4) == b"PK\x03\x04"  # as torch.load tells its two formats apart
    file.seek(0)
    if packed:
        file = io.BytesIO(opened(file).get_record("data.pkl"))
    with suppress(EOFError):  # of the older format the fourth pickle is the one that matters
        for _ in range(1 if packed else 4):
            _check_weight(_Reader(file).load())


class _Inert:
    """Stands in for every object of a pickle: keeps what it is given, and does nothing."""

    given: list[object]

    def __new__(cls, *given: object) -> Self:
        made = super().__new__(cls)
        made.given = [*given]
        return made

    def __setstate__(self, state: object) -> None:
        self.given.append(state)

    def __setitem__(self, _: object, value: object) -> None:
        self.given.append(value)

    def append(self, value: object) -> None:
        self.given.append(value)

    def extend(self, values: Iterable[object]) -> None:
        self.given.extend(values)


# In Python, where a memo is a dict: that in C makes room for any index that a pickle names.
class _Reader(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        return _Inert(pid)

    # A key is hashed, through all that is in it.
    def _one_key(self) -> None:
        _check_key(self.stack[-2])  # type: ignore[attr-defined]
        self.load_setitem()  # type: ignore[attr-defined]

    def _keys(self) -> None:
        for key in self.stack[::2]:  # type: ignore[attr-defined]
            _check_key(key)
        self.load_setitems()  # type: ignore[attr-defined]

    def _refused(self) -> None:
        raise HostileError("holds what no state dict does")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.SETITEM[0]: _one_key,
        pickle.SETITEMS[0]: _keys,
        **dict.fromkeys((pickle.DICT[0], pickle.ADDITEMS[0], pickle.FROZENSET[0]), _refused),
    }


def _check_key(key: object) -> None:
    parts = key if isinstance(key, tuple) else (key,)
    if any(isinstance(part, tuple | frozenset) for part in parts):
        raise HostileError("has a key of tuples within tuples")


def _check_weight(root: object) -> None:
    """Count what a walk would meet that knows nothing of what it has met before."""
    weights: dict[int, int] = {}
    pending = [root]
    while pending:
        value = pending[-1]
        inner = _inner(value)
        unknown = [item for item in inner if id(item) not in weights]
        if unknown and id(value) not in weights:
            weights[id(value)] = _MOST_VALUES + 1  # for whoever comes back to it from within
            pending += unknown
            continue
        pending.pop()
        weights[id(value)] = 1 + sum(weights[id(item)] for item in inner)
    if weights[id(root)] > _MOST_VALUES:
        raise HostileError("holds values that grow without end when they are read")


def _inner(value: object) -> list[object]:
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, _Inert):
        return value.given
    return [*value] if isinstance(value, list | tuple) else []


# --- TorchScript -------------------------------------------------------------------------------


class _Storages(_Reader):
    def __init__(self, data: bytes, held: Callable[[str], int]) -> None:
        super().__init__(io.BytesIO(data))
        self.held = held

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return name
        if name.startswith("_rebuild_"):
            return (_BOUNDS.get(name) if module == "torch._utils" else None) or _unknown(name)
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> int:
        """The number of elements of a storage, which its bytes must make."""
        _, kind, key, _, count = pid
        if not (isinstance(key, str) and isinstance(count, int) and count >= 0):
            raise HostileError("holds a storage without a name or size")
        if count * _WIDTHS[kind] > self.held(key):
            raise HostileError(f"claims {count:,} values in a {kind} that holds fewer")
        return count


def _check_bounds(count: int, offset: int, size: Any, stride: Any, *_: object) -> _Inert:
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise HostileError("claims a tensor of no possible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if all(size) and last >= count:
        raise HostileError(f"claims a tensor of shape {[*size]!r:.60} in {count:,} values")
    return _Inert()


def _unknown(name: str) -> Any:
    raise HostileError(f"holds a tensor of a kind whose bounds cannot be seen ({name:.40})")


_WIDTHS = {
    f"{name}Storage": width
    for width, names in {
        1: "Byte Char Bool QInt8 QUInt8 QUInt4x2 QUInt2x4",
        2: "Half BFloat16 Short",
        4: "Float Int QInt32",
        8: "Double Long ComplexFloat",
        16: "ComplexDouble",
    }.items()
    for name in names.split()
}
"""Bytes of an element."""

_BOUNDS: dict[str, Any] = {
    **dict.fromkeys(("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_qtensor"), _check_bounds),
    **dict.fromkeys(("_rebuild_parameter", "_rebuild_parameter_v2"), _Inert),
}
