"""Predictions that are kept to be compared with: what they are in figures, and the golden file.

Knows .npy predictions and .safetensors; needs no torch. Looks at a window of rows at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gradrun.core.errors import ConfigError, GradrunError
from gradrun.core.files import replace_file
from gradrun.core.units import pluralize
from gradrun.output.formats.npy import output_name
from gradrun.results.result import Output

_WINDOW_BYTES = 16 * 1024 * 1024
_KEY = "check.expected"

Array = np.ndarray[Any, Any]


def predictions(folder: Path, files: Iterable[str]) -> dict[str, Array]:
    """Output name to rows [samples, ...], mapped from a run's .npy files; of others nothing."""
    npy_files = [file for file in files if file.endswith(".npy")]
    return {output_name(file): np.load(folder / file, mmap_mode="r") for file in npy_files}


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


def _distance(old: Array, new: Array) -> float:
    """The greatest difference, as double precision has it; a NaN against a number is none."""
    complex_ones = np.iscomplexobj(old)
    one, other = (old, new) if complex_ones else (_real(old), _real(new))
    with np.errstate(invalid="ignore"):  # inf - inf
        apart = np.abs(other - one)
    return float(np.nanmax(apart, initial=0.0))


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
    try:
        with safe_open(path, framework="np") as file:
            return _differences(set(file.keys()), file.get_tensor, outputs, rtol, atol)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no safetensors file: {error}", _KEY) from error


def differences_from(
    folder: Path, own: Path, files: Iterable[str], rtol: float, atol: float
) -> dict[str, str]:
    """Output name to how it differs from another run's; empty where none does.

    Args:
        folder: of the other run.
        own: of the run that is looked at.
        files: the names of its files.
        rtol: how much may differ, relative to the other's values.
        atol: how much more, absolute.
    """
    there = [path.name for path in folder.glob("predictions*")]
    lines = "predictions.jsonl"
    if lines in there and lines in files:
        text = _of_lines(own / lines, folder / lines, rtol, atol)
        return {lines: text} if text else {}
    other = predictions(folder, there)
    outputs = predictions(own, files)
    return _differences(set(other), other.__getitem__, outputs, rtol, atol)


def _differences(
    golden: set[str],
    get: Callable[[str], Array],
    outputs: Mapping[str, Array],
    rtol: float,
    atol: float,
) -> dict[str, str]:
    found = dict.fromkeys(sorted(outputs.keys() - golden), "is new")
    found |= dict.fromkeys(sorted(golden - outputs.keys()), "is missing")
    for name in sorted(golden & outputs.keys()):
        text = _difference(get(name), outputs[name], rtol, atol)
        found |= {name: text} if text else {}
    return found


def _of_lines(own: Path, other: Path, rtol: float, atol: float) -> str:
    """How rows of many shapes differ, in words; empty where they do not."""
    count, bad, first = 0, 0, -1
    with own.open(encoding="utf-8") as ours, other.open(encoding="utf-8") as theirs:
        for one, two in zip_longest(ours, theirs):
            if one is None or two is None:
                return f"has {'fewer' if one is None else 'more'} samples than the other side's"
            if one != two and not _same_line(json.loads(two), json.loads(one), rtol, atol):
                first, bad = first if first >= 0 else count, bad + 1
            count += 1
    return f"differs in {pluralize(bad, 'sample')} of {count:,}, first {first}" if bad else ""


def _same_line(golden: dict[str, Any], row: dict[str, Any], rtol: float, atol: float) -> bool:
    return golden.keys() == row.keys() and all(
        _same_value(value, row[name], rtol, atol) for name, value in golden.items()
    )


def _same_value(golden: Any, value: Any, rtol: float, atol: float) -> bool:
    old, new = np.asarray(golden), np.asarray(value)
    if "O" in {old.dtype.kind, new.dtype.kind} or "U" in {old.dtype.kind, new.dtype.kind}:
        return bool(golden == value)
    return not _difference(np.atleast_1d(old), np.atleast_1d(new), rtol, atol)


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
            worst = max(worst, _distance(old[samples], new[samples]))
    if not bad:
        return ""
    return f"differs in {pluralize(bad, 'sample')} of {len(rows):,}, first {first}, by {worst:.2g}"
