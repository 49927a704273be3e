"""The gradient modes as torch's own context managers.

Knows what a mode does to the thread, and nothing of models or measuring.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from gradrun.config import GradMode

_GUARDS: dict[GradMode, type[Any]] = {
    GradMode.GRAD: torch.enable_grad,
    GradMode.NO_GRAD: torch.no_grad,
    GradMode.INFERENCE_MODE: torch.inference_mode,
}


def grad_mode(mode: GradMode | str) -> AbstractContextManager[Any]:
    """A fresh guard of torch's for `mode`; one instance entered twice would leak its state.

    Raises:
        ValueError: `mode` is no gradient mode.
    """
    guard: AbstractContextManager[Any] = _GUARDS[GradMode(mode)]()
    return guard
