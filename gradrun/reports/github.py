"""A check on GitHub Actions: an annotation at the config's line for what did not pass.

Knows the workflow commands of GitHub's runner ("Workflow commands for GitHub Actions" in its
documentation) and its escapes; the step summary is reports/markdown.py's text.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradrun.reports.printable import printable
from gradrun.reports.terminal import nearest
from gradrun.result import Outcome, RunResult


def commands(result: RunResult) -> Iterator[str]:
    """One line for the runner to read for each outcome that is not a pass."""
    for outcome in result.outcomes:
        if outcome.status != "pass":
            yield _annotation(outcome)


def _annotation(outcome: Outcome) -> str:
    kind = "error" if outcome.status == "fail" else "warning"
    places = {"title": f"gradrun: {outcome.check}"}
    file, line = _place(outcome.source)
    if file:
        places = {"file": nearest(file), "line": line, **places}
    said = f"{outcome.reason} (allowed: {outcome.limit}; found: {outcome.value})"
    where = ",".join(f"{key}={_property(value)}" for key, value in places.items())
    return f"::{kind} {where}::{_data(said)}"


def _place(source: str | None) -> tuple[str, str]:
    """`"gradrun.yaml:12:3"` as file and line; empty where it is no place in a file."""
    parts = (source or "").rsplit(":", 2)
    if len(parts) < 3 or parts[0].startswith("--"):
        return "", ""
    return parts[0], parts[1]


def _data(text: str) -> str:
    return printable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
