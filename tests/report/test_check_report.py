"""A check in the terminal, as JUnit XML and as GitHub's workflow commands."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import xmlschema

from gradrun.report import github, junit
from gradrun.results.result import CheckResult, Outcome, Warning
from tests.conftest import ROOT
from tests.support.reporting import EVIL, assert_golden, printed, show, without_style
from tests.support.run_results import run_result

PASSED = Outcome(
    check="model runs", limit="no error", value="125 batches", status="pass", key="check.smoke"
)
FAILED = Outcome(
    check="forward peak",
    limit="at most 60.00 KiB",
    value="64.50 KiB",
    status="fail",
    reason="4.50 KiB above the limit (66,048 bytes)",
    key="check.limits.forward_peak",
    source="configs/digits.yaml:24:19",
)
UNCLEAR = Outcome(
    check="time vs origin/main",
    limit="at most +5%",
    value="+4.8% (+3.1% to +6.5%)",
    status="inconclusive",
    reason="the confidence interval includes the limit; reduce load on the machine or raise "
    "measure.budget or measure.processes",
    key="check.regression.time",
)


def result(*outcomes: Outcome, **changes) -> CheckResult:
    return run_result(cls=CheckResult, outcomes=outcomes, **changes)


CASES = {
    "passed": result(PASSED),
    "mixed": result(
        PASSED, FAILED, UNCLEAR, warnings=(Warning(code="noisy_machine", text="busy"),)
    ),
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", CASES)
def test_a_check_matches_its_golden_file(name, width):
    text = printed(show, CASES[name], width)
    assert_golden(f"check {name} {width}", text)
    assert max(map(len, text.splitlines())) <= width


def test_no_name_drives_the_terminal():
    evil = FAILED.replace(check=EVIL, limit=EVIL, value=EVIL, reason=EVIL)
    text = without_style(printed(show, result(evil), 120, terminal=True))
    assert "[bold red]" in text
    assert not any(char in text for char in "\x1b\x07\x9b\u202e")


def test_junit_keeps_to_the_schema_and_counts_right():
    evil = FAILED.replace(check=f"<&\"'{EVIL}", reason=f"]]>{EVIL}\x00")
    text = junit.render(result(PASSED, FAILED, UNCLEAR, evil))
    xmlschema.XMLSchema(ROOT / "tests" / "junit.xsd").validate(text)
    suite = ElementTree.fromstring(text.encode()).find("testsuite")
    assert suite is not None
    counts = {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "4", "failures": "2", "errors": "0", "skipped": "1"}
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.get("message") == FAILED.reason
    assert "configs/digits.yaml:24:19" in (failure.text or "")
    assert "includes the limit" in (suite.find("testcase/skipped").get("message") or "")


def test_the_schema_rejects_invalid_junit():
    schema = xmlschema.XMLSchema(ROOT / "tests" / "junit.xsd")
    good = junit.render(result(FAILED))
    for wrong in (
        good.replace("testcase", "case"),
        good.replace(' tests="1"', ""),
        good.replace(' name="forward peak"', ""),
        good.replace('failures="1"', 'failures="one"'),
    ):
        assert wrong != good
        assert not schema.is_valid(wrong)


def test_github_annotations_have_the_line_of_the_check():
    lines = [*github.annotate(result(PASSED, FAILED, UNCLEAR))]
    assert lines == [
        "::error file=configs/digits.yaml,line=24,title=gradrun%3A forward peak::"
        "4.50 KiB above the limit (66,048 bytes) (allowed: at most 60.00 KiB; found: 64.50 KiB)",
        "::warning title=gradrun%3A time vs origin/main::the confidence interval includes the "
        "limit; reduce load on the machine or raise measure.budget or measure.processes "
        "(allowed: at most +5%25; found: +4.8%25 (+3.1%25 to +6.5%25))",
    ]


def test_no_text_is_a_command_of_its_own():
    evil = FAILED.replace(check="a,line=9::b\n::error::c", reason="x\r\n::set-output name=a::b\x1b")
    (line,) = github.annotate(result(evil))
    assert "\n" not in line
    assert "\r" not in line
    assert "\x1b" not in line
    assert line.startswith("::error file=configs/digits.yaml,line=24,title=gradrun%3A a%2Cline=9")
    assert line.count("::") == 4, "the command's own two, and two in the text of its message"
