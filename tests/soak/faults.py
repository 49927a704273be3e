"""Every call to the disk that a run makes goes wrong in turn: it fails, is cut off, or is the last.

After each, what the journal says must be true of the files, and a resume must end with the files of
a run that nothing befell. `python tests/soak/faults.py` tries every call, and `--stride N` every
N-th, as tests/test_faults.py does.
"""

from __future__ import annotations

import argparse
import errno
import gc
import io
import itertools
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import gradrun
from gradrun.core.errors import GradrunError
from gradrun.inference import runner
from gradrun.output import checkpointer, journal
from gradrun.output.formats import READERS, WRITERS, npy, sharded_writer
from gradrun.output.lock import FILE_NAME as LOCK
from gradrun.output.verification import damaged_ranges
from gradrun.results.result import RunResult

SAMPLES, BATCH, ROW_BYTES = 23, 4, 2 * 4 + 2 * 8
FORMATS = [*WRITERS]

CALLS: dict[str, tuple[Any, str, int]] = {
    "open": (os, "open", errno.EMFILE),
    "open as file": (io, "open", errno.EACCES),
    "write": (os, "write", errno.ENOSPC),
    "pwrite": (os, "pwrite", errno.ENOSPC),
    "pread": (os, "pread", errno.EIO),
    "fsync": (os, "fsync", errno.EIO),
    "replace": (os, "replace", errno.EACCES),
    "unlink": (os, "unlink", errno.EACCES),
    "mkdir": (os, "mkdir", errno.EACCES),
    "ftruncate": (os, "ftruncate", errno.EIO),
    "posix_fallocate": (os, "posix_fallocate", errno.ENOSPC),
}
"""name -> where the function lies, and the error that it fails with."""

FAULTS = {
    "fails": "it fails, once",
    "fails from then on": "it fails, and so does every call after it",
    "is cut off": "a write takes half, and then the disk is full",
    "Ctrl-C before": "KeyboardInterrupt comes before it",
    "Ctrl-C after": "KeyboardInterrupt comes after it",
    "kill": "the process is killed before it: the files stay as they are",
    "power cut": "the machine stops before it: of the files stays what was synced",
}


class Died(BaseException):
    """Stands in for the end of the process or the machine: nothing may handle it."""


class Disk:
    """Counts the calls that reach files below a folder, and lets one of them go wrong."""

    def __init__(self, folder: Path, fault: str = "", at: int = -1, every: int = 1) -> None:
        self.folder, self.fault, self.at, self.every = folder, fault, at, every
        self.calls: list[str] = []
        self.left: dict[str, bytes] | None = None
        """What kill or power cut leave of the folder."""
        there = [*folder.iterdir()] if folder.exists() else []
        self._names = {file.name: file.stat().st_ino for file in there}
        self._synced = {file.stat().st_ino: file.read_bytes() for file in there}
        self._lost: set[int] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, (home, attribute, number) in CALLS.items():
                wrapped = self._wrapped(name, getattr(home, attribute), number)
                stack.enter_context(mock.patch.object(home, attribute, wrapped))
            target = checkpointer.Checkpointer
            commit, batches = target.commit_if_due, itertools.count(1)

            def at_times(keeper: checkpointer.Checkpointer) -> None:
                """Commit after every so many batches: the clock may cut ranges anywhere."""
                if next(batches) % self.every == 0:
                    commit(keeper)

            stack.enter_context(mock.patch.object(target, "commit_if_due", at_times))
            yield

    def _wrapped(self, name: str, real: Callable[..., Any], number: int) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            if not self._below(given[0]):
                return real(*given, **named)
            self.calls.append(name)
            index = len(self.calls) - 1
            if index == self.at:
                self._go_wrong(name, number, real, given)
            if index > self.at >= 0 and self.fault == "fails from then on":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if name in {"unlink", "replace"}:
                self._part_with(Path(given[-1]))
            found = self._sync(given[0]) if name == "fsync" else real(*given, **named)
            if index == self.at and self.fault == "Ctrl-C after":
                raise KeyboardInterrupt
            return found

        return call

    def _go_wrong(self, name: str, number: int, real: Any, given: tuple[Any, ...]) -> None:
        if name == "fsync" and self.fault in {"fails", "fails from then on", "is cut off"}:
            self._lost.add(os.fstat(given[0]).st_ino)
        match self.fault:
            case "fails" | "fails from then on":
                raise OSError(number, os.strerror(number))
            case "is cut off" if name in {"write", "pwrite"}:
                real(given[0], given[1][: len(given[1]) // 2], *given[2:])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "is cut off":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case "Ctrl-C before":
                raise KeyboardInterrupt
            case "kill":
                self.left = contents(self.folder)
                raise Died
            case "power cut":
                self.left = self.synced()
                raise Died

    def _below(self, what: Any) -> bool:
        if isinstance(what, int):
            what = Path(f"/proc/self/fd/{what}").readlink()
        what = getattr(what, "filename", what)
        return Path(os.fspath(what)).is_relative_to(self.folder)

    def _sync(self, descriptor: int) -> None:
        """Remember what a machine would find again; nothing is brought to the disk itself.

        Linux forgets what it could not write: a sync after one that failed succeeds in vain.
        """
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path == self.folder:
            self._names = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
        elif path.stat().st_ino not in self._lost:
            self._synced[path.stat().st_ino] = path.read_bytes()

    def _part_with(self, path: Path) -> None:
        """Keep what was synced of a file that goes, since another may get its number."""
        if path.exists():
            node = path.stat().st_ino
            self._lost.discard(node)
            if node in self._synced:
                self._synced[-len(self.calls)] = self._synced.pop(node)
                gone = {n: -len(self.calls) for n, at in self._names.items() if at == node}
                self._names.update(gone)

    def synced(self) -> dict[str, bytes]:
        """What a machine would find again if it stopped now."""
        return {name: self._synced.get(node, b"") for name, node in self._names.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Name to bytes of every file."""
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}


@contextmanager
def commits_at_every_batch() -> Iterator[None]:
    """Make commits, parts and windows small, so that little data meet every seam; sync nothing."""
    with ExitStack() as stack:
        for home, name, value in (
            (checkpointer, "SECONDS", 0.0),
            (checkpointer, "_TIME_SHARE", float("inf")),
            (runner, "_CALLBACK_NS", 0),
            (sharded_writer, "SHARD_BYTES", 11 * ROW_BYTES),
            (sharded_writer, "ID_BYTES", 0),
            (npy, "BUFFER_BYTES", 5 * 8),
            (os, "fsync", lambda _: None),  # nobody cuts our own power
        ):
            stack.enter_context(mock.patch.object(home, name, value))
        yield


def infer(folder: Path, form: str, **options: Any) -> RunResult:
    """The run under test: two outputs, six batches, three parts."""
    config = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {
            "source": "synthetic",
            "inputs": {"x": {"shape": [3]}},
            "samples": SAMPLES,
            "batch_size": BATCH,
        },
        "run": {"device": "cpu", "warmup": 0, "threads": 1},
        "measure": {"memory": False},
        "output": {"path": str(folder), "format": form, "transform": "topk", "k": 2},
    }
    return gradrun.infer(config, **options)


class FaultyRun:
    """One format: the files that a run of it must end with, and ways to spoil the run."""

    def __init__(self, form: str, folder: Path) -> None:
        self.form, self.folder = form, folder
        infer(folder / "right", form)
        self.right = predictions(folder / "right")
        self.rows = {
            name: np.ascontiguousarray(rows) for name, rows in sorted(self._read_rows().items())
        }
        self.before: dict[str, dict[str, bytes] | None] = {
            "a new run": None,
            "the resume of a killed run": self._stopped("kill"),
            "the resume of an interrupted run": self._stopped("Ctrl-C before"),
        }
        """What lies in the folder when a run begins."""

    def _read_rows(self) -> dict[str, Any]:
        """Output to rows as the journal's checksums see them."""
        folder = self.folder / "right"
        if self.form == "npy":
            return {name: np.load(folder / name) for name in self.right}
        if self.form == "safetensors":
            from safetensors.torch import load_file

            held = [load_file(folder / name) for name in sorted(self.right)]
            return {key: torch.cat([part[key] for part in held]).numpy() for key in held[0]}
        if self.form == "parquet":
            read = [rows for _, rows in READERS["parquet"](folder)]
            return {key: np.concatenate([rows[key] for rows in read]) for key in read[0]}
        return {}

    def _stopped(self, fault: str) -> dict[str, bytes]:
        """The folder of a run that was stopped past its middle."""
        disk = Disk(self.folder / fault)
        with disk.watched():
            infer(disk.folder, self.form)
        shutil.rmtree(disk.folder)
        stopped = Disk(disk.folder, fault, len(disk.calls) * 3 // 5)
        self._run(stopped)
        return contents(stopped.folder) if stopped.left is None else stopped.left

    def calls(self, which: str) -> list[str]:
        """The calls of a run that nothing befalls."""
        disk = Disk(self._begin(which))
        with disk.watched():
            infer(disk.folder, self.form, resume=self.before[which] is not None)
        return disk.calls

    def check(self, fault: str, at: int, which: str) -> str:
        """Let a call go wrong, then resume; the error's sentence, or nothing if it ended well."""
        disk = Disk(self._begin(which), fault, at)
        said = self._run(disk, resume=self.before[which] is not None)
        folder = disk.folder
        if open_below(folder):
            gc.collect()  # an error's frames hold open files
        if disk.left is None and (fault, disk.calls[at]) != ("Ctrl-C after", "open"):
            assert not open_below(folder), "files were left open"
        close_below(folder)
        if disk.left is not None:
            lay_out(folder, disk.left)
            self.check_truth(folder)
            # What a resume makes of the remains must be as sound as what a run makes of nothing.
            second = Disk(folder, "kill", random.Random(at).randrange(len(disk.calls)), every=2)
            self._run(second, resume=True)
            close_below(folder)
            if second.left is not None:
                lay_out(folder, second.left)
        kept = self.check_truth(folder)
        if counted := re.search(r"(\d+) of 23 predictions are saved", said):
            # A line that can neither be synced nor taken back is true, and was not counted on.
            more = fault == "fails from then on" and kept > int(counted[1])
            assert disk.left or more or kept == int(counted[1]), said
        lay_out(self.folder / "synced", disk.synced())
        self.check_truth(self.folder / "synced")
        if not said:
            self.check_whole(folder)
        again = infer(folder, self.form, resume=True)
        assert again.predictions == SAMPLES
        self.check_whole(folder)
        return said

    def _begin(self, which: str) -> Path:
        folder = self.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        if before := self.before[which]:
            lay_out(folder, before)
        return folder

    def _run(self, disk: Disk, **options: Any) -> str:
        try:
            with disk.watched():
                infer(disk.folder, self.form, **options)
        except GradrunError as error:
            return str(error)
        except KeyboardInterrupt:
            assert disk.fault.startswith("Ctrl-C")
            return "Ctrl-C"
        except Died:
            return "died"
        return ""

    def check_truth(self, folder: Path) -> int:
        """See that the journal's checksums are of the right rows, and of the files'; how many."""
        if not (folder / "journal.jsonl").exists():
            return 0
        kept = journal.read(folder / "journal.jsonl")
        assert not [*damaged_ranges(folder, kept)]
        begin = 0
        for committed in kept.ranges:
            if self.form == "npy":
                right = {
                    name: zlib.crc32(rows[committed.start : committed.stop])
                    for name, rows in self.rows.items()
                }
                assert committed.files == right
            elif self.form in {"safetensors", "parquet"}:
                found = 0
                for rows in self.rows.values():
                    found = zlib.crc32(rows[committed.start : committed.stop], found)
                if self.form == "parquet":
                    ids = range(committed.start, committed.stop)
                    found = zlib.crc32("".join(f"{name}\n" for name in ids).encode(), found)
                assert [*committed.files.values()] == [found]
            else:
                (name,) = self.right
                lines = self.right[name]
                headings = name.endswith(".csv")
                assert lines[: committed.end].count(b"\n") == committed.stop + headings
                assert committed.files == {name: zlib.crc32(lines[begin : committed.end])}
                begin = committed.end or 0
        return kept.committed

    def check_whole(self, folder: Path) -> None:
        """See that the folder holds a whole run and nothing else."""
        found = contents(folder)
        found.pop(LOCK, None)  # where it could not be removed; it holds nobody up
        assert found.keys() == {*self.right, "journal.jsonl", "result.json"}
        assert predictions(folder) == self.right
        kept = journal.read(folder / "journal.jsonl")
        assert kept.complete
        assert RunResult.load(folder).predictions == SAMPLES
        self.check_truth(folder)


def predictions(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("pred")}


def lay_out(folder: Path, files: dict[str, bytes]) -> None:
    """Make the folder hold just these."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def open_below(folder: Path) -> list[int]:
    """Descriptors of the files below a folder that are open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that listed them
            if folder in entry.readlink().parents:
                found.append(int(entry.name))
    return found


def close_below(folder: Path) -> None:
    """What the end of a process does."""
    for descriptor in open_below(folder):
        os.close(descriptor)


def cases(trial: FaultyRun, stride: int, seed: int) -> Iterator[tuple[str, int, str, str]]:
    """(fault, index of the call, of which run, the call), every stride-th of each fault's."""
    lot = random.Random(seed)
    for which in trial.before:
        calls = [*enumerate(trial.calls(which))]
        for fault in FAULTS:
            lot.shuffle(calls)
            yield from ((fault, at, which, name) for at, name in calls[::stride])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    bad = 0
    for form in FORMATS:
        with tempfile.TemporaryDirectory() as folder, commits_at_every_batch():
            trial, began = FaultyRun(form, Path(folder).resolve()), time.monotonic()
            told: Counter[tuple[str, str]] = Counter()
            for fault, at, which, name in cases(trial, asked.stride, asked.seed):
                try:
                    said = trial.check(fault, at, which)
                    told[fault, "an error" if said else "ended well"] += 1
                except Exception as error:
                    bad += 1
                    print(f"{form}: call {at} of {which} ({name}), {fault}: {error!r}")
                    traceback.print_exc()
            print(f"{form}: {sum(told.values())} faults in {time.monotonic() - began:.0f} s")
            for (fault, said), count in sorted(told.items()):
                print(f"  {count:5}  {fault:20} {said}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
