"""What a report says in words: what it is of, the verdict, the machine, and what to look out for.

Knows results; not how a sentence is set, nor what any mark-up would make of a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradrun.core.units import format_bytes, format_number, format_seconds, pluralize
from gradrun.report.tables import batch_sizes, by_variant
from gradrun.results import safety
from gradrun.results.result import AuditResult, CheckResult, CompareResult, RunResult
from gradrun.results.summary import summarize_comparison

_ENDED = {"pass": "passed", "fail": "failed", "inconclusive": "inconclusive"}


def model_name(result: RunResult) -> str:
    """What the model is called: by its config, without folders."""
    return result.info.model


def mode(result: RunResult) -> str:
    """The mode of a run or check; empty where there are several."""
    if result.kind == "check":  # it measures others too, or none where the model did not run
        return str(result.info.mode)
    return result.measurements[0].mode.value if result.kind == "infer" else ""


def facts(result: RunResult) -> str:
    """What was run where, and how much of it."""
    return ", ".join(filter(None, _FACTS[result.kind](result)))


def _facts_of_a_run(result: RunResult) -> tuple[str, ...]:
    measured = result.measurements[0]
    batches = pluralize(len(measured.batch_seconds), "batch")
    return (*_where(result), f"{batches} of {max(measured.batch_sizes, default=0)}")


def _facts_of_a_comparison(result: RunResult) -> tuple[str, ...]:
    variants = by_variant(result)
    if not variants:
        return _where(result)
    first = next(iter(variants.values()))
    rounds, sizes = sum(len(measured.batch_seconds) for measured in first), batch_sizes(result)
    device, threads = _where(result)
    return (
        device,
        "" if any("threads=" in name for name in variants) else threads,
        f"batches of {sizes.pop()}" if rounds and len(sizes) == 1 else "",
        f"{pluralize(rounds, 'round')} in {pluralize(len(first), 'fresh process')}",
    )


def _facts_of_an_audit(result: RunResult) -> tuple[str, ...]:
    return "audit", _where(result)[0], f"torch {result.environment.torch}"


def _facts_of_a_check(result: RunResult) -> tuple[str, ...]:
    return "check", *_where(result), f"torch {result.environment.torch}"


def _where(result: RunResult) -> tuple[str, str]:
    machine = result.environment
    return machine.device_name or machine.device, pluralize(machine.threads, "thread")


_FACTS: dict[str, Callable[[RunResult], tuple[str, ...]]] = {
    "infer": _facts_of_a_run,
    "compare": _facts_of_a_comparison,
    "audit": _facts_of_an_audit,
    "check": _facts_of_a_check,
}


def verdict(result: RunResult) -> str:
    """The one thing to take away."""
    return _VERDICTS[result.kind](result)


def _of_a_run(result: RunResult) -> str:
    measured = result.measurements[0]
    if not measured.samples:
        return "Nothing was predicted."
    bound, shares = measured.bound_by
    parts = [
        f"{format_number(measured.throughput)} samples a second, bound by {bound} "
        f"({shares[bound]:.0%} of {format_seconds(measured.seconds)})."
    ]
    if median := measured.latency(0.5):
        took = format_seconds(median.value, median.uncertainty)
        parts.append(f"A batch of {max(measured.batch_sizes)} takes {took} at the median")
        if (peak := measured.memory.forward_peak) is not None:
            parts[-1] += f", and at most {format_bytes(peak)} beyond weights and inputs"
        parts[-1] += "."
    return " ".join(parts)


def _counts(result: CheckResult) -> str:
    ended = [outcome.status for outcome in result.outcomes]
    counts = [f"{ended.count(status)} {word}" for status, word in _ENDED.items() if status in ended]
    return ", ".join(counts) or "Nothing was checked"


_VERDICTS: dict[str, Callable[[Any], str]] = {
    "infer": _of_a_run,
    "compare": summarize_comparison,
    "audit": safety.verdict,
    "check": _counts,
}


def notices(result: RunResult) -> list[str]:
    """What a reader must know besides the figures; the worst first."""
    return [*reasons(result), *warnings(result)]


def reasons(result: RunResult) -> list[str]:
    """Why checks did not pass, and what to do about it."""
    if not isinstance(result, CheckResult):
        return []
    return [f"{outcome.check}: {outcome.reason}" for outcome in result.outcomes if outcome.reason]


def warnings(result: RunResult) -> list[str]:
    """What could not be run, and what makes figures less than they look."""
    failures = result.failures if isinstance(result, CompareResult) else ()
    return [*failures, *(warning.text for warning in result.warnings)]


def environment(result: RunResult) -> list[tuple[str, str]]:
    """The machine, the versions and the time, each with its name."""
    machine = result.environment
    return [
        ("device", machine.device_name or machine.device),
        ("processor", machine.cpu),
        ("cores", f"{machine.cores}, of which this process may use {machine.cpus}"),
        ("threads", str(machine.threads)),
        ("memory", format_bytes(machine.memory)),
        ("system", machine.platform),
        ("torch", machine.torch),
        ("numpy", machine.numpy),
        ("python", machine.python),
        ("gradrun", machine.gradrun),
        ("started", result.started_at),
    ]


def findings(result: RunResult) -> list[tuple[str, str, str]]:
    """What an audit found: how bad it is, where, and what to do about it."""
    told: list[tuple[str, str, str]] = []
    for found in result.findings if isinstance(result, AuditResult) else ():
        modes = f"in {', '.join(found.modes)}" if 0 < len(found.modes) < 3 else ""
        where = ", ".join(filter(None, (found.module, modes, found.source)))
        advice = f" {found.advice}." if found.advice else ""
        told.append((found.severity, where, f"{found.text}.{advice}"))
    return told
