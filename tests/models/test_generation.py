"""Generated text: each prompt alone, seeds per sample, settings, and the times of tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import gradrun
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_transformers
from gradrun.models.generation import TextGenerator
from gradrun.results.result import InferResult
from tests.models.test_texts import save_causal, save_gpt_tokenizer, stated
from tests.support.small_models import WIDTH, save_tokenizer, sentences, skewed

PROMPTS = [text[:30] for text in skewed(20, seed=3)]
NEW = 6
CAUSAL, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt") / "gpt"
    save_gpt_tokenizer(folder)
    save_causal(folder, "GPT2LMHeadModel")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "llama"
    save_gpt_tokenizer(folder, pad_token="<pad>")
    save_causal(folder, "LlamaForCausalLM", pad_token_id=257)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "t5"
    transformers = import_transformers("")
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=250, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def infer(
    folder: Path, out: Path, generate: dict[str, Any], prompts: list[str] | None = None, **more: Any
) -> tuple[list[str], InferResult]:
    """Return the texts that gradrun generates."""
    path = out.parent / "prompts.jsonl"
    texts = PROMPTS if prompts is None else prompts
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    auto = SEQ2SEQ if folder.name == "t5" else CAUSAL
    model = {"source": "huggingface", "path": str(folder), "auto_class": auto}
    data = {"source": "text", "path": str(path), "field": "text", "batch_size": 8}
    result = gradrun.infer(
        {
            "model": model | {"generate": generate} | more.pop("model", {}),
            "data": data | more.pop("data", {}),
            "output": {"path": str(out), "format": "jsonl"},
            "run": {"warmup": 0} | more.pop("run", {}),
            "measure": {"memory": False, "batch_independence": False},
            **more,
        }
    )
    return read(out), result


def read(out: Path) -> list[str]:
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def by_transformers(folder: Path, texts: list[str], **settings: Any) -> list[str]:
    """Generate the text of each prompt alone, with generate() of transformers."""
    transformers = import_transformers("")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.decode(row, skip_special_tokens=True)
        for row in new_tokens(folder, texts, **settings)
    ]


def new_tokens(folder: Path, texts: list[str], **settings: Any) -> list[list[int]]:
    """Return the tokens that generate() of transformers appends to each prompt alone."""
    transformers = import_transformers("")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = SEQ2SEQ if folder.name == "t5" else CAUSAL
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        pad = tokenizer.pad_token_id
        pad = tokenizer.eos_token_id if pad is None else pad
        (row,) = model.generate(**inputs, do_sample=False, pad_token_id=pad, **settings)
        start = 1 if folder.name == "t5" else inputs["input_ids"].shape[1]
        found.append(row[start:].tolist())
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_texts_do_not_depend_on_the_batches_in_flight(
    gpt: Path, tmp_path: Path, device: str
) -> None:
    one, three = (
        infer(
            gpt,
            tmp_path / str(in_flight),
            {"max_new_tokens": NEW},
            data={"batch_size": 2},
            run={"device": device, "in_flight": in_flight},
        )[0]
        for in_flight in (1, 3)
    )
    assert three == one
    assert len(one) == len(PROMPTS)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt", {}),
        ("gpt", {"repetition_penalty": 3.0}),
        ("llama", {"num_beams": 3}),
        ("t5", {}),
        ("t5", {"num_beams": 2, "min_new_tokens": 4}),
    ],
)
def test_the_text_of_each_prompt_is_the_one_that_it_has_alone(
    name: str, settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    settings = {"max_new_tokens": NEW, **settings}
    texts, _ = infer(folder, tmp_path / "out", settings)
    assert texts == by_transformers(folder, PROMPTS, **settings)
    assert len(set(texts)) > 5


@pytest.mark.parametrize("name", ["gpt", "t5"])
def test_a_sampled_text_depends_on_the_seed_and_its_sample_alone(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    prompts = [*PROMPTS[:9], *[PROMPTS[0]] * 3]
    settings = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.5, "top_p": 0.95}

    def sampled(out: str, size: int, **more: Any) -> list[str]:
        data = {"data": {"batch_size": size, "group_by_length": size == 4}}
        return infer(folder, tmp_path / out, settings, prompts, **data, **more)[0]

    alone = sampled("a", 1)
    assert sampled("b", 8) == alone
    assert sampled("c", 4) == alone
    assert len({alone[0], *alone[9:]}) == 4, "the same prompt has several texts"
    assert sampled("d", 8, run={"seed": 1}) != alone


def test_sampled_tokens_have_the_probabilities_of_the_model(gpt: Path, tmp_path: Path) -> None:
    settings = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.5, "top_k": 4}
    count = 2000
    out = tmp_path / "out"
    infer(gpt, out, settings, [PROMPTS[0]] * count, data={"batch_size": 500})
    transformers = import_transformers("")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt)
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt).eval()
    inputs = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        scores = model(**inputs).logits[0, -1] / 0.5
    best, tokens = scores.topk(4)
    texts = read(out)
    for token, chance in zip(tokens.tolist(), best.softmax(0).tolist(), strict=True):
        share = texts.count(tokenizer.decode(token, skip_special_tokens=True)) / count
        assert share == pytest.approx(chance, abs=4.5 * (chance * (1 - chance) / count) ** 0.5)


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
def test_texts_are_the_same_in_every_gradient_mode_and_with_workers(
    mode: str, t5: Path, tmp_path: Path
) -> None:
    settings = {"max_new_tokens": NEW, "do_sample": True}
    more: dict[str, Any] = {"run": {"mode": mode}}
    if mode == "no_grad":
        more["engine"] = {"source": "processes", "workers": 2}
        more["run"]["threads"] = 1
    texts, result = infer(t5, tmp_path / "out", settings, PROMPTS[:9], **more)
    reference, _ = infer(t5, tmp_path / "again", settings, PROMPTS[:9])
    assert texts == reference
    generation = result.measurements[0].generation
    assert generation
    assert len(generation.batch_seconds) == 2


def test_times_and_tokens_are_those_of_the_batches(gpt: Path, tmp_path: Path) -> None:
    _, result = infer(gpt, tmp_path / "out", {"max_new_tokens": NEW})
    generation = result.measurements[0].generation
    assert generation
    rows = new_tokens(gpt, PROMPTS, max_new_tokens=NEW)
    assert generation.tokens == sum(map(len, rows))
    assert len(generation.batch_steps) == 3
    assert generation.batch_steps[0] == NEW
    for first, total, forward in zip(
        generation.first_token_seconds, generation.batch_seconds,
        result.measurements[0].batch_seconds, strict=True,
    ):  # fmt: skip
        assert 0 < first < total <= forward


def test_a_text_ends_before_a_stop_string(gpt: Path, tmp_path: Path) -> None:
    plain, _ = infer(gpt, tmp_path / "plain", {"max_new_tokens": NEW})
    stop = plain[0][2:4]
    texts, result = infer(gpt, tmp_path / "out", {"max_new_tokens": NEW, "stop_strings": [stop]})
    assert texts == [text.split(stop)[0] for text in plain]
    assert f"ends before {stop!r}" in stated(result)


def test_settings_of_the_folder_apply_unless_they_are_replaced(gpt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt"
    save_gpt_tokenizer(folder)
    model = save_causal(folder, "GPT2LMHeadModel")
    own = {"max_new_tokens": 4, "repetition_penalty": 2.5, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, **own}))
    texts, result = infer(folder, tmp_path / "a", {})
    assert texts == by_transformers(gpt, PROMPTS, max_new_tokens=4, repetition_penalty=2.5)
    assert "generation_config.json: max_new_tokens 4" in stated(result)
    more, result = infer(folder, tmp_path / "b", {"max_new_tokens": 5})
    assert more == by_transformers(gpt, PROMPTS, max_new_tokens=5, repetition_penalty=2.5)
    assert "max_new_tokens 4 (replaced)" in stated(result)
    assert model is not None


def test_prompts_are_cut_at_their_start_so_that_new_tokens_have_positions(
    gpt: Path, tmp_path: Path
) -> None:
    long = "abcdefghij" * 9
    texts, result = infer(gpt, tmp_path / "out", {"max_new_tokens": 60}, [long, "ab"])
    assert texts == by_transformers(gpt, [long[-4:], "ab"], max_new_tokens=60)
    assert "1 of 2 truncated to 4 tokens" in stated(result)
    assert "longer texts lose their start" in stated(result)


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        ({}, r"max_new_tokens is missing; set .* such as max_new_tokens: 64"),
        ({"max_new_token": 5}, "did you mean max_new_tokens"),
        ({"max_new_tokens": "many"}, "'many' is not a whole number from 1 on"),
        ({"max_new_tokens": 5, "temperature": 0.5}, "temperature has no effect without sampling"),
        ({"max_new_tokens": 5, "do_sample": True, "num_beams": 2}, "cannot be combined"),
        ({"max_new_tokens": 5, "do_sample": True, "temperature": -1}, "strictly positive"),
        ({"max_new_tokens": 5, "num_return_sequences": 2}, "a prompt has one text"),
        ({"max_length": 20}, "counts the prompt and its padding.*set max_new_tokens"),
        ({"max_new_tokens": 64}, "the model has positions for 64 tokens"),
        ({"max_new_tokens": 5, "do_sample": "yes"}, "'yes' is not true or false"),
        ({"max_new_tokens": 5, "stop_strings": ["a", ""]}, "'' is not a text"),
        ({"max_new_tokens": 5, "stop_strings": [3]}, "3 is not a text"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    gpt: Path, tmp_path: Path, generate: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        infer(gpt, tmp_path / "out", generate)


def test_a_text_is_not_longer_than_the_positions_of_a_decoder(tmp_path: Path) -> None:
    transformers = import_transformers("")
    tokenizer = save_tokenizer(tmp_path / "t5")  # a name for AutoModelForSeq2SeqLM
    config = transformers.BartConfig(
        vocab_size=250, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=20, pad_token_id=0, bos_token_id=None, forced_eos_token_id=None,
        eos_token_id=tokenizer.sep_token_id, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    prompts = PROMPTS[:3]
    with pytest.raises(ConfigError, match="positions for 20 tokens; set at most 19"):
        infer(tmp_path / "t5", tmp_path / "out", {"max_new_tokens": 21}, prompts)
    texts, _ = infer(tmp_path / "t5", tmp_path / "out", {"max_new_tokens": 19}, prompts)
    assert texts == by_transformers(tmp_path / "t5", prompts, max_new_tokens=19)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"auto_class": "AutoModel"}}, "needs a model that writes text"),
        ({"model": {"compile": True}}, "model.compile cannot be combined"),
        ({"data": {"padding_side": "right"}}, "padding on the right"),
        ({"data": {"call": "dict"}}, "passes its inputs by keyword"),
        ({"data": {"field": ["text", "text"]}}, "a prompt is one text"),
    ],
)
def test_a_config_that_cannot_generate_is_refused(
    gpt: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        infer(gpt, tmp_path / "out", {"max_new_tokens": 5}, **changes)


def test_a_model_that_computes_nan_does_not_write_text(gpt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt"
    save_gpt_tokenizer(folder)
    model = save_causal(folder, "GPT2LMHeadModel")
    model.transformer.wte.weight.data[ord("z") - 33] = torch.nan
    model.save_pretrained(folder)
    assert sentences(1)
    with pytest.raises(ConfigError, match="contain NaN"):
        infer(folder, tmp_path / "out", {"max_new_tokens": 4}, ["zoo", "zz"])


def test_a_prompt_that_fails_is_quarantined_and_the_others_keep_their_texts(
    gpt: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gpt"
    save_gpt_tokenizer(folder)
    model = save_causal(folder, "GPT2LMHeadModel")
    model.transformer.wpe.weight.data[40:] = torch.nan  # positions that only long prompts reach
    model.save_pretrained(folder)
    prompts = [*PROMPTS[:11], "x" * 45, *PROMPTS[11:]]
    settings = {"max_new_tokens": NEW}
    run = {"on_error": "quarantine"}
    texts, result = infer(folder, tmp_path / "out", settings, prompts, run=run)
    without, _ = infer(folder, tmp_path / "without", settings)
    assert [*texts[:11], *texts[12:]] == without == infer(gpt, tmp_path / "all", settings)[0]
    assert texts[11] is None
    assert result.quarantined == 1
    (line,) = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == 11
    assert "contain NaN" in json.loads(line)["error"]


@pytest.mark.parametrize("name", ["gpt", "t5"])
def test_batches_that_do_not_fit_in_memory_are_split_and_give_the_same_texts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    settings = {"max_new_tokens": NEW, "do_sample": True}
    whole, _ = infer(folder, tmp_path / "whole", settings)
    sizes, generate = [], TextGenerator.forward

    def limited(self: Any, sample_numbers: Any = None, **inputs: torch.Tensor) -> list[str]:
        size = len(next(iter(inputs.values())))
        if len(sizes) >= 2 and size > 3:  # later than the first batch and its repetition
            raise torch.OutOfMemoryError("Tried to allocate 20.00 MiB")
        sizes.append(size)
        return generate(self, sample_numbers, **inputs)

    monkeypatch.setattr(TextGenerator, "forward", limited)
    texts, result = infer(folder, tmp_path / "out", settings)
    assert texts == whole
    assert max(sizes[2:]) <= 3
    assert result.measurements[0].batch_limit in {2, 3}
    assert any("out of memory at sample" in warning.text for warning in result.warnings)


# --- speech --------------------------------------------------------------------------------------


def test_speech_becomes_the_text_of_each_file_alone(tmp_path: Path) -> None:
    transformers = import_transformers("")
    folder, clips = tmp_path / "whisper", tmp_path / "clips"
    tokenizer = save_gpt_tokenizer(folder, pad_token="<pad>")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=260, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8,
        max_source_positions=50, max_target_positions=40, pad_token_id=257, bos_token_id=256,
        eos_token_id=256, decoder_start_token_id=256, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    own = {"decoder_start_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    own |= {"is_multilingual": False, "no_timestamps_token_id": 259}
    (folder / "generation_config.json").write_text(json.dumps(own))
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    extractor.save_pretrained(folder)
    clips.mkdir()
    noise = np.random.default_rng(0).normal(size=(5, 16000)).astype(np.float32)
    for number, samples in enumerate(noise):
        soundfile.write(clips / f"{number}.wav", samples * 0.1 * (number + 1), 16000)

    def transcribe(generate: dict[str, Any]) -> list[str]:
        model = {"source": "huggingface", "path": str(folder), "generate": generate}
        gradrun.infer(
            {
                "model": model | {"auto_class": "AutoModelForSpeechSeq2Seq"},
                "data": {"source": "audio", "path": str(clips), "batch_size": 2},
                "output": {"path": str(tmp_path / "out"), "format": "jsonl"},
                "run": {"warmup": 0},
                "measure": {"memory": False},
            }
        )
        return read(tmp_path / "out")

    with pytest.raises(ConfigError, match="models of speech choose the most likely token"):
        transcribe({"max_new_tokens": 8, "do_sample": True})
    texts = transcribe({"max_new_tokens": 8})
    loaded = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    for number, text in enumerate(texts):
        samples, _ = soundfile.read(clips / f"{number}.wav", dtype="float32")
        inputs = extractor(samples, sampling_rate=16000, return_tensors="pt")
        (tokens,) = loaded.generate(inputs.input_features, max_new_tokens=8, do_sample=False)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len({*texts}) > 1


# --- chats ---------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def test_a_chat_template_builds_the_prompt_from_texts_and_messages(
    gpt: Path, tmp_path: Path
) -> None:
    prompts: Any = [
        "hi",
        [{"role": "system", "content": "be"}, {"role": "user", "content": "who"}],
    ]
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        infer(gpt, tmp_path / "a", {"max_new_tokens": NEW}, prompts, data={"chat": True})
    folder = tmp_path / "gpt"
    save_gpt_tokenizer(folder, chat_template=TEMPLATE)
    save_causal(folder, "GPT2LMHeadModel")
    texts, result = infer(
        folder, tmp_path / "b", {"max_new_tokens": NEW}, prompts, data={"chat": True}
    )
    rendered = ["<user>hi<bot>", "<system>be<user>who<bot>"]
    assert texts == by_transformers(gpt, rendered, max_new_tokens=NEW)
    assert "chat: the tokenizer's template" in stated(result)
    with pytest.raises(ConfigError, match=r"not a text or a list of \{role, content\}"):
        infer(folder, tmp_path / "c", {"max_new_tokens": NEW}, [{"a": 1}], data={"chat": True})  # type: ignore[list-item]


# --- perplexity ----------------------------------------------------------------------------------


def perplexity(
    folder: Path, out: Path, documents: list[str], **more: Any
) -> tuple[dict[str, list[float]], InferResult]:
    path = out.parent / "documents.txt"
    path.write_text("".join(f"{text}\n" for text in documents))
    result = gradrun.infer(
        {
            "model": {"source": "huggingface", "path": str(folder), "auto_class": CAUSAL}
            | more.pop("model", {}),
            "data": {"source": "text", "path": str(path), "batch_size": 8},
            "output": {"path": str(out), "format": "jsonl", "transform": "perplexity"},
            "run": {"warmup": 0},
            "measure": {"memory": False},
            **more,
        }
    )
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows] for name in ("perplexity", "loss", "tokens")}, result


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_perplexity_is_that_of_a_plain_loop_over_documents(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    documents = [*PROMPTS, "the model " * 20]
    found, result = perplexity(folder, tmp_path / "out", documents)
    transformers = import_transformers("")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for row, text in enumerate(documents):
        ids = tokenizer(text, truncation=True, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            loss = float(model(input_ids=ids, labels=ids).loss)
        assert found["loss"][row] == pytest.approx(loss, rel=1e-5)
        assert found["perplexity"][row] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found["tokens"][row] == ids.shape[1] - 1
    assert "then" not in stated(result)
    assert "mean loss of the tokens after the first" in stated(result)
    assert "1 of 21 truncated to 64 tokens" in stated(result)


def test_a_document_of_one_token_has_no_perplexity(gpt: Path, tmp_path: Path) -> None:
    found, result = perplexity(gpt, tmp_path / "out", ["ab", "a"])
    assert found["tokens"] == [1, 0]
    assert found["loss"][0] > 0
    assert str(found["loss"][1]).lower() in {"nan", "none"}
    assert any("NaN" in warning.text for warning in result.warnings)


def test_perplexity_needs_a_causal_model(gpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a model that predicts the next token"):
        perplexity(gpt, tmp_path / "out", ["ab"], model={"auto_class": "AutoModelForMaskedLM"})
