"""What a forward changes or depends on beside its input: training mode, buffers, random numbers.

Knows modules and their tensors; not gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from gradrun.audits.target import AuditTarget, source_of, users_line
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from gradrun.inference.module_calls import track_module_calls
from gradrun.inference.module_state import TABLES, preserve_module_state
from gradrun.output.transforms import iter_tensors
from gradrun.results.result import Finding

_TRAIN = nn.Module.train.__code__


def first_run(subject: AuditTarget) -> Iterable[Finding]:
    """Parameters, buffers and caches that the first forward made inside inference mode.

    They stay: this is the model's first run, and what it makes lazily it makes once.
    """
    returned = subject.run(subject.copy())
    if not list(iter_tensors(returned)):
        kind = type(returned).__name__
        raise ConfigError(
            f"the model returned {kind}, where a tensor or several are wanted", "model"
        )
    if subject.mode is not GradMode.INFERENCE_MODE:
        return
    made = {id(t) for m in subject.model.modules() for _, t in _own_tensors(m) if t.is_inference()}
    subject.run(subject.copy())
    for name, module in subject.model.named_modules():
        for attribute, tensor in _own_tensors(module):
            # What each call makes anew is not there for good.
            if id(tensor) not in made or not tensor.is_inference():
                continue
            path = f"{name}.{attribute}" if name else attribute
            registered = attribute in module._parameters or attribute in module._buffers
            kind = "Parameter" if attribute in module._parameters else "Buffer"
            yield Finding(
                severity="error" if registered else "warning",
                code="made_in_inference_mode",
                modes=(subject.mode,),
                module=subject.label(module),
                source=source_of(module),
                text=f"{kind if registered else 'Attribute'} {path} was made inside "
                "inference_mode: it is an inference tensor for good, and breaks training later "
                "in the process",
                advice="Make it in __init__, or run the model once in grad or no_grad first",
                cost=tensor.nbytes,
            )


def disturbed(subject: AuditTarget) -> Iterable[Finding]:
    """Training mode, random numbers, and writes into buffers, parameters or the input."""
    batch, seen = subject.copy(), _Seen(subject.device)
    inputs = [(tensor, tensor.clone()) for tensor in batch.tensors()]
    seen.inputs = [tensor for tensor, _ in inputs]
    kept = {name: tensor.detach().clone() for name, tensor in _plain_state(subject.model)}
    parameters = dict(subject.model.named_parameters())
    with preserve_module_state(subject.model):
        with track_module_calls(seen.enter, seen.leave), _train_calls(seen):
            subject.run(batch)
        changed = [
            name
            for name, tensor in _plain_state(subject.model)
            if not _same(kept.get(name), tensor)
        ]
    for name in [name for name in changed if name in parameters]:
        with torch.no_grad():
            parameters[name].copy_(kept[name])
    yield from _training(subject, seen)
    yield from _random(subject, seen)
    yield from _written(subject, changed, parameters, seen)
    if any(not _same(before, tensor) for tensor, before in inputs):
        culprit = subject.model if seen.writer is None else seen.writer
        yield Finding(
            severity="warning",
            code="changes_input",
            modes=(subject.mode,),
            module=subject.label(culprit),
            source=source_of(culprit),
            text="Changes the model's input in place: whoever still needs the batch gets another",
            advice="Clone the input first, or use the operation that is not in place",
        )


class _Seen:
    """What module calls show from outside."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inputs: list[torch.Tensor] = []
        self.training: dict[nn.Module, None] = {}
        self.drew: dict[nn.Module, None] = {}
        self.switched_on: str | None = None
        """Where a forward called train()."""
        self.writer: nn.Module | None = None
        self._told: list[bool] = []
        """For each call under way, whether a module inside it is known to draw."""

    def enter(self, module: nn.Module, _: Any) -> Any:
        if module.training:
            self.training[module] = None
        self._told.append(False)
        return self._random_state(), self._versions()

    def leave(self, module: nn.Module, before: Any, _: Any) -> None:
        random, versions = before
        # The innermost module returns first; those around it only called it.
        told = self._told.pop()
        if not torch.equal(random, self._random_state()):
            if not told:
                self.drew[module] = None
            if self._told:
                self._told[-1] = True
        if self.writer is None and versions != self._versions():
            self.writer = module

    def _random_state(self) -> torch.Tensor:
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in self.inputs]


@contextmanager
def _train_calls(seen: _Seen) -> Iterator[None]:
    """Note where train() is called while the block runs."""

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is _TRAIN and frame.f_locals.get("mode", True):
            seen.switched_on = seen.switched_on or users_line(frame.f_back)

    earlier = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(earlier)


def _training(subject: AuditTarget, seen: _Seen) -> Iterator[Finding]:
    asked = getattr(subject.config.model, "training", False)
    advice = "Call eval() on it in the end, and do not override train()"
    if asked:
        advice = "Leave out model.training: true"
    elif seen.switched_on:
        advice = "Do not call train() in a forward"
    for module in seen.training:
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            text = f"Drops {module.p:.0%} of its input at random: it is in training mode"
        elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.InstanceNorm1d) and (
            module.track_running_stats
        ):
            text = (
                "Is in training mode: it normalizes with the statistics of each batch, and "
                "moves its running ones with every forward"
            )
        else:
            continue
        yield Finding(
            severity="warning" if asked else "error",
            code="training_mode",
            modes=(subject.mode,),
            module=subject.label(module),
            source=seen.switched_on or source_of(module),
            text=text,
            advice=advice,
        )


def _random(subject: AuditTarget, seen: _Seen) -> Iterator[Finding]:
    for module in seen.drew:
        if module in seen.training and isinstance(module, nn.modules.dropout._DropoutNd):
            continue
        yield Finding(
            severity="warning",
            code="random",
            modes=(subject.mode,),
            module=subject.label(module),
            source=source_of(module),
            text="Draws random numbers, so that there is noise in the predictions",
            advice="Pass training=self.training to functional dropout; noise is seldom meant",
        )


def _written(
    subject: AuditTarget, changed: list[str], parameters: dict[str, Any], seen: _Seen
) -> Iterator[Finding]:
    """One finding a module for parameters and buffers that its forward wrote."""
    batch_norms = nn.modules.batchnorm._NormBase
    by_module: dict[str, list[str]] = {}
    for name in changed:
        by_module.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    for path, names in by_module.items():
        module = dict(subject.model.named_modules())[path]
        if isinstance(module, batch_norms) and module in seen.training:
            continue  # said already
        trained = [name for name in names if f"{path}.{name}".lstrip(".") in parameters]
        yield Finding(
            severity="error" if trained else "warning",
            code="changes_parameters" if trained else "changes_buffers",
            modes=(subject.mode,),
            module=subject.label(module),
            source=source_of(module),
            text=f"Its forward changes {', '.join(trained or names)}: a prediction depends on "
            "what was predicted before it",
            advice="Keep what a call computes in local variables"
            if trained
            else "Fine for a cache that is meant; otherwise keep it in local variables",
        )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for table in (module._parameters, module._buffers, vars(module)):
        for name, value in list(table.items()):
            if isinstance(value, torch.Tensor):
                yield name, value
            # The modules' own tables are dicts too, and are walked elsewhere.
            elif isinstance(value, dict | list | tuple) and name not in TABLES:
                yield from ((f"{name}.{path}", t) for path, t in iter_tensors(value))


def _plain_state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.layout == torch.strided and not nn.parameter.is_lazy(tensor):
            yield name, tensor


def _same(before: torch.Tensor | None, after: torch.Tensor) -> bool:
    if before is None:  # made by this very call
        return True
    with torch.no_grad():
        return before.shape == after.shape and torch.equal(
            before.nan_to_num() if before.is_floating_point() else before,
            after.nan_to_num() if after.is_floating_point() else after,
        )
