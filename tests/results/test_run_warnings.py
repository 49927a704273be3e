"""Conditions and texts of the warnings of a run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gradrun.results.result import Measurement
from gradrun.results.run_warnings import run_warnings
from tests.support.run_results import MACHINE, measurement


def found(measured: Measurement, *, training: bool = False, **machine: Any) -> dict[str, str]:
    """The warnings by their code."""
    warnings = run_warnings(measured, MACHINE.replace(**machine), training=training)
    assert len({warning.code for warning in warnings}) == len(warnings)
    return {warning.code: warning.text for warning in warnings}


def times(slow: float, batches: int = 200) -> Measurement:
    """Every fifth batch `slow` times as long as the others."""
    seconds = tuple(1e-3 * (slow if i % 5 == 0 else 1) for i in range(batches))
    return measurement(batches, batch_seconds=seconds)


def test_a_good_run_has_no_warnings() -> None:
    assert found(measurement()) == {}


@pytest.mark.parametrize(("batches", "warned"), [(0, False), (1, True), (5, True), (6, False)])
def test_too_few_batches_for_an_interval_of_the_median_are_a_warning(
    batches: int, warned: bool
) -> None:
    measured = measurement(batches)
    assert ("few_batches" in found(measured)) is warned
    median = measured.latency(0.5)
    assert (median is not None and median.low > 0 and math.isfinite(median.high)) is (batches > 5)


def test_the_warning_about_few_batches_has_their_number_and_a_remedy() -> None:
    text = found(measurement(1))["few_batches"]
    assert text.startswith("1 batch ")
    assert "run more samples" in text
    assert "data.batch_size" not in text, "another batch size changes what is measured"


@pytest.mark.parametrize(("slow", "warned"), [(1.0, False), (1.9, False), (2.1, True), (9.0, True)])
def test_a_high_variance_is_a_warning(slow: float, warned: bool) -> None:
    warnings = found(times(slow))
    assert ("high_variance" in warnings) is warned
    assert not warned or f"{slow:.1f} times" in warnings["high_variance"]


def test_too_few_batches_for_p90_have_no_variance_warning() -> None:
    assert found(times(9.0, batches=9)) == {}


LENGTHS = [4, 8, 16, 60, 120, 240] * 20


def texts(*, disturbed: bool) -> Measurement:
    """Batches of 1 ms and 10 us per token; if disturbed, every fifth takes five times as long."""
    seconds = [1e-3 + 1e-5 * length for length in LENGTHS]
    if disturbed:
        seconds = [5 * time if i % 5 == 0 else time for i, time in enumerate(seconds)]
    return measurement(len(LENGTHS), batch_seconds=tuple(seconds)).replace(
        batch_elements=tuple(4 * length for length in LENGTHS)
    )


def test_longer_texts_are_not_a_noisy_machine() -> None:
    measured = texts(disturbed=False)
    p90, median = np.quantile(measured.batch_seconds, [0.9, 0.5])
    assert p90 > 2 * median, "judged by the batch, this run would be unsteady"
    assert "high_variance" not in found(measured)
    assert "high_variance" in found(measured.replace(batch_elements=()))


def test_texts_that_take_longer_than_longer_texts_are_a_noisy_machine() -> None:
    text = found(texts(disturbed=True))["high_variance"]
    assert "of batches of their size or more" in text


@pytest.mark.parametrize(
    ("threads", "cpus", "device", "warned"),
    [(3, 2, "cpu", True), (2, 2, "cpu", False), (1, 2, "cpu", False), (3, 2, "cuda", False)],
)
def test_more_threads_than_processors_are_a_warning_on_the_cpu(
    threads: int, cpus: int, device: str, warned: bool
) -> None:
    warnings = found(measurement(), threads=threads, cpus=cpus, device=device)
    assert ("too_many_threads" in warnings) is warned
    assert not warned or "run.threads: auto" in warnings["too_many_threads"]


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_reported(training: bool) -> None:
    assert ("training_mode" in found(measurement(), training=training)) is training


def test_all_warnings_are_reported_together() -> None:
    warnings = found(times(9.0, batches=50), training=True, threads=4)
    assert list(warnings) == ["high_variance", "too_many_threads", "training_mode"]
