"""Texts are batched by length, and predictions are in the order of the input."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import gradrun
from gradrun.core.errors import RunFailed
from gradrun.core.optional import import_transformers
from gradrun.data.text import CHUNK_BATCHES
from gradrun.inference import timed_loop
from gradrun.output import checkpointer, journal
from gradrun.output.formats import sharded_writer
from gradrun.results.result import RunResult
from tests.conftest import Command
from tests.support.forked import ForkedCommand
from tests.support.small_models import WIDTH, save_bert, save_tokenizer, sentences, skewed

BATCH = 4
WINDOW = BATCH * CHUNK_BATCHES
SAMPLES = 3 * WINDOW + 10

NET = '''
import os
import torch
from gradrun.inference import timed_loop
from gradrun.data import text
from gradrun.output import checkpointer
from gradrun.output.formats import sharded_writer
from pathlib import Path
from torch import nn

if "EAGER" in os.environ:  # commit as often as possible
    text.CHUNK_TEXTS = 0
    sharded_writer.SHARD_BYTES = 0
    checkpointer.SECONDS, checkpointer._TIME_SHARE, timed_loop._CALLBACK_NS = 0, 1e9, 0
HERE = Path(__file__).parent
BAD, FITS, KILL = {bad}, {fits}, {kill}
calls = 0


class Net(nn.Module):
    """Returns the sum of the tokens of each text."""

    def forward(self, input_ids, attention_mask):
        global calls
        calls += 1
        if KILL and calls == KILL and not (HERE / "killed").exists():
            (HERE / "killed").touch()
            os.kill(os.getpid(), 9)
        sums = (input_ids * attention_mask).sum(1)
        if torch.isin(sums, torch.tensor(BAD)).any() and not (HERE / "mended").exists():
            raise ValueError("a bad text")
        if len(sums) > FITS:
            torch.empty(len(sums), 2**45)
        return sums.double()
'''


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradrun.data.text.CHUNK_TEXTS", 0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def sums(tokenizer: Path, tmp_path: Path) -> list[int]:
    """The output of the network for each line of t.txt."""
    lines = [f"{text} {'z' * (i // 26 % 8)} {i}" for i, text in enumerate(skewed(SAMPLES))]
    (tmp_path / "t.txt").write_text("\n".join(lines) + "\n")
    made = import_transformers("").AutoTokenizer.from_pretrained(tokenizer)
    return [sum(made(line, truncation=True)["input_ids"]) for line in lines]


Config = Callable[..., dict[str, Any]]


@pytest.fixture
def config(tokenizer: Path, tmp_path: Path) -> Config:
    def make(
        bad: list[int] | None = None,
        fits: int = 99,
        kill: int = 0,
        batch_tokens: int | None = None,
        **output: Any,
    ) -> dict[str, Any]:
        net = tmp_path / "net.py"
        net.write_text(NET.format(bad=bad or [-1], fits=fits, kill=kill))
        return {
            "model": {"source": "python", "target": f"{net}:Net"},
            "data": {
                "source": "text",
                "path": str(tmp_path / "t.txt"),
                "tokenizer": str(tokenizer),
                "inputs": ["input_ids", "attention_mask"],
                "batch_size": BATCH,
                "batch_tokens": batch_tokens,
            },
            "run": {"warmup": 0},
            "measure": {"memory": False},
            "output": {"path": str(tmp_path / "out"), **output},
        }

    return make


def infer(config: dict[str, Any], **settings: Any) -> RunResult:
    return gradrun.infer(config, trust_code=True, **settings)


def found(tmp_path: Path, out: str = "out") -> np.ndarray[Any, Any]:
    return np.load(tmp_path / out / "predictions.npy")


# --- embeddings --------------------------------------------------------------------------------


def embeddings(folder: Path, lines: list[str], batch: int) -> torch.Tensor:
    """Compute embeddings as documented by the library, in the order of the lines."""
    auto = import_transformers("")
    tokenizer = auto.AutoTokenizer.from_pretrained(folder)
    model = auto.AutoModel.from_pretrained(folder).eval()
    pooled = []
    for first in range(0, len(lines), batch):
        given = tokenizer(
            lines[first : first + batch], padding=True, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(-1).float()
        pooled.append((states * mask).sum(1) / mask.sum(1))
    return normalize(torch.cat(pooled))


@pytest.mark.parametrize(("grouped", "limit"), [(True, None), (False, None), (True, 200)])
def test_embeddings_of_real_sentences_equal_those_of_a_plain_loop(
    tmp_path: Path, grouped: bool, limit: int | None
) -> None:
    lines = sentences(200)
    (tmp_path / "t.txt").write_text("\n".join(lines) + "\n")
    save_bert(tmp_path / "bert")
    result = gradrun.infer(
        {
            "model": {"source": "huggingface", "path": str(tmp_path / "bert")},
            "data": {
                "source": "text",
                "path": str(tmp_path / "t.txt"),
                "batch_size": 8,
                "group_by_length": grouped,
                "batch_tokens": limit,
            },
            "output": {
                "path": str(tmp_path / "out"),
                "select": "last_hidden_state",
                "transform": ["mean_pool", "normalize"],
            },
        }
    )
    ours, theirs = torch.from_numpy(found(tmp_path)), embeddings(tmp_path / "bert", lines, 8)
    assert ours.shape == (200, WIDTH)
    assert (ours - theirs).abs().max() <= 1e-6
    padding = result.measurements[0].padding
    assert padding is not None
    assert (padding.run < padding.ungrouped) == grouped


# --- order -------------------------------------------------------------------------------------


TOKENS = 40
"""Most tokens of a batch: fewer than BATCH texts of most lengths have."""


@pytest.mark.parametrize(
    ("form", "limit"), [("npy", None), ("npy", TOKENS), ("jsonl", None), ("safetensors", None)]
)
def test_predictions_are_in_the_order_of_the_input(
    config: Config, tmp_path: Path, sums: list[int], form: str, limit: int | None
) -> None:
    assert len(set(sums)) > SAMPLES // 2, "most texts have different sums"
    result = infer(config(format=form, batch_tokens=limit))
    assert result.predictions == SAMPLES
    sizes = result.measurements[0].batch_sizes
    assert set(sizes) == ({BATCH, SAMPLES % BATCH} if limit is None else {1, 2, 3, 4})
    if form == "npy":
        assert found(tmp_path).tolist() == sums
    elif form == "jsonl":
        lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert rows == [{"id": i, "prediction": value} for i, value in enumerate(sums)]
    padding = result.measurements[0].padding
    assert padding is not None
    assert padding.run < padding.ungrouped


def test_rows_as_long_as_their_batch_can_only_be_written_as_jsonl(
    tmp_path: Path, cli: Command
) -> None:
    lines = skewed(100)
    (tmp_path / "t.txt").write_text("\n".join(lines) + "\n")
    save_bert(tmp_path / "bert")
    (tmp_path / "c.yaml").write_text(
        "model: {source: huggingface, path: bert, dtype: float64}\n"
        "data: {source: text, path: t.txt, batch_size: 4}\n"
        "output: {path: out, select: last_hidden_state, format: jsonl}\n"
    )
    assert cli("infer", tmp_path / "c.yaml").code == 0
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    assert [row["id"] for row in rows] == list(range(100))
    auto = import_transformers("")
    tokenizer = auto.AutoTokenizer.from_pretrained(tmp_path / "bert")
    model = auto.AutoModel.from_pretrained(tmp_path / "bert", dtype=torch.float64).eval()
    for row, line in zip(rows, lines, strict=True):
        with torch.inference_mode():
            states = model(**tokenizer(line, return_tensors="pt")).last_hidden_state[0]
        got = torch.tensor(row["prediction"], dtype=torch.float64)[: len(states)]
        assert torch.allclose(got, states, atol=1e-12)
    answer = cli("infer", tmp_path / "c.yaml", "--set", "output.format=npy", "--overwrite")
    assert answer.code != 0
    assert "format: jsonl for rows of any shape" in answer.err
    assert "mean_pool" in answer.err


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, TOKENS])
def test_a_bad_text_is_reported_by_its_position_in_the_input(
    config: Config, tmp_path: Path, sums: list[int], limit: int | None
) -> None:
    bad = [i for i in (70, 71, 150) if sums.count(sums[i]) == 1]
    assert bad
    asked = config([sums[i] for i in bad], batch_tokens=limit) | {
        "run": {"warmup": 0, "on_error": "quarantine"}
    }
    result = infer(asked)
    assert result.predictions == SAMPLES
    lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert sorted(line["sample"] for line in entries) == bad
    assert all(line["sample"] == line["id"] for line in entries)
    values = found(tmp_path)
    assert np.isnan(values).nonzero()[0].tolist() == bad
    good = [i for i in range(SAMPLES) if i not in bad]
    assert values[good].tolist() == [sums[i] for i in good]


@pytest.mark.parametrize("limit", [None, TOKENS])
def test_a_batch_that_does_not_fit_in_memory_is_split_and_stays_in_order(
    config: Config, tmp_path: Path, sums: list[int], limit: int | None
) -> None:
    result = infer(config(fits=3, batch_tokens=limit))
    assert found(tmp_path).tolist() == sums
    assert "out_of_memory" in {warning.code for warning in result.warnings}


@pytest.mark.parametrize("limit", [None, TOKENS])
def test_a_stopped_run_has_complete_chunks_and_a_resume_writes_the_same_bytes(
    config: Config, tmp_path: Path, sums: list[int], limit: int | None
) -> None:
    infer(config(batch_tokens=limit))
    whole = (tmp_path / "out/predictions.npy").read_bytes()
    at = next(i for i in range(2 * WINDOW + 5, SAMPLES) if sums.count(sums[i]) == 1)
    asked = config([sums[at]], batch_tokens=limit)
    with pytest.raises(RunFailed, match="a bad text") as caught:
        infer(asked, overwrite=True)
    assert f"{2 * WINDOW} of {SAMPLES} predictions are saved" in str(caught.value)
    assert found(tmp_path).tolist() == sums[: 2 * WINDOW]
    measured = caught.value.result.measurements[0]
    assert measured.samples == 2 * WINDOW
    (tmp_path / "mended").touch()
    result = infer(asked, resume=True)
    assert result.resumed_at == 2 * WINDOW
    assert (tmp_path / "out/predictions.npy").read_bytes() == whole
    padding = result.measurements[0].padding
    assert padding is not None
    assert padding.tokens < sum(map(bool, sums)) * 64


@pytest.mark.parametrize("form", ["jsonl", "safetensors"])
def test_a_killed_and_resumed_run_writes_the_same_bytes(
    config: Config,
    tmp_path: Path,
    sums: list[int],
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharded_writer, "SHARD_BYTES", 0)
    infer(config(format=form))
    (tmp_path / "out").rename(tmp_path / "whole")
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config(format=form, kill=CHUNK_BATCHES * 2 + 9)))
    killed = ForkedCommand("infer", path, "--trust-code", cwd=tmp_path, env={"EAGER": "1"})
    assert killed.wait() == -signal.SIGKILL
    state = journal.read(tmp_path / "out/journal.jsonl")
    assert state.committed == 2 * WINDOW
    infer(json.loads(path.read_text()), resume=True)
    for file in (tmp_path / "whole").glob("predictions*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_commits_end_with_chunks(
    config: Config, tmp_path: Path, sums: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointer, "SECONDS", 0)
    monkeypatch.setattr(checkpointer, "_TIME_SHARE", 1e9)
    monkeypatch.setattr(timed_loop, "_CALLBACK_NS", 0)
    infer(config())
    state = journal.read(tmp_path / "out/journal.jsonl")
    assert len(state.ranges) > 2
    assert {commit.stop % WINDOW for commit in state.ranges[:-1]} == {0}
    assert state.complete
