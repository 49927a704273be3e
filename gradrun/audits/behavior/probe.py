"""What a probe is, and the words in which probes say what they saw.

Knows torch's three blocks and the thread's mode; not which questions are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from gradrun.core.grad_mode import GradMode
from gradrun.modes import observe

BLOCKS: dict[GradMode, type[Any]] = {
    GradMode.GRAD: torch.enable_grad,
    GradMode.NO_GRAD: torch.no_grad,
    GradMode.INFERENCE_MODE: torch.inference_mode,
}
"""mode -> torch's own object for it: the page is about torch, not about our guards."""


class Unavailable(Exception):
    """The installed torch or machine cannot be asked this; the text says why."""


Ask = Callable[[GradMode, torch.device], str]


@dataclass(frozen=True)
class Probe:
    """A question that running it answers, in each mode or once."""

    question: str
    expected: tuple[str, str, str] | str
    """What grad, no_grad and inference_mode give; one text where no mode is chosen."""
    ask: Ask
    """Runs it and says what was seen; the mode is grad where none is chosen.

    It has its thread to itself and may leave that in any mode. What it raises is seen too.
    """
    why: str
    """What it means to who writes code: a sentence or two."""

    def cells(self) -> Iterator[tuple[GradMode | None, str]]:
        """Each mode with what is expected in it; None where no mode is chosen."""
        if isinstance(self.expected, str):
            yield None, self.expected
        else:
            yield from zip(GradMode, self.expected, strict=True)


def block(mode: GradMode) -> AbstractContextManager[Any]:
    """A fresh `with` block of torch's own."""
    entered: AbstractContextManager[Any] = BLOCKS[mode]()
    return entered


def enter_other_mode(mode: GradMode) -> None:
    """Put the thread in a mode that `mode` can be told from."""
    torch.set_grad_enabled(mode is not GradMode.GRAD)


# --- what was seen, in words -------------------------------------------------------------------


def in_all_modes(text: str) -> tuple[str, str, str]:
    """One answer in all three modes."""
    return text, text, text


def yes(seen: bool) -> str:
    """The answer to a question of yes or no."""
    return "yes" if seen else "no"


def on(seen: bool) -> str:
    """The state of a switch."""
    return "on" if seen else "off"


def current_mode() -> GradMode:
    """The mode that the thread is in; inference mode overrules the grad flag."""
    state = observe()
    if state.inference:
        return GradMode.INFERENCE_MODE
    return GradMode.GRAD if state.grad else GradMode.NO_GRAD


def outcome(call: Callable[[], object], saying: str) -> str:
    """Whether a call works, or the type of the error that says `saying`; others are raised on.

    A text that the call returns is itself the answer.
    """
    try:
        answer = call()
    except Exception as error:
        if saying not in str(error):
            raise
        return type(error).__name__
    return answer if isinstance(answer, str) else "works"
