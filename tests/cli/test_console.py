"""Output of commands: JSON, --quiet, colors and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def test_json_writes_the_result_to_a_file(cli):
    answer = cli("infer", "c.yaml", "--json", "r.json")
    assert "Peak memory" in answer.out
    assert Path("r.json").read_text() == Path("out/result.json").read_text()


def test_json_dash_prints_only_json_to_stdout(cli):
    answer = cli("infer", "c.yaml", "--json", "-")
    assert json.loads(answer.out) == json.loads(Path("out/result.json").read_text())
    assert "Peak memory" in answer.err


def test_json_dash_prints_nothing_to_stdout_after_an_error(cli):
    answer = cli("infer", "c.yaml", "--json", "-", "--set", "run.mod=1")
    assert (answer.code, answer.out) == (2, "")


def test_an_unwritable_json_file_is_reported_before_the_run(cli):
    answer = cli("infer", "c.yaml", "--json", "no/r.json")
    assert answer.code == 2
    assert "--json no/r.json: folder no does not exist" in answer.err
    assert not Path("out").exists(), "reported before the run"


def test_quiet_prints_nothing(cli):
    answer = cli("infer", "c.yaml", "--quiet")
    assert (answer.code, answer.text) == (0, "")
    assert Path("out/predictions.npy").exists()


def test_quiet_prints_errors_and_writes_json(cli):
    answer = cli("infer", "c.yaml", "-q", "--json", "-")
    assert json.loads(answer.out)["kind"] == "infer"
    assert not answer.err
    assert cli("infer", "c.yaml", "-q").err.startswith("error: c.yaml:10:16  output.path: ")


@pytest.mark.parametrize(
    "settings", [{"NO_COLOR": "1"}, {"NO_COLOR": "1", "TERM": "xterm-256color"}]
)
def test_no_color_disables_colors_on_a_terminal(settings):
    assert "\x1b[3" not in on_a_terminal(settings)


def test_a_terminal_gets_colors():
    assert "\x1b[" in on_a_terminal({"TERM": "xterm-256color"})


def on_a_terminal(settings: dict[str, str]) -> str:
    """Return the output of `gradrun infer c.yaml --set run.mod=1` if stderr is a terminal."""
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    words = [sys.executable, "-m", "gradrun", "infer", "c.yaml", "--set", "run.mod=1"]
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM")}
    subprocess.run(
        words, stderr=child, env={**plain, "PYTHONPATH": str(ROOT), **settings}, check=False
    )
    os.close(child)
    output = os.read(parent, 65536).decode()
    os.close(parent)
    assert "unknown key" in output
    return output


def test_debug_shows_the_traceback(cli):
    with pytest.raises(Exception, match="unknown key"):
        cli("infer", "c.yaml", "--debug", "--set", "run.mod=1")
