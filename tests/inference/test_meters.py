"""The meters, compared with values computed by hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

import gradrun
from gradrun.core.imports import import_file
from gradrun.core.resources import bundled
from gradrun.inference.meters import (
    FORWARD_MEMORY,
    clock,
    cpu_memory,
    device_memory,
    process_memory,
)
from gradrun.modes import grad_mode
from gradrun.results.result import RunResult

CPU = torch.device("cpu")
MODES = ["grad", "no_grad", "inference_mode"]
WITHOUT_GRADIENTS = MODES[1:]


def zoo(name: str, **args: Any) -> nn.Module:
    model: nn.Module = import_file(bundled("models") / f"{name}.py").build(**args)
    return model.eval()


def floats(*shape: int) -> int:
    """Bytes of a float32 tensor."""
    return 4 * prod(shape)


# --- tensor memory: the perceptron -------------------------------------------------------------

ACTIVATION = floats(256, 1024)
MLP = {
    # The graph saves the result of each ReLU, which is also the next Linear's input: 8
    # activations. The peak is in the last ReLU, while the result of its Linear is still live.
    "grad": (9 * ACTIVATION, 8 * ACTIVATION),
    # Input, Linear and ReLU of one layer are live together, and only the last result stays.
    "no_grad": (3 * ACTIVATION, ACTIVATION),
    "inference_mode": (3 * ACTIVATION, ACTIVATION),
}
"""Mode -> (peak, retained) of 8 x (Linear 1024, ReLU) and a batch of 256."""


def test_the_expected_memory_of_the_mlp_is_as_documented() -> None:
    assert MLP["grad"] == (9_437_184, 8_388_608)
    assert MLP["no_grad"] == MLP["inference_mode"] == (3_145_728, 1_048_576)


@pytest.mark.parametrize("mode", MODES)
def test_the_memory_of_the_mlp_is_exact(mode: str) -> None:
    model, batch = zoo("mlp", width=1024), torch.randn(256, 1024)
    with grad_mode(mode):
        assert cpu_memory.forward_memory(lambda: model(batch))[:2] == MLP[mode]
        assert cpu_memory.forward_memory(lambda: model(batch))[:2] == MLP[mode], "the second call"


@pytest.mark.parametrize("mode", WITHOUT_GRADIENTS)
def test_a_sequential_frees_the_input_of_each_layer(mode: str) -> None:
    layers = [layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    model, batch = nn.Sequential(*layers), torch.randn(256, 1024)
    with grad_mode(mode):
        found = cpu_memory.forward_memory(lambda: model(batch))[:2]
    assert found == (2_097_152, 1_048_576) == (2 * ACTIVATION, ACTIVATION)


def infer_mlp(output: Path, samples: int, **run: Any) -> RunResult:
    return gradrun.infer(
        {
            "model": {"source": "zoo", "name": "mlp", "args": {"width": 1024}},
            "data": {
                "source": "synthetic",
                "inputs": {"x": {"shape": [1024]}},
                "samples": samples,
                "batch_size": 256,
            },
            "run": {"warmup": 2, **run},
            "output": {"path": str(output)},
        }
    )


@pytest.mark.parametrize("mode", MODES)
def test_infer_reports_the_same_bytes(mode: str, tmp_path: Path) -> None:
    result = infer_mlp(tmp_path / "out", 300, mode=mode, device="cpu")
    memory = result.measurements[0].memory
    assert (memory.forward_peak, memory.retained) == MLP[mode]
    assert memory.inputs == ACTIVATION
    assert memory.weights == 8 * (floats(1024, 1024) + floats(1024))


# --- tensor memory: ResNet-18, batch 8, 224 x 224 ----------------------------------------------

BATCH = 8
STEM = floats(BATCH, 64, 112, 112)
POOLED = floats(BATCH, 64, 56, 56)
STAGES = [floats(BATCH, 64 * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)]
FEATURES, LOGITS = floats(BATCH, 512), floats(BATCH, 1000)

# Saved for backward in eval mode: the inputs of convolutions, batch norms and Linear layers, the
# results of ReLUs, the input and indices (int64) of the pool; nothing for an addition.
RESNET_RETAINED = (
    2 * STEM  # results of conv1 and the first ReLU; that of bn1 is freed
    + POOLED
    + 2 * POOLED  # the pool's indices, 8 bytes each
    + 8 * STAGES[0]  # results of two convolutions and two ReLUs in each of two blocks
    + sum(
        9 * stage for stage in STAGES[1:]
    )  # plus the convolution that resizes the input of the first block
    + FEATURES
    + LOGITS
)


def resnet_peak_in_grad(model: nn.Module) -> int:
    """The peak of the last convolution, plus the bytes saved for backward until then.

    What comes after it: its result and the last ReLU's, the features and the logits. On x86 a
    convolution's peak is its result and oneDNN's copies of its weights and its input; another
    processor may do without copies, so the convolution alone is measured here.
    """
    last = model.get_submodule("layer4.1.conv2")
    image = torch.randn(BATCH, 512, 7, 7)
    peak = cpu_memory.forward_memory(lambda: last(image)).peak
    assert peak in (STAGES[3], 2 * STAGES[3] + floats(512, 512, 3, 3))
    return RESNET_RETAINED - 2 * STAGES[3] - FEATURES - LOGITS + peak


def test_the_memory_of_resnet_is_exact_in_grad() -> None:
    model, images = zoo("resnet18"), torch.randn(BATCH, 3, 224, 224)
    with grad_mode("grad"):
        peak, retained = cpu_memory.forward_memory(lambda: model(images))[:2]
        assert retained == RESNET_RETAINED == 172_653_824
        assert peak == resnet_peak_in_grad(model) == 182_042_624


@pytest.mark.parametrize("mode", WITHOUT_GRADIENTS)
def test_the_memory_of_resnet_is_exact_without_gradients(mode: str) -> None:
    model, images = zoo("resnet18"), torch.randn(BATCH, 3, 224, 224)
    with grad_mode(mode):
        found = cpu_memory.forward_memory(lambda: model(images))[:2]
    # The peak is in bn1: its input, its result, and a scale and a shift for each channel.
    assert found == (2 * STEM + 2 * floats(64), LOGITS) == (51_380_736, 32_000)


# --- tensor memory: the meter itself -----------------------------------------------------------


def test_memory_allocated_before_the_call_is_not_counted() -> None:
    batch = torch.randn(1000)
    assert cpu_memory.forward_memory(lambda: batch)[:2] == (0, 0)
    assert cpu_memory.forward_memory(lambda: batch.neg())[:2] == (4000, 4000)
    assert cpu_memory.forward_memory(lambda: batch.neg().abs().sum())[:2] == (8000, 4)


def test_an_error_in_the_call_is_raised_and_the_meter_works_again() -> None:
    with pytest.raises(ZeroDivisionError):
        cpu_memory.forward_memory(lambda: 1 / 0)
    assert cpu_memory.forward_memory(lambda: torch.empty(10))[:2] == (40, 40)


def test_log_lines_of_kineto_do_not_reach_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    def prints() -> torch.Tensor:
        print("printed by the model", file=sys.stderr)
        return torch.empty(1)

    cpu_memory.forward_memory(prints)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "printed by the model\n")


def test_infer_writes_nothing_to_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gradrun.infer(
        {
            "model": {"source": "layers", "layers": ["ReLU"]},
            "data": {"source": "synthetic", "inputs": {"x": {"shape": [2]}}, "samples": 3},
            "run": {"device": "cpu"},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    assert capfd.readouterr() == ("", "")


def test_memory_is_measured_in_a_process_without_stderr() -> None:
    stderr = os.dup(2)
    os.close(2)
    try:
        memory = cpu_memory.forward_memory(lambda: torch.empty(10))
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    assert memory[:2] == (40, 40)


# --- weights -----------------------------------------------------------------------------------


def linear(width: int = 10) -> nn.Linear:
    return nn.Linear(width, width)


def tied() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    model[1].weight = model[0].weight
    return model


def halves() -> nn.Module:
    whole, model = torch.zeros(20, 10), nn.Module()
    model.upper, model.lower = nn.Parameter(whole[:10]), nn.Parameter(whole[10:])
    return model


def one_row() -> nn.Module:
    model = nn.Module()
    model.register_buffer("row", torch.zeros(20, 10)[3])
    return model


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (linear, 4 * (100 + 10)),
        (tied, 4 * (100 + 10 + 10)),
        (halves, 4 * 200),
        (one_row, 4 * 200),
        (lambda: linear().half(), 2 * (100 + 10)),
        (lambda: nn.BatchNorm2d(8), 4 * 8 * 4 + 8),
        (nn.ReLU, 0),
    ],
    ids=["plain", "tied", "views of one", "a view keeps its storage", "half", "buffers", "none"],
)
def test_weight_bytes_cover_the_storage_of_parameters_and_buffers(
    model: Callable[[], nn.Module], count: int
) -> None:
    assert cpu_memory.weight_bytes(model()) == count


def test_a_batch_of_views_counts_their_storage_once() -> None:
    window = torch.zeros(100, 10)
    assert cpu_memory.storage_bytes(window.split(10)) == 4000
    assert cpu_memory.storage_bytes([]) == 0


# --- the process -------------------------------------------------------------------------------

SLACK = 2**20
"""The kernel updates its page counts with a delay."""


def test_the_process_peak_is_in_bytes_with_its_method() -> None:
    peak, method = process_memory.peak_resident()
    assert peak
    assert 50 * 2**20 < peak < 2**40
    assert method in {"VmHWM", "ru_maxrss"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_peak_remains_after_memory_is_freed() -> None:
    block = torch.ones(2**24)
    resident = psutil.Process().memory_info().rss
    peak, method = process_memory.peak_resident()
    assert method == "VmHWM"
    assert peak
    assert peak >= resident - SLACK
    del block
    assert process_memory.peak_resident()[0] == pytest.approx(peak, abs=SLACK)


def test_without_proc_the_peak_is_read_by_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = process_memory.peak_resident()

    def absent(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    peak, method = process_memory.peak_resident()
    assert method == "ru_maxrss"
    assert expected
    assert peak == pytest.approx(expected, rel=0.1)


# --- clocks ------------------------------------------------------------------------------------


def test_the_host_clock_has_one_time_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter([0, 250_000_000, 1_000_000_000, 1_000_000_001])
    monkeypatch.setattr(clock.time, "perf_counter_ns", lambda: next(reads))
    host = clock.clock_for(CPU)
    for _ in range(2):
        host.start()
        host.stop()
    host.finish()
    assert list(host.seconds) == pytest.approx([0.25, 1e-9])


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cpu", clock.Clock), ("cuda", clock.CudaClock), ("mps", clock.MpsClock)],
)
def test_each_device_has_its_clock(device: str, kind: type) -> None:
    assert type(clock.clock_for(torch.device(device))) is kind


def test_the_cpu_has_no_device_memory() -> None:
    device_memory.reset(CPU)
    assert device_memory.peaks(CPU) == (None, None)


# --- on a GPU ----------------------------------------------------------------------------------


WORKSPACE = 128 * 2**20


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


@pytest.mark.cuda
def test_the_cuda_clock_times_the_device_and_not_the_launch(gpu: torch.device) -> None:
    matrix = torch.randn(4096, 4096, device=gpu)
    timer = clock.clock_for(gpu)
    assert isinstance(timer, clock.CudaClock)
    for products in (1, 1, 20):  # the first warms up
        timer.start()
        for _ in range(products):
            matrix @ matrix
        timer.stop()
    timer.finish()
    _, one, twenty = timer.seconds
    assert 0 < one < 1
    assert 5 * one < twenty < 50 * one


@pytest.mark.cuda
def test_the_cuda_clock_has_few_pending_events_and_loses_none(gpu: torch.device) -> None:
    timer = clock.CudaClock()
    vector = torch.ones(1, device=gpu)
    for _ in range(600):
        timer.start()
        vector + 1
        timer.stop()
        assert len(timer._pairs) < 256
    timer.finish()
    timer.finish()
    assert len(timer.seconds) == 600
    assert all(0 <= seconds < 1 for seconds in timer.seconds)


@pytest.mark.cuda
def test_device_memory_is_the_peak_since_the_reset(gpu: torch.device) -> None:
    big = torch.empty(64 * 2**20, dtype=torch.uint8, device=gpu)
    del big
    device_memory.reset(gpu)
    floor, _ = device_memory.peaks(gpu)
    assert floor is not None
    block = torch.empty(8 * 2**20, dtype=torch.uint8, device=gpu)
    del block
    allocated, reserved = device_memory.peaks(gpu)
    assert allocated == floor + 8 * 2**20
    assert reserved
    assert reserved >= allocated


@pytest.mark.cuda
def test_the_memory_of_a_forward_on_the_device_is_above_the_level_before(gpu: torch.device) -> None:
    block = torch.randn(2**18, device=gpu)
    assert FORWARD_MEMORY["cuda"] is device_memory.forward_memory
    assert device_memory.forward_memory(lambda: block)[:2] == (0, 0)
    assert device_memory.forward_memory(lambda: block.neg())[:2] == (2**20, 2**20)
    assert device_memory.forward_memory(lambda: block.neg().abs()[:1])[:2] == (2**21, 2**20)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_infer_measures_the_device_it_runs_on(mode: str, tmp_path: Path) -> None:
    result = infer_mlp(tmp_path / "out", 2048, mode=mode, device="cuda")
    (measured,) = result.measurements
    memory = measured.memory
    assert result.environment.device.startswith("cuda")
    assert result.environment.device_name
    assert (measured.samples, len(measured.batch_seconds)) == (2048, 8)
    assert all(0 < seconds < 1 for seconds in measured.batch_seconds)
    assert memory.retained == MLP[mode][1]
    # A matrix product may allocate a workspace in addition to its result.
    assert memory.forward_peak
    assert MLP[mode][0] <= memory.forward_peak <= MLP[mode][0] + WORKSPACE
    # Weights, two batches and the peak of the forward.
    least = memory.weights + ACTIVATION + MLP[mode][1]
    assert memory.device_allocated
    assert least <= memory.device_allocated <= least + 4 * ACTIVATION + WORKSPACE
    assert memory.device_reserved
    assert memory.device_reserved >= memory.device_allocated
    predictions = np.load(tmp_path / "out" / "predictions.npy")
    assert predictions.shape == (2048, 1024)
    assert np.isfinite(predictions).all()


@pytest.mark.cuda
def test_the_modes_differ_on_the_device_by_the_memory_saved_for_backward(tmp_path: Path) -> None:
    grad, no_grad, inference = (
        infer_mlp(tmp_path / mode, 512, mode=mode, device="cuda").measurements[0].memory
        for mode in MODES
    )
    assert no_grad.device_allocated == inference.device_allocated
    assert grad.device_allocated
    assert no_grad.device_allocated
    more = grad.device_allocated - no_grad.device_allocated
    assert more == MLP["grad"][0] - MLP["no_grad"][0]


@pytest.mark.cuda
def test_a_run_on_the_second_gpu_is_timed_there(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    result = infer_mlp(tmp_path / "out", 2048, device="cuda:1")
    assert all(1e-5 < seconds < 1 for seconds in result.measurements[0].batch_seconds)
    assert torch.cuda.current_device() == 0
