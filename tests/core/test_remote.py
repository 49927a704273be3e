"""Requests to a store that fails in planted ways, without a server."""

from __future__ import annotations

import errno
import re
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradrun.core import remote
from gradrun.core.remote import RemoteError, RemotePath, as_path, local_copy

FILE = RemotePath("s3://bucket/folder/a.bin")


class Status(Exception):
    """An error with a status of HTTP."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status = status


def named(kind: str, text: str = "") -> Exception:
    """Return an error of a type of a library that is not imported."""
    return type(kind, (Exception,), {})(text)


class Store:
    """A file system of fsspec whose next requests may fail or give other bytes."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {"bucket/folder/a.bin": bytes(range(200))}
        self.errors: deque[Exception] = deque()
        self.answers: deque[bytes] = deque()
        self.requests: list[str] = []

    def _next(self, request: str) -> None:
        self.requests.append(request)
        if self.errors:
            raise self.errors.popleft()

    def _details(self, key: str) -> dict[str, Any]:
        data = self.objects[key]
        return {"type": "file", "size": len(data), "ETag": f"{hash(data)}"}

    def info(self, key: str) -> dict[str, Any]:
        self._next("info")
        if key in self.objects:
            return self._details(key)
        if any(name.startswith(f"{key}/") for name in self.objects):
            return {"type": "directory", "size": 0}
        raise FileNotFoundError(key)

    def find(self, key: str, detail: bool) -> dict[str, Any]:
        self._next("find")
        return {name: self._details(name) for name in self.objects if name.startswith(f"{key}/")}

    def glob(self, key: str, detail: bool) -> dict[str, Any]:
        self._next("glob")
        return {name: self._details(name) for name in self.objects if Path(name).match(key)}

    def cat_file(self, key: str, start: int, end: int) -> bytes:
        self._next("cat")
        return self.answers.popleft() if self.answers else self.objects[key][start:end]

    def pipe_file(self, key: str, data: bytes) -> None:
        self._next("pipe")
        self.objects[key] = data

    def rm_file(self, key: str) -> None:
        self._next("rm")
        if self.objects.pop(key, None) is None:
            raise FileNotFoundError(key)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that requests wait before they are repeated; nothing waits."""
    found: list[float] = []
    monkeypatch.setattr("gradrun.core.remote.time.sleep", found.append)
    return found


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Store]:
    found = Store()
    monkeypatch.setattr(remote, "connect", lambda _: found)
    monkeypatch.setattr(remote, "_blocks", remote._Blocks())
    remote._filesystem.cache_clear()
    remote.forget_versions()
    yield found
    remote._filesystem.cache_clear()
    remote.forget_versions()


def test_a_request_that_fails_is_repeated_with_longer_waits(
    store: Store, waits: list[float]
) -> None:
    store.errors.extend([Status(503), Status(429), ConnectionError("reset")])
    assert FILE.stat().st_size == 200
    assert len(store.requests) == 4
    assert all(0.5 <= wait / (0.5 * 2**n) <= 1 for n, wait in enumerate(waits))
    store.errors.extend([Status(500)] * 6)
    with pytest.raises(RemoteError, match=r"busy or broken \(500\)"):
        FILE.stat()
    assert len(store.requests) == 10
    assert len(waits) == 3 + 5


DENIED = "the store denies access to s3://bucket: check the address, the credentials in the"


@pytest.mark.parametrize(
    ("error", "problem", "repeated"),
    [
        (PermissionError("s3://key:secret@x"), DENIED, False),
        (Status(403), DENIED, False),
        (named("HttpError", "Forbidden: https://x?token=secret"), DENIED, False),
        (
            named("NoCredentialsError"),
            "the environment has no credentials for s3://bucket: ",
            False,
        ),
        (named("OfflineModeIsEnabled"), "HF_HUB_OFFLINE is set, so s3://bucket cannot be", False),
        (named("ConnectTimeout"), "the server of s3://bucket does not answer", True),
        (named("ProfileNotFound", "secret"), "s3://bucket in the environment are not valid", False),
        (Status(416), "its content changed during the run", False),
        (Status(400, "secret"), "the server answered 400", False),
        (ValueError("secret"), "s3://bucket is not a valid address, its server does not", False),
        (Status(500), "the store is busy or broken (500)", True),
        (named("ClientError", "SlowDown"), "the store is busy or broken (ClientError)", True),
        (named("Odd", "secret"), "the connection to s3://bucket failed (Odd)", True),
    ],
)
def test_an_error_is_a_sentence_without_its_text(
    store: Store, error: Exception, problem: str, repeated: bool
) -> None:
    """The text of the error may contain a credential."""
    store.errors.extend([error] * 6)
    with pytest.raises(RemoteError) as caught:
        FILE.exists()
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(store.requests) == (6 if repeated else 1)


def test_the_cause_of_a_missing_file_is_the_error(store: Store) -> None:
    error = FileNotFoundError("bucket/folder/a.bin")
    error.__cause__ = Status(401)
    store.errors.append(error)
    with pytest.raises(RemoteError, match="denies access"):
        FILE.exists()
    error = FileNotFoundError("bucket/folder/a.bin")
    error.__cause__ = Status(404)
    store.errors.append(error)
    assert not FILE.exists()


def test_the_state_of_a_path_is_that_of_the_object(store: Store) -> None:
    assert (FILE.is_file(), FILE.is_dir(), FILE.is_symlink()) == (True, False, False)
    assert (FILE.parent.is_file(), FILE.parent.is_dir()) == (False, True)
    assert stat.S_ISREG(FILE.stat().st_mode)
    assert stat.S_ISDIR(FILE.parent.stat().st_mode)
    assert not RemotePath("s3://").is_dir()
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        (FILE.parent / "b.bin").stat()
    version = FILE.version()
    store.objects["bucket/folder/a.bin"] = b"other"
    assert FILE.version() != version
    assert str(FILE.relative_to(FILE.parent)) == "a.bin"
    assert repr(FILE) == "RemotePath('s3://bucket/folder/a.bin')"


def test_files_below_a_folder_and_of_a_pattern_need_no_further_request(store: Store) -> None:
    store.objects["bucket/folder/b.txt"] = b"1234"
    store.objects["bucket/folder/empty/"] = b""  # as some tools mark a folder
    assert sorted(map(str, FILE.parent.files())) == [
        "s3://bucket/folder/a.bin", "s3://bucket/folder/b.txt",
    ]  # fmt: skip
    (found,) = FILE.parent.glob("*.txt")
    before = len(store.requests)
    assert (found.size(), found.is_file(), found.is_dir()) == (4, True, False)
    assert len(store.requests) == before


def test_a_file_is_read_by_range_like_a_local_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 64)
    with FILE.open("rb") as file:
        assert file.read(3) == b"\0\1\2"
        assert file.seek(-4, 2) == 196
        assert file.read() == bytes(range(196, 200))
        assert file.seek(100) == 100
        assert file.seek(28, 1) == 128
        assert file.read(2) == b"\x80\x81"
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
    store.objects["bucket/folder/t.txt"] = "ä\nb".encode()
    assert (FILE.parent / "t.txt").read_text(encoding="utf-8") == "ä\nb"
    with pytest.raises(OSError, match="opened for reading only") as caught:
        FILE.open("w")
    assert caught.value.errno == errno.EROFS
    with pytest.raises(IsADirectoryError):
        FILE.parent.open("rb")


def test_an_answer_of_another_length_is_repeated_or_refused(store: Store) -> None:
    store.answers.append(b"\0\1")  # the connection ended early
    assert FILE.read_bytes() == bytes(range(200))
    remote._blocks = remote._Blocks()
    store.answers.append(b"\0" * 300)  # the whole file, or a page
    with pytest.raises(RemoteError, match="its server cannot send a part of a file"):
        FILE.read_bytes()


def test_a_file_that_changes_while_it_is_read_ends_with_an_error(store: Store) -> None:
    FILE.note_version()
    store.objects["bucket/folder/a.bin"] = bytes(200)
    with pytest.raises(RemoteError, match="its content changed during the run"):
        FILE.read_bytes()


def test_a_file_of_unknown_size_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "info", lambda _: {"type": "file", "size": None})
    with pytest.raises(RemoteError, match="its server does not report its size"):
        FILE.read_bytes()


def test_objects_are_written_and_removed(store: Store) -> None:
    remote.put_bytes(b"new", FILE)
    assert FILE.read_bytes() == b"new"
    remote.remove(FILE)
    remote.remove(FILE)  # it may be gone already
    assert not FILE.exists()
    store.errors.append(FileNotFoundError("bucket"))
    with pytest.raises(RemoteError, match=r"s3://bucket does not exist"):
        remote.put_bytes(b"new", FILE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remote, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_a_folder_is_copied_once_per_version_without_hidden_files(
    store: Store, cache: Path
) -> None:
    store.objects |= {"bucket/folder/more/b.txt": b"b", "bucket/folder/.git/x": b"x"}
    copy = local_copy(FILE.parent)
    files = {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*.*")}
    assert files == {"a.bin": bytes(range(200)), "more/b.txt": b"b"}
    store.requests.clear()
    assert local_copy(FILE.parent) == copy
    assert "cat" not in store.requests
    assert local_copy(cache) == cache
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        local_copy(RemotePath("s3://bucket/none"))


def test_a_name_that_leads_out_of_the_copy_is_left_out(store: Store, cache: Path) -> None:
    store.objects["bucket/folder/../../../evil"] = b"x"
    assert [path.name for path in local_copy(FILE.parent).iterdir()] == ["a.bin"]
    assert not [*cache.rglob("evil")]


def test_a_copy_that_another_process_made_meanwhile_is_used(
    store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(draft: Path, target: Path) -> Path:
        (target / "a.bin").parent.mkdir(parents=True)
        (target / "a.bin").write_bytes(b"of the other process")
        return rename(draft, target)

    monkeypatch.setattr(Path, "rename", late)
    assert local_copy(FILE).read_bytes() == b"of the other process"
    assert not [*(cache / "remote").glob("*.tmp")]


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("ftp://host/x", "ftp:// is not supported; addresses start with "),
        ("s3://", "s3:// names no bucket or server"),
        ("s3://key:secret@bucket/x", "at s3://bucket contains a credential"),
        ("https://host/x?token=secret", "at https://host contains a query"),
        ("s3://bucket/a/../b", "contains '..', which stores do not resolve"),
    ],
)
def test_an_address_that_is_ambiguous_or_secret_is_refused(address: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        as_path(Path(address))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["C:/x", "data/x.npy", "c:", "A://x"])
def test_other_paths_are_local(path: str) -> None:
    assert not isinstance(as_path(Path(path)), RemotePath)
