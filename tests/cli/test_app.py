"""Start of the command line: imports, help and invalid words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradrun import __version__
from tests.conftest import ROOT
from tests.support.run_results import run_result

COMMANDS = [
    "infer", "compare", "modes", "audit", "check", "verify", "report", "validate", "init", "schema",
]  # fmt: skip


LOADED = """
import sys
from gradrun.cli.app import main
sys.argv = ["gradrun", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "pydantic", "numpy", "safetensors", "yaml", "gradrun.config.schema"}
    print("LOADED", sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""


def loaded(*words: str) -> set[str]:
    """Return the heavy modules that a successful command imports."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return set(re.findall(r"'(\S+)'", done.stderr.rpartition("LOADED")[2]))


HELPS = [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS)]


@pytest.mark.parametrize("words", HELPS)
def test_help_loads_neither_torch_nor_pydantic(words):
    assert not loaded(*words)


def test_summaries_of_commands_fit_into_80_columns(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "..." not in cli("--help").out.partition("Commands:")[2]


@pytest.mark.parametrize("words", ["", "--format csv", "--format=json -q", "-o r.md"])
def test_a_report_loads_neither_torch_nor_pydantic(words):
    run_result().save(Path("result.json"))
    assert not loaded("report", *words.split(), "result.json")


@pytest.mark.parametrize("words", [["validate", "c.yaml"], ["schema"], ["init"]])
def test_commands_that_run_nothing_load_no_torch(words):
    assert not loaded(*words) & {"torch", "numpy", "safetensors"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli, command):
    answer = cli(command, "-h")
    assert answer.code == 0
    assert f"gradrun {command}" in answer.out
    assert "--help" in answer.out


def test_version_option_prints_the_version(cli):
    assert cli("--version").out == f"gradrun {__version__}\n"


def test_the_module_runs_the_command(process):
    assert process("--version").out == f"gradrun {__version__}\n"


@pytest.mark.parametrize("words", [[], ["infr"], ["infer", "--nope"], ["infer", "a", "b"]])
def test_an_invalid_command_line_exits_with_2(cli, words):
    answer = cli(*words)
    assert answer.code == 2
    assert "Traceback" not in answer.text
