"""Shared fixtures: run commands in this process or in a subprocess."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Idle threads of OpenMP wait in a loop, which takes the processors from the other test process.
# The library reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test needs the hub, and some machines answer only after a minute of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from typer.testing import CliRunner

from gradrun.cli.app import app
from tests.support import forked

ROOT = Path(__file__).parent.parent


@dataclass
class Answer:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


Command = Callable[..., Answer]


def run_cli(*words: object, input: str | None = None) -> Answer:
    """Run a command in this process; unexpected exceptions propagate."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=input)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def cli() -> Command:
    """Return `run_cli`."""
    return run_cli


@pytest.fixture
def process(tmp_path: Path) -> Command:
    """Run a command in a subprocess, in an empty folder."""

    def run(*words: object, timeout: float = 120, **settings: object) -> Answer:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        done = subprocess.run(
            [sys.executable, "-m", "gradrun", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **{"cwd": tmp_path, "env": environment, **settings},  # type: ignore[call-overload]
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def forked_children() -> Iterator[None]:
    """Fork the processes of workers, which takes a tenth of the time of a start."""
    with forked.forked_children():
        yield


def pytest_configure() -> None:
    """Restore the SIGINT handler, which shells disable for background processes; hide the cache."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Peaks measured on this machine must not appear in the reports of tests.
    os.environ["GRADRUN_CACHE"] = os.devnull


def pytest_collection_finish() -> None:
    """Exempt the imported modules and the tests themselves from garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a CUDA device if none is available."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
