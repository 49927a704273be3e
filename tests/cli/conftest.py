"""A folder with a config for each test of a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli_files import CONFIG, NET, PYTHON


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADRUN_TRUST_CODE", raising=False)
    Path("c.yaml").write_text(CONFIG)
    Path("p.yaml").write_text(PYTHON)
    Path("m.py").write_text(NET)
