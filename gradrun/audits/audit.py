"""`gradrun.audit`: what each gradient mode does to one model, found out and saved.

Knows the order of the steps; what is looked for stands in audits/.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from gradrun.audits import AUDIT_PASSES, agreement, saved_tensors, torch_compile
from gradrun.audits.target import AuditTarget
from gradrun.config.load import ConfigSource, is_trusted, resolve_config
from gradrun.config.schema import RunConfig
from gradrun.core.errors import GradrunError, RunFailed, first_line
from gradrun.core.grad_mode import GradMode
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.data.source import Batch
from gradrun.inference.device import device_context, seed_generators
from gradrun.inference.diagnosis import describe_model_error, explain_first_batch_failure
from gradrun.inference.environment import current_environment
from gradrun.inference.meters import measure_forward_memory
from gradrun.inference.sampling import first_batches
from gradrun.models import load_model
from gradrun.output.run_folder import RunFolder
from gradrun.results.result import (
    AuditResult,
    Equivalence,
    Finding,
    Measurement,
    Phases,
    RunInfo,
    SavedForBackward,
)

"""Told (what is being looked at, steps done, steps in all)."""


@dataclass
class _Audited:
    """What has been found so far."""

    findings: list[Finding] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    equivalence: list[Equivalence] = field(default_factory=list)
    kept: tuple[SavedForBackward, ...] = ()


def audit(
    config: ConfigSource,
    *,
    trust_code: bool = False,
    compile: bool = True,
    progress: ProgressCallback = ignore,
    **overrides: Any,
) -> AuditResult:
    """Find out whether a model is safe and lean under each gradient mode.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        trust_code: let a `python` model run the code that the config names.
        compile: also look at what torch.compile makes of the model; takes a few seconds.
        progress: called before each mode.
        overrides: as for `infer`.

    Returns:
        Findings, one Measurement a mode (its memory only), the outputs' equivalence, and what each
        module keeps for backward. It is in result.json too, in the folder beside output.path that
        ends in -audit.

    Raises:
        ConfigError: the config, model or data are wrong, or the model runs in no mode.
    """
    loaded = resolve_config(config, overrides)
    path = loaded.config.output.path
    folder = RunFolder(path.with_name(f"{path.name}-audit"), overwrite=True)
    # Hooks do not run in a compiled model; torch.compile is examined separately.
    whole = loaded.config.replace({"model.compile": False, "output.path": folder.path})
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    found, base = _Audited(), None
    with loaded.error_locations(), device_context(whole.run) as device:
        batches = first_batches(whole, device)
        modes = list(GradMode)
        for step, mode in enumerate(modes):
            progress(Progress(f"auditing {mode}", step, len(modes) + compile))
            subject, load_seconds = _loaded(whole, mode, device, batches, is_trusted(trust_code))
            try:
                last = base is None and mode is modes[-1]
                if _looked_at(subject, found, load_seconds, last=last):
                    base = _compared(base, subject, found)
            except GradrunError:
                raise
            except Exception as error:  # it ran one batch, and fails on another
                text = (
                    f"the model failed while it was looked at: {describe_model_error(error, mode)}"
                )
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
        findings=_merged(found.findings),
        saved_for_backward=found.kept,
    )
    with folder.locked():
        folder.save(result)
    return result


def _loaded(
    config: RunConfig, mode: GradMode, device: torch.device, batches: list[Batch], trust_code: bool
) -> tuple[AuditTarget, float]:
    """The model anew: what it made lazily in another mode must not hide what it does in this."""
    in_mode = config.replace({"run.mode": mode})
    began = time.perf_counter()
    seed_generators(config.run.seed, device)
    model = load_model(config.model, device, trust_code=trust_code)
    return AuditTarget(mode.value, in_mode, device, model, batches), time.perf_counter() - began


def _looked_at(subject: AuditTarget, found: _Audited, load_seconds: float, *, last: bool) -> bool:
    """Look for everything in one mode; whether the model runs in it at all.

    Raises:
        ConfigError: it does not, and this is the last mode that it could have run in.
    """
    try:
        first, *others = AUDIT_PASSES
        found.findings += first(subject)  # runs the model as it is: what fails here is its fault
        found.measurements.append(_measured(subject, load_seconds))
    except GradrunError:
        raise
    except (Exception, SystemExit) as error:  # whatever a model may raise
        if last:
            batch = subject.copy()
            with subject.active():
                raise explain_first_batch_failure(
                    subject.model, batch.args, batch.kwargs, error, subject.mode
                ) from error
        reason = describe_model_error(error, subject.mode)
        found.findings.append(
            Finding(
                severity="error",
                code="fails",
                modes=(subject.mode,),
                text=f"The model cannot be run: {reason.rstrip('.')}",
                advice="",
            )
        )
        return False
    for look in (*others, agreement.repeated):
        with _noted(found, subject, look.__name__):
            found.findings += look(subject)
    if subject.mode is GradMode.GRAD:
        with _noted(found, subject, "kept_for_backward"):
            found.kept = saved_tensors.kept_for_backward(subject)
    return True


@contextmanager
def _noted(found: _Audited, subject: AuditTarget, look: str) -> Iterator[None]:
    """Turn what a look cannot look at into a warning: it says nothing of the model."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}".rstrip(".")
        found.findings.append(
            Finding(
                severity="warning",
                code="not_looked_at",
                modes=(subject.mode,),
                text=f"{look.replace('_', ' ').capitalize()} could not be looked at: {said}",
                advice="",
            )
        )


def _compared(base: AuditTarget | None, subject: AuditTarget, found: _Audited) -> AuditTarget:
    """The first mode that runs is the baseline, whose model the others are compared on."""
    if base is None:
        return subject
    same_model = AuditTarget(subject.name, subject.config, subject.device, base.model, base.batches)
    steady = not any(finding.code == "not_deterministic" for finding in found.findings)
    equivalence, findings = agreement.across(base, same_model, steady=steady)
    found.equivalence.append(equivalence)
    found.findings += findings
    return base


def _measured(subject: AuditTarget, load_seconds: float) -> Measurement:
    """The mode's memory; time is not taken here, where hooks and meters would count into it."""
    batch = subject.copy()
    with subject.active():
        memory = measure_forward_memory(subject.model, batch, subject.device)
    return Measurement(
        mode=subject.mode,
        variant=subject.name,
        batch_seconds=(),
        batch_sizes=(),
        phases=Phases(
            load_model=load_seconds,
            open_data=0.0,
            first_batch=0.0,
            warm_up=0.0,
            data=0.0,
            forward=0.0,
            output=0.0,
        ),
        memory=memory,
    )


def _merged(findings: list[Finding]) -> tuple[Finding, ...]:
    """What is the same in several modes once, with all of them; the worst first."""
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
