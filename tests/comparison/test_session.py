"""When enough has been measured, and what happens to workers that fail: with workers of paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from gradrun.comparison import session
from gradrun.comparison.protocol import Failure, Job, Variant, VariantMeasurement, WorkerReport
from gradrun.comparison.session import Session, SessionData, sentence
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.results.ratios import compare_measured
from gradrun.results.result import Equivalence, SystemNoise
from tests.support.run_results import CONFIG, MACHINE, MEMORY, PHASES, measurement

QUIET, NOISY = SystemNoise(), SystemNoise(others=1.5)


def variant(name: str) -> Variant:
    config = CONFIG.model_dump(mode="json")
    config["run"]["mode"] = name.split()[0]
    return Variant(name=name, config=config)


@dataclass
class Paper:
    """Workers whose reports are made by a function of the job; each takes two seconds."""

    answer: Callable[[Job, int], WorkerReport]
    now: float = 100.0
    jobs: list[Job] = field(default_factory=list)
    open: int = 0
    most_open: dict[str, int] = field(default_factory=lambda: {"weigh": 0, "time": 0})
    threads: set[int] = field(default_factory=set)

    def monotonic(self) -> float:
        return self.now

    def worker(self, job: Job, *, threads: int) -> Any:
        paper = self

        class Worker:
            def __enter__(self) -> Worker:
                paper.open += 1
                paper.most_open[job.kind] = max(paper.most_open[job.kind], paper.open)
                paper.threads.add(threads)
                self.number = sum(known.kind == job.kind for known in paper.jobs)
                paper.jobs.append(job)
                return self

            def __exit__(self, *_: object) -> None:
                paper.open -= 1

            def report(self, timeout: float) -> WorkerReport:
                paper.now += 2.0
                return paper.answer(job, self.number)

        return Worker()

    @property
    def timed(self) -> list[Job]:
        return [job for job in self.jobs if job.kind == "time"]


def trial(name: str, seconds: float, **memory: Any) -> VariantMeasurement:
    return VariantMeasurement(
        variant=name,
        batch_seconds=(seconds,) * 5,
        batch_sizes=(4,) * 5,
        phases=PHASES,
        memory=MEMORY.replace(**{"process_peak": None} | memory),
    )


def all_well(job: Job, number: int, **changes: Any) -> WorkerReport:
    """grad takes 1.3 ms, a mode after it 1 ms, and the ratio shifts a little by process."""
    if job.kind == "weigh":
        peak = {"process_peak": 1000 + ord(job.variants[0].name[0]), "process_method": "VmHWM"}
        return WorkerReport(trials=(trial(job.variants[0].name, 0.0, **peak),))
    shift = changes.pop("shift", 0.001) * (number % 2)
    trials = tuple(
        trial(v.name, (0.0013 if v.name == "grad" else 0.001) * (1 + shift * (v.name != "grad")))
        for v in job.variants
    )
    base = job.variants[0].name
    agreed = tuple(
        Equivalence(baseline=base, candidate=v.name, bitwise=True, max_abs_diff=0.0, equal=True)
        for v in job.variants[1:]
    )
    given = {"trials": trials, "equivalence": agreed, "environment": MACHINE}
    return WorkerReport(**(given | changes))


Run = Callable[..., tuple[SessionData, Paper]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    papers: list[Paper] = []

    def of(
        answer: Callable[[Job, int], WorkerReport] = all_well,
        modes: tuple[str, ...] = ("grad", "no_grad", "inference_mode"),
        progress: ProgressCallback = ignore,
        **measure: Any,
    ) -> tuple[SessionData, Paper]:
        paper = Paper(answer)
        papers.append(paper)
        monkeypatch.setattr(session, "Worker", paper.worker)
        monkeypatch.setattr(session, "time", paper)
        section = CONFIG.measure.model_copy(update=measure)
        config: RunConfig = CONFIG.model_copy(update={"measure": section})
        under_test = session.Session([variant(mode) for mode in modes], config, trust_code=False)
        return under_test.run(progress), paper

    yield of
    assert not any(paper.open for paper in papers), "a worker was not ended"


def processes_of(found: SessionData, name: str) -> list[int]:
    return [m.process for m in found.measurements if m.variant == name]


# --- enough ------------------------------------------------------------------------------------


def test_five_processes_are_enough_where_they_agree(run: Run) -> None:
    found, paper = run()
    assert len(paper.timed) == 5
    for mode in ("grad", "no_grad", "inference_mode"):
        assert processes_of(found, mode) == [0, 1, 2, 3, 4]
    assert [(c.baseline, c.candidate, c.verdict) for c in found.comparisons] == [
        ("grad", "no_grad", "faster"),
        ("grad", "inference_mode", "faster"),
    ]
    assert found.comparisons[0].ratio == pytest.approx(1.3, rel=2e-3)
    assert (found.warnings, found.failures, found.environment) == ([], [], MACHINE)
    assert len(found.equivalence) == 2, "told once, not by every process"


def test_each_process_gets_a_seed_of_its_own(run: Run) -> None:
    _, paper = run()
    assert len({job.seed for job in paper.timed}) == 5


def test_more_processes_are_started_until_the_interval_is_narrow_enough(run: Run) -> None:
    found, paper = run(lambda job, number: all_well(job, number, shift=0.02), budget=600)
    assert len(paper.timed) > 5
    assert all(c.relative_width <= 0.01 for c in found.comparisons)
    without_last = [m for m in found.measurements if m.process < len(paper.timed) - 1]
    assert any(c.relative_width > 0.01 for c in compare_measured(without_last, 0.01))
    assert found.warnings == []


def near_the_edge(job: Job, number: int) -> WorkerReport:
    """no_grad is slower by 0 % and by 1.4 % in turn: neither the same nor different after five."""
    report = all_well(job, number)
    if job.kind == "weigh":
        return report
    other = trial("no_grad", 0.0013 * (1 + 0.014 * (number % 2)))
    return report.replace(trials=(report.trials[0], other))


def test_a_ratio_at_the_edge_of_no_difference_takes_half_the_width(run: Run) -> None:
    found, paper = run(near_the_edge, modes=("grad", "no_grad"), budget=600)
    at_five = compare_measured([m for m in found.measurements if m.process < 5], 0.01)[0]
    assert (at_five.verdict, at_five.relative_width <= 0.01) == ("inconclusive", True)
    assert len(paper.timed) > 5
    assert found.comparisons[0].relative_width <= 0.005
    assert found.warnings == []


def test_at_the_edge_the_budget_still_ends_it(run: Run) -> None:
    found, paper = run(near_the_edge, modes=("grad", "no_grad"), budget=16)
    assert len(paper.timed) < 8
    assert found.comparisons[0].verdict == "inconclusive"


def test_when_the_budget_is_spent_it_ends_and_says_so(run: Run) -> None:
    found, paper = run(lambda job, number: all_well(job, number, shift=0.1), budget=40)
    (warning,) = found.warnings
    assert warning.code == "not_precise"
    assert f"after {len(paper.timed)} processes" in warning.text
    assert "40 s" in warning.text
    assert paper.now - 100.0 <= 40


def test_a_budget_too_small_for_the_fewest_processes_still_gives_an_interval(run: Run) -> None:
    found, paper = run(budget=0.1)
    assert len(paper.timed) == 2
    assert all(0 < c.low < c.high < 2 for c in found.comparisons)


# --- weighing ----------------------------------------------------------------------------------


def test_each_variant_is_weighed_alone_before_the_time_is_taken(run: Run) -> None:
    found, paper = run()
    assert [[v.name for v in job.variants] for job in paper.jobs[:3]] == [
        ["grad"],
        ["no_grad"],
        ["inference_mode"],
    ]
    assert {job.kind for job in paper.jobs[3:]} == {"time"}
    for measured in found.measurements:
        assert measured.memory.process_peak == 1000 + ord(measured.variant[0])
        assert measured.memory.process_method == "VmHWM"
        assert measured.memory.forward_peak == MEMORY.forward_peak


def test_time_is_taken_in_one_process_at_a_time(run: Run) -> None:
    _, paper = run()
    assert paper.most_open == {"weigh": 2, "time": 1}  # nothing is timed while weighing


def test_memory_that_differs_between_processes_is_a_warning(run: Run) -> None:
    def drifting(job: Job, number: int) -> WorkerReport:
        report = all_well(job, number)
        if job.kind == "weigh":
            return report
        drift = trial("no_grad", 0.001, forward_peak=1024 * (1 + number))
        return report.replace(trials=(report.trials[0], drift, report.trials[2]))

    found, _ = run(drifting)
    (warning,) = found.warnings
    assert warning.code == "memory_differs"
    assert warning.text.startswith("no_grad:")


# --- processes that were disturbed -------------------------------------------------------------


def disturbed_at(*numbers: int, noise: SystemNoise = NOISY) -> Callable[[Job, int], WorkerReport]:
    def answer(job: Job, number: int) -> WorkerReport:
        here = noise if number in numbers else QUIET
        if job.kind == "weigh":
            return all_well(job, number)
        report = all_well(job, number, disturbance=here)
        if here is QUIET:
            return report
        slow = [t.replace(batch_seconds=(9.0,) * 5) for t in report.trials]
        return report.replace(trials=tuple(slow))

    return answer


@pytest.mark.parametrize("noise", [NOISY, SystemNoise(steal=0.1), SystemNoise(preemptions=500)])
def test_a_disturbed_process_is_done_again_and_told(run: Run, noise: SystemNoise) -> None:
    found, paper = run(disturbed_at(0, 2, noise=noise))
    assert len(paper.timed) == 7
    assert processes_of(found, "grad") == [1, 3, 4, 5, 6]
    assert not any(9.0 in m.batch_seconds for m in found.measurements)
    (warning,) = found.warnings
    assert warning.code == "noisy_machine"
    assert warning.text.startswith("2 processes measured again")


def slow_at(*numbers: int, times: float) -> Callable[[Job, int], WorkerReport]:
    """Processes in which every variant takes longer, though no counter tells why."""

    def answer(job: Job, number: int) -> WorkerReport:
        report = all_well(job, number)
        if job.kind != "time" or number not in numbers:
            return report
        slow = [
            t.replace(batch_seconds=tuple(times * s for s in t.batch_seconds))
            for t in report.trials
        ]
        return report.replace(trials=tuple(slow))

    return answer


@pytest.mark.parametrize("numbers", [(0,), (3,), (0, 4)])
def test_a_process_that_was_slow_for_every_variant_is_done_again(
    run: Run, numbers: tuple[int, ...]
) -> None:
    found, paper = run(slow_at(*numbers, times=1.5))
    assert len(paper.timed) == 5 + len(numbers)
    assert not set(processes_of(found, "grad")) & set(numbers)
    assert [warning.code for warning in found.warnings] == ["noisy_machine"]


def test_a_process_that_was_a_little_slower_counts(run: Run) -> None:
    found, _ = run(slow_at(0, 3, times=1.1))
    assert processes_of(found, "grad") == [0, 1, 2, 3, 4]


def test_a_little_noise_is_no_disturbance(run: Run) -> None:
    _, paper = run(
        disturbed_at(*range(5), noise=SystemNoise(others=0.1, steal=0.01, preemptions=20))
    )
    assert len(paper.timed) == 5


def test_on_a_machine_that_is_never_quiet_it_goes_on_all_the_same(run: Run) -> None:
    found, paper = run(disturbed_at(*range(100)), budget=60)
    assert found.comparisons
    assert len(paper.timed) - len(processes_of(found, "grad")) == 5
    assert "noisy_machine" in [warning.code for warning in found.warnings]


# --- variants that fail ------------------------------------------------------------------------


def failing(name: str, kind: str = "weigh", **failure: Any) -> Callable[[Job, int], WorkerReport]:
    """`name` fails in weighing, or in the third process, which gives no other report."""

    def answer(job: Job, number: int) -> WorkerReport:
        hit = name in [v.name for v in job.variants] or not name
        if hit and job.kind == kind and (kind == "weigh" or number > 1):
            given = {"variant": name, "batch": 3, "error": "was killed by SIGKILL"}
            return WorkerReport(failures=(Failure(**(given | failure)),))
        return all_well(job, number)

    return answer


def test_a_variant_that_fails_is_left_out_and_the_others_go_on(run: Run) -> None:
    found, paper = run(failing("no_grad"))
    assert [sentence(failure) for failure in found.failures] == [
        "no_grad, batch 3: was killed by SIGKILL"
    ]
    assert all([v.name for v in job.variants] == ["grad", "inference_mode"] for job in paper.timed)
    assert [c.candidate for c in found.comparisons] == ["inference_mode"]


def test_without_the_baseline_the_next_variant_is_it(run: Run) -> None:
    found, _ = run(failing("grad"))
    assert [(c.baseline, c.candidate) for c in found.comparisons] == [("no_grad", "inference_mode")]


def test_what_a_variant_gave_before_it_failed_is_kept(run: Run) -> None:
    found, paper = run(failing("no_grad", "time"))
    assert processes_of(found, "no_grad") == [0, 1]
    assert processes_of(found, "grad") == [0, 1, 3, 4, 5]
    assert len(found.failures) == 1
    assert len(paper.timed) == 6, "the process that died counts for nobody"


def test_one_variant_alone_is_still_measured(run: Run) -> None:
    found, _ = run(failing("no_grad"), modes=("grad", "no_grad"))
    assert processes_of(found, "grad") == [0, 1, 2, 3, 4]
    assert found.comparisons == []


def test_a_worker_that_died_before_any_variant_ends_the_comparison(run: Run) -> None:
    found, paper = run(failing("", "time"))
    assert len(paper.timed) == 3
    assert processes_of(found, "grad") == [0, 1]
    assert [sentence(failure) for failure in found.failures] == [
        "a worker, batch 3: was killed by SIGKILL"
    ]


def test_a_config_that_no_variant_can_run_is_the_configs_error(run: Run) -> None:
    def refused(job: Job, number: int) -> WorkerReport:
        name = job.variants[0].name
        failure = Failure(variant=name, batch=0, error="wrong shape", config_key="data.inputs")
        return WorkerReport(failures=(failure,))

    with pytest.raises(ConfigError, match="wrong shape") as caught:
        run(refused)
    assert caught.value.key == "data.inputs"


# --- what is told, and the arithmetic ----------------------------------------------------------


def test_progress_is_told_before_each_step(run: Run) -> None:
    calls: list[Progress] = []
    run(progress=calls.append)
    timed = [Progress("timing processes", done, 5) for done in range(5)]
    assert calls == [Progress("measuring memory", 0, 5), *timed]


def test_workers_get_the_threads_of_the_variant_that_wants_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variants = [variant("grad"), variant("no_grad")]
    variants[0].config["run"]["threads"], variants[1].config["run"]["threads"] = 3, 1
    paper = Paper(all_well)
    monkeypatch.setattr(session, "Worker", paper.worker)
    Session(variants, CONFIG, trust_code=False).run()
    assert paper.threads == {3}


def test_a_ratio_is_of_paired_rounds_and_above_one_where_the_candidate_is_faster() -> None:
    measured = [
        measurement(5, last=4, variant=name, process=process, batch_seconds=seconds)
        for process in range(3)
        for name, seconds in (("grad", (2.0, 4.0, 8.0, 2.0, 2.0)), ("x", (1.0, 2.0, 4.0, 1.0, 9.0)))
    ]
    (found,) = compare_measured(measured, 0.01)
    assert (found.baseline, found.candidate, found.verdict) == ("grad", "x", "faster")
    assert (found.low, found.ratio, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_samples_are_compared_and_not_batches_of_other_sizes() -> None:
    measured = [
        measurement(
            5, variant=name, process=process, batch_seconds=(s,) * 5, batch_sizes=(size,) * 5
        )
        for process in range(2)
        for name, s, size in (("run.threads=1", 1.0, 8), ("data.batch_size=16", 2.0, 16))
    ]
    assert compare_measured(measured, 0.01)[0].ratio == pytest.approx(1.0)


def test_only_processes_that_measured_both_are_compared() -> None:
    measured = [
        measurement(5, last=4, variant=name, process=process)
        for name, processes in (("grad", (0, 1, 2)), ("x", (1, 2)), ("y", ()), ("z", (7,)))
        for process in processes
    ]
    assert [c.candidate for c in compare_measured(measured, 0.01)] == ["x"]
