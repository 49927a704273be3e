"""Embeddings of sentence-transformers folders, compared with the library itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradrun
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_transformers
from gradrun.results.result import InferResult
from tests.support.small_models import WIDTH, save_bert, save_tokenizer, sentences

library = pytest.importorskip("sentence_transformers")

LONG = ["the model of data " * 75, "Time " * 300, "a mode " * 330]
TEXTS = [*sentences(12), *LONG, "", "x"]
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
Modules = Callable[[Path], list[Any]]


def parts() -> Any:
    from sentence_transformers.sentence_transformer import modules

    return modules


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with positions for 600 tokens, and a file of texts, some over 256 and 512 tokens."""
    folder = tmp_path_factory.mktemp("sentences")
    save_bert(folder / "bert", max_position_embeddings=600)
    save_tokenizer(folder / "bert", model_max_length=600)
    (folder / "t.txt").write_text("\n".join(TEXTS) + "\n")
    return folder


def infer(
    base: Path, out: Path, model: dict[str, Any], data: Any = None, output: Any = None
) -> tuple[np.ndarray, InferResult]:
    result = gradrun.infer(
        {
            "model": {"source": "huggingface", **model},
            "data": {
                "source": "text",
                "path": str(base / "t.txt"),
                "batch_size": 4,
                **(data or {}),
            },
            "output": {"path": str(out), **(output or {})},
            "run": {"warmup": 0},
            "measure": {"memory": False},
        }
    )
    return np.load(out / "predictions.npy"), result


def stated(result: InferResult) -> str:
    return "\n".join(f"{line.topic}: {line.text}" for line in result.interpretation)


def encode(folder: Path, **options: Any) -> np.ndarray:
    found: np.ndarray = library.SentenceTransformer(str(folder)).encode(TEXTS, **options)
    return found


def dense(size: int) -> Any:
    torch.manual_seed(2)
    return parts().Dense(size, 24)


def residual(size: int) -> Any:
    torch.manual_seed(3)
    return parts().Dense(WIDTH, size, activation_function=torch.nn.Identity(), use_residual=True)


def layer_norm() -> Any:
    norm = parts().LayerNorm(WIDTH)
    torch.nn.init.normal_(norm.norm.weight)
    return norm


FOLDERS: dict[str, tuple[int, Modules]] = {
    "mean, 256 tokens": (256, lambda _: [parts().Pooling(WIDTH, "mean"), parts().Normalize()]),
    "cls, 600 tokens": (600, lambda _: [parts().Pooling(WIDTH, "cls")]),
    "last token": (600, lambda _: [parts().Pooling(WIDTH, "lasttoken"), parts().Normalize()]),
    "every mode, Dense": (
        512,
        lambda _: [parts().Pooling(WIDTH, MODES), dense(6 * WIDTH), parts().Normalize()],
    ),
    "Dropout, LayerNorm": (
        300,
        lambda _: [parts().Pooling(WIDTH, "weightedmean"), parts().Dropout(0.5), layer_norm()],
    ),
    "residuals": (64, lambda _: [parts().Pooling(WIDTH, "mean"), residual(WIDTH), residual(8)]),
}


@pytest.mark.parametrize(
    ("name", "side"),
    [*((name, "right") for name in FOLDERS), ("last token", "left"), ("every mode, Dense", "left")],
)
def test_the_embeddings_of_a_folder_equal_those_of_the_library(
    base: Path, tmp_path: Path, name: str, side: str
) -> None:
    limit, others = FOLDERS[name]
    transformer = parts().Transformer(str(base / "bert"), max_seq_length=limit)
    library.SentenceTransformer(modules=[transformer, *others(base)]).save(str(tmp_path / "st"))
    data = {"padding_side": side}
    found, result = infer(base, tmp_path / "out", {"path": str(tmp_path / "st")}, data)
    assert np.abs(found - encode(tmp_path / "st")).max() <= 1e-5
    lengths = [len(ids) for ids in transformer.tokenizer(TEXTS, truncation=False)["input_ids"]]
    cut = sum(length > limit for length in lengths)
    counts = f"{cut} of {len(TEXTS)} truncated to {limit} tokens (longest: {max(lengths)})"
    assert counts in stated(result)
    assert f"padding: {side}" in stated(result)


def test_a_llama_folder_padded_on_the_left_gives_the_embeddings_of_the_library(
    base: Path, tmp_path: Path
) -> None:
    transformers = import_transformers("")
    save_tokenizer(tmp_path / "llama", model_max_length=600, padding_side="left")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=250, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=600,
    )  # fmt: skip
    transformers.LlamaModel(config).eval().save_pretrained(tmp_path / "llama")
    transformer = parts().Transformer(str(tmp_path / "llama"))
    pooling = [parts().Pooling(WIDTH, "lasttoken"), parts().Normalize()]
    library.SentenceTransformer(modules=[transformer, *pooling]).save(str(tmp_path / "st"))
    found, result = infer(base, tmp_path / "out", {"path": str(tmp_path / "st")})
    assert np.abs(found - encode(tmp_path / "st")).max() <= 1e-5
    assert "padding: left, token [PAD] (0), with position_ids" in stated(result)


def test_the_prompt_of_a_folder_is_used_and_excluded_from_pooling_as_in_the_library(
    base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "st"
    library.SentenceTransformer(
        modules=[
            parts().Transformer(str(base / "bert"), max_seq_length=40),
            parts().Pooling(WIDTH, MODES, include_prompt=False),
        ],
        prompts={"query": "the data: ", "passage": "a mode "},
        default_prompt_name="query",
    ).save(str(folder))
    given: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"prompt_name": "passage"}, {"prompt_name": "passage"}),
        ({"prompt": "of time "}, {"prompt": "of time "}),
        ({"prompt": ""}, {"prompt": ""}),
    ]
    for number, (data, options) in enumerate(given):
        found, result = infer(base, tmp_path / str(number), {"path": str(folder)}, data)
        assert np.abs(found - encode(folder, **options)).max() <= 1e-5
        if not data:
            assert "prompt: 'the data: ' before every text" in stated(result)
    with pytest.raises(ConfigError, match="unknown prompt 'qery'; did you mean query"):
        infer(base, tmp_path / "bad", {"path": str(folder)}, {"prompt_name": "qery"})


def save_old_folder(folder: Path, base: Path) -> None:
    """Write a folder as versions before 2.3 did: 0_Transformer, a flag per mode, .bin weights."""
    shutil.copytree(base / "bert", folder / "0_Transformer")
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": f"{i}_{kind}",
             "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(["Transformer", "Pooling", "Dense", "Normalize"])
        ],
        "0_Transformer/sentence_bert_config.json": {"max_seq_length": 12, "do_lower_case": True},
        "1_Pooling/config.json": {
            "word_embedding_dimension": WIDTH,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": True,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
        "2_Dense/config.json": {
            "in_features": 2 * WIDTH,
            "out_features": 8,
            "bias": False,
            "activation_function": "torch.nn.modules.activation.GELU",
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "3_Normalize").mkdir()
    weight = torch.randn(8, 2 * WIDTH, generator=torch.Generator().manual_seed(3))
    torch.save({"linear.weight": weight}, folder / "2_Dense/pytorch_model.bin")


def test_a_folder_of_an_old_version_gives_the_embeddings_of_the_library(
    base: Path, tmp_path: Path
) -> None:
    save_old_folder(tmp_path / "st", base)
    found, result = infer(base, tmp_path / "out", {"path": str(tmp_path / "st")})
    assert found.shape == (len(TEXTS), 8)
    assert np.abs(found - encode(tmp_path / "st")).max() <= 1e-5
    text = stated(result)
    assert "limit 12 tokens (sentence_bert_config.json)" in text
    assert "embedding: max + mean pooling, Dense to 8, normalized" in text
    assert result.config["output"]["transform"] == "sentence_embedding"


def test_a_transform_that_differs_from_the_folder_is_stated(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "st"
    library.SentenceTransformer(
        modules=[
            parts().Transformer(str(base / "bert"), max_seq_length=40),
            parts().Pooling(WIDTH, "cls"),
            parts().Normalize(),
        ]
    ).save(str(folder))
    select = {"select": "last_hidden_state"}
    chosen = {**select, "transform": ["mean_pool", "normalize"]}
    _, result = infer(base, tmp_path / "a", {"path": str(folder)}, output=chosen)
    assert "embedding: not the folder's own, which is: cls pooling, normalized" in stated(result)
    assert "other_pooling" in [warning.code for warning in result.warnings]
    chosen = {**select, "transform": ["cls", "normalize"]}
    found, result = infer(base, tmp_path / "b", {"path": str(folder)}, output=chosen)
    assert "embedding: cls pooling, normalized" in stated(result)
    assert "other_pooling" not in [warning.code for warning in result.warnings]
    assert np.abs(found - encode(folder)).max() <= 1e-5


def test_a_folder_of_t5_is_encoded_without_its_decoder(base: Path, tmp_path: Path) -> None:
    transformers = import_transformers("")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=250, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).eval().save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5", model_max_length=600)
    modules = [parts().Transformer(str(tmp_path / "t5"), max_seq_length=30), dense(WIDTH)]
    modules.insert(1, parts().Pooling(WIDTH, "mean"))
    library.SentenceTransformer(modules=modules).save(str(tmp_path / "st"))
    found, result = infer(base, tmp_path / "out", {"path": str(tmp_path / "st")})
    assert np.abs(found - encode(tmp_path / "st")).max() <= 1e-5
    assert "model: only the encoder" in stated(result)


def test_an_unsupported_module_is_an_error_only_if_its_output_is_needed(
    base: Path, tmp_path: Path
) -> None:
    save_old_folder(tmp_path / "st", base)
    lines = json.loads((tmp_path / "st/modules.json").read_text())
    lines[2]["type"] = "sentence_transformers.models.LSTM"
    (tmp_path / "st/modules.json").write_text(json.dumps(lines))
    with pytest.raises(ConfigError, match=r"has LSTM, .* set output\.transform, e\.g\. mean_pool"):
        infer(base, tmp_path / "a", {"path": str(tmp_path / "st")})
    chosen = {"select": "last_hidden_state", "transform": "mean_pool"}
    found, _ = infer(base, tmp_path / "b", {"path": str(tmp_path / "st")}, output=chosen)
    assert found.shape == (len(TEXTS), WIDTH)
    lines[2] |= {"type": "sentence_transformers.models.Dense", "path": "../elsewhere"}
    (tmp_path / "st/modules.json").write_text(json.dumps(lines))
    with pytest.raises(ConfigError, match=r"has the path '\.\./elsewhere'"):
        infer(base, tmp_path / "c", {"path": str(tmp_path / "st")})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "2_Dense/config.json",
            {"in_features": 64, "out_features": 8, "activation_function": "evil.run"},
            r"Dense in 2_Dense of .*st cannot be loaded: the activation evil\.run is not a class",
        ),
        (
            "2_Dense/config.json",
            {"in_features": 64, "out_features": 8, "activation_function": "torch.nn.functional"},
            r"the activation torch\.nn\.functional is not a class of torch\.nn",
        ),
        ("2_Dense/config.json", {"in_features": 64, "out_features": 9}, "Dense in 2_Dense of .*st"),
        (
            "2_Dense/config.json",
            {"in_features": 64},
            "loaded: its config.json has no 'out_features'",
        ),
        ("2_Dense/pytorch_model.bin", None, "it has neither model.safetensors nor pytorch_model"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "has pooling 'median', "),
        ("modules.json", 1, "has no Pooling, "),
    ],
)
def test_modules_that_cannot_be_built_are_named(
    base: Path, tmp_path: Path, file: str, content: Any, message: str
) -> None:
    save_old_folder(tmp_path / "st", base)
    if file == "modules.json":
        content = json.loads((tmp_path / "st/modules.json").read_text())[:content]
    (tmp_path / "st" / file).unlink()
    if content is not None:
        (tmp_path / "st" / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        infer(
            base, tmp_path / "out", {"path": str(tmp_path / "st")},
            output={"select": "last_hidden_state", "transform": "sentence_embedding"},
        )  # fmt: skip


def test_sentence_embedding_of_another_folder_is_an_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a sentence-transformers folder"):
        infer(
            base, tmp_path / "out", {"path": str(base / "bert")},
            output={"transform": "sentence_embedding"},
        )  # fmt: skip


def test_pairs_of_a_cross_encoder_score_as_in_the_library(base: Path, tmp_path: Path) -> None:
    made = library.CrossEncoder(str(base / "bert"), num_labels=1)
    made.save(str(tmp_path / "ce"))
    pairs = [("the model", text) for text in TEXTS]
    rows = [{"query": query, "passage": passage} for query, passage in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "pairs.jsonl"), "field": ["query", "passage"]}
    model = {
        "path": str(tmp_path / "ce"),
        "auto_class": "AutoModelForSequenceClassification",
    }
    found, _ = infer(base, tmp_path / "out", model, data, {"transform": "sigmoid"})
    assert np.abs(found[:, 0] - made.predict(pairs)).max() <= 1e-5
