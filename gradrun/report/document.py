"""The content of a report, independent of the medium: what every renderer gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradrun.core.units import count_of, pluralize
from gradrun.report import profile_tables, tables, tune_tables, wording
from gradrun.report.tables import Cell, Status, Table, Tone
from gradrun.report.wording import Note, display_path
from gradrun.results.peaks_cache import CachedPeaks, cache_path
from gradrun.results.result import (
    AnyResult,
    AuditResult,
    CheckResult,
    InferResult,
    ModeFacts,
    ProfileResult,
    Statement,
    TuneResult,
    Verification,
    Warning,
)

_MAX_FILES = 3
_TUNE_TONES: dict[str, Tone] = {"faster": "good", "inconclusive": "unsure"}
_MAX_RANGES = 20


@dataclass(frozen=True)
class Document:
    """A report on one result; empty parts are left out by the renderers."""

    kind: str = ""
    title: str = ""
    subject: str = ""
    """What was run, in a few words."""
    verdict: str = ""
    tone: Tone = ""
    tables: tuple[Table, ...] = ()
    """Time and memory; the outcomes of a check."""
    predictions: tuple[Table, ...] = ()
    """The quality of the predictions."""
    interpretation: tuple[Table, ...] = ()
    findings: tuple[Note, ...] = ()
    notes: tuple[Note, ...] = ()
    machine: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[Cell, str], ...] = ()
    """Descriptions and paths, one path per line."""

    @property
    def leading_tables(self) -> tuple[Table, ...]:
        """The tables that matter most, to be shown before plots."""
        return (*(self.tables if self.kind == "check" else ()), *self.predictions)

    @property
    def other_tables(self) -> tuple[Table, ...]:
        """The tables that are not in `leading_tables`."""
        return (*(() if self.kind == "check" else self.tables), *self.interpretation)


def describe(result: AnyResult) -> Document:
    """Build the report on a result."""
    status = result.status if isinstance(result, CheckResult) and result.outcomes else ""
    return Document(
        kind=result.kind,
        title=result.info.model,
        subject=wording.subject(result),
        verdict=wording.verdict(result),
        tone=_TUNE_TONES.get(result.status, "")
        if isinstance(result, TuneResult)
        else tables.OUTCOME_TONES.get(status, ""),
        tables=_tables(result),
        predictions=tables.of_predictions(result),
        interpretation=tables.of_interpretation(result),
        findings=tuple(wording.findings(result)) if isinstance(result, AuditResult) else (),
        notes=tuple(wording.notes(result)),
        machine=tuple(wording.machine(result)),
        files=tuple(_files(result)),
    )


def _tables(result: AnyResult) -> tuple[Table, ...]:
    if isinstance(result, ProfileResult):
        return profile_tables.tables_of(result)
    if isinstance(result, TuneResult):
        return tune_tables.tables_of(result)
    return tables.of_measurements(result)


def _files(result: AnyResult) -> list[tuple[Cell, str]]:
    if not result.info.output_path:  # the predictions were not written to a folder
        return []
    folder = display_path(result.info.output_path)
    rows: list[tuple[Cell, str]] = []
    if isinstance(result, InferResult):
        paths = [f"{folder}/{file}" for file in result.files[:_MAX_FILES]]
        if more := len(result.files) - len(paths):
            paths.append(f"and {more} more")
        samples, bad = result.measurements[0].samples, result.quarantined
        count = (samples if result.predictions is None else result.predictions) - bad
        rows.append((Status(pluralize(count, "prediction"), "good"), "\n".join(paths)))
        if bad:
            text = f"{pluralize(bad, 'sample')} quarantined"
            rows.append((Status(text, "unsure"), f"{folder}/quarantine.jsonl"))
        if result.resumed_at:
            rows.append(("resumed", f"after {pluralize(result.resumed_at, 'sample')}"))
    if isinstance(result, TuneResult) and result.file:
        label = Status("tuned config", "good")
        if result.unconfirmed:
            label = Status("unconfirmed", "unsure")
        rows.append((label, display_path(result.file)))
    return [*rows, ("all figures", f"{folder}/result.json")]


def describe_modes(result: ModeFacts) -> Document:
    """Build the report on the behavior of the gradient modes."""
    machine = result.environment
    unavailable = dict.fromkeys(f.unavailable for f in result.facts if f.observed is None)
    return Document(
        title=f"torch {machine.torch}",
        subject=f"{machine.device_name or machine.device}, python {machine.python}",
        verdict=wording.count_facts(result),
        tone="bad" if result.differing else "good",
        tables=tables.mode_behavior(result),
        notes=(
            *(Note(wording.explain_difference(f, machine.torch), "bad") for f in result.differing),
            *(Note(f"not available: {reason}") for reason in unavailable),
        ),
    )


def describe_machine(measured: CachedPeaks) -> Document:
    """Build the report on the peaks of a machine."""
    machine = measured.machine
    best = max(measured.peaks, key=lambda peaks: peaks.rate("float32") or 0.0)
    path = display_path(cache_path(machine))
    return Document(
        title=machine.cpu or machine.device,
        subject=f"{machine.device}, {machine.instructions}, torch {machine.torch}",
        verdict=profile_tables.summarize_peaks(best),
        tables=(profile_tables.peaks(measured.peaks),),
        notes=tuple(Note(text) for text in measured.notes),
        files=() if measured.notes else (("kept in", path),),
    )


def describe_interpretation(
    statements: Sequence[Statement], warnings: Sequence[Warning] = ()
) -> Document:
    """Build the report on the interpretations of a config."""
    return Document(
        interpretation=(tables.interpretation(statements),),
        notes=tuple(Note(warning.text) for warning in warnings),
    )


def describe_verification(result: Verification) -> Document:
    """Build the report on the files of a run folder."""
    notes = [
        Note(f"samples {r.start:,} to {r.stop - 1:,} in {r.file}: {r.problem}", "bad")
        for r in result.damaged[:_MAX_RANGES]
    ]
    damaged = len(result.damaged)
    if damaged > _MAX_RANGES:
        notes.append(Note(f"and {damaged - _MAX_RANGES:,} more", "bad"))
    if result.torn:
        notes.append(Note("the last line of the journal is incomplete and was ignored"))
    count = f"{count_of(result.committed, result.samples)} verified"
    tone: Tone = "bad"
    if damaged:
        text = f"{pluralize(damaged, 'range')} damaged; to predict again: infer --overwrite"
    elif result.committed != result.samples:
        remedy = "to resume: infer --resume"
        if not result.resumable:
            remedy = "this version cannot resume it; to predict again: infer --overwrite"
        text, tone = f"unfinished, {count}; {remedy}", "unsure"
    else:
        text, tone = f"{count} ({pluralize(result.ranges, 'range')})", "good"
    verdict = f"{display_path(result.folder)}: {text}"
    return Document(verdict=verdict, tone=tone, notes=tuple(notes))
