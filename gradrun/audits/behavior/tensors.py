"""What a mode does to the tensors made in it: flags, backward, and what becomes of them later.

Knows no second thread and no function: one block, its tensors, and the code after it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import backward

from gradrun.audits.behavior.probe import (
    Ask,
    Probe,
    block,
    enter_other_mode,
    in_all_modes,
    outcome,
    yes,
)
from gradrun.core.grad_mode import GradMode

_NO_GRAPH = "element 0 of tensors does not require grad and does not have a grad_fn"
_UNCOUNTED = "Inference tensors do not track version counter"
_CHANGED = "Inplace update to inference tensor outside InferenceMode"
_SAVED = "Inference tensors cannot be saved for backward"


def _inside(look: Callable[[], bool]) -> Ask:
    """What the thread says of itself within the block."""

    def ask(mode: GradMode, device: torch.device) -> str:
        enter_other_mode(mode)
        with block(mode):
            return yes(look())

    return ask


def _of_result(look: Callable[[Tensor, Tensor], str]) -> Ask:
    """What is seen of r and w after a block that held `r = w * 2`."""

    def ask(mode: GradMode, device: torch.device) -> str:
        w = torch.ones(3, device=device, requires_grad=True)
        with block(mode):
            r = w * 2
        return look(r, w)

    return ask


def _of_view(look: Callable[[Tensor], bool]) -> Ask:
    """What is seen of `w.view(-1)`, made in the block."""

    def ask(mode: GradMode, device: torch.device) -> str:
        w = torch.ones(3, device=device, requires_grad=True)
        with block(mode):
            view = w.view(-1)
        return yes(look(view))

    return ask


def _of_parameter(look: Callable[[nn.Parameter], str]) -> Ask:
    """What is seen of a Parameter that was made in the block."""

    def ask(mode: GradMode, device: torch.device) -> str:
        with block(mode):
            p = nn.Parameter(torch.ones(3, device=device))
        return look(p)

    return ask


def _kind(tensor: Tensor) -> str:
    return "inference" if tensor.is_inference() else "normal"


def _train(p: nn.Parameter) -> None:
    backward((p * torch.ones(3, device=p.device)).sum())
    torch.optim.SGD([p], lr=0.1).step()


def _through_pickle(tensor: Tensor) -> Tensor:
    copied: Tensor = pickle.loads(pickle.dumps(tensor))  # noqa: S301 - our own, a line ago
    return copied


INSIDE = (
    Probe(
        "is_grad_enabled()",
        ("yes", "no", "no"),
        _inside(torch.is_grad_enabled),
        "Both modes turn the grad flag off, so code that asks only for it cannot tell them apart.",
    ),
    Probe(
        "is_inference_mode_enabled()",
        ("no", "no", "yes"),
        _inside(torch.is_inference_mode_enabled),
        "Inference mode is a second flag beside the grad flag, and overrules it.",
    ),
)

MADE = (
    Probe(
        "r.requires_grad",
        ("yes", "no", "no"),
        _of_result(lambda r, _: yes(r.requires_grad)),
        "Without gradients an operation on a weight is not recorded, and its result needs none.",
    ),
    Probe(
        "r.is_leaf",
        ("no", "yes", "yes"),
        _of_result(lambda r, _: yes(r.is_leaf)),
        "A tensor that no recorded operation made is a leaf: no graph lies behind it, and no "
        "memory is held by one.",
    ),
    Probe(
        "r.is_inference()",
        ("no", "no", "yes"),
        _of_result(lambda r, _: yes(r.is_inference())),
        "What inference mode makes is an inference tensor for life, also outside the block.",
    ),
    Probe(
        "r._version",
        ("0", "0", "RuntimeError"),
        _of_result(lambda r, _: outcome(lambda: str(r._version), _UNCOUNTED)),
        "Inference tensors do not count changes in place. That saves time, and it is why autograd "
        "refuses them: it could not notice that a value it saved has changed.",
    ),
    Probe(
        "r.sum().backward()",
        ("works", "RuntimeError", "RuntimeError"),
        _of_result(lambda r, _: outcome(lambda: backward(r.sum()), _NO_GRAPH)),
        f'Nothing was recorded to go back through; torch says "{_NO_GRAPH}".',
    ),
    Probe(
        "w.view(-1).requires_grad",
        in_all_modes("yes"),
        _of_view(lambda view: view.requires_grad),
        "A view is its base under another shape: it requires gradients as its base does.",
    ),
    Probe(
        "w.view(-1).is_inference()",
        in_all_modes("no"),
        _of_view(Tensor.is_inference),
        "A view of a normal tensor is a normal tensor, also when inference mode made it.",
    ),
)

AFTERWARDS = (
    Probe(
        "r.add_(1)",
        ("works", "works", "RuntimeError"),
        _of_result(lambda r, _: outcome(lambda: r.add_(1), _CHANGED)),
        f"An inference tensor is read-only outside inference mode; torch says "
        f'"{_CHANGED} is not allowed". Change a clone() instead.',
    ),
    Probe(
        "r * w, which saves r",
        ("works", "works", "RuntimeError"),
        _of_result(lambda r, w: outcome(lambda: backward((r * w).sum()), _SAVED)),
        f'What backward needs must be a normal tensor; torch says "{_SAVED}". Use a clone(), or '
        "make it under no_grad.",
    ),
    Probe(
        "r + w, which saves nothing",
        in_all_modes("works"),
        _of_result(lambda r, w: outcome(lambda: backward((r + w).sum()), _SAVED)),
        "Only what is saved for backward must be normal: an addition saves nothing, so mixing "
        "works in one place and fails in the next.",
    ),
    Probe(
        "r.clone()",
        in_all_modes("normal"),
        _of_result(lambda r, _: _kind(r.clone())),
        "A clone made outside is a normal tensor: the way out of inference mode.",
    ),
    Probe(
        "copy.deepcopy(r.detach())",
        in_all_modes("normal"),
        _of_result(lambda r, _: _kind(copy.deepcopy(r.detach()))),
        "A deep copy is a clone, so copying a module outside the block mends its tensors.",
    ),
    Probe(
        "pickle.loads(pickle.dumps(r))",
        in_all_modes("normal"),
        _of_result(lambda r, _: _kind(_through_pickle(r))),
        "Files and other processes carry values, not modes: what is read back is normal.",
    ),
    Probe(
        "r.detach()",
        ("normal", "normal", "inference"),
        _of_result(lambda r, _: _kind(r.detach())),
        "detach() shares memory and so stays what r is; it does not lead out of inference mode.",
    ),
    Probe(
        "r.data",
        ("normal", "normal", "inference"),
        _of_result(lambda r, _: _kind(r.data)),
        ".data shares memory and so stays what r is; it does not lead out of inference mode.",
    ),
    Probe(
        "r.to(r.dtype)",
        ("normal", "normal", "inference"),
        _of_result(lambda r, _: _kind(r.to(r.dtype))),
        "A .to() that has nothing to convert returns r itself, so whether it makes a normal tensor "
        "hangs on the dtype.",
    ),
)

PARAMETER = (
    Probe(
        "p is",
        ("normal", "normal", "inference"),
        _of_parameter(_kind),
        "A module, and whatever it makes lazily, belongs outside inference mode: parameters made "
        "inside are inference tensors.",
    ),
    Probe(
        "a training step on p afterwards",
        ("works", "works", "RuntimeError"),
        _of_parameter(lambda p: outcome(lambda: _train(p), _CHANGED)),
        "A parameter that inference mode made can never be trained: the optimizer's update in "
        "place is refused.",
    ),
)
