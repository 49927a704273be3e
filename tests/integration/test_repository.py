"""The repository's own files agree with each other: workflows, templates, pins and metadata."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.support.actionlint import actionlint, needs_actionlint

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@needs_actionlint
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actionlint_accepts_the_workflow(workflow: Path) -> None:
    assert actionlint(workflow.read_text()) == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_minimal_permissions_and_pinned_actions(workflow: Path) -> None:
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"}
    assert content["concurrency"]
    assert all(job["timeout-minutes"] for job in content["jobs"].values())
    for step in steps(workflow):
        if action := step.get("uses"):
            assert re.fullmatch(r"[\w./-]+@(v\d+|release/v1)", action)
            assert "checkout" not in action or step["with"]["persist-credentials"] is False
        # An expression in a script would be expanded to shell code.
        assert "${{" not in step.get("run", "")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_only_make_targets_that_exist(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for step in steps(workflow):
        if step.get("run", "").startswith("make "):
            words = step["run"].split()[1:]
            assert targets >= {word for word in words if "=" not in word}


def test_only_the_publishing_job_may_request_an_identity() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert jobs["publish"]["environment"]["name"] == "pypi"
    allowed = [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})]
    assert allowed == ["publish"]


def test_the_classifiers_name_the_python_versions_that_ci_tests() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    prefix = "Programming Language :: Python :: "
    versions = [name.removeprefix(prefix) for name in PROJECT["classifiers"] if "3." in name]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_the_oldest_constraints_are_the_lower_bounds() -> None:
    optional = PROJECT["optional-dependencies"]
    extras = [
        line
        for name in optional
        if name not in {"dev", "docs", "peers", "release"}
        for line in optional[name]
    ]
    wanted = [line.lower().partition(";")[0] for line in [*PROJECT["dependencies"], *extras]]
    bounds = dict(line.split(">=") for line in wanted)
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints-oldest.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert bounds.keys() == pins.keys() - {"torchvision"}
    for name, bound in bounds.items():
        assert f"{pins[name]}.".startswith(f"{bound}.")


def test_every_dependency_has_a_comment_with_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    lists = text[text.index("dependencies = [") : text.index("[project.urls]")]
    requirements = [line for line in lists.splitlines() if re.match(r'    "', line)]
    assert len(requirements) > 25
    assert all(re.search(r'", # \w', line) for line in requirements)


@pytest.mark.parametrize("form", ["bug.yml", "feature.yml"])
def test_an_issue_form_is_complete(form: str) -> None:
    content = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / form).read_text())
    assert {"name", "description", "labels", "body"} <= content.keys()
    identifiers = [field["id"] for field in content["body"]]
    assert len(identifiers) == len(set(identifiers))
    assert all(field["attributes"]["label"] for field in content["body"])
