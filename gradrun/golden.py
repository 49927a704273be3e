"""Predictions that are kept to be compared with: what they are in figures, and the golden file.

Knows .npy predictions and .safetensors; needs no torch. Looks at a window of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gradrun.disk import replace_file
from gradrun.errors import ConfigError, GradrunError
from gradrun.result import Output
from gradrun.units import count_text

_WINDOW_BYTES = 16 * 1024 * 1024
_KEY = "check.expected"

Array = np.ndarray[Any, Any]


def predictions(folder: Path, files: tuple[str, ...]) -> dict[str, Array]:
    """Output name to rows [samples, ...], mapped from a run's .npy files; of others nothing."""
    found = {}
    for file in (file for file in files if file.endswith(".npy")):
        name = file.removesuffix(".npy").removeprefix("predictions").lstrip(".") or "prediction"
        found[name] = np.load(folder / file, mmap_mode="r")
    return found


def described(outputs: Mapping[str, Array]) -> tuple[Output, ...]:
    """Each output in figures."""
    return tuple(_described(name, rows) for name, rows in outputs.items())


def _described(name: str, rows: Array) -> Output:
    with np.errstate(invalid="ignore"):  # a NaN or an infinity makes them NaN
        return _in_figures(name, rows)


def _in_figures(name: str, rows: Array) -> Output:
    count = max(rows.size, 1)
    mean = sum(float(_real(part).sum()) for part in _windows(rows)) / count
    square = sum(float(((_real(part) - mean) ** 2).sum()) for part in _windows(rows)) / count
    return Output(
        name=name,
        dtype=str(rows.dtype),
        shape=rows.shape[1:],
        mean=mean,
        spread=square**0.5,
    )


def _real(part: Array) -> Array:
    """In double precision; of complex numbers their size."""
    return (np.abs(part) if np.iscomplexobj(part) else part).astype(np.float64)


def _windows(rows: Array) -> Iterator[Array]:
    for begin, end in _cuts(rows):
        yield rows[begin:end]


def _cuts(rows: Array) -> Iterator[tuple[int, int]]:
    step = max(1, _WINDOW_BYTES // max(1, rows[:1].nbytes))
    for begin in range(0, len(rows), step):
        yield begin, min(begin + step, len(rows))


def write(path: Path, outputs: Mapping[str, Array]) -> None:
    """Make outputs the golden ones, whole or not at all.

    Raises:
        GradrunError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = save({name: np.ascontiguousarray(rows) for name, rows in outputs.items()})
        replace_file(path, data)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GradrunError(f"{path} cannot be written: {reason}") from error


def differences(
    path: Path, outputs: Mapping[str, Array], rtol: float, atol: float
) -> dict[str, str]:
    """Output name to how it differs from the golden file's; empty where none does.

    Raises:
        ConfigError: it is no safetensors file.
    """
    found: dict[str, str] = {}
    try:
        with safe_open(path, framework="np") as file:
            golden = set(file.keys())
            found |= dict.fromkeys(sorted(outputs.keys() - golden), "is not in it")
            found |= dict.fromkeys(sorted(golden - outputs.keys()), "is missing")
            for name in sorted(golden & outputs.keys()):
                text = _difference(file.get_tensor(name), outputs[name], rtol, atol)
                found |= {name: text} if text else {}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no safetensors file: {error}", _KEY) from error
    return found


def _difference(golden: Array, rows: Array, rtol: float, atol: float) -> str:
    if (golden.shape, golden.dtype) != (rows.shape, rows.dtype):
        was, now = (f"{list(a.shape)} {a.dtype}" for a in (golden, rows))
        return f"is {now}, where {was} is expected"
    bad, worst, first = 0, 0.0, -1
    for begin, end in _cuts(rows):
        old, new = golden[begin:end], rows[begin:end]
        if old.dtype.kind in "fc":
            wrong = ~np.isclose(new, old, rtol=rtol, atol=atol, equal_nan=True)
        else:
            wrong = old != new
        samples = wrong.reshape(len(wrong), -1).any(axis=1)
        if samples.any():
            first = first if first >= 0 else begin + int(samples.argmax())
            bad += int(samples.sum())
            worst = max(worst, float(np.nanmax(np.abs(_real(new[samples]) - _real(old[samples])))))
    if not bad:
        return ""
    return f"differs in {count_text(bad, 'sample')} of {len(rows):,}, first {first}, by {worst:.2g}"
