"""Messages between a session and its workers, and the marker of a worker's position."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gradrun.comparison.protocol import (
    Failure,
    Job,
    Marker,
    VariantTask,
    WorkerReport,
)
from gradrun.core.grad_mode import GradMode
from gradrun.results.result import Equivalence, Measurement, SystemNoise
from tests.support.run_results import MACHINE, MEMORY, PHASES

JOB = Job(
    kind="time",
    variants=(VariantTask(name="grad", config={"run": {"mode": "grad"}}),),
    seed=3,
    seconds=0.25,
    trust_code=True,
    marker="/tmp/marker",
)
REPORT = WorkerReport(
    measurements=(
        Measurement(
            mode=GradMode.GRAD,
            variant="grad",
            batch_seconds=(0.1 + 0.2, 1e-5),
            batch_sizes=(8, 8),
            phases=PHASES,
            memory=MEMORY,
        ),
    ),
    equivalence=(
        Equivalence(
            baseline="grad",
            candidate="no_grad",
            bitwise=False,
            max_abs_diff=math.inf,
            equal=False,
            first_module="layers.0 (Linear)",
        ),
    ),
    failures=(Failure(variant="no_grad", batch=3, error="ValueError: größer\n\x00…"),),
    noise=SystemNoise(steal=0.01, others=1.5, preemptions=20.0),
    environment=MACHINE,
)


def test_a_job_survives_serialization() -> None:
    assert Job.from_json(JOB.to_json()) == JOB


def test_a_report_survives_serialization_to_the_last_bit() -> None:
    assert WorkerReport.from_json(REPORT.to_json()) == REPORT


def test_messages_are_immutable() -> None:
    with pytest.raises(AttributeError):
        JOB.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "dance"}', "Loading model...\n{}"])
def test_an_invalid_message_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expect|Invalid"):
        Job.from_json(text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    marker = tmp_path / "marker"
    marker.write_bytes(bytes(Marker.SIZE))
    return marker


def test_a_new_marker_names_no_variant(path: Path) -> None:
    Marker(path)
    assert Marker.read(path) == (-1, 0)


def test_a_marker_records_the_current_variant_and_batch(path: Path) -> None:
    marker = Marker(path)
    for position in [(0, 0), (2, 7), (1, 123_456_789_012)]:
        marker.set(*position)
        assert Marker.read(path) == position
        assert marker.batch == position[1]
