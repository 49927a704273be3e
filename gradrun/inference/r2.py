"""The coefficient of determination, without cancellation for labels far from 0."""

from __future__ import annotations

import torch

_ROUNDING = 2.0**-50
"""Relative difference between equal float64 labels and their mean."""


class R2:
    """R² over chunks: squared deviations from the mean of each chunk are combined in float64.

    Sums of squares of the labels themselves would cancel for labels such as timestamps.
    """

    def __init__(self) -> None:
        self._samples = 0
        self._mean: torch.Tensor | float = 0.0
        self._deviations: torch.Tensor | float = 0.0
        self._errors: torch.Tensor | float = 0.0

    def update(self, values: torch.Tensor, labels: torch.Tensor) -> None:
        """Add values and labels of some samples, [n, numbers per sample]."""
        added, samples = len(labels), self._samples + len(labels)
        mean = labels.mean(0)
        step = mean - self._mean
        between = step.square() * (self._samples * added / samples)
        self._deviations = self._deviations + (labels - mean).square().sum(0) + between
        self._mean = self._mean + step * (added / samples)
        self._errors = self._errors + (values - labels).square().sum(0)
        self._samples = samples

    def compute(self) -> torch.Tensor:
        """Return the mean over the numbers of a sample.

        Labels that are all equal have 1 if the values equal them, and else 0.

        Raises:
            ValueError: there are fewer than two samples.
        """
        if self._samples < 2:
            raise ValueError("r2 needs at least two samples")
        errors, deviations = torch.as_tensor(self._errors), torch.as_tensor(self._deviations)
        rounding = self._samples * (_ROUNDING * torch.as_tensor(self._mean)).square()
        varies = deviations > rounding
        return (1 - torch.where(varies, errors / deviations, (errors > 0).double())).mean()
