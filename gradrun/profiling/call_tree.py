"""The tree of module calls: which module calls which, with the time and work of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from gradrun.inference.module_calls import track_module_calls
from gradrun.results.work import Work

Clock = Callable[[], int]
"""Nanoseconds."""

T = TypeVar("T")


@dataclass(eq=False)
class CallNode:
    """One module called by one other."""

    module: nn.Module
    parent: int
    index: int
    children: dict[nn.Module, CallNode] = field(default_factory=dict)
    nanoseconds: int = 0
    """In the current round."""
    count: int = 0
    """Calls in the current round."""
    rounds: list[float] = field(default_factory=list)
    """Seconds per batch."""
    calls: list[float] = field(default_factory=list)
    """Per batch, for each round."""
    work: Work | None = None
    """Of one batch, without children."""
    peak: int | None = None
    """Bytes."""


class CallTree:
    """The nodes that passes over one model have found, callers first."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.nodes: list[CallNode] = []
        self._paths: dict[nn.Module, str] = {m: path for path, m in model.named_modules()}

    def path(self, node: CallNode) -> str:
        """Return the path of a node's module in the model."""
        return self._paths.get(node.module, "(outside the model)")

    def enter(self, module: nn.Module, caller: CallNode | None) -> CallNode:
        """Return the node of a module that `caller` calls, created on its first call.

        Calls outside of a call of the model count as calls by the model.
        """
        if caller is None:
            if not self.nodes:
                self.nodes.append(CallNode(self.model, -1, 0))
            caller = self.nodes[0]
            if module is self.model:
                return caller
        node = caller.children.get(module)
        if node is None:
            node = CallNode(module, caller.index, len(self.nodes))
            caller.children[module] = node
            self.nodes.append(node)
        return node

    @contextmanager
    def tracked(
        self, begin: Callable[[CallNode], T], end: Callable[[CallNode, T], None]
    ) -> Iterator[Callable[[], CallNode | None]]:
        """Call `begin` and `end` around each module call; yield a function for the running node.

        `end` gets the value that `begin` returned; it follows a call that raised, too.
        """

        def running() -> CallNode | None:
            return calls[-1][1][0] if calls else None

        def enter(module: nn.Module, _: Any) -> tuple[CallNode, T]:
            node = self.enter(module, running())
            return node, begin(node)

        def leave(_: nn.Module, value: tuple[CallNode, T], __: Any) -> None:
            end(*value)

        with track_module_calls(enter, leave, always_leave=True) as stack:
            calls = stack.calls
            yield running

    @contextmanager
    def timed(self, now: Clock) -> Iterator[None]:
        """Add the time of each call in the block to its node; `now` is read inside of the hooks."""

        def end(node: CallNode, began: int) -> None:
            node.nanoseconds += now() - began
            node.count += 1

        with self.tracked(lambda _: now(), end):
            yield

    def timed_nodes(self) -> list[CallNode]:
        """Return the nodes that were called in the rounds.

        The work of other nodes, which only a later pass called, is added to that of their callers.
        """
        for node in reversed(self.nodes):
            if not any(node.calls) and node.work:
                caller = self.nodes[node.parent]
                caller.work, node.work = (caller.work or Work()) + node.work, None
        return [node for node in self.nodes if any(node.calls)]

    def take(self) -> list[tuple[int, int]]:
        """Return the nanoseconds and calls of each node, and set them to 0."""
        taken = [(node.nanoseconds, node.count) for node in self.nodes]
        for node in self.nodes:
            node.nanoseconds = node.count = 0
        return taken

    def end_round(self, number: int, batches: int, taken: list[tuple[int, int]]) -> None:
        """Store the sums that `take` returned as the round with a number, from 0, per batch."""
        taken = taken + [(0, 0)] * (len(self.nodes) - len(taken))
        for node, (nanoseconds, count) in zip(self.nodes, taken, strict=True):
            missing = [0.0] * (number - len(node.rounds))
            node.rounds += [*missing, nanoseconds * 1e-9 / batches]
            node.calls += [*missing, count / batches]


def host_clock(device: torch.device) -> Clock:
    """Return a clock that waits for the work of an accelerator before it is read."""
    synchronize = {
        "cuda": lambda: torch.cuda.synchronize(device),
        "mps": lambda: torch.mps.synchronize(),
    }.get(device.type)
    if synchronize is None:
        return time.perf_counter_ns

    def now() -> int:
        synchronize()
        return time.perf_counter_ns()

    return now


class _Empty(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


_CALLS, _REPEATS = 200, 15


def hook_cost(now: Clock) -> tuple[float, float]:
    """Return the seconds that timing costs per call of an empty module: (inside, outside)."""
    module, insides, totals = _Empty(), [], []
    around = nn.Sequential(*[module] * _CALLS)
    tree = CallTree(around)
    for _ in range(_REPEATS):
        began = now()
        around(None)
        plain = now() - began
        began = now()
        for _ in range(_CALLS):
            module.forward(None)
        direct = now() - began
        with tree.timed(now):
            began = now()
            around(None)
            hooked = now() - began
        node = tree.nodes[-1]
        insides.append((node.nanoseconds - direct) / _CALLS)
        totals.append((hooked - plain) / (_CALLS + 1))
        tree.take()
    inside = max(0.0, sorted(insides)[_REPEATS // 2] * 1e-9)
    total = max(0.0, sorted(totals)[_REPEATS // 2] * 1e-9)
    inside = min(inside, total)
    return inside, total - inside
