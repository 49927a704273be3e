"""Time variants with and without hooks in interleaved blocks, in random order."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from gradrun.core.progress import Progress, ProgressCallback
from gradrun.inference.module_state import preserve_module_state
from gradrun.profiling.call_tree import Clock
from gradrun.profiling.variant import ProfiledVariant
from gradrun.results import stats

MIN_ROUNDS, MAX_ROUNDS = 11, 101
_BLOCK_SECONDS = 0.01
"""Minimum length of a block, of which the median pass counts."""

_SECONDS = 4.0
"""Timing of each variant, unless its intervals are narrow before."""

_LEAST_SECONDS = 1.0
_MAX_OVERTIME = 5


def time_rounds(
    variants: Sequence[ProfiledVariant], now: Clock, budget: float, progress: ProgressCallback
) -> None:
    """Time rounds of two blocks per variant, until the intervals are narrow or the time is spent.

    Blocks are a whole number of passes over the batches of a variant. Each variant gets 11 rounds
    even if they take longer than `budget` seconds, up to five times as long.
    """
    seconds = min(budget, _SECONDS * len(variants))
    blocks = [(variant, hooks) for variant in variants for hooks in (False, True)]
    shuffled = random.Random(0)  # noqa: S311 - an order, not a secret
    with _states(variants):
        began = time.monotonic()
        for done in range(MAX_ROUNDS):
            spent = time.monotonic() - began
            if done >= MIN_ROUNDS and (spent > seconds or _are_precise(variants, spent)):
                return
            if done > 1 and spent > _MAX_OVERTIME * seconds:
                return
            progress(Progress("timing modules", done, max(done + 1, MIN_ROUNDS)))
            shuffled.shuffle(blocks)
            for variant, hooks in blocks:
                pass_seconds = max(variant.batch_seconds * len(variant.batches), 1e-7)
                variant.time_block(math.ceil(_BLOCK_SECONDS / pass_seconds), now, hooks=hooks)


def _are_precise(variants: Sequence[ProfiledVariant], spent: float) -> bool:
    if spent < min(_LEAST_SECONDS, _SECONDS) * len(variants):
        return False
    estimates = [(stats.quantile(v.plain, 0.5), v.config.measure.precision) for v in variants]
    return all(found and found.relative <= precision for found, precision in estimates)


@contextmanager
def _states(variants: Sequence[ProfiledVariant]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in {id(variant.model): variant.model for variant in variants}.values():
            stack.enter_context(preserve_module_state(model))
        yield
