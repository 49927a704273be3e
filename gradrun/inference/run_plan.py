"""Open the folder, model and data of a run, and identify the run by a fingerprint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from gradrun.config.schema import RunConfig
from gradrun.core.imports import imported_files, target_root
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.version import __version__
from gradrun.data import open_data
from gradrun.data.source import has_row_checksums
from gradrun.inference.compilation import compile_model
from gradrun.inference.decoding import open_decoder
from gradrun.inference.metrics import plan_metrics
from gradrun.inference.runner import Runner
from gradrun.models import load_model
from gradrun.models.class_names import check_order
from gradrun.models.loaded import LoadedModel
from gradrun.output.fingerprint import fingerprint
from gradrun.output.journal import JournalHeader
from gradrun.output.quarantine import Quarantine
from gradrun.output.run_folder import RunFolder
from gradrun.output.transforms import resolve_output
from gradrun.results.result import InferResult


@dataclass(frozen=True)
class RunOptions:
    """How to start a run, besides its config."""

    trust_code: bool = False
    """Whether the config may run code."""
    overwrite: bool = False
    """Replace an earlier run in the folder."""
    resume: bool = False
    """Continue an unfinished run in the folder, if any."""
    progress: ProgressCallback = ignore


@dataclass(frozen=True)
class OpenedRun:
    """The opened model and data of a run."""

    header: JournalHeader
    model: LoadedModel
    runner: Runner
    """The module, data source, config and device."""
    load_seconds: float
    open_seconds: float


@dataclass(frozen=True)
class RunPlan(OpenedRun):
    """A run that is ready to start."""

    folder: RunFolder
    quarantine: Quarantine
    started_at: str
    finished: InferResult | None
    """The result of an earlier run that is complete and is to be resumed."""


def plan_run(config: RunConfig, device: torch.device, options: RunOptions) -> RunPlan:
    """Open the run folder, model and data, and check that a resume continues the same run.

    Raises:
        ConfigError: one of them cannot be opened, or the folder has another run.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    folder = RunFolder(
        config.output.path,
        overwrite=options.overwrite,
        resume=options.resume,
        inputs=config.input_files(),
    )
    opened = open_run(config, device, options)
    folder.check_resumable(opened.header, opened.runner.data.checksum)
    return RunPlan(
        **vars(opened),
        folder=folder,
        quarantine=Quarantine(folder.path),
        started_at=started_at,
        finished=folder.finished_result(),
    )


def open_run(config: RunConfig, device: torch.device, options: RunOptions) -> OpenedRun:
    """Load the model and open the data of a config, and take their fingerprint.

    Raises:
        ConfigError: one of them cannot be opened.
    """
    trusted, progress = options.trust_code, options.progress
    progress(Progress("loading the model"))
    started = time.perf_counter()
    model = load_model(config.model, device, data=config.data, trust_code=trusted)
    config = config.replace({"output": resolve_output(config.output, model)})
    loaded = time.perf_counter()
    progress(Progress("opening the data"))
    opening = time.perf_counter()
    data = open_data(
        config.data,
        seed=config.run.seed,
        model=config.model,
        model_classes=model.classes,
        device=device,
        trust_code=trusted,
        keep=config.kept_columns,
    )
    opened = time.perf_counter()
    decode = None
    if target := config.output.decoder:
        decode = open_decoder(target, beside=_code_roots(config), trust_code=trusted)
    model = compile_model(model, config.model.compile, data, device)
    compiled = time.perf_counter()
    check_order(data.classes, model.classes)
    metrics = partial(plan_metrics, config, data, model=model)
    header = fingerprint(
        config,
        data.samples,
        __version__,
        listed=data.files,
        by_rows=has_row_checksums(data),
        classes=model.classes,
        id_type=data.id_type,
        kept_types={name: str(kind) for name, kind in data.kept_types.items()},
        identity=data.identity,
        code=code_files(config),
        resolved={"device": device.type, "threads": torch.get_num_threads()},
        versions={
            "torch": str(torch.__version__),
            "weights": "in files" if model.files else model.weights,
        },
    )
    return OpenedRun(
        header=header,
        model=model,
        runner=Runner(model.module, data, config, device, model, metrics, decode),
        load_seconds=loaded - started + compiled - opened,
        open_seconds=opened - opening,
    )


def _code_roots(config: RunConfig) -> dict[Path, str]:
    """Return the folders of the user's code for model and data, and what precedes file names."""
    roots: dict[Path, str] = {}
    for key, target in config.targets().items():
        section, _, _ = key.partition(".")
        root = getattr(getattr(config, section), "root", None)
        roots.setdefault(target_root(target, root), "" if section == "model" else f"{section}: ")
    return roots


def code_files(config: RunConfig) -> dict[str, Path]:
    """Return name and path of each file of the user's code that has been imported."""
    roots = _code_roots(config)
    if config.output.decoder:
        roots.setdefault(target_root(config.output.decoder, None), "output: ")
    return {
        f"{prefix}{name}": path
        for root, prefix in roots.items()
        for name, path in imported_files(root).items()
    }
