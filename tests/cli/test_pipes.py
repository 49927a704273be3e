"""Standard input as data, and predictions on standard output, in real pipes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradrun.cli.pipes import PredictionStream
from tests.conftest import ROOT, Command

pytestmark = pytest.mark.slow
NET = """\
from torch import nn


class Double(nn.Module):
    def forward(self, x):
        print("a line of the model")
        return 2 * x
"""

CONFIG = """\
model: {source: python, target: net.py:Double}
data: {source: records, path: "-", inputs: {x: {columns: [a, b]}}, id: name, batch_size: 4}
run: {threads: 1}
output: {path: out}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("c.yaml").write_text(CONFIG)
    return tmp_path


def rows(count: int) -> str:
    return "".join(json.dumps({"name": f"n{i}", "a": i, "b": -i}) + "\n" for i in range(count))


def pipe(folder: Path, command: str, given: str) -> subprocess.CompletedProcess[str]:
    """Run a shell pipeline in which `gradrun` is the command of this checkout."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; gradrun() {{ "{sys.executable}" -m gradrun "$@"; }}; '
         f"{command}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        input=given,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_rows_of_stdin_become_lines_of_stdout(folder: Path, suffix: str) -> None:
    given = rows(10)
    if suffix == "csv":
        given = "name,a,b\n" + "".join(f"n{i},{i},{-i}\n" for i in range(10))
    done = pipe(folder, "gradrun infer c.yaml --trust-code --output - | cat", given)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [{"id": f"n{i}", "prediction": [2.0 * i, -2.0 * i]} for i in range(10)]
    assert "throughput" in done.stderr
    assert "a line of the model" in done.stderr
    assert "gradrun-" not in done.stderr, "the temporary folder is not shown"
    assert not (folder / "out").exists()


def test_a_reader_that_ends_early_ends_the_run_quietly(folder: Path) -> None:
    command = "gradrun infer c.yaml --trust-code --output - | head -n 1"
    done = pipe(folder, command, rows(100_000))
    assert done.stdout == '{"id": "n0", "prediction": [0.0, 0.0]}\n'
    assert done.returncode == 141
    assert "error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_short_write_loses_no_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unbuffered(io.BytesIO):
        """As the standard output with PYTHONUNBUFFERED, into a full pipe."""

        def write(self, data: Any) -> int:
            return super().write(data[:7])

    stdout = Unbuffered()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout))
    (tmp_path / "predictions.jsonl").write_text(rows(10) + "an incomplete line")
    PredictionStream(tmp_path).copy()
    assert stdout.getvalue().decode() == rows(10)


def test_csv_is_written_if_the_config_says_so(folder: Path) -> None:
    command = "gradrun infer c.yaml --trust-code --quiet --set output.format=csv -o -"
    done = pipe(folder, command, rows(2))
    assert done.stdout.splitlines() == ["id,prediction.0,prediction.1", "n0,0.0,0.0", "n1,2.0,-2.0"]
    assert done.stderr == "a line of the model\n" * done.stderr.count("\n")


def test_the_failed_run_keeps_its_predictions_and_names_their_folder(folder: Path) -> None:
    Path("net.py").write_text(NET.replace("return", "assert x[0, 0] != 8\n        return"))
    done = pipe(folder, "gradrun infer c.yaml --trust-code -o - 2>err.txt | cat", rows(12))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"n{i}" for i in range(8)]
    assert "8 of 12 predictions are saved in" in (folder / "err.txt").read_text()


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        (["infer", "c.yaml", "--trust-code"], "", "standard input is empty"),
        (["infer", "c.yaml", "-o", "-", "--json", "-"], "x", "--output - and --json - conflict"),
        (["infer", "c.yaml", "-o", "-", "--resume"], "x", "--output - and --resume conflict"),
        (["audit", "c.yaml", "--trust-code"], "x", "only the command `gradrun infer` reads"),
    ],
)
def test_what_cannot_be_piped_is_one_sentence(
    cli: Command, folder: Path, words: list[str], given: str, message: str
) -> None:
    answer = cli(*words, input=given)
    assert answer.code == 2
    assert message in answer.err
