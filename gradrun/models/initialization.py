"""Find the parameters of a model that are random numbers, drawn while its code built it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradrun.core.units import first_names

_MAX_LISTED = 3
_OVERWRITING = {"copy_", "fill_", "zero_"}
"""Operations whose result does not depend on the values of their first argument."""


class _Origin(Enum):
    RANDOM = "random"
    CONSTANT = "constant"


class RandomOrigins(TorchDispatchMode):
    """Follows random numbers through all tensor operations of a block.

    A tensor that comes from elsewhere, such as a file or numpy, has no origin, nor has a tensor
    that such a tensor overwrites.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origins: dict[int, tuple[StorageWeakRef, _Origin | None]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports torch._dynamo at the first operation: a second or more

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then store the origin of its result."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        overwriting = name in _OVERWRITING
        inputs = [*_tensors(args[1:] if overwriting else args), *_tensors(kwargs)]
        origins = {self._origin(tensor) for tensor in inputs}
        if torch.Tag.nondeterministic_seeded in func.tags or _Origin.RANDOM in origins:
            origin: _Origin | None = _Origin.RANDOM
        else:
            origin = None if None in origins or name == "set_" else _Origin.CONSTANT
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            whole = tensor.numel() * tensor.element_size() == storage.nbytes()
            if whole or origin is _Origin.RANDOM or storage._cdata not in self._origins:
                # The weak reference keeps the key from being used for another storage.
                self._origins[storage._cdata] = StorageWeakRef(storage), origin  # type: ignore[no-untyped-call]
        return result

    def random_parameters(self, module: nn.Module) -> list[str]:
        """Return the names of the parameters that are random, or would be at the first call.

        Constants, such as a bias of zeros, count as random if no parameter comes from elsewhere.
        """
        origins = {
            name: _Origin.RANDOM if nn.parameter.is_lazy(value) else self._origin(value)
            for name, value in module.named_parameters()
        }
        if _Origin.RANDOM not in origins.values():
            return []
        wanted = {_Origin.RANDOM} if None in origins.values() else {*_Origin}
        return [name for name, origin in origins.items() if origin in wanted]

    def _origin(self, tensor: torch.Tensor) -> _Origin | None:
        return self._origins.get(tensor.untyped_storage()._cdata, (None, None))[1]


def describe_random(names: Sequence[str], module: nn.Module) -> str:
    """Describe parameters that were drawn from torch's generator: "random (seed 0)", or ""."""
    if not names:
        return ""
    seed = f"random (seed {torch.initial_seed()})"
    total = sum(1 for _ in module.parameters())
    if len(names) >= total:
        return seed
    return f"{len(names)} of {total} tensors {seed}: {first_names(names, _MAX_LISTED)}"


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    leaves: Iterable[Any] = tree_leaves(values)
    for value in leaves:
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            yield value
