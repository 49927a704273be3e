"""The search with planted speeds, outputs, peaks and clocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradrun.config.run import MeasureSection
from gradrun.config.schema import RunConfig
from gradrun.config.tune import TuneSection
from gradrun.core.errors import RunFailed
from gradrun.results.trials import describe_changes
from gradrun.tuning.constraints import Constraints
from gradrun.tuning.facts import apply
from gradrun.tuning.moves import MOVES, Move, applicable
from gradrun.tuning.tune import _result as tune_result
from tests.support.lanes import Planted
from tests.support.planted_search import PlantedSearch, move, planted_facts

SEED = move("seed", "process", {"run.seed": 1})  # stands for any key
MODE = move("mode", "kernels", {"run.mode": "no_grad"}, {"run.mode": "grad"})
THREADS = move("threads", "kernels", {"run.threads": 1})
WARMUP = move("warmup", "workers", {"run.warmup": 3})


def _doubled(facts: Any) -> list[dict[str, Any]]:
    return [{"data.batch_size": 2 * facts.config.data.batch_size}]


def _interrupt(facts: Any) -> list[dict[str, Any]]:
    raise KeyboardInterrupt


BATCH = Move("batch", "batches", "rounding", _doubled, climbs=True)


def test_a_faster_setting_is_found_and_confirmed_with_its_ratio() -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.001 if config.run.seed == 0 else 0.0005, noise=0.02, process_noise=0.005)

    best, confirmed = PlantedSearch(plan, (SEED, MODE)).run()
    assert best.changes == {"run.seed": 1}
    assert confirmed
    assert confirmed.accepted
    assert confirmed.ratio.value == pytest.approx(2, rel=0.03)
    assert confirmed.ratio.low < confirmed.ratio.value < confirmed.ratio.high


def test_where_nothing_helps_few_of_many_searches_name_a_winner() -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.05, noise=0.02, process_noise=0.02)

    accepted = 0
    for seed in range(20):
        _, confirmed = PlantedSearch(plan, (SEED, MODE, THREADS, WARMUP, BATCH), seed=seed).run()
        accepted += bool(confirmed and confirmed.accepted)
    assert accepted <= 1


def test_settings_that_help_only_together_are_found() -> None:
    def plan(config: RunConfig) -> Planted:
        changed = (config.run.mode == "no_grad") + (config.run.threads == 1)
        return Planted({0: 0.001, 1: 0.0012, 2: 0.0004}[changed])

    best, confirmed = PlantedSearch(plan, (MODE, THREADS)).run()
    assert best.changes == {"run.mode": "no_grad", "run.threads": 1}
    assert confirmed
    assert confirmed.accepted


def test_a_key_that_does_not_pay_is_left_out() -> None:
    """Threads help before the mode changes, and cost nothing afterwards."""

    def plan(config: RunConfig) -> Planted:
        if config.run.warmup == 3:
            return Planted(0.0003)
        return Planted(0.001 if config.run.seed == 0 else 0.0008)

    found = PlantedSearch(plan, (SEED, WARMUP))
    best, _ = found.run()
    assert best.changes == {"run.warmup": 3}
    assert found.search.gains["run.warmup"].value == pytest.approx(8 / 3)


def test_gains_of_the_remaining_keys_are_measured() -> None:
    def plan(config: RunConfig) -> Planted:
        seconds = 0.001 / (2 if config.run.seed else 1) / (1.25 if config.run.warmup == 3 else 1)
        return Planted(seconds)

    found = PlantedSearch(plan, (SEED, WARMUP))
    best, _ = found.run()
    assert best.changes == {"run.seed": 1, "run.warmup": 3}
    assert found.search.gains["run.warmup"].value == pytest.approx(1.25)
    assert found.search.gains["run.seed"].value == pytest.approx(2)


def test_a_climb_ends_where_doubling_no_longer_gains() -> None:
    def plan(config: RunConfig) -> Planted:
        size = config.data.batch_size
        return Planted(0.001 / min(size, 64))

    best, _ = PlantedSearch(plan, (BATCH,)).run()
    assert best.changes == {"data.batch_size": 64}


def test_the_batch_size_is_found_in_large_steps_and_then_in_small_ones() -> None:
    """The best is 128."""

    def plan(config: RunConfig) -> Planted:
        size = config.data.batch_size
        return Planted(0.001 / min(size, 128) * max(1, size / 128))

    rows = tuple(move for move in MOVES if "larger batches" in move.name)
    found = PlantedSearch(plan, rows)
    best, confirmed = found.run()
    assert best.changes == {"data.batch_size": 128}
    assert confirmed
    assert confirmed.ratio.value == pytest.approx(16)
    tried = [trial.changes["data.batch_size"] for trial in found.search.trials]
    assert tried == [64, 512, 128, 256]


def test_a_batch_that_may_not_fit_the_memory_is_not_tried() -> None:
    """Half of the machine's memory, if all memory of the process grew with the batch."""
    (row,) = (move for move in MOVES if move.name == "much larger batches")
    assert row.settings(planted_facts(memory=64 * 2**30, peak=2**30)) == [{"data.batch_size": 64}]
    assert row.settings(planted_facts(memory=15 * 2**30, peak=2**30)) == []


def test_a_race_ends_as_soon_as_its_interval_decides() -> None:
    """Of two settings with blocks of the same duration."""

    def plan(config: RunConfig) -> Planted:
        return Planted(0.001 if config.run.seed == 0 else 0.01, noise=0.01)

    slower = PlantedSearch(plan, (SEED,))
    slower.run()
    equal = PlantedSearch(lambda _: Planted(0.001), (SEED,))
    equal.run()
    assert equal.search.spent.races > 1.5 * slower.search.spent.races


@pytest.mark.parametrize("seed", range(3))
def test_processes_whose_threads_wait_for_a_cpu_decide_nothing(seed: int) -> None:
    """One process in ten takes ten times as long, of every setting."""

    def plan(config: RunConfig) -> Planted:
        seconds = 0.001 if config.run.seed == 0 else 0.0005
        return Planted(seconds, noise=0.01, process_noise=0.01, disturbed=0.1)

    found = PlantedSearch(plan, (SEED,), {"budget": 900}, seed=seed)
    best, confirmed = found.run()
    assert best.changes == {"run.seed": 1}
    assert confirmed
    assert confirmed.accepted
    assert confirmed.ratio.value == pytest.approx(2, rel=0.05)


def test_ctrl_c_keeps_the_best_setting_so_far() -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.001 if config.run.seed == 0 else 0.0005)

    found = PlantedSearch(plan, (SEED, Move("stop", "workers", "rounding", _interrupt)))
    best = found.search.run()
    assert found.search.interrupted
    assert best.changes == {"run.seed": 1}
    assert best.speed == pytest.approx(2)
    assert all(lane.closed for lane in found.opened)


def test_ctrl_c_before_the_baseline_ran_is_raised() -> None:
    def plan(config: RunConfig) -> Planted:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PlantedSearch(plan, (SEED,)).search.run()


@pytest.mark.parametrize("budget", [40, 60, 120])
def test_a_short_budget_confirms_a_setting_that_it_could_race(budget: int) -> None:
    def plan(config: RunConfig) -> Planted:
        seconds = 0.001 if config.run.seed == 0 else 0.0005
        return Planted(seconds, start=2.0, noise=0.02, process_noise=0.01)

    found = PlantedSearch(plan, (SEED, MODE, THREADS, WARMUP), {"budget": budget})
    best, confirmed = found.run()
    assert best.changes["run.seed"] == 1
    assert confirmed
    assert confirmed.accepted
    assert confirmed.ratio.value == pytest.approx(2, rel=0.05)
    assert found.clock.now < 1.3 * budget


def test_the_times_of_the_phases_add_up_to_that_of_the_search() -> None:
    found = PlantedSearch(
        lambda config: Planted(0.001 / (1 + config.run.seed)), (SEED, MODE, THREADS)
    )
    _, confirmed = found.run()
    assert confirmed
    spent = found.search.spent
    assert spent.confirmation > 0
    assert found.clock.now == pytest.approx(
        spent.starts + spent.gates + spent.races + spent.confirmation
    )


def test_batches_by_tokens_are_tried_on_texts_of_many_lengths(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    data = {
        "source": "text", "path": str(tmp_path / "texts.txt"), "tokenizer": "t", "batch_size": 32,
    }  # fmt: skip
    (row,) = (move for move in MOVES if move.name == "tokens per batch")
    tried = row.settings(planted_facts(data=data))
    assert [setting["data.batch_tokens"] for setting in tried] == [1024, 4096]
    assert all(apply(planted_facts(data=data).config, setting) for setting in tried)
    assert row.settings(planted_facts(data=data | {"group_by_length": False})) == []
    assert row.settings(planted_facts(data=data | {"batch_tokens": 512})) == []
    padded = planted_facts(data=data | {"padding": "max_length", "max_length": 8})
    assert row.skip(padded) == "all texts are padded to data.max_length"
    assert row.skip(planted_facts()) == "the data are not texts"


def test_decode_threads_are_tried_on_files(tmp_path: Path) -> None:
    (row,) = (move for move in MOVES if move.name == "decode threads")
    data = {"source": "images", "path": str(tmp_path), "batch_size": 8}
    facts = planted_facts(data=data, cpus=4)
    assert not row.skip(facts)
    assert row.settings(facts) == [{"data.decode_threads": n} for n in (1, 2, 8)]
    fixed = planted_facts(data=data | {"decode_threads": 1}, cpus=1)
    assert row.settings(fixed) == [{"data.decode_threads": 2}]
    assert row.skip(planted_facts()) == "the data are not image or audio files"


def test_a_fast_setting_that_is_wrong_beyond_the_tolerance_is_not_timed() -> None:
    def plan(config: RunConfig) -> Planted:
        if config.run.seed == 0:
            return Planted(0.001)
        return Planted(0.0001, output=lambda i: (1.0 + i % 7) * (1.03 if i % 100 == 0 else 1))

    found = PlantedSearch(plan, (SEED,), {"within": {"max_rel": 0.001}})
    best, _ = found.run()
    assert not best.changes
    (trial,) = found.search.trials
    assert trial.outcome == "differs"
    assert trial.ratio is None


@pytest.mark.parametrize("seed", range(5))
def test_an_error_on_one_sample_in_a_hundred_that_calibration_misses_is_refused(seed: int) -> None:
    """Twice the tolerance, on samples behind those of the calibration."""
    tolerance = 0.01

    def wrong(sample: int) -> float:
        off = sample >= 2000 and sample % 100 == seed
        return 1.0 + sample % 7 + (2 * tolerance * 7 if off else 0)

    def plan(config: RunConfig) -> Planted:
        if config.run.seed == 0:
            return Planted(0.001)
        return Planted(0.0001, output=wrong)

    found = PlantedSearch(plan, (SEED,), {"within": {"max_rel": tolerance}}, seed=seed)
    best, confirmed = found.run()
    assert best.changes  # it passed the calibration
    assert confirmed
    assert not confirmed.accepted
    assert "differ by 0.02 of the greatest" in confirmed.refused


def test_a_memory_hog_is_refused() -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.001) if config.run.seed == 0 else Planted(0.0001, peak=700 * 2**20)

    found = PlantedSearch(plan, (SEED,), {"memory": "600 MiB"})
    best, _ = found.run()
    assert not best.changes
    assert found.search.trials[0].reason == "process peak 700.00 MiB"


def test_a_slow_latency_is_refused() -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.001 / config.data.batch_size**0.5)

    best, confirmed = PlantedSearch(plan, (BATCH,), {"p99": "6 ms"}).run()
    assert best.changes == {"data.batch_size": 32}  # 5.7 ms a batch; 64 take 8 ms
    assert confirmed
    assert confirmed.accepted


def test_a_setting_that_fails_is_recorded_and_the_search_continues() -> None:
    def plan(config: RunConfig) -> Planted:
        if config.run.seed:
            return Planted(fails="worker 1 cannot start: no such operator")
        return Planted(0.0005 if config.run.warmup == 3 else 0.001)

    found = PlantedSearch(plan, (SEED, WARMUP))
    best, _ = found.run()
    assert best.changes == {"run.warmup": 3}
    assert found.search.trials[0].outcome == "failed"
    assert "no such operator" in found.search.trials[0].reason


def _breaks_behind(sample: int, error: BaseException) -> Callable[[int, int], None]:
    def check(start: int, stop: int) -> None:
        if stop > sample:
            raise error

    return check


def test_a_setting_that_fails_behind_the_calibration_does_not_end_the_search() -> None:
    def plan(config: RunConfig) -> Planted:
        if config.run.seed:
            return Planted(0.0001, check=_breaks_behind(5000, RunFailed("sample 5000 is too long")))
        return Planted(0.0005 if config.run.warmup == 3 else 0.001)

    found = PlantedSearch(plan, (SEED, WARMUP))
    best, confirmed = found.run()
    assert best.changes == {"run.warmup": 3}
    assert confirmed
    assert confirmed.accepted
    trial = found.search.trials[0]
    assert (trial.outcome, trial.reason) == ("failed", "sample 5000 is too long")


def test_a_setting_that_fails_when_it_starts_again_does_not_end_the_search() -> None:
    """Equal settings are measured again in fresh processes."""
    starts = 0

    def plan(config: RunConfig) -> Planted:
        nonlocal starts
        if not config.run.seed:
            return Planted(0.0005 if config.run.warmup == 3 else 0.001)
        starts += 1
        return Planted(0.001, fails="no space is left" if starts == 2 else "")

    found = PlantedSearch(plan, (SEED, WARMUP))
    best, _ = found.run()
    assert best.changes == {"run.warmup": 3}
    assert (found.search.trials[0].outcome, starts) == ("failed", 2)


def test_a_leader_that_fails_later_is_replaced_by_the_baseline() -> None:
    starts = 0

    def plan(config: RunConfig) -> Planted:
        nonlocal starts
        broken = _breaks_behind(0, RunFailed("out of memory"))
        if config.run.warmup == 3:
            return Planted(0.0001, check=_breaks_behind(5000, RunFailed("too long")))
        if not config.run.seed:
            return Planted(0.001)
        starts += 1
        return Planted(0.0005, check=broken) if starts > 1 else Planted(0.0005)

    found = PlantedSearch(plan, (SEED, WARMUP))
    best, _ = found.run()
    assert best is found.search.baseline
    assert [(t.outcome, t.reason) for t in found.search.trials] == [
        ("failed", "out of memory"),
        ("failed", "too long"),
    ]


def test_a_baseline_that_fails_behind_the_calibration_is_the_error_of_the_search() -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.0001, check=_breaks_behind(5000, RunFailed("sample 5000 has no file")))

    found = PlantedSearch(plan, (SEED,))
    with pytest.raises(RunFailed, match="sample 5000 has no file"):
        found.search.run()
    assert all(lane.closed for lane in found.opened)


def test_a_race_that_ctrl_c_ends_does_not_count_as_faster() -> None:
    def plan(config: RunConfig) -> Planted:
        check = _breaks_behind(5000, KeyboardInterrupt())
        return Planted(0.0001, check=check) if config.run.seed else Planted(0.001)

    found = PlantedSearch(plan, (SEED,))
    best = found.search.run()
    assert best is found.search.baseline
    assert found.search.interrupted
    (trial,) = found.search.trials
    assert (trial.outcome, trial.reason) == ("not_tried", "its race did not end")
    assert found.saved.popitem()[1].outcome == "not_tried"  # --resume tries it again


def test_ctrl_c_while_a_setting_starts_keeps_the_best_so_far() -> None:
    def plan(config: RunConfig) -> Planted:
        if config.run.warmup == 3:
            raise KeyboardInterrupt
        return Planted(0.001 if config.run.seed == 0 else 0.0005)

    found = PlantedSearch(plan, (SEED, WARMUP))
    best = found.search.run()
    assert found.search.interrupted
    assert best.changes == {"run.seed": 1}
    assert [trial.changes for trial in found.saved.values()] == [{"run.seed": 1}]


def test_a_metric_that_cannot_be_computed_fails_the_setting() -> None:
    def gate(config: RunConfig) -> str:
        raise RunFailed("the process was killed")

    found = PlantedSearch(lambda config: Planted(0.001 / (1 + config.run.seed)), (SEED,))
    found.search.gate = gate
    found.run()
    (trial,) = found.search.trials
    assert (trial.outcome, trial.reason) == ("failed", "the process was killed")


def test_a_metric_that_takes_longer_than_the_budget_is_not_computed() -> None:
    """Over 16,384 samples, of the baseline and of the setting: 33 s."""
    calls: list[int] = []

    def gate(config: RunConfig) -> str:
        calls.append(config.run.seed)
        return ""

    def plan(config: RunConfig) -> Planted:
        return Planted(0.001 / (1 + config.run.seed))

    short = PlantedSearch(plan, (SEED,), {"budget": 60})
    short.search.gate = gate
    best, _ = short.run()
    (trial,) = short.search.trials
    assert not best.changes
    assert not calls
    assert short.search.out_of_time
    assert trial.outcome == "not_tried"
    assert trial.reason == "the metric takes 32.8 s over all data; a larger budget allows it"
    long = PlantedSearch(plan, (SEED,), {"budget": 120})
    long.search.gate = gate
    best, _ = long.run()
    assert best.changes == {"run.seed": 1}
    assert calls == [1]


@pytest.mark.parametrize(("budget", "decided"), [(60, False), (300, True)])
def test_the_budget_is_kept_roughly_with_batches_of_seconds(budget: int, decided: bool) -> None:
    """A batch takes 1.6 s, so that a race of 7 rounds takes 30 s."""

    def plan(config: RunConfig) -> Planted:
        return Planted(0.1 if config.run.seed else 0.2)

    tune = {"budget": budget, "p99": "10s"}
    found = PlantedSearch(plan, (SEED, MODE, THREADS, WARMUP), tune)
    _, confirmed = found.run()
    assert found.clock.now < 1.6 * budget
    assert confirmed
    assert confirmed.undecided
    assert confirmed.ratio.value == pytest.approx(2)
    assert (len(confirmed.starts) >= 3) == decided
    assert "batches do not bound" in confirmed.undecided or not decided


def test_a_start_that_takes_too_long_ends_the_candidate() -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.0001, start=400.0) if config.run.seed else Planted(0.001)

    found = PlantedSearch(plan, (SEED,))
    best, _ = found.run()
    assert not best.changes
    (trial,) = found.search.trials
    assert trial.outcome == "not_tried"
    assert "not ready within" in trial.reason


def test_a_spent_budget_leaves_the_rest_untried_and_is_kept_roughly() -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.001 / (1 + config.run.seed), start=20.0)

    found = PlantedSearch(plan, (SEED, MODE, THREADS, WARMUP), {"budget": 200})
    found.run()
    assert found.search.out_of_time
    assert any(trial.outcome == "not_tried" for trial in found.search.trials)
    assert found.clock.now < 1.3 * 200


def test_a_second_search_continues_where_the_first_ran_out_of_time() -> None:
    def plan(config: RunConfig) -> Planted:
        if config.run.mode == "grad":
            return Planted(0.001, start=20.0, fails="no gradients")
        return Planted(0.001 / (1 + config.run.seed), start=20.0)

    moves = (move("fails", "process", {"run.mode": "grad"}), SEED, THREADS, MODE, WARMUP)
    first = PlantedSearch(plan, moves, {"budget": 200})
    first.run()
    untried = [t.changes for t in first.saved.values() if t.outcome == "not_tried"]
    failed = [t for t in first.saved.values() if t.outcome == "failed"]
    assert untried
    assert [trial.reason for trial in failed] == ["no gradients"]

    second = PlantedSearch(plan, moves, {"budget": 2000}, known=dict(first.saved))
    best, confirmation = second.run()
    assert "run.seed" in best.changes
    assert confirmation
    assert confirmation.accepted
    repeated = [lane.config.run.mode for lane in second.opened]
    assert "grad" not in repeated
    found = {str(trial.changes): trial.outcome for trial in second.search.trials}
    assert found[str(failed[0].changes)] == "failed"
    assert all(found.get(str(changes)) != "not_tried" for changes in untried)


def test_a_longer_start_must_pay_within_the_job() -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.0005, start=30.0) if config.run.seed else Planted(0.001, start=2.0)

    # 28 s later, and 0.5 ms saved per sample: it pays after 56,000 samples.
    short, _ = PlantedSearch(plan, (SEED,), {"steady": False, "samples": 20_000}).run()
    long, confirmed = PlantedSearch(
        plan, (SEED,), {"steady": False, "samples": 200_000, "budget": 2000}
    ).run()
    assert not short.changes
    assert long.changes == {"run.seed": 1}
    assert confirmed
    assert confirmed.accepted
    assert confirmed.break_even == pytest.approx(56_000, rel=0.01)


def test_samples_that_pay_for_a_start_are_those_of_all_blocks() -> None:
    """The first block of a process takes ten times as long, of both settings."""

    def plan(config: RunConfig) -> Planted:
        changed = config.run.seed
        return Planted(
            0.0005 if changed else 0.001,
            start=30.0 if changed else 2.0,
            cost=lambda sample: 10 if sample == 2000 else 1,
        )

    found = PlantedSearch(plan, (SEED,), {"steady": False, "samples": 200_000, "budget": 2000})
    _, confirmed = found.run()
    assert found.search.calibration == (0, 2000)
    assert confirmed
    assert confirmed.break_even == pytest.approx(56_000, rel=0.01)


def test_no_setting_is_opened_twice_before_backward_elimination() -> None:
    found = PlantedSearch(lambda _: Planted(0.001), (SEED, MODE, THREADS, WARMUP, BATCH))
    found.run()
    tried = [describe_changes(t.changes) for t in found.search.trials if t.step != "backward"]
    assert len(tried) == len(set(tried))


def test_bitwise_tries_only_moves_that_may_keep_the_bits() -> None:
    found = PlantedSearch(lambda _: Planted(0.001), (SEED, MODE, BATCH), {"within": "bitwise"})
    found.run()
    assert {trial.step for trial in found.search.trials} == {"process"}
    assert found.search.skipped == {
        "mode": "bitwise equal outputs", "batch": "bitwise equal outputs",
    }  # fmt: skip


def test_kept_keys_are_not_changed() -> None:
    found = PlantedSearch(
        lambda c: Planted(0.001 / c.data.batch_size), (BATCH,), {"keep": ["data.batch_size"]}
    )
    best, _ = found.run()
    assert not best.changes
    assert found.search.skipped == {"batch": "data.batch_size is kept"}


KEPT_BITS = move("seed", "kernels", {"run.seed": 1}, {"run.seed": 2}, ranked=True)


def _tried(found: PlantedSearch) -> list[dict[str, Any]]:
    return [trial.changes for trial in found.search.trials if trial.step == "kernels"]


def test_bundles_go_from_all_settings_over_each_exchanged_to_each_left_out() -> None:
    """Each exchange starts from the best so far: seed 2 replaces seed 1."""

    def plan(config: RunConfig) -> Planted:
        threads = 0.9 if config.run.threads == 1 else 1.0
        return Planted({0: 0.001, 1: 0.0005, 2: 0.0002}[config.run.seed] * threads)

    seed = move("seed", "kernels", {"run.seed": 1}, {"run.seed": 2})
    found = PlantedSearch(plan, (seed, MODE, THREADS))
    best, _ = found.run()
    one = {"run.threads": 1}
    assert _tried(found) == [
        {"run.seed": 1, "run.mode": "no_grad"} | one,
        {"run.seed": 2, "run.mode": "no_grad"} | one,
        {"run.seed": 2, "run.mode": "grad"} | one,
        {"run.mode": "no_grad"} | one,
        {"run.seed": 2} | one,
        {"run.seed": 2, "run.mode": "no_grad"},
    ]
    assert best.changes == {"run.seed": 2} | one  # the mode gains nothing
    assert found.search.gains["run.seed"].value == pytest.approx(5)


def test_a_ranked_setting_is_tried_only_if_the_one_before_is_refused() -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.001 / (1 + config.run.seed))

    found = PlantedSearch(plan, (KEPT_BITS, THREADS))
    best, _ = found.run()
    assert best.changes == {"run.seed": 1}
    assert {"run.seed": 2, "run.threads": 1} not in _tried(found)

    def refused(config: RunConfig) -> Planted:
        wrong = 1.5 if config.run.seed == 1 else 1.0
        return Planted(0.001 / (1 + config.run.seed), output=lambda i: wrong * (1.0 + i % 7))

    found = PlantedSearch(refused, (KEPT_BITS, THREADS))
    best, _ = found.run()
    assert best.changes == {"run.seed": 2}
    assert found.search.trials[0].outcome == "differs"


def test_workers_that_may_not_fit_the_memory_are_not_tried() -> None:
    """Half of the machine's memory, as for larger batches."""
    (row,) = (move for move in MOVES if move.name == "worker processes")
    facts = planted_facts(cpus=8, memory=16 * 2**30, peak=2**30)
    workers = [setting["engine"]["workers"] for setting in row.settings(facts)]
    assert workers == [8, 4, 2]
    large = replace(facts, peak=3 * 2**30)
    assert [setting["engine"]["workers"] for setting in row.settings(large)] == [2]


def test_threads_and_workers_share_the_cpus() -> None:
    (row,) = (move for move in MOVES if move.name == "threads")
    facts = planted_facts(cpus=8)
    two = facts.config.replace({"engine": {"source": "processes", "workers": 2}, "run.threads": 4})
    assert row.settings(replace(facts, config=two)) == [{"run.threads": 2}, {"run.threads": 1}]


def test_cuda_moves_are_tried_on_cuda_devices_only() -> None:
    rows = [move for move in MOVES if move.name in {"batches in flight", "CUDA graphs"}]
    cpu = [(move.name, reason) for move, reason in applicable(rows, planted_facts())]
    assert cpu == [
        ("batches in flight", "the model does not run on a CUDA device"),
        ("CUDA graphs", "the model does not run on a CUDA device"),
    ]
    facts = planted_facts(device="cuda:0")
    assert [reason for _, reason in applicable(rows, facts)] == ["", ""]
    flight, graphs = (row.settings(facts) for row in rows)
    assert flight == [{"run.in_flight": 3}]
    assert graphs[0] == {"model.compile": {"backend": "cudagraphs"}}
    compiled = facts.config.replace({"model.compile": {"freezing": True}})
    assert rows[1].settings(replace(facts, config=compiled))[0] == {
        "model.compile.mode": "reduce-overhead"
    }
    texts = replace(facts, varies=True)
    assert [reason for _, reason in applicable(rows, texts)] == [
        "",
        "batches of these texts differ in length",
    ]


@pytest.mark.parametrize(
    ("milliseconds", "found"),
    [
        ([7.0], "median batch 7.00 ms"),
        ([5.0], ""),
        ([5.0] * 60 + [90.0] * 40, ""),
        ([5.0] * 370 + [90.0] * 30, "99th percentile up to 90.0 ms"),
    ],
)
def test_a_limit_of_latency_needs_many_batches_for_the_percentile(
    milliseconds: list[float], found: str
) -> None:
    limits = Constraints(TuneSection(p99="6 ms"), MeasureSection())
    assert limits.latency_violation([t / 1000 for t in milliseconds]) == found


@pytest.mark.parametrize("seed", range(5))
def test_nothing_helps_names_a_gain_that_no_interval_contains(seed: int) -> None:
    def plan(config: RunConfig) -> Planted:
        return Planted(0.05, noise=0.02, process_noise=0.02)

    found = PlantedSearch(plan, (SEED, MODE, THREADS, WARMUP), seed=seed)
    _, confirmed = found.run()
    tried = [confirmed] if confirmed else []
    result = tune_result(found.search, tried, None, "2026-01-01", Path("out"))
    assert result.status == "nothing_helps"
    assert result.detectable > 0.01  # the noise hides one percent
    highest = [t.high for t in result.trials if t.outcome == "no_gain" and t.high and not confirmed]
    assert all(high <= 1 + result.detectable for high in highest)


def test_a_gain_that_is_dropped_is_called_uncertain() -> None:
    """Blocks of one process differ by a factor of about ten."""

    def plan(config: RunConfig) -> Planted:
        return Planted(0.0005 if config.run.seed else 0.001, noise=2.5)

    reasons: list[str] = []
    for seed in range(5):
        found = PlantedSearch(plan, (SEED,), seed=seed)
        found.run()
        reasons += [t.reason for t in found.search.trials if t.ratio and t.ratio > 1.01]
    assert any("x as fast as the baseline, but uncertain (" in reason for reason in reasons)
