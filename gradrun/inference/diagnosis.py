"""Explain why a model failed: input shapes and the module, or the gradient mode and the line."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from gradrun.core.errors import GradrunError, ModelInputError, first_line
from gradrun.core.grad_mode import GradMode
from gradrun.core.units import format_bytes
from gradrun.data.batch import Batch
from gradrun.inference.module_calls import track_module_calls

_NO_GRAPH = "does not require grad and does not have a grad_fn"
"""Part of torch's message for a backward pass without a graph."""

_SIGNS_OF_DICT = ("keyword argument", "invalid data type 'str'", "no attribute 'items'", "'keys'")
"""Parts of errors of a model that expects its inputs in a dict."""

_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
"""Messages of CUDA for memory that torch does not allocate itself; the device stays usable."""

_TORCH, _GRADRUN = Path(torch.__file__).parent, Path(__file__).parents[1]


@contextmanager
def first_batch_errors(model: nn.Module, batch: Batch, mode: GradMode) -> Iterator[None]:
    """Explain an error of the model, which runs its first batch in the block.

    Raises:
        ModelInputError: the model failed.
    """
    try:
        yield
    except GradrunError:
        raise
    except Exception as error:  # user code can raise anything
        raise explain_first_batch_failure(model, batch, error, mode) from error


def explain_first_batch_failure(
    model: nn.Module, batch: Batch, error: BaseException, mode: GradMode
) -> ModelInputError:
    """Return the error to raise after a model raised `error` on its first batch.

    Runs the model again to find the module that failed.
    """
    args, kwargs = batch.args, batch.kwargs
    if ran_out_of_memory(error):
        return ModelInputError(
            f"the first batch does not fit in memory ({describe_allocation(error)}); "
            "choose a smaller batch",
            "data.batch_size",
        )
    if _needs_graph(error, mode):
        return ModelInputError(describe_model_error(error, mode), "run.mode")
    named = [f"{name} {_describe(value)}" for name, value in kwargs.items()]
    inputs = ", ".join([*map(_describe, args), *named])
    module = _failing_module(model, args, kwargs)
    return ModelInputError(
        f"the model failed on the input {inputs}{module}: {describe_model_error(error, mode)}"
        f"{_remedy(model, kwargs, first_line(error))}",
        "data.inputs",
    )


def _remedy(model: nn.Module, kwargs: dict[str, Any], reason: str) -> str:
    """Return the remedy for a common cause, or ""."""
    parameters = inspect.signature(model.forward).parameters
    if len(parameters) == 1 and any(sign in reason for sign in _SIGNS_OF_DICT):
        return "; data.call: dict passes all inputs as one dict, by their names"
    if "unexpected keyword argument" in reason:
        accepted = ", ".join(name for name in kwargs if name in parameters)
        return f"; pass only inputs that it accepts: data.inputs: [{accepted}]" if accepted else ""
    parts = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if parts and not any(name.startswith("decoder") for name in kwargs):
        return (
            "; an encoder-decoder model needs decoder inputs too; model.auto_class: "
            "AutoModelForTextEncoding runs its encoder alone"
        )
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if "dtype" not in reason or weights is None:
        return ""
    name = str(weights).removeprefix("torch.")
    return (
        f"; convert the input to {name}: arrays and records of a config by data.inputs: "
        f"{{NAME: {{dtype: {name}}}}}, other data in the code that makes them"
    )


def describe_model_error(error: BaseException, mode: GradMode) -> str:
    """Describe an error of a model that ran in `mode`, with the line of the user's code.

    For a backward pass without a graph, the description names the mode as the cause.
    """
    if not _needs_graph(error, mode):
        return f"{type(error).__name__}: {first_line(error)}{_raising_line(error)}"
    # Inference mode records no graph even with gradients enabled.
    outer_mode = "" if mode is GradMode.NO_GRAD else "run.mode=no_grad with "
    return (
        f"{_backward_line(error)} needs a graph, but the model ran in {mode}, which records none; "
        f"set run.mode=grad, or use {outer_mode}torch.enable_grad() around that part of the model"
    )


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = first_line(error)
    return isinstance(error, RuntimeError) and (
        "allocate memory" in text or text.startswith(_OUT_OF_MEMORY)
    )


def device_failed(error: BaseException) -> bool:
    """Whether a CUDA device reported an error, after which this process cannot use it."""
    cuda = isinstance(error, RuntimeError) and first_line(error).startswith("CUDA error:")
    return cuda and not ran_out_of_memory(error)


def describe_allocation(error: BaseException) -> str:
    """Describe the size of a failed allocation and the available memory."""
    size = re.search(r"allocate (\d+) bytes", str(error))
    request = f"torch requested {format_bytes(int(size[1]))}" if size else first_line(error)
    available = format_bytes(psutil.virtual_memory().available)
    return f"{request}; {available} of host memory available"


def _needs_graph(error: BaseException, mode: GradMode) -> bool:
    return mode is not GradMode.GRAD and _NO_GRAPH in first_line(error)


def _backward_line(error: BaseException) -> str:
    """Return the user's call that needs gradients: "backward() at /home/me/net.py:13"."""
    for callee, file, line in _user_frames(error):
        if callee:
            return f"{callee}() at {file}:{line}"
    return "backward()"


def _raising_line(error: BaseException) -> str:
    """Return the innermost line outside of torch: " (/home/me/net.py:13)"."""
    for _, file, line in _user_frames(error):
        if file.is_file():
            return f" ({file}:{line})"
    return ""


def _user_frames(error: BaseException) -> Iterator[tuple[str, Path, int | None]]:
    """Yield (function called there, file, line) of the frames outside of torch, innermost first.

    A TorchScript program has no Python frames.
    """
    callee = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_relative_to(_GRADRUN):
            return
        if not file.is_relative_to(_TORCH):
            yield callee, file, frame.lineno
        callee = frame.name


def _failing_module(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    # The model fails again, and its unfinished calls stay on the stack.
    with track_module_calls(lambda _, inputs: inputs) as stack, suppress(Exception, SystemExit):
        model(*args, **kwargs)
    if not stack.calls:
        return ""
    module, inputs = stack.calls[-1]
    path = {inner: name for name, inner in model.named_modules()}.get(module, "")
    weight = getattr(module, "weight", None)
    kind = str(module).splitlines()[0].rstrip("(")
    size = f" with weight {_describe(weight)}" if isinstance(weight, torch.Tensor) else ""
    tensors = ", ".join(_describe(value) for value in inputs if isinstance(value, torch.Tensor))
    if not tensors:  # called by keyword, and global hooks receive only positional arguments
        return ""
    return f"; module {path or '(the model)'} is {kind}{size} and got {tensors}"


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if nn.parameter.is_lazy(value):
        return "(not yet initialized)"
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
