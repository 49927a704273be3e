"""Optional libraries: one sentence if one is missing; its settings are restored after a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradrun.core.optional import EXTRAS, import_transformers, library_settings

ROOT = Path(__file__).parents[2]
WITHOUT = """\
import sys
sys.modules[sys.argv.pop(1)] = None
from gradrun.cli.app import main
main()
"""


def config(case: str, folder: Path) -> dict[str, Any]:
    """A config that needs a library: the first word of the case."""
    np.savez(folder / "data.npz", x=np.zeros((4, 2), np.float32), y=np.zeros(4, int))
    base = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "arrays", "path": "data.npz", "inputs": {"x": {"key": "x"}}},
        "output": {"path": "out"},
    }
    labelled = base["data"] | {"labels": {"key": "y"}}  # type: ignore[operator]
    (folder / "rows.parquet").touch()
    records = {"source": "records", "path": "rows.parquet", "inputs": {"x": {"columns": ["x"]}}}
    needs: dict[str, dict[str, Any]] = {
        "torchmetrics": {"data": labelled, "metrics": ["accuracy"]},
        "pyarrow": {"data": records},
        "PIL": {"data": {"source": "images", "path": "."}},
        "transformers": {"model": {"source": "huggingface", "path": "some/model"}},
        "timm": {
            "data": {"source": "images", "path": ".", "preprocess": "timm", "architecture": "vit"}
        },
        "torchvision": {"model": {"source": "torchvision", "name": "resnet18"}},
        "timm model": {"model": {"source": "timm", "name": "resnet18"}},
        "pyarrow to write": {"output": {"path": "out", "format": "parquet"}},
    }
    return base | needs[case]


@pytest.mark.parametrize("case", [*EXTRAS, "pyarrow to write", "timm model"])
def test_a_missing_library_is_one_sentence_with_the_package_to_install(
    tmp_path: Path, case: str
) -> None:
    library = case.split()[0]
    (tmp_path / "c.yaml").write_text(json.dumps(config(case, tmp_path)))
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
    package, extra = EXTRAS[library]
    assert f"needs {package}; pip install 'gradrun[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_settings_of_libraries_are_restored() -> None:
    settings = pytest.importorskip("transformers").logging

    def state() -> tuple[Any, ...]:
        return settings.get_verbosity(), settings.is_progress_bar_enabled(), [*warnings.filters]

    before = state()
    with library_settings():
        import_transformers("model.source")
        warnings.simplefilter("error")
        assert state()[:2] == (settings.ERROR, False)
    assert state() == before
