"""The machine a run is given: device, threads, seed, and what is worth knowing about it.

Knows no model and no data.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy
import psutil
import torch

from gradrun.config.schema import RunSection
from gradrun.core.cpu import available_cpus
from gradrun.core.errors import ConfigError
from gradrun.core.version import __version__
from gradrun.results.result import Environment


def resolve(name: str) -> torch.device:
    """The torch device for a config's `run.device`; auto takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: the device is not there.
    """
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(_has_mps())}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    device = torch.device(name)
    if (device.index or 0) >= there[device.type]:
        present = [kind for kind, count in there.items() if count]
        raise ConfigError(
            f"there is no {name} here; torch {torch.__version__} sees {', '.join(present)} "
            "(auto takes the best of them)",
            key="run.device",
        )
    return device


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def seed(value: int, device: torch.device) -> None:
    """Seed the generators that a run on `device` draws from, and no other device's."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


@contextmanager
def device_context(run: RunSection) -> Iterator[torch.device]:
    """Threads, determinism and seed as the config asks, given back afterwards; yields the device.

    Raises:
        ConfigError: the device is not there.
    """
    device = resolve(run.device)
    threads = torch.get_num_threads()
    cuda = device.type == "cuda"
    # Events and new tensors go to the current device, which is the first one unless told.
    current = torch.cuda.device(device) if cuda else nullcontext()
    seeded = torch.random.fork_rng(devices=[device] if cuda else [])
    with current, seeded, _deterministic(run.deterministic):
        try:
            torch.set_num_threads(available_cpus() if run.threads == "auto" else run.threads)
            seed(run.seed, device)
            yield device
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _deterministic(asked: bool) -> Iterator[None]:
    # Touched only when asked for: torch's setter imports the compiler stack, which takes a second.
    before = torch.are_deterministic_algorithms_enabled()
    if not asked or before:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def environment(device: torch.device) -> Environment:
    """What a reader of the result must know to compare it with another."""
    return Environment(
        gradrun=__version__,
        torch=str(torch.__version__),  # not torch's own kind of text: a result needs no torch
        numpy=numpy.__version__,
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        cpu=_cpu_model(),
        cores=psutil.cpu_count(logical=False) or available_cpus(),
        cpus=available_cpus(),
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    )


def _cpu_model() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
