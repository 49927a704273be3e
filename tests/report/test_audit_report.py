"""The tables of an audit: golden files from results made by hand, and laws for any result."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.cells import cell_len

from gradrun.core.grad_mode import GradMode
from gradrun.report.escaping import escape_control_chars
from gradrun.report.tables import DASH
from gradrun.results.result import AuditResult, Equivalence, Finding, Memory, SavedForBackward
from tests.support.reporting import EVIL, assert_golden, printed, show, without_style
from tests.support.run_results import CONFIG, MEMORY, measurement, run_result

MIB = 1024**2
PATH = {**CONFIG.model_dump(mode="json"), "output": {"path": "runs/digits-audit"}}


def in_mode(mode: str, **memory: int | None) -> Any:
    return measurement(0, mode=mode, variant=mode, memory=MEMORY.replace(**memory))


GRAD = in_mode("grad", forward_peak=9 * MIB, retained=8 * MIB)
NO_GRAD = in_mode("no_grad", forward_peak=3 * MIB, retained=MIB)
INFERENCE = in_mode("inference_mode", forward_peak=3 * MIB, retained=MIB)
SAME = tuple(
    Equivalence(baseline="grad", candidate=mode, bitwise=True, max_abs_diff=0.0, equal=True)
    for mode in ("no_grad", "inference_mode")
)
DIFFERS = SAME[0].replace(bitwise=False, max_abs_diff=0.25, equal=False)


def finding(severity: str, **changes: Any) -> Finding:
    given = {
        "severity": severity,
        "code": "made_in_inference_mode",
        "modes": ("inference_mode",),
        "module": "encoder.layers.0 (Block)",
        "source": "/home/me/nets/mine.py:41",
        "text": "Buffer encoder.layers.0.scale was made inside inference_mode",
        "advice": "Make it in __init__",
        "cost": 4096,
    }
    return Finding(**(given | changes))


def audit(**changes: Any) -> AuditResult:
    given: dict[str, Any] = {
        "config": PATH,
        "measurements": (GRAD, NO_GRAD, INFERENCE),
        "equivalence": SAME,
        "saved_for_backward": (
            SavedForBackward(module="encoder.layers.0 (Block)", bytes=6 * MIB),
            SavedForBackward(module="(the model) (Net)", bytes=MIB),
            SavedForBackward(module="(outputs)", bytes=MIB),
        ),
    }
    return run_result(cls=AuditResult, **(given | changes))


RESULTS = {
    "clean": audit(),
    "findings": audit(
        findings=(
            finding("error"),
            finding("warning", modes=tuple(GradMode), text="Draws random numbers", cost=None),
            finding("info", modes=(), module="", source=None, text="torch.compile is fine"),
        ),
    ),
    "no safe mode": audit(findings=(finding("error", modes=tuple(GradMode)),)),
    "grad alone": audit(
        measurements=(GRAD,),
        equivalence=(),
        findings=(
            finding(
                "error",
                code="model_fails",
                modes=("no_grad", "inference_mode"),
                advice="",
                cost=None,
            ),
        ),
    ),
    "differs": audit(
        equivalence=(DIFFERS, SAME[1]), findings=(finding("error", modes=("no_grad",)),)
    ),
    "unmeasured": audit(
        measurements=tuple(
            m.replace(memory=Memory(weights=0, inputs=16)) for m in (GRAD, NO_GRAD, INFERENCE)
        ),
        saved_for_backward=(),
    ),
    "elsewhere": audit(
        saved_for_backward=(SavedForBackward(module="encoder.layers.0 (Block)", bytes=6 * MIB),)
    ),
    "many": audit(
        saved_for_backward=tuple(
            SavedForBackward(module=f"layers.{i} (Block)", bytes=MIB // 2) for i in range(16)
        )
    ),
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_are_those_of_the_golden_file(name: str, width: int) -> None:
    assert_golden(f"audit-{name}-{width}", printed(show, RESULTS[name], width))


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("name", RESULTS)
def test_no_line_is_longer_than_the_terminal(name: str, width: int) -> None:
    result = RESULTS[name].replace(
        saved_for_backward=(SavedForBackward(module="a." * 60 + "b (Block)", bytes=8 * MIB),)
    )
    assert max(map(cell_len, printed(show, result, width).splitlines())) <= width


def test_the_worst_comes_with_its_module_line_cost_and_advice() -> None:
    text = " ".join(printed(show, RESULTS["findings"]).split())
    assert "error encoder.layers.0 (Block), in inference_mode, /home/me/nets/mine.py:41" in text
    assert "mine.py:41" in text
    assert "inside inference_mode. Make it in __init__." in text


def test_a_finding_in_all_modes_names_no_mode() -> None:
    (line,) = [
        line for line in printed(show, RESULTS["findings"]).splitlines() if "warning" in line
    ]
    assert " in " not in line


def test_a_model_without_findings_is_reported_as_safe() -> None:
    assert "No problems found" in printed(show, RESULTS["clean"])
    assert "No problems found" not in printed(show, RESULTS["findings"])


def test_memory_outside_of_modules_has_a_separate_row() -> None:
    text = printed(show, RESULTS["elsewhere"])
    assert re.search(r"\(not attributed\) +2\.00 MiB +25%", text)
    assert "not attributed" not in printed(show, RESULTS["clean"])


def test_many_modules_are_summed_up() -> None:
    assert re.search(r"4 more +2\.00 MiB +25%", printed(show, RESULTS["many"]))


def test_an_unmeasured_value_is_a_dash() -> None:
    row = next(
        line for line in printed(show, RESULTS["unmeasured"]).splitlines() if "no_grad" in line
    )
    assert row.count(DASH) == 2


def test_only_a_terminal_gets_colour() -> None:
    result = RESULTS["findings"]
    coloured = printed(show, result, terminal=True)
    assert re.search(r"\x1b\[[\d;]*3\dm", coloured)
    assert without_style(coloured) == printed(show, result)
    assert not re.search(r"\x1b\[[\d;]*3\dm", printed(show, result, terminal=True, NO_COLOR="1"))


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "result",
    [
        audit(findings=(finding("error", module=EVIL),)),
        audit(findings=(finding("error", text=EVIL),)),
        audit(findings=(finding("error", advice=EVIL),)),
        audit(findings=(finding("error", source=f"{EVIL}:3"),)),
        audit(saved_for_backward=(SavedForBackward(module=EVIL, bytes=3),)),
        audit(config=PATH | {"output": {"path": EVIL}}),
        audit(config=PATH | {"model": {"source": "python", "target": f"{EVIL}:Net"}}),
    ],
    ids=["module", "text", "advice", "source", "kept", "folder", "model"],
)
def test_no_name_can_drive_the_terminal(result: AuditResult, terminal: bool) -> None:
    text = without_style(printed(show, result, 300, terminal=terminal))
    assert escape_control_chars(text) == text
    assert "[bold red]x" in text, "markup is text like any other"
