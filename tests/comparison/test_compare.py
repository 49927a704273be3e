"""`gradrun compare` as it is typed, and `gradrun.compare`: what is asked, what is answered.

Most tests stop before any worker; what is true of real workers is asked of two real comparisons.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import gradrun
from gradrun.comparison import session
from gradrun.comparison.session import SessionData
from gradrun.core.errors import ConfigError
from gradrun.results.ratios import compare_measured
from gradrun.results.result import RunResult
from tests.conftest import ROOT, Answer, Command
from tests.support.run_results import MACHINE, measurement

ALL = ["grad", "no_grad", "inference_mode"]

YAML = """\
model: {source: zoo, name: mlp, args: {width: 4, depth: 1}}
data: {source: synthetic, inputs: {x: {shape: [4]}}, samples: 64, batch_size: 8}
run: {threads: 1}
measure: {processes: 2, budget: 5}
output: {path: runs/out}
"""


@dataclass
class Asked:
    """What a comparison was asked, by the time its workers would have been started."""

    sessions: list[Any]

    @property
    def names(self) -> list[str]:
        (session,) = self.sessions
        return [variant.name for variant in session.variants]

    @property
    def configs(self) -> list[dict[str, Any]]:
        return [variant.config for variant in self.sessions[0].variants]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """No worker runs; the result has one row a variant."""
    found = Asked([])

    def run(session: Any, progress: Any = None) -> SessionData:
        found.sessions.append(session)
        measured = [
            measurement(5, last=4, variant=v.name, mode=v.config["run"]["mode"], process=process)
            for v in session.variants
            for process in range(2)
        ]
        return SessionData(
            measurements=measured,
            comparisons=compare_measured(measured, 0.01),
            environment=MACHINE,
        )

    monkeypatch.setattr(session.Session, "run", run)
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for c.yaml, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(YAML)
    return tmp_path


# --- every form --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("c.yaml", ALL),
        ("c.yaml --modes", ALL),
        ("--modes c.yaml", ALL),
        ("c.yaml --modes grad,inference_mode", ["grad", "inference_mode"]),
        ("--modes grad,inference_mode c.yaml", ["grad", "inference_mode"]),
        ("c.yaml --modes=no_grad,grad", ["no_grad", "grad"]),
        ("c.yaml --modes grad --modes no_grad", ["grad", "no_grad"]),
        ("--modes grad c.yaml --modes no_grad", ["grad", "no_grad"]),
        ("c.yaml --modes --quiet", ALL),
        ("--modes --set run.threads=1 c.yaml", ALL),
        ("c.yaml --modes grad,grad", ["grad", "grad again"]),
        ("c.yaml --modes no_grad,no_grad,no_grad", ["no_grad", "no_grad again"]),
        ("c.yaml --over run.threads=1,2", ["run.threads=1", "run.threads=2"]),
        ("--over run.threads=1,1 c.yaml", ["run.threads=1", "run.threads=1 again"]),
        ("c.yaml --over run.mode=grad,no_grad", ["grad", "no_grad"]),
        ("c.yaml --over model.args.width=4,8", ["model.args.width=4", "model.args.width=8"]),
    ],
)
def test_every_form_compares_what_it_names_in_that_order(
    cli: Command, asked: Asked, words: str, names: list[str]
) -> None:
    answer = cli("compare", *words.split())
    assert answer.code == 0, answer.text
    assert asked.names[: len(names)] == names
    assert len(set(asked.names)) == len(asked.names)
    assert all(config["model"]["name"] == "mlp" for config in asked.configs)


@pytest.mark.parametrize("words", ["--modes", ""])
def test_without_a_config_the_bundled_digits_are_compared_and_the_result_lies_here(
    cli: Command, asked: Asked, folder: Path, words: str
) -> None:
    (folder / "c.yaml").unlink()
    answer = cli("compare", *words.split())
    assert answer.code == 0, answer.text
    assert asked.names == ALL
    assert {config["model"]["name"] for config in asked.configs} == {"digits_cnn"}
    assert (folder / "runs" / "digits-compare" / "result.json").is_file()


def test_variants_differ_in_the_key_compared_and_in_nothing_else(
    cli: Command, asked: Asked
) -> None:
    cli("compare", "c.yaml", "--over", "run.threads=1,2", "--set", "run.seed=5")
    one, two = asked.configs
    assert (one["run"].pop("threads"), two["run"].pop("threads")) == (1, 2)
    assert one == two
    assert one["run"]["seed"] == 5


def test_the_first_is_the_baseline(cli: Command, asked: Asked) -> None:
    answer = cli("compare", "c.yaml", "--modes", "no_grad,grad,inference_mode", "--json", "-")
    found = json.loads(answer.out)["comparisons"]
    assert [(c["baseline"], c["candidate"]) for c in found] == [
        ("no_grad", "grad"),
        ("no_grad", "inference_mode"),
    ]


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("c.yaml --modes grad,no_gard", ["no_gard", "did you mean", "no_grad"]),
        ("c.yaml --modes inference", ["inference", "did you mean", "inference_mode"]),
        ("c.yaml --modes grad", ["two values of run.mode"]),
        ("c.yaml --over output.path=a,b", ["output.path", "nothing that is measured"]),
        ("c.yaml --over run.threads=1,2 --over run.seed=1,2", ["one key at a time"]),
        ("c.yaml --over run.thread=1,2", ["run.thread", "did you mean", "threads"]),
        ("c.yaml --over run.threads=1,two", ["run.threads", "two"]),
        ("c.yaml --over run.threads", ["--over run.threads", "run.threads=1,2"]),
        ("c.yaml --over run.threads=1", ["--over", "key=a,b"]),
        ("c.yaml --over run.threads=1,2 --modes grad,no_grad", ["--over", "--modes", "one"]),
        ("c.yaml --set run.thread=1", ["run.thread", "did you mean"]),
        ("c.yaml --set measure.processes=1", ["measure.processes", "2"]),
        ("missing.yaml --modes", ["missing.yaml"]),
        ("c.yaml --json no/such/folder.json", ["no/such"]),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(
    cli: Command, asked: Asked, folder: Path, words: str, told: list[str]
) -> None:
    answer = cli("compare", *words.split())
    assert answer.code == 2
    assert answer.out == ""
    assert all(word in answer.err.lower() for word in told), answer.err
    assert "Traceback" not in answer.err
    assert not asked.sessions
    assert not (folder / "runs").exists()


def test_a_file_in_the_place_of_the_results_folder_is_said_before_anything_runs(
    cli: Command, asked: Asked, folder: Path
) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "out-compare").touch()
    assert cli("compare", "c.yaml").code == 2
    assert not asked.sessions


# --- what is answered --------------------------------------------------------------------------


def test_json_on_stdout_is_alone_there(cli: Command, asked: Asked, folder: Path) -> None:
    answer = cli("compare", "c.yaml", "--json", "-")
    result = RunResult.from_json(answer.out)
    assert result == RunResult.load(folder / "runs" / "out-compare")
    assert (result.kind, len(result.comparisons)) == ("compare", 2)
    assert "inference_mode" in answer.err


def test_json_goes_to_a_file_too(cli: Command, asked: Asked, folder: Path) -> None:
    answer = cli("compare", "c.yaml", "--json", "here.json")
    assert RunResult.load(folder / "here.json").kind == "compare"
    assert "inference_mode" in answer.out


def test_quiet_says_nothing(cli: Command, asked: Asked, folder: Path) -> None:
    assert cli("compare", "c.yaml", "--quiet").text == ""
    assert (folder / "runs" / "out-compare" / "result.json").is_file()


def test_an_earlier_run_of_infer_is_not_touched(cli: Command, asked: Asked, folder: Path) -> None:
    assert cli("infer", "c.yaml", "--quiet").code == 0
    before = {path: path.read_bytes() for path in (folder / "runs" / "out").iterdir()}
    assert cli("compare", "c.yaml").code == 0
    assert cli("compare", "c.yaml").code == 0, "and it can be asked again"
    assert {path: path.read_bytes() for path in (folder / "runs" / "out").iterdir()} == before


def test_the_function_takes_what_the_command_takes(asked: Asked, folder: Path) -> None:
    compared = gradrun.compare("c.yaml", ["no_grad", gradrun.GradMode.GRAD], run={"seed": 3})
    assert asked.names == ["no_grad", "grad"]
    assert {config["run"]["seed"] for config in asked.configs} == {3}
    assert [type(c) for c in compared] == [gradrun.Comparison]
    assert compared.result.comparisons == tuple(compared)


def test_the_function_compares_along_any_key_with_values_of_any_type(asked: Asked) -> None:
    written = gradrun.load_config("c.yaml").config
    gradrun.compare(written, over=("model.args", [{"width": 8}, {"width": 4, "depth": 2}]))
    assert [config["model"]["args"] for config in asked.configs] == [
        {"width": 8, "depth": 1},  # a mapping is laid over what c.yaml says, as everywhere
        {"width": 4, "depth": 2},
    ]


def test_the_function_refuses_a_mode_that_there_is_none_of(asked: Asked) -> None:
    with pytest.raises(ConfigError, match="no_grad"):
        gradrun.compare("c.yaml", ["grad", "nograd"])
    assert not asked.sessions


# --- real workers ------------------------------------------------------------------------------

SCRIPT = """\
import json, sys, time
import gradrun
gradrun.compare, gradrun.RunConfig  # imported outside of what is counted
began, used = time.perf_counter(), time.process_time()
compared = gradrun.compare("c.yaml", ["grad", "inference_mode"])
wall, cpu = time.perf_counter() - began, time.process_time() - used
print(json.dumps({
    "torch": "torch" in sys.modules, "wall": wall, "cpu": cpu,
    "kinds": [type(c).__name__ for c in compared],
    "processes": compared.result.measurements[-1].process,
}))
"""


@dataclass
class Real:
    """A comparison by real workers, in a process of its own."""

    said: dict[str, Any]
    result: RunResult


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    (folder / "c.yaml").write_text(YAML)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Real(json.loads(done.stdout), RunResult.load(folder / "runs" / "out-compare"))


def test_the_parent_neither_imports_torch_nor_takes_the_processor_from_its_workers(
    real: Real,
) -> None:
    assert real.said["torch"] is False
    assert real.said["cpu"] < 0.2 * real.said["wall"]


def test_a_real_comparison_has_every_figure_that_the_issue_asks_for(real: Real) -> None:
    assert real.said["kinds"] == ["Comparison"]
    result = real.result
    (compared,) = result.comparisons
    assert compared.low <= compared.ratio <= compared.high
    assert compared.verdict in {"faster", "slower", "no_difference", "inconclusive"}
    assert [(e.bitwise, e.equal) for e in result.equivalence] == [(True, True)]
    assert {m.variant for m in result.measurements} == {"grad", "inference_mode"}
    assert {m.process for m in result.measurements} == set(range(real.said["processes"] + 1))
    assert len({m.process for m in result.measurements}) >= 2
    for measured in result.measurements:
        assert measured.batch_seconds, "raw samples of every process"
        assert measured.memory.process_peak
        assert measured.memory.retained == (8 * 4 * 4)
    assert len({m.memory.process_peak for m in result.measurements}) <= 2
    assert result.environment.threads == 1


FATAL = """\
import os, signal, torch
from torch import nn


class Net(nn.Module):
    def forward(self, x):
        print("a line on stdout", flush=True)
        if torch.is_grad_enabled() and x[0, 0] == 16.0:
            raise ValueError("no 16 in grad")
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            if x[0, 0] == 24.0:
                os.kill(os.getpid(), signal.SIGKILL)
        return x * 2
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, RunResult]:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "nets.py").write_text(FATAL)
    (folder / "x.csv").write_text("a,b\n" + "".join(f"{i},0\n" for i in range(48)))
    (folder / "c.yaml").write_text(
        "model: {source: python, target: nets.py:Net}\n"
        "data: {source: records, path: x.csv, inputs: {x: {columns: [a, b]}}, batch_size: 8}\n"
        "run: {threads: 1}\n"
        "measure: {processes: 2, budget: 5}\n"
        "output: {path: out}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "gradrun", "compare", "c.yaml", "--trust-code", "--modes",
         "grad,no_grad,inference_mode,inference_mode"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    return (
        Answer(done.returncode, done.stdout, done.stderr),
        RunResult.load(folder / "out-compare"),
    )


def test_modes_that_fail_are_told_in_one_sentence_each_with_their_batch(
    broken: tuple[Answer, RunResult],
) -> None:
    answer, result = broken
    assert answer.code == 1
    assert "Traceback" not in answer.err
    raised, killed = answer.err.strip().splitlines()
    said = r"error: grad, batch 2: ValueError: no 16 in grad \(/.*/nets\.py:9\)"
    assert re.fullmatch(said, raised)
    assert killed.startswith("no_grad, batch 3: was killed by SIGKILL")
    assert list(result.failures) == [raised.removeprefix("error: "), killed]


def test_the_rows_of_the_others_are_shown_and_saved_all_the_same(
    broken: tuple[Answer, RunResult],
) -> None:
    answer, result = broken
    assert "inference_mode again" in answer.out
    assert "same to the bit" in answer.out
    assert "a line on stdout" not in answer.out
    assert {m.variant for m in result.measurements} == {"inference_mode", "inference_mode again"}
    assert [c.baseline for c in result.comparisons] == ["inference_mode"]


def test_a_device_that_is_not_there_is_told_as_infer_tells_it(cli: Command, folder: Path) -> None:
    answer = cli("compare", "c.yaml", "--over", "run.device=cpu,cuda:99")
    assert answer.code in {1, 2}
    assert "device cuda:99 is not available" in answer.err


def test_ctrl_c_shows_and_saves_what_was_measured(
    cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = session.Session._enough

    def stop(session: Any, cost: float) -> bool:
        if len(session.paces) == 2:
            raise KeyboardInterrupt
        return enough(session, cost)

    monkeypatch.setattr(session.Session, "_enough", stop)
    answer = cli("compare", "c.yaml", "--modes", "grad,no_grad")
    assert answer.code == 130, answer.text
    assert "error: interrupted" in answer.err
    assert "in 2 fresh processes" in answer.out
    saved = RunResult.load(next(folder.rglob("result.json")))
    assert len(saved.comparisons) == 1
