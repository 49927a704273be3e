"""Scenarios on a real Ray cluster of several raylets; test_ray.py runs it in a new process.

Prints one JSON object per scenario. The raylets need a network namespace, because they bind the
outward address of the machine.
"""

from __future__ import annotations

import json
import os
import sys
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
READY_SECONDS = 60.0


class Scenarios:
    """A cluster whose head runs no worker, and runs in a thread beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "net.py").write_text(NET)
        np.save(folder / "n.npy", np.arange(2000, dtype=np.float32)[:, None])
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


def main() -> None:
    scenarios = Scenarios(Path(sys.argv[1]))
    wanted = sys.argv[2:]

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
        scenarios.remove(2)

    section = RayEngine(source="ray", address=scenarios.cluster.address)
    print(json.dumps({"scenario": "offer", "text": engine.offer(section)}), flush=True)
    scenarios.run("plain", samples=200)
    scenarios.run("too large", workers="auto", cpus=64)
    scenarios.run("node lost", lose_a_node)
    if "all" in wanted:
        scenarios.run("node replaced", replace_the_only_node, workers=1)
        engine._ROOM_SECONDS = 5
        scenarios.run("no node left", lose_the_only_node, workers=1)
    scenarios.cluster.shutdown()


if __name__ == "__main__":
    main()
