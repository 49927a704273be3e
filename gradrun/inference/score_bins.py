"""Bins of scores for a ROC curve in bounded memory."""

from __future__ import annotations

import numpy as np
import torch

_SAMPLED_SCORES = 1 << 20


class ScoreBins:
    """Bins with about equally many scores, from quantiles of a random sample of them.

    Bins of equal width would hold most scores in one of them where scores are close together or one
    of them is far away.
    """

    def __init__(self, count: int) -> None:
        """Prepare `count` bins; see `add`, then `divide`."""
        self._count = count
        self._generator = np.random.default_rng(0)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: torch.Tensor | None = None
        self._edges = torch.empty(0)

    def add(self, rows: torch.Tensor) -> None:
        """Sample rows of scores [n, columns]: those with the smallest random keys stay."""
        keys = torch.from_numpy(self._generator.random(len(rows)))
        self._keys = torch.cat([self._keys, keys])
        self._rows = rows if self._rows is None else torch.cat([self._rows, rows])
        limit = max(self._count, _SAMPLED_SCORES // max(1, rows.shape[1]))
        if len(self._keys) > limit:
            kept = self._keys.topk(limit, largest=False).indices
            self._keys, self._rows = self._keys[kept], self._rows[kept]

    @property
    def sample(self) -> torch.Tensor:
        """The sampled rows [n, columns]."""
        assert self._rows is not None
        return self._rows

    def divide(self, scores: torch.Tensor) -> None:
        """Set the bins of each column to quantiles of finite scores [n, columns]."""
        finite = scores.isfinite()
        ordered = scores.masked_fill(~finite, torch.inf).sort(0).values
        last = (finite.sum(0) - 1).clamp(min=0)
        positions = torch.arange(self._count)[:, None] * last // (self._count - 1)
        self._edges = ordered.gather(0, positions).T.contiguous()

    @property
    def thresholds(self) -> torch.Tensor:
        """Lower limits of the numbers from `place`, and 1, which they do not reach."""
        return torch.arange(self._count + 2, dtype=torch.float64) / (self._count + 1)

    def place(self, scores: torch.Tensor) -> torch.Tensor:
        """Replace scores [n, columns] by the positions of their bins, from 0 to below 1."""
        bins = torch.searchsorted(
            self._edges.expand(scores.shape[1], -1).contiguous(),
            scores.T.contiguous(),
            right=True,
        )
        return bins.T.double() / (self._count + 1)
