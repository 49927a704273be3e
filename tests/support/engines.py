"""An engine whose workers run one after the other in the test's process."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection
from typing import Any

import pytest

from gradrun.engines import infer
from gradrun.engines.engine import EngineRequest, Event, Lost, StartedEngine
from gradrun.engines.messages import Open, Ready, Task, decode_reply, decode_request, encode
from gradrun.engines.range_runner import RangeRunner, failed

Dies = Callable[[int, Task], bool]
"""Whether a worker dies when it runs a task."""

Change = Callable[[int, Ready], Ready]
"""Returns the Ready of a worker as another machine would have sent it."""


class InlineEngine:
    """Runs tasks when the driver asks for the next event; messages are encoded and decoded."""

    name = "inline workers"

    def __init__(self, opening: Open, dies: Dies, change: Change) -> None:
        self.opening, self.dies = decode_request(encode(opening)), dies
        self.change = change
        self.runners: dict[int, RangeRunner] = {}
        self.tasks: dict[int, deque[Task]] = {}
        self.turns: Counter[int] = Counter()
        self.started = 0
        self.opened: list[int] = []

    def start(self, count: int) -> None:
        for _ in range(count):
            self.started += 1
            self.tasks[self.started] = deque()

    def send(self, worker: int, task: Task) -> None:
        request = decode_request(encode(task))
        assert isinstance(request, Task)
        self.tasks[worker].append(request)

    def next(self, timeout: float) -> tuple[int, Event] | None:
        if new := [worker for worker in self.tasks if worker not in self.runners]:
            return new[0], self._open(new[0])
        # Alternately and the last worker first, so that results arrive out of order.
        for worker in sorted(self.tasks, key=lambda number: (self.turns[number], -number)):
            if self.tasks[worker]:
                self.turns[worker] += 1
                task = self.tasks[worker].popleft()
                if self.dies(worker, task):
                    self.stop(worker)
                    return worker, Lost("was killed by SIGKILL")
                return worker, decode_reply(bytearray(encode(self.runners[worker].run(task))))
        return None

    def _open(self, worker: int) -> Event:
        assert isinstance(self.opening, Open)
        self.runners[worker] = RangeRunner(self.opening)
        self.opened.append(worker)
        try:
            ready = self.change(worker, self.runners[worker].prepare())
            return decode_reply(bytearray(encode(ready)))
        except Exception as error:
            return failed(error)

    def stop(self, worker: int) -> None:
        del self.tasks[worker]
        if runner := self.runners.pop(worker, None):
            runner.__exit__()

    def keep(self, count: int) -> Collection[int]:
        for worker in sorted(self.tasks)[count:]:
            self.stop(worker)
        return self.tasks.keys()

    def close(self) -> None:
        for worker in list(self.runners):
            self.stop(worker)


class InlineEngines:
    """Replaces the engine `processes`, and remembers the engines of all runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dies: Dies = lambda worker, task: False
        self.change: Change = lambda worker, ready: ready
        self.engines: list[InlineEngine] = []
        source = infer.ENGINES["processes"]
        monkeypatch.setitem(infer.ENGINES, "processes", source._replace(start=self._start))
        # One unit per range, so that a small run has many.
        monkeypatch.setattr("gradrun.engines.dispatch.SPAN_SECONDS", 0.0)
        monkeypatch.setattr("gradrun.engines.dispatch._PROGRESS_SECONDS", 0.0)

    def _start(self, request: EngineRequest) -> StartedEngine:
        section: Any = request.config.engine
        config = request.config.replace({"run.threads": request.threads(1)})
        opening = Open(config=config.model_dump(mode="json"), trust_code=request.trust_code)
        engine = InlineEngine(
            opening,
            lambda worker, task: self.dies(worker, task),
            lambda worker, ready: self.change(worker, ready),
        )
        engine.start(section.workers)
        self.engines.append(engine)
        return StartedEngine(engine, config, "inline", section.workers)
