"""Data, weights and outputs in servers of Google's, Microsoft's and Hugging Face's protocols."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import PIL.Image
import pytest
import yaml

import gradrun
from gradrun.core import remote
from gradrun.core.errors import RunFailed
from gradrun.output import remote_folder
from tests.conftest import Command
from tests.support.cloud_stores import NO_AZURITE, SECRET, CloudStore, cloud_store
from tests.support.lost_machine import lost_machine
from tests.support.remote_data import EXPECTED, ROWS, WEIGHT, config, enter_folder, npy
from tests.support.replaced_objects import check_replacement

READ = [
    "gs",
    pytest.param("az", marks=pytest.mark.skipif(NO_AZURITE != "", reason=NO_AZURITE)),
    "hf",
]
WRITTEN = READ[:2]
VARIABLES = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_CONNECTION_STRING",
    "hf": "HF_TOKEN",
}


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CloudStore]:
    folder = tmp_path_factory.mktemp(request.param)
    with (
        pytest.MonkeyPatch.context() as patch,
        cloud_store(request.param, folder, patch.setenv) as store,
    ):
        yield store


@pytest.fixture
def store(
    server: CloudStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CloudStore]:
    enter_folder(tmp_path, monkeypatch)
    server.proxy.requests.clear()
    yield server
    assert not server.proxy.faults


def in_stores(schemes: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("server", schemes, indirect=True)


def scheme(store: CloudStore) -> str:
    return store.root.partition(":")[0]


@in_stores(READ)
@pytest.mark.parametrize(("form", "pattern"), [("jsonl.gz", "/part-*.gz"), ("csv", "")])
def test_shards_are_read_in_natural_order(server: CloudStore, store: CloudStore, form: str,
                                          pattern: str) -> None:  # fmt: skip
    table = pandas.DataFrame({"key": [f"k{number}" for number in range(60)]})
    table[["a", "b", "c", "d"]] = ROWS
    for number, (start, stop) in enumerate([(0, 7), (7, 31), (31, 60)], 9):
        part = table[start:stop]
        content = part.to_csv(index=False).encode()
        if form == "jsonl.gz":
            lines = "\n".join(json.dumps(row) for row in part.to_dict("records"))
            content = gzip.compress(lines.encode())
        store.put(f"{form}/part-{number}.{form}", content)
    columns = {"x": {"columns": ["a", "b", "c", "d"]}}
    path = f"{store.root}/{form}{pattern}"
    gradrun.infer(config({"source": "records", "path": path, "inputs": columns, "id": "key"}))
    np.testing.assert_allclose(np.load("out/predictions.npy"), EXPECTED, rtol=1e-5)
    assert Path("out/ids.txt").read_text().split() == [*table["key"]]


@in_stores(READ)
def test_an_array_is_read_by_range_with_faults(
    store: CloudStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 256)
    path = store.put("in/x.npy", npy())
    store.proxy.faults[:] = ["ok", "reset", "ok", "503", "slow", "reset"]
    gradrun.infer(config({"source": "arrays", "path": path}))
    np.testing.assert_allclose(np.load("out/predictions.npy"), EXPECTED, rtol=1e-5)
    spans = [span.removeprefix("bytes=").split("-") for *_, span in store.proxy.requests if span]
    assert {int(begin) % 256 for begin, _ in spans} == {0}
    assert max(int(end) - int(begin) + 1 for begin, end in spans) == 256


@in_stores(READ)
def test_images_of_a_folder_have_the_labels_of_their_folders(store: CloudStore) -> None:
    colors = {"blue": (0, 0, 255), "red": (255, 0, 0)}
    for name, color in colors.items():
        for number in range(2):
            file = io.BytesIO()
            PIL.Image.new("RGB", (2, 2), color).save(file, "PNG")
            store.put(f"pictures/{name}/no. {number} #1.png", file.getvalue())
    data = {"source": "images", "path": f"{store.root}/pictures", "labels": "folder"}
    gradrun.infer(config(data, layers=["Flatten"], weights=None))
    expected = [np.repeat(colors[name], 4) / 255 for name in ("blue", "blue", "red", "red")]
    np.testing.assert_allclose(np.load("out/predictions.npy"), expected, atol=1e-6)
    ids = Path("out/ids.txt").read_text().splitlines()
    assert ids[0].endswith("blue/no. 0 #1.png")


@in_stores(READ)
def test_weights_are_downloaded_once(store: CloudStore) -> None:
    path = store.put("models/w.safetensors", Path("w.safetensors").read_bytes())
    Path("x.npy").write_bytes(npy())
    for folder in ("a", "b"):
        gradrun.infer(config({"source": "arrays", "path": "x.npy"}, weights=path), output=folder)
        found = np.load(f"{folder}/predictions.npy")
        np.testing.assert_allclose(found, EXPECTED, rtol=1e-5)
    downloads = {path for _, path, span in store.proxy.requests if span}
    assert {"w.safetensors" in path for path in downloads} == {True}
    assert sum(bool(span) for *_, span in store.proxy.requests) == len(downloads)


@in_stores(READ)
def test_data_that_changed_cannot_be_resumed(store: CloudStore, cli: Command) -> None:
    made = config({"source": "arrays", "path": store.put("in/y.npy", npy())})
    gradrun.infer(made)
    Path("out/result.json").unlink()
    store.put("in/y.npy", npy(ROWS + 1))
    Path("c.yaml").write_text(yaml.safe_dump(made))
    answer = cli("infer", "c.yaml", "--resume")
    assert answer.code == 2
    assert "y.npy changed (version)" in " ".join(answer.text.split())


@in_stores(READ)
def test_a_file_that_is_replaced_during_a_run_ends_it(
    store: CloudStore, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config({"source": "arrays", "path": f"{store.root}/in/z.npy"})
    put = partial(store.put, "in/z.npy")
    check_replacement(cli, made, put, WEIGHT.numpy(), monkeypatch)


@in_stores(WRITTEN)
def test_a_run_of_a_lost_machine_is_resumed_on_another_one(
    store: CloudStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = "parquet"
    monkeypatch.setattr(remote_folder, "SECONDS", 0.1)
    np.save("x.npy", np.tile(ROWS, (100, 1)))
    local = config({"source": "arrays", "path": "x.npy", "batch_size": 50})
    local["output"] = {"path": "local", "format": form}
    made = local | {"output": {"path": f"{store.root}/runs/{form}", "format": form}}
    gradrun.infer(local)
    expected = {
        path.relative_to("local").as_posix(): path.read_bytes()
        for path in Path("local").rglob("*")
        if path.is_file()
    }
    with (
        lost_machine(monkeypatch),
        pytest.raises(RunFailed, match="the network is lost"),
    ):
        gradrun.infer(made)
    shutil.rmtree("cache")
    names = {key.removeprefix(f"runs/{form}/").partition(".")[0] for key in store.keys("runs/")}
    assert "journal" in names
    store.proxy.faults[:] = ["ok", "ok", "reset", "slow"]
    result = gradrun.infer(made, resume=True)
    prefix = f"runs/{form}/"
    found = {key.removeprefix(prefix): store.get(key) for key in store.keys(prefix)}
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"result.json", "journal.jsonl"}:
        assert found[name] == expected[name], name
    assert result.predictions == 6000
    assert gradrun.verify(f"{store.root}/runs/{form}").complete
    stored = (found["result.json"] + found["journal.jsonl"]).decode()
    assert SECRET not in stored
    assert "AccountKey" not in stored


def problem(cli: Command, data: str, output: str = "out") -> str:
    """Return the message of a run that must end with exit code 2 before it writes anything."""
    Path("c.yaml").write_text(yaml.safe_dump(config({"source": "arrays", "path": data})))
    answer = cli("infer", "c.yaml", "--output", output, "--set", "output.format=jsonl")
    text = " ".join(answer.text.split())
    assert answer.code == 2, answer.text
    assert "Traceback" not in text
    assert SECRET not in text
    assert not Path("out").exists()
    return text


@in_stores(READ)
def test_an_absent_file_or_bucket_is_an_error_in_a_sentence(
    store: CloudStore, cli: Command
) -> None:
    assert f"{store.root}/no.npy does not exist" in problem(cli, f"{store.root}/no.npy")
    # The hub does not reveal whether a repository is absent or private.
    place = "hf://datasets/user/none" if scheme(store) == "hf" else f"{scheme(store)}://none"
    reason = f"denies access to {place}" if scheme(store) == "hf" else "does not exist"
    assert reason in problem(cli, f"{place}/x.npy")


@in_stores(READ)
def test_credentials_that_the_server_rejects_are_an_error_in_a_sentence(
    store: CloudStore, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.put("in/x.npy", npy())
    for name, value in store.denied.items():
        monkeypatch.setenv(name, value)
    remote._filesystem.cache_clear()
    text = problem(cli, path)
    assert f"the store denies access to {store.root}" in text
    assert f"the credentials in the environment ({VARIABLES[scheme(store)]}" in text
    monkeypatch.undo()  # the next run reads the environment again
    assert remote.RemotePath(path).is_file()


@in_stores(READ)
def test_an_absent_server_is_an_error_in_a_sentence(
    store: CloudStore, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_TRIES", 1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for name, value in store.absent(f"http://127.0.0.1:{unused.getsockname()[1]}").items():
            monkeypatch.setenv(name, value)
        remote._filesystem.cache_clear()
        text = problem(cli, f"{store.root}/x.npy")
        remote._filesystem.cache_clear()
    assert f"the server of {store.root} does not answer" in text


@in_stores(WRITTEN)
def test_a_bucket_that_cannot_be_written_is_an_error_before_the_run(
    store: CloudStore, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("x.npy", ROWS)
    text = problem(cli, "x.npy", f"{scheme(store)}://none/run")
    assert f"{scheme(store)}://none/run cannot be written" in text
    assert "does not exist" in text
    for name, value in store.denied.items():
        monkeypatch.setenv(name, value)
    remote._filesystem.cache_clear()
    assert f"denies access to {store.root}" in problem(cli, "x.npy", f"{store.root}/runs/none")


@in_stores(["hf"])
def test_outputs_are_not_written_to_the_hub(store: CloudStore, cli: Command) -> None:
    np.save("x.npy", ROWS)
    text = problem(cli, "x.npy", f"{store.root}/run")
    assert (
        "outputs cannot be written to hf://; use s3://, gs://, az://, abfs:// or a folder" in text
    )
    assert not store.proxy.requests


@in_stores(READ[1:2])
def test_both_schemes_of_azure_name_the_same_files(store: CloudStore) -> None:
    path = store.put("in/x.npy", npy())
    assert remote.RemotePath(path.replace("az:", "abfs:")).open("rb").read() == npy()


@in_stores(["hf"])
def test_a_revision_of_the_hub_is_part_of_the_address(store: CloudStore, cli: Command) -> None:
    path = store.put("in/x.npy", npy())
    at_main = path.replace("user/name", "user/name@main")
    gradrun.infer(config({"source": "arrays", "path": at_main}))
    np.testing.assert_allclose(np.load("out/predictions.npy"), EXPECTED, rtol=1e-5)
    shutil.rmtree("out")
    absent = path.replace("user/name", "user/name@v9")
    assert f"{absent} does not exist" in problem(cli, absent)
