"""Detect state that a forward changes or depends on: training mode, buffers, random numbers."""

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
_NORMS = nn.modules.batchnorm._NormBase
"""Batch and instance normalization."""


def first_run(subject: AuditTarget) -> Iterable[Finding]:
    """Report parameters, buffers and caches that the first forward creates in inference mode.

    The model's state is not restored: lazily created tensors are created only once.
    """
    returned = subject.run(subject.copy())
    if not list(iter_tensors(returned)):
        kind = type(returned).__name__
        raise ConfigError(f"the model returned {kind}; expected one or more tensors", "model")
    if subject.mode is not GradMode.INFERENCE_MODE:
        return
    created = {
        id(t) for m in subject.model.modules() for _, t in _own_tensors(m) if t.is_inference()
    }
    subject.run(subject.copy())
    for name, module in subject.model.named_modules():
        for attribute, tensor in _own_tensors(module):
            # Tensors that each call replaces do not persist.
            if id(tensor) not in created or not tensor.is_inference():
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
                text=f"{kind if registered else 'Attribute'} {path} was created in "
                "inference_mode: it remains an inference tensor and breaks later training in the "
                "same process",
                advice="Create it in __init__, or run the model once in grad or no_grad first",
                cost=tensor.nbytes,
            )


def side_effects(subject: AuditTarget) -> Iterable[Finding]:
    """Report training mode, random numbers, and writes to buffers, parameters or inputs."""
    batch, observed = subject.copy(), _Observed(subject.device)
    inputs = [(tensor, tensor.clone()) for tensor in batch.tensors()]
    observed.inputs = [tensor for tensor, _ in inputs]
    saved = {name: tensor.detach().clone() for name, tensor in _plain_state(subject.model)}
    parameters = dict(subject.model.named_parameters())
    with preserve_module_state(subject.model):
        with track_module_calls(observed.enter, observed.leave), _train_calls(observed):
            subject.run(batch)
        changed = [
            name
            for name, tensor in _plain_state(subject.model)
            if not _equal(saved.get(name), tensor)
        ]
    for name in [name for name in changed if name in parameters]:
        with torch.no_grad():
            parameters[name].copy_(saved[name])
    yield from _training(subject, observed)
    yield from _random(subject, observed)
    yield from _written(subject, changed, parameters, observed)
    if any(not _equal(before, tensor) for tensor, before in inputs):
        writer = subject.model if observed.writer is None else observed.writer
        yield Finding(
            severity="warning",
            code="changes_input",
            modes=(subject.mode,),
            module=subject.label(writer),
            source=source_of(writer),
            text="Modifies the model's input in place; other users of the batch see the change",
            advice="Clone the input first, or use the out-of-place operation",
        )


class _Observed:
    """State changes observed around module calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inputs: list[torch.Tensor] = []
        self.training: dict[nn.Module, None] = {}
        self.drew: dict[nn.Module, None] = {}
        self.switched_on: str | None = None
        """The source line of a train() call inside a forward."""
        self.writer: nn.Module | None = None
        self._inner_drew: list[bool] = []
        """For each running call, whether a module inside it has drawn random numbers."""

    def enter(self, module: nn.Module, _: Any) -> Any:
        if module.training:
            self.training[module] = None
        self._inner_drew.append(False)
        return self._random_state(), self._versions()

    def leave(self, module: nn.Module, before: Any, _: Any) -> None:
        random, versions = before
        # The innermost module returns first; outer modules only called it.
        inner_drew = self._inner_drew.pop()
        if not torch.equal(random, self._random_state()):
            if not inner_drew:
                self.drew[module] = None
            if self._inner_drew:
                self._inner_drew[-1] = True
        if self.writer is None and versions != self._versions():
            self.writer = module

    def _random_state(self) -> torch.Tensor:
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in self.inputs]


@contextmanager
def _train_calls(observed: _Observed) -> Iterator[None]:
    """Record the source line of train() calls while the block runs."""

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is _TRAIN and frame.f_locals.get("mode", True):
            observed.switched_on = observed.switched_on or users_line(frame.f_back)

    earlier = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(earlier)


def _training(subject: AuditTarget, observed: _Observed) -> Iterator[Finding]:
    requested = getattr(subject.config.model, "training", False)
    advice = "Call eval() last, and do not override train()"
    if requested:
        advice = "Remove model.training: true"
    elif observed.switched_on:
        advice = "Do not call train() in a forward"
    for module in observed.training:
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            text = f"Is in training mode and drops {module.p:.0%} of its input at random"
        elif isinstance(module, _NORMS) and module.track_running_stats:
            unit = "batch" if isinstance(module, nn.modules.batchnorm._BatchNorm) else "sample"
            text = (
                f"Is in training mode: it normalizes with the statistics of each {unit} and "
                "updates its running statistics in every forward"
            )
        else:
            continue
        yield Finding(
            severity="warning" if requested else "error",
            code="training_mode",
            modes=(subject.mode,),
            module=subject.label(module),
            source=observed.switched_on or source_of(module),
            text=text,
            advice=advice,
        )


def _random(subject: AuditTarget, observed: _Observed) -> Iterator[Finding]:
    for module in observed.drew:
        if module in observed.training and isinstance(module, nn.modules.dropout._DropoutNd):
            continue
        yield Finding(
            severity="warning",
            code="random",
            modes=(subject.mode,),
            module=subject.label(module),
            source=source_of(module),
            text="Draws random numbers, which adds noise to the predictions",
            advice="Pass training=self.training to functional dropout",
        )


def _written(
    subject: AuditTarget, changed: list[str], parameters: dict[str, Any], observed: _Observed
) -> Iterator[Finding]:
    """Yield one finding per module whose forward writes to parameters or buffers."""
    by_module: dict[str, list[str]] = {}
    for name in changed:
        by_module.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    for path, names in by_module.items():
        module = dict(subject.model.named_modules())[path]
        if isinstance(module, _NORMS) and module in observed.training:
            continue  # reported as training mode
        trained = [name for name in names if f"{path}.{name}".lstrip(".") in parameters]
        yield Finding(
            severity="error" if trained else "warning",
            code="changes_parameters" if trained else "changes_buffers",
            modes=(subject.mode,),
            module=subject.label(module),
            source=source_of(module),
            text=f"Its forward changes {', '.join(trained or names)}: predictions depend on "
            "earlier batches",
            advice="Store intermediate values in local variables"
            if trained
            else "No change needed for an intended cache; otherwise use local variables",
        )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for table in (module._parameters, module._buffers, vars(module)):
        for name, value in list(table.items()):
            if isinstance(value, torch.Tensor):
                yield name, value
            # Parameter and module tables are dicts too; they are visited separately.
            elif isinstance(value, dict | list | tuple) and name not in TABLES:
                yield from ((f"{name}.{path}", t) for path, t in iter_tensors(value))


def _plain_state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.layout == torch.strided and not nn.parameter.is_lazy(tensor):
            yield name, tensor


def _equal(before: torch.Tensor | None, after: torch.Tensor) -> bool:
    if before is None:  # created by this call
        return True
    with torch.no_grad():
        return before.shape == after.shape and torch.equal(
            before.nan_to_num() if before.is_floating_point() else before,
            after.nan_to_num() if after.is_floating_point() else after,
        )
