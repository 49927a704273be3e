"""Images in .tar files: order, ids, ranges, labels, and archives that cannot be read."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradrun.core.errors import ConfigError
from gradrun.data.source import BatchSource
from tests.support.sources import data, data_error, joined

COLORS = {f"{'cat' if n % 3 else 'dog'}/{n}.png": (n, 2 * n, 255 - n) for n in range(11)}
NAMES = [*COLORS]


def picture(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), COLORS[name]).save(file, "png")
    return file.getvalue()


def archive(path: Path, names: Sequence[str], **others: bytes) -> Path:
    contents = {f"./{name}": picture(name) for name in names} | others
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def opened(path: Any, **keys: Any) -> BatchSource:
    return data("images", path=path, batch_size=4, **keys)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    archive(tmp_path / "part-10.tar", NAMES[6:], **{"10.json": b"{}"})
    archive(tmp_path / "part-9.TAR", NAMES[:6], **{"._1.png": b"x"})
    return tmp_path


def test_members_of_archives_are_samples_in_natural_order(shards: Path) -> None:
    source = opened(shards)
    batches = list(source.batches())
    assert [id for batch in batches for id in batch.ids] == NAMES
    expected = np.array([*COLORS.values()], np.float32) / 255
    np.testing.assert_allclose(joined(batches)[:, :, 0, 0].numpy(), expected, rtol=1e-6)
    assert [(s.topic, s.text) for s in source.statements()][:2] == [
        (
            "files",
            "11 images, as in 2 archives, in natural order, first part-9.TAR, last part-10.tar",
        ),
        ("files", "2 other files (1 .json, 1 .png) not read"),
    ]
    assert source.files == [shards / "part-9.TAR", shards / "part-10.tar"]


@pytest.mark.parametrize("path", ["part-*", ["part-9.TAR", "part-10.tar"]])
def test_a_range_has_the_images_of_the_whole_pass(shards: Path, path: Any) -> None:
    paths = [str(shards / p) for p in path] if isinstance(path, list) else shards / path
    source = opened(paths)
    whole = joined(source.batches())
    for start, stop in [(8, 11), (4, 8), (0, 11)]:
        assert joined(source.batches(start, stop)).equal(whole[start:stop])


def test_labels_are_folders_in_the_archive(shards: Path) -> None:
    source: Any = opened(shards, labels="folder")
    assert source.classes == ("cat", "dog")
    expected = [["cat", "dog"].index(name.partition("/")[0]) for name in NAMES]
    assert [int(label) for part in source.labels() for label in part] == expected


def test_a_damaged_member_is_an_error_of_its_sample(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", NAMES[:2], **{"x.png": b"no picture"})
    (batch,) = opened(path).batches()
    assert [str(error) for error in batch.errors.values()] == [
        "x.png is not an image of a supported format"
    ]


def test_links_of_an_archive_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(archive(tmp_path / "a.tar", NAMES[:2]), "a") as tar:
        for name, kind in [("s.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    (batch,) = opened(tmp_path / "a.tar").batches()
    assert list(batch.ids) == NAMES[:2]


def test_archives_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    whole = archive(tmp_path / "a.tar", NAMES[:3]).read_bytes()
    path = tmp_path / "b.tar"
    cases: dict[bytes, str] = {
        whole[:1100]: "no end mark at byte 1,024: it is truncated or damaged",
        whole[:1024]: "no end mark at byte 1,024: it is truncated or damaged",
        whole[:700]: "cannot be read as an archive: unexpected end of data",
        b"x" * 2000: "cannot be read as an archive",
        whole + whole: "it has no end mark at byte 3,072",
        archive(tmp_path / "c.tar", [], **{"a.txt": b"x"}).read_bytes(): (
            "contain no images; they have 1 other file (1 .txt)"
        ),
    }
    for content, message in cases.items():
        path.write_bytes(content)
        assert message in data_error("images", path=path, batch_size=4)
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(whole))
    assert "archives without compression; decompress it" in data_error("images", path=packed)
    assert "does not apply to files that data.path names" in data_error(
        "images", path=tmp_path / "a.tar", pattern="*"
    )


def test_images_beside_archives_are_an_error(shards: Path) -> None:
    (shards / "1.png").write_bytes(picture(NAMES[1]))
    with pytest.raises(ConfigError, match=r"1 file of images and \.tar files; select those"):
        opened(shards)
    both = [str(shards / "*.png"), str(shards / "*.tar")]
    assert "images and .tar files; choose one kind" in data_error("images", path=both)


def test_labels_are_the_members_beside_the_images(tmp_path: Path) -> None:
    """As in WebDataset: 0001.jpg and 0001.cls are one sample."""
    labels = [3, 0, 12]
    members = {
        f"{name.removesuffix('.png')}.cls": b"%d\n" % n
        for name, n in zip(NAMES, labels, strict=False)
    }
    archive(tmp_path / "a-9.tar", NAMES[:2], **dict([*members.items()][:2]))
    with tarfile.open(tmp_path / "a-10.tar", "w") as tar:  # the label comes first
        for name, content in [("dog/3.cls", b"12"), ("dog/3.x.png", picture(NAMES[3]))]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source: Any = opened(tmp_path / "a-*.tar", labels=".cls")
    assert [id for batch in source.batches() for id in batch.ids] == [*NAMES[:2], "dog/3.x.png"]
    assert torch.cat([*source.labels()]).tolist() == labels
    assert "not read" not in str([*source.statements()])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "dog/0.png in a.tar has no label, because dog/0.cls is missing"),
        ({"dog/0.cls": b""}, "dog/0.cls in a.tar is not a label: a text of at most 200 bytes"),
        ({"dog/0.cls": b"\xff"}, "is not a label"),
        ({"dog/0.cls": b"1" * 300}, "is not a label"),
    ],
)
def test_images_without_a_label_beside_them_are_an_error(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    path = archive(tmp_path / "a.tar", NAMES[:1], **members)
    assert message in data_error("images", path=path, labels=".cls")


def test_an_archive_that_becomes_shorter_is_an_error_of_its_samples(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", NAMES[:3])
    source = opened(path)
    path.write_bytes(path.read_bytes()[:1200])
    (batch,) = source.batches()
    assert [*batch.errors] == [1, 2]
