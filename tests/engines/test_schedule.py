"""The schedule runs every sample once, in order, whichever workers die and whenever."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from gradrun.engines.schedule import Schedule, Span


def test_a_span_has_whole_units_and_the_last_one_ends_with_the_samples() -> None:
    schedule = Schedule(0, 10, unit=4, batch_size=4)
    schedule.add_worker(1)
    spans = []
    while span := schedule.assign(1):
        spans.append(span)
        schedule.complete(1, span)
        list(schedule.release())
    assert spans == [Span(0, 4), Span(4, 8), Span(8, 10)]
    assert schedule.finished


def test_a_worker_gets_two_spans_and_no_more() -> None:
    schedule = Schedule(0, 100, unit=1, batch_size=1)
    schedule.add_worker(1)
    assert [schedule.assign(1), schedule.assign(1), schedule.assign(1)] == [
        Span(0, 1),
        Span(1, 2),
        None,
    ]


def test_no_span_is_assigned_far_ahead_of_a_slow_worker() -> None:
    schedule = Schedule(0, 10_000, unit=1, batch_size=1)
    schedule.add_worker(1)
    schedule.add_worker(2)
    slow = schedule.assign(1)
    assert slow == Span(0, 1)
    ahead = 0
    while span := schedule.assign(2):
        if span == slow:
            break
        schedule.complete(2, span)
        ahead = span.stop
    assert ahead <= 8, "at most four spans per worker"


def test_spans_become_shorter_towards_the_end() -> None:
    schedule = Schedule(0, 1000, unit=10, batch_size=10)
    schedule.add_worker(1)
    sizes = []
    while span := schedule.assign(1, 400):
        schedule.complete(1, span)
        list(schedule.release())
        sizes.append(span.size)
    assert sizes[0] == 400
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 10
    assert sum(sizes) == 1000


def test_the_first_worker_that_is_ready_leaves_samples_for_the_others() -> None:
    schedule = Schedule(0, 800, unit=16, batch_size=16, workers=2)
    schedule.add_worker(1)
    assert schedule.assign(1, 256) == Span(0, 192)
    assert schedule.assign(1, 256) == Span(192, 336)
    schedule.add_worker(2)
    assert schedule.assign(2, 256) == Span(336, 448)


def test_short_spans_at_the_end_do_not_leave_a_worker_without_work() -> None:
    schedule = Schedule(0, 800, unit=16, batch_size=16, workers=2)
    for worker in (1, 2):
        schedule.add_worker(worker)
    assert schedule.assign(1, 256) == Span(0, 192)
    stop = 0
    while stop < 800:
        span = schedule.assign(2, 256)
        assert span is not None
        assert span.start > 0
        schedule.complete(2, span)
        stop = span.stop
    assert schedule.assign(2, 256) == Span(0, 192)


def test_an_idle_worker_takes_a_span_that_waits_before_one_that_runs() -> None:
    schedule = Schedule(0, 30, unit=10, batch_size=10)
    for worker in (1, 2):
        schedule.add_worker(worker)
    assert schedule.assign(1) == Span(0, 10)
    assert schedule.assign(1) == Span(10, 20)
    last = schedule.assign(2)
    assert last == Span(20, 30)
    schedule.complete(2, last)
    assert schedule.assign(2) == Span(10, 20)


def test_a_slow_worker_gets_shorter_spans() -> None:
    schedule = Schedule(0, 10_000, unit=10, batch_size=10)
    schedule.add_worker(1)
    schedule.add_worker(2)
    assert schedule.assign(1, 1000) == Span(0, 1000)
    assert schedule.assign(2, 25) == Span(1000, 1020)


def test_the_spans_of_a_lost_worker_are_repeated_first() -> None:
    schedule = Schedule(0, 100, unit=10, batch_size=10)
    schedule.add_worker(1)
    schedule.add_worker(2)
    assert schedule.assign(1) == Span(0, 10)
    assert schedule.assign(2) == Span(10, 20)
    assert schedule.lose_worker(1) == []
    assert schedule.assign(2) == Span(0, 10)
    assert schedule.repeated == {1: 0, 2: 1}


def test_an_idle_worker_repeats_the_oldest_span_and_the_first_result_counts() -> None:
    schedule = Schedule(0, 10, unit=10, batch_size=10)
    schedule.add_worker(1)
    schedule.add_worker(2)
    span = schedule.assign(1)
    assert span is not None
    assert schedule.assign(2) == span
    assert schedule.repeated[2] == 1
    assert schedule.complete(2, span)
    assert not schedule.complete(1, span)
    assert list(schedule.release()) == [span]
    assert schedule.finished


def test_nothing_after_a_failing_span_is_assigned_and_everything_before_it_is_written() -> None:
    schedule = Schedule(0, 100, unit=10, batch_size=10)
    for worker in (1, 2):
        schedule.add_worker(worker)
    first, second = schedule.assign(1), schedule.assign(2)
    assert first == Span(0, 10)
    assert second == Span(10, 20)
    schedule.end_at(second)
    schedule.complete(2, second)
    assert list(schedule.release()) == []
    assert schedule.assign(2) in (None, first)
    schedule.complete(1, first)
    assert list(schedule.release()) == [first, second]
    assert schedule.finished


def test_a_sample_that_ends_two_workers_is_isolated() -> None:
    """Every worker that runs sample 13 dies; all other samples get a result."""
    schedule = Schedule(0, 40, unit=8, batch_size=4)
    results: Counter[int] = Counter()
    poisonous: list[Span] = []
    worker = deaths = 0
    schedule.add_worker(worker)
    while not schedule.finished:
        span = schedule.assign(worker, 16)
        assert span is not None
        if 13 in range(span.start, span.stop):
            poisonous += schedule.lose_worker(worker)
            worker, deaths = worker + 1, deaths + 1
            schedule.add_worker(worker)
        elif schedule.complete(worker, span):
            results.update(range(span.start, span.stop))
        list(schedule.release())
    assert poisonous == [Span(13, 14)]
    assert results == Counter(n for n in range(40) if n != 13)
    assert deaths == 8, "two for the span, the unit, the batch and the sample"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_sample_is_written_once_and_in_order(data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, 4), "batch size")
    unit = batch_size * data.draw(st.integers(1, 3), "batches per unit")
    start = unit * data.draw(st.integers(0, 2), "units before")
    stop = start + data.draw(st.integers(1, 60), "samples")
    killers = data.draw(st.sets(st.integers(start, stop - 1), max_size=2), "killing samples")
    schedule = Schedule(start, stop, unit=unit, batch_size=batch_size)
    size = unit * data.draw(st.integers(1, 4), "units per span")
    alive = list(range(data.draw(st.integers(1, 3), "workers")))
    for worker in alive:
        schedule.add_worker(worker)
    new = len(alive)
    written: list[int] = []
    lost: list[int] = []
    accidents = 3
    for _ in range(3000):
        if schedule.finished:
            break
        for worker in alive:
            while schedule.assign(worker, size):
                pass
        busy = [worker for worker in alive if schedule.running(worker)]
        assert busy, "no worker has work, but samples are left"
        worker = data.draw(st.sampled_from(busy), "next event")
        span = schedule.running(worker)[0]
        kills = any(span.start <= killer < span.stop for killer in killers)
        accident = not kills and accidents > 0 and data.draw(st.booleans(), "accident")
        if kills or accident:
            accidents -= accident
            lost += [sample.start for sample in schedule.lose_worker(worker)]
            alive.remove(worker)
            alive.append(new)
            schedule.add_worker(new)
            new += 1
        else:
            schedule.complete(worker, span)
        for released in schedule.release():
            written += range(released.start, released.stop)
    assert schedule.finished
    assert written == list(range(start, stop))
    assert set(lost) >= killers
