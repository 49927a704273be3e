"""Data, weights and folders in an S3 server and on a web server."""

from __future__ import annotations

import gzip
import io
import json
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import PIL.Image
import pytest
import s3fs
import yaml
from botocore.exceptions import ClientError

import gradrun
from gradrun.core import remote
from tests.conftest import Command
from tests.support.object_store import ObjectStore, object_store
from tests.support.remote_data import EXPECTED, ROWS, WEIGHT, config, enter_folder, npy
from tests.support.replaced_objects import check_replacement
from tests.support.small_models import save_bert, skewed


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with pytest.MonkeyPatch.context() as patch, object_store(patch.setenv) as store:
        yield store


@pytest.fixture
def store(
    server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    enter_folder(tmp_path, monkeypatch)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    server.faults.clear()
    server.requests.clear()
    yield server
    server.broken_from = None


def arrays(path: str) -> dict[str, Any]:
    return {"source": "arrays", "path": path}


def put_shards(store: ObjectStore, form: str) -> None:
    table = pandas.DataFrame({"key": [f"k{number}" for number in range(60)]})
    table[["a", "b", "c", "d"]] = ROWS
    for number, (start, stop) in enumerate([(0, 7), (7, 31), (31, 60)], 9):
        part = table[start:stop]
        if form == "parquet":
            content = part.to_parquet()
        else:
            lines = "\n".join(json.dumps(row) for row in part.to_dict("records"))
            content = gzip.compress(lines.encode())
        store.put(f"{form}/part-{number}.{form}", content)


@pytest.mark.parametrize(("form", "pattern"), [("jsonl.gz", ""), ("parquet", "/part-*")])
def test_shards_in_a_bucket_are_read_in_natural_order(
    store: ObjectStore, form: str, pattern: str
) -> None:
    put_shards(store, form)
    data = {
        "source": "records",
        "path": f"s3://bucket/{form}{pattern}",
        "inputs": {"x": {"columns": ["a", "b", "c", "d"]}},
        "id": "key",
    }
    result = gradrun.infer(config(data))
    np.testing.assert_allclose(np.load("out/predictions.npy"), EXPECTED, rtol=1e-5)
    assert Path("out/ids.txt").read_text().split() == [f"k{number}" for number in range(60)]
    text = " ".join(statement.text for statement in result.interpretation)
    assert f"3 files, {form}, 60 rows, first part-9.{form}, last part-11.{form}" in text


def test_an_array_is_read_by_range_with_faults(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 256)
    path = store.put("in/x.npy", npy())
    ranges = ["ok", "503", "reset", "ok", "slow", "503"]
    store.faults[:] = ranges * 3
    gradrun.infer(config(arrays(path)))
    np.testing.assert_allclose(np.load("out/predictions.npy"), EXPECTED, rtol=1e-5)
    assert not store.faults
    read = [span for method, _, span in store.requests if method == "GET" and span]
    sizes = [int(span.split("-")[1]) - int(span[6:].split("-")[0]) + 1 for span in read]
    assert max(sizes) == 256


def test_images_of_a_folder_have_the_labels_of_their_folders(store: ObjectStore) -> None:
    colors = {"blue": (0, 0, 255), "red": (255, 0, 0)}
    for name, color in colors.items():
        for number in range(2):
            file = io.BytesIO()
            PIL.Image.new("RGB", (2, 2), color).save(file, "PNG")
            store.put(f"pictures/{name}/{number}.png", file.getvalue())
    data = {
        "source": "images",
        "path": "s3://bucket/pictures",
        "labels": "folder",
    }
    layers = ["Flatten"]
    gradrun.infer(config(data, layers=layers, weights=None))
    expected = [np.repeat(colors[name], 4) / 255 for name in ("blue", "blue", "red", "red")]
    np.testing.assert_allclose(np.load("out/predictions.npy"), expected, atol=1e-6)


def test_weights_are_downloaded_once(store: ObjectStore) -> None:
    path = store.put("models/w.safetensors", Path("w.safetensors").read_bytes())
    Path("x.npy").write_bytes(npy())
    for folder in ("a", "b"):
        gradrun.infer(config(arrays("x.npy"), weights=path), output=folder)
        found = np.load(f"{folder}/predictions.npy")
        np.testing.assert_allclose(found, EXPECTED, rtol=1e-5)
    downloads = [path for method, path, _ in store.requests if method == "GET" and "w.safe" in path]
    assert len(downloads) == 1


def test_a_model_folder_and_its_tokenizer_are_downloaded_for_texts_in_a_bucket(
    store: ObjectStore,
) -> None:
    save_bert(Path("bert"))
    Path("texts.txt").write_text("\n".join(skewed(20)))
    for path in [*Path("bert").iterdir(), Path("texts.txt")]:
        store.put(f"nlp/{path}", path.read_bytes())
    predictions = []
    for place in ("", "s3://bucket/nlp/"):
        made = config({"source": "text", "path": f"{place}texts.txt"})
        made["model"] = {"source": "huggingface", "path": f"{place}bert"}
        made["output"] = {"path": f"out{len(predictions)}", "transform": "mean_pool"}
        made["output"]["select"] = "last_hidden_state"
        gradrun.infer(made)
        predictions.append(np.load(f"out{len(predictions)}/predictions.npy"))
    np.testing.assert_array_equal(*predictions)


def test_a_page_in_place_of_a_file_is_an_error(store: ObjectStore, cli: Command) -> None:
    store.put("in/page.csv", b"<!DOCTYPE html>\n<p>Log in</p>\n", public=True)
    path = f"{store.endpoint}/bucket/in/page.csv"
    data = {"source": "records", "path": path, "inputs": {"x": {"columns": ["a"]}}}
    Path("c.yaml").write_text(yaml.safe_dump(config(data)))
    answer = cli("infer", "c.yaml")
    assert answer.code == 2
    text = " ".join(answer.text.split())
    assert f"{path} cannot be read: its server sent an HTML page, not a file" in text


def test_a_profile_that_does_not_exist_is_an_error_of_the_settings(
    store: ObjectStore, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    remote._filesystem.cache_clear()
    Path("c.yaml").write_text(yaml.safe_dump(config(arrays("s3://bucket/x.npy"))))
    answer = cli("infer", "c.yaml")
    remote._filesystem.cache_clear()
    assert answer.code == 2
    text = " ".join(answer.text.split())
    assert "the settings for s3://bucket in the environment are not valid (ProfileNotFound)" in text
    assert "check AWS_ACCESS_KEY_ID or AWS_PROFILE" in text


def test_a_rejected_token_is_found_in_the_cause_of_an_error(store: ObjectStore) -> None:
    answer = {"Error": {"Code": "401"}, "ResponseMetadata": {"HTTPStatusCode": 401}}

    def request(_: object) -> None:
        raise OSError("An error occurred (401)") from ClientError(answer, "HeadObject")

    with pytest.raises(remote.RemoteError, match="the store denies access to s3://bucket"):
        remote._call(remote.RemotePath("s3://bucket/x.npy"), request)


def test_a_web_server_is_read_by_range(store: ObjectStore) -> None:
    store.put("in/x.npy", npy(), public=True)
    gradrun.infer(config(arrays(f"{store.endpoint}/bucket/in/x.npy")))
    np.testing.assert_allclose(np.load("out/predictions.npy"), EXPECTED, rtol=1e-5)


def test_data_that_changed_cannot_be_resumed(store: ObjectStore, cli: Command) -> None:
    path = store.put("in/x.npy", npy())
    made = config(arrays(path))
    gradrun.infer(made)
    Path("out/result.json").unlink()
    store.put("in/x.npy", npy(ROWS + 1))
    Path("c.yaml").write_text(yaml.safe_dump(made))
    answer = cli("infer", "c.yaml", "--resume")
    assert answer.code == 2
    assert "x.npy changed (version)" in answer.text.replace("\n", " ")


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_file_that_is_replaced_during_a_run_ends_it(
    scheme: str, store: ObjectStore, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = store.endpoint if scheme == "http" else "s3:/"
    made = config(arrays(f"{root}/bucket/in/z.npy"))
    put = partial(store.put, "in/z.npy", public=True)
    check_replacement(cli, made, put, WEIGHT.numpy(), monkeypatch)


def test_images_are_not_at_fault_if_the_credentials_expire_during_a_run(
    store: ObjectStore, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        file = io.BytesIO()
        PIL.Image.new("L", (2, 2), number).save(file, "PNG")
        store.put(f"gray/{number:02}.png", file.getvalue())
    data = {"source": "images", "path": "s3://bucket/gray", "mode": "L", "batch_size": 1}
    made = config(data, layers=["Flatten"], weights=None) | {"run": {"on_error": "quarantine"}}
    Path("c.yaml").write_text(yaml.safe_dump(made))
    read = remote._read_block

    def read_block(path: remote.RemotePath, *words: Any) -> bytes:
        store.forbidden |= path.name == "11.png"
        return read(path, *words)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "_read_block", read_block)
        answer = cli("infer", "c.yaml")
    store.forbidden = False
    text = " ".join(answer.text.split())
    assert answer.code == 1, text
    assert ".png cannot be read: the store denies access to s3://bucket" in text
    assert "predictions are saved in" in text
    assert not Path("out/quarantine.jsonl").exists()
    assert cli("infer", "c.yaml", "--resume").code == 0
    expected = np.repeat(np.arange(12)[:, None], 4, 1) / 255
    np.testing.assert_allclose(np.load("out/predictions.npy"), expected, atol=1e-6)


def test_predictions_stay_if_the_store_fails_for_good(
    store: ObjectStore, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 2**20)
    monkeypatch.setattr(remote, "_TRIES", 2)
    path = store.put("in/x.npy", npy(np.tile(ROWS, (8000, 1))))
    made = config(arrays(path) | {"batch_size": 4096})
    Path("c.yaml").write_text(yaml.safe_dump(made))
    store.broken_from = 6 * 2**20
    answer = cli("infer", "c.yaml")
    text = " ".join(answer.text.split())
    assert answer.code == 1, answer.text
    assert "predictions are saved in" in text
    assert "--resume" in text
    assert 0 < json.loads(Path("out/journal.jsonl").read_text().splitlines()[-1])["stop"] < 480_000
    store.broken_from = None
    assert cli("infer", "c.yaml", "--resume").code == 0
    np.testing.assert_allclose(
        np.load("out/predictions.npy"), np.tile(EXPECTED, (8000, 1)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/absent.npy", "s3://bucket/absent.npy does not exist"),
        ("s3://nobucket/x.npy", "s3://nobucket/x.npy does not exist"),
        ("s3:", "s3:// names no bucket"),
        ("s3://bucket/in/../x.npy", "s3://bucket contains '..'"),
        ("ftp://host/x.npy", "ftp:// is not supported; addresses start with s3://, gs://"),
        ("https://user:HUSH@host/x.npy", "credentials come from the environment"),
        ("https://host/x.npy?X-Amz-Signature=HUSH", "contains a query, which may be a credential"),
        ("abfs://container@account/x.npy", "a credential or an account"),
    ],
)
def test_addresses_that_cannot_be_read_are_errors_in_a_sentence(
    store: ObjectStore, cli: Command, path: str, message: str
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(config(arrays(path))))
    answer = cli("infer", "c.yaml")
    assert answer.code == 2
    text = " ".join(answer.text.split())
    assert message in text
    assert "HUSH" not in text
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("scheme", "package", "install"),
    [
        ("s3", "s3fs", "'gradrun[remote]'"),
        ("gs", "gcsfs", "'gradrun[gcs]'"),
        ("az", "adlfs", "'gradrun[azure]'"),
        ("abfs", "adlfs", "'gradrun[azure]'"),
        ("hf", "huggingface_hub", "huggingface_hub"),
        ("https", "aiohttp", "'gradrun[remote]'"),
    ],
)
def test_a_missing_package_is_an_error_that_names_its_extra(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    scheme: str, package: str, install: str,
) -> None:  # fmt: skip
    remote._filesystem.cache_clear()
    module = {"https": "fsspec.implementations.http"}.get(scheme, package)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    data = {"source": "arrays", "path": f"{scheme}://datasets/user/name/x.npy"}
    Path("c.yaml").write_text(yaml.safe_dump(config(data, weights=None)))
    answer = cli("infer", "c.yaml")
    assert answer.code == 2
    message = f"{scheme}:// needs {package}; pip install {install}"
    assert message in " ".join(answer.text.split())
    assert not Path("out").exists()


def test_settings_that_a_package_rejects_are_an_error_without_their_text(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote._filesystem.cache_clear()
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "HUSH")
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(config(arrays("az://c/x.npy"), weights=None)))
    answer = cli("infer", "c.yaml")
    assert answer.code == 2
    text = " ".join(answer.text.split())
    assert "adlfs cannot connect to az:// with the settings in the environment" in text
    assert "HUSH" not in text


def test_an_absent_server_is_an_error_in_a_sentence(store: ObjectStore, cli: Command) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/x.npy"
        Path("c.yaml").write_text(yaml.safe_dump(config(arrays(address))))
        answer = cli("infer", "c.yaml")
    assert answer.code == 2
    assert "does not answer" in " ".join(answer.text.split())
