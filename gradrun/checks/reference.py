"""Open the reference of a check: a baseline, another config or a git revision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradrun.checks.git_worktree import git_worktree
from gradrun.config.load import LoadedConfig, load_config
from gradrun.config.run import MetricSection
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from gradrun.core.options import option
from gradrun.results.result import Measurement, RunResult


@dataclass(frozen=True)
class Reference:
    """Either an earlier `result`, a `config` that is run side by side, or neither."""

    name: str
    result: RunResult | None = None
    config: RunConfig | None = None
    worktree: tuple[str, str] | None = None
    """(repository, worktree) of a git revision."""
    missing: str = ""
    """Why there is nothing to compare with: the revision does not have the config yet."""

    @property
    def variant(self) -> str:
        """Name of its variant in a session."""
        return f"against {self.name}"


@contextmanager
def open_reference(
    loaded: LoadedConfig,
    baseline: str | Path | None,
    against: str | Path | None,
    overrides: Mapping[str, Any] | Sequence[str],
) -> Iterator[Reference | None]:
    """Open the reference, if any; a revision is checked out until the block ends.

    `overrides` are applied to the reference's config too.

    Raises:
        ConfigError: the reference does not exist or is invalid.
    """
    if baseline:
        if not Path(baseline).exists():
            save = option("save_baseline", "PATH")
            raise ConfigError(f"the baseline {baseline} does not exist; {save} creates it")
        yield Reference(Path(baseline).name, result=RunResult.load(baseline))
    elif against is None:
        yield None
    elif Path(against).is_file():
        other = load_config(Path(against), overrides)
        yield Reference(Path(against).name, config=checked_config(other.config))
    else:
        file = Path(loaded.locations.name) if loaded.locations else None
        if file is None or not file.is_file():
            raise ConfigError(f"{option('against', 'REVISION')} requires a config that is a file")
        folder = file.parent.resolve()
        with git_worktree(str(against), folder, loaded.config.input_files()) as worktree:
            moved = worktree.path_of(folder) / file.name
            if not moved.is_file():
                name = moved.relative_to(worktree.path)
                yield Reference(str(against), missing=f"{against} does not have {name} yet")
                return
            yield Reference(
                str(against),
                config=checked_config(load_config(moved, overrides).config),
                worktree=(str(worktree.repository), str(worktree.path)),
            )


def checked_config(config: RunConfig) -> RunConfig:
    """Return the config with the checked mode, an output folder of its own and all metrics."""
    path = config.output.path
    known = {metric.title for metric in config.metrics}
    missing = [
        MetricSection.model_validate({"name": name})
        for name in config.check.limits.of_metrics() | config.check.regression.of_metrics()
        if name not in known
    ]
    return config.replace(
        {
            "metrics": (*config.metrics, *missing),
            "run.mode": config.check.mode or config.run.mode,
            "output.path": path.with_name(f"{path.name}-check"),
            # Arrays are the easiest to compare; only jsonl supports rows of any shape.
            "output.format": "jsonl" if config.output.format == "jsonl" else "npy",
        }
    )


def measurements_in(result: Sequence[Measurement], mode: GradMode) -> list[Measurement]:
    """Return the measurements of the model itself in a mode, without those of a reference."""
    return [m for m in result if m.mode == mode and m.variant in {"", str(mode)}]
