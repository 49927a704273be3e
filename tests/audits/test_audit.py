"""The audit as a whole: planted faults are found, sound models pass, bytes agree with the meter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradrun
from gradrun.core.errors import ConfigError, GradrunError
from gradrun.core.grad_mode import GradMode
from gradrun.modes import assert_restored
from gradrun.results.result import Finding, RunResult
from gradrun.results.summary import (
    errors_in,
    has_errors,
    lowest_memory_safe_mode,
    summarize_audit,
)
from tests.conftest import ROOT, Command
from tests.support import planted
from tests.support.torch_version import needs_torch_2_13

PLANTED = ROOT / "tests" / "support" / "planted.py"
ALL = tuple(GradMode)
GRAD, NO_GRAD, INFERENCE = ALL


def config(tmp_path: Path, fault: str, build: str = "build", **run: Any) -> dict[str, Any]:
    return {
        "model": {"source": "python", "target": f"{PLANTED}:{build}", "args": {"fault": fault}},
        "data": {
            "source": "synthetic",
            "inputs": {"x": {"shape": [4]}},
            "samples": 24,
            "batch_size": 4,
        },
        "run": {"threads": 1, **run},
        "output": {"path": str(tmp_path / "run")},
    }


@pytest.fixture
def audited(tmp_path: Path) -> Any:
    def audit(fault: str, build: str = "build", compile: bool = False, **changes: Any) -> RunResult:
        with assert_restored():
            return gradrun.audit(
                config(tmp_path, fault, build), trust_code=True, compile=compile, **changes
            )

    return audit


def line_of(fault: str) -> str:
    lines = PLANTED.read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.endswith(f"# LINE {fault}"))
    return f"{PLANTED}:{number}"


def found(result: RunResult, code: str) -> Finding:
    matching = [finding for finding in result.findings if finding.code == code]
    assert len(matching) == 1, (code, [(f.code, f.modes, f.text) for f in result.findings])
    return matching[0]


def codes(result: RunResult) -> set[str]:
    return {finding.code for finding in result.findings}


FAULTS: list[tuple[str, str, str, str, tuple[GradMode, ...]]] = [
    # fault, code, severity, its module, the modes it is seen in
    ("Tracks", "enables_grad", "warning", "block.1 (Tracks)", (NO_GRAD,)),
    ("TracksByDecorator", "enables_grad", "warning", "block.1 (TracksByDecorator)", (NO_GRAD,)),
    ("TracksByGuard", "enables_grad", "warning", "block.1 (TracksByGuard)", (NO_GRAD,)),
    ("Tracks", "redundant_enable_grad", "info", "block.1 (Tracks)", (INFERENCE,)),
    ("StopsGradients", "stops_gradients", "info", "block.1 (StopsGradients)", (GRAD,)),
    ("EntersInference", "stops_gradients", "info", "block.1 (EntersInference)", (GRAD,)),
    ("EntersInference", "switches", "info", "block.1 (EntersInference)", (NO_GRAD,)),
    ("StaysInTraining", "training_mode", "error", "block.1 (StaysInTraining)", ALL),
    ("NormStaysInTraining", "training_mode", "error", "block.1 (NormStaysInTraining)", ALL),
    (
        "InstanceNormStaysInTraining",
        "training_mode",
        "error",
        "block.1 (InstanceNormStaysInTraining)",
        ALL,
    ),
    ("DropsByFunction", "random", "warning", "block.1 (DropsByFunction)", ALL),
    (
        "MakesParameter",
        "made_in_inference_mode",
        "error",
        "block.1 (MakesParameter)",
        (INFERENCE,),
    ),
    ("MakesBuffer", "made_in_inference_mode", "error", "block.1 (MakesBuffer)", (INFERENCE,)),
    ("MakesCache", "made_in_inference_mode", "warning", "block.1 (MakesCache)", (INFERENCE,)),
    ("Counts", "changes_buffers", "warning", "block.1 (Counts)", ALL),
    ("Learns", "changes_parameters", "error", "block.1 (Learns)", ALL),
    ("AnswersByMode", "outputs_differ", "error", "block.1 (AnswersByMode)", (NO_GRAD, INFERENCE)),
    ("Ticks", "not_deterministic", "warning", "block.1 (Ticks)", ALL),
]


@pytest.mark.parametrize(("fault", "code", "severity", "module", "modes"), FAULTS)
def test_a_planted_fault_is_found_and_its_module_named(
    audited: Any,
    fault: str,
    code: str,
    severity: str,
    module: str,
    modes: tuple[GradMode, ...],
) -> None:
    finding = found(audited(fault), code)
    assert (finding.severity, finding.module, finding.modes) == (severity, module, modes)
    assert finding.source is not None
    assert finding.source.startswith(f"{PLANTED}:")
    assert finding.text[0].isupper()
    assert not finding.text.endswith(".")


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("Tracks", "enables_grad"),
        ("TracksByDecorator", "enables_grad"),
        ("TracksByGuard", "enables_grad"),
        ("StopsGradients", "stops_gradients"),
        ("EntersInference", "switches"),
        ("TracksWithoutNeed", "enables_grad"),
        ("CallsTrain", "training_mode"),
    ],
)
def test_a_switch_is_found_to_the_line(audited: Any, fault: str, code: str) -> None:
    assert found(audited(fault), code).source == line_of(fault)


def test_a_block_that_leaves_inference_mode_tracks_in_both_modes(audited: Any) -> None:
    result = audited("LeavesInference")
    by_mode = {f.modes: f.source for f in result.findings if f.code == "enables_grad"}
    assert by_mode == {
        (NO_GRAD,): line_of("LeavesInference"),
        (INFERENCE,): line_of("LeavesInference"),
    }


def test_a_forward_that_leaves_the_thread_in_another_mode_is_an_error_in_each(audited: Any) -> None:
    leaks = [f for f in audited("LeavesMode").findings if f.code == "leaves_mode"]
    assert [f.modes for f in leaks] == [(GRAD,), (NO_GRAD,), (INFERENCE,)]
    assert {(f.severity, f.module) for f in leaks} == {("error", "block.1 (LeavesMode)")}
    assert "leaves the thread in no_grad" in leaks[0].text


def test_outputs_with_a_graph_are_reported_with_their_memory(
    audited: Any,
) -> None:
    result = audited("Tracks", build="alone")
    without = found(result, "keeps_graph")
    assert (without.severity, without.modes) == ("warning", (NO_GRAD,))
    measured = {m.mode: m.memory for m in result.measurements}
    assert without.cost == measured[NO_GRAD].retained > 0
    assert "keeps_graph" not in codes(audited("TracksWithoutNeed", build="alone"))


def test_enabled_gradients_are_reported_with_the_memory_they_cost(audited: Any) -> None:
    """x * weight saves x, [4, 4] floats, which the Linear before it made; x itself is no cost."""
    assert found(audited("Tracks"), "enables_grad").cost == 4 * 4 * 4
    assert not found(audited("Tracks", build="alone"), "enables_grad").cost


def test_a_modified_input_is_reported_with_its_module(audited: Any) -> None:
    finding = found(audited("FirstChangesInput", build="alone"), "changes_input")
    assert finding.module == "first (ChangesInput)"
    assert finding.modes == ALL


@pytest.mark.parametrize(
    ("fault", "module", "place", "bytes_of_grad"),
    [
        ("ListOfLosses", "block.1 (ListOfLosses)", "in block.1.losses", "132 B"),
        ("DequeOfOutputs", "block.1 (DequeOfOutputs)", "in block.1.seen", "128 B"),
        ("GrowsElsewhere", "(the model) (Around)", "outside the model's attributes", "128 B"),
    ],
)
def test_growing_memory_is_reported_per_batch_with_its_attribute(
    audited: Any, fault: str, module: str, place: str, bytes_of_grad: str
) -> None:
    """In grad a graph hangs on what is kept, with the activations before it."""
    in_grad, without = [f for f in audited(fault).findings if f.code == "memory_grows"]
    assert (in_grad.modes, without.modes) == ((GRAD,), (NO_GRAD, INFERENCE))
    for finding in (in_grad, without):
        assert (finding.severity, finding.module) == ("error", module)
        assert finding.source is not None
        assert place in finding.text
    assert f"Retains {bytes_of_grad} of every batch" in in_grad.text
    assert in_grad.cost > without.cost


def test_a_mode_in_which_the_model_fails_is_unsafe_and_the_others_are_audited(audited: Any) -> None:
    result = audited("NeedsGradients")
    fails = [f for f in result.findings if f.code == "model_fails"]
    assert [(f.severity, f.modes) for f in fails] == [
        ("error", (NO_GRAD,)),
        ("error", (INFERENCE,)),
    ]
    assert "grad() at" in fails[0].text
    assert str(PLANTED) in fails[0].text
    assert [m.mode for m in result.measurements] == [GRAD]
    best = lowest_memory_safe_mode(result)
    assert best is not None
    assert best.mode is GRAD
    assert summarize_audit(result).startswith("Use grad,")


def test_a_model_that_marks_its_input_is_audited_like_any_other(audited: Any) -> None:
    result = audited("InputGradients", build="alone")
    assert [m.mode for m in result.measurements] == [GRAD]
    assert summarize_audit(result).startswith("Use grad,")


def test_a_model_that_runs_in_no_mode_is_the_configs_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model failed on the input"):
        gradrun.audit(config(tmp_path, "FailsAlways"), trust_code=True, compile=False)


def test_dropout_that_the_config_asks_for_is_a_warning(audited: Any) -> None:
    result = audited("StaysInTraining", **{"model.training": True})
    assert found(result, "training_mode").severity == "warning"


def test_the_safe_mode_with_the_lowest_memory_is_chosen(audited: Any) -> None:
    result = audited("MakesParameter")
    assert has_errors(result)
    assert [len(errors_in(result, mode)) for mode in ALL] == [0, 0, 1]
    best = lowest_memory_safe_mode(result)
    assert best is not None
    assert best.mode is NO_GRAD
    assert "Do not use inference_mode: 1 error" in summarize_audit(result)


def test_the_verdict_is_that_no_mode_is_safe(audited: Any) -> None:
    assert summarize_audit(audited("ListOfLosses")).startswith(
        "No mode is safe. Fix the 2 errors first"
    )


def test_each_mode_is_audited_on_a_new_model(audited: Any) -> None:
    """Problems caused in one mode do not affect the next: each mode loads the model again."""
    assert codes(audited("SharesStorage", build="alone")) == set()


@pytest.mark.parametrize(
    ("fault", "clean"),
    [
        ("KeepsCache", {"model_fails", "changes_input"}),
        ("Sparse", {"model_fails", "pass_failed"}),
        ("FillsABoundedCache", {"memory_grows"}),
        ("RemakesBuffer", {"made_in_inference_mode"}),
        ("ReturnsParameter", {"keeps_graph"}),
    ],
)
def test_a_correct_model_has_no_findings(audited: Any, fault: str, clean: set[str]) -> None:
    result = audited(fault, build="alone")
    assert not codes(result) & clean, [(f.code, f.text) for f in result.findings]
    assert {m.mode for m in result.measurements} == set(GradMode)


@pytest.mark.parametrize("mode", GradMode)
def test_a_model_that_keeps_hidden_state_gets_a_finding_in_each_mode(
    audited: Any, mode: GradMode
) -> None:
    result = audited("KeepsHiddenState", build="alone", compile=True)
    finding = found(result, "carries_state")
    assert mode in finding.modes
    assert (finding.severity, finding.module) == ("warning", "cell (GRUCell)")
    assert "model_fails" not in codes(result)
    assert "not_compiled" not in codes(result), "torch.compile starts from the same state too"


def test_a_scripted_part_runs_in_every_mode(audited: Any) -> None:
    result = audited("HasAScriptedPart", build="alone", compile=True)
    assert codes(result) == set()
    assert {m.mode for m in result.measurements} == set(GradMode)
    assert all(e.bitwise for e in result.equivalence)


def test_a_padding_mask_is_audited_with_the_difference_of_the_fused_path(audited: Any) -> None:
    result = audited("MasksPadding", build="alone")
    torch.manual_seed(0)
    model = planted.MasksPadding().eval()
    batch = torch.randn(4, 4)
    with torch.no_grad():
        fused = model(batch)
    difference = (model(batch) - fused).abs().max()
    assert difference > 0.01, "zeros at padded positions change the mean"
    finding = found(result, "outputs_differ")
    assert (finding.severity, finding.modes) == ("error", (NO_GRAD, INFERENCE))
    assert finding.module == "encoder.layers.0 (TransformerEncoderLayer)"
    assert "returns zeros" in finding.text
    assert "enable_nested_tensor=False" in finding.advice
    assert result.equivalence[0].max_abs_diff > 0.01


def test_gradients_that_a_model_needs_itself_are_not_a_finding(audited: Any) -> None:
    for finding in audited("Energy", build="alone").findings:
        assert "backward pass that never runs" not in finding.text


def test_a_model_that_returns_no_tensor_is_not_called_safe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model returned list; expected one or more tensors"):
        gradrun.audit(config(tmp_path, "WithoutTensors", "alone"), trust_code=True, compile=False)


# --- torch.compile -----------------------------------------------------------------------------


def test_a_mode_entered_manually_is_a_graph_break_with_its_line(audited: Any) -> None:
    finding = found(audited("EntersByHand", compile=True), "mode_breaks_graph")
    assert finding.severity == "warning"
    assert finding.source is not None
    number = int(finding.source.rpartition(":")[2])
    assert "guard.__" in PLANTED.read_text().splitlines()[number - 1]


def test_other_graph_breaks_have_another_code(audited: Any) -> None:
    result = audited("BreaksGraph", compile=True)
    assert "reasons other than the mode" in found(result, "graph_breaks").text
    assert "mode_breaks_graph" not in codes(result)


def test_one_compilation_per_mode_is_reported(audited: Any) -> None:
    finding = found(audited("Counts", compile=True), "compiles_per_mode")
    assert "1 in grad, 1 in no_grad, 1 in inference_mode" in finding.text


# --- bytes -------------------------------------------------------------------------------------

ZOO = ["digits", "mlp", "resnet18", "transformer_encoder"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunResult]:
    folder = tmp_path_factory.mktemp("zoo")
    small = {"samples": 16}
    data: dict[str, dict[str, Any]] = {
        "digits": {},
        "resnet18": small | {"inputs": {"image": {"shape": [3, 64, 64]}}},
    }
    return {
        name: gradrun.audit(
            ROOT / "configs" / f"{name}.yaml",
            compile=name == "transformer_encoder",
            run={"threads": 1},
            output={"path": str(folder / name)},
            data=data.get(name, small),
        )
        for name in ZOO
    }


@pytest.mark.parametrize("name", ZOO)
def test_bytes_saved_by_modules_add_up_to_the_retained_memory(
    zoo: dict[str, RunResult], name: str
) -> None:
    result = zoo[name]
    grad = next(m for m in result.measurements if m.mode is GRAD)
    assert sum(kept.bytes for kept in result.saved_for_backward) == grad.memory.retained
    assert list(result.saved_for_backward) == sorted(
        result.saved_for_backward, key=lambda kept: -kept.bytes
    )


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_has_no_error(zoo: dict[str, RunResult], name: str) -> None:
    assert not has_errors(zoo[name]), zoo[name].findings
    best = lowest_memory_safe_mode(zoo[name])
    assert best is not None
    assert best.mode is INFERENCE


def test_the_fused_path_is_explained(zoo: dict[str, RunResult]) -> None:
    finding = found(zoo["transformer_encoder"], "outputs_differ")
    assert finding.severity == "info"
    assert finding.modes == (NO_GRAD, INFERENCE)
    assert "TransformerEncoderLayer" in finding.module
    assert "fused implementation when gradients are off" in finding.text
    assert all(e.equal for e in zoo["transformer_encoder"].equivalence)


def test_the_mlp_keeps_exactly_its_activations(zoo: dict[str, RunResult]) -> None:
    """8 x relu of [8, 64] floats: each is saved once, by relu and by the next Linear alike."""
    assert sum(kept.bytes for kept in zoo["mlp"].saved_for_backward) == 8 * 8 * 64 * 4


@pytest.mark.parametrize("fault", ["SharesStorage", "DropsBranch"])
def test_shared_and_dropped_storage_count_as_the_meter_counts_them(
    audited: Any, fault: str
) -> None:
    result = audited(fault, build="alone")
    grad = next(m for m in result.measurements if m.mode is GRAD)
    assert sum(kept.bytes for kept in result.saved_for_backward) == grad.memory.retained


# --- the command -------------------------------------------------------------------------------


def test_the_command_exits_3_on_an_error_and_0_without(cli: Command, tmp_path: Path) -> None:
    for fault, code in (("MakesBuffer", 3), ("Counts", 0)):
        file = tmp_path / f"{fault}.yaml"
        file.write_text(json.dumps(config(tmp_path, fault)))
        answer = cli("audit", file, "--trust-code", "--no-compile", "--json", "-")
        assert answer.code == code, answer.text
        result = RunResult.from_json(answer.out)
        assert result.kind == "audit"
        assert RunResult.load(tmp_path / "run-audit") == result
        assert "the safe mode with the lowest memory" in answer.err
        assert "Traceback" not in answer.text


def test_the_command_needs_trust_for_code(cli: Command, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(config(tmp_path, "Counts")))
    answer = cli("audit", file)
    assert answer.code == 2
    assert "--trust-code" in answer.err
    assert not (tmp_path / "run-audit").exists()


def test_the_bundled_models_pass_through_the_command(cli: Command, tmp_path: Path) -> None:
    answer = cli("audit", ROOT / "configs" / "mlp.yaml", "--set", f"output.path={tmp_path / 'o'}")
    assert answer.code == 0
    assert re.search(r"total retained\s+16\.00 KiB", answer.out)
    assert "Use inference_mode, the safe mode with the lowest memory" in answer.out


@pytest.mark.parametrize(
    "name",
    ["torchscript", pytest.param("exported", marks=needs_torch_2_13), "records", "layers"],
)
def test_every_source_can_be_audited(cli: Command, tmp_path: Path, name: str) -> None:
    config = ROOT / "configs" / f"{name}.yaml"
    answer = cli("audit", config, "--trust-code", "--set", f"output.path={tmp_path / 'o'}")
    assert answer.code == 0, answer.text
    assert "the safe mode with the lowest memory" in answer.out


@pytest.mark.cuda
def test_on_cuda_the_modes_are_audited_too(tmp_path: Path) -> None:
    result = gradrun.audit(
        ROOT / "configs" / "mlp.yaml",
        compile=False,
        run={"device": "cuda"},
        output={"path": str(tmp_path / "o")},
    )
    assert torch.device(result.environment.device).type == "cuda"
    assert not has_errors(result)


def test_a_model_that_fails_on_a_later_batch_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.repeat([1, 1, 9, 1], 8).astype(np.float32)[:, None])
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self):\n"
        "        super().__init__(1, 1)\n\n    def forward(self, x):\n"
        "        if x.max() > 5:\n            raise ValueError('too loud')\n"
        "        return super().forward(x)\n"
    )
    config = {
        "model": {"source": "python", "target": str(tmp_path / "net.py:Net")},
        "data": {"source": "arrays", "path": str(tmp_path / "x.npy"), "batch_size": 8},
        "output": {"path": str(tmp_path / "o")},
    }
    with pytest.raises(GradrunError, match="too loud"):
        gradrun.audit(config, compile=False, trust_code=True)
