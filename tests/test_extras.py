"""Each optional library missing: one sentence that says what to install, and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradrun.extras import EXTRAS

ROOT = Path(__file__).parent.parent
WITHOUT = """\
import sys
sys.modules[sys.argv.pop(1)] = None
from gradrun.cli import main
main()
"""


def config(library: str, folder: Path) -> dict[str, Any]:
    """A config that needs a library."""
    np.savez(folder / "data.npz", x=np.zeros((4, 2), np.float32), y=np.zeros(4, int))
    base = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "arrays", "path": "data.npz", "inputs": {"x": {"key": "x"}}},
        "output": {"path": "out"},
    }
    labelled = base["data"] | {"labels": {"key": "y"}}  # type: ignore[operator]
    return base | {"torchmetrics": {"data": labelled, "metrics": ["accuracy"]}}[library]


@pytest.mark.parametrize("library", EXTRAS)
def test_a_missing_library_is_one_sentence_that_says_what_to_install(
    tmp_path: Path, library: str
) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(config(library, tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, library, "infer", "c.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"needs {library}; pip install 'gradrun[{EXTRAS[library]}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
