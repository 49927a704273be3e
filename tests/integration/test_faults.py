"""Every call to the disk may fail, be cut off or be the last: what remains is true and goes on.

The engine is tests/soak/faults.py, which `make soak` lets try every call.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.soak import faults

STRIDE = 11
"""One call in so many, in an order drawn by lot."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


@pytest.mark.parametrize("form", faults.FORMATS)
def test_whatever_befalls_a_run_its_journal_is_true_and_a_resume_ends_it(
    tmp_path: Path, form: str
) -> None:
    with faults.commits_at_every_batch():
        trial = faults.VariantMeasurement(form, tmp_path.resolve())
        met = set()
        for fault, at, which, name in faults.cases(trial, STRIDE, seed=0):
            try:
                trial.check(fault, at, which)
            except Exception as error:
                pytest.fail(f"call {at} of {which} ({name}), {fault}: {error!r}")
            met.add((fault, which))
    assert len(met) == len(faults.FAULTS) * len(trial.before)


def test_the_calls_it_lets_fail_are_those_that_a_run_makes(tmp_path: Path) -> None:
    met: set[str] = set()
    with faults.commits_at_every_batch():
        for form in faults.FORMATS:
            trial = faults.VariantMeasurement(form, tmp_path.resolve() / form)
            met.update(*map(trial.calls, trial.before))
    assert met == {*faults.CALLS}
