"""`gradrun validate`, `schema` and `init`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml

import gradrun
from tests.conftest import ROOT
from tests.support.cli_files import CONFIG, NET

EXAMPLES = sorted((ROOT / "configs").glob("*.yaml"))


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


def test_validate_imports_no_code_even_if_trusted(cli, monkeypatch):
    monkeypatch.setenv("GRADRUN_TRUST_CODE", "1")
    assert cli("validate", "p.yaml").code == 0
    assert not Path("imported").exists()


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


def test_explain_prints_what_a_run_of_the_same_config_states(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.ones((6, 4), np.float32))
    Path("net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    class_names = ['cat', 'dog', 'fox', 'owl']\n"
    )
    Path("c.yaml").write_text(
        "model: {source: python, target: net.py:Net, args: {in_features: 4, out_features: 4}}\n"
        "data: {source: arrays, path: x.npy}\n"
        "output: {path: out, transform: softmax}\n"
    )
    answer = cli("validate", "--explain", "c.yaml", "--trust-code", "--json", "v.json")
    checked = (
        "c.yaml: valid; model and data can be opened (infer also checks labels, shapes and outputs)"
    )
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith(checked)
    explained = json.loads(Path("v.json").read_text())["c.yaml"]["interpretation"]
    stated = [s.as_dict() for s in gradrun.infer("c.yaml", trust_code=True).interpretation]
    # Only the run has the shape of the outputs.
    assert [s for s in explained if s["topic"] != "output"] == [
        s for s in stated if s["topic"] != "output"
    ]
    assert {"topic": "classes", "text": "cat, dog, fox, owl (4, the model's)"} in explained
    for statement in explained:
        first = re.escape(statement["text"][:20])
        assert re.search(rf"^{statement['topic']} +{first}", answer.out, re.MULTILINE)
