"""How well predictions agree with labels: read back from the run's files and held against each
other, some samples at a time, after the run.

Knows torchmetrics and the shapes that classes and scores have; not how either was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gradrun.config.run import MetricSection
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional
from gradrun.core.units import pluralize
from gradrun.data.source import BatchSource, HasLabels
from gradrun.output.formats import READERS
from gradrun.output.missing import MISSING_CLASS
from gradrun.output.quarantine import quarantined_positions
from gradrun.output.transforms import Outputs
from gradrun.results.result import Metric

Compute = Callable[[Path], tuple[Metric, ...]]
"""The metrics of the predictions in a run's folder."""

_TAKES = {
    "accuracy": ({"class", "ranked", "score", "scores"}, "classes or scores"),
    "f1": ({"class", "score", "scores"}, "one class a sample, or scores"),
    "auroc": ({"score", "scores"}, "a score for each class"),
    "mse": ({"score", "scores", "values"}, "numbers that are no classes"),
}
"""metric -> the forms of output that it takes (see _form), and the same in words."""


def prepared(
    config: RunConfig, data: BatchSource, outputs: Outputs, called: Sequence[str] = ()
) -> Compute | None:
    """What computes the metrics that a config asks for; None where it asks for none.

    Args:
        config: the run's.
        data: the run's; its labels are looked through once.
        outputs: some batch's, for their names, shapes and types.
        called: what the model calls its classes, where it does.

    Raises:
        ConfigError: torchmetrics is missing, the data have no labels, or the outputs kept are not
            what a metric needs.
    """
    if not config.metrics:
        return None
    import_optional("torchmetrics", "metrics")
    form = config.output.format
    if not isinstance(data, HasLabels):
        raise ConfigError(f"data of source {config.data.source} have no labels", "metrics")
    if form not in READERS:
        text = f"metrics are taken from the files, and {form} is not read back; choose one of "
        raise ConfigError(text + ", ".join(READERS), "output.format")
    _check_order(data.classes, called)
    asked = [_Asked(spec, f"metrics.{i}", outputs) for i, spec in enumerate(config.metrics)]
    for labels in data.labels():  # all of them: after a night's run it would be late to complain
        for metric in asked:
            metric.check_labels(labels.double())

    def compute(folder: Path) -> tuple[Metric, ...]:
        for _, rows in _read(form, folder):
            for metric in asked:
                metric.count_classes(rows)
        measures, samples = [metric.measure() for metric in asked], 0
        for rows, truth in _pairs(_read(form, folder), data, quarantined_positions(folder)):
            samples += len(truth)
            for metric, measure in zip(asked, measures, strict=True):
                measure.update(*metric.given(rows, truth))
        if not samples:
            return ()
        return tuple(
            Metric(name=metric.spec.title, value=float(measure.compute()), samples=samples)
            for metric, measure in zip(asked, measures, strict=True)
        )

    return compute


def _check_order(classes: Sequence[str] | None, called: Sequence[str]) -> None:
    """Refuse labels whose classes are the model's, in another order: each would be another's."""
    if classes and sorted(classes) == sorted(called) and list(classes) != list(called):
        raise ConfigError(
            f"the model counts its classes in another order than the labels are counted in; "
            f"set data.classes: [{', '.join(called)}]",
            "data.classes",
        )


def _read(form: str, folder: Path) -> Iterator[tuple[torch.Tensor, Outputs]]:
    for numbers, rows in READERS[form](folder):
        outputs = {name: torch.from_numpy(values) for name, values in rows.items()}
        yield torch.from_numpy(numbers), outputs


def _pairs(
    read: Iterator[tuple[torch.Tensor, Outputs]], data: HasLabels, apart: set[int]
) -> Iterator[tuple[Outputs, torch.Tensor]]:
    """Outputs and labels of the same samples, without those that were set apart."""
    left_out = torch.tensor(sorted(apart), dtype=torch.int64)
    windows = (labels.double() for labels in data.labels())  # torch reckons with few integer types
    held, first = next(windows), 0  # labels not yet used, from sample `first` on
    for numbers, rows in read:
        stop = int(numbers[-1]) + 1
        while first + len(held) < stop:
            held = torch.cat([held, next(windows)])
        keep = ~torch.isin(numbers, left_out)
        if keep.any():
            truth = held[numbers[keep] - first]
            yield {name: tensor[keep] for name, tensor in rows.items()}, truth
        held, first = held[stop - first :], stop


def _form(tensor: torch.Tensor, *, ranked: bool) -> str:
    """What an output [n, ...] holds of a sample: a class, a score, scores of classes, values."""
    if ranked and tensor.ndim == 2:
        return "ranked"  # classes, the likeliest first
    one = tensor[:1].numel() == 1
    if not tensor.is_floating_point():
        return "class" if one else "integers"
    return "score" if one else "scores" if tensor.ndim == 2 else "values"


class _Asked:
    """One metric and the output that it is taken of."""

    def __init__(self, spec: MetricSection, key: str, outputs: Outputs) -> None:
        self.spec, self.key = spec, key
        parts = {name.rpartition(".")[2] for name in outputs}
        ranked = parts == {"values", "indices"}  # as topk leaves them
        classified = parts == {"class", "score"}
        part = "indices" if ranked else "class" if classified else ""
        self.output = self._chosen(outputs, part)
        tensor = outputs[self.output]
        self.width, self.form = tensor[:1].numel(), _form(tensor, ranked=ranked)
        self.classes = {"scores": self.width, "score": 2}.get(self.form, 0)
        """How many there are; of a form that does not say, how many were seen."""
        self.probable: bool | None = None
        """Whether scores are probabilities as they are; the first ones tell."""
        forms, words = _TAKES[spec.name]
        if self.form not in forms or (self.form == "ranked" and spec.average):
            raise ConfigError(
                f"{spec.title} needs {words}, which output.transform does not leave; none and "
                "softmax keep every score",
                key,
            )
        most = self.width if self.form in {"ranked", "scores"} else 1
        if (spec.top_k or 1) > most:
            raise ConfigError(
                f"top_k is {spec.top_k}, and the predictions hold {most} of a sample's classes; "
                "output.transform: none keeps all",
                key,
            )

    def _chosen(self, outputs: Outputs, part: str) -> str:
        """The name of the output that is meant; of a topk or classify, the classes."""
        names = [name for name in outputs if not part or name.rpartition(".")[2] == part]
        ending = f".{part}" if part else ""
        wanted = self.spec.output and f"{self.spec.output}{ending}"
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted in names:
            return str(wanted)
        listed = ", ".join(name.removesuffix(ending) for name in names)
        raise ConfigError(f"the run keeps the outputs {listed}; say by `output` which", self.key)

    def check_labels(self, labels: torch.Tensor) -> None:
        """See that some labels [n, ...], as float64, can be compared with.

        Raises:
            ConfigError: they cannot.
        """
        width = self.width if self.spec.name == "mse" else 1
        if labels[:1].numel() != width:
            held = pluralize(labels[:1].numel(), "number")
            text = f"a label holds {held}, and {self.spec.title} needs {width}"
            raise ConfigError(text, "data.labels")
        if self.spec.name == "mse":
            return
        least, most = float(labels.min()), float(labels.max())
        known = self.classes if self.form in {"score", "scores"} else 0
        if least < 0 or (known and most >= known) or bool((labels % 1).any()):
            allowed = f"0 to {known - 1}" if known else "whole numbers from 0 on"
            raise ConfigError(
                f"labels lie from {least:g} to {most:g}, and classes are {allowed}", "data.labels"
            )
        self.classes = known or max(self.classes, int(most) + 1)

    def count_classes(self, rows: Outputs) -> None:
        """Where only the likeliest class was kept, see how many there are."""
        if self.form == "class":
            self.classes = max(self.classes, int(rows[self.output].max()) + 1)

    def measure(self) -> Any:
        """A torchmetrics object, which takes what `given` makes."""
        spec, binary = self.spec, self.form == "score"
        metrics = import_optional("torchmetrics", self.key)
        kinds = import_optional("torchmetrics", self.key, "classification")
        classes = {"num_classes": max(2, self.classes), "average": spec.average or "macro"}
        match spec.name:
            case "mse":
                return metrics.MeanSquaredError()
            case "auroc" if binary:
                return kinds.BinaryAUROC(thresholds=spec.thresholds)
            case "auroc":
                return kinds.MulticlassAUROC(**classes, thresholds=spec.thresholds)
            case "f1":
                return kinds.BinaryF1Score() if binary else kinds.MulticlassF1Score(**classes)
            case _ if self.form == "ranked":
                return metrics.MeanMetric()
            case _ if binary:
                return kinds.BinaryAccuracy()
        classes["average"] = spec.average or "micro"
        return kinds.MulticlassAccuracy(**classes, top_k=spec.top_k or 1)

    def given(self, rows: Outputs, truth: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Predictions and labels of some samples as the measure takes them."""
        kept = rows[self.output].reshape(len(truth), -1)
        if self.spec.name == "mse":
            return kept.double(), truth.reshape(len(truth), -1).double()
        truth = truth.reshape(-1).long()
        # What was predicted of a sample whose scores are no numbers is any class but the true one.
        wrong = (truth + 1) % max(2, self.classes)
        if self.form == "ranked":
            best = rows[self.output.removesuffix("indices") + "values"].reshape(len(truth), -1)[
                :, 0
            ]
            right = kept[:, : self.spec.top_k or 1] == truth[:, None]
            return ((right.any(1) & best.isfinite()).double(),)
        if self.form == "class":
            return torch.where(kept[:, 0] == MISSING_CLASS, wrong, kept[:, 0].long()), truth
        kept = kept.double()
        lost = ~kept.amax(1).isfinite()
        if self.form == "scores":
            none = torch.nn.functional.one_hot(wrong, self.width).double()
            kept = torch.where(lost[:, None], none, kept)
        if self.spec.name == "auroc":
            return self._ranking(kept), truth
        if self.form == "score":
            bound = 0.5 if self.spec.threshold is None else self.spec.threshold
            return torch.where(lost, wrong, (kept[:, 0] > bound).long()), truth
        return kept, truth

    def _ranking(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores as torchmetrics ranks them: from 0 to 1, and no two that differ made equal.

        Left to itself it would take each window for probabilities or not by what it finds there.
        """
        if self.probable is None:
            inside = bool(((scores >= 0) & (scores <= 1)).all())
            whole = self.form == "score" or bool(((scores.sum(1) - 1).abs() < 1e-3).all())
            self.probable = inside and whole
        if self.form == "scores":
            return scores if self.probable else scores.softmax(1)
        return scores[:, 0] if self.probable else (scores[:, 0] / (1 + scores[:, 0].abs()) + 1) / 2
