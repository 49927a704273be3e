"""Tests of the source `huggingface`: outputs, labels, damaged folders and trust."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import gradrun
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_transformers
from tests.conftest import Command
from tests.support.small_models import (
    CLASSES,
    WIDTH,
    bert,
    named_classes,
    save_bert,
    sentences,
    skewed,
)
from tests.support.workers import in_process_workers

TEXT = {"source": "text", "batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved BERT, its tokenizer, and a file of 40 sentences."""
    base = tmp_path_factory.mktemp("models")
    save_bert(base / "bert")
    (base / "t.txt").write_text("\n".join(sentences(40)) + "\n")
    return base


def config(folder: Path, out: Path, **model: Any) -> dict[str, Any]:
    return {
        "model": {"source": "huggingface", "path": str(folder / "bert"), **model},
        "data": {**TEXT, "path": str(folder / "t.txt")},
        "output": {"path": str(out), "select": "last_hidden_state", "transform": "mean_pool"},
        "run": {"warmup": 1},
    }


def infer_error(config: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        gradrun.infer(config, **settings)
    return str(caught.value)


HEADS: list[tuple[str, str, dict[str, Any], tuple[int, ...]]] = [
    ("AutoModelForSequenceClassification", "BertForSequenceClassification", named_classes(), (3,)),
    ("AutoModelForMaskedLM", "BertForMaskedLM", {}, (64, 250)),
    ("AutoModelForTokenClassification", "BertForTokenClassification", named_classes(), (64, 3)),
    ("AutoModelForCausalLM", "BertLMHeadModel", {"is_decoder": True}, (64, 250)),
]


@pytest.mark.parametrize(("auto_class", "kind", "settings", "shape"), HEADS)
def test_each_auto_class_gives_its_logits(
    folder: Path,
    tmp_path: Path,
    auto_class: str,
    kind: str,
    settings: dict[str, Any],
    shape: tuple[int, ...],
) -> None:
    model = save_bert(tmp_path / "bert", kind, **settings)
    asked = config(folder, tmp_path / "out", path=str(tmp_path / "bert"), auto_class=auto_class)
    asked["output"] = {"path": str(tmp_path / "out"), "select": "logits"}
    asked["data"] |= {"padding": "max_length", "max_length": 64}
    gradrun.infer(asked)
    found = np.load(tmp_path / "out/predictions.npy")
    assert found.shape == (40, *shape)
    tokenizer = import_transformers("").AutoTokenizer.from_pretrained(tmp_path / "bert")
    given = tokenizer(sentences(40), padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**given).logits
    real = given["attention_mask"].bool() if len(shape) > 1 else torch.ones(40, dtype=torch.bool)
    # Texts of causal models end at the right edge, whatever the padding.
    places = real.flip(1) if auto_class == "AutoModelForCausalLM" else real
    assert torch.allclose(torch.from_numpy(found)[places], expected[real], atol=1e-5)


def test_an_image_classifier_accepts_arrays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = import_transformers("").ViTForImageClassification(
        import_transformers("").ViTConfig(
            **small, intermediate_size=32, image_size=16, patch_size=8
        )
    )
    vit.eval().save_pretrained(tmp_path / "vit")
    images = np.random.default_rng(0).standard_normal((6, 3, 16, 16), dtype=np.float32)
    np.save(tmp_path / "images.npy", images)
    gradrun.infer(
        {
            "model": {
                "source": "huggingface",
                "path": str(tmp_path / "vit"),
                "auto_class": "AutoModelForImageClassification",
            },
            "data": {"source": "arrays", "path": str(tmp_path / "images.npy"), "batch_size": 6},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    with torch.inference_mode():
        expected = vit(torch.from_numpy(images)).logits
    found = torch.from_numpy(np.load(tmp_path / "out/predictions.npy"))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("grouped", [True, False])
def test_embeddings_equal_those_of_a_plain_loop(
    folder: Path, tmp_path: Path, grouped: bool
) -> None:
    texts = sentences(200)
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n")
    asked = config(folder, tmp_path / "out")
    asked["data"] |= {"path": str(tmp_path / "t.txt"), "group_by_length": grouped}
    gradrun.infer(asked)
    tokenizer = import_transformers("").AutoTokenizer.from_pretrained(folder / "bert")
    expected = []
    for begin in range(0, 200, 8):
        given = tokenizer(
            texts[begin : begin + 8], padding=True, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            states = bert()(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(-1)
        expected.append((states * mask).sum(1) / mask.sum(1))
    found = torch.from_numpy(np.load(tmp_path / "out/predictions.npy"))
    assert len(found) == 200
    assert (found - torch.cat(expected)).abs().max() <= 1e-6


def test_dtype_and_attention_are_applied(folder: Path) -> None:
    from gradrun.config.load import load_config
    from gradrun.models import load_model

    asked = config(folder, Path("/tmp/out"), dtype="bfloat16", attention="eager")
    model: Any = load_model(load_config(asked).config.model, torch.device("cpu")).module
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_a_folder_is_relative_to_the_config(folder: Path, cli: Command) -> None:
    (folder / "c.yaml").write_text(
        "model: {source: huggingface, path: bert}\n"
        "data: {source: text, path: t.txt, batch_size: 8}\n"
        "output: {path: beside, select: pooler_output}\n"
    )
    assert cli("validate", folder / "c.yaml").code == 0
    assert cli("infer", folder / "c.yaml").code == 0
    assert np.load(folder / "beside/predictions.npy").shape == (40, WIDTH)


def test_a_missing_folder_is_an_error_before_the_run(folder: Path) -> None:
    message = infer_error(config(folder, folder / "none", path="./bret"))
    assert "is neither a folder relative to the config nor on the hub" in message


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_an_error(folder: Path) -> None:
    message = infer_error(config(folder, folder / "none", path="nobody/nothing"))
    assert "'nobody/nothing' is neither a folder relative to the config nor on the hub" in message


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_is_an_error(folder: Path, tmp_path: Path, broken: str) -> None:
    shutil.copytree(folder / "bert", tmp_path / "bert")
    (tmp_path / "bert" / broken).write_bytes(b"\x00\xff{")
    message = infer_error(config(folder, tmp_path / "out", path=str(tmp_path / "bert")))
    assert f"{tmp_path / 'bert'} cannot be loaded" in message
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_an_error(folder: Path, tmp_path: Path) -> None:
    asked = config(folder, tmp_path / "out", auto_class="AutoModelForSequenceClassification")
    asked["output"] = {"path": str(tmp_path / "out")}
    message = infer_error(asked)
    assert "has no weights for classifier.bias, classifier.weight" in message
    asked["model"]["random_weights"] = True
    gradrun.infer(asked)
    assert np.load(tmp_path / "out/predictions.npy").shape == (40, 2)


# --- labels ------------------------------------------------------------------------------------


def classified(folder: Path, tmp_path: Path, **output: Any) -> list[dict[str, Any]]:
    """Classify the 40 sentences; return the rows of the output file."""
    settings = named_classes() if output.pop("named", True) else {"num_labels": 3}
    save_bert(tmp_path / "bert", "BertForSequenceClassification", **settings)
    asked = config(
        folder,
        tmp_path / "out",
        path=str(tmp_path / "bert"),
        auto_class="AutoModelForSequenceClassification",
    )
    gradrun.infer(asked | {"output": {"path": str(tmp_path / "out"), **output}}, overwrite=True)
    if output["format"] == "csv":
        with (tmp_path / "out/predictions.csv").open(newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_class_labels_come_from_the_model(folder: Path, tmp_path: Path, form: str) -> None:
    rows = classified(folder, tmp_path, format=form, transform="argmax")
    assert list(rows[0]) == ["id", "prediction", "label"]
    assert [row["label"] for row in rows] == [CLASSES[int(row["prediction"])] for row in rows]
    logits = classified(folder, tmp_path, format="jsonl")
    assert list(logits[0]) == ["id", "prediction"]
    best = [int(np.argmax(row["prediction"])) for row in logits]
    assert [int(row["prediction"]) for row in rows] == best


def test_topk_classes_have_labels(folder: Path, tmp_path: Path) -> None:
    output = {"transform": ["softmax", "topk"], "k": 2}
    rows = classified(folder, tmp_path, format="jsonl", **output)
    for row in rows:
        assert row["labels"] == [CLASSES[number] for number in row["indices"]]
    table = classified(folder, tmp_path, format="csv", **output)
    assert list(table[0]) == [
        *("id", "values.0", "values.1", "indices.0", "indices.1", "labels.0", "labels.1")
    ]
    assert [row["labels.0"] for row in table] == [row["labels"][0] for row in rows]
    assert [float(row["values.0"]) for row in table] == [row["values"][0] for row in rows]


def test_parquet_rows_have_id_label_and_score_and_metrics_use_the_labels_of_the_file(
    folder: Path, tmp_path: Path, cli: Command
) -> None:
    save_bert(tmp_path / "bert", "BertForSequenceClassification", **named_classes())
    texts = skewed(40)  # so that they are run in another order
    truth = [CLASSES[number % 3] for number in range(40)]
    rows = [
        {"t": t, "is": name, "n": f"s{i}"}
        for i, (t, name) in enumerate(zip(texts, truth, strict=True))
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"field": "t", "id": "n", "labels": "is", "classes": CLASSES}
    asked = {
        "model": {
            "source": "huggingface",
            "path": str(tmp_path / "bert"),
            "auto_class": "AutoModelForSequenceClassification",
        },
        "data": {**TEXT, "path": str(tmp_path / "t.jsonl"), **columns, "group_by_length": True},
        "output": {"path": str(tmp_path / "out"), "format": "parquet", "transform": "classify"},
        "metrics": ["accuracy"],
    }
    result = gradrun.infer(asked)
    found = pandas.read_parquet(tmp_path / "out/predictions")
    assert [*found.columns] == ["id", "class", "score", "label"]
    assert found["id"].tolist() == [row["n"] for row in rows]
    assert found["label"].tolist() == [CLASSES[number] for number in found["class"]]
    assert found["score"].dtype == np.float32
    assert found["score"].between(1 / 3, 1).all()
    (metric,) = result.metrics
    assert metric.value == pytest.approx(np.mean(found["label"] == truth))
    assert cli("verify", tmp_path / "out").code == 0
    columns["labels"] = "t"
    asked["data"] |= columns
    assert "t.jsonl:1  the label" in infer_error(asked, overwrite=True)
    asked["data"] |= {"labels": "is", "classes": CLASSES[::-1]}
    assert "set data.classes: [good, bad, neither]" in infer_error(asked, overwrite=True)
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / "bert" / name).unlink(missing_ok=True)
    error = infer_error(asked, overwrite=True)
    # transformers 4 raises an error of its own.
    assert re.search(
        "contains no vocabulary; set data.tokenizer|data.tokenizer: .* cannot be", error
    )


def test_generic_class_names_of_a_model_are_not_written(folder: Path, tmp_path: Path) -> None:
    rows = classified(folder, tmp_path, format="jsonl", transform="argmax", named=False)
    assert list(rows[0]) == ["id", "prediction"]


# --- trust -------------------------------------------------------------------------------------

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import BertConfig, BertModel
class Config(BertConfig):
    model_type = "mine"
class Model(BertModel):
    config_class = Config
"""


@pytest.fixture
def with_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model with its own Python code, which creates a file when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    path = tmp_path / "coded"
    shutil.copytree(folder / "bert", path)
    (path / "mine.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    settings = json.loads((path / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    settings["auto_map"]["AutoModel"] = "mine.Model"
    (path / "config.json").write_text(json.dumps(settings))
    known = list(sys.path)
    yield path
    sys.path[:] = known


def test_code_in_a_folder_runs_only_with_trust(
    folder: Path, tmp_path: Path, with_code: Path
) -> None:
    asked = config(folder, tmp_path / "out", path=str(with_code))
    asked["data"]["tokenizer"] = str(folder / "bert")
    assert "trust_code=True" in infer_error(asked)
    assert not (tmp_path / "mark").exists()
    gradrun.infer(asked, trust_code=True)
    assert (tmp_path / "mark").exists()


def test_pickled_weights_are_read_only_with_trust(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bert"
    shutil.copytree(folder / "bert", path)
    (path / "model.safetensors").unlink()
    torch.save(bert().state_dict(), path / "pytorch_model.bin")
    asked = config(folder, tmp_path / "out", path=str(path))
    message = infer_error(asked)
    assert "has no .safetensors weights" in message
    assert "trust_code=True" in message
    gradrun.infer(asked, trust_code=True)


@pytest.mark.parametrize("part", [(), ("text_config",)])
def test_a_kernel_from_the_hub_needs_trust(
    folder: Path, tmp_path: Path, part: tuple[str, ...]
) -> None:
    path = tmp_path / "bert"
    shutil.copytree(folder / "bert", path)
    settings = json.loads((path / "config.json").read_text())
    named = {"attn_implementation": "somebody/kernel"}
    settings |= {part[0]: named} if part else named
    (path / "config.json").write_text(json.dumps(settings))
    asked = config(folder, tmp_path / "out", path=str(path))
    assert "the kernel 'somebody/kernel' from the hub" in infer_error(asked)
    asked["model"]["attention"] = "sdpa"
    gradrun.infer(asked)


# --- the commands ------------------------------------------------------------------------------


def test_compare_and_audit_run_on_a_huggingface_model(
    folder: Path, tmp_path: Path, cli: Command
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config(folder, tmp_path / "out")))
    quick = ["--set", "measure.budget=1", "--set", "measure.processes=2"]
    with in_process_workers():
        compared = cli("compare", path, "--modes", "grad,inference_mode", *quick)
    assert compared.code == 0, compared.text
    assert "bert" in compared.out
    audited = cli("audit", path, "--no-compile")
    assert audited.code == 0, audited.text
    assert "safe" in audited.out


def test_the_error_for_a_missing_library_names_the_extra(
    folder: Path, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config(folder, tmp_path / "out")))
    monkeypatch.setitem(sys.modules, "transformers", None)
    answer = cli("infer", path)
    assert answer.code == 2
    assert "model.path: this needs transformers; pip install 'gradrun[hf]'" in answer.err
    assert "Traceback" not in answer.err


def test_messages_of_transformers_are_not_printed(
    folder: Path, tmp_path: Path, process: Command
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config(folder, tmp_path / "out")))
    answer = process("infer", path, "--json", "-", "--quiet")
    assert answer.code == 0
    assert json.loads(answer.out)["predictions"] == 40
    assert answer.err == ""


def test_changed_weights_in_the_folder_change_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    from gradrun.config.load import load_config
    from gradrun.output.fingerprint import differences, fingerprint

    shutil.copytree(folder / "bert", tmp_path / "bert")
    loaded = load_config(config(folder, tmp_path / "out", path=str(tmp_path / "bert"))).config
    before = fingerprint(loaded, 40, "0")
    weights = tmp_path / "bert/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    found = differences(before, fingerprint(loaded, 40, "0"))
    assert len(found) == 1
    assert "model.safetensors changed" in found[0]
