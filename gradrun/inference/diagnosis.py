"""Why a model refused its input or failed, in a sentence: both shapes, or mode and line.

Knows modules, their call order and what a mode forbids; not where the input came from.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from gradrun.core.errors import ModelInputError, first_line
from gradrun.core.grad_mode import GradMode
from gradrun.core.units import format_bytes
from gradrun.inference.module_calls import track_module_calls

_NO_GRAPH = "does not require grad and does not have a grad_fn"
"""How torch says that nothing was recorded to go back through."""

_TORCH, _GRADRUN = Path(torch.__file__).parent, Path(__file__).parents[1]


def explain_first_batch_failure(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    error: BaseException,
    mode: GradMode,
) -> ModelInputError:
    """The error to raise when `model(*args, **kwargs)` raised `error` on the first batch.

    Runs the model once more to see which module was entered last.
    """
    said = first_line(error)
    if ran_out_of_memory(error):
        return ModelInputError(
            f"the first batch does not fit in memory ({memory_asked(error)}); "
            "choose a smaller batch",
            "data.batch_size",
        )
    if _is_of_the_mode(error, mode):
        return ModelInputError(describe_model_error(error, mode), "run.mode")
    named = [f"{name} {_shape(value)}" for name, value in kwargs.items()]
    shapes = ", ".join([*map(_shape, args), *named])
    where = _innermost(model, args, kwargs)
    hint = "; data.inputs: {NAME: {dtype: ...}} converts it" if "dtype" in said else ""
    return ModelInputError(
        f"the model refuses the input {shapes}{where}: {describe_model_error(error, mode)}{hint}",
        "data.inputs",
    )


def describe_model_error(error: BaseException, mode: GradMode) -> str:
    """What a model that ran in `mode` raised, and where; of a backward() without a graph, why."""
    if not _is_of_the_mode(error, mode):
        return f"{type(error).__name__}: {first_line(error)}{_raised_at(error)}"
    # Inference mode records nothing, whatever the grad flag says.
    below = "" if mode is GradMode.NO_GRAD else "run.mode=no_grad with "
    return (
        f"{_asked_at(error)} has nothing to go back through: the model ran in {mode}, which "
        f"records nothing; choose run.mode=grad, or {below}torch.enable_grad() around that part "
        "of the model"
    )


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in first_line(error)


def memory_asked(error: BaseException) -> str:
    """What an allocation that failed wanted, and what the machine has."""
    asked = re.search(r"allocate (\d+) bytes", str(error))
    free = format_bytes(psutil.virtual_memory().available)
    said = f"torch asked for {format_bytes(int(asked[1]))}" if asked else first_line(error)
    return f"{said}, and {free} of the machine's memory are free"


def _is_of_the_mode(error: BaseException, mode: GradMode) -> bool:
    return mode is not GradMode.GRAD and _NO_GRAPH in first_line(error)


def _asked_at(error: BaseException) -> str:
    """The user's line that asked torch for gradients: "backward() at /home/me/net.py:13"."""
    for called, place, line in _lines_outside(error):
        if called:
            return f"{called}() at {place}:{line}"
    return "backward()"


def _raised_at(error: BaseException) -> str:
    """The last line outside of torch that led to it: " (/home/me/net.py:13)"."""
    for _, place, line in _lines_outside(error):
        if place.is_file():
            return f" ({place}:{line})"
    return ""


def _lines_outside(error: BaseException) -> Iterator[tuple[str, Path, int | None]]:
    """(what was called there, file, line) of the model's lines outside of torch, the last first.

    A TorchScript program has no lines of Python, so there may be none.
    """
    called = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        place = Path(frame.filename)
        if place.is_relative_to(_GRADRUN):
            return
        if not place.is_relative_to(_TORCH):
            yield called, place, frame.lineno
        called = frame.name


def _innermost(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    # The model fails again, and its unfinished calls stay on the stack.
    with track_module_calls(lambda _, given: given) as stack, suppress(Exception, SystemExit):
        model(*args, **kwargs)
    if not stack.calls:
        return ""
    module, given = stack.calls[-1]
    path = {inner: name for name, inner in model.named_modules()}.get(module, "")
    weight = getattr(module, "weight", None)
    kind = str(module).splitlines()[0].rstrip("(")
    has = f" with weight {_shape(weight)}" if isinstance(weight, torch.Tensor) else ""
    got = ", ".join(_shape(value) for value in given if isinstance(value, torch.Tensor))
    if not got:  # called by keyword, and global hooks receive only positional arguments
        return ""
    return f"; module {path or '(the model)'} is {kind}{has} and got {got}"


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if nn.parameter.is_lazy(value):
        return "(not yet sized)"
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
