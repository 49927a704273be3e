"""Run the code of one question in a gradient mode and format its answer."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import torch
from torch import nn

from gradrun.core.errors import first_line
from gradrun.core.grad_mode import GradMode
from gradrun.modes import observe

BLOCKS: dict[GradMode, type[Any]] = {
    GradMode.GRAD: torch.enable_grad,
    GradMode.NO_GRAD: torch.no_grad,
    GradMode.INFERENCE_MODE: torch.inference_mode,
}
"""mode -> torch's context manager for it. The table describes torch, not gradrun's guards."""


class Unavailable(Exception):
    """The installed torch or machine cannot run a question; the message is the reason."""


def run_snippet(code: str, mode: GradMode, device: torch.device, error: str | None) -> str:
    """Execute `code` and return its variable `answer` as text.

    The code sees `block` (torch's context manager for the mode), `enter_other_mode()`,
    `current_mode()`, `kind()`, `compiled()`, `device`, `mode` and the modules it needs.

    Args:
        error: part of the message of an error that counts as an answer (its type name); None if
            no error does.
    """
    names: dict[str, Any] = {
        "asyncio": asyncio,
        "copy": copy,
        "nn": nn,
        "pickle": pickle,
        "torch": torch,
        "Thread": Thread,
        "ThreadPoolExecutor": ThreadPoolExecutor,
        "block": BLOCKS[mode],
        "compiled": _compiled,
        "current_mode": current_mode,
        "device": device,
        "enter_other_mode": lambda: torch.set_grad_enabled(mode is not GradMode.GRAD),
        "kind": _kind,
        "mode": mode,
        "modes": BLOCKS,
        "tensor_mode": _tensor_mode,
    }
    try:
        exec(compile(code, "<question>", "exec"), names)  # noqa: S102 - text of questions.yaml
        answer = names.get("answer", "works")
        return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer)
    except Unavailable:
        raise
    except Exception as raised:
        if error is None or error not in str(raised):
            raise
        return type(raised).__name__


def current_mode() -> GradMode:
    """Return the thread's gradient mode; inference mode takes precedence over the grad flag."""
    state = observe()
    if state.inference:
        return GradMode.INFERENCE_MODE
    return GradMode.GRAD if state.grad else GradMode.NO_GRAD


def _tensor_mode(result: torch.Tensor) -> GradMode:
    """Return the mode in which a product with a weight was computed."""
    if result.is_inference():
        return GradMode.INFERENCE_MODE
    return GradMode.GRAD if result.requires_grad else GradMode.NO_GRAD


def _kind(tensor: torch.Tensor) -> str:
    return "inference" if tensor.is_inference() else "normal"


class GraphCounter:
    """A torch.compile backend that counts graphs and runs them unchanged."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def _compiled(body: Callable[..., Any], *, fullgraph: bool = True) -> tuple[Any, GraphCounter]:
    """Return `body` under torch.compile and the counter of its graphs.

    Each snippet defines its own code object, so nothing compiled earlier is reused, and the
    caller's compiled functions stay as they are (torch._dynamo.reset() would discard them).

    Raises:
        Unavailable: torch.compile does not work on this machine.
    """
    probe, names = GraphCounter(), dict[str, Any]()
    exec("def double(x): return x * 2", names)  # noqa: S102 - a new code object, as in snippets
    try:
        double: Any = torch.compile(names["double"], backend=probe, fullgraph=True)
        double(torch.ones(3))
    except Exception as error:  # any error of an installation without a working dynamo
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise Unavailable(f"torch.compile fails here: {reason}") from error
    if not probe.graphs:
        raise Unavailable("torch.compile is turned off here")
    counter = GraphCounter()
    return torch.compile(body, backend=counter, fullgraph=fullgraph), counter
