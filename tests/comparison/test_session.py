"""Session: when to stop, noisy processes and failing workers, tested with fake workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from gradrun.comparison import session
from gradrun.comparison.protocol import Failure, Job, WorkerReport
from gradrun.comparison.session import Session, SessionData, Variant
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.results.ratios import compare_measured
from gradrun.results.result import Equivalence, Measurement, SystemNoise
from tests.support.run_results import CONFIG, MACHINE, MEMORY, PHASES, measurement

QUIET, NOISY = SystemNoise(), SystemNoise(others=1.5)


def variant(name: str, **run: Any) -> Variant:
    changes = {"mode": GradMode(name.split()[0])} | run
    return Variant(name, CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update=changes)}))


@dataclass
class FakeWorkers:
    """Workers whose reports come from a function of the job; each takes two seconds."""

    answer: Callable[[Job, int], WorkerReport]
    now: float = 100.0
    jobs: list[Job] = field(default_factory=list)
    open: int = 0
    most_open: dict[str, int] = field(default_factory=lambda: {"measure_memory": 0, "time": 0})
    threads: set[int] = field(default_factory=set)

    def monotonic(self) -> float:
        return self.now

    def worker(self, job: Job, *, threads: int) -> Any:
        fakes = self

        class Worker:
            def __enter__(self) -> Worker:
                fakes.open += 1
                fakes.most_open[job.kind] = max(fakes.most_open[job.kind], fakes.open)
                fakes.threads.add(threads)
                self.number = sum(known.kind == job.kind for known in fakes.jobs)
                fakes.jobs.append(job)
                return self

            def __exit__(self, *_: object) -> None:
                fakes.open -= 1

            def report(self, timeout: float) -> WorkerReport:
                fakes.now += 2.0
                return fakes.answer(job, self.number)

        return Worker()

    @property
    def timed(self) -> list[Job]:
        return [job for job in self.jobs if job.kind == "time"]


def measured(name: str, seconds: float, **memory: Any) -> Measurement:
    return Measurement(
        mode=GradMode(name.split()[0]),
        variant=name,
        batch_seconds=(seconds,) * 5,
        batch_sizes=(4,) * 5,
        phases=PHASES,
        memory=MEMORY.replace(**{"process_peak": None} | memory),
    )


def sound(job: Job, number: int, **changes: Any) -> WorkerReport:
    """grad takes 1.3 ms, a mode after it 1 ms, and the ratio shifts a little by process."""
    if job.kind == "measure_memory":
        peak = {"process_peak": 1000 + ord(job.variants[0].name[0]), "process_method": "VmHWM"}
        return WorkerReport(measurements=(measured(job.variants[0].name, 0.0, **peak),))
    shift = changes.pop("shift", 0.001) * (number % 2)
    measurements = tuple(
        measured(v.name, (0.0013 if v.name == "grad" else 0.001) * (1 + shift * (v.name != "grad")))
        for v in job.variants
    )
    base = job.variants[0].name
    equal = tuple(
        Equivalence(baseline=base, candidate=v.name, bitwise=True, max_abs_diff=0.0, equal=True)
        for v in job.variants[1:]
    )
    given = {"measurements": measurements, "equivalence": equal, "environment": MACHINE}
    return WorkerReport(**(given | changes))


Run = Callable[..., tuple[SessionData, FakeWorkers]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    fakes: list[FakeWorkers] = []

    def run_session(
        answer: Callable[[Job, int], WorkerReport] = sound,
        modes: tuple[str, ...] = ("grad", "no_grad", "inference_mode"),
        progress: ProgressCallback = ignore,
        **measure: Any,
    ) -> tuple[SessionData, FakeWorkers]:
        fake = FakeWorkers(answer)
        fakes.append(fake)
        monkeypatch.setattr(session, "Worker", fake.worker)
        monkeypatch.setattr(session, "time", fake)
        section = CONFIG.measure.model_copy(update=measure)
        config: RunConfig = CONFIG.model_copy(update={"measure": section})
        under_test = session.Session([variant(mode) for mode in modes], config, trust_code=False)
        return under_test.run(progress), fake

    yield run_session
    assert not any(fake.open for fake in fakes), "a worker was not stopped"


def processes_of(data: SessionData, name: str) -> list[int]:
    return [m.process for m in data.measurements if m.variant == name]


# --- when to stop --------------------------------------------------------------------------------


def test_five_processes_suffice_if_they_agree(run: Run) -> None:
    data, workers = run()
    assert len(workers.timed) == 5
    for mode in ("grad", "no_grad", "inference_mode"):
        assert processes_of(data, mode) == [0, 1, 2, 3, 4]
    assert [(c.baseline, c.candidate, c.verdict) for c in data.comparisons] == [
        ("grad", "no_grad", "faster"),
        ("grad", "inference_mode", "faster"),
    ]
    assert data.comparisons[0].ratio == pytest.approx(1.3, rel=2e-3)
    assert (data.warnings, data.failures, data.environment) == ([], [], MACHINE)
    assert len(data.equivalence) == 2, "reported once, not by every process"


def test_each_process_gets_its_own_seed(run: Run) -> None:
    _, workers = run()
    assert len({job.seed for job in workers.timed}) == 5


def test_more_processes_are_started_until_the_interval_is_narrow_enough(run: Run) -> None:
    data, workers = run(lambda job, number: sound(job, number, shift=0.02), budget=600)
    assert len(workers.timed) > 5
    assert all(c.relative_width <= 0.01 for c in data.comparisons)
    without_last = [m for m in data.measurements if m.process < len(workers.timed) - 1]
    assert any(c.relative_width > 0.01 for c in compare_measured(without_last, 0.01))
    assert data.warnings == []


def near_the_edge(job: Job, number: int) -> WorkerReport:
    """no_grad alternates between 0 % and 1.4 % slower: inconclusive after five processes."""
    report = sound(job, number)
    if job.kind == "measure_memory":
        return report
    other = measured("no_grad", 0.0013 * (1 + 0.014 * (number % 2)))
    return report.replace(measurements=(report.measurements[0], other))


def test_a_ratio_near_the_edge_of_no_difference_needs_half_the_width(run: Run) -> None:
    data, workers = run(near_the_edge, modes=("grad", "no_grad"), budget=600)
    at_five = compare_measured([m for m in data.measurements if m.process < 5], 0.01)[0]
    assert (at_five.verdict, at_five.relative_width <= 0.01) == ("inconclusive", True)
    assert len(workers.timed) > 5
    assert data.comparisons[0].relative_width <= 0.005
    assert data.warnings == []


def test_the_budget_also_limits_a_ratio_near_the_edge(run: Run) -> None:
    data, workers = run(near_the_edge, modes=("grad", "no_grad"), budget=16)
    assert len(workers.timed) < 8
    assert data.comparisons[0].verdict == "inconclusive"


def test_spending_the_budget_stops_the_session_with_a_warning(run: Run) -> None:
    data, workers = run(lambda job, number: sound(job, number, shift=0.1), budget=40)
    (warning,) = data.warnings
    assert warning.code == "not_precise"
    assert f"after {len(workers.timed)} processes" in warning.text
    assert "40 s" in warning.text
    assert workers.now - 100.0 <= 40


def test_a_budget_below_the_minimum_processes_still_gives_an_interval(run: Run) -> None:
    data, workers = run(budget=0.1)
    assert len(workers.timed) == 2
    assert all(0 < c.low < c.high < 2 for c in data.comparisons)


# --- memory --------------------------------------------------------------------------------------


def test_memory_of_each_variant_is_measured_alone_before_timing(run: Run) -> None:
    data, workers = run()
    assert [[v.name for v in job.variants] for job in workers.jobs[:3]] == [
        ["grad"],
        ["no_grad"],
        ["inference_mode"],
    ]
    assert {job.kind for job in workers.jobs[3:]} == {"time"}
    for measured in data.measurements:
        assert measured.memory.process_peak == 1000 + ord(measured.variant[0])
        assert measured.memory.process_method == "VmHWM"
        assert measured.memory.forward_peak == MEMORY.forward_peak


def test_one_process_is_timed_at_a_time(run: Run) -> None:
    _, workers = run()
    assert workers.most_open == {"measure_memory": 2, "time": 1}  # nothing is timed meanwhile


def test_memory_that_differs_between_processes_is_a_warning(run: Run) -> None:
    def drifting(job: Job, number: int) -> WorkerReport:
        report = sound(job, number)
        if job.kind == "measure_memory":
            return report
        drift = measured("no_grad", 0.001, forward_peak=1024 * (1 + number))
        return report.replace(measurements=(report.measurements[0], drift, report.measurements[2]))

    data, _ = run(drifting)
    (warning,) = data.warnings
    assert warning.code == "memory_differs"
    assert warning.text.startswith("no_grad:")


# --- noisy processes -----------------------------------------------------------------------------


def noisy_at(*numbers: int, noise: SystemNoise = NOISY) -> Callable[[Job, int], WorkerReport]:
    def answer(job: Job, number: int) -> WorkerReport:
        here = noise if number in numbers else QUIET
        if job.kind == "measure_memory":
            return sound(job, number)
        report = sound(job, number, noise=here)
        if here is QUIET:
            return report
        slow = [t.replace(batch_seconds=(9.0,) * 5) for t in report.measurements]
        return report.replace(measurements=tuple(slow))

    return answer


@pytest.mark.parametrize("noise", [NOISY, SystemNoise(steal=0.1), SystemNoise(preemptions=500)])
def test_a_noisy_process_is_repeated_with_a_warning(run: Run, noise: SystemNoise) -> None:
    data, workers = run(noisy_at(0, 2, noise=noise))
    assert len(workers.timed) == 7
    assert processes_of(data, "grad") == [1, 3, 4, 5, 6]
    assert not any(9.0 in m.batch_seconds for m in data.measurements)
    (warning,) = data.warnings
    assert warning.code == "noisy_machine"
    assert warning.text.startswith("2 processes measured again")


def slow_at(*numbers: int, times: float) -> Callable[[Job, int], WorkerReport]:
    """Processes in which every variant is slow although no counter shows noise."""

    def answer(job: Job, number: int) -> WorkerReport:
        report = sound(job, number)
        if job.kind != "time" or number not in numbers:
            return report
        slow = [
            t.replace(batch_seconds=tuple(times * s for s in t.batch_seconds))
            for t in report.measurements
        ]
        return report.replace(measurements=tuple(slow))

    return answer


@pytest.mark.parametrize("numbers", [(0,), (3,), (0, 4)])
def test_a_process_that_was_slow_for_every_variant_is_repeated(
    run: Run, numbers: tuple[int, ...]
) -> None:
    data, workers = run(slow_at(*numbers, times=1.5))
    assert len(workers.timed) == 5 + len(numbers)
    assert not set(processes_of(data, "grad")) & set(numbers)
    assert [warning.code for warning in data.warnings] == ["noisy_machine"]


def test_a_slightly_slower_process_counts(run: Run) -> None:
    data, _ = run(slow_at(0, 3, times=1.1))
    assert processes_of(data, "grad") == [0, 1, 2, 3, 4]


def test_little_noise_is_tolerated(run: Run) -> None:
    _, workers = run(noisy_at(*range(5), noise=SystemNoise(others=0.1, steal=0.01, preemptions=20)))
    assert len(workers.timed) == 5


def test_a_permanently_noisy_machine_still_gives_comparisons(run: Run) -> None:
    data, workers = run(noisy_at(*range(100)), budget=60)
    assert data.comparisons
    assert len(workers.timed) - len(processes_of(data, "grad")) == 5
    assert "noisy_machine" in [warning.code for warning in data.warnings]


# --- failing variants ----------------------------------------------------------------------------


def failing(
    name: str, kind: str = "measure_memory", **failure: Any
) -> Callable[[Job, int], WorkerReport]:
    """`name` fails while memory is measured, or in the third process."""

    def answer(job: Job, number: int) -> WorkerReport:
        hit = name in [v.name for v in job.variants] or not name
        if hit and job.kind == kind and (kind == "measure_memory" or number > 1):
            given = {"variant": name, "batch": 3, "error": "was killed by SIGKILL"}
            return WorkerReport(failures=(Failure(**(given | failure)),))
        return sound(job, number)

    return answer


def test_a_failing_variant_is_dropped_and_the_others_continue(run: Run) -> None:
    data, workers = run(failing("no_grad"))
    assert [failure.message for failure in data.failures] == [
        "no_grad, batch 3: was killed by SIGKILL"
    ]
    assert all(
        [v.name for v in job.variants] == ["grad", "inference_mode"] for job in workers.timed
    )
    assert [c.candidate for c in data.comparisons] == ["inference_mode"]


def test_the_next_variant_replaces_a_failed_baseline(run: Run) -> None:
    data, _ = run(failing("grad"))
    assert [(c.baseline, c.candidate) for c in data.comparisons] == [("no_grad", "inference_mode")]


def test_measurements_from_before_a_failure_are_kept(run: Run) -> None:
    data, workers = run(failing("no_grad", "time"))
    assert processes_of(data, "no_grad") == [0, 1]
    assert processes_of(data, "grad") == [0, 1, 3, 4, 5]
    assert len(data.failures) == 1
    assert len(workers.timed) == 6, "the process that died does not count"


def test_a_single_remaining_variant_is_measured(run: Run) -> None:
    data, _ = run(failing("no_grad"), modes=("grad", "no_grad"))
    assert processes_of(data, "grad") == [0, 1, 2, 3, 4]
    assert data.comparisons == []


def test_a_worker_that_dies_before_any_variant_stops_the_session(run: Run) -> None:
    data, workers = run(failing("", "time"))
    assert len(workers.timed) == 3
    assert processes_of(data, "grad") == [0, 1]
    assert [failure.message for failure in data.failures] == [
        "a worker, batch 3: was killed by SIGKILL"
    ]


def test_a_config_that_no_variant_can_run_is_a_config_error(run: Run) -> None:
    def invalid(job: Job, number: int) -> WorkerReport:
        name = job.variants[0].name
        failure = Failure(variant=name, batch=0, error="wrong shape", config_key="data.inputs")
        return WorkerReport(failures=(failure,))

    with pytest.raises(ConfigError, match="wrong shape") as caught:
        run(invalid)
    assert caught.value.key == "data.inputs"


# --- progress and arithmetic ---------------------------------------------------------------------


def test_progress_is_reported_before_each_step(run: Run) -> None:
    steps: list[Progress] = []
    run(progress=steps.append)
    timed = [Progress("timing processes", done, 5) for done in range(5)]
    assert steps == [Progress("measuring memory"), *timed]


def test_workers_get_the_largest_thread_count_of_the_variants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variants = [variant("grad", threads=3), variant("no_grad", threads=1)]
    workers = FakeWorkers(sound)
    monkeypatch.setattr(session, "Worker", workers.worker)
    Session(variants, CONFIG, trust_code=False).run()
    assert workers.threads == {3}


def test_a_ratio_of_paired_rounds_is_above_one_if_the_candidate_is_faster() -> None:
    measured = [
        measurement(5, last=4, variant=name, process=process, batch_seconds=seconds)
        for process in range(3)
        for name, seconds in (("grad", (2.0, 4.0, 8.0, 2.0, 2.0)), ("x", (1.0, 2.0, 4.0, 1.0, 9.0)))
    ]
    (ratio,) = compare_measured(measured, 0.01)
    assert (ratio.baseline, ratio.candidate, ratio.verdict) == ("grad", "x", "faster")
    assert (ratio.low, ratio.ratio, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_times_per_sample_are_compared_if_batch_sizes_differ() -> None:
    measured = [
        measurement(
            5, variant=name, process=process, batch_seconds=(s,) * 5, batch_sizes=(size,) * 5
        )
        for process in range(2)
        for name, s, size in (("run.threads=1", 1.0, 8), ("data.batch_size=16", 2.0, 16))
    ]
    assert compare_measured(measured, 0.01)[0].ratio == pytest.approx(1.0)


def test_only_processes_with_both_variants_are_compared() -> None:
    measured = [
        measurement(5, last=4, variant=name, process=process)
        for name, processes in (("grad", (0, 1, 2)), ("x", (1, 2)), ("y", ()), ("z", (7,)))
        for process in processes
    ]
    assert [c.candidate for c in compare_measured(measured, 0.01)] == ["x"]


def test_a_budget_for_too_few_processes_states_how_many_were_asked_for(run: Run) -> None:
    data, workers = run(lambda job, number: sound(job, number, shift=0.1), budget=8)
    assert len(workers.timed) < 5
    (warning,) = data.warnings
    expected = f"the budget of 8 s was spent after {len(workers.timed)} of at least 5 processes"
    assert warning.text.startswith(expected)
