"""A check as JUnit XML, which CI servers read: one test case a check.

Knows the format that Jenkins and GitLab take (its schema is in tests/data/junit-10.xsd); JUnit has
no word for inconclusive, so that is a skipped test with its reason.
"""

from __future__ import annotations

from datetime import UTC, datetime
from xml.etree import ElementTree

from gradrun.report.escaping import escape_control_chars
from gradrun.report.wording import model_name
from gradrun.results.result import CheckResult, Outcome


def xml(result: CheckResult) -> str:
    """The document."""
    outcomes = result.outcomes
    count = [outcome.status for outcome in outcomes].count
    name = _clean(model_name(result))
    suites, suite = _suite(
        name,
        result.started_at,
        tests=len(outcomes),
        failures=count("fail"),
        skipped=count("inconclusive"),
    )
    for outcome in outcomes:
        _case(suite, outcome, name)
    return _text(suites)


def refusal(said: str) -> str:
    """The document of a check that could not begin: one test case, in error."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    suites, suite = _suite("gradrun", now, tests=1, errors=1)
    case = ElementTree.SubElement(suite, "testcase", name="runs", classname="gradrun", time="0")
    error = ElementTree.SubElement(case, "error", message=_clean(said.partition("\n")[0]))
    error.set("type", "error")
    error.text = _clean(said)
    return _text(suites)


def _suite(
    name: str, started_at: str, *, tests: int, failures: int = 0, errors: int = 0, skipped: int = 0
) -> tuple[ElementTree.Element, ElementTree.Element]:
    """A document, and its one suite to be filled."""
    suites = ElementTree.Element("testsuites", name="gradrun check")
    suite = ElementTree.SubElement(
        suites,
        "testsuite",
        name=name,
        tests=str(tests),
        failures=str(failures),
        errors=str(errors),
        skipped=str(skipped),
        time="0",
        timestamp=started_at.partition("+")[0],
    )
    return suites, suite


def _text(suites: ElementTree.Element) -> str:
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, outcome: Outcome, model: str) -> None:
    name = _clean(outcome.check)
    case = ElementTree.SubElement(suite, "testcase", name=name, classname=f"gradrun.{model}")
    case.set("time", "0")
    allowed = f"{outcome.limit}; found {outcome.value}"
    if outcome.status == "fail":
        failure = ElementTree.SubElement(case, "failure", message=_clean(outcome.reason))
        failure.set("type", "limit")
        failure.text = _clean(f"allowed: {allowed}\n{outcome.source or ''}".strip())
    elif outcome.status == "inconclusive":
        said = f"inconclusive: {outcome.reason} (allowed: {allowed})"
        ElementTree.SubElement(case, "skipped", message=_clean(said))
    else:
        ElementTree.SubElement(case, "system-out").text = _clean(f"allowed: {allowed}")


def _clean(text: str) -> str:
    """Without the characters that XML 1.0 has no way to hold."""
    return escape_control_chars(text)
