"""Tables of the figures of a result, as plain text for every renderer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from gradrun.core.grad_mode import GradMode
from gradrun.core.units import (
    format_bytes,
    format_number,
    format_score,
    format_seconds,
    format_seconds_range,
    pluralize,
    seconds_shown,
    seconds_within,
)
from gradrun.results import stats
from gradrun.results.result import (
    AnyResult,
    AuditResult,
    CheckResult,
    ClassDistribution,
    CompareResult,
    Comparison,
    Compilation,
    Equivalence,
    Example,
    Fact,
    Generation,
    InferResult,
    Measurement,
    Memory,
    Metric,
    MetricChange,
    ModeFacts,
    Padding,
    Statement,
)
from gradrun.results.summary import errors_in, ratio_digits

DASH = "–"
_QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_MAX_MODULES = 12
_MAX_CLASSES = 10
_MAX_MATRIX = 6
"""Most classes of a confusion matrix that fits in 80 columns with their names."""
_MAX_CONFUSIONS = 10
_CLASS_WIDTH = 10
_DEVICE_COLUMNS = {"device_allocated": "device peak", "device_reserved": "reserved"}
_MEMORY_COLUMNS = {
    "forward_peak": "forward peak",
    "retained": "retained",
    "process_peak": "process peak",
    **_DEVICE_COLUMNS,
}

Tone = Literal["", "good", "bad", "unsure", "quiet"]


@dataclass(frozen=True)
class Status:
    """Text with a meaning that renderers show by colour."""

    text: str
    tone: Tone = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Share:
    """A share from 0 to 1, which a page shows as a bar too."""

    value: float
    bar: float = 0
    """Length of the bar, from 0 to 1."""

    def __str__(self) -> str:
        if 0 < self.value < 0.005:
            return "<1%"
        return ">99%" if 0.995 <= self.value < 1 else f"{self.value:.0%}"


@dataclass(frozen=True)
class Picture:
    """A name, and a JPEG that a page shows above it; without one, `jpeg` is empty."""

    name: str
    jpeg: bytes

    def __str__(self) -> str:
        return self.name


Cell = str | Status | Share | Picture


@dataclass(frozen=True)
class Column:
    """Figures are right-aligned; only texts are wrapped."""

    title: str = ""
    kind: Literal["figure", "text", "status"] = "figure"
    emphasis: Literal["", "strong", "quiet"] = ""
    min_width: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of a name and one cell per column; `title` is the header of the names."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    full_width: bool = False
    """Fill the width, so that consecutive tables in a terminal are aligned."""
    brief: int = 0
    """Rows that a terminal shows, each on one line; 0: all, wrapped."""


def of_measurements(result: AnyResult) -> tuple[Table, ...]:
    """Build the tables of time and memory, or of the outcomes of a check."""
    match result:
        case InferResult():
            measured = result.measurements[0]
            memory = peak_memory(measured.memory, result.environment.allocator)
            return _with_rows(timing(measured), workers(measured), memory)
        case CompareResult():
            return _with_rows(ratios(result), generated(result), variant_memory(result))
        case AuditResult():
            return _with_rows(mode_safety(result), saved_for_backward(result))
        case CheckResult():
            return _with_rows(outcomes(result))
        case _:
            return ()


def of_predictions(result: AnyResult) -> tuple[Table, ...]:
    """Build the tables of the quality of the predictions."""
    match result:
        case InferResult():
            return _with_rows(
                metrics(result.metrics),
                *map(confusion, with_matrix(result.metrics)),
                *(predicted_classes(d, result.predictions) for d in result.class_distribution),
                example_predictions(result.examples),
            )
        case CheckResult():
            return _with_rows(
                metrics(result.metrics),
                metric_changes(result.metric_changes),
                *map(confusion, with_matrix(result.metrics)),
            )
        case CompareResult():
            return _with_rows(metric_changes(result.metric_changes))
        case _:
            return ()


def of_interpretation(result: AnyResult) -> tuple[Table, ...]:
    """Build the table of the interpretations that change predictions."""
    return _with_rows(interpretation(result.interpretation))


def _with_rows(*tables: Table) -> tuple[Table, ...]:
    return tuple(table for table in tables if table.rows)


# --- infer -------------------------------------------------------------------------------------


def figure_table(title: str, rows: Sequence[tuple[str, str, str]]) -> Table:
    """Build a table of names, figures and details; such tables are aligned in a terminal."""
    columns = (Column(emphasis="strong", min_width=11), Column(kind="text", emphasis="quiet"))
    return Table(title, columns, tuple(rows), full_width=True)


def timing(measured: Measurement) -> Table:
    """Cold start, latency, throughput and the phase that dominates the run."""
    phases, limit = measured.phases, measured.batch_limit
    load, opened, first = map(
        format_seconds, (phases.load_model, phases.open_data, phases.first_batch)
    )
    rows = [("batch size", f"{limit}", "reduced after an out-of-memory error")] if limit else []
    details = f"model {load}, data {opened}, first batch {first}"
    rows.append(("cold start", format_seconds(measured.cold_start), details))
    if measured.compilation:
        rows.append(_compilation(measured, measured.compilation))
    if measured.workers:
        slowest = max(worker.cold_start for worker in measured.workers)
        rows.append(("workers", format_seconds(slowest), "cold start of the slowest worker"))
    rows += _latencies(measured)
    if measured.padding:
        rows.append(_padding(measured.padding))
    if measured.samples:
        bound, shares = measured.bound_by
        total = f"{pluralize(measured.samples, 'sample')} in {format_seconds(measured.seconds)}"
        names = {"output": "transfer, waiting and output"} if measured.workers else {}
        split = ", ".join(f"{names.get(name, name)} {share:.0%}" for name, share in shares.items())
        rows.append(
            ("throughput", f"{format_number(measured.throughput)} /s", f"{total}, end to end")
        )
        rows.append(("bound by", bound, split))
    rows += _generation(measured.generation)
    return replace(figure_table("Time", rows), note=_sentence(measured.reach))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def workers(measured: Measurement) -> Table:
    """The part of each worker of an engine, and how lost ones ended."""
    total, repeats = measured.samples or 1, any(worker.repeated for worker in measured.workers)
    several = len({worker.node for worker in measured.workers}) > 1
    rows: list[tuple[Cell, ...]] = []
    for worker in measured.workers:
        seconds = sum(span.ended - span.began for span in worker.ranges)
        rate = format_number(worker.samples / seconds) if seconds else DASH
        forward = f"{worker.forward / worker.busy:.0%}" if worker.busy else DASH
        peak = DASH if worker.process_peak is None else format_bytes(worker.process_peak)
        share = f"{worker.samples / total:.0%}"
        ending = "rejected" if worker.rejected else "lost" if worker.lost else ""
        fate = Status(ending, "bad") if ending else Status("")
        name = f"{worker.worker} on {worker.node}" if several else f"{worker.worker}"
        again = [f"{worker.repeated:,}" if worker.repeated else DASH] if repeats else []
        rows.append((name, f"{worker.samples:,}", share, rate, forward, peak, *again, fate))
    columns = (
        Column("samples", emphasis="strong"),
        Column("share"),
        Column("samples/s"),
        Column("forward"),
        Column("process peak"),
        *([Column("repeated")] if repeats else []),
        Column(kind="text"),
    )
    return Table("Worker", columns, tuple(rows))


def _compilation(measured: Measurement, compilation: Compilation) -> tuple[str, str, str]:
    """Time of compiling, which is part of cold start and warm-up, and when it is repaid."""
    speedup = f"{format_number(compilation.speedup)} x as fast as eager on the first batch"
    repaid = measured.samples_to_repay_compilation
    after = "does not pay" if repaid is None else f"pays after {pluralize(repaid, 'sample')}"
    return "compile", format_seconds(compilation.seconds), f"{speedup}: {after}"


def _generation(texts: Generation | None) -> Iterator[tuple[str, str, str]]:
    """Yield new tokens per second, and the times of the first and of the later ones."""
    if texts is None or not texts.tokens:
        return
    rate = f"{format_number(texts.tokens_per_second)} /s"
    yield "tokens", rate, f"{texts.tokens:,} new tokens, in generate()"
    first, later = texts.first_token_seconds, texts.seconds_per_later_token
    yield "first token", format_seconds(median(first)), "median over batches"
    if later:
        yield "later tokens", format_seconds(median(later)), "each; median over batches"


def generated(result: CompareResult) -> Table:
    """Rate and times of the new tokens of each variant."""
    rows: list[tuple[Cell, ...]] = []
    for name, measured in result.by_variant().items():
        texts = [m.generation for m in measured if m.generation and m.generation.tokens]
        if texts:
            total = sum(texts, Generation())
            later = total.seconds_per_later_token
            rows.append(
                (
                    name,
                    f"{format_number(total.tokens_per_second)}",
                    format_seconds(median(total.first_token_seconds)),
                    format_seconds(median(later)) if later else DASH,
                )
            )
    columns = (Column("tokens/s", emphasis="strong"), Column("first token"), Column("later tokens"))
    note = "Times are medians over batches; later tokens: the time of each."
    return Table("Generated text", columns, tuple(rows), note=note)


def _padding(padding: Padding) -> tuple[str, str, str]:
    share = 1 - padding.tokens / max(1, padding.run)
    ungrouped = 1 - padding.tokens / max(1, padding.ungrouped)
    details = f"of {padding.run:,} tokens"
    if padding.run != padding.ungrouped:
        details += f"; {ungrouped:.0%} if not grouped by length"
    return "padding", f"{share:.0%}", details


def _latencies(measured: Measurement) -> Iterator[tuple[str, str, str]]:
    shown = uncertainty = 0.0
    for name, q in _QUANTILES.items():
        estimate = measured.latency(q)
        if estimate is None:
            yield f"batch {name}", DASH, f"needs at least {round(1 / (1 - q))} batches"
            continue
        # With fewer digits than the quantile before it, this one could read as less than that:
        # then both are rounded alike.
        if seconds_shown(estimate.value, estimate.uncertainty) >= shown:
            uncertainty = estimate.uncertainty
        shown = seconds_shown(estimate.value, uncertainty)
        yield (
            f"batch {name}",
            format_seconds(estimate.value, uncertainty),
            _interval(estimate, uncertainty),
        )


def _interval(estimate: stats.Estimate, uncertainty: float) -> str:
    low, high = estimate.low, estimate.high
    if low > 0 and math.isfinite(high):
        return f"{format_seconds_range(low, high, uncertainty)} (95 %)"
    if low > 0:
        return f"{format_seconds(low, uncertainty)} or more (95 %)"
    return f"{format_seconds(high, uncertainty)} or less (95 %)" if math.isfinite(high) else ""


def peak_memory(memory: Memory, allocator: str = "") -> Table:
    """Sizes and peaks, with exact bytes."""
    process = f"whole process ({memory.process_method})"
    if allocator == "retain":
        process = f"process ({memory.process_method}), allocator retain"
    peak_in = f"in {memory.peak_module}" if memory.peak_module else "excluding weights and inputs"
    batch = "one batch"
    if memory.first_batch:
        number = "" if memory.batch is None else f"number {memory.batch + 1}: "
        batch = f"largest batch ({number}{_shape(memory.shape)})"
    rows = [
        _bytes("weights", memory.weights),
        _bytes("inputs", memory.inputs, batch),
        _bytes("forward peak", memory.forward_peak, peak_in),
        _bytes("retained", memory.retained, "outputs and, in grad mode, their graph"),
    ]
    if first := memory.first_batch:
        details = f"its peak, for {_shape(first.shape)}"
        rows.append(_bytes("first batch", first.forward_peak, details))
    rows.append(_bytes("process peak", memory.process_peak, process))
    if memory.device_allocated is None and memory.device_reserved is None:
        rows.append(("device peak", DASH, "no accelerator in use"))
    else:
        rows.append(_bytes("device peak", memory.device_allocated, "allocated"))
        rows.append(_bytes("device pool", memory.device_reserved, "reserved"))
    return figure_table("Peak memory", rows)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _bytes(name: str, count: int | None, note: str = "") -> tuple[str, str, str]:
    if count is None:
        return name, DASH, "not measured"
    return name, format_bytes(count), ", ".join(filter(None, (f"{count:,} bytes", note)))


def metrics(values: Sequence[Metric]) -> Table:
    """Agreement of the predictions with the labels."""
    rows = []
    for metric in values:
        details = ", ".join(filter(None, (pluralize(metric.samples, "sample"), metric.note)))
        rows.append((metric.name, format_score(metric.value), f"over {details}"))
        shown = metric.per_class[:_MAX_CLASSES]
        rows += [(f"  {value.name}", format_score(value.value), "") for value in shown]
        if more := len(metric.per_class) - len(shown):
            rows.append((f"  {more} more", "", "classes; result.json has all"))
    return figure_table("Metrics", rows)


def metric_changes(changes: Sequence[MetricChange]) -> Table:
    """The metrics of each variant beside those of the baseline."""
    rows: list[tuple[Cell, ...]] = []
    for name in dict.fromkeys(change.name for change in changes):
        of_metric = [change for change in changes if change.name == name]
        first = of_metric[0]
        before = format_score(first.before)
        rows.append((name, first.baseline, before, "", Status("baseline", "quiet")))
        for change in of_metric:
            difference = change.value - change.before
            shown = f"{difference:+.2g}" if math.isfinite(difference) else DASH
            text = "equal" if change.value == change.before else ""
            value = format_score(change.value)
            rows.append(("", change.candidate, value, shown, Status(text)))
    columns = (
        Column("variant", "text"),
        Column("value", emphasis="strong"),
        Column("difference"),
        Column(kind="status"),
    )
    return Table("Metric", columns, tuple(rows), note="Metrics are over all data.")


def with_matrix(values: Sequence[Metric]) -> list[Metric]:
    """Return the metrics with a confusion matrix."""
    return [metric for metric in values if metric.matrix]


def confusion(metric: Metric) -> Table:
    """Samples by true and predicted class; of many classes, the most frequent confusions."""
    matrix = metric.matrix
    assert matrix is not None
    names: Sequence[str] = matrix.classes
    title = f"{metric.name}: true"
    if len(names) <= _MAX_MATRIX:
        width = _CLASS_WIDTH
        names = [name if len(name) <= width else f"{name[: width - 1]}…" for name in names]
        rows = tuple(
            (name, *(f"{count:,}" for count in counts))
            for name, counts in zip(names, matrix.counts, strict=True)
        )
        columns = tuple(Column(name) for name in names)
        return Table(title, columns, rows, note="Columns are predicted classes.")
    pairs = sorted(
        (-count, true, predicted)
        for true, counts in enumerate(matrix.counts)
        for predicted, count in enumerate(counts)
        if count and true != predicted
    )
    confused = tuple(
        (names[true], names[predicted], f"{-count:,}", f"{-count / sum(matrix.counts[true]):.0%}")
        for count, true, predicted in pairs[:_MAX_CONFUSIONS]
    )
    columns = (Column("predicted", "text"), Column("count"), Column("of the true"))
    return Table(title, columns, confused, note="The most frequent confusions.")


def predicted_classes(found: ClassDistribution, predictions: int | None) -> Table:
    """The classes that were predicted most often, of a run with this number of predictions."""
    shown = found.most_frequent[:_MAX_CLASSES]
    total, largest = max(1, found.predictions), max((c.count for c in shown), default=1)
    rows: list[tuple[Cell, ...]] = [
        (c.name, f"{c.count:,}", Share(c.count / total, c.count / max(1, largest))) for c in shown
    ]
    if more := found.distinct - len(shown):
        rest = found.predictions - sum(c.count for c in shown)
        rows.append((f"{more:,} more", f"{rest:,}", Share(rest / total)))
    note = f"{pluralize(found.distinct, 'class')} predicted"
    if found.classes:
        note = f"{found.distinct:,} of {pluralize(found.classes, 'class')} predicted"
    if found.samples < (predictions or 0):
        note += f" in the first {pluralize(found.samples, 'sample')}"
    title = "Predicted class"
    title += "" if found.output in {"prediction", "class", "indices", ""} else f", {found.output}"
    columns = (Column("predictions"), Column("share"))
    return Table(title, columns, tuple(rows), note=f"{note}.", brief=5)


def example_predictions(examples: Sequence[Example]) -> Table:
    """Some samples with their predictions."""
    tones: dict[bool | None, Tone] = {True: "good", False: "bad", None: ""}
    labels = any(example.label for example in examples)
    rows = [
        (Picture(e.input, e.picture), e.prediction, Status(e.label, tones[e.correct]))
        for e in examples
    ]
    columns = (Column("prediction", "text"), Column("label", "status"))
    count = 2 if labels else 1
    return Table("Example", columns[:count], tuple(row[: count + 1] for row in rows), brief=4)


def interpretation(statements: Sequence[Statement]) -> Table:
    """What the run took for granted: weights, preprocessing, classes, order."""
    rows = [(statement.topic, statement.text) for statement in statements]
    return Table("Interpretation", (Column(kind="text"),), tuple(rows), full_width=True)


# --- compare -----------------------------------------------------------------------------------


def ratios(result: CompareResult) -> Table:
    """Time of each variant and its ratio to the baseline."""
    # With several batch sizes, the time per batch would contradict the ratio, which is per sample.
    per_batch = len(result.batch_sizes) == 1
    comparisons = {c.candidate: c for c in result.comparisons}
    rows: list[tuple[Cell, ...]] = []
    for name, measured in result.by_variant().items():
        size = measured[0].batch_sizes[0] if per_batch else 1
        time = stats.mean_over_processes(
            [median(m.batch_seconds if per_batch else m.seconds_per_sample) for m in measured]
        )
        rate = format_number(size / time.value, size / time.value * time.relative)
        comparison = comparisons.get(name)
        rows.append((name, seconds_or_about(time), *_ratio(comparison), rate, _verdict(comparison)))
    unit = "per run" if result.of_whole_runs else "per batch" if per_batch else "per sample"
    columns = (
        Column(unit, emphasis="strong"),
        Column("ratio", emphasis="strong"),
        Column("95 % CI", emphasis="quiet"),
        Column("samples/s"),
        Column(kind="status"),
    )
    note = "Intervals are over processes; ratios are paired within each process."
    if result.of_whole_runs:
        note = "Intervals are over runs; each run is compared with the one before or after it."
    notes = [note if comparisons else "", *_reach_of_fastest(result)]
    return Table("Time", columns, tuple(rows), note=" ".join(filter(None, notes)))


def _reach_of_fastest(result: CompareResult) -> Iterator[str]:
    """Yield the distance to the machine's peak of the variant with the least time per sample."""
    fastest = min(
        (measured[0] for measured in result.by_variant().values()),
        key=lambda measured: median(measured.seconds_per_sample),
        default=None,
    )
    if fastest and fastest.reach:
        yield _sentence(f"with {fastest.variant}, {fastest.reach}")


def seconds_or_about(time: stats.Estimate) -> str:
    """Format a time with its interval, or as a rough value if the interval is wide."""
    if 2 * time.uncertainty < time.value:
        return seconds_within(time.value, time.uncertainty)
    return f"about {format_seconds(time.value, time.value)}"


def _ratio(comparison: Comparison | None) -> tuple[str, str]:
    if comparison is None:
        return "1", ""
    digits = ratio_digits(comparison)
    interval = DASH  # a single process supports no interval
    if math.isfinite(comparison.high) and comparison.relative_width < 1:
        interval = f"{comparison.low:.{digits}f}–{comparison.high:.{digits}f}"
    return f"{comparison.ratio:.{digits}f}", interval


_TONES: dict[str, Tone] = {"faster": "good", "slower": "bad", "inconclusive": "unsure"}


def _verdict(comparison: Comparison | None) -> Status:
    if comparison is None:
        return Status("baseline", "quiet")
    verdict = comparison.verdict
    return Status(verdict.replace("_", " "), _TONES.get(verdict, ""))


def variant_memory(result: CompareResult) -> Table:
    """Memory peaks of each variant, and the difference of its outputs from the baseline's."""
    cpu, process, device = ["forward_peak", "retained"], ["process_peak"], [*_DEVICE_COLUMNS]
    memories = [m.memory for m in result.measurements]
    # A terminal has room for the peaks of the CPU or those of the device, not for both.
    if any(memory.device_allocated is not None for memory in memories):
        cpu = [f for f in cpu if any(getattr(memory, f) is not None for memory in memories)]
    else:
        device = []
    fields = cpu + process + device
    equivalence = {e.candidate: e for e in result.equivalence}
    rows: list[tuple[Cell, ...]] = [
        (name, *_peaks(variant[0].memory, fields), outputs_status(equivalence.get(name)))
        for name, variant in result.by_variant().items()
    ]
    columns = (*(Column(_MEMORY_COLUMNS[f]) for f in fields), Column("outputs", "status"))
    return Table("Memory", columns, tuple(rows))


def _peaks(memory: Memory, fields: Sequence[str]) -> list[str]:
    counts = [getattr(memory, field) for field in fields]
    return [DASH if count is None else format_bytes(count) for count in counts]


def outputs_status(equivalence: Equivalence | None) -> Status:
    """Describe the difference of a variant's outputs from the baseline's."""
    if equivalence is None:
        return Status("baseline", "quiet")
    if not equivalence.compared:
        return Status("no common sample")
    if equivalence.bitwise:
        return Status("bitwise equal")
    if equivalence.equal:
        return Status(f"within tolerance (±{equivalence.max_abs_diff:.1g})")
    return Status(f"differ by {equivalence.max_abs_diff:.2g}", "bad")


# --- audit -------------------------------------------------------------------------------------


def mode_safety(result: AuditResult) -> Table:
    """Errors, memory and outputs in each mode."""
    equivalence = {e.candidate: e for e in result.equivalence}
    measurements = {m.mode: m for m in result.measurements}
    rows: list[tuple[Cell, ...]] = []
    for mode, measured in measurements.items():
        errors = len(errors_in(result, mode))
        safe = Status(pluralize(errors, "error"), "bad") if errors else Status("yes", "good")
        peaks = _peaks(measured.memory, ("forward_peak", "retained"))
        rows.append((mode.value, safe, *peaks, outputs_status(equivalence.get(mode.value))))
    missing = [mode.value for mode in GradMode if mode not in measurements]
    rows += [(mode, Status("cannot run", "bad"), DASH, DASH, Status(DASH)) for mode in missing]
    columns = (
        Column("safe"),
        Column("forward peak"),
        Column("retained"),
        Column("outputs", "status"),
    )
    return Table("Mode", columns, tuple(rows))


def saved_for_backward(result: AuditResult) -> Table:
    """The modules that save the most for backward, and the total of the memory meter."""
    grad = next((m for m in result.measurements if m.mode is GradMode.GRAD), None)
    attributed = sum(saved.bytes for saved in result.saved_for_backward)
    retained = grad.memory.retained if grad else None
    total = attributed if retained is None else retained
    parts = [(saved.module, saved.bytes) for saved in result.saved_for_backward]
    if rest := parts[_MAX_MODULES:]:
        parts[_MAX_MODULES:] = [(f"{len(rest)} more", sum(count for _, count in rest))]
    if parts and total != attributed:
        parts.append(("(not attributed)", total - attributed))
    rows = [
        (name, format_bytes(count), f"{count / total:.0%}" if total else DASH)
        for name, count in parts
    ]
    if rows:
        rows.append(("total" if retained is None else "total retained", format_bytes(total), ""))
    columns = (Column("per batch"), Column("share"))
    return Table("Saved for backward in grad", columns, tuple(rows))


# --- check -------------------------------------------------------------------------------------

OUTCOME_TONES: dict[str, Tone] = {"pass": "good", "fail": "bad", "inconclusive": "unsure"}


def outcomes(result: CheckResult) -> Table:
    """Limit, value and status of each check."""
    rows = [
        (o.check, o.limit, o.value, Status(o.status, OUTCOME_TONES[o.status]))
        for o in result.outcomes
    ]
    columns = (
        Column("limit", "text", "quiet"),
        Column("value", "text"),
        Column("status", "status"),
    )
    return Table("Check", columns, tuple(rows))


# --- modes -------------------------------------------------------------------------------------

DIFFERS = "✗"
_MODE_WIDTH = len("✗ RuntimeError")


def mode_behavior(result: ModeFacts) -> tuple[Table, ...]:
    """One table per topic and, for questions that are not asked per mode, one more."""
    topics: dict[tuple[str, bool], dict[str, dict[GradMode | None, Fact]]] = {}
    for topic in dict.fromkeys(fact.topic for fact in result.facts):
        for per_mode in (True, False):
            topics[topic, per_mode] = {}
    for fact in result.facts:
        questions = topics[fact.topic, fact.mode is not None]
        questions.setdefault(fact.question, {})[fact.mode] = fact
    return tuple(
        _topic(topic, questions, per_mode=per_mode)
        for (topic, per_mode), questions in topics.items()
        if questions
    )


def _topic(
    topic: str, questions: dict[str, dict[GradMode | None, Fact]], *, per_mode: bool
) -> Table:
    modes: list[GradMode | None] = [*GradMode] if per_mode else [None]
    columns = tuple(Column(mode or "", "text", min_width=_MODE_WIDTH) for mode in modes)
    rows = tuple(
        (question, *(_observed(cells[mode]) if mode in cells else "" for mode in modes))
        for question, cells in questions.items()
    )
    return Table(topic, columns, rows, full_width=True)


def _observed(fact: Fact) -> Status:
    if fact.observed is None:
        return Status("not available", "unsure")
    if fact.holds:
        return Status(fact.observed, "unsure" if fact.observed.endswith("Error") else "")
    short = fact.observed.partition(":")[0].removeprefix("raises ")
    return Status(f"{DIFFERS} {short}", "bad")
