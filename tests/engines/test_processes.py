"""Real worker processes: they die, hang and print, and none outlives its driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
import yaml

import gradrun
from gradrun.config.load import load_config
from gradrun.core.errors import RunFailed
from gradrun.core.progress import Progress
from gradrun.engines import processes
from gradrun.engines.engine import EngineRequest, Lost, StartedEngine
from gradrun.engines.messages import Done, Failed, Open, Task, unpack_rows
from gradrun.engines.range_runner import RangeRunner
from gradrun.results.result import WorkerStats
from tests.conftest import ROOT
from tests.support.forked import ForkedCommand
from tests.support.lanes import planted_ready

COUNT, BATCH = 48, 4

NET = """
import os, signal, sys, time
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        print("a print of the model")
        for value in x[:, 0].tolist():
            act(int(value))
        return x * 3 + 1

def act(value):
    if value == {exits}:
        os._exit(0)
    if value == {crashes}:
        import ctypes
        ctypes.string_at(0)
    if value == {hangs}:
        time.sleep(3600)
    time.sleep(float(os.environ.get("SECONDS_PER_SAMPLE", 0)))
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Write a model that acts on some samples, and return a config of two workers."""

    def write(**net: Any) -> dict[str, Any]:
        options = {"exits": -1, "crashes": -1, "hangs": -1, **net}
        (tmp_path / "net.py").write_text(NET.format(**options))
        np.save(tmp_path / "n.npy", np.arange(COUNT, dtype=np.float32)[:, None])
        return {
            "model": {"source": "python", "target": str(tmp_path / "net.py") + ":Net"},
            "data": {"source": "arrays", "path": str(tmp_path / "n.npy"), "batch_size": BATCH},
            "run": {"threads": 1, "on_error": "quarantine", "warmup": 0},
            "output": {"path": str(tmp_path / "out")},
            "measure": {"memory": False},
            "engine": {"source": "processes", "workers": 2},
        }

    return write


EXPECTED = np.arange(COUNT, dtype=np.float32)[:, None] * 3 + 1


def test_samples_that_exit_crash_or_hang_are_quarantined_alone(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forked_children: None,
) -> None:
    # One sample per range, so that each bad sample ends two workers only.
    monkeypatch.setattr("gradrun.engines.dispatch.SPAN_SECONDS", 0.0)
    config = run(exits=21, crashes=38, hangs=COUNT - 1)
    config["data"]["batch_size"] = 1
    config["engine"]["timeout"] = 1
    result = gradrun.infer(config, trust_code=True)
    found = np.load(tmp_path / "out" / "predictions.npy")
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    reasons = {line["sample"]: line["error"] for line in map(json.loads, lines)}
    assert reasons == {
        21: "its worker process ended its process with exit code 0",
        38: "its worker process was killed by SIGSEGV",
        COUNT - 1: "its worker process did not finish a range in 1 s (engine.timeout)",
    }
    others = [row for row in range(COUNT) if row not in reasons]
    assert np.array_equal(found[others], EXPECTED[others])
    assert np.isnan(found[[*reasons]]).all()
    lost = [worker.lost for worker in result.measurements[0].workers if worker.lost]
    assert sum("SIGSEGV" in cause for cause in lost) >= 2


WEIGHTED = """
import time
from pathlib import Path
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        time.sleep(0 if Path(__file__).with_name("fast").exists() else 0.1)
        return x * self.factor
"""


class Eventful(NamedTuple):
    """A run in which a worker was stopped and the weights changed, and its predictions."""

    workers: tuple[WorkerStats, ...]
    predictions: np.ndarray[Any, Any]
    folder: Path


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Eventful:
    """Stop a worker; its replacement starts after the weights were replaced."""
    folder = tmp_path_factory.mktemp("eventful")
    (folder / "net.py").write_text(WEIGHTED)
    np.save(folder / "n.npy", np.arange(300, dtype=np.float32)[:, None])
    torch.save({"factor": torch.full((1,), 2.0)}, folder / "w.pt")
    config = {
        "model": {
            "source": "python",
            "target": str(folder / "net.py") + ":Net",
            "weights": str(folder / "w.pt"),
        },
        "data": {"source": "arrays", "path": str(folder / "n.npy"), "batch_size": 1},
        "run": {"threads": 1, "warmup": 0},
        "output": {"path": str(folder / "out")},
        "measure": {"memory": False},
        "engine": {"source": "processes", "workers": 2, "timeout": 3},
    }
    stopped: list[psutil.Process] = []

    def act(progress: Progress) -> None:
        if not stopped and len(progress.workers) == 2 and progress.done:
            stopped.append(_worker_processes()[0])
            stopped[0].suspend()
            torch.save({"factor": torch.full((1,), 3.0)}, folder / "w.pt")
        if progress.other_workers == "1 lost, 1 rejected":
            (folder / "fast").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradrun.engines.dispatch.SPAN_SECONDS", 0.0)
        result = gradrun.infer(config, trust_code=True, progress=act)
    predictions = np.load(folder / "out" / "predictions.npy")
    return Eventful(result.measurements[0].workers, predictions, folder)


def test_a_worker_that_stops_is_ended_by_the_timeout_and_costs_no_row(eventful: Eventful) -> None:
    lost = [worker.lost for worker in eventful.workers]
    assert lost.count("did not finish a range in 3 s (engine.timeout)") == 1
    assert np.array_equal(eventful.predictions, np.arange(300, dtype=np.float32)[:, None] * 2)
    assert sum(worker.samples for worker in eventful.workers) == 300
    assert not _worker_processes()


def _worker_processes() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "gradrun.engines.worker" in child.cmdline()]


def test_a_replacement_that_finds_other_weights_is_refused_by_name(eventful: Eventful) -> None:
    *_, replacement = eventful.workers
    assert replacement.worker == 3
    assert replacement.samples == 0
    assert replacement.rejected
    assert replacement.lost == "its model.weights differs from that of the driver"


def test_a_worker_that_cannot_start_is_reported_with_its_output(
    run: Callable[..., dict[str, Any]], tmp_path: Path, forked_children: None
) -> None:
    config = run()
    net = tmp_path / "net.py"
    text = "import os, sys\nif '--driver' not in sys.argv and 'pytest' not in sys.modules:\n"
    net.write_text(
        f"{text}    sys.stderr.write('no such device\\n'); os._exit(7)\n" + net.read_text()
    )
    with pytest.raises(RunFailed) as caught:
        gradrun.infer(config, trust_code=True)
    assert "ended its process with exit code 7 before its first batch" in str(caught.value)
    assert "no such device" in str(caught.value)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_worker_outlives_its_driver_and_the_run_can_be_resumed(
    name: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = run()
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    driver = ForkedCommand(
        "infer", "c.yaml", "--trust-code", cwd=tmp_path,
        env={"SECONDS_PER_SAMPLE": "0.05", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    journal = tmp_path / "out" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert journal.exists()
    workers = psutil.Process(driver.pid).children(recursive=True)
    assert len(workers) == 2
    driver.send_signal(getattr(signal, name))
    code = driver.wait(timeout=30)
    assert code == {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[name]
    psutil.wait_procs(workers, timeout=10)
    assert not [worker for worker in workers if worker.is_running()]
    config["engine"] = config["engine"] if name == "SIGKILL" else None
    gradrun.infer(config, trust_code=True, resume=True)
    assert np.array_equal(np.load(tmp_path / "out" / "predictions.npy"), EXPECTED)


KILLED = """
import os, random, signal, threading, time
from pathlib import Path
import torch

FOLDER = Path(__file__).with_name("kills")

def kill():
    number = len(list(FOLDER.iterdir()))
    if number < 17:
        (FOLDER / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)

class Net(torch.nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 4 and os.getpid() != {driver}:
            threading.Timer(random.uniform(0.02, 0.15), kill).start()
        time.sleep(0.002)
        return x * 3 + 1
"""


def test_17_kills_of_workers_at_random_moments_change_no_byte(
    run: Callable[..., dict[str, Any]], tmp_path: Path, forked_children: None
) -> None:
    config = run()
    (tmp_path / "net.py").write_text(KILLED.format(driver=os.getpid()))
    (tmp_path / "kills").mkdir()
    numbers = np.arange(6000, dtype=np.float32)[:, None]
    np.save(tmp_path / "n.npy", numbers)
    result = gradrun.infer(config, trust_code=True)
    assert np.array_equal(np.load(tmp_path / "out" / "predictions.npy"), numbers * 3 + 1)
    lost = [w.lost for w in result.measurements[0].workers if w.lost]
    assert len(lost) == len(list((tmp_path / "kills").iterdir())) >= 17
    assert all("SIGKILL" in cause for cause in lost)


def test_auto_uses_workers_or_one_process_and_says_which(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS_PER_SAMPLE", "0.001")
    config = run()  # sleeping needs no CPU: two workers are twice as fast
    config["engine"] = {"source": "processes", "workers": "auto"}
    config["run"]["threads"] = "auto"
    result = gradrun.infer(config, trust_code=True)
    (engine,) = [s.text for s in result.interpretation if s.topic == "engine"]
    if psutil.cpu_count() == 1:
        assert engine.startswith("one process")
    else:
        assert "x as fast as one process" in engine
        assert len(result.measurements[0].workers) > 1
    assert np.array_equal(np.load(tmp_path / "out" / "predictions.npy"), EXPECTED)


def test_a_worker_that_cannot_start_is_reported_once_and_can_be_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*_: Any, **__: Any) -> subprocess.Popen[bytes]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(["sleep", "60"], start_new_session=True, **pipes)

    monkeypatch.setattr(processes, "start_child", start)
    engine = processes.ProcessesEngine([Open(config={}, trust_code=False)] * 2, 1, pin=False)
    with closing(engine):
        engine.start(2)
        engine._events.put((2, Failed(error="no room")))
        event = engine.next(5.0)
        assert event is not None
        assert (event[0], type(event[1])) == (2, Failed)
        engine.start(1)
        assert engine.next(0.5) is None, "the end of the process is not another failure"
        assert sorted(engine.keep(2)) == [1, 3]


# --- whether workers pay, with planted speeds ----------------------------------------------------


class PlantedEngine:
    """Two workers that answer at once, with the planted speed of one and of both."""

    name = "2 processes"

    def __init__(self, alone: float, together: float, **failing: Any) -> None:
        self.alone, self.together, self.failing = alone, together, failing
        self.events: deque[tuple[int, Any]] = deque()
        self.tasks: list[tuple[int, Task]] = []
        self.closed = 0

    def start(self, count: int) -> None:
        ready = planted_ready(load_config(LINEAR).config, batch_seconds=0.1, whole_batches=BATCH)
        for number in range(1, count + 1):
            self.events.append((number, self.failing.get("start", ready)))

    def send(self, worker: int, task: Task) -> None:
        self.tasks.append((worker, task))
        speed = self.alone if task.threads else self.together
        seconds = (task.stop - task.start) / speed
        done = Done(start=task.start, stop=task.stop, seconds=seconds)
        self.events.append((worker, self.failing.get("run", done)))

    def next(self, timeout: float) -> tuple[int, Any] | None:
        return self.events.popleft() if self.events else None

    def close(self) -> None:
        self.closed += 1


LINEAR: dict[str, Any] = {
    "model": {"source": "layers", "layers": [{"Linear": [8, 4]}]},
    "data": {
        "source": "synthetic", "inputs": {"x": {"shape": [8]}}, "samples": 10_000,
        "batch_size": BATCH,
    },
    "output": {"path": "out"},
    "engine": {"source": "processes", "workers": "auto"},
}  # fmt: skip


def measured(engine: PlantedEngine) -> StartedEngine:
    """Decide between the engine and one process of eight threads."""
    config = load_config(LINEAR).config
    engine.start(2)
    request = EngineRequest(config, None, False, lambda _: None)
    return processes._measure(request, StartedEngine(engine, config, "2 workers", 2), 8)


def test_workers_that_are_faster_together_are_kept() -> None:
    engine = PlantedEngine(alone=100.0, together=80.0)
    found = measured(engine)
    assert found.engine is engine
    assert found.text == "2 workers, 1.60 x as fast as one process of 8 threads"
    assert [number for number, _ in found.ready] == [1, 2]
    assert not engine.closed
    # The speed of one worker is that of all CPUs; the tasks start and end at batches.
    assert {(number, task.threads) for number, task in engine.tasks} == {
        (1, 8), (1, None), (2, None),
    }  # fmt: skip
    assert all(task.start == 0 and task.stop % BATCH == 0 for _, task in engine.tasks)


def test_workers_that_are_slower_together_are_not_used() -> None:
    engine = PlantedEngine(alone=100.0, together=45.0)
    found = measured(engine)
    assert found.engine is None
    assert found.text == "one process of 8 threads; 2 workers ran 0.90 x as fast"
    assert engine.closed == 1


@pytest.mark.parametrize(
    ("failing", "problem"),
    [
        ({"start": Failed(error="no memory")}, "no memory"),
        ({"run": Done(start=0, stop=BATCH, error="sample 3 fails")}, "sample 3 fails"),
        ({"run": Lost("was killed by SIGKILL")}, "was killed by SIGKILL"),
    ],
)
def test_a_measurement_that_fails_leaves_the_run_to_one_process(
    failing: dict[str, Any], problem: str
) -> None:
    engine = PlantedEngine(1.0, 1.0, **failing)
    found = measured(engine)
    assert found.engine is None
    assert found.text.startswith("one process, because 2 processes could not be measured: ")
    assert problem in found.text
    assert engine.closed == 1


def test_ctrl_c_during_the_measurement_ends_the_workers() -> None:
    engine = PlantedEngine(1.0, 1.0)

    def interrupt(timeout: float) -> None:
        raise KeyboardInterrupt

    engine.next = interrupt
    with pytest.raises(KeyboardInterrupt):
        measured(engine)
    assert engine.closed == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned")
def test_a_task_of_a_measurement_uses_the_cpus_and_threads_that_it_names(
    tmp_path: Path,
) -> None:
    """And the worker has its own afterwards."""
    (tmp_path / "net.py").write_text(
        "import os, torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        found = [torch.get_num_threads(), len(os.sched_getaffinity(0))]\n"
        "        return torch.tensor([found] * len(x))\n"
    )
    config = load_config(
        LINEAR | {"model": {"source": "python", "target": f"{tmp_path}/net.py:Net"}},
        {"run.threads": 1, "measure.memory": False},
    ).config
    cpus, threads = os.sched_getaffinity(0), torch.get_num_threads()
    one = {min(cpus)}
    opening = Open(config=config.model_dump(mode="json"), trust_code=True)
    os.sched_setaffinity(0, one)
    try:
        with RangeRunner(opening, cpus) as runner:
            runner.prepare()
            rows: list[Any] = []
            for task in (Task(start=0, stop=BATCH, threads=3), Task(start=0, stop=BATCH)):
                (event,) = runner.run(task).events
                rows.append(unpack_rows(event)[0]["prediction"][0].tolist())
            assert os.sched_getaffinity(0) == one
    finally:
        os.sched_setaffinity(0, cpus)
    assert rows == [[3, len(cpus)], [1, 1]]
    assert torch.get_num_threads() == threads
