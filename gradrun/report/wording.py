"""Sentences of a report: headline, verdict, notes and machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gradrun.core.remote import RemotePath, is_address
from gradrun.core.units import format_bytes, format_number, format_seconds, pluralize
from gradrun.report import profile_tables, tune_tables
from gradrun.report.tables import OUTCOME_TONES, Tone
from gradrun.results.result import (
    AnyResult,
    AuditResult,
    CheckResult,
    CompareResult,
    Fact,
    Finding,
    InferResult,
    Measurement,
    ModeFacts,
    ProfileResult,
    Status,
    TuneResult,
)
from gradrun.results.summary import summarize_audit, summarize_comparison

_OUTCOMES: dict[Status, str] = {"pass": "passed", "fail": "failed", "inconclusive": "inconclusive"}
_SEVERITIES: dict[str, Tone] = {"error": "bad", "warning": "unsure", "info": ""}


@dataclass(frozen=True)
class Note:
    """A paragraph besides the tables; `label` is the severity of a finding, else empty."""

    text: str
    tone: Tone = "unsure"
    label: str = ""
    location: str = ""


def subject(result: AnyResult) -> str:
    """Describe what was run, and on which device."""
    machine = result.environment
    device, threads = machine.device_name or machine.device, pluralize(machine.threads, "thread")
    match result:
        case InferResult():
            batches = result.measurements[0].batch_sizes
            count = "no batch was timed"
            if batches:
                count = f"{pluralize(len(batches), 'batch')} of {max(batches)}"
            parts = [result.measurements[0].mode.value, device, threads, count]
        case CompareResult():
            parts = [device, *_rounds(result, threads)]
        case AuditResult():
            parts = ["audit", device, f"torch {machine.torch}"]
        case ProfileResult():
            rounds = pluralize(len(result.measurements[0].batch_seconds), "round")
            size = f"batches of {max(result.batch_sizes)}"
            mode = "" if result.key == "run.mode" else result.info.mode.value
            parts = ["profile", mode, device, threads, size, rounds]
        case CheckResult():
            parts = [result.info.mode.value, "check", device, threads, f"torch {machine.torch}"]
        case TuneResult():
            parts = ["tune", device, threads, *tune_tables.subject(result)]
    return ", ".join(filter(None, parts))


def _rounds(result: CompareResult, threads: str) -> list[str]:
    variants = result.by_variant()
    if not variants:
        return [threads]
    first = next(iter(variants.values()))
    rounds, sizes = sum(len(m.batch_seconds) for m in first), result.batch_sizes
    if result.of_whole_runs:
        samples = pluralize(first[0].samples, "sample")
        return [threads, f"{pluralize(rounds, 'run')} of {samples} per variant"]
    return [
        "" if any("threads=" in name for name in variants) else threads,
        f"batches of {sizes.pop()}" if len(sizes) == 1 else "",
        f"{pluralize(rounds, 'round')} in {pluralize(len(first), 'fresh process')}",
    ]


def verdict(result: AnyResult) -> str:
    """Summarize a result in one or two sentences."""
    match result:
        case InferResult():
            return _summarize_run(result.measurements[0])
        case CompareResult():
            return summarize_comparison(result)
        case AuditResult():
            return summarize_audit(result)
        case ProfileResult():
            return profile_tables.verdict(result)
        case TuneResult():
            return tune_tables.verdict(result)
        case CheckResult():
            statuses = [outcome.status for outcome in result.outcomes]
            counts = ((statuses.count(status), word) for status, word in _OUTCOMES.items())
            return ", ".join(f"{n} {word}" for n, word in counts if n) or "Nothing was checked"


def _summarize_run(measured: Measurement) -> str:
    if not measured.samples:
        return "No samples were predicted."
    bound, shares = measured.bound_by
    text = (
        f"{format_number(measured.throughput)} samples per second, bound by {bound} "
        f"({shares[bound]:.0%} of {format_seconds(measured.seconds)})."
    )
    if median := measured.latency(0.5):
        time = format_seconds(median.value, median.uncertainty)
        text += f" The median time of a batch of {max(measured.batch_sizes)} is {time}"
        if (peak := measured.memory.forward_peak) is not None:
            text += f"; its forward peak is {format_bytes(peak)}, excluding weights and inputs"
        text += "."
    return text


def notes(result: AnyResult) -> list[Note]:
    """Reasons of outcomes that are not a pass, failures and warnings, in this order."""
    found = []
    if isinstance(result, CheckResult):
        found += [
            Note(f"{outcome.check}: {outcome.reason}", OUTCOME_TONES[outcome.status])
            for outcome in result.outcomes
            if outcome.reason
        ]
    if isinstance(result, CompareResult):
        found += [Note(failure, "bad") for failure in result.failures]
    if isinstance(result, ProfileResult):
        found += [Note(text) for text in profile_tables.doubts(result)]
    if isinstance(result, TuneResult):
        found += [Note(text) for text in tune_tables.notes(result)]
    return found + [Note(warning.text) for warning in result.warnings]


def findings(result: AuditResult) -> list[Note]:
    """Findings of an audit with severity, location and advice."""
    if not result.findings:
        return [Note("No problems found.", "good")]
    return [
        Note(
            f"{finding.text}.{f' {finding.advice}.' if finding.advice else ''}",
            _SEVERITIES[finding.severity],
            finding.severity,
            _location(finding),
        )
        for finding in result.findings
    ]


def _location(finding: Finding) -> str:
    modes = f"in {', '.join(finding.modes)}" if 0 < len(finding.modes) < 3 else ""
    source = ""
    if finding.source:
        file, _, line = finding.source.rpartition(":")
        source = f"{display_path(file)}:{line}"
    return ", ".join(filter(None, (finding.module, modes, source)))


def machine(result: AnyResult) -> list[tuple[str, str]]:
    """Describe hardware, versions and start time as pairs of name and value."""
    environment = result.environment
    rows = [
        ("device", environment.device_name or environment.device),
        ("processor", environment.cpu),
        ("cores", f"{environment.cores} ({environment.cpus} available to this process)"),
        ("threads", str(environment.threads)),
        ("memory", format_bytes(environment.memory)),
        ("allocator", environment.allocator),
        ("system", environment.platform),
        ("torch", environment.torch),
        ("numpy", environment.numpy),
        ("python", environment.python),
        ("gradrun", environment.gradrun),
        ("started", result.started_at),
    ]
    return [(name, value) for name, value in rows if value]


def explain_difference(fact: Fact, torch: str) -> str:
    """Explain a mode behavior that is not as expected."""
    where = " > ".join(filter(None, (fact.topic, fact.question, fact.mode)))
    observed = (fact.observed or "").removeprefix("raises ")
    return f'{where}: expected "{fact.expected}", got "{observed}" on torch {torch}. {fact.why}'


def count_facts(result: ModeFacts) -> str:
    """Count the mode behaviors that are as expected, different and unavailable."""
    torch, different = result.environment.torch, len(result.differing)
    unavailable = sum(fact.observed is None for fact in result.facts)
    tested = pluralize(len(result.facts) - unavailable, "behavior")
    text = f"{different} of {tested} differ on torch {torch}"
    if not different:
        text = f"{tested} verified on torch {torch}"
    if unavailable:
        text += f"; {unavailable} not available"
    return f"{text}."


def display_path(path: str | Path) -> str:
    """Shorten a path to its relative form where that is shorter."""
    if is_address(Path(path)):
        return str(RemotePath(path))
    return min(os.path.relpath(path or os.curdir), str(path), key=len)
