"""Measure gradrun on a CUDA device: `python benchmarks/cuda_bench.py --json cuda.json`.

Sections, each in a separate process with a time limit, together about 6 minutes:

- pipeline: ResNet-50 and ResNet-18 at 224 pixels from a uint8 .npy, bfloat16, channels_last: the
  whole timed pass against forwards of resident batches, with one and with three batches in flight.
- memory: bytes of a forward pass on the device in each mode, against the sum of activations.
- graphs: the small MLP at batch 8, eager and with CUDA graphs.
- encoder: a Transformer encoder in bfloat16: share of the measured matrix-product peak.
- modes: grad, no_grad and inference_mode with 95 % intervals.
- tests: the tests marked `cuda`.

Rows are written as they are measured, so that a section that fails or exceeds its limit keeps the
rows before. `--device cpu --small` runs every section in small, to test this file; its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

import gradrun
from gradrun.config.load import load_config
from gradrun.core.imports import import_file
from gradrun.core.resources import bundled
from gradrun.inference.device import device_context
from gradrun.inference.execution import run_in_this_process
from gradrun.inference.infer import infer
from gradrun.inference.run_plan import RunOptions
from gradrun.models import load_model
from gradrun.results.profile import ProfileFigures
from gradrun.results.result import InferResult
from gradrun.results.work import reach

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One figure, with its target if there is one."""

    section: str
    what: str
    value: float | str
    unit: str = ""
    target: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Setting:
    """Where and in what size a section runs."""

    device: str
    small: bool
    folder: Path

    def size(self, full: int, small: int) -> int:
        """Return one of two sizes."""
        return small if self.small else full


# --- pipeline ----------------------------------------------------------------------------------


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


def _resnet50() -> nn.Module:
    """Return a network with the layers of ResNet-50."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(count):
            layers.append(_Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Images(nn.Module):
    """A ResNet on uint8 pixels, which are scaled on the device."""

    def __init__(self, name: str) -> None:
        super().__init__()
        build = import_file(bundled("models") / "resnet18.py").build
        self.net = _resnet50() if name == "resnet50" else build()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        dtype = next(self.net.parameters()).dtype
        scaled = pixels.to(dtype, memory_format=torch.channels_last).div_(255)
        found: torch.Tensor = self.net(scaled)
        return found


def pipeline(setting: Setting) -> Iterator[Row]:
    """Compare the timed pass with forwards of batches that are on the device already."""
    batch, side = setting.size(256, 2), setting.size(224, 32)
    count = batch * setting.size(40, 3)
    file = setting.folder / "pixels.npy"
    pixels = np.random.default_rng(0).bytes(count * 3 * side * side)
    np.save(file, np.frombuffer(pixels, np.uint8).reshape(count, 3, side, side))
    for name in ("resnet50", "resnet18"):
        config: dict[str, Any] = {
            "model": {
                "source": "python",
                "target": f"{Path(__file__).resolve()}:Images",
                "args": {"name": name},
                "dtype": "bfloat16",
                "channels_last": True,
            },
            "data": {"source": "arrays", "path": str(file), "batch_size": batch},
            "run": {"device": setting.device},
            "measure": {"memory": False, "batch_independence": False},
            "output": {"path": str(setting.folder / name), "examples": 0},
        }
        ratios: dict[int, list[float]] = {3: [], 1: []}
        alone: list[float] = []
        written: dict[int, bytes] = {}
        for _ in range(setting.size(3, 1)):
            alone.append(_resident_forward(config, file, count // batch))
            for in_flight, found in ratios.items():
                _, seconds = _timed_pass(config, {"run.in_flight": in_flight})
                found.append(seconds / (count // batch) / alone[-1])
                written[in_flight] = (setting.folder / name / "predictions.npy").read_bytes()
        yield Row("pipeline", f"{name} b{batch}: forward alone", 1e3 * median(alone), "ms/batch")
        for in_flight, found in ratios.items():
            of_target = in_flight == 3 and name == "resnet50"
            yield Row(
                "pipeline",
                f"{name}: pass / forward alone, {in_flight} in flight "
                f"({min(found):.3f} to {max(found):.3f})",
                median(found),
                "x",
                "at most 1.05" if of_target else "",
                median(found) <= 1.05 if of_target else None,
            )
        same = written[1] == written[3]
        yield Row("pipeline", f"{name}: same bytes with 1 and 3 in flight", str(same), met=same)


def _resident_forward(config: dict[str, Any], file: Path, batches: int) -> float:
    """Return the seconds per forward over batches on the device, one after the other."""
    loaded = load_config(config).config
    size = loaded.data.batch_size
    with device_context(loaded.run) as device, torch.inference_mode():
        model = load_model(loaded.model, device, trust_code=True).module
        rows = np.load(file, mmap_mode="r")
        resident = [
            torch.from_numpy(rows[at : at + size].copy()).to(device)
            for at in range(0, min(4, batches) * size, size)
        ]
        for inputs in resident:
            model(inputs)
        if device.type != "cuda":
            began = time.perf_counter()
            for number in range(batches):
                model(resident[number % len(resident)])
            return (time.perf_counter() - began) / batches
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        for number in range(batches):
            model(resident[number % len(resident)])
        end.record()
        end.synchronize()
        seconds: float = begin.elapsed_time(end) * 1e-3 / batches
        return seconds


def _timed_pass(config: dict[str, Any], changes: dict[str, Any]) -> tuple[InferResult, float]:
    """Run a config; return the result and the seconds of the timed pass."""
    seconds: list[float] = []

    def run_pass(*args: Any) -> Any:
        timed = run_in_this_process(*args)
        seconds.append(timed.total_ns * 1e-9)
        return timed

    options = RunOptions(trust_code=True, overwrite=True)
    result = infer(load_config(config, changes), options, run_pass)
    return result, seconds[0]


# --- the other sections --------------------------------------------------------------------------


def memory(setting: Setting) -> Iterator[Row]:
    """Compare the bytes of a forward of 8 x (Linear, ReLU) with the sum of its activations."""
    width, batch = setting.size(1024, 64), setting.size(4096, 16)
    activation = 4 * width * batch
    expected = {
        "grad": (9 * activation, 8 * activation),
        "no_grad": (3 * activation, activation),
        "inference_mode": (3 * activation, activation),
    }
    for mode, (peak, retained) in expected.items():
        config = {
            "model": {"source": "zoo", "name": "mlp", "args": {"width": width}},
            "data": {
                "source": "synthetic", "inputs": {"x": {"shape": [width]}},
                "samples": 4 * batch, "batch_size": batch,
            },
            "run": {"device": setting.device, "mode": mode},
            "output": {"path": str(setting.folder / mode), "examples": 0},
        }  # fmt: skip
        measured = infer(load_config(config), RunOptions(overwrite=True)).measurements[0].memory
        for what, found, wanted in (
            ("forward peak", measured.forward_peak, peak),
            ("retained", measured.retained, retained),
        ):
            yield Row(
                "memory",
                f"{mode}: {what}",
                "not measured" if found is None else found,
                "B",
                f"{wanted} B",
                found == wanted,
            )
        for what, value in (
            ("allocated", measured.device_allocated),
            ("reserved", measured.device_reserved),
        ):
            yield Row(
                "memory", f"{mode}: peak {what}", "not measured" if value is None else value, "B"
            )


def graphs(setting: Setting) -> Iterator[Row]:
    """Compare the MLP at batch 8 with and without CUDA graphs."""
    file = setting.folder / "x.npy"
    count = 8 * setting.size(4000, 20)
    np.save(file, np.random.default_rng(0).standard_normal((count, 64), dtype=np.float32))
    config: dict[str, Any] = {
        "model": {"source": "zoo", "name": "mlp"},
        "data": {"source": "arrays", "path": str(file), "batch_size": 8},
        "run": {"device": setting.device},
        "measure": {"memory": False, "batch_independence": False},
        "output": {"path": str(setting.folder / "mlp"), "examples": 0},
    }
    ways: dict[str, Any] = {
        "eager": False,
        "backend: cudagraphs": {"backend": "cudagraphs"},
        "mode: reduce-overhead": {"mode": "reduce-overhead"},
    }
    eager = 0.0
    for name, compiled in ways.items():
        try:
            result, seconds = _timed_pass(config, {"model.compile": compiled})
        except gradrun.GradrunError as error:
            yield Row("graphs", name, f"not possible: {error}")
            continue
        forward = median(result.measurements[0].batch_seconds)
        yield Row("graphs", f"{name}: median forward", 1e6 * forward, "us")
        yield Row("graphs", f"{name}: pass per batch", 8e6 * seconds / count, "us")
        if name == "eager":
            eager = forward
        else:
            ratio = eager / forward
            yield Row("graphs", f"{name}: times as fast", ratio, "x", "at least 3", ratio >= 3)


def encoder(setting: Setting) -> Iterator[Row]:
    """Profile an encoder at a large batch against the peak of matrix products."""
    width, tokens = setting.size(1024, 32), setting.size(512, 8)
    config: dict[str, Any] = {
        "model": {
            "source": "zoo", "name": "transformer_encoder", "dtype": "bfloat16",
            "args": {
                "d_model": width, "heads": 8, "feedforward": 4 * width,
                "layers": setting.size(12, 2),
            },
        },
        "data": {
            "source": "synthetic", "inputs": {"x": {"shape": [tokens, width]}},
            "samples": setting.size(128, 8), "batch_size": setting.size(64, 4),
        },
        "run": {"device": setting.device},
        "measure": {"budget": setting.size(12, 1)},
        "output": {"path": str(setting.folder / "encoder"), "examples": 0},
    }  # fmt: skip
    for fast_path in (False, True):
        result = gradrun.profile(config, **{"run.fast_path": fast_path})
        profile = result.profiles[0]
        figures, peaks = ProfileFigures(profile), profile.peaks
        name = "fused layers" if fast_path else "separate operators"
        yield Row("encoder", f"{name}: forward", 1e3 * figures.forward.value, "ms/batch")
        work = figures.modules[0].work
        found = reach(work, figures.forward.value, peaks) if work and peaks else None
        if found is None or peaks is None:
            yield Row("encoder", f"{name}: share of the peak", "no work or peak was measured")
            continue
        yield Row("encoder", f"{name}: reached", found.flops * 1e-12, "TFLOP/s")
        yield Row("encoder", f"{name}: share of the bfloat16 peak", 100 * found.compute, "%")
        yield Row("encoder", "bfloat16 peak", 1e-12 * (peaks.rate("bfloat16") or 0), "TFLOP/s")


def modes(setting: Setting) -> Iterator[Row]:
    """Compare the modes with intervals over fresh processes."""
    width = setting.size(1024, 16)
    shapes = {
        "mlp b256": ({"name": "mlp", "args": {"width": width}}, [width], 256),
        "mlp b8": ({"name": "mlp"}, [64], 8),
    }
    for name, (model, shape, batch) in shapes.items():
        config: dict[str, Any] = {
            "model": {"source": "zoo", **model},
            "data": {
                "source": "synthetic", "inputs": {"x": {"shape": shape}},
                "samples": 16 * batch, "batch_size": batch,
            },
            "run": {"device": setting.device},
            "measure": {"processes": setting.size(3, 2), "budget": setting.size(25, 4)},
            "output": {"path": str(setting.folder / f"modes {batch}")},
        }  # fmt: skip
        result = gradrun.compare(config)
        for one in result:
            yield Row(
                "modes",
                f"{name}: {one.baseline} / {one.candidate} "
                f"({one.low:.3f} to {one.high:.3f}), {one.verdict}",
                one.ratio,
                "x",
            )
        for failure in result.result.failures:
            yield Row("modes", name, failure)


def tests(setting: Setting) -> Iterator[Row]:
    """Run the tests marked `cuda`."""
    where = ["tests/inference/test_cuda.py"] if setting.small else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--durations=5", *where],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout[-8000:], file=sys.stderr)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    yield Row("tests", "pytest -m cuda", last, "", "all pass", done.returncode == 0)
    for line in failed:
        yield Row("tests", line[:100], "failed", met=False)


SECTIONS: dict[str, tuple[Callable[[Setting], Iterator[Row]], int]] = {
    "pipeline": (pipeline, 110),
    "memory": (memory, 40),
    "graphs": (graphs, 60),
    "encoder": (encoder, 60),
    "modes": (modes, 90),
    "tests": (tests, 120),
}
"""Name -> function and time limit in seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test this file")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="separated by commas")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _run_section(options.sections, options.device, options.small, Path(options.child))
        return
    rows: list[Row] = []
    for name in options.sections.split(","):
        rows += _section_in_a_process(name, options.device, options.small)
        if options.json:  # after each section: a later one may exhaust the time of the machine
            card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
            text = {"card": card, "torch": str(torch.__version__), "rows": [*map(asdict, rows)]}
            options.json.write_text(json.dumps(text, indent=1))
    _print(rows)
    sys.exit(any(row.met is False for row in rows) and not options.small)


def _section_in_a_process(name: str, device: str, small: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        command = [sys.executable, __file__, "--sections", name, "--device", device]
        command += ["--child", str(file), *(["--small"] if small else [])]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADRUN_CACHE": f"{folder}/cache"}
        began, limit = time.perf_counter(), SECTIONS[name][1]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        problem = ""
        try:
            if process.wait(timeout=limit):
                problem = f"failed with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"stopped after its limit of {limit} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = file.read_text().splitlines() if file.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    if problem:
        rows.append(Row(name, "the section", problem, met=False))
    return [*rows, Row(name, "duration of the section", time.perf_counter() - began, "s")]


def _run_section(name: str, device: str, small: bool, file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, file.open("w") as written:
        for row in SECTIONS[name][0](Setting(device, small, Path(folder))):
            written.write(f"{json.dumps(asdict(row))}\n")
            written.flush()


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("section", "what", "value", "target", "met")
    for row in rows:
        value = f"{row.value:,.4g}" if isinstance(row.value, float) else str(row.value)
        met = "" if row.met is None else "yes" if row.met else "NO"
        table.add_row(row.section, row.what, f"{value} {row.unit}".strip(), row.target, met)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
