"""What torch.compile makes of a model under each mode: graph breaks and compiles, in plain English.

Knows dynamo's own explanations; compiles with a backend that runs graphs as they are, so that no
compiler is needed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gradrun.audits.target import AuditTarget
from gradrun.core.errors import first_line
from gradrun.core.grad_mode import GradMode
from gradrun.inference.module_state import preserve_module_state
from gradrun.results.result import Finding

_OF_MODES = re.compile(
    r"\b(no_grad|enable_grad|set_grad_enabled|inference_mode|__enter__|__exit__)\b|context manager"
)
_TORCH = Path(torch.__file__).parent


def compiled(subject: AuditTarget, modes: Sequence[GradMode]) -> Iterable[Finding]:
    """Graph breaks, those of modes told from others, and how often it is compiled for `modes`."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in subject.model.modules()):
        return  # it is compiled already
    graphs: dict[GradMode, int] = {}
    with _dynamo() as dynamo, preserve_module_state(subject.model):
        counted = _Counted()
        traced: Any = torch.compile(subject.model, backend=counted)
        for mode in modes:
            counted.graphs = 0
            in_mode = _in_mode(subject, mode)
            try:
                replace(in_mode, model=traced).run(subject.copy())
            except Exception as error:
                yield _not_traced(error)
                return
            graphs[mode] = counted.graphs
        dynamo.reset()
        batch = subject.copy()
        with subject.active():
            explained = dynamo.explain(subject.model)(*batch.args, **batch.kwargs)
    yield from _breaks(explained)
    if sum(graphs.values()) > 1:
        listed = ", ".join(f"{count} in {mode}" for mode, count in graphs.items())
        yield Finding(
            severity="info",
            code="compiles_per_mode",
            text=f"torch.compile makes its graphs anew for each mode: {listed}",
            advice="Keep to one mode in a process, so that it compiles once",
        )


class _Counted:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def _in_mode(subject: AuditTarget, mode: GradMode) -> AuditTarget:
    return replace(subject, config=subject.config.replace({"run.mode": mode}))


@contextmanager
def _dynamo() -> Iterator[Any]:
    """Dynamo as new, silent, and left as new."""
    import torch._dynamo as dynamo

    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    dynamo.reset()
    try:
        yield dynamo
    finally:
        dynamo.reset()
        logger.setLevel(level)


def _not_traced(error: Exception) -> Finding:
    return Finding(
        severity="info",
        code="not_compiled",
        text=f"torch.compile cannot take it: {type(error).__name__}: {first_line(error)}",
        advice="Run it without model.compile",
    )


def _breaks(explained: Any) -> Iterator[Finding]:
    others = []
    for broken in explained.break_reasons:
        if not broken.graph_break:
            continue
        frames = [f for f in broken.user_stack if not Path(f.filename).is_relative_to(_TORCH)]
        frame = (frames or broken.user_stack or [None])[-1]
        source = f"{frame.filename}:{frame.lineno}" if frame else None
        reason = broken.reason.splitlines()[0]
        line = (frame.line or "") if frame else ""
        if not _OF_MODES.search(f"{reason} {line}"):
            others.append((source, reason))
            continue
        yield Finding(
            severity="warning",
            code="mode_breaks_graph",
            source=source,
            text=f"torch.compile breaks its graph where the mode is changed: {reason}",
            advice="Use torch's own guards, or gradrun.modes', in a with block that begins in the "
            "compiled function",
        )
    if others:
        source, reason = others[0]
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        yield Finding(
            severity="info",
            code="graph_breaks",
            source=source,
            text=f"torch.compile breaks its graph, not because of a mode: {reason}{more}",
            advice="",
        )
