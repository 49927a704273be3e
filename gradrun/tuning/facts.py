"""The properties of model, data and machine that decide which moves are tried."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradrun.comparison.lanes import Lane
from gradrun.config.load import load_config
from gradrun.config.schema import RunConfig
from gradrun.core.cpu import available_cpus
from gradrun.tuning.constraints import Constraints

_COMPILERS = ("g++", "clang++", "c++")


@dataclass(frozen=True)
class Facts:
    """What is known before the search; `config` is that of the best setting so far."""

    config: RunConfig
    modules: dict[str, int]
    """Number of modules by type."""
    varies: bool
    """Whether the work per sample depends on its length."""
    samples: int
    device: str
    constraints: Constraints
    cpus: int
    cpu_flags: frozenset[str]
    has_compiler: bool
    memory: int
    """Bytes that this machine, or its container, has."""
    peak: int | None = None
    """Process peak of the best setting so far, in bytes."""

    def has(self, *types: str) -> bool:
        """Whether the model has a module of one of these types."""
        return any(self.modules.get(name) for name in types)


def gather_facts(config: RunConfig, lane: Lane, constraints: Constraints) -> Facts:
    """Collect the facts from the lane of the baseline and from the machine."""
    return Facts(
        config=config,
        modules=lane.ready.modules,
        varies=lane.ready.varies,
        samples=lane.ready.samples,
        device=lane.ready.environment.device,
        constraints=constraints,
        cpus=available_cpus(),
        cpu_flags=_cpu_flags(),
        has_compiler=any(shutil.which(name) for name in _COMPILERS),
        memory=_memory(),
    )


def apply(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Return a config with changed keys.

    Raises:
        ConfigError: the changed config is invalid.
    """
    return load_config(config.model_dump(mode="json"), changes).config


def value_of(config: RunConfig, key: str) -> Any:
    """Return the value of a dotted key in JSON types; None if there is none."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup, or "max"
        return memory


def _cpu_flags() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:  # not Linux
        pass
    return frozenset()
