"""Compute metrics after the run, from what was saved of the model's outputs, in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradrun.config.run import MetricSection
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional
from gradrun.core.options import option
from gradrun.core.units import list_names, pluralize
from gradrun.data.source import CHUNK_BYTES, BatchSource
from gradrun.inference.evidence import Evidence, Target, find_target
from gradrun.inference.scorers import Scorer
from gradrun.models.loaded import LoadedModel
from gradrun.output.columns import ValueColumn
from gradrun.output.evidence_writer import LABELS, evidence_file, evidence_key, lacks_evidence
from gradrun.output.formats import read_rows
from gradrun.output.journal import CommittedRange
from gradrun.output.quarantine import quarantined_positions
from gradrun.output.tensor_transforms import Inputs
from gradrun.output.transforms import (
    SelectedOutput,
    Tensors,
    ToHost,
    check_rows,
    is_safe_name,
    scored_outputs,
    to_cpu,
)
from gradrun.results.result import Metric, Warning

_Chunk = tuple[torch.Tensor, Tensors]
"""Positions [n] of some samples in the input, and outputs or evidence [n, ...]."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a run whose config, labels and first outputs have been checked."""

    config: RunConfig
    model: LoadedModel
    data: BatchSource
    scorers: tuple[Scorer, ...]
    unread: frozenset[str]
    """Columns of the predictions that are not tensors."""

    @property
    def saves_labels(self) -> bool:
        """Whether the run saves the labels, which are read with the inputs."""
        return self.data.labels_in_batches

    @cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        """What the run must write, because the predictions do not contain it."""
        needed = {scorer.evidence.name: scorer.evidence for scorer in self.scorers}
        output = self.config.output
        return tuple(item for item in needed.values() if not item.in_predictions(output))

    def check_saved(self, committed: Sequence[CommittedRange]) -> None:
        """Check that an earlier run saved what the metrics need.

        Raises:
            ConfigError: it did not.
        """
        if self.saves_labels and lacks_evidence(LABELS, committed):
            raise ConfigError(
                "metrics need labels, which the run in this folder did not save; run again with "
                f"{option('overwrite')}",
                "metrics",
            )
        written = {item.name for item in self.evidence}
        for scorer in self.scorers:
            name = scorer.evidence.name
            if name in written and lacks_evidence(name, committed):
                raise ConfigError(
                    f"{scorer.spec.title} needs {scorer.needs} of output "
                    f"{scorer.target.source!r}, which the run in this folder did not save; run "
                    f"again with {option('overwrite')}, or remove the metric",
                    scorer.key,
                )

    def check_labels(self) -> None:
        """Check all labels, because after the run an error would be too late.

        Those that are read with the inputs are checked after the run.

        Raises:
            ConfigError: a label cannot be read, or no metric can compare an output with it.
        """
        if not self.saves_labels:
            self._check_labels(self.data.labels())

    def _check_labels(self, chunks: Iterator[torch.Tensor]) -> None:
        first = 0
        for labels in chunks:
            for scorer in self.scorers:
                scorer.check_labels(labels.double(), first)
            first += len(labels)
        for scorer in self.scorers:
            scorer.check_label_range()

    def label_warnings(self) -> tuple[Warning, ...]:
        """Warn of numbers of labels, all checked, that may be those of other classes."""
        if self.data.classes:
            return ()
        doubts = [scorer.doubt for scorer in self.scorers if scorer.doubt]
        return tuple(Warning(code="labels_from_1", text=doubt) for doubt in doubts[:1])

    def class_order_warnings(self) -> tuple[Warning, ...]:
        """Warn of classes that are predicted as one another, after compute()."""
        scorer = next((scorer for scorer in self.scorers if scorer.exchanged), None)
        if scorer is None:
            return ()
        names, exchanged = scorer.class_names, scorer.exchanged
        pairs = [
            f"{names[true]} as {names[other]} ({share:.0%})"
            for true, (other, share) in exchanged.items()
        ]
        listed = list_names(pairs, _MAX_PAIRS)
        text = (
            f"{len(exchanged):,} classes are predicted as one another: {listed}; the class "
            "names or labels probably have another order than the model's classes: set "
            "data.classes to the names in the model's order"
        )
        return (Warning(code=CLASS_ORDER, text=text),)

    def collect(self, returned: Any, inputs: Inputs, to_host: ToHost = to_cpu) -> Tensors:
        """Return the evidence of a batch, copied by `to_host`, by the names for a writer."""
        sources = {item.target.source for item in self.evidence}
        outputs = {
            output.source: output.tensor
            for output in scored_outputs(returned, self.config.output, inputs, sources, self.model)
        }
        return {
            evidence_key(item.name): to_host(item.of(outputs[item.target.source]))
            for item in self.evidence
        }

    def compute(self, folder: Path) -> tuple[Metric, ...]:
        """Compute the metrics of the predictions in a run folder."""
        quarantined = quarantined_positions(folder)
        if self.saves_labels:
            self._check_labels(_zeroed(self._labels(folder), quarantined))
        if any(scorer.surveys for scorer in self.scorers):
            for _, rows in self._predicted(folder, quarantined):
                for scorer in self.scorers:
                    scorer.survey(rows)
        for scorer in self.scorers:
            scorer.start()
        samples = 0
        predicted = self._predicted(folder, quarantined)
        for rows, labels in _pairs(predicted, self._labels(folder)):
            samples += len(labels)
            for scorer in self.scorers:
                scorer.update(rows, labels)
        return tuple(scorer.result(samples) for scorer in self.scorers) if samples else ()

    def _labels(self, folder: Path) -> Iterator[torch.Tensor]:
        """Yield the labels of all samples, in chunks."""
        if not self.saves_labels:
            yield from self.data.labels()
            return
        saved = np.load(folder / evidence_file(LABELS), mmap_mode="r")
        step = max(1, CHUNK_BYTES // max(1, saved[:1].nbytes))
        for begin in range(0, len(saved), step):
            yield torch.from_numpy(np.array(saved[begin : begin + step]))

    def _predicted(self, folder: Path, quarantined: set[int]) -> Iterator[_Chunk]:
        """Yield the evidence of the samples that have a prediction."""
        excluded = torch.tensor(sorted(quarantined), dtype=torch.int64)
        for positions, rows in self._read(folder):
            included = ~torch.isin(positions, excluded)
            if included.any():
                yield positions[included], {name: row[included] for name, row in rows.items()}

    def _read(self, folder: Path) -> Iterator[_Chunk]:
        """Yield the evidence of all metrics, keyed by its name."""
        files = {item.name: folder / evidence_file(item.name) for item in self.evidence}
        written = [s.evidence for s in self.scorers if s.evidence.name not in files]
        saved_rows = [np.load(path, mmap_mode="r") for path in files.values()]
        row_bytes = sum(rows[:1].nbytes for rows in saved_rows)
        chunks = self._predictions() if written else _positions(len(saved_rows[0]))
        del saved_rows
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        for all_positions, predictions in chunks:
            rows = {item.name: item.read(predictions) for item in written}
            for begin in range(0, len(all_positions), step):
                part = slice(begin, begin + step)
                positions = all_positions[part]
                saved = {
                    name: torch.from_numpy(np.load(path, mmap_mode="r")[positions.numpy()])
                    for name, path in files.items()
                }
                yield positions, {name: row[part] for name, row in rows.items()} | saved

    def _predictions(self) -> Iterator[_Chunk]:
        for positions, rows in read_rows(self.config.output, self.unread):
            outputs = {name: torch.from_numpy(values) for name, values in rows.items()}
            yield torch.from_numpy(positions), outputs


def plan_metrics(
    config: RunConfig,
    data: BatchSource,
    outputs: Sequence[SelectedOutput],
    model: LoadedModel,
) -> Evaluation | None:
    """Find what the metrics of a config need; None if it has none.

    Args:
        data: its first labels are read.
        outputs: all outputs of the model for a batch, before transforms of their scores.
        model: the model, for its class names and the meaning of its scores.

    Raises:
        ConfigError: torchmetrics is missing, the data source has no labels, or a metric does not
            match an output.
    """
    if not config.metrics:
        return None
    import_optional("torchmetrics", "metrics")
    names = tuple(model.classes or data.classes)
    first = next(data.labels())
    scorers = []
    for i, spec in enumerate(config.metrics):
        key = f"metrics.{i}"
        label = _label_shape(spec, first, key)
        output = _find_output(spec, key, outputs)
        target = find_target(output, label, config.output, model, values=spec.name in _VALUES)
        _check_class_count(data.classes, target, model.classes)
        scorers.append(Scorer(spec, key, target, names))
        scorers[-1].check_scores(output.tensor)
    unread = {output.name for output in outputs if isinstance(output.column, ValueColumn)}
    unread |= {*config.kept_columns}
    return Evaluation(config, model, data, tuple(scorers), frozenset(unread))


CLASS_ORDER = "class_order"
"""Code of the warning about classes that are predicted as one another."""

_MAX_PAIRS = 4
_MAX_LISTED = 6
_VALUES = {"mse", "mae", "r2"}
"""Metrics of numbers; the others compare classes."""


def _check_class_count(
    classes: Sequence[str], target: Target, model_classes: Sequence[str]
) -> None:
    """Reject names of labels whose number is not that of the model's classes.

    Their numbers would be those of other classes of the model.
    """
    count = target.classes if target.task in {"binary", "multiclass"} else 0
    if not classes or not count or len(classes) == count:
        return
    listed = list_names(classes, _MAX_LISTED)
    known = set(classes) <= set(model_classes)
    names = f"the model's {count:,} names" if known else f"{count:,} names"
    raise ConfigError(
        f"the labels have {pluralize(len(classes), 'class')} ({listed}), but the output "
        f"{target.source!r} has {count:,}; set data.classes to {names}, in the order of the output",
        "data.labels",
    )


def _label_shape(spec: MetricSection, labels: torch.Tensor, key: str) -> tuple[int, ...]:
    """The shape of one sample's label, given labels [n, ...]."""
    if spec.label is None:
        return tuple(labels.shape[1:])
    if labels.ndim < 2 or not 0 <= spec.label < labels.shape[1]:
        count = labels.shape[1] if labels.ndim > 1 else 1
        raise ConfigError(
            f"label is {spec.label}, but each sample has {pluralize(count, 'label')}, counted from "
            "0",
            key,
        )
    return tuple(labels.shape[2:])


def _find_output(
    spec: MetricSection, key: str, outputs: Sequence[SelectedOutput]
) -> SelectedOutput:
    """Return the output of a metric: the one that is written, or the one it names."""
    written = [output for output in outputs if output.name]
    matches = written
    if spec.output is not None:
        matches = [output for output in outputs if spec.output in (output.source, output.name)]
    if len(matches) != 1 or not is_safe_name(matches[0].source):
        choices = ", ".join(output.source for output in outputs)
        raise ConfigError(f"set `output` to one of the outputs: {choices}", key)
    check_rows(matches[0].source, matches[0].tensor, len(outputs[0].column))
    return matches[0]


def _positions(samples: int) -> Iterator[_Chunk]:
    """Yield the positions of all samples, without outputs."""
    step = CHUNK_BYTES // 8
    for begin in range(0, samples, step):
        yield torch.arange(begin, min(begin + step, samples)), {}


def _zeroed(chunks: Iterator[torch.Tensor], positions: set[int]) -> Iterator[torch.Tensor]:
    """Yield labels in chunks, with 0 at some positions, such as those without a label."""
    first = 0
    for labels in chunks:
        numbers = torch.arange(first, first + len(labels))
        labels[torch.isin(numbers, torch.tensor(sorted(positions), dtype=torch.int64))] = 0
        yield labels
        first += len(labels)


def _pairs(
    chunks: Iterator[_Chunk], labels_of_all: Iterator[torch.Tensor]
) -> Iterator[tuple[Tensors, torch.Tensor]]:
    """Yield outputs and labels of the same samples."""
    # float64, because torch supports few operations on the smaller integer types.
    label_chunks = (labels.double() for labels in labels_of_all)
    labels, first = next(label_chunks), 0  # unused labels, and the position of the first of them
    for positions, rows in chunks:
        stop = int(positions[-1]) + 1
        while first + len(labels) < stop:
            labels = torch.cat([labels, next(label_chunks)])
        yield rows, labels[positions - first]
        labels, first = labels[stop - first :], stop
