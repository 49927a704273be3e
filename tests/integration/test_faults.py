"""Inject faults into calls to the disk: the journal stays correct and the run can be resumed.

Uses tests/soak/faults.py on a sample of the calls; `make soak` tries all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.soak import faults

STRIDE = 36
"""Try one of this many calls, in a random order."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.mark.parametrize("form", faults.FORMATS)
def test_after_any_fault_the_journal_is_correct_and_a_resume_completes_the_run(
    tmp_path: Path, form: str
) -> None:
    with faults.commits_at_every_batch():
        run = faults.FaultyRun(form, tmp_path.resolve())
        met = set()
        for fault, at, which, name in faults.cases(run, STRIDE, seed=0):
            try:
                run.check(fault, at, which)
            except Exception as error:
                pytest.fail(f"call {at} of {which} ({name}), {fault}: {error!r}")
            met.add((fault, which))
    assert len(met) == len(faults.FAULTS) * len(run.before)


def test_faults_are_injected_into_every_call_that_a_run_makes(tmp_path: Path) -> None:
    met: set[str] = set()
    with faults.commits_at_every_batch():
        for form in faults.FORMATS:
            run = faults.FaultyRun(form, tmp_path.resolve() / form)
            met.update(*map(run.calls, run.before))
    assert met == {*faults.CALLS}
