"""Runs on a CUDA device. Tests with the parameter `device` also run on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradrun
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from gradrun.core.imports import import_file
from gradrun.inference.transfers import CudaTransfers
from gradrun.results.result import InferResult
from tests.conftest import ROOT

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SAMPLES, BATCH = 50, 8
MIB = 2**20

MODEL = '''
import torch
from torch import nn


class Net(nn.Module):
    """Doubles the input; `kind` selects how it returns, or what it allocates."""

    def __init__(self, kind="plain", memory=0, outputs=2):
        super().__init__()
        self.kind, self.memory, self.outputs, self.same = kind, memory, outputs, []

    def forward(self, x):
        if self.memory:
            torch.empty(len(x), self.memory, dtype=torch.uint8, device=x.device)
        if self.kind == "same memory":
            if not self.same:
                self.same.append(torch.zeros(8, 2, device=x.device))
            return torch.mul(x.detach(), 2, out=self.same[0][: len(x)])
        if self.kind == "input":
            return x.mul_(2)
        if self.kind == "tuple":
            return {"double": 2 * x, "row": x[:, 0], "class": x[:, 0].long()}
        if self.kind == "texts":
            return [f"sample {number:.0f}" for number in x[:, 0]]
        if self.kind == "ragged":
            return [torch.arange(int(n) % 3 + 1, device=x.device) for n in x[:, 0]]
        if self.kind == "wide":
            return x[:, :1].expand(-1, self.outputs)
        return 2 * x
'''

ASSERTS = """
import sys
import numpy as np, torch
from torch import nn
import gradrun

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 2)

    def forward(self, x):
        return self.table(x)

if __name__ == "__main__":
    x = np.zeros(64, np.int64)
    x[37] = 100
    config = {
        "model": {"source": "python", "target": __file__ + ":Net"},
        "data": {"source": "arrays", "path": sys.argv[1] + "/i.npy", "batch_size": 8},
        "run": {"device": "cuda", "in_flight": 3, "on_error": "quarantine"},
        "output": {"path": sys.argv[1] + "/run"},
    }
    np.save(sys.argv[1] + "/i.npy", x)
    try:
        gradrun.infer(config, trust_code=True)
    except gradrun.GradrunError as error:
        print(error)
"""


class Runs:
    """Runs the model above over the numbers 0, 1, 2, ... in two columns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = np.arange(SAMPLES, dtype=np.float32).repeat(2).reshape(-1, 2)
        np.save(folder / "x.npy", rows)
        (folder / "net.py").write_text(MODEL)

    def __call__(
        self, device: str, kind: str = "plain", name: str = "run", **changes: Any
    ) -> InferResult:
        """Run with some config keys changed; the files are in the folder `name`."""
        config: dict[str, Any] = {
            "model": {
                "source": "python",
                "target": f"{self.folder / 'net.py'}:Net",
                "args": {"kind": kind},
            },
            "data": {
                "source": "arrays", "path": str(self.folder / "x.npy"), "batch_size": BATCH,
            },
            "run": {"device": device, "warmup": 0},
            "measure": {"memory": False, "batch_independence": False},
            "output": {"path": str(self.folder / name), "examples": 0},
        }  # fmt: skip
        return gradrun.infer(config, trust_code=True, overwrite=True, **changes)

    def files(self, name: str) -> dict[str, bytes]:
        """Return the content of the files with predictions."""
        paths = (self.folder / name).glob("predictions*")
        return {path.name: path.read_bytes() for path in sorted(paths)}

    def rows(self, name: str = "run") -> Any:
        """Return the predictions."""
        return np.load(self.folder / name / "predictions.npy")


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


# --- several batches in flight -------------------------------------------------------------------


FORMS = {
    "plain": "npy", "tuple": "safetensors", "same memory": "npy", "input": "npy", "wide": "npy",
    "texts": "jsonl", "ragged": "jsonl",
}  # fmt: skip


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("cpu", "plain"),  # test_ring.py has the others
        *(pytest.param("cuda", kind, marks=pytest.mark.cuda) for kind in FORMS),
    ],
)
def test_the_files_with_three_batches_in_flight_are_those_of_one(
    runs: Runs, device: str, kind: str
) -> None:
    for in_flight in (1, 3):
        changes = {"run.in_flight": in_flight, "output.format": FORMS[kind]}
        runs(device, kind, f"run-{in_flight}", **changes)
    assert runs.files("run-3") == runs.files("run-1")
    if kind in {"plain", "same memory", "input"}:
        assert runs.rows("run-3")[:, 0].tolist() == [2.0 * i for i in range(SAMPLES)]


@pytest.mark.cuda
@pytest.mark.parametrize("mode", [*GradMode])
def test_many_batches_of_slow_forwards_are_written_in_order(
    runs: Runs, mode: GradMode, tmp_path: Path
) -> None:
    """The forwards take longer than copies and writing, so that the ring is full."""
    (tmp_path / "slow.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, kind):\n        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.eye(2048))\n"
        "    def forward(self, x):\n"
        "        wide = x.new_zeros(2048, 2048)\n"
        "        wide[: len(x), :2] = x\n"
        "        for _ in range(20):\n            wide = wide @ self.weight\n"
        "        return 2 * wide[: len(x), :2]\n"
    )
    rows = np.arange(8 * 400, dtype=np.float32).repeat(2).reshape(-1, 2) % 1024
    np.save(tmp_path / "x.npy", rows)
    result = runs(
        "cuda",
        **{
            "model.target": f"{tmp_path / 'slow.py'}:Net",
            "run.in_flight": 3,
            "run.mode": mode.value,
            "run.float32_precision": "ieee",
        },
    )
    assert np.array_equal(runs.rows(), 2 * rows)
    measured = result.measurements[0]
    assert len(measured.batch_seconds) == 400
    assert all(0 < seconds < 1 for seconds in measured.batch_seconds)


@pytest.mark.cuda
def test_a_copy_to_the_host_is_complete_after_the_wait_and_not_before() -> None:
    copies = CudaTransfers(torch.device("cuda"), None)
    tensor = torch.arange(2**20, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # about a second
    tensor += 1
    host = copies.to_host(tensor)
    copied = copies.mark()
    tensor.zero_()  # as a model that returns the same memory again
    assert host.is_pinned()
    assert not copied.done()
    copied.wait()
    assert copied.done()
    assert torch.equal(host, torch.arange(1, 2**20 + 1))


@pytest.mark.cuda
def test_a_device_that_fails_stops_the_run_without_quarantine(tmp_path: Path) -> None:
    """The failure is in a subprocess, which cannot use the device afterwards."""
    script = tmp_path / "asserts.py"
    script.write_text(ASSERTS)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CUDA error: device-side assert triggered" in done.stdout, done.stderr
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    written = np.load(tmp_path / "run" / "predictions.npy")
    assert len(written) <= 32
    assert (written == written[:1]).all()


# --- memory --------------------------------------------------------------------------------------


@pytest.fixture
def limited() -> Iterator[Any]:
    """A function that limits the memory of this process on the device to a number of bytes."""

    def limit(size: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(size / total)

    yield limit
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_batch_that_exceeds_the_memory_is_split_or_refused(
    runs: Runs, limited: Any, device: str, in_flight: int
) -> None:
    if device == "cpu":
        with pytest.raises(ConfigError, match="does not fit in memory"):
            runs(device, **{"model.args.memory": 2**45, "run.in_flight": in_flight})
        return
    limited(BATCH * 256 * MIB)
    result = runs(device, **{"model.args.memory": 256 * MIB, "run.in_flight": in_flight})
    assert runs.rows()[:, 0].tolist() == [2.0 * i for i in range(SAMPLES)]
    assert result.measurements[0].batch_limit == 4
    assert max(result.measurements[0].batch_sizes) == 4


@pytest.mark.parametrize("device", DEVICES)
def test_batches_that_fit_only_alone_are_not_split(runs: Runs, limited: Any, device: str) -> None:
    # An output of a batch has 32 MiB on the device.
    changes: dict[str, Any] = {"model.args.outputs": MIB if device == "cuda" else 64}
    one = runs(device, "wide", "run-1", **changes)
    if device == "cuda":
        reserved = one.measurements[0].memory.device_reserved
        assert reserved
        limited(reserved + 40 * MIB)
    result = runs(device, "wide", "run-4", **changes, **{"run.in_flight": 4})
    assert runs.files("run-4") == runs.files("run-1")
    assert result.measurements[0].batch_limit is None


@pytest.mark.parametrize("device", DEVICES)
def test_the_memory_of_a_layer_is_counted_to_the_byte(tmp_path: Path, device: str) -> None:
    width, batch = 1024, 256
    result = gradrun.infer(
        {
            "model": {"source": "layers", "layers": ["ReLU", "Tanh"]},
            "data": {
                "source": "synthetic", "inputs": {"x": {"shape": [width]}},
                "samples": 4 * batch, "batch_size": batch,
            },
            "run": {"device": device},
            "output": {"path": str(tmp_path / "run")},
        }
    )  # fmt: skip
    memory = result.measurements[0].memory
    activation = 4 * width * batch
    assert (memory.inputs, memory.weights) == (activation, 0)
    assert memory.forward_peak == 2 * activation  # the results of both layers
    assert memory.retained == activation
    if device == "cuda":
        assert memory.device_allocated
        assert memory.device_reserved
        # The batch, its copy for the first batch, and the results.
        assert 3 * activation <= memory.device_allocated <= 6 * activation
        assert memory.device_reserved >= memory.device_allocated


# --- modes, types and workers --------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_modes_give_the_same_bytes(runs: Runs, device: str) -> None:
    for mode in GradMode:
        runs(device, "tuple", mode.value, **{"run.mode": mode.value, "run.in_flight": 2})
    first, *others = (runs.files(mode.value) for mode in GradMode)
    assert all(other == first for other in others)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_flight", [1, 3])
def test_autocast_runs_the_forward_in_its_type(tmp_path: Path, device: str, in_flight: int) -> None:
    rows = np.random.default_rng(0).standard_normal((20, 16), dtype=np.float32)
    np.save(tmp_path / "x.npy", rows)
    gradrun.infer(
        {
            "model": {"source": "layers", "layers": [{"Linear": [16, 4]}]},
            "data": {"source": "arrays", "path": str(tmp_path / "x.npy"), "batch_size": 8},
            "run": {"device": device, "autocast": "bfloat16", "in_flight": in_flight},
            "output": {"path": str(tmp_path / "run")},
        }
    )
    torch.manual_seed(0)
    layer = nn.Linear(16, 4).to(device)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        parts = [layer(torch.from_numpy(rows[at : at + 8]).to(device)) for at in range(0, 20, 8)]
    expected = torch.cat(parts)
    assert expected.dtype == torch.bfloat16
    assert np.array_equal(np.load(tmp_path / "run" / "predictions.npy"), expected.float().cpu())


@pytest.mark.cuda
def test_two_workers_on_one_gpu_give_the_same_files(runs: Runs) -> None:
    changes = {"run.threads": 1, "run.in_flight": 3}
    runs("cuda", "tuple", "one", **changes)
    engine = {"source": "processes", "workers": 2}
    result = runs("cuda", "tuple", "two", engine=engine, **changes)
    assert runs.files("two") == runs.files("one")
    assert len(result.measurements[0].workers) == 2


@pytest.mark.cuda
def test_automatic_workers_are_one_per_gpu(runs: Runs) -> None:
    engine = {"source": "processes", "workers": "auto"}
    result = runs("cuda", engine=engine, **{"run.threads": 1})
    assert runs.rows()[:, 0].tolist() == [2.0 * i for i in range(SAMPLES)]
    expected = torch.cuda.device_count() if torch.cuda.device_count() > 1 else 0
    assert len(result.measurements[0].workers) == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_flight", [1, 3])
def test_inputs_and_weights_are_cast_to_half_precision(
    runs: Runs, device: str, in_flight: int
) -> None:
    runs(device, **{"model.dtype": "bfloat16", "run.in_flight": in_flight})
    assert runs.rows()[:, 0].tolist() == [2.0 * i for i in range(SAMPLES)]


def test_the_benchmark_counts_the_bytes_of_a_forward(tmp_path: Path) -> None:
    """One section in small; `cuda_bench.py --device cpu --small` runs all of them."""
    bench = import_file(ROOT / "benchmarks" / "cuda_bench.py")
    rows = [*bench.memory(bench.Setting("cpu", True, tmp_path))]
    exact = [row for row in rows if row.target]
    assert [(row.target, row.met) for row in exact] == [(f"{row.value} B", True) for row in exact]
    assert len(exact) == 6


# --- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [{"backend": "cudagraphs"}, {"mode": "reduce-overhead"}])
@pytest.mark.parametrize("mode", [*GradMode])
@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_cuda_graph_gives_the_rows_of_the_eager_model(
    tmp_path: Path, compiled: dict[str, str], mode: GradMode, in_flight: int
) -> None:
    rows = np.random.default_rng(0).standard_normal((100, 16), dtype=np.float32)
    np.save(tmp_path / "x.npy", rows)
    torch._dynamo.reset()
    predicted = []
    for name, compile_ in (("eager", False), ("graph", compiled)):
        result = gradrun.infer(
            {
                "model": {
                    "source": "layers",
                    "layers": [{"Linear": [16, 8]}, "ReLU", {"Linear": [8, 4]}],
                    "compile": compile_,
                },
                "data": {"source": "arrays", "path": str(tmp_path / "x.npy"), "batch_size": 8},
                "run": {"device": "cuda", "mode": mode.value, "in_flight": in_flight},
                "output": {"path": str(tmp_path / name)},
            }
        )
        predicted.append(np.load(tmp_path / name / "predictions.npy"))
        assert not [w.text for w in result.warnings if w.code == "recompiled"]
    assert len(np.unique(predicted[1], axis=0)) == 100
    np.testing.assert_allclose(predicted[1], predicted[0], rtol=1e-3, atol=1e-4)
