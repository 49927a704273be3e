"""JUnit XML of checks."""

from __future__ import annotations

from xml.etree import ElementTree

import xmlschema

from gradrun.report import junit
from tests.conftest import ROOT
from tests.support.reporting import EVIL
from tests.support.saved_results import FAILED, INCONCLUSIVE, PASSED, check


def test_junit_conforms_to_the_schema_and_counts_statuses():
    evil = FAILED.replace(check=f"<&\"'{EVIL}", reason=f"]]>{EVIL}\x00")
    text = junit.render(check(PASSED, FAILED, INCONCLUSIVE, evil))
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


def test_the_schema_rejects_invalid_documents():
    schema = xmlschema.XMLSchema(ROOT / "tests" / "junit.xsd")
    good = junit.render(check(FAILED))
    for wrong in (
        good.replace("testcase", "case"),
        good.replace(' tests="1"', ""),
        good.replace(' name="forward peak"', ""),
        good.replace('failures="1"', 'failures="one"'),
    ):
        assert wrong != good
        assert not schema.is_valid(wrong)
