"""Tables and sentences of a tuning."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from gradrun.core.units import format_bytes, format_seconds, pluralize
from gradrun.report.tables import DASH, Cell, Column, Status, Table, Tone, figure_table
from gradrun.results.result import TuneResult
from gradrun.results.summary import ratio_digits
from gradrun.results.trials import Outcome, Trial, describe_value

_OUTCOMES: dict[Outcome, tuple[str, Tone]] = {
    "faster": ("faster", "good"),
    "no_gain": ("no gain", "quiet"),
    "differs": ("differs", "bad"),
    "over_limit": ("over the limit", "bad"),
    "failed": ("failed", "bad"),
    "not_tried": ("not tried", "unsure"),
}


def tables_of(result: TuneResult) -> tuple[Table, ...]:
    """Build the tables of the changed keys, of the start, and of all settings that were tried."""
    tables = (_keys(result), _starts(result), _trials(result), _phases(result))
    return tuple(table for table in tables if table.rows)


def _keys(result: TuneResult) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for key in result.keys:
        gain = DASH if key.gain is None else f"{key.gain:.2f}"
        interval = f"{key.low:.2f}–{key.high:.2f}" if key.low and key.high else ""
        values = (describe_value(key.before), describe_value(key.value))
        rows.append((key.key, *values, gain, interval))
    columns = (
        Column("before", "text"),
        Column("tuned", "text", "strong"),
        Column("gain"),
        Column("95 % CI", emphasis="quiet"),
    )
    note = (
        "Gain: times as fast with the key as without it, in the search. Gains are not independent."
    )
    return Table("Changed key", columns, tuple(rows), note=note)


def _starts(result: TuneResult) -> Table:
    if result.tuned_start is None:
        return Table("Start", (), ())
    cold = result.tuned_start_cold
    compiles = any(key.key.startswith("model.compile") for key in result.keys)
    cached = "with compiled programs in the cache" if compiles else ""
    rows = [
        ("baseline", format_seconds(result.start_seconds), ""),
        ("tuned", format_seconds(result.tuned_start), cached),
    ]
    if compiles and cold and cold > 1.2 * result.tuned_start:
        rows.append(("tuned, first time", format_seconds(cold), "compiles"))
    if result.break_even:
        rows.append(("pays after", f"{result.break_even:,}", "samples"))
        samples = f"of {pluralize(result.job_samples, 'sample')}, with the start"
        before = _job_seconds(result, "baseline", result.start_seconds)
        after = _job_seconds(result, "tuned", result.tuned_start)
        detail = f"{samples}; {format_seconds(before)} before"
        rows.append(("job", format_seconds(after), detail))
    return figure_table("Start", rows)


def _job_seconds(result: TuneResult, variant: str, start: float) -> float:
    """Return the seconds of a job at the median speed of a variant, with its start."""
    speeds = [median(m.seconds_per_sample) for m in result.measurements if m.variant == variant]
    return start + result.job_samples * median(speeds)


def _trials(result: TuneResult) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for trial in result.trials:
        word, tone = _OUTCOMES[trial.outcome]
        text = f"{word}: {trial.reason}" if trial.reason else word
        ratio = DASH if trial.ratio is None else f"{trial.ratio:.2f}"
        peak = DASH if trial.process_peak is None else format_bytes(trial.process_peak)
        rows.append((trial.name, ratio, _difference(trial), peak, Status(text, tone)))
    columns = (
        Column("ratio", emphasis="strong"),
        Column("max_rel"),
        Column("process peak"),
        Column("outcome", "text"),
    )
    goal = "" if result.steady else " of jobs with their start"
    note = f"Ratios of the search{goal}, to the baseline; they are not confirmed."
    return Table("Tried", columns, tuple(rows), note=note)


def _phases(result: TuneResult) -> Table:
    spent = result.phases
    rows = [
        (name, format_seconds(seconds), f"{seconds / result.seconds:.0%}", what)
        for name, seconds, what in (
            ("starts", spent.starts, "imports, loading, compiling, warm-up"),
            ("gates", spent.gates, "outputs, memory and latency of each setting"),
            ("races", spent.races, "blocks of two settings alternately"),
            ("confirmation", spent.confirmation, "fresh processes, other samples"),
        )
        if seconds and result.seconds
    ]
    columns = (Column(emphasis="strong"), Column(), Column(kind="text", emphasis="quiet"))
    return Table("Time of tune", columns, tuple(rows))


def _difference(trial: Trial) -> str:
    if trial.bitwise:
        return "0"
    return DASH if trial.max_rel is None else f"{trial.max_rel:.1e}"


def verdict(result: TuneResult) -> str:
    """Summarize a tuning in one or two sentences."""
    if result.status == "faster":
        (c,) = result.comparisons
        digits = ratio_digits(c)
        text = (
            f"{c.ratio:.{digits}f} times as fast (95 %: {c.low:.{digits}f} to "
            f"{c.high:.{digits}f}), confirmed in fresh processes. {_outputs(result)}"
        )
        return f"{text} Written to {result.file}." if result.file else text
    tried = pluralize(sum(t.outcome != "not_tried" for t in result.trials), "setting")
    if result.status == "nothing_helps":
        text = f"Nothing helps: none of {tried} is faster within {result.tolerance}. "
        if result.detectable:
            text += f"A gain of {result.detectable:.1%} would have been seen. "
        if result.baseline_over:
            return f"{text}The config itself exceeds a limit: {result.baseline_over}."
        return f"{text}Keep the config."
    reason = f" ({result.refused[-1]})" if result.refused else ""
    reason = " (interrupted)" if result.interrupted else reason
    best = result.unconfirmed
    if best is None:
        return (
            f"Inconclusive after {tried}{reason}. Keep the config, or continue with --resume and a "
            f"larger --budget ({result.budget:g} s)."
        )
    written = f" Written to {result.file}, for a comparison." if result.file else ""
    return (
        f"Inconclusive after {tried}{reason}. The best so far was {best.ratio:.2f} x as fast in "
        f"the search and is not confirmed: {best.name}.{written} Continue with --resume and a "
        f"larger --budget ({result.budget:g} s)."
    )


def _outputs(result: TuneResult) -> str:
    equal = result.equivalence[0]
    samples = pluralize(result.checked, "sample")
    if equal.bitwise:
        return f"The outputs of {samples} are bitwise equal."
    return (
        f"The outputs of {samples} differ by up to {equal.max_abs_diff:.2g} "
        f"(max_rel {result.max_rel:.2g}), within {result.tolerance}; at most "
        f"{100 * min(1.0, 3 / max(1, result.checked)):.2g} % of other samples exceed it (95 %)."
    )


def notes(result: TuneResult) -> Iterator[str]:
    """Yield what limits the result: settings that were refused, moves that were not tried."""
    if result.status != "inconclusive":
        yield from (f"not confirmed: {reason}" for reason in result.refused)
    if result.out_of_time:
        yield f"the budget of {result.budget:g} s was spent before all settings were tried"
    if result.skipped:
        yield f"not tried: {'; '.join(result.skipped)}"


def subject(result: TuneResult) -> list[str]:
    """Return the facts of the headline."""
    goal = "steady state" if result.steady else f"jobs of {pluralize(result.job_samples, 'sample')}"
    return [f"within {result.tolerance}", goal, f"{result.seconds:.0f} s"]
