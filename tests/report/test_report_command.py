"""`gradrun report` with saved, old, truncated and malicious results."""

from __future__ import annotations

import json
import math
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradrun import report
from gradrun.core.errors import GradrunError
from gradrun.results.ratios import recompute
from gradrun.results.result import RunResult
from tests.conftest import ROOT, Command
from tests.support.saved_results import RESULTS

OLD = Path(__file__).parents[1] / "golden" / "result-of-0.1.0.json"
FORMATS = ("markdown", "csv", "json", "html")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with a run and a comparison."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "comparison"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        RESULTS[name].save(folder / "result.json")
    return tmp_path


def test_a_folder_and_its_file_are_reported_alike(cli: Command, saved: Path) -> None:
    folder, file = cli("report", "runs/run"), cli("report", "runs/run/result.json")
    assert folder.code == file.code == 0
    assert folder.out == file.out
    assert "498 predictions" in folder.out
    assert "more:" not in folder.out


@pytest.mark.parametrize(
    ("suffix", "begins"),
    [
        (".md", "### digits_cnn"),
        (".csv", "result,kind,mode,metric,seconds,bytes"),
        (".json", '{\n "format": 1'),
        (".html", "<!DOCTYPE html>"),
        (".HTM", "<!DOCTYPE html>"),
        (".txt", "\ndigits_cnn"),
    ],
)
def test_the_suffix_selects_the_format(cli: Command, saved: Path, suffix: str, begins: str) -> None:
    answer = cli("report", "runs/run", "-o", f"out{suffix}")
    assert (answer.code, answer.out.strip()) == (0, f"wrote out{suffix}")
    assert (saved / f"out{suffix}").read_text(encoding="utf-8").startswith(begins)
    assert cli("report", "runs/run", "-o", f"out{suffix}", "--quiet").text == ""


@pytest.mark.parametrize("format", FORMATS)
def test_text_is_printed_without_an_output_file(cli: Command, saved: Path, format: str) -> None:
    answer = cli("report", "runs/run", "runs/comparison", "--format", format)
    assert answer.code == 0
    assert answer.err == ""
    results = [("runs/run", RESULTS["run"]), ("runs/comparison", RESULTS["comparison"])]
    assert answer.out == report.render(results, format)


def test_the_format_option_overrides_the_suffix(cli: Command, saved: Path) -> None:
    assert cli("report", "runs/run", "--format", "csv", "-o", "out.md").code == 0
    assert (saved / "out.md").read_text().startswith("result,kind")


def test_several_results_are_shown_side_by_side(cli: Command, saved: Path) -> None:
    answer = cli("report", "runs/run", "runs/run")
    assert answer.code == 0
    (line,) = (line for line in answer.out.splitlines() if line.startswith("batch median"))
    assert line.count("685 ± 9 µs") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere cannot be read: No such file"),
        (["runs/run", "--format", "htm"], "unknown format 'htm'; did you mean html?"),
        (["runs/run", "-o", "out.pdf"], "no format has this suffix"),
        (["runs/run", "-o", "runs"], "is a folder, not a file"),
        (["runs/run", "-o", "runs/run/result.json"], "is the result itself"),
        (["runs/run", "-o", "no/such/x.md"], "cannot be written: No such file"),
    ],
)
def test_invalid_options_are_an_error(
    cli: Command, saved: Path, words: list[str], said: str
) -> None:
    before = (saved / "runs" / "run" / "result.json").read_bytes()
    answer = cli("report", *words)
    assert answer.code in (1, 2)
    assert answer.err.startswith("error: ")
    assert said in answer.err
    assert answer.out == ""
    assert (saved / "runs" / "run" / "result.json").read_bytes() == before


def test_a_failed_write_keeps_the_previous_file(
    cli: Command, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved / "out.md").write_text("before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    answer = cli("report", "runs/run", "-o", "out.md")
    assert answer.code == 1
    assert "out.md cannot be written: No space left on device" in answer.err
    assert (saved / "out.md").read_text() == "before"
    assert not list(saved.glob("*.tmp"))


# --- files of other versions, damaged and hostile ones -----------------------------------------


def test_a_result_of_format_1_is_reported(cli: Command, saved: Path) -> None:
    for format in ("table", *FORMATS):
        answer = cli("report", OLD, "--format", format)
        assert answer.code == 0
        assert "no_grad" in answer.out


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (
            0,
            "this version reads formats 1 and 2: repeat the run",
        ),
        (
            3,
            "this version reads formats 1 and 2: upgrade gradrun",
        ),
    ],
)
def test_an_unknown_format_number_differs_from_a_damaged_file(
    cli: Command, saved: Path, version: int, said: str
) -> None:
    told = json.loads(RESULTS["run"].to_json()) | {"format": version, "gradrun": "0.0.9"}
    (saved / "other.json").write_text(json.dumps(told))
    answer = cli("report", "other.json")
    assert answer.code == 1
    assert f"has format {version}, written by gradrun 0.0.9; {said}" in answer.err


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_result_is_an_error(cli: Command, saved: Path, share: float) -> None:
    text = RESULTS["run"].to_json()
    (saved / "cut.json").write_text(text[: int(share * len(text))])
    answer = cli("report", "cut.json", "--format", "html")
    assert (answer.code, answer.out) == (1, "")
    assert "cut.json is not a gradrun result: not JSON" in answer.err


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1, "config": {}},
        {"format": 1, "config": {"model": "x", "output": {"path": "y"}}},
        {"format": 1, "config": {"model": {"source": "zoo"}, "output": {"path": 3}}},
        {"format": 1, "config": {"model": {"source": "zoo"}, "output": {"path": "y"}}},
        {"format": 1, "config": {"model": {}, "output": {"path": "y"}, "run": {"mode": "grad"}}},
        {"config": []},
        {"info": {}},
        {"info": {"model": "x", "mode": "no", "output_path": "y"}},
        {"info": {"model": "x", "mode": "grad", "output_path": 3}},
        {"info": {"model": "x", "mode": "grad", "output_path": "y", "precision": 0}},
        {"measurements": []},
        {"measurements": None},
        {"environment": {"memory": 10**400}},
        {"started_at": 3},
    ],
)
def test_impossible_values_in_a_result_are_an_error(
    cli: Command, saved: Path, change: dict[str, Any]
) -> None:
    told = json.loads(RESULTS["run"].to_json())
    if "environment" in change:
        change = {"environment": told["environment"] | change["environment"]}
    (saved / "odd.json").write_text(json.dumps(told | change))
    answer = cli("report", "odd.json")
    assert answer.code == 1
    assert "odd.json is not a gradrun result" in answer.err


@pytest.mark.parametrize("name", ["check", "comparison"])
def test_rounds_of_zero_duration_are_rejected(cli: Command, saved: Path, name: str) -> None:
    told = json.loads(RESULTS[name].to_json())
    for measured in told["measurements"][:1]:
        measured["batch_seconds"] = [0.0] * len(measured["batch_seconds"])
    (saved / "odd.json").write_text(json.dumps(told))
    answer = cli("report", "odd.json", "--format", "csv")
    assert answer.code == 1
    assert "a round of zero duration" in answer.err


def test_errors_escape_control_characters_of_a_file(cli: Command, saved: Path) -> None:
    told = json.loads(RESULTS["run"].to_json()) | {"format": 3, "gradrun": "\x1b]0;gone\x07"}
    (saved / "other.json").write_text(json.dumps(told))
    answer = cli("report", "other.json")
    assert answer.code == 1
    assert "\x1b" not in answer.text
    (saved / "deep.json").write_text("[" * 100_000)
    assert cli("report", "deep.json").code == 1


ODD = (
    *(0, -1, 5e-324, 1e308, 10**40, 10**400, math.inf, math.nan),
    *("", "Infinity", None, [], {}, True, "x|y"),
)  # fmt: skip


def changed(told: Any, rng: random.Random) -> Any:
    """The same with one value, anywhere in it, made odd."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(told)
    node, key = rng.choice(places)
    node[key] = rng.choice(ODD)
    return told


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(sorted(RESULTS)), seed=st.integers(0, 2**32))
def test_odd_values_in_a_file_are_reported_or_rejected(
    name: str, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    told = json.loads(RESULTS[name].to_json())
    for measured in told["measurements"]:  # few, so that other values are hit too
        measured["batch_seconds"] = measured["batch_seconds"][:6]
        measured["batch_sizes"] = measured["batch_sizes"][:6]
    for _ in range(rng.randint(1, 3)):
        told = changed(told, rng)
    file = tmp_path / "result.json"
    file.write_text(json.dumps(told))
    try:
        results = [("a", recompute(RunResult.load(file)))]
    except GradrunError:
        return
    assert report.render(results, "table")
    assert report.render(results * 2, "table")
    for format in FORMATS:
        assert report.render(results, format)


# --- start-up cost and messages ----------------------------------------------------------------


def test_a_report_imports_no_torch(saved: Path) -> None:
    code = (
        "import sys; from gradrun.cli.app import app\n"
        "try: app(['report', 'runs/run', 'runs/comparison', '-o', 'out.md'])\n"
        "except SystemExit as end: assert end.code in (0, None), end.code\n"
        "assert not {'torch', 'pydantic', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    environment = {**__import__("os").environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=saved, env=environment)


def test_a_run_prints_the_report_command(cli: Command, saved: Path) -> None:
    config = ROOT / "configs" / "layers.yaml"
    run = ["--set", "output.path=" + str(saved / "runs" / "a run"), "--set", "data.samples=64"]
    for command in (
        ["infer", config, *run],
        ["audit", config, *run, "--no-compile"],
    ):
        answer = cli(*command)
        assert answer.code == 0, answer.text
        (line,) = (line for line in answer.out.splitlines() if line.startswith("more: "))
        program, *words = shlex.split(line.removeprefix("more: "))
        assert program == "gradrun"
        shown = cli(*words)
        assert shown.code == 0, shown.text
        assert Path(words[-1]).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        assert answer.out.splitlines()[-1] == line
