"""Bad input, full disks and Ctrl-C: one clear error, the right exit code, valid files."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gradrun.core import files
from gradrun.output.formats import sharded_writer
from gradrun.output.formats.jsonl import JsonlWriter
from gradrun.results.result import RunResult
from tests.conftest import ROOT, Answer
from tests.support.forked import ForkedCommand

FORMATS = ["npy", "jsonl", "safetensors"]

CONFIG = """\
model:
  source: layers
  layers: [{Linear: [4, 3]}]
data:
  source: synthetic
  inputs: {x: {shape: [4]}}
  samples: 7
run: {warmup: 0}
output: {path: out}
"""
LAYERS = "source: layers\n  layers: [{Linear: [4, 3]}]"
SYNTHETIC = "source: synthetic\n  inputs: {x: {shape: [4]}}\n  samples: 7"
EVIL = "[bold]\x1b]0;x\x07[/]"
NETS = """
import torch
net, number = torch.nn.ReLU(), 5
class Plain: pass
def none(): pass
def broken(): raise ValueError("no such luck")
class Text(torch.nn.Module):
    def forward(self, x): return "text"
class Mean(torch.nn.Module):
    def forward(self, x): return x.mean()
class Climbs(torch.nn.Module):
    def forward(self, x): return {"../../evil": x, "fine": x}
"""


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("trapped",))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADRUN_TRUST_CODE", raising=False)


def config(*changes: tuple[str, str], name: str = "c.yaml") -> str:
    text = CONFIG
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Path(name).write_text(text, encoding="utf-8")
    return name


def refused(answer, *, code: int = 2) -> str:
    """Return the error message of a command that wrote nothing."""
    assert answer.code == code, answer.text
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.text
    assert "\x1b" not in answer.text
    assert not answer.out
    assert not Path("out").exists()
    return answer.err.removeprefix("error: ")


# --- wrong configs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("samples: 7", "smples: 7", "c.yaml:7:3  data.smples: unknown key; did you mean samples?"),
        ("samples: 7", "samples: 7\n  samples: 7", "c.yaml:8:3  data.samples: duplicate key"),
        ("samples: 7", "samples: many", "c.yaml:7:12  data.samples: 'many' is not an integer"),
        ("warmup: 0", "mode: nograd", "c.yaml:8:13  run.mode: unknown value 'nograd'; did you m"),
        (
            "warmup: 0",
            "device: cuda:99",
            "c.yaml:8:15  run.device: device cuda:99 is not",
        ),
        (SYNTHETIC, "source: arrays\n  path: no.npy", "c.yaml:6:9  data.path: file"),
        (LAYERS, "source: exported\n  path: no.pt2", "c.yaml:3:9  model.path: file"),
        ("  samples", "\tsamples", "c.yaml:7:1  invalid YAML: a tab; YAML is indented with spaces"),
        ("samples: 7", "samples: *n", "c.yaml:7:12  invalid YAML: found undefined alias 'n'"),
        ("samples: 7", "samples: &n [*n]", "c.yaml:7:12  invalid config: "),
        ("7", '!!python/object/apply:os.mkdir ["trapped"]', "c.yaml:7:12  tag !!python/object"),
        ("path: out", "path: ../out", "c.yaml:9:16  output.path: '../out' contains '..'"),
        ("path: out", "path: out/../..", "c.yaml:9:16  output.path: 'out/../..' contains '..'"),
        ("path: out", "path: c.yaml", "is a file, not a folder"),
        ("path: out", "path: out, transform: topk", "output.k: topk with k=5 exceeds the 3"),
        (
            "path: out",
            "path: out, dim: 2, transform: argmax",
            "c.yaml:9:26  output.dim: cannot apply",
        ),
        ("path: out", "path: out, select: [a]", "the model has no output 'a'; allowed: 0"),
        (
            "shape: [4]",
            "shape: [4], dtype: int64",
            "normal numbers need a floating-point dtype, not int64",
        ),
        ("Linear: [4, 3]", "Liner: [4, 3]", "torch.nn has no layer 'Liner'; did you mean Linear?"),
        ("Linear: [4, 3]", "Linear: [4]", "c.yaml:3:12  model.layers.0: nn.Linear does not accept"),
        ("[4, 3]", f"[{10**6}, {10**9}]", "3,637.98 TiB of weights, but only "),
        ("shape: [4]", f"shape: [{2**40}]", "data.batch_size: one batch needs 28.00 TiB, but"),
    ],
)
def test_a_config_error_is_reported_at_its_location(cli, old, new, message):
    assert message in refused(cli("infer", config((old, new))))
    assert not Path("trapped").exists()


def test_an_input_of_the_wrong_shape_is_reported_with_both_shapes(cli):
    message = refused(cli("infer", config(("shape: [4]", "shape: [5]"))))
    assert message.startswith(
        "c.yaml:6:11  data.inputs: the model failed on the input [7, 5] float32; "
    )
    assert (
        "module 0 is Linear(in_features=4, out_features=3, bias=True) with weight [3, 4]" in message
    )


def test_a_lazy_layer_takes_its_size_from_the_data(cli):
    assert cli("infer", config(("Linear: [4, 3]", "LazyLinear: [3]"))).code == 0
    assert np.load("out/predictions.npy").shape == (7, 3)


@pytest.mark.parametrize(
    "change",
    [
        ("[{Linear: [4, 3]}]", "[{LazyConv2d: [2, 2]}]"),
        ("[{Linear: [4, 3]}]", "[{LazyLinear: [3]}]\n  weights: w.safetensors"),
        ("[4, 3]", f"[{10**30}, 3]"),
    ],
    ids=["data", "weights", "size"],
)
def test_an_unsuitable_layer_is_a_single_error(cli, change):
    save_file({"0.weight": torch.zeros(3, 4), "0.odd": torch.zeros(3)}, "w.safetensors")
    message = refused(cli("infer", config(change)))
    assert len(message.splitlines()) == 3, "the message, the line and its caret"


def test_a_missing_config_is_an_error(cli):
    assert refused(cli("infer", "no.yaml")).startswith("no.yaml: cannot be read: No such file")


# --- wrong files -------------------------------------------------------------------------------


def arrays(name: str) -> tuple[str, str]:
    return SYNTHETIC, f"source: arrays\n  path: {name}"


def records(name: str) -> tuple[str, str]:
    return SYNTHETIC, f"source: records\n  path: {name}\n  inputs: {{x: {{columns: [a]}}}}"


def weights(name: str) -> tuple[str, str]:
    return LAYERS, f"{LAYERS}\n  weights: {name}"


def _empty_npz(name):
    np.savez(name, a=np.zeros((0, 4), np.float32))


WRONG_FILES = {
    "an empty array": (
        arrays,
        "x.npy",
        lambda n: np.save(n, np.zeros((0, 4))),
        "contains no samples",
    ),
    "an empty archive": (arrays, "x.npz", _empty_npz, "the data contains no samples"),
    "an empty table": (
        records,
        "x.csv",
        lambda n: Path(n).write_text("a\n"),
        "contains no samples",
    ),
    "an empty text": (
        records,
        "x.jsonl",
        lambda n: Path(n).write_text("\n"),
        "contains no samples",
    ),
    "a file of 0 bytes": (arrays, "x.npy", lambda n: Path(n).touch(), "x.npy is not a NumPy array"),
    "one number": (arrays, "x.npy", lambda n: np.save(n, 3.0), "a single number, not rows"),
    "pickled objects": (
        arrays,
        "x.npy",
        lambda n: np.save(n, np.array([Trap()], object), allow_pickle=True),
        "x.npy contains pickled Python objects, and unpickling them could run code",
    ),
    "pickled objects in an archive": (
        arrays,
        "x.npz",
        lambda n: np.savez(n, a=np.array([Trap()], object)),
        "x.npz contains pickled Python objects",
    ),
    "a pickle": (
        arrays,
        "x.npy",
        lambda n: Path(n).write_bytes(pickle.dumps(Trap())),
        "not a NumPy array",
    ),
    "texts": (arrays, "x.npy", lambda n: np.save(n, np.array(["a"])), "torch does not support"),
    "another suffix": (arrays, "x.txt", lambda n: Path(n).touch(), "x.txt is not a .npy, .npz"),
    "words in a column": (records, "x.csv", lambda n: Path(n).write_text("a\n1\nb\n"), "x.csv:3  "),
    "no such column": (records, "x.csv", lambda n: Path(n).write_text("b\n1\n"), "no column 'a'"),
    "broken JSON": (
        records,
        "x.jsonl",
        lambda n: Path(n).write_text("{\n"),
        "x.jsonl:1  invalid JSON",
    ),
    "a checkpoint of code": (
        weights,
        "w.pt",
        lambda n: torch.save({"state_dict": Trap()}, n),
        "w.pt contains Python objects besides tensors, and unpickling them could run code",
    ),
    "a whole module": (weights, "w.pt", lambda n: torch.save(torch.nn.ReLU(), n), "could run code"),
    "a pickle of weights": (
        weights,
        "w.pt",
        lambda n: Path(n).write_bytes(pickle.dumps(Trap())),
        "model.weights: ",
    ),
    "no safetensors": (weights, "w.safetensors", lambda n: Path(n).touch(), "is not a valid safe"),
    "other weights": (
        weights,
        "w.safetensors",
        lambda n: save_file({"0.weight": torch.zeros(3, 4), "1.odd": torch.zeros(1)}, n),
        "missing in the file: 0.bias; not in the model: 1.odd",
    ),
}


@pytest.mark.parametrize(("use", "name", "make", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_is_an_error_and_runs_no_code(cli, use, name, make, message):
    make(name)
    assert message in refused(cli("infer", config(use(name))))
    assert not Path("trapped").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Plain", "not a torch.nn.Module"),
        ("number", "is the int 5, not a torch.nn.Module"),
        ("none", "returns the NoneType None, not a torch.nn.Module"),
        ("broken", "failed: ValueError: no such luck"),
        ("Nothing", "nets.py has no 'Nothing'; "),
        ("Text", "the model returned str; it must return a tensor"),
        ("Mean", "the first dimension must be the batch"),
        ("Climbs", "an output named '../../evil', which is not a safe file name"),
    ],
)
def test_a_target_that_is_not_a_usable_model_is_an_error(cli, name, message):
    Path("nets.py").write_text(NETS)
    name = config((LAYERS, f"source: python\n  target: nets.py:{name}"))
    assert message in refused(cli("infer", name, "--trust-code"))
    assert "model" in refused(cli("infer", name)), "without trust it is an error as well"


@pytest.mark.parametrize(
    ("code", "message"),
    [("x = ", "SyntaxError"), ("import nowhere", "nowhere"), ("raise SystemExit(0)", "SystemExit")],
)
def test_a_target_that_cannot_be_imported_is_an_error(cli, code, message):
    Path("bad.py").write_text(code)
    name = config((LAYERS, "source: python\n  target: bad.py:Net"))
    assert message in refused(cli("infer", name, "--trust-code"))


# --- terminals ---------------------------------------------------------------------------------


def _quoted(text: str) -> str:
    return json.dumps(text)


@pytest.mark.parametrize(
    "change",
    [
        ("samples: 7", f"samples: 7\n  {_quoted(EVIL)}: 1"),
        ("samples: 7", f"samples: {_quoted(EVIL)}"),
        ("path: out", f"path: out, format: {_quoted(EVIL)}"),
        ("path: out", f"path: out, select: {_quoted(EVIL.replace('/', ''))}"),
        ("[{Linear: [4, 3]}]", f"[{_quoted(EVIL)}]"),
        (LAYERS, f"source: exported\n  path: {_quoted(EVIL)}"),
        (LAYERS, f"source: python\n  target: {_quoted(EVIL + ':Net')}"),
        (LAYERS, f"source: zoo\n  name: mlp\n  args: {{{_quoted(EVIL)}: 1}}"),
    ],
    ids=["key", "value", "choice", "output", "layer", "path", "target", "argument"],
)
def test_control_characters_in_a_config_do_not_reach_the_terminal(cli, change):
    message = refused(cli("infer", config(change)))
    assert "[bold]" in message, "markup is not interpreted"
    assert r"\x1b]0;x\x07" in message or r"\u001b]0;x\u0007" in message


def test_control_characters_in_a_file_name_do_not_reach_the_terminal(cli):
    folder = Path(EVIL.replace("/", ""))
    folder.mkdir()
    name = config(name=f"{folder}/c.yaml")
    for words in (["validate", name], ["infer", name], ["infer", f"{name}.no"], ["infer", name]):
        answer = cli(*words)
        assert "\x1b" not in answer.text
        assert "\x07" not in answer.text
    assert "[bold]" in answer.err
    assert "already exists" in answer.err
    assert (folder / "out/predictions.npy").exists()


def test_control_characters_in_an_error_of_a_model_do_not_reach_the_terminal(cli):
    Path("m.py").write_text(
        f"import torch\nclass Net(torch.nn.Module):\n"
        f"    def forward(self, x): raise ValueError({EVIL!r})\n"
    )
    name = config((LAYERS, "source: python\n  target: m.py:Net"))
    assert r"ValueError: [bold]\x1b]0;x\x07[/]" in refused(cli("infer", name, "--trust-code"))


def test_control_characters_in_a_data_file_do_not_reach_the_terminal(cli):
    save_file({EVIL: torch.zeros(2, 4), "b": torch.zeros(2, 4)}, "x.safetensors")
    assert r"[bold]\x1b]0;x\x07[/]" in refused(cli("infer", config(arrays("x.safetensors"))))
    Path("x.csv").write_text(f"{EVIL}\n1\n")
    assert r"[bold]\x1b]0;x\x07[/]" in refused(cli("infer", config(records("x.csv"))))


# --- written files stay valid ------------------------------------------------------------------


def predictions(folder: Path | str) -> np.ndarray:
    """Load all predictions in a folder, in any format; every file must be complete."""
    folder = Path(folder)
    if (folder / "predictions.npy").exists():
        return np.load(folder / "predictions.npy")
    if (folder / "predictions.jsonl").exists():
        lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
        assert all(line.endswith("\n") for line in lines)
        rows = [json.loads(line) for line in lines]
        assert [row["id"] for row in rows] == list(range(len(rows)))
        return np.array([row["prediction"] for row in rows], np.float32)
    parts = [load_file(part)["prediction"] for part in sorted(folder.glob("*.safetensors"))]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)


def doubles(count: int, width: int = 1) -> tuple[tuple[str, str], np.ndarray]:
    """Write the inputs of a model that doubles them; return the config change and the outputs."""
    rows = np.arange(count * width, dtype=np.float32).reshape(count, width)
    np.save("x.npy", rows)
    return (SYNTHETIC, "source: arrays\n  path: x.npy\n  batch_size: 10"), 2 * rows


def model(body: str) -> tuple[str, str]:
    Path("m.py").write_text(
        "import time, torch\nfrom pathlib import Path\n"
        "class Net(torch.nn.Module):\n    calls = 0\n    def forward(self, x):\n"
        f"        self.calls += 1\n        {body}\n        return 2 * x\n"
    )
    return LAYERS, "source: python\n  target: m.py:Net"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_that_fails_half_way_leaves_the_earlier_predictions(cli, kind):
    data, right = doubles(100)
    net = model("if x[0] >= 50: raise ValueError('sample too [bold]great[/]')")
    answer = cli("infer", config(data, net), "--trust-code", "--set", f"output.format={kind}")
    assert answer.code == 1
    assert "Traceback" not in answer.text
    assert "error: batch 5, which starts at sample 50, failed: ValueError: sample too [bold]" in (
        answer.err
    )
    assert "50 of 100 predictions are saved in " in answer.err
    assert "Peak memory" in answer.out
    assert np.array_equal(predictions("out"), right[:50])
    assert RunResult.load("out").measurements[0].samples == 50


def test_data_that_fails_half_way_leaves_the_earlier_predictions(cli):
    Path("x.csv").write_text("a\n" + "1\n" * 30 + "oops\n")
    answer = cli(
        "infer", config(records("x.csv"), ("[4, 3]", "[1, 3]")), "--set", "data.batch_size=8"
    )
    assert answer.code == 1
    assert "x.csv:32  column 'a' is 'oops', not a number of type float32" in answer.err
    assert predictions("out").shape == (24, 3)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root privileges")
    yield disk
    subprocess.run(["umount", disk], check=True)


def check_files_after_full_disk(answer, folder: Path, kind: str, right: np.ndarray) -> None:
    assert answer.code == 1, answer.text
    assert "Traceback" not in answer.text
    assert answer.err.startswith("error: ")
    written = predictions(folder)
    assert np.array_equal(written, right[: len(written)].reshape(written.shape))
    if kind == "npy":
        assert re.search(r"predictions\.npy needs [\d.]+ KiB; the disk has", answer.err)
        assert not len(written), "the space is checked before the first batch"
    else:
        assert 0 < len(written) < len(right)
        # The message counts committed predictions; the files may contain more.
        committed = re.search(rf"([\d,]+) of {len(right):,} predictions are saved in ", answer.err)
        assert committed
        if "No space left" in answer.err:
            assert re.search(r"; [\d.]+ (B|KiB) are free[,;]", answer.err)
            more = re.search(r"the run needs about [\d.]+ [KM]iB more", answer.err)
            assert more or committed[1] == "0", answer.err
            assert re.search(r"to resume: gradrun infer .*--resume", answer.err)
        assert int(committed[1].replace(",", "")) <= len(written)
        assert "Peak memory" in answer.out
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("kind", FORMATS)
def test_too_little_disk_space_is_reported_before_the_first_batch(cli, small_disk, kind):
    data, _ = doubles(100_000)
    words = ["--trust-code", "-o", small_disk / "out", "--set", f"output.format={kind}"]
    message = refused(cli("infer", config(data, model("pass")), *words), code=1)
    assert re.search(
        r"predictions\S* needs (about )?[\d.,]+ [KM]iB; the disk has [\d.]+ KiB free",
        message,
    )
    assert not list((small_disk / "out").iterdir())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_leaves_valid_files(cli, small_disk, kind, monkeypatch):
    monkeypatch.setattr(sharded_writer, "SHARD_BYTES", 8192)
    monkeypatch.setattr(
        files, "ensure_free_space", lambda *_: None
    )  # another process uses it up later
    data, right = doubles(100_000)
    words = ["--trust-code", "-o", small_disk / "out", "--set", f"output.format={kind}"]
    answer = cli("infer", config(data, model("pass")), *words)
    check_files_after_full_disk(answer, small_disk / "out", kind, right)


@pytest.mark.parametrize("kind", ["npy", "jsonl"])
def test_a_file_size_limit_leaves_valid_files(kind):
    data, right = doubles(20_000)
    words = ["--trust-code", "--set", f"output.format={kind}", "--set", "measure.memory=false"]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, 50_000))
    words = ["infer", config(data, model("pass")), *words]
    running = ForkedCommand(*words, env={"COLUMNS": "120"}, before=limit)
    out, err = running.communicate()
    check_files_after_full_disk(Answer(running.returncode, out, err), Path("out"), kind, right)


@pytest.mark.parametrize("path", ["c.yaml/out", "c.yaml/a/b"])
def test_a_folder_that_cannot_be_created_is_exit_1(cli, path):
    message = refused(cli("infer", config(("path: out", f"path: {path}"))), code=1)
    assert re.search(r"cannot be (written|read): Not a directory", message)


def test_a_read_only_folder_is_exit_1(cli, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = refused(cli("infer", config(), "-o", small_disk / "out"), code=1)
    assert "cannot be written: Read-only file system" in message


# --- Ctrl-C ------------------------------------------------------------------------------------


def interrupt(running: subprocess.Popen[str] | ForkedCommand, marker: str) -> Answer:
    """Send SIGINT to a command as soon as the file `marker` exists."""
    deadline = time.monotonic() + 60
    while not Path(marker).exists() and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    return Answer(running.returncode, out, err)


@pytest.mark.parametrize("kind", FORMATS)
def test_ctrl_c_leaves_the_predictions_so_far_and_shows_the_tables(kind):
    data, right = doubles(200_000)
    net = model("time.sleep(0.001)\n        if self.calls == 100: Path('running').touch()")
    words = ["infer", config(data, net), "--trust-code", "--set", f"output.format={kind}"]
    done = interrupt(ForkedCommand(*words), "running")
    assert done.code == 130, done.err
    assert "Traceback" not in done.err
    written = predictions("out")
    assert 900 <= len(written) < len(right)
    assert np.array_equal(written, right[: len(written)].reshape(written.shape))
    assert f"error: interrupted; {len(written):,} of 200,000 predictions are saved in " in done.err
    for table in ("Peak memory", "throughput", "p99"):
        assert table in done.out
    result = RunResult.load("out")
    assert result.measurements[0].samples == len(written)
    assert [warning.code for warning in result.warnings if warning.code == "ended_early"]


def test_ctrl_c_between_a_write_and_its_count_keeps_both_consistent(cli, monkeypatch):
    write = JsonlWriter.write
    calls = iter(range(100))

    def interrupted_after(*words):
        write(*words)
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(JsonlWriter, "write", interrupted_after)
    data, right = doubles(100)
    net = model("pass")
    answer = cli("infer", config(data, net), "--trust-code", "--set", "output.format=jsonl")
    assert answer.code == 130
    assert np.array_equal(predictions("out"), right[:30])
    assert RunResult.load("out").measurements[0].samples == 30


@pytest.mark.parametrize("at", ["yaml", "torch", "m", "first batch"])
def test_ctrl_c_while_starting_is_exit_130_and_writes_nothing(at):
    name = config(doubles(20)[0], model("Path('here').touch(); time.sleep(20)"))
    if at != "first batch":  # this module shadows the real one on the path
        Path(f"{at}.py").write_text("import time\nopen('here', 'w').close()\ntime.sleep(20)\n")
    running = subprocess.Popen(
        [sys.executable, "-m", "gradrun", "infer", name, "--trust-code"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    done = interrupt(running, "here")
    assert done.code == 130, done.err
    assert "Traceback" not in done.err
    if at != "yaml":
        assert done.err == "error: interrupted\n"
    assert not Path("out").exists()
