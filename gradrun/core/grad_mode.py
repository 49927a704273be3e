"""Names of the gradient modes; gradrun.modes implements them."""

from __future__ import annotations

from enum import StrEnum


class GradMode(StrEnum):
    """How torch handles gradients while a model runs."""

    GRAD = "grad"
    NO_GRAD = "no_grad"
    INFERENCE_MODE = "inference_mode"
