"""The model under audit in one gradient mode, and the source lines of its modules."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from gradrun.config.schema import RunConfig
from gradrun.core.grad_mode import GradMode
from gradrun.data.batch import Batch
from gradrun.inference.device import execution_context, seed_generators

_TORCH = Path(torch.__file__).parent


@dataclass
class AuditTarget:
    """A model with batches, in the mode of its config; a ComparableModel of equivalence.py."""

    name: str
    config: RunConfig
    device: torch.device
    model: nn.Module
    batches: list[Batch]

    @property
    def mode(self) -> GradMode:
        """The gradient mode of the runs."""
        return self.config.run.mode

    def execution_context(self) -> AbstractContextManager[None]:
        """Return a context with the gradient mode and autocast of the config."""
        return execution_context(self.config.run, self.device)

    def run_batch(self, number: int) -> Any:
        """Run the model on one of the batches, in the current mode."""
        batch = self.batches[number % len(self.batches)]
        return self.model(*batch.args, **batch.kwargs)

    def copy(self, number: int = 0) -> Batch:
        """Return a copy of a batch that the model may modify; its tensors are normal tensors."""
        return self.batches[number % len(self.batches)].map(torch.clone)

    def run(self, batch: Batch) -> Any:
        """Run the model on a batch in its mode, seeded with the config's seed."""
        seed_generators(self.config.run.seed, self.device)
        with self.execution_context():
            return self.model(*batch.args, **batch.kwargs)

    def label(self, module: nn.Module) -> str:
        """Return "path (Type)" of a module."""
        for name, known in self.model.named_modules():
            if known is module:
                return f"{name or '(the model)'} ({type(module).__name__})"
        return f"(outside the model) ({type(module).__name__})"

    def labelled(self, label: str) -> nn.Module:
        """Return the module of a label, or the model if the label matches none."""
        path = label.partition(" (")[0]
        return next((m for name, m in self.model.named_modules() if name == path), self.model)


def users_line(frame: FrameType | None) -> str | None:
    """Return file:line of the innermost frame outside of torch."""
    while frame is not None:
        if not Path(frame.f_code.co_filename).is_relative_to(_TORCH):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def source_of(module: nn.Module) -> str | None:
    """Return file:line of a module's forward or class; None if both belong to torch."""
    if isinstance(module, torch.jit.ScriptModule):
        return None  # TorchScript code has no source file
    for place in (inspect.unwrap(type(module).forward), type(module)):
        try:
            file, line = inspect.getsourcefile(place), inspect.getsourcelines(place)[1]
        except (OSError, TypeError):
            continue
        if file and not Path(file).is_relative_to(_TORCH):
            return f"{file}:{line}"
    return None
