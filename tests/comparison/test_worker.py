"""Worker processes: every way a process can end gives a report, and none is left running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gradrun.comparison import worker
from gradrun.comparison.protocol import Job, VariantTask, WorkerReport
from gradrun.comparison.worker import Worker
from gradrun.config.load import load_config
from tests.conftest import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="requires Linux")

LONG = 300.0
JOB = Job(
    kind="time",
    variants=(VariantTask(name="grad", config={}), VariantTask(name="no_grad", config={})),
    seed=0,
)


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return found


def wait_until_dead(pid: int) -> None:
    """Wait for a killed process, which the kernel removes a moment later."""
    wait_for(lambda: not is_alive(pid), 10)


# --- processes that misbehave --------------------------------------------------------------------

STUB = """\
#!{python}
import json, os, signal, struct, subprocess, sys, time

def at(variant, batch):
    marker = json.loads(sys.stdin.buffer.read())["marker"]
    with open(marker, "r+b") as file:
        file.write(struct.pack("qq", variant, batch))

def leave(name, **settings):
    code = "import time; time.sleep(300)"
    child = subprocess.Popen([sys.executable, "-c", code], **settings)
    with open({folder!r} + "/" + name, "w") as file:
        file.write(str(child.pid))

open({folder!r} + "/worker", "w").write(str(os.getpid()))
"""

Stub = Callable[[str], Worker]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A Worker whose process runs a few lines of Python instead of gradrun."""
    with_python = STUB.format(python=sys.executable, folder=str(tmp_path))

    def make(lines: str) -> Worker:
        file = tmp_path / "stub"
        file.write_text(with_python + textwrap.dedent(lines))
        file.chmod(0o755)
        monkeypatch.setattr(worker.sys, "executable", str(file))
        return Worker(JOB, threads=1)

    yield make
    for name in ("worker", "child"):
        if (tmp_path / name).exists():
            wait_until_dead(int((tmp_path / name).read_text()))


@pytest.mark.parametrize(
    ("lines", "variant", "batch", "cause"),
    [
        ("at(1, 4); os._exit(7)", "no_grad", 4, "ended its process with exit code 7"),
        ("at(0, 2); os.kill(os.getpid(), signal.SIGKILL)", "grad", 2, "was killed by SIGKILL"),
        ("at(1, 0); os.kill(os.getpid(), signal.SIGSEGV)", "no_grad", 0, "was killed by SIGSEGV"),
        ("at(-1, 0); sys.exit(3)", "", 0, "ended its process with exit code 3"),
        ("at(0, 1); os._exit(0)", "grad", 1, "ended without a report"),
        ("at(0, 1); print('no message'); sys.exit(0)", "grad", 1, "ended without a report"),
        ("at(0, 1); print('{}, and more')", "grad", 1, "ended without a report"),
    ],
)
def test_a_dead_process_is_a_failure_with_its_variant_and_batch(
    stub: Stub, lines: str, variant: str, batch: int, cause: str
) -> None:
    with stub(lines) as worker:
        report = worker.report(LONG)
    (failure,) = report.failures
    assert (failure.variant, failure.batch) == (variant, batch)
    assert failure.error.startswith(cause)
    assert report.measurements == ()
    assert ("memory" in failure.error) == ("SIGKILL" in cause), "the usual cause of SIGKILL"


def test_a_process_that_hangs_is_killed_with_its_children_after_the_timeout(
    stub: Stub,
) -> None:
    with stub("at(1, 5); leave('child'); time.sleep(300)") as worker:
        (failure,) = worker.report(1.0).failures
    assert (failure.variant, failure.batch) == ("no_grad", 5)
    assert failure.error == "did not return within 1 s (measure.timeout)"


@linux
@pytest.mark.parametrize("end", ["os._exit(7)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_children_of_a_dead_process_are_killed_and_do_not_delay_the_report(
    stub: Stub, end: str
) -> None:
    with stub(f"leave('child'); at(1, 4); {end}") as worker:
        (failure,) = worker.report(LONG).failures
    assert "did not return" not in failure.error


@linux
def test_children_of_a_finished_process_do_not_delay_the_report(stub: Stub) -> None:
    with stub("leave('child'); print('{}', flush=True); os._exit(0)") as worker:
        assert worker.report(LONG) == WorkerReport()


def test_an_abandoned_process_is_killed_although_it_ignores_signals(
    stub: Stub, tmp_path: Path
) -> None:
    lines = f"""
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        open({str(tmp_path / "ready")!r}, "w")
        time.sleep(300)
    """
    with stub(lines):
        wait_for((tmp_path / "ready").exists)
    # The fixture checks that the process is gone.


def test_the_marker_file_is_deleted_with_the_worker(stub: Stub) -> None:
    with stub("os._exit(1)") as worker:
        folder = Path(worker.job.marker).parent
        assert folder.is_dir()
        worker.report(LONG)
    assert not folder.exists()


def test_thread_counts_are_set_in_the_environment_of_the_process(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    lines = """
        one, other = (int(os.environ[name + "_NUM_THREADS"]) for name in ("OMP", "MKL"))
        at(0, 10 * one + other); os._exit(1)
    """
    with stub(lines) as worker:
        (failure,) = worker.report(LONG).failures
    assert failure.batch == 11


# --- the real worker process ---------------------------------------------------------------------

NETS = """\
import os, subprocess, sys, time
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, folder, fate="none"):
        super().__init__()
        self.folder, self.fate = folder, fate
        self.linear = nn.Linear(4, 4)
        if fate == "loud":
            print("to stdout, buffered")
            os.write(1, b"to file descriptor 1\\n")
        if fate == "unbuildable":
            raise RuntimeError("no such weights")

    def forward(self, x):
        if self.fate == "picky" and x[0, 0] == 24.0:
            raise ValueError("24 is too much")
        if self.fate == "fork":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
            self.note("child", child.pid)
            self.fate = "none"
        if self.fate == "slow":
            self.note("worker", os.getpid())
            time.sleep(300)
        return self.linear(x)

    def note(self, name, pid):
        draft = os.path.join(self.folder, name + ".tmp")
        with open(draft, "w") as file:
            file.write(str(pid))
        os.replace(draft, os.path.join(self.folder, name))
"""


def config_of(folder: Path, fate: str = "none") -> dict[str, Any]:
    """A config for Net with a file whose batch i starts with the number 8 * i."""
    (folder / "nets.py").write_text(NETS)
    rows = "\n".join(f"{i},0,0,0" for i in range(40))
    (folder / "rows.csv").write_text("a,b,c,d\n" + rows + "\n")
    args = {"folder": str(folder), "fate": fate}
    target = f"{folder / 'nets.py'}:Net"
    return {
        "model": {"source": "python", "target": target, "args": args},
        "data": {
            "source": "records",
            "path": str(folder / "rows.csv"),
            "inputs": {"x": {"columns": ["a", "b", "c", "d"]}},
            "batch_size": 8,
        },
        "run": {"threads": 1},
        "output": {"path": str(folder / "out")},
    }


FATES = ["loud", "picky", "unbuildable", "fork"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> WorkerReport:
    folder = tmp_path_factory.mktemp("real")
    variants = tuple(
        VariantTask(
            name=fate, config=load_config(config_of(folder, fate)).config.model_dump(mode="json")
        )
        for fate in FATES
    )
    job = Job(kind="time", variants=variants, seed=0, seconds=0.1, trust_code=True)
    with Worker(job, threads=1) as worker:
        report = worker.report(LONG)
    if sys.platform == "linux":
        wait_until_dead(int((folder / "child").read_text()))
    return report


def test_prints_of_a_model_do_not_corrupt_the_report(report: WorkerReport) -> None:
    assert "loud" in [measured.variant for measured in report.measurements]


def test_an_exception_in_a_model_is_a_failure_and_the_others_continue(
    report: WorkerReport,
) -> None:
    assert [measured.variant for measured in report.measurements] == ["loud", "fork"]
    picky = {failure.variant: failure for failure in report.failures}["picky"]
    assert re.fullmatch(r"ValueError: 24 is too much \(.*nets\.py:\d+\)", picky.error)
    assert picky.batch == 3


def test_a_model_that_cannot_be_built_is_a_failure(report: WorkerReport) -> None:
    found = {failure.variant: failure for failure in report.failures}["unbuildable"]
    assert "no such weights" in found.error
    assert found.batch == 0, "not the batch at which another model failed"


def test_the_report_has_environment_and_noise(report: WorkerReport) -> None:
    assert report.environment
    assert report.environment.threads == 1
    assert report.noise.steal >= 0


# --- stopping the whole command ------------------------------------------------------------------


@pytest.fixture
def comparing(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A running `gradrun compare` whose first worker is inside a slow batch."""
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(config_of(tmp_path, "slow")))
    process = subprocess.Popen(
        [sys.executable, "-m", "gradrun", "compare", str(config), "--trust-code"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for((tmp_path / "worker").exists)
        yield process, int((tmp_path / "worker").read_text())
    finally:
        for child in psutil.Process(process.pid).children() if process.poll() is None else ():
            child.kill()
        process.kill()
        process.communicate()


def test_ctrl_c_stops_all_workers_with_one_message(
    comparing: tuple[subprocess.Popen[str], int],
) -> None:
    process, worker = comparing
    children = psutil.Process(process.pid).children(recursive=True)
    assert worker in [child.pid for child in children]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "error: interrupted")
    for child in children:
        wait_until_dead(child.pid)


@linux
def test_no_worker_survives_a_killed_parent(
    comparing: tuple[subprocess.Popen[str], int],
) -> None:
    process, worker = comparing
    children = psutil.Process(process.pid).children(recursive=True)
    assert worker in [child.pid for child in children]
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_alive(child.pid) for child in children), 20)


@linux
def test_a_worker_whose_parent_has_already_died_exits_at_once() -> None:
    # The test process is the parent, but not the one whose id is passed.
    done = subprocess.run(
        [sys.executable, "-m", "gradrun.comparison.worker", "1234567890"],
        input=b"not even a job",
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, b"")
