"""Apply the settings of a config that hold for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradrun.config.run import RunSection
from gradrun.core.errors import ConfigError
from gradrun.inference.allocator import allocator_settings

_BACKENDS = ("mkldnn", "cudnn", "cuda")
_OPERATORS = ("matmul", "conv")


@contextmanager
def process_settings(run: RunSection) -> Iterator[None]:
    """Apply allocator, precision of float32 operators and fast path; restore them at the end.

    Raises:
        ConfigError: the installed torch cannot set the precision.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with allocator_settings(run.allocator), _float32_precision(run.float32_precision):
        torch.backends.mha.set_fastpath_enabled(fast_path and run.fast_path)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _float32_precision(precision: str | None) -> Iterator[None]:
    if precision is None:
        yield
        return
    named: list[Any] = [
        getattr(getattr(torch.backends, backend), name, None)
        for backend in _BACKENDS
        for name in _OPERATORS
    ]
    operators = [operator for operator in named if hasattr(operator, "fp32_precision")]
    if not operators:
        raise ConfigError(
            f"torch {torch.__version__} has no fp32_precision; it needs 2.9 or newer",
            "run.float32_precision",
        )
    before = [(operator, operator.fp32_precision) for operator in operators]
    try:
        for operator in operators:
            _set_precision(operator, precision)
        yield
    finally:
        for operator, value in before:
            operator.fp32_precision = value


def _set_precision(operator: Any, precision: str) -> None:
    try:
        operator.fp32_precision = precision
    except RuntimeError:  # this backend has no such precision, such as bf16 on CUDA
        operator.fp32_precision = "ieee"
