"""Values of any size per sample are written, read back and resumed in each format."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest
import torch

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.core.value_types import TypeMismatch, merged, type_of
from gradrun.engines import messages
from gradrun.output.columns import ValueColumn, blank, join
from gradrun.output.formats import FORMATS, check_columns, open_writer, sharded_writer
from gradrun.output.journal import CommittedRange, JournalHeader, JournalState
from gradrun.output.missing import count_nonfinite, finite_rows
from gradrun.output.transforms import Outputs
from gradrun.output.verification import damaged_ranges

BOXES = [torch.arange(4.0 * n).reshape(n, 4) for n in (0, 2, 1, 0, 3, 1, 2)]
TEXTS = ["a", "", "ä\n", "d", 'e"', "f", "g"]
TAGS: list[Any] = [[{"w": "x", "p": 0.5}], [], [{"w": "y", "p": 1.0}] * 2, [], [], [], []]
ROWS: Outputs = {
    "boxes": ValueColumn(BOXES),
    "text": ValueColumn(TEXTS),
    "tags": ValueColumn(TAGS),
    "score": torch.arange(7.0),
}
VALID = torch.tensor([True, True, False, True, True, True, True])
EXPECTED = [
    {"boxes": boxes.tolist(), "text": text, "tags": tags, "score": float(i)}
    if i != 2
    else dict.fromkeys(ROWS)
    for i, (boxes, text, tags) in enumerate(zip(BOXES, TEXTS, TAGS, strict=True))
]


def write(
    folder: Path, form: str, start: int, stop: int, committed: Sequence[CommittedRange] = ()
) -> list[CommittedRange]:
    """Write rows in batches of two, and return all ranges."""
    folder.mkdir(exist_ok=True)
    writer = open_writer(OutputSection(path=folder, format=form), len(BOXES), 2, has_ids=True)
    writer.open({name: column[:2] for name, column in ROWS.items()}, committed)
    for begin in range(start, stop, 2):
        part = slice(begin, min(begin + 2, stop))
        ids = [f"i{n}" for n in range(part.start, part.stop)]
        writer.write({name: column[part] for name, column in ROWS.items()}, ids, VALID[part])
    return [*committed, *writer.close()]


def stored(folder: Path, form: str) -> list[dict[str, Any]]:
    if form == "jsonl":
        return [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    rows: list[dict[str, Any]] = (
        pyarrow.dataset.dataset(folder / "predictions").to_table().to_pylist()
    )
    return rows


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("rows_per_shard", [2, 1024])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_values_are_written_and_an_interrupted_run_continues_with_the_same_bytes(
    tmp_path: Path, form: str, rows_per_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_writer, "shard_rows", lambda *_: rows_per_shard)
    ranges = write(tmp_path / "whole", form, 0, 7)
    assert [{k: row[k] for k in ROWS} for row in stored(tmp_path / "whole", form)] == EXPECTED
    assert [row["id"] for row in stored(tmp_path / "whole", form)] == [f"i{n}" for n in range(7)]
    header = JournalHeader(gradrun="", samples=7, config={}, files={})
    state = JournalState(header, ranges, [0] * (len(ranges) + 1), torn=False)
    assert [*damaged_ranges(tmp_path / "whole", state)] == []
    for stop in (2, 4, 6):
        part = write(tmp_path / f"part{stop}", form, 0, stop)
        write(tmp_path / f"part{stop}", form, stop, 7, part)
        assert files_in(tmp_path / f"part{stop}") == files_in(tmp_path / "whole")
    read = [rows for _, rows in FORMATS[form].read(tmp_path / "whole", {"boxes", "text", "tags"})]
    assert {name for rows in read for name in rows} == {"score"}


def test_a_damaged_value_in_parquet_is_found(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    ranges = write(tmp_path, "parquet", 0, 7)
    header = JournalHeader(gradrun="", samples=7, config={}, files={})
    state = JournalState(header, ranges, [0] * (len(ranges) + 1), torn=False)
    (path,) = (tmp_path / "predictions").iterdir()
    for name in ("boxes", "text", "tags"):
        table = parquet.read_table(path)
        values = table.column(name).to_pylist()
        values[1], values[4] = values[4], values[1]
        changed = arrow.array(values, table.column(name).type)
        if values[1] == values[4]:
            continue
        damaged = table.set_column(table.column_names.index(name), name, changed)
        parquet.write_table(damaged, path)
        assert [*damaged_ranges(tmp_path, state)], name
        parquet.write_table(table, path)
        assert not [*damaged_ranges(tmp_path, state)]


@pytest.mark.parametrize("form", ["npy", "safetensors", "csv"])
def test_a_format_without_values_names_those_that_have_them(tmp_path: Path, form: str) -> None:
    config = OutputSection(path=tmp_path, format=form)
    with pytest.raises(ConfigError, match=rf"{form} cannot .* jsonl, parquet or files$"):
        check_columns(config, {"boxes": ROWS["boxes"]})
    if form == "csv":
        check_columns(config, {"text": ROWS["text"]})
        return
    with pytest.raises(ConfigError, match=r"jsonl, parquet, files or csv$"):
        check_columns(config, {"text": ROWS["text"]})


def test_csv_has_texts(tmp_path: Path) -> None:
    writer = open_writer(OutputSection(path=tmp_path, format="csv"), 3)
    texts = ValueColumn(["a,b", None, "c\n"])
    writer.open({"text": texts})
    writer.write({"text": texts}, range(3))
    writer.close()
    assert (tmp_path / "predictions.csv").read_text() == 'id,text\n0,"a,b"\n1,\n2,"c\n"\n'


def test_parquet_refuses_values_without_one_type(tmp_path: Path) -> None:
    def opened(values: list[Any]) -> Any:
        writer = open_writer(OutputSection(path=tmp_path, format="parquet"), 4)
        writer.open({"x": ValueColumn(values)})
        return writer

    with pytest.raises(ConfigError, match="one type for column 'x', which has text and integer"):
        opened(["a", 1])
    with pytest.raises(ConfigError, match="the first batch does not determine it"):
        opened([[], []])
    with pytest.raises(ValueError, match="had the type list of integer in the first batch"):
        opened([[1], []]).write({"x": ValueColumn([["a"]])}, range(1))
    with pytest.raises(ValueError, match="use format: jsonl"):
        opened([torch.zeros(2, 4)]).write({"x": ValueColumn([torch.zeros(2)])}, range(1))


def test_the_type_of_values_covers_all_of_them() -> None:
    kind = merged(map(type_of, [[1], [2.5, None], None, []]))
    assert str(kind) == "list of number"
    assert kind.covers(type_of([3]))
    assert not type_of([3]).covers(kind)
    record = type_of({"a": 1}).merge(type_of({"b": "x"}))
    assert record.covers(type_of({"a": None}))
    assert not record.covers(type_of({"c": 1}))
    with pytest.raises(TypeMismatch, match="boolean and text"):
        type_of(True).merge(type_of("x"))


def test_columns_are_selected_joined_and_checked_for_nan() -> None:
    column = ValueColumn(BOXES)
    assert column[torch.tensor([True, False, True] + [False] * 4)].values == [BOXES[0], BOXES[2]]
    assert join([column[:2], column[[4, 2]]]).values == [BOXES[i] for i in (0, 1, 4, 2)]
    assert blank(column, 2).values == [None, None]
    bad = ValueColumn([torch.tensor([math.nan]), "nan", [{"p": math.inf}], None])
    assert finite_rows([bad]).tolist() == [False, True, False, True]
    assert count_nonfinite({"x": bad}, torch.tensor([False, True, True, True])) == 1


def test_values_travel_between_processes() -> None:
    rows = messages.pack_rows(ROWS, [*"abcdefg"], VALID)
    packed = messages._ENCODER.encode(rows)
    decoder = messages.msgspec.msgpack.Decoder(messages.Rows, ext_hook=messages._decode_extension)
    outputs, ids, valid = messages.unpack_rows(decoder.decode(bytearray(packed)))
    assert ids == [*"abcdefg"]
    assert valid is not None
    for name, column in ROWS.items():
        assert outputs[name].tolist() == column.tolist()
    assert [box.dtype for box in outputs["boxes"].values] == [torch.float32] * 7
