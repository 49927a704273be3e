"""Kill runs at moments drawn by lot, resume them, and compare with a run that nobody killed.

`kill.py [--kills N] [--seed S]`: real processes, SIGKILL, all sinks in turn. The moments are drawn
from the course of a whole run: a phase, one of its occurrences, a point within that. Prints in
which phase the kills landed; exits 1 when a byte differs or a sample is missing or doubled.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WRITERS = ("npy", "jsonl", "csv", "safetensors", "parquet")
PHASES = {"start": 1, "load": 1, "open": 2, "run": 3, "commit": 6, "close": 2, "end": 1}
"""Of a process: up to the model, up to the files, the files made, predictions between commits, a
commit, the last one and the files' end, memory and result; and how often each is aimed at."""

LONG = 1200
"""Samples of a run that somebody watches."""

SHORT = 237
"""Samples of a run that is killed: a third of a second, in a dozen commits and five parts."""

_MODEL = """\
import time
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        time.sleep(0.002)
        return self.linear(x)
"""
_DRIVER = """\
from tests.soak.kill import hurry
hurry()
from gradrun.cli.app import main
main()
"""

# Forked from a process that has torch already, so that a hundred kills take a minute.
_processes = multiprocessing.get_context("forkserver")


def hurry() -> None:
    """Make commits so frequent, and parts so small, that a short run has many."""
    from gradrun.inference import runner
    from gradrun.output import checkpointer
    from gradrun.output.formats import npy, sharded_writer

    checkpointer.SECONDS, checkpointer._TIME_SHARE = 0.02, 1.0
    runner._CALLBACK_NS, runner.WARM_UP_SECONDS = 5_000_000, 0.01
    sharded_writer.SHARD_BYTES, sharded_writer.ID_BYTES, npy.BUFFER_BYTES = 50 * 12, 0, 40 * 12


class Folder:
    """A config of its own for each sink, and the command that runs it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "net.py").write_text(_MODEL)
        (path / "driver.py").write_text(_DRIVER)
        for sink in WRITERS:
            config = {
                "model": {"source": "python", "target": "net.py:Net"},
                "data": {
                    "source": "synthetic",
                    "inputs": {"x": {"shape": [8]}},
                    "samples": LONG,
                    "batch_size": 4,
                },
                "run": {"threads": 1},
                "measure": {"memory": False},
                "output": {"path": sink, "format": sink},
            }
            (path / f"{sink}.yaml").write_text(json.dumps(config))

    def words(self, sink: str, out: str, *more: str) -> list[str]:
        """What is typed behind `gradrun`."""
        return ["infer", f"{sink}.yaml", "--trust-code", "--output", out, *more]

    def start(self, sink: str, out: str, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "driver.py", *self.words(sink, out, *more)],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def whole(self, sink: str) -> dict[str, bytes]:
        """The files of a run that nobody kills."""
        self.ended(self.start(sink, f"{sink}-whole"))
        return self.files(f"{sink}-whole")

    def ended(self, process: subprocess.Popen[bytes]) -> None:
        _, said = process.communicate(timeout=120)
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {said.decode()}")

    def files(self, out: str) -> dict[str, bytes]:
        """The predictions, and nothing of the journal, whose ranges depend on the clock."""
        names = sorted((self.path / out).iterdir())
        return {
            file.name: file.read_bytes() for file in names if file.name.startswith("predictions")
        }

    def committed(self, out: str) -> int:
        """Samples that the journal tells of."""
        journal = self.path / out / "journal.jsonl"
        lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
        return json.loads(lines[-1])["stop"] if lines else 0


# --- the process that is killed ----------------------------------------------------------------


def _process(folder: Path, words: list[str], phases: Connection) -> None:
    """`gradrun` with these words, telling its phases."""
    os.chdir(folder)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    from gradrun.cli import app
    from gradrun.inference import infer
    from gradrun.output import checkpointer

    def told(home: Any, name: str, before: str, after: str) -> None:
        real: Callable[..., Any] = getattr(home, name)

        def call(*given: Any, **named: Any) -> Any:
            phases.send_bytes(before.encode())
            found = real(*given, **named)
            phases.send_bytes(after.encode())
            return found

        setattr(home, name, call)

    def slow(descriptor: int) -> None:
        time.sleep(0.002)  # as disks are that are not a cache: a kill must be able to hit it
        sync(descriptor)
        time.sleep(0.002)

    sync, os.fsync = os.fsync, slow
    hurry()
    told(infer, "load_model", "load", "load")
    told(infer, "_open_files", "open", "run")
    told(checkpointer.Checkpointer, "commit", "commit", "run")
    told(checkpointer.Checkpointer, "close", "close", "end")
    sys.argv = ["gradrun", *words]
    app.main()


@contextmanager
def _preloaded() -> Iterator[None]:
    """Have torch imported by the process that the others are forked from."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    _processes.set_forkserver_preload(
        ["torch", "gradrun.cli.app", "gradrun.inference.infer", "rich.table"]
    )
    try:
        yield
    finally:
        os.environ["PYTHONPATH"] = before


# --- the one that kills ------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """So many seconds into the n-th time that a phase begins."""

    phase: str
    times: int
    seconds: float


@dataclass
class Course:
    """What a process went through, each phase with when it began."""

    phases: list[tuple[str, float]] = field(default_factory=list)
    ended: float = 0.0
    code: int | None = None

    def draw(self, lot: random.Random) -> Moment:
        """A moment of it."""
        ends = [*(at for _, at in self.phases[1:]), self.ended]
        (phase,) = lot.choices([*PHASES], [*PHASES.values()])
        spans = [
            end - at for (name, at), end in zip(self.phases, ends, strict=True) if name == phase
        ]
        times = lot.randrange(len(spans))
        return Moment(phase, times, lot.uniform(0, 1.1) * spans[times])


@dataclass(frozen=True)
class Kill:
    """Where one landed."""

    sink: str
    resumes: int
    """How often the run had been resumed."""
    phase: str
    kept: int
    """Samples that the journal told of."""


def follow(folder: Path, words: list[str], moment: Moment | None = None) -> Course:
    """Run gradrun in a process of its own, to its end or to the moment when it is killed."""
    ours, theirs = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_process, args=(folder, words, theirs))
    process.start()
    theirs.close()
    course = Course([("start", time.monotonic())])
    deadline, left = time.monotonic() + 60, moment.times if moment else 0
    if moment and moment.phase == "start":
        deadline = time.monotonic() + moment.seconds
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            course.phases.append((ours.recv_bytes().decode(), time.monotonic()))
            if moment and course.phases[-1][0] == moment.phase:
                left -= 1
                if left == -1:
                    deadline = time.monotonic() + moment.seconds
        process.kill()
        while ours.poll(60):
            course.phases.append((ours.recv_bytes().decode(), time.monotonic()))
    except EOFError:  # it has ended, by itself or not
        course.ended = time.monotonic()
    process.join()
    course.code = process.exitcode
    return course


def kill_and_resume(
    folder: Folder, sink: str, moments: list[Moment], out: str
) -> Iterator[tuple[str, int]]:
    """Kill a run at each moment and then let it end; the phase and what was kept, of each kill."""
    words = folder.words(sink, out, "--set", f"data.samples={SHORT}", "--resume")
    for moment in moments:
        course = follow(folder.path, words, moment)
        if course.code == -signal.SIGKILL:
            yield course.phases[-1][0], check_truth(folder, out)
        elif course.code:
            raise SystemExit(f"{out}: {_ended_badly(folder.path, course)}")
    course = follow(folder.path, words)
    if course.code:
        raise SystemExit(f"{out}: {_ended_badly(folder.path, course)}")


def _ended_badly(folder: Path, course: Course) -> str:
    said = folder / "said.txt"
    phases = [phase for phase, _ in course.phases]
    return f"exit code {course.code} after {phases}: {said.read_text() if said.exists() else ''}"


def check_truth(folder: Folder, out: str) -> int:
    """See that what the journal says is in the files; how many samples that is."""
    from gradrun.output import journal
    from gradrun.output.verification import damaged_ranges

    path = folder.path / out
    if not (path / "journal.jsonl").exists():
        return 0
    kept = journal.read(path / "journal.jsonl")
    if faults := [*damaged_ranges(path, kept)]:
        raise SystemExit(f"{path}: the journal tells of what is not there: {faults}")
    return kept.committed


def check_whole(folder: Folder, out: str, whole: dict[str, bytes]) -> None:
    """See that the folder is that of the run that nobody killed."""
    found = folder.files(out)
    if found != whole:
        differing = [name for name in {*found, *whole} if found.get(name) != whole.get(name)]
        raise SystemExit(f"{out} in {folder.path}: {sorted(differing)} differ")
    others = {file.name for file in (folder.path / out).iterdir()} - found.keys()
    if others != {"journal.jsonl", "result.json"}:
        raise SystemExit(f"{out} in {folder.path}: beside the predictions lie {sorted(others)}")
    result = json.loads((folder.path / out / "result.json").read_text())
    if result["predictions"] != SHORT or check_truth(folder, out) != SHORT:
        raise SystemExit(f"{out} in {folder.path}: the result or the journal tells of fewer")


def run(path: Path, kills: int, seed: int) -> list[Kill]:
    """So many kills, spread over the sinks; where they landed."""
    folder, lot = Folder(path), random.Random(seed)
    landed: list[Kill] = []
    with _preloaded():
        courses: dict[str, Course] = {}
        for sink in WRITERS:
            words = folder.words(sink, f"{sink}-whole", "--set", f"data.samples={SHORT}")
            courses[sink] = follow(path, words)
            if courses[sink].code:
                raise SystemExit(_ended_badly(path, courses[sink]))
        number = 0
        while len(landed) < kills:
            sink = WRITERS[number % len(WRITERS)]
            times = min(lot.choice([1, 1, 2]), kills - len(landed))
            moments = [courses[sink].draw(lot) for _ in range(times)]
            out = f"{sink}-{number}"
            killed = enumerate(kill_and_resume(folder, sink, moments, out))
            landed += [Kill(sink, resumes, *where) for resumes, where in killed]
            check_whole(folder, out, folder.files(f"{sink}-whole"))
            number += 1
    return landed


def table(landed: list[Kill]) -> str:
    """How many kills landed in which phase of which sink's run."""
    counts = Counter((kill.phase, kill.sink) for kill in landed)
    lines = ["killed in " + "".join(f"{sink:>13}" for sink in (*WRITERS, "all"))]
    for phase in PHASES:
        row = [counts[phase, sink] for sink in WRITERS]
        lines.append(f"{phase:10}" + "".join(f"{count:13}" for count in (*row, sum(row))))
    resumes = sum(kill.resumes > 0 for kill in landed)
    midway = sum(0 < kill.kept < SHORT for kill in landed)
    lines.append(f"{len(landed)} kills, {resumes} of a resume; {midway} left part of the samples")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(table(run(Path(name), asked.kills, asked.seed)))
    print("every file is byte for byte that of a run nobody killed")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
