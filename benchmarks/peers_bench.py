"""`make bench-peers`: gradrun against other tools with the same model, weights, data and threads.

Each peer has a process of its own, which prepares, runs once, and then waits for its turns. Before
anything is timed, its predictions must agree with gradrun's: the table lists peers that fail or
differ. Then all others run in random order, once per round; a sitting has several rounds, and the
next one starts new processes.
The table shows the ratio of the medians, peer by gradrun, with its 95 % bootstrap interval over
sittings and rounds: over 1, gradrun is faster. Close other programs first.

SENTENCE_MODEL=FOLDER uses a sentence-transformers model instead of one with random weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
from peer_work import WORKS, Work
from peers import PEERS, Peer
from rich.console import Console
from rich.table import Table

from gradrun.core.cpu import available_cpus

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4
"""Greatest difference of a prediction from gradrun's, by the greatest prediction."""

_RESAMPLES = 2000

Times = dict[str, list[list[float]]]
"""Peer -> sitting -> the seconds of each round."""


class PeerFailed(Exception):
    """A peer that cannot be timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--works", default=",".join(WORKS), help="names, separated by commas")
    parser.add_argument("--peers", default="", help="parts of names, separated by commas")
    parser.add_argument("--sittings", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="0: compare predictions only")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--times", type=Path, help="a JSON file; new sittings are added to it")
    options = parser.parse_args()
    for name in options.works.split(","):
        chosen = [
            peer
            for number, peer in enumerate(PEERS)
            if WORKS[name].kind in peer.kinds
            and (number == 0 or any(part in peer.name for part in options.peers.split(",")))
        ]
        missing = [peer for peer in chosen if not all(map(find_spec, peer.modules))]
        failed = {peer.name: f"pip install {peer.install}" for peer in missing}
        saved = json.loads(options.times.read_text()) if _exists(options.times) else {}
        times: Times = saved.setdefault(name, {})
        for _ in range(options.sittings):
            present = [peer for peer in chosen if peer.name not in failed]
            with tempfile.TemporaryDirectory() as folder:
                WORKS[name].make(Path(folder), WORKS[name])
                failed |= sit(name, present, Path(folder), options.rounds, options.threads, times)
            if options.times:
                options.times.write_text(json.dumps(saved))
        if options.rounds:
            print_table(WORKS[name], times, failed)


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


def sit(
    work: str,
    peers: Sequence[Peer],
    folder: Path,
    rounds: int,
    threads: int,
    times: Times,
) -> dict[str, str]:
    """Start a process per peer, compare their predictions, and add the seconds of all rounds.

    Returns:
        The peers that cannot be timed, and why.
    """
    sides, failed, sitting = {}, {}, len(next(iter(times.values()), []))
    try:
        for peer in peers:  # one after the other: their preparation would disturb each other
            process = _start(work, peer, folder, threads)
            try:
                _answer(process, peer.name, folder)
                check_equal(folder, peer.name)
                sides[peer.name] = process
            except PeerFailed as error:
                process.kill()
                if peer is PEERS[0]:
                    raise SystemExit(str(error)) from error
                failed[peer.name] = str(error)
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            order = random.Random(f"{sitting} {number}").sample(sorted(sides), len(sides))
            for name in order:
                stdin = sides[name].stdin
                assert stdin
                print("run", file=stdin, flush=True)
                found[name].append(_answer(sides[name], name, folder))
    finally:
        for process in sides.values():
            process.kill()
            process.wait()
    for name, seconds in found.items():
        times.setdefault(name, []).append(seconds)
    return failed


def _start(work: str, peer: Peer, folder: Path, threads: int) -> subprocess.Popen[str]:
    count = str(threads)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path, "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    words = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), work, peer.name]
    with (folder / f"{peer.name}.err").open("w") as errors:
        return subprocess.Popen(
            [*words, str(folder), count], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip


def _answer(process: subprocess.Popen[str], name: str, folder: Path) -> float:
    assert process.stdout
    line = process.stdout.readline()  # blocks: a busy parent would take a core
    if not line:
        errors = (folder / f"{name}.err").read_text(errors="replace")
        print(errors[-3000:], file=sys.stderr)
        raise PeerFailed(f"exit code {process.wait()}: {(errors.splitlines() or [''])[-1]}")
    return float(line)


def check_equal(folder: Path, name: str) -> None:
    """Raise PeerFailed if a peer computes something else than gradrun."""
    expected, found = (
        np.load(folder / "runs" / side / "predictions.npy") for side in (PEERS[0].name, name)
    )
    if expected.shape != found.shape:
        raise PeerFailed(f"predictions {found.shape} instead of {expected.shape}")
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"{name}: greatest difference {error:.1e} of the greatest prediction", file=sys.stderr)
    if not error <= TOLERANCE:
        raise PeerFailed(f"predictions differ by {error:.1e}, more than {TOLERANCE:.0e}")


def ratio(base: list[list[float]], other: list[list[float]]) -> tuple[float, float, float]:
    """Return the ratio of medians, other / base, with its 95 % bootstrap interval.

    Sittings are drawn first, then rounds of each, because processes differ more than rounds do.
    """
    drawn, values = random.Random(0), []
    for _ in range(_RESAMPLES):
        pairs = []
        for sitting in drawn.choices(range(len(base)), k=len(base)):
            rounds = drawn.choices(range(len(base[sitting])), k=len(base[sitting]))
            pairs += [(base[sitting][i], other[sitting][i]) for i in rounds]
        values.append(median(o for _, o in pairs) / median(b for b, _ in pairs))
    values.sort()
    low, high = values[_RESAMPLES // 40], values[-_RESAMPLES // 40 - 1]
    return overall(other) / overall(base), low, high


def overall(sittings: list[list[float]]) -> float:
    """Return the median over all rounds."""
    return median(itertools.chain(*sittings))


def print_table(work: Work, times: Times, failed: dict[str, str]) -> None:
    """Print the ratios, and the peers that were not timed."""
    base = times[PEERS[0].name]
    title = f"{work.title}: {len(base)} sittings, {sum(map(len, base))} rounds"
    table = Table("peer", "seconds", "peer / gradrun", "95 % interval", title=title)
    for name, seconds in times.items():
        value, low, high = ratio(base, seconds)
        table.add_row(name, f"{overall(seconds):.3g}", f"{value:.2f}", f"{low:.2f} to {high:.2f}")
    for name, reason in failed.items():
        table.add_row(name, "not timed", reason, "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
