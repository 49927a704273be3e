"""Conditions for tests that need a newer torch than the oldest supported one."""

from __future__ import annotations

import pytest
import torch

IS_OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)

needs_torch_2_13 = pytest.mark.skipif(
    IS_OLD, reason="needs torch 2.13: torch.compile of guards, and the format of bundled programs"
)
