"""`gradrun.infer` and `gradrun.compare` with a model or data in memory."""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import gradrun
from gradrun.core.errors import ConfigError
from gradrun.engines.objects import Inference
from tests.conftest import ROOT
from tests.support.engines import InlineEngines
from tests.support.workers import in_process_workers


class Sum(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + 2 * b


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


ROWS = np.random.default_rng(0).normal(size=(100, 8))
TWINS = pd.DataFrame([[1.0, None], [2.0, 3.0]], columns=["a", "a"])
MASKED = np.ma.array([[1.0, 2.0]], mask=[[False, True]])


def by_hand(net: nn.Module, rows: np.ndarray[Any, Any], size: int = 32) -> np.ndarray[Any, Any]:
    was = net.training
    net.eval()
    with torch.inference_mode():
        inputs = torch.from_numpy(rows).float().split(size)
        outputs = torch.cat([net(batch) for batch in inputs]).numpy()
    net.train(was)
    return outputs


def run(**arguments: Any) -> Inference:
    found = gradrun.infer(**arguments)
    assert isinstance(found, Inference)
    return found


@pytest.mark.parametrize(
    "data",
    [ROWS, ROWS.astype(np.float32), torch.from_numpy(ROWS).float(), ROWS.tolist()],
    ids=["float64", "float32", "tensor", "list"],
)
def test_predictions_equal_a_loop_by_hand(net: nn.Module, data: Any) -> None:
    found = run(model=net, data=data, mode="inference_mode", batch_size=32)
    np.testing.assert_array_equal(found.predictions["prediction"], by_hand(net, ROWS))
    assert found.result.info.mode == "inference_mode"
    assert found.quarantined == ()
    assert repr(found).startswith("<Inference prediction float32 [100, 3]; ")
    assert (found.result.files, found.result.info.output_path) == ((), ""), "no removed folder"


def test_no_file_is_written_and_the_module_stays_in_training_mode(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net[1].eval()
    first = run(model=net, data=ROWS)
    second = run(model=net, data=ROWS)
    np.testing.assert_array_equal(first.predictions["prediction"], second.predictions["prediction"])
    assert [module.training for module in net.modules()] == [True, True, False, True, True]
    assert not list(tmp_path.iterdir())


def test_a_run_with_another_dtype_leaves_the_module_unchanged(net: nn.Module) -> None:
    found = run(model=net, data=ROWS, **{"model.dtype": "bfloat16"})
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    np.testing.assert_allclose(
        found.predictions["prediction"].astype(float), by_hand(net, ROWS), atol=0.05
    )


def test_a_module_of_float64_gets_its_inputs_unrounded(net: nn.Module) -> None:
    found = run(model=net.double(), data=ROWS, batch_size=100)
    with torch.inference_mode():
        expected = net.eval()(torch.from_numpy(ROWS)).numpy()
    np.testing.assert_array_equal(found.predictions["prediction"], expected)


@pytest.mark.parametrize(
    "data",
    [{"b": ROWS, "a": 3 * ROWS}, (3 * ROWS, ROWS)],
    ids=["by name", "by position"],
)
def test_several_arrays_are_passed_by_name_or_position(data: Any) -> None:
    found = run(model=Sum(), data=data)
    np.testing.assert_allclose(found.predictions["prediction"], 5 * ROWS, rtol=1e-6)


def test_a_table_gives_rows_ids_and_metrics(net: nn.Module) -> None:
    pytest.importorskip("torchmetrics")
    names = [f"sample {number}" for number in range(100)]
    table = pd.DataFrame(ROWS, index=names, columns=list("abcdefgh"))
    classes = by_hand(net, ROWS).argmax(1)
    truth = np.where(np.arange(100) < 25, (classes + 1) % 3, classes)
    found = run(model=net, data=table, labels=truth, metrics=["accuracy"], batch_size=32)
    np.testing.assert_array_equal(found.predictions["prediction"], by_hand(net, ROWS))
    assert list(found.ids) == names
    assert found.result.metrics[0].value == pytest.approx(0.75)


def test_texts_and_image_files_in_a_list_are_read_as_their_sources_do(tmp_path: Path) -> None:
    files = []
    for number in range(3):
        files.append(tmp_path / f"picture, {number}.png")
        Image.new("RGB", (4, 4), (80 * number, 0, 255)).save(files[-1])
    module = nn.Flatten()
    for paths in (files, [str(path) for path in files]):
        found = run(model=module, data=paths)
        first = found.predictions["prediction"][:, 0]
        np.testing.assert_allclose(first, [0, 80 / 255, 160 / 255], rtol=1e-6)
    with pytest.raises(gradrun.ConfigError, match=r"data\.tokenizer is missing"):
        gradrun.infer(model=module, data=["a text", "another"])


class Squares(Dataset[tuple[torch.Tensor, int]]):
    """Pairs of a row and its class."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(ROWS[index]).float() ** 2, index % 3


@pytest.mark.parametrize("kind", ["Dataset", "DataLoader", "generator"])
def test_datasets_and_loaders_in_memory_are_read_as_those_of_a_file(
    net: nn.Module, kind: str
) -> None:
    data: Any = Squares()
    if kind == "DataLoader":
        data = DataLoader(data, batch_size=32)
    if kind == "generator":
        data = (torch.from_numpy(row).float() ** 2 for row in ROWS)
    changes = {} if kind == "generator" else {"data.inputs": [0]}
    found = run(model=net, data=data, batch_size=32, **changes)
    expected = by_hand(net, (ROWS.astype(np.float32)) ** 2)
    np.testing.assert_allclose(found.predictions["prediction"], expected, rtol=1e-6)


class Detector(nn.Module):
    """Returns one dict per sample, with as many boxes as its first value says."""

    def forward(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [{"boxes": torch.full((int(row[0]), 4), float(row[1]))} for row in x]


def test_outputs_of_different_length_are_lists() -> None:
    counts = np.array([[0, 5.0], [2, 0.5], [1, 7.0]])
    found = run(model=Detector(), data=counts, batch_size=2)
    assert found.predictions == {"prediction": [[], [[0.5] * 4] * 2, [[7.0] * 4]]}
    assert repr(found).startswith("<Inference prediction list of 3; ")


@pytest.mark.parametrize(
    ("output", "files"),
    [
        ({"format": "parquet"}, []),
        ({"path": "out"}, ["predictions.jsonl"]),
        ({"path": "out", "format": "parquet"}, ["predictions/predictions-00000.parquet"]),
    ],
)
def test_outputs_of_different_length_are_written_in_the_format_that_is_set(
    output: dict[str, str], files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counts = np.array([[0, 5.0], [2, 0.5], [1, 7.0]])
    found = run(model=Detector(), data=counts, batch_size=2, output=output)
    assert found.predictions == {"prediction": [[], [[0.5] * 4] * 2, [[7.0] * 4]]}
    assert list(found.result.files) == files


def test_a_format_that_cannot_hold_the_outputs_is_not_replaced(tmp_path: Path) -> None:
    output = {"path": str(tmp_path / "out"), "format": "csv"}
    with pytest.raises(ConfigError, match="csv cannot store"):
        run(model=Detector(), data=np.ones((3, 2)), output=output)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_a_sample_without_prediction_is_listed(net: nn.Module) -> None:
    rows = ROWS.copy()
    rows[7] = np.nan
    found = run(model=net, data=rows, run={"on_nonfinite": "quarantine"})
    assert [entry["sample"] for entry in found.quarantined] == [7]
    assert np.isnan(found.predictions["prediction"][7]).all()


def test_a_failure_names_no_folder_that_is_removed(net: nn.Module) -> None:
    class Fails(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> torch.Tensor:
            if index == 7:
                raise ValueError("a broken item")
            return torch.ones(8)

    with pytest.raises(gradrun.RunFailed) as caught:
        gradrun.infer(model=net, data=Fails(), batch_size=4)
    assert "a broken item" in str(caught.value)
    assert str(caught.value).endswith("4 of 9 predictions are lost; with an output folder, "
                                      "output=..., they are kept")  # fmt: skip


def test_an_output_folder_gets_the_files(net: nn.Module, tmp_path: Path) -> None:
    found = run(model=net, data=ROWS, batch_size=32, output=tmp_path / "out")
    written = np.load(tmp_path / "out/predictions.npy")
    np.testing.assert_array_equal(written, found.predictions["prediction"])
    with pytest.raises(gradrun.ConfigError, match="use overwrite=True to replace it"):
        gradrun.infer(model=net, data=ROWS, output=tmp_path / "out")


def test_workers_get_copies_of_the_objects(net: nn.Module) -> None:
    engine = {"source": "processes", "workers": 1}
    found = run(model=net, data=ROWS, batch_size=32, engine=engine, run={"threads": 1})
    np.testing.assert_allclose(found.predictions["prediction"], by_hand(net, ROWS), rtol=1e-5)
    assert len(found.result.measurements[0].workers) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3, "data": ROWS}, "model is a int, not a torch.nn.Module"),
        ({"data": ROWS}, "model is missing"),
        ({"model": nn.Identity()}, "data is missing"),
        ({"model": nn.Identity(), "data": {}}, "data"),
        ({"model": nn.Identity(), "data": np.float32(3)}, "a single number"),
        ({"model": nn.Identity(), "data": np.zeros((0, 3))}, "no samples"),
        ({"model": nn.Identity(), "data": [[1, 2], [3]]}, "not an array of numbers"),
        ({"model": nn.Identity(), "data": np.array([1j])}, "array of complex128"),
        ({"model": nn.Identity(), "data": (ROWS, ROWS[:5])}, "different numbers of samples"),
        ({"model": nn.Identity(), "data": pd.DataFrame({"a": [1], "b": ["x"]})}, "'b' is not num"),
        ({"model": nn.Identity(), "data": pd.DataFrame({"a": [1.0, None]})}, "1 missing value"),
        ({"model": nn.Identity(), "data": TWINS}, "column 'a' has 1 missing value"),
        ({"model": nn.Identity(), "data": MASKED}, "an array with masked values; fill them"),
        ({"model": nn.Identity(), "data": np.array([1e39])}, "values that do not fit in float32"),
        ({"model": nn.Identity(), "data": pd.DataFrame({"a": [1e39]})}, "do not fit in float32"),
        ({"model": nn.Identity(), "data": [Path("a.xyz")]}, "a.xyz is neither an image nor"),
        ({"model": nn.Identity(), "data": ROWS, "resume": True}, "cannot be resumed"),
        ({"model": nn.Identity(), "data": "rows.npy"}, "data is a str: pass a list of texts"),
        ({"model": nn.Identity(), "data": ["a", None]}, "item 1 of data is None, not a text"),
        ({"model": nn.Identity(), "data": {1.0, 2.0}}, "data is a set, which has no order"),
        ({"model": nn.Identity(), "data": ROWS, "batch_size": 0}, "must be more than 0"),
        ({"model": nn.Identity(), "data": ROWS, "batchsize": 3}, "did you mean batch_size?"),
        ({"model": nn.Identity(), "data": ROWS, "k": 3}, "pass output={'k': 3}"),
        ({"model": nn.Linear(8, 2), "data": torch.from_numpy(ROWS)}, "the input to float32"),
    ],
)
def test_an_unusable_argument_is_one_sentence_without_flags(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(gradrun.ConfigError) as caught:
        gradrun.infer(**arguments)
    text = str(caught.value)
    assert message in text
    assert "--" not in text


def test_a_module_runs_on_the_data_of_a_config(net: nn.Module, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS.astype(np.float32))
    config = {
        "model": {"source": "layers", "layers": ["ReLU"]},
        "data": {"source": "arrays", "path": str(tmp_path / "x.npy"), "batch_size": 32},
        "output": {"path": str(tmp_path / "out")},
    }
    found = run(config=config, model=net, mode="inference_mode")
    np.testing.assert_array_equal(found.predictions["prediction"], by_hand(net, ROWS))
    assert (tmp_path / "out" / "predictions.npy").exists()
    with pytest.raises(gradrun.ConfigError, match="labels belong to arrays in memory"):
        gradrun.infer(config, model=net, labels=[0] * 100, overwrite=True)


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_a_section_of_a_model_runs_on_data_in_memory(form: str) -> None:
    model = {"source": "layers", "layers": ["ReLU"]}
    found = run(model=model, data=ROWS, output={"format": form})
    rows = ROWS.astype(np.float32)
    np.testing.assert_array_equal(found.predictions["prediction"], np.maximum(rows, 0))


def test_a_column_or_an_array_of_texts_is_read_as_a_list(tmp_path: Path) -> None:
    from tests.support.small_models import save_tokenizer

    save_tokenizer(tmp_path / "tokens")
    texts = ["the model runs", "data", "a mode of the time"]
    keys = {"tokenizer": str(tmp_path / "tokens"), "inputs": ["input_ids"], "batch_size": 1}

    class First(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids[:, 1:2]

    def first(data: Any) -> list[Any]:
        found = run(model=First(), data=data, **{f"data.{key}": keys[key] for key in keys})
        return list(found.predictions["prediction"].ravel())

    expected = first(texts)
    assert len({*expected}) == 3
    for data in (pd.DataFrame({"any name": texts}), pd.Series(texts), np.array(texts)):
        assert first(data) == expected


def test_workers_get_labels_and_arrays_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")
    InlineEngines(monkeypatch)
    truth = (5 * ROWS[:, :1]).astype(np.float32)
    found = run(
        model=Sum(), data=(3 * ROWS[:, :1], ROWS[:, :1]), labels=truth + 0.5, batch_size=32,
        metrics=["mae"], engine={"source": "processes", "workers": 2},
    )  # fmt: skip
    np.testing.assert_allclose(found.predictions["prediction"], truth, rtol=1e-6)
    assert found.result.metrics[0].value == pytest.approx(0.5, rel=1e-5)


def test_a_module_that_cannot_be_pickled_is_not_sent_to_workers(net: nn.Module) -> None:
    net.lock = threading.Lock()
    with pytest.raises(gradrun.ConfigError) as caught:
        gradrun.infer(model=net, data=ROWS, engine={"source": "processes", "workers": 2})
    assert str(caught.value) == (
        "the Sequential cannot be sent to another process: TypeError: cannot pickle "
        "'_thread.lock' object; put its class in a file, and use model: {source: python}"
    )


def test_ctrl_c_names_the_predictions_that_are_lost() -> None:
    class Stops(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return x

    settings = {"run.warmup": 0, "measure.memory": False, "measure.batch_independence": False}
    with pytest.raises(gradrun.Interrupted) as caught:
        gradrun.infer(model=Stops(), data=ROWS, batch_size=25, **settings)
    text = str(caught.value)
    assert text.endswith("of 100 predictions are lost; with an output folder, output=..., they are "
                         "kept")  # fmt: skip
    assert caught.value.exit_code == 130


def test_a_failure_before_the_first_prediction_is_not_changed(net: nn.Module) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("by hand")

    with pytest.raises(gradrun.GradrunError, match="ZeroDivisionError: by hand") as caught:
        gradrun.infer(model=Fails(), data=ROWS)
    assert "are lost" not in str(caught.value)


def test_ten_calls_leave_nothing_behind(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def left() -> dict[str, int]:
        gc.collect()
        found = gc.get_objects()
        return {
            "tensors": sum(type(one) is torch.Tensor for one in found),
            "objects": len(found),
            "threads": threading.active_count(),
            "open files": len(psutil.Process().open_files()),
            "temporary files": len([*tmp_path.iterdir()]),
        }

    def calls(count: int) -> None:
        for _ in range(count):
            run(model=net, data=ROWS)
            with pytest.raises(gradrun.GradrunError):
                run(model=net, data=ROWS[:, :3])

    calls(2)
    before = left()
    calls(10)
    after = left()
    assert after.pop("objects") - before.pop("objects") < 10, "less than one per call"
    assert after == before


def test_modes_of_a_module_in_memory_are_compared(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cloudpickle")
    monkeypatch.chdir(tmp_path)
    with in_process_workers():
        compared = gradrun.compare(
            modes=["grad", "inference_mode"],
            model=net,
            data=ROWS,
            batch_size=32,
            run={"threads": 1},
            measure={"processes": 2, "budget": 0.2},
        )
    assert [c.candidate for c in compared] == ["inference_mode"]
    assert compared.result.equivalence[0].equal
    assert compared.result.info.batch_size == 32
    assert not list(tmp_path.iterdir())


def test_compare_without_cloudpickle_names_the_package_to_install(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    message = r"this needs cloudpickle; pip install 'gradrun\[notebook\]'"
    with pytest.raises(gradrun.ConfigError, match=message):
        gradrun.compare(model=net, data=ROWS)


def test_a_notebook_shows_the_result_as_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_code_cell(
            "import gradrun, numpy as np\nfrom torch import nn\n"
            "class Net(nn.Linear): pass\n"
            "gradrun.infer(model=Net(2, 2), data=np.ones((8, 2)), run={'threads': 1})"
        )
    ]
    nbclient.NotebookClient(
        book, timeout=60, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = book.cells[0].outputs
    pages = [o["data"]["text/html"] for o in outputs if o["output_type"] == "execute_result"]
    assert "<iframe srcdoc" in pages[0]
    assert "Throughput" in pages[0] or "throughput" in pages[0]
    assert not [o for o in outputs if o["output_type"] == "stream"], "no output besides"
