"""`gradrun.audit`: find problems of a model in each gradient mode."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from gradrun.audits import AUDIT_PASSES, agreement, saved_tensors, torch_compile
from gradrun.audits.mixed_samples import mixed_samples
from gradrun.audits.target import AuditTarget
from gradrun.config.load import ConfigSource, is_trusted, resolve_config
from gradrun.config.schema import RunConfig
from gradrun.core.errors import GradrunError, RunFailed, first_line
from gradrun.core.grad_mode import GradMode
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.data import open_data
from gradrun.data.batch import Batch
from gradrun.inference.device import device_context, seed_generators
from gradrun.inference.diagnosis import describe_model_error, explain_first_batch_failure
from gradrun.inference.environment import current_environment
from gradrun.inference.interpretation import describe
from gradrun.inference.meters import measure_forward_memory
from gradrun.inference.sampling import first_batches
from gradrun.inference.torchscript import compile_without_gradients
from gradrun.models import load_model
from gradrun.models.loaded import LoadedModel
from gradrun.output.run_folder import RunFolder
from gradrun.results.result import (
    AuditResult,
    Equivalence,
    Finding,
    Measurement,
    Phases,
    RunInfo,
    SavedForBackward,
    Statement,
)


@dataclass
class _Audited:
    """Results collected so far."""

    findings: list[Finding] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    equivalence: list[Equivalence] = field(default_factory=list)
    saved_for_backward: tuple[SavedForBackward, ...] = ()


def audit(
    config: ConfigSource,
    *,
    trust_code: bool = False,
    compile: bool = True,
    progress: ProgressCallback = ignore,
    **overrides: Any,
) -> AuditResult:
    """Find problems of a model in each gradient mode, and its memory use per module.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        trust_code: allow the code that the config names to run.
        compile: also report graph breaks under torch.compile; takes a few seconds.
        progress: called before each mode.
        overrides: as for `infer`.

    Returns:
        Findings, one Measurement per mode (memory only), the equivalence of outputs, and the bytes
        that each module saves for backward. Also written to result.json in the folder beside
        output.path whose name ends in -audit.

    Raises:
        ConfigError: the config, model or data are invalid, or the model fails in every mode.
        RunFailed: the model failed after its first batch.
    """
    loaded = resolve_config(config, overrides)
    path = loaded.config.output.path
    folder = RunFolder(path.with_name(f"{path.name}-audit"), overwrite=True)
    # Hooks cannot observe modules of a compiled model; torch_compile.py reports on compilation.
    whole = loaded.config.replace({"model.compile": False, "output.path": folder.path})
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    found, base = _Audited(), None
    interpretation: tuple[Statement, ...] = ()
    with loaded.error_locations(), device_context(whole.run) as device:
        data = open_data(
            whole.data,
            seed=whole.run.seed,
            model=whole.model,
            device=device,
            trust_code=is_trusted(trust_code),
        )
        batches = first_batches(whole, device, data)
        modes = list(GradMode)
        for step, mode in enumerate(modes):
            progress(Progress(f"auditing {mode}", step, len(modes) + compile))
            began = time.perf_counter()
            model = _load(whole, device, batches, trust_code=is_trusted(trust_code))
            load_seconds = time.perf_counter() - began
            interpretation = interpretation or describe(whole, model, data)
            in_mode = whole.replace({"run.mode": mode})
            subject = AuditTarget(mode.value, in_mode, device, model.module, batches)
            try:
                last = base is None and mode is modes[-1]
                if _run_passes(subject, found, load_seconds, last=last):
                    base = _compare_to(base, subject, found)
            except GradrunError:
                raise
            except Exception as error:  # the first batch succeeded
                text = f"the model failed during the audit: {describe_model_error(error, mode)}"
                raise RunFailed(text) from error
        if compile and base:
            progress(Progress("auditing torch.compile", len(modes), len(modes) + 1))
            found.findings += torch_compile.compiled(base, [m.mode for m in found.measurements])
        environment = current_environment(device)
    result = AuditResult(
        gradrun=environment.gradrun,
        started_at=started_at,
        info=RunInfo.from_config(dumped := whole.model_dump(mode="json")),
        config=dumped,
        environment=environment,
        measurements=tuple(found.measurements),
        equivalence=tuple(found.equivalence),
        interpretation=interpretation,
        findings=_merge(found.findings),
        saved_for_backward=found.saved_for_backward,
    )
    with folder.locked():
        folder.save(result)
    return result


def _load(
    config: RunConfig, device: torch.device, batches: list[Batch], *, trust_code: bool
) -> LoadedModel:
    """Load a new model: tensors created lazily in another mode must not hide findings."""
    seed_generators(config.run.seed, device)
    model = load_model(config.model, device, data=config.data, trust_code=trust_code)
    compile_without_gradients(model.module, batches[0])
    return model


def _run_passes(subject: AuditTarget, found: _Audited, load_seconds: float, *, last: bool) -> bool:
    """Run all passes in one mode; return whether the model runs in it.

    Raises:
        ConfigError: the model fails in this mode, and `last` is set.
    """
    try:
        first, *others = AUDIT_PASSES
        found.findings += first(subject)  # an error here is the model's
        found.measurements.append(_measure_memory(subject, load_seconds))
    except GradrunError:
        raise
    except (Exception, SystemExit) as error:  # a model may raise anything
        if last:
            batch = subject.copy()
            with subject.execution_context():
                raise explain_first_batch_failure(
                    subject.model, batch, error, subject.mode
                ) from error
        reason = describe_model_error(error, subject.mode)
        found.findings.append(
            Finding(
                severity="error",
                code="model_fails",
                modes=(subject.mode,),
                text=f"The model fails: {reason.rstrip('.')}",
                advice="",
            )
        )
        return False
    for audit_pass in (*others, agreement.repeated):
        with _report_failure(found, subject, audit_pass.__name__):
            found.findings += audit_pass(subject)
    if subject.mode is GradMode.GRAD:
        with _report_failure(found, subject, "saved_for_backward"):
            found.saved_for_backward = saved_tensors.saved_for_backward(subject)
    return True


@contextmanager
def _report_failure(found: _Audited, subject: AuditTarget, name: str) -> Iterator[None]:
    """Turn an error of a pass into a warning: it is not a finding about the model."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}".rstrip(".")
        found.findings.append(
            Finding(
                severity="warning",
                code="pass_failed",
                modes=(subject.mode,),
                text=f"The pass {name.replace('_', ' ')!r} failed: {reason}",
                advice="",
            )
        )


def _compare_to(base: AuditTarget | None, subject: AuditTarget, found: _Audited) -> AuditTarget:
    """Compare with the first mode that runs, the baseline; both modes use its model.

    Samples that mix in one mode mix in all, so only the baseline is tested for that.
    """
    if base is None:
        with _report_failure(found, subject, "mixed_samples"):
            found.findings += mixed_samples(subject)
        return subject
    same_model = AuditTarget(subject.name, subject.config, subject.device, base.model, base.batches)
    steady = not any(finding.code == "not_deterministic" for finding in found.findings)
    equivalence, findings = agreement.across(base, same_model, steady=steady)
    found.equivalence.append(equivalence)
    found.findings += findings
    return base


def _measure_memory(subject: AuditTarget, load_seconds: float) -> Measurement:
    """Measure the mode's memory. Times are left empty: hooks and meters would distort them."""
    numbers = range(len(subject.batches))
    largest = max(numbers, key=lambda number: subject.batches[number].elements)
    batch = subject.copy(largest)
    with subject.execution_context():
        memory = measure_forward_memory(subject.model, batch, subject.device)
    return Measurement(
        mode=subject.mode,
        variant=subject.name,
        batch_seconds=(),
        batch_sizes=(),
        phases=Phases(load_model=load_seconds),
        memory=memory.replace(batch=largest),
    )


def _merge(findings: list[Finding]) -> tuple[Finding, ...]:
    """Merge findings that are equal except for their mode; most severe first."""
    merged: dict[tuple[Any, ...], Finding] = {}
    for finding in findings:
        key = (finding.severity, finding.code, finding.module, finding.source, finding.text)
        known = merged.get(key)
        merged[key] = (
            finding
            if known is None
            else known.replace(
                modes=(*known.modes, *finding.modes),
                cost=max(filter(None, (known.cost, finding.cost)), default=None),
            )
        )
    ranks = ["error", "warning", "info"]
    return tuple(sorted(merged.values(), key=lambda finding: ranks.index(finding.severity)))
