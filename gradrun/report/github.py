"""A check on GitHub Actions: an annotation at the config's line for what did not pass.

Knows the workflow commands of GitHub's runner ("Workflow commands for GitHub Actions" in its
documentation) and its escapes; the step summary is reports/markdown.py's text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from gradrun.report.escaping import escape_control_chars
from gradrun.results.result import CheckResult, Outcome


def commands(result: CheckResult) -> Iterator[str]:
    """One line for the runner to read for each outcome that is not a pass."""
    for outcome in result.outcomes:
        if outcome.status != "pass":
            yield _annotation(outcome)


def _annotation(outcome: Outcome) -> str:
    kind = "error" if outcome.status == "fail" else "warning"
    places = {"title": f"gradrun: {outcome.check}"}
    file, line = _place(outcome.source)
    if file:
        places = {"file": _in_repository(file), "line": line, **places}
    said = f"{outcome.reason} (allowed: {outcome.limit}; found: {outcome.value})"
    return _command(kind, places, said)


def refusal(said: str) -> str:
    """The line for a check that could not begin: what was said, at the place that it names."""
    places = {"title": "gradrun"}
    if found := re.match(r"(.+?):(\d+):\d+  ", said):
        places = {"file": _in_repository(found[1]), "line": found[2], **places}
    return _command("error", places, said)


def _command(kind: str, places: dict[str, str], said: str) -> str:
    where = ",".join(f"{key}={_property(value)}" for key, value in places.items())
    return f"::{kind} {where}::{_data(said)}"


def _in_repository(file: str) -> str:
    """A path as GitHub knows it, wherever in the checkout the command runs."""
    return os.path.relpath(file, os.environ.get("GITHUB_WORKSPACE") or None)


def _place(source: str | None) -> tuple[str, str]:
    """`"gradrun.yaml:12:3"` as file and line; empty where it is no place in a file."""
    parts = (source or "").rsplit(":", 2)
    if len(parts) < 3 or parts[0].startswith("--"):
        return "", ""
    return parts[0], parts[1]


def _data(text: str) -> str:
    return escape_control_chars(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
