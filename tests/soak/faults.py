"""Inject a fault into each disk call of a run in turn: an error, a partial write, or a crash.

After each fault the files must match the journal, and a resume must end with the files of an
undisturbed run. `python tests/soak/faults.py` tries every call, and `--stride N` every N-th, as
tests/integration/test_faults.py does.
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
from gradrun.inference import timed_loop
from gradrun.output import checkpointer, journal
from gradrun.output.formats import FORMATS as ALL_FORMATS
from gradrun.output.formats import npy, sharded_writer
from gradrun.output.lock import FILE_NAME as LOCK
from gradrun.output.verification import damaged_ranges
from gradrun.results.result import RunResult

FORMATS = [form for form in ALL_FORMATS if form != "files"]
"""The formats whose predictions are one table."""

SAMPLES, BATCH, ROW_BYTES = 23, 4, 2 * 4 + 2 * 8


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
"""Name to module, attribute and errno of the error."""

FAULTS = {
    "fails": "the call fails once",
    "fails from then on": "the call and all later ones fail",
    "is cut off": "half of the data is written, then the disk is full",
    "Ctrl-C before": "KeyboardInterrupt before the call",
    "Ctrl-C after": "KeyboardInterrupt after the call",
    "kill": "the process is killed before the call; the files stay as they are",
    "power cut": "the machine stops before the call; only synced data remains",
}


class Died(BaseException):
    """Simulates the end of the process or the machine; no code may handle it."""


class Disk:
    """Counts the calls for files below a folder, and injects a fault into one of them."""

    def __init__(self, folder: Path, fault: str = "", at: int = -1, every: int = 1) -> None:
        self.folder, self.fault, self.at, self.every = folder, fault, at, every
        self.calls: list[str] = []
        self.remains: dict[str, bytes] | None = None
        """Files after a kill or a power cut."""
        there = files_below(folder)
        self._names = {name: file.stat().st_ino for name, file in there.items()}
        self._synced = {file.stat().st_ino: file.read_bytes() for file in there.values()}
        self._lost: set[int] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, (owner, attribute, number) in CALLS.items():
                wrapped = self._wrapped(name, getattr(owner, attribute), number)
                stack.enter_context(mock.patch.object(owner, attribute, wrapped))
            target = checkpointer.Checkpointer
            commit, batches = target.commit_if_due, itertools.count(1)

            def at_times(keeper: checkpointer.Checkpointer) -> None:
                """Commit after every `every` batches: the clock may end a range anywhere."""
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
                self._inject(name, number, real, given)
            if index > self.at >= 0 and self.fault == "fails from then on":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if name in {"unlink", "replace"}:
                self._forget(Path(given[-1]))
            result = self._sync(given[0]) if name == "fsync" else real(*given, **named)
            if index == self.at and self.fault == "Ctrl-C after":
                raise KeyboardInterrupt
            return result

        return call

    def _inject(self, name: str, number: int, real: Any, given: tuple[Any, ...]) -> None:
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
                self.remains = contents(self.folder)
                raise Died
            case "power cut":
                self.remains = self.synced()
                raise Died

    def _below(self, target: Any) -> bool:
        if isinstance(target, int):
            target = Path(f"/proc/self/fd/{target}").readlink()
        target = getattr(target, "filename", target)
        return Path(os.fspath(target)).is_relative_to(self.folder)

    def _sync(self, descriptor: int) -> None:
        """Record the state after a power cut; nothing is written to the disk itself.

        Linux drops data that it could not write: a later sync succeeds without them.
        """
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            there = {name: file for name, file in self._names.items() if self._parent(name) != path}
            there |= {
                name: file.stat().st_ino
                for name, file in files_below(self.folder).items()
                if self._parent(name) == path
            }
            self._names = there
        elif path.stat().st_ino not in self._lost:
            self._synced[path.stat().st_ino] = path.read_bytes()

    def _parent(self, name: str) -> Path:
        return (self.folder / name).parent

    def _forget(self, path: Path) -> None:
        """Keep the synced data of a removed file, because another may get its inode number."""
        if path.exists():
            node = path.stat().st_ino
            self._lost.discard(node)
            if node in self._synced:
                self._synced[-len(self.calls)] = self._synced.pop(node)
                gone = {n: -len(self.calls) for n, at in self._names.items() if at == node}
                self._names.update(gone)

    def synced(self) -> dict[str, bytes]:
        """Files after a power cut at this moment."""
        return {name: self._synced.get(node, b"") for name, node in self._names.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Name to bytes of every file."""
    return {name: file.read_bytes() for name, file in files_below(folder).items()}


def files_below(folder: Path) -> dict[str, Path]:
    """Relative name to path of every file of a run folder and of its folder of predictions."""
    return {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }


@contextmanager
def commits_at_every_batch() -> Iterator[None]:
    """Make commits, shards and buffers small, so that few samples cross every limit; skip syncs."""
    with ExitStack() as stack:
        for owner, name, value in (
            (checkpointer, "SECONDS", 0.0),
            (checkpointer, "_TIME_SHARE", float("inf")),
            (timed_loop, "_CALLBACK_NS", 0),
            (sharded_writer, "SHARD_BYTES", 11 * ROW_BYTES),
            (sharded_writer, "ID_BYTES", 0),
            (npy, "BUFFER_BYTES", 5 * 8),
            (os, "fsync", lambda _: None),  # no real power cut is tested
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def infer(folder: Path, form: str, **options: Any) -> RunResult:
    """The run under test: two outputs, six batches, three shards."""
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
    """One format: the files of an undisturbed run, and faults to inject."""

    def __init__(self, form: str, folder: Path) -> None:
        self.form, self.folder = form, folder
        infer(folder / "undisturbed", form)
        self.expected = predictions(folder / "undisturbed")
        self.rows = {
            name: np.ascontiguousarray(rows) for name, rows in sorted(self._read_rows().items())
        }
        self.before: dict[str, dict[str, bytes] | None] = {
            "a new run": None,
            "the resume of a killed run": self._stopped("kill"),
            "the resume of an interrupted run": self._stopped("Ctrl-C before"),
        }
        """Files in the folder when a run starts."""

    def _read_rows(self) -> dict[str, Any]:
        """Output name to the rows that the checksums cover."""
        folder = self.folder / "undisturbed"
        if self.form == "npy":
            return {name: np.load(folder / name) for name in self.expected}
        if self.form == "safetensors":
            from safetensors.torch import load_file

            shards = [load_file(folder / name) for name in sorted(self.expected)]
            return {key: torch.cat([part[key] for part in shards]).numpy() for key in shards[0]}
        if self.form == "parquet":
            read = [rows for _, rows in ALL_FORMATS["parquet"].read(folder)]
            return {key: np.concatenate([rows[key] for rows in read]) for key in read[0]}
        return {}

    def _stopped(self, fault: str) -> dict[str, bytes]:
        """Files of a run that stopped after more than half."""
        disk = Disk(self.folder / fault)
        with disk.watched():
            infer(disk.folder, self.form)
        shutil.rmtree(disk.folder)
        stopped = Disk(disk.folder, fault, len(disk.calls) * 3 // 5)
        self._run(stopped)
        return contents(stopped.folder) if stopped.remains is None else stopped.remains

    def calls(self, which: str) -> list[str]:
        """Calls of an undisturbed run."""
        disk = Disk(self._prepare(which))
        with disk.watched():
            infer(disk.folder, self.form, resume=self.before[which] is not None)
        return disk.calls

    def check(self, fault: str, at: int, which: str) -> str:
        """Inject a fault, then resume; returns the error message, empty if there was none."""
        disk = Disk(self._prepare(which), fault, at)
        message = self._run(disk, resume=self.before[which] is not None)
        folder = disk.folder
        if open_below(folder):
            gc.collect()  # the frames of an error refer to open files
        if disk.remains is None and (fault, disk.calls[at]) != ("Ctrl-C after", "open"):
            assert not open_below(folder), "files were left open"
        close_below(folder)
        if disk.remains is not None:
            lay_out(folder, disk.remains)
            self.check_journal(folder)
            # A resume must survive a fault as well as a new run does.
            second = Disk(folder, "kill", random.Random(at).randrange(len(disk.calls)), every=2)
            self._run(second, resume=True)
            close_below(folder)
            if second.remains is not None:
                lay_out(folder, second.remains)
        committed_samples = self.check_journal(folder)
        if counted := re.search(r"(\d+) of 23 predictions are saved", message):
            # A line that can be neither synced nor removed is valid, but was not counted.
            more = fault == "fails from then on" and committed_samples > int(counted[1])
            assert disk.remains or more or committed_samples == int(counted[1]), message
        lay_out(self.folder / "synced", disk.synced())
        self.check_journal(self.folder / "synced")
        if not message:
            self.check_complete(folder)
        again = infer(folder, self.form, resume=True)
        assert again.predictions == SAMPLES
        self.check_complete(folder)
        return message

    def _prepare(self, which: str) -> Path:
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

    def check_journal(self, folder: Path) -> int:
        """Check the checksums against rows and files; returns the number of committed samples."""
        if not (folder / "journal.jsonl").exists():
            return 0
        state = journal.read(folder / "journal.jsonl")
        assert not [*damaged_ranges(folder, state)]
        begin = 0
        for committed in state.ranges:
            if self.form == "npy":
                right = {
                    name: zlib.crc32(rows[committed.start : committed.stop])
                    for name, rows in self.rows.items()
                }
                assert committed.files == right
            elif self.form in {"safetensors", "parquet"}:
                result = 0
                for rows in self.rows.values():
                    result = zlib.crc32(rows[committed.start : committed.stop], result)
                if self.form == "parquet":
                    ids = range(committed.start, committed.stop)
                    result = zlib.crc32("".join(f"{name}\n" for name in ids).encode(), result)
                assert [*committed.files.values()] == [result]
            else:
                (name,) = self.expected
                lines = self.expected[name]
                headings = name.endswith(".csv")
                assert lines[: committed.end].count(b"\n") == committed.stop + headings
                assert committed.files == {name: zlib.crc32(lines[begin : committed.end])}
                begin = committed.end or 0
        return state.committed

    def check_complete(self, folder: Path) -> None:
        """Check that the folder has the files of a complete run and no others."""
        result = contents(folder)
        result.pop(LOCK, None)  # remains if it could not be removed; harmless
        assert result.keys() == {*self.expected, "journal.jsonl", "result.json"}
        assert predictions(folder) == self.expected
        state = journal.read(folder / "journal.jsonl")
        assert state.complete
        assert RunResult.load(folder).predictions == SAMPLES
        self.check_journal(folder)


def predictions(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("pred")}


def lay_out(folder: Path, files: dict[str, bytes]) -> None:
    """Write these files, and remove all others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def open_below(folder: Path) -> list[int]:
    """Open descriptors of files below a folder."""
    result = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing
            if folder in entry.readlink().parents:
                result.append(int(entry.name))
    return result


def close_below(folder: Path) -> None:
    """Close these files, as the end of a process does."""
    for descriptor in open_below(folder):
        os.close(descriptor)


def cases(test: FaultyRun, stride: int, seed: int) -> Iterator[tuple[str, int, str, str]]:
    """Yield (fault, index of the call, run, call) for every stride-th call of each fault."""
    rng = random.Random(seed)
    for which in test.before:
        calls = [*enumerate(test.calls(which))]
        for fault in FAULTS:
            rng.shuffle(calls)
            yield from ((fault, at, which, name) for at, name in calls[::stride])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bad = 0
    for form in FORMATS:
        with tempfile.TemporaryDirectory() as folder, commits_at_every_batch():
            test, began = FaultyRun(form, Path(folder).resolve()), time.monotonic()
            outcomes: Counter[tuple[str, str]] = Counter()
            for fault, at, which, name in cases(test, options.stride, options.seed):
                try:
                    message = test.check(fault, at, which)
                    outcomes[fault, "an error" if message else "ended well"] += 1
                except Exception as error:
                    bad += 1
                    print(f"{form}: call {at} of {which} ({name}), {fault}: {error!r}")
                    traceback.print_exc()
            print(f"{form}: {sum(outcomes.values())} faults in {time.monotonic() - began:.0f} s")
            for (fault, message), count in sorted(outcomes.items()):
                print(f"  {count:5}  {fault:20} {message}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
