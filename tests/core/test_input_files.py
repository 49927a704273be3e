"""Input files: natural order, folders, globs and lists; reading through a compression."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradrun.core.errors import ConfigError
from gradrun.core.input_files import (
    common_folder,
    format_name,
    format_suffix,
    list_files,
    open_input,
)

TEXT = b"".join(b"line %d\n" % number for number in range(5000))
TABLES = (".csv", ".tsv", ".jsonl")


def zstd_compress(data: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    compressed: bytes = zstd.compress(data)
    return compressed


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd_compress,
}


def make(folder: Path, *names: str) -> list[Path]:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(str(number))
    return [folder / name for name in names]


def names(folder: Path, path: Path | list[Path]) -> list[str]:
    files = list_files(path, "data.path", TABLES).files
    return [file.relative_to(folder).as_posix() for file in files]


def error(path: Path | list[Path]) -> str:
    with pytest.raises(ConfigError) as caught:
        list_files(path, "data.path", TABLES)
    assert caught.value.key == "data.path"
    return str(caught.value)


SHARDS = ["shard1.csv", "shard2.csv", "shard10.csv", "shard20.CSV.GZ"]


def test_files_of_a_folder_and_of_a_glob_are_in_natural_order(tmp_path: Path) -> None:
    make(tmp_path, *reversed(SHARDS))
    assert names(tmp_path, tmp_path) == SHARDS
    assert names(tmp_path, tmp_path / "*.csv") == SHARDS[:3]
    assert names(tmp_path, tmp_path / "shard[12]*") == SHARDS


def test_folders_are_ordered_by_number_before_their_files(tmp_path: Path) -> None:
    expected = ["day2/a9.csv", "day2/a10.csv", "day11/a1.csv"]
    make(tmp_path, *expected)
    assert names(tmp_path, tmp_path) == expected
    assert names(tmp_path, tmp_path / "**" / "*.csv") == expected


def test_a_list_keeps_its_order(tmp_path: Path) -> None:
    a, b, c = make(tmp_path, "b.csv", "a.csv", "more/c.csv")
    assert names(tmp_path, [c.parent, a, b]) == ["more/c.csv", "b.csv", "a.csv"]
    assert list_files([a, b], "data.path").order == "in the order of the list"


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    make(tmp_path, "a[1].csv", "a1.csv")
    assert names(tmp_path, tmp_path / "a[1].csv") == ["a[1].csv"]


def test_hidden_files_and_other_formats_of_a_folder_are_counted_and_not_read(
    tmp_path: Path,
) -> None:
    make(tmp_path, "a.csv", ".DS_Store", "_SUCCESS", "_log/0.csv", "README.md", "LICENSE")
    listed = list_files(tmp_path, "data.path", TABLES)
    assert listed.files == (tmp_path / "a.csv",)
    assert listed.left_out == "4 other files (1 .csv, 1 .md, 1 _SUCCESS, 1 no suffix)"


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ([], ".", "has no files to read (.csv, .jsonl, .tsv)"),
        (["a.md"], ".", "has no files to read (.csv, .jsonl, .tsv); it has 1 other file (1 .md)"),
        (["a.csv"], "b.csv", "b.csv does not exist"),
        (["a.csv"], "*.tsv", "no file matches"),
        (["d/a.csv"], "*", "(only folders: append /*)"),
        (["a.csv", "b.jsonl"], ".", "several formats, such as a.csv and b.jsonl"),
        (["a.jsonl.gz", "b.csv"], ".", "/*.jsonl.gz"),
        (["a.csv", "a.csv.gz"], ".", "a.csv and a.csv.gz in"),
    ],
)
def test_a_path_without_usable_files_is_an_error(
    tmp_path: Path, files: list[str], path: str, message: str
) -> None:
    make(tmp_path, *files)
    assert message in error(tmp_path / path)


def test_a_path_that_the_system_refuses_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert error(tmp_path) == f"{tmp_path} cannot be read: Permission denied"


def test_the_common_folder_is_the_part_of_the_paths_before_a_wildcard(tmp_path: Path) -> None:
    one, two = make(tmp_path, "a/b/one.csv", "a/c/two.csv")
    assert common_folder(one, "data.path") == tmp_path / "a" / "b"
    assert common_folder(tmp_path / "a", "data.path") == tmp_path / "a"
    assert common_folder(tmp_path / "a" / "*" / "one.csv", "data.path") == tmp_path / "a"
    assert common_folder([one, two], "data.path") == tmp_path / "a"
    assert common_folder([one, Path("/")], "data.path") == Path("/")
    with pytest.raises(ConfigError, match="have no common folder"):
        common_folder([one, Path("relative/x.csv")], "data.path")


def test_a_file_that_is_listed_twice_is_an_error(tmp_path: Path) -> None:
    (a,) = make(tmp_path, "a.csv")
    assert f"{a} is listed twice" in error([a, tmp_path])
    (tmp_path / "latest.csv").symlink_to(a)
    assert f"{tmp_path / 'latest.csv'} is the same file as {a}" in error(tmp_path)


def test_a_broken_link_or_an_unreadable_folder_is_an_error_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.csv", "more/b.csv")
    (tmp_path / "c.csv").symlink_to(tmp_path / "absent")
    for path in (tmp_path, tmp_path / "*.csv"):
        assert "c.csv is not a regular file, but a broken link" in error(path)
    (tmp_path / "c.csv").unlink()
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path / 'more'} cannot be read: Permission denied" in error(tmp_path)


def test_the_format_is_the_suffix_before_the_compression() -> None:
    for name, suffix, shown in [
        ("a.jsonl.gz", ".jsonl", "jsonl.gz"),
        ("A.CSV.XZ", ".csv", "csv.xz"),
        ("a.gz", "", ".gz"),
        ("a.parquet", ".parquet", "parquet"),
    ]:
        assert format_suffix(Path(name)) == suffix
        assert format_name(Path(name)) == shown.removeprefix(".")


@pytest.mark.parametrize("suffix", [*COMPRESS])
def test_a_compressed_file_has_the_content_of_the_file(tmp_path: Path, suffix: str) -> None:
    for content in (TEXT, b""):
        path = tmp_path / f"t.txt{suffix.upper()}"
        path.write_bytes(COMPRESS[suffix](content))
        with open_input(path) as file:
            assert not file.seekable()
            assert file.read() == content


@pytest.mark.parametrize("suffix", [*COMPRESS])
def test_a_file_of_several_compressed_parts_is_read_to_its_end(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT[:700]) + COMPRESS[suffix](TEXT[700:]))
    with open_input(path) as file:
        assert file.read() == TEXT


@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".gz"])
def test_zeros_behind_compressed_data_are_ignored(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.txt{suffix}"
    padding = bytes(400_000)
    for content in (TEXT, b""):
        path.write_bytes(COMPRESS[suffix](content) + padding + COMPRESS[suffix](TEXT) + padding)
        with open_input(path) as file:
            assert file.read() == content + TEXT


@pytest.mark.parametrize("suffix", [*COMPRESS])
@pytest.mark.parametrize("rest", ["damaged", "cut", "no stream"])
def test_a_damaged_second_part_is_an_error(tmp_path: Path, suffix: str, rest: str) -> None:
    path, packed = tmp_path / f"t.txt{suffix}", COMPRESS[suffix](os.urandom(40_000))
    second = {
        "damaged": b"\xff" + packed[1:],
        "cut": packed[:20_000],
        "no stream": b"other data",
    }[rest]
    path.write_bytes(packed + second)
    with open_input(path) as file, pytest.raises(OSError, match="the compressed data"):
        file.read()


@pytest.mark.parametrize("suffix", [*COMPRESS])
def test_damaged_compressed_files_are_errors_with_a_reason(tmp_path: Path, suffix: str) -> None:
    path, packed = tmp_path / f"t.txt{suffix}", COMPRESS[suffix](os.urandom(40_000))
    cases = {
        packed[:20_000]: "the compressed data end too early; the file is truncated",
        packed[:7] + b"\xff" * 300 + packed[307:]: "the compressed data are damaged",
        TEXT: "but it is not",
        b"": "but it is empty (0 bytes)",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(OSError, match=message.replace("(", r"\(").replace(")", r"\)")):
            open_input(path).read()


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_compressed_file_without_the_suffix_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(COMPRESS[suffix](TEXT))
    with pytest.raises(OSError, match=f"add {suffix} to its name"):
        open_input(path)


def test_zstd_names_its_extra_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.version_info >= (3, 14):
        pytest.skip("Python reads zstd itself")
    path = tmp_path / "t.csv.zst"
    path.write_bytes(zstd_compress(TEXT))
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    with pytest.raises(ConfigError, match=r"pip install 'gradrun\[zstd\]'"):
        open_input(path)
