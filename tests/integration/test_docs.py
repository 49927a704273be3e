"""The pages in docs/ are true: every block runs, and prints or raises what the page shows.

A page's blocks run from top to bottom in one namespace and one folder. One that begins with a
file's name in a comment is saved there too.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from gradrun.modes import assert_restored
from tests.conftest import ROOT, Command
from tests.support.actionlint import actionlint, needs_actionlint

PAGE = ROOT / "docs" / "modes.md"
HOME = "/home/me"  # stands for the folder that commands run in


class Block(NamedTuple):
    language: str
    code: str
    line: int


def blocks_of(text: str) -> list[Block]:
    fenced = re.finditer(r"^```(.*)\n((?s:.*?))^```$", text, re.MULTILINE)
    return [Block(f[1], f[2], text.count("\n", 0, f.start(2)) + 1) for f in fenced]


def run_block(block: Block, names: dict[str, Any], command: Command) -> None:
    """Run a block, save it or both.

    Raises:
        AssertionError: it does not do what it shows, or is of a kind that is not run.
    """
    file = re.match(r"# (\S+\.\w+)\n", block.code)
    if file:
        Path(file[1]).write_text(block.code)
    if block.language == "python":
        run_python(block, names)
    elif block.language == "console":
        run_console(block, command)
    else:
        assert file, (
            f"line {block.line}: nobody runs a block of {block.language or 'no language'!r}"
        )


def run_python(block: Block, names: dict[str, Any]) -> None:
    # The lines before it make tracebacks point into the page.
    code = compile("\n" * (block.line - 1) + block.code, PAGE, "exec")
    printed, raised = io.StringIO(), ""
    try:
        with assert_restored(), contextlib.redirect_stdout(printed):
            exec(code, names)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}".splitlines()[0]
        if "# raises " not in block.code:
            raise
    shown = re.findall(r"# -> (.*)", block.code)
    assert printed.getvalue().splitlines() == shown, f"line {block.line}"
    expected = re.search(r"# raises (.*?)(\.\.\.)?\n\Z", block.code)
    if expected is None:
        assert not raised, f"line {block.line}: '# raises' is a block's last line"
    else:
        assert raised.startswith(expected[1]), f"line {block.line}"
        assert expected[2] or raised == expected[1], f"line {block.line}"


def run_console(block: Block, command: Command) -> None:
    """Lines may be broken anew on a page, and so blanks are not compared."""
    typed, _, shown = block.code.partition("\n")
    prompt, program, *words = shlex.split(typed)
    assert (prompt, program) == ("$", "gradrun"), f"line {block.line}"
    text = command(*words).text.replace(str(Path.cwd()), HOME)
    assert text.split() == shown.split(), f"line {block.line}"


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_the_page_does_what_it_shows(empty_folder: Path, cli: Command) -> None:
    names: dict[str, Any] = {"__name__": "docs.modes"}
    blocks = blocks_of(PAGE.read_text())
    assert len(blocks) * 2 == PAGE.read_text().count("```") > 40, "no block is overlooked"
    for block in blocks:
        run_block(block, names, cli)


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
        "```yaml\na: 1\n```\n",
        "```console\n$ ls\n```\n",
        "```console\n$ gradrun --version\ngradrun 0.0.0\n```\n",
    ],
)
def test_a_block_that_is_not_run_or_shows_what_is_not_so_fails(
    empty_folder: Path, cli: Command, text: str
) -> None:
    (block,) = blocks_of(text)
    with pytest.raises(AssertionError):
        run_block(block, {}, cli)


def test_what_a_block_raises_unannounced_comes_out(empty_folder: Path, cli: Command) -> None:
    (block,) = blocks_of("```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError):
        run_block(block, {}, cli)


def test_the_page_for_ci_is_true(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """Its config checks, its test file passes in pytest, and its YAML is what the tools take."""
    monkeypatch.setenv("GRADRUN_TRUST_CODE", "1")
    blocks = {
        block.code.partition("\n")[0].removeprefix("# "): block
        for block in blocks_of((ROOT / "docs" / "ci.md").read_text())
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
    quick = "measure: {processes: 2, budget: 2, precision: 0.5}\n"
    # Without the limit on a ratio, which two processes on a busy machine cannot decide.
    limits = "".join(line for line in config.splitlines(True) if "speedup_over" not in line)
    Path("gradrun.yaml").write_text(limits + quick)
    answer = cli("check", "gradrun.yaml", "--update-expected")
    assert answer.code == 0, answer.text
    Path("test_model.py").write_text(blocks["test_model.py"].code)
    words = [sys.executable, "-m", "pytest", "-q", "test_model.py"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr

    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    workflow = yaml.safe_load(blocks[".github/workflows/model.yml"].code)
    steps = workflow["jobs"]["check"]["steps"]
    (ours,) = [step for step in steps if step.get("uses", "").startswith("gradrun/")]
    assert ours["with"].keys() <= inputs.keys()
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    asked = yaml.safe_load(blocks[".pre-commit-config.yaml"].code)["repos"][0]["hooks"]
    assert [wanted["id"] for wanted in asked] == [hook["id"]]
    assert re.search(hook["files"], "a/gradrun.yaml")
    assert not re.search(hook["files"], "a/docker.yaml")


def test_the_action_passes_every_input_on_and_none_as_text_of_a_script(tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    *_, step = action["runs"]["steps"]
    assert all("${{" not in step["run"] for step in action["runs"]["steps"] if "run" in step)
    told = tmp_path / "told"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\n')
    python.chmod(0o755)
    values = {
        "config": "my config.yaml", "against": "origin/main; touch x", "baseline": "",
        "junit": "out.xml", "inconclusive": "fail", "args": "--trust-code --quiet",
    }  # fmt: skip
    names = {name: re.search(r"inputs\.([\w-]+)", text)[1] for name, text in step["env"].items()}  # type: ignore[index]
    environment = {name: values[wanted] for name, wanted in names.items()}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euo", "pipefail", "-c", step["run"]], env=environment, check=True)
    assert told.read_text().splitlines() == [
        *("-m", "gradrun", "check", "my config.yaml", "--against", "origin/main; touch x"),
        *("--junit", "out.xml", "--inconclusive", "fail", "--trust-code", "--quiet"),
    ]


@needs_actionlint
@pytest.mark.parametrize(("change", "faults"), [("", 0), ("github.base_ref", 1)])
def test_actionlint_finds_only_the_planted_error_in_the_workflow_of_the_page(change, faults):
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    (workflow,) = [block.code for block in blocks_of(page) if "workflows/" in block.code]
    planted = workflow.replace(change, "github.nowhere") if change else workflow
    assert len(actionlint(planted)) == faults
