"""Profile operators and memory with torch's profiler, attributed to the modules of a call tree.

The profiler slows the forward down, so its times are apart from those of the modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import profiler as torch_profiler

from gradrun.inference.meters.cpu_memory import quiet_stderr
from gradrun.inference.module_state import preserve_module_state
from gradrun.profiling.call_tree import CallNode
from gradrun.profiling.trace import BATCH, Span, Trace
from gradrun.profiling.variant import ProfiledVariant
from gradrun.results.profile import OperatorTime

TRACED_BATCHES = 3

_MARK = "gradrun module "
_SHOWN = 10


@dataclass(frozen=True)
class OperatorPass:
    """The operators that take most, and the trace of some batches."""

    operators: tuple[OperatorTime, ...]
    seconds: float
    """Per batch, of all operators."""
    trace: Trace


def profile_operators(variant: ProfiledVariant) -> OperatorPass:
    """Run some batches under the profiler, and store each module's peak of memory in its node.

    An additional first batch, in which the profiler starts, is left out of the times.
    """
    profile: Any = torch_profiler.profile  # not typed in torch
    profiler = profile(use_cpu=True, record_shapes=True, profile_memory=True, acc_events=False)
    tree = variant.tree

    def begin(node: CallNode) -> Any:
        mark: Any = torch_profiler.record_function(f"{_MARK}{node.index}")
        mark.__enter__()
        return mark

    def end(_: CallNode, mark: Any) -> None:
        mark.__exit__(None, None, None)

    batches = [variant.largest for _ in range(1 + TRACED_BATCHES)]
    with (
        preserve_module_state(variant.model),
        variant.execution_context(),
        quiet_stderr(),
        profiler,
    ):
        for batch in batches:
            hooks = tree.tracked(begin, end) if variant.hooks else nullcontext()
            with torch_profiler.record_function(BATCH), hooks:
                variant.run(batch)
    events = sorted(
        profiler.kineto_results.events(), key=lambda e: (e.start_ns(), -e.duration_ns())
    )
    _measure_peaks(events, tree.nodes, variant.device.type)
    start = [event.start_ns() for event in events if event.name() == BATCH][1]
    spans = tuple(_spans(events, start))
    labels = [f"{tree.path(n) or '(the model)'} ({type(n.module).__name__})" for n in tree.nodes]
    return OperatorPass(
        *_longest(spans, labels),
        trace=Trace(spans=spans, labels=tuple(labels), memory=tuple(_memory(events, start))),
    )


@dataclass
class _Open:
    """A range that has not ended: an operator, or a module."""

    event: Any
    end: int
    node: int
    inner: int = 0
    """Nanoseconds in the operators that it calls."""
    level: int = 0
    peak: int = 0


def _spans(events: Sequence[Any], begin: int) -> Iterator[Span]:
    """Yield the ranges from a time on, with the time that is their own."""
    main = next((e.start_thread_id() for e in events if e.name() == BATCH), 0)
    stack: list[_Open] = []

    def close(one: _Open) -> Span:
        event = one.event
        return Span(
            name=event.name(),
            module=one.node,
            start=event.start_ns() - begin,
            duration=event.duration_ns(),
            own=event.duration_ns() - one.inner,
            shapes=" ".join(str(shape) for shape in event.shapes() if shape),
            is_operator=not event.name().startswith("gradrun "),
        )

    for event in events:
        if event.start_thread_id() != main or event.start_ns() < begin or not event.duration_ns():
            continue
        while stack and stack[-1].end <= event.start_ns():
            yield close(stack.pop())
        node = stack[-1].node if stack else -1
        if event.name().startswith(_MARK):
            node = int(event.name().removeprefix(_MARK))
        elif stack and not stack[-1].event.name().startswith("gradrun "):
            stack[-1].inner += event.duration_ns()
        stack.append(_Open(event, event.start_ns() + event.duration_ns(), node))
    while stack:
        yield close(stack.pop())


def _longest(
    spans: Sequence[Span], labels: Sequence[str]
) -> tuple[tuple[OperatorTime, ...], float]:
    """Return the operators that take most, and the seconds of all, both per batch."""
    times: dict[tuple[str, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for span in spans:
        if span.is_operator:
            key = (span.name.removeprefix("aten::"), span.shapes)
            times[key][span.module] += span.own
            calls[key] += 1
    ordered = sorted(times.items(), key=lambda item: -sum(item[1].values()))
    operators = tuple(
        OperatorTime(
            name=name,
            shapes=shapes,
            calls=calls[name, shapes] / TRACED_BATCHES,
            seconds=sum(by_module.values()) * 1e-9 / TRACED_BATCHES,
            modules=tuple(
                labels[node] if node >= 0 else "(the model)"
                for node, _ in sorted(by_module.items(), key=lambda item: -item[1])
            ),
        )
        for (name, shapes), by_module in ordered[:_SHOWN]
    )
    total = sum(sum(by_module.values()) for by_module in times.values())
    return operators, total * 1e-9 / TRACED_BATCHES


def _measure_peaks(events: Sequence[Any], nodes: Sequence[CallNode], device: str) -> None:
    """Store the peak of live bytes of each module above the level at its call."""
    kind = {
        "cpu": torch.profiler.DeviceType.CPU,
        "cuda": torch.profiler.DeviceType.CUDA,
    }.get(device)
    if kind is None:
        return
    live, stack = 0, list[_Open]()

    def close(ended: _Open) -> None:
        node = nodes[ended.node]
        node.peak = max(node.peak or 0, ended.peak - ended.level)
        if stack:
            stack[-1].peak = max(stack[-1].peak, ended.peak)

    for event in events:
        while stack and stack[-1].end <= event.start_ns():
            close(stack.pop())
        if event.name().startswith(_MARK):
            node_index = int(event.name().removeprefix(_MARK))
            end = event.start_ns() + event.duration_ns()
            stack.append(_Open(event, end, node_index, level=live, peak=live))
        elif event.name() == "[memory]" and event.device_type() == kind:
            live += event.nbytes()
            if stack:
                stack[-1].peak = max(stack[-1].peak, live)
    while stack:
        close(stack.pop())


def _memory(events: Sequence[Any], begin: int) -> Iterator[tuple[int, int]]:
    """Yield the time and the live bytes after each allocation from a time on."""
    live = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            if event.start_ns() >= begin:
                yield event.start_ns() - begin, live
