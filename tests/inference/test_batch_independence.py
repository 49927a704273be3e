"""Predictions that depend on the other samples of their batch are found, and no others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradrun
from gradrun.config.schema import RunConfig
from gradrun.data.batch import Batch
from gradrun.inference.batch_independence import (
    BatchDependence,
    batch_dependence,
    reference_rows,
)
from gradrun.modes import grad_mode
from tests.support import small_models

CPU = torch.device("cpu")


def config(**changes: Any) -> RunConfig:
    written = {
        "model": {"source": "zoo", "name": "mlp"},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 8},
        "output": {"path": "out"},
    }
    return RunConfig.model_validate(written, strict=False).replace(changes)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def dependence(
    model: nn.Module,
    *args: torch.Tensor,
    mode: str = "inference_mode",
    settings: RunConfig | None = None,
    lengths: Mapping[int, torch.Tensor] | None = None,
    **kwargs: torch.Tensor,
) -> BatchDependence | None:
    """Run a batch, then the test; the model's state stays as it was."""
    settings = settings or config()
    size = len([*args, *kwargs.values()][0])
    batch = Batch(args, kwargs, size, range(size), lengths=lengths or {})
    state = copy.deepcopy(model.state_dict())
    with grad_mode(mode):
        torch.manual_seed(1)
        rows = reference_rows(copy.deepcopy(model)(*args, **kwargs), batch, settings)
        found = batch_dependence(model, batch, rows, settings, CPU)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    return found


class Recurrent(nn.Module):
    """Takes the last step of an LSTM, to which the batch looks like time."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(3, 5, **settings), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


class Does(nn.Module):
    """Applies a function, after a linear layer if `width` is given."""

    def __init__(self, function: Any, width: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.linear = nn.Linear(width, width) if width else nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.linear(x))


def standardize(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)) / (x.std(0) + 1e-3)


def boxes(x: torch.Tensor) -> torch.Tensor:
    """All boxes of a batch with a positive score, of which as many as samples are kept."""
    return x.reshape(-1, 4)[x.reshape(-1, 4)[:, 0] > 0][: len(x)]


def encoder(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, **settings), 2).eval()


class Experts(nn.Module):
    """A mixture of experts, each with at most `capacity` samples of a batch."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.capacity = nn.Linear(8, 4), capacity
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()[: self.capacity]
            out[rows] = expert(x[rows])
        return out


MIXING = {
    "batch_first forgotten": (Recurrent(), numbers(4, 7, 3), "lstm (LSTM)", "batch_first=True"),
    "batch_first forgotten in attention": (
        encoder(),
        numbers(4, 6, 8),
        "layers.0.self_attn (MultiheadAttention)",
        "batch_first=True",
    ),
    "softmax over the batch": (
        nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=0)),
        numbers(6, 4),
        "1 (Softmax)",
        "dimension after the first",
    ),
    "hand-made batch norm": (
        nn.Sequential(nn.Linear(4, 4), Does(standardize)),
        numbers(6, 4),
        "1 (Does)",
        "data.batch_size",
    ),
    "batch norm in training mode": (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(),
        numbers(6, 4),
        "1 (BatchNorm1d)",
        "eval()",
    ),
    "classes before the batch": (
        Does(lambda x: x.t(), width=6),
        numbers(6, 6),
        "",
        "dimension 1 of the output is the batch",
    ),
    "boxes taken for rows": (Does(boxes), numbers(6, 8), "(the model) (Does)", "output.select"),
    "scaled by the batch's largest value": (
        Does(lambda x: x / x.abs().max(), width=4),
        numbers(64, 4),
        "(the model) (Does)",
        "data.batch_size",
    ),
    "divided by the number of samples": (
        Does(lambda x: x / len(x), width=4),
        numbers(6, 4),
        "",
        "data.batch_size",
    ),
    "similarity of all pairs": (
        Does(lambda x: x @ x.t()),
        numbers(6, 4),
        "(the model) (Does)",
        "data.batch_size",
    ),
    "experts with a capacity": (Experts(2), numbers(32, 8), "", "if this is intended"),
}


@pytest.mark.parametrize("mode", ["grad", "inference_mode"])
@pytest.mark.parametrize("name", MIXING)
def test_samples_that_mix_are_found_with_the_first_module(name: str, mode: str) -> None:
    model, x, module, advice = MIXING[name]
    found = dependence(model, x, mode=mode)
    assert found is not None
    assert found.label == module
    if name != "boxes taken for rows":
        assert advice in found.advice
    assert "other samples of their batch" in found.text


def test_hidden_states_of_layers_are_not_taken_for_rows() -> None:
    """An LSTM of 2 layers returns [2, batch, width]: for a batch of 2, each row is a layer."""
    model = nn.LSTM(3, 5, num_layers=2, batch_first=True)
    found = dependence(model, numbers(2, 7, 3))
    assert found is not None
    assert (found.module, found.batch_dim) == (None, 1)
    assert "output.select" in found.advice
    only_rows = config(**{"output.select": ("0",)})
    assert dependence(model, numbers(2, 7, 3), settings=only_rows) is None


def test_the_difference_is_that_of_the_sample_alone() -> None:
    model, x = Recurrent(), numbers(4, 7, 3)
    found = dependence(model, x)
    assert found is not None
    with torch.inference_mode():
        row = int(found.sample)
        last = (model(x)[3] - model(x[3:])[0]).abs().max().item()
        copies = (model(x)[row] - model(x[[row] * 4])[row]).abs().max().item()
    assert found.difference >= max(last, copies) * 0.99
    assert f"sample {row}" in found.text


def test_all_zero_inputs_do_not_hide_an_output_of_another_layout() -> None:
    model = nn.LSTM(3, 5, num_layers=2, batch_first=True)
    assert dependence(model, torch.zeros(2, 7, 3)) is not None


class OneSize(nn.Module):
    """Runs batches of 6 samples only, as an exported program does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) != 6:
            raise ValueError("expected 6 samples")
        out: torch.Tensor = self.inner(x)
        return out


class Samples(nn.Module):
    """Adds random numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Ticks(nn.Module):
    """Returns other values in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[int]] = [[0]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[0][0] += 1
        return x + self.calls[0][0]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 10))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 12 * 12, 4)).eval()


SOUND = {
    "float32": (mlp(), numbers(33, 64)),
    "bfloat16": (mlp().bfloat16(), numbers(33, 64).bfloat16()),
    "float16": (mlp().half(), numbers(33, 64).half()),
    "float64": (mlp().double(), numbers(33, 64).double()),
    "convolutions": (convolutions(), numbers(7, 3, 16, 16)),
    "convolutions in bfloat16": (
        convolutions().bfloat16(),
        numbers(7, 3, 16, 16).bfloat16(),
    ),
    "batch_first": (Recurrent(batch_first=True), numbers(4, 7, 3)),
    "encoder": (encoder(batch_first=True), numbers(5, 6, 8)),
    "sequence first inside": (
        Does(lambda x: nn.functional.relu(x.transpose(0, 1)).transpose(0, 1), width=8),
        numbers(6, 6, 8),
    ),
    "dropout in training mode": (mlp().append(nn.Dropout(0.5)).train(), numbers(9, 64)),
    "random numbers": (Samples(), numbers(5, 4)),
    "other results in each call": (Ticks(), numbers(5, 4)),
    "squeezes a single sample": (Does(torch.squeeze, width=4), numbers(5, 4)),
    "one logit without a dimension": (Does(lambda x: x[:, 0], width=4), numbers(5, 4)),
    "experts without a capacity": (Experts(1000), numbers(32, 8)),
    "integers": (Does(lambda x: x.argmax(1), width=64), numbers(33, 64)),
    "NaN in a row": (Does(lambda x: x.sqrt(), width=4), numbers(6, 4)),
    "only full batches": (OneSize(mlp()), numbers(6, 64)),
    "a tuple and a scalar": (Does(lambda x: {"rows": x, "loss": x.mean()}), numbers(6, 4)),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_has_no_finding(name: str) -> None:
    model, x = SOUND[name]
    assert dependence(model, x) is None


def test_a_model_for_one_batch_size_is_tested_with_other_neighbors() -> None:
    model = OneSize(nn.Sequential(nn.Linear(4, 4), Does(standardize)))
    found = dependence(model, numbers(6, 4))
    assert found is not None
    assert found.label == "inner.1 (Does)"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 100])
def test_every_batch_size_is_tested_if_there_are_neighbors(size: int) -> None:
    found = dependence(Does(lambda x: x - x.sum(0)), numbers(size, 4))
    assert (found is not None) is (size > 1)


def test_the_test_can_be_disabled() -> None:
    off = config(**{"measure.batch_independence": False})
    assert dependence(Recurrent(), numbers(4, 7, 3), settings=off) is None


def test_hidden_state_is_restored_and_is_not_a_dependence_on_neighbors() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.hidden = nn.GRUCell(4, 4), None

        def forward(self, x: torch.Tensor) -> Any:
            self.hidden = self.cell(x, self.hidden)
            return self.hidden

    model = Keeps()
    assert dependence(model, numbers(5, 4)) is None
    assert model.hidden is None


def test_compiled_models_are_not_compiled_again() -> None:
    from torch._dynamo.testing import CompileCounter

    counter: Any = CompileCounter()  # type: ignore[no-untyped-call]
    model: Any = torch.compile(nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=0)), backend=counter)
    x, settings = numbers(6, 4), config()
    batch = Batch((x,), {}, 6, range(6))
    with torch.inference_mode():
        rows = reference_rows(model(x), batch, settings)
        compiled = counter.frame_count
        found = batch_dependence(model, batch, rows, settings, CPU)
        model(x)
    assert counter.frame_count == compiled > 0
    assert found is not None
    assert found.label == "1 (Softmax)"


# --- padding -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens() -> dict[str, torch.Tensor]:
    """Token ids of four texts of other lengths, padded to the longest on the right."""
    mask = torch.tensor([[1] * n + [0] * (9 - n) for n in (9, 4, 7, 2)])
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask}


class Averages(nn.Module):
    """Averages embeddings over all tokens, or over those of the mask."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.masked = nn.Embedding(100, 8), masked

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask if self.masked else torch.ones_like(attention_mask)
        vectors: torch.Tensor = self.embedding(input_ids) * mask.unsqueeze(-1)
        return vectors.sum(1) / mask.sum(1, keepdim=True)


class LastStep(nn.Module):
    """An LSTM that takes the last step of the batch, or of each series."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(2, 4, batch_first=True)

    def forward(self, series: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        steps: torch.Tensor = self.lstm(series)[0]
        return steps[:, -1] if lengths is None else steps[torch.arange(len(steps)), lengths - 1]


def test_a_model_that_ignores_the_lengths_depends_on_padding() -> None:
    lengths = torch.tensor([9, 4, 7, 2])
    series = numbers(4, 9, 2) * (torch.arange(9) < lengths[:, None])[..., None]
    model = LastStep()
    found = dependence(model, series, lengths={0: lengths})
    assert found is not None
    assert (found.padding, found.sample) == (True, 3), "the shortest series"
    expected = (model(series)[3] - model(series[3:, :2])[0]).abs().max().item()
    assert found.difference == pytest.approx(expected)
    assert "lengths" in found.advice
    assert "attention_mask" not in found.advice
    assert dependence(model, series, lengths, lengths={0: lengths}) is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_that_ignores_the_mask_depends_on_padding(
    tokens: dict[str, torch.Tensor], side: str
) -> None:
    if side == "left":
        tokens = {name: value.flip(1) for name, value in tokens.items()}
    model = Averages(masked=False)
    found = dependence(model, **tokens)
    assert found is not None
    assert found.padding
    assert found.sample == 3, "the shortest text"
    own = tokens["attention_mask"][3] == 1
    alone = {name: value[3:4, own] for name, value in tokens.items()}
    expected = (model(**tokens)[3] - model(**alone)[0]).abs().max().item()
    assert found.difference == pytest.approx(expected)
    assert "attention_mask" in found.advice
    assert dependence(Averages(masked=True), **tokens) is None


def test_texts_of_fixed_length_do_not_depend_on_their_batch(
    tokens: dict[str, torch.Tensor],
) -> None:
    """With padding: max_length no text determines the padding of another."""
    padded = {name: nn.functional.pad(value, (0, 3)) for name, value in tokens.items()}
    assert dependence(Averages(masked=False), **padded) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bert_does_not_depend_on_neighbors_or_padding(
    tokens: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    model = small_models.bert().to(dtype)
    assert dependence(model, **tokens) is None


# --- commands ------------------------------------------------------------------------------------

NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first={batch_first}), nn.Linear(5, 2)
    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])
"""


def project(folder: Path, *, batch_first: bool, batch_size: int = 4) -> dict[str, Any]:
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(12, 7, 3)).astype("f4"))
    (folder / "net.py").write_text(NET.format(batch_first=batch_first))
    return {
        "model": {"source": "python", "target": f"{folder / 'net.py'}:Net"},
        "data": {"source": "arrays", "path": str(folder / "x.npy"), "batch_size": batch_size},
        "run": {"warmup": 0, "threads": 1},
        "output": {"path": str(folder / "run")},
    }


@pytest.mark.parametrize(("batch_first", "warns"), [(False, True), (True, False)])
def test_infer_warns_if_rows_depend_on_the_batch_size(
    tmp_path: Path, batch_first: bool, warns: bool
) -> None:
    rows = []
    for size in (4, 1):
        written = project(tmp_path, batch_first=batch_first, batch_size=size)
        result = gradrun.infer(written, trust_code=True, overwrite=True)
        rows.append(np.load(tmp_path / "run" / "predictions.npy"))
        codes = {warning.code for warning in result.warnings}
        assert ("batch_dependent" in codes) is (warns and size > 1)
    assert (np.abs(rows[0] - rows[1]).max() > 0.01) is np.bool_(warns)


def test_predictions_and_first_batch_are_those_of_a_run_without_the_test(tmp_path: Path) -> None:
    rows = []
    for enabled in (True, False):
        written = project(tmp_path, batch_first=False)
        written["measure"] = {"batch_independence": enabled}
        result = gradrun.infer(written, trust_code=True, overwrite=True)
        rows.append((tmp_path / "run" / "predictions.npy").read_bytes())
        codes = {warning.code for warning in result.warnings}
        assert ("batch_dependent" in codes) is enabled
    assert rows[0] == rows[1]


@pytest.mark.parametrize("batch_size", [4, 1])
def test_audit_reports_the_module_that_mixes_samples(tmp_path: Path, batch_size: int) -> None:
    written = project(tmp_path, batch_first=False, batch_size=batch_size)
    result = gradrun.audit(written, trust_code=True, compile=False)
    (finding,) = [f for f in result.findings if f.code == "mixes_samples"]
    assert (finding.severity, finding.module, finding.modes) == ("error", "lstm (LSTM)", ())
    assert "batch_first=True" in finding.advice
    written = project(tmp_path, batch_first=True, batch_size=batch_size)
    findings = gradrun.audit(written, trust_code=True, compile=False).findings
    assert [finding for finding in findings if finding.severity == "error"] == []
