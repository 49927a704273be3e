"""What a reader of a run's figures must know: Warnings drawn from the result alone.

Knows results; each warning has a code and says what to do.
"""

from __future__ import annotations

from gradrun.core.units import pluralize
from gradrun.results.result import Environment, Measurement, Warning

_SPREAD = 2.0
_P99_BATCHES = 100


def run_warnings(measured: Measurement, machine: Environment, *, training: bool) -> list[Warning]:
    """The warnings that one measurement of a run deserves."""
    found: list[Warning] = []

    def warn(code: str, text: str) -> None:
        found.append(Warning(code=code, text=text))

    batches = len(measured.batch_seconds)
    if 0 < batches < _P99_BATCHES:
        warn(
            "few_batches",
            f"{pluralize(batches, 'batch')} cannot show every percentile (p99 takes "
            f"{_P99_BATCHES}); for them lower data.batch_size or run more samples",
        )
    median, slow = measured.latency(0.5), measured.latency(0.9)
    if median and slow and slow.value > _SPREAD * median.value:
        warn(
            "high_variance",
            f"the slowest tenth of the batches took {slow.value / median.value:.1f} times the "
            "median or more: perhaps something else uses this machine; close it, or lower "
            "run.threads",
        )
    if machine.device == "cpu" and machine.threads > machine.cpus:
        warn(
            "too_many_threads",
            f"{machine.threads} threads share {pluralize(machine.cpus, 'processor')}; "
            "run.threads: auto takes as many as there are",
        )
    if training:
        warn(
            "training_mode",
            "model.training is on: dropout and batch norm work as in training, so predictions "
            "depend on seed and batch size; leave it out to predict",
        )
    return found
