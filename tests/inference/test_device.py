"""The machine a run is given, and that its caller gets everything back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gradrun.config.run import RunSection
from gradrun.core.errors import ConfigError
from gradrun.inference import device, environment

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files below /sys/fs/cgroup, by name; there are 8 processors. We are in slice/job."""
    files: dict[str, str] = {}

    def read(path: Path) -> str:
        if path == Path("/proc/self/cgroup"):
            return "0::/slice/job\n"
        try:
            return files[str(path.relative_to("/sys/fs/cgroup"))]
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return files


V1_QUOTA, V1_PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"slice/job/cpu.max": "400000 100000\n", "cpu.max": "max 100000\n"}, 4),
        ({"slice/job/cpu.max": "400000 100000\n", "slice/cpu.max": "300000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu.max": "garbage\n"}, 8),
        ({"cpu.max": "\n"}, 8),
        ({V1_QUOTA: "-1\n", V1_PERIOD: "100000\n"}, 8),
        ({V1_QUOTA: "300000\n", V1_PERIOD: "100000\n"}, 3),
        ({V1_QUOTA: "300000\n"}, 8),
    ],
)
def test_a_cgroups_quota_limits_the_processors(
    cgroup: dict[str, str], files: dict[str, str], cpus: int
) -> None:
    cgroup.update(files)
    assert device.available_cpus() == cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_limits_the_processors_and_the_threads_of_a_run() -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import torch\n"
        "from gradrun.config.run import RunSection\n"
        "from gradrun.inference import device\n"
        "with device.device_context(RunSection(device='cpu')):\n"
        "    print(device.available_cpus(), torch.get_num_threads())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"1 1\n"


def test_the_cpu_is_always_there() -> None:
    assert device.resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(0, False, "cpu"), (0, True, "mps"), (2, False, "cuda")]
)
def test_auto_takes_the_best_device_there_is(
    cuda: int, mps: bool, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device.resolve_device("auto").type == best


@pytest.mark.parametrize(
    ("name", "cuda", "there"),
    [
        ("cuda", 0, "finds cpu "),
        ("cuda:1", 1, "finds cpu, cuda "),
        ("mps", 1, "finds cpu, cuda "),
    ],
)
def test_an_unavailable_device_is_an_error_that_lists_the_available_ones(
    name: str, cuda: int, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"device {name} is not available") as caught:
        device.resolve_device(name)
    assert there in str(caught.value)
    assert caught.value.key == "run.device"


def settings() -> dict[str, Any]:
    """What a run may change in torch."""
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "random numbers": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
    }


ASKED = RunSection(device="cpu", threads=CPUS + 1, deterministic=True, seed=5)


@pytest.mark.parametrize("warn_only", [None, False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_restores_the_settings_it_changed(fails: bool, warn_only: bool | None) -> None:
    try:
        torch.use_deterministic_algorithms(warn_only is not None, warn_only=bool(warn_only))
        before = settings()
        try:
            with device.device_context(ASKED) as prepared:
                assert prepared == torch.device("cpu")
                assert torch.get_num_threads() == CPUS + 1
                assert torch.are_deterministic_algorithms_enabled()
                torch.rand(100)
                if fails:
                    raise KeyError("inside")
        except KeyError:
            assert fails
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_are_as_many_as_there_are_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_cpus", lambda: CPUS + 2)
    with device.device_context(RunSection(device="cpu")):
        assert torch.get_num_threads() == CPUS + 2
        assert environment.current_environment(torch.device("cpu")).threads == CPUS + 2


def test_the_seed_makes_random_weights_repeat() -> None:
    def weights(seed: int) -> list[float]:
        with device.device_context(RunSection(device="cpu", seed=seed)):
            return torch.nn.Linear(4, 4).weight.flatten().tolist()

    torch.manual_seed(99)
    first = weights(3)
    torch.manual_seed(100)
    assert weights(3) == first != weights(4)


def test_a_device_that_is_not_there_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = settings()
    with (
        pytest.raises(ConfigError),
        device.device_context(RunSection(device="cuda", threads=CPUS + 1, seed=5)),
    ):
        pytest.fail("there is no such device")
    assert settings() == before


def test_the_environment_is_recorded() -> None:
    found = environment.current_environment(torch.device("cpu"))
    assert found.torch == torch.__version__
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert 1 <= found.cpus <= CPUS
    assert found.cores >= 1
    assert found.memory > 2**27
    assert found.cpu
    assert (found.device, found.device_name) == ("cpu", None)


@pytest.mark.cuda
def test_a_run_on_cuda_gives_back_its_random_numbers_too() -> None:
    torch.rand(1, device="cuda")
    before, current = torch.cuda.get_rng_state().tolist(), torch.cuda.current_device()
    last = f"cuda:{torch.cuda.device_count() - 1}"
    with device.device_context(RunSection(device=last, seed=5)) as prepared:
        assert torch.cuda.current_device() == prepared.index
        drawn = torch.rand(8, device=prepared).tolist()
    assert torch.cuda.get_rng_state().tolist() == before
    assert torch.cuda.current_device() == current
    with device.device_context(RunSection(device=last, seed=5)) as prepared:
        assert torch.rand(8, device=prepared).tolist() == drawn


@pytest.mark.cuda
def test_a_run_on_the_cpu_leaves_the_gpus_random_numbers() -> None:
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state().tolist()
    with device.device_context(RunSection(device="cpu", seed=5)):
        pass
    assert torch.cuda.get_rng_state().tolist() == before


@pytest.mark.cuda
def test_the_environment_names_the_gpu() -> None:
    assert environment.current_environment(torch.device("cuda")).device_name


def test_an_environment_is_of_plain_words_and_numbers() -> None:
    told = environment.current_environment(torch.device("cpu")).as_dict()
    assert {type(value) for value in told.values()} <= {str, int, type(None)}
