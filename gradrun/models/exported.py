"""A program from torch.export.save, run also where it was exported for one batch size.

Knows the sizes that the program takes; a batch that is too small is padded and its outputs cut.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradrun.config.model import ExportedModel
from gradrun.core.errors import ConfigError
from gradrun.models.pt2_trust import inspect, weights_only_loads


def open_model(config: ExportedModel, *, trust_code: bool) -> nn.Module:
    """The program as a module that takes inputs as it was exported to, in batches as it can."""
    program = _load(config.path, trust_code=trust_code)
    smallest, largest = _batch_sizes(program)
    return Program(program.module(), _positional_names(program), smallest, largest)


def _positional_names(program: torch.export.ExportedProgram) -> tuple[str, ...] | None:
    """The names of inputs that the program takes by position alone; None where it takes names."""
    if program.call_spec.in_spec is None or program.call_spec.in_spec.children()[1].num_children:
        return None
    signature = program.module_call_graph[0].signature
    return tuple(signature.forward_arg_names or ()) if signature else ()


def _load(path: Path, *, trust_code: bool) -> torch.export.ExportedProgram:
    try:
        if trust_code:
            return torch.export.load(path)
        inspect(path)
        with weights_only_loads(), _quiet():
            return torch.export.load(path)
    except ConfigError:
        raise
    except Exception as error:  # a damaged archive fails in any of a dozen ways
        raise ConfigError(
            f"{path} is no program that torch {torch.__version__} reads ({type(error).__name__}); "
            "it is written by torch.export.save (source: torchscript reads torch.jit's files)",
            "model.path",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging the traceback of what it is about to raise, or to try otherwise."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _batch_sizes(program: torch.export.ExportedProgram) -> tuple[int, int | None]:
    """The smallest and largest first dimension that the program's inputs take."""
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
            # Without an upper bound torch gives an infinity of sympy's, which is no int.
            largest = int(limits.upper) if limits.upper.is_Integer else largest
    return smallest, largest


class Program(nn.Module):
    """Calls an exported program with what it takes.

    A batch below `smallest` is padded by repeating its last sample, and the outputs are cut. Inputs
    that come by name are put in the program's order where it knows positions only.
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
        """Inputs of shape [n, ...] to what the program gives for them, n samples of it.

        Raises:
            ConfigError: n is more than the program takes.
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
        return _cut(padded, self.smallest, size)


def _pad(value: torch.Tensor, missing: int) -> torch.Tensor:
    return torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])


def _cut(value: Any, padded: int, size: int) -> Any:
    """`value` with every tensor of `padded` samples cut to the first `size`."""
    if isinstance(value, torch.Tensor):
        return value[:size] if value.ndim and len(value) == padded else value
    if isinstance(value, dict):
        return {name: _cut(item, padded, size) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cut(item, padded, size) for item in value)
    return value
