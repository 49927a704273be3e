"""Graph breaks and recompilations of a model under torch.compile in each mode.

The backend runs graphs unchanged, so a compiler is not needed.
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

from gradrun.audits.behavior.snippet import GraphCounter
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
    """Report graph breaks, separated by cause, and recompilations across `modes`."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in subject.model.modules()):
        return  # TorchScript is compiled already
    graphs: dict[GradMode, int] = {}
    with _dynamo() as dynamo:
        counter = GraphCounter()
        traced: Any = torch.compile(subject.model, backend=counter)
        try:
            for mode in modes:
                counter.graphs = 0
                config = subject.config.replace({"run.mode": mode})
                in_mode = replace(subject, config=config, model=traced)
                # Each mode starts from the same state: grad cannot use tensors that
                # inference_mode left behind.
                with preserve_module_state(subject.model):
                    in_mode.run(subject.copy())
                graphs[mode] = counter.graphs
            dynamo.reset()
            batch = subject.copy()
            with preserve_module_state(subject.model), subject.execution_context():
                explained = dynamo.explain(subject.model)(*batch.args, **batch.kwargs)
        except Exception as error:
            yield _not_traced(error)
            return
    yield from _breaks(explained)
    if sum(graphs.values()) > 1:
        listed = ", ".join(f"{count} in {mode}" for mode, count in graphs.items())
        yield Finding(
            severity="info",
            code="compiles_per_mode",
            text=f"torch.compile compiles separate graphs for each mode: {listed}",
            advice="Use one mode per process to compile once",
        )


@contextmanager
def _dynamo() -> Iterator[Any]:
    """Yield dynamo in its initial state with logging off, and reset it afterwards."""
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
        text=f"torch.compile fails: {type(error).__name__}: {first_line(error)}",
        advice="Run the model without model.compile",
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
            text=f"torch.compile breaks the graph at a change of mode: {reason}",
            advice="Use a with block of torch's or gradrun.modes' guards inside the compiled "
            "function",
        )
    if others:
        source, reason = others[0]
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        yield Finding(
            severity="info",
            code="graph_breaks",
            source=source,
            text=f"torch.compile breaks the graph for reasons other than the mode: {reason}{more}",
            advice="",
        )
