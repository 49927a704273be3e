"""Tests of the source `arrays`: .npy, .npz and .safetensors."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from gradrun.data.source import BatchSource
from tests.conftest import ROOT
from tests.support.sources import data, data_error, joined

ROWS = np.random.default_rng(0).standard_normal((103, 3, 4)).astype(np.float32)


def stored(folder: Path, form: str, rows: np.ndarray = ROWS) -> Path:
    """Write `rows` to a file of one format, next to another array if the format allows."""
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


@pytest.mark.parametrize("chunk", [None, 1, 1000])  # bytes: all, less than a row, some batches
@pytest.mark.parametrize("form", FORMS)
def test_an_array_is_read_exactly_repeatedly_and_from_any_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, chunk: int | None
) -> None:
    if chunk:
        monkeypatch.setattr("gradrun.data.source.CHUNK_BYTES", chunk)
    rows = torch.from_numpy(ROWS)
    source = opened(stored(tmp_path, form))
    assert source.samples == 103
    found = list(source.batches())
    assert [batch.size for batch in found] == [10] * 10 + [3]
    assert [batch.args[0].shape[0] for batch in found] == [10] * 10 + [3]
    assert [i for batch in found for i in batch.ids] == list(range(103))
    assert torch.equal(joined(found), rows)
    for start in (50, 0, 1, 99, 102):  # backwards too
        tail = list(source.batches(start))
        assert torch.equal(joined(tail), rows[start:])
        assert tail[0].ids[0] == start
    assert list(source.batches(103)) == []


@pytest.mark.parametrize("form", FORMS)
def test_two_iterations_at_once_are_independent(tmp_path: Path, form: str) -> None:
    source = opened(stored(tmp_path, form), batch_size=20)
    pairs = list(zip(source.batches(), source.batches(20), strict=False))
    assert torch.equal(torch.cat([ahead.args[0] for _, ahead in pairs]), torch.tensor(ROWS[20:]))
    assert torch.equal(torch.cat([b.args[0] for b, _ in pairs]), torch.tensor(ROWS[:100]))


@pytest.mark.parametrize("form", FORMS)
def test_two_threads_read_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    # As when a failed batch is read again while a thread prefetches.
    monkeypatch.setattr("gradrun.data.source.CHUNK_BYTES", 1)
    rows = np.arange(40_000, dtype=np.float32).reshape(400, 100)
    source = opened(stored(tmp_path, form, rows), batch_size=4)
    with ThreadPoolExecutor(2) as pool:
        read = [pool.submit(lambda: joined(list(source.batches()))) for _ in range(2)]
    assert all(torch.equal(future.result(), torch.from_numpy(rows)) for future in read)


@pytest.mark.parametrize("form", FORMS)
def test_dtype_scale_and_shape_are_applied_in_this_order(tmp_path: Path, form: str) -> None:
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
def test_an_array_keeps_its_stored_dtype(tmp_path: Path, form: str, dtype: str) -> None:
    rows = np.arange(6).reshape(3, 2).astype(dtype)
    found = joined(opened(stored(tmp_path, form, rows)).batches())
    assert found.dtype == getattr(torch, dtype)
    assert np.array_equal(found.numpy(), rows)


def test_bfloat16_is_read_from_safetensors(tmp_path: Path) -> None:
    rows = torch.randn(5, 2).bfloat16()
    save_file({"rows": rows}, tmp_path / "b.safetensors")
    assert torch.equal(joined(opened(tmp_path / "b.safetensors").batches()), rows)


def test_a_file_with_one_array_needs_no_inputs_section(tmp_path: Path) -> None:
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


def test_call_keyword_passes_one_input_by_name(tmp_path: Path) -> None:
    path = stored(tmp_path, "npy")
    source = data("arrays", path=path, inputs={"image": {}}, call="keyword")
    assert list(next(iter(source.batches())).kwargs) == ["image"]


class _Pickled:
    """Creates a file when it is unpickled."""

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
    "text": (lambda p: _npy(p, np.array(["a", "b"])), "torch does not support"),
    "records": (lambda p: _npy(p, np.zeros(2, [("a", "f4")])), "torch does not support"),
    "number": (lambda p: _npy(p, np.float32(3)), "a single number, not rows"),
    "empty": (lambda p: _npy(p, np.zeros((0, 4))), "no samples"),
    "cut_rows": (lambda p: _cut(_npy(p, ROWS), 600), "is truncated"),
    "cut_header": (lambda p: _cut(_npy(p, ROWS), 40), "is not a NumPy array"),
    "nothing": (lambda p: _cut(_npy(p, ROWS), 0), "is not a NumPy array"),
    "long_header": (
        lambda p: _header(p, "(2**40, 3)".replace("2**40", str(2**40))),
        "is truncated",
    ),
    "many_dimensions": (lambda p: _header(p, f"({2**62}, {2**62})"), "is truncated"),
    "negative_samples": (lambda p: _header(p, "(-4, 2)"), "is not a NumPy array"),
    "negative_rows": (lambda p: _header(p, "(4, -2)"), "is not a NumPy array"),
    "code_header": (lambda p: _header(p, "__import__('os').getpid()"), "is not a NumPy array"),
    "other_file": (lambda p: p.write_bytes(b"hello") and p, "is not a NumPy array"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["npy", "npz"])
@pytest.mark.parametrize("case", BAD_NPY)
def test_an_invalid_array_is_an_error_when_it_is_opened(
    tmp_path: Path, case: str, packed: bool
) -> None:
    make, words = BAD_NPY[case]
    path = make(tmp_path / "bad.npy")
    if packed:
        path = tmp_path / "bad.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "bad.npy", "rows.npy")
    with pytest.raises(ConfigError, match=words):
        data("arrays", path=path)


def test_a_file_that_changes_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = stored(tmp_path, "npy")
    source = opened(path)
    first = next(source.batches())
    assert torch.equal(first.args[0], torch.from_numpy(ROWS[:10]))
    _cut(path, 600)
    with pytest.raises(ConfigError, match=r"npy\.npy is truncated: its header declares 4,944"):
        list(source.batches(10))
    path.unlink()
    with pytest.raises(ConfigError, match=r"npy\.npy cannot be read: No such file or directory"):
        list(source.batches())


@pytest.mark.parametrize("start", [0, 90])
def test_a_compressed_array_that_ends_early_is_an_error(
    tmp_path: Path, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradrun.data.source.CHUNK_BYTES", 1000)
    plain = _cut(_npy(tmp_path / "a.npy", ROWS), 3000)
    path = tmp_path / "rows.npy.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    source = data("arrays", path=path, batch_size=10)
    assert torch.equal(next(source.batches()).args[0], torch.from_numpy(ROWS[:10]))
    with pytest.raises(ConfigError, match=r"rows\.npy\.gz is truncated"):
        list(source.batches(start))


def test_archives_are_not_read_from_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "rows.npz.gz").write_bytes(gzip.compress(stored(tmp_path, "stored").read_bytes()))
    assert data_error("arrays", path=tmp_path / "rows.npz.gz") == (
        "rows.npz.gz: .npz files cannot be read from a .gz file; decompress it"
    )


def test_a_pickled_array_is_an_error_and_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    np.save(tmp_path / "p.npy", np.array([_Pickled(mark)], object), allow_pickle=True)
    np.savez(tmp_path / "p.npz", rows=np.array([_Pickled(mark)], object))
    for name in ("p.npy", "p.npz"):
        assert "unpickling them could run code" in data_error("arrays", path=tmp_path / name)
    assert not mark.exists()
    np.load(tmp_path / "p.npy", allow_pickle=True)
    assert mark.exists(), "unpickling creates the file"


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_damaged_archive_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = stored(tmp_path, "compressed" if suffix == "npz" else suffix)
    whole = path.read_bytes()
    for damage in (b"", b"hello", whole[:50], whole[:-100]):
        path.write_bytes(damage)
        data_error("arrays", path=path, inputs={"x": {"key": "rows"}})


@pytest.mark.parametrize(
    ("local", "central", "value"), [(6, 8, 1), (8, 10, 99)], ids=["encrypted", "odd compression"]
)
def test_an_archive_that_zipfile_cannot_expand_is_an_error(
    tmp_path: Path, local: int, central: int, value: int
) -> None:
    path = tmp_path / "one.npz"
    np.savez(path, rows=ROWS)
    damaged = bytearray(path.read_bytes())
    damaged[local] = damaged[damaged.index(b"PK\x01\x02") + central] = value
    path.write_bytes(damaged)
    assert "rows.npy cannot be read" in data_error("arrays", path=path)


@pytest.mark.parametrize("form", ["stored", "compressed"])
def test_a_flipped_bit_in_an_archive_is_detected(tmp_path: Path, form: str) -> None:
    path = stored(tmp_path, form)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    assert "damaged" in data_error("arrays", path=path, inputs={"x": {"key": "rows"}})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"x": {"key": "row"}}, "did you mean"),
        ({"x": {}}, "contains 2 arrays"),
        ({}, "contains 2 arrays"),
        ({"x": {"key": "rows", "shape": [5, 5]}}, "12 values per sample"),
        ({"x": {"key": "rows"}, "y": {"key": "decoy"}}, "x 103, y 2"),
    ],
)
def test_a_wrong_key_shape_or_count_is_an_error(
    tmp_path: Path, inputs: dict[str, Any], words: str
) -> None:
    assert words in data_error("arrays", path=stored(tmp_path, "stored"), inputs=inputs)


def test_a_key_for_an_npy_an_unknown_suffix_and_a_missing_path_are_errors(tmp_path: Path) -> None:
    path = stored(tmp_path, "npy")
    assert "one array without a key" in data_error(
        "arrays", path=path, inputs={"x": {"key": "rows"}}
    )
    assert "no file is set" in data_error("arrays", inputs={"x": {}})
    path.rename(tmp_path / "rows.txt")
    assert "source: records" in data_error("arrays", path=tmp_path / "rows.txt")


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_values_are_still_samples(tmp_path: Path, form: str) -> None:
    source = opened(stored(tmp_path, form, np.zeros((5, 0), np.float32)), batch_size=2)
    assert [tuple(batch.args[0].shape) for batch in source.batches()] == [(2, 0), (2, 0), (1, 0)]


def test_an_error_in_the_labels_names_their_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    np.save(tmp_path / "y.npy", np.array(["a", "b", "c"]))
    keys = {"source": "arrays", "path": tmp_path / "x.npy", "labels": {"path": tmp_path / "y.npy"}}
    config = TypeAdapter(DataConfig).validate_json(json.dumps(keys, default=str))
    with pytest.raises(ConfigError, match=r"y\.npy contains <U1") as caught:
        open_data(config, seed=0)
    assert caught.value.key == "data.labels.path"


# --- memory and time ---------------------------------------------------------------------------


def sparse(path: Path, samples: int, width: int) -> Path:
    """Create a sparse file of zeros."""
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
before, start_time = resident(sys.argv[2]), time.perf_counter()
data = open_data(config, seed=0)
for batch in data.batches(int(sys.argv[3])):
    assert batch.args[0].sum() == 0
print(time.perf_counter() - start_time, resident(sys.argv[2]) - before, batch.ids[-1])
"""


def watched(path: Path, field: str, start: int) -> tuple[float, float, int]:
    """Read a file in a subprocess; return the seconds, the growth in MiB and the last id."""
    words = [sys.executable, "-c", WATCHED, str(path), field, str(start)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, grown, last = done.stdout.split()
    return float(seconds), float(grown), int(last)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_reading_the_last_batch_of_two_gigabytes_is_fast_and_needs_little_memory(
    tmp_path: Path,
) -> None:
    path = sparse(tmp_path / "big.npy", samples=2_000_000, width=256)
    assert path.stat().st_size > 2 * 10**9
    seconds, grown, last = watched(path, "VmRSS:", 1_999_999)
    assert last == 1_999_999
    assert seconds < 2
    assert grown < 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_reading_400_megabytes_needs_little_memory(tmp_path: Path) -> None:
    path = sparse(tmp_path / "big.npy", samples=400_000, width=256)
    _, grown, last = watched(path, "VmHWM:", 0)
    assert last == 399_999
    assert grown < 40


def test_opening_reads_no_rows(tmp_path: Path) -> None:
    path = sparse(tmp_path / "big.npy", samples=2_000_000, width=256)
    start_time = time.perf_counter()
    assert data("arrays", path=path).samples == 2_000_000
    assert time.perf_counter() - start_time < 0.5
