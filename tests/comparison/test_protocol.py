"""What workers are told and answer, and the marker that says where one was when it died."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gradrun.comparison.protocol import (
    Failure,
    Job,
    Marker,
    Variant,
    VariantMeasurement,
    WorkerReport,
)
from gradrun.results.result import Equivalence, SystemNoise
from tests.support.run_results import MACHINE, MEMORY, PHASES

JOB = Job(
    kind="time",
    variants=(Variant(name="grad", config={"run": {"mode": "grad"}}),),
    seed=3,
    seconds=0.25,
    trust_code=True,
    marker="/tmp/marker",
)
REPORT = WorkerReport(
    trials=(
        VariantMeasurement(
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
    failures=(Failure(variant="no_grad", batch=3, error="ValueError: größer\n\x00", details="…"),),
    disturbance=SystemNoise(steal=0.01, others=1.5, preemptions=20.0),
    environment=MACHINE,
)


def test_a_job_arrives_as_it_was_sent() -> None:
    assert Job.from_json(JOB.to_json()) == JOB


def test_a_report_arrives_as_it_was_sent_to_the_last_bit() -> None:
    assert WorkerReport.from_json(REPORT.to_json()) == REPORT


def test_a_message_cannot_be_changed_on_its_way() -> None:
    with pytest.raises(AttributeError):
        JOB.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "dance"}', "Loading model...\n{}"])
def test_what_is_no_message_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expect|Invalid"):
        Job.from_json(text)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "marker"
    path.write_bytes(bytes(Marker.SIZE))
    return path


def test_a_new_marker_is_at_no_variant(page: Path) -> None:
    Marker(page)
    assert Marker.read(page) == (-1, 0)


def test_a_marker_says_where_its_owner_was_at_any_moment(page: Path) -> None:
    marker = Marker(page)
    for place in [(0, 0), (2, 7), (1, 123_456_789_012)]:
        marker.at(*place)
        assert Marker.read(page) == place
        assert marker.batch == place[1]
