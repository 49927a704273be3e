"""Reading ahead keeps the order, the bytes and the errors of reading, and ends with its reader."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from gradrun.core.errors import ConfigError
from gradrun.data.batch import Batch
from gradrun.data.prefetch import _TRIAL_SECONDS, prefetch, should_prefetch


def batch(value: int) -> Batch:
    return Batch((torch.full((2,), float(value)),), {}, 2, range(2))


class Source:
    """Batches that take a while, and a note of what was read and of how it was left."""

    def __init__(self, count: int = 8, seconds: float = 0.0, fails_at: int | None = None) -> None:
        self.count, self.seconds, self.fails_at = count, seconds, fails_at
        self.read = 0
        self.readers: set[str] = set()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        for i in range(start, self.count):
            time.sleep(self.seconds)
            self.readers.add(threading.current_thread().name)
            if i == self.fails_at:
                raise ConfigError(f"row {i} is bad")
            self.read += 1
            yield batch(i)


def running() -> bool:
    return any(thread.name == "gradrun-read-ahead" for thread in threading.enumerate())


def values(found: Iterator[Batch]) -> list[int]:
    return [int(each.args[0][0]) for each in found]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_batches_come_in_order_from_a_thread_that_ends(count: int) -> None:
    source = Source(count)
    assert values(prefetch(source.batches())) == list(range(count))
    assert source.readers <= {"gradrun-read-ahead"}
    assert not running()


def test_batches_are_read_in_the_thread() -> None:
    source = Source(3)
    assert values(prefetch(source.batches())) == [0, 1, 2]
    assert source.readers == {"gradrun-read-ahead"}


def test_only_a_few_batches_are_held() -> None:
    source = Source(100)
    ahead = prefetch(source.batches())
    next(ahead)
    time.sleep(0.2)
    assert 2 <= source.read <= 4, "two ready, and one in each hand"
    ahead.close()


@pytest.mark.parametrize("fails_at", [0, 1, 5])
def test_an_error_of_reading_comes_after_the_batches_before_it(fails_at: int) -> None:
    ahead = prefetch(Source(fails_at=fails_at).batches())
    assert [next(ahead).args[0][0] for _ in range(fails_at)] == list(range(fails_at))
    with pytest.raises(ConfigError, match=f"row {fails_at} is bad"):
        next(ahead)
    assert not running()


@pytest.mark.parametrize("taken", [1, 3])
def test_closing_early_ends_the_thread_at_once(taken: int) -> None:
    source = Source(10_000)
    ahead = prefetch(source.batches())
    for _ in range(taken):
        next(ahead)
    began = time.perf_counter()
    ahead.close()
    assert time.perf_counter() - began < 1
    assert not running()
    assert source.read < taken + 5


def test_an_error_of_the_model_ends_the_thread() -> None:
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
        began = time.perf_counter()
        for _ in batches:
            time.sleep(0.03)
        return time.perf_counter() - began

    after_each_other = seconds(Source(10, 0.03).batches())
    assert seconds(prefetch(Source(10, 0.03).batches())) < 0.8 * after_each_other


@pytest.mark.parametrize(
    ("reading", "forward", "worth"),
    [
        (0.004, 0.01, True),
        (0.0, 0.01, False),  # nothing to save
        (0.004, 0.0001, False),  # nothing to hide it behind
        (0.0, 0.0, False),
    ],
)
def test_it_pays_off_where_reading_and_forward_both_take_a_while(
    reading: float, forward: float, worth: bool
) -> None:
    source = Source(1000, reading)
    assert should_prefetch(source, forward) is worth
    assert source.read * reading <= 2 * _TRIAL_SECONDS, "the trial is short"


def test_it_does_not_pay_off_without_data() -> None:
    assert should_prefetch(Source(0), 1.0) is False


def test_data_that_is_broken_further_on_is_left_for_the_run_to_find(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two batches are soon read, unless another process is given the processor meanwhile.
    monkeypatch.setattr("gradrun.data.prefetch.WORTH_SECONDS", 0.05)
    assert not should_prefetch(Source(fails_at=2), forward_seconds=1.0)
    assert should_prefetch(Source(4, seconds=0.06, fails_at=2), forward_seconds=1.0)
