"""Why a model refused its input, in a sentence with both shapes.

Knows modules and their call order; not where the input came from.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from gradrun.errors import ConfigError


def refusal(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException
) -> ConfigError:
    """The error to raise when `model(*args, **kwargs)` raised `error` on the first batch.

    Runs the model once more to see which module was entered last.
    """
    reason = first_line(error)
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason:
        return ConfigError(
            f"the first batch does not fit in memory ({reason}); choose a smaller batch",
            "data.batch_size",
        )
    named = [f"{name} {_shape(value)}" for name, value in kwargs.items()]
    shapes = ", ".join([*map(_shape, args), *named])
    where = _innermost(model, args, kwargs)
    hint = "; data.inputs: {NAME: {dtype: ...}} converts it" if "dtype" in reason else ""
    return ConfigError(
        f"the model refuses the input {shapes}{where}: {type(error).__name__}: {reason}{hint}",
        "data.inputs",
    )


def first_line(error: BaseException) -> str:
    """The first line of what torch says; the rest is a C++ or Python traceback."""
    try:
        lines = str(error).strip().splitlines() or [type(error).__name__]
    except Exception:  # an exception of the user's may fail to say what it is
        return type(error).__name__
    # The interpreter of TorchScript puts its traceback first and the reason last.
    return lines[-1 if "TorchScript interpreter" in lines[0] else 0]


def _innermost(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    entered: list[tuple[nn.Module, tuple[Any, ...]]] = []
    hooks = [
        register_module_forward_pre_hook(lambda module, given: entered.append((module, given))),
        register_module_forward_hook(lambda *_: _drop_last(entered)),
    ]
    try:
        # The same error comes again; the modules that it leaves entered are what we want.
        with suppress(Exception, SystemExit):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if not entered:
        return ""
    module, given = entered[-1]
    path = {inner: name for name, inner in model.named_modules()}.get(module, "")
    weight = getattr(module, "weight", None)
    kind = str(module).splitlines()[0].rstrip("(")
    has = f" with weight {_shape(weight)}" if isinstance(weight, torch.Tensor) else ""
    got = ", ".join(_shape(value) for value in given if isinstance(value, torch.Tensor))
    if not got:  # it was called by keyword, which a global hook is not told
        return ""
    return f"; module {path or '(the model)'} is {kind}{has} and got {got}"


def _drop_last(entered: list[Any]) -> None:
    entered.pop()


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if nn.parameter.is_lazy(value):
        return "(not yet sized)"
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
