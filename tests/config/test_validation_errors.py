"""pydantic's errors as sentences: which key, what is wrong, what is allowed, did you mean."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gradrun.config.schema import RunConfig
from gradrun.config.validation_errors import config_issue, config_issues, suggest

GOOD: dict[str, Any] = {
    "model": {"source": "layers", "layers": ["ReLU"]},
    "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 7},
    "output": {"path": "out"},
}
ARRAYS = {"source": "arrays", "path": "x.npy", "inputs": {"image": {"sclae": 1}}}
COLUMNS = {
    "source": "records",
    "path": "x.csv",
    "inputs": {"x": {"columns": ["age"]}},
    "columns": [{"age": {"fil": 3}}],
}
ITEMS = {"source": "python", "target": "mine:items"}
TABLE = {"source": "records", "path": "x.csv", "inputs": {"x": {"columns": ["a"]}}}
RECORDS = {"source": "records", "path": "x.csv", "inputs": {"x": {"columns": []}}}


def issues(**sections: Any) -> set[tuple[str, str, bool]]:
    """(dotted key, sentence, about the key itself) of each error in GOOD with other sections."""
    data = GOOD | sections
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate_json(json.dumps(data))
    found = config_issues(caught.value.errors(), data)
    return {(".".join(map(str, one.key)), one.text, one.about_key) for one in found}


def only(**sections: Any) -> tuple[str, str, bool]:
    (one,) = issues(**sections)
    return one


@pytest.mark.parametrize(
    ("section", "value", "key", "text", "about_key"),
    [
        ("run", {"md": 1}, "run.md", "unknown key; did you mean mode?", True),
        ("rum", {}, "rum", "unknown key; did you mean run?", True),
        (
            "run",
            {"mode": "nograd"},
            "run.mode",
            "unknown value 'nograd'; did you mean no_grad?",
            False,
        ),
        ("run", {"mode": 1}, "run.mode", "unknown value 1; allowed: grad, no_grad, infe", False),
        ("run", {"device": "gpu"}, "run.device", "allowed: auto, cpu, cuda, cuda:N or mps", False),
        ("run", {"device": 0}, "run.device", "unknown value 0; allowed: auto, cpu", False),
        ("run", {"seed": -1}, "run.seed", "-1 must be at least 0", False),
        ("run", {"seed": 2**63}, "run.seed", f"{2**63} must be less than {2**63}", False),
        ("run", {"deterministic": "yes"}, "run.deterministic", "'yes' is not true or false", False),
        ("run", [], "run", "a list is not a section", False),
        ("run", None, "run", "null is not a section", False),
        ("output", {"path": "o", "transform": "sofmax"}, "output.transform", "softmax?", False),
        (
            "output",
            {"path": "o", "palette": [[0, 0, 300]]},
            "output.palette.0.2",
            "most 255",
            False,
        ),
        ("output", {"path": "o", "keep": None}, "output.keep", "such as [a, b]", False),
        ("metrics", {"accuracy": True}, "metrics", "write [accuracy]", False),
        ("data", COLUMNS, "data.columns", "age: unknown key 'fil'; did you mean fill?", False),
        ("output", {}, "output.path", "is missing: folder of the run", True),
        ("output", {"path": 3}, "output.path", "3 is not text", False),
        ("output", {"path": "o", "format": "npz"}, "output.format", "did you mean npy?", False),
        ("output", {"path": "o", "select": ["../x"]}, "output.select.0", "not by path", False),
        ("model", {}, "model.source", "is missing; one of zoo, layers, python, torchs", True),
        (
            "model",
            {"source": "zo"},
            "model.source",
            "unknown source 'zo'; did you mean zoo?",
            False,
        ),
        ("model", {"source": "zoo", "name": "x"}, "model.name", "allowed: digits_cnn, mlp", False),
        ("model", {"source": "python", "target": "x"}, "model.target", "file.py:Name or", False),
        (
            "model",
            {"source": "layers", "layers": "ReLU"},
            "model.layers",
            "'ReLU' is not a list; write [ReLU]",
            False,
        ),
        ("data", ARRAYS, "data.inputs.image.sclae", "unknown key; did you mean scale?", True),
        ("data", RECORDS, "data.inputs.x.columns", "has 0 entries; allowed: at least 1", False),
        ("data", TABLE | {"separator": '"'}, "data.separator", "cannot separate columns", False),
        ("data", ITEMS | {"workers": -1}, "data.workers", "-1 must be at least 0", False),
        ("data", RECORDS | {"inputs": 3}, "data.inputs", "3 is not a section", False),
        ("data", RECORDS | {"inputs": {"x": 3}}, "data.inputs.x", "3 is not a section", False),
    ],
)
def test_an_issue_names_key_problem_and_allowed_values(section, value, key, text, about_key):
    found_key, found_text, found_about = only(**{section: value})
    assert (found_key, found_about) == (key, about_key)
    assert text in found_text


@pytest.mark.parametrize("name", ["threads", "warmup"])
@pytest.mark.parametrize("value", [-1, "many", 10**6, [1], None])
def test_a_number_or_auto_gives_one_issue_with_both_alternatives(name, value):
    key, text, _ = only(run={name: value})
    assert key == f"run.{name}"
    assert "allowed: auto or an integer from" in text


def test_a_missing_section_is_a_missing_key():
    data = {key: value for key, value in GOOD.items() if key != "output"}
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate_json(json.dumps(data))
    found = config_issue(caught.value.errors()[0], data)
    assert (found.key, found.text) == (("output",), "is missing")


def test_an_input_may_be_named_like_a_key():
    data = {"source": "synthetic", "samples": 7, "inputs": {"shape": {"shape": [-1]}}}
    assert only(data=data)[:2] == ("data.inputs.shape.shape.0", "-1 must be more than 0")


def test_long_values_are_truncated():
    _, text, _ = only(run={"mode": "x" * 500})
    assert len(text) < 200


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("nograd", "did you mean no_grad? (allowed: no_grad, Linear)"),
        ("NO_GRAD", "did you mean no_grad? (allowed: no_grad, Linear)"),
        ("liner", "did you mean Linear? (allowed: no_grad, Linear)"),
        ("xyz", "allowed: no_grad, Linear"),
        ("", "allowed: no_grad, Linear"),
    ],
)
def test_suggest_ignores_case(given, hint):
    assert suggest(given, ["no_grad", "Linear"]) == hint


@pytest.mark.parametrize(
    ("data", "key", "text"),
    [
        (
            RECORDS | {"inputs": ["a", "b"]},
            "data.inputs",
            "a list is not a section; write a map of names, such as {x: {columns: [a, b]}}",
        ),
        (
            RECORDS | {"inputs": {"x": ["a", "b"]}},
            "data.inputs.x",
            "a list is not a section; write a map, such as {columns: [a, b]}",
        ),
        (
            RECORDS | {"inputs": {"x": {"columns": "a"}}},
            "data.inputs.x.columns",
            "'a' is not a list; write [a]",
        ),
        (
            ARRAYS | {"inputs": ["image"]},
            "data.inputs",
            "a list is not a section; write a map of names, such as {x: {key: images}}",
        ),
        (
            ARRAYS | {"inputs": {}, "labels": "y"},
            "data.labels",
            "'y' is not a section; write a map, such as {key: labels}",
        ),
        (
            GOOD["data"] | {"inputs": {"x": [3, 8]}},
            "data.inputs.x",
            "a list is not a section; write a map, such as {shape: [3, 8, 8]}",
        ),
        (["a"], "data", "a list is not a section; write one key per line, such as source: ..."),
    ],
)
def test_a_list_in_place_of_a_map_is_answered_with_a_map(data: Any, key: str, text: str) -> None:
    assert only(data=data) == (key, text, False)
