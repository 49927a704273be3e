"""Detect modules that mix the samples of a batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gradrun.audits.target import AuditTarget, source_of
from gradrun.data.batch import Batch
from gradrun.inference.batch_independence import batch_dependence, reference_rows
from gradrun.inference.module_state import preserve_module_state
from gradrun.results.result import Finding


def mixed_samples(subject: AuditTarget) -> Iterable[Finding]:
    """Report predictions that depend on the other samples of their batch, with the first module."""
    batch = _several_samples(subject)
    with subject.execution_context():
        with preserve_module_state(subject.model):
            copy = batch.map(torch.clone)
            rows = reference_rows(subject.run(copy), batch, subject.config)
        found = batch_dependence(subject.model, batch, rows, subject.config, subject.device)
    if found is None:
        return
    requested = getattr(subject.config.model, "training", False)
    yield Finding(
        severity="warning" if requested else "error",
        code="mixes_samples",
        module=found.label,
        source=source_of(found.module or subject.model),
        text=f"{found.text[0].upper()}{found.text[1:]}",
        advice=f"{found.advice[0].upper()}{found.advice[1:]}",
    )


def _several_samples(subject: AuditTarget) -> Batch:
    """Return the first batch, or several batches of one sample joined."""
    first, *others = subject.batches
    shapes = [tensor.shape for tensor in first.tensors()]
    alike = [b for b in others if [tensor.shape for tensor in b.tensors()] == shapes]
    if first.size > 1 or not alike:
        return subject.copy()
    joined = [first, *alike]
    return Batch(
        tuple(torch.cat(tensors) for tensors in zip(*(b.args for b in joined), strict=True)),
        {name: torch.cat([b.kwargs[name] for b in joined]) for name in first.kwargs},
        len(joined),
        [sample for b in joined for sample in b.ids],
    )
