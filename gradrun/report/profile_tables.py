"""Tables and sentences of a profile: time, work and operators per module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from gradrun.core.units import (
    first_names,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    format_seconds_range,
    pluralize,
    seconds_within,
)
from gradrun.report.tables import DASH, Cell, Column, Share, Status, Table, Tone, seconds_or_about
from gradrun.results.profile import (
    ModuleDifference,
    ModuleFigures,
    OperatorTime,
    Profile,
    ProfileFigures,
    differences,
    forward_difference,
)
from gradrun.results.result import ProfileResult
from gradrun.results.work import MachinePeaks, Reach, describe_reach

_INDENT = "· "
_MAX_DIFFERENCES = 10
_MAX_TYPES = 6
_CALLER_WIDTH = 24
_DOUBTFUL = 0.03
_MAX_NAMED = 8
"""Operators without a formula that a note names."""
_BOUNDS: dict[str, Tone] = {"overhead": "unsure", "memory": "", "cache": "", "compute": "good"}


def tables_of(result: ProfileResult) -> tuple[Table, ...]:
    """Build the tables of a profile; of several variants, those of differences and times."""
    profiles = [ProfileFigures(profile) for profile in result.profiles]
    if len(profiles) == 1:
        (figures,) = profiles
        shown = shown_modules(figures, result.depth, result.top)
        tables = [
            times("Module", figures, shown),
            by_type(figures),
            work(figures, shown),
            operators(figures.profile),
        ]
    else:
        base, *others = result.profiles
        tables = [difference(base, other, result.key) for other in others]
        for figures in profiles:
            shown = shown_modules(figures, result.depth, result.top)
            tables.append(times(f"Module, {figures.profile.variant}", figures, shown))
    return tuple(table for table in tables if table.rows)


def shown_modules(figures: ProfileFigures, depth: int, top: int) -> list[ModuleFigures]:
    """Return the modules to show, callers first: a number of those that take most, to a depth."""
    modules = [m for m in figures.in_tree_order() if not depth or m.depth < depth]
    if not top or len(modules) <= top:
        return modules
    longest = sorted(modules, key=lambda m: -m.time.value)[:top]
    kept = {0}
    for module in longest:  # with their callers, even if noise makes one of them shorter
        index = module.index
        while index not in kept:
            kept.add(index)
            index = figures.modules[index].calls.parent
    return [module for module in modules if module.index in kept]


def name_of(figures: ProfileFigures, module: ModuleFigures) -> str:
    """Return the path relative to the caller, and the type."""
    path, parent = module.calls.path, module.calls.parent
    around = figures.modules[parent].calls.path if parent >= 0 else ""
    local = path.removeprefix(f"{around}.") if around else path
    return " ".join(filter(None, (local, module.calls.type)))


def times(title: str, figures: ProfileFigures, shown: Sequence[ModuleFigures]) -> Table:
    """Time, share, memory and parameters of each module."""
    rows: list[tuple[Cell, ...]] = []
    for module in shown:
        own, whole = module.self_time.value, figures.modules[0].time.value or 1.0
        peak = module.calls.peak
        rows.append(
            (
                _INDENT * module.depth + name_of(figures, module),
                seconds_or_about(module.time) if module.time.value > 0 else "about 0 s",
                Share(max(0.0, module.share.value), min(1.0, max(0.0, module.share.value))),
                f"{max(0.0, own / whole):.0%}",
                _count(module.calls.calls),
                DASH if peak is None else format_bytes(peak),
                format_count(module.calls.parameters),
            )
        )
    columns = (
        Column("per batch", emphasis="strong"),
        Column("share"),
        Column("self"),
        Column("calls"),
        Column("memory"),
        Column("params"),
    )
    note = " ".join(filter(None, (_hidden(figures, shown), _hooks(figures))))
    return Table(title, columns, tuple(rows), note=note, brief=len(rows))


def _hidden(figures: ProfileFigures, shown: Sequence[ModuleFigures]) -> str:
    more = len(figures.modules) - len(shown)
    if not more:
        return ""
    return f"{pluralize(more, 'more module')} in the time of those around them."


def _hooks(figures: ProfileFigures) -> str:
    forward = figures.forward
    text = f"The forward pass takes {seconds_or_about(forward)} without hooks"
    if not figures.overhead:
        return f"{text}."
    share = figures.overhead / forward.value if forward.value else 0.0
    cost = format_seconds(figures.overhead)
    return (
        f"{text}. Hooks add {cost} ({share:.1%}), which is subtracted; the self times add up to "
        f"{figures.sum_of_self_times:.1%} of the forward pass."
    )


def doubts(result: ProfileResult) -> Iterator[str]:
    """Yield a sentence for each profile whose times do not add up, and for peaks exceeded."""
    for profile in result.profiles:
        figures, name = ProfileFigures(profile), f"{profile.variant}: " if profile.variant else ""
        total = figures.sum_of_self_times
        if abs(total - 1) > _DOUBTFUL:
            yield (
                f"{name}the times of the modules add up to {total:.0%} of the forward pass without "
                "hooks; reduce load on the machine and repeat the profile"
            )
        whole = figures.modules[0].reach(profile.peaks)
        if whole and whole.compute > 1 + _DOUBTFUL:
            yield (
                f"{name}the forward pass is faster than the measured peak of the machine; run "
                "gradrun profile --machine while no other program is running"
            )


def by_type(figures: ProfileFigures) -> Table:
    """Self times by type of module, longest first."""
    calls: dict[str, float] = defaultdict(float)
    for module in figures.modules:
        calls[module.calls.type] += module.calls.calls
    total = figures.modules[0].time.value
    shares = _shares_by_type(figures)[:_MAX_TYPES]
    longest = shares[0][1] or 1.0
    rows = [
        (name, format_seconds(share * total), Share(share, share / longest), _count(calls[name]))
        for name, share in shares
    ]
    columns = (Column("self"), Column("share"), Column("calls"))
    return Table("Type", columns, tuple(rows))


def _shares_by_type(figures: ProfileFigures) -> list[tuple[str, float]]:
    """Return the types of modules with the shares of their self times, longest first."""
    seconds = figures.self_seconds_by_type
    total = sum(seconds.values()) or 1.0
    return [(name, own / total) for name, own in seconds.items()]


def _count(calls: float) -> str:
    return format_number(calls) if calls % 1 else f"{calls:,.0f}"


def work(figures: ProfileFigures, shown: Sequence[ModuleFigures]) -> Table:
    """Operations, bytes and rates of each module, and the roof that limits it."""
    peaks, rows = figures.profile.peaks, list[tuple[Cell, ...]]()
    for module in shown:
        counted, found = module.work, module.reach(figures.profile.peaks)
        if counted is None:
            continue
        rows.append(
            (
                _INDENT * module.depth + name_of(figures, module),
                format_count(counted.total_flops) if counted.flops else DASH,
                format_count(counted.bytes) if counted.bytes else DASH,
                format_number(counted.intensity) if counted.flops else DASH,
                *_rates(module, found),
            )
        )
    columns = (
        Column("FLOP"),
        Column("bytes"),
        Column("FLOP/B"),
        Column("FLOP/s"),
        Column("B/s"),
        Column("of peak", emphasis="strong"),
        Column("bound by", "status"),
    )
    whole = figures.modules[0].work
    parts = []
    if peaks is not None:
        products = {one.dtype for one in whole.flops} if whole else set()
        rates = [
            f"{format_number(peak.rate / 1e9)} GFLOP/s in {peak.dtype}"
            for peak in peaks.products
            if peak.dtype in products
        ]
        rates.append(f"{format_number(peaks.copy / 1e9)} GB/s")
        parts.append(
            f"Peaks of {pluralize(peaks.threads, 'thread')}, measured: {', '.join(rates)}."
        )
    if whole and whole.uncounted:
        names = first_names(sorted(whole.uncounted), _MAX_NAMED)
        parts.append(f"FLOP: products, convolutions, attention; not counted: {names}.")
    return Table("Work", columns, tuple(rows), note=" ".join(parts), brief=len(rows))


def _rates(module: ModuleFigures, found: Reach | None) -> tuple[Cell, ...]:
    seconds, work = module.time.value, module.work
    counts = (work.total_flops, work.bytes) if work and seconds > 0 else (0, 0)
    rates = [format_count(count / seconds) if count else DASH for count in counts]
    if found is None or not any(counts):
        return *rates, DASH, Status(DASH)
    return *rates, f"{found.share:.0%}", Status(found.bound, _BOUNDS[found.bound])


def operators(profile: Profile) -> Table:
    """The operators that take most, with their shapes and callers."""
    total = profile.operator_seconds or 1.0
    rows = [
        (
            " ".join(filter(None, (one.name, one.shapes))),
            format_seconds(one.seconds),
            f"{one.seconds / total:.0%}",
            _count(one.calls),
            _callers(one),
        )
        for one in profile.operators
    ]
    columns = (Column("self"), Column("share"), Column("calls"), Column("called by", "text"))
    note = "Under torch's profiler, which adds about a microsecond per operator."
    return Table("Operator", columns, tuple(rows), note=note, brief=len(rows))


def _callers(operator: OperatorTime) -> str:
    first, *more = [label.rpartition(" (")[0] or label for label in operator.modules]
    if len(first) > _CALLER_WIDTH:
        first = f"…{first[1 - _CALLER_WIDTH :]}"
    return f"{first} +{len(more)}" if more else first


def difference(base: Profile, other: Profile, key: str) -> Table:
    """The modules that make the difference between two variants."""
    found = differences(base, other)
    one, two = ProfileFigures(base), ProfileFigures(other)
    whole = forward_difference(base, other)
    change = whole.difference
    clear = change.low > 0 or change.high < 0
    rows: list[tuple[Cell, ...]] = [
        (
            "forward",
            format_seconds(one.forward.value),
            format_seconds(two.forward.value),
            _signed(whole),
            "",
        )
    ]
    rows += [
        (
            d.label if d.own else f"{d.label} with children",
            format_seconds(max(0.0, d.baseline)),
            format_seconds(max(0.0, d.candidate)),
            _signed(d),
            f"{d.difference.value / change.value:.0%}" if clear else DASH,
        )
        for d in found[:_MAX_DIFFERENCES]
    ]
    columns = (
        Column(base.variant.removeprefix(f"{key}=")),
        Column(other.variant.removeprefix(f"{key}=")),
        Column("change", emphasis="strong"),
        Column("of total"),
    )
    note = "Per batch, each with its 95 % interval over pairs of rounds in one process."
    if not found:
        note = "No module differs by at least 1 % of the forward pass beyond its interval."
    elif len(found) > _MAX_DIFFERENCES:
        note += f" {len(found) - _MAX_DIFFERENCES} smaller differences are not listed."
    return Table("Difference", columns, tuple(rows), note=note, brief=len(rows))


def _signed(one: ModuleDifference) -> str:
    change = one.difference
    if not change.value:
        return "0 s"
    sign = "+" if change.value > 0 else "-"
    if abs(change.value) <= 2 * change.uncertainty:  # an interval to zero or far to one side
        near, far = sorted((abs(change.low), abs(change.high)))
        if change.low * change.high <= 0:
            return f"{sign}{format_seconds(abs(change.value), change.uncertainty)}, unclear"
        text = format_seconds_range(near, far, change.uncertainty)
        return f"{sign}{text.replace(' to ', f' to {sign}')}"  # -10 to 90 would span zero
    return f"{sign}{seconds_within(abs(change.value), change.uncertainty)}"


def verdict(result: ProfileResult) -> str:
    """Summarize a profile: where the time is, and how far the forward pass is from the peak."""
    return " ".join(_sentences(result))


def _sentences(result: ProfileResult) -> Iterator[str]:
    base, *others = result.profiles
    if others:
        for other in others:
            yield _summarize_difference(base, other)
        return
    figures = ProfileFigures(base)
    (first, share), *rest = _shares_by_type(figures)
    parts = [f"{first} takes {share:.0%} of {format_seconds(figures.forward.value)} per batch"]
    parts += [f"{name} {part:.0%}" for name, part in rest[:2]]
    longest = max(figures.modules, key=lambda m: m.self_time.value)
    alone = max(0.0, longest.self_time.value) / (figures.modules[0].time.value or 1.0)
    yield f"{', '.join(parts)}. The longest module is {longest.calls.label} with {alone:.0%}."
    whole = figures.modules[0].work
    if whole and base.peaks:
        text = describe_reach(whole, figures.forward.value, base.peaks)
        if text:
            yield f"{text[0].upper()}{text[1:]}."


def _summarize_difference(base: Profile, other: Profile) -> str:
    change = forward_difference(base, other).difference
    start = f"{other.variant} takes {format_seconds(abs(change.value))} "
    if change.low <= 0 <= change.high:
        return f"{other.variant}: no difference in time to {base.variant} beyond the interval."
    start += f"{'more' if change.value > 0 else 'less'} per batch than {base.variant}"
    found = differences(base, other)[:3]
    if not found:
        return f"{start}, spread over modules that differ by less than 1 % each."
    names = ", ".join(f"{d.label} ({_signed(d)})" for d in found)
    share = sum(d.difference.value for d in found) / change.value
    return f"{start}, {'most of it' if share > 0.5 else 'with the largest differences'} in {names}."


# --- peaks of a machine ------------------------------------------------------------------------


def peaks(measured: Sequence[MachinePeaks]) -> Table:
    """Peaks of matrix products per type and of copies, per number of threads."""
    dtypes = dict.fromkeys(peak.dtype for one in measured for peak in one.products)
    rows = [
        (
            pluralize(one.threads, "thread"),
            *(_gigas(one.rate(dtype)) for dtype in dtypes),
            _gigas(one.copy),
        )
        for one in measured
    ]
    columns = (*(Column(dtype) for dtype in dtypes), Column("copy"))
    note = "GFLOP/s of matrix products per type, and GB/s read and written by a copy."
    return Table("Peak", columns, tuple(rows), note=note)


def _gigas(rate: float | None) -> str:
    return DASH if rate is None else format_number(rate / 1e9)


def summarize_peaks(best: MachinePeaks) -> str:
    """Describe the peaks and the intensity at which they meet."""
    rate = best.rate("float32")
    if rate is None:
        return ""
    return (
        f"With {pluralize(best.threads, 'thread')}, float32 products reach "
        f"{format_number(rate / 1e9)} GFLOP/s and copies {format_number(best.copy / 1e9)} GB/s: "
        f"below {format_number(rate / best.copy)} FLOP per byte, memory is the limit."
    )
