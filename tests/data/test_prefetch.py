"""Tests of prefetch: order, errors, the end of the thread, and when it is used."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from gradrun.core.errors import ConfigError
from gradrun.data.batch import Batch
from gradrun.data.prefetch import _TRIAL_SECONDS, prefetch, should_prefetch
from gradrun.data.source import BatchSource


def batch(value: int) -> Batch:
    return Batch((torch.full((2,), float(value)),), {}, 2, range(2))


class Source(BatchSource):
    """A source of slow batches that counts reads and records the reading threads."""

    def __init__(self, count: int = 8, seconds: float = 0.0, fails_at: int | None = None) -> None:
        self.count, self.samples, self.seconds, self.fails_at = count, count, seconds, fails_at
        self.read = 0
        self.readers: set[str] = set()

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        for i in range(start, self.count):
            time.sleep(self.seconds)
            self.readers.add(threading.current_thread().name)
            if i == self.fails_at:
                raise ConfigError(f"row {i} is bad")
            self.read += 1
            yield batch(i)


def running() -> bool:
    return any(thread.name.startswith("gradrun-prefetch") for thread in threading.enumerate())


def values(batches: Iterator[Batch]) -> list[int]:
    return [int(each.args[0][0]) for each in batches]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_batches_are_in_order_and_the_thread_ends(count: int) -> None:
    source = Source(count)
    assert values(prefetch(source.batches())) == list(range(count))
    assert source.readers <= {"gradrun-prefetch_0"}
    assert not running()


def test_batches_are_read_in_the_thread() -> None:
    source = Source(3)
    assert values(prefetch(source.batches())) == [0, 1, 2]
    assert source.readers == {"gradrun-prefetch_0"}


def test_only_a_few_batches_are_read_ahead() -> None:
    source = Source(100)
    ahead = prefetch(source.batches())
    next(ahead)
    time.sleep(0.2)
    assert 2 <= source.read <= 4, "two ready, one in the thread and one consumed"
    ahead.close()


@pytest.mark.parametrize("fails_at", [0, 1, 5])
def test_a_reading_error_is_raised_after_the_batches_before_it(fails_at: int) -> None:
    ahead = prefetch(Source(fails_at=fails_at).batches())
    assert [next(ahead).args[0][0] for _ in range(fails_at)] == list(range(fails_at))
    with pytest.raises(ConfigError, match=f"row {fails_at} is bad"):
        next(ahead)
    assert not running()


@pytest.mark.parametrize("taken", [1, 3])
def test_closing_early_ends_the_thread(taken: int) -> None:
    source = Source(10_000)
    ahead = prefetch(source.batches())
    for _ in range(taken):
        next(ahead)
    start = time.perf_counter()
    ahead.close()
    assert time.perf_counter() - start < 1
    assert not running()
    assert source.read < taken + 5


def test_an_error_of_the_consumer_ends_the_thread() -> None:
    ahead = prefetch(Source(10_000).batches())

    def consume() -> None:
        for _ in ahead:
            raise KeyError("the model failed")

    with pytest.raises(KeyError):
        consume()
    ahead.close()
    assert not running()


def test_reading_and_working_overlap() -> None:
    def seconds(batches: Iterator[Batch]) -> float:
        start = time.perf_counter()
        for _ in batches:
            time.sleep(0.03)
        return time.perf_counter() - start

    sequential = seconds(Source(10, 0.03).batches())
    assert seconds(prefetch(Source(10, 0.03).batches())) < 0.8 * sequential


@pytest.mark.parametrize(
    ("reading", "forward", "expected"),
    [
        (0.004, 0.01, True),
        (0.0, 0.01, False),  # nothing to save
        (0.004, 0.0001, False),  # too short to overlap
        (0.0, 0.0, False),
    ],
)
def test_prefetch_is_used_if_reading_and_forward_are_both_slow(
    reading: float, forward: float, expected: bool
) -> None:
    source = Source(1000, reading)
    assert should_prefetch(source, forward) is expected
    assert source.read * reading <= 2 * _TRIAL_SECONDS, "the trial is short"


def test_prefetch_is_not_used_without_data() -> None:
    assert should_prefetch(Source(0), 1.0) is False


def test_an_error_in_later_data_is_ignored_by_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two fast batches stay below this limit even on a busy machine.
    monkeypatch.setattr("gradrun.data.prefetch.MIN_SECONDS", 0.05)
    assert not should_prefetch(Source(fails_at=2), forward_seconds=1.0)
    assert should_prefetch(Source(4, seconds=0.06, fails_at=2), forward_seconds=1.0)
