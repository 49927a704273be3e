"""Metrics equal those of scikit-learn, for every output format."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score, top_k_accuracy_score

import gradrun
from gradrun.core.errors import ConfigError, Interrupted
from gradrun.core.progress import Progress
from gradrun.output.formats import FORMATS
from gradrun.results.result import RunResult
from tests.conftest import Command

SAMPLES, CLASSES = 500, 7
DRAWN = np.random.default_rng(3)
LABELS = DRAWN.integers(0, CLASSES, SAMPLES)
SCORES = (DRAWN.normal(size=(SAMPLES, CLASSES)) + 1.5 * np.eye(CLASSES)[LABELS]).astype(np.float32)
PROBABLE = np.exp(SCORES) / np.exp(SCORES).sum(1, keepdims=True)
CHOSEN = SCORES.argmax(1)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    np.savez(tmp_path / "data.npz", x=SCORES, y=LABELS.astype(np.uint8))
    return {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {
            "source": "arrays",
            "path": str(tmp_path / "data.npz"),
            "inputs": {"x": {"key": "x"}},
            "labels": {"key": "y"},
            "batch_size": 64,
        },
        "measure": {"memory": False},
        "run": {"warmup": 0, "threads": 1},
        "output": {"path": str(tmp_path / "out")},
        "metrics": ["accuracy"],
    }


def values(result: RunResult) -> dict[str, float]:
    assert {metric.samples for metric in result.metrics} == {SAMPLES}
    return {metric.name: metric.value for metric in result.metrics}


ALL = [
    "accuracy",
    {"name": "accuracy", "top_k": 3},
    {"name": "accuracy", "average": "macro", "alias": "balanced"},
    "f1",
    {"name": "f1", "average": "weighted", "alias": "f1_weighted"},
    "auroc",
]


READ_BACK = [form for form in FORMATS if form != "files"]
"""The metrics of `files` come from other files, in the same way for every transform."""


@pytest.mark.parametrize(
    ("form", "transform"), [*product(READ_BACK, ["none", "softmax"]), ("files", "none")]
)
def test_metrics_of_scores_equal_scikit_learn(
    config: dict[str, Any], form: str, transform: str
) -> None:
    output = {"format": form, "transform": transform}
    found = values(gradrun.infer(config, output=output, metrics=ALL))
    right = {
        "accuracy": accuracy_score(LABELS, CHOSEN),
        "accuracy_top3": top_k_accuracy_score(LABELS, SCORES, k=3),
        "balanced": np.mean([(c == CHOSEN)[c == LABELS].mean() for c in range(CLASSES)]),
        "f1": f1_score(LABELS, CHOSEN, average="macro"),
        "f1_weighted": f1_score(LABELS, CHOSEN, average="weighted"),
        "auroc": roc_auc_score(LABELS, PROBABLE, multi_class="ovr", average="macro"),
    }
    assert found == pytest.approx(right, abs=1e-6)
    saved = RunResult.load(config["output"]["path"])
    assert {metric.name: metric.value for metric in saved.metrics} == found


@pytest.mark.parametrize(
    ("transform", "scale"), [("softmax", 60), (["softmax", "topk"], 60), ("softmax", 1e-9)]
)
def test_scores_rank_classes_whose_probabilities_a_softmax_rounds_to_equal_numbers(
    config: dict[str, Any], tmp_path: Path, transform: str | list[str], scale: float
) -> None:
    scores = (SCORES * np.float32(scale)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=scores, y=LABELS)
    asked = ["accuracy", {"name": "accuracy", "top_k": 3}, "auroc"]
    found = values(gradrun.infer(config, output={"transform": transform, "k": 3}, metrics=asked))
    exponents = np.exp(scores - scores.max(1, keepdims=True), dtype=np.float64)
    probable = exponents / exponents.sum(1, keepdims=True)
    right = {
        "accuracy": accuracy_score(LABELS, scores.argmax(1)),
        "accuracy_top3": top_k_accuracy_score(LABELS, scores, k=3),
        "auroc": roc_auc_score(LABELS, probable, multi_class="ovr", average="macro"),
    }
    assert found == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("form", READ_BACK)
def test_metrics_of_the_most_likely_class(config: dict[str, Any], form: str) -> None:
    output = {"transform": "argmax", "format": form}
    found = values(gradrun.infer(config, output=output, metrics=["accuracy", "f1"]))
    right = {
        "accuracy": accuracy_score(LABELS, CHOSEN),
        "f1": f1_score(LABELS, CHOSEN, average="macro"),
    }
    assert found == pytest.approx(right, abs=1e-6)


def test_metrics_of_the_most_likely_classes(config: dict[str, Any]) -> None:
    asked = ["accuracy", {"name": "accuracy", "top_k": 3}]
    found = values(gradrun.infer(config, output={"transform": "topk", "k": 4}, metrics=asked))
    right = {
        "accuracy": accuracy_score(LABELS, CHOSEN),
        "accuracy_top3": top_k_accuracy_score(LABELS, SCORES, k=3),
    }
    assert found == pytest.approx(right, abs=1e-6)


class Scores(torch.nn.Module):
    """Returns its input as scores of classes, one of them with an empty name."""

    class_names = ("", "1", "2", "3+", "d", "e", "f")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


TRANSFORMS = ("none", "softmax", "argmax", "classify", "topk")


@pytest.mark.parametrize("form", READ_BACK)
def test_samples_with_nonfinite_scores_count_as_wrong_for_every_transform(
    config: dict[str, Any], tmp_path: Path, form: str
) -> None:
    scores = SCORES.copy()
    lost = np.arange(0, SAMPLES, 10)
    scores[lost, LABELS[lost]] = np.where(lost % 20, np.nan, np.inf)  # else correct
    np.savez(tmp_path / "data.npz", x=scores, y=LABELS)
    right = CHOSEN == LABELS
    right[lost] = False
    config["model"] = {"source": "python", "target": f"{__file__}:Scores"}
    for transform in TRANSFORMS:
        output = {"format": form, "transform": transform, "k": 1}
        found = gradrun.infer(config, output=output, overwrite=True, trust_code=True)
        assert values(found) == {"accuracy": pytest.approx(right.mean())}, transform


def test_a_single_class_has_a_metric(config: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=[[1.0, 0.0], [np.nan, 0.0]], y=[0, 0])
    result = gradrun.infer(config, output={"transform": "argmax"})
    assert [metric.value for metric in result.metrics] == [0.5]


def test_one_score_for_two_classes(config: dict[str, Any], tmp_path: Path) -> None:
    # A float32 sigmoid of these scores would be 1 for many, and lose their order.
    scores, truth = 100 * SCORES[:, 0] + 50, (LABELS == 0).astype(np.int64)
    np.savez(tmp_path / "data.npz", x=scores, y=truth)
    asked = [
        {"name": "accuracy", "threshold": 50},
        {"name": "f1", "threshold": 50},
        "auroc",
        {"name": "auroc", "thresholds": 500, "alias": "auroc_binned"},
    ]
    found = values(gradrun.infer(config, metrics=asked))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, scores > 50), abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(truth, scores > 50), abs=1e-6)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-6)
    assert found["auroc_binned"] == pytest.approx(roc_auc_score(truth, scores), abs=2 / 500)


NESTED = """
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        return {returned}
"""


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("returned", "output"),
    [
        ('{"h": (x, -x)}', "h.0"),
        ('{"h": (-x, x)}', "h.1"),
        ('{"h": (x[:, :3], x, x[:, 0].round().int())}', "h.1"),
        ('{"h": {"a": (x.round().int(), x)}}', "h.a.1"),
        ('{"a.1": -x, "b": x}', "b"),
    ],
)
def test_metrics_of_nested_outputs_do_not_depend_on_the_format(
    config: dict[str, Any], tmp_path: Path, returned: str, output: str, form: str
) -> None:
    (tmp_path / "net.py").write_text(NESTED.replace("{returned}", returned))
    config["model"] = {"source": "python", "target": f"{tmp_path}/net.py:Net"}
    config["output"]["format"] = form
    config["metrics"] = [{"name": "accuracy", "output": output}]
    result = gradrun.infer(config, trust_code=True)
    assert not [warning for warning in result.warnings if warning.code.startswith("no_")]
    assert values(result)["accuracy"] == pytest.approx((CHOSEN == LABELS).mean())


def test_csv_refuses_outputs_whose_columns_are_ambiguous(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(NESTED.replace("{returned}", '{"a": x, "a.7": -x[:, 0]}'))
    config["model"] = {"source": "python", "target": f"{tmp_path}/net.py:Net"}
    config["output"]["format"] = "csv"
    config["metrics"] = [{"name": "accuracy", "output": "a"}]
    with pytest.raises(ConfigError, match=r"of the outputs 'a', 'a\.7' are ambiguous; use"):
        gradrun.infer(config, trust_code=True)
    config["output"]["format"] = "jsonl"
    result = gradrun.infer(config, trust_code=True)
    assert [m.value for m in result.metrics] == [pytest.approx((CHOSEN == LABELS).mean())]


def test_the_squared_error_of_values(config: dict[str, Any], tmp_path: Path) -> None:
    truth = SCORES + DRAWN.normal(size=SCORES.shape).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=SCORES, y=truth)
    found = values(gradrun.infer(config, metrics=["mse"]))
    assert found["mse"] == pytest.approx(((truth - SCORES) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["uint16", "bool", "float32", "int8"])
def test_labels_may_have_any_numeric_dtype(
    config: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    truth = LABELS % 2 if kind == "bool" else LABELS
    np.savez(tmp_path / "data.npz", x=SCORES, y=truth.astype(kind)[:, None])
    found = values(gradrun.infer(config))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, CHOSEN), abs=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_quarantined_samples_are_excluded(
    config: dict[str, Any], tmp_path: Path, form: str
) -> None:
    spoiled = SCORES.copy()
    spoiled[::9] = np.nan
    np.savez(tmp_path / "data.npz", x=spoiled, y=LABELS)
    run = {"on_nonfinite": "quarantine", "warmup": 0}
    result = gradrun.infer(config, run=run, output={"format": form})
    good = np.arange(SAMPLES) % 9 != 0
    (metric,) = result.metrics
    assert metric.samples == good.sum()
    assert metric.value == pytest.approx(accuracy_score(LABELS[good], CHOSEN[good]), abs=1e-6)


CLASS_NUMBERS = """
import torch


class Net(torch.nn.Module):
    def forward(self, x):
        if (x[:, 0] == 5).any():
            raise ValueError("bad")
        return (x[:, 0] % 3).to(torch.uint8)
"""


def test_the_missing_value_of_a_quarantined_sample_is_not_a_class(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(CLASS_NUMBERS)
    numbers = np.arange(60)
    labels = numbers % 4 % 3
    np.savez(tmp_path / "data.npz", x=numbers.astype(np.float32)[:, None], y=labels)
    config["model"] = {"source": "python", "target": f"{tmp_path}/net.py:Net"}
    config["data"]["batch_size"] = 4
    config["run"]["on_error"] = "quarantine"
    config["metrics"] = ["confusion_matrix", {"name": "f1", "per_class": True}]
    matrix, f1 = gradrun.infer(config, trust_code=True).metrics
    good = numbers != 5
    assert np.load(tmp_path / "out" / "predictions.npy")[5] == 255, "the missing value of uint8"
    counted = np.zeros((3, 3), int)
    np.add.at(counted, (labels[good], numbers[good] % 3), 1)
    assert matrix.matrix is not None
    assert np.array_equal(matrix.matrix.counts, counted)
    right = f1_score(labels[good], numbers[good] % 3, average=None)
    assert [each.value for each in f1.per_class] == pytest.approx(right.tolist(), abs=1e-6)


ITEMS = """
import torch


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.eye(5)[i % 5], 1 + i % 3
"""


def test_labels_without_class_0_are_a_warning_wherever_they_are_read(
    config: dict[str, Any], tmp_path: Path
) -> None:
    def warned(result: RunResult) -> list[str]:
        return [w.text for w in result.warnings if w.code == "labels_from_1"]

    (tmp_path / "items.py").write_text(ITEMS)
    items = {"source": "python", "target": f"{tmp_path}/items.py:Items", "labels": 1}
    output = {"path": str(tmp_path / "items")}
    of_items = gradrun.infer(config | {"data": items, "output": output}, trust_code=True)
    assert len(warned(of_items)) == 1, "labels that are read with the inputs"
    np.savez(tmp_path / "data.npz", x=SCORES, y=1 + LABELS % 3)
    labels = config["data"].pop("labels")
    first = gradrun.infer(config | {"metrics": []})
    assert warned(first) == []
    config["data"]["labels"] = labels
    (text,) = warned(gradrun.infer(config, resume=True))
    assert "range from 1 to 3, and none is class 0 of 0 to 6" in text


def test_a_resumed_run_has_metrics_over_all_samples(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done > 0:
            raise KeyboardInterrupt

    monkeypatch.setattr("gradrun.inference.timed_loop._CALLBACK_NS", 0)
    with pytest.raises(Interrupted):
        gradrun.infer(config, progress=stop)
    result = gradrun.infer(config, resume=True)
    assert 0 < result.resumed_at < SAMPLES
    assert values(result) == {"accuracy": pytest.approx(accuracy_score(LABELS, CHOSEN))}


def test_a_resume_with_other_metrics_recomputes_them_without_running_the_model(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = config["data"].pop("labels")
    first = gradrun.infer(config | {"metrics": []})
    monkeypatch.setattr(
        "gradrun.inference.runner.Runner.run_timed_pass", lambda *_: pytest.fail("it ran again")
    )

    config["data"]["labels"] = labels
    scored = gradrun.infer(config, resume=True)
    assert values(scored) == {"accuracy": pytest.approx(accuracy_score(LABELS, CHOSEN))}
    assert scored.measurements == first.measurements
    assert RunResult.load(config["output"]["path"]) == scored
    assert gradrun.infer(config, resume=True) == scored

    both = gradrun.infer(config | {"metrics": ["accuracy", "f1"]}, resume=True)
    assert list(values(both)) == ["accuracy", "f1"]
    assert gradrun.infer(config | {"metrics": []}, resume=True).metrics == ()


def test_a_resume_retries_failed_metrics(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("torchmetrics.Metric.compute", lambda _: 1 / 0)
        broken.setattr("torchmetrics.classification.MulticlassAccuracy.compute", lambda _: 1 / 0)
        failed = gradrun.infer(config)
    assert "no_metrics" in {warning.code for warning in failed.warnings}
    scored = gradrun.infer(config, resume=True)
    assert values(scored) == {"accuracy": pytest.approx(accuracy_score(LABELS, CHOSEN))}
    assert "no_metrics" not in {warning.code for warning in scored.warnings}


def test_labels_of_records_may_be_class_names(config: dict[str, Any], tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
    rows = [
        {"x": row.tolist(), "y": names[label]} for row, label in zip(SCORES, LABELS, strict=True)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config["data"] = {
        "source": "records",
        "path": str(tmp_path / "data.jsonl"),
        "inputs": {"x": {"columns": ["x"]}},
        "labels": "y",
        "classes": names,
    }
    assert values(gradrun.infer(config)) == {
        "accuracy": pytest.approx(accuracy_score(LABELS, CHOSEN))
    }
    with pytest.raises(ConfigError, match=r"data\.jsonl:\d+  the label '\w+' is not one of"):
        gradrun.infer(config, overwrite=True, **{"data.classes": names[:-1]})


WRONG = {
    "no labels": ({"data.labels": None}, "data.labels is not set"),
    "too few classes": (
        {"metrics": [{"name": "accuracy", "top_k": 8}]},
        "top_k is 8, but the output has scores of 7 classes",
    ),
    "an argument of another": (
        {"metrics": [{"name": "mse", "top_k": 3}]},
        r"metrics\.0: mse does not take top_k; allowed: no arguments",
    ),
    "an unknown argument": (
        {"metrics": [{"name": "accuracy", "topk": 3}]},
        r"metrics\.0\.topk: unknown key; did you mean top_k\?",
    ),
    "an unknown metric": ({"metrics": ["acuracy"]}, r"did you mean accuracy\?"),
    "one name for two": ({"metrics": ["f1", "f1"]}, "two metrics have the name f1"),
    "another output": (
        {"metrics": [{"name": "f1", "output": "logits"}]},
        "set `output` to one of the outputs: prediction",
    ),
    "more classes than scores": ({"data.labels": {"key": "z"}}, "labels range from 0 to 9"),
    "fewer labels than samples": (
        {"data.labels": {"key": "short"}},
        f"3 labels for {SAMPLES} samples",
    ),
    "no such array": ({"data.labels": {"key": "labels"}}, "has no array 'labels'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_labels_or_outputs_that_do_not_match_are_an_error_before_the_run(
    config: dict[str, Any], tmp_path: Path, name: str
) -> None:
    changes, said = WRONG[name]
    many = np.arange(SAMPLES) % 10
    np.savez(tmp_path / "data.npz", x=SCORES, y=LABELS, z=many, short=many[:3])
    with pytest.raises(ConfigError, match=said):
        gradrun.infer(config, **changes)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_table_shows_the_metrics(config: dict[str, Any], tmp_path: Path, cli: Command) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    answer = cli("infer", tmp_path / "c.yaml")
    assert answer.code == 0
    assert f"{accuracy_score(LABELS, CHOSEN):.4f}" in answer.out
    assert f"over {SAMPLES} samples" in answer.out
