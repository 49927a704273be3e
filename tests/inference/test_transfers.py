"""The order of copies and forwards on CUDA streams, checked without a device."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch

from gradrun.data.batch import Batch
from gradrun.inference.transfers import CudaTransfers
from tests.support.stream_order import DEVICE, Order, memory


def run(order: Order, patch: pytest.MonkeyPatch, in_flight: int = 3) -> tuple[Any, list[Any]]:
    """Run six batches as the runner does, with a model that returns the same memory each time."""
    order.install(patch)
    copies = CudaTransfers(torch.device("cuda"), "bfloat16")
    copies._device = DEVICE
    ring, held = deque[Any](), list[Any]()
    same = torch.empty(4, 2, device=DEVICE, dtype=torch.bfloat16)

    def finish() -> None:
        host, copied = ring.popleft()
        copied.wait()
        order.use(order.host, [*host], [])

    with order, torch.inference_mode():
        for number in range(6):
            there = torch.ones(4, 2, device=DEVICE)  # an input that is on the device already
            inputs = (torch.full((4, 2), number), torch.ones(4, 2), there)
            batch = Batch(inputs, {}, 4, range(4))
            if len(ring) == in_flight:
                finish()
            numbers, ones, _ = copies.to_device(batch).args
            assert (numbers.dtype, ones.dtype) == (torch.int64, torch.bfloat16)
            torch.add(numbers, ones, out=same)
            ones.zero_()  # the model may write to its input
            host = [copies.to_host(same), copies.to_host(numbers)]
            copied = copies.mark()
            ring.append((host, copied))
            held.append(copied)
        while ring:
            finish()
    return copies, held


def test_all_uses_of_the_same_memory_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order()
    run(order, monkeypatch)
    assert order.races == []
    streams = {name for names in order.used.values() for name in names}
    assert streams == {"host", "inward", "forward", "outward"}


@pytest.mark.parametrize("wait", [1, 2, 3])
def test_each_wait_between_streams_is_needed(wait: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits of a batch: forward for its inputs, outward for each of two outputs."""
    order = Order(ignored_wait=wait)
    run(order, monkeypatch, in_flight=1)
    assert order.races


def test_an_output_that_is_read_before_the_wait_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order()
    order.install(monkeypatch)
    copies = CudaTransfers(torch.device("cuda"), None)
    copies._device = DEVICE
    with order:
        host = copies.to_host(torch.ones(2, device=DEVICE))
        copied = copies.mark()
        assert not copied.done()
        order.use(order.host, [host], [])
    assert order.races == ["outward and host use [2]"]
    copied.wait()
    assert copied.done()


def test_memory_of_copies_is_kept_and_recorded_until_the_end_of_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = Order()
    copies, held = run(order, monkeypatch)
    kept = {memory(tensor) for copied in held for tensor in copied._memory}
    for key, streams in order.used.items():
        if streams & {"inward", "outward"}:
            assert key in kept
            if key not in order.pinned:  # the allocator of pinned memory tracks its copies
                side = {"forward"} if "inward" in streams else {"outward"}
                assert {(key, name) for name in side} <= order.recorded
    assert copies._memory == []
