"""The outcomes of a check as annotations of GitHub Actions, by the runner's workflow commands."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from gradrun.report.escaping import escape_control_chars
from gradrun.results.result import CheckResult


def annotate(result: CheckResult) -> Iterator[str]:
    """Yield one workflow command per outcome that is not a pass."""
    for outcome in result.outcomes:
        if outcome.status == "pass":
            continue
        level = "error" if outcome.status == "fail" else "warning"
        # A value set on the command line has no location in a file.
        location = re.fullmatch(r"(?!--)(.+):(\d+):\d+", outcome.source or "")
        message = f"{outcome.reason} (limit: {outcome.limit}; value: {outcome.value})"
        title = f"gradrun: {outcome.check}"
        yield _command(level, title, location and location.groups(), message)


def annotate_error(message: str) -> str:
    """Return the workflow command for a check that could not start, at the location it names."""
    location = re.match(r"(.+?):(\d+):\d+  ", message)
    return _command("error", "gradrun", location and location.groups(), message)


def _command(level: str, title: str, location: tuple[str, ...] | None, message: str) -> str:
    properties = {"title": title}
    if location:
        # GitHub expects paths relative to the checkout.
        file = os.path.relpath(location[0], os.environ.get("GITHUB_WORKSPACE") or None)
        properties = {"file": file, "line": location[1], **properties}
    where = ",".join(f"{key}={_escape_property(value)}" for key, value in properties.items())
    return f"::{level} {where}::{_escape_data(message)}"


def _escape_data(text: str) -> str:
    return escape_control_chars(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape_data(text).replace(":", "%3A").replace(",", "%2C")
