"""What a module remembers from call to call, put back as it was: measuring must not change it.

Knows buffers and attributes of modules; parameters are not put back, but looked at for changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TABLES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_ABSENT = object()


@contextmanager
def preserve_module_state(model: nn.Module) -> Iterator[None]:
    """Give every module the buffers and attributes back that it had before the block.

    Running figures of batch norm, counters, hidden states and caches made on the way are as if the
    block had not been; objects that a module only refers to are not looked into. Where the block
    changed a parameter nothing is put back: weights that are packed at the first call, and the flag
    that says so, belong together.
    """
    modules = [module for module in model.modules() if type(module).__name__ != "OptimizedModule"]
    eager = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    scripted = [buffer for module in modules if module not in eager for buffer in module.buffers()]
    kept = [(module, _copied(module._buffers), _copied(_attributes(module))) for module in eager]
    held = [(buffer, _copy(buffer)) for buffer in scripted]
    versions = [(parameter, parameter._version) for parameter in _parameters(model)]
    try:
        yield
    finally:
        if all(parameter._version == before for parameter, before in versions):
            with torch.no_grad():
                for module, buffers, attributes in kept:
                    _put_back(module._buffers, buffers)
                    _put_back(module.__dict__, attributes, leave=TABLES)
                for buffer, copy in held:
                    if copy is not None:
                        buffer.copy_(copy)


def _parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for parameter in model.parameters():
        if not nn.parameter.is_lazy(parameter) and not parameter.is_inference():
            yield parameter


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in TABLES}


def _copied(values: Any) -> dict[str, tuple[Any, Any]]:
    """Each value with a copy of what it holds, where it is of a kind that is changed in place."""
    with torch.no_grad():
        return {name: (value, _copy(value)) for name, value in values.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        plain = value.layout == torch.strided and not nn.parameter.is_lazy(value)
        return value.clone() if plain else None
    return value.copy() if type(value) in {list, dict, set} else None


def _put_back(table: Any, kept: dict[str, tuple[Any, Any]], leave: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    for name in [name for name in table if name not in kept and name not in leave]:
        del table[name]
    for name, (value, copy) in kept.items():
        if isinstance(value, torch.Tensor) and copy is not None:
            if not torch.equal(value, copy):
                with torch.inference_mode(value.is_inference()):
                    value.copy_(copy)
        elif copy is not None:
            value.clear()
            value.extend(copy) if isinstance(value, list) else value.update(copy)
        if table.get(name, _ABSENT) is not value:
            table[name] = value
