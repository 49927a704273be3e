"""Kill workers and drivers of spread runs at random moments, and compare every byte at the end.

A run whose driver was killed is resumed with another number of workers, or without an engine, until
it finishes. Prints one line per run, and ends with exit code 1 after the first difference.

With `--shards`, each run reads the samples from shards of another format, and must write the bytes
of one array.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, BATCH = 1600, 4
FORMATS = ("npy", "safetensors", "jsonl", "csv", "parquet")

NET = """
import time, torch

class Net(torch.nn.Module):
    def forward(self, x):
        time.sleep(0.004 * len(x))
        return x * 3 + 1
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", action="store_true", help="read shards instead of one array")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="gradrun-soak-") as name:
        folder = Path(name)
        (folder / "net.py").write_text(NET)
        values = np.arange(SAMPLES, dtype=np.float32)
        np.save(folder / "x.npy", values[:, None])
        kinds = _write_shards(folder, values, chance) if arguments.shards else [""]
        expected = {form: _run_whole(_write(folder, f"whole-{form}", form)) for form in FORMATS}
        kills = runs = 0
        while kills < arguments.kills:
            form = chance.choice(FORMATS)
            kind = kinds[runs % len(kinds)]
            config = _write(folder, f"run-{runs}", form, kind)
            most = min(arguments.kills - kills, -(-arguments.kills // len(kinds)))
            done, count = _run_with_kills(config, chance, most)
            kills, runs = kills + count, runs + 1
            equal = done == expected[form]
            found = "equal" if equal else "DIFFERENT"
            print(f"run {runs}: {kind or 'npy'} to {form}, {count} kills, {found}", flush=True)
            if not equal:
                return 1
    print(f"{kills} kills in {runs} runs: every byte equal")
    return 0


def _write_shards(folder: Path, values: np.ndarray, chance: random.Random) -> list[str]:
    """Write the values as 30 shards of random lengths in each of some formats; return these."""
    ends = sorted(chance.sample(range(1, len(values)), 29))
    parts = np.split(values, ends)
    kinds = ["jsonl.gz", "csv.xz", "parquet", "npy"]
    for kind in kinds:
        (folder / kind).mkdir()
        for number, part in enumerate(parts):
            path, table = folder / kind / f"part-{number}.{kind}", pandas.DataFrame({"x": part})
            match kind:
                case "jsonl.gz":
                    table.to_json(path, orient="records", lines=True)
                case "csv.xz":
                    table.to_csv(path, index=False)
                case "parquet":
                    table.to_parquet(path)
                case "npy":
                    np.save(path, part[:, None])
    return kinds


def _write(folder: Path, name: str, form: str, kind: str = "") -> Path:
    data: dict[str, Any] = {"source": "arrays", "path": str(folder / (kind or "x.npy"))}
    if kind not in {"", "npy"}:
        data |= {"source": "records", "inputs": {"x": {"columns": ["x"]}}}
    config = {
        "model": {"source": "python", "target": str(folder / "net.py") + ":Net"},
        "data": data | {"batch_size": BATCH},
        "run": {"threads": 1, "warmup": 0},
        "output": {"path": str(folder / name), "format": form},
        "measure": {"memory": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _start(config: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gradrun", "infer", str(config), "--trust-code", "--resume"]
    return subprocess.Popen(
        [*command, *(["--workers", str(workers)] if workers else [])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _run_whole(config: Path) -> dict[str, bytes]:
    driver = _start(config, 0)
    _, errors = driver.communicate()
    if driver.returncode:
        raise SystemExit(f"{config.name}: exit code {driver.returncode}\n{errors.decode()}")
    return _predictions(config)


def _predictions(config: Path) -> dict[str, bytes]:
    folder = config.with_suffix("")
    return {p.name: p.read_bytes() for p in folder.rglob("predictions*") if p.is_file()}


def _run_with_kills(config: Path, chance: random.Random, most: int) -> tuple[dict[str, bytes], int]:
    """Run a config until it finishes; return its files and the number of kills."""
    kills = 0
    journal = config.with_suffix("") / "journal.jsonl"
    while True:
        driver = _start(config, chance.choice([0, 1, 2, 3]))
        while kills < most:
            ranges = _lines(journal)
            while driver.poll() is None and _lines(journal) <= max(1, ranges):
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.4))
            if driver.poll() is not None:
                break
            workers = psutil.Process(driver.pid).children()
            victim = chance.choice([driver.pid, *(worker.pid for worker in workers)])
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                kills += 1
            if victim == driver.pid:
                _, alive = psutil.wait_procs(workers, timeout=10)
                if alive:
                    raise SystemExit(f"{len(alive)} workers outlived their driver")
                break
        _, errors = driver.communicate()
        if not driver.returncode:
            return _predictions(config), kills
        # Three workers may have been killed before they were ready.
        if driver.returncode > 0 and b"before its first batch" not in errors:
            raise SystemExit(f"{config.name}: exit code {driver.returncode}\n{errors.decode()}")


def _lines(journal: Path) -> int:
    try:
        return len(journal.read_bytes().splitlines())
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
