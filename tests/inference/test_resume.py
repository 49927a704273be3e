"""Runs that are killed, stopped or changed, and resumed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradrun
from gradrun.core.errors import ConfigError, GradrunError, Interrupted, RunFailed
from gradrun.core.progress import Progress
from gradrun.inference import timed_loop
from gradrun.output import journal
from gradrun.output.formats import FORMATS
from gradrun.results.result import RunResult
from tests.soak import kill
from tests.support.forked import ForkedCommand

SAMPLES, BATCH = 60, 4


@pytest.mark.slow
def test_a_killed_and_resumed_run_writes_the_same_bytes(tmp_path: Path) -> None:
    landed = kill.run(tmp_path, kills=12, seed=1)
    print(kill.table(landed))
    assert len(landed) == 12
    assert {one.form for one in landed} == {*kill.WRITERS}
    assert any(one.resumes for one in landed), "a resume can be killed too"
    assert any(0 < one.committed < kill.SHORT for one in landed)


# --- signals -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    return kill.Folder(tmp_path_factory.mktemp("whole")).uninterrupted("npy")


def started(folder: kill.Folder, out: str, *more: str) -> ForkedCommand:
    """A run in progress with a first commit."""
    process = folder.start("npy", out, *more)
    while not folder.committed(out) and process.poll() is None:
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_run_and_the_printed_command_resumes_it(
    tmp_path: Path, whole: dict[str, bytes], number: int, code: int
) -> None:
    folder = kill.Folder(tmp_path)
    process = started(folder, "out")
    began = time.monotonic()
    process.send_signal(number)
    printed, stderr = process.communicate(timeout=20)
    assert time.monotonic() - began < 10, "on a loaded machine; under two seconds otherwise"
    assert process.returncode == code, stderr
    for table in ("throughput", "Peak memory"):
        assert table in printed
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    state = journal.read(tmp_path / "out" / "journal.jsonl")
    assert 0 < state.committed < kill.LONG
    assert len(np.load(tmp_path / "out" / "predictions.npy")) == state.committed
    assert (
        json.loads((tmp_path / "out" / "result.json").read_text())["predictions"] == state.committed
    )
    (line,) = [line for line in stderr.splitlines() if line.startswith("to resume: ")]
    words = shlex.split(line.removeprefix("to resume: "))
    assert words[0] == "gradrun"
    resumed = ForkedCommand(*words[1:], cwd=tmp_path)
    printed, stderr = resumed.communicate()
    assert resumed.returncode == 0, stderr
    assert re.search(rf"resumed +after {state.committed:,} samples", printed)
    assert folder.files("out") == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("call", "committed"),
    [(0, None), (1, None), (4, None), (11, 20), (21, SAMPLES)],
    ids=[
        "while it loads",
        "in the first batch",
        "while samples run alone",
        "in a batch",
        "while memory is counted",
    ],
)
def test_a_signal_at_any_time_is_reported_with_its_exit_code(
    tmp_path: Path, call: int, committed: int | None, number: int
) -> None:
    (tmp_path / "net.py").write_text(
        "import os\nfrom pathlib import Path\nfrom torch import nn\n"
        "CALLS = []\n"
        "def count():\n"
        f"    if len(CALLS) == {call} and not Path('killed').exists():\n"
        f"        Path('killed').touch()\n        os.kill(os.getpid(), {int(number)})\n"
        "    CALLS.append(1)\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        count()\n"
        "    def forward(self, x):\n        count()\n        return x * 2\n"
    )
    config = {
        "model": {"source": "python", "target": f"{tmp_path / 'net.py'}:Net"},
        "data": {
            "source": "synthetic",
            "inputs": {"x": {"shape": [2]}},
            "samples": SAMPLES,
            "batch_size": BATCH,
        },
        "run": {"warmup": 0},
        "output": {"path": str(tmp_path / "run")},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(Interrupted) as ended:
            gradrun.infer(config, trust_code=True)
        assert ended.value.exit_code == 128 + number
        assert (ended.value.result is not None) is (committed is not None)
        if committed is None:
            assert not (tmp_path / "run").exists()
        else:
            assert f"{committed} of 60 predictions are saved" in str(ended.value)
            assert ended.value.resumable
            assert journal.read(tmp_path / "run" / "journal.jsonl").committed == committed
        result = gradrun.infer(config, trust_code=True, resume=True)
    assert result.predictions == SAMPLES


def test_a_signal_during_the_write_of_the_result_is_deferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 8},
        "output": {"path": str(tmp_path / "run")},
    }
    save = RunResult.save

    def interrupted(result: RunResult, path: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(result, path)

    monkeypatch.setattr(RunResult, "save", interrupted)
    with pytest.raises(Interrupted) as ended:
        gradrun.infer(config)
    assert ended.value.exit_code == 143
    monkeypatch.undo()
    assert gradrun.infer(config, resume=True) == RunResult.load(tmp_path / "run")


def test_a_second_signal_ends_the_run_at_once_and_it_can_be_resumed(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    folder = kill.Folder(tmp_path)
    process = started(folder, "out")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode in {130, 143}
    assert "Traceback" not in stderr
    folder.wait(folder.start("npy", "out", "--resume"))
    assert folder.files("out") == whole


def test_a_second_run_in_a_folder_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    folder, long = kill.Folder(tmp_path), ("--set", "data.samples=1000000")
    first = started(folder, "out", *long)
    second = folder.start("npy", "out", "--resume", *long)
    _, stderr = second.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 2, stderr
    assert f"process {first.pid} on" in stderr
    third = folder.start("npy", "out", "--resume", *long)  # the lock of a dead process is free
    before = folder.committed("out")
    while folder.committed("out") == before and third.poll() is None:
        time.sleep(0.01)
    third.kill()
    third.communicate()
    assert folder.committed("out") > before


# --- changes before a resume -------------------------------------------------------------------

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, scale=2.0):
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(2, 2)
        self.calls = 0

    def forward(self, x):
        if x[:, 0].max() >= STOP:
            raise ValueError("this far and no further")
        return self.scale * self.linear(x)
"""


@pytest.fixture
def stopped(tmp_path: Path) -> dict[str, Any]:
    """The config of a run that failed at sample 40 of 60, whose weights and model are files."""
    from safetensors.torch import save_file
    from torch import nn

    np.save(tmp_path / "x.npy", np.arange(SAMPLES, dtype=np.float32).repeat(2).reshape(-1, 2))
    layer = nn.Linear(2, 2)
    save_file({f"linear.{k}": v for k, v in layer.state_dict().items()}, tmp_path / "w.safetensors")
    (tmp_path / "net.py").write_text(MODEL.replace("STOP", "STOPS_AT") + "\nSTOPS_AT = 40\n")
    config = {
        "model": {
            "source": "python",
            "target": f"{tmp_path / 'net.py'}:Net",
            "weights": str(tmp_path / "w.safetensors"),
        },
        "data": {"source": "arrays", "path": str(tmp_path / "x.npy"), "batch_size": BATCH},
        "output": {"path": str(tmp_path / "run")},
    }
    with pytest.raises(RunFailed, match="which starts at sample 40"):
        gradrun.infer(config, trust_code=True)
    return config


def replaced(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace the content but not the size and the modification time."""
    status = file.stat()
    file.write_bytes(change(file.read_bytes()))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
    "data": (
        lambda folder, config: replaced(folder / "x.npy", lambda data: data[:-4] + b"abcd"),
        r"x\.npy changed \(content\)",
    ),
    "data's size": (
        lambda folder, config: np.save(folder / "x.npy", np.zeros((61, 2), np.float32)),
        r"number of samples changed from 60 to 61; .*x\.npy changed \(size, content\)",
    ),
    "weights": (
        lambda folder, config: replaced(folder / "w.safetensors", lambda data: data[:-4] + b"abcd"),
        r"w\.safetensors changed \(content\)",
    ),
    "the model's source": (
        lambda folder, config: (folder / "net.py").write_text(MODEL.replace("STOP", "99")) and None,
        r"net\.py changed",
    ),
    "the mode": (
        lambda folder, config: config.update(run={"mode": "grad"}),
        r"run\.mode changed from inference_mode to grad",
    ),
    "an argument": (
        lambda folder, config: config["model"].update(args={"scale": 3.0}),
        r"model\.args\.scale changed from missing to 3\.0",
    ),
    "two keys": (
        lambda folder, config: config.update(
            run={"seed": 7}, data=config["data"] | {"batch_size": 5}
        ),
        r"data\.batch_size changed from 4 to 5; run\.seed changed from 0 to 7",
    ),
    "the format": (
        lambda folder, config: config["output"].update(format="jsonl"),
        r"output\.format changed from npy to jsonl",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resume_of_another_run_is_an_error_and_changes_no_file(
    tmp_path: Path, stopped: dict[str, Any], what: str
) -> None:
    change, message = CHANGES[what]
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    change(tmp_path, stopped)
    with pytest.raises(ConfigError, match=message):
        gradrun.infer(stopped, trust_code=True, resume=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_measurement_settings_and_the_folder_may_change_before_a_resume(
    tmp_path: Path, stopped: dict[str, Any]
) -> None:
    shutil.move(tmp_path / "run", tmp_path / "moved")
    stopped["output"]["path"] = str(tmp_path / "moved")
    stopped["measure"] = {"memory": False}
    with pytest.raises(RunFailed, match="which starts at sample 40"):
        gradrun.infer(stopped, trust_code=True, resume=True)


def test_without_resume_an_unfinished_run_is_an_error_with_a_hint(
    stopped: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=r"40 of 60 samples\); use resume=True .* overwrite=True"):
        gradrun.infer(stopped, trust_code=True)


def test_a_resume_does_not_repeat_a_finished_run(tmp_path: Path) -> None:
    config = {
        "model": {"source": "zoo", "name": "mlp", "args": {"width": 4}},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 8},
        "output": {"path": str(tmp_path / "run")},
    }
    first = gradrun.infer(config, resume=True)
    again = gradrun.infer(config, resume=True)
    assert again == first


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"journal": 3', '"journal": 4'), "has journal format 4"),
        (lambda text: text.replace('"start": 0', '"start": 4'), "the journal is damaged"),
        (lambda text: "", "not a journal of a run"),
        (lambda text: text[:50], "not a journal of a run"),
    ],
)
def test_a_damaged_journal_is_reported_with_its_line(
    tmp_path: Path, stopped: dict[str, Any], damage: Callable[[str], str], message: str
) -> None:
    file = tmp_path / "run" / "journal.jsonl"
    text = file.read_text() + '{"start": 40, "stop": 44, "files": {}}\n'
    file.write_text(damage(text))
    with pytest.raises(GradrunError, match=message):
        gradrun.infer(stopped, trust_code=True, resume=True)


def test_an_incomplete_last_line_of_the_journal_is_dropped_with_a_warning(
    tmp_path: Path, stopped: dict[str, Any]
) -> None:
    with (tmp_path / "run" / "journal.jsonl").open("a") as file:
        file.write('{"start": 40, "st')
    with pytest.raises(RunFailed) as ended:
        gradrun.infer(stopped, trust_code=True, resume=True)
    assert "torn_journal" in {warning.code for warning in ended.value.result.warnings}
    assert journal.read(tmp_path / "run" / "journal.jsonl").committed == 40


def test_a_missing_result_is_written_again_and_a_damaged_one_is_reported(tmp_path: Path) -> None:
    config = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 8},
        "output": {"path": str(tmp_path / "run")},
    }
    gradrun.infer(config)
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(GradrunError, match=r"result\.json is not a gradrun result: .* resume=True"):
        gradrun.infer(config, resume=True)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"unfinished run \(8 of 8 samples\); use resume=True"):
        gradrun.infer(config)
    before = (tmp_path / "run" / "predictions.npy").read_bytes()
    assert gradrun.infer(config, resume=True).predictions == 8
    assert RunResult.load(tmp_path / "run").resumed_at == 8
    assert (tmp_path / "run" / "predictions.npy").read_bytes() == before


def test_a_resume_detects_data_that_were_replaced_during_the_run(
    tmp_path: Path, stopped: dict[str, Any]
) -> None:
    shutil.rmtree(tmp_path / "run")
    file = tmp_path / "net.py"
    text = file.read_text().replace(
        "        if x",
        "        if x[0, 0] == 20:\n"
        "            from pathlib import Path\n"
        "            data = Path(__file__).with_name('x.npy')\n"
        "            data.with_suffix('.new').write_bytes(data.read_bytes()[:-4] + b'abcd')\n"
        "            data.with_suffix('.new').replace(data)\n"
        "        if x",
    )
    file.write_text(text)
    with pytest.raises(RunFailed, match="no further"):
        gradrun.infer(stopped, trust_code=True)
    with pytest.raises(ConfigError, match=r"cannot resume .*x\.npy changed \(content\)"):
        gradrun.infer(stopped, trust_code=True, resume=True)


def test_missing_prediction_files_are_an_error(tmp_path: Path, stopped: dict[str, Any]) -> None:
    (tmp_path / "run" / "predictions.npy").unlink()
    with pytest.raises(GradrunError, match=r"predictions cannot be written|predictions\.npy"):
        gradrun.infer(stopped, trust_code=True, resume=True)


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_deleted_during_the_run_is_an_error_for_every_format(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timed_loop, "_CALLBACK_NS", 0)
    out = tmp_path / "run"
    config = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 70_000},
        "output": {"path": str(out), "format": form},
    }

    def delete(progress: Progress) -> None:
        shutil.rmtree(out, ignore_errors=True)

    with pytest.raises(RunFailed, match=r"No such file or directory|the output folder was removed"):
        gradrun.infer(config, progress=delete)
    assert not out.exists()


def test_a_folder_deleted_during_the_run_is_reported_in_one_sentence(tmp_path: Path) -> None:
    folder = kill.Folder(tmp_path)
    process = started(folder, "out")
    shutil.rmtree(tmp_path / "out")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
