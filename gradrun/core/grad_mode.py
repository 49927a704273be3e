"""The names of the gradient modes; modes.py gives them life.

Knows no torch and no config, so that modes.py is useful without the rest of the house.
"""

from __future__ import annotations

from enum import StrEnum


class GradMode(StrEnum):
    """How torch treats gradients while the model runs."""

    GRAD = "grad"
    NO_GRAD = "no_grad"
    INFERENCE_MODE = "inference_mode"
