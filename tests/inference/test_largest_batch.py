"""Memory is that of the largest batch of a run, in results, limits and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gradrun
from gradrun.comparison import benchmark
from gradrun.comparison.protocol import Job, Marker, VariantTask
from gradrun.config.load import load_config
from gradrun.inference.meters.cpu_memory import forward_memory
from gradrun.report.tables import of_measurements
from gradrun.results.result import InferResult, Memory
from tests.support import small_models
from tests.support.workers import in_process_workers, keep_gc_unfrozen

SHORT, LONG, SIZE = 24, 8, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and texts of 3 tokens before texts of 62."""
    folder = tmp_path_factory.mktemp("ragged")
    small_models.save_tokenizer(folder / "bert")
    small_models.bert().save_pretrained(folder / "bert")
    texts = ["model"] * SHORT + [" ".join(["data"] * 60)] * LONG
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    return folder


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"source": "huggingface", "path": str(folder / "bert")},
        "data": {
            "source": "text",
            "path": str(folder / "texts.txt"),
            "batch_size": SIZE,
            "group_by_length": False,
        },
        "run": {"threads": 1, "warmup": 0},
        "output": {"path": str(folder / "run"), "select": ["pooler_output"]},
        **changes,
    }


def peak(model: Any, tokens: int) -> int:
    """The peak of a batch of texts with a number of tokens, measured without a run."""
    inputs = {
        "input_ids": torch.full((SIZE, tokens), 5),
        "token_type_ids": torch.zeros((SIZE, tokens), dtype=torch.int64),
        "attention_mask": torch.ones((SIZE, tokens), dtype=torch.int64),
    }
    with torch.inference_mode():
        model(**inputs)
        return forward_memory(lambda: model(**inputs)).peak


@pytest.fixture(scope="module")
def result(folder: Path) -> InferResult:
    return gradrun.infer(config(folder), overwrite=True)


def memory_of(result: Any) -> Memory:
    memory: Memory = result.measurements[0].memory
    return memory


def test_the_largest_and_the_first_batch_are_both_measured(
    folder: Path, result: InferResult
) -> None:
    model = small_models.bert()
    memory, first = memory_of(result), memory_of(result).first_batch
    assert first is not None
    assert (memory.batch, memory.shape, first.shape) == (3, (SIZE, 62), (SIZE, 3))
    assert memory.inputs == 3 * SIZE * 62 * 8, "three inputs of int64"
    assert first.inputs == 3 * SIZE * 3 * 8
    assert memory.forward_peak == pytest.approx(peak(model, 62), rel=0.02)
    assert first.forward_peak == pytest.approx(peak(model, 3), rel=0.1)
    assert memory.forward_peak > 5 * (first.forward_peak or 0)


def test_the_report_names_the_batch(result: InferResult) -> None:
    (table,) = [table for table in of_measurements(result) if table.title == "Peak memory"]
    rows = {str(name): " ".join(map(str, cells)) for name, *cells in table.rows}
    assert "largest batch (number 4: 8 x 62)" in rows["inputs"]
    assert "8 x 3" in rows["first batch"]


def test_batches_of_one_size_are_measured_once(folder: Path, tmp_path: Path) -> None:
    data = {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 20, "batch_size": 8}
    model = {"source": "zoo", "name": "mlp", "args": {"width": 4, "depth": 1}}
    written = config(folder, model=model, data=data, output={"path": str(tmp_path / "run")})
    memory = memory_of(gradrun.infer(written))
    assert (memory.batch, memory.shape, memory.first_batch) == (0, (8, 4), None)


def test_a_limit_of_a_check_holds_for_the_largest_batch(folder: Path, result: InferResult) -> None:
    memory = memory_of(result)
    assert memory.first_batch
    between = ((memory.forward_peak or 0) + (memory.first_batch.forward_peak or 0)) // 2
    with in_process_workers():
        checked = gradrun.check(
            config(folder, check={"limits": {"forward_peak": between}}, measure={"processes": 2})
        )
    (outcome,) = [outcome for outcome in checked.outcomes if outcome.check == "forward peak"]
    assert outcome.status == "fail"
    assert {m.memory.forward_peak for m in checked.measurements if m.mode != "grad"} == {
        memory.forward_peak
    }


def test_a_comparison_measures_the_largest_batch_that_it_times(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_gc_unfrozen(monkeypatch)
    (tmp_path / "marker").write_bytes(bytes(Marker.SIZE))
    variant = load_config(config(folder)).config.model_dump(mode="json")
    job = Job(
        kind="time",
        variants=(VariantTask(name="inference_mode", config=variant),),
        seed=0,
        seconds=0.0,
        marker=str(tmp_path / "marker"),
    )
    for number, expected in ((None, 3), (0, 0), (3, 3), (99, 3)):
        (measured,) = benchmark.run_task(job.replace(memory_batch=number)).measurements
        assert measured.memory.batch == expected
        assert measured.memory.shape == ((SIZE, 62) if expected else (SIZE, 3))
