"""Compute metrics after the run, from the saved predictions and the labels, in chunks."""

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
from gradrun.output.formats import FORMATS
from gradrun.output.missing import MISSING_CLASS
from gradrun.output.quarantine import quarantined_positions
from gradrun.output.transforms import Outputs
from gradrun.results.result import Metric

ComputeMetrics = Callable[[Path], tuple[Metric, ...]]
"""Computes the metrics of the predictions in a run folder."""

_ACCEPTED = {
    "accuracy": ({"class", "ranked", "score", "scores"}, "classes or scores"),
    "f1": ({"class", "score", "scores"}, "one class per sample, or scores"),
    "auroc": ({"score", "scores"}, "a score per class"),
    "mse": ({"score", "scores", "values"}, "numbers other than classes"),
}
"""Metric -> the accepted forms of output (see _form), and their description."""


def prepare_metrics(
    config: RunConfig, data: BatchSource, outputs: Outputs, model_classes: Sequence[str] = ()
) -> ComputeMetrics | None:
    """Check that the metrics of a config can be computed; None if it has none.

    Args:
        config: the config of the run.
        data: the data source of the run; all of its labels are read and checked once.
        outputs: tensors [size, ...] of any batch, for names, shapes and dtypes.
        model_classes: class names of the model, if it has any.

    Raises:
        ConfigError: torchmetrics is missing, the data source has no labels, or a metric does not
            accept the outputs.
    """
    if not config.metrics:
        return None
    import_optional("torchmetrics", "metrics")
    form = config.output.format
    if not isinstance(data, HasLabels):
        raise ConfigError(f"data of source {config.data.source} have no labels", "metrics")
    if form not in FORMATS:
        text = f"metrics need predictions in a readable format, and {form} is not; choose one of "
        raise ConfigError(text + ", ".join(FORMATS), "output.format")
    _check_class_order(data.classes, model_classes)
    metrics = [
        _OutputMetric(spec, f"metrics.{i}", outputs) for i, spec in enumerate(config.metrics)
    ]
    for labels in data.labels():  # all of them, because after the run an error would be too late
        for metric in metrics:
            metric.check_labels(labels.double())

    def compute(folder: Path) -> tuple[Metric, ...]:
        for _, rows in _read(form, folder):
            for metric in metrics:
                metric.count_classes(rows)
        torch_metrics, samples = [metric.torch_metric() for metric in metrics], 0
        for rows, truth in _pairs(_read(form, folder), data, quarantined_positions(folder)):
            samples += len(truth)
            for metric, torch_metric in zip(metrics, torch_metrics, strict=True):
                torch_metric.update(*metric.arguments(rows, truth))
        if not samples:
            return ()
        return tuple(
            Metric(name=metric.spec.title, value=float(torch_metric.compute()), samples=samples)
            for metric, torch_metric in zip(metrics, torch_metrics, strict=True)
        )

    return compute


def _check_class_order(classes: Sequence[str] | None, model_classes: Sequence[str]) -> None:
    """Reject labels with the model's class names in another order."""
    if classes and sorted(classes) == sorted(model_classes) and list(classes) != [*model_classes]:
        raise ConfigError(
            "the labels have the model's classes in another order; set data.classes: "
            f"[{', '.join(model_classes)}]",
            "data.classes",
        )


def _read(form: str, folder: Path) -> Iterator[tuple[torch.Tensor, Outputs]]:
    for positions, rows in FORMATS[form].read(folder):
        outputs = {name: torch.from_numpy(values) for name, values in rows.items()}
        yield torch.from_numpy(positions), outputs


def _pairs(
    chunks: Iterator[tuple[torch.Tensor, Outputs]], data: HasLabels, quarantined: set[int]
) -> Iterator[tuple[Outputs, torch.Tensor]]:
    """Yield outputs and labels of the same samples, without the quarantined ones."""
    excluded = torch.tensor(sorted(quarantined), dtype=torch.int64)
    # float64, because torch supports few operations on the smaller integer types.
    label_chunks = (labels.double() for labels in data.labels())
    labels, first = next(label_chunks), 0  # unused labels, and the position of the first of them
    for positions, rows in chunks:
        stop = int(positions[-1]) + 1
        while first + len(labels) < stop:
            labels = torch.cat([labels, next(label_chunks)])
        included = ~torch.isin(positions, excluded)
        if included.any():
            truth = labels[positions[included] - first]
            yield {name: tensor[included] for name, tensor in rows.items()}, truth
        labels, first = labels[stop - first :], stop


def _form(tensor: torch.Tensor, *, ranked: bool) -> str:
    """Classify an output [n, ...] by its content per sample: class, score, scores or values."""
    if ranked and tensor.ndim == 2:
        return "ranked"  # classes, the most likely first
    single = tensor[:1].numel() == 1
    if not tensor.is_floating_point():
        return "class" if single else "integers"
    return "score" if single else "scores" if tensor.ndim == 2 else "values"


class _OutputMetric:
    """One metric and the output it is computed from."""

    def __init__(self, spec: MetricSection, key: str, outputs: Outputs) -> None:
        self.spec, self.key = spec, key
        suffixes = {name.rpartition(".")[2] for name in outputs}
        ranked = suffixes == {"values", "indices"}  # the outputs of topk
        classified = suffixes == {"class", "score"}
        self.output = self._select_output(
            outputs, "indices" if ranked else "class" if classified else ""
        )
        tensor = outputs[self.output]
        self.width, self.form = tensor[:1].numel(), _form(tensor, ranked=ranked)
        self.classes = {"scores": self.width, "score": 2}.get(self.form, 0)
        """Number of classes; for forms without that information, the number seen so far."""
        self.is_probability: bool | None = None
        """Whether scores are probabilities, decided by the first chunk."""
        forms, description = _ACCEPTED[spec.name]
        if self.form not in forms or (self.form == "ranked" and spec.average):
            raise ConfigError(
                f"{spec.title} needs {description}, which output.transform removes; none and "
                "softmax keep all scores",
                key,
            )
        available = self.width if self.form in {"ranked", "scores"} else 1
        if (spec.top_k or 1) > available:
            raise ConfigError(
                f"top_k is {spec.top_k}, but the predictions contain {available} of a sample's "
                "classes; output.transform: none keeps all",
                key,
            )

    def _select_output(self, outputs: Outputs, suffix: str) -> str:
        """Return the name of the output to use; of topk and classify, the one with the classes."""
        names = [name for name in outputs if not suffix or name.rpartition(".")[2] == suffix]
        ending = f".{suffix}" if suffix else ""
        wanted = self.spec.output and f"{self.spec.output}{ending}"
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted in names:
            return str(wanted)
        choices = ", ".join(name.removesuffix(ending) for name in names)
        raise ConfigError(f"set `output` to one of the outputs: {choices}", self.key)

    def check_labels(self, labels: torch.Tensor) -> None:
        """Check labels [n, ...] of type float64.

        Raises:
            ConfigError: the metric cannot compare the output with them.
        """
        width = self.width if self.spec.name == "mse" else 1
        if labels[:1].numel() != width:
            size = pluralize(labels[:1].numel(), "number")
            text = f"each label has {size}, but {self.spec.title} needs {width}"
            raise ConfigError(text, "data.labels")
        if self.spec.name == "mse":
            return
        lowest, highest = float(labels.min()), float(labels.max())
        known = self.classes if self.form in {"score", "scores"} else 0
        if lowest < 0 or (known and highest >= known) or bool((labels % 1).any()):
            allowed = f"0 to {known - 1}" if known else "integers from 0"
            raise ConfigError(
                f"labels range from {lowest:g} to {highest:g}; allowed classes: {allowed}",
                "data.labels",
            )
        self.classes = known or max(self.classes, int(highest) + 1)

    def count_classes(self, rows: Outputs) -> None:
        """Update the number of classes, if the output contains class numbers."""
        if self.form == "class":
            self.classes = max(self.classes, int(rows[self.output].max()) + 1)

    def torch_metric(self) -> Any:
        """Create the torchmetrics object that is updated with `arguments`."""
        spec, binary = self.spec, self.form == "score"
        torchmetrics = import_optional("torchmetrics", self.key)
        classification = import_optional("torchmetrics", self.key, "classification")
        options = {"num_classes": max(2, self.classes), "average": spec.average or "macro"}
        match spec.name:
            case "mse":
                return torchmetrics.MeanSquaredError()
            case "auroc" if binary:
                return classification.BinaryAUROC(thresholds=spec.thresholds)
            case "auroc":
                return classification.MulticlassAUROC(**options, thresholds=spec.thresholds)
            case "f1" if binary:
                return classification.BinaryF1Score()
            case "f1":
                return classification.MulticlassF1Score(**options)
            case _ if self.form == "ranked":
                return torchmetrics.MeanMetric()
            case _ if binary:
                return classification.BinaryAccuracy()
        options["average"] = spec.average or "micro"
        return classification.MulticlassAccuracy(**options, top_k=spec.top_k or 1)

    def arguments(self, rows: Outputs, truth: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Convert predictions and labels of some samples to the arguments of update()."""
        values = rows[self.output].reshape(len(truth), -1)
        if self.spec.name == "mse":
            return values.double(), truth.reshape(len(truth), -1).double()
        truth = truth.reshape(-1).long()
        # A sample with NaN or infinite scores counts as predicted wrong: another class than true.
        wrong = (truth + 1) % max(2, self.classes)
        if self.form == "ranked":
            scores = rows[self.output.removesuffix("indices") + "values"].reshape(len(truth), -1)
            correct = values[:, : self.spec.top_k or 1] == truth[:, None]
            return ((correct.any(1) & scores[:, 0].isfinite()).double(),)
        if self.form == "class":
            return torch.where(values[:, 0] == MISSING_CLASS, wrong, values[:, 0].long()), truth
        values = values.double()
        nonfinite = ~values.amax(1).isfinite()
        if self.form == "scores":
            wrong_scores = torch.nn.functional.one_hot(wrong, self.width).double()
            values = torch.where(nonfinite[:, None], wrong_scores, values)
        if self.spec.name == "auroc":
            return self._to_unit_interval(values), truth
        if self.form == "score":
            threshold = 0.5 if self.spec.threshold is None else self.spec.threshold
            return torch.where(nonfinite, wrong, (values[:, 0] > threshold).long()), truth
        return values, truth

    def _to_unit_interval(self, scores: torch.Tensor) -> torch.Tensor:
        """Map scores to 0 to 1 with the same ranking, as torchmetrics expects them for AUROC.

        torchmetrics would decide for each chunk separately whether its scores are probabilities.
        """
        if self.is_probability is None:
            in_range = bool(((scores >= 0) & (scores <= 1)).all())
            sums_to_1 = self.form == "score" or bool(((scores.sum(1) - 1).abs() < 1e-3).all())
            self.is_probability = in_range and sums_to_1
        if self.form == "scores":
            return scores if self.is_probability else scores.softmax(1)
        score = scores[:, 0]
        return score if self.is_probability else (score / (1 + score.abs()) + 1) / 2
