"""Warnings that follow from the measurement of a run."""

from __future__ import annotations

from gradrun.core.units import pluralize
from gradrun.results.result import Environment, Measurement, Warning

_MAX_SPREAD = 2.0
_P99_BATCHES = 100


def run_warnings(measured: Measurement, machine: Environment, *, training: bool) -> list[Warning]:
    """Return the warnings for one measurement; each says what to do."""
    warnings: list[Warning] = []

    def warn(code: str, text: str) -> None:
        warnings.append(Warning(code=code, text=text))

    batches = len(measured.batch_seconds)
    if 0 < batches < _P99_BATCHES:
        warn(
            "few_batches",
            f"{pluralize(batches, 'batch')} cannot support every percentile (p99 needs "
            f"{_P99_BATCHES}); lower data.batch_size or run more samples",
        )
    median, slow = measured.latency(0.5), measured.latency(0.9)
    if median and slow and slow.value > _MAX_SPREAD * median.value:
        warn(
            "high_variance",
            f"the slowest 10 % of the batches took at least {slow.value / median.value:.1f} times "
            "the median; if other programs are using this machine, close them or lower run.threads",
        )
    if machine.device == "cpu" and machine.threads > machine.cpus:
        warn(
            "too_many_threads",
            f"{machine.threads} threads share {pluralize(machine.cpus, 'processor')}; "
            "run.threads: auto uses one thread per processor",
        )
    texts = measured.padding
    if texts and texts.truncated:
        warn(
            "truncated",
            f"{texts.truncated:,} of {pluralize(texts.texts, 'text')} were truncated to "
            f"{texts.limit:,} tokens (the longest has {texts.longest:,}); split them, or raise "
            "data.max_length if the model allows it",
        )
    if training:
        warn(
            "training_mode",
            "model.training is on: dropout and batch normalization behave as in training, so "
            "predictions depend on seed and batch size; remove it for inference",
        )
    return warnings
