"""`gradrun.profile`: time, work and memory per module, against the peaks of the machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gradrun.comparison.compare import make_variants
from gradrun.config.load import ConfigSource, is_trusted, resolve_config
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, GradrunError, RunFailed
from gradrun.core.files import replace_file
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.inference.device import device_context
from gradrun.inference.diagnosis import describe_model_error
from gradrun.inference.environment import current_environment, current_machine
from gradrun.inference.meters import measure_forward_memory, model_memory
from gradrun.inference.meters.work import counting
from gradrun.inference.module_state import preserve_module_state
from gradrun.output.run_folder import RunFolder
from gradrun.profiling.call_tree import CallNode, hook_cost, host_clock
from gradrun.profiling.coverage import limitations, parameter_count, statements_of
from gradrun.profiling.operators import OperatorPass, profile_operators
from gradrun.profiling.peaks import kept_peaks
from gradrun.profiling.rounds import time_rounds
from gradrun.profiling.variant import ProfiledVariant, load_variant
from gradrun.results.peaks_cache import cached_peaks
from gradrun.results.profile import ModuleCalls, Profile
from gradrun.results.result import (
    Measurement,
    Memory,
    Phases,
    ProfileResult,
    RunInfo,
    Warning,
)
from gradrun.results.work import MachinePeaks, Work

_OF_PROCESS = {"run.device", "run.allocator", "run.deterministic"}
"""Keys whose values a process cannot mix."""


def profile(
    config: ConfigSource,
    *,
    over: tuple[str, Sequence[Any]] | None = None,
    depth: int = 0,
    top: int = 20,
    trace: str | Path | None = None,
    peaks: bool = True,
    trust_code: bool = False,
    progress: ProgressCallback = ignore,
    **overrides: Any,
) -> ProfileResult:
    """Measure where the time of a forward pass goes, and how far it is from the machine's peaks.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        over: values of a config key to profile against each other, such as
            `("run.mode", ["grad", "inference_mode"])`; the first is the baseline.
        depth: levels of modules that reports show; 0: all.
        top: modules that reports show, longest first; 0: all.
        trace: a file for a trace of some batches in the JSON format of Chrome and Perfetto.
        peaks: measure peaks of the machine that are not in the cache, which takes a few seconds.
        trust_code: allow the code that the config names to run.
        progress: called before each step.
        overrides: config values to change, as for `infer`.

    Returns:
        One profile per variant: times with and without hooks, work and memory per module, and the
        operators that take most. Also saved as result.json in the folder beside output.path whose
        name ends in -profile.

    Raises:
        ConfigError: the config, model or data are invalid, or the model fails.
        RunFailed: the model failed after its first batch.
    """
    loaded = resolve_config(config, overrides)
    path = loaded.config.output.path
    folder = RunFolder(path.with_name(f"{path.name}-profile"), overwrite=True)
    whole = loaded.config.replace({"output.path": folder.path})
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    configs = _configs(whole, over) if over else {"": whole}
    with loaded.error_locations(), device_context(whole.run) as device:
        variants: list[ProfiledVariant] = []
        for name, one in configs.items():
            progress(Progress("loading the model"))
            trusted = is_trusted(trust_code)
            variants.append(load_variant(name, one, device, variants, trust_code=trusted))
            variants[-1].run_first_batch()
        threads = {variant.threads for variant in variants}
        known, warnings = _peaks(device, threads, progress if peaks else None)
        now = host_clock(device)
        cost = hook_cost(now)
        with _failures(whole):  # the first batch succeeded
            for variant in variants:
                variant.warm_up()
            time_rounds(variants, now, whole.measure.budget, progress)
        passes = [_run_untimed_passes(variant, warnings, progress) for variant in variants]
        statements = [one for variant in variants for one in statements_of(variant)]
        environment = current_environment(device)
    dumped = whole.model_dump(mode="json")
    result = ProfileResult(
        gradrun=environment.gradrun,
        started_at=started_at,
        info=RunInfo.from_config(dumped),
        config=dumped,
        environment=environment,
        measurements=tuple(
            _measurement(variant, found.memory)
            for variant, found in zip(variants, passes, strict=True)
        ),
        profiles=tuple(
            _profile(variant, cost, found.operators, known[variant.threads])
            for variant, found in zip(variants, passes, strict=True)
        ),
        interpretation=tuple(dict.fromkeys(statements)),
        warnings=tuple(dict.fromkeys(warnings)),
        key=over[0] if over else "",
        depth=depth,
        top=top,
    )
    with folder.locked():
        folder.save(result)
    if trace is not None:
        _write_trace(Path(trace), passes[0].operators, result)
    return result


@dataclass(frozen=True)
class _UntimedPasses:
    """Results of the passes after the timed rounds; None if a pass failed."""

    memory: Memory
    operators: OperatorPass | None


def _run_untimed_passes(
    variant: ProfiledVariant, warnings: list[Warning], progress: ProgressCallback
) -> _UntimedPasses:
    """Count work, profile operators and measure memory; a pass that fails is a warning."""
    operators, memory = None, model_memory(variant.model, variant.largest)
    progress(Progress("counting operations"))
    with _warn_of_failure("the operations were not counted", variant, warnings):
        _count_work(variant)
    progress(Progress("profiling operators"))
    with _warn_of_failure("the operators were not profiled", variant, warnings):
        operators = profile_operators(variant)
    progress(Progress("measuring memory"))
    with (
        _warn_of_failure("the memory was not measured", variant, warnings),
        variant.execution_context(),
    ):
        memory = measure_forward_memory(variant.model, variant.largest, variant.device)
    warnings += limitations(variant)
    return _UntimedPasses(memory, operators)


@contextmanager
def _warn_of_failure(
    problem: str, variant: ProfiledVariant, warnings: list[Warning]
) -> Iterator[None]:
    """Turn an error of the model into a warning: the times are complete."""
    try:
        yield
    except Exception as error:  # a model may depend on types of tensors that a pass replaces
        reason = describe_model_error(error, variant.config.run.mode)
        warnings.append(Warning(code="pass_failed", text=f"{problem}: {reason}"))


@contextmanager
def _failures(config: RunConfig) -> Iterator[None]:
    """Turn an error of the model into a RunFailed."""
    try:
        yield
    except GradrunError:
        raise
    except Exception as error:  # user code can raise anything
        reason = describe_model_error(error, config.run.mode)
        raise RunFailed(f"the model failed during the profile: {reason}") from error


def _configs(config: RunConfig, over: tuple[str, Sequence[Any]]) -> dict[str, RunConfig]:
    """Return the config with each value of a key, by name.

    Raises:
        ConfigError: the key cannot be varied, or has fewer than two values.
    """
    key, _ = over
    if key in _OF_PROCESS or key.partition(".")[0] in {"engine", "metrics", "check"}:
        raise ConfigError(
            f"{key} cannot be varied by profile --over, which runs all variants in one process on "
            "one device; use gradrun compare"
        )
    return {one.name: one.config for one in make_variants(config, over, config.output.path)}


def _peaks(
    device: torch.device, threads: Iterable[int], progress: ProgressCallback | None
) -> tuple[dict[int, MachinePeaks | None], list[Warning]]:
    """Return the peaks for each number of threads; without `progress`, those in the cache."""
    found: dict[int, MachinePeaks | None] = {}
    warnings: list[Warning] = []
    for count in threads:
        if progress is None:
            found[count] = cached_peaks(current_machine(device), count)
        else:
            found[count], noted = kept_peaks(device, count, progress)
            warnings += noted
    return found, warnings


def _count_work(variant: ProfiledVariant) -> None:
    """Store the work of a batch in each node: the mean over the batches that are timed."""
    tree, parts = variant.tree, dict[CallNode, list[Work]]()
    with variant.execution_context(), variant.running_node() as running:

        def record(work: Work) -> None:
            parts.setdefault(running() or tree.enter(variant.model, None), []).append(work)

        copies = [batch.map(torch.clone) for batch in variant.batches]
        with preserve_module_state(variant.model), counting(record):
            for batch in copies:
                variant.run(batch)
    for node in tree.nodes:
        node.work = sum(parts.get(node, []), Work()).divided(len(variant.batches))


def _measurement(variant: ProfiledVariant, memory: Memory) -> Measurement:
    """Return the times without hooks, and the memory of the largest batch."""
    sizes = {batch.size for batch in variant.batches}
    return Measurement(
        mode=variant.config.run.mode,
        variant=variant.name,
        batch_seconds=tuple(variant.plain),
        batch_sizes=(max(sizes),) * len(variant.plain),
        phases=Phases(
            load_model=variant.load_seconds,
            open_data=variant.open_seconds,
            first_batch=variant.first_seconds,
            forward=sum(variant.plain),
        ),
        memory=memory,
    )


def _profile(
    variant: ProfiledVariant,
    cost: tuple[float, float],
    found: OperatorPass | None,
    peaks: MachinePeaks | None,
) -> Profile:
    inside, outside = cost if variant.hooks else (0.0, 0.0)
    rounds = len(variant.hooked)
    timed = variant.tree.timed_nodes()
    numbers = {node.index: number for number, node in enumerate(timed)}
    return Profile(
        variant=variant.name,
        plain_seconds=tuple(variant.plain),
        hooked_seconds=tuple(variant.hooked),
        inside=inside,
        outside=outside,
        modules=tuple(
            ModuleCalls(
                path=variant.tree.path(node),
                type=type(node.module).__name__,
                parent=numbers.get(node.parent, -1),
                calls=sum(node.calls) / rounds,
                seconds=tuple(node.rounds),
                work=node.work,
                peak=node.peak,
                parameters=parameter_count(node.module),
            )
            for node in timed
        ),
        operators=found.operators if found else (),
        operator_seconds=found.seconds if found else 0.0,
        peaks=peaks,
    )


def _write_trace(path: Path, found: OperatorPass | None, result: ProfileResult) -> None:
    """Write the trace of the first variant.

    Raises:
        RunFailed: there is no trace, or it cannot be written; the error has the result.
    """
    if found is None:
        raise RunFailed(f"--trace {path}: the operators were not profiled", result=result)
    try:
        replace_file(path, found.trace.to_json(result.info.model))
    except OSError as error:
        text = f"--trace {path} cannot be written: {error.strerror}"
        raise RunFailed(text, result=result) from error
