"""README.md and the pages in docs/: code runs and prints what the page shows, commands exist.

The blocks of a page run from top to bottom in one namespace and one folder, which contains the
bundled examples. A block that begins with a file name in a comment is saved there, too.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import typer.main
import yaml

from gradrun.cli.app import app
from gradrun.config.schema import RunConfig
from gradrun.modes import assert_restored
from tests.conftest import ROOT, Command
from tests.support.actionlint import actionlint, needs_actionlint
from tests.support.forked import forked_children
from tests.support.workers import in_process_workers
from tools.docs_examples import Block, blocks_of, clean, pages, prepare

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages() if page.parent.name != "adr"}
SLOW = {"README.md", "docs/compare.md"}
CHECKS = ROOT / "docs" / "checks.md"

OTHER_PROGRAMS = {"git", "pipx", "pre-commit", "python"}
"""Programs whose arguments are not checked."""

QUICK = {"processes": 2, "budget": 2.0, "precision": 0.5}
"""`measure` of the configs that pages show, so that comparisons are short."""

BASE = {
    "model": {"source": "layers", "layers": [{"Linear": [4, 2]}]},
    "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 8},
    "output": {"path": "runs/base"},
}
"""Completes a YAML block that shows some sections only."""


def run_block(block: Block, names: dict[str, Any], page: str, command: Command) -> None:
    """Run a block, save it or both.

    Raises:
        AssertionError: the block does not do what the page shows, or has an unknown language.
    """
    file = re.match(r"# (\S+\.\w+)\n", block.code)
    if file and not file[1].startswith("."):
        Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(file[1]).write_text(block.code)
    if block.language == "python":
        if not (file and file[1].startswith("test_")):
            run_python(block, names)
    elif block.language == "console":
        run_console(block, page, command)
    elif block.language == "yaml":
        if not (file and file[1].startswith(".")):
            check_config(block, file[1] if file else "")
    elif block.language == "sh":
        for line in block.code.splitlines():
            check_command(shlex.split(line, comments=True))
    else:
        assert block.language == "text", f"line {block.line}: unknown language {block.language!r}"


def run_python(block: Block, names: dict[str, Any]) -> None:
    # The lines before it make tracebacks point into the page.
    code = compile("\n" * (block.line - 1) + block.code, names["__name__"], "exec")
    printed, raised = io.StringIO(), ""
    try:
        with assert_restored(), contextlib.redirect_stdout(printed):
            exec(code, names)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}".splitlines()[0]
        if "# raises " not in block.code:
            raise
    shown = re.findall(r"# -> (.*)", block.code)
    if shown or names["__name__"] != "README.md":
        assert printed.getvalue().splitlines() == shown, f"line {block.line}"
    expected = re.search(r"# raises (.*?)(\.\.\.)?\n\Z", block.code)
    if expected is None:
        assert not raised, f"line {block.line}: '# raises' is the last line of a block"
    else:
        assert raised.startswith(expected[1]), f"line {block.line}"
        assert expected[2] or raised == expected[1], f"line {block.line}"


def run_console(block: Block, page: str, command: Command) -> None:
    """Check the command and, for a `checked` block, its output up to line breaks."""
    typed, _, shown = block.code.partition("\n")
    prompt, *words = shlex.split(typed)
    assert prompt == "$", f"line {block.line}"
    check_command(words)
    if block.kind == "recorded":
        return
    assert block.kind == "checked", f"line {block.line}: a console block is recorded or checked"
    folder = Path("scenario", str(block.line)).absolute()
    folder.mkdir(parents=True)
    prepare(block.scenario, folder, page)
    with contextlib.chdir(folder):
        answer = command(*words[1:])
    assert clean(answer.text, folder).split() == shown.split(), f"line {block.line}"


def check_config(block: Block, name: str) -> None:
    """Validate a config, or some sections of one; files need not exist."""
    shown = yaml.safe_load(block.code)
    RunConfig.model_validate(BASE | shown, strict=False)
    if name:
        quick = "" if "measure" in shown else yaml.safe_dump({"measure": QUICK})
        Path(name).write_text(block.code + quick)


def check_command(words: list[str]) -> None:
    """Parse a command line without running it; of a pipeline, the commands of gradrun."""
    if not words:
        return
    if "|" in words:
        parts = [[*part] for pipe, part in groupby(words, "|".__eq__) if not pipe]
        own = [part for part in parts if part[0] == "gradrun"]
        assert own, words
        for part in own:
            check_command(part)
        return
    program, *arguments = words
    if program == "gradrun" and arguments[0].startswith("-"):
        return
    if program == "gradrun":
        commands: Any = typer.main.get_command(app)
        name, *rest = arguments
        before = rest[: rest.index(">")] if ">" in rest else rest
        commands.commands[name].make_context(name, before).close()
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {*arguments} <= {*targets}, words
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for listed in re.findall(r"gradrun\[(.*)\]", arguments[-1]):
            assert {*listed.split(",")} <= extras["optional-dependencies"].keys(), words
    else:
        assert program in OTHER_PROGRAMS, words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADRUN_TRUST_CODE", raising=False)
    return tmp_path


def write_model() -> None:
    """The files that the config in README.md names."""
    Path("nets").mkdir(exist_ok=True)
    Path("nets/mine.py").write_text("from torch import nn\n\nNet = nn.Linear(16, 4)\n")
    weights = {"weight": torch.ones(4, 16), "bias": torch.zeros(4)}
    safetensors.torch.save_file(weights, "mine.safetensors")
    np.save("inputs.npy", np.ones((128, 16), np.float32))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PAGES]
)
def test_the_code_blocks_of_a_page_have_the_shown_results(
    folder: Path, cli: Command, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = PAGES[name].read_text(encoding="utf-8")
    blocks = blocks_of(text)
    assert len(blocks) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE)), "no block is skipped"
    if any(block.language == "python" for block in blocks):
        prepare("examples", folder, text)
        write_model()
    names: dict[str, Any] = {"__name__": name}
    # The comparison of one page starts processes.
    with forked_children() if name == "README.md" else in_process_workers():
        for block in blocks:
            run_block(block, names, text, cli)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(1)  # -> 2\n```\n",
        "```python\nprint(1)\n```\n",
        "```python\n1  # -> 1\n```\n",
        "```python\n1 / 1\n# raises ZeroDivisionError: division by zero\n```\n",
        "```python\n1 / 0\n# raises ZeroDivisionError: division\n```\n",
        "```python\nimport torch\ntorch.set_grad_enabled(False)\n```\n",
        "```\nanything\n```\n",
        "```sh\nls\n```\n",
        "```sh\nmake tea\n```\n",
        "```sh\nls | wc -l\n```\n",
        "```sh\npip install 'gradrun[tea]'\n```\n",
        "```console\n$ ls\n```\n",
        "```console\n$ gradrun validate no.yaml\n```\n",
        "<!-- checked: typo -->\n```console\n$ gradrun validate digits.yaml\nvalid\n```\n",
    ],
)
def test_a_block_with_another_result_fails(folder: Path, cli: Command, text: str) -> None:
    (block,) = blocks_of(text)
    with pytest.raises(AssertionError):
        run_block(block, {"__name__": "page"}, text, cli)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```yaml\nmodel: {source: zoo, name: none}\n```\n", ValueError),
        ("```sh\ngradrun brew\n```\n", KeyError),
        ("```sh\nls | gradrun brew | jq .\n```\n", KeyError),
    ],
)
def test_errors_of_a_block_are_raised(
    folder: Path, cli: Command, text: str, error: type[Exception]
) -> None:
    (block,) = blocks_of(text)
    with pytest.raises(error):
        run_block(block, {"__name__": "page"}, text, cli)


def test_readme_and_contributing_are_short_and_their_links_lead_somewhere() -> None:
    for name, most in (("README.md", 150), ("CONTRIBUTING.md", 80)):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= most
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                generated = target in {"docs/contributing.md", "docs/changelog.md"}
                assert generated or (ROOT / target).exists(), target


# --- the site ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; `make docs` installs it")
    target = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(target)]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    loaded = r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(https?:)?//|url\((?:https?:)?//"
    sheets = r"<link\b[^>]*rel=\"(?:stylesheet|preconnect|preload|icon)\"[^>]*href=\"(?:https?:)?//"
    for page in [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(f"{loaded}|{sheets}", text), page


def test_the_reference_lists_every_command_and_every_section(site: Path) -> None:
    commands: Any = typer.main.get_command(app)
    page = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert all(f'id="gradrun-{name}"' in page for name in commands.commands)
    page = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in RunConfig.model_fields)


# --- architecture.md ---------------------------------------------------------------------------


def test_the_architecture_page_names_every_module_and_no_other() -> None:
    package = ROOT / "gradrun"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    known = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    named, unknown, folder = set[str](), set[str](), "."
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"##+ (\w+)", line):
            folder = heading[1]
        for name in re.findall(r"`([\w/]+\.py)`", line):
            places = [name, f"{folder}/{name}", name.removeprefix("gradrun/")]
            places += [f"{inner}{name}" for inner in re.findall(r"`([\w/]+/)`", line)]
            if found := modules.intersection(places):
                named |= found
            elif name not in known and "yours.py" not in name:
                unknown.add(name)
    assert unknown == set()
    assert {name for name in modules if not name.endswith("__.py")} - named == set()


# --- checks.md ---------------------------------------------------------------------------------


def test_the_page_about_checks_works_with_pytest_actions_and_pre_commit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    monkeypatch.setenv("GRADRUN_TRUST_CODE", "1")
    blocks = {
        block.code.partition("\n")[0].removeprefix("# "): block
        for block in blocks_of(CHECKS.read_text(encoding="utf-8"))
        if block.language in {"yaml", "python"}
    }
    assert [*blocks] == [
        "gradrun.yaml",
        ".github/workflows/model.yml",
        ".pre-commit-config.yaml",
        "test_model.py",
    ]
    Path("nets").mkdir()
    Path("nets/mine.py").write_text(
        "from torch import nn\n\nNet = nn.Sequential(nn.Linear(64, 4))\n"
    )
    config = blocks["gradrun.yaml"].code
    # Without the limit on a ratio, which two processes on a busy machine cannot decide.
    limits = "".join(line for line in config.splitlines(True) if "speedup_over" not in line)
    Path("gradrun.yaml").write_text(limits + yaml.safe_dump({"measure": QUICK}))
    with in_process_workers():
        answer = cli("check", "gradrun.yaml", "--update-expected")
    assert answer.code == 0, answer.text
    Path("test_model.py").write_text(blocks["test_model.py"].code)
    words = [sys.executable, "-m", "pytest", "-q", "test_model.py"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr

    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    workflow = yaml.safe_load(blocks[".github/workflows/model.yml"].code)
    steps = workflow["jobs"]["check"]["steps"]
    (used,) = [step for step in steps if step.get("uses", "").startswith("gradrun/")]
    assert used["with"].keys() <= inputs.keys()
    table = re.findall(r"^\| `([a-z-]+)` \|", CHECKS.read_text(encoding="utf-8"), re.MULTILINE)
    assert table == [*inputs], "the page lists every input of the action"
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    shown = yaml.safe_load(blocks[".pre-commit-config.yaml"].code)["repos"][0]["hooks"]
    assert [entry["id"] for entry in shown] == [hook["id"]]
    assert re.search(hook["files"], "a/gradrun.yaml")
    assert not re.search(hook["files"], "a/docker.yaml")


def test_the_action_passes_every_input_as_a_variable_and_none_as_script_text(
    tmp_path: Path,
) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    *_, step = action["runs"]["steps"]
    assert all("${{" not in step["run"] for step in action["runs"]["steps"] if "run" in step)
    passed = tmp_path / "passed"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {passed}\n')
    python.chmod(0o755)
    values = {
        "config": "my config.yaml", "against": "origin/main; touch x", "baseline": "",
        "junit": "out.xml", "inconclusive": "fail", "args": "--trust-code --quiet",
    }  # fmt: skip
    names = {name: re.search(r"inputs\.([\w-]+)", text)[1] for name, text in step["env"].items()}  # type: ignore[index]
    environment = {name: values[wanted] for name, wanted in names.items()}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euo", "pipefail", "-c", step["run"]], env=environment, check=True)
    assert passed.read_text().splitlines() == [
        *("-m", "gradrun", "check", "my config.yaml", "--against", "origin/main; touch x"),
        *("--junit", "out.xml", "--inconclusive", "fail", "--trust-code", "--quiet"),
    ]


@needs_actionlint
@pytest.mark.parametrize(("change", "errors"), [("", 0), ("github.base_ref", 1)])
def test_actionlint_finds_only_the_planted_error_in_the_workflow_of_the_page(change, errors):
    page = CHECKS.read_text(encoding="utf-8")
    (workflow,) = [block.code for block in blocks_of(page) if "workflows/" in block.code]
    planted = workflow.replace(change, "github.nowhere") if change else workflow
    assert len(actionlint(planted)) == errors


def test_the_page_about_checks_states_what_a_ci_lets_pass() -> None:
    page = (ROOT / "docs" / "checks.md").read_text(encoding="utf-8")
    assert "regression: {outputs: false}" in page
    assert "extras" in page
    assert "inconclusive" in page
