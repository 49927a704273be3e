"""Batches of unknown number, read once: which of them can be read again, and where they end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gradrun.core.errors import ConfigError
from gradrun.data.batch import Batch
from gradrun.data.stream import StreamedBatches

SIZE = 4


def stream(count: int) -> StreamedBatches:
    """Samples 0 to count - 1, each one number."""

    def read() -> Iterator[Batch]:
        for start in range(0, count, SIZE):
            ids = range(start, min(start + SIZE, count))
            yield Batch((torch.tensor(ids, dtype=torch.float32),), {}, len(ids), ids)

    return StreamedBatches(read(), SIZE, "data.target")


def values(batches: Iterator[Batch]) -> list[float]:
    return [value for batch in batches for value in batch.args[0].tolist()]


def test_the_number_of_samples_is_known_after_the_last_batch() -> None:
    for count in (1, 7, 8):
        data = stream(count)
        batches = data.batches()
        next(batches)
        assert data.samples == (None if count > SIZE else count)
        assert sum(batch.size for batch in batches) == max(0, count - SIZE)
        assert data.samples == count


def test_the_first_batches_can_be_read_before_a_whole_pass() -> None:
    data = stream(23)
    assert values(data.batches(0, SIZE)) == [0, 1, 2, 3]
    assert values(data.batches(SIZE, 2 * SIZE)) == [4, 5, 6, 7]
    assert values(data.batches()) == list(range(23))


def test_the_current_batch_can_be_read_again_as_it_was_before_the_model_changed_it() -> None:
    data = stream(23)
    for batch in data.batches():
        start = batch.ids[0]
        batch.args[0].zero_()
        assert isinstance(start, int)
        assert values(data.batches(start, start + SIZE)) == list(batch.ids)


def test_the_largest_batch_can_be_read_at_the_end_and_others_cannot() -> None:
    data = stream(23)
    assert len(values(data.batches())) == 23
    assert values(data.batches(0, SIZE)) == [0, 1, 2, 3], "the first of several largest ones"
    with pytest.raises(ConfigError, match="sample 8 is no longer in memory"):
        next(data.batches(8))


def test_a_resume_skips_the_samples_before_its_start() -> None:
    data = stream(23)
    next(data.batches())
    assert values(data.batches(12)) == list(range(12, 23))


@pytest.mark.parametrize("count", [8, 23])
def test_a_resume_at_the_end_has_no_batches(count: int) -> None:
    data = stream(count)
    assert [*data.batches(count)] == []
    assert data.samples == count


@pytest.mark.parametrize(
    ("start", "problem"),
    [
        (24, "end after 23 samples, and 24 are predicted"),
        (40, "end after 23 samples, and 40 are predicted"),
        (10, "have more than the 10 samples"),
    ],
)
def test_a_resume_notices_another_number_of_samples(start: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        next(stream(23).batches(start))
