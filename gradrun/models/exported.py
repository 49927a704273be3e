"""A program saved with torch.export.save, run in batches of the sizes that it accepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradrun.config.model import ExportedModel
from gradrun.core.errors import ConfigError
from gradrun.core.imports import require_trust
from gradrun.models.loaded import LoadedModel


def open_model(config: ExportedModel, *, trust_code: bool) -> LoadedModel:
    """Load the program as a module; see ExportedProgram."""
    require_trust(trust_code, f"{config.path} contains an exported program", "model.path")
    try:
        program = torch.export.load(config.path)
    except Exception as error:  # torch raises many types of error for a damaged archive
        raise ConfigError(
            f"{config.path} is not a program that torch {torch.__version__} can read "
            f"({type(error).__name__}); save it with torch.export.save (source: torchscript reads "
            "files of torch.jit.save)",
            "model.path",
        ) from error
    smallest, largest = _batch_sizes(program)
    module = ExportedProgram(program.module(), _positional_names(program), smallest, largest)
    return LoadedModel(module, files=(config.path,))


def _positional_names(program: torch.export.ExportedProgram) -> tuple[str, ...] | None:
    """Return the names of inputs if the program takes all by position, None if it takes names."""
    spec = program.call_spec.in_spec
    if spec is None or spec.unflatten([None] * spec.num_leaves)[1]:
        return None
    signature = program.module_call_graph[0].signature
    return tuple(signature.forward_arg_names or ()) if signature else ()


def _batch_sizes(program: torch.export.ExportedProgram) -> tuple[int, int | None]:
    """Return the smallest and largest first dimension that the inputs accept."""
    smallest, largest = 0, None
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name not in program.graph_signature.user_inputs or not getattr(value, "ndim", 0):
            continue
        size = value.shape[0]
        if isinstance(size, int):
            return size, size
        limits = program.range_constraints.get(size.node.expr)
        if limits is not None:
            smallest = max(smallest, int(limits.lower))
            # Without an upper bound torch gives sympy's infinity, which is not an integer.
            largest = int(limits.upper) if limits.upper.is_Integer else largest
    return smallest, largest


class ExportedProgram(nn.Module):
    """Calls an exported program with batches of any size up to its maximum.

    A batch smaller than the minimum is padded with copies of its last sample, and the outputs are
    truncated. Named inputs are put into the program's order if it takes inputs by position.
    """

    def __init__(
        self,
        module: nn.Module,
        positional: tuple[str, ...] | None,
        smallest: int,
        largest: int | None,
    ) -> None:
        super().__init__()
        self.module, self.positional = module, positional
        self.smallest, self.largest = smallest, largest

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """Call the program with inputs [n, ...] and return its outputs for the n samples.

        Raises:
            ConfigError: n exceeds the program's maximum.
        """
        if kwargs and self.positional is not None:
            known = set(self.positional) == set(kwargs)
            args = (*args, *(kwargs[name] for name in (self.positional if known else kwargs)))
            kwargs = {}
        size = len(next(iter((*args, *kwargs.values()))))
        if self.largest is not None and size > self.largest:
            raise ConfigError(
                f"the program was exported for batches of at most {self.largest}; "
                f"set data.batch_size to {self.largest}",
                "data.batch_size",
            )
        missing = self.smallest - size
        if missing <= 0:
            return self.module(*args, **kwargs)
        padded = self.module(
            *(_pad(value, missing) for value in args),
            **{name: _pad(value, missing) for name, value in kwargs.items()},
        )
        return _truncate(padded, self.smallest, size)


def _pad(value: torch.Tensor, missing: int) -> torch.Tensor:
    return torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])


def _truncate(value: Any, padded: int, size: int) -> Any:
    """Truncate every tensor of `padded` samples in a nested value to `size` samples."""
    if isinstance(value, torch.Tensor):
        return value[:size] if value.ndim and len(value) == padded else value
    if isinstance(value, dict):
        return {name: _truncate(item, padded, size) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_truncate(item, padded, size) for item in value)
    return value
