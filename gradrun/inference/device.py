"""Set up the device, threads, determinism, seed and gradient mode of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from gradrun.config.run import RunSection
from gradrun.core.cpu import thread_count
from gradrun.core.errors import ConfigError
from gradrun.core.optional import library_settings
from gradrun.inference.process_settings import process_settings
from gradrun.modes import grad_mode


def resolve_device(name: str) -> torch.device:
    """Return the torch device for `run.device`; "auto" prefers CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: the device is not available.
    """
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if counts[kind])
    device = torch.device(name)
    if (device.index or 0) >= counts[device.type]:
        available = ", ".join(kind for kind, count in counts.items() if count)
        raise ConfigError(
            f"device {name} is not available; torch {torch.__version__} finds {available} "
            "(auto selects the best of them)",
            key="run.device",
        )
    return device


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the random number generators of the CPU and of `device`, and no other device's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use a number of CPU threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def device_context(run: RunSection) -> Iterator[torch.device]:
    """Apply process settings, threads, determinism and seed of a config; restore them at the end.

    Settings of libraries are restored too.

    Yields:
        The device.

    Raises:
        ConfigError: the device is not available.
    """
    device = resolve_device(run.device)
    settings = process_settings(run)  # before the first large allocation
    cuda = device.type == "cuda"
    # Events and new tensors use the current device, which is the first one by default.
    current = torch.cuda.device(device) if cuda else nullcontext()
    random_state = torch.random.fork_rng(devices=[device] if cuda else [])
    deterministic = _deterministic_algorithms(run.deterministic)
    threads = torch_threads(thread_count(run.threads))
    with settings, library_settings(), current, random_state, deterministic, threads:
        seed_generators(run.seed, device)
        yield device


@contextmanager
def _deterministic_algorithms(enabled: bool) -> Iterator[None]:
    # Called only if enabled: torch's setter imports the compiler stack, which takes a second.
    if not enabled or torch.are_deterministic_algorithms_enabled():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def execution_context(run: RunSection, device: torch.device) -> Iterator[None]:
    """Apply the gradient mode and autocast of a config."""
    dtype = getattr(torch, run.autocast) if run.autocast else None
    autocast = torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()
    with grad_mode(run.mode), autocast:
        yield
