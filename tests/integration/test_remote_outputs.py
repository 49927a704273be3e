"""Runs whose output folder is in an S3 server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
import torch
import yaml
from safetensors.torch import save_file

import gradrun
from gradrun.core import remote
from gradrun.core.errors import ConfigError, RunFailed
from gradrun.output import remote_folder
from gradrun.output.remote_folder import RemoteFolder
from tests.conftest import Command
from tests.support.lost_machine import lost_machine
from tests.support.object_store import ObjectStore, object_store

FORMATS = ("jsonl", "parquet")  # csv and safetensors take the same ways: tests/soak
ROWS = np.random.default_rng(0).normal(size=(6000, 4)).astype(np.float32)
WEIGHT = torch.arange(12, dtype=torch.float32).reshape(3, 4)
EXPECTED = ROWS @ WEIGHT.numpy().T


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with pytest.MonkeyPatch.context() as patch, object_store(patch.setenv) as store:
        yield store


@pytest.fixture
def store(
    server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    monkeypatch.setenv("GRADRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "_TRIES", 3)
    monkeypatch.setattr(remote_folder, "SECONDS", 0.1)
    monkeypatch.setattr(remote_folder, "_TIME_SHARE", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    save_file({"0.weight": WEIGHT, "0.bias": torch.zeros(3)}, "w.safetensors")
    np.save("x.npy", ROWS)
    for key in server.keys():  # noqa: SIM118 - a method
        server.client.delete_object(Bucket="bucket", Key=key)
    server.faults.clear()
    server.requests.clear()
    yield server
    server.faults.clear()
    server.refused = ""


def config(form: str = "parquet", path: str = "s3://bucket/runs/one") -> dict[str, Any]:
    return {
        "model": {
            "source": "layers",
            "layers": [{"Linear": [4, 3]}],
            "weights": "w.safetensors",
        },
        "data": {"source": "arrays", "path": "x.npy", "batch_size": 50},
        "output": {"path": path, "format": form},
        "measure": {"memory": False},
    }


def local_files(form: str, name: str = "local") -> dict[str, bytes]:
    """The predictions of the same run in a local folder."""
    gradrun.infer(config(form, name))
    paths = [path for path in Path(name).rglob("*") if path.is_file()]
    return {
        path.relative_to(name).as_posix(): path.read_bytes()
        for path in paths
        if path.name not in {"result.json", "journal.jsonl"}
    }


def remote_files(store: ObjectStore, folder: str = "runs/one/") -> dict[str, bytes]:
    names = [key.removeprefix(folder) for key in store.keys(folder)]
    left_out = {"result.json", "journal.jsonl"}
    return {name: store.get(folder + name) for name in names if name not in left_out}


@pytest.mark.parametrize("form", FORMATS)
def test_a_run_in_a_bucket_has_the_bytes_of_a_local_one(store: ObjectStore, form: str) -> None:
    store.faults[:] = ["ok", "ok", "503", "ok", "ok", "reset"] * 2
    result = gradrun.infer(config(form))
    assert remote_files(store) == local_files(form)
    assert result.info.output_path == "s3://bucket/runs/one"
    saved = store.get("runs/one/result.json").decode()
    assert "cache" not in saved
    assert "SECRET" not in saved + store.get("runs/one/journal.jsonl").decode()
    assert json.loads(saved)["predictions"] == 6000
    assert gradrun.verify("s3://bucket/runs/one").complete
    assert not [*Path("cache/runs").iterdir()]


@pytest.mark.parametrize("form", FORMATS)
def test_a_run_of_a_lost_machine_is_resumed_on_another_one(
    store: ObjectStore, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = local_files(form)
    with lost_machine(monkeypatch), pytest.raises(RunFailed, match="the network is lost"):
        gradrun.infer(config(form))
    shutil.rmtree("cache")
    names = {name.partition(".parts")[0] for name in remote_files(store)}
    shards = {f"predictions/predictions-0000{number}.parquet" for number in range(3)}
    assert names == {"jsonl": {"predictions.jsonl"}, "parquet": shards}[form]
    with pytest.raises(ConfigError, match="s3://bucket/runs/one has an unfinished run"):
        gradrun.infer(config(form))
    result = gradrun.infer(config(form), resume=True)
    assert remote_files(store) == expected
    assert result.predictions == 6000
    assert gradrun.verify("s3://bucket/runs/one").complete


def test_predictions_that_cannot_be_uploaded_stay_and_are_uploaded_by_a_resume(
    store: ObjectStore, cli: Command
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(config("jsonl")))
    store.refused = "predictions"
    answer = cli("infer", "c.yaml")
    text = " ".join(answer.text.split())
    assert answer.code == 1, answer.text
    assert "cannot be uploaded to s3://bucket/runs/one: the store is busy" in text
    assert "gradrun infer c.yaml --resume" in text
    store.refused = ""
    answer = cli("infer", "c.yaml", "--resume")
    assert answer.code == 0, answer.text
    assert remote_files(store) == local_files("jsonl")


def test_an_upload_that_a_proxy_only_pretends_to_accept_is_repeated_by_a_resume(
    store: ObjectStore, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(config("jsonl")))
    put_file = remote.put_file

    def pretend(file: Path, path: remote.RemotePath) -> None:
        if path.name != "predictions.jsonl":
            put_file(file, path)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "put_file", pretend)
        answer = cli("infer", "c.yaml")
    text = " ".join(answer.text.split())
    assert answer.code == 1, answer.text
    assert "its server accepted predictions.jsonl, but does not have it" in text
    assert "gradrun infer c.yaml --resume" in text
    answer = cli("infer", "c.yaml", "--resume")
    assert answer.code == 0, answer.text
    assert remote_files(store) == local_files("jsonl")


def test_an_overwrite_removes_the_objects_of_the_run_only(store: ObjectStore) -> None:
    gradrun.infer(config("parquet"))
    store.put("runs/one/notes.txt", b"mine")
    store.put("runs/one-more/predictions.jsonl", b"other")
    with pytest.raises(ConfigError, match="output folder s3://bucket/runs/one already exists"):
        gradrun.infer(config("jsonl"))
    gradrun.infer(config("jsonl"), overwrite=True)
    assert remote_files(store) == local_files("jsonl") | {"notes.txt": b"mine"}
    assert store.get("runs/one-more/predictions.jsonl") == b"other"


def test_a_finished_run_is_not_repeated_by_a_resume(store: ObjectStore) -> None:
    first = gradrun.infer(config("jsonl"))
    store.requests.clear()
    assert gradrun.infer(config("jsonl"), resume=True) == first
    written = [path for method, path, _ in store.requests if method == "PUT"]
    assert written == ["/bucket/runs/one/.gradrun.output.lock"]


def test_two_processes_do_not_write_to_one_folder(store: ObjectStore) -> None:
    original = RemoteFolder._put_journal

    def put(self: RemoteFolder, content: bytes) -> None:
        original(self, content)
        store.put("runs/one/journal.jsonl", b"of another process")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteFolder, "_put_journal", put)
        with pytest.raises(RunFailed, match="another process writes to s3://bucket/runs/one"):
            gradrun.infer(config("jsonl"))


def test_damage_in_a_bucket_is_found(store: ObjectStore, cli: Command) -> None:
    gradrun.infer(config("jsonl"))
    content = store.get("runs/one/predictions.jsonl")
    store.put("runs/one/predictions.jsonl", content.replace(b"1", b"2", 1))
    answer = cli("verify", "s3://bucket/runs/one")
    assert answer.code == 3
    assert cli("report", "s3://bucket/runs/one").code == 0
    answer = cli("report", "https://user:HUSH@host/run")
    assert answer.code == 1
    assert "contains a credential" in answer.text
    assert "HUSH" not in answer.text
    assert "has no journal.jsonl" in cli("verify", "s3://bucket/none").text


@pytest.mark.parametrize(
    ("path", "form", "message"),
    [
        ("s3://nobucket/run", "jsonl", "s3://nobucket/run cannot be written"),
        ("s3://bucket/run", "npy", "set output.format: parquet, safetensors, jsonl or csv"),
        ("s3://bucket", "jsonl", "is a bucket; name a folder in it"),
        ("https://host/run", "jsonl", "outputs cannot be written to https://"),
    ],
)
def test_folders_that_cannot_be_written_are_errors_in_a_sentence(
    store: ObjectStore, cli: Command, path: str, form: str, message: str
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(config(form)))
    answer = cli("infer", "c.yaml", "--output", path)
    assert answer.code == 2, answer.text
    assert message in " ".join(answer.text.split())


def test_a_cache_that_cannot_be_written_is_an_error_before_the_run(
    store: ObjectStore, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADRUN_CACHE", str(Path("w.safetensors").absolute() / "cache"))
    Path("c.yaml").write_text(yaml.safe_dump(config("jsonl")))
    answer = cli("infer", "c.yaml")
    assert answer.code == 2
    text = " ".join(answer.text.split())
    assert "w.safetensors/cache cannot be written: Not a directory; set GRADRUN_CACHE" in text
    assert not store.keys("runs/one")


def test_a_bucket_without_permission_is_an_error_before_the_run(
    store: ObjectStore, cli: Command
) -> None:
    store.forbidden = True
    try:
        Path("c.yaml").write_text(yaml.safe_dump(config("jsonl")))
        answer = cli("infer", "c.yaml")
    finally:
        store.forbidden = False
    assert answer.code == 2
    assert "the store denies access to s3://bucket" in " ".join(answer.text.split())


def test_other_commands_write_to_local_folders_only(store: ObjectStore, cli: Command) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(config("jsonl")))
    for command in ("compare", "check", "audit"):
        answer = cli(command, "c.yaml")
        assert answer.code == 2, answer.text
        assert "set output.path to a local folder" in " ".join(answer.text.split())
