"""Tests of the source `text`: reading, tokenizing and grouping by length."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from gradrun.config.data import DataConfig, TextData
from gradrun.config.load import load_config
from gradrun.config.model import HuggingFaceModel
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.optional import import_transformers
from gradrun.data import open_data
from gradrun.data.batch import Batch
from gradrun.data.text import CHUNK_BATCHES, Texts
from tests.support.small_models import save_bert, save_tokenizer, sentences, skewed
from tests.support.sources import read_all

LINES = skewed(300)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradrun.data.text.CHUNK_TEXTS", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("texts")
    save_tokenizer(base / "tokenizer")
    (base / "t.txt").write_text("\n".join(LINES) + "\n")
    return base


def opened(folder: Path, **keys: Any) -> Texts:
    given = {"source": "text", "path": "t.txt", "batch_size": 8, **keys}
    given["path"] = str(folder / given["path"])
    given.setdefault("tokenizer", str(folder / "tokenizer"))
    found = open_data(TypeAdapter(DataConfig).validate_json(json.dumps(given)), seed=0)
    assert isinstance(found, Texts)
    return found


def text_error(folder: Path, **keys: Any) -> str:
    with pytest.raises((ConfigError, SampleError)) as caught:
        read_all(opened(folder, **keys))
    return str(caught.value)


def tokens(batches: Iterable[Batch]) -> list[list[int]]:
    """The tokens of every sample without padding, in the order of the batches."""
    return [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch.kwargs["input_ids"], batch.kwargs["attention_mask"], strict=True)
    ]


def tokenize(lines: list[str], folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return [tokenizer(line, truncation=True)["input_ids"] for line in lines]


# --- the file ----------------------------------------------------------------------------------


def test_lines_are_tokenized_and_padded_to_the_longest_of_the_batch(
    folder: Path,
) -> None:
    data = opened(folder, group_by_length=False)
    assert data.samples == len(LINES)
    expected = tokenize(LINES, folder)
    batches = list(data.batches())
    assert tokens(batches) == expected
    for first, batch in zip(range(0, len(LINES), 8), batches, strict=True):
        longest = max(map(len, expected[first : first + 8]))
        assert batch.kwargs["input_ids"].shape == (batch.size, longest)
        assert list(batch.ids) == list(range(first, first + batch.size))
    assert list(batches[0].kwargs) == ["input_ids", "token_type_ids", "attention_mask"]


def test_every_line_is_a_sample_even_an_empty_one(folder: Path) -> None:
    (folder / "gaps.txt").write_bytes("\ufeffone\r\n\r\nthree\n".encode())
    assert tokens(opened(folder, path="gaps.txt").batches()) == tokenize(
        ["one", "", "three"], folder
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_records_provide_texts_and_ids(folder: Path, suffix: str) -> None:
    rows = [{"key": f"r{i}", "body": line} for i, line in enumerate(LINES[:20])]
    path = folder / f"rows.{suffix}"
    if suffix == "csv":
        path.write_text("key,body\n" + "".join(f"{r['key']},{r['body']}\n" for r in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = opened(folder, path=path.name, field="body", id="key", group_by_length=False)
    batches = list(data.batches())
    assert tokens(batches) == tokenize(LINES[:20], folder)
    assert [name for batch in batches for name in batch.ids] == [row["key"] for row in rows]


def test_texts_are_truncated_to_the_limit_of_the_tokenizer_or_the_config(folder: Path) -> None:
    (folder / "long.txt").write_text("model " * 500)
    (width,) = {b.kwargs["input_ids"].shape[1] for b in opened(folder, path="long.txt").batches()}
    assert width == 64
    data = opened(folder, path="long.txt", max_length=10)
    assert next(data.batches()).kwargs["input_ids"].shape == (1, 10)


def test_padding_to_max_length_gives_one_shape(folder: Path) -> None:
    data = opened(folder, padding="max_length", max_length=20)
    assert not data.grouped, "grouping saves nothing"
    assert {b.kwargs["input_ids"].shape[1] for b in data.batches()} == {20}


@pytest.mark.parametrize("end", ["[SEP]", None])
def test_a_tokenizer_without_a_pad_token_pads_with_the_end_token(
    folder: Path, end: str | None
) -> None:
    made = save_tokenizer(folder / "unpadded")
    plain = import_transformers("").PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, unk_token="[UNK]", eos_token=end
    )
    assert plain.pad_token is None
    plain.save_pretrained(folder / "unpadded")
    keys = {"tokenizer": str(folder / "unpadded"), "group_by_length": False, "max_length": 64}
    if end:
        assert tokens(opened(folder, **keys).batches()) == tokenize(LINES, folder)
    else:
        assert "has no token for padding" in text_error(folder, **keys)


def test_only_the_inputs_of_the_config_are_passed(folder: Path) -> None:
    data = opened(folder, inputs=["input_ids", "attention_mask"])
    assert list(next(data.batches()).kwargs) == ["input_ids", "attention_mask"]
    assert "the tokenizer has no output 'mask'; " in text_error(folder, inputs=["mask"])


@pytest.mark.parametrize(
    ("name", "content", "keys", "message"),
    [
        ("t.pdf", b"x", {}, "t.pdf is not a .csv, .tsv, .jsonl, .ndjson, .parquet, .txt file"),
        ("t.txt", b"caf\xe9\n", {}, "t.txt:1  the row is not UTF-8 text"),
        ("t.txt", b"", {}, "contains no samples"),
        ("t.txt", b"a\n", {"field": "body"}, "a .txt file has no columns"),
        (
            "t.csv",
            b"key,body\n1,a\n",
            {},
            "has columns; set the column of the text; allowed: key, body",
        ),
        ("t.csv", b"key,body\n1,a\n", {"field": "boby"}, "no column 'boby'; did you mean body?"),
        ("t.csv", b"key,body\n1,a\n", {"field": "body", "id": "k"}, "has no column 'k'"),
        ("t.csv", b",body\n1,a\n", {}, "t.csv has columns"),
        ("t.jsonl", b"{\n", {"field": "body"}, "invalid JSON"),
    ],
)
def test_a_file_without_texts_is_an_error(
    folder: Path, tmp_path: Path, name: str, content: bytes, keys: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    keys = {**keys, "tokenizer": str(folder / "tokenizer")}
    assert message in text_error(tmp_path, path=name, **keys)


# --- the tokenizer -----------------------------------------------------------------------------


def config(folder: Path, model: dict[str, Any], **data: Any) -> Any:
    text = {"source": "text", "path": str(folder / "t.txt"), **data}
    return load_config(
        {"model": model, "data": text, "output": {"path": str(folder / "out")}}
    ).config


def test_the_default_tokenizer_is_that_of_the_model(folder: Path) -> None:
    save_bert(folder / "bert")
    found = config(folder, {"source": "huggingface", "path": str(folder / "bert")})
    assert found.data.tokenizer_source(found.model) == (folder / "bert", None)
    # The dumped config does not name the tokenizer, so that another model brings its own.
    written = found.model_dump(mode="json")
    assert written["data"]["tokenizer"] is None
    again = load_config(written, {"model.path": str(folder / "tokenizer")}).config
    assert again.data.tokenizer_source(again.model) == (folder / "tokenizer", None)
    assert folder / "bert" in found.input_files()


def test_a_model_without_a_tokenizer_needs_data_tokenizer(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer is missing: set a folder"):
        config(folder, {"source": "zoo", "name": "mlp"})
    own = config(folder, {"source": "zoo", "name": "mlp"}, tokenizer=str(folder / "tokenizer"))
    assert own.data.tokenizer_source(own.model) == (folder / "tokenizer", None)


def test_a_tokenizer_with_code_is_an_error(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "coded")
    path = tmp_path / "coded/tokenizer_config.json"
    described = json.loads(path.read_text())
    described |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path.write_text(json.dumps(described))
    (tmp_path / "coded/mine.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    message = text_error(folder, tokenizer=str(tmp_path / "coded"))
    assert "contains Python code, which tokenizers never run" in message
    assert not (tmp_path / "mark").exists()


def test_a_chunk_that_is_no_longer_cached_is_read_again(folder: Path) -> None:
    data = opened(folder, batch_size=2)
    assert data.grouped
    assert data.samples > 9 * data.chunk_size, "more chunks than are cached"
    expected = [name for batch in data.batches() for name in batch.ids]
    assert [data.input_position(at) for at in range(data.samples)] == expected


def test_padding_max_length_needs_data_max_length(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"padding: max_length needs data\.max_length"):
        config(folder, {"source": "zoo", "name": "mlp"}, padding="max_length")


# --- grouping ----------------------------------------------------------------------------------


def test_texts_are_grouped_only_if_that_saves_a_tenth_of_the_tokens(folder: Path) -> None:
    (folder / "even.txt").write_text("the model\n" * 100)
    assert opened(folder).grouped
    assert not opened(folder, path="even.txt").grouped
    assert opened(folder, path="even.txt", group_by_length=True).grouped
    assert not opened(folder, group_by_length=False).grouped
    assert not opened(folder, batch_size=1).grouped


def test_grouping_permutes_the_texts_within_chunks_and_reports_their_positions(
    folder: Path,
) -> None:
    data, expected = opened(folder), tokenize(LINES, folder)
    assert data.samples > data.chunk_size, "more than one chunk, and the last is incomplete"
    found = tokens(data.batches())
    positions = [data.input_position(at) for at in range(data.samples)]
    assert sorted(positions) == list(range(data.samples))
    assert [expected[position] for position in positions] == found
    assert positions != sorted(positions)
    for first in range(0, data.samples, data.chunk_size):
        stop = min(first + data.chunk_size, data.samples)
        assert sorted(positions[first:stop]) == list(range(first, stop)), (
            "texts stay in their chunk"
        )
        lengths = [len(row) for row in found[first:stop]]
        batches = [lengths[at : at + 8] for at in range(0, len(lengths), 8)]
        assert max(batches, key=max) == batches[0], "the longest first"
        assert all(batch == sorted(batch, reverse=True) for batch in batches)
        mixed = [batch for batch in batches if batch[0] != batch[-1]]
        assert len(mixed) < len(batches), "similar lengths are together"
    assert [name for batch in data.batches() for name in batch.ids] == positions


@pytest.mark.parametrize("start", [8, 64, 8 * CHUNK_BATCHES, 200, 296])
def test_batches_from_a_later_start_are_the_same(folder: Path, start: int) -> None:
    data = opened(folder)
    whole = list(data.batches())[start // 8 :]
    again = list(opened(folder).batches(start))
    assert len(whole) == len(again)
    for one, other in zip(whole, again, strict=True):
        assert list(one.ids) == list(other.ids)
        assert torch.equal(one.kwargs["input_ids"], other.kwargs["input_ids"])


def test_padding_is_counted(folder: Path) -> None:
    data, plain = opened(folder), opened(folder, group_by_length=False)
    computed = {}
    for name, one in (("grouped", data), ("plain", plain)):
        computed[name] = sum(batch.kwargs["input_ids"].numel() for batch in one.batches())
    found = data.padding(0, data.samples)
    assert found.tokens == sum(map(len, tokenize(LINES, folder)))
    assert (found.run, found.ungrouped) == (computed["grouped"], computed["plain"])
    assert found.run < 0.5 * found.ungrouped
    other = plain.padding(0, plain.samples)
    assert other.run == other.ungrouped == computed["plain"]


@pytest.mark.parametrize(
    ("texts", "size", "chunk"),
    [
        (["one two three"] * 40, 8, 2048),
        (["one two three"] * 40, 100, 2000),
        (["one two three"] * 40, 256, 16 * 256),
        (["word " * 15] * 40, 8, 2048),  # 62 tokens: a token per letter, and two around them
        (["word " * 62] * 40, 8, 520),
        (["word " * 62] * 40, 64, 1024),
    ],
)
def test_chunks_are_as_long_as_the_texts_and_tokens_in_memory_allow(
    folder: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], size: int, chunk: int
) -> None:
    monkeypatch.setattr("gradrun.data.text.CHUNK_TEXTS", 2048)
    monkeypatch.setattr("gradrun.data.text.LEAST_CHUNKS", 1)
    (folder / "long.txt").write_text("\n".join(texts * 52) + "\n")
    data = opened(folder, path="long.txt", batch_size=size, max_length=512)
    lengths = [len(row) for row in tokens(data.batches())]
    assert data.chunk_size == chunk
    assert chunk == 16 * size or chunk * max(lengths) <= 2**17


def test_a_short_input_has_several_chunks_for_workers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradrun.data.text.CHUNK_TEXTS", 2048)
    (folder / "short.txt").write_text("one two three\n" * 400)
    assert opened(folder, path="short.txt", batch_size=2).chunk_size == 100
    assert opened(folder, path="short.txt", batch_size=3).chunk_size == 102  # four, not five
    assert opened(folder, path="short.txt", batch_size=8).chunk_size == 16 * 8


# --- batches of tokens -------------------------------------------------------------------------


def test_batches_on_a_cpu_have_at_most_2048_tokens_if_no_size_is_set(folder: Path) -> None:
    (folder / "uneven.txt").write_text("\n".join([*LINES, *["model " * 300] * 20]) + "\n")
    data = opened(folder, path="uneven.txt", batch_size=None, max_length=512)
    shapes = [batch.kwargs["input_ids"].shape for batch in data.batches()]
    assert sum(texts for texts, _ in shapes) == data.samples
    assert all(texts <= 64 and texts * length <= 2048 for texts, length in shapes)
    assert len({texts for texts, _ in shapes}) > 1
    (statement,) = (one for one in data.statements() if one.topic == "batches")
    assert statement.text.startswith("at most 2,048 tokens with padding and 64 texts")


@pytest.mark.parametrize(
    ("keys", "model", "device"),
    [
        ({}, {}, "cuda"),
        ({"batch_size": 64}, {}, "cpu"),
        ({"group_by_length": False}, {}, "cpu"),
        ({"padding": "max_length", "max_length": 8}, {}, "cpu"),
        ({}, {"compile": True}, "cpu"),
        ({}, {"generate": {"max_new_tokens": 2}, "auto_class": "AutoModelForCausalLM"}, "cpu"),
    ],
)
def test_other_batches_of_texts_have_64_texts(
    keys: dict[str, Any], model: dict[str, Any], device: str
) -> None:
    section = {"source": "text", "path": "t.txt", "tokenizer": "tok", **keys}
    config = TypeAdapter(DataConfig).validate_json(json.dumps(section))
    network = HuggingFaceModel(source="huggingface", path="m", **model)
    resolved = config.with_defaults(network, device)
    assert isinstance(resolved, TextData)
    assert (resolved.batch_size, resolved.batch_tokens) == (64, None)


@pytest.mark.parametrize(("limit", "size"), [(64, 8), (64, 64), (200, 16), (5, 8)])
def test_batches_have_at_most_the_tokens_and_the_texts_that_are_allowed(
    folder: Path, limit: int, size: int
) -> None:
    data, expected = opened(folder, batch_tokens=limit, batch_size=size), tokenize(LINES, folder)
    batches = list(data.batches())
    positions = [data.input_position(at) for at in range(data.samples)]
    assert [name for batch in batches for name in batch.ids] == positions
    assert [expected[position] for position in positions] == tokens(batches)
    computed = [batch.kwargs["input_ids"].numel() for batch in batches]
    assert all(batch.size <= size for batch in batches)
    assert all(
        found <= limit or batch.size == 1 for found, batch in zip(computed, batches, strict=True)
    )
    if limit == 64:
        assert max(computed) > limit - 8, "batches are full"
        assert len({batch.size for batch in batches}) > 1
    for first in range(0, data.samples, data.chunk_size):
        stop = min(first + data.chunk_size, data.samples)
        assert sorted(positions[first:stop]) == list(range(first, stop))
    found = data.padding(0, data.samples)
    assert (found.texts, found.run) == (data.samples, sum(computed))
    plain = opened(folder, group_by_length=False, batch_size=size)
    assert found.ungrouped == sum(b.kwargs["input_ids"].numel() for b in plain.batches())


def test_any_batch_of_tokens_can_be_read_again(folder: Path) -> None:
    data = opened(folder, batch_tokens=64)
    start = 0
    for batch in data.batches():
        again = opened(folder, batch_tokens=64) if start % 50 == 0 else data
        assert {again.batch_start(start + row) for row in range(batch.size)} == {start}
        (same,) = again.batches(start, start + batch.size)
        assert torch.equal(same.kwargs["input_ids"], batch.kwargs["input_ids"])
        start += batch.size
    assert start == data.samples


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"group_by_length": False}, "group_by_length: false; batch_tokens groups texts"),
        ({"padding": "max_length", "max_length": 9}, "padding: max_length, which gives all"),
    ],
)
def test_batches_of_tokens_are_refused_where_they_have_no_meaning(
    folder: Path, keys: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=f"batch_tokens cannot be combined with {problem}"):
        config(folder, {"source": "zoo", "name": "mlp"}, batch_tokens=64, **keys)
    fixed = {"source": "zoo", "name": "mlp", "compile": {"dynamic": False}}
    with pytest.raises(
        ConfigError, match=r"cannot be combined with model\.compile\.dynamic: false"
    ):
        config(folder, fixed, batch_tokens=64)


def test_sentences_of_the_readme_are_tokenized(folder: Path) -> None:
    lines = sentences(200)
    assert len(lines) == 200
    (folder / "readme.txt").write_text("\n".join(lines) + "\n")
    data = opened(folder, path="readme.txt")
    found = dict(
        zip([i for b in data.batches() for i in b.ids], tokens(data.batches()), strict=True)
    )
    assert [found[i] for i in range(200)] == tokenize(lines, folder)


# --- interpretation ----------------------------------------------------------------------------


def facts(data: Texts) -> str:
    """The statements of a source and of its texts, once all are read."""
    list(data.batches())
    every = [*data.statements(), *data.padding(0, data.samples).statements()]
    return "\n".join(f"{statement.topic}: {statement.text}" for statement in every)


def test_order_ids_and_labels_of_texts_are_stated(folder: Path) -> None:
    (folder / "named.csv").write_text("k,body,y\nb,one,dog\na,two,cat\nb,three,dog\n")
    keys = {"field": "body", "id": "k", "labels": "y", "classes": ["cat", "dog"]}
    stated = facts(data := opened(folder, path="named.csv", **keys)).splitlines()
    assert "order: rows as in named.csv; ids: column k (text, 2 distinct)" in stated
    assert "labels: column y, by name: cat, dog (2 classes, from data.classes)" in stated
    assert data.repeated_ids == 1
    lines = facts(opened(folder)).splitlines()
    assert "order: lines as in t.txt; ids: row numbers, from 0" in lines


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"k": 1}', "'body' is missing"),
        ('{"body": null}', "'body' is null"),
        ('{"body": [true, null]}', "'body' is [true, null], not a text"),
    ],
)
def test_a_field_without_a_text_is_described_in_the_words_of_json(
    folder: Path, line: str, found: str
) -> None:
    (folder / "gap.jsonl").write_text(f'{{"body": "one"}}\n{line}\n')
    assert text_error(folder, path="gap.jsonl", field="body").endswith(f"gap.jsonl:2  {found}")


def test_truncated_texts_are_counted_with_the_longest(folder: Path) -> None:
    (folder / "mixed.txt").write_text("the model\n" * 40 + "the model " * 90 + "\n")
    longest = len(tokenizer_of(folder)("the model " * 90)["input_ids"])
    for grouped in (False, True):
        data = opened(folder, path="mixed.txt", batch_size=2, group_by_length=grouped)
        for _ in range(2):  # batches that are read again count once
            assert f"texts: 1 of 41 truncated to 64 tokens (longest: {longest})" in facts(data)
        assert (data.padding(0, 32).truncated, data.padding(32, 41).truncated) == (0, 1)
    assert "texts: none of 300 truncated (longest: 62)" in facts(opened(folder))


def tokenizer_of(folder: Path) -> Any:
    return import_transformers("").AutoTokenizer.from_pretrained(folder / "tokenizer")


def test_pairs_of_texts_are_tokenized_together_and_truncated_as_the_tokenizer_does(
    folder: Path,
) -> None:
    rows = [{"q": "the model", "d": "a mode of data"}, {"q": "time " * 50, "d": "memory " * 60}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = opened(folder, path="pairs.jsonl", field=["q", "d"], group_by_length=False)
    batch = next(data.batches())
    expected = tokenizer_of(folder)(
        [row["q"] for row in rows], [row["d"] for row in rows],
        padding=True, truncation=True, return_tensors="pt",
    )  # fmt: skip
    for name, tensor in batch.kwargs.items():
        assert torch.equal(tensor, expected[name])
    assert "1 of 2 truncated to 64 tokens (longest: 113)" in facts(data)


def test_a_prompt_is_put_before_every_text(folder: Path) -> None:
    data = opened(folder, prompt="time: ", group_by_length=False)
    assert tokens(data.batches()) == tokenize([f"time: {line}" for line in LINES], folder)
    assert "prompt: 'time: ' before every text" in facts(data)
    assert "unknown prompt 'query'; the tokenizer's folder has no prompts" in text_error(
        folder, prompt_name="query"
    )


def test_half_a_surrogate_pair_is_replaced_and_stated(folder: Path) -> None:
    (folder / "half.jsonl").write_text(
        '{"body": "the model"}\n{"body": "the \\ud83d model"}\n{"body": "\\ud83d\\ude00"}\n'
    )
    data = opened(folder, path="half.jsonl", field="body", group_by_length=False)
    expected = tokenize(["the model", "the \ufffd model", "\U0001f600"], folder)
    assert tokens(data.batches()) == expected
    assert "half a character replaced by U+FFFD in 1, such as half.jsonl:2" in facts(data)


@pytest.mark.parametrize("line", ['{"body": null}', '{"body": 3}', "{}"])
def test_a_row_without_a_text_is_an_error_of_that_sample_only(folder: Path, line: str) -> None:
    (folder / "gap.jsonl").write_text(f'{{"body": "the model"}}\n{line}\n{{"body": "a mode"}}\n')
    data = opened(folder, path="gap.jsonl", field="body", group_by_length=False)
    (batch,) = data.batches()
    assert list(batch.errors) == [1]
    assert "gap.jsonl:2  'body' is " in str(batch.errors[1])
    readable = batch.select([0, 2])
    assert tokens([readable]) == tokenize(["the model", "a mode"], folder)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_text_without_tokens_is_an_error_whatever_its_neighbours(
    folder: Path, batch_size: int
) -> None:
    made = save_tokenizer(folder / "bare")
    import_transformers("").PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, pad_token="[PAD]", model_max_length=64
    ).save_pretrained(folder / "bare")
    backend = json.loads((folder / "bare/tokenizer.json").read_text())
    backend["post_processor"] = None  # adds no tokens, as that of GPT-2
    (folder / "bare/tokenizer.json").write_text(json.dumps(backend))
    (folder / "empty.txt").write_text("the model\n\na mode\n\n")
    for grouped in (False, True):
        data = opened(
            folder, path="empty.txt", tokenizer=str(folder / "bare"), batch_size=batch_size,
            group_by_length=grouped,
        )  # fmt: skip
        batches = list(data.batches())
        found = [str(error) for batch in batches for error in batch.errors.values()]
        assert sorted(text.rpartition("/")[2] for text in found) == [
            "empty.txt:2  the text has no tokens",
            "empty.txt:4  the text has no tokens",
        ]
        assert all(
            (batch.kwargs["attention_mask"].sum(1) > 0).sum() + len(batch.errors) == batch.size
            for batch in batches
        )


def test_texts_are_padded_on_the_side_of_the_config(folder: Path) -> None:
    data = opened(folder, padding_side="left", group_by_length=False)
    assert tokens(data.batches()) == tokenize(LINES, folder)
    for batch in data.batches():
        assert batch.kwargs["attention_mask"][:, -1].all(), "every text ends at the right edge"
    assert "padding: left, token [PAD] (0)" in facts(data)
