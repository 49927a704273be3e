"""Which modes an audit's findings leave safe, and which of them is the leanest."""

from __future__ import annotations

import pytest

from gradrun.core.grad_mode import GradMode
from gradrun.results.result import AuditResult
from gradrun.results.safety import errors_in, has_errors, lowest_memory_safe_mode, verdict
from tests.report.test_audit_report import GRAD, INFERENCE, NO_GRAD, audit, finding, in_mode

MIB = 1024**2


def best(result: AuditResult) -> str | None:
    chosen = lowest_memory_safe_mode(result)
    return None if chosen is None else chosen.mode.value


def test_of_modes_that_need_the_same_memory_inference_mode_has_the_least_overhead() -> None:
    assert best(audit()) == "inference_mode"
    assert best(audit(measurements=(GRAD, NO_GRAD))) == "no_grad"


def test_the_least_peak_is_leanest() -> None:
    fat = in_mode("inference_mode", forward_peak=4 * MIB, retained=MIB)
    assert best(audit(measurements=(GRAD, NO_GRAD, fat))) == "no_grad"


def test_of_equal_peaks_what_is_retained_decides() -> None:
    holding = in_mode("inference_mode", forward_peak=3 * MIB, retained=2 * MIB)
    assert best(audit(measurements=(GRAD, NO_GRAD, holding))) == "no_grad"


def test_without_a_meter_the_overhead_alone_decides() -> None:
    unknown = tuple(in_mode(m, forward_peak=None, retained=None) for m in ("grad", "no_grad"))
    assert best(audit(measurements=unknown)) == "no_grad"
    assert verdict(audit(measurements=unknown)) == "Run it in no_grad: the leanest safe mode."


def test_an_error_makes_its_modes_unsafe_and_no_others() -> None:
    result = audit(findings=(finding("error", modes=("inference_mode",)),))
    assert [len(errors_in(result, mode)) for mode in GradMode] == [0, 0, 1]
    assert best(result) == "no_grad"
    assert verdict(result).endswith("Not in inference_mode: 1 error.")


def test_an_error_that_names_no_mode_counts_for_all() -> None:
    result = audit(findings=(finding("error", modes=()),))
    assert best(result) is None
    assert verdict(result) == "No mode is safe: mend the 1 error first."


@pytest.mark.parametrize(("severity", "fails"), [("error", True), ("warning", False)])
def test_only_an_error_fails_an_audit(severity: str, fails: bool) -> None:
    result = audit(findings=(finding(severity),))
    assert has_errors(result) is fails
    assert best(result) == ("no_grad" if fails else "inference_mode")
    assert not has_errors(audit())


def test_what_the_mode_saves_is_told_in_bytes() -> None:
    assert verdict(audit()) == (
        "Run it in inference_mode: the leanest safe mode, with a forward peak of 3.00 MiB where "
        "grad takes 9.00 MiB."
    )
    same = tuple(in_mode(m, forward_peak=MIB, retained=0) for m in ("grad", "inference_mode"))
    assert "though grad's forward peak is the same 1.00 MiB" in verdict(audit(measurements=same))
    assert verdict(audit(measurements=(INFERENCE,))).endswith("safe mode.")
