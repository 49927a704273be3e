"""Warnings that follow from the measurement of a run."""

from __future__ import annotations

from bisect import insort
from itertools import groupby

from gradrun.core.units import pluralize
from gradrun.results import stats
from gradrun.results.result import Environment, Measurement, Warning

_MAX_SPREAD = 2.0

_MEDIAN_BATCHES = 6
"""Batches for which the 95 % interval of the median has both ends."""

_MAX_BATCHES = 10_000
"""Batches of which times are compared, evenly spaced."""


def run_warnings(measured: Measurement, machine: Environment, *, training: bool) -> list[Warning]:
    """Return the warnings for one measurement; each says what to do."""
    warnings: list[Warning] = []

    def warn(code: str, text: str) -> None:
        warnings.append(Warning(code=code, text=text))

    batches = len(measured.batch_seconds)
    if 0 < batches < _MEDIAN_BATCHES:
        warn(
            "few_batches",
            f"{pluralize(batches, 'batch')} cannot bound the median time (it needs "
            f"{_MEDIAN_BATCHES}); run more samples for reliable times",
        )
    slow = stats.quantile(_relative_times(measured), 0.9)
    if slow and slow.value > _MAX_SPREAD:
        of_size = " of batches of their size or more" if measured.batch_elements else ""
        warn(
            "high_variance",
            f"the slowest 10 % of the batches took at least {slow.value:.1f} times the median"
            f"{of_size}; if other programs are using this machine, close them or lower run.threads",
        )
    if machine.device == "cpu" and machine.threads > machine.cpus:
        warn(
            "too_many_threads",
            f"{machine.threads} threads share {pluralize(machine.cpus, 'processor')}; "
            "run.threads: auto uses one thread per processor",
        )
    if lost := [worker for worker in measured.workers if worker.lost and not worker.rejected]:
        first = lost[0]
        warn(
            "workers_lost",
            f"{pluralize(len(lost), 'worker')} lost, and their samples were run again: worker "
            f"{first.worker} on {first.node} {first.lost}",
        )
    if rejected := [worker for worker in measured.workers if worker.rejected]:
        first = rejected[0]
        warn(
            "workers_rejected",
            f"{pluralize(len(rejected), 'worker')} rejected, and the others did the work: worker "
            f"{first.worker} on {first.node}, because {first.lost}",
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


def _relative_times(measured: Measurement) -> list[float]:
    """Return the time of each batch relative to the median of those with as many elements or more.

    A batch of longer texts may take longer; a batch that takes longer than larger ones may not.
    """
    seconds = measured.batch_seconds
    elements = measured.batch_elements or (1,) * len(seconds)
    step = -(-len(seconds) // _MAX_BATCHES) or 1
    batches = sorted(zip(elements[::step], seconds[::step], strict=True), reverse=True)
    ratios: list[float] = []
    larger: list[float] = []
    for _, group in groupby(batches, key=lambda batch: batch[0]):
        times = [time for _, time in group]
        for time in reversed(times):  # in ascending order, which moves fewer of them
            insort(larger, time)
        median = larger[len(larger) // 2]
        ratios += [time / median if median else 1.0 for time in times]
    return ratios
