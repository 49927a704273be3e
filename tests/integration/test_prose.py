"""The word-list check of `make lint` finds translated prose, and only prose."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "tools" / "check_prose.py"
_spec = importlib.util.spec_from_file_location("check_prose", SCRIPT)
assert _spec
assert _spec.loader
check_prose = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_prose)

PLAIN = "word " * 1000


def findings(root: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return check_prose.check(root)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gradrun/a.py", '"""Begin\n\nanew."""\n', "gradrun/a.py:3: 'anew'"),
        ("gradrun/a.py", "x = 1\ny = 2  # as ever\n", "gradrun/a.py:2: 'as ever'"),
        ("gradrun/a.py", "x = 1\n# put\n# back\n", "gradrun/a.py:2: 'put back'"),
        ("gradrun/a.py", 'x = "it is no file"\n', "gradrun/a.py:1: 'is no'"),
        ("gradrun/a.py", 'x = f"{1} is\\n no file"\n', "gradrun/a.py:1: 'is no'"),
        ("docs/page.md", "One.\n\nIt stands in\nthe file.\n", "docs/page.md:3: 'stands in'"),
        ("tests/test_a.py", "def test_it_is_told():\n    pass\n", "tests/test_a.py:1: 'is told'"),
        ("configs/a.yaml", "run:\n  x: 1  # set apart\n", "configs/a.yaml:2: 'set apart'"),
        ("Makefile", "golden: ## write them anew\n", "Makefile:1: 'anew'"),
    ],
)
def test_a_discouraged_phrase_is_reported_with_its_line(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    (finding,) = findings(tmp_path, {name: text})
    assert finding.startswith(expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("docs/page.md", "```\nanew\n```\n\nUse `anew`.\n\n    ```text\n    anew\n    ```\n"),
        ("gradrun/a.py", 'x = "anew"\nanew = 1\n'),
        ("gradrun/a.py", 'x = "the key is no longer used"\n'),
        ("tests/golden/report.md", "anew\n"),
        ("other/a.py", "# anew\n"),
    ],
)
def test_code_keys_and_golden_files_are_not_prose(tmp_path: Path, name: str, text: str) -> None:
    assert findings(tmp_path, {name: text}) == []


@pytest.mark.parametrize(
    ("word", "allowed"), [("what", 2), ("holds", 1), ("says", 1), ("told", 0), ("are no", 0)]
)
def test_a_frequent_word_is_reported_above_its_rate(
    tmp_path: Path, word: str, allowed: int
) -> None:
    below = f'"""{PLAIN}{f"{word}. " * allowed}"""\n'
    assert findings(tmp_path, {"gradrun/a.py": below}) == []
    above = f'"""{PLAIN}{f"{word}. " * (allowed + 1)}"""\n'
    (finding,) = findings(tmp_path, {"gradrun/a.py": above})
    assert "per 1,000 words" in finding
    assert "gradrun/a.py:1" in finding


def test_the_script_exits_with_1_if_it_finds_something(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "check_prose.py").write_text(SCRIPT.read_text())
    command = [sys.executable, tmp_path / "tools" / "check_prose.py"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    (tmp_path / "README.md").write_text("anew\n")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "README.md:1: 'anew'; use: again" in done.stdout
