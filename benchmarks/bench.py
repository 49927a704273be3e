"""`make bench`: compare gradrun with hand-written code, as ratios.

Both sides of a ratio run alternately, in one process or in pairs of processes. The table shows the
median, its 95 % interval and the limit; "unsure" marks an interval that includes the limit. Exits
with 1 if a median exceeds its limit.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import loop_by_hand
import numpy as np
import torch
import user_data
from PIL import Image
from rich.console import Console
from rich.table import Table

import gradrun
from gradrun.config.load import load_config
from gradrun.config.schema import RunConfig
from gradrun.data import open_data
from gradrun.inference.device import device_context
from gradrun.inference.runner import Runner
from gradrun.models import load_model
from gradrun.output.checkpointer import Checkpointer
from gradrun.output.fingerprint import fingerprint
from gradrun.output.formats import open_writer
from gradrun.output.journal import Journal
from gradrun.results import stats
from tests.support import small_models

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="measure only lines with one of these words")
    words = parser.parse_args().words
    # Installed packages have compiled files, so the commands below should start from them too.
    compileall.compile_dir(ROOT / "gradrun", quiet=1)
    table = Table("benchmark", "median", "95 % interval", "at most", "")
    failed = False
    for title, limit, measure in LINES:
        if words and not any(word in title for word in words):
            continue
        with tempfile.TemporaryDirectory() as name:
            ratios = measure(Path(name))
        value = median(ratios)
        over = value > limit
        failed |= over
        # Five samples are too few for a 95 % interval, so show their range.
        estimate = stats.quantile(ratios, 0.5) if len(ratios) > 5 else None
        low, high = (estimate.low, estimate.high) if estimate else (min(ratios), max(ratios))
        sure = "" if low > limit or high <= limit else ", unsure"
        table.add_row(
            title,
            f"{value:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{limit:.2f}",
            ("[red]over[/]" if over else "ok") + sure,
        )
        print(f"{title}: {value:.3f} ({low:.3f} to {high:.3f})", file=sys.stderr, flush=True)
    Console().print(table)
    sys.exit(failed)


def loop(folder: Path) -> list[float]:
    """160,000 samples of 64 floats, batch 8, 8 x (Linear 64, ReLU), .npy to .npy.

    gradrun also syncs to disk and writes a journal, which the hand-written loop does not.
    """
    source = folder / "inputs.npy"
    np.save(source, np.random.default_rng(0).standard_normal((160_000, 64), dtype=np.float32))
    config = _loop_config(source, folder / "loop")
    ratios = []
    with device_context(config.run) as device:
        model = load_model(config.model, device).module
        data = open_data(config.data, seed=0)
        head = fingerprint(config, data.samples, gradrun.__version__)

        def by_hand() -> float:
            start = time.perf_counter()
            loop_by_hand.run(model, source, folder / "by_hand.npy", 8)
            return time.perf_counter() - start

        def by_gradrun() -> float:
            for file in config.output.path.glob("*"):
                file.unlink()
            config.output.path.mkdir(exist_ok=True)
            runner = Runner(model, data, config, device)
            prepared = runner.prepare()
            start = time.perf_counter()
            writer = open_writer(config.output, data.samples, 8)
            journal = Journal(config.output.path / "journal.jsonl", head)
            writer.open(prepared.outputs)
            checkpointer = Checkpointer(writer, journal, 8, row_bytes=256)
            timed = runner.run_timed_pass(prepared, writer, checkpointer.commit_if_due)
            checkpointer.close()
            if timed.stopped:
                raise timed.stopped
            return time.perf_counter() - start

        ratios = _alternate(by_gradrun, by_hand, 2 * ROUNDS)
    expected = np.load(folder / "by_hand.npy")
    assert np.array_equal(np.load(folder / "loop" / "predictions.npy"), expected)
    return ratios


def start_up(folder: Path) -> list[float]:
    """Whole processes, alternately."""
    return _alternate(
        _command("-m", "gradrun", "--help"), _command("-c", "import typer"), 2 * ROUNDS
    )


def saved_report(folder: Path) -> list[float]:
    """Show a saved run of 500 batches; whole processes, alternately."""
    run = folder / "report"
    _output("-m", "gradrun", "infer", str(ROOT / "configs" / "digits.yaml"), "-o", str(run))
    return _alternate(
        _command("-m", "gradrun", "report", str(run)),
        _command("-c", "import typer, rich"),
        2 * ROUNDS,
    )


def whole_command(folder: Path) -> list[float]:
    """Whole processes, alternately; both must write the same predictions."""
    target = folder / "digits"
    ratios = _alternate(
        _command(
            "-m", "gradrun", "infer", str(ROOT / "configs" / "digits.yaml"),
            "--output", str(target), "--overwrite",
        ),
        _command(str(ROOT / "benchmarks" / "digits_by_hand.py"), str(folder / "digits.npy")),
        ROUNDS,
    )  # fmt: skip
    expected = np.load(folder / "digits.npy")
    assert np.array_equal(np.load(target / "predictions.npy"), expected)
    return ratios


def tensor_bytes(folder: Path) -> list[float]:
    """Forward peak of 8 x (Linear 1024, ReLU), batch 256, in activations of 1 MiB."""
    activation = 256 * 1024 * 4
    model = {"source": "zoo", "name": "mlp", "args": {"width": 1024}}
    inputs = {"x": {"shape": [1024]}}
    data = {"source": "synthetic", "inputs": inputs, "samples": 256, "batch_size": 256}
    ratios = []
    for mode, activations in (("grad", 9), ("no_grad", 3), ("inference_mode", 3)):
        result = gradrun.infer(
            {"model": model, "data": data, "output": {"path": str(folder / mode)}},
            run={"mode": mode},
        )
        ratios.append((result.measurements[0].memory.forward_peak or 0) / activation / activations)
    return ratios


def memory_growth(folder: Path) -> list[float]:
    """Process peak of a run over 160,000 samples, relative to 16,000."""
    sources = {count: folder / f"{count}.npy" for count in (16_000, 160_000)}
    for count, path in sources.items():
        np.save(path, np.random.default_rng(0).standard_normal((count, 64), dtype=np.float32))

    def peak(count: int) -> float:
        out = folder / f"peak{count}"
        config = _loop_config(sources[count], out).model_dump(mode="json")
        code = (
            "import sys, json, gradrun\n"
            "result = gradrun.infer(json.loads(sys.argv[1]), overwrite=True)\n"
            "print(result.measurements[0].memory.process_peak)"
        )
        return float(_output("-c", code, json.dumps(config)))

    return [peak(160_000) / peak(16_000) for _ in range(5)]


def flat(folder: Path) -> list[float]:
    """Greatest resident set of a run over 10 million samples, relative to the first tenth."""
    samples = 10_000_000
    config = {
        "model": {"source": "layers", "layers": [{"Linear": [4, 2]}]},
        "data": {
            "source": "synthetic",
            "inputs": {"x": {"shape": [4]}},
            "samples": samples,
            "batch_size": 128,
        },
        "output": {"path": str(folder / "flat")},
    }
    code = (
        "import sys, json, gradrun, psutil\n"
        "sizes = []\n"
        "def note(progress):\n"
        "    sizes.append((progress.done / progress.total, psutil.Process().memory_info().rss))\n"
        "gradrun.infer(json.loads(sys.argv[1]), progress=note)\n"
        "print(json.dumps(sizes))"
    )
    sizes = json.loads(_output("-c", code, json.dumps(config)))
    tenth = next(size for share, size in sizes if share >= 0.1)
    return [max(size for _, size in sizes) / tenth]


def grouping(folder: Path) -> list[float]:
    """1,000 texts, a tenth of them long, through a small BERT, from reading to writing."""
    small_models.save_bert(folder / "bert", hidden_size=128, intermediate_size=512)
    (folder / "t.txt").write_text("\n".join(small_models.skewed(1_000)) + "\n")

    def run(grouped: bool) -> Callable[[], float]:
        config = {
            "model": {"source": "huggingface", "path": str(folder / "bert")},
            "data": {
                "source": "text",
                "path": str(folder / "t.txt"),
                "batch_size": 16,
                "group_by_length": grouped,
            },
            "run": {"warmup": 1},
            "measure": {"memory": False},
            "output": {
                "path": str(folder / f"grouped-{grouped}"),
                "select": "last_hidden_state",
                "transform": "mean_pool",
            },
        }
        return lambda: gradrun.infer(config, overwrite=True).measurements[0].seconds

    ratios = _alternate(run(True), run(False), 7)
    grouped, ordered = (np.load(folder / f"grouped-{g}/predictions.npy") for g in (True, False))
    assert np.allclose(grouped, ordered, atol=1e-5), "the order has changed"
    return ratios


def flat_parquet(folder: Path) -> list[float]:
    """Greatest resident set of a run over a million Parquet rows, relative to the first tenth."""
    output = _output(str(ROOT / "benchmarks" / "parquet_rows.py"), str(folder))
    sizes = dict(map(int, line.split()) for line in output.splitlines())
    return [max(sizes.values()) / sizes[1]]


def flat_iterable(folder: Path, samples: int = 5_000_000) -> list[float]:
    """Greatest resident set of a run over an IterableDataset, relative to the first tenth."""
    config = {
        "model": {"source": "layers", "layers": [{"Linear": [4, 2]}]},
        "data": {
            "source": "python",
            "target": str(ROOT / "benchmarks" / "user_data.py:Numbers"),
            "args": {"count": samples},
            "batch_size": 1024,
        },
        "run": {"threads": 1},
        "output": {"path": str(folder / "iterable"), "format": "parquet"},
    }
    code = (
        "import sys, json, gradrun, psutil\n"
        "sizes = []\n"
        "def note(progress):\n"
        "    if progress.done:\n"
        "        sizes.append((progress.done, psutil.Process().memory_info().rss))\n"
        "gradrun.infer(json.loads(sys.argv[1]), progress=note, trust_code=True)\n"
        "print(json.dumps(sizes))"
    )
    sizes = json.loads(_output("-c", code, json.dumps(config)))
    tenth = next(size for done, size in sizes if done >= samples / 10)
    return [max(size for _, size in sizes) / tenth]


def user_dataset(folder: Path, count: int = 1600) -> list[float]:
    """1,600 JPEGs through a convolution, decoded by two processes, to .npy."""
    pictures = user_data.Pictures(count)
    config = load_config(
        {
            "model": {
                "source": "layers",
                "layers": [{"Conv2d": [3, 8, 3]}, "ReLU", "Flatten", {"Linear": [30_752, 10]}],
            },
            "data": {
                "source": "python",
                "target": str(ROOT / "benchmarks" / "user_data.py:Pictures"),
                "args": {"count": len(pictures)},
                "batch_size": user_data.BATCH,
                "workers": user_data.WORKERS,
            },
            "run": {"threads": 1},
            "output": {"path": str(folder / "pictures-of-user")},
        }
    ).config
    with device_context(config.run) as device:
        model = load_model(config.model, device).module

        def by_gradrun() -> float:
            # Opened again, because the first pass starts the processes, as that of a script does.
            data = open_data(config.data, seed=0, trust_code=True)
            runner = Runner(model, data, config, device)
            prepared = runner.prepare()
            for file in config.output.path.glob("*"):
                file.unlink()
            config.output.path.mkdir(exist_ok=True)
            start = time.perf_counter()
            writer = open_writer(config.output, data.samples, data.batch_size)
            writer.open(prepared.outputs)
            timed = runner.run_timed_pass(prepared, writer)
            writer.close()
            if timed.stopped:
                raise timed.stopped
            return time.perf_counter() - start

        by_hand = partial(user_data.run, model, pictures, folder / "pictures_by_hand.npy")
        ratios = _alternate(by_gradrun, by_hand, ROUNDS)
    expected = np.load(folder / "pictures_by_hand.npy")
    assert np.array_equal(np.load(config.output.path / "predictions.npy"), expected)
    return ratios


def overlap(folder: Path) -> list[float]:
    """160 JPEGs of 1280 x 960 through resnet18 on one thread.

    Decoding takes about half as long as the forward. More would not fit next to it on two cores;
    less would not show the overlap.
    """
    drawn = np.random.default_rng(0)
    for i in range(160):
        coarse = drawn.integers(0, 256, (30, 40, 3), np.uint8)
        path = folder / "pictures" / f"{i:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((1280, 960)).save(path)
    config = load_config(
        {
            "model": {"source": "zoo", "name": "resnet18"},
            "data": {
                "source": "images",
                "path": str(folder / "pictures"),
                "preprocess": "imagenet",
                "resize": 128,
                "crop": 112,
                "batch_size": 8,
            },
            "run": {"threads": 1},
            "output": {"path": str(folder / "overlap")},
        }
    ).config
    ratios = []
    with device_context(config.run) as device, torch.inference_mode():
        model, data = load_model(config.model, device).module, open_data(config.data, seed=0)
        batches = [*data.batches()]

        def decode() -> None:
            for _ in data.batches():
                pass

        def compute() -> None:
            for batch in batches:
                model(*batch.args)

        def both() -> None:
            runner = Runner(model, data, config, device)
            prepared = runner.prepare()
            for file in config.output.path.glob("*"):
                file.unlink()
            config.output.path.mkdir(exist_ok=True)
            writer = open_writer(config.output, data.samples, data.batch_size)
            writer.open(prepared.outputs)
            seconds.append(-time.perf_counter())
            runner.run_timed_pass(prepared, writer)
            seconds[-1] += time.perf_counter()
            writer.close()

        compute()
        for _ in range(5):
            seconds: list[float] = []
            both()
            for alone in (decode, compute):
                start = time.perf_counter()
                alone()
                seconds.append(time.perf_counter() - start)
            total, decoding, computing = seconds
            print(f"whole {total:.2f} s, decode {decoding:.2f} s, compute {computing:.2f} s")
            ratios.append(total / max(decoding, computing))
    return ratios


def _loop_config(source: Path, target: Path) -> RunConfig:
    return load_config(
        {
            "model": {"source": "zoo", "name": "mlp"},
            "data": {"source": "arrays", "path": str(source), "batch_size": 8},
            "output": {"path": str(target)},
        }
    ).config


def _alternate(
    measured: Callable[[], float], reference: Callable[[], float], rounds: int
) -> list[float]:
    """Return the ratios of pairs of runs, in alternating order, after one pair of warm-up."""
    measured(), reference()
    ratios = []
    for i in range(rounds):
        if i % 2:
            seconds, expected = measured(), reference()
        else:
            expected, seconds = reference(), measured()
        ratios.append(seconds / expected)
    return ratios


def _command(*words: str) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        _output(*words)
        return time.perf_counter() - start

    return run


def _output(*words: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


LINES = (
    ("loop: time per batch against a hand-written loop", 1.05, loop),
    ("start: gradrun --help against import typer", 2.0, start_up),
    ("report: gradrun report against import typer, rich", 2.5, saved_report),
    ("whole command: digits against a plain script", 1.15, whole_command),
    ("memory: tensor bytes against the bytes counted by hand", 1.0, tensor_bytes),
    ("memory: process peak with 10 x the samples", 1.05, memory_growth),
    ("memory: resident set at 100 % and 10 % of 10 million", 1.05, flat),
    ("texts: grouped by length against the order of the input", 1 / 1.3, grouping),
    (
        "memory: resident set at 100 % and 10 % of 1 million Parquet rows",
        1.05,
        flat_parquet,
    ),
    (
        "memory: resident set at 100 % and 10 % of an iterable of 5 million",
        1.05,
        flat_iterable,
    ),
    ("data: a Dataset with 2 workers against a DataLoader loop", 1.03, user_dataset),
    ("images: whole run against the longer of decode and compute", 1.15, overlap),
)


if __name__ == "__main__":
    main()
