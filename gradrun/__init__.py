"""Run PyTorch inference from a config; report latency, throughput and peak memory.

Public names are imported on first use: `import gradrun` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradrun.core.version import __version__ as __version__

if TYPE_CHECKING:
    from gradrun import modes
    from gradrun.audits.audit import audit
    from gradrun.audits.mode_behavior import mode_behavior
    from gradrun.checks.check import check
    from gradrun.comparison.compare import compare
    from gradrun.config.load import LoadedConfig, load_config
    from gradrun.config.schema import RunConfig
    from gradrun.core.errors import ConfigError, GradrunError, Interrupted, RunFailed
    from gradrun.core.grad_mode import GradMode
    from gradrun.engines.infer import infer
    from gradrun.output.remote_folder import verify
    from gradrun.profiling.profile import profile
    from gradrun.results.result import Comparison, Measurement, RunResult
    from gradrun.tuning.tune import tune

__all__ = [
    "Comparison",
    "ConfigError",
    "GradMode",
    "GradrunError",
    "Interrupted",
    "LoadedConfig",
    "Measurement",
    "RunConfig",
    "RunFailed",
    "RunResult",
    "audit",
    "check",
    "compare",
    "infer",
    "load_config",
    "mode_behavior",
    "modes",
    "profile",
    "tune",
    "verify",
]

_MODULES = {
    "infer": "engines.infer",
    "compare": "comparison.compare",
    "audit": "audits.audit",
    "check": "checks.check",
    "profile": "profiling.profile",
    "verify": "output.remote_folder",
    "tune": "tuning.tune",
    "mode_behavior": "audits.mode_behavior",
    "Comparison": "results.result",
    "LoadedConfig": "config.load",
    "load_config": "config.load",
    "GradMode": "core.grad_mode",
    "modes": "modes",
    "RunConfig": "config.schema",
    "Measurement": "results.result",
    "RunResult": "results.result",
    "ConfigError": "core.errors",
    "GradrunError": "core.errors",
    "Interrupted": "core.errors",
    "RunFailed": "core.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'gradrun' has no attribute {name!r}")
    module = importlib.import_module(f"gradrun.{_MODULES[name]}")
    return module if name == _MODULES[name] else getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
