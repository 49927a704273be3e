"""The engine `processes`: worker subprocesses on this machine, each with CPUs of its own."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

import torch

from gradrun.core.cpu import available_cpus
from gradrun.core.errors import RunFailed, first_line
from gradrun.core.progress import Progress
from gradrun.core.units import pluralize
from gradrun.engines.child_process import (
    Process,
    exit_cause,
    kill,
    read_frame,
    start_child,
    write_frame,
)
from gradrun.engines.engine import Engine, EngineRequest, Event, Lost, StartedEngine, start_error
from gradrun.engines.messages import Done, Failed, Open, Ready, Task, decode_reply, encode
from gradrun.inference.device import resolve_device

_LAST_LINES = 20
_POLL_SECONDS = 0.2

_MEASURE_SECONDS = 0.3
"""Duration of each measurement for `workers: auto`."""

_PAIRS = 5
"""Measurements of one process and of the workers, in turn; the median decides."""
_PAIRS_SECONDS = 5.0
"""Time after which no further pair is measured: batches may be slow."""


class _Worker:
    """A subprocess, and threads that read its replies and the end of its output."""

    def __init__(
        self, number: int, slot: int, process: Process, events: SimpleQueue[tuple[int, Event]]
    ) -> None:
        self.number, self.slot, self.process = number, slot, process
        self._events = events
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        assert process.stdin
        assert process.stdout
        assert process.stderr
        self.requests, self._replies, self._output = process.stdin, process.stdout, process.stderr
        self._collector = threading.Thread(target=self._collect_output, daemon=True)
        self._collector.start()
        threading.Thread(target=self._read_replies, daemon=True).start()

    def _read_replies(self) -> None:
        with suppress(OSError, ValueError):  # the pipe is closed by kill()
            while data := read_frame(self._replies):
                self._events.put((self.number, decode_reply(data)))
        code = self.process.wait()
        self._collector.join(timeout=1)
        self._events.put((self.number, Lost(exit_cause(code), "\n".join(self._lines))))

    def _collect_output(self) -> None:
        with suppress(OSError, ValueError):
            for line in self._output:
                self._lines.append(line.decode(errors="replace").rstrip())


class ProcessesEngine:
    """Workers as subprocesses of this one."""

    def __init__(self, opens: list[Open], threads: int, *, pin: bool = True) -> None:
        """Prepare one slot per worker.

        Args:
            opens: the first message to the worker in each slot.
            pin: give each worker CPUs of its own, if there are enough.
        """
        self.name = pluralize(len(opens), "process")
        self._opens, self._threads = opens, threads
        self._cpus = _divide_cpus(len(opens), threads) if pin else None
        self._numbers = itertools.count(1)
        self._workers: dict[int, _Worker] = {}
        self._events: SimpleQueue[tuple[int, Event]] = SimpleQueue()

    def start(self, count: int) -> None:
        for _ in range(count):
            used = {worker.slot for worker in self._workers.values()}
            slot = next(slot for slot in range(len(self._opens)) if slot not in used)
            cpus = [] if self._cpus is None else self._cpus[slot]
            process = start_child(
                "gradrun.engines.worker", self._threads, [*map(str, cpus)], stderr=-1
            )
            worker = _Worker(next(self._numbers), slot, process, self._events)
            self._workers[worker.number] = worker
            self._write(worker, encode(self._opens[slot]))

    def send(self, worker: int, task: Task) -> None:
        self._write(self._workers[worker], encode(task))

    def _write(self, worker: _Worker, data: bytes) -> None:
        with suppress(BrokenPipeError):  # its reader reports the end of the process
            write_frame(worker.requests, data)

    def next(self, timeout: float) -> tuple[int, Event] | None:
        while True:
            try:
                number, event = self._events.get(timeout=timeout)
            except Empty:
                return None
            if number not in self._workers:
                continue  # the end of a process that stop() killed
            if isinstance(event, Lost | Failed):  # one event, and its slot is free
                self.stop(number)
            return number, event

    def stop(self, worker: int) -> None:
        kill(self._workers.pop(worker).process)

    def keep(self, count: int) -> Collection[int]:
        for number in sorted(self._workers)[count:]:
            self.stop(number)
        return self._workers.keys()

    def close(self) -> None:
        for number in list(self._workers):
            self.stop(number)


def start(request: EngineRequest) -> StartedEngine:
    """Request the workers that the config asks for, or as many as pay."""
    section, device = request.config.engine, resolve_device(request.config.run.device)
    assert section
    workers, cpus = section.workers, available_cpus()
    if workers != "auto":
        return _request(request, workers, request.threads(max(1, cpus // workers)))
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpus > 1:
        return _request(request, gpus, request.threads(max(1, cpus // gpus)))
    threads = request.threads(1)
    if device.type != "cpu" or threads >= cpus:
        text = f"one process: {'one device' if device.type != 'cpu' else 'it uses all CPUs'}"
        return StartedEngine(None, request.config, text)
    return _measure(request, _request(request, cpus // threads, threads), cpus)


def offer(section: Any) -> str:
    """Describe the workers of the section and the CPUs of this machine."""
    workers = "a measured number of" if section.workers == "auto" else f"{section.workers:,}"
    noun = "process" if section.workers == 1 else "processes"
    return f"{workers} {noun}; this machine has {pluralize(available_cpus(), 'CPU')}"


def _request(request: EngineRequest, workers: int, threads: int) -> StartedEngine:
    config = request.config.replace({"run.threads": threads})
    gpus = torch.cuda.device_count() if resolve_device(config.run.device).type == "cuda" else 0
    opens = [
        Open(
            config=(
                config.replace({"run.device": f"cuda:{slot % gpus}"}) if gpus > 1 else config
            ).model_dump(mode="json"),
            trust_code=request.trust_code,
        )
        for slot in range(workers)
    ]
    engine = ProcessesEngine(opens, threads)
    engine.start(workers)
    text = f"{engine.name} of {pluralize(threads, 'thread')}"
    return StartedEngine(engine, config, text, workers)


def _measure(request: EngineRequest, started: StartedEngine, cpus: int) -> StartedEngine:
    """Keep the workers if they are faster together than one of them with all CPUs."""
    engine = started.engine
    assert engine
    request.progress(Progress(f"measuring whether {engine.name} pay", 0, 1))
    try:
        ready = await_ready(engine, started.workers)
        gain = _gain(engine, ready, cpus)
    except RunFailed as error:  # a single process predicts what precedes it, and reports it
        engine.close()
        text = f"one process, because {engine.name} could not be measured: {first_line(error)}"
        return StartedEngine(None, request.config, text)
    except BaseException:
        engine.close()
        raise
    one = f"one process of {pluralize(cpus, 'thread')}"
    if gain < 1:
        engine.close()
        text = f"{one}; {started.text} ran {gain:.2f} x as fast"
        return StartedEngine(None, request.config, text)
    text = f"{started.text}, {gain:.2f} x as fast as {one}"
    return replace(started, text=text, ready=tuple(ready.items()))


def _gain(engine: Engine, ready: Mapping[int, Ready], cpus: int) -> float:
    """Return how many times as fast all workers are as one of them with all CPUs."""
    first = min(ready)
    worker = ready[first]
    batches = max(1, round(_MEASURE_SECONDS / max(worker.batch_seconds, 1e-6)))
    step = worker.whole_batches
    stop = min(math.ceil(batches * worker.batch_size / step) * step, worker.samples)
    one, own = Task(start=0, stop=stop, threads=cpus), Task(start=0, stop=stop)
    _run_tasks(engine, [first], one)  # starts the threads, and fills the page cache
    gains: list[float] = []
    deadline = time.monotonic() + _PAIRS_SECONDS
    while len(gains) < _PAIRS and (not gains or time.monotonic() < deadline):
        rate = _run_tasks(engine, [first], one)
        gains.append(_run_tasks(engine, list(ready), own) / rate)
    return median(gains)


def await_ready(engine: Engine, workers: int) -> dict[int, Ready]:
    """Wait until all requested workers are ready.

    Raises:
        RunFailed: a worker cannot start.
    """
    ready: dict[int, Ready] = {}
    while len(ready) < workers:
        if event := engine.next(_POLL_SECONDS):
            number, message = event
            if not isinstance(message, Ready):
                raise start_error(number, message)
            ready[number] = message
    return ready


def _run_tasks(engine: Engine, workers: Sequence[int], task: Task) -> float:
    """Run a task on each of some workers at the same time; return their samples per second."""
    for worker in workers:
        engine.send(worker, task)
    waiting, rate = set(workers), 0.0
    while waiting:
        if event := engine.next(_POLL_SECONDS):
            number, done = event
            if not isinstance(done, Done):
                raise start_error(number, done)
            if done.error:
                raise RunFailed(done.error)
            waiting.discard(number)
            rate += (task.stop - task.start) / max(done.seconds, 1e-9)
    return rate


def _divide_cpus(workers: int, threads: int) -> list[list[int]] | None:
    """Return the CPUs of each worker; None if there are too few, or the system cannot pin."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cpus = sorted(os.sched_getaffinity(0))
    if workers * threads > len(cpus):
        return None
    return [cpus[slot * threads : (slot + 1) * threads] for slot in range(workers)]
