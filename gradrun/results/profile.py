"""Time, work and memory per module, derived from the raw times of module calls.

Times are measured by hooks. Their cost per call has two parts: the part inside the interval of the
call that is timed, and the part outside of it, which the module around it would be charged for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from statistics import median

from gradrun.core.record import Record
from gradrun.results import stats
from gradrun.results.bounds import ByteChange, Calls, Count, Seconds
from gradrun.results.work import MachinePeaks, Reach, Work, reach

_SIGNIFICANT = 0.01
"""A difference below this share of the forward pass is not listed."""

_SHORTEST = 1e-12
_DEEPEST = 200

_PRECISE = 0.5
"""Relative uncertainty up to which the cost of hooks in the model is used as it was measured."""
_MAX_FACTOR = 2.0
"""Otherwise, it is at most this many times the cost in an empty module, and at least a fraction."""


class ModuleCalls(Record, frozen=True, kw_only=True):
    """The calls of one module by one other; a module called by several has an entry for each."""

    path: str
    """In the model; empty for the model itself."""
    type: str
    parent: int
    """Index of the caller in the profile, which precedes this entry; -1 for the model."""
    calls: Calls
    """Per batch; the mean over the rounds."""
    seconds: tuple[Seconds, ...]
    """One per round: seconds per batch in all calls, with children and the cost of hooks."""
    work: Work | None = None
    """Of one batch, without children; None if it was not counted."""
    peak: ByteChange | None = None
    """Highest live bytes during a call above the level before it; None if not measured."""
    parameters: Count = 0
    """Elements of its parameters and those of its children."""

    @property
    def label(self) -> str:
        """The path and type of the module."""
        return f"{self.path or '(the model)'} ({self.type})"


class OperatorTime(Record, frozen=True, kw_only=True):
    """The calls of an operator with the same input shapes, under torch's profiler."""

    name: str
    shapes: str
    """Of its inputs."""
    calls: Calls
    seconds: Seconds
    """Per batch, without the operators that it calls; includes the cost of the profiler."""
    modules: tuple[str, ...]
    """Labels of the modules that call it, with the longest time first."""


class Profile(Record, frozen=True, kw_only=True):
    """One variant: times per module in rounds with hooks, each beside a round without them."""

    variant: str = ""
    plain_seconds: tuple[Seconds, ...]
    """One per round: seconds per batch without hooks."""
    hooked_seconds: tuple[Seconds, ...]
    """One per round: seconds per batch with hooks."""
    inside: Seconds
    """Cost of the hooks of one call within the interval that they time, in an empty module."""
    outside: Seconds
    """Their cost per call outside of this interval."""
    modules: tuple[ModuleCalls, ...]
    """In the order of their first calls, callers first; the model is the first."""
    operators: tuple[OperatorTime, ...] = ()
    """Longest first."""
    operator_seconds: Seconds = 0.0
    """Per batch, of all operators."""
    peaks: MachinePeaks | None = None

    def __post_init__(self) -> None:
        rounds = len(self.hooked_seconds)
        if not self.modules or not rounds or len(self.plain_seconds) != rounds:
            raise ValueError("a profile without modules or rounds")
        if min(*self.plain_seconds, *self.hooked_seconds) < _SHORTEST:
            raise ValueError("a round of zero duration, which a clock cannot measure")
        depths: list[int] = []
        for index, module in enumerate(self.modules):
            if not -1 <= module.parent < index or (module.parent < 0) != (index == 0):
                raise ValueError(f"module {index} has the parent {module.parent}")
            depths.append(depths[module.parent] + 1 if index else 0)
            if depths[-1] > _DEEPEST:
                raise ValueError(f"modules call each other more than {_DEEPEST} deep")
            if len(module.seconds) != rounds:
                raise ValueError("times of a module and rounds differ in number")


@dataclass(frozen=True)
class ModuleFigures:
    """Figures of one entry of a profile, per batch; times without the cost of the hooks."""

    calls: ModuleCalls
    index: int
    depth: int
    children: tuple[int, ...]
    rounds: tuple[float, ...]
    """Seconds with children, per round."""
    self_rounds: tuple[float, ...]
    """Seconds without children, per round."""
    shares: tuple[float, ...]
    """Of the forward pass, per round."""
    work: Work | None
    """With children; None if it was not counted."""

    @cached_property
    def time(self) -> stats.Estimate:
        """Seconds with children."""
        return _median(self.rounds)

    @cached_property
    def self_time(self) -> stats.Estimate:
        """Seconds without children."""
        return _median(self.self_rounds)

    @cached_property
    def share(self) -> stats.Estimate:
        """Share of the forward pass, with children."""
        return _median(self.shares)

    def reach(self, peaks: MachinePeaks | None) -> Reach | None:
        """Compare the work with the peaks of the machine."""
        if peaks is None or self.work is None or self.time.value <= 0:
            return None
        return reach(self.work, self.time.value, peaks)


class ProfileFigures:
    """The figures of a profile, computed from its raw times."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        children: list[list[int]] = [[] for _ in profile.modules]
        depths: list[int] = []
        for index, module in enumerate(profile.modules):
            depths.append(depths[module.parent] + 1 if index else 0)
            if index:
                children[module.parent].append(index)
        self._entries = Counter(module.label for module in profile.modules)
        self.inside, self.outside = _cost_per_call(profile)
        selfs = [self._self_rounds(index, children[index]) for index in range(len(depths))]
        totals, works = [list(rounds) for rounds in selfs], [m.work for m in profile.modules]
        for index in reversed(range(1, len(depths))):
            parent = profile.modules[index].parent
            totals[parent] = [a + b for a, b in zip(totals[parent], totals[index], strict=True)]
            works[parent] = _sum(works[parent], works[index])
        whole = [max(seconds, _SHORTEST) for seconds in totals[0]]
        self.modules = [
            ModuleFigures(
                calls=module,
                index=index,
                depth=depths[index],
                children=tuple(children[index]),
                rounds=tuple(totals[index]),
                self_rounds=tuple(selfs[index]),
                shares=tuple(a / b for a, b in zip(totals[index], whole, strict=True)),
                work=works[index],
            )
            for index, module in enumerate(profile.modules)
        ]

    def _self_rounds(self, index: int, children: Sequence[int]) -> list[float]:
        modules = self.profile.modules
        cost = self.inside * modules[index].calls
        cost += fsum(self.outside * modules[child].calls for child in children)
        own = modules[index].seconds
        inner = [fsum(modules[c].seconds[r] for c in children) for r in range(len(own))]
        return [a - b - cost for a, b in zip(own, inner, strict=True)]

    @property
    def forward(self) -> stats.Estimate:
        """Seconds per batch without hooks."""
        return _median(self.profile.plain_seconds)

    @property
    def overhead(self) -> float:
        """Seconds per batch that the hooks cost, and that are subtracted."""
        return (self.inside + self.outside) * sum(m.calls for m in self.profile.modules)

    @property
    def sum_of_self_times(self) -> float:
        """Relative to the forward pass without hooks.

        Far from 1 if modules are disturbed in different rounds, by other programs.
        """
        return fsum(module.self_time.value for module in self.modules) / self.forward.value

    @property
    def self_seconds_by_type(self) -> dict[str, float]:
        """Self times per batch by type of module, longest first."""
        seconds: dict[str, float] = defaultdict(float)
        for module in self.modules:
            seconds[module.calls.type] += max(0.0, module.self_time.value)
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))

    def chain(self, module: ModuleFigures) -> list[str]:
        """Return the label of a module, and of its callers if another entry has the same label."""
        labels, parent = [module.calls.label], module.calls.parent
        if self._entries[module.calls.label] > 1:
            while parent >= 0:
                labels.append(self.modules[parent].calls.label)
                parent = self.modules[parent].calls.parent
        return labels

    def in_tree_order(self) -> Iterator[ModuleFigures]:
        """Yield each module before the modules that it calls."""
        stack = [0]
        while stack:
            index = stack.pop()
            yield self.modules[index]
            stack += reversed(self.modules[index].children)


def _cost_per_call(profile: Profile) -> tuple[float, float]:
    """Return the cost of the hooks of a call inside and outside of its interval, in seconds.

    The cost within the model follows from the rounds with and without hooks. Where that difference
    is smaller than the noise of the rounds, the cost in an empty module limits it.
    """
    alone = profile.inside + profile.outside
    calls = sum(module.calls for module in profile.modules)
    if not alone or not calls:
        return 0.0, 0.0
    pairs = zip(profile.hooked_seconds, profile.plain_seconds, strict=True)
    differences = [hooked - plain for hooked, plain in pairs]
    cost, found = median(differences) / calls, stats.quantile(differences, 0.5)
    if found is None or not found.low > 0 or found.uncertainty > _PRECISE * found.value:
        cost = min(max(cost, alone / _MAX_FACTOR), alone * _MAX_FACTOR)
    inside = cost * profile.inside / alone
    return inside, cost - inside


def _median(values: Sequence[float]) -> stats.Estimate:
    """Estimate the median; with few values, the interval is their range."""
    found = stats.quantile(values, 0.5)
    if found is None:
        return stats.Estimate(values[0], min(values), max(values))
    low = found.low if found.low in values else min(values)
    return stats.Estimate(found.value, low, min(found.high, max(values)))


def _sum(one: Work | None, other: Work | None) -> Work | None:
    return None if one is None or other is None else one + other


# --- differences between variants --------------------------------------------------------------


@dataclass(frozen=True)
class ModuleDifference:
    """A module whose time differs between two variants, in seconds per batch."""

    label: str
    baseline: float
    candidate: float
    difference: stats.Estimate
    """Time of the candidate minus that of the baseline."""
    own: bool
    """Without children, which differ for themselves or not at all."""


def forward_difference(base: Profile, other: Profile) -> ModuleDifference:
    """Compare the forward passes without hooks, over pairs of rounds."""
    pairs = zip(base.plain_seconds, other.plain_seconds, strict=False)
    change = _median([after - before for before, after in pairs])
    before, after = (ProfileFigures(one).forward.value for one in (base, other))
    return ModuleDifference("forward", before, after, change, own=False)


def differences(base: Profile, other: Profile) -> list[ModuleDifference]:
    """List the modules whose time differs, largest difference first.

    Modules are compared without their children, and with them where the variants do not call the
    same children. A difference is listed if its interval excludes 0 and it is at least 1 % of the
    baseline's forward pass.
    """
    one, two = ProfileFigures(base), ProfileFigures(other)
    least = _SIGNIFICANT * one.forward.value
    found = []
    for before, after, own in _common(one, two, 0, 0):
        first, second = ((m.self_rounds if own else m.rounds) for m in (before, after))
        change = _median([b - a for a, b in zip(first, second, strict=False)])
        if abs(change.value) >= least and (change.low > 0 or change.high < 0):
            found.append(
                ModuleDifference(before.calls.label, median(first), median(second), change, own)
            )
    return sorted(found, key=lambda one: -abs(one.difference.value))


def _common(
    one: ProfileFigures, two: ProfileFigures, first: int, second: int
) -> Iterator[tuple[ModuleFigures, ModuleFigures, bool]]:
    """Yield pairs of modules to compare, and whether without their children."""
    before, after = one.modules[first], two.modules[second]
    children = [
        {figures.modules[child].calls.path: child for child in module.children}
        for figures, module in ((one, before), (two, after))
    ]
    if not children[0] or children[0].keys() != children[1].keys():
        yield before, after, not any(children)
        return
    yield before, after, True
    for path, child in children[0].items():
        yield from _common(one, two, child, children[1][path])
