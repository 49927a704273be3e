"""Detect where a model changes the gradient mode itself: module, source line and effect."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.utils import _contextlib

from gradrun import modes
from gradrun.audits.saved_tensors import unused_saved_bytes
from gradrun.audits.target import AuditTarget, source_of
from gradrun.core.grad_mode import GradMode
from gradrun.core.units import format_bytes
from gradrun.inference.module_calls import ModuleCallStack, track_module_calls
from gradrun.inference.module_state import preserve_module_state
from gradrun.modes import ModeState, observe
from gradrun.results.result import Finding, Severity

_GUARDS: list[Any] = [
    torch.no_grad,
    torch.enable_grad,
    torch.set_grad_enabled,
    torch.inference_mode,
    modes.ModeGuard,
]
_ENTRIES: set[CodeType] = {
    torch.no_grad.__enter__.__code__,
    torch.enable_grad.__enter__.__code__,
    torch.set_grad_enabled.__init__.__code__,
    torch.inference_mode.__enter__.__code__,
    modes.ModeGuard.__enter__.__code__,
}
_EXITS: set[CodeType] = {guard.__exit__.__code__ for guard in _GUARDS}
_DECORATED = {"decorate_context", "generator_context", "covered"}
"""Names of the wrappers that torch and modes.py put around a decorated function."""

_MACHINERY = {
    str(file)
    for file in (
        torch.autograd.grad_mode.__file__,
        _contextlib.__file__,
        modes.__file__,
        sys.modules["contextlib"].__file__,
    )
}


@dataclass(frozen=True)
class Switch:
    """A change of the mode inside a forward."""

    module: nn.Module | None
    source: str | None
    before: ModeState
    after: ModeState


def mode_switches(subject: AuditTarget) -> Iterable[Finding]:
    """Report modules that switch the mode, and forwards that do not restore it."""
    found: dict[Switch, None] = {}
    leaks: dict[nn.Module, tuple[ModeState, ModeState]] = {}

    def leave(module: nn.Module, before: ModeState, _: Any) -> None:
        after = observe()
        if after != before and not leaks:  # the innermost module returns first
            leaks[module] = before, after

    batch = subject.copy()
    with (
        preserve_module_state(subject.model),
        track_module_calls(lambda *_: observe(), leave) as calls,
        _record_switches(calls, subject, found),
    ):
        subject.run(batch)
    for module, (before, after) in leaks.items():
        yield Finding(
            severity="error",
            code="leaves_mode",
            modes=(subject.mode,),
            module=subject.label(module),
            source=source_of(module),
            text=f"The forward starts in {before} and leaves the thread in {after}",
            advice="Use a with block: a plain call of torch.set_grad_enabled(...), or a guard "
            "entered by hand, stays in effect for the rest of the thread",
        )
    tracked = any(switch.after.records for switch in found)
    costs = unused_saved_bytes(subject) if tracked else {}
    for switch in found:
        label = subject.label(subject.model if switch.module is None else switch.module)
        yield _finding(subject.mode, label, switch, costs.get(label))


def _finding(mode: GradMode, label: str, switch: Switch, cost: int | None) -> Finding:
    before, after = switch.before, switch.after
    severity: Severity
    if after.records:
        severity, code = "warning", "enables_grad"
        saves = (
            f", and saves {format_bytes(cost)} for a backward pass that never runs" if cost else ""
        )
        text = f"Enables gradients inside {mode}{saves}"
        advice = "Let the caller set the mode, or use gradrun.modes.conditional_no_grad"
    elif after.inference and after.grad and not before.grad:
        severity, code = "info", "redundant_enable_grad"
        text = "Enables gradients inside inference_mode, where operations are never recorded"
        advice = "To record gradients, leave the mode with torch.inference_mode(False)"
    elif before.records:
        severity, code = "info", "stops_gradients"
        text = f"Switches to {after}: tensors computed there carry no gradient"
        advice = "No change needed for inference; in training this module receives no gradient"
    else:
        severity, code = "info", "switches"
        text = f"Switches from {before} to {after}"
        advice = ""
    return Finding(
        severity=severity,
        code=code,
        modes=(mode,),
        module=label,
        source=switch.source,
        text=text,
        advice=advice,
        cost=cost if after.records else None,
    )


# --- detecting switches --------------------------------------------------------------------------


@contextmanager
def _record_switches(
    calls: ModuleCallStack[ModeState], subject: AuditTarget, found: dict[Switch, None]
) -> Iterator[None]:
    """Record the switches that Python code makes while the block runs.

    A profile function sees each call of a guard without changing torch's behavior. A torch
    function mode would change it: nn.TransformerEncoderLayer leaves its fused path under one.
    """
    current: ModeState | None = None

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal current
        entry = event == "return" and (frame.f_code in _ENTRIES or frame.f_code in _EXITS)
        if not entry and not (event == "c_return" and arg is torch._C._set_grad_enabled):
            return
        after, before = observe(), current
        if after == before:
            return
        current = after
        if before is None or not calls.calls:  # the mode of the run, not a switch of the model
            return
        site = _site(frame)
        if site:
            found[Switch(calls.innermost, site, before, after)] = None

    earlier = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(earlier)


def _site(frame: FrameType | None) -> str | None:
    """Return file:line of the code that switched the mode; None if a guard only restores it."""
    while frame is not None:
        code = frame.f_code
        if code in _EXITS:
            return None
        if code.co_filename not in _MACHINERY:
            return f"{code.co_filename}:{frame.f_lineno}"
        if code.co_name in _DECORATED:
            function = frame.f_locals.get("func") or frame.f_locals.get("function")
            inner = getattr(function, "__code__", None)
            if inner:
                return f"{inner.co_filename}:{inner.co_firstlineno}"
        frame = frame.f_back
    return None
