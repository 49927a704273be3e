"""The engine `ray` on a real cluster of several raylets, and its errors without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gradrun
from gradrun.core.errors import ConfigError
from tests.conftest import ROOT

pytest.importorskip("ray")

IN_NAMESPACE = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""Raylets bind the outward address of the machine; a network namespace has only the loopback."""


def _has_namespaces() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*IN_NAMESPACE, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not _has_namespaces(), reason="needs the right to create a network namespace")
@pytest.mark.timeout(240)
def test_a_lost_node_changes_no_byte_and_a_cluster_without_room_is_an_error(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "tests.engines.ray_cluster", str(tmp_path)]
    done = subprocess.run(
        [*IN_NAMESPACE, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["scenario"]: line for line in map(json.loads, done.stdout.splitlines())}
    plain, lost = found["plain"], found["node lost"]
    assert plain["equal"]
    assert plain["complete"]
    assert len(plain["samples"]) == 2
    assert plain["engine"][0].startswith("2 Ray workers of 1 CPU at 127.0.0.1:")
    assert lost["equal"]
    assert lost["complete"]
    assert lost["lost"], "the result names the worker that was lost"
    assert sum(lost["samples"]) == 2000
    assert found["offer"]["text"].startswith("room for 2 workers of 1 CPU; the cluster has 3 nodes")
    assert "has no room for a worker of 64 CPUs: the cluster has" in found["too large"]["error"]


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
        "1 process of 1 thread"
    ]


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"this needs Ray; pip install 'gradrun\[ray\]'"):
        gradrun.infer(_config(tmp_path, address="127.0.0.1:1"))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_an_address_without_a_cluster_is_reported_at_once(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no Ray cluster answers at {address} \(Connection"):
        gradrun.infer(_config(tmp_path, address=address))
