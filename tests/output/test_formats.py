"""Each writer stores all rows in order, and leaves readable files whenever it is closed."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gradrun.config.output import OutputSection
from gradrun.output.class_labels import DEFAULT_OUTPUT
from gradrun.output.columns import ValueColumn
from gradrun.output.formats import (
    FORMATS,
    PredictionWriter,
    npy,
    open_writer,
    sharded_writer,
    text_writer,
)
from gradrun.output.journal import CommittedRange, JournalHeader, JournalState
from gradrun.output.missing import MISSING_CLASS
from gradrun.output.transforms import Outputs
from gradrun.output.verification import damaged_ranges
from gradrun.results.result import DamagedRange

SAMPLES, BATCH = 23, 5

TABLES = [form for form in FORMATS if form != "files"]
"""Formats with one table; tests/integration/test_values.py tests one file per sample."""


def new_writer(folder: Path, form: str, samples: int | None = SAMPLES) -> PredictionWriter:
    folder.mkdir(exist_ok=True)
    return open_writer(OutputSection(path=folder, format=form), samples)


def fill(
    writer: PredictionWriter, rows: Outputs, samples: int = SAMPLES, opened: int = BATCH
) -> None:
    """Write the first `samples` rows of every output in batches, and close."""
    writer.open({name: tensor[:opened] for name, tensor in rows.items()})
    for start in range(0, samples, BATCH):
        ids = range(start, min(start + BATCH, samples))
        writer.write({name: tensor[start : ids.stop] for name, tensor in rows.items()}, ids)
    writer.close()


def stored(folder: Path, form: str, name: str = DEFAULT_OUTPUT) -> torch.Tensor:
    if form == "npy":
        return torch.from_numpy(np.load(folder / file_name(name)))
    if form == "safetensors":
        parts = sorted(folder.glob("predictions-*.safetensors"))
        return torch.cat([load_file(part)[name] for part in parts])
    if form == "csv":
        return table(folder, name)
    if form == "parquet":
        chunks = [rows[name] for _, rows in FORMATS["parquet"].read(folder)]
        return torch.from_numpy(np.concatenate(chunks))
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)[name] for line in lines])


def table(folder: Path, name: str) -> torch.Tensor:
    """The columns of an output, in the shape that their titles give."""
    with (folder / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    own = [i for i, called in enumerate(header) if called == name or called.startswith(f"{name}.")]
    last = header[own[-1]].removeprefix(name).split(".")[1:]
    read = {"True": True, "False": False}
    values = [
        [read[row[i]] if row[i] in read else json_number(row[i]) for i in own] for row in rows
    ]
    return torch.tensor(values).reshape(len(rows), *(int(i) + 1 for i in last))


def json_number(text: str) -> float:
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(text) or json.loads(text)


def file_name(name: str) -> str:
    return "predictions.npy" if name == DEFAULT_OUTPUT else f"predictions.{name}.npy"


def files_in(folder: Path) -> list[Path]:
    """The files of a run folder and of its folder of predictions."""
    return [path for path in folder.rglob("*") if path.is_file()]


def numbered(*shape: int, rows: int = SAMPLES) -> torch.Tensor:
    return torch.arange(rows * int(np.prod(shape)), dtype=torch.float32).reshape(rows, *shape)


@pytest.fixture(params=["one buffer", "small buffers"])
def _windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with buffers for all rows, and for seven rows."""
    if request.param == "small buffers":
        monkeypatch.setattr(npy, "BUFFER_BYTES", 7 * 16)
        monkeypatch.setattr(sharded_writer, "SHARD_BYTES", 7 * 16)
        monkeypatch.setattr(sharded_writer, "ID_BYTES", 0)


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("written", [23, 20, 13, 5, 1])
@pytest.mark.parametrize("form", TABLES)
def test_rows_are_read_back_in_order_however_early_the_run_ended(
    tmp_path: Path, form: str, written: int
) -> None:
    rows = numbered(2, 2)
    target = new_writer(tmp_path, form)
    fill(target, {DEFAULT_OUTPUT: rows}, written)
    assert target.written == written
    assert torch.equal(stored(tmp_path, form), rows[:written])
    on_disk = {path.relative_to(tmp_path).as_posix() for path in files_in(tmp_path)}
    assert on_disk == set(target.files()), "files() lists all files, and no draft remains"
    if form == "npy":
        assert (tmp_path / "predictions.npy").stat().st_size == 128 + written * 16


@pytest.mark.parametrize("form", TABLES)
def test_a_writer_closed_before_the_first_batch_leaves_no_rows(tmp_path: Path, form: str) -> None:
    target = new_writer(tmp_path, form)
    fill(target, {DEFAULT_OUTPUT: numbered(3)}, samples=0)
    target.close()  # closing twice has no effect
    assert target.written == 0
    if form == "npy":
        assert np.load(tmp_path / "predictions.npy").shape == (0, 3)
    else:
        assert target.files() == []
        header = "id,prediction.0,prediction.1,prediction.2\n" if form == "csv" else ""
        assert all(path.read_text() == header for path in files_in(tmp_path))


@pytest.mark.parametrize("form", TABLES)
def test_a_writer_that_was_never_opened_leaves_no_files(tmp_path: Path, form: str) -> None:
    target = new_writer(tmp_path, form)
    target.close()
    assert files_in(tmp_path) == []


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", TABLES)
def test_a_run_may_be_a_single_short_batch(tmp_path: Path, form: str) -> None:
    rows = numbered(2, rows=3)
    fill(new_writer(tmp_path, form, samples=3), {DEFAULT_OUTPUT: rows}, samples=3, opened=3)
    assert torch.equal(stored(tmp_path, form), rows)


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
    ],
)
@pytest.mark.parametrize("form", TABLES)
def test_dtypes_are_preserved_and_those_that_numpy_lacks_are_widened(
    tmp_path: Path, form: str, dtype: str
) -> None:
    kind = getattr(torch, dtype)
    rows = (numbered(3) / (3 if kind.is_floating_point else 1)).to(kind)
    fill(new_writer(tmp_path, form), {DEFAULT_OUTPUT: rows})
    found = stored(tmp_path, form)
    if form in ("jsonl", "csv"):  # text has no dtypes, but the values must be equal
        assert torch.equal(found.to(kind).double(), rows.double())
    else:
        widened = form in {"npy", "parquet"} and dtype in {"bfloat16", "float8_e4m3fn"}
        assert found.dtype == (torch.float32 if widened else kind)
        assert torch.equal(found.double(), rows.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_float_in_jsonl_reads_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(SAMPLES, 4, dtype=torch.float64) * 10.0 ** torch.arange(-30, 10, 10)).to(
        dtype
    )
    info = torch.finfo(dtype)
    rows[0] = torch.tensor([info.tiny, info.max, -0.0, 1 / 3], dtype=dtype)
    rows[1] = torch.tensor([torch.inf, -torch.inf, torch.nan, 5e-324], dtype=dtype)
    fill(new_writer(tmp_path, "jsonl"), {DEFAULT_OUTPUT: rows})
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    found = torch.tensor([json.loads(line)[DEFAULT_OUTPUT] for line in lines], dtype=torch.float64)
    found = found.to(dtype)
    assert torch.equal(found.isnan(), rows.isnan())
    plain = ~rows.isnan()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(found[plain].view(bits), rows[plain].view(bits))


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", TABLES)
def test_several_outputs_are_stored_under_their_names(tmp_path: Path, form: str) -> None:
    rows = {"logits": numbered(4), "states.0": numbered(2, 1).to(torch.int64), "best": numbered()}
    target = new_writer(tmp_path, form)
    fill(target, rows)
    for name, tensor in rows.items():
        assert torch.equal(
            stored(tmp_path, form, name), tensor.to(stored(tmp_path, form, name).dtype)
        )
    if form == "npy":
        assert target.files() == [file_name(name) for name in rows]


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("shape", [(3,), (2, 2), ()])
def test_rows_of_another_shape_are_refused_except_in_jsonl(
    tmp_path: Path, form: str, shape: tuple[int, ...]
) -> None:
    target = new_writer(tmp_path, form)
    first, other = numbered(2)[:BATCH], numbered(*shape)[:BATCH]
    target.open({DEFAULT_OUTPUT: first})
    target.write({DEFAULT_OUTPUT: first}, range(BATCH))
    if form == "jsonl":
        target.write({DEFAULT_OUTPUT: other}, range(BATCH, 2 * BATCH))
    else:
        with pytest.raises(ValueError, match=r"(rows of shape \[2\]|has 2 numbers).*jsonl"):
            target.write({DEFAULT_OUTPUT: other}, range(BATCH, 2 * BATCH))
    target.close()
    if form == "jsonl":
        lines = [json.loads(x) for x in (tmp_path / "predictions.jsonl").read_text().splitlines()]
        assert [x[DEFAULT_OUTPUT] for x in lines] == first.tolist() + other.tolist()
    else:
        assert torch.equal(stored(tmp_path, form), first), "earlier rows stay"


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0)])
def test_rows_may_have_one_number_or_none(
    tmp_path: Path, form: str, shape: tuple[int, ...]
) -> None:
    rows = torch.ones(SAMPLES, *shape)
    fill(new_writer(tmp_path, form), {DEFAULT_OUTPUT: rows}, 13)
    if form == "csv" and 0 in shape:
        text = (tmp_path / "predictions.csv").read_text()
        assert text.splitlines() == ["id", *map(str, range(13))]
        return
    assert stored(tmp_path, form).shape == (13, *shape)


def test_csv_reads_back_outputs_of_different_shapes_in_one_list(tmp_path: Path) -> None:
    outputs = {
        "h.0": numbered(3),
        "h.1": numbered(2, 2),
        "h.2": torch.arange(SAMPLES),
        "a.1": -numbered(2),
        "b": numbered(1),
    }
    fill(new_writer(tmp_path, "csv"), outputs)
    ((_, found),) = FORMATS["csv"].read(tmp_path)
    assert found.pop("h").tolist() == outputs.pop("h.0").unsqueeze(1).tolist()  # joined
    assert found.keys() == outputs.keys()
    for name, rows in outputs.items():
        assert np.array_equal(found[name], rows.numpy()), name


def test_strided_views_are_written_in_logical_order(tmp_path: Path) -> None:
    rows = numbered(3, 4).transpose(1, 2)
    for form in TABLES:
        fill(new_writer(tmp_path / form, form), {DEFAULT_OUTPUT: rows})
        assert torch.equal(stored(tmp_path / form, form), rows)


@pytest.mark.parametrize("form", TABLES)
def test_a_batch_is_copied_before_its_tensor_is_used_again(tmp_path: Path, form: str) -> None:
    reused = torch.zeros(BATCH, 2)
    target = new_writer(tmp_path, form, samples=2 * BATCH)
    target.open({DEFAULT_OUTPUT: reused})
    for i in (1, 2):
        reused.fill_(i)
        target.write({DEFAULT_OUTPUT: reused}, range((i - 1) * BATCH, i * BATCH))
    reused.fill_(9)
    target.close()
    assert stored(tmp_path, form)[:, 0].tolist() == [1] * BATCH + [2] * BATCH


def test_safetensors_shards_have_their_sample_range_in_the_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_writer, "SHARD_BYTES", 12 * 8)
    monkeypatch.setattr(sharded_writer, "ID_BYTES", 0)
    rows = numbered(2)
    target = new_writer(tmp_path, "safetensors")
    fill(target, {DEFAULT_OUTPUT: rows})
    assert target.files() == [f"predictions-{i:05}.safetensors" for i in range(2)]
    ends = []
    for name in target.files():
        with safe_open(tmp_path / name, framework="pt") as part:
            start, stop = map(int, part.metadata()["samples"].split(":"))
            ends.append((start, stop))
            assert torch.equal(part.get_tensor(DEFAULT_OUTPUT), rows[start:stop])
    assert ends == [(0, 12), (12, 23)]


def test_jsonl_lines_have_the_ids_of_their_samples(tmp_path: Path) -> None:
    target = new_writer(tmp_path, "jsonl", samples=2)
    target.open({DEFAULT_OUTPUT: numbered(1)[:2]})
    target.write({DEFAULT_OUTPUT: numbered(1)[:2]}, ["a", 'ü"\n'])
    target.close()
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": "a", "prediction": [0.0]},
        {"id": 'ü"\n', "prediction": [1.0]},
    ]


def test_an_npy_file_is_allocated_in_full_at_the_start(tmp_path: Path) -> None:
    target = new_writer(tmp_path, "npy", samples=100_000)
    target.open({DEFAULT_OUTPUT: numbered(2)[:BATCH]})
    status = (tmp_path / "predictions.npy").stat()
    target.close()
    assert status.st_size >= 800_000
    assert status.st_blocks * 512 >= 800_000, "allocated, so that a full disk is reported now"


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (
            "jsonl",
            '{"id": 0, "prediction": 1, "label": "b"}\n'
            '{"id": 1, "prediction": null, "label": null}\n'
            '{"id": 2, "prediction": 7, "label": "7"}\n',
        ),
        ("csv", "id,prediction,label\n0,1,b\n1,,\n2,7,7\n"),
    ],
)
def test_class_names_are_written_and_a_missing_prediction_is_null(
    tmp_path: Path, form: str, expected: str
) -> None:
    config = OutputSection(path=tmp_path, format=form, transform=("argmax",))
    target = open_writer(config, 3, classes=("a", "b"))
    numbers = {DEFAULT_OUTPUT: torch.tensor([1, torch.iinfo(torch.int64).min, 7])}
    target.open(numbers)
    target.write(numbers, range(3), torch.tensor([True, False, True]))
    target.close()
    assert "".join(contents(tmp_path)[f"predictions.{form}"].decode()) == expected


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("transform", ["argmax", "classify", "topk"])
@pytest.mark.parametrize("classes", [(), ("a", "b", "c")])
@pytest.mark.parametrize("nans", [[1], [0], [0, 1, 2]])
def test_the_class_of_nan_scores_is_empty_in_tables_and_read_as_missing(
    tmp_path: Path, form: str, transform: str, classes: tuple[str, ...], nans: list[int]
) -> None:
    best = torch.tensor([2, 0, 1])
    best[nans] = MISSING_CLASS
    scores = torch.tensor([0.5, 0.25, 1.0])
    scores[nans] = torch.nan
    second = torch.tensor([[1], [2], [0]])
    outputs = {
        "argmax": {DEFAULT_OUTPUT: best},
        "classify": {"class": best, "score": scores},
        "topk": {
            "values": scores[:, None].repeat(1, 2),
            "indices": torch.cat([best[:, None], second], 1),
        },
    }[transform]
    config = OutputSection(path=tmp_path, format=form, transform=(transform,))
    target = open_writer(config, 3, classes=classes)
    target.open(outputs)
    target.write(outputs, range(3))
    assert [part.nonfinite for part in target.close()] == [len(nans)]
    if form != "parquet":
        text = (tmp_path / f"predictions.{form}").read_text()
        assert str(MISSING_CLASS) not in text
        assert text.count("null") == (len(nans) if form == "jsonl" else 0)
    ((numbers, rows),) = FORMATS[form].read(tmp_path)
    assert numbers.tolist() == [0, 1, 2]
    for name, tensor in outputs.items():
        np.testing.assert_array_equal(rows[name], tensor.numpy())
    assert {name.rpartition(".")[2] for name in rows} - {"label", "labels"} == {*outputs}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_values_of_an_invalid_sample_are_null_in_parquet(
    tmp_path: Path, dtype: str, stop: int
) -> None:
    outputs = {"a": torch.ones(5, 2).to(getattr(torch, dtype)), "b": torch.arange(5.0)}
    outputs["b"][2] = torch.nan
    valid = torch.tensor([True, False, True, True, False])
    ranges: list[CommittedRange] = []
    for start, end in ((0, stop), (stop, 5)):  # interrupted and resumed
        target = new_writer(tmp_path, "parquet", 5)
        target.open(outputs, ranges)
        rows = slice(start, end)
        batch = {name: tensor[rows] for name, tensor in outputs.items()}
        target.write(batch, range(start, end), valid[rows])
        ranges += target.close()
    assert not damaged(tmp_path, ranges)
    assert sum(committed.nonfinite for committed in ranges) == 1
    table = pandas.read_parquet(
        tmp_path / "predictions" / "predictions-00000.parquet", dtype_backend="pyarrow"
    )
    assert table["b"].isna().tolist() == (~valid).tolist(), "a predicted NaN is not null"
    assert [list(row) == [None, None] for row in table["a"]] == (~valid).tolist()
    ((_, read),) = FORMATS["parquet"].read(tmp_path)
    assert read["a"].dtype == outputs["a"].numpy().dtype
    assert np.array_equal(read["a"][valid], outputs["a"][valid].numpy())


def test_parquet_has_dictionaries_of_class_numbers_and_texts_but_not_of_ids_and_floats(
    tmp_path: Path,
) -> None:
    output = OutputSection(path=tmp_path, format="parquet", transform=("classify",))
    target = open_writer(output, SAMPLES, classes=("a", "b"))
    fill(target, {"a.class": numbered().long() % 2, "a.score": numbered()})
    (path,) = (tmp_path / "predictions").iterdir()
    group = pyarrow.parquet.read_metadata(path).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    encoded = {column.path_in_schema: column.has_dictionary_page for column in columns}
    assert encoded == {"id": False, "a.class": True, "a.score": False, "a.label": True}
    assert pandas.read_parquet(path)["id"].tolist() == [*range(SAMPLES)]


@pytest.mark.parametrize("form", ["npy", "jsonl"])
def test_an_existing_file_is_not_overwritten(tmp_path: Path, form: str) -> None:
    fill(new_writer(tmp_path, form), {DEFAULT_OUTPUT: numbered(2)})
    with pytest.raises(FileExistsError):
        new_writer(tmp_path, form).open({DEFAULT_OUTPUT: numbered(2)[:BATCH]})
    assert torch.equal(stored(tmp_path, form), numbered(2))


# --- commits and resume ------------------------------------------------------------------------


def opened(
    folder: Path, form: str, rows: Outputs, before: Sequence[CommittedRange] = ()
) -> PredictionWriter:
    target = new_writer(folder, form)
    target.open({name: tensor[:BATCH] for name, tensor in rows.items()}, before)
    return target


def write(target: PredictionWriter, rows: Outputs, start: int, stop: int) -> None:
    for first in range(start, stop, BATCH):
        ids = range(first, min(first + BATCH, stop))
        target.write({name: tensor[first : ids.stop] for name, tensor in rows.items()}, ids)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files_in(folder)}


def damaged(folder: Path, commits: Sequence[CommittedRange]) -> list[DamagedRange]:
    head = JournalHeader(gradrun="0.1.0", samples=SAMPLES, config={}, files={})
    return [*damaged_ranges(folder, JournalState(head, commits, [0], torn=False))]


SEVERAL = {"states.0": numbered(2, 1).to(torch.int64), "logits": numbered(4), "best": numbered()}


SHARDED = {"safetensors", "parquet"}


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", TABLES)
def test_ranges_are_consecutive_and_match_the_files(tmp_path: Path, form: str) -> None:
    target, ranges = opened(tmp_path, form, SEVERAL), []
    assert target.commit() == []
    for start, stop in ((0, 5), (5, 15), (15, 20)):
        write(target, SEVERAL, start, stop)
        ranges += target.commit()
        assert target.commit() == [], "each range is returned once"
        if form not in SHARDED:
            assert ranges[-1].stop == stop
        assert not damaged(tmp_path, ranges)
    write(target, SEVERAL, 20, SAMPLES)
    ranges += target.close()
    assert [r.start for r in ranges] == [0, *(r.stop for r in ranges[:-1])]
    assert ranges[-1].stop == SAMPLES
    assert not damaged(tmp_path, ranges)
    for file in files_in(tmp_path):
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert damaged(tmp_path, ranges), "a changed byte is detected"


@pytest.mark.parametrize("form", sorted(SHARDED))
def test_a_shard_is_committed_when_it_is_sealed(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_writer, "SHARD_BYTES", 11 * 8)
    monkeypatch.setattr(sharded_writer, "ID_BYTES", 0)
    config, rows = OutputSection(path=tmp_path, format=form), {DEFAULT_OUTPUT: numbered(2)}
    target = open_writer(config, SAMPLES, BATCH)
    target.open(rows)
    write(target, rows, 0, 10)
    assert contents(tmp_path).keys() == {target.files()[0]}, "11 rows are 2 batches of 5"
    assert [(r.start, r.stop) for r in target.commit()] == [(0, 10)]
    write(target, rows, 10, 15)
    assert target.commit() == []
    assert [(r.start, r.stop) for r in target.close()] == [(10, 15)]
    assert target.files() == sorted(contents(tmp_path))


@pytest.mark.parametrize(
    ("samples", "row_bytes", "batch_size", "rows"),
    [
        (500, 40, 32, 1024),  # one file
        (1_000_000, 40, 32, 15_616),  # 1/64 of the run, in whole batches
        (10**9, 40, 32, 1_677_696),  # 64 MiB
        (500, 2**30, 32, 32),  # one batch
        (500, 0, 1000, 1000),
    ],
)
def test_a_shard_has_a_64th_of_the_run_within_limits(
    samples: int, row_bytes: int, batch_size: int, rows: int
) -> None:
    assert sharded_writer.shard_rows(samples, row_bytes, batch_size) == rows


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", TABLES)
def test_files_grow_to_the_same_rows_if_the_number_of_samples_is_unknown(
    tmp_path: Path, form: str
) -> None:
    rows = numbered(2, 2)
    fill(new_writer(tmp_path / "known", form), {DEFAULT_OUTPUT: rows})
    target = new_writer(tmp_path / "unknown", form, None)
    fill(target, {DEFAULT_OUTPUT: rows})
    assert torch.equal(stored(tmp_path / "unknown", form), rows)
    assert sorted(target.files()) == sorted(contents(tmp_path / "unknown"))
    assert contents(tmp_path / "unknown") == contents(tmp_path / "known")


def test_shards_of_a_run_of_unknown_length_double_after_every_64() -> None:
    layout = sharded_writer.shard_layout(None, 40, 32)
    start = 0
    for number in range(64 * 4):
        rows = 1024 * 2 ** (number // 64)
        for sample in (start, start + rows - 1):
            assert layout.locate(sample) == (number, start, rows)
        start += rows


def test_shards_of_a_run_of_unknown_length_stay_within_64_mib() -> None:
    layout = sharded_writer.shard_layout(None, 20_000, 32)
    assert layout.locate(10**9).rows * 20_000 <= sharded_writer.SHARD_BYTES
    assert layout.locate(10**9).rows == 2048


@pytest.mark.parametrize("form", ["safetensors", "parquet"])
@pytest.mark.parametrize("written", [10, 40, 65, 90])
def test_a_run_of_unknown_length_is_resumed_in_shards_of_any_size(
    tmp_path: Path, form: str, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_writer, "LEAST_ROWS", 5)
    monkeypatch.setattr(sharded_writer, "SHARDS", 3)
    rows = numbered(2, rows=103)
    whole = open_writer(OutputSection(path=tmp_path / "whole", format=form), None, BATCH)
    (tmp_path / "whole").mkdir()
    fill(whole, {DEFAULT_OUTPUT: rows}, 103)
    assert len(whole.files()) == 9, "15 samples in 3 shards, 30 in 3, then 58 in 3"
    (tmp_path / "cut").mkdir()
    cut = open_writer(OutputSection(path=tmp_path / "cut", format=form), None, BATCH)
    cut.open({DEFAULT_OUTPUT: rows[:BATCH]})
    for start in range(0, written, BATCH):
        cut.write({DEFAULT_OUTPUT: rows[start : start + BATCH]}, range(start, start + BATCH))
    ranges = cut.close()
    resumed = open_writer(OutputSection(path=tmp_path / "cut", format=form), None, BATCH)
    resumed.open({DEFAULT_OUTPUT: rows[:BATCH]}, ranges)
    assert resumed.written == written
    for start in range(written, 103, BATCH):
        ids = range(start, min(start + BATCH, 103))
        resumed.write({DEFAULT_OUTPUT: rows[start : ids.stop]}, ids)
    resumed.close()
    assert resumed.files() == whole.files()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("end", ["killed", "closed without a journal entry", "stopped"])
@pytest.mark.parametrize("committed", [5, 10, 15, 20])
@pytest.mark.parametrize("form", TABLES)
def test_a_resumed_run_writes_the_same_bytes(
    tmp_path: Path, form: str, committed: int, end: str
) -> None:
    fill(new_writer(tmp_path / "whole", form), SEVERAL)
    first, ranges = opened(tmp_path / "run", form, SEVERAL), []
    for start in range(0, committed, BATCH):
        write(first, SEVERAL, start, start + BATCH)
        ranges += first.commit()
    if end == "stopped":
        ranges += first.close()
        assert ranges[-1].stop == committed
    else:
        write(first, SEVERAL, committed, SAMPLES)  # not in the journal
    if end == "closed without a journal entry":
        first.close()
    second = opened(tmp_path / "run", form, SEVERAL, ranges)
    assert second.written == (ranges[-1].stop if ranges else 0)
    if not ranges:
        second = restarted(second, tmp_path / "run", form)
    write(second, SEVERAL, second.written, SAMPLES)
    second.close()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert second.files() == sorted(contents(tmp_path / "whole"), key=second.files().index)


def restarted(writer: PredictionWriter, folder: Path, form: str) -> PredictionWriter:
    """Start over without a committed range, as a run folder does."""
    writer.close()
    for file in files_in(folder):
        file.unlink()
    return opened(folder, form, SEVERAL)


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", TABLES)
def test_a_run_can_be_resumed_many_times(tmp_path: Path, form: str) -> None:
    fill(new_writer(tmp_path / "whole", form), SEVERAL)
    ranges: list[CommittedRange] = []
    for stop in (5, 10, 15, 20, SAMPLES):
        target = opened(tmp_path / "run", form, SEVERAL, ranges)
        write(target, SEVERAL, target.written, stop)
        ranges += target.commit()
        write(target, SEVERAL, stop, SAMPLES)
        assert not damaged(tmp_path / "run", ranges)
    target = opened(tmp_path / "run", form, SEVERAL, ranges)
    write(target, SEVERAL, target.written, SAMPLES)
    target.close()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("form", sorted(SHARDED))
def test_a_stopped_shard_can_be_continued_many_times(tmp_path: Path, form: str) -> None:
    fill(new_writer(tmp_path / "whole", form), SEVERAL)
    ranges: list[CommittedRange] = []
    for stop in (5, 10, 12, 20, SAMPLES):
        target = opened(tmp_path / "run", form, SEVERAL, ranges)
        write(target, SEVERAL, target.written, stop)
        ranges += target.close()
        assert not damaged(tmp_path / "run", ranges)
    assert [r.stop for r in ranges] == [5, 10, 12, 20, SAMPLES]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", TABLES)
def test_nonfinite_rows_are_counted_once_also_after_a_resume(tmp_path: Path, form: str) -> None:
    logits, best = numbered(4), numbered()
    logits[[2, 7, 11, 22], [0, 1, 2, 3]] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-40])
    best[[7, 8]] = torch.nan  # the same sample as above, and another
    rows = {"logits": logits, "best": best, "states.0": SEVERAL["states.0"]}
    first, ranges = stopped(tmp_path, form, rows)
    assert (first.nonfinite, sum(r.nonfinite for r in ranges)) == (3, 3)
    second = opened(tmp_path, form, rows, ranges)
    assert second.nonfinite == 3
    write(second, rows, 10, SAMPLES)
    second.close()
    assert second.nonfinite == 4


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", TABLES)
def test_invalid_samples_are_not_counted_as_nonfinite(tmp_path: Path, form: str) -> None:
    rows = {"logits": numbered(4), "best": numbered()}
    rows["logits"][[2, 7]] = torch.nan
    valid = torch.ones(SAMPLES, dtype=torch.bool)
    valid[[7, 12]] = False
    target = opened(tmp_path, form, rows)
    for start in range(0, SAMPLES, BATCH):
        ids = range(start, min(start + BATCH, SAMPLES))
        batch = {name: tensor[start : ids.stop] for name, tensor in rows.items()}
        target.write(batch, ids, valid[start : ids.stop])
    target.close()
    assert target.nonfinite == 1
    assert not rows["logits"][12].isnan().any(), "the outputs of the model are not changed"


def stopped(
    folder: Path, form: str, rows: Outputs
) -> tuple[PredictionWriter, list[CommittedRange]]:
    """A run with ten committed rows: killed later on, or, with shards, stopped."""
    target = opened(folder, form, rows)
    write(target, rows, 0, 10)
    if form in SHARDED:
        return target, target.close()
    ranges = target.commit()
    write(target, rows, 10, 15)
    return target, ranges


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("damage", ["gone", "shorter"])
@pytest.mark.parametrize("form", TABLES)
def test_a_resume_refuses_missing_or_short_files_and_does_not_change_them(
    tmp_path: Path, form: str, damage: str
) -> None:
    _, ranges = stopped(tmp_path, form, SEVERAL)
    for file in files_in(tmp_path):
        if damage == "gone":
            file.unlink()
        else:
            os.truncate(file, 130 if form == "npy" else 9)
    before = contents(tmp_path)
    target = new_writer(tmp_path, form)
    with pytest.raises(OSError, match=r"No such file|its committed range|is damaged") as error:
        target.open({name: tensor[:BATCH] for name, tensor in SEVERAL.items()}, ranges)
    assert str(tmp_path / "predictions") in str(error.value), "it names the file"
    target.close()
    assert contents(tmp_path).keys() == before.keys(), "no shard is made of missing rows"


@pytest.mark.parametrize("rows", [1, 9])
def test_a_shard_with_fewer_rows_than_committed_is_refused(tmp_path: Path, rows: int) -> None:
    _, ranges = stopped(tmp_path, "safetensors", SEVERAL)
    path = tmp_path / "predictions-00000.safetensors"
    save_file({name: tensor[:rows].clone() for name, tensor in SEVERAL.items()}, path)
    with pytest.raises(OSError, match=r"is damaged|its committed range"):
        opened(tmp_path, "safetensors", SEVERAL, ranges)


def test_a_resume_keeps_files_with_similar_names(tmp_path: Path) -> None:
    _, ranges = stopped(tmp_path, "safetensors", SEVERAL)
    (tmp_path / "predictions-final.safetensors").write_bytes(b"mine")
    opened(tmp_path, "safetensors", SEVERAL, ranges)
    assert (tmp_path / "predictions-final.safetensors").read_bytes() == b"mine"


def test_a_resume_removes_later_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_writer, "SHARD_BYTES", 7 * 36)
    target = opened(tmp_path, "safetensors", SEVERAL)
    write(target, SEVERAL, 0, 15)
    first, _ = target.commit()  # killed before the journal has the second
    (tmp_path / "predictions-00002.safetensors.tmp").write_bytes(b"cut off")
    opened(tmp_path, "safetensors", SEVERAL, [first])
    assert contents(tmp_path).keys() == {"predictions-00000.safetensors"}


@pytest.mark.parametrize("form", TABLES)
def test_ctrl_c_during_a_write_keeps_earlier_batches(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {DEFAULT_OUTPUT: numbered(2)}
    target = opened(tmp_path, form, rows)
    write(target, rows, 0, 10)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if form in ("jsonl", "csv"):
        monkeypatch.setattr(text_writer, "count_nonfinite", interrupt)
    batch = numbered(2)[10:15]
    batch.numpy = batch.__len__ = interrupt  # type: ignore[method-assign]
    if form in {"safetensors", "parquet"}:
        monkeypatch.setattr(torch.Tensor, "__setitem__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        target.write({DEFAULT_OUTPUT: batch}, range(10, 15))
    monkeypatch.undo()
    (committed,) = target.close()
    assert (target.written, committed.stop) == (10, 10)
    assert torch.equal(stored(tmp_path, form), rows[DEFAULT_OUTPUT][:10])
    assert not damaged(tmp_path, [committed])


def test_shards_of_the_same_rows_have_the_same_bytes(tmp_path: Path) -> None:
    for form in ("safetensors", "parquet"):
        for i in range(8):
            fill(new_writer(tmp_path / f"{form}{i}", form), SEVERAL)
        assert len({b"".join(contents(tmp_path / f"{form}{i}").values()) for i in range(8)}) == 1


def test_pandas_reads_parquet_shards_with_the_right_dtypes(tmp_path: Path) -> None:
    target = new_writer(tmp_path, "parquet", samples=2)
    outputs = {
        "best": torch.tensor([3, 4]),
        "embedding": numbered(3)[:2],
        "grid": numbered(2, 2)[:2].double(),
        "sure": torch.tensor([True, False]),
    }
    target.open(outputs)
    target.write(outputs, ["a", 'ü"\n'])
    target.close()
    found = pandas.read_parquet(tmp_path / "predictions")
    assert list(found.columns) == ["id", "best", "embedding", "grid", "sure"]
    assert found["id"].tolist() == ["a", 'ü"\n']
    assert (found["best"].dtype, found["sure"].dtype) == (np.int64, np.bool_)
    assert [row.dtype for row in found["embedding"]] == [np.float32, np.float32]
    assert np.array_equal(np.stack(found["embedding"]), numbered(3)[:2])
    assert [[float(x) for x in row] for row in found["grid"][1]] == [[4, 5], [6, 7]]


def test_numbered_samples_have_integer_ids_in_parquet(tmp_path: Path) -> None:
    fill(new_writer(tmp_path, "parquet"), {DEFAULT_OUTPUT: numbered(2)})
    found = pandas.read_parquet(tmp_path / "predictions")
    assert (found["id"].dtype, found["id"].tolist()) == (np.int64, list(range(SAMPLES)))


@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet"])
def test_values_after_rows_of_one_shape_are_refused(tmp_path: Path, form: str) -> None:
    target = new_writer(tmp_path, form)
    first = torch.arange(BATCH, dtype=torch.float64)
    target.open({DEFAULT_OUTPUT: first})
    target.write({DEFAULT_OUTPUT: first}, range(BATCH))
    later = ValueColumn([0.5, None, 1.5, 2.5, 3.5])
    with pytest.raises(ValueError, match=r"has values of any shape; use format: jsonl"):
        target.write({DEFAULT_OUTPUT: later}, range(BATCH, 2 * BATCH))
    target.close()
    assert torch.equal(stored(tmp_path, form), first), "earlier rows stay"
