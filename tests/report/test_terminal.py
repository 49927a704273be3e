"""The tables: golden files of fixed results, and properties of any result.

`make golden` rewrites the golden files.
"""

from __future__ import annotations

import io
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from gradrun.report.escaping import escape_control_chars
from gradrun.report.tables import DASH, timing
from gradrun.report.wording import display_path
from gradrun.results.result import Memory, RunResult, Warning
from tests.support.reporting import show
from tests.support.run_results import MACHINE, MEMORY, measurement, run_result

GOLDEN = Path(__file__).parents[1] / "golden"
WARNING = Warning(
    code="high_variance",
    text="the slowest tenth of the batches took 2.4 times the median or more: something else uses "
    "this machine; close it, or lower run.threads",
)
UNMEASURED = Memory(weights=0, inputs=16)
RESULTS = {
    "digits": run_result(),
    "warned": run_result(measurement(7, memory=UNMEASURED), warnings=(WARNING, WARNING)),
    "gpu": run_result(
        measurement(
            2_000,
            mode="grad",
            memory=MEMORY.replace(
                device_allocated=54_001_664,
                device_reserved=67_108_864,
                forward_peak=None,
                retained=None,
            ),
        ),
        environment=MACHINE.replace(device="cuda", device_name="NVIDIA H200"),
        files=tuple(f"predictions-{i:05}.safetensors" for i in range(5)),
    ),
    "nothing": run_result(measurement(0), files=()),
}


def shown(result: RunResult, width: int = 80, *, terminal: bool = False, **environ: str) -> str:
    """What `show` prints; plain unless it is to look like a terminal."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        _environ=environ,
    )
    show(result, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_are_those_of_the_golden_file(name: str, width: int) -> None:
    golden = GOLDEN / f"terminal-{name}-{width}.txt"
    text = "\n".join(line.rstrip() for line in shown(RESULTS[name], width).splitlines()) + "\n"
    if os.environ.get("GRADRUN_GOLDEN") == "1":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "if it is meant: make golden"


@pytest.mark.parametrize("width", [40, 60, 80, 81, 120, 200])
@pytest.mark.parametrize("name", RESULTS)
def test_no_line_is_longer_than_the_terminal(name: str, width: int) -> None:
    result = RESULTS[name]
    long = "/somewhere/" + "far/" * 30 + "away"
    result = result.replace(info=result.info.replace(output_path=long))
    assert max(map(cell_len, shown(result, width).splitlines())) <= width


def row(text: str, name: str) -> str:
    """The line of a table that begins with `name`, without it."""
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return line.removeprefix(name)


@pytest.mark.parametrize(
    ("result", "name"),
    [
        ("warned", "forward peak"),
        ("warned", "retained"),
        ("warned", "process peak"),
        ("warned", "device"),
        ("digits", "device"),
        ("gpu", "forward peak"),
        ("warned", "batch p90"),
        ("warned", "batch p99"),
        ("nothing", "batch median"),
    ],
)
def test_an_unmeasured_value_is_a_dash_and_not_zero(result: str, name: str) -> None:
    found = row(shown(RESULTS[result]), name)
    assert DASH in found
    assert not re.search(r"\b0\b", found)


@pytest.mark.parametrize(
    ("result", "name", "figure"),
    [
        ("digits", "weights", "257.29 KiB"),
        ("digits", "weights", "263,464 bytes"),
        ("digits", "forward peak", "66,048 bytes"),
        ("digits", "retained", "160 B"),
        ("digits", "process peak", "VmHWM"),
        ("digits", "cold start", "16.9 ms"),
        ("digits", "throughput", "4,970 /s"),
        ("digits", "bound by", "forward"),
        ("warned", "weights", "0 B"),
        ("gpu", "device peak", "51.50 MiB"),
    ],
)
def test_the_measurements_are_shown(result: str, name: str, figure: str) -> None:
    assert figure in row(shown(RESULTS[result]), name)


def test_the_headline_names_model_and_device() -> None:
    text = shown(RESULTS["gpu"])
    assert all(word in text for word in ("digits_cnn", "grad", "NVIDIA H200"))


def test_warnings_are_shown_whole_below_the_tables() -> None:
    text = shown(RESULTS["warned"])
    assert text.count("! the slowest tenth") == 2
    assert " ".join(text.split()).count(WARNING.text) == 2
    assert text.index("weights") < text.index("! the slowest tenth")
    assert "!" not in shown(RESULTS["digits"])


def test_the_last_lines_name_the_files() -> None:
    text = shown(RESULTS["digits"])
    assert "498 predictions" in text
    assert str(Path("runs", "digits", "predictions.npy")) in text


# --- plain, coloured and harmless --------------------------------------------------------------


@pytest.mark.parametrize("name", RESULTS)
def test_a_pipe_gets_plain_text(name: str) -> None:
    assert escape_control_chars(text := shown(RESULTS[name])) == text


def test_only_a_terminal_gets_colour() -> None:
    coloured, escape = shown(RESULTS["warned"], terminal=True), re.compile(r"\x1b\[[\d;]*m")
    assert re.search(r"\x1b\[[\d;]*3\dm", coloured)
    assert escape.sub("", coloured) == shown(RESULTS["warned"])
    assert not re.search(r"\x1b\[[\d;]*3\dm", shown(RESULTS["warned"], terminal=True, NO_COLOR="1"))


CONFIG = RESULTS["digits"].config
EVIL = "[bold red]x[red]y\x1b]0;gone\x07\x1b[2J\x9b2J\u202e.py"


ODD = MEMORY.replace(process_method=EVIL)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"config": CONFIG | {"model": {"source": "python", "target": f"{EVIL}:Net"}}},
        {"config": CONFIG | {"output": {"path": EVIL}}},
        {"files": (EVIL,)},
        {"warnings": (Warning(code="x", text=EVIL),)},
        {"environment": MACHINE.replace(device_name=EVIL)},
        {"measurements": (measurement(memory=ODD),)},
    ],
    ids=["model", "folder", "file", "warning", "device", "method"],
)
def test_no_name_can_drive_the_terminal(change: dict[str, Any], terminal: bool) -> None:
    text = re.sub(r"\x1b\[[\d;]*m", "", shown(run_result(**change), 300, terminal=terminal))
    assert escape_control_chars(text) == text
    unfolded = "".join(text.split())
    assert "[boldred]x" in unfolded, "markup is text like any other"


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("plain µ – 名\n\tnext", "plain µ – 名\n\tnext"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x9b2J\x07\x00\r", r"\x9b2J\x07\x00\r"),
        ("\u202eevil\u2028", r"\u202eevil\u2028"),
        ("[bold]", "[bold]"),
    ],
)
def test_control_characters_are_written_out(text: str, harmless: str) -> None:
    assert escape_control_chars(text) == harmless


def test_a_path_is_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert display_path(tmp_path / "runs" / "digits") == str(Path("runs", "digits"))
    assert display_path("/x") == "/x"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-6, 1e-1), min_size=25, max_size=150))
def test_a_quantile_never_reads_as_less_than_the_one_before_it(times):
    measured = measurement(len(times), 4, batch_seconds=tuple(times))
    rows = {row[0]: row[1] for row in timing(measured).rows}
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    shown = [
        float(number.replace(",", "")) * units[unit]
        for name in ("batch median", "batch p90", "batch p95", "batch p99")
        if rows[name] != DASH
        for number, unit in [rows[name].split()]
    ]
    assert all(one <= other * (1 + 1e-9) for one, other in pairwise(shown))
