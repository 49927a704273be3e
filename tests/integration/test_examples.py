"""Every example config is short and valid, runs completely and gives the described output."""

from __future__ import annotations

import csv
import json
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import gradrun
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from gradrun.core.resources import bundled, examples
from gradrun.results.result import RunResult
from tests.support.small_models import named_classes, save_bert
from tests.support.torch_version import needs_torch_2_13

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
COUNTS = {
    "records": 50,
    "shards": 50,
    "audio": 4,
    "dataset": 20,
    "table": 8,
    "parquet": 50,
    "images": 20,
    "detect": 20,
    "masks": 20,
    "embeddings": 20,
    "sentiment": 20,
    "generation": 8,
}
MADE = ("digits.pt", "digits.pt2", "answers/model.safetensors")  # by scripts in models/
EXPORTED = pytest.param("exported", marks=needs_torch_2_13)
LABELS = np.load(CONFIGS / "digits.npz")["labels"]

Run = Callable[..., RunResult]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run an example with a temporary output folder, one thread and a short warm-up."""

    def infer(name: str, **overrides: object) -> RunResult:
        quick = {"run.threads": 1, "run.warmup": 1, "output.path": str(tmp_path / name)}
        return gradrun.infer(CONFIGS / f"{name}.yaml", trust_code=True, **(quick | overrides))

    return infer


def test_there_is_an_example_for_every_source_format_and_zoo_model() -> None:
    assert examples() == NAMES
    configs = [gradrun.load_config(CONFIGS / f"{name}.yaml").config for name in NAMES]
    sources = {config.model.source for config in configs}
    assert sources == {
        *("zoo", "layers", "python", "torchscript", "exported", "huggingface", "timm"),
    }
    assert {config.data.source for config in configs} == {
        *("arrays", "synthetic", "records", "text", "images", "audio", "python"),
    }
    assert {config.output.format for config in configs} == {
        *("npy", "safetensors", "jsonl", "csv", "parquet", "files"),
    }
    transforms = {word for config in configs for word in config.output.transform}
    assert transforms == {"auto", "softmax", "argmax", "topk", "threshold", "sentence_embedding"}
    zoo = {config.model.name for config in configs if config.model.source == "zoo"}
    assert zoo == {"digits_cnn", "mlp", "resnet18", "transformer_encoder"}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_commented_and_valid(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("# ")
    assert sum("# " in line for line in lines) >= 4
    config = gradrun.load_config(CONFIGS / f"{name}.yaml").config
    assert config.output.path == CONFIGS / "runs" / name, "no two examples share a folder"


# test_timm.py runs the example of timm in a subprocess that can import it.
@pytest.mark.parametrize(
    "name", [EXPORTED if name == "exported" else name for name in NAMES if name != "timm"]
)
def test_an_example_runs_completely(run: Run, tmp_path: Path, name: str) -> None:
    result = run(name, **local_model(name, tmp_path))
    samples = result.measurements[0].samples
    config = gradrun.load_config(CONFIGS / f"{name}.yaml").config
    assert samples == getattr(config.data, "samples", COUNTS.get(name, 500))
    folder = tmp_path / name
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    evidence = {file for file in on_disk if file.startswith("_metrics.")}
    assert config.metrics or not evidence
    beside = evidence | on_disk & {"classes.txt", "ids.txt"}
    beside |= {file for file in on_disk if file.endswith(".png")}
    assert on_disk == {*result.files, *beside, "journal.jsonl", "result.json"}
    counts: dict[str, int] = {}
    for file in result.files:  # shards: one output in several files
        output = file.partition("-0")[0]
        counts[output] = counts.get(output, 0) + rows(tmp_path / name / file)
    assert set(counts.values()) == {samples}


def local_model(name: str, folder: Path) -> dict[str, str]:
    """Overrides that replace a model from the hub with a small local one."""
    kinds = {"embeddings": "BertModel", "sentiment": "BertForSequenceClassification"}
    if name not in kinds:
        return {}
    save_bert(folder / "bert", kinds[name], **named_classes())
    if name == "embeddings":
        lines = [
            {"type": "models.Transformer", "path": ""},
            {"type": "models.Pooling", "path": "1"},
        ]
        (folder / "bert/modules.json").write_text(json.dumps(lines))
    return {"model.path": str(folder / "bert")}


def rows(path: Path) -> int:
    if path.suffix == ".npy":
        return len(np.load(path))
    if path.suffix == ".safetensors":
        return len(load_file(path)["prediction"])
    if path.suffix == ".parquet":
        return len(pandas.read_parquet(path))
    return len(path.read_text().splitlines()) - (path.suffix == ".csv")


@pytest.mark.parametrize("name", ["digits", "torchscript", EXPORTED])
def test_the_trained_network_classifies_digits_of_the_test_set(
    run: Run, tmp_path: Path, name: str
) -> None:
    run(name)
    predicted = np.load(tmp_path / name / "predictions.npy")
    assert predicted.shape == (500,)
    assert (predicted == LABELS).mean() >= 0.97


def test_the_python_example_gives_the_three_most_likely_digits(run: Run, tmp_path: Path) -> None:
    run("python")
    values, indices = (
        np.load(tmp_path / "python" / f"predictions.{part}.npy") for part in ("values", "indices")
    )
    assert (indices[:, 0] == LABELS).mean() >= 0.97
    assert (indices == LABELS[:, None]).any(1).mean() >= 0.99
    assert (np.diff(values) <= 0).all(), "the most likely first"


def test_only_examples_with_programs_need_trust_and_their_first_lines_mention_it(
    tmp_path: Path,
) -> None:
    programs = {"python", "torchscript", "exported", "detect", "own_dataset"}
    for name in NAMES:
        config = gradrun.load_config(CONFIGS / f"{name}.yaml").config
        sources = {config.model.source, config.data.source}
        assert bool(sources & programs) == (name in programs)
        head = (CONFIGS / f"{name}.yaml").read_text().splitlines()[:3]
        assert any("--trust-code" in line for line in head) == (name in programs)
    for name in programs:
        with pytest.raises(ConfigError, match="pass trust_code=True"):
            gradrun.infer(CONFIGS / f"{name}.yaml", **{"output.path": str(tmp_path / "out")})


def test_the_records_example_copies_ids_and_classifies_digits(run: Run, tmp_path: Path) -> None:
    run("records")
    lines = (tmp_path / "records/predictions.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    with (CONFIGS / "digits.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [answer["id"] for answer in answers] == [row["id"] for row in table]
    scores = np.array([answer["prediction"] for answer in answers])
    assert np.allclose(scores.sum(1), 1, atol=1e-6)
    assert (scores.argmax(1) == [int(row["digit"]) for row in table]).mean() >= 0.97


def test_the_parquet_example_reads_and_writes_a_table(run: Run, tmp_path: Path) -> None:
    run("parquet")
    written = pandas.read_parquet(tmp_path / "parquet" / "predictions")
    table = pandas.read_parquet(CONFIGS / "digits.parquet")
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in (tmp_path / "parquet" / "predictions").iterdir()]
    read = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))
    assert read.to_pandas().astype(written.dtypes).equals(written)
    assert np.array_equal(np.stack(table["pixels"]), np.load(CONFIGS / "digits.npz")["images"][:50])
    assert written["id"].tolist() == table["id"].tolist()
    assert (np.stack(written["indices"])[:, 0] == table["digit"]).mean() >= 0.97


def test_the_images_example_classifies_the_images_in_its_folders(run: Run, tmp_path: Path) -> None:
    run("images")
    lines = (tmp_path / "images" / "predictions.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["prediction"] for answer in answers] == [
        int(Path(answer["id"]).parent.name) for answer in answers
    ]


def test_the_detector_example_finds_the_box_of_the_ink(run: Run, tmp_path: Path) -> None:
    run("detect")
    for line in (tmp_path / "detect" / "predictions.jsonl").read_text().splitlines():
        answer = json.loads(line)
        pixels = np.asarray(Image.open(CONFIGS / "pictures" / answer["id"]))
        rows, columns = (pixels > 127).nonzero()
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert answer["boxes"] == [box]
        assert answer["label_names"] == ["ink"]
        assert answer["scores"] == [pytest.approx(pixels.mean() / 255)]


def test_the_masks_example_writes_a_picture_per_picture(run: Run, tmp_path: Path) -> None:
    run("masks")
    for line in (tmp_path / "masks" / "files.jsonl").read_text().splitlines():
        answer = json.loads(line)
        mask = Image.open(tmp_path / "masks" / answer["prediction"]["file"])
        ink = np.asarray(Image.open(CONFIGS / "pictures" / answer["id"])) > 127
        assert np.array_equal(np.asarray(mask)[None] == 1, ink[None])
        assert mask.convert("RGB").getpixel((0, 0)) in {(255, 255, 255), (0, 0, 160)}


def test_the_metrics_example_computes_its_metrics(run: Run) -> None:
    values = {metric.name: metric.value for metric in run("metrics").metrics}
    assert values.keys() == {"accuracy", "top3", "f1", "auroc"}
    assert min(values.values()) >= 0.97


def test_the_layers_example_gives_probabilities(run: Run, tmp_path: Path) -> None:
    run("layers")
    shards = sorted((tmp_path / "layers").glob("predictions-*.safetensors"))
    scores = torch.cat([load_file(shard)["prediction"] for shard in shards])
    assert scores.shape == (10_000, 10)
    assert torch.allclose(scores.sum(1), torch.ones(10_000), atol=1e-6)


@pytest.mark.parametrize("mode", GradMode)
@pytest.mark.parametrize("name", ["mlp", EXPORTED])
def test_an_example_runs_in_every_mode(run: Run, name: str, mode: GradMode) -> None:
    result = run(name, **{"run.mode": mode.value})
    assert result.measurements[0].mode == mode


def test_the_table_contains_the_first_images_of_the_test_set() -> None:
    digits = np.load(CONFIGS / "digits.npz")
    with (CONFIGS / "digits.csv").open(newline="") as file:
        header, *table = csv.reader(file)
    assert header[:3] == ["id", "digit", "p00"]
    assert len(table) == 50
    assert np.array_equal(np.array([row[2:] for row in table], int), digits["images"][:50])
    assert np.array_equal([int(row[1]) for row in table], digits["labels"][:50])


@pytest.mark.parametrize("file", MADE)
def test_a_bundled_model_is_small_and_contains_no_local_path(
    file: str,
) -> None:
    content = (CONFIGS / file).read_bytes()
    assert len(content) <= 250_000
    for trace in (b"site-packages", str(ROOT).encode(), b"/home", b"/tmp"):
        assert trace not in content


def test_the_examples_of_a_checkout_are_used() -> None:
    assert bundled("configs") == CONFIGS
    assert bundled("models") == ROOT / "models"


def test_the_generation_example_answers_each_question(run: Run, tmp_path: Path) -> None:
    run("generation")
    with (tmp_path / "generation/predictions.jsonl").open() as file:
        found = [json.loads(line) for line in file]
    with (CONFIGS / "questions.jsonl").open() as file:
        given = [json.loads(line) for line in file]
    answers = runpy.run_path(str(ROOT / "models/train_answers.py"))["ANSWERS"]
    assert found == [row | {"prediction": answers[row["id"]]} for row in given]
