"""Regression tests for defects found in reviews, through `gradrun infer` and gradrun.infer only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gradrun
from gradrun.core.progress import Progress
from gradrun.results.result import RunResult
from tests.conftest import ROOT, Answer, Command
from tests.support.forked import ForkedCommand

CONFIG: dict[str, Any] = {
    "model": {"source": "layers", "layers": ["Identity"]},
    "data": {"source": "arrays", "path": "x.npy", "batch_size": 5},
    "run": {"device": "cpu"},
    "output": {"path": "out"},
}
ROWS = np.arange(1, 93, dtype=np.float32).reshape(23, 4)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADRUN_TRUST_CODE", raising=False)
    np.save("x.npy", ROWS)


def config(name: str = "c.yaml", **sections: dict[str, Any]) -> str:
    """Write a config file (JSON is YAML) with changed keys in its sections; None drops a key."""
    merged = {
        section: {k: v for k, v in {**CONFIG[section], **sections.get(section, {})}.items() if v}
        for section in CONFIG
    }
    Path(name).write_text(json.dumps(merged), encoding="utf-8")
    return name


def network(forward: str, init: str = "pass", top: str = "") -> dict[str, Any]:
    """Write a Python model with these lines; return the config section `model`."""
    Path("m.py").write_text(
        f"import sys, time, torch\nfrom pathlib import Path\n{top}\n"
        "class Net(torch.nn.Module):\n"
        f"    def __init__(self):\n        super().__init__()\n        {init}\n"
        f"    def forward(self, x):\n        {forward}\n"
    )
    return {"source": "python", "target": "m.py:Net", "layers": None}


def predictions() -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = np.load("out/predictions.npy")
    return array


def refused(answer: Answer, *codes: int) -> str:
    assert answer.code in (codes or {2}), answer.text
    assert "Traceback" not in answer.text
    assert answer.err.replace("on_error: ", "").count("error: ") == 1
    return answer.err


# --- --overwrite -------------------------------------------------------------------------------


def _link(file: Path) -> None:
    np.save("out/predictions.npy", ROWS)
    file.symlink_to("out/predictions.npy")


OVERWRITTEN: dict[str, tuple[str, Callable[[Path], Any], dict[str, Any]]] = {
    "data": ("out/predictions.npy", lambda file: np.save(file, ROWS), {}),
    "a link to data": ("link.npy", _link, {}),
    "records": (
        "out/predictions.jsonl",
        lambda file: file.write_text('{"a": 1}\n'),
        {"data": {"source": "records", "inputs": {"x": {"columns": ["a"]}}}},
    ),
    "weights": (
        "out/predictions-00000.safetensors",
        lambda file: save_file({"0.weight": torch.zeros(4, 4), "0.bias": torch.zeros(4)}, file),
        {"model": {"layers": [{"Linear": [4, 4]}]}},
    ),
}


@pytest.mark.parametrize(("name", "make", "change"), OVERWRITTEN.values(), ids=OVERWRITTEN)
def test_overwrite_does_not_remove_inputs_of_the_run(
    cli: Command, name: str, make: Callable[[Path], Any], change: dict[str, Any]
) -> None:
    Path("out").mkdir()
    make(Path(name))
    before = Path(name).read_bytes()
    if "model" in change:
        change = {"model": {**change["model"], "weights": name}}
    else:
        change = {"data": {**change.get("data", {}), "path": name}}
    message = refused(cli("infer", config(**change), "--overwrite"))
    assert f"--overwrite would remove {Path(name).absolute()}" in message
    assert Path(name).read_bytes() == before


def test_overwrite_does_not_remove_files_with_similar_names(cli: Command) -> None:
    generated = {"predictions.npy", "predictions-00000.safetensors", "result.json"}
    foreign = {"predictions.xlsx", "predictions-final.txt", "predictions-final.safetensors"}
    Path("out").mkdir()
    for name in generated | foreign:
        Path("out", name).write_text("old")
    assert cli("infer", config(), "--overwrite").code == 0
    left = {file.name for file in Path("out").iterdir() if file.read_text("latin-1") == "old"}
    assert left == foreign


# --- unusual models ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["", "0", "3"])
def test_a_model_that_exits_half_way_fails_and_keeps_the_earlier_predictions(
    cli: Command, status: str
) -> None:
    model = network(f"if x[0, 0] > 40: sys.exit({status})\n        return x")
    message = refused(cli("infer", config(model=model), "--trust-code"), 1)
    assert "batch 2, which starts at sample 10, failed: SystemExit" in message
    assert np.array_equal(predictions(), ROWS[:10])
    assert RunResult.load("out").measurements[0].samples == 10


@pytest.mark.parametrize("call", [1, 2])
def test_a_model_that_exits_before_the_first_prediction_fails(cli: Command, call: int) -> None:
    model = network(
        f"self.n += 1\n        if self.n == {call}: sys.exit(0)\n        return x", "self.n = 0"
    )
    message = refused(cli("infer", config(model=model), "--trust-code"), 1, 2)
    assert "SystemExit" in message
    assert not Path("out").exists()


STATES = {
    "a number": ("self.n = 0", "self.n += 1; return x * self.n"),
    "a list": ("self.seen = []", "self.seen.append(1); return x * len(self.seen)"),
    "a tensor in a list": ("self.h = [torch.zeros(4)]", "self.h[0] = x[-1]; return x + self.h[0]"),
    "a dict": ("self.seen = {}", "self.seen[len(self.seen)] = 1; return x * len(self.seen)"),
    "a tensor changed in place": ("self.t = torch.zeros(1)", "self.t += 1; return x * self.t"),
    "a new tensor": ("self.t = torch.zeros(1)", "self.t = self.t + 1; return x * self.t"),
    "a buffer that was None": (
        "self.register_buffer('t', None)",
        "self.t = x[-1:] if self.t is None else self.t + x[-1:]; return x + self.t",
    ),
    "a buffer made in forward": (
        "pass",
        "hasattr(self, 't') or self.register_buffer('t', torch.zeros(1)); "
        "self.t += 1; return x * self.t",
    ),
    "an attribute made in forward": (
        "pass",
        "self.n = getattr(self, 'n', 0) + 1; return x * self.n",
    ),
    "a number of a child": (
        "self.child = torch.nn.ReLU(); self.child.n = 0",
        "self.child.n += 1; return self.child(x) * self.child.n",
    ),
}


@pytest.mark.parametrize("mode", ["grad", "inference_mode"])
@pytest.mark.parametrize(("init", "forward"), STATES.values(), ids=STATES)
def test_a_stateful_model_predicts_as_in_a_plain_loop(init: str, forward: str, mode: str) -> None:
    name = config(model=network(forward, init))
    made: dict[str, Any] = {}
    exec(Path("m.py").read_text(), made)
    net = made["Net"]().eval()
    plain = [net(batch) for batch in torch.from_numpy(ROWS.copy()).split(5)]
    gradrun.infer(name, trust_code=True, run={"mode": mode, "warmup": 3})
    assert np.array_equal(predictions(), torch.cat(plain).numpy())


def test_a_model_that_fails_on_the_second_call_is_an_error(cli: Command) -> None:
    model = network(
        "self.n += 1\n        if self.n == 2: raise ValueError('once only')\n        return x",
        "self.n = 0",
    )
    message = refused(cli("infer", config(model=model), "--trust-code"), 1, 2)
    assert "failed when it ran it again: ValueError: once only" in message


@pytest.mark.parametrize(
    ("forward", "right"),
    [
        ("assert x.min() > 0; x.neg_(); return x.clone()", -ROWS),
        ("assert x.ndim == 2; x.unsqueeze_(-1); return x * 2", 2 * ROWS[..., None]),
    ],
    ids=["values", "shape"],
)
def test_a_model_may_change_its_input_in_place(
    cli: Command, forward: str, right: np.ndarray[Any, Any]
) -> None:
    answer = cli("infer", config(model=network(forward)), "--trust-code")
    assert answer.code == 0, answer.text
    assert np.array_equal(predictions(), right)
    assert "could not be counted" not in answer.text
    assert np.array_equal(np.load("x.npy"), ROWS)


@pytest.mark.parametrize(
    ("returned", "transform", "message"),
    [
        ("x.long()", "softmax", "softmax needs floating-point scores"),
        ("x > 3", "softmax", "softmax needs floating-point scores"),
        ("torch.complex(x, x)", "argmax", "the transforms cannot be applied to this output:"),
        ("torch.complex(x, x)", "topk", "the transforms cannot be applied to this output:"),
    ],
)
def test_a_transform_that_does_not_support_the_output_is_an_error(
    cli: Command, returned: str, transform: str, message: str
) -> None:
    model, output = network(f"return {returned}"), {"transform": transform, "k": 2}
    if transform != "topk":
        del output["k"]
    error = refused(cli("infer", config(model=model, output=output), "--trust-code"))
    assert f"output.transform: {message}" in error
    assert not Path("out").exists()


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_a_default_dtype_that_a_model_sets_does_not_change_the_data(distribution: str) -> None:
    data = {
        "source": "synthetic",
        "inputs": {"x": {"shape": [4], "distribution": distribution}},
        "samples": 9,
        "path": None,
    }
    drawn = []
    try:
        for top in ("", "torch.set_default_dtype(torch.float64)"):
            name = config(model=network("return x", top=top), data=data)
            gradrun.infer(name, trust_code=True, overwrite=True)
            drawn.append(predictions())
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(*drawn)


@pytest.mark.parametrize(("name", "kind"), [("__metadata__", "safetensors"), ("id", "jsonl")])
def test_an_output_with_a_name_reserved_by_the_format_is_an_error(
    cli: Command, name: str, kind: str
) -> None:
    model = network(f"return {{{name!r}: x, 'other': x}}")
    name_of_config = config(model=model, output={"format": kind})
    message = refused(cli("infer", name_of_config, "--trust-code"), 2)
    assert f"the output name '{name}' is reserved" in message
    assert not list(Path("out").glob("*"))


# --- damaged data ------------------------------------------------------------------------------


def _npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), \n",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': {(1,) * 71}, }}\n",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**70}, 0), }}\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "(" * 300 + "\n",
    ],
    ids=["unterminated", "71 dimensions", "2**70 rows", "nested"],
)
def test_a_damaged_npy_header_is_an_error(cli: Command, header: str) -> None:
    Path("x.npy").write_bytes(_npy(header))
    assert "x.npy" in refused(cli("infer", config()))


def test_an_archive_with_a_flipped_byte_is_read_or_is_an_error(cli: Command) -> None:
    np.savez_compressed("x.npz", a=ROWS)
    whole = Path("x.npz").read_bytes()
    name, codes = config(data={"path": "x.npz"}), set()
    for at in range(0, len(whole), 3):
        Path("x.npz").write_bytes(
            whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :],
        )
        answer = cli("infer", name, "--overwrite", "--set", "measure.memory=false")
        assert "Traceback" not in answer.text
        codes.add(answer.code)
    assert codes == {0, 2}


@pytest.mark.parametrize(
    "checkpoint",
    [{0: torch.zeros(1)}, {"state_dict": {1: torch.zeros(1), "a": torch.zeros(1)}}],
    ids=["integers", "nested integers"],
)
def test_a_checkpoint_with_integer_keys_is_an_error(cli: Command, checkpoint: Any) -> None:
    torch.save(checkpoint, "w.pt")
    model = {"layers": [{"Linear": [4, 4]}], "weights": "w.pt"}
    assert "model.weights: " in refused(cli("infer", config(model=model)))


def records(*lines: str, dtype: str = "float32") -> dict[str, Any]:
    Path("x.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return {
        "source": "records",
        "path": "x.jsonl",
        "inputs": {"x": {"columns": ["a"], "dtype": dtype}},
    }


def test_an_integer_of_5000_digits_is_an_error_with_its_line(cli: Command) -> None:
    data = records('{"a": 1}', f'{{"a": {"9" * 5000}}}')
    assert "x.jsonl:2  " in refused(cli("infer", config(data=data)))


def test_integers_among_floats_keep_all_their_digits(cli: Command) -> None:
    data = records('{"a": [9007199254740993, 1.0]}', '{"a": [-9007199254740993, 2]}', dtype="int64")
    answer = cli("infer", config(data=data))
    assert answer.code == 0, answer.text
    assert predictions().tolist() == [[9007199254740993, 1], [-9007199254740993, 2]]


def test_an_input_with_a_superscript_digit_as_name_is_handled(cli: Command) -> None:
    data = {"inputs": {"²": {"shape": [4], "dtype": "int64"}}, "source": "synthetic"}
    message = refused(cli("infer", config(data={**data, "path": None, "samples": 7})))
    assert "normal numbers need a floating-point dtype, not int64" in message


# --- configs and files -------------------------------------------------------------------------


def test_a_key_written_twice_does_not_hide_other_errors(cli: Command) -> None:
    config()
    text = Path("c.yaml").read_text().replace('"batch_size"', '"path": "x.npy", "batch_sze"')
    Path("c.yaml").write_text(text.replace('"device": "cpu"', '"mode": "nograd"'))
    message = refused(cli("infer", "c.yaml"))
    assert "data.path: duplicate key" in message
    assert "data.batch_sze: unknown key" in message
    assert "run.mode: unknown value 'nograd'" in message


def test_a_folder_name_that_is_not_utf_8_is_handled(cli: Command) -> None:
    folder = Path(os.fsdecode(b"odd\xff"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system accepts only UTF-8 names")
    np.save(folder / "x.npy", ROWS)
    answer = cli("infer", config(f"{folder}/c.yaml"))
    assert answer.code == 0, answer.text
    assert RunResult.load(folder / "out").measurements[0].samples == len(ROWS)


# --- terminals, pipes and signals --------------------------------------------------------------


def test_output_printed_by_a_model_does_not_mix_with_the_json(cli: Command) -> None:
    model = network("print('hello'); return x", "print('made')")
    answer = cli("infer", config(model=model), "--trust-code", "--json", "-")
    assert answer.code == 0, answer.text
    assert json.loads(answer.out)["kind"] == "infer"
    assert "made\nhello\n" in answer.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [[], ["-q", "--json", "-"]], ids=["tables", "json"])
def test_a_report_that_cannot_be_printed_is_one_error(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("infer", config(), *words),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=60,
            check=False,
        )
    assert done.returncode == 1, done.stderr
    assert done.stderr == "error: cannot print the report: No space left on device\n"
    assert np.array_equal(predictions(), ROWS)


def test_the_time_of_progress_callbacks_is_not_measured() -> None:
    calls = []

    def draw(progress: Progress) -> None:
        calls.append(progress.done)
        time.sleep(0.05)

    model = network("time.sleep(0.05); return x")
    name = config(model=model, data={"batch_size": 1})
    result = gradrun.infer(name, trust_code=True, progress=draw)
    phases = result.measurements[0].phases
    assert len(calls) >= 4
    assert phases.data < 0.1
    assert phases.output < 0.1


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "gradrun", *words]


def environment(**settings: str) -> dict[str, str]:
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path.lstrip(os.pathsep), "COLUMNS": "100", **settings}


def test_no_color_disables_escape_codes_on_a_terminal() -> None:
    pty = pytest.importorskip("pty")
    reader, terminal = pty.openpty()
    running = subprocess.Popen(
        command("infer", config()),
        stdout=terminal,
        stderr=terminal,
        env=environment(NO_COLOR="1", TERM="xterm"),
    )
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(reader, 4096):
            shown += piece
    except OSError:  # Linux raises this when the other end is closed
        pass
    finally:
        os.close(reader)
    assert running.wait(60) == 0, shown
    assert b"Peak memory" in shown
    assert b"\x1b" not in shown


def test_a_killed_run_leaves_a_file_that_counts_only_written_rows() -> None:
    np.save("x.npy", np.arange(1, 41, dtype=np.float32)[:, None])
    model = network(
        "if x[0] >= 30: Path('far').touch(); time.sleep(20)\n"
        "        return x.expand(1, 131072) * 2"  # 8 rows fill a window of the file
    )
    name = config(model=model, data={"batch_size": 1}, run={"warmup": 1})
    running = ForkedCommand("infer", name, "-q", "--trust-code")
    try:
        deadline = time.monotonic() + 60
        while not Path("far").exists():
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        running.kill()
    assert running.wait(60) == -signal.SIGKILL
    left = predictions()
    assert len(left) < 30, "only committed rows are counted"
    assert np.array_equal(left[:, 0], 2 * np.arange(1, len(left) + 1))
    assert not len(left) or np.array_equal(left.min(1), left.max(1))


def test_a_model_that_packs_its_weights_at_the_first_call_packs_them_once() -> None:
    """The flag was restored after warm-up, but not the weights, so they were packed twice."""
    Path("packs.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight, self.packed = nn.Parameter(torch.ones(1)), False\n"
        "    def forward(self, x):\n"
        "        if not self.packed:\n"
        "            with torch.no_grad():\n"
        "                self.weight.mul_(2)\n"
        "            self.packed = True\n"
        "        return x * self.weight\n"
    )
    np.save("ones.npy", np.ones((12, 1), np.float32))
    gradrun.infer(
        {
            "model": {"source": "python", "target": "packs.py:Net"},
            "data": {"source": "arrays", "path": "ones.npy", "batch_size": 2},
            "output": {"path": "packed"},
        },
        trust_code=True,
    )
    assert np.load("packed/predictions.npy").tolist() == [[2.0]] * 12
