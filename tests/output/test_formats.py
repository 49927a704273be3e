"""Every sink keeps each row, in order, whole, and leaves a readable file whenever it is closed."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gradrun.config.output import OutputSection
from gradrun.output.formats import (
    READERS,
    WRITERS,
    PredictionWriter,
    npy,
    open_writer,
    sharded_writer,
    text_writer,
)
from gradrun.output.journal import CommittedRange, JournalHeader, JournalState
from gradrun.output.readback import faults
from gradrun.output.transforms import DEFAULT_OUTPUT, Outputs
from gradrun.results.result import DamagedRange

SAMPLES, BATCH = 23, 5


def sink(folder: Path, form: str, samples: int = SAMPLES) -> PredictionWriter:
    folder.mkdir(exist_ok=True)
    return open_writer(OutputSection(path=folder, format=form), samples)


def fill(
    sink: PredictionWriter, rows: Outputs, samples: int = SAMPLES, opened: int = BATCH
) -> None:
    """Write the first `samples` rows of every output in batches, and close."""
    sink.open({name: tensor[:opened] for name, tensor in rows.items()})
    for start in range(0, samples, BATCH):
        ids = range(start, min(start + BATCH, samples))
        sink.write({name: tensor[start : ids.stop] for name, tensor in rows.items()}, ids)
    sink.close()


def kept(folder: Path, form: str, name: str = DEFAULT_OUTPUT) -> torch.Tensor:
    if form == "npy":
        return torch.from_numpy(np.load(folder / file_name(name)))
    if form == "safetensors":
        parts = sorted(folder.glob("predictions-*.safetensors"))
        return torch.cat([load_file(part)[name] for part in parts])
    if form == "csv":
        return table(folder, name)
    if form == "parquet":
        return torch.cat([rows[name] for _, rows in READERS["parquet"](folder)])
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)[name] for line in lines])


def table(folder: Path, name: str) -> torch.Tensor:
    """An output's columns in the shape that their names tell of."""
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


def numbered(*shape: int, rows: int = SAMPLES) -> torch.Tensor:
    return torch.arange(rows * int(np.prod(shape)), dtype=torch.float32).reshape(rows, *shape)


@pytest.fixture(params=["whole", "in windows"])
def _windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sink once with room for all, and once with room for seven rows at a time."""
    if request.param == "in windows":
        monkeypatch.setattr(npy, "BUFFER_BYTES", 7 * 16)
        monkeypatch.setattr(sharded_writer, "PART_BYTES", 7 * 16)
        monkeypatch.setattr(sharded_writer, "ID_BYTES", 0)


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("written", [23, 20, 13, 5, 1])
@pytest.mark.parametrize("form", WRITERS)
def test_what_was_written_is_read_back_in_order_however_early_it_ended(
    tmp_path: Path, form: str, written: int
) -> None:
    rows = numbered(2, 2)
    target = sink(tmp_path, form)
    fill(target, {DEFAULT_OUTPUT: rows}, written)
    assert target.written == written
    assert torch.equal(kept(tmp_path, form), rows[:written])
    on_disk = {path.name for path in tmp_path.iterdir()}
    assert on_disk == set(target.files()), "it names its files, and leaves no draft"
    if form == "npy":
        assert (tmp_path / "predictions.npy").stat().st_size == 128 + written * 16


@pytest.mark.parametrize("form", WRITERS)
def test_a_sink_closed_before_the_first_batch_holds_nothing(tmp_path: Path, form: str) -> None:
    target = sink(tmp_path, form)
    fill(target, {DEFAULT_OUTPUT: numbered(3)}, samples=0)
    target.close()  # closing twice is closing once
    assert target.written == 0
    if form == "npy":
        assert np.load(tmp_path / "predictions.npy").shape == (0, 3)
    else:
        assert target.files() == []
        header = "id,prediction.0,prediction.1,prediction.2\n" if form == "csv" else ""
        assert all(path.read_text() == header for path in tmp_path.iterdir())


@pytest.mark.parametrize("form", WRITERS)
def test_a_sink_that_was_never_opened_closes_and_leaves_nothing(tmp_path: Path, form: str) -> None:
    target = sink(tmp_path, form)
    target.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", WRITERS)
def test_a_single_short_batch_is_all_there_is(tmp_path: Path, form: str) -> None:
    rows = numbered(2, rows=3)
    fill(sink(tmp_path, form, samples=3), {DEFAULT_OUTPUT: rows}, samples=3, opened=3)
    assert torch.equal(kept(tmp_path, form), rows)


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
@pytest.mark.parametrize("form", WRITERS)
def test_a_type_is_kept_and_one_that_numpy_lacks_is_widened(
    tmp_path: Path, form: str, dtype: str
) -> None:
    kind = getattr(torch, dtype)
    rows = (numbered(3) / (3 if kind.is_floating_point else 1)).to(kind)
    fill(sink(tmp_path, form), {DEFAULT_OUTPUT: rows})
    found = kept(tmp_path, form)
    if form in ("jsonl", "csv"):  # text has one kind of number; each must be the very same
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
    fill(sink(tmp_path, "jsonl"), {DEFAULT_OUTPUT: rows})
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    found = torch.tensor([json.loads(line)[DEFAULT_OUTPUT] for line in lines], dtype=torch.float64)
    found = found.to(dtype)
    assert torch.equal(found.isnan(), rows.isnan())
    plain = ~rows.isnan()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(found[plain].view(bits), rows[plain].view(bits))


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", WRITERS)
def test_several_outputs_lie_apart_under_their_names(tmp_path: Path, form: str) -> None:
    rows = {"logits": numbered(4), "states.0": numbered(2, 1).to(torch.int64), "best": numbered()}
    target = sink(tmp_path, form)
    fill(target, rows)
    for name, tensor in rows.items():
        assert torch.equal(kept(tmp_path, form, name), tensor.to(kept(tmp_path, form, name).dtype))
    if form == "npy":
        assert target.files() == [file_name(name) for name in rows]


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("shape", [(3,), (2, 2), ()])
def test_rows_that_change_their_shape_are_refused_or_kept_as_they_are(
    tmp_path: Path, form: str, shape: tuple[int, ...]
) -> None:
    target = sink(tmp_path, form)
    first, other = numbered(2)[:BATCH], numbered(*shape)[:BATCH]
    target.open({DEFAULT_OUTPUT: first})
    target.write({DEFAULT_OUTPUT: first}, range(BATCH))
    if form == "jsonl":
        target.write({DEFAULT_OUTPUT: other}, range(BATCH, 2 * BATCH))
    else:
        with pytest.raises(ValueError, match=r"(rows of shape \[2\]|began with 2 numbers).*jsonl"):
            target.write({DEFAULT_OUTPUT: other}, range(BATCH, 2 * BATCH))
    target.close()
    if form == "jsonl":
        lines = [json.loads(x) for x in (tmp_path / "predictions.jsonl").read_text().splitlines()]
        assert [x[DEFAULT_OUTPUT] for x in lines] == first.tolist() + other.tolist()
    else:
        assert torch.equal(kept(tmp_path, form), first), "what was written before stays"


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0)])
def test_rows_of_one_number_or_none_are_rows(
    tmp_path: Path, form: str, shape: tuple[int, ...]
) -> None:
    rows = torch.ones(SAMPLES, *shape)
    fill(sink(tmp_path, form), {DEFAULT_OUTPUT: rows}, 13)
    if form == "csv" and 0 in shape:
        text = (tmp_path / "predictions.csv").read_text()
        assert text.splitlines() == ["id", *map(str, range(13))]
        return
    assert kept(tmp_path, form).shape == (13, *shape)


def test_rows_that_are_a_strided_view_are_written_as_they_look(tmp_path: Path) -> None:
    rows = numbered(3, 4).transpose(1, 2)
    for form in WRITERS:
        fill(sink(tmp_path / form, form), {DEFAULT_OUTPUT: rows})
        assert torch.equal(kept(tmp_path / form, form), rows)


@pytest.mark.parametrize("form", WRITERS)
def test_a_batch_is_copied_before_its_tensor_is_used_again(tmp_path: Path, form: str) -> None:
    reused = torch.zeros(BATCH, 2)
    target = sink(tmp_path, form, samples=2 * BATCH)
    target.open({DEFAULT_OUTPUT: reused})
    for i in (1, 2):
        reused.fill_(i)
        target.write({DEFAULT_OUTPUT: reused}, range((i - 1) * BATCH, i * BATCH))
    reused.fill_(9)
    target.close()
    assert kept(tmp_path, form)[:, 0].tolist() == [1] * BATCH + [2] * BATCH


def test_safetensors_parts_say_which_samples_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_writer, "PART_BYTES", 12 * 8)
    monkeypatch.setattr(sharded_writer, "ID_BYTES", 0)
    rows = numbered(2)
    target = sink(tmp_path, "safetensors")
    fill(target, {DEFAULT_OUTPUT: rows})
    assert target.files() == [f"predictions-{i:05}.safetensors" for i in range(2)]
    ends = []
    for name in target.files():
        with safe_open(tmp_path / name, framework="pt") as part:
            start, stop = map(int, part.metadata()["samples"].split(":"))
            ends.append((start, stop))
            assert torch.equal(part.get_tensor(DEFAULT_OUTPUT), rows[start:stop])
    assert ends == [(0, 12), (12, 23)]


def test_jsonl_lines_carry_the_ids_of_their_samples(tmp_path: Path) -> None:
    target = sink(tmp_path, "jsonl", samples=2)
    target.open({DEFAULT_OUTPUT: numbered(1)[:2]})
    target.write({DEFAULT_OUTPUT: numbered(1)[:2]}, ["a", 'ü"\n'])
    target.close()
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": "a", "prediction": [0.0]},
        {"id": 'ü"\n', "prediction": [1.0]},
    ]


def test_an_npy_sets_its_whole_room_aside_at_once(tmp_path: Path) -> None:
    target = sink(tmp_path, "npy", samples=100_000)
    target.open({DEFAULT_OUTPUT: numbered(2)[:BATCH]})
    status = (tmp_path / "predictions.npy").stat()
    target.close()
    assert status.st_size >= 800_000
    assert status.st_blocks * 512 >= 800_000, "set aside, not only named: a full disk shows now"


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
def test_classes_are_spelled_out_and_a_missing_one_is_left_out(
    tmp_path: Path, form: str, expected: str
) -> None:
    config = OutputSection(path=tmp_path, format=form, transform=("argmax",))
    target = open_writer(config, 3, ("a", "b"))
    numbers = {DEFAULT_OUTPUT: torch.tensor([1, torch.iinfo(torch.int64).min, 7])}
    target.open(numbers)
    target.write(numbers, range(3), {1})
    target.close()
    assert "".join(contents(tmp_path)[f"predictions.{form}"].decode()) == expected


@pytest.mark.parametrize("form", ["npy", "jsonl"])
def test_a_file_that_is_there_already_is_not_overwritten(tmp_path: Path, form: str) -> None:
    fill(sink(tmp_path, form), {DEFAULT_OUTPUT: numbered(2)})
    with pytest.raises(FileExistsError):
        sink(tmp_path, form).open({DEFAULT_OUTPUT: numbered(2)[:BATCH]})
    assert torch.equal(kept(tmp_path, form), numbered(2))


# --- commits, and going on behind them ---------------------------------------------------------


def begun(
    folder: Path, form: str, rows: Outputs, kept: Sequence[CommittedRange] = ()
) -> PredictionWriter:
    target = sink(folder, form)
    target.open({name: tensor[:BATCH] for name, tensor in rows.items()}, kept)
    return target


def write(target: PredictionWriter, rows: Outputs, start: int, stop: int) -> None:
    for first in range(start, stop, BATCH):
        ids = range(first, min(first + BATCH, stop))
        target.write({name: tensor[first : ids.stop] for name, tensor in rows.items()}, ids)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def faults_of(folder: Path, commits: Sequence[CommittedRange]) -> list[DamagedRange]:
    head = JournalHeader(gradrun="0.1.0", samples=SAMPLES, config={}, files={})
    return [*faults(folder, JournalState(head, commits, [0], torn=False))]


SEVERAL = {"states.0": numbered(2, 1).to(torch.int64), "logits": numbered(4), "best": numbered()}


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", WRITERS)
def test_commits_follow_one_another_and_their_checksums_are_of_the_files(
    tmp_path: Path, form: str
) -> None:
    target, commits = begun(tmp_path, form, SEVERAL), []
    assert target.commit() == [], "nothing was written, so nothing is told"
    for stop in (5, 15, 20):
        write(target, SEVERAL, commits[-1].stop if commits else 0, stop)
        commits += target.commit()
        assert target.commit() == []
        assert commits[-1].stop == stop
        assert not faults_of(tmp_path, commits)
    write(target, SEVERAL, 20, SAMPLES)
    commits += target.close()
    assert [c.start for c in commits] == [0, *(c.stop for c in commits[:-1])]
    assert commits[-1].stop == SAMPLES
    assert not faults_of(tmp_path, commits)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert faults_of(tmp_path, commits), "a byte that changed is seen"


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("closed", [False, True], ids=["killed", "closed"])
@pytest.mark.parametrize("committed", [5, 10, 15, 20])
@pytest.mark.parametrize("form", WRITERS)
def test_behind_its_last_commit_a_sink_goes_on_to_the_same_bytes(
    tmp_path: Path, form: str, committed: int, closed: bool
) -> None:
    fill(sink(tmp_path / "whole", form), SEVERAL)
    first, commits = begun(tmp_path / "run", form, SEVERAL), []
    for start in range(0, committed, BATCH):
        write(first, SEVERAL, start, start + BATCH)
        commits += first.commit()
    write(first, SEVERAL, committed, SAMPLES)  # and of this the journal is never told
    if closed:
        first.close()
    second = begun(tmp_path / "run", form, SEVERAL, commits)
    assert second.written == committed
    write(second, SEVERAL, committed, SAMPLES)
    second.close()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert second.files() == sorted(contents(tmp_path / "whole"), key=second.files().index)


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", WRITERS)
def test_a_sink_goes_on_as_often_as_it_has_to(tmp_path: Path, form: str) -> None:
    fill(sink(tmp_path / "whole", form), SEVERAL)
    commits: list[CommittedRange] = []
    for stop in (5, 10, 15, 20, SAMPLES):
        target = begun(tmp_path / "run", form, SEVERAL, commits)
        write(target, SEVERAL, target.written, stop)
        commits += target.commit()
        write(target, SEVERAL, stop, SAMPLES)
        assert not faults_of(tmp_path / "run", commits)
    target = begun(tmp_path / "run", form, SEVERAL, commits)
    target.close()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("form", WRITERS)
def test_rows_that_are_not_finite_are_counted_once_resumed_or_not(
    tmp_path: Path, form: str
) -> None:
    logits, best = numbered(4), numbered()
    logits[[2, 7, 11, 22], [0, 1, 2, 3]] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-40])
    best[[7, 8]] = torch.nan  # the same sample as above, and another
    rows = {"logits": logits, "best": best, "states.0": SEVERAL["states.0"]}
    first = begun(tmp_path, form, rows)
    write(first, rows, 0, 10)
    commits = first.commit()
    assert (first.nonfinite, sum(c.nonfinite for c in commits)) == (3, 3)
    write(first, rows, 10, 15)
    second = begun(tmp_path, form, rows, commits)
    assert second.nonfinite == 3
    write(second, rows, 10, SAMPLES)
    second.close()
    assert second.nonfinite == 4


def stopped(folder: Path, form: str) -> list[CommittedRange]:
    """A run that was killed behind its commit of ten rows."""
    target = begun(folder, form, SEVERAL)
    write(target, SEVERAL, 0, 10)
    commits = target.commit()
    write(target, SEVERAL, 10, 15)
    return commits


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize("damage", ["gone", "shorter"])
@pytest.mark.parametrize("form", WRITERS)
def test_files_that_hold_less_than_the_journal_says_are_refused_and_left_alone(
    tmp_path: Path, form: str, damage: str
) -> None:
    commits = stopped(tmp_path, form)
    for file in tmp_path.iterdir():
        if damage == "gone":
            file.unlink()
        else:
            os.truncate(file, 130 if form == "npy" else 9)
    before = contents(tmp_path)
    target = sink(tmp_path, form)
    with pytest.raises(OSError, match=r"No such file|the journal says") as error:
        target.open({name: tensor[:BATCH] for name, tensor in SEVERAL.items()}, commits)
    assert str(tmp_path / "predictions") in str(error.value), "it names the file"
    target.close()
    assert contents(tmp_path).keys() == before.keys(), "no part is made of rows that are not there"


def test_going_on_leaves_files_alone_that_are_only_named_like_ours(tmp_path: Path) -> None:
    commits = stopped(tmp_path, "safetensors")
    (tmp_path / "predictions-final.safetensors").write_bytes(b"mine")
    begun(tmp_path, "safetensors", SEVERAL, commits)
    assert (tmp_path / "predictions-final.safetensors").read_bytes() == b"mine"


def test_going_on_drops_the_rest_of_a_part_that_was_begun_too_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_writer, "PART_BYTES", 7 * 32)
    monkeypatch.setattr(sharded_writer, "ID_BYTES", 0)
    target = begun(tmp_path, "safetensors", SEVERAL)
    write(target, SEVERAL, 0, 5)
    told = target.commit()
    write(target, SEVERAL, 5, 10)
    target.commit()  # of part 0, and rows of part 1; killed before the journal has either
    assert {"predictions-00000.safetensors", "predictions-00001.safetensors.rest"} <= contents(
        tmp_path
    ).keys()
    begun(tmp_path, "safetensors", SEVERAL, told)
    assert contents(tmp_path).keys() == {"predictions-00000.safetensors.rest"}


@pytest.mark.parametrize("form", WRITERS)
def test_ctrl_c_in_the_middle_of_a_write_leaves_the_batches_before_it(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {DEFAULT_OUTPUT: numbered(2)}
    target = begun(tmp_path, form, rows)
    write(target, rows, 0, 10)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if form in ("jsonl", "csv"):
        monkeypatch.setattr(text_writer, "nonfinite_rows", interrupt)
    batch = numbered(2)[10:15]
    batch.numpy = batch.__len__ = interrupt  # type: ignore[method-assign]
    if form in {"safetensors", "parquet"}:
        monkeypatch.setattr(torch.Tensor, "__setitem__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        target.write({DEFAULT_OUTPUT: batch}, range(10, 15))
    monkeypatch.undo()
    (committed,) = target.close()
    assert (target.written, committed.stop) == (10, 10)
    assert torch.equal(kept(tmp_path, form), rows[DEFAULT_OUTPUT][:10])
    assert not faults_of(tmp_path, [committed])


def test_parts_of_the_same_rows_have_the_same_bytes(tmp_path: Path) -> None:
    for form in ("safetensors", "parquet"):
        for i in range(8):
            fill(sink(tmp_path / f"{form}{i}", form), SEVERAL)
        assert len({b"".join(contents(tmp_path / f"{form}{i}").values()) for i in range(8)}) == 1


def test_parquet_parts_are_tables_that_pandas_reads_with_the_right_types(tmp_path: Path) -> None:
    target = sink(tmp_path, "parquet", samples=2)
    outputs = {
        "best": torch.tensor([3, 4]),
        "embedding": numbered(3)[:2],
        "grid": numbered(2, 2)[:2].double(),
        "sure": torch.tensor([True, False]),
    }
    target.open(outputs)
    target.write(outputs, ["a", 'ü"\n'])
    target.close()
    found = pandas.read_parquet(tmp_path / "predictions-00000.parquet")
    assert list(found.columns) == ["id", "best", "embedding", "grid", "sure"]
    assert found["id"].tolist() == ["a", 'ü"\n']
    assert (found["best"].dtype, found["sure"].dtype) == (np.int64, np.bool_)
    assert [row.dtype for row in found["embedding"]] == [np.float32, np.float32]
    assert np.array_equal(np.stack(found["embedding"]), numbered(3)[:2])
    assert [[float(x) for x in row] for row in found["grid"][1]] == [[4, 5], [6, 7]]


def test_numbered_samples_have_whole_numbers_for_ids_in_parquet(tmp_path: Path) -> None:
    fill(sink(tmp_path, "parquet"), {DEFAULT_OUTPUT: numbered(2)})
    found = pandas.read_parquet(tmp_path / "predictions-00000.parquet")
    assert (found["id"].dtype, found["id"].tolist()) == (np.int64, list(range(SAMPLES)))
