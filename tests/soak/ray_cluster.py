"""Lose and replace nodes of a real Ray cluster of several raylets, and compare every byte.

Prints one JSON object per scenario, and ends with exit code 1 if a result is wrong. The raylets
bind the outward address of the machine, so they run in a network namespace that has only the
loopback. Without the right to create one, the scenarios are skipped.
"""

from __future__ import annotations

import hashlib
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

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
from ray.cluster_utils import Cluster

import gradrun
from gradrun.config.engine import RayEngine
from gradrun.core.progress import Progress
from gradrun.engines import ray as engine
from gradrun.results.result import InferResult
from tests.support.engine_runs import config_for, write_inputs

NET = """
import os, time, torch

class Net(torch.nn.Module):
    def forward(self, x):
        if (x < 0).any():
            os._exit(1)
        time.sleep(0.01 * len(x))
        return x * 3 + 1
"""
RAY_CELLS = [
    ("arrays", "safetensors"),
    ("csv", "csv"),
    ("jsonl", "jsonl"),
    ("images", "npy"),
    ("synthetic", "parquet"),
    ("texts", "parquet"),
]
"""Data sources and output formats that are compared with one process."""

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

    def config(self, folder: Path, samples: int, engine: dict[str, Any] | None) -> dict[str, Any]:
        """A slow model over the numbers from 0."""
        np.save(self.folder / "n.npy", np.arange(samples, dtype=np.float32)[:, None])
        config = {
            "model": {"source": "python", "target": f"{self.folder / 'net.py'}:Net"},
            "data": {"source": "arrays", "path": str(self.folder / "n.npy"), "batch_size": 4},
            "run": {"threads": 1, "warmup": 0, "on_error": "quarantine"},
            "output": {"path": str(folder)},
            "measure": {"memory": False},
        }
        return config | ({"engine": engine} if engine else {})

    def ray(self, workers: int | str, **section: Any) -> dict[str, Any]:
        """An engine section for the cluster."""
        return {"source": "ray", "address": self.cluster.address, "workers": workers, **section}

    def resume(self, name: str, *engines: dict[str, Any] | None, samples: int = 600) -> None:
        """Interrupt a run on each engine but the last; None is one process."""
        folder, rows, found = self.folder / name, [0], {"scenario": name}

        def interrupt(progress: Progress) -> None:
            if progress.stage.startswith("predicting") and progress.done > rows[-1] + 50:
                rows.append(progress.done)
                raise KeyboardInterrupt

        for number, section in enumerate(engines):
            config, last = self.config(folder, samples, section), number == len(engines) - 1
            options: dict[str, Any] = {"trust_code": True, "resume": number > 0}
            if last:
                result = gradrun.infer(config, **options)
                found |= self._describe(result, folder, samples) | {"resumed": rows[1:]}
            else:
                try:
                    gradrun.infer(config, progress=interrupt, **options)
                except gradrun.Interrupted:
                    continue
                raise AssertionError(f"{name}: not interrupted")
        self.found[name] = found
        print(json.dumps(found), flush=True)

    def quarantine(self, name: str, sample: int, samples: int = 100) -> None:
        """Run with a sample that ends its process."""
        folder = self.folder / name
        config = self.config(folder, samples, self.ray(2))
        values = np.arange(samples, dtype=np.float32)[:, None]
        expected = values * 3 + 1
        values[sample], expected[sample] = -1, np.nan
        np.save(self.folder / "n.npy", values)
        gradrun.infer(config, trust_code=True)
        lines = (folder / "quarantine.jsonl").read_text().splitlines()
        self.found[name] = {
            "scenario": name,
            "equal": bool(np.array_equal(np.load(folder / "predictions.npy"), expected, True)),
            "quarantined": [json.loads(line)["sample"] for line in lines],
        }
        print(json.dumps(self.found[name]), flush=True)

    def equal(self, source: str, form: str) -> None:
        """Compare a run on Ray with one in this process."""
        name = f"{source} to {form}"
        inputs = self.folder / "inputs"
        if not inputs.exists():
            inputs.mkdir()
            write_inputs(inputs)
        checksums = []
        for section in (None, self.ray(2)):
            folder = self.folder / f"{source}-{form}-{'ray' if section else 'one'}"
            config = config_for(source, inputs, folder, form)
            gradrun.infer(config | ({"engine": section} if section else {}))
            files = sorted(path for path in folder.rglob("predictions*") if path.is_file())
            checksums.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
        one, spread = checksums
        self.found[name] = {"scenario": name, "equal": bool(one) and one == spread, "sha256": one}
        print(json.dumps(self.found[name]), flush=True)

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
        config = self.config(folder, samples, self.ray(**{"workers": 2, **section}))
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
    for source, form in RAY_CELLS:
        scenarios.equal(source, form)
    processes = {"source": "processes", "workers": 3}
    scenarios.resume("ray, then one process", scenarios.ray(2), None)
    scenarios.resume("processes, then ray", processes, scenarios.ray(2))
    scenarios.resume("one process, ray, processes", None, scenarios.ray(1), processes)
    scenarios.quarantine("a sample ends its worker", sample=30)
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
    for scenario in found.values():
        assert scenario.get("equal", "error" in scenario), scenario
        assert scenario.get("complete", True), scenario
    for name in ("plain", "node lost", "node replaced", "ray, then one process"):
        assert found[name]["complete"], found[name]
    assert found["a sample ends its worker"]["quarantined"] == [30]
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
