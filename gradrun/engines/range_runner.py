"""Run ranges of samples in a worker and describe what a single process would have written."""

from __future__ import annotations

import os
import platform
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError, GradrunError, Interrupted, first_line
from gradrun.data.source import require_length, whole_batches
from gradrun.engines.messages import (
    Done,
    Failed,
    Open,
    Quarantined,
    Ready,
    Reply,
    Request,
    Rows,
    Task,
    pack_rows,
    tensor_bytes,
)
from gradrun.inference.device import device_context, torch_threads
from gradrun.inference.environment import current_environment
from gradrun.inference.first_batch import PreparedRun
from gradrun.inference.meters import model_memory, process_memory, system_load
from gradrun.inference.reordering import commit_unit
from gradrun.inference.run_plan import RunOptions, open_run
from gradrun.inference.runner import Runner
from gradrun.output.columns import ValueColumn, blank, layout
from gradrun.output.transforms import Outputs

InputPositions = Callable[[int, int], Sequence[int]]
"""Maps samples start to stop, within one batch, to their positions in the input."""


class RangeRunner:
    """The model and data of a run, opened in a worker; a context manager."""

    def __init__(self, message: Open, all_cpus: Collection[int] = ()) -> None:
        """Store the request.

        Args:
            all_cpus: those of the driver, if this process is pinned to some of them.
        """
        self._all_cpus = all_cpus
        config = load_config(message.config).config
        # The driver counts the errors of all workers.
        self.config = config.replace({"run.max_errors": None})
        self._trust_code = message.trust_code
        self._stack = ExitStack()
        self._runner: Runner
        self._prepared: PreparedRun
        self._events: EventLog

    def __enter__(self) -> RangeRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def prepare(self) -> Ready:
        """Load the model, open the data, run the first batch and warm up.

        Raises:
            ConfigError: the model or the data cannot be opened here.
            RunFailed: the model fails on its first batch.
        """
        device = self._stack.enter_context(device_context(self.config.run))
        opened = open_run(self.config, device, RunOptions(trust_code=self._trust_code))
        self._runner, data = opened.runner, opened.runner.data
        samples = require_length(data)
        grouped = data.input_positions if data.grouped else None
        self._events = EventLog(grouped)
        self._prepared = self._runner.prepare(self._events)
        return Ready(
            node=platform.node(),
            environment=current_environment(device),
            files=opened.header.files,
            checksum=outputs_checksum(self._prepared.outputs),
            load_seconds=opened.load_seconds,
            open_seconds=opened.open_seconds,
            first_batch_seconds=self._prepared.first_batch_seconds,
            batch_seconds=self._prepared.batch_seconds,
            samples=samples,
            batch_size=data.batch_size,
            whole_batches=whole_batches(data),
            unit=commit_unit(data),
            varies=data.of_texts,
            memory=model_memory(self._runner.model, self._prepared.first),
            modules=_count_types(opened.model.module),
        )

    def run(self, task: Task) -> Done:
        """Run samples task.start to task.stop; an error of the run is in the result."""
        runner, recovery = self._runner, self._prepared.recovery
        self._events.reset(task.start, task.stop)
        waiting = system_load.waiting_threads()
        with self._threads(task.threads):
            timed = runner.run_timed_pass(self._prepared, self._events, stop=task.stop)
        waited = system_load.waited(waiting, timed.total_ns)
        if not task.rows:
            self._events.reset(task.start, task.stop)
        batches, data = len(timed.sizes), runner.data
        return Done(
            start=task.start,
            stop=task.stop,
            events=self._events.take(),
            positions=self._events.positions,
            batch_seconds=timed.seconds[:batches].tobytes(),
            batch_sizes=timed.sizes.tobytes(),
            recovered=timed.recovered,
            data_seconds=timed.data_ns * 1e-9,
            seconds=timed.total_ns * 1e-9,
            padding=data.padding(task.start, task.stop),
            generation=timed.generation,
            waited=waited,
            batch_elements=timed.elements[:batches].tobytes(),
            largest=timed.largest,
            flags=data.flags[task.start : task.stop].tobytes(),
            batch_limit=recovery.batch_limit,
            limited_from=recovery.limited_from,
            process_peak=process_memory.peak_resident()[0],
            error=str(timed.stopped) if timed.stopped else None,
            resume_options=timed.stopped.resume_options if timed.stopped else "",
            interrupted=isinstance(timed.stopped, Interrupted),
        )

    @contextmanager
    def _threads(self, count: int | None) -> Iterator[None]:
        """Use all CPUs with `count` threads, if set."""
        if count is None:
            yield
            return
        pinned = os.sched_getaffinity(0) if self._all_cpus else None
        if pinned:
            os.sched_setaffinity(0, self._all_cpus)
        try:
            with torch_threads(count):
                yield
        finally:
            if pinned:
                os.sched_setaffinity(0, pinned)


class EventLog:
    """A writer and a quarantine that record what they are given, in order.

    Consecutive batches whose rows have the same shape become one event.
    """

    def __init__(self, input_positions: InputPositions | None) -> None:
        """Start an empty log; `input_positions` is None if samples run in input order."""
        self.path = Path("quarantine.jsonl")
        self.written = self.count = 0
        self.positions: list[int] | None = None
        """Input position of each sample in the log; None if samples run in input order."""
        self._input_positions = input_positions
        self._events: list[Rows | Quarantined] = []
        self._stop = 0
        self._buffers: Outputs = {}
        """Rows of one layout, [samples of the task, ...] each."""
        self._begin = self._end = 0
        """The rows in the buffers that are in no event yet."""
        self._ids: list[Sequence[int | str]] = []

    def reset(self, start: int, stop: int) -> None:
        """Start a new log of samples `start` to `stop`."""
        self.take()
        self.written, self._stop = start, stop
        self._begin = self._end = 0
        self.positions = [] if self._input_positions else None

    def take(self) -> list[Rows | Quarantined]:
        """Return the events since the last call."""
        self._flush()
        events, self._events = self._events, []
        return events

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        """Record the outputs [n, ...] of n samples."""
        count = len(ids)
        if self._input_positions and self.positions is not None:
            self.positions += self._input_positions(self.written, self.written + count)
        if valid is None:
            if not self._fits(outputs, count):
                self._flush()
                self._allocate(outputs)
            end = self._end + count
            # A copy, because a model may return the same memory with every batch.
            buffers: Any = self._buffers
            for name, column in outputs.items():
                buffers[name][self._end : end] = column
            self._end = end
            self._ids.append(ids)
        else:
            self._flush()
            self._events.append(pack_rows(outputs, ids, valid))
        self.written += count

    def add(self, sample: int, sample_id: int | str, error: str, details: str) -> None:
        """Record a sample without a prediction."""
        self._flush()
        self._events.append(Quarantined(sample=sample, id=sample_id, error=error, details=details))
        self.count += 1

    def _fits(self, outputs: Outputs, count: int) -> bool:
        """Return whether the buffers have the layout of these rows, and room for them."""
        if outputs.keys() != self._buffers.keys():
            return False
        if any(layout(column) != layout(self._buffers[name]) for name, column in outputs.items()):
            return False
        return self._end + count <= len(next(iter(self._buffers.values())))

    def _allocate(self, outputs: Outputs) -> None:
        rows = self._stop - self.written
        self._buffers = {name: blank(column, rows) for name, column in outputs.items()}
        self._begin = self._end = 0

    def _flush(self) -> None:
        if self._begin == self._end:
            return
        rows = {name: buffer[self._begin : self._end] for name, buffer in self._buffers.items()}
        self._events.append(pack_rows(rows, _joined(self._ids), None))
        self._begin, self._ids = self._end, []


def _count_types(model: nn.Module) -> dict[str, int]:
    """Count the modules of a model by the names of their classes and base classes."""
    kinds = (kind for module in model.modules() for kind in type(module).__mro__)
    return dict(Counter(kind.__name__ for kind in kinds if issubclass(kind, nn.Module)))


def outputs_checksum(outputs: Outputs) -> int:
    """Return the CRC-32 of the names, dtypes, shapes and values of some outputs."""
    crc = 0
    for name, column in outputs.items():
        if isinstance(column, ValueColumn):
            crc = column.checksum(zlib.crc32(f"{name}\n".encode(), crc))
        else:
            crc = zlib.crc32(f"{name} {column.dtype} {list(column.shape)}\n".encode(), crc)
            crc = zlib.crc32(tensor_bytes(column), crc)
    return crc


def _joined(ids: list[Sequence[int | str]]) -> Sequence[int | str]:
    if all(isinstance(part, range) for part in ids):
        return range(ids[0].start, ids[-1].stop)  # type: ignore[attr-defined]
    return [sample_id for part in ids for sample_id in part]


def serve(
    receive: Callable[[], Request | None],
    reply: Callable[[Reply], None],
    all_cpus: Collection[int] = (),
) -> None:
    """Answer the requests of a driver: Open first, then any number of tasks."""
    opening = receive()
    if not isinstance(opening, Open):
        return
    with RangeRunner(opening, all_cpus) as runner:
        try:
            ready = runner.prepare()
        except Exception as error:
            reply(failed(error))
            return
        reply(ready)
        while isinstance(task := receive(), Task):
            reply(runner.run(task))


def failed(error: Exception) -> Failed:
    """Describe the error that prevents a worker from starting."""
    expected = isinstance(error, GradrunError)
    text = str(error) if expected else f"{type(error).__name__}: {first_line(error)}"
    return Failed(error=text, invalid=isinstance(error, ConfigError))
