"""Preserve the state of a model while it runs for a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TABLES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
"""Attributes of nn.Module that contain its tensors and submodules."""

_ABSENT = object()

_Saved = dict[str, tuple[Any, Any]]
"""Name to value and, if the value is mutable, a copy of its content."""


@contextmanager
def preserve_module_state(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Restore buffers and attributes of all modules after the block.

    Yields a function that returns the dotted names of those that have changed so far.

    This covers running statistics of batch norm, counters, hidden states and caches, but not the
    content of objects that a module references. If the block changed a parameter, nothing is
    restored: weights packed at the first call must stay consistent with the flag that marks them.
    """
    modules = [module for module in model.modules() if type(module).__name__ != "OptimizedModule"]
    eager = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    scripted = [buffer for module in modules if module not in eager for buffer in module.buffers()]
    saved = [(module, _save(module._buffers), _save(_attributes(module))) for module in eager]
    saved_buffers = [(buffer, _copy(buffer)) for buffer in scripted]
    versions = [(parameter, parameter._version) for parameter in _parameters(model)]

    def changed() -> list[str]:
        paths = {module: path for path, module in model.named_modules()}
        return [
            ".".join(filter(None, (paths.get(module), name)))
            for module, buffers, attributes in saved
            for name in (
                *_changed_names(module._buffers, buffers),
                *_changed_names(_attributes(module), attributes),
            )
        ]

    try:
        yield changed
    finally:
        if all(parameter._version == before for parameter, before in versions):
            with torch.no_grad():
                for module, buffers, attributes in saved:
                    _restore(module._buffers, buffers)
                    _restore(module.__dict__, attributes, ignore=TABLES)
                for buffer, copy in saved_buffers:
                    if copy is not None:
                        buffer.copy_(copy)


def _parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for parameter in model.parameters():
        if not nn.parameter.is_lazy(parameter) and not parameter.is_inference():
            yield parameter


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in TABLES}


def _save(values: Any) -> _Saved:
    with torch.no_grad():
        return {name: (value, _copy(value)) for name, value in values.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        plain = value.layout == torch.strided and not nn.parameter.is_lazy(value)
        return value.clone() if plain else None
    return value.copy() if type(value) in {list, dict, set} else None


def _changed_names(table: Any, saved: _Saved) -> Iterator[str]:
    """Yield the names of values that are new, replaced, or differ from their copy."""
    for name, value in table.items():
        before, copy = saved.get(name, (_ABSENT, None))
        if isinstance(copy, torch.Tensor):
            changed = value is not before or not torch.equal(value, copy)
        else:
            changed = value is not before or (copy is not None and len(value) != len(copy))
        if changed:
            yield name


def _restore(table: Any, saved: _Saved, ignore: set[str] | frozenset[str] = frozenset()) -> None:
    for name in [name for name in table if name not in saved and name not in ignore]:
        del table[name]
    for name, (value, copy) in saved.items():
        if isinstance(value, torch.Tensor) and copy is not None:
            if not torch.equal(value, copy):
                with torch.inference_mode(value.is_inference()):
                    value.copy_(copy)
        elif copy is not None:
            value.clear()
            value.extend(copy) if isinstance(value, list) else value.update(copy)
        if table.get(name, _ABSENT) is not value:
            table[name] = value
