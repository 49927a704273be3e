"""The tables of a comparison: golden files of fixed results, and properties of any result.

GRADRUN_GOLDEN=1 rewrites the golden files.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from gradrun.report.escaping import escape_control_chars
from gradrun.report.tables import DASH
from gradrun.results.ratios import compare_measured
from gradrun.results.result import CompareResult, Equivalence, Measurement, Memory, Warning
from tests.support.reporting import show
from tests.support.run_results import CONFIG, MACHINE, MEMORY, measurement, run_result

GOLDEN = Path(__file__).parents[1] / "golden"
PATH = {**CONFIG.model_dump(mode="json"), "output": {"path": "runs/digits-compare"}}
MIB = 1024**2
UNMEASURED = Memory(weights=0, inputs=16)


def side(name: str, seconds: float, wobble: float, memory: Memory, mode: str) -> list[Measurement]:
    """Five processes with seven rounds each; `wobble` is how far apart the processes lie."""
    return [
        measurement(
            7,
            mode=mode,
            variant=name,
            process=process,
            batch_seconds=tuple(seconds * (1 + wobble * (process - 2)) for _ in range(7)),
            batch_sizes=(4,) * 7,
            memory=memory,
        )
        for process in range(5)
    ]


def agreed(candidate: str, base: str = "grad", difference: float = 0.0, **changes: Any) -> Any:
    given = {
        "baseline": base,
        "candidate": candidate,
        "bitwise": not difference,
        "max_abs_diff": difference,
        "equal": True,
    }
    return Equivalence(**(given | changes))


def compared(*sides: list[Measurement], **changes: Any) -> CompareResult:
    measured = tuple(m for side in sides for m in side)
    given: dict[str, Any] = {
        "config": PATH,
        "measurements": measured,
        "comparisons": tuple(compare_measured(measured, 0.01)),
    }
    return run_result(cls=CompareResult, **(given | changes))


def of(**update: Any) -> Memory:
    return MEMORY.replace(**update)


GRAD = side("grad", 9.13e-4, 0.001, of(forward_peak=9 * MIB, retained=8 * MIB), "grad")
NO_GRAD = side("no_grad", 7.1e-4, 0.003, of(forward_peak=3 * MIB, retained=MIB), "no_grad")
INFERENCE = side(
    "inference_mode", 7.0e-4, 0.002, of(forward_peak=3 * MIB, retained=MIB), "inference_mode"
)
TWICE = side("inference_mode again", 7.0e-4, 0.002, INFERENCE[0].memory, "inference_mode")
WILD = side("no_grad", 7.1e-4, 0.35, UNMEASURED, "no_grad")
ON_GPU = of(forward_peak=None, retained=None, device_allocated=54_001_664)
RESULTS = {
    "modes": compared(
        GRAD, NO_GRAD, INFERENCE, equivalence=(agreed("no_grad"), agreed("inference_mode"))
    ),
    "same": compared(INFERENCE, TWICE, equivalence=(agreed("inference_mode again"),)),
    "noisy": compared(
        side("grad", 9.13e-4, 0.001, UNMEASURED, "grad"),
        WILD,
        equivalence=(agreed("no_grad", difference=3.1e-7),),
        warnings=(
            Warning(
                code="not_precise",
                text="the budget of 60 s was spent after 5 processes, before the intervals were "
                "as narrow as 1.0%; reduce load on the machine or raise measure.budget",
            ),
        ),
    ),
    "differs": compared(
        GRAD,
        NO_GRAD,
        equivalence=(
            agreed(
                "no_grad",
                difference=0.0123,
                equal=False,
                first_module="layers.0 (TransformerEncoderLayer)",
            ),
        ),
    ),
    "gpu": compared(
        side("grad", 9.13e-4, 0.001, ON_GPU, "grad"),
        side("no_grad", 7.1e-4, 0.003, ON_GPU, "no_grad"),
        environment=MACHINE.replace(device="cuda", device_name="NVIDIA H200"),
        equivalence=(agreed("no_grad"),),
    ),
    "threads": compared(
        side("run.threads=1", 9.13e-4, 0.001, MEMORY, "no_grad"),
        side("run.threads=2", 9.9e-4, 0.001, MEMORY, "no_grad"),
        equivalence=(agreed("run.threads=2", "run.threads=1", 1.2e-7),),
    ),
    "alone": compared(GRAD, failures=("no_grad, batch 3: was killed by SIGKILL",)),
    "nothing": compared(failures=("grad, batch 0: ValueError: no",)),
    "one process": compared(GRAD[:1], NO_GRAD[:1], equivalence=(agreed("no_grad"),)),
}
INFO = RESULTS["modes"].info


def shown(result: CompareResult, width: int = 80, *, terminal: bool = False, **environ: str) -> str:
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
    golden = GOLDEN / f"comparison-{name.replace(' ', '-')}-{width}.txt"
    text = "\n".join(line.rstrip() for line in shown(RESULTS[name], width).splitlines()) + "\n"
    if os.environ.get("GRADRUN_GOLDEN") == "1":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "if it is meant: GRADRUN_GOLDEN=1"


@pytest.mark.parametrize("width", [40, 60, 80, 81, 120, 200])
@pytest.mark.parametrize("name", RESULTS)
def test_no_line_is_longer_than_the_terminal(name: str, width: int) -> None:
    result = RESULTS[name]
    long = "/somewhere/" + "far/" * 30 + "away"
    result = result.replace(info=result.info.replace(output_path=long))
    assert max(map(cell_len, shown(result, width).splitlines())) <= width


def row(text: str, name: str) -> tuple[str, str]:
    """The lines of the two tables that begin with `name`, without it."""
    beginning = re.compile(rf"{re.escape(name)} +[\dab–]")
    time, memory = (line.removeprefix(name) for line in text.splitlines() if beginning.match(line))
    return time, memory


@pytest.mark.parametrize(
    ("name", "variant", "figure"),
    [
        ("modes", "grad", "913"),
        ("modes", "grad", "baseline"),
        ("modes", "grad", "9.00 MiB"),
        ("modes", "grad", "8.00 MiB"),
        ("modes", "grad", "392.91 MiB"),
        ("modes", "no_grad", "faster"),
        ("modes", "no_grad", "bitwise equal"),
        ("modes", "no_grad", "1.29"),
        ("same", "inference_mode again", "no difference"),
        ("noisy", "no_grad", "inconclusive"),
        ("noisy", "no_grad", "within tolerance"),
        ("differs", "no_grad", "differ by 0.012"),
        ("threads", "run.threads=2", "slower"),
        ("gpu", "no_grad", "51.50 MiB"),
        ("gpu", "no_grad", "bitwise equal"),
    ],
)
def test_measurements_are_in_the_row_of_their_variant(name: str, variant: str, figure: str) -> None:
    for width in (80, 120):
        assert figure in "".join(row(shown(RESULTS[name], width), variant))


@pytest.mark.parametrize(
    ("name", "variant", "dashes"), [("noisy", "grad", 3), ("gpu", "grad", 1), ("modes", "grad", 0)]
)
def test_an_unmeasured_value_is_a_dash_and_not_zero(name: str, variant: str, dashes: int) -> None:
    _, memory = row(shown(RESULTS[name], 120), variant)
    assert memory.count(DASH) == dashes
    assert not re.search(r"\b0\b", memory)


def test_the_headline_names_model_device_and_rounds() -> None:
    text = shown(RESULTS["gpu"], 120)
    for word in ("digits_cnn", "NVIDIA H200", "batches of 4", "35 rounds in 5 fresh processes"):
        assert word in text


def test_one_process_alone_claims_no_interval() -> None:
    time, _ = row(shown(RESULTS["one process"], 120), "no_grad")
    assert "inf " not in shown(RESULTS["one process"])
    assert "inconclusive" in time
    assert "±" not in time


def test_under_the_tables_stand_warnings_then_one_sentence_then_the_file() -> None:
    text = " ".join(shown(RESULTS["noisy"]).split())
    order = ["no_grad", "! the budget of 60 s", "Inconclusive:", "result.json"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_no_figure_of_the_table_is_more_exact_than_its_interval() -> None:
    time, _ = row(shown(RESULTS["noisy"], 120), "no_grad")
    assert re.search(r"\d\.\d–\d\.\d ", time), "one decimal of a ratio that may be half or double"
    assert not re.search(r"\d\.\d\d", time.split("inconclusive")[0])


# --- plain, coloured and harmless --------------------------------------------------------------


@pytest.mark.parametrize("name", RESULTS)
def test_a_pipe_gets_plain_text(name: str) -> None:
    text = shown(RESULTS[name])
    assert "\x1b" not in text
    assert escape_control_chars(text) == text


def test_only_a_terminal_gets_colour() -> None:
    coloured, escape = shown(RESULTS["modes"], terminal=True), re.compile(r"\x1b\[[\d;]*m")
    assert re.search(r"\x1b\[[\d;]*3\dm", coloured)
    assert escape.sub("", coloured) == shown(RESULTS["modes"])
    assert not re.search(r"\x1b\[[\d;]*3\dm", shown(RESULTS["modes"], terminal=True, NO_COLOR="1"))


EVIL = "[bold red]x[red]y\x1b]0;gone\x07\x1b[2J\x9b2J\u202e.py"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "result",
    [
        RESULTS["modes"].replace(info=INFO.replace(model=f"{EVIL}:Net")),
        RESULTS["modes"].replace(info=INFO.replace(output_path=EVIL)),
        RESULTS["modes"].replace(warnings=(Warning(code="x", text=EVIL),)),
        RESULTS["modes"].replace(environment=MACHINE.replace(device_name=EVIL)),
        compared(GRAD, side(EVIL, 7e-4, 0.001, MEMORY, "no_grad"), equivalence=(agreed(EVIL),)),
        compared(
            GRAD,
            NO_GRAD,
            equivalence=(agreed("no_grad", difference=1.0, equal=False, first_module=EVIL),),
        ),
    ],
    ids=["model", "folder", "warning", "device", "variant", "module"],
)
def test_no_name_can_drive_the_terminal(result: CompareResult, terminal: bool) -> None:
    text = re.sub(r"\x1b\[[\d;]*m", "", shown(result, 300, terminal=terminal))
    assert escape_control_chars(text) == text
    assert "[bold red]x" in text, "markup is text like any other"
