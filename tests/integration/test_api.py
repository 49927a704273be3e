"""`gradrun.infer` as a library function: arguments, result, errors and side effects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import gradrun
from gradrun import ConfigError, GradrunError, Interrupted, RunConfig, RunFailed, RunResult
from tests.inference.test_device import CPUS, settings

SAMPLES = 10
INPUTS = np.random.default_rng(0).normal(size=(SAMPLES, 4)).astype("float32")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small config, also written to conf.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADRUN_TRUST_CODE", raising=False)
    np.save("x.npy", INPUTS)
    config: dict[str, Any] = {
        "model": {"source": "layers", "layers": [{"Linear": [4, 3]}, "ReLU"]},
        "data": {"source": "arrays", "path": "x.npy", "batch_size": 4},
        "run": {"mode": "no_grad", "device": "cpu", "warmup": 1},
        "output": {"path": "out"},
    }
    Path("conf.yaml").write_text(yaml.safe_dump(config))
    return config


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "path": lambda _: Path("conf.yaml"),
    "text": lambda _: "conf.yaml",
    "mapping": lambda config: config,
    "LoadedConfig": lambda _: gradrun.load_config("conf.yaml"),
    "RunConfig": lambda _: gradrun.load_config("conf.yaml").config,
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def predictions(folder: str = "out") -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = np.load(Path(folder, "predictions.npy"))
    return array


# --- arguments and result ----------------------------------------------------------------------


@every_kind
def test_a_config_may_be_a_path_a_mapping_or_a_loaded_config(
    written: dict[str, Any], kind: Callable[[dict[str, Any]], Any]
) -> None:
    result = gradrun.infer(kind(written))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    with torch.no_grad():
        expected = torch.cat([model(torch.from_numpy(INPUTS[i : i + 4])) for i in (0, 4, 8)])
    assert predictions().tobytes() == expected.numpy().tobytes()
    assert result.measurements[0].batch_sizes == (4, 4, 2)
    assert result.files == ("predictions.npy",)


def test_the_returned_result_equals_the_saved_result(written: dict[str, Any]) -> None:
    result = gradrun.infer(written)
    assert isinstance(result, RunResult)
    assert RunResult.load("out") == result
    assert json.loads(Path("out/result.json").read_text()) == json.loads(result.to_json())
    assert sorted(file.name for file in Path("out").iterdir()) == [
        "journal.jsonl",
        "predictions.npy",
        "result.json",
    ]
    assert result.config["run"]["mode"] == "no_grad"
    assert Path(result.config["output"]["path"]).is_absolute()


def test_a_saved_config_can_be_run_again(written: dict[str, Any]) -> None:
    first = gradrun.infer(written)
    before = predictions().tobytes()
    again = gradrun.infer(first.config, overwrite=True)
    assert again.config == first.config
    assert predictions().tobytes() == before


@every_kind
@pytest.mark.parametrize(
    "overrides",
    [
        {"run": {"mode": "grad"}, "data": {"batch_size": 5}},
        {"run.mode": "grad", "data.batch_size": 5},
        {"run": {"mode": gradrun.GradMode.GRAD}, "data.batch_size": 5},
    ],
    ids=["sections", "dotted", "mixed"],
)
def test_overrides_change_only_their_keys(
    written: dict[str, Any], kind: Callable[[dict[str, Any]], Any], overrides: dict[str, Any]
) -> None:
    before = json.dumps(written)
    result = gradrun.infer(kind(written), **overrides)
    (measured,) = result.measurements
    assert (measured.mode, measured.batch_sizes) == ("grad", (5, 5))
    assert (result.config["run"]["warmup"], result.config["data"]["batch_size"]) == (1, 5)
    assert json.dumps(written) == before


def test_progress_receives_each_stage_and_the_samples_done(
    written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradrun.inference.timed_loop._CALLBACK_NS", -1)
    calls: list[tuple[str, int, int]] = []
    gradrun.infer(written, progress=lambda p: calls.append((p.stage, p.done, p.total)))
    unknown = ["loading the model", "opening the data", "running the first batch"]
    assert calls == [
        *((stage, 0, 0) for stage in unknown),
        *(("predicting", done, 10) for done in (0, 4, 8, 10)),
        ("measuring memory", 0, 0),
    ]


def test_only_overwrite_replaces_an_earlier_run(written: dict[str, Any]) -> None:
    gradrun.infer(written)
    with pytest.raises(ConfigError, match="use overwrite=True"):
        gradrun.infer(written)
    Path("out/notes.txt").write_text("mine")
    gradrun.infer(written, overwrite=True, output={"transform": "argmax"})
    assert predictions().shape == (SAMPLES,)
    assert Path("out/notes.txt").read_text() == "mine"


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "place", "text"),
    [
        ({"model.layers": [{"Linear": [5, 3]}]}, "data", r"\[4, 4\].*weight \[3, 5\]"),
        ({"output.transform": "topk"}, "output", "k=5 exceeds the 3 classes"),
        ({"output.select": "logits"}, "output", "no output 'logits'"),
        ({"data.inputs": {"x": {"key": "a"}}}, "data", "without a key"),
        ({"run.device": "cuda:99"}, "run", "device cuda:99 is not available"),
    ],
)
def test_an_error_of_the_run_has_the_location_of_its_key(
    written: dict[str, Any], change: dict[str, Any], place: str, text: str
) -> None:
    ((key, value),) = change.items()
    section, name = key.split(".")
    written[section][name] = value
    lines = yaml.safe_dump(written).splitlines()
    Path("conf.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=text) as caught:
        gradrun.infer("conf.yaml")
    shown = str(caught.value).splitlines()
    line = int(shown[0].split(":")[1])
    sections = [word[:-1] for word in lines[:line] if word[0].isalpha()]
    assert shown[0].startswith(f"conf.yaml:{line}:")
    assert sections[-1] == place
    assert shown[1].strip() == lines[line - 1].strip()
    assert not Path("out").exists()


@every_kind
def test_a_mistyped_override_is_an_error_and_writes_nothing(
    written: dict[str, Any], kind: Callable[[dict[str, Any]], Any]
) -> None:
    with pytest.raises(ConfigError, match="did you mean mode"):
        gradrun.infer(kind(written), **{"run.mod": "grad"})
    with pytest.raises(ConfigError, match="no_grad"):
        gradrun.infer(kind(written), run={"mode": "nograd"})
    assert not Path("out").exists()


STOPPING = """
from torch import nn
class Net(nn.Module):
    calls = 0
    def forward(self, x):
        type(self).calls += 1
        if self.calls == 8:  # first batch, warm-up, two checks of two calls, one timed
            raise {error}
        return x * 2
"""


@pytest.mark.parametrize("data_format", ["npy", "jsonl", "safetensors"])
@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [("KeyboardInterrupt", Interrupted, 130), ("ValueError('no more')", RunFailed, 1)],
)
def test_a_run_that_ends_early_keeps_its_predictions_and_its_result(
    written: dict[str, Any], error: str, kind: type[GradrunError], code: int, data_format: str
) -> None:
    Path("stopping.py").write_text(STOPPING.format(error=error))
    written["model"] = {"source": "python", "target": "stopping.py:Net"}
    with pytest.raises(kind, match="4 of 10 predictions are saved in") as caught:
        gradrun.infer(written, trust_code=True, **{"output.format": data_format})
    assert caught.value.exit_code == code
    result = caught.value.result
    assert RunResult.load("out") == result
    assert result.measurements[0].batch_sizes == (4,)
    assert result.measurements[0].memory.forward_peak is None
    assert "ended_early" in {warning.code for warning in result.warnings}
    assert len(result.files) == 1
    if data_format == "npy":
        assert np.array_equal(predictions(), INPUTS[:4] * 2)


def test_code_runs_only_if_it_is_trusted(
    written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("loud.py").write_text("open('ran', 'w')\nfrom torch import nn\nNet = nn.Identity\n")
    written["model"] = {"source": "python", "target": "loud.py:Net"}
    for untrusting in ("", "0", "yes"):
        monkeypatch.setenv("GRADRUN_TRUST_CODE", untrusting)
        with pytest.raises(ConfigError, match="trust_code=True or set GRADRUN_TRUST_CODE=1"):
            gradrun.infer(written)
    assert not Path("ran").exists()
    assert not Path("out").exists()
    monkeypatch.setenv("GRADRUN_TRUST_CODE", "1")
    gradrun.infer(written)
    assert Path("ran").exists()


# --- side effects ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", gradrun.GradMode)
def test_a_run_restores_the_settings_of_torch(written: dict[str, Any], mode: str) -> None:
    torch.manual_seed(123)
    before = settings()
    gradrun.infer(
        written, run={"mode": mode, "threads": CPUS + 1, "seed": 7, "deterministic": True}
    )
    assert settings() == before


def test_an_error_restores_the_settings_of_torch(written: dict[str, Any]) -> None:
    before = settings()
    written["model"]["layers"] = [{"Linear": [5, 3]}]
    with pytest.raises(ConfigError):
        gradrun.infer(written, run={"threads": CPUS + 1, "seed": 7})
    assert settings() == before


def test_the_mode_of_a_run_overrides_the_mode_of_the_caller(
    written: dict[str, Any],
) -> None:
    Path("looking.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def forward(self, x):\n        return x * 0 + torch.is_grad_enabled()\n"
    )
    written["model"] = {"source": "python", "target": "looking.py:Net"}
    with torch.no_grad():
        gradrun.infer(written, trust_code=True, run={"mode": "grad"})
        assert not torch.is_grad_enabled()
    assert predictions().min() == 1


def test_a_run_does_not_change_its_config(written: dict[str, Any]) -> None:
    loaded = gradrun.load_config("conf.yaml")
    before = loaded.config.model_dump_json()
    gradrun.infer(loaded, run={"mode": "grad"})
    assert isinstance(loaded.config, RunConfig)
    assert loaded.config.model_dump_json() == before
