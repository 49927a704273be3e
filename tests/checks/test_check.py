"""`gradrun check` on real models: outcomes, files and exit codes.

Workers run in the test process, except where a test needs real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xmlschema

import gradrun
from gradrun.core.errors import ConfigError, RunFailed
from gradrun.core.progress import Progress
from gradrun.data import open_data
from gradrun.results.result import RunResult
from tests.conftest import ROOT
from tests.support.forked import forked_children
from tests.support.workers import in_process_workers

CONFIG = """\
model:
  source: python
  target: nets/mine.py:Net
data:
  source: synthetic
  inputs: {x: {shape: [64]}}
  samples: 40
  batch_size: 8
run: {threads: 1, warmup: 0}
measure: {processes: 2, budget: 1, precision: 0.5}
output:
  path: runs/mine
"""
NET = """\
import torch
from torch import nn

import sizes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, sizes.HIDDEN), nn.Linear(sizes.HIDDEN, 10)

    def forward(self, x):
        for _ in range(sizes.ROUNDS):
            out = self.last(torch.relu(self.first(x)))
        return out
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a user's own model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADRUN_TRUST_CODE", "1")
    Path("nets").mkdir()
    Path("nets/mine.py").write_text(NET)
    Path("nets/sizes.py").write_text("HIDDEN, ROUNDS = 128, 1\n")
    Path("gradrun.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def in_process():
    with in_process_workers():
        yield


in_this_process = pytest.mark.usefixtures("in_process")
in_processes = pytest.mark.usefixtures("forked_children")
"""In processes that end, but start faster than new ones."""


def statuses(result: RunResult) -> dict[str, str]:
    return {outcome.check: outcome.status for outcome in result.outcomes}


@in_this_process
def test_a_sound_model_passes_and_saves_its_predictions(project):
    result = gradrun.check("gradrun.yaml", sets=["check.limits.forward_peak=1 MiB"])
    assert result.status == "pass"
    assert [*statuses(result)] == [
        "model runs",
        "predictions complete",
        "predictions finite",
        "no retained graph",
        "independent of batch",
        "outputs match grad",
        "outputs match no_grad",
        "forward peak",
    ]
    assert result.predictions == 40
    (output,) = result.outputs
    assert (output.shape, output.dtype) == ((10,), "float32")
    assert RunResult.load(project / "runs" / "mine-check") == result
    assert (project / "runs" / "mine-check" / "predictions.npy").exists()
    assert not (project / "runs" / "mine").exists(), "the folder of infer is not used"


@in_this_process
@pytest.mark.parametrize(
    ("body", "check", "reason"),
    [
        (
            "return self.last(torch.relu(self.first(x))) / 0",
            "predictions finite",
            "NaN or infinity",
        ),
        (
            "with torch.inference_mode(False), torch.enable_grad():\n"
            "            return self.last(self.first(x.clone()))",
            "no retained graph",
            "has a gradient graph",
        ),
        (
            "return self.last(self.first(x)) + torch.is_grad_enabled()",
            "outputs match grad",
            "differ from inference_mode by 1",
        ),
        (
            "return self.last(self.first(x)).softmax(0)",
            "independent of batch",
            "other samples of their batch",
        ),
        ("raise ValueError('out of tune')", "model runs", "out of tune"),
    ],
)
def test_a_faulty_model_fails_its_smoke_check(project, body, check, reason):
    Path("nets/mine.py").write_text(NET.partition("for _")[0] + body + "\n")
    result = gradrun.check("gradrun.yaml")
    failed = {
        outcome.check: outcome.reason for outcome in result.outcomes if outcome.status == "fail"
    }
    assert check in failed
    assert reason in failed[check]
    assert RunResult.load(project / "runs" / "mine-check").status == "fail"


@in_this_process
def test_a_nan_in_the_last_sample_is_found_before_argmax(project):
    Path("nets/mine.py").write_text(
        NET.replace("return out", "out[x[:, 0] == LAST] = torch.nan\n        return out").replace(
            "class Net", f"LAST = {float(last_of_the_data()):.9g}\n\n\nclass Net"
        )
    )
    result = gradrun.check("gradrun.yaml", output={"transform": "argmax", "path": "runs/mine"})
    assert statuses(result)["predictions finite"] == "fail"
    assert result.predictions == 40
    least = np.iinfo(np.int64).min
    assert (np.load("runs/mine-check/predictions.npy") == least).nonzero()[0].tolist() == [39]


def last_of_the_data() -> torch.Tensor:
    """The first value of the last sample of the data."""
    config = gradrun.load_config("gradrun.yaml").config
    return [*open_data(config.data, seed=config.run.seed).batches()][-1].args[0][-1, 0]


@in_this_process
def test_smoke_can_be_disabled_if_something_else_is_checked(project):
    result = gradrun.check(
        "gradrun.yaml", check={"smoke": False, "limits": {"forward_peak": "1 MiB"}}
    )
    assert statuses(result) == {"forward peak": "pass"}
    with pytest.raises(ConfigError, match="nothing to check"):
        gradrun.check("gradrun.yaml", check={"smoke": False})


@in_this_process
def test_golden_outputs_are_written_once_and_compared(project, cli):
    words = ["check", "gradrun.yaml", "--set", "check.expected=golden.safetensors"]
    answer = cli(*words)
    assert answer.code == 2
    assert "--update-expected creates it" in answer.err
    assert not Path("runs").exists(), "reported before anything runs"
    answer = cli(*words, "--update-expected", "--save-baseline", "base.json")
    assert answer.code == 0
    assert "wrote base.json\nwrote golden.safetensors\n" in answer.out
    assert cli(*words).code == 0
    Path("nets/mine.py").write_text(NET.replace("manual_seed(0)", "manual_seed(1)"))
    answer = cli(*words)
    assert answer.code == 3
    assert "differs in 40 samples of 40" in answer.out
    assert cli("check", "gradrun.yaml", "--update-expected").code == 2


@in_this_process
def test_quiet_prints_only_the_failed_checks(project, cli):
    words = ["check", "gradrun.yaml", "-q", "--set", "check.limits.retained=1 B"]
    answer = cli(*words)
    assert (answer.code, answer.out) == (3, "")
    assert answer.err == "fail: retained\n"
    assert cli(*words[:3]).text == ""


@in_this_process
def test_a_baseline_of_a_failed_check_is_reported(project, cli):
    answer = cli(
        "check",
        "gradrun.yaml",
        "--save-baseline",
        "base.json",
        "--set",
        "check.limits.retained=1 B",
    )
    assert answer.code == 3
    assert "wrote base.json, of a failed check\n" in answer.out


@in_this_process
def test_a_baseline_decides_memory_and_outputs_everywhere_and_time_on_its_machine(project, cli):
    limits = ["--set", "check.regression.time=999999%"]
    answer = cli("check", "gradrun.yaml", "--save-baseline", "base.json", *limits)
    assert answer.code == 0, answer.text
    base = RunResult.load("base.json")
    assert len({m.process for m in base.measurements}) >= 2, "one process gives no interval"
    answer = cli("check", "gradrun.yaml", "--baseline", "base.json", *limits)
    assert answer.code == 0, answer.text
    assert "time vs" in answer.out

    other = json.loads(Path("base.json").read_text())
    other["environment"]["cpu"] = "another"
    Path("other.json").write_text(json.dumps(other))
    words = ["check", "gradrun.yaml", "--baseline", "other.json"]
    answer = cli(*words, "--json", "result.json")
    assert answer.code == 4, answer.text
    assert "cpu another, here" in " ".join(answer.out.split())
    (untimed,) = [
        m for m in RunResult.load("result.json").measurements if m.mode == "inference_mode"
    ]
    assert len(untimed.batch_seconds) == 1, "nothing is timed if times cannot decide"
    assert cli(*words, "--inconclusive", "pass").code == 0
    assert cli(*words, "--inconclusive", "fail").code == 3

    Path("nets/sizes.py").write_text("HIDDEN, ROUNDS = 160, 1\n")
    answer = cli(*words, "--json", "result.json", "--junit", "junit.xml")
    assert answer.code == 3
    found = statuses(RunResult.load("result.json"))
    assert found["forward peak vs other.json"] == "fail"
    assert found["outputs vs other.json"] == "fail"
    assert found["time vs other.json"] == "inconclusive"
    assert 'failures="2"' in Path("junit.xml").read_text()


@in_this_process
def test_a_baseline_with_another_batch_size_decides_only_outputs(project, cli):
    assert cli("check", "gradrun.yaml", "--save-baseline", "base.json").code == 0
    words = ["--set", "data.batch_size=4", "--set", "check.regression.time=999999%"]
    answer = cli("check", "gradrun.yaml", "--baseline", "base.json", "--json", "s.json", *words)
    assert answer.code == 4, answer.text
    found = {o.check: o for o in RunResult.load("s.json").outcomes}
    for check in ("time vs base.json", "forward peak vs base.json"):
        assert found[check].status == "inconclusive"
        assert "batch size 8, here 4" in found[check].reason
    assert found["outputs vs base.json"].status == "pass"


@in_this_process
def test_an_interrupted_check_does_not_block_the_next(project, cli):
    def stop(progress: Progress) -> None:
        if progress.stage == "timing processes":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradrun.check("gradrun.yaml", progress=stop, save_baseline="base.json")
    assert RunResult.load("runs/mine-check").kind == "infer"
    answer = cli("check", "gradrun.yaml")
    assert answer.code == 0, answer.text
    assert RunResult.load("runs/mine-check").kind == "check"


@in_this_process
def test_two_checks_do_not_write_to_one_folder(project, cli):
    def second(progress: Progress) -> None:
        if progress.stage == "predicting":
            return
        answer = cli("check", "gradrun.yaml")
        assert answer.code == 2
        assert f"process {os.getpid()} on" in answer.err
        assert "is writing to" in answer.err
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradrun.check("gradrun.yaml", progress=second, save_baseline="base.json")


def git(*words: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
        check=True,
        capture_output=True,
    )


def commit() -> None:
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="requires git")


@needs_git
@in_processes
def test_a_revision_uses_its_own_helper_modules(project):
    commit()
    # 40 times the work in a helper module: the model's file is the same on both sides.
    Path("nets/sizes.py").write_text("HIDDEN, ROUNDS = 132, 40\n")
    processes = {"measure.processes": 3}  # the interval of two is wide
    result = gradrun.check("gradrun.yaml", against="HEAD", check={"smoke": False}, **processes)
    found = statuses(result)
    assert found["time vs HEAD"] == "fail", [o.reason for o in result.outcomes]
    assert found["forward peak vs HEAD"] == "fail", "3 % more, exact to the byte"
    assert found["outputs vs HEAD"] == "fail"
    worktrees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True)
    assert len(worktrees.stdout.splitlines()) == 1, "the worktree is removed"


@needs_git
@in_this_process
@pytest.mark.parametrize("smoke", [True, False])
@pytest.mark.parametrize("where", [".", "ml/models"])
def test_a_revision_without_the_config_gives_a_check_without_a_reference(
    project, cli, monkeypatch, where, smoke
):
    """The pull request that adds gradrun.yaml is checked against its base."""
    Path("README.md").write_text("A project.\n")
    git("init", "-q")
    git("add", "README.md")
    git("commit", "-qm", "base")
    Path(where).mkdir(parents=True, exist_ok=True)
    Path("nets").rename(f"{where}/nets")
    Path("gradrun.yaml").rename(f"{where}/gradrun.yaml")
    git("add", ".")
    git("commit", "-qm", "one")
    changes = ["--set", f"check.smoke={str(smoke).lower()}"]
    answer = cli("check", f"{where}/gradrun.yaml", "--against", "HEAD~1", *changes)
    assert answer.code == 0, answer.text
    text = " ".join(answer.text.split())
    name = Path(where, "gradrun.yaml")
    assert f"checked without a reference: HEAD~1 does not have {name} yet" in text
    result = RunResult.load(Path(where) / "runs" / "mine-check")
    assert result.status == "pass"
    assert not any("vs HEAD~1" in outcome.check for outcome in result.outcomes)
    assert bool(result.outcomes) is smoke


@needs_git
@in_processes
def test_a_change_that_does_not_affect_outputs_passes(project):
    commit()
    Path("nets/sizes.py").write_text("HIDDEN, ROUNDS = 128, 2\n")
    regression = {"time": None, "forward_peak": None}
    result = gradrun.check(
        "gradrun.yaml", against="HEAD", check={"smoke": False, "regression": regression}
    )
    assert statuses(result) == {"outputs vs HEAD": "pass"}


@needs_git
@in_processes
def test_a_package_is_imported_from_the_revision(project):
    Path("nets/__init__.py").touch()
    Path("nets/mine.py").write_text(NET.replace("import sizes", "from nets import sizes"))
    Path("gradrun.yaml").write_text(CONFIG.replace("nets/mine.py:Net", "nets.mine:Net"))
    commit()
    Path("nets/sizes.py").write_text("HIDDEN, ROUNDS = 256, 1\n")
    result = gradrun.check(
        "gradrun.yaml", against="HEAD", check={"regression": {"time": None, "outputs": False}}
    )
    assert statuses(result)["forward peak vs HEAD"] == "fail"


REPEATED = NET.partition("for _")[0] + (
    "rows = x.repeat(sizes.ROUNDS, 1)\n"
    "        return self.last(torch.relu(self.first(rows)))[: len(x)]\n"
)
WITHOUT = REPEATED.replace("import sizes\n", "").replace("sizes.HIDDEN", "128")
LATE = {
    "in the constructor": WITHOUT.replace("sizes.ROUNDS", "self.rounds").replace(
        "        super()",
        "        import sizes\n\n        self.rounds = sizes.ROUNDS\n        super()",
    ),
    "in the forward": WITHOUT.replace("        rows", "        import sizes\n\n        rows"),
    "from the current folder": REPEATED.replace("import sizes", "from nets import sizes"),
}


@needs_git
@in_processes
@pytest.mark.parametrize("late", LATE)
def test_late_imports_come_from_the_same_revision(project, late, monkeypatch):
    monkeypatch.syspath_prepend(str(project))  # as for a command in the current folder
    Path("nets/mine.py").write_text(LATE[late])
    commit()
    Path("nets/sizes.py").write_text("HIDDEN, ROUNDS = 128, 16\n")
    regression = {"time": None, "outputs": False}
    result = gradrun.check(
        "gradrun.yaml", against="HEAD", check={"smoke": False, "regression": regression}
    )
    assert statuses(result)["forward peak vs HEAD"] == "fail", "16 times the rows"


@needs_git
def test_code_that_cannot_be_imported_from_the_revision_is_an_error(project, monkeypatch):
    """Like a package whose installation fixes its folder."""
    Path("finder").mkdir()
    Path("finder/sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'sizes':\n"
        f"            place = {str(project / 'nets' / 'sizes.py')!r}\n"
        "            return importlib.util.spec_from_file_location(name, place)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{project / 'finder'}:{ROOT}")
    commit()
    with pytest.raises(
        (ConfigError, RunFailed), match=r"imports sizes from .*, a file of the working tree"
    ):
        gradrun.check("gradrun.yaml", against="HEAD", check={"smoke": False})


@in_this_process
def test_a_run_of_another_command_is_not_overwritten(project):
    gradrun.infer("gradrun.yaml", output={"path": "runs/mine-check"})
    before = Path("runs/mine-check/result.json").read_bytes()
    with pytest.raises(ConfigError, match="has the output of another command"):
        gradrun.check("gradrun.yaml")
    assert Path("runs/mine-check/result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("body", "failed", "real"),
    [
        (
            "assert not torch.is_grad_enabled()\n        return self.last(self.first(x))",
            "outputs match grad",
            False,
        ),
        (
            "import os\n        if torch.is_grad_enabled(): os.abort()\n"
            "        return self.last(self.first(x))",
            "outputs match grad",
            True,
        ),
        (
            "import os\n        if os.getppid() != PARENT: raise ValueError('no')\n"
            "        return self.last(self.first(x))",
            "model runs in a new process",
            True,
        ),
    ],
)  # fmt: skip
def test_a_model_that_fails_in_a_worker_fails_the_check(project, body, failed, real):
    source = NET.partition("for _")[0].replace(
        "import sizes", f"import sizes\nPARENT = {os.getppid()}"
    )
    Path("nets/mine.py").write_text(source + body + "\n")
    with forked_children() if real else in_process_workers():
        result = gradrun.check("gradrun.yaml")
    assert statuses(result)[failed] == "fail"
    assert statuses(result)["model runs"] == "pass"


@in_this_process
def test_values_of_any_size_are_checked_in_jsonl_but_have_no_golden_outputs(project):
    Path("nets/mine.py").write_text(
        NET.partition("for _")[0] + "return [row[: 1 + i] for i, row in enumerate(x)]\n"
    )
    result = gradrun.check("gradrun.yaml")
    assert statuses(result)["model runs"] == "pass"
    lines = Path("runs/mine-check/predictions.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["prediction"]) for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8] * 5
    with pytest.raises(ConfigError, match=r"golden outputs require output\.format npy"):
        gradrun.check("gradrun.yaml", check={"expected": "g.safetensors"}, update_expected=True)


@in_this_process
def test_rows_of_different_shapes_are_checked_in_jsonl(project):
    Path("nets/mine.py").write_text(
        NET.partition("for _")[0] + "return self.last(self.first(x))[:, : 1 + int(x[0, 0] > 0)]\n"
    )
    result = gradrun.check("gradrun.yaml", output={"format": "jsonl", "path": "runs/mine"})
    assert result.status == "pass", result.outcomes


@needs_git
def test_sigterm_removes_the_worktree(project):
    commit()
    words = [sys.executable, "-m", "gradrun", "check", "gradrun.yaml", "--against", "HEAD"]
    running = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=-1)
    deadline = time.monotonic() + 60
    while not list(Path(".git").glob("worktrees/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 143
    assert not list(Path(".git").glob("worktrees/*"))


UNTIMED = {"regression": {"time": None}}


@in_this_process
def test_every_sample_is_compared_with_the_reference(project):
    longer = CONFIG.replace("samples: 40", "samples: 80")  # more than a worker uses for timing
    Path("gradrun.yaml").write_text(longer)
    late = "return torch.complex(out, (x[:, :1] == LAST) * 1.0)"
    last = f"LAST = {float(last_of_the_data()):.9g}\n\n\nclass Net"
    Path("nets/other.py").write_text(NET.replace("return out", late).replace("class Net", last))
    Path("nets/mine.py").write_text(NET.replace("return out", "return torch.complex(out, 0 * out)"))
    Path("mine.yaml").write_text(longer.replace("mine.py", "other.py"))
    result = gradrun.check("mine.yaml", against="gradrun.yaml", check=UNTIMED)
    (found,) = [o for o in result.outcomes if o.check.startswith("outputs vs")]
    assert found.status == "fail"
    assert "differs in 1 sample of 80, first at 79" in found.reason
    assert not [*Path("runs").glob("*against*")], "the predictions of the reference are removed"


@in_this_process
@pytest.mark.parametrize(
    ("form", "samples", "status"), [("npy", 39, "fail"), ("jsonl", 40, "pass")]
)
def test_the_number_of_samples_is_compared(project, form, samples, status):
    fewer = CONFIG.replace("samples: 40", f"samples: {samples}")
    Path("fewer.yaml").write_text(fewer)
    output = {"format": form, "path": "runs/mine"}
    result = gradrun.check("fewer.yaml", against="gradrun.yaml", check=UNTIMED, output=output)
    found = statuses(result)
    assert found["outputs vs gradrun.yaml"] == status
    assert not result.comparisons, "nothing is timed"


@in_this_process
def test_another_config_can_be_the_reference(project):
    Path("slow.yaml").write_text(CONFIG.replace("batch_size: 8", "batch_size: 4"))
    result = gradrun.check(
        "slow.yaml", against="gradrun.yaml", check={"regression": {"time": None, "outputs": False}}
    )
    (found,) = [o for o in result.outcomes if o.check.endswith("vs gradrun.yaml")]
    assert found.status == "pass"
    assert found.value.startswith("-")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": "no-such-branch"}, "neither a file nor a git revision|git"),
        ({"against": "--output=x"}, "neither a file nor a git revision|git"),
        ({"against": "x", "baseline": "y"}, "cannot be combined"),
        ({"baseline": "none.json"}, "the baseline none.json does not exist; save_baseline="),
        (
            {"check": {"expected": "golden.safetensors"}, "output": {"format": "jsonl"}},
            "golden outputs require output.format npy: rows of jsonl can differ in shape",
        ),
        (
            {"check": {"expected": "gradrun.yaml/golden.safetensors"}},
            "a parent folder of .*golden.safetensors is a file",
        ),
    ],
)
def test_an_invalid_reference_is_reported_before_anything_runs(project, options, message):
    if "against" in options and shutil.which("git"):
        commit()
    with pytest.raises(ConfigError, match=message):
        gradrun.check("gradrun.yaml", **options)
    assert not Path("runs").exists()


def test_a_baseline_in_another_mode_is_reported_before_anything_runs(project):
    gradrun.infer("gradrun.yaml", **{"run.mode": "grad"})
    with pytest.raises(ConfigError, match="no measurement in inference_mode"):
        gradrun.check("gradrun.yaml", baseline="runs/mine")


@in_this_process
def test_a_reference_that_cannot_run_is_an_error(project):
    Path("broken.yaml").write_text(CONFIG.replace("shape: [64]", "shape: [65]"))
    with pytest.raises((RunFailed, ConfigError), match="65"):
        gradrun.check("gradrun.yaml", against="broken.yaml")


@in_this_process
def test_github_annotations_point_to_the_config(project, cli, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    Path("gradrun.yaml").write_text(CONFIG + "check:\n  limits:\n    retained: 1 B\n")
    answer = cli("check", "gradrun.yaml")
    assert answer.code == 3
    assert "::error file=gradrun.yaml,line=15,title=gradrun%3A retained::" in answer.err


def test_an_invalid_config_is_reported_to_github(project, cli, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(project))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project / "summary.md"))
    (project / "below").mkdir()
    monkeypatch.chdir(project / "below")
    Path("../gradrun.yaml").write_text(CONFIG + "check:\n  limits:\n    acuracy: '>= 1'\n")
    answer = cli("check", "../gradrun.yaml", "--junit", "j.xml")
    assert answer.code == 2
    assert "../gradrun.yaml:15:5  check.limits.acuracy: unknown limit; did you mean" in answer.err
    assert "::error file=gradrun.yaml,line=15,title=gradrun::" in answer.err
    assert "    ../gradrun.yaml:15:5  check.limits" in (project / "summary.md").read_text()
    xmlschema.XMLSchema(ROOT / "tests" / "junit.xsd").validate("j.xml")
    assert 'errors="1"' in Path("j.xml").read_text()


@in_this_process
@pytest.mark.parametrize(("limit", "status"), [(">= 0.97", "pass"), (">= 0.999", "fail")])
def test_accuracy_has_a_limit_if_the_data_have_labels(tmp_path, limit, status):
    pytest.importorskip("torchmetrics")
    result = gradrun.check(
        ROOT / "configs" / "digits.yaml",
        output={"path": str(tmp_path / "run"), "transform": "none"},
        check={"smoke": False, "limits": {"accuracy": limit}},
        **{"data.labels": {"key": "labels"}, "run.threads": 1},
    )
    (found,) = result.outcomes
    assert (found.check, found.status, found.value) == ("accuracy", status, "0.9960")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"retaned": "1 MiB"},
            r"limits.retaned: unknown limit; did you mean retained\? \(allowed: weights",
        ),
        ({"accuracy": "0.97"}, "'0.97' is not a limit; write '>= 0.97'"),
        ({"forward_peak": ">= 1 MiB"}, "not a limit in bytes"),
    ],
)
def test_an_invalid_limit_is_reported_with_the_allowed_ones(project, limits, message):
    with pytest.raises(ConfigError, match=message):
        gradrun.check("gradrun.yaml", check={"limits": limits})


def test_the_bundled_example_passes(cli, tmp_path):
    """With real workers."""
    answer = cli(
        "check",
        ROOT / "configs" / "digits.yaml",
        "--set",
        f"output.path={tmp_path / 'digits'}",
        "--set",
        "run.threads=1",
    )
    assert answer.code == 0, answer.text
    assert "6 passed" in answer.out


@in_this_process
def test_a_metric_may_not_become_worse_than_that_of_the_reference(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.chdir(tmp_path)
    drawn = np.random.default_rng(0)
    labels = drawn.integers(0, 3, 60)
    good = np.eye(3)[labels].astype(np.float32)
    poor = good.copy()
    poor[:6] = poor[:6, [1, 2, 0]]  # 6 of 60 wrong
    np.savez("good.npz", x=good, y=labels)
    np.savez("poor.npz", x=poor, y=labels)
    regression = {"time": None, "outputs": False, "accuracy": "5%"}
    config = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "arrays", "inputs": {"x": {"key": "x"}}, "labels": {"key": "y"}},
        "run": {"threads": 1, "warmup": 0},
        "output": {"transform": "argmax"},
        "check": {"smoke": False, "regression": regression},
    }
    for name in ("good", "poor"):
        data = config["data"] | {"path": f"{name}.npz"}
        output = config["output"] | {"path": name}
        Path(f"{name}.yaml").write_text(json.dumps(config | {"data": data, "output": output}))
    gradrun.check("good.yaml", save_baseline="base.json")
    for reference in ({"baseline": "base.json"}, {"against": "good.yaml"}):
        result = gradrun.check("poor.yaml", **reference)
        (found,) = [o for o in result.outcomes if o.check.startswith("accuracy vs")]
        assert (found.status, found.value) == ("fail", "0.9000, was 1.0000")
        assert found.reason == "worse by 10.0%"
        (change,) = result.metric_changes
        assert (change.before, change.value) == (1.0, pytest.approx(0.9))
    assert gradrun.check("good.yaml", against="poor.yaml").status == "pass"
