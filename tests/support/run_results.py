"""A RunResult with fixed values, for tests that read results instead of measuring."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from gradrun.config.schema import RunConfig
from gradrun.core.grad_mode import GradMode
from gradrun.results.result import (
    AnyResult,
    Environment,
    InferResult,
    Measurement,
    Memory,
    Phases,
    RunInfo,
)

CONFIG = RunConfig.model_validate_json(
    """{"model": {"source": "zoo", "name": "digits_cnn"},
        "data": {"source": "synthetic", "inputs": {"image": {"shape": [1, 8, 8]}}, "samples": 498,
                 "batch_size": 4},
        "output": {"path": "runs/digits", "transform": "argmax"}}"""
)
MACHINE = Environment(
    gradrun="0.1.0",
    torch="2.13.0+cpu",
    numpy="2.4.6",
    python="3.11.9",
    platform="Linux-6.1",
    cpu="AMD EPYC",
    cores=2,
    cpus=2,
    threads=2,
    memory=8 * 1024**3,
    allocator="retain",
    device="cpu",
)
PHASES = Phases(
    load_model=0.0123,
    open_data=0.0004,
    first_batch=0.0042,
    warm_up=0.031,
    data=0.006,
    forward=0.09,
    output=0.0042,
)
MEMORY = Memory(
    weights=263_464,
    inputs=1_024,
    forward_peak=66_048,
    retained=160,
    process_peak=412_000_256,
    process_method="VmHWM",
)
Result = TypeVar("Result", bound=AnyResult)


def skewed(batches: int) -> tuple[float, ...]:
    """Return realistic seconds per batch: at least 650 µs, skewed to the right."""
    return tuple(6.5e-4 - 5e-5 * math.log1p(-(i * 0.618034 % 1)) for i in range(batches))


def measurement(batches: int = 125, last: int = 2, **changes: Any) -> Measurement:
    """Return a measurement of `batches` batches of four samples, and `last` in the last."""
    sizes = (*(4,) * (batches - 1), last)[:batches]
    given: dict[str, Any] = {
        "mode": "inference_mode",
        "batch_seconds": skewed(batches),
        "batch_sizes": sizes,
        "phases": PHASES,
        "memory": MEMORY,
    }
    given |= changes
    return Measurement(**given | {"mode": GradMode(given["mode"])})


def run_result(
    measured: Measurement | None = None, *, cls: type[Result] = InferResult, **changes: Any
) -> Result:
    """Return a complete result, by default of an infer run; `changes` replace its fields."""
    given: dict[str, Any] = {
        "gradrun": "0.1.0",
        "started_at": "2026-11-20T12:00:00+00:00",
        "config": CONFIG.model_dump(mode="json"),
        "environment": MACHINE,
        "measurements": (measured or measurement(),),
    }
    if cls is InferResult:
        given["files"] = ("predictions.npy",)
    given |= changes
    return cls(info=RunInfo.from_config(given["config"]), **given)
