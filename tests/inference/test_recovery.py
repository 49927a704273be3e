"""Recovery from failed batches: bad samples, NaN outputs and out-of-memory errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file

import gradrun
from gradrun.core.errors import ConfigError, RunFailed
from gradrun.output.formats import FORMATS
from gradrun.output.missing import MISSING_CLASS
from gradrun.results.result import RunResult
from tests.conftest import Command

MODEL = '''
import torch
from torch import nn

BAD = {BAD}


class Net(nn.Module):
    """Doubles the input; `kind` selects the failure for samples whose number is in BAD."""

    def __init__(self, kind="raise", fits=5):
        super().__init__()
        self.kind, self.fits = kind, fits

    def forward(self, x):
        bad = torch.isin(x[:, 0], torch.tensor(BAD))
        if self.kind == "writes":
            x.mul_(1.0)
            x += 0.0
            if bad.any():
                x.fill_(-1.0)
        if self.kind in ("raise", "writes") and bad.any():
            raise ValueError(f"sample {{x[bad][0, 0]:.0f}} is bad")
        if self.kind == "odd" and (bad & (x[:, 0] % 2 == 1)).any():
            raise ValueError("a bad sample with an odd number")
        if self.kind == "memory" and len(x) > self.fits:
            torch.empty(len(x), 2**45)
        y = 2 * x
        if self.kind in ("nan", "odd"):
            y = y.masked_fill(bad[:, None], float("nan"))
        if self.kind == "infinite":
            y = y.masked_fill(bad[:, None], float("-inf"))
        return y.long() if self.kind == "whole numbers" else y
'''
SAMPLES, BATCH = 50, 8
BAD = [13, 14, 29]


@pytest.fixture
def infer(tmp_path: Path) -> Any:
    np.save(tmp_path / "x.npy", np.arange(SAMPLES, dtype=np.float32).repeat(2).reshape(-1, 2))

    def run(
        kind: str = "raise", bad: list[int] | None = None, fits: int = 5, **changes: Any
    ) -> RunResult:
        file = tmp_path / "net.py"
        file.write_text(MODEL.format(BAD=[float(i) for i in (BAD if bad is None else bad)]))
        given: dict[str, Any] = {
            "model": {
                "source": "python",
                "target": f"{file}:Net",
                "args": {"kind": kind, "fits": fits},
            },
            "data": {"source": "arrays", "path": str(tmp_path / "x.npy"), "batch_size": BATCH},
            "output": {"path": str(tmp_path / "run")},
        }
        return gradrun.infer(given, trust_code=True, overwrite=True, **changes)

    return run


def rows(tmp_path: Path) -> np.ndarray[Any, Any]:
    return np.load(tmp_path / "run" / "predictions.npy")


def quarantined(tmp_path: Path) -> list[dict[str, Any]]:
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def warning(result: RunResult, code: str) -> str:
    (text,) = [w.text for w in result.warnings if w.code == code]
    return text


QUARANTINE = {"run.on_error": "quarantine"}


# --- bad samples -------------------------------------------------------------------------------


def test_by_default_a_bad_sample_stops_the_run_and_earlier_samples_stay(
    infer: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        RunFailed, match=r"starts at sample 8, failed: ValueError: .* \(.*net\.py:\d+\)"
    ):
        infer()
    assert len(rows(tmp_path)) == 8
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


@pytest.mark.parametrize("kind", ["raise", "writes"])
def test_bad_samples_are_quarantined_and_the_others_predicted(
    infer: Any, tmp_path: Path, kind: str
) -> None:
    result = infer(kind, **QUARANTINE)
    found = rows(tmp_path)
    good = [i for i in range(SAMPLES) if i not in BAD]
    assert found[good, 0].tolist() == [2.0 * i for i in good]
    assert np.isnan(found[BAD]).all()
    lines = quarantined(tmp_path)
    assert [(line["sample"], line["id"]) for line in lines] == [(i, i) for i in BAD]
    assert all(line["error"].startswith("ValueError: sample") for line in lines)
    assert all("in forward" in line["traceback"] for line in lines)
    assert all(line["traceback"].count("Traceback") == 1 for line in lines)
    assert result.predictions == SAMPLES
    assert warning(result, "quarantined").startswith("3 samples could not be predicted")
    assert "nonfinite" not in {w.code for w in result.warnings}


@pytest.mark.parametrize("bad", [[0], [7], [0, 1, 2, 3, 4, 5, 6], [49], list(range(8, 16))])
def test_bad_samples_may_be_anywhere_and_fill_a_batch(
    infer: Any, tmp_path: Path, bad: list[int]
) -> None:
    infer(bad=bad, **QUARANTINE)
    assert [line["sample"] for line in quarantined(tmp_path)] == bad
    assert np.isnan(rows(tmp_path)[:, 0]).nonzero()[0].tolist() == bad


def test_nonfinite_outputs_in_a_batch_with_a_bad_sample_are_quarantined(
    infer: Any, tmp_path: Path
) -> None:
    infer("odd", **QUARANTINE, **{"run.on_nonfinite": "quarantine"})
    errors = {line["sample"]: line["error"].partition(":")[0] for line in quarantined(tmp_path)}
    nonfinite = "the output of sample 14 contains NaN or infinity"
    assert errors == {13: "ValueError", 14: nonfinite, 29: "ValueError"}
    good = [i for i in range(SAMPLES) if i not in BAD]
    assert rows(tmp_path)[good, 0].tolist() == [2.0 * i for i in good]
    with pytest.raises(RunFailed, match="sample 14 contains NaN"):
        infer("odd", **QUARANTINE, **{"run.on_nonfinite": "stop"})
    assert len(rows(tmp_path)) == 8


WIDTHS = """
import torch


class Net(torch.nn.Module):
    def forward(self, x):
        if (x[:, 0] == 13).any():
            raise ValueError("bad")
        return x[:, :2] if (x[:, 0] == 8).any() else x[:, :1]
"""


@pytest.mark.parametrize("form", ["jsonl", "npy"])
def test_the_parts_of_a_failed_batch_may_differ_in_the_shape_of_their_rows(
    tmp_path: Path, form: str
) -> None:
    (tmp_path / "net.py").write_text(WIDTHS)
    np.save(tmp_path / "x.npy", np.arange(24, dtype=np.float32).repeat(2).reshape(-1, 2))
    config = {
        "model": {"source": "python", "target": f"{tmp_path}/net.py:Net"},
        "data": {"source": "arrays", "path": f"{tmp_path}/x.npy", "batch_size": 8},
        "run": {"on_error": "quarantine"},
        "output": {"path": f"{tmp_path}/run", "format": form},
    }
    if form == "npy":
        with pytest.raises(RunFailed, match=r"rows of shape \[1\], .* has values .* format: jsonl"):
            gradrun.infer(config, trust_code=True)
        assert rows(tmp_path)[:, 0].tolist() == [*range(8)]
        return
    gradrun.infer(config, trust_code=True)
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    # 8 to 15 are divided until 13 is alone: 8 to 11, 12, 13, 14 to 15.
    widths = {8: 2, 9: 2, 10: 2, 11: 2}
    right = [[float(i)] * widths.get(i, 1) if i != 13 else None for i in range(24)]
    assert [json.loads(line)["prediction"] for line in lines] == right


def test_a_first_batch_of_bad_samples_is_an_error(infer: Any) -> None:
    with pytest.raises(ConfigError, match="the model failed on the input"):
        infer(bad=list(range(8)), **QUARANTINE)


@pytest.mark.parametrize("form", ["jsonl", "safetensors"])
def test_every_format_marks_a_bad_sample_as_missing(infer: Any, tmp_path: Path, form: str) -> None:
    infer(**QUARANTINE, **{"output.format": form})
    if form == "jsonl":
        lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert [line["id"] for line in found if line["prediction"] is None] == BAD
        assert found[12]["prediction"] == [24.0, 24.0]
    else:
        found = load_file(tmp_path / "run" / "predictions-00000.safetensors")["prediction"]
        assert found.isnan().all(1).nonzero().flatten().tolist() == BAD


def test_the_lowest_integer_marks_a_missing_class(infer: Any, tmp_path: Path) -> None:
    infer(**QUARANTINE, output={"path": str(tmp_path / "run"), "transform": "argmax"})
    found = rows(tmp_path)
    assert found[BAD].tolist() == [np.iinfo(np.int64).min] * 3


@pytest.mark.parametrize("transform", ["argmax", "topk"])
def test_parquet_has_a_null_for_a_missing_class(infer: Any, tmp_path: Path, transform: str) -> None:
    output = {"path": str(tmp_path / "run"), "transform": transform, "format": "parquet"}
    infer(**QUARANTINE, output=output | ({"k": 2} if transform == "topk" else {}))
    name = {"argmax": "prediction", "topk": "indices"}[transform]
    table = pandas.read_parquet(tmp_path / "run" / "predictions")
    values = np.array(table[name].tolist(), dtype=float).reshape(SAMPLES, -1)
    assert np.isnan(values).all(1).nonzero()[0].tolist() == BAD
    ((_, read),) = FORMATS["parquet"].read(tmp_path / "run")
    assert read[name].dtype == np.int64
    missing = (read[name] == MISSING_CLASS).reshape(SAMPLES, -1).all(1)
    assert missing.nonzero()[0].tolist() == BAD
    assert gradrun.verify(tmp_path / "run").complete


def test_more_bad_samples_than_max_errors_stop_the_run(infer: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"3 samples failed, more than run\.max_errors allows"):
        infer(**QUARANTINE, **{"run.max_errors": 2})
    assert len(rows(tmp_path)) == 24
    saved = RunResult.load(tmp_path / "run")
    assert (saved.predictions, saved.quarantined) == (24, 2), "the batch with sample 29 is missing"
    infer(**QUARANTINE, **{"run.max_errors": 3})
    assert RunResult.load(tmp_path / "run").quarantined == 3


def test_recovered_batches_are_not_timed(infer: Any) -> None:
    (measured,) = infer(**QUARANTINE).measurements
    assert measured.batch_sizes == (8, 8, 8, 8, 2)
    assert len(measured.batch_seconds) == 5


def test_a_resume_removes_samples_quarantined_after_the_last_commit(
    infer: Any, tmp_path: Path
) -> None:
    """Samples 13 and 14 are committed at the first stop; 29 fails in the second run."""
    with pytest.raises(RunFailed):
        infer(**QUARANTINE, **{"run.max_errors": 2})
    assert len(quarantined(tmp_path)) == 3
    config = json.loads((tmp_path / "run" / "result.json").read_text())["config"]
    with pytest.raises(RunFailed, match=r"more than run\.max_errors"):
        gradrun.infer(config, trust_code=True, resume=True)
    assert [line["sample"] for line in quarantined(tmp_path)] == BAD
    assert len(rows(tmp_path)) == 24


# --- NaN and infinity --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "infinite"])
@pytest.mark.parametrize("form", ["npy", "jsonl", "safetensors"])
def test_nonfinite_predictions_are_counted_and_written(
    infer: Any, tmp_path: Path, kind: str, form: str
) -> None:
    result = infer(kind, **{"output.format": form})
    assert warning(result, "nonfinite").startswith("3 predictions with NaN or infinity")
    if form == "npy":
        assert (~np.isfinite(rows(tmp_path)[:, 0])).nonzero()[0].tolist() == BAD


def test_nonfinite_predictions_can_be_quarantined(infer: Any, tmp_path: Path) -> None:
    result = infer("infinite", **{"run.on_nonfinite": "quarantine"})
    assert [line["sample"] for line in quarantined(tmp_path)] == BAD
    assert np.isnan(rows(tmp_path)[BAD]).all()
    assert rows(tmp_path)[12].tolist() == [24.0, 24.0]
    assert "nonfinite" not in {w.code for w in result.warnings}
    assert sum(result.measurements[0].batch_sizes) == SAMPLES, "the forward succeeded and was timed"


def test_nonfinite_predictions_can_stop_the_run(infer: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="the output of sample 13 contains NaN or infinity"):
        infer("nan", **{"run.on_nonfinite": "stop"})
    assert len(rows(tmp_path)) == 8


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fits", [5, 4, 1, 7])
def test_batches_that_do_not_fit_in_memory_are_split_in_order(
    infer: Any, tmp_path: Path, fits: int
) -> None:
    result = infer("memory", fits=fits)
    assert rows(tmp_path)[:, 0].tolist() == [2.0 * i for i in range(SAMPLES)]
    (measured,) = result.measurements
    assert measured.batch_limit is not None
    assert measured.batch_limit <= fits
    assert max(measured.batch_sizes) == measured.batch_limit
    assert "out of memory at sample 0" in warning(result, "out_of_memory")


def test_a_later_batch_that_does_not_fit_in_memory_is_split(infer: Any, tmp_path: Path) -> None:
    """The first batches fit; from sample 24 on the model fails for more than 5 samples."""
    text = (
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n"
        "    calls = 0\n"
        "    def __init__(self, kind, fits):\n        super().__init__()\n"
        "    def forward(self, x):\n"
        "        if x[:, 0].max() >= 24 and len(x) > 5:\n"
        "            torch.empty(len(x), 2**45)\n"
        "        return 2 * x\n"
    )
    (tmp_path / "late.py").write_text(text)
    target = {"model": {"target": f"{tmp_path / 'late.py'}:Net"}}
    result = infer(**target)
    assert rows(tmp_path)[:, 0].tolist() == [2.0 * i for i in range(SAMPLES)]
    assert result.measurements[0].batch_sizes == (8, 8, 8, *(4,) * 4, 2)
    assert "at sample 24" in warning(result, "out_of_memory")


def test_a_sample_that_does_not_fit_in_memory_stops_the_run(infer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"torch requested .*iB; .*iB of host memory available"):
        infer("memory", fits=0)


def test_the_command_reports_split_batches_and_succeeds(
    cli: Command, infer: Any, tmp_path: Path
) -> None:
    result = infer("memory", fits=4)
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(result.config))
    answer = cli("infer", file, "--overwrite", "--trust-code")
    assert answer.code == 0, answer.text
    assert "reduced after an out-of-memory error" in answer.out
    assert "50 predictions" in answer.out


def test_config_errors_are_never_quarantined(infer: Any) -> None:
    """An output that a transform cannot handle is an error of the config, not of a sample."""
    with pytest.raises(ConfigError, match="argmax"):
        infer(bad=[], **QUARANTINE, output={"path": "/tmp", "transform": "argmax", "dim": 5})


def test_the_gradient_mode_is_restored_after_a_recovery(infer: Any) -> None:
    infer(**QUARANTINE)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
