"""Count the work of a forward pass operator by operator: operations and bytes.

Formulas are those of torch.utils.flop_counter, and of operators that it lacks. Counting slows the
forward down, so it never runs in a timed pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gradrun.data.batch import Batch
from gradrun.inference.compilation import without_compilation
from gradrun.inference.environment import current_machine
from gradrun.inference.meters.cpu_memory import storages
from gradrun.inference.module_state import preserve_module_state
from gradrun.results.peaks_cache import cached_peaks
from gradrun.results.work import Flops, MachinePeaks, Work

Key = TypeVar("Key")

_GATHERS = {"embedding", "index_select", "gather", "index"}
"""Operators that read the selected part of their first input only."""
_NO_TRAFFIC = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh"}
_FEEDFORWARD = 12
"""Position of the first feed-forward weight of a fused encoder layer, after its width."""
_QUERIES = {"is_contiguous", "size", "stride", "numel", "dim", "storage_offset", "device", "layout"}


def _sdpa_for_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    *_, rows, width = query.shape
    return 2 * int(prod(query.shape[:-2]) * rows * key.shape[-2] * (width + value.shape[-1]))


def _self_attention(source: Any, width: int) -> int:
    """Projections of queries, keys, values and the output, and two products per head."""
    return sum(8 * length * int(width**2) + 4 * length**2 * width for length in _lengths(source))


def _lengths(source: Any) -> list[int]:
    """Return the length of each sequence; a nested tensor stores sequences without padding."""
    if source.is_nested:
        return [int(rows) for rows, _ in source._nested_tensor_size().tolist()]
    return [source.shape[1]] * source.shape[0]


def _encoder_layer(source: Any, width: int, *args: Any, **_: Any) -> int:
    feedforward = int(args[_FEEDFORWARD].shape[0])
    mlp = sum(4 * length * width * feedforward for length in _lengths(source))
    return _self_attention(source, width) + mlp


def _native_attention(query: Any, key: Any, value: Any, width: int, *_: Any, **__: Any) -> int:
    return _self_attention(query, width)


def _recurrent(x: Any, w_input: Any, w_hidden: Any, *_: Any, **__: Any) -> int:
    return 2 * int(prod(x.shape[:-1]) * (w_input.numel() + w_hidden.numel()))


def _vector(matrix: Any, vector: Any) -> int:
    return 2 * int(matrix.numel())


_FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _sdpa_for_cpu,
    "_scaled_dot_product_fused_attention_overrideable": _sdpa_for_cpu,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "_native_multi_head_attention": _native_attention,
    "mkldnn_rnn_layer": _recurrent,
    "_addmm_activation": lambda _, a, b, **__: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    "mv": _vector,
    "addmv": lambda _, matrix, vector, **__: _vector(matrix, vector),
    "dot": _vector,
    "vdot": _vector,
}
"""Operators that torch.utils.flop_counter lacks."""


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # not typed in torch
    """Passes the work of each operator to a callback."""

    def __init__(self, record: Callable[[Work], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not typed in torch
        self._record = record

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports torch._dynamo at the first operation: a second or more

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in _QUERIES or not hasattr(func, "decompose"):
            return func(*args, **kwargs)
        with self:  # composite operators count as their parts
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        if not _is_view(func):
            self._record(_work_of(func, name, args, kwargs, result))
        return result


def _name(func: Any) -> str:
    return str(getattr(func, "_opname", func))


def _is_view(func: Any) -> bool:
    returned = func._schema.returns
    alias = returned[0].alias_info if returned else None
    return alias is not None and not alias.is_write


def _work_of(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> Work:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    output = sum(map(_bytes, written))
    read = [_bytes(tensor) for tensor in tensors]
    if name in _GATHERS and read:
        read[0] = min(read[0], output)
    if name.startswith("_embedding_bag"):  # one row per index, of which the output is a sum
        weight, indices, *_ = args
        read[0] = min(read[0], indices.numel() * weight.shape[1] * weight.element_size())
    traffic = 0 if name in _NO_TRAFFIC else sum(read) + output
    operations = _operations(func, name, args, kwargs, result)
    flops: tuple[Flops, ...] = ()
    if operations:
        floats = [t for t in tensors if t.is_floating_point()] or tensors or written
        flops = (Flops(dtype=str(floats[-1].dtype).removeprefix("torch."), count=operations),)
    uncounted = (name,) if operations is None and traffic else ()
    return Work(flops=flops, bytes=traffic, operators=1, uncounted=uncounted)


def _operations(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int | None:
    """Return the operations of a call; None without a formula."""
    if own := _FORMULAS.get(name.removesuffix("_")):
        return int(own(*args, **kwargs))
    formula = flop_registry.get(func._overloadpacket)
    return None if formula is None else int(formula(*args, **kwargs, out_val=result))


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of the elements, which may be fewer in memory if a tensor is expanded."""
    if tensor.is_nested:
        return tensor.numel() * tensor.element_size()
    if tensor.layout != torch.strided:
        return sum(storages([tensor]).values())
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def counting(record: Callable[[Work], None]) -> Iterator[None]:
    """Call `record` with the work of each operator while the block runs.

    Compiled models run eagerly in the block.
    """
    with without_compilation(), _Counter(record):
        yield


@dataclass(frozen=True)
class KnownWork:
    """The work of a batch and the peaks of the machine; None if the peaks are not cached."""

    work: Work | None = None
    peaks: MachinePeaks | None = None


UNKNOWN = KnownWork()


def known_work(model: nn.Module, batch: Batch, device: torch.device) -> KnownWork:
    """Count the work of a batch if the peaks for the current threads are cached.

    Call this inside the execution context. A model that cannot be counted has no work.
    """
    peaks = cached_peaks(current_machine(device), torch.get_num_threads())
    if peaks is None:
        return UNKNOWN
    try:
        return KnownWork(forward_work(model, batch.map(torch.clone)), peaks)
    except Exception:  # a model may depend on types of tensors that counting replaces
        return UNKNOWN


def forward_work(model: nn.Module, batch: Batch) -> Work:
    """Run one forward pass and count its work; restore the state of the model.

    Call this inside the execution context. The model may write into `batch`, so pass a copy.
    """
    total: list[Work] = []
    with preserve_module_state(model), counting(total.append):
        model(*batch.args, **batch.kwargs)
    work = sum(total, Work())
    return work.replace(batch_size=batch.size, elements=batch.elements)
