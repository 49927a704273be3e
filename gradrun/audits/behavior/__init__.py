"""What each gradient mode does on the installed torch: the table of questions, and their proof.

Knows torch and the modes; nothing of models, configs or how facts are shown.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from gradrun.audits.behavior import compiled, decorators, scopes, tensors
from gradrun.audits.behavior.probe import Probe, Unavailable
from gradrun.core.grad_mode import GradMode
from gradrun.results.result import Fact

TOPICS: dict[str, tuple[Probe, ...]] = {
    "Inside the block": tensors.INSIDE,
    "r = w * 2 inside (w needs grad)": tensors.MADE,
    "r after the block": tensors.AFTERWARDS,
    "p = Parameter made inside": tensors.PARAMETER,
    "Blocks within blocks: gradients are": scopes.NESTING,
    "Threads: mode of": scopes.THREADS,
    "Generators and asyncio: mode of": scopes.SUSPENDED,
    "torch's decorator covers": decorators.TORCH,
    "gradrun's guard covers": decorators.GUARD,
    "torch.compile": compiled.PROBES,
}
"""topic -> its probes, in the order in which they are told."""


def prove(device: torch.device) -> tuple[Fact, ...]:
    """Ask everything, now and on `device`; changes no mode of the calling thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates some of what is shown
        return tuple(
            _fact(topic, probe, mode, expected, device)
            for topic, probes in TOPICS.items()
            for probe in probes
            for mode, expected in probe.cells()
        )


def _fact(
    topic: str, probe: Probe, mode: GradMode | None, expected: str, device: torch.device
) -> Fact:
    observed, untried = None, ""
    try:
        observed = _in_a_thread_of_its_own(lambda: probe.ask(mode or GradMode.GRAD, device))
    except Unavailable as reason:
        untried = str(reason)
    except Exception as error:  # what torch raises is an answer like any other
        observed = f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Fact(
        topic=topic,
        question=probe.question,
        mode=mode,
        expected=expected,
        observed=None if observed is None else str(observed),
        why=probe.why,
        untried=untried,
    )


def _in_a_thread_of_its_own(ask: Callable[[], str]) -> str:
    """A new thread is in no mode, whatever the caller is in, and what leaks there ends with it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ask).result()
