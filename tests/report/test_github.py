"""Annotations of GitHub Actions for checks."""

from __future__ import annotations

from gradrun.report import github
from tests.support.saved_results import FAILED, INCONCLUSIVE, PASSED, check


def test_outcomes_are_annotated_at_the_line_of_their_limit():
    lines = [*github.annotate(check(PASSED, FAILED, INCONCLUSIVE))]
    assert lines == [
        "::error file=configs/digits.yaml,line=24,title=gradrun%3A forward peak::"
        "4.50 KiB above the limit (66,048 bytes) (limit: at most 60.00 KiB; value: 64.50 KiB)",
        "::warning title=gradrun%3A time vs origin/main::the confidence interval includes the "
        "limit; reduce load on the machine or raise measure.budget or measure.processes "
        "(limit: at most +5%25; value: +4.8%25 (+3.1%25 to +6.5%25))",
    ]


def test_text_cannot_start_a_workflow_command():
    evil = FAILED.replace(check="a,line=9::b\n::error::c", reason="x\r\n::set-output name=a::b\x1b")
    (line,) = github.annotate(check(evil))
    assert "\n" not in line
    assert "\r" not in line
    assert "\x1b" not in line
    assert line.startswith("::error file=configs/digits.yaml,line=24,title=gradrun%3A a%2Cline=9")
    assert line.count("::") == 4, "the command's own two, and two in the text of its message"
