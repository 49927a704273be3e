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

from gradrun.config import RunSection
from gradrun.errors import ConfigError
from gradrun.result import Environment


def available_cpus() -> int:
    """The processors this process may use: the smaller of its affinity and its cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cpus, int(quota))) if quota else cpus


def _cgroup_quota() -> float | None:
    """Processors that this process's cgroup and those around it allow (v2, then v1)."""
    quotas = [
        _quota(folder / "cpu.max", None) for folder in _cgroup_folders(Path("/sys/fs/cgroup"))
    ]
    v1 = Path("/sys/fs/cgroup/cpu")
    quotas.append(_quota(v1 / "cpu.cfs_quota_us", v1 / "cpu.cfs_period_us"))
    return min((quota for quota in quotas if quota), default=None)


def _cgroup_folders(root: Path) -> list[Path]:
    """The folder of this process's own cgroup and those above it, up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = root / own.lstrip("/")
    return [folder, *(above for above in folder.parents if above.is_relative_to(root))]


def _quota(quota_file: Path, period_file: Path | None) -> float | None:
    try:
        words = quota_file.read_text().split()
        if period_file:
            words += period_file.read_text().split()
        return None if words[0] in {"max", "-1"} else float(words[0]) / float(words[1])
    except (OSError, ValueError, IndexError):
        return None


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
def prepared(run: RunSection) -> Iterator[torch.device]:
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
        gradrun=_gradrun_version(),
        torch=torch.__version__,
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


def _gradrun_version() -> str:
    from gradrun import __version__

    return __version__


def _cpu_model() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
