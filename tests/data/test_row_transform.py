"""`data.transform`: a function of the user for the rows of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradrun
from gradrun.core.errors import ConfigError, RunFailed
from tests.conftest import Command
from tests.support.engines import InlineEngines

PREP = """
import helper

def prepare(row):
    if row["a"] == "bad":
        raise ValueError("cannot prepare")
    if row["a"] == "none":
        return None
    return {"x": helper.number(row["a"]) + len(row["city"]), "id": row["city"]}
"""
ROWS = [f"{i},{'city' * (i % 3)}" for i in range(19)]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prep.py").write_text(PREP)
    (tmp_path / "helper.py").write_text("def number(text):\n    return float(text) * 2\n")
    (tmp_path / "t.csv").write_text("\n".join(["a,city", *ROWS]) + "\n")
    return {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {
            "source": "records",
            "path": str(tmp_path / "t.csv"),
            "transform": f"{tmp_path}/prep.py:prepare",
            "inputs": {"x": {"columns": ["x"]}},
            "batch_size": 4,
        },
        "run": {"warmup": 0},
        "output": {"path": str(tmp_path / "out")},
    }


def predictions(folder: Path) -> Any:
    return np.load(folder / "predictions.npy").flatten().tolist()


def test_rows_are_those_that_the_function_returns_also_with_workers_and_a_resume(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = gradrun.infer(config, trust_code=True)
    expected = [2.0 * i + 4 * (i % 3) for i in range(19)]
    assert predictions(tmp_path / "out") == expected
    texts = {statement.topic: statement.text for statement in result.interpretation}
    assert texts["transform"] == "every row by prep.py:prepare, before all other steps"
    InlineEngines(monkeypatch)
    engine = {"source": "processes", "workers": 2}
    output = {"path": str(tmp_path / "two")}
    gradrun.infer(config, trust_code=True, output=output, engine=engine)
    assert predictions(tmp_path / "two") == expected

    (tmp_path / "t.csv").write_text("\n".join(["a,city", *ROWS[:10], "bad,", *ROWS[11:]]) + "\n")
    output = {"path": str(tmp_path / "three")}
    with pytest.raises(RunFailed, match=r"t.csv:12  prep.py:prepare failed: ValueError: cannot"):
        gradrun.infer(config, trust_code=True, output=output)
    (tmp_path / "t.csv").write_text("\n".join(["a,city", *ROWS]) + "\n")
    gradrun.infer(config, trust_code=True, output=output, resume=True)
    assert predictions(tmp_path / "three") == expected
    (tmp_path / "prep.py").write_text(PREP + "\n")
    with pytest.raises(ConfigError, match=r"prep.py changed"):
        gradrun.infer(config, trust_code=True, output=output, resume=True)


def test_the_function_is_not_imported_without_trust(
    tmp_path: Path, config: dict[str, Any], cli: Command
) -> None:
    (tmp_path / "prep.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{PREP}")
    with pytest.raises(ConfigError, match=r"prep.py:prepare is Python code and was not loaded"):
        gradrun.infer(config)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transform": "prep.py:prepair"}, "has no 'prepair'; did you mean prepare?"),
        ({"inputs": {"x": {"columns": ["y"]}}}, "the rows of prep.py:prepare have no column 'y'"),
    ],
)
def test_a_wrong_name_is_one_sentence(
    tmp_path: Path, config: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    if "transform" in change:
        change = {"transform": f"{tmp_path}/{change['transform']}"}
    config["data"] |= change
    with pytest.raises(ConfigError) as caught:
        gradrun.infer(config, trust_code=True)
    assert words in str(caught.value)


def test_a_result_that_is_not_a_dict_is_an_error_of_its_row(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    (tmp_path / "t.csv").write_text("a,city\n1,x\nnone,x\n")
    with pytest.raises(ConfigError, match=r"t.csv:3  prep.py:prepare returned NoneType"):
        gradrun.infer(config, trust_code=True)


def test_a_transform_needs_a_function_and_columns(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "prep.py").write_text("number = 3\n" + PREP)
    config["data"]["transform"] = f"{tmp_path}/prep.py:number"
    with pytest.raises(ConfigError, match=r"prep\.py:number is not a function of a row"):
        gradrun.infer(config, trust_code=True)
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    config["data"] = {
        "source": "text", "path": str(tmp_path / "t.txt"), "tokenizer": "t",
        "transform": f"{tmp_path}/prep.py:prepare",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"a \.txt file has no columns to transform"):
        gradrun.infer(config, trust_code=True)
