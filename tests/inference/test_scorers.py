"""Metrics of one-logit, multi-label, segmentation and multi-head models equal numpy and sklearn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

import gradrun
from gradrun.core.errors import ConfigError, Interrupted
from gradrun.core.progress import Progress
from gradrun.inference.r2 import R2
from gradrun.output.formats import FORMATS
from gradrun.results.result import InferResult, Metric

SAMPLES = 300
DRAWN = np.random.default_rng(5)
TRUTH = DRAWN.integers(0, 2, SAMPLES)
LOGITS = (DRAWN.normal(size=SAMPLES) + 2.0 * TRUTH - 1.0).astype(np.float32)
WILL = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))


def infer(folder: Path, x: np.ndarray, y: np.ndarray, **changes: Any) -> InferResult:
    """Run a model that returns its input, or `target` of this file, over x with labels y."""
    overwrite = not changes.get("resume")
    if overwrite:
        np.savez(folder / "data.npz", x=x, y=y)
    model: dict[str, Any] = {"source": "layers", "layers": ["Identity"]}
    if target := changes.pop("target", None):
        model = {"source": "python", "target": f"{__file__}:{target}"}
    config = {
        "model": model,
        "data": changes.pop("data", None)
        or {
            "source": "arrays",
            "path": str(folder / "data.npz"),
            "inputs": {"x": {"key": "x"}},
            "labels": {"key": "y"},
            "batch_size": 32,
        },
        "measure": {"memory": False},
        "run": {"warmup": 0, "threads": 1},
        "output": {"path": str(folder / "out")} | changes.pop("output", {}),
    }
    return gradrun.infer(config, trust_code=True, overwrite=overwrite, **changes)


def values(result: InferResult) -> dict[str, float]:
    assert [w for w in result.warnings if w.code == "no_metrics"] == []
    assert {metric.samples for metric in result.metrics} == {SAMPLES}
    return {metric.name: metric.value for metric in result.metrics}


def only(result: InferResult) -> Metric:
    (metric,) = result.metrics
    return metric


# --- one logit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(SAMPLES,), (SAMPLES, 1)])
@pytest.mark.parametrize("transform", ["none", "sigmoid"])
def test_one_logit_is_cut_at_0_and_its_sigmoid_at_one_half(
    tmp_path: Path, shape: tuple[int, ...], transform: str
) -> None:
    asked = [
        *({"name": name, "input": "logits"} for name in ("accuracy", "f1", "precision", "recall")),
        {"name": "accuracy", "threshold": 0.5, "alias": "above_half", "input": "logits"},
        "auroc",
    ]
    output = {"transform": transform}
    found = infer(tmp_path, LOGITS.reshape(shape), TRUTH, output=output, metrics=asked)
    said = LOGITS > 0
    assert values(found) == pytest.approx(
        {
            "accuracy": np.mean(said == TRUTH),
            "f1": sk.f1_score(TRUTH, said),
            "precision": sk.precision_score(TRUTH, said),
            "recall": sk.recall_score(TRUTH, said),
            "above_half": np.mean((LOGITS > 0.5) == TRUTH),
            "auroc": sk.roc_auc_score(TRUTH, LOGITS),
        },
        abs=1e-6,
    )
    written = np.load(tmp_path / "out" / "predictions.npy").reshape(-1)
    assert np.allclose(written, WILL if transform == "sigmoid" else LOGITS, atol=1e-7)


def test_after_sigmoid_a_threshold_applies_to_the_probability(tmp_path: Path) -> None:
    asked = ["accuracy", {"name": "accuracy", "threshold": 0.3, "alias": "early"}]
    result = infer(tmp_path, LOGITS, TRUTH, output={"transform": "sigmoid"}, metrics=asked)
    assert values(result) == pytest.approx(
        {"accuracy": np.mean((WILL > 0.5) == TRUTH), "early": np.mean((WILL > 0.3) == TRUTH)},
        abs=1e-6,
    )
    assert [m.note for m in result.metrics] == ["1 if probability > 0.5", "1 if probability > 0.3"]


def test_probabilities_of_one_class_are_cut_at_one_half(tmp_path: Path) -> None:
    asked = [{"name": "accuracy", "input": "probabilities"}]
    found = infer(tmp_path, WILL.astype(np.float32), TRUTH, metrics=asked)
    assert values(found) == {"accuracy": pytest.approx(np.mean((WILL > 0.5) == TRUTH))}


def test_input_probabilities_refuses_values_outside_0_to_1(tmp_path: Path) -> None:
    asked = [{"name": "accuracy", "input": "probabilities"}]
    with pytest.raises(ConfigError, match=r"metrics\.0.*from -\S+ to \S+, which are not prob"):
        infer(tmp_path, LOGITS, TRUTH, metrics=asked)


@pytest.mark.parametrize("name", ["accuracy", "f1", "confusion_matrix", "calibration_error"])
def test_one_score_of_unknown_meaning_is_an_error_that_names_both(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match=r"input: logits .* or input: probabilities"):
        infer(tmp_path, LOGITS, TRUTH, metrics=[name])
    assert not (tmp_path / "out").exists()


BINNED = {"name": "auroc", "thresholds": 100}
SCALES = {
    "close together": lambda z: 1000 + 1e-2 * z,
    "large": lambda z: 1e6 * z,
    "tiny": lambda z: 1e-7 * z,
    "one far away": lambda z: np.where(np.arange(SAMPLES).reshape(-1, *[1] * (z.ndim - 1)), z, 1e9),
}


@pytest.mark.parametrize("given", [{}, {"input": "logits"}])
@pytest.mark.parametrize("name", SCALES)
def test_thresholds_follow_the_scores(tmp_path: Path, name: str, given: dict[str, str]) -> None:
    x = SCALES[name](LOGITS.astype(np.float64))
    found = only(infer(tmp_path, x, TRUTH, metrics=[BINNED | given]))
    assert found.value == pytest.approx(sk.roc_auc_score(TRUTH, x), abs=0.01)


def test_thresholds_of_scores_of_few_kinds_lose_nothing(tmp_path: Path) -> None:
    x = np.round(LOGITS)
    x[5] = np.nan  # counts as wrong
    right = np.where(np.isnan(x), np.where(TRUTH, -99, 99), x)
    found = only(infer(tmp_path, x, TRUTH, metrics=[BINNED]))
    assert found.value == pytest.approx(sk.roc_auc_score(TRUTH, right), abs=0.005)


@pytest.mark.parametrize("transform", ["none", "softmax", "argmax"])
@pytest.mark.parametrize("scale", [1e-6, 1, 30])
def test_thresholds_of_several_classes_follow_each_class(
    tmp_path: Path, scale: float, transform: str
) -> None:
    x = SCORES[:, :4] * np.float32(scale)
    found = only(infer(tmp_path, x, CLASSES, metrics=[BINNED], output={"transform": transform}))
    likely = softmax(x)
    columns = [sk.roc_auc_score(c == CLASSES, likely[:, c]) for c in range(4)]
    assert found.value == pytest.approx(np.mean(columns), abs=0.01)


def test_thresholds_of_several_labels_are_shared_by_a_micro_average_only(tmp_path: Path) -> None:
    x = (DRAWN.normal(size=(SAMPLES, 3)) * [1, 1e4, 1e-4]).astype(np.float32)
    y = (x * (1 + DRAWN.normal(size=x.shape)) > 0).astype(np.int64)
    asked = [BINNED, BINNED | {"average": "micro", "alias": "micro"}]
    assert values(infer(tmp_path, x, y, metrics=asked)) == pytest.approx(
        {
            average: sk.roc_auc_score(y, x, average=kind)
            for average, kind in (("auroc", "macro"), ("micro", "micro"))
        },
        abs=0.01,
    )


def test_the_calibration_error_equals_the_gap_per_bin(tmp_path: Path) -> None:
    def gap(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
        index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        gaps = (
            abs(confidence[index == b].sum() - correct[index == b].sum())
            for b in range(bins)
            if (index == b).any()
        )
        return sum(gaps) / len(confidence)

    asked = [{"name": "calibration_error", "bins": 10, "input": "logits"}]
    found = only(infer(tmp_path, LOGITS, TRUTH, metrics=asked))
    # torchmetrics compares the probability of class 1 with its frequency.
    assert found.value == pytest.approx(gap(WILL, TRUTH.astype(float), 10), abs=1e-6)

    logits = DRAWN.normal(size=(SAMPLES, 4)).astype(np.float32)
    truth = DRAWN.integers(0, 4, SAMPLES)
    likely = softmax(logits)
    right = gap(likely.max(1), (likely.argmax(1) == truth).astype(float), 15)
    for x in (logits, likely.astype(np.float32)):
        found = only(infer(tmp_path, x, truth, metrics=["calibration_error"]))
        assert found.value == pytest.approx(right, abs=1e-5)


# --- several labels ----------------------------------------------------------------------------

LABELS = DRAWN.integers(0, 2, (SAMPLES, 5))
LABEL_LOGITS = (DRAWN.normal(size=(SAMPLES, 5)) + 2.0 * LABELS - 1.0).astype(np.float32)


@pytest.mark.parametrize("transform", [["sigmoid"], ["sigmoid", "threshold"]])
def test_metrics_of_several_labels_equal_scikit_learn(tmp_path: Path, transform: list[str]) -> None:
    asked = [
        "accuracy",
        "exact_match",
        {"name": "f1", "per_class": True},
        {"name": "f1", "average": "micro", "alias": "f1_micro"},
        {"name": "recall", "average": "weighted"},
        "auroc",
        {"name": "iou"},
    ]
    result = infer(tmp_path, LABEL_LOGITS, LABELS, output={"transform": transform}, metrics=asked)
    said = LABEL_LOGITS > 0
    assert values(result) == pytest.approx(
        {
            "accuracy": np.mean(said == LABELS),
            "exact_match": np.mean((said == LABELS).all(1)),
            "f1": sk.f1_score(LABELS, said, average="macro"),
            "f1_micro": sk.f1_score(LABELS, said, average="micro"),
            "recall": sk.recall_score(LABELS, said, average="weighted"),
            "auroc": sk.roc_auc_score(LABELS, LABEL_LOGITS, average="macro"),
            "iou": sk.jaccard_score(LABELS, said, average="macro"),
        },
        abs=1e-6,
    )
    per_label = [value.value for value in result.metrics[2].per_class]
    assert per_label == pytest.approx(sk.f1_score(LABELS, said, average=None), abs=1e-6)
    written = np.load(tmp_path / "out" / "predictions.npy")
    probable = 1 / (1 + np.exp(-LABEL_LOGITS))
    assert np.allclose(written, said if "threshold" in transform else probable, atol=1e-6)


def test_several_labels_need_the_meaning_of_the_scores(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 5 scores per sample, which may be logits or prob"):
        infer(tmp_path, LABEL_LOGITS, LABELS, metrics=["f1"])
    with pytest.raises(ConfigError, match="softmax is for classes that exclude each other"):
        infer(tmp_path, LABEL_LOGITS, LABELS, output={"transform": "softmax"}, metrics=["f1"])


@pytest.mark.parametrize("named", [False, True])
def test_labels_of_records_may_be_lists(tmp_path: Path, named: bool) -> None:
    classes = ["ant", "bee", "cat", "dog", "eel"]
    lists = [[classes[i] for i in np.flatnonzero(row)] if named else row.tolist() for row in LABELS]
    rows = [{"x": x.tolist(), "y": y} for x, y in zip(LABEL_LOGITS, lists, strict=True)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {
        "source": "records",
        "path": str(tmp_path / "data.jsonl"),
        "inputs": {"x": {"columns": ["x"]}},
        "labels": "y",
    } | ({"classes": classes} if named else {})
    asked = [{"name": "f1", "input": "logits"}]
    found = infer(tmp_path, LABEL_LOGITS, LABELS, data=data, metrics=asked)
    right = sk.f1_score(LABELS, LABEL_LOGITS > 0, average="macro")
    assert values(found) == {"f1": pytest.approx(right, abs=1e-6)}
    if not named:
        rows[5]["y"] = [1, 0]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(ConfigError, match=r"jsonl:6  the label 'y' has 2 list items"):
            infer(tmp_path, LABEL_LOGITS, LABELS, data=data, metrics=asked)


# --- segmentation ------------------------------------------------------------------------------

PIXELS = DRAWN.integers(0, 3, (SAMPLES, 4, 6))
PIXEL_LOGITS = (
    DRAWN.normal(size=(SAMPLES, 3, 4, 6)) + 1.5 * np.eye(3)[PIXELS].transpose(0, 3, 1, 2)
).astype(np.float32)


@pytest.mark.parametrize("transform", ["none", "argmax", ["argmax", "uint8"], "classify"])
def test_metrics_of_masks_equal_numpy(tmp_path: Path, transform: Any) -> None:
    asked = [
        "accuracy",
        {"name": "iou", "per_class": True},
        "dice",
        "confusion_matrix",
    ]
    output = {"transform": transform}
    result = infer(tmp_path, PIXEL_LOGITS, PIXELS, output=output, metrics=asked)
    said, true = PIXEL_LOGITS.argmax(1).ravel(), PIXELS.ravel()
    both = np.array([np.sum((said == c) & (true == c)) for c in range(3)])
    sizes = np.array([np.sum(said == c) + np.sum(true == c) for c in range(3)])
    iou = both / (sizes - both)
    assert values(result) == pytest.approx(
        {
            "accuracy": np.mean(said == true),
            "iou": iou.mean(),
            "dice": np.mean(2 * both / sizes),
            "confusion_matrix": np.mean(said == true),
        },
        abs=1e-6,
    )
    assert [v.value for v in result.metrics[1].per_class] == pytest.approx(iou, abs=1e-6)
    matrix = result.metrics[3].matrix
    assert matrix is not None
    assert np.array_equal(matrix.counts, sk.confusion_matrix(true, said))
    if transform == ["argmax", "uint8"]:
        written = np.load(tmp_path / "out" / "predictions.npy")
        assert written.dtype == np.uint8
        assert np.array_equal(written.ravel(), said)


def test_pixels_with_the_ignored_label_are_left_out(tmp_path: Path) -> None:
    masks = PIXELS.copy()
    masks[:, 0] = 255
    with pytest.raises(ConfigError, match="to leave out 255, set ignore: 255"):
        infer(tmp_path, PIXEL_LOGITS, masks, metrics=["iou"])
    asked = [{"name": "accuracy", "ignore": 255}]
    found = infer(tmp_path, PIXEL_LOGITS, masks, metrics=asked)
    right = np.mean(PIXEL_LOGITS.argmax(1)[:, 1:] == PIXELS[:, 1:])
    assert values(found) == {"accuracy": pytest.approx(right, abs=1e-6)}


@pytest.mark.parametrize("shape", [(SAMPLES, 4, 6), (SAMPLES, 1, 4, 6)])
def test_masks_of_one_class_have_one_logit_per_pixel(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    truth = (PIXELS == 1).astype(np.uint8)
    asked = [{"name": name, "input": "logits"} for name in ("iou", "dice", "accuracy")]
    x = PIXEL_LOGITS[:, 1].reshape(shape)
    found = infer(tmp_path, x, truth, metrics=asked)
    said, true = PIXEL_LOGITS[:, 1] > 0, truth == 1
    both = np.sum(said & true)
    assert values(found) == pytest.approx(
        {
            "iou": both / np.sum(said | true),
            "dice": 2 * both / (np.sum(said) + np.sum(true)),
            "accuracy": np.mean(said == true),
        },
        abs=1e-6,
    )


def test_masks_of_class_numbers_are_compared_with_labels(tmp_path: Path) -> None:
    found = infer(tmp_path, PIXELS.astype(np.uint8), PIXELS, metrics=["iou", "accuracy"])
    assert values(found) == {"iou": 1.0, "accuracy": 1.0}


# --- several heads -----------------------------------------------------------------------------


class Heads(torch.nn.Module):
    """Three outputs: two heads of classes and one value."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sentiment": x[:, :2], "topic": x[:, 2:6], "stars": x[:, 6]}


HEADS = DRAWN.normal(size=(SAMPLES, 7)).astype(np.float32)
HEAD_LABELS = np.stack(
    [DRAWN.integers(0, 2, SAMPLES), DRAWN.integers(0, 4, SAMPLES), DRAWN.integers(0, 5, SAMPLES)], 1
)


@pytest.mark.parametrize("select", [(), ("topic",)])
def test_each_head_has_its_own_transform_label_and_metrics(
    tmp_path: Path, select: tuple[str, ...]
) -> None:
    asked = [
        {"name": "accuracy", "output": "sentiment", "label": 0, "alias": "sentiment"},
        {"name": "accuracy", "output": "topic", "label": 1, "alias": "topic"},
        {"name": "accuracy", "output": "topic", "label": 1, "top_k": 2, "alias": "topic_top2"},
        {"name": "mae", "output": "stars", "label": 2},
    ]
    transform = {"topic": ["topk"]} | ({} if select else {"sentiment": "softmax"})
    output = {"transform": transform, "k": 1, "select": select}
    found = infer(tmp_path, HEADS, HEAD_LABELS, target="Heads", output=output, metrics=asked)
    order = np.argsort(-HEADS[:, 2:6], axis=1)
    assert values(found) == pytest.approx(
        {
            "sentiment": np.mean(HEADS[:, :2].argmax(1) == HEAD_LABELS[:, 0]),
            "topic": np.mean(order[:, 0] == HEAD_LABELS[:, 1]),
            "topic_top2": np.mean((order[:, :2] == HEAD_LABELS[:, 1:2]).any(1)),
            "mae": np.mean(abs(HEADS[:, 6] - HEAD_LABELS[:, 2])),
        },
        abs=1e-6,
    )
    if not select:
        exponents = np.exp(HEADS[:, :2])
        written = np.load(tmp_path / "out" / "predictions.sentiment.npy")
        assert np.allclose(written, exponents / exponents.sum(1, keepdims=True), atol=1e-6)


class NamedHeads(Heads):
    """Two heads, and names for the classes of one."""

    class_names = ("art", "law", "sport", "tech")


def test_class_names_are_those_of_the_heads_that_have_as_many_classes(tmp_path: Path) -> None:
    output = {"transform": {"topic": "argmax", "sentiment": "classify"}, "format": "jsonl"}
    result = infer(tmp_path, HEADS, HEAD_LABELS, target="NamedHeads", output=output)
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    topics = [NamedHeads.class_names[i] for i in HEADS[:, 2:6].argmax(1)]
    assert [row["topic.label"] for row in rows] == topics
    assert "sentiment.label" not in rows[0]
    assert [row["sentiment.class"] for row in rows] == HEADS[:, :2].argmax(1).tolist()
    texts = [warning.text for warning in result.warnings if warning.code == "class_names"]
    assert texts == [
        "output sentiment has 2 classes, and there are 4 class names; its classes are written as "
        "numbers"
    ]
    one = {"select": "topic", "transform": {"topic": "argmax"}, "format": "jsonl", "name": "topic"}
    infer(tmp_path, HEADS, HEAD_LABELS, target="NamedHeads", output=one)
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    assert [row["topic.label"] for row in rows] == topics


def test_a_metric_of_several_outputs_or_labels_asks_which(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of the outputs: sentiment, topic, stars"):
        infer(tmp_path, HEADS, HEAD_LABELS, target="Heads", metrics=["accuracy"])
    asked = [{"name": "accuracy", "output": "topic"}]
    with pytest.raises(ConfigError, match=r"labels with shape \[3\] per sample do not match"):
        infer(tmp_path, HEADS, HEAD_LABELS, target="Heads", metrics=asked)
    asked = [{"name": "accuracy", "output": "topic", "label": 3}]
    with pytest.raises(ConfigError, match="label is 3, but each sample has 3 labels"):
        infer(tmp_path, HEADS, HEAD_LABELS, target="Heads", metrics=asked)


# --- values and classes ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(SAMPLES,), (SAMPLES, 3)])
def test_metrics_of_values_equal_scikit_learn(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = DRAWN.normal(size=shape).astype(np.float32)
    y = (x + DRAWN.normal(size=shape)).astype(np.float32)
    found = infer(tmp_path, x, y, metrics=["mse", "mae", "r2"])
    assert values(found) == pytest.approx(
        {
            "mse": sk.mean_squared_error(y, x),
            "mae": sk.mean_absolute_error(y, x),
            "r2": sk.r2_score(y, x),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("centre", [1e5, 1.7e12])
def test_r2_of_labels_far_from_0_equals_scikit_learn(
    tmp_path: Path, centre: float, outlier: bool
) -> None:
    drawn = np.random.default_rng(8)
    y = np.stack([centre + drawn.normal(size=SAMPLES), drawn.normal(size=SAMPLES)], 1)
    x = y + 0.3 * drawn.normal(size=y.shape)
    if outlier:
        y[0] -= 1000
    asked = ["r2", {"name": "mse"}]
    found = values(infer(tmp_path, x, y, metrics=asked))
    right = {"r2": sk.r2_score(y, x), "mse": sk.mean_squared_error(y, x)}
    assert found == pytest.approx(right, rel=1e-5)


def test_r2_combines_chunks_of_any_size_and_constant_labels() -> None:
    drawn = np.random.default_rng(9)
    y = np.stack([1e9 + drawn.normal(size=99), np.full(99, 0.1), np.full(99, 6.1)], 1)
    x = y + 0.3 * drawn.normal(size=y.shape)
    x[:, 2] = 6.1
    metric = R2()
    for part in np.split(np.arange(99), [1, 2, 40]):
        metric.update(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    assert float(metric.compute()) == pytest.approx((sk.r2_score(y[:, 0], x[:, 0]) + 0 + 1) / 3)


CLASSES = DRAWN.integers(0, 4, SAMPLES)
SCORES = (DRAWN.normal(size=(SAMPLES, 5)) + 1.5 * np.eye(5)[CLASSES]).astype(np.float32)


class Named(torch.nn.Module):
    """Returns its input as scores of named classes."""

    class_names = ("ant", "bee", "cat", "dog", "eel")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_values_per_class_and_the_confusion_matrix_name_the_classes(tmp_path: Path) -> None:
    scores = SCORES.copy()
    scores[:, 4] = -9  # in neither predictions nor labels
    asked = [
        *({"name": name, "per_class": True} for name in ("precision", "recall", "f1")),
        "confusion_matrix",
    ]
    result = infer(tmp_path, scores, CLASSES, target="Named", metrics=asked)
    said = scores.argmax(1)
    right = sk.precision_recall_fscore_support(CLASSES, said, labels=range(4))
    for metric, expected in zip(result.metrics[:3], right[:3], strict=True):
        assert [value.name for value in metric.per_class] == [*Named.class_names]
        assert [v.value for v in metric.per_class[:4]] == pytest.approx(expected, abs=1e-6)
        assert np.isnan(metric.per_class[4].value)
        assert metric.value == pytest.approx(np.mean(expected), abs=1e-6)
        assert metric.note == "macro over 4 of 5 classes"
    matrix = result.metrics[3].matrix
    assert matrix is not None
    assert matrix.classes == Named.class_names
    expected = sk.confusion_matrix(CLASSES, said, labels=range(5))
    assert np.array_equal(matrix.counts, expected)


def test_the_note_of_an_average_counts_the_classes_that_occur(tmp_path: Path) -> None:
    truth = np.array([0, 0, 1, 1, 0, 1])
    scores = np.eye(4, dtype=np.float32)[[0, 1, 1, 1, 3, 1]]  # class 2 occurs nowhere
    asked = [{"name": "iou"}, {"name": "dice"}, {"name": "f1", "average": "weighted"}, "auroc"]
    iou, dice, weighted, auroc = infer(tmp_path, scores, truth, metrics=asked).metrics
    # TP, FP, FN: 1, 0, 2 of class 0; 3, 1, 0 of class 1; 0, 1, 0 of class 3.
    assert iou.value == pytest.approx(np.mean([1 / 3, 3 / 4, 0]), abs=1e-6)
    assert dice.value == pytest.approx(np.mean([2 / 4, 6 / 7, 0]), abs=1e-6)
    assert weighted.value == pytest.approx(np.mean([2 / 4, 6 / 7]), abs=1e-6)
    assert (iou.note, dice.note) == ("macro over 3 of 4 classes",) * 2
    assert weighted.note == "weighted over 2 of 4 classes"
    assert auroc.note.startswith("macro over 2 of 4 classes")


def softmax(scores: np.ndarray) -> np.ndarray:
    exponents = np.exp(scores.astype(np.float64))
    return exponents / exponents.sum(1, keepdims=True)


def test_scores_are_probabilities_only_if_those_of_every_sample_are(tmp_path: Path) -> None:
    likely = softmax(SCORES[:, :4]).astype(np.float32)
    mixed = np.concatenate([likely[:200], SCORES[200:, :4]])
    for x, expected, note in (
        (SCORES[:, :4], likely, "of softmax"),
        (likely, likely, "of probabilities"),
        (mixed, softmax(mixed), "of softmax"),
    ):
        found = only(infer(tmp_path, x, CLASSES, metrics=["auroc"]))
        columns = [sk.roc_auc_score(c == CLASSES, expected[:, c]) for c in range(4)]
        assert found.value == pytest.approx(np.mean(columns), abs=1e-6)
        assert found.note == f"macro over 4 classes, {note}"


def test_classes_without_a_label_do_not_count_in_the_auroc(tmp_path: Path) -> None:
    asked = [
        {"name": "auroc", "per_class": True},
        {"name": "auroc", "average": "weighted", "alias": "weighted"},
    ]
    result = infer(tmp_path, SCORES, CLASSES, metrics=asked)
    likely = softmax(SCORES)
    columns = [sk.roc_auc_score(c == CLASSES, likely[:, c]) for c in range(4)]
    weights = np.bincount(CLASSES)
    assert values(result) == pytest.approx(
        {"auroc": np.mean(columns), "weighted": np.average(columns, weights=weights)}, abs=1e-6
    )
    per_class = [value.value for value in result.metrics[0].per_class]
    assert per_class[:4] == pytest.approx(columns, abs=1e-6)
    assert np.isnan(per_class[4])


def test_a_label_without_a_positive_sample_is_not_counted_in_the_auroc(tmp_path: Path) -> None:
    y = DRAWN.integers(0, 2, (SAMPLES, 3))
    y[:, 2] = 0
    metric = only(infer(tmp_path, SCORES[:, :3], y, metrics=["auroc"]))
    columns = [sk.roc_auc_score(y[:, c], SCORES[:, c]) for c in range(2)]
    assert metric.value == pytest.approx(np.mean(columns), abs=1e-6)
    assert metric.note == "macro over 2 of 3 labels"


# --- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "columns"), [("accuracy", 5), ("mae", 1), ("r2", 1)])
def test_a_nan_or_infinite_label_is_an_error_that_names_its_row(
    tmp_path: Path, name: str, columns: int, unknown: float
) -> None:
    y = CLASSES.astype(np.float64)
    y[[123, 200]] = unknown
    with pytest.raises(ConfigError, match=rf"data\.labels.*row 123, .* is {unknown:g};"):
        infer(tmp_path, SCORES[:, :columns].squeeze(), y, metrics=[name])
    assert not (tmp_path / "out").exists()


def test_labels_from_1_to_the_number_of_classes_are_reported_to_start_at_1(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"range from 1 to 4; .* start at 1: subtract 1, or"):
        infer(tmp_path, SCORES[:, :4], CLASSES + 1, metrics=["accuracy"])
    with pytest.raises(ConfigError, match=r"range from 0 to 4; .* set ignore: 4"):
        infer(tmp_path, SCORES[:, :4], np.where(CLASSES == 3, 4, CLASSES), metrics=["accuracy"])


def test_labels_without_class_0_are_a_warning(tmp_path: Path) -> None:
    def warned(y: np.ndarray, **metric: Any) -> list[str]:
        asked = [{"name": "accuracy", **metric}]
        result = infer(tmp_path, SCORES, y, metrics=asked, target="Named")
        return [w.text for w in result.warnings if w.code == "labels_from_1"]

    (text,) = warned(CLASSES + 1 - (CLASSES == 3))
    assert "range from 1 to 3, and none is class 0 of 0 to 4; if they start at 1" in text
    assert warned(CLASSES) == []
    assert warned(CLASSES, ignore=0) == []


# --- one run, several forms --------------------------------------------------------------------

SEVERAL = ["accuracy", {"name": "accuracy", "top_k": 2}, "auroc", "confusion_matrix"]


# The scores are read from predictions in one table, and saved beside those in other files.
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "files"])
def test_metrics_of_several_forms_come_from_one_run_that_was_resumed(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "output": {"transform": "argmax", "format": form},
        "metrics": SEVERAL,
        "data.batch_size": 8,
    }
    whole = infer(tmp_path, SCORES, CLASSES, **changes)
    likely, order = softmax(SCORES), np.argsort(-SCORES, axis=1)
    columns = [sk.roc_auc_score(c == CLASSES, likely[:, c]) for c in range(4)]
    assert values(whole)["auroc"] == pytest.approx(np.mean(columns), abs=1e-6)
    assert values(whole)["accuracy"] == pytest.approx(np.mean(order[:, 0] == CLASSES))
    top = np.mean((order[:, :2] == CLASSES[:, None]).any(1))
    assert values(whole)["accuracy_top2"] == pytest.approx(top)
    assert gradrun.verify(tmp_path / "out").complete
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("_metrics*")}
    assert sorted(files) == ["_metrics.prediction.scores.npy", "_metrics.prediction.top.2.npy"]

    def stop(progress: Progress) -> None:
        if progress.done > 100:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("gradrun.inference.timed_loop._CALLBACK_NS", 0)
        with pytest.raises(Interrupted):
            infer(tmp_path, SCORES, CLASSES, progress=stop, **changes)
    result = infer(tmp_path, SCORES, CLASSES, resume=True, **changes)
    assert result.metrics == whole.metrics
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("_metrics*")} == files


def test_a_finished_run_computes_other_metrics_if_it_saved_what_they_need(tmp_path: Path) -> None:
    output = {"transform": "argmax"}
    infer(tmp_path, SCORES, CLASSES, output=output, metrics=["auroc"])
    found = infer(tmp_path, SCORES, CLASSES, output=output, metrics=["auroc", "f1"], resume=True)
    assert list(values(found)) == ["auroc", "f1"]
    with pytest.raises(ConfigError, match=r"metrics\.0.*needs the best classes .* did not save"):
        infer(
            tmp_path,
            SCORES,
            CLASSES,
            output=output,
            resume=True,
            metrics=[{"name": "accuracy", "top_k": 2}],
        )


def test_a_resume_with_a_metric_that_earlier_samples_lack_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done > 0:
            raise KeyboardInterrupt

    monkeypatch.setattr("gradrun.inference.timed_loop._CALLBACK_NS", 0)
    changes: dict[str, Any] = {"output": {"transform": "argmax"}, "data.batch_size": 8}
    with pytest.raises(Interrupted):
        infer(tmp_path, SCORES, CLASSES, progress=stop, **changes)
    with pytest.raises(ConfigError, match="auroc needs the scores of output 'prediction'"):
        infer(tmp_path, SCORES, CLASSES, resume=True, metrics=["auroc"], **changes)
    found = infer(tmp_path, SCORES, CLASSES, resume=True, metrics=["accuracy"], **changes)
    right = np.mean(SCORES.argmax(1) == CLASSES)
    assert values(found) == {"accuracy": pytest.approx(right)}


def test_evidence_does_not_change_which_samples_are_quarantined(tmp_path: Path) -> None:
    scores = SCORES.copy()
    scores[3, 0] = -np.inf  # excludes a class, so that argmax is finite
    scores[7, CLASSES[7]] = np.nan
    changes: dict[str, Any] = {
        "output": {"transform": "argmax"},
        "run": {"on_nonfinite": "quarantine", "warmup": 0},
    }
    plain = infer(tmp_path, scores, CLASSES, **changes)
    found = infer(tmp_path, scores, CLASSES, metrics=["auroc", "accuracy"], **changes)
    assert plain.quarantined == found.quarantined == 1
    kept = np.arange(SAMPLES) != 7
    accuracy = {metric.name: metric for metric in found.metrics}["accuracy"]
    assert accuracy.samples == SAMPLES - 1
    right = np.mean(scores[kept].argmax(1) == CLASSES[kept])
    assert accuracy.value == pytest.approx(right, abs=1e-6)


def test_class_numbers_without_scores_cannot_be_ranked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auroc needs scores, but the output contains class num"):
        infer(tmp_path, CLASSES, CLASSES, metrics=["auroc"])


@pytest.mark.parametrize(
    ("x", "y", "transform", "metric", "problem"),
    [
        (LOGITS, TRUTH, "sigmoid", {"name": "exact_match"},
         "exact_match needs several labels per sample; use accuracy"),
        (LOGITS, TRUTH, "sigmoid", {"name": "f1", "per_class": True},
         "f1: per_class needs several classes; one score has a single class 1"),
        (LABEL_LOGITS, LABELS, "sigmoid", {"name": "confusion_matrix"},
         "confusion_matrix needs classes that exclude each other, and the labels may coincide"),
        (SCORES, CLASSES, "softmax", {"name": "accuracy", "threshold": 0.5},
         "accuracy: threshold needs one score per sample or several labels; there are scores of "
         "exclusive classes"),
        (CLASSES, CLASSES, "none", {"name": "accuracy", "threshold": 0.5}, "there are no scores"),
        (SCORES, CLASSES, "softmax", {"name": "auroc", "average": "micro"},
         "auroc: average: macro and weighted are defined for exclusive classes, not micro"),
        (SCORES, CLASSES, "none", {"name": "accuracy", "top_k": 6},
         "accuracy_top6: top_k is 6, but the output has scores of 5 classes"),
    ],
)  # fmt: skip
def test_a_metric_that_the_output_does_not_fit_is_an_error_before_the_run(
    tmp_path: Path, x: np.ndarray, y: np.ndarray, transform: str, metric: Any, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        infer(tmp_path, x, y, output={"transform": transform}, metrics=[metric])
    assert problem in str(caught.value)
    assert not (tmp_path / "out" / "predictions.npy").exists()
