"""Writes that are whole, syncs that raise, checksums of any stretch."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradrun.core import files


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def test_partial_writes_are_continued(
    file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, sizes = os.write, []

    def short(descriptor: int, data: memoryview) -> int:
        sizes.append(len(data))
        return write(descriptor, data[:7])

    monkeypatch.setattr(os, "write", short)
    files.write_all(file, bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))
    assert len(sizes) == 15


def test_a_failing_write_or_sync_raises(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        files.write_all(file, b"x")
    with pytest.raises(OSError, match="No space"):
        files.sync(file)


def test_a_folder_can_be_synced(tmp_path: Path) -> None:
    files.sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.sync_folder(tmp_path / "gone")


@pytest.mark.parametrize(("begin", "end"), [(0, 3_000_000), (5, 6), (7, 7), (1_048_570, 1_048_580)])
def test_a_checksum_covers_the_requested_range(file: int, begin: int, end: int) -> None:
    data = os.urandom(3_000_000)
    files.write_all(file, data)
    assert files.checksum(file, begin, end) == zlib.crc32(data[begin:end])
    assert files.size(file) == len(data)


def test_reading_beyond_the_end_yields_nothing(file: int) -> None:
    files.write_all(file, b"abc")
    assert b"".join(files.read_chunks(file, 1, 100)) == b"bc"


def test_links_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    os.close(files.open_regular(tmp_path / "file", os.O_RDONLY))
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match="not a regular file"):
            files.open_regular(tmp_path / name, os.O_RDONLY)
    with pytest.raises(OSError, match="not a regular file"):
        files.open_regular(tmp_path, os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "none", os.O_RDONLY)


def test_lines_are_read_whole_and_endless_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"one\n\ntwo\nthree")
    assert [*files.read_lines(tmp_path / "file")] == [b"one\n", b"\n", b"two\n", b"three"]
    monkeypatch.setattr(files, "_LONGEST_LINE", 4)
    with pytest.raises(OSError, match="a line is longer than gradrun writes"):
        [*files.read_lines(tmp_path / "file")]
