"""Kill runs that read from an object store and write to it, resume them, and compare every byte.

`object_store.py [--scheme s3|gs|az] [--kills N] [--seed S] [--memory MIB]`: real processes, SIGKILL
at random moments, a server that answers some requests with 503, a reset or late. After every second
kill the local files of the run are removed too, as on a lost machine; every third run has two
workers. With `--memory`, measures the resident memory of a run over an input of so many MiB in S3
instead.
Ends with exit code 1 if a byte differs, or the memory grows by more than 5 % and 16 MiB between the
second and the last tenth of the run.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

import gradrun
from gradrun.core.progress import Progress
from tests.support.cloud_stores import CloudStore, FaultyProxy, cloud_store
from tests.support.object_store import BUCKET, ObjectStore, object_store

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("parquet", "jsonl", "safetensors", "csv")
ROWS = 12_000
FAULTS = ("503", "reset", "slow")
MIB = 2**20
PART = 128
"""MiB per file of a large input."""

_MODEL = """\
import time
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        time.sleep(0.02)
        return self.linear(x)
"""

_DRIVER = """\
import pathlib
from gradrun.core import remote
from gradrun.output import remote_folder

remote._FIRST_WAIT = 0.05
remote_folder.SECONDS, remote_folder._TIME_SHARE = 0.2, 1
upload = remote_folder.RemoteFolder._upload

def note(self, **words):
    upload(self, **words)
    if self._journal:
        pathlib.Path("uploaded").touch()

remote_folder.RemoteFolder._upload = note

if __name__ == "__main__":
    from gradrun.cli.app import main
    main()
"""


class RandomProxy(FaultyProxy):
    """A proxy that fails at random."""

    def __init__(self, chance: random.Random, share: float, target: str) -> None:
        self._chance, self._share, self._quiet = chance, share, True
        super().__init__(target)

    def fail(self, active: bool) -> None:
        """Begin or stop to fail."""
        self._quiet = not active

    def fault(self, method: str, path: str, span: str) -> str:
        self.requests.clear()
        if not self._quiet and self._chance.random() < self._share:
            self.faults[:] = [self._chance.choice(FAULTS)]
        return super().fault(method, path, span)


class FaultyStore(ObjectStore):
    """A server of S3 that fails at random."""

    root = f"s3://{BUCKET}"

    def __init__(self, chance: random.Random, share: float) -> None:
        self._chance, self._share, self._quiet = chance, share, True
        super().__init__()

    def fail(self, active: bool) -> None:
        """Begin or stop to fail."""
        self._quiet = not active

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.requests.clear()
        if not self._quiet and self._chance.random() < self._share:
            self.faults[:] = [self._chance.choice(FAULTS)]
        return super().__call__(environ, start_response)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--scheme", choices=["s3", "gs", "az"], default="s3")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="gradrun-soak-") as name:
        os.chdir(name)
        os.environ["GRADRUN_CACHE"] = f"{name}/cache"
        setenv = os.environ.__setitem__
        if arguments.scheme == "s3":
            with object_store(setenv, FaultyStore(chance, 0.02)) as store:
                if arguments.memory:
                    return _measure_memory(store, arguments.memory)
                return _kill(store, store.fail, arguments.kills, chance)
        proxies: list[RandomProxy] = []

        def proxy(target: str) -> RandomProxy:
            proxies.append(RandomProxy(chance, 0.02, target))
            return proxies[0]

        with cloud_store(arguments.scheme, Path(name), setenv, proxy) as cloud:
            return _kill(cloud, proxies[0].fail, arguments.kills, chance)


def _kill(
    store: FaultyStore | CloudStore,
    fail: Callable[[bool], None],
    wanted: int,
    chance: random.Random,
) -> int:
    Path("net.py").write_text(_MODEL)
    Path("driver.py").write_text(_DRIVER)
    rows = np.random.default_rng(0).normal(size=(ROWS, 8)).round(4).tolist()
    ends = [0, *sorted(chance.sample(range(1, ROWS), 19)), ROWS]
    for number in range(20):
        lines = (json.dumps({"x": row}) for row in rows[ends[number] : ends[number + 1]])
        store.put(f"in/part-{number}.jsonl.gz", gzip.compress("\n".join(lines).encode()))
    kills = runs = 0
    while kills < wanted:
        form = FORMATS[runs % len(FORMATS)]
        workers = ["--workers", "2"] if runs % 3 == 2 else []
        _write_config("expected.yaml", store.root, form, f"expected-{form}")
        fail(False)
        if not Path(f"expected-{form}").exists():
            _start("expected.yaml").wait()
        expected = _local(Path(f"expected-{form}"))
        folder = f"out/{runs}"
        _write_config("run.yaml", store.root, form, f"{store.root}/{folder}")
        fail(True)
        killed = lost = 0
        while killed < min(5, wanted - kills):
            process = _start("run.yaml", *workers, "--resume")
            if not _wait(process, chance):
                break
            _end(process)
            killed += 1
            if killed % 2 == 0:
                shutil.rmtree("cache", ignore_errors=True)
                lost += 1
        kills, runs = kills + killed, runs + 1
        code = _start("run.yaml", *workers, "--resume").wait()
        fail(False)
        found = {
            key.removeprefix(f"{folder}/"): store.get(key)
            for key in store.keys(f"{folder}/")
            if not key.endswith(("result.json", "journal.jsonl"))
        }
        equal = (
            code == 0 and found == expected and gradrun.verify(f"{store.root}/{folder}").complete
        )
        print(
            f"run {runs}: {form}, {'2 workers' if workers else 'no workers'}, {killed} kills, "
            f"{lost} lost machines, exit code {code}, {'equal' if equal else 'DIFFERENT'}",
            flush=True,
        )
        if not equal:
            print(sorted(found), sorted(expected))
            return 1
    print(f"{kills} kills in {runs} runs: every byte equal")
    return 0


def _write_config(path: str, root: str, form: str, output: str) -> None:
    config = {
        "model": {"source": "python", "target": "net.py:Net"},
        "data": {
            "source": "records",
            "path": f"{root}/in",
            "inputs": {"x": {"columns": ["x"]}},
            "batch_size": 100,
        },
        "run": {"threads": 1, "warmup": 0},
        "output": {"path": output, "format": form},
        "measure": {"memory": False},
    }
    Path(path).write_text(yaml.safe_dump(config))


def _start(*words: str) -> subprocess.Popen[bytes]:
    Path("uploaded").unlink(missing_ok=True)
    return subprocess.Popen(
        [sys.executable, "driver.py", "infer", *words, "--trust-code", "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _wait(process: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """Wait for a random moment, mostly after an upload; return whether the process still runs."""
    until = time.monotonic() + 60
    while chance.random() < 0.999 and time.monotonic() < until and not Path("uploaded").exists():
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    time.sleep(chance.random())
    return process.poll() is None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its workers."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _local(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    left_out = {"result.json", "journal.jsonl"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.name not in left_out
    }


def _measure_memory(store: ObjectStore, size: int) -> int:
    process = psutil.Process()
    # The server is in this process, so the run is in another one.
    block = np.random.default_rng(0).normal(size=(MIB // 256, 64)).astype(np.float32)
    for begin in range(0, size, PART):  # moto copies a whole object for each range of it
        file = io.BytesIO()
        part = min(PART, size - begin)
        np.save(file, np.broadcast_to(block, (part, *block.shape)).reshape(-1, 64))
        store.put(f"large/{begin}.npy", file.getvalue())
        del file
    config = {
        "model": {"source": "layers", "layers": [{"Linear": [64, 1]}]},
        "data": {"source": "arrays", "path": "s3://bucket/large/*.npy", "batch_size": 256},
        "run": {"threads": 1},
        "output": {"path": "s3://bucket/out", "format": "safetensors"},
        "measure": {"memory": False},
    }
    Path("config.json").write_text(json.dumps(config))
    code = f"from tests.soak.object_store import watch; watch({str(Path.cwd())!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    peaks = json.loads(Path("peaks.json").read_text())
    listed = " ".join(f"{peak / MIB:.0f}" for peak in peaks)
    print(f"resident memory by tenth of an input of {size} MiB, in MiB: {listed}")
    print(f"server and this process: {process.memory_info().rss / MIB:.0f} MiB")
    return int(peaks[-1] - peaks[1] > max(0.05 * peaks[1], 16 * MIB))


def watch(folder: str) -> None:
    """Run config.json of a folder, and write the peak memory of each tenth to peaks.json."""
    os.chdir(folder)
    process, peaks = psutil.Process(), [0] * 10

    def note(progress: Progress) -> None:
        if progress.total:
            tenth = min(9, 10 * progress.done // progress.total)
            peaks[tenth] = max(peaks[tenth], process.memory_info().rss)

    gradrun.infer(json.loads(Path("config.json").read_text()), progress=note)
    Path("peaks.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    sys.exit(main())
