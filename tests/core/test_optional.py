"""Optional libraries: one sentence if one is missing; its settings are restored after a run."""

from __future__ import annotations

import json
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradrun.core import optional, remote
from gradrun.core.optional import EXTRAS, import_transformers, library_settings
from tests.conftest import Command

IN_PYTHON = {"cloudpickle"}
"""Libraries that only the Python API needs; tests/engines/test_objects.py."""


def config(case: str, folder: Path) -> dict[str, Any]:
    """Return a config that needs a library, the first word of the case."""
    np.savez(folder / "data.npz", x=np.zeros((4, 2), np.float32), y=np.zeros(4, int))
    base = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "arrays", "path": "data.npz", "inputs": {"x": {"key": "x"}}},
        "output": {"path": "out"},
    }
    labelled = base["data"] | {"labels": {"key": "y"}}  # type: ignore[operator]
    (folder / "rows.parquet").touch()
    (folder / "rows.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    records = {"source": "records", "path": "rows.parquet", "inputs": {"x": {"columns": ["x"]}}}
    needs: dict[str, dict[str, Any]] = {
        "torchmetrics": {"data": labelled, "metrics": ["accuracy"]},
        "pyarrow": {"data": records},
        "backports": {"data": records | {"path": "rows.jsonl.zst"}},
        "PIL": {"data": {"source": "images", "path": "."}},
        "transformers": {"model": {"source": "huggingface", "path": "some/model"}},
        "timm": {
            "data": {"source": "images", "path": ".", "preprocess": "timm", "architecture": "vit"}
        },
        "torchvision": {"model": {"source": "torchvision", "name": "resnet18"}},
        "ray": {"engine": {"source": "ray", "address": "127.0.0.1:9"}},
        "soundfile": {"data": {"source": "audio", "path": "."}},
        "datasets": {"data": {"source": "images", "dataset": {"path": "."}}},
        "soxr": {"data": {"source": "audio", "path": "."}},
        "fsspec": {"data": {"source": "arrays", "path": "gs://bucket/x.npy"}},
        "timm model": {"model": {"source": "timm", "name": "resnet18"}},
        "pyarrow to write": {"output": {"path": "out", "format": "parquet"}},
    }
    return base | needs[case]


@pytest.mark.parametrize(
    "case", [*sorted(EXTRAS.keys() - IN_PYTHON), "pyarrow to write", "timm model"]
)
def test_a_missing_library_is_one_sentence_with_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command, case: str
) -> None:
    library = case.split()[0]
    for name in [library, *sys.modules]:
        if name.partition(".")[0] == library:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(json.dumps(config(case, tmp_path)))
    answer = cli("infer", "c.yaml")
    assert answer.code == 2, answer.text
    package, extra = EXTRAS[library]
    assert f"needs {package}; pip install 'gradrun[{extra}]'" in answer.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("case", "needs", "extra"),
    [
        ("transformers", "transformers 5.4 or newer, and 5.3.0", "hf"),
        ("fsspec", "gcsfs 2025.3 or newer, and 2025.2.0", "gcs"),
    ],
)
def test_a_library_older_than_the_extra_requires_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command, case: str, needs: str, extra: str
) -> None:
    found = metadata.version
    old = {"transformers": "5.3.0", "gcsfs": "2025.2.0"}
    monkeypatch.setattr(metadata, "version", lambda name: old.get(name) or found(name))
    bounds = ["torch>=2.6", "transformers>=5.4; extra == 'hf'", 'gcsfs>=2025.3; extra == "gcs"']
    monkeypatch.setattr(metadata, "requires", lambda _: bounds)
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(json.dumps(config(case, tmp_path)))
    for function in (optional._version_problem, remote._filesystem):
        function.cache_clear()
    answer = cli("infer", "c.yaml")
    optional._version_problem.cache_clear()
    assert answer.code == 2, answer.text
    message = f"this needs {needs} is installed; pip install --upgrade 'gradrun[{extra}]'"
    assert message in " ".join(answer.err.split())
    assert not Path("out").exists()


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
