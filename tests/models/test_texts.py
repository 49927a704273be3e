"""Text models: pad tokens, padding sides, positions, and the scores of classifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradrun
from gradrun.audits import audit as audits
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_transformers
from gradrun.models import load_model
from gradrun.results.result import InferResult
from tests.conftest import Command
from tests.support.small_models import WIDTH, save_bert, save_tokenizer, sentences

TEXTS = ["the cat sat on the mat", "a", "it was bad", "the dog ran and ran and ran"]
HEAD = "AutoModelForSequenceClassification"


def infer(
    folder: Path, out: Path, texts: list[str], model: Any = None, data: Any = None, **output: Any
) -> tuple[np.ndarray, InferResult]:
    folder.parent.mkdir(exist_ok=True)
    (folder.parent / "t.txt").write_text("\n".join(texts) + "\n")
    path = str(folder.parent / "t.txt")
    result = gradrun.infer(
        {
            "model": {"source": "huggingface", "path": str(folder), **(model or {})},
            "data": {"source": "text", "path": path, "group_by_length": False, **(data or {})},
            "output": {"path": str(out), **output},
            "run": {"warmup": 0},
            "measure": {"memory": False},
        }
    )
    name = "predictions.npy" if (out / "predictions.npy").exists() else "predictions.score.npy"
    return np.load(out / name), result


def stated(result: InferResult) -> str:
    return "\n".join(f"{line.topic}: {line.text}" for line in result.interpretation)


def save_gpt_tokenizer(folder: Path, **settings: Any) -> Any:
    """Save a byte-level tokenizer that adds no tokens, as that of GPT-2."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"<|endoftext|>": 256}
    if "pad_token" in settings:
        vocabulary["<pad>"] = 257
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = import_transformers("").PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", model_max_length=64, **settings
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_causal(folder: Path, kind: str, **settings: Any) -> Any:
    """Save a small GPT-2 or Llama with random weights that are large enough to matter."""
    transformers = import_transformers("")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 260, "eos_token_id": 256, "bos_token_id": 256}
    if kind.startswith("GPT2"):
        sizes |= {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
        config = transformers.GPT2Config(**sizes, **settings)
    else:
        sizes |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = transformers.LlamaConfig(**sizes, **settings)
    model = getattr(transformers, kind)(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "own", "pad"),
    [("GPT2", {}, None), ("GPT2", {}, 0), ("Llama", {"pad_token": "<pad>"}, 5)],
)
def test_a_causal_classifier_predicts_the_same_whatever_its_neighbours(
    tmp_path: Path, kind: str, own: dict[str, str], pad: int | None
) -> None:
    folder = tmp_path / "gpt"
    tokenizer = save_gpt_tokenizer(folder, **own)
    model = save_causal(folder, f"{kind}ForSequenceClassification", pad_token_id=pad)
    with torch.inference_mode():
        alone = [
            model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
            for text in TEXTS
        ]
    for side in ("right", "left"):
        found, result = infer(
            folder, tmp_path / side, TEXTS, {"auto_class": HEAD}, {"padding_side": side},
            select="logits",
        )  # fmt: skip
        assert np.abs(found - torch.stack(alone).numpy()).max() <= 1e-5
    name = "<pad> (257)" if own else "<|endoftext|> (256)"
    text = f"pad token: {name} of the tokenizer, instead of {pad} in the model's config"
    assert text in stated(result)


@pytest.mark.parametrize("command", ["audit", "validate"])
def test_other_commands_give_the_model_the_pad_token_too(
    tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    save_gpt_tokenizer(tmp_path / "gpt")
    save_causal(tmp_path / "gpt", "GPT2ForSequenceClassification")
    (tmp_path / "t.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "c.yaml").write_text(
        f"model: {{source: huggingface, path: gpt, auto_class: {HEAD}}}\n"
        "data: {source: text, path: t.txt}\noutput: {path: out, select: logits}\n"
    )
    if command == "validate":
        answer = cli("validate", "--explain", tmp_path / "c.yaml")
        assert "pad token" in answer.out
        return

    def load(*args: Any, **keys: Any) -> Any:
        model = load_model(*args, **keys)
        raise ConfigError(f"pad token {model.module.config.pad_token_id}")

    monkeypatch.setattr(audits, "load_model", load)  # the passes of an audit take seconds
    assert "pad token 256" in cli("audit", tmp_path / "c.yaml").err


def test_a_pad_token_outside_of_the_vocabulary_of_the_model_is_an_error(tmp_path: Path) -> None:
    save_gpt_tokenizer(tmp_path / "gpt", pad_token="<pad>")
    transformers = import_transformers("")
    transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=257, n_positions=64, n_embd=4, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path / "gpt")
    with pytest.raises(ConfigError, match=r"'<pad>' .* number 257, but the model has 257 tokens"):
        infer(tmp_path / "gpt", tmp_path / "out", TEXTS, select="last_hidden_state")


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_the_next_token_of_padded_texts_is_that_of_each_text_alone(
    tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "gpt"
    tokenizer = save_gpt_tokenizer(folder)
    model = save_causal(folder, kind)
    causal = {"auto_class": "AutoModelForCausalLM"}
    with torch.inference_mode():
        alone = torch.stack(
            [
                model(**tokenizer(t, return_tensors="pt", return_token_type_ids=False)).logits[
                    0, -1
                ]
                for t in TEXTS
            ]
        ).numpy()
    for side, data in (("left", {}), ("right", {"padding_side": "right"})):
        found, result = infer(
            folder, tmp_path / side, TEXTS, causal, data, select="logits", transform="last_token"
        )
        assert np.abs(found - alone).max() <= 1e-4
        assert f"padding: {side}, token <|endoftext|> (256)" in stated(result)


# --- classifiers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["toxic", "insult", "threat"], "multi_label_classification"),
        (["toxic"], None),
        (["good", "bad", "neither"], None),
        (["good", "bad", "neither"], "single_label_classification"),
    ],
)
def test_the_scores_of_a_classifier_are_those_of_the_pipeline(
    tmp_path: Path, labels: list[str], problem: str | None
) -> None:
    names = dict(enumerate(labels))
    model = save_bert(
        tmp_path / "bert", "BertForSequenceClassification", problem_type=problem,
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    model.classifier.bias.data = torch.tensor([1.5, 1.2, -2.0][: len(labels)])
    model.save_pretrained(tmp_path / "bert")
    texts = sentences(6)
    transformers = import_transformers("")
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "bert"))
    answers = pipeline(texts, top_k=None, truncation=True)
    head = {"auto_class": HEAD}
    probabilities, result = infer(
        tmp_path / "bert", tmp_path / "a", texts, head, select="logits", transform="softmax"
    )
    for row, answer in zip(probabilities, answers, strict=True):
        expected = {line["label"]: line["score"] for line in answer}
        assert np.abs(row - [expected[name] for name in labels]).max() <= 1e-6
    if problem == "multi_label_classification" or len(labels) == 1:
        assert "softmax by sigmoid, as the model's config asks" in stated(result)
    score, _ = infer(
        tmp_path / "bert", tmp_path / "b", texts, head, select="logits", transform="classify"
    )
    assert np.abs(score - [answer[0]["score"] for answer in answers]).max() <= 1e-6
    classes = np.load(tmp_path / "b/predictions.class.npy")
    assert [labels[number] for number in classes] == [answer[0]["label"] for answer in answers]


def test_a_regression_model_has_no_classes(tmp_path: Path) -> None:
    save_bert(
        tmp_path / "bert", "BertForSequenceClassification", num_labels=1, problem_type="regression"
    )
    with pytest.raises(ConfigError, match="predicts values, not classes"):
        infer(
            tmp_path / "bert", tmp_path / "out", TEXTS, {"auto_class": HEAD},
            select="logits", transform="classify",
        )  # fmt: skip


# --- lengths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "offset"), [("Bert", 0), ("Roberta", 2), ("MPNet", 2)])
def test_positions_limit_texts_if_the_tokenizer_has_no_limit(
    tmp_path: Path, kind: str, offset: int
) -> None:
    transformers = import_transformers("")
    save_tokenizer(tmp_path / "m", model_max_length=int(1e30))
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=250, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, pad_token_id=1 if offset else 0,
    )  # fmt: skip
    getattr(transformers, f"{kind}Model")(config).eval().save_pretrained(tmp_path / "m")
    texts = ["the mode", "the model of data " * 20]
    _, result = infer(
        tmp_path / "m", tmp_path / "out", texts, select="last_hidden_state", transform="cls"
    )
    assert f"limit {32 - offset} tokens (the model's positions)" in stated(result)
    assert f"1 of 2 truncated to {32 - offset} tokens (longest: 8" in stated(result)
    with pytest.raises(ConfigError, match=f"has positions for {32 - offset} tokens"):
        infer(tmp_path / "m", tmp_path / "long", texts, data={"max_length": 40})


def test_a_resume_after_a_failing_text_is_advised_with_quarantine(
    tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bert(tmp_path / "bert")
    (tmp_path / "net.py").write_text(
        "import torch, transformers\n"
        "def build(): return transformers.BertModel.from_pretrained('bert')\n"
    )
    save_tokenizer(tmp_path / "tok", model_max_length=int(1e30))
    (tmp_path / "t.txt").write_text("the mode\n" * 6 + "the model of data " * 30 + "\n")
    (tmp_path / "c.yaml").write_text(
        "model: {source: python, target: net.py:build}\n"
        "data: {source: text, path: t.txt, tokenizer: tok, batch_size: 2, group_by_length: false}\n"
        "output: {path: out, select: last_hidden_state, transform: cls}\n"
    )
    monkeypatch.chdir(tmp_path)
    answer = cli("infer", "c.yaml", "--trust-code")
    assert answer.code == 1
    assert answer.err.endswith(
        "to resume past the failing sample: gradrun infer c.yaml --trust-code --resume "
        "--set run.on_error=quarantine\n"
    )
    skip = ["--set", "run.on_error=quarantine"]
    resumed = cli("infer", "c.yaml", "--trust-code", "--resume", *skip)
    assert resumed.code == 0, resumed.text
    assert len(np.load(tmp_path / "out/predictions.npy")) == 7
    (line,) = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == 6


# --- inputs ------------------------------------------------------------------------------------


def test_an_encoder_decoder_runs_its_encoder_or_says_how(tmp_path: Path) -> None:
    transformers = import_transformers("")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=250, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5Model(config).eval().save_pretrained(tmp_path / "t5")
    tokenizer = save_tokenizer(tmp_path / "t5")
    inputs = {"inputs": ["input_ids", "attention_mask"]}
    with pytest.raises(ConfigError, match="AutoModelForTextEncoding runs its encoder alone"):
        infer(tmp_path / "t5", tmp_path / "a", TEXTS, data=inputs)
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5").eval()
    found, _ = infer(
        tmp_path / "t5", tmp_path / "b", TEXTS, {"auto_class": "AutoModelForTextEncoding"}, inputs,
        transform="mean_pool",
    )  # fmt: skip
    with torch.inference_mode():
        for row, text in zip(found, TEXTS, strict=True):
            given = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            expected = encoder(**given).last_hidden_state[0].mean(0).numpy()
            assert np.abs(row - expected).max() <= 1e-5


def test_inputs_that_a_forward_does_not_accept_are_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tok")
    (tmp_path / "t.txt").write_text("the mode\n")
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, input_ids, attention_mask): return input_ids.float().mean(1)\n"
    )
    with pytest.raises(ConfigError, match=r"data\.inputs: \[input_ids, attention_mask\]"):
        gradrun.infer(
            {
                "model": {"source": "python", "target": f"{tmp_path}/net.py:Net"},
                "data": {
                    "source": "text", "path": str(tmp_path / "t.txt"),
                    "tokenizer": str(tmp_path / "tok"),
                },
                "output": {"path": str(tmp_path / "out")},
            },
            trust_code=True,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tokens_of_a_half_precision_model_are_pooled_in_float32(tmp_path: Path, dtype: str) -> None:
    save_bert(tmp_path / "bert")
    texts = ["the model of data " * 20]
    steps = {"select": "last_hidden_state", "transform": ["mean_pool", "normalize"]}
    found, _ = infer(tmp_path / "bert", tmp_path / "a", texts, {"dtype": dtype}, **steps)
    transformers = import_transformers("")
    model = transformers.BertModel.from_pretrained(
        tmp_path / "bert", dtype=getattr(torch, dtype)
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    with torch.inference_mode():
        states = model(**tokenizer(texts, truncation=True, return_tensors="pt")).last_hidden_state
    mean = states[0].double().numpy().mean(0)
    assert found.dtype == np.float32
    assert np.abs(found[0] - mean / np.linalg.norm(mean)).max() <= 1e-6


def test_labels_of_texts_are_matched_by_name_with_id2label(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = ["neg", "neu", "pos"]
    save_bert(
        tmp_path / "model",
        "BertForSequenceClassification",
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    texts = sentences(12)
    labels = ["pos", *(names[(7 * number) % 3] for number in range(11))]
    rows = [json.dumps({"t": t, "y": y}) for t, y in zip(texts, labels, strict=True)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    path = str(tmp_path / "t.jsonl")
    result = gradrun.infer(
        {
            "model": {"source": "huggingface", "path": str(tmp_path / "model"), "auto_class": HEAD},
            "data": {"source": "text", "path": path, "field": "t", "labels": "y"},
            "output": {"path": str(tmp_path / "out"), "transform": "classify"},
            "run": {"warmup": 0},
            "measure": {"memory": False},
            "metrics": ["accuracy"],
        }
    )
    pipeline = import_transformers("").pipeline("text-classification", str(tmp_path / "model"))
    said = [one["label"] for one in pipeline(texts, truncation=True)]
    assert result.metrics[0].value == pytest.approx(np.mean(np.array(said) == labels))
    assert "by name: neg, neu, pos (3 classes, from the model)" in stated(result)
