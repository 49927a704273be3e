"""`gradrun infer`: output folder, overwriting, examples and trust."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

import gradrun
from gradrun.cli.infer import _options, _resume_command
from gradrun.results.result import RunResult
from tests.conftest import ROOT, Command


def test_infer_writes_predictions_and_prints_both_tables(cli):
    answer = cli("infer", "c.yaml")
    assert answer.code == 0
    assert np.load("out/predictions.npy").shape == (7, 3)
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "journal.jsonl",
        "predictions.npy",
        "result.json",
    ]
    for word in ("cold start", "p99", "throughput", "Peak memory", "weights", "60 bytes"):
        assert word in answer.out
    assert "out/predictions.npy" in answer.out
    assert not answer.err


def test_set_overrides_the_config(cli):
    assert cli("infer", "c.yaml", "--set", "data.samples=5", "--set", "run.mode=grad").code == 0
    assert len(np.load("out/predictions.npy")) == 5
    assert RunResult.load("out").measurements[0].mode == "grad"


@pytest.mark.parametrize("folder", ["other", "a/b", "../elsewhere"])
def test_output_option_selects_the_folder(cli, folder):
    assert cli("infer", "c.yaml", "--output", folder).code == 0
    assert Path(folder, "predictions.npy").exists()
    assert not Path("out").exists()


def test_an_existing_folder_is_rejected_with_a_hint_to_overwrite(cli):
    assert cli("infer", "c.yaml").code == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    answer = cli("infer", "c.yaml", "--set", "data.samples=5")
    assert answer.code == 2
    assert "c.yaml:10:16  output.path: " in answer.err
    assert "--overwrite" in answer.err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_overwrite_replaces_the_run_but_not_other_files(cli):
    jsonl = ["--set", "output.format=jsonl"]
    assert cli("infer", "c.yaml", *jsonl).code == 0
    for name in ("notes.txt", "predictions", "my_predictions.npy"):
        Path("out", name).write_text("mine")
    assert cli("infer", "c.yaml", "--overwrite", "--set", "data.samples=5").code == 0
    left = {path.name for path in Path("out").iterdir()}
    mine = {"notes.txt", "predictions", "my_predictions.npy"}
    assert left == {"journal.jsonl", "predictions.npy", "result.json"} | mine
    assert len(np.load("out/predictions.npy")) == 5


def test_overwrite_with_an_invalid_config_does_not_change_the_earlier_run(cli):
    assert cli("infer", "c.yaml").code == 0
    answer = cli("infer", "c.yaml", "--overwrite", "--set", "data.inputs.x.shape=[5]")
    assert answer.code == 2
    assert len(np.load("out/predictions.npy")) == 7


def test_an_empty_folder_is_accepted(cli):
    Path("out").mkdir()
    assert cli("infer", "c.yaml").code == 0


@pytest.mark.slow
def test_example_runs_in_an_empty_folder(process, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    answer = process("infer", "--example", "digits", cwd=empty)
    assert answer.code == 0, answer.text
    labels = np.load(ROOT / "configs/digits.npz")["labels"]
    assert np.mean(np.load(empty / "runs/digits/predictions.npy") == labels) >= 0.97
    assert "\x1b" not in answer.text, "a pipe gets plain text"


def test_an_unknown_example_lists_the_available_ones(cli):
    answer = cli("infer", "--example", "digit")
    assert answer.code == 2
    assert "unknown example 'digit'; did you mean digits? (allowed: audio, " in answer.err


@pytest.mark.parametrize("words", [[], ["c.yaml", "--example", "digits"]])
def test_infer_needs_exactly_one_config(cli, words):
    answer = cli("infer", *words)
    assert answer.code == 2
    assert answer.err.startswith("error: ")
    assert "--example" in answer.err


# --- trust -------------------------------------------------------------------------------------


def test_python_code_is_not_imported_without_trust(cli):
    answer = cli("infer", "p.yaml")
    assert answer.code == 2
    assert answer.err.startswith("error: p.yaml:3:11  model.target: ")
    assert "pass --trust-code or set GRADRUN_TRUST_CODE=1" in answer.err
    assert not Path("imported").exists()
    assert not Path("out").exists()


@pytest.mark.parametrize("value", ["", "0", "yes", "true"])
def test_trust_needs_the_value_1(cli, monkeypatch, value):
    monkeypatch.setenv("GRADRUN_TRUST_CODE", value)
    assert cli("infer", "p.yaml").code == 2
    assert not Path("imported").exists()


@pytest.mark.parametrize("how", ["option", "environment"])
def test_trusted_code_runs(cli, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("GRADRUN_TRUST_CODE", "1")
    assert cli("infer", "p.yaml", *(["--trust-code"] if how == "option" else [])).code == 0
    assert Path("imported").exists()
    assert np.load("out/predictions.npy").shape == (7,)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--workers", "zero"], "--workers:1:11  engine.workers: unknown value 'zero'"),
        (["--workers", "0"], "--workers:1:11  engine.workers: unknown value 0"),
        (["--engine", "spark"], "--engine:1:10  engine.source: unknown source 'spark'"),
        (["--address", "127.0.0.1:9"], "--address:1:11  engine.address: no Ray cluster answers"),
    ],
)
def test_an_error_names_the_option_that_was_typed(cli, words, line):
    answer = cli("infer", "c.yaml", *words)
    assert answer.code == 2
    first, typed, caret = answer.err.splitlines()
    assert first.startswith(f"error: {line}")
    assert typed.strip() == " ".join(words)
    assert typed[caret.index("^") :] == words[1]


def test_the_command_to_resume_has_the_options_that_were_typed():
    options = _options(None, "2", None, Path("an output"))
    command = _resume_command(Path("c.yaml"), None, ["run.threads=1"], options, False)
    assert shlex.split(command) == shlex.split(
        "gradrun infer c.yaml --set run.threads=1 --workers 2 --output 'an output' --resume"
    )
    options = _options("ray", "auto", "auto", None)
    command = _resume_command(Path("c.yaml"), None, [], options, True)
    assert command == (
        "gradrun infer c.yaml --engine ray --workers auto --address auto --trust-code --resume"
    )


def test_errors_name_flags_on_the_command_line_and_arguments_in_python(
    cli: Command, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {source: layers, layers: [Identity]}\n"
        "data: {source: synthetic, inputs: {x: {shape: [2]}}, samples: 4}\n"
        "output: {path: out}\n"
    )
    assert cli("infer", config).code == 0
    answer = cli("infer", config)
    assert answer.code == 2
    assert "use --overwrite to replace it" in answer.err
    assert "overwrite=True" not in answer.err
    with pytest.raises(gradrun.ConfigError, match="use overwrite=True to replace it") as caught:
        gradrun.infer(config)
    assert "--" not in str(caught.value)
