"""Reports in the terminal: golden files, properties of every report, and malicious text."""

from __future__ import annotations

import itertools
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from gradrun import report
from gradrun.report.document import Document, describe, describe_modes, describe_verification
from gradrun.report.escaping import escape_control_chars
from gradrun.report.tables import DASH, DIFFERS, timing
from gradrun.report.terminal import TABLE_WIDTH, show
from gradrun.report.wording import display_path
from gradrun.results.result import (
    AnyResult,
    DamagedRange,
    Example,
    ModeFacts,
    Padding,
    SavedForBackward,
    Statement,
    Verification,
    Warning,
)
from tests.support import saved_results as saved
from tests.support.reporting import EVIL, assert_golden, printed, without_style
from tests.support.run_results import MACHINE, MEMORY, measurement, run_result

RESULTS: dict[str, AnyResult] = {
    **{f"terminal-{name}": result for name, result in saved.RUNS.items()},
    **{f"comparison-{name}": result for name, result in saved.COMPARISONS.items()},
    **{f"audit-{name}": result for name, result in saved.AUDITS.items()},
    **{f"check-{name}": result for name, result in saved.CHECKS.items()},
    **{f"profile-{name}": result for name, result in saved.PROFILES.items()},
}
DOCUMENTS: dict[str, Document] = {
    **{name: describe(result) for name, result in RESULTS.items()},
    **{f"modes-{name}": describe_modes(facts) for name, facts in saved.MODES.items()},
}


def shown(name: str, width: int = 80, **settings: Any) -> str:
    return printed(show, DOCUMENTS[name], width, **settings)


# --- every report ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", RESULTS)
def test_result_matches_the_golden_file(name: str, width: int) -> None:
    assert_golden(f"{name}-{width}", shown(name, width))


@pytest.mark.parametrize("name", saved.MODES)
def test_modes_match_the_golden_file(name: str) -> None:
    assert_golden(f"modes-{name}-80", shown(f"modes-{name}"))


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_exceeds_the_terminal(width: int) -> None:
    far = "/somewhere/" + "far/" * 30 + "away"
    deep = (SavedForBackward(module="a." * 60 + "b (Block)", bytes=8 * saved.MIB),)
    for name, result in RESULTS.items():
        long = result.replace(info=result.info.replace(output_path=far))
        if name.startswith("audit"):
            long = long.replace(saved_for_backward=deep)
        text = printed(show, describe(long), width)
        assert max(map(cell_len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [40, 60, 79, 80, 120, 200])
def test_tables_of_modes_have_the_same_width(width: int) -> None:
    for name in saved.MODES:
        lines = shown(f"modes-{name}", width).splitlines()
        assert max(map(cell_len, lines)) <= width
        rules = {cell_len(line) for line in lines if line.startswith("─")}
        assert rules == {min(width, TABLE_WIDTH)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_only_a_terminal_gets_colour(name: str) -> None:
    plain, colour = shown(name), re.compile(r"\x1b\[[\d;]*3\dm")
    assert "\x1b" not in plain
    assert escape_control_chars(plain) == plain
    coloured = shown(name, terminal=True)
    assert without_style(coloured) == plain
    assert not colour.search(shown(name, terminal=True, NO_COLOR="1"))


@pytest.mark.parametrize("name", ["comparison-modes", "audit-findings", "check-mixed"])
def test_statuses_have_colours(name: str) -> None:
    assert re.search(r"\x1b\[[\d;]*3\dm", shown(name, terminal=True))


INFO = run_result().info
MALICIOUS: dict[str, AnyResult | ModeFacts] = {
    "model": run_result().replace(info=INFO.replace(model=f"{EVIL}:Net")),
    "folder": run_result().replace(info=INFO.replace(output_path=EVIL)),
    "file": run_result(files=(EVIL,)),
    "warning": run_result(warnings=(Warning(code="x", text=EVIL),)),
    "device": run_result(environment=MACHINE.replace(device_name=EVIL)),
    "method": run_result(measurement(memory=MEMORY.replace(process_method=EVIL))),
    "variant": saved.compared(
        saved.GRAD_TIMES,
        saved.side(EVIL, 7e-4, 0.001, MEMORY, "no_grad"),
        equivalence=(saved.equal_outputs(EVIL),),
    ),
    "first module": saved.compared(
        saved.GRAD_TIMES,
        saved.NO_GRAD_TIMES,
        equivalence=(
            saved.equal_outputs("no_grad", difference=1.0, equal=False, first_module=EVIL),
        ),
    ),
    "finding module": saved.audit(findings=(saved.finding("error", module=EVIL),)),
    "finding text": saved.audit(findings=(saved.finding("error", text=EVIL),)),
    "advice": saved.audit(findings=(saved.finding("error", advice=EVIL),)),
    "source": saved.audit(findings=(saved.finding("error", source=f"{EVIL}:3"),)),
    "saved": saved.audit(saved_for_backward=(SavedForBackward(module=EVIL, bytes=3),)),
    "outcome": saved.check(saved.FAILED.replace(check=EVIL, limit=EVIL, value=EVIL, reason=EVIL)),
    "observed": saved.mode_facts(saved.fact("r", "works", EVIL, mode="grad")),
    "raised": saved.mode_facts(saved.fact("r", "works", f"raises E: {EVIL}")),
    "question": saved.mode_facts(saved.fact(EVIL, "works")),
    "topic": saved.mode_facts(saved.fact("r", "works", topic=EVIL)),
    "unavailable": saved.mode_facts(saved.fact("r", "works", None, unavailable=EVIL)),
    "torch": saved.mode_facts(*saved.AFTER, environment=MACHINE.replace(torch=EVIL)),
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", MALICIOUS)
def test_no_text_can_control_the_terminal(name: str, terminal: bool) -> None:
    result = MALICIOUS[name]
    document = describe_modes(result) if isinstance(result, ModeFacts) else describe(result)
    text = without_style(printed(show, document, 300, terminal=terminal))
    assert escape_control_chars(text) == text
    assert "[boldred]x" in "".join(text.split()), "markup is printed verbatim"


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
def test_control_characters_are_escaped(text: str, harmless: str) -> None:
    assert escape_control_chars(text) == harmless


def test_paths_are_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert display_path(tmp_path / "runs" / "digits") == str(Path("runs", "digits"))
    assert display_path("/x") == "/x"


# --- runs --------------------------------------------------------------------------------------


def row(name: str, start: str) -> str:
    """Return the line of a table that starts with `start`, without it."""
    (line,) = (line for line in shown(name).splitlines() if line.startswith(start))
    return line.removeprefix(start)


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
def test_unmeasured_figures_of_a_run_are_dashes(result: str, name: str) -> None:
    cells = row(f"terminal-{result}", name)
    assert DASH in cells
    assert not re.search(r"\b0\b", cells)


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
def test_measured_figures_of_a_run_are_shown(result: str, name: str, figure: str) -> None:
    assert figure in row(f"terminal-{result}", name)


def test_headline_of_a_run_names_model_mode_and_device() -> None:
    text = shown("terminal-gpu")
    assert all(word in text for word in ("digits_cnn", "grad", "NVIDIA H200"))


def test_warnings_are_shown_below_the_tables() -> None:
    text = shown("terminal-warned")
    assert text.count("! the slowest 10 %") == 2
    assert " ".join(text.split()).count(saved.WARNING.text) == 2
    assert text.index("weights") < text.index("! the slowest 10 %")
    assert "!" not in shown("terminal-digits")


def test_a_run_ends_with_its_files() -> None:
    text = shown("terminal-digits")
    assert "498 predictions" in text
    assert str(Path("runs", "digits", "predictions.npy")) in text


def test_quarantined_and_resumed_samples_are_counted() -> None:
    result = run_result(predictions=498, quarantined=3, resumed_at=100)
    text = printed(show, describe(result))
    assert re.search(r"495 predictions +runs/digits/predictions\.npy", text)
    assert re.search(r"3 samples quarantined +runs/digits/quarantine\.jsonl", text)
    assert re.search(r"resumed +after 100 samples", text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-6, 1e-1), min_size=25, max_size=150))
def test_displayed_quantiles_do_not_decrease(times):
    rows = {
        row[0]: row[1]
        for row in timing(measurement(len(times), 4, batch_seconds=tuple(times))).rows
    }
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    quantiles = [
        float(number.replace(",", "")) * units[unit]
        for name in ("batch median", "batch p90", "batch p95", "batch p99")
        if rows[name] != DASH
        for number, unit in [rows[name].split()]
    ]
    assert all(one <= other * (1 + 1e-9) for one, other in pairwise(quantiles))


# --- comparisons -------------------------------------------------------------------------------


def variant_rows(name: str, variant: str, width: int = 120) -> tuple[str, str]:
    """Return the lines of a variant in both tables, without its name."""
    start = re.compile(rf"{re.escape(variant)} +[\dab–]")
    lines = shown(f"comparison-{name}", width).splitlines()
    time, memory = (line.removeprefix(variant) for line in lines if start.match(line))
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
def test_figures_are_in_the_row_of_their_variant(name: str, variant: str, figure: str) -> None:
    for width in (80, 120):
        assert figure in "".join(variant_rows(name, variant, width))


@pytest.mark.parametrize(
    ("name", "variant", "dashes"), [("noisy", "grad", 3), ("gpu", "grad", 1), ("modes", "grad", 0)]
)
def test_unmeasured_memory_of_a_variant_is_a_dash(name: str, variant: str, dashes: int) -> None:
    _, memory = variant_rows(name, variant)
    assert memory.count(DASH) == dashes
    assert not re.search(r"\b0\b", memory)


def test_headline_of_a_comparison_counts_rounds_and_processes() -> None:
    text = shown("comparison-gpu", 120)
    for word in ("digits_cnn", "NVIDIA H200", "batches of 4", "35 rounds in 5 fresh processes"):
        assert word in text


def test_a_single_process_has_no_interval() -> None:
    time, _ = variant_rows("one process", "no_grad")
    assert "inf " not in shown("comparison-one process")
    assert "inconclusive" in time
    assert "±" not in time


def test_a_comparison_ends_with_warnings_verdict_and_file() -> None:
    text = " ".join(shown("comparison-noisy").split())
    positions = [
        text.index(words)
        for words in ("no_grad", "! the budget of 60 s", "Inconclusive:", "result.json")
    ]
    assert positions == sorted(positions)


def test_ratios_have_only_the_digits_that_the_interval_supports() -> None:
    time, _ = variant_rows("noisy", "no_grad")
    assert re.search(r"\d\.\d–\d\.\d ", time), "one decimal for a factor of two"
    assert not re.search(r"\d\.\d\d", time.split("inconclusive")[0])


# --- audits ------------------------------------------------------------------------------------


def test_a_finding_has_module_line_and_advice() -> None:
    text = " ".join(shown("audit-findings").split())
    assert (
        "error encoder.layers.0 (Block), in inference_mode, /home/me/nets/mine.py:41 "
        "Buffer encoder.layers.0.scale was made inside inference_mode. Make it in __init__."
    ) in text


def test_a_finding_in_all_modes_names_none() -> None:
    (line,) = (line for line in shown("audit-findings").splitlines() if "warning" in line)
    assert " in " not in line


def test_an_audit_without_findings_says_so() -> None:
    assert "No problems found" in shown("audit-clean")
    assert "No problems found" not in shown("audit-findings")


def test_retained_bytes_without_a_module_have_their_own_row() -> None:
    assert re.search(r"\(not attributed\) +2\.00 MiB +25%", shown("audit-elsewhere"))
    assert "not attributed" not in shown("audit-clean")


def test_modules_beyond_the_largest_are_summed() -> None:
    assert re.search(r"4 more +2\.00 MiB +25%", shown("audit-many"))


def test_unmeasured_memory_of_a_mode_is_a_dash() -> None:
    lines = shown("audit-unmeasured").splitlines()
    assert next(line for line in lines if "no_grad" in line).count(DASH) == 2


# --- modes -------------------------------------------------------------------------------------


def cells(name: str, question: str) -> list[str]:
    return re.split(r"\s{2,}", row(f"modes-{name}", f"{question} ").strip())


def test_each_mode_has_a_column() -> None:
    assert cells("proven", "r after the block") == ["grad", "no_grad", "inference_mode"]
    assert cells("proven", "r.add_(1)") == ["works", "works", "RuntimeError"]
    assert cells("proven", "enable_grad() inside no_grad()") == ["on"]


def test_questions_without_a_mode_have_a_table_of_their_own() -> None:
    assert shown("modes-mixed").count("r after the block") == 2
    assert cells("mixed", "alone") == ["yes"]


@pytest.mark.parametrize("name", ["proven", "gpu", "mixed", "unavailable"])
def test_expected_behavior_is_neither_marked_nor_explained(name: str) -> None:
    text = shown(f"modes-{name}")
    assert DIFFERS not in text
    assert "This is why" not in text


def test_only_unexpected_behavior_is_marked() -> None:
    assert cells("differs", "r.add_(1)") == ["works", "works", f"{DIFFERS} works"]
    assert cells("differs", "r.clone()") == ["normal", f"{DIFFERS} TypeError", "normal"]
    assert cells("differs", "no_grad() inside enable_grad()") == [f"{DIFFERS} on"]


def test_unexpected_behavior_is_explained_once() -> None:
    lines = shown("modes-differs", 400).splitlines()
    assert [line for line in lines if line.startswith(f"{DIFFERS} ")] == [
        f'{DIFFERS} r after the block > r.add_(1) > inference_mode: expected "RuntimeError", got '
        '"works" on torch 2.13.0+cpu. This is why r.add_(1) matters.',
        f'{DIFFERS} r after the block > r.clone() > no_grad: expected "normal", got "TypeError: '
        'clone() is no more: use copy()" on torch 2.13.0+cpu. This is why r.clone() matters.',
        f"{DIFFERS} Blocks within blocks: gradients are > no_grad() inside enable_grad(): expected "
        '"off", got "on" on torch 2.13.0+cpu. This is why no_grad() inside enable_grad() matters.',
    ]


def test_unexpected_behavior_is_red() -> None:
    red = "\x1b[1;31m"
    coloured = shown("modes-differs", terminal=True)
    assert f"{red}{DIFFERS} works" in coloured
    assert f"{red}{DIFFERS} TypeError" in coloured
    assert red not in shown("modes-proven", terminal=True)


def test_unavailable_behavior_is_explained_once_and_counted() -> None:
    text = shown("modes-unavailable")
    assert cells("unavailable", "gradrun's guard, fullgraph=True") == ["not available"] * 3
    assert text.count("! not available: torch.compile is turned off here") == 1
    assert " ".join(text.split()).endswith("on torch 2.13.0+cpu; 3 not available.")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("proven", "11 behaviors verified on torch 2.13.0+cpu."),
        ("differs", "3 of 8 behaviors differ on torch 2.13.0+cpu; 3 not available."),
    ],
)
def test_behaviors_are_counted_at_the_end(name: str, sentence: str) -> None:
    assert shown(f"modes-{name}").rstrip().splitlines()[-1] == sentence


def test_headline_of_modes_names_torch_and_device() -> None:
    assert shown("modes-gpu").split("\n")[1] == "torch 2.13.0+cpu  NVIDIA H200, python 3.11.9"


# --- predictions and interpretation ------------------------------------------------------------


def test_a_terminal_shows_some_examples_on_one_line_each() -> None:
    examples = tuple(
        Example(position=i, input="a long text " * 20, prediction=f"cat (0.{i})", label="dog")
        for i in range(8)
    )
    text = printed(show, describe(saved.RUNS["digits"].replace(examples=examples)))
    shown = [line for line in text.splitlines() if line.startswith("a long text")]
    assert len(shown) == 4
    assert all(re.search(r"… +cat \(0\.\d\) +dog", line) for line in shown)
    assert max(map(len, text.splitlines())) <= 80


def test_a_long_interpretation_is_wrapped_below_its_own_column() -> None:
    statements = (
        Statement(topic="weights", text="random (seed 0)"),
        Statement(topic="preprocessing", text="resize to 256 (bicubic), crop 224, " * 3),
    )
    text = printed(show, describe(saved.RUNS["digits"].replace(interpretation=statements)))
    lines = text[text.index("Interpretation") :].splitlines()
    column = lines[2].index("random")
    wrapped = list(itertools.takewhile(str.strip, lines[3:]))
    assert len(wrapped) == 2
    assert all(line[column - 1] == " " != line[column] for line in wrapped)
    assert max(map(len, lines)) <= 79


def test_side_by_side_shows_the_interpretations_that_differ() -> None:
    def stated(weights: str) -> Any:
        topics = {"weights": weights, "threads": "2 threads"}
        statements = (Statement(topic=topic, text=text) for topic, text in topics.items())
        return saved.RUNS["digits"].replace(interpretation=tuple(statements))

    named = [("runs/a", stated("random (seed 0)")), ("runs/b", stated("b.safetensors"))]
    text = printed(report.show, named, 100)
    assert re.search(r"weights +random \(seed 0\) +b\.safetensors", text)
    assert "2 threads" not in text
    assert "interpretation" not in printed(report.show, [named[0], named[0]], 100)


# --- verifications -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damaged", "committed", "torn", "expected"),
    [
        (0, 40, False, "out: 40 of 40 samples verified (5 ranges)\n"),
        (0, 16, False, "out: unfinished, 16 of 40 samples verified; to resume: infer --resume\n"),
        (1, 40, True, "out: 1 range damaged; to predict again: infer --overwrite\n"),
    ],
)
def test_a_verification_ends_with_its_verdict(
    damaged: int, committed: int, torn: bool, expected: str
) -> None:
    ranges = tuple(DamagedRange(i, i + 8, "x.npy", "missing") for i in range(damaged))
    result = Verification(Path("out"), 40, committed, 5, ranges, torn)
    text = printed(show, describe_verification(result))
    assert text.endswith(expected)
    assert ("✗ samples 0 to 7 in x.npy: missing" in text) is bool(damaged)
    assert ("the last line of the journal" in text) is torn


def test_many_damaged_ranges_are_counted() -> None:
    ranges = tuple(DamagedRange(i, i + 1, "x.npy", "missing") for i in range(25))
    text = printed(
        show, describe_verification(Verification(Path("out"), 25, 25, 25, ranges, False))
    )
    assert text.count("samples") == 20
    assert "and 5 more" in text


def test_padding_is_one_share_of_the_computed_tokens() -> None:
    counted = Padding(texts=10, tokens=80, run=100, ungrouped=160)
    rows = {row[0]: row[1:] for row in timing(measurement(10, padding=counted)).rows}
    assert rows["padding"] == ("20%", "of 100 tokens; 50% if not grouped by length")
