"""Kill runs at random moments, resume them, and compare with an uninterrupted run.

`kill.py [--kills N] [--seed S] [--data SOURCE]`: real processes, SIGKILL, all formats in turn. The
moments are drawn from the timeline of a complete run: a phase, one of its occurrences, a point
within it. Prints in which phases the kills happened; exits with 1 if a byte differs or a sample is
missing or duplicated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.forked import PROCESSES, ForkedCommand, preloaded

WRITERS = ("npy", "jsonl", "csv", "safetensors", "parquet", "boxes", "tables", "files")
"""A format each; boxes and tables: values of any size in jsonl and Parquet."""

TEXT_WRITERS = ("jsonl", "csv", "parquet", "files")
"""Formats of generated text."""

_FORMATS = {"boxes": "jsonl", "tables": "parquet"}
PHASES = {"start": 1, "load": 1, "open": 2, "run": 3, "commit": 6, "close": 2, "end": 1}
"""Phase of a process to its weight in the draw. start: until the model is loaded; load: until the
files are opened; open: files are created; run: predictions between commits; commit; close: the last
commit; end: memory pass and result."""

LONG = 1200
"""Samples of a run that receives a signal."""

SHORT = 237
"""Samples of a run that is killed: a third of a second, a dozen commits and five shards."""

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


class Boxes(Net):
    def forward(self, x):
        scores = super().forward(x)
        return [{"boxes": row[row > 0], "text": f"{len(row[row > 0])} found"} for row in scores]
"""
_ITEMS = """\
import torch
from torch.utils.data import Dataset, IterableDataset


class Items(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return torch.randn(8, generator=torch.Generator().manual_seed(i))


class Stream(IterableDataset):
    def __init__(self, count):
        self.items = Items(count)

    def __iter__(self):
        return (self.items[i] for i in range(len(self.items)))
"""


@dataclass(frozen=True)
class Workload:
    """The samples of the runs, and the model."""

    length: tuple[str, Callable[[int], Any]]
    """A key of the section `data`, and its value for a number of samples."""
    data: dict[str, Any]
    writers: tuple[str, ...] = WRITERS
    model: dict[str, Any] | None = None
    """Default: a linear layer that takes 2 ms."""

    def prepare(self, path: Path) -> None:
        """Write the files that the config names."""
        if self.model:
            _save_generator(path)


WORKLOADS = {
    "synthetic": Workload(
        ("samples", int), {"source": "synthetic", "inputs": {"x": {"shape": [8]}}}
    ),
    "dataset": Workload(
        ("args", lambda count: {"count": count}),
        {"source": "python", "target": "items.py:Items", "workers": 1},
    ),
    "iterable": Workload(
        ("args", lambda count: {"count": count}), {"source": "python", "target": "items.py:Stream"}
    ),
    "generation": Workload(
        ("path", lambda count: f"prompts-{count}.txt"),
        {"source": "text"},
        TEXT_WRITERS,
        {
            "source": "huggingface",
            "path": "gpt",
            "auto_class": "AutoModelForCausalLM",
            "generate": {"max_new_tokens": 5, "do_sample": True},
        },
    ),
}
"""Value of --data -> the workload."""


def _save_generator(path: Path) -> None:
    """Save a small GPT-2, and prompts of which some are long."""
    from tests.models.test_texts import save_causal, save_gpt_tokenizer
    from tests.support.small_models import skewed

    save_gpt_tokenizer(path / "gpt")
    save_causal(path / "gpt", "GPT2LMHeadModel")
    for count in (SHORT, LONG):
        prompts = [f"{number} {text}"[:40] for number, text in enumerate(skewed(count))]
        (path / f"prompts-{count}.txt").write_text("\n".join(prompts) + "\n")


def hurry() -> None:
    """Make commits frequent and shards small, so that a short run has many."""
    from gradrun.inference import first_batch, timed_loop
    from gradrun.output import checkpointer
    from gradrun.output.formats import npy, sharded_writer

    checkpointer.SECONDS, checkpointer._TIME_SHARE = 0.02, 1.0
    timed_loop._CALLBACK_NS, first_batch.WARM_UP_SECONDS = 5_000_000, 0.01
    sharded_writer.SHARD_BYTES, sharded_writer.ID_BYTES, npy.BUFFER_BYTES = 50 * 12, 0, 40 * 12


class Folder:
    """One config per format, and the command that runs it."""

    def __init__(self, path: Path, source: str = "synthetic") -> None:
        self.path, self.workload = path, WORKLOADS[source]
        (path / "net.py").write_text(_MODEL)
        (path / "items.py").write_text(_ITEMS)
        self.workload.prepare(path)
        key, value = self.workload.length
        for form in self.workload.writers:
            net = f"net.py:{'Boxes' if form in _FORMATS else 'Net'}"
            config = {
                "model": self.workload.model or {"source": "python", "target": net},
                "data": {"batch_size": 4, **self.workload.data, key: value(LONG)},
                "run": {"threads": 1},
                "measure": {"memory": False},
                "output": {"path": form, "format": _FORMATS.get(form, form)},
            }
            (path / f"{form}.yaml").write_text(json.dumps(config))

    def short(self) -> list[str]:
        """Arguments of a run of SHORT samples."""
        key, value = self.workload.length
        return ["--set", f"data.{key}={json.dumps(value(SHORT))}"]

    def arguments(self, form: str, out: str, *more: str) -> list[str]:
        """Arguments of `gradrun`."""
        return ["infer", f"{form}.yaml", "--trust-code", "--output", out, *more]

    def start(self, form: str, out: str, *more: str) -> ForkedCommand:
        return ForkedCommand(*self.arguments(form, out, *more), cwd=self.path, before=hurry)

    def uninterrupted(self, form: str) -> dict[str, bytes]:
        """The files of an uninterrupted run."""
        self.wait(self.start(form, f"{form}-uninterrupted"))
        return self.files(f"{form}-uninterrupted")

    def wait(self, process: ForkedCommand) -> None:
        _, message = process.communicate()
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {message}")

    def files(self, out: str) -> dict[str, bytes]:
        """The predictions, without the journal, whose ranges depend on the clock."""
        folder = self.path / out
        files = [
            *folder.glob("predictions*"),
            *folder.glob("predictions/*"),
            folder / "files.jsonl",
        ]
        return {file.name: file.read_bytes() for file in sorted(files) if file.is_file()}

    def committed(self, out: str) -> int:
        """Number of samples in the journal."""
        journal = self.path / out / "journal.jsonl"
        lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
        return json.loads(lines[-1])["stop"] if lines else 0


# --- the process that is killed ----------------------------------------------------------------


def _process(folder: Path, arguments: list[str], phases: Connection) -> None:
    """Run `gradrun` with these arguments, and report its phases."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from gradrun.cli import app
    from gradrun.inference import execution, run_plan
    from gradrun.output import checkpointer
    from gradrun.output.formats import sharded_writer

    def report(owner: Any, name: str, before: str, after: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            phases.send_bytes(before.encode())
            result = real(*given, **named)
            phases.send_bytes(after.encode())
            return result

        setattr(owner, name, call)

    def slow(descriptor: int) -> None:
        time.sleep(0.002)  # like a real disk, so that kills can happen during a sync
        sync(descriptor)
        time.sleep(0.002)

    sync, os.fsync = os.fsync, slow
    hurry()
    report(run_plan, "load_model", "load", "load")
    report(execution, "_open_files", "open", "run")
    report(checkpointer.Checkpointer, "commit", "commit", "run")
    report(sharded_writer.ShardedWriter, "_seal", "commit", "run")
    report(checkpointer.Checkpointer, "close", "close", "end")
    sys.argv = ["gradrun", *arguments]
    app.main()


# --- the one that kills ------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A number of seconds after the n-th start of a phase."""

    phase: str
    times: int
    seconds: float


@dataclass
class Timeline:
    """Timeline of a process: each phase with its start."""

    phases: list[tuple[str, float]] = field(default_factory=list)
    ended: float = 0.0
    code: int | None = None

    def draw(self, rng: random.Random) -> Moment:
        """Draw a moment of this timeline."""
        ends = [*(at for _, at in self.phases[1:]), self.ended]
        (phase,) = rng.choices([*PHASES], [*PHASES.values()])
        spans = [
            end - at for (name, at), end in zip(self.phases, ends, strict=True) if name == phase
        ]
        times = rng.randrange(len(spans))
        return Moment(phase, times, rng.uniform(0, 1.1) * spans[times])


@dataclass(frozen=True)
class Kill:
    """Where a kill happened."""

    form: str
    resumes: int
    """Number of earlier resumes of the run."""
    phase: str
    committed: int
    """Number of samples in the journal."""


def follow(folder: Path, arguments: list[str], moment: Moment | None = None) -> Timeline:
    """Run gradrun in a new process until its end, or until the moment of a kill."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_process, args=(folder, arguments, sender))
    process.start()
    sender.close()
    timeline = Timeline([("start", time.monotonic())])
    deadline, left = time.monotonic() + 60, moment.times if moment else 0
    if moment and moment.phase == "start":
        deadline = time.monotonic() + moment.seconds
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            timeline.phases.append((receiver.recv_bytes().decode(), time.monotonic()))
            if moment and timeline.phases[-1][0] == moment.phase:
                left -= 1
                if left == -1:
                    deadline = time.monotonic() + moment.seconds
        process.kill()
        while receiver.poll(60):
            timeline.phases.append((receiver.recv_bytes().decode(), time.monotonic()))
    except EOFError:  # the process has ended
        timeline.ended = time.monotonic()
    process.join()
    timeline.code = process.exitcode
    return timeline


def kill_and_resume(
    folder: Folder, form: str, moments: list[Moment], out: str
) -> Iterator[tuple[str, int]]:
    """Kill a run at each moment, then let it finish; yields phase and committed samples."""
    arguments = folder.arguments(form, out, *folder.short(), "--resume")
    for moment in moments:
        timeline = follow(folder.path, arguments, moment)
        if timeline.code == -signal.SIGKILL:
            yield timeline.phases[-1][0], check_journal(folder, out)
        elif timeline.code:
            raise SystemExit(f"{out}: {_failure(folder.path, timeline)}")
    timeline = follow(folder.path, arguments)
    if timeline.code:
        raise SystemExit(f"{out}: {_failure(folder.path, timeline)}")


def _failure(folder: Path, timeline: Timeline) -> str:
    output = folder / "output.txt"
    phases = [phase for phase, _ in timeline.phases]
    text = output.read_text() if output.exists() else ""
    return f"exit code {timeline.code} after {phases}: {text}"


def check_journal(folder: Folder, out: str) -> int:
    """Verify the files against the journal; returns the number of committed samples."""
    from gradrun.output import journal
    from gradrun.output.verification import damaged_ranges

    path = folder.path / out
    if not (path / "journal.jsonl").exists():
        return 0
    state = journal.read(path / "journal.jsonl")
    if damaged := [*damaged_ranges(path, state)]:
        raise SystemExit(f"{path}: the files do not match the journal: {damaged}")
    return state.committed


def check_complete(folder: Folder, out: str, expected: dict[str, bytes]) -> None:
    """Compare the folder with that of the uninterrupted run."""
    files = folder.files(out)
    if files != expected:
        differing = [name for name in {*files, *expected} if files.get(name) != expected.get(name)]
        raise SystemExit(f"{out} in {folder.path}: {sorted(differing)} differ")
    there = (folder.path / out).rglob("*")
    others = {file.name for file in there if file.is_file()} - files.keys()
    if others != {"journal.jsonl", "result.json"}:
        raise SystemExit(f"{out} in {folder.path}: unexpected files {sorted(others)}")
    result = json.loads((folder.path / out / "result.json").read_text())
    if result["predictions"] != SHORT or check_journal(folder, out) != SHORT:
        raise SystemExit(f"{out} in {folder.path}: the result or the journal has fewer samples")


def run(path: Path, kills: int, seed: int, source: str = "synthetic") -> list[Kill]:
    """Kill runs of all formats; returns where the kills happened."""
    folder, rng = Folder(path, source), random.Random(seed)
    done: list[Kill] = []
    with preloaded():
        timelines: dict[str, Timeline] = {}
        for form in folder.workload.writers:
            arguments = folder.arguments(form, f"{form}-uninterrupted", *folder.short())
            timelines[form] = follow(path, arguments)
            if timelines[form].code:
                raise SystemExit(_failure(path, timelines[form]))
        number = 0
        while len(done) < kills:
            formats = Counter(kill.form for kill in done)
            form = min(folder.workload.writers, key=formats.__getitem__)
            times = min(1 if number % 4 else 2, kills - len(done))
            moments = [timelines[form].draw(rng) for _ in range(times)]
            out = f"{form}-{number}"
            killed = enumerate(kill_and_resume(folder, form, moments, out))
            done += [Kill(form, resumes, *where) for resumes, where in killed]
            check_complete(folder, out, folder.files(f"{form}-uninterrupted"))
            number += 1
    return done


def table(done: list[Kill]) -> str:
    """Number of kills per phase and format."""
    counts = Counter((kill.phase, kill.form) for kill in done)
    forms = sorted({kill.form for kill in done}, key=WRITERS.index)
    lines = ["killed in " + "".join(f"{form:>13}" for form in (*forms, "all"))]
    for phase in PHASES:
        row = [counts[phase, form] for form in forms]
        lines.append(f"{phase:10}" + "".join(f"{count:13}" for count in (*row, sum(row))))
    resumes = sum(kill.resumes > 0 for kill in done)
    midway = sum(0 < kill.committed < SHORT for kill in done)
    lines.append(f"{len(done)} kills, {resumes} of a resume; {midway} with some samples committed")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", choices=WORKLOADS, default="synthetic")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(table(run(Path(name), options.kills, options.seed, options.data)))
    print("all files have the same bytes as those of an uninterrupted run")


if __name__ == "__main__":
    main()
