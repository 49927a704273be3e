"""One bad row at any place of a table: it is quarantined, or the run stops and can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

import gradrun
from gradrun.core.errors import ConfigError, RunFailed

ROWS, BATCH = 41, 4

BAD = {
    ".csv": {
        "an empty number": ("1,", "column 'b' is empty"),
        "a short row": ("1", "column 'b' is missing"),
        "a text": ("1,x", "column 'b' is 'x', not a number"),
        "an underscore": ("1,12_34", "column 'b' is '12_34', not a number"),
        "a number out of range": ("1,1e400", "column 'b' is '1e400', not a number"),
        "a number beyond float32": ("1,1e39", "the value 1e+39 does not fit in float32"),
        "a thousands separator": ("1,2,000", "3 values, but the header has 2 columns"),
    },
    ".jsonl": {
        "no JSON": ('{"a": 1,', "invalid JSON"),
        "a list": ("[1, 2]", "a line must be one object"),
        "null": ('{"a": 1, "b": null}', "column 'b' is null"),
        "no field": ('{"a": 1}', "column 'b' is missing"),
        "a text": ('{"a": 1, "b": "x"}', "column 'b' is 'x', not a number"),
        "a longer list": ('{"a": 1, "b": [2, 3]}', "3 values for input 'x', but most rows have"),
        "a number out of range": ('{"a": 1, "b": 1e400}', "1e400 is out of range"),
    },
    ".parquet": {"null": (None, "column 'b' is null")},
}
CASES = [(suffix, case) for suffix, cases in BAD.items() for case in cases]


def write_table(path: Path, bad: dict[int, str | None]) -> None:
    """Write rows (i, 2 i), with some rows replaced."""
    if path.suffix == ".parquet":
        b = [None if i in bad else 2.0 * i for i in range(ROWS)]
        pandas.DataFrame({"a": np.arange(float(ROWS)), "b": b}).to_parquet(path)
        return
    form = "{0},{1}" if path.suffix == ".csv" else '{{"a": {0}, "b": {1}}}'
    lines = [bad.get(i) or form.format(i, 2 * i) for i in range(ROWS)]
    path.write_text("\n".join([*["a,b"][path.suffix != ".csv" :], *lines]) + "\n")


def config(folder: Path, suffix: str, **run: Any) -> dict[str, Any]:
    return {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {
            "source": "records",
            "path": str(folder / f"t{suffix}"),
            "inputs": {"x": {"columns": ["a", "b"]}},
            "batch_size": BATCH,
        },
        "run": {"warmup": 0, **run},
        "measure": {"memory": False},
        "output": {"path": str(folder / "out")},
    }


def expected(missing: set[int]) -> np.ndarray:
    rows = np.stack([np.arange(ROWS), 2 * np.arange(ROWS)], axis=1).astype(np.float32)
    rows[sorted(missing)] = np.nan
    return rows


@pytest.mark.parametrize(("suffix", "case"), CASES)
def test_bad_rows_anywhere_are_quarantined_with_file_and_line_and_all_others_are_predicted(
    tmp_path: Path, suffix: str, case: str
) -> None:
    text, words = BAD[suffix][case]
    places = (0, 21, ROWS - 1)
    write_table(tmp_path / f"t{suffix}", dict.fromkeys(places, text))
    result = gradrun.infer(config(tmp_path, suffix, on_error="quarantine"))
    assert (result.predictions, result.quarantined) == (ROWS, 3)
    found = np.load(tmp_path / "out" / "predictions.npy")
    assert np.array_equal(found, expected({*places}), equal_nan=True)
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["sample"] for entry in entries] == [*places]
    for entry in entries:
        line = entry["sample"] + (2 if suffix == ".csv" else 1)
        assert f"t{suffix}:{line}  " in entry["error"]
        assert words in entry["error"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_stopped_run_resumes_after_the_row_is_corrected_and_loses_nothing(
    tmp_path: Path, suffix: str
) -> None:
    text, words = next(iter(BAD[suffix].values()))
    write_table(tmp_path / f"t{suffix}", {21: text})
    message = f"{words}.*; correct the row and resume, or set .*20 of 41"
    with pytest.raises(RunFailed, match=message) as ended:
        gradrun.infer(config(tmp_path, suffix))
    assert ended.value.resumable
    out = tmp_path / "out" / "predictions.npy"
    assert np.array_equal(np.load(out), expected(set())[:20])
    before = out.read_bytes()[128 : 128 + 20 * 8]
    write_table(tmp_path / f"t{suffix}", {})
    result = gradrun.infer(config(tmp_path, suffix), resume=True)
    assert result.resumed_at == 20
    assert np.array_equal(np.load(out), expected(set()))
    assert out.read_bytes()[128 : 128 + 20 * 8] == before


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_stopped_run_resumes_with_quarantine_without_a_change_of_the_data(
    tmp_path: Path, suffix: str
) -> None:
    write_table(tmp_path / f"t{suffix}", {21: next(iter(BAD[suffix].values()))[0]})
    with pytest.raises(RunFailed):
        gradrun.infer(config(tmp_path, suffix))
    result = gradrun.infer(config(tmp_path, suffix, on_error="quarantine"), resume=True)
    assert (result.resumed_at, result.quarantined) == (20, 1)
    found = np.load(tmp_path / "out" / "predictions.npy")
    assert np.array_equal(found, expected({21}), equal_nan=True)


def write_ids(path: Path, last: str, bad: str) -> None:
    """Write rows with the ids 0, 1, ... and a last one, and some text in row 21."""
    rows = [f"{i},{i},{bad if i == 21 else 2 * i}" for i in range(ROWS - 1)]
    path.write_text("\n".join(["id,a,b", *rows, f"{last},1,2"]) + "\n")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_resume_that_would_give_the_ids_another_type_is_refused(
    tmp_path: Path, form: str
) -> None:
    keys = config(tmp_path, ".csv")
    keys["data"]["id"] = "id"
    keys["output"]["format"] = form
    for before, after, change in (
        ("40", "z40", "from whole numbers to text"),
        ("z40", "40", "from text to whole numbers"),
    ):
        write_ids(tmp_path / "t.csv", before, bad="")
        with pytest.raises(RunFailed, match="is empty"):
            gradrun.infer(keys, overwrite=True)
        write_ids(tmp_path / "t.csv", after, bad="42")
        with pytest.raises(ConfigError, match=f"the type of the ids changed {change}"):
            gradrun.infer(keys, resume=True)
        write_ids(tmp_path / "t.csv", before, bad="42")
        gradrun.infer(keys, resume=True)
        if form == "jsonl":
            lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
            found = [json.loads(line)["id"] for line in lines]
        else:
            found = pandas.read_parquet(tmp_path / "out" / "predictions")["id"].tolist()
        kind = int if before == "40" else str
        assert found == [*map(kind, range(40)), kind(before)]


@pytest.mark.parametrize("form", ["npy", "csv"])
def test_a_resume_with_another_id_is_accepted_where_all_ids_are_text(
    tmp_path: Path, form: str
) -> None:
    keys = config(tmp_path, ".csv")
    keys["data"]["id"] = "id"
    keys["output"]["format"] = form
    write_ids(tmp_path / "t.csv", "40", bad="")
    with pytest.raises(RunFailed, match="is empty"):
        gradrun.infer(keys)
    write_ids(tmp_path / "t.csv", "z40", bad="42")
    assert gradrun.infer(keys, resume=True).resumed_at == 20
    name = "ids.txt" if form == "npy" else "predictions.csv"
    lines = (tmp_path / "out" / name).read_text().splitlines()[form == "csv" :]
    assert [line.split(",")[0] for line in lines] == [*map(str, range(40)), "z40"]


@pytest.mark.parametrize("change", ["a predicted row", "a row less", "a quarantined row"])
def test_a_resume_with_other_predicted_rows_is_refused_and_changes_no_file(
    tmp_path: Path, change: str
) -> None:
    path, run = tmp_path / "t.csv", {}
    write_table(path, {21: "3,"})
    if change == "a quarantined row":
        run = {"on_error": "quarantine"}
        gradrun.infer(config(tmp_path, ".csv", **run))
    else:
        with pytest.raises(RunFailed):
            gradrun.infer(config(tmp_path, ".csv"))
    write_table(path, {3: "9,9"} if change == "a predicted row" else {})
    if change == "a row less":
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    words = {
        "a predicted row": "the data changed in the first 20 samples",
        "a row less": r"number of samples changed from 41 to 40 \(to skip a row, keep it",
        "a quarantined row": "first 41 samples, which are predicted or quarantined already",
    }
    with pytest.raises(ConfigError, match=words[change]):
        gradrun.infer(config(tmp_path, ".csv", **run), resume=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_the_same_data_with_another_time_can_be_resumed(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", {21: "3,"})
    with pytest.raises(RunFailed):
        gradrun.infer(config(tmp_path, ".csv"))
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").unlink()
    (tmp_path / "t.csv").write_text(text)
    result = gradrun.infer(config(tmp_path, ".csv", on_error="quarantine"), resume=True)
    assert result.resumed_at == 20


def test_a_corrected_parquet_file_is_refused_with_the_reason_and_quarantine_continues(
    tmp_path: Path,
) -> None:
    """Its rows have no checksums, so the message does not advise to correct the row."""
    path = tmp_path / "t.parquet"
    write_table(path, {21: None})
    bad = path.read_bytes()
    with pytest.raises(RunFailed, match=r"null; set run\.on_error: quarantine"):
        gradrun.infer(config(tmp_path, ".parquet"))
    write_table(path, {})
    with pytest.raises(ConfigError, match=r"cannot resume .*t\.parquet changed"):
        gradrun.infer(config(tmp_path, ".parquet"), resume=True)
    path.write_bytes(bad)
    result = gradrun.infer(config(tmp_path, ".parquet", on_error="quarantine"), resume=True)
    assert (result.resumed_at, result.quarantined) == (20, 1)
    found = np.load(tmp_path / "out" / "predictions.npy")
    assert np.array_equal(found, expected({21}), equal_nan=True)


def test_metrics_leave_out_quarantined_rows(tmp_path: Path) -> None:
    lines = [f'{{"a": {i}, "b": 0, "y": {i + 1}}}' for i in range(ROWS)]
    lines[5], lines[7] = '{"a": 1,', '{"a": "x", "b": 0, "y": 8}'
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    keys = config(tmp_path, ".jsonl", on_error="quarantine")
    keys["data"] |= {"labels": "y", "inputs": {"x": {"columns": ["a"]}}}
    (metric,) = gradrun.infer(keys | {"metrics": ["mse"]}).metrics
    assert (metric.value, metric.samples) == (1.0, ROWS - 2)
