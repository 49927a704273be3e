"""Errors of the engine `ray` without a cluster; tests/soak/ray_cluster.py runs a real one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import gradrun
from gradrun.core.errors import ConfigError

pytest.importorskip("ray")


def _config(tmp_path: Path, **engine: Any) -> dict[str, Any]:
    return {
        "model": {"source": "layers", "layers": [{"Linear": [3, 2]}]},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [3]}}, "samples": 64},
        "run": {"threads": 1},
        "output": {"path": str(tmp_path / "out")},
        "engine": {"source": "ray", **engine},
    }


def test_without_an_address_the_workers_are_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = gradrun.infer(_config(tmp_path, workers=1))
    assert [s.text for s in result.interpretation if s.topic == "engine"] == [
        "1 process of 1 thread; no Ray address is set"
    ]


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"this needs Ray; pip install 'gradrun\[ray\]'"):
        gradrun.infer(_config(tmp_path, address="127.0.0.1:1"))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_an_address_without_a_cluster_is_reported_at_once(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no Ray cluster answers at {address} \(Connection"):
        gradrun.infer(_config(tmp_path, address=address))
