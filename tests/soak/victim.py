"""Run gradrun's commands on malicious files in a monitored process.

main() is the process; `Victim` starts it and survives its crashes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradrun.engines.child_process import kill
from tests.support.forked import ForkedChild

ROOT = Path(__file__).parents[2]
MEMORY = 2**31
"""Limit of the address space in bytes, above its size after startup; no run here needs as much."""
PEAK = 700 * 2**20
"""Bytes that a command may add to the resident set."""
SECONDS = 60.0
"""Time limit of a command."""

_STARTS_A_PROCESS = (
    "os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty subprocess.Popen pty.spawn "
    "socket.connect socket.bind webbrowser.open"
).split()
_CHANGES_A_NAME = "os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate".split()
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EXIT_CODES = {0, 1, 2, 3}


@dataclass
class Ending:
    """Outcome of a job; `wrong` lists violations in arguments."""

    codes: list[int] = field(default_factory=list)
    output: str = ""
    """Output of the commands."""
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Duration of the slowest command."""
    peak: int = 0
    """Greatest growth of the resident set in bytes."""


class Victim:
    """Runs jobs in a separate process, which is restarted when a job ends it."""

    def __init__(self) -> None:
        self._process: ForkedChild | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the handle

    def run(self, folder: Path, commands: list[list[str]], seconds: float = SECONDS) -> Ending:
        """Run the commands one after the other in `folder`; they may write below folder/out."""
        process = self._start()
        process.stdin.write(json.dumps([str(folder), commands]).encode() + b"\n")
        process.stdin.flush()
        timer = threading.Timer(seconds, process.send_signal, [signal.SIGABRT])
        timer.start()
        began = time.monotonic()
        answer = process.stdout.readline()
        timer.cancel()
        if answer:
            return Ending(**json.loads(answer))
        late = "" if time.monotonic() - began < seconds else f", stopped after {seconds:.0f} s"
        ended = f"the interpreter ended with {process.wait()}{late}"
        self.close()
        return Ending(wrong=[f"{ended}: {self._traceback()}"])

    def close(self) -> None:
        """End the process."""
        if self._process:
            kill(self._process)  # type: ignore[arg-type]
            self._process = None

    def _start(self) -> ForkedChild:
        if self._process is None:
            errors = self._errors.fileno()
            self._process = ForkedChild("tests.soak.victim", 1, stderr=errors)
            self._process.stdout.readline()  # ready: imports do not count towards the timeout
        return self._process

    def _traceback(self) -> str:
        self._errors.seek(0)
        output = self._errors.read()
        self._errors.seek(0)
        self._errors.truncate()
        return output[-9000:]


# --- the process -------------------------------------------------------------------------------


class Watch:
    """Records files opened for writing and started processes, while `folder` is set."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.wrong: list[str] = []
        sys.addaudithook(self._record)

    def _record(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, _, flags = args
            if flags & _WRITES:
                self._check(event, path, follows=not flags & os.O_NOFOLLOW)
        elif event in _CHANGES_A_NAME:
            for path in args[:2] if event in {"os.rename", "os.link", "os.symlink"} else args[:1]:
                self._check(event, path, follows=False)
        elif event in _STARTS_A_PROCESS:
            self.wrong.append(f"{event}{args!r:.300}")

    def _check(self, event: str, path: Any, *, follows: bool) -> None:
        if isinstance(path, int):  # a descriptor, which was checked when it was opened
            return
        named = Path(os.fsdecode(path))
        place = named.resolve() if follows else named.parent.resolve() / named.name
        if place.is_relative_to(self.folder) or place == Path(os.devnull):
            return
        self.wrong.append(f"{event} of {named}, which is at {place}")


def _peak() -> int:
    """Bytes of the greatest resident set since `_forget_peak`."""
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _run(arguments: list[str], ending: Ending, watch: Watch, folder: Path) -> None:
    from typer.testing import CliRunner

    from gradrun.cli.app import app

    _forget_peak()
    before, began = _peak(), time.monotonic()
    watch.folder = Path(folder, "out")
    with contextlib.suppress(MemoryError):
        result = CliRunner().invoke(app, arguments)
    watch.folder = None
    ending.seconds = max(ending.seconds, time.monotonic() - began)
    ending.peak = max(ending.peak, _peak() - before)
    ending.codes.append(result.exit_code)
    ending.output += result.output
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        import traceback

        ending.wrong.append("".join(traceback.format_exception(error))[-3000:])
    elif result.exit_code not in _EXIT_CODES:
        ending.wrong.append(f"exit code {result.exit_code}")
    elif result.exit_code in {1, 2} and "error: " not in result.stderr:
        ending.wrong.append(f"exit code {result.exit_code} without a sentence: {result.stderr!r}")
    if "Traceback" in result.output:
        ending.wrong.append(f"a traceback is shown: {result.output[-3000:]}")
    if unprintable := [c for c in result.output if not c.isprintable() and c not in "\n\t"]:
        ending.wrong.append(f"{unprintable[:5]} reach the terminal: {result.output!r:.300}")
    if ending.peak > PEAK:
        ending.wrong.append(f"{arguments} took {ending.peak / 2**20:,.0f} MiB")


def _warm_up() -> None:
    """Import modules that are imported late, so that no job is charged for it."""
    from typer.testing import CliRunner

    from gradrun.cli.app import app

    with contextlib.suppress(ImportError):
        import matplotlib.pyplot  # noqa: F401 - creates a folder in the home directory
    with contextlib.suppress(ImportError):
        import pyarrow.parquet  # noqa: F401 - allocates memory for its threads
    with contextlib.suppress(ImportError):
        from transformers import BertModel  # noqa: F401 - old versions run lscpu

    with tempfile.TemporaryDirectory() as folder:
        for name in ("exported", "digits"):  # older torch does not read the exported program
            config = str(ROOT / f"configs/{name}.yaml")
            arguments = ["infer", config, "--trust-code", "-o", f"{folder}/out"]
            done = CliRunner().invoke(app, arguments)
            if done.exit_code == 0:
                break
        assert done.exit_code == 0, done.output
        done = CliRunner().invoke(app, ["verify", f"{folder}/out"])
        assert done.exit_code == 0, done.output


def main() -> None:
    import resource

    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # all opened files are checked
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.pop("GRADRUN_TRUST_CODE", None)
    _warm_up()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    watch = Watch()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        named, commands = json.loads(line)
        folder = Path(named).resolve()
        os.chdir(folder)
        ending, watch.wrong = Ending(), []
        for arguments in commands:
            _run(arguments, ending, watch, folder)
        ending.wrong += watch.wrong
        answers.write(json.dumps(ending.__dict__) + "\n")
        answers.flush()
