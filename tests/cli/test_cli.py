"""Commands: output streams, files, errors and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml

from gradrun import __version__
from gradrun.results.result import RunResult
from tests.support.run_results import run_result

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "configs").glob("*.yaml"))
COMMANDS = [
    "infer", "compare", "modes", "audit", "check", "verify", "report", "validate", "init", "schema",
]  # fmt: skip

CONFIG = """\
model:
  source: layers
  layers: [{Linear: [4, 3]}]
data:
  source: synthetic
  inputs: {x: {shape: [4]}}
  samples: 7
  batch_size: 3
run: {warmup: 0}
output: {path: out}
"""
PYTHON = CONFIG.replace(
    "source: layers\n  layers: [{Linear: [4, 3]}]", "source: python\n  target: m.py:Net"
)
NET = """\
from pathlib import Path
import torch
Path(__file__).with_name("imported").touch()
class Net(torch.nn.Module):
    def forward(self, x):
        return x.sum(1)
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADRUN_TRUST_CODE", raising=False)
    Path("c.yaml").write_text(CONFIG)
    Path("p.yaml").write_text(PYTHON)
    Path("m.py").write_text(NET)


# --- starting ----------------------------------------------------------------------------------

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


# --- infer -------------------------------------------------------------------------------------


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
    assert "unknown example 'digit'; did you mean digits? (allowed: digits" in answer.err


@pytest.mark.parametrize("words", [[], ["c.yaml", "--example", "digits"]])
def test_infer_needs_exactly_one_config(cli, words):
    answer = cli("infer", *words)
    assert answer.code == 2
    assert answer.err.startswith("error: ")
    assert "--example" in answer.err


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


def test_validate_imports_no_code_even_if_trusted(cli, monkeypatch):
    monkeypatch.setenv("GRADRUN_TRUST_CODE", "1")
    assert cli("validate", "p.yaml").code == 0
    assert not Path("imported").exists()


# --- validate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid_and_short_and_commented(cli, path):
    assert cli("validate", path).code == 0
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("#")


def test_validate_reports_errors_of_all_files_and_writes_nothing(cli):
    Path("a.yaml").write_text(CONFIG.replace("run:", "rn:"))
    Path("b.yaml").write_text(CONFIG.replace("samples", "smples"))
    answer = cli("validate", "a.yaml", "c.yaml", "b.yaml")
    assert answer.code == 2
    assert "c.yaml: valid" in answer.out
    for place in ("a.yaml:9:1  rn: ", "b.yaml:4:1  data.samples: ", "b.yaml:7:3  data.smples: "):
        assert place in answer.err
    assert not Path("out").exists()


def test_validate_writes_the_resolved_config_as_json(cli, tmp_path):
    answer = cli("validate", "c.yaml", "--json", "-", "--set", "run.seed=3")
    checked = json.loads(answer.out)["c.yaml"]
    resolved = checked["config"]
    assert checked["valid"] is True
    assert resolved["run"]["seed"] == 3
    assert resolved["output"] == resolved["output"] | {
        "path": f"{tmp_path}/out",
        "format": "npy",
    }
    assert answer.err == "c.yaml: valid (weights and shapes are checked by infer)\n"


def test_validate_writes_errors_as_json(cli):
    answer = cli("validate", "c.yaml", "--json", "-", "--set", "run.mod=3")
    assert answer.code == 2
    checked = json.loads(answer.out)["c.yaml"]
    assert checked["valid"] is False
    assert "run.mod: unknown key" in checked["error"]


# --- schema ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema():
    from typer.testing import CliRunner

    from gradrun.cli.app import app

    return json.loads(CliRunner().invoke(app, ["schema"]).stdout)


def accepts(schema, config) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(config)


def test_the_schema_is_valid(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "2020-12" in schema["$schema"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_schema_accepts_every_example_and_rejects_unknown_keys(schema, path):
    config = yaml.safe_load(path.read_text())
    jsonschema.Draft202012Validator(schema).validate(config)
    for section, value in config.items():
        spoiled = [*value, {"mistyped": 1}] if isinstance(value, list) else value | {"mistyped": 1}
        assert not accepts(schema, config | {section: spoiled})
    assert not accepts(schema, config | {"mistyped": {}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("run", "mode", "nograd"),
        ("data", "samples", "7"),
        ("run", "threads", 0),
        ("run", "seed", -1),
    ],
)
def test_the_schema_rejects_invalid_values(schema, section, key, value):
    config = yaml.safe_load(CONFIG)
    assert accepts(schema, config)
    assert not accepts(schema, config | {section: config[section] | {key: value}})


def test_the_schema_describes_the_keys(schema):
    text = json.dumps(schema)
    assert "where the model runs" in text
    assert "samples per batch; the last batch may be shorter" in text


# --- init --------------------------------------------------------------------------------------


def test_init_writes_a_config_that_validates_and_runs(cli):
    answer = cli("init")
    assert answer.code == 0
    assert answer.out == "wrote gradrun.yaml; next: gradrun infer gradrun.yaml\n"
    assert cli("validate", "gradrun.yaml").code == 0
    assert cli("infer", "gradrun.yaml", "--set", "data.samples=128").code == 0
    assert np.load("runs/first/predictions.npy").shape == (128, 10)


@pytest.mark.parametrize("name", ["m.py", "sub/m.py", "a %s b.py", "odd: #.py"])
@pytest.mark.parametrize("config", ["gradrun.yaml", "conf/g.yaml"])
def test_init_from_a_users_model_runs(cli, name, config):
    Path(name).parent.mkdir(exist_ok=True)
    Path(config).parent.mkdir(exist_ok=True)
    Path(name).write_text(NET)
    answer = cli("init", config, "--from", f"{name}:Net")
    assert answer.code == 0
    assert "--trust-code" in answer.out
    assert cli("infer", config, "--trust-code", "--set", "data.samples=9").code == 0
    assert len(np.load(Path(config).parent / "runs/first/predictions.npy")) == 9


@pytest.mark.parametrize("target", ["m.py", "m.py:", ":", "m.py:a b", "Net"])
def test_init_from_needs_a_file_and_a_name(cli, target):
    answer = cli("init", "--from", target)
    assert answer.code == 2
    assert "expected FILE.PY:NAME" in answer.err
    assert not Path("gradrun.yaml").exists()


def test_init_does_not_replace_a_file(cli):
    answer = cli("init", "c.yaml")
    assert answer.code == 2
    assert "c.yaml already exists" in answer.err
    assert Path("c.yaml").read_text() == CONFIG


@pytest.mark.parametrize("name", ["no/c.yaml", "c.yaml/d.yaml", "."])
def test_init_reports_an_unwritable_path(cli, name):
    answer = cli("init", name)
    assert answer.code in (1, 2)
    assert answer.err.startswith(f"error: {name}")
