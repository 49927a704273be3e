"""Times per module with a clock that the modules themselves advance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gradrun.profiling.call_tree import CallTree, hook_cost
from gradrun.results.profile import ModuleCalls, Profile, ProfileFigures
from gradrun.results.work import Work

MS = 1_000_000


class FakeClock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Takes(nn.Module):
    """Takes some milliseconds itself, then calls its children."""

    def __init__(self, clock: FakeClock, ms: float, *children: nn.Module) -> None:
        super().__init__()
        self.clock, self.ns = clock, round(ms * MS)
        self.parts = nn.ModuleList(children)

    def forward(self, x: Any) -> Any:
        self.clock.now += self.ns
        for part in self.parts:
            x = part(x)
        return x


def profile_of(model: nn.Module, clock: FakeClock, rounds: int = 1) -> ProfileFigures:
    tree = CallTree(model)
    hooked = []
    for number in range(rounds):
        began = clock.now
        with tree.timed(clock):
            model(torch.ones(1))
        hooked.append((clock.now - began) * 1e-9)
        tree.end_round(number, 1, tree.take())
    modules = tuple(
        ModuleCalls(
            path=tree.path(node),
            type=type(node.module).__name__,
            parent=node.parent,
            calls=sum(node.calls) / rounds,
            seconds=tuple(node.rounds),
        )
        for node in tree.nodes
    )
    return ProfileFigures(
        Profile(
            plain_seconds=tuple(hooked),
            hooked_seconds=tuple(hooked),
            inside=0.0,
            outside=0.0,
            modules=modules,
        )
    )


def rows(figures: ProfileFigures) -> list[tuple[str, float, float, float]]:
    return [
        (
            m.calls.path,
            m.calls.calls,
            round(m.time.value * 1e3, 6),
            round(m.self_time.value * 1e3, 6),
        )
        for m in figures.in_tree_order()
    ]


def test_self_times_and_times_with_children_are_those_that_the_modules_took() -> None:
    clock = FakeClock()
    model = Takes(clock, 1, Takes(clock, 2, Takes(clock, 3)), Takes(clock, 4))
    assert rows(profile_of(model, clock)) == [
        ("", 1, 10, 1),
        ("parts.0", 1, 5, 2),
        ("parts.0.parts.0", 1, 3, 3),
        ("parts.1", 1, 4, 4),
    ]


def test_shares_of_planted_modules_are_exact_and_ranked() -> None:
    clock = FakeClock()
    model = Takes(clock, 0, Takes(clock, 5), Takes(clock, 10), Takes(clock, 1))
    modules = profile_of(model, clock).modules[1:]
    assert [round(m.share.value, 9) for m in modules] == [5 / 16, 10 / 16, 1 / 16]


def test_a_module_that_is_called_several_times_has_one_entry_with_all_calls() -> None:
    clock = FakeClock()
    shared = Takes(clock, 2)
    assert rows(profile_of(Takes(clock, 1, shared, shared, shared), clock)) == [
        ("", 1, 7, 1),
        ("parts.0", 3, 6, 6),
    ]


def test_a_module_that_two_modules_call_has_an_entry_for_each() -> None:
    clock = FakeClock()
    shared = Takes(clock, 2)
    figures = profile_of(Takes(clock, 0, Takes(clock, 1, shared), Takes(clock, 3, shared)), clock)
    assert [(t, own) for _, _, t, own in rows(figures)] == [(8, 0), (3, 1), (2, 2), (5, 3), (2, 2)]
    first, second = (m for m in figures.modules if m.self_time.value == pytest.approx(2e-3))
    assert first.calls.label == second.calls.label
    assert figures.chain(first) != figures.chain(second)


def test_a_module_that_calls_itself_counts_once_in_its_caller() -> None:
    clock = FakeClock()

    class Recursive(nn.Module):
        def forward(self, depth: int) -> int:
            clock.now += MS
            return self(depth - 1) if depth else 0

    model = Recursive()
    tree = CallTree(model)
    with tree.timed(clock):
        model(2)
    assert [node.nanoseconds for node in tree.nodes] == [3 * MS, 2 * MS, MS]


def test_modules_called_in_another_order_in_the_next_round_are_matched() -> None:
    clock = FakeClock()
    one, two = Takes(clock, 1), Takes(clock, 5)

    class Alternates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.turn = one, two, 0

        def forward(self, x: Any) -> Any:
            self.turn += 1
            return self.two(self.one(x)) if self.turn % 2 else self.one(self.two(x))

    figures = profile_of(Alternates(), clock, rounds=4)
    assert rows(figures)[1:] == [("one", 1, 1, 1), ("two", 1, 5, 5)]


def test_a_module_that_first_runs_in_a_later_round_has_zeros_before() -> None:
    clock = FakeClock()

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.turn = Takes(clock, 2), 0

        def forward(self, x: Any) -> Any:
            self.turn += 1
            clock.now += MS
            return self.part(x) if self.turn > 2 else x

    figures = profile_of(Late(), clock, rounds=3)
    assert figures.modules[1].calls.seconds == (0.0, 0.0, 0.002)
    assert figures.modules[1].calls.calls == pytest.approx(1 / 3)


def test_a_call_whose_error_is_caught_is_timed() -> None:
    clock = FakeClock()

    class Fails(nn.Module):
        def forward(self, x: Any) -> Any:
            clock.now += 3 * MS
            raise ValueError("no")

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.last = Fails(), Takes(clock, 2)

        def forward(self, x: Any) -> Any:
            try:
                return self.fails(x)
            except ValueError:
                return self.last(x)

    assert rows(profile_of(Catches(), clock)) == [
        ("", 1, 5, 0),
        ("fails", 1, 3, 3),
        ("last", 1, 2, 2),
    ]


def test_the_work_of_modules_that_only_a_later_pass_calls_is_their_callers() -> None:
    clock = FakeClock()
    model = Takes(clock, 1, Takes(clock, 2, Takes(clock, 3)))
    tree = CallTree(model)
    root = tree.enter(model, None)
    late = tree.enter(model.parts[0], root)
    later = tree.enter(late.module.parts[0], late)  # type: ignore[union-attr, index]
    root.count = 1
    tree.end_round(0, 1, tree.take())
    root.work, late.work, later.work = (Work(bytes=n) for n in (1, 20, 300))
    assert tree.timed_nodes() == [root]
    assert root.work == Work(bytes=321)


def test_hooks_are_removed_and_leave_the_fused_path_of_an_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    tree = CallTree(layer)
    with torch.inference_mode(), tree.timed(FakeClock()):
        layer(torch.ones(1, 3, 8))
    assert [node.module for node in tree.nodes] == [layer]
    with torch.enable_grad(), tree.timed(FakeClock()):
        layer(torch.ones(1, 3, 8))
    assert len(tree.nodes) > 4, "its children are called where gradients are on"
    count = tree.nodes[0].count
    layer(torch.ones(1, 3, 8))
    assert tree.nodes[0].count == count


def test_the_cost_of_a_hook_is_a_few_microseconds() -> None:
    import time

    inside, outside = hook_cost(time.perf_counter_ns)
    assert inside > 0
    assert outside >= 0
    assert inside + outside < 1e-3
