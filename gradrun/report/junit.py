"""The outcomes of a check as JUnit XML, in the schema that Jenkins and GitLab accept.

JUnit has no status for inconclusive: the test case is skipped, and its message has the reason.
"""

from __future__ import annotations

from datetime import UTC, datetime
from xml.etree import ElementTree

from gradrun.report.escaping import escape_control_chars
from gradrun.results.result import CheckResult, Outcome


def render(result: CheckResult) -> str:
    """Write one test case per check."""
    name = result.info.model
    statuses = [outcome.status for outcome in result.outcomes]
    counts = {"failures": statuses.count("fail"), "skipped": statuses.count("inconclusive")}
    suites, suite = _suite(name, result.started_at, tests=len(statuses), **counts)
    for outcome in result.outcomes:
        _add_case(suite, outcome, name)
    return _to_xml(suites)


def render_error(message: str) -> str:
    """Write the document of a check that could not start: one test case with an error."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    suites, suite = _suite("gradrun", now, tests=1, errors=1)
    case = ElementTree.SubElement(suite, "testcase", name="runs", classname="gradrun", time="0")
    text = escape_control_chars(message)
    error = ElementTree.SubElement(case, "error", message=text.partition("\n")[0], type="error")
    error.text = text
    return _to_xml(suites)


def _suite(
    name: str, started_at: str, **counts: int
) -> tuple[ElementTree.Element, ElementTree.Element]:
    suites = ElementTree.Element("testsuites", name="gradrun check")
    suite = ElementTree.SubElement(suites, "testsuite", name=escape_control_chars(name), time="0")
    for key in ("tests", "failures", "errors", "skipped"):
        suite.set(key, str(counts.get(key, 0)))
    suite.set("timestamp", escape_control_chars(started_at.partition("+")[0]))
    return suites, suite


def _to_xml(suites: ElementTree.Element) -> str:
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: ElementTree.Element, outcome: Outcome, model: str) -> None:
    name, class_name = escape_control_chars(outcome.check), escape_control_chars(f"gradrun.{model}")
    case = ElementTree.SubElement(suite, "testcase", name=name, classname=class_name, time="0")
    reason = escape_control_chars(outcome.reason)
    figures = escape_control_chars(f"limit: {outcome.limit}; value: {outcome.value}")
    if outcome.status == "fail":
        failure = ElementTree.SubElement(case, "failure", message=reason, type="limit")
        failure.text = "\n".join(
            filter(None, (figures, escape_control_chars(outcome.source or "")))
        )
    elif outcome.status == "inconclusive":
        message = f"inconclusive: {reason} ({figures})"
        ElementTree.SubElement(case, "skipped", message=message)
    else:
        ElementTree.SubElement(case, "system-out").text = figures
