"""Example predictions with their inputs, and the distribution of classes, for reports."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.core.units import pluralize
from gradrun.data.source import BatchSource, at_positions, require_length
from gradrun.output.class_labels import DEFAULT_OUTPUT, ClassLabels
from gradrun.output.columns import ValueColumn, row_bytes
from gradrun.output.formats import read_rows
from gradrun.output.kept_columns import title_of
from gradrun.output.missing import MISSING_CLASS
from gradrun.output.quarantine import quarantined_positions
from gradrun.output.transforms import Outputs
from gradrun.results.result import ClassDistribution, Example, PredictedClass

_EXAMPLE_ROWS, _EXAMPLE_BYTES = 10_000, 4 * 1024**2
"""Examples are spread over the first predictions: at most so many, and so many bytes.

Reading more of a table in text form would take seconds.
"""
_SECONDS = 1.0
"""Limit of the time to count classes; in .csv files, about 50,000 predictions."""
_MAX_CLASSES = 20
_MAX_TEXT = 200

_Array = np.ndarray[Any, Any]
_Rows = Mapping[str, _Array]
"""Output name -> values [n, ...]."""

_SCORES = {"class": "score", "indices": "values"}
"""Suffix of the outputs of classify and topk with classes -> suffix of those with scores."""


def describe_predictions(
    output: OutputSection,
    data: BatchSource,
    model_classes: Sequence[str],
    outputs: Outputs,
    class_counts: Mapping[str, int] | None = None,
) -> tuple[tuple[ClassDistribution, ...], tuple[Example, ...]]:
    """Read saved predictions: count the classes, and select examples.

    Args:
        output: the config section of the run, which is complete.
        data: its data source; without previews of inputs, the result is empty.
        model_classes: class names of the model; if it has none, those of the labels are used.
        outputs: those of a batch, for the size of one prediction.
        class_counts: number of classes of outputs, which get names only if they have as many.
    """
    if not output.examples or not data.has_previews:
        return (), ()
    # Metrics compare the numbers of a model without names with those of the labels.
    label_names = data.classes or model_classes
    names = model_classes or label_names
    reader = _Reader(output, names, class_counts)
    most = _EXAMPLE_BYTES // max(1, row_bytes(outputs))
    samples = require_length(data)
    rows = min(samples, _EXAMPLE_ROWS, max(1, most))
    skip = {title_of(name) for name, column in outputs.items() if isinstance(column, ValueColumn)}
    if outputs and len(skip) == len(outputs):  # nothing to describe, such as boxes of any number
        return (), ()
    positions = _spread(rows, output.examples)
    excluded = quarantined_positions(output.path)
    predictions: dict[int, str] = {}
    numbers: dict[int, int | None] = {}
    started = time.monotonic()
    for chunk, values in read_rows(output, skip):
        wanted = [p for p in positions if chunk[0] <= p <= chunk[-1] and p not in excluded]
        for position in wanted:
            row = {name: array[chunk == position][:1] for name, array in values.items()}
            if all(map(len, row.values())):
                predictions[position], numbers[position] = reader.describe(row)
        included = ~np.isin(chunk, list(excluded))
        reader.count({name: array[included] for name, array in values.items()}, int(chunk[-1]) + 1)
        late = time.monotonic() - started > _SECONDS
        if chunk[-1] >= positions[-1] and (late or not reader.counts):
            break
    else:
        reader.count({}, samples)  # the files may lack the last samples, if quarantined
    found = sorted(predictions)
    examples = []
    unlike = len(label_names) != len(names)  # their numbers are those of other classes
    for position, preview, label in zip(
        found, data.previews(found), _labels(data, found), strict=True
    ):
        number = numbers[position]
        example = Example(
            position=position,
            input=_shorten(preview.text),
            picture=preview.picture,
            prediction=predictions[position],
            label="" if label is None else _label_text(label, label_names),
            correct=None if label is None or number is None or unlike else number == label,
        )
        examples.append(example)
    return reader.distributions(), tuple(examples)


def _spread(samples: int, count: int) -> list[int]:
    """Return positions of at most `count` samples, evenly spaced from the first to the last."""
    step = max(1.0, (samples - 1) / max(1, count - 1))
    return [round(i * step) for i in range(count) if round(i * step) < samples]


def _labels(data: BatchSource, positions: Sequence[int]) -> list[float | None]:
    """Return the labels of some samples: None without labels, and for those of several numbers."""
    try:
        chunks = (label for chunk in data.labels() for label in chunk)
        return [float(x) if x.numel() == 1 else None for x in at_positions(chunks, positions)]
    except ConfigError:  # the config names no labels
        return [None] * len(positions)


def _label_text(label: float, classes: Sequence[str]) -> str:
    known = label.is_integer() and 0 <= label < len(classes)
    return classes[int(label)] if known else f"{label:g}"


def _shorten(text: str) -> str:
    line = " ".join(text[: 2 * _MAX_TEXT].split())
    return line if len(line) <= _MAX_TEXT else f"{line[: _MAX_TEXT - 1]}…"


def _scores_of(name: str) -> str:
    """Return the output with the scores of an output of classes, of classify or topk; else ""."""
    output, dot, suffix = name.rpartition(".")
    return f"{output}{dot}{_SCORES[suffix]}" if suffix in _SCORES else ""


def _without_scores(rows: _Rows) -> _Rows:
    scores = {_scores_of(name) for name in rows}
    return {name: values for name, values in rows.items() if name not in scores}


class _Reader:
    """Describes predictions in words, and counts their classes."""

    def __init__(
        self,
        output: OutputSection,
        classes: Sequence[str],
        class_counts: Mapping[str, int] | None = None,
    ) -> None:
        self.output, self.classes = output, classes
        self.labels = ClassLabels(output, classes, class_counts)
        self.counts: dict[str, Counter[int]] = {}
        self.samples = 0

    def distributions(self) -> tuple[ClassDistribution, ...]:
        """Return the counted classes of each output that has any."""
        return tuple(
            ClassDistribution(
                output=name.rpartition(".")[0] if name.rpartition(".")[2] in _SCORES else name,
                predictions=counted.total(),
                samples=self.samples,
                distinct=len(counted),
                classes=self.labels.counts.get(name) or len(self.classes) or None,
                most_frequent=tuple(
                    PredictedClass(name=self._name(number, name), count=count)
                    for number, count in counted.most_common(_MAX_CLASSES)
                ),
            )
            for name, counted in self.counts.items()
        )

    def count(self, rows: _Rows, samples: int) -> None:
        """Count the classes of the next predictions, which end at sample `samples`."""
        self.samples = samples
        for name, values in _without_scores(rows).items():
            if (numbers := self._class_numbers(name, values)) is not None:
                found, counts = np.unique(numbers, return_counts=True)
                counted = dict(zip(found.tolist(), counts.tolist(), strict=True))
                counted.pop(MISSING_CLASS, None)
                self.counts.setdefault(name, Counter()).update(counted)

    def _class_numbers(self, name: str, values: _Array) -> _Array | None:
        """Return the predicted class numbers of an output; None if it has no classes."""
        if self.labels.has_numbers(name):
            return values[:, 0] if name.rpartition(".")[2] == "indices" else values
        steps, width = self.output.transforms_of(name), values[:1].size
        if "threshold" in steps and width == 1:
            return values
        scores = values.ndim == 2 and values.dtype.kind == "f" and width > 1
        if scores and "sigmoid" not in steps and (len(self.classes) == width or "softmax" in steps):
            return np.where(np.isfinite(values).all(1), values.argmax(1), MISSING_CLASS)
        return None

    def describe(self, row: _Rows) -> tuple[str, int | None]:
        """Return a short text on the prediction of one sample, and its class if it has one."""
        parts, numbers = [], []
        for name, values in _without_scores(row).items():
            found, scores = self._class_numbers(name, values), row.get(_scores_of(name))
            text = self._describe_output(
                name, values[0], found, None if scores is None else scores[0]
            )
            title = name if scores is None else name.rpartition(".")[0]
            parts.append(text if title in {"", DEFAULT_OUTPUT} else f"{title}: {text}")
            numbers += [] if found is None or found.size > 1 else [int(found.reshape(-1)[0])]
        return "; ".join(parts), numbers[0] if len(numbers) == 1 else None

    def _describe_output(
        self, name: str, value: _Array, found: _Array | None, scores: _Array | None
    ) -> str:
        if found is None:
            return _describe_numbers(value)
        if found.size > 1:  # a class map
            return self._describe_map(name, found)
        if scores is not None:  # of classify and topk
            best = zip(value.reshape(-1)[:3].tolist(), scores.reshape(-1)[:3].tolist(), strict=True)
            return ", ".join(f"{self._name(number, name)} ({score:.3g})" for number, score in best)
        number = int(found.reshape(-1)[0])
        if number == MISSING_CLASS or value.size == 1:
            return self._name(number, name)
        return f"{self._name(number, name)} ({value[number]:.3g})"

    def _describe_map(self, name: str, found: _Array) -> str:
        counted = Counter(found.reshape(-1).tolist())
        return ", ".join(
            f"{self._name(number, name)} {count / found.size:.0%}"
            for number, count in counted.most_common(3)
        )

    def _name(self, number: int, output: str) -> str:
        if number == MISSING_CLASS:
            return "none"
        return str(self.labels.names_of(number) if self.labels.fits(output) else number)


def _describe_numbers(value: _Array) -> str:
    flat: Iterable[Any] = value.reshape(-1).tolist()
    if value.size <= 4:
        return " ".join(map(_number, flat))
    shape = " × ".join(map(str, value.shape))
    text = f"{shape} values" if value.ndim > 1 else pluralize(value.size, "value")
    if value.dtype.kind not in "fiu" or not np.isfinite(value).any():
        return text
    return f"{text}, {_number(np.nanmin(value))} to {_number(np.nanmax(value))}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float | np.floating) else str(value)
