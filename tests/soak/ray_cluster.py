"""Lose and replace nodes of a real Ray cluster of several raylets, and compare every byte.

Prints one JSON object per scenario, and ends with exit code 1 if a result is wrong. The raylets
bind the outward address of the machine, so they run in a network namespace that has only the
loopback. Without the right to create one, the scenarios are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
from ray.cluster_utils import Cluster

import gradrun
from gradrun.config.engine import RayEngine
from gradrun.engines import ray as engine
from gradrun.results.result import InferResult

NET = """
import time, torch

class Net(torch.nn.Module):
    def forward(self, x):
        time.sleep(0.01 * len(x))
        return x * 3 + 1
"""
SECONDS_PER_SAMPLE = 0.01
READY_SECONDS = 180.0
ROOT = Path(__file__).resolve().parents[2]
IN_NAMESPACE = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


class Scenarios:
    """A cluster whose head runs no worker, and runs in a thread beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, dict[str, Any]] = {}
        """The answer of each scenario."""
        (folder / "net.py").write_text(NET)
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]

    def run(
        self,
        name: str,
        act: Callable[[Path], None] = lambda folder: None,
        *,
        samples: int = 2000,
        **section: Any,
    ) -> None:
        """Run a config; call `act` with its output folder meanwhile; print what happened."""
        folder = self.folder / name
        np.save(self.folder / "n.npy", np.arange(samples, dtype=np.float32)[:, None])
        config = {
            "model": {"source": "python", "target": f"{self.folder / 'net.py'}:Net"},
            "data": {"source": "arrays", "path": str(self.folder / "n.npy"), "batch_size": 4},
            "run": {"threads": 1, "warmup": 0},
            "output": {"path": str(folder)},
            "measure": {"memory": False},
            "engine": {"source": "ray", "address": self.cluster.address, "workers": 2, **section},
        }
        found: dict[str, Any] = {"scenario": name}

        def infer() -> None:
            try:
                result = gradrun.infer(config, trust_code=True)
            except gradrun.GradrunError as error:
                found["error"] = f"{type(error).__name__}: {error}"
            else:
                found.update(self._describe(result, folder, samples))

        thread = threading.Thread(target=infer)
        began = time.monotonic()
        thread.start()
        act(folder)
        thread.join()
        found["seconds"] = round(time.monotonic() - began, 1)
        self.found[name] = found
        print(json.dumps(found), flush=True)

    def _describe(self, result: InferResult, folder: Path, samples: int) -> dict[str, Any]:
        expected = np.arange(samples, dtype=np.float32)[:, None] * 3 + 1
        workers = result.measurements[0].workers
        return {
            "equal": bool(np.array_equal(np.load(folder / "predictions.npy"), expected)),
            "complete": gradrun.verify(folder).complete,
            "samples": [worker.samples for worker in workers],
            "lost": [worker.lost for worker in workers if worker.lost],
            "engine": [s.text for s in result.interpretation if s.topic == "engine"],
        }

    def wait_for_rows(self, folder: Path, ranges: int = 3) -> None:
        """Wait until the journal has this many ranges."""
        journal = folder / "journal.jsonl"
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if journal.exists() and len(journal.read_text().splitlines()) > ranges:
                return
            time.sleep(0.05)
        raise TimeoutError(f"{journal} has no {ranges} ranges")

    def remove(self, number: int) -> None:
        """Kill a node without grace."""
        self.cluster.remove_node(self.nodes[number], allow_graceful=False)


def run_scenarios(folder: Path) -> None:
    """Run every scenario.

    Raises:
        AssertionError: a result is wrong.
    """
    scenarios = Scenarios(folder)

    def lose_a_node(folder: Path) -> None:
        scenarios.wait_for_rows(folder)
        scenarios.remove(0)

    def replace_the_only_node(folder: Path) -> None:
        scenarios.wait_for_rows(folder)
        scenarios.remove(1)
        time.sleep(2)
        scenarios.nodes.append(scenarios.cluster.add_node(num_cpus=1))

    def lose_the_only_node(folder: Path) -> None:
        scenarios.wait_for_rows(folder)
        engine._ROOM_SECONDS = 5
        scenarios.remove(2)

    offer = engine.offer(RayEngine(source="ray", address=scenarios.cluster.address))
    assert offer.startswith("room for 2 workers of 1 CPU; the cluster has 3 nodes"), offer
    scenarios.run("plain", samples=200)
    scenarios.run("too large", workers="auto", cpus=64)
    scenarios.run("node lost", lose_a_node)
    scenarios.run("node replaced", replace_the_only_node, workers=1)
    scenarios.run("no node left", lose_the_only_node, workers=1)
    scenarios.cluster.shutdown()
    check(scenarios.found)


def check(found: dict[str, dict[str, Any]]) -> None:
    """Compare the answers with those that are expected.

    Raises:
        AssertionError: an answer differs.
    """
    for name in ("plain", "node lost", "node replaced"):
        assert found[name].get("equal"), found[name]
        assert found[name]["complete"], found[name]
    plain = found["plain"]
    assert len(plain["samples"]) == 2, plain
    assert plain["engine"][0].startswith("2 Ray workers of 1 CPU at 127.0.0.1:"), plain
    for name in ("node lost", "node replaced"):
        assert found[name]["lost"], "the result names the worker that was lost"
        assert sum(found[name]["samples"]) == 2000, found[name]
    error = "has no room for a worker of 64 CPUs: the cluster has"
    assert error in found["too large"]["error"], found["too large"]
    assert "no room for a worker in 5 s" in found["no node left"]["error"], found["no node left"]


def main() -> int:
    if len(sys.argv) > 1:
        run_scenarios(Path(sys.argv[1]))
        return 0
    if not (shutil.which("unshare") and shutil.which("ip")) or subprocess.call(
        [*IN_NAMESPACE, "true"], stderr=subprocess.DEVNULL
    ):
        print("skipped: needs the right to create a network namespace")
        return 0
    with tempfile.TemporaryDirectory(prefix="gradrun-soak-") as folder:
        command = [sys.executable, __file__, folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.call([*IN_NAMESPACE, *command], cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())
