"""The confirmation of a setting, with planted speeds, outputs and starts."""

from __future__ import annotations

from typing import Any

import pytest

from gradrun.config.schema import RunConfig
from gradrun.tuning.confirm import Confirmation, confirm
from tests.support.lanes import Planted
from tests.support.planted_search import Plan, PlantedSearch, move

SEED = move("seed", "process", {"run.seed": 1})


def twice_as_fast(config: RunConfig) -> Planted:
    return Planted(0.0005 if config.run.seed else 0.001)


def confirmed(plan: Plan, first: Plan = twice_as_fast, **tune: Any) -> Confirmation:
    """Find a setting that the search measures with `first`, and confirm it with `plan`."""
    found = PlantedSearch(first, (SEED,), tune)
    best = found.search.run()
    assert best.changes == {"run.seed": 1}
    found.plan = plan
    confirmation = confirm(found.search, best)
    assert all(lane.closed for lane in found.opened)
    return confirmation


def test_a_setting_that_fails_when_it_starts_again_is_refused() -> None:
    found = confirmed(lambda c: Planted(0.001, fails="out of memory" if c.run.seed else ""))
    assert found.refused == "failed in a fresh process: out of memory"
    assert found.measurements == []


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_a_gain_that_fresh_processes_do_not_show_is_refused(ratio: float) -> None:
    found = confirmed(lambda c: Planted(0.001 / ratio if c.run.seed else 0.001))
    assert found.refused == f"{ratio:.3f} x as fast as the baseline in fresh processes"
    assert not found.accepted


def test_a_peak_over_the_limit_in_a_fresh_process_is_refused() -> None:
    found = confirmed(
        lambda c: Planted(0.0005 if c.run.seed else 0.001, peak=(100 + 99 * c.run.seed) * 2**20),
        memory="150 MiB",
    )
    assert found.refused == "process peak 199.00 MiB"


def test_a_share_is_bounded_by_as_many_samples_as_it_needs() -> None:
    """Of n samples without another class, up to 1 - 0.05^(1/n) of all samples may have one."""
    found = confirmed(twice_as_fast, within={"top1": 0.999})
    assert found.accepted
    assert found.deviation
    assert 1 - 0.05 ** (1 / found.deviation.samples) <= 0.001
    few = confirmed(twice_as_fast, within={"top1": 0.9999})  # of 16,384 samples
    assert few.refused == ""
    assert few.undecided.endswith("at least 29,956 samples are needed")
    assert 1 - 0.05 ** (1 / 29_956) <= 0.0001 < 1 - 0.05 ** (1 / 29_955)


def test_batches_are_repeated_until_they_bound_the_percentile() -> None:
    found = confirmed(twice_as_fast, p99="100 ms")
    assert found.accepted
    assert len(found.batch_seconds) >= 367
    slow = confirmed(twice_as_fast, p99="4 ms")  # 8 samples of 0.5 ms
    assert slow.accepted
    late = confirmed(lambda c: Planted(0.0006 if c.run.seed else 0.001), p99="4.5 ms")
    assert late.refused == "99th percentile up to 4.80 ms"


def test_a_start_that_the_job_does_not_pay_is_refused() -> None:
    """10 s later, and 0.5 ms less per sample: it pays after 20,000 samples."""
    plan = lambda c: Planted(0.0005 if c.run.seed else 0.001, start=2 + 10 * c.run.seed)  # noqa: E731
    found = confirmed(plan, steady=False, samples=19_000)
    assert found.break_even == pytest.approx(20_000, abs=1)
    assert found.refused == (
        "2.00 x as fast, but it starts 10.0 s later, which pays after 20,000 samples; the job has "
        "19,000 (--steady ignores the start, --samples sets the size of a job)"
    )
    assert confirmed(plan, steady=False, samples=21_000).accepted
    assert confirmed(plan, steady=True, samples=19_000).accepted
