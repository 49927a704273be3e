"""Conditions and texts of the warnings of a run."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize(("batches", "warned"), [(0, False), (1, True), (99, True), (100, False)])
def test_too_few_batches_for_a_percentile_are_a_warning(batches: int, warned: bool) -> None:
    assert ("few_batches" in found(measurement(batches))) is warned


def test_the_warning_about_few_batches_has_their_number_and_a_remedy() -> None:
    text = found(measurement(1))["few_batches"]
    assert text.startswith("1 batch ")
    assert "data.batch_size" in text


@pytest.mark.parametrize(("slow", "warned"), [(1.0, False), (1.9, False), (2.1, True), (9.0, True)])
def test_a_high_variance_is_a_warning(slow: float, warned: bool) -> None:
    warnings = found(times(slow))
    assert ("high_variance" in warnings) is warned
    assert not warned or f"{slow:.1f} times" in warnings["high_variance"]


def test_too_few_batches_for_p90_have_no_variance_warning() -> None:
    assert found(times(9.0, batches=9)).keys() == {"few_batches"}


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
    assert list(warnings) == ["few_batches", "high_variance", "too_many_threads", "training_mode"]
