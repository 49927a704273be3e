"""One metric over one output: which evidence it needs, and its torchmetrics objects."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from gradrun.config.run import MetricSection
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional
from gradrun.inference.evidence import Evidence, Target
from gradrun.inference.r2 import R2
from gradrun.inference.score_bins import ScoreBins
from gradrun.output.transforms import Tensors
from gradrun.results.result import ClassValue, ConfusionMatrix, Metric

_VALUES = {"mse": "MeanSquaredError", "mae": "MeanAbsoluteError"}
_CLASSES = {
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1Score",
    "iou": "JaccardIndex",
    "dice": "F1Score",
    "exact_match": "ExactMatch",
    "confusion_matrix": "ConfusionMatrix",
    "auroc": "AUROC",
    "calibration_error": "CalibrationError",
}
"""Names in torchmetrics; those of classes follow the name of their task there."""

_TASKS = {
    "binary": "Binary",
    "multiclass": "Multiclass",
    "classes": "Multiclass",
    "multilabel": "Multilabel",
}
_WITHOUT_AVERAGE = {"exact_match", "confusion_matrix", "calibration_error"}
_EXCLUSIVE_STEPS = {"softmax", "argmax", "classify", "topk"}
_SUM_TOLERANCE = 0.01
"""Greatest difference from 1 of a sum of probabilities, which may be in half precision."""

_MAX_EXCHANGED = 1000
"""Greatest number of classes whose confusions are counted to find names in another order."""

_LEAST_SUPPORT = 5
"""Fewer samples of a class show no pattern."""


class Scorer:
    """A metric of the config, and the output it is computed from."""

    def __init__(
        self,
        spec: MetricSection,
        key: str,
        target: Target,
        names: tuple[str, ...],
    ) -> None:
        """Check that the metric accepts the output.

        `spec` is at `key` in the config; `names` are those of the classes, () if they have none.

        Raises:
            ConfigError: it does not, or the meaning of the scores is not known.
        """
        self.spec, self.key, self.target = spec, key, target
        self.classes = target.classes
        """Number of classes or labels; for class numbers, that of the classes seen so far."""
        self.names = names
        self._check_arguments()
        self.probabilities = self._scores_are_probabilities()
        """Whether scores are probabilities; None if that is not known."""
        self.evidence = self._find_evidence()
        self._unknown_scale = (
            self.evidence.kind == "scores"
            and target.task == "multiclass"
            and self.probabilities is None
        )
        self._bins = ScoreBins(spec.thresholds) if spec.thresholds else None
        self._metrics: list[Any] = []
        self._lowest, self._highest, self._whole = torch.inf, -torch.inf, True

    # --- before the run --------------------------------------------------------------------------

    @property
    def needs(self) -> str:
        """The evidence in words."""
        words = {"class": "the classes", "scores": "the scores", "top": "the best classes"}
        return words[self.evidence.kind]

    def _check_arguments(self) -> None:
        spec, task = self.spec, self.target.task
        one_score = task in {"binary", "multilabel"}
        problem = ""
        if task == "classes" and (spec.name in {"auroc", "calibration_error"} or spec.top_k):
            problem = " needs scores, but the output contains class numbers"
        elif spec.name == "exact_match" and task != "multilabel":
            problem = " needs several labels per sample; use accuracy"
        elif spec.name in {"confusion_matrix", "calibration_error"} and task == "multilabel":
            problem = " needs classes that exclude each other, and the labels may coincide"
        elif spec.per_class and task == "binary":
            problem = ": per_class needs several classes; one score has a single class 1"
        elif spec.threshold is not None and not one_score:
            found = "scores of exclusive classes" if task == "multiclass" else "no scores"
            problem = f": threshold needs one score per sample or several labels; there are {found}"
        elif spec.name == "auroc" and spec.average == "micro" and task == "multiclass":
            problem = ": average: macro and weighted are defined for exclusive classes, not micro"
        elif (spec.top_k or 1) > max(1, self.classes if task == "multiclass" else 1):
            available = self.classes if task == "multiclass" else 1
            problem = f": top_k is {spec.top_k}, but the output has scores of {available} classes"
        elif task == "multilabel" and _EXCLUSIVE_STEPS.intersection(self.target.steps):
            problem = (
                f": each label has {self.classes} numbers, which may coincide, but "
                f"output.transform {', '.join(self.target.steps)} is for classes that exclude each "
                "other; use sigmoid, or labels with one class number"
            )
        if problem:
            raise ConfigError(f"{self.spec.title}{problem}", self.key)

    def _scores_are_probabilities(self) -> bool | None:
        """Whether the output, before transforms, has probabilities; None if it is not known."""
        if self.spec.input is not None:
            return self.spec.input == "probabilities" and "sigmoid" not in self.target.steps
        written = {"softmax", "classify", "sigmoid"}.intersection(self.target.steps)
        if written or self.target.logits:
            return False
        return None

    def _find_evidence(self) -> Evidence:
        spec, target = self.spec, self.target
        if target.task == "values":
            return Evidence(target, "scores")
        if spec.name in {"auroc", "calibration_error"} or (spec.top_k and spec.average):
            if spec.name == "calibration_error" and target.task == "binary":
                self._require_scale()
            return Evidence(target, "scores")
        if spec.top_k:
            return Evidence(target, "top", spec.top_k)
        if target.task not in {"binary", "multilabel"}:
            return Evidence(target, "class")
        sigmoid = "sigmoid" in target.steps and spec.input != "logits"
        if spec.threshold is None:
            self._require_scale()
        default = 0.5 if sigmoid or self.probabilities else 0.0
        threshold = default if spec.threshold is None else spec.threshold
        return Evidence(target, "class", threshold=threshold, sigmoid=sigmoid)

    def _require_scale(self) -> None:
        """Raise unless it is known whether the scores are logits or probabilities."""
        if self.probabilities is None:
            count = "one score" if self.target.task == "binary" else f"{self.classes} scores"
            raise ConfigError(
                f"{self.spec.title}: output {self.target.source!r} has {count} per sample, which "
                "may be logits or probabilities; set input: logits (class 1 above 0) or input: "
                "probabilities (above 0.5) in the metric",
                self.key,
            )

    def check_scores(self, scores: torch.Tensor) -> None:
        """Check that scores [n, ...] of the first batch are probabilities if the config says so.

        Raises:
            ConfigError: they are not.
        """
        if self.spec.input != "probabilities" or "sigmoid" in self.target.steps:
            return
        finite = scores[scores.isfinite()]
        if len(finite) and not (finite.min() >= 0 and finite.max() <= 1):
            raise ConfigError(
                f"output {self.target.source!r} has values from {float(finite.min()):g} to "
                f"{float(finite.max()):g}, which are not probabilities; set input: logits",
                f"{self.key}.input",
            )

    def check_labels(self, labels: torch.Tensor, first: int) -> None:
        """Check labels [n, ...] of type float64, of the samples from `first` on.

        Raises:
            ConfigError: a label is NaN or infinite.
        """
        labels = self._select(labels)
        unknown = ~labels.isfinite().reshape(len(labels), -1).all(1)
        if unknown.any():
            row = int(unknown.int().argmax())
            values = labels[row].reshape(-1)
            raise ConfigError(
                f"the label of row {first + row:,}, counted from 0, is "
                f"{float(values[~values.isfinite()][0]):g}; metrics need a finite number for every "
                "row, so remove the rows without one",
                "data.labels",
            )
        labels = labels.reshape(-1)
        if self.spec.ignore is not None:
            labels = labels[labels != self.spec.ignore]
        if len(labels):
            self._lowest = min(self._lowest, float(labels.min()))
            self._highest = max(self._highest, float(labels.max()))
            self._whole &= not bool((labels % 1).any())

    def check_label_range(self) -> None:
        """Check the range of all labels that were checked one by one.

        Raises:
            ConfigError: the metric cannot compare the output with them.
        """
        lowest, highest = self._lowest, self._highest
        if self.target.task == "values" or lowest > highest:
            return
        limit = self._limit
        if lowest < 0 or (limit and highest >= limit) or not self._whole:
            allowed = f"0 to {limit - 1}" if limit else "integers from 0"
            outside = highest if limit and highest >= limit else lowest
            hint = ""
            if lowest == 1 and highest == limit:
                hint = "; labels seem to start at 1: subtract 1, or list data.classes"
            elif outside % 1 == 0:
                hint = f"; to leave out {outside:g}, set ignore: {outside:g} in the metric"
            raise ConfigError(
                f"labels range from {lowest:g} to {highest:g}; allowed classes: {allowed}{hint}",
                "data.labels",
            )
        if self.target.task == "classes":
            self.classes = max(self.classes, int(highest) + 1)

    @property
    def _limit(self) -> int:
        """The number of classes of a label; 0 if the output does not determine it."""
        return 2 if self.target.task == "multilabel" else self.target.classes

    @property
    def doubt(self) -> str:
        """Why the labels may not be those of the output's classes; empty without a reason."""
        left_out = self.spec.ignore == 0
        if self.target.task != "multiclass" or left_out or self._lowest != 1:
            return ""
        return (
            f"the labels of {self.spec.title} range from 1 to {self._highest:g}, and none is class "
            f"0 of 0 to {self._limit - 1}; if they start at 1, subtract 1"
        )

    # --- after the run ---------------------------------------------------------------------------

    @property
    def exchanged(self) -> dict[int, tuple[int, float]]:
        """Classes that are predicted as one another: class -> predicted class, and its share.

        In each, at least five samples and most of all are predicted as another class, and these
        predicted classes are the same set. Confusions of a model hardly ever are such a
        permutation; names in another order are.
        """
        if self._confusion is None:
            return {}
        counts = self._confusion
        support, most = counts.sum(1), counts.max(1)
        often = (support >= _LEAST_SUPPORT) & (2 * most.values > support)
        pairs = enumerate(most.indices.tolist())
        found = {true: other for true, other in pairs if often[true] and other != true}
        while lost := found.keys() ^ {*found.values()}:
            found = {
                true: other
                for true, other in found.items()
                if true not in lost and other not in lost
            }
        shares = most.values / support.clamp(min=1)
        return {true: (other, float(shares[true])) for true, other in found.items()}

    @property
    def surveys(self) -> bool:
        """Whether all evidence must be read once before the metric is computed."""
        return self.target.task == "classes" or self._unknown_scale or self._bins is not None

    def survey(self, rows: Tensors) -> None:
        """Count class numbers, sample scores, or find out whether scores are probabilities.

        Scores of several classes are probabilities if those of every sample are from 0 to 1 and
        their sum is 1.
        """
        values = rows[self.evidence.name]
        if self._bins:
            scores = self.target.rows(values.double(), wide=True)
            self._bins.add(scores.reshape(len(scores), -1))
        if self.target.task == "classes":
            self.classes = max(self.classes, int(values.max()) + 1)
        elif self._unknown_scale and self.probabilities is not False:
            scores = self.target.rows(values.double(), wide=True)
            scores = scores[scores.isfinite().all(1)]
            in_range = bool(((scores >= 0) & (scores <= 1)).all())
            sums = bool(((scores.sum(1) - 1).abs() < _SUM_TOLERANCE).all())
            self.probabilities = in_range and sums

    def start(self) -> None:
        """Create the torchmetrics objects."""
        spec = self.spec
        count = max(2, self.classes)
        self._missing, self._seen = 0, torch.zeros(count, dtype=torch.bool)
        self._support = torch.zeros(count, dtype=torch.int64)
        exclusive = self.target.task in {"multiclass", "classes"} and self.evidence.kind != "top"
        self._confusion: torch.Tensor | None = None
        if exclusive and count <= _MAX_EXCHANGED:
            self._confusion = torch.zeros(count, count, dtype=torch.int64)
        if self._bins:
            scores = self._comparable(self._bins.sample)
            self._bins.divide(scores.reshape(-1, 1) if spec.average == "micro" else scores)
        if spec.name == "r2":
            self._metrics = [R2()]
        elif spec.name in _VALUES:
            torchmetrics = import_optional("torchmetrics", self.key)
            self._metrics = [getattr(torchmetrics, _VALUES[spec.name])()]
        elif self.evidence.kind == "top":
            self._metrics = [import_optional("torchmetrics", self.key).MeanMetric()]
        elif self._averages_here:
            self._metrics = [self._torch_metric("none")]
        else:
            averages = [self._average(), *(["none"] if spec.per_class else [])]
            self._metrics = [self._torch_metric(average) for average in averages]

    @property
    def _averages_here(self) -> bool:
        """Whether the average is taken over the classes with labels only.

        torchmetrics counts an AUROC of 0 for each class without a positive sample.
        """
        several = self.target.task != "binary"
        return self.spec.name == "auroc" and several and self.spec.average != "micro"

    def _mean_of_classes(self, values: torch.Tensor) -> torch.Tensor:
        weights = (self._support > 0).double()
        if self.spec.average == "weighted":
            weights = self._support.double()
        values = torch.where(self._support > 0, values.double(), 0.0)
        return (values * weights).sum() / weights.sum()

    def _average(self) -> str:
        return self.spec.average or ("micro" if self.spec.name == "accuracy" else "macro")

    def _torch_metric(self, average: str) -> Any:
        spec, task = self.spec, self.target.task
        classification = import_optional("torchmetrics", self.key, "classification")
        options: dict[str, Any] = {}
        if task == "multilabel":
            options = {"num_labels": self.classes, "ignore_index": spec.ignore}
        elif task != "binary":
            options = {"num_classes": max(2, self.classes)}
        if task != "binary" and spec.name not in _WITHOUT_AVERAGE:
            options["average"] = average
        if spec.name == "auroc":
            options["thresholds"] = self._bins.thresholds if self._bins else None
        if spec.name == "calibration_error":
            options["n_bins"] = spec.bins or 15
        if spec.top_k:
            options["top_k"] = spec.top_k
        return getattr(classification, _TASKS[task] + _CLASSES[spec.name])(**options)

    def update(self, rows: Tensors, labels: torch.Tensor) -> None:
        """Add evidence and labels [n, ...] of some samples."""
        values, labels = rows[self.evidence.name], self._select(labels)
        if self.target.task == "values":
            arguments = self._values(values.double(), labels)
        else:
            arguments = self._class_arguments(values, labels.long())
        for metric in self._metrics:
            metric.update(*arguments)

    def _select(self, labels: torch.Tensor) -> torch.Tensor:
        return labels if self.spec.label is None else labels[:, self.spec.label]

    def _values(self, values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.spec.name == "r2":  # the mean over the values of a sample
            return values.reshape(len(labels), -1), labels.reshape(len(labels), -1)
        return values.reshape(-1), labels.reshape(-1)

    def _class_arguments(
        self, values: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Convert to the arguments of update(): predictions and truth, one row per position."""
        kind, several = self.evidence.kind, self.target.task == "multilabel"
        truth = self.target.rows(labels, wide=several)
        if kind == "top":
            assert self.target.dim is not None
            found = values.movedim(self.target.dim + 1, -1).reshape(len(truth), -1)
        else:
            found = self.target.rows(values, wide=kind == "scores" or several)
        if self.spec.ignore is not None and not several:
            kept = truth != self.spec.ignore
            found, truth = found[kept], truth[kept]
        if kind == "top":
            return ((found.long() == truth[:, None]).any(1).double(),)
        if several:
            self._support += (truth == 1).sum(0)
        else:
            self._support += torch.bincount(truth, minlength=len(self._support))
        if self._confusion is not None:
            self._count(found.argmax(1) if found.ndim > 1 else found.long(), truth)
        if kind == "scores":
            return self._to_unit_interval(found.double(), truth), truth
        found = found.long()
        missing = found < 0
        if self.spec.name == "confusion_matrix":
            self._missing += int(missing.sum())
            return found[~missing], truth[~missing]
        if not several:
            self._seen[found[~missing]] = True
        return torch.where(missing, self._wrong(truth), found), truth

    def _count(self, found: torch.Tensor, truth: torch.Tensor) -> None:
        """Add predicted and true classes [n] to the confusion matrix."""
        assert self._confusion is not None
        count, known = len(self._confusion), found >= 0
        pairs = truth[known] * count + found[known]
        self._confusion += torch.bincount(pairs, minlength=count * count).view(count, count)

    def _wrong(self, truth: torch.Tensor) -> torch.Tensor:
        """Another class than the true one, for predictions with NaN or infinite scores."""
        if self.target.task == "multilabel":
            return (truth != 1).long()
        return (truth + 1) % max(2, self.classes)

    def _to_unit_interval(self, scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Map scores to 0 to 1, as torchmetrics expects them.

        torchmetrics would decide for each chunk separately whether its scores are probabilities.
        NaN and infinite scores become those of a wrong class.
        """
        if self.target.task == "multiclass":
            nonfinite = ~scores.amax(1, keepdim=True).isfinite()
            wrong = torch.nn.functional.one_hot(self._wrong(truth), self.classes).double()
        else:
            nonfinite, wrong = ~scores.isfinite(), self._wrong(truth).double()
        scores = self._comparable(scores)
        if self._bins:
            scores = self._bins.place(scores.reshape(len(scores), -1)).reshape(scores.shape)
        elif self.target.task != "multiclass" and not self.probabilities:
            if self.spec.name == "auroc":
                scores = (scores / (1 + scores.abs()) + 1) / 2  # the same order, without ties
            else:
                scores = scores.sigmoid()
        return torch.where(nonfinite, wrong, scores)

    def _comparable(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores that compare samples: exclusive classes need probabilities."""
        if self.target.task != "multiclass" or self.probabilities or self.spec.top_k:
            return scores
        return scores.softmax(1)

    def result(self, samples: int) -> Metric:
        """Return the value over all samples."""
        spec, matrix = self.spec, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes without samples, which per_class shows
            computed = [metric.compute() for metric in self._metrics]
        value = computed[0]
        if self._averages_here:
            value = self._mean_of_classes(value)
        if spec.name == "confusion_matrix":
            counts = value.long()
            matrix = ConfusionMatrix(
                classes=self.class_names, counts=tuple(map(tuple, counts.tolist()))
            )
            value = counts.diagonal().sum() / counts.sum().clamp(min=1)
        return Metric(
            name=spec.title,
            value=float(value),
            samples=samples,
            note=self._note(),
            per_class=self._per_class(computed[-1]) if spec.per_class else (),
            matrix=matrix,
        )

    def _per_class(self, values: torch.Tensor) -> tuple[ClassValue, ...]:
        defined = self._seen | (self._support > 0)  # in predictions or labels
        if self.spec.name == "auroc":
            defined = self._support > 0
        if self.target.task != "multilabel" or self.spec.name == "auroc":
            values = torch.where(defined, values.double(), torch.nan)
        names = self.class_names
        return tuple(
            ClassValue(name=name, value=value)
            for name, value in zip(names, values.tolist(), strict=True)
        )

    def _averaged(self) -> torch.Tensor:
        """Return which classes an average is taken over, bool [classes]."""
        if self._averages_here or self._average() == "weighted" or self.evidence.kind == "scores":
            return self._support > 0
        if self.target.task == "multilabel":
            return torch.ones(self.classes, dtype=torch.bool)
        return self._seen | (self._support > 0)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers."""
        count = max(2, self.classes)
        return self.names if len(self.names) == count else tuple(map(str, range(count)))

    def _note(self) -> str:
        """How the value is defined, in a few words."""
        spec, task = self.spec, self.target.task
        parts = []
        if task == "values":
            return ""
        if spec.name == "confusion_matrix":
            parts.append("share on the diagonal")
            if self._missing:
                parts.append(f"{self._missing:,} without a class left out")
        elif task != "binary" and spec.name not in _WITHOUT_AVERAGE and self.evidence.kind != "top":
            noun = "labels" if task == "multilabel" else "classes"
            if (average := self._average()) != "micro":
                averaged = int(self._averaged().sum())
                count = max(averaged, self.classes)
                of = f" of {count}" if averaged < count else ""
                parts.append(f"{average} over {averaged}{of} {noun}")
        if self.evidence.kind == "class" and task in {"binary", "multilabel"}:
            what = "probability" if self.evidence.sigmoid or self.probabilities else "score"
            parts.append(f"1 if {what} > {self.evidence.threshold:g}")
        elif self.evidence.kind == "scores" and task == "multiclass":
            parts.append("of probabilities" if self.probabilities else "of softmax")
        return ", ".join(parts)
