"""Every data source gives the rows that its file holds, lazily, or says what is wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from gradrun.config.data import DataConfig
from gradrun.core.errors import ConfigError
from gradrun.data import open_data
from gradrun.data.batch import Batch
from gradrun.data.source import BatchSource

ROOT = Path(__file__).parents[2]


def data(source: str, seed: int = 0, **keys: Any) -> BatchSource:
    keys = {"source": source, **keys}
    config = TypeAdapter(DataConfig).validate_json(json.dumps(keys, default=str))
    return open_data(config, seed=seed)


def joined(found: Iterator[Batch], name: str | None = None) -> torch.Tensor:
    """All batches of one input, put together again."""
    return torch.cat([b.kwargs[name] if name else b.args[0] for b in found])


def refused(source: str, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        list(data(source, **keys).batches())
    return str(caught.value)


# --- synthetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["normal", "uniform", "randint"])
@pytest.mark.parametrize("width", [3, 40_000])  # many samples a block, and one
def test_a_synthetic_sample_is_the_same_whatever_batch_size_and_start(
    distribution: str, width: int
) -> None:
    spec = {"shape": [width], "distribution": distribution, "high": 9}

    def drawn(batch_size: int, start: int = 0) -> torch.Tensor:
        opened = data("synthetic", inputs={"x": spec}, samples=25, batch_size=batch_size)
        return joined(opened.batches(start))

    whole = drawn(25)
    assert len(torch.unique(whole[:, 0])) > 5, "samples differ"
    assert all(torch.equal(drawn(size), whole) for size in (1, 7, 64))
    assert all(torch.equal(drawn(4, start), whole[start:]) for start in (1, 4, 24))


def test_a_synthetic_sample_keeps_its_values_when_more_are_asked_for() -> None:
    few, many = (
        joined(data("synthetic", inputs={"x": {"shape": [2]}}, samples=n).batches())
        for n in (10, 100_000)
    )
    assert torch.equal(many[:10], few)
    assert len(torch.unique(many, dim=0)) == 100_000, "no block repeats another"


def test_synthetic_seeds_and_inputs_are_independent() -> None:
    inputs = {"a": {"shape": [8]}, "b": {"shape": [8]}}
    first, other = (
        next(iter(data("synthetic", seed=s, inputs=inputs, samples=4).batches())).kwargs
        for s in (0, 1)
    )
    drawn = [first["a"], first["b"], other["a"], other["b"]]
    assert len({tuple(tensor.flatten().tolist()) for tensor in drawn}) == 4


@pytest.mark.parametrize(
    ("spec", "low", "high", "mean"),
    [
        ({"distribution": "normal"}, -7, 7, 0.0),
        ({"distribution": "uniform"}, 0, 1, 0.5),
        ({"distribution": "uniform", "low": -4, "high": -2, "dtype": "float64"}, -4, -2, -3.0),
        ({"distribution": "randint", "high": 5, "dtype": "int64"}, 0, 4, 2.0),
        ({"distribution": "randint", "low": -3, "high": 4, "dtype": "int8"}, -3, 3, 0.0),
        ({"distribution": "randint", "high": 256, "dtype": "uint8"}, 0, 255, 127.5),
        ({"distribution": "randint", "high": 2, "dtype": "bool"}, 0, 1, 0.5),
        ({"distribution": "zeros", "dtype": "bfloat16"}, 0, 0, 0.0),
        ({"distribution": "ones", "dtype": "float16"}, 1, 1, 1.0),
    ],
)
def test_a_distribution_keeps_to_its_range_mean_and_type(
    spec: dict[str, Any], low: float, high: float, mean: float
) -> None:
    opened = data("synthetic", inputs={"x": {"shape": [100]} | spec}, samples=1000)
    drawn = joined(opened.batches())
    assert drawn.dtype == getattr(torch, spec.get("dtype", "float32"))
    values = drawn.double()
    assert low <= values.min()
    assert values.max() <= high
    assert abs(values.mean() - mean) <= 0.01 * (high - low)
    if spec["distribution"] == "normal":
        assert abs(values.std() - 1) < 0.01
    elif spec["distribution"] == "randint":
        assert len(torch.unique(drawn)) == high - low + 1, "every number comes up"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"distribution": "normal", "dtype": "int64"}, "use distribution: randint"),
        ({"distribution": "uniform", "low": 2, "high": 2}, "low 2 must be below high 2"),
        ({"distribution": "randint", "low": 3, "high": 1, "dtype": "int64"}, "must be below"),
        ({"distribution": "randint", "high": 257, "dtype": "uint8"}, "from 0 to 256"),
        ({"distribution": "randint", "low": -129, "dtype": "int8"}, "from -128 to 128"),
        ({"distribution": "randint", "high": 3, "dtype": "bool"}, "from 0 to 2"),
        ({"distribution": "randint", "high": 1e300}, "randint numbers of float32 lie"),
        ({"distribution": "randint", "high": 2.0**63, "dtype": "int64"}, "lie from"),
        ({"distribution": "uniform", "low": -3e38, "high": 3e38}, "lie from"),
        ({"distribution": "uniform", "high": 1e6, "dtype": "float16"}, "to 65504"),
    ],
)
def test_a_distribution_that_makes_no_sense_is_refused(spec: dict[str, Any], words: str) -> None:
    assert words in refused("synthetic", inputs={"x": {"shape": [2]} | spec}, samples=3)


def test_a_batch_beyond_memory_is_refused_before_it_is_made() -> None:
    inputs = {"x": {"shape": [2**38]}}
    assert "choose a smaller batch" in refused("synthetic", inputs=inputs, samples=2**30)


# --- arrays ------------------------------------------------------------------------------------

ROWS = np.random.default_rng(0).standard_normal((103, 3, 4)).astype(np.float32)


def stored(folder: Path, form: str, rows: np.ndarray = ROWS) -> Path:
    """`rows` in a file of one form, alone or beside a decoy."""
    suffix = {"stored": "npz", "compressed": "npz"}.get(form, form)
    path = folder / f"{form}.{suffix}"
    if form == "npy":
        np.save(path, rows)
    elif form == "safetensors":
        save_file({"decoy": torch.zeros(2), "rows": torch.from_numpy(rows.copy())}, path)
    else:
        save = np.savez if form == "stored" else np.savez_compressed
        save(path, decoy=np.zeros(2), rows=rows)
    return path


FORMS = ("npy", "stored", "compressed", "safetensors")


def opened(path: Path, batch_size: int = 10, **spec: Any) -> BatchSource:
    key = {} if path.suffix == ".npy" else {"key": "rows"}
    return data("arrays", path=path, inputs={"x": key | spec}, batch_size=batch_size)


@pytest.mark.parametrize("window", [None, 1, 1000])  # bytes: all, less than a row, some batches
@pytest.mark.parametrize("form", FORMS)
def test_an_array_comes_back_bit_for_bit_and_again_and_from_any_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, window: int | None
) -> None:
    if window:
        monkeypatch.setattr("gradrun.data.source.CHUNK_BYTES", window)
    rows = torch.from_numpy(ROWS)
    source = opened(stored(tmp_path, form))
    assert source.samples == 103
    found = list(source.batches())
    assert [batch.size for batch in found] == [10] * 10 + [3]
    assert [batch.args[0].shape[0] for batch in found] == [10] * 10 + [3]
    assert [i for batch in found for i in batch.ids] == list(range(103))
    assert torch.equal(joined(iter(found)), rows)
    for start in (50, 0, 1, 99, 102):  # backwards too
        tail = list(source.batches(start))
        assert torch.equal(joined(iter(tail)), rows[start:])
        assert tail[0].ids[0] == start
    assert list(source.batches(103)) == []


@pytest.mark.parametrize("form", FORMS)
def test_two_walks_at_once_do_not_disturb_each_other(tmp_path: Path, form: str) -> None:
    source = opened(stored(tmp_path, form), batch_size=20)
    pairs = list(zip(source.batches(), source.batches(20), strict=False))
    assert torch.equal(torch.cat([ahead.args[0] for _, ahead in pairs]), torch.tensor(ROWS[20:]))
    assert torch.equal(torch.cat([b.args[0] for b, _ in pairs]), torch.tensor(ROWS[:100]))


@pytest.mark.parametrize("form", FORMS)
def test_type_scale_and_shape_are_applied_in_this_order(tmp_path: Path, form: str) -> None:
    rows = np.arange(24, dtype=np.uint8).reshape(4, 6)
    source = opened(stored(tmp_path, form, rows), dtype="float64", scale=0.1, shape=[1, 2, 3])
    expected = (torch.from_numpy(rows).double() * 0.1).reshape(4, 1, 2, 3)
    found = joined(source.batches())
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "int16", "int32", "int64", "bool", "float16", "float64"]
)
@pytest.mark.parametrize("form", FORMS)
def test_an_array_keeps_the_type_it_is_stored_in(tmp_path: Path, form: str, dtype: str) -> None:
    rows = np.arange(6).reshape(3, 2).astype(dtype)
    found = joined(opened(stored(tmp_path, form, rows)).batches())
    assert found.dtype == getattr(torch, dtype)
    assert np.array_equal(found.numpy(), rows)


def test_bfloat16_is_read_from_safetensors(tmp_path: Path) -> None:
    rows = torch.randn(5, 2).bfloat16()
    save_file({"rows": rows}, tmp_path / "b.safetensors")
    assert torch.equal(joined(opened(tmp_path / "b.safetensors").batches()), rows)


def test_a_file_with_one_array_needs_no_input_section(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", anything=ROWS)
    assert torch.equal(
        joined(data("arrays", path=tmp_path / "one.npz").batches()), torch.from_numpy(ROWS)
    )


@pytest.mark.parametrize("call", ["auto", "positional", "keyword"])
def test_several_inputs_come_from_several_files(tmp_path: Path, call: str) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    np.savez(tmp_path / "b.npz", rows=ROWS * 2)
    inputs = {"one": {"path": tmp_path / "a.npy"}, "two": {"key": "rows"}}
    source = data("arrays", path=tmp_path / "b.npz", inputs=inputs, call=call, batch_size=50)
    for first, batch in zip((0, 50, 100), source.batches(), strict=True):
        assert list(batch.kwargs) == ([] if call == "positional" else ["one", "two"])
        one, two = batch.tensors()
        assert np.array_equal(one.numpy(), ROWS[first : first + 50])
        assert np.array_equal(two.numpy(), ROWS[first : first + 50] * 2)


def test_one_input_is_passed_by_name_where_the_config_says_so(tmp_path: Path) -> None:
    path = stored(tmp_path, "npy")
    source = data("arrays", path=path, inputs={"image": {}}, call="keyword")
    assert list(next(iter(source.batches())).kwargs) == ["image"]


class _Pickled:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def _npy(path: Path, rows: Any) -> Path:
    np.save(path, rows)
    return path


def _header(path: Path, shape: str, dtype: str = "<f4", body: bytes = b"0" * 64) -> Path:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with path.open("ab") as file:
        file.write(body)
    return path


def _cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


BAD_NPY: dict[str, tuple[Callable[[Path], Path], str]] = {
    "fortran": (lambda p: _npy(p, np.asfortranarray(ROWS)), "Fortran order"),
    "big_endian": (lambda p: _npy(p, ROWS.astype(">f4")), "byte order"),
    "text": (lambda p: _npy(p, np.array(["a", "b"])), "torch has no type"),
    "records": (lambda p: _npy(p, np.zeros(2, [("a", "f4")])), "torch has no type"),
    "number": (lambda p: _npy(p, np.float32(3)), "a single number"),
    "empty": (lambda p: _npy(p, np.zeros((0, 4))), "no samples"),
    "cut_rows": (lambda p: _cut(_npy(p, ROWS), 600), "cut off"),
    "cut_header": (lambda p: _cut(_npy(p, ROWS), 40), "no array of numpy's"),
    "nothing": (lambda p: _cut(_npy(p, ROWS), 0), "no array of numpy's"),
    "long_header": (lambda p: _header(p, "(2**40, 3)".replace("2**40", str(2**40))), "cut off"),
    "many_dimensions": (lambda p: _header(p, f"({2**62}, {2**62})"), "cut off"),
    "negative_samples": (lambda p: _header(p, "(-4, 2)"), "no array of numpy's"),
    "negative_rows": (lambda p: _header(p, "(4, -2)"), "no array of numpy's"),
    "code_header": (lambda p: _header(p, "__import__('os').getpid()"), "no array of numpy's"),
    "no_numpy": (lambda p: p.write_bytes(b"hello") and p, "no array of numpy's"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["npy", "npz"])
@pytest.mark.parametrize("case", BAD_NPY)
def test_a_bad_array_is_refused_when_it_is_opened(tmp_path: Path, case: str, packed: bool) -> None:
    import zipfile

    make, words = BAD_NPY[case]
    path = make(tmp_path / "bad.npy")
    if packed:
        path = tmp_path / "bad.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "bad.npy", "rows.npy")
    with pytest.raises(ConfigError, match=words):
        data("arrays", path=path)


def test_a_pickled_array_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    np.save(tmp_path / "p.npy", np.array([_Pickled(mark)], object), allow_pickle=True)
    np.savez(tmp_path / "p.npz", rows=np.array([_Pickled(mark)], object))
    for name in ("p.npy", "p.npz"):
        assert "unpickling them could run code" in refused("arrays", path=tmp_path / name)
    assert not mark.exists()
    np.load(tmp_path / "p.npy", allow_pickle=True)
    assert mark.exists(), "the mark would have shown it"


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_damaged_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    path = stored(tmp_path, "compressed" if suffix == "npz" else suffix)
    whole = path.read_bytes()
    for damage in (b"", b"hello", whole[:50], whole[:-100]):
        path.write_bytes(damage)
        refused("arrays", path=path, inputs={"x": {"key": "rows"}})


@pytest.mark.parametrize(
    ("local", "central", "value"), [(6, 8, 1), (8, 10, 99)], ids=["encrypted", "odd compression"]
)
def test_an_archive_that_zipfile_cannot_unpack_is_refused(
    tmp_path: Path, local: int, central: int, value: int
) -> None:
    path = tmp_path / "one.npz"
    np.savez(path, rows=ROWS)
    damaged = bytearray(path.read_bytes())
    damaged[local] = damaged[damaged.index(b"PK\x01\x02") + central] = value
    path.write_bytes(damaged)
    assert "rows.npy cannot be read" in refused("arrays", path=path)


@pytest.mark.parametrize("form", ["stored", "compressed"])
def test_a_flipped_bit_in_an_archive_is_found(tmp_path: Path, form: str) -> None:
    path = stored(tmp_path, form)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    assert "damaged" in refused("arrays", path=path, inputs={"x": {"key": "rows"}})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"x": {"key": "row"}}, "did you mean"),
        ({"x": {}}, "holds 2 arrays"),
        ({}, "holds 2 arrays"),
        ({"x": {"key": "rows", "shape": [5, 5]}}, "12 values a sample"),
        ({"x": {"key": "rows"}, "y": {"key": "decoy"}}, "x 103, y 2"),
    ],
)
def test_a_wrong_key_shape_or_count_is_explained(
    tmp_path: Path, inputs: dict[str, Any], words: str
) -> None:
    assert words in refused("arrays", path=stored(tmp_path, "stored"), inputs=inputs)


def test_a_key_for_an_npy_an_unknown_suffix_and_no_file_are_refused(tmp_path: Path) -> None:
    path = stored(tmp_path, "npy")
    assert "which has no key" in refused("arrays", path=path, inputs={"x": {"key": "rows"}})
    assert "no file" in refused("arrays", inputs={"x": {}})
    path.rename(tmp_path / "rows.txt")
    assert "source: records" in refused("arrays", path=tmp_path / "rows.txt")


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_values_are_still_samples(tmp_path: Path, form: str) -> None:
    source = opened(stored(tmp_path, form, np.zeros((5, 0), np.float32)), batch_size=2)
    assert [tuple(batch.args[0].shape) for batch in source.batches()] == [(2, 0), (2, 0), (1, 0)]


# --- lazily ------------------------------------------------------------------------------------


def sparse(path: Path, samples: int, width: int) -> Path:
    """A file of zeros that takes no room on the disk."""
    _header(path, f"({samples}, {width})", body=b"")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + samples * width * 4)
    return path


WATCHED = """
import sys, time
import torch
from pathlib import Path
from gradrun.config.data import ArraysData
from gradrun.data import open_data

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

config = ArraysData(source="arrays", path=Path(sys.argv[1]))
before, began = resident(sys.argv[2]), time.perf_counter()
data = open_data(config, seed=0)
for batch in data.batches(int(sys.argv[3])):
    assert batch.args[0].sum() == 0
print(time.perf_counter() - began, resident(sys.argv[2]) - before, batch.ids[-1])
"""


def watched(path: Path, field: str, start: int) -> tuple[float, float, int]:
    """(seconds, growth in MiB, last id) of a walk in a process of its own."""
    words = [sys.executable, "-c", WATCHED, str(path), field, str(start)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, grown, last = done.stdout.split()
    return float(seconds), float(grown), int(last)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_last_batch_of_two_gigabytes_costs_no_more_than_any_other(tmp_path: Path) -> None:
    path = sparse(tmp_path / "big.npy", samples=2_000_000, width=256)
    assert path.stat().st_size > 2 * 10**9
    seconds, grown, last = watched(path, "VmRSS:", 1_999_999)
    assert last == 1_999_999
    assert seconds < 2
    assert grown < 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_400_megabytes_keeps_a_few_in_memory(tmp_path: Path) -> None:
    path = sparse(tmp_path / "big.npy", samples=400_000, width=256)
    _, grown, last = watched(path, "VmHWM:", 0)
    assert last == 399_999
    assert grown < 40


def test_opening_reads_no_rows(tmp_path: Path) -> None:
    path = sparse(tmp_path / "big.npy", samples=2_000_000, width=256)
    began = time.perf_counter()
    assert data("arrays", path=path).samples == 2_000_000
    assert time.perf_counter() - began < 0.5


# --- records -----------------------------------------------------------------------------------


def records(path: Path, text: str | bytes, columns: list[str], **keys: Any) -> BatchSource:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    spec = {"columns": columns} | keys.pop("spec", {})
    return data("records", path=path, inputs={"x": spec}, **keys)


@pytest.mark.parametrize(
    "text",
    [
        "name,a,b\nx,1,2\ny,3,4\n",
        "name,a,b\r\nx,1,2\r\ny,3,4",
        "\ufeffa,b\n1,2\n3,4\n",
        "name,a,b\n\nx,1,2\n\n\ny,3,4\n\n",
        'name,a,b\n"x\nand, more",1,2\n"y ""z""",3,4\n',
        'name,a,b\n"x"," 1 ","2.0"\ny,3e0,+4\n',
    ],
)
def test_a_csv_is_read_as_spreadsheets_write_it(tmp_path: Path, text: str) -> None:
    source = records(tmp_path / "t.csv", text, ["b", "a"])
    assert source.samples == 2
    assert joined(source.batches()).tolist() == [[2, 1], [4, 3]]
    assert joined(source.batches(1)).tolist() == [[4, 3]]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "b": 2}\n{"a": 3, "b": 4}\n',
        '\ufeff{"b": 2, "a": 1, "c": "x"}\n\n  \n{"a": 3.0, "b": 4}',
        '{"a": [1], "b": [[2]]}\r\n{"a": 3, "b": [4]}\n',
    ],
)
def test_jsonl_fields_are_laid_side_by_side(tmp_path: Path, text: str) -> None:
    source = records(tmp_path / "t.jsonl", text, ["a", "b"])
    assert joined(source.batches()).tolist() == [[1, 2], [3, 4]]


def test_jsonl_lists_take_type_scale_and_shape(tmp_path: Path) -> None:
    text = '{"image": [[1, 2], [3, 4]]}\n{"image": [5, 6, 7, 8]}\n'
    spec = {"dtype": "float64", "scale": 0.5, "shape": [1, 2, 2]}
    source = records(tmp_path / "t.jsonl", text, ["image"], spec=spec)
    found = joined(source.batches())
    assert found.dtype == torch.float64
    assert found.tolist() == [[[[0.5, 1], [1.5, 2]]], [[[2.5, 3], [3.5, 4]]]]


def test_large_integers_stay_exact(tmp_path: Path) -> None:
    big = 2**53 + 1
    for name, text in (("t.csv", f"a\n{big}\n"), ("t.jsonl", f'{{"a": {big}}}')):
        source = records(tmp_path / name, text, ["a"], spec={"dtype": "int64"})
        assert joined(source.batches()).item() == big


def test_rows_are_named_by_the_id_column_or_counted(tmp_path: Path) -> None:
    text = "name,a\nx,1\ny,2\nz,3\n"
    named = records(tmp_path / "t.csv", text, ["a"], id="name", batch_size=2)
    assert [list(batch.ids) for batch in named.batches()] == [["x", "y"], ["z"]]
    assert [list(batch.ids) for batch in named.batches(1)] == [["y", "z"]]
    counted = records(tmp_path / "t.csv", text, ["a"], batch_size=2)
    assert [list(batch.ids) for batch in counted.batches()] == [[0, 1], [2]]


def test_several_inputs_take_columns_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,c\n1,2,3\n4,5,6\n")
    inputs = {"one": {"columns": ["c"]}, "two": {"columns": ["a", "b"], "dtype": "int32"}}
    source = data("records", path=tmp_path / "t.csv", inputs=inputs)
    assert joined(source.batches(), "one").tolist() == [[3], [6]]
    two = joined(source.batches(), "two")
    assert two.dtype == torch.int32
    assert two.tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "a,b\n1,2\nx,4\n", "t.csv:3  column 'a' is 'x'"),
        ("t.csv", "a,b\n1,2\n\n3,\n", "t.csv:4  column 'b' is ''"),
        ("t.csv", "a,b\n1,2\n3\n", "t.csv:3  column 'b' is missing"),
        ("t.csv", "a,b\n1,2\n3,4,5\n", "t.csv:3  3 values"),
        ("t.csv", "a,b,c\n1,2,3\n1,000,2,3\n", "t.csv:3  4 values"),
        ("t.csv", 'a,b\n"1\n",2\n3,"y\n\n"\n', "t.csv:6  column 'b'"),
        ("t.csv", "a,c\n1,2\n", "no column 'b'"),
        ("t.csv", "a,b\n", "no samples"),
        ("t.csv", "", "no samples"),
        ("t.csv", b"a,b\n1,\xff\n", "cannot be read"),
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1, "b": "x"}\n', "t.jsonl:2  column 'b' is 'x'"),
        ("t.jsonl", '{"a": 1, "b": 2}\n\n{"a": 1}\n', "t.jsonl:3  column 'b' is missing"),
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1, "b": null}\n', "t.jsonl:2  column 'b' is missing"),
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1, "b": [2, 3]}\n', "t.jsonl:2  3 values"),
        ("t.jsonl", '{"a": 1, "b": [[1, 2], [3]]}\n', "t.jsonl:1  column 'b'"),
        ("t.jsonl", '{"a": 1, "b": {"c": 1}}\n', "t.jsonl:1  column 'b'"),
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1,\n', "t.jsonl:2  not JSON"),
        ("t.jsonl", "[1, 2]\n", "t.jsonl:1  a line is one object"),
        ("t.jsonl", '{"a": 1, "c": 2}\n', "no column 'b'"),
        ("t.jsonl", "\n\n", "no samples"),
        ("t.txt", "a,b\n1,2\n", "source: arrays"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(
    tmp_path: Path, name: str, text: str | bytes, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        list(records(tmp_path / name, text, ["a", "b"]).batches())
    assert words in str(caught.value)


@pytest.mark.parametrize(("name", "form"), [("t.csv", "a\n{}\n"), ("t.jsonl", '{{"a": {}}}\n')])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [("1.5", "int64"), (str(2**70), "int64"), ("300", "uint8"), ("1e999", "int8")],
)
def test_a_number_that_its_type_cannot_hold_is_refused(
    tmp_path: Path, name: str, form: str, value: str, dtype: str
) -> None:
    with pytest.raises(ConfigError, match=rf"column 'a' is .*, which is no {dtype} number"):
        records(tmp_path / name, form.format(value), ["a"], spec={"dtype": dtype})


def test_an_unknown_id_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column 'nme'; did you mean"):
        records(tmp_path / "t.csv", "name,a\nx,1\n", ["a"], id="nme")


def test_records_are_read_a_batch_at_a_time(tmp_path: Path) -> None:
    """A fault in a late row is met when that row is read, after the batches before it."""
    source = records(tmp_path / "t.csv", "a\n" + "1\n" * 10 + "x\n", ["a"], batch_size=5)
    found = source.batches()
    assert [next(found).size, next(found).size] == [5, 5]
    with pytest.raises(ConfigError, match=":12"):
        next(found)


def test_labels_that_are_no_numbers_are_blamed_on_their_own_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    np.save(tmp_path / "y.npy", np.array(["a", "b", "c"]))
    keys = {"source": "arrays", "path": tmp_path / "x.npy", "labels": {"path": tmp_path / "y.npy"}}
    config = TypeAdapter(DataConfig).validate_json(json.dumps(keys, default=str))
    with pytest.raises(ConfigError, match=r"y\.npy holds <U1") as caught:
        open_data(config, seed=0)
    assert caught.value.key == "data.labels.path"
