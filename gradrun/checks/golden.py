"""Compare predictions with a golden file or with another run's, in chunks of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gradrun.comparison.predictions import take_numbers
from gradrun.core.errors import ConfigError, GradrunError
from gradrun.core.files import replace_file
from gradrun.core.units import pluralize
from gradrun.output.formats.npy import output_name
from gradrun.results.result import Output

_CHUNK_BYTES = 16 * 1024 * 1024

Array = np.ndarray[Any, Any]


def load_predictions(folder: Path, files: Iterable[str]) -> dict[str, Array]:
    """Map the .npy files of a run to output name -> rows [samples, ...]; skip other formats."""
    arrays = [file for file in files if file.endswith(".npy")]
    return {output_name(file): np.load(folder / file, mmap_mode="r") for file in arrays}


def summarize(outputs: Mapping[str, Array]) -> tuple[Output, ...]:
    """Return dtype, shape, mean and standard deviation of each output."""
    return tuple(_summarize(name, rows) for name, rows in outputs.items())


def _summarize(name: str, rows: Array) -> Output:
    count = max(rows.size, 1)
    with np.errstate(invalid="ignore"):  # NaN and infinity result in NaN
        mean = sum(float(_real(rows[chunk]).sum()) for chunk in _chunks(rows)) / count
        variance = (
            sum(float(((_real(rows[chunk]) - mean) ** 2).sum()) for chunk in _chunks(rows)) / count
        )
    return Output(
        name=name, dtype=str(rows.dtype), shape=rows.shape[1:], mean=mean, spread=variance**0.5
    )


def _real(rows: Array) -> Array:
    """Convert to float64; complex numbers become their absolute values."""
    return (np.abs(rows) if np.iscomplexobj(rows) else rows).astype(np.float64)


def _chunks(rows: Array) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // max(1, rows[:1].nbytes))
    for begin in range(0, len(rows), step):
        yield slice(begin, min(begin + step, len(rows)))


def write(path: Path, outputs: Mapping[str, Array]) -> None:
    """Write the golden file atomically.

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


def compare_with_file(
    path: Path, outputs: Mapping[str, Array], rtol: float, atol: float
) -> dict[str, str]:
    """Compare outputs with a golden file.

    Returns:
        Output name -> how it differs; empty if all are equal.

    Raises:
        ConfigError: the file is not a valid safetensors file.
    """
    try:
        with safe_open(path, framework="np") as file:
            return _differences(set(file.keys()), file.get_tensor, outputs, rtol, atol)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        text = f"{path} is not a valid safetensors file: {error}"
        raise ConfigError(text, "check.expected") from error


def compare_runs(
    reference: Path, folder: Path, files: Iterable[str], rtol: float, atol: float
) -> dict[str, str]:
    """Compare the prediction files of a run in `folder` with those of a reference run.

    Returns:
        Output name -> how it differs; empty if all are equal.
    """
    reference_files = [path.name for path in reference.glob("predictions*")]
    lines = "predictions.jsonl"
    if lines in reference_files and lines in files:
        text = _line_differences(reference / lines, folder / lines, rtol, atol)
        return {lines: text} if text else {}
    golden = load_predictions(reference, reference_files)
    outputs = load_predictions(folder, files)
    return _differences(set(golden), golden.__getitem__, outputs, rtol, atol)


def _differences(
    golden: set[str],
    load: Callable[[str], Array],
    outputs: Mapping[str, Array],
    rtol: float,
    atol: float,
) -> dict[str, str]:
    differences = dict.fromkeys(sorted(outputs.keys() - golden), "is new")
    differences |= dict.fromkeys(sorted(golden - outputs.keys()), "is missing")
    for name in sorted(golden & outputs.keys()):
        text = _difference(load(name), outputs[name], rtol, atol)
        differences |= {name: text} if text else {}
    return differences


def _difference(golden: Array, rows: Array, rtol: float, atol: float) -> str:
    """Describe how rows differ; empty if they are equal."""
    if (golden.shape, golden.dtype) != (rows.shape, rows.dtype):
        expected, actual = (f"{list(a.shape)} {a.dtype}" for a in (golden, rows))
        return f"is {actual}, expected {expected}"
    count, largest, first = 0, 0.0, -1
    for chunk in _chunks(rows):
        old, new = golden[chunk], rows[chunk]
        if old.dtype.kind in "fc":
            wrong = ~np.isclose(new, old, rtol=rtol, atol=atol, equal_nan=True)
        else:
            wrong = old != new
        samples = wrong.reshape(len(wrong), -1).any(axis=1)
        if samples.any():
            first = first if first >= 0 else chunk.start + int(samples.argmax())
            count += int(samples.sum())
            largest = max(largest, _max_difference(old[samples], new[samples]))
    return f"{_count_text(count, len(rows), first)}, by up to {largest:.2g}" if count else ""


def _max_difference(old: Array, new: Array) -> float:
    """Return the largest difference in double precision; differences to NaN are ignored."""
    one, other = (old, new) if np.iscomplexobj(old) else (_real(old), _real(new))
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = np.abs(other - one)
    return float(np.nanmax(difference, initial=0.0))


def _line_differences(reference: Path, file: Path, rtol: float, atol: float) -> str:
    """Describe how JSON lines, whose rows can differ in shape, differ; empty if they are equal."""
    total, count, first = 0, 0, -1
    with file.open(encoding="utf-8") as rows, reference.open(encoding="utf-8") as golden:
        for new, old in zip_longest(rows, golden):
            if new is None or old is None:
                return f"has {'fewer' if new is None else 'more'} samples than the reference"
            if new != old and not _same_row(json.loads(old), json.loads(new), rtol, atol):
                first, count = first if first >= 0 else total, count + 1
            total += 1
    return _count_text(count, total, first) if count else ""


def _count_text(count: int, total: int, first: int) -> str:
    return f"differs in {pluralize(count, 'sample')} of {total:,}, first at {first}"


def _same_row(golden: Any, row: Any, rtol: float, atol: float) -> bool:
    old: list[float] = []
    new: list[float] = []
    same = take_numbers(golden, old, (float,)) == take_numbers(row, new, (float,))
    return same and bool(np.isclose(new, old, rtol=rtol, atol=atol, equal_nan=True).all())
