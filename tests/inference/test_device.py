"""Devices, threads and seeds of a run, which are restored afterwards."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from gradrun.config.run import RunSection
from gradrun.core import cpu
from gradrun.core.errors import ConfigError
from gradrun.inference import device, environment

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_cpu_affinity_limits_the_threads_of_a_run() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        with device.device_context(RunSection(device="cpu")):
            assert (cpu.available_cpus(), torch.get_num_threads()) == (1, 1)
    finally:
        os.sched_setaffinity(0, before)


def test_the_cpu_is_always_available() -> None:
    assert device.resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(0, False, "cpu"), (0, True, "mps"), (2, False, "cuda")]
)
def test_auto_selects_the_best_available_device(
    cuda: int, mps: bool, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device.resolve_device("auto").type == best


@pytest.mark.parametrize(
    ("name", "cuda", "available"),
    [
        ("cuda", 0, "finds cpu "),
        ("cuda:1", 1, "finds cpu, cuda "),
        ("mps", 1, "finds cpu, cuda "),
    ],
)
def test_an_unavailable_device_is_an_error_that_lists_the_available_ones(
    name: str, cuda: int, available: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"device {name} is not available") as caught:
        device.resolve_device(name)
    assert available in str(caught.value)
    assert caught.value.key == "run.device"


def settings() -> dict[str, Any]:
    """Settings of torch that a run may change."""
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "random numbers": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
    }


REQUESTED = RunSection(device="cpu", threads=CPUS + 1, deterministic=True, seed=5)


@pytest.mark.parametrize("warn_only", [None, False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_settings_are_restored_after_a_run(fails: bool, warn_only: bool | None) -> None:
    try:
        torch.use_deterministic_algorithms(warn_only is not None, warn_only=bool(warn_only))
        before = settings()
        try:
            with device.device_context(REQUESTED) as prepared:
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


def test_the_default_number_of_threads_is_the_number_of_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "available_cpus", lambda: CPUS + 2)
    with device.device_context(RunSection(device="cpu")):
        assert torch.get_num_threads() == CPUS + 2
        assert environment.current_environment(torch.device("cpu")).threads == CPUS + 2


def test_random_weights_repeat_with_the_seed() -> None:
    def weights(seed: int) -> list[float]:
        with device.device_context(RunSection(device="cpu", seed=seed)):
            return torch.nn.Linear(4, 4).weight.flatten().tolist()

    torch.manual_seed(99)
    first = weights(3)
    torch.manual_seed(100)
    assert weights(3) == first != weights(4)


def test_an_unavailable_device_changes_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = settings()
    with (
        pytest.raises(ConfigError),
        device.device_context(RunSection(device="cuda", threads=CPUS + 1, seed=5)),
    ):
        pytest.fail("the device is unavailable")
    assert settings() == before


@pytest.mark.cuda
def test_a_run_on_cuda_restores_its_random_state() -> None:
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
def test_a_run_on_the_cpu_does_not_change_the_random_state_of_the_gpu() -> None:
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state().tolist()
    with device.device_context(RunSection(device="cpu", seed=5)):
        pass
    assert torch.cuda.get_rng_state().tolist() == before
