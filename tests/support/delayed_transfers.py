"""Copies that run late in a thread, over memory that is reused as torch's allocators reuse it.

Memory is filled with a pattern as soon as nothing references it any more, and is used again for the
next tensor of its size. Outputs that are read too early, or memory that is released too early, thus
give wrong predictions.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from gradrun.data.batch import Batch, transfer_to
from gradrun.output.transforms import to_cpu

_PATTERN = 0xA5


class Pool:
    """Memory by size. A block returns to the pool with the last tensor that uses it."""

    def __init__(self) -> None:
        self._free: dict[int, list[Any]] = {}
        self.blocks = self.reused = 0

    def tensor(self, like: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return a tensor of the shape and dtype of another one, with any content; its block."""
        free = self._free.setdefault(like.nbytes, [])
        if free:
            block = free.pop()
            self.reused += 1
        else:
            block = np.full(like.nbytes, _PATTERN, np.uint8)
            self.blocks += 1
        handle = block[:]
        weakref.finalize(handle, self._release, block)
        tensor = torch.from_numpy(handle).view(like.dtype).reshape(like.shape)
        return tensor, block

    def _release(self, block: Any) -> None:
        block.fill(_PATTERN)
        self._free[len(block)].append(block)


class _Copied:
    def __init__(self, owner: DelayedTransfers, number: int, memory: list[torch.Tensor]) -> None:
        self._owner, self._number, self._memory = owner, number, memory

    def wait(self) -> None:
        self._owner.wait(self._number)

    def done(self) -> bool:
        return self._owner.finished >= self._number


class DelayedTransfers:
    """Copies to the host that a thread runs "late", when they are waited for, or at any time."""

    when: Literal["late", "any time"] = "late"
    made: list[DelayedTransfers] = []  # noqa: RUF012 - the instances, for tests
    fails_at: int | None = None
    """The number of the batch, from 1, whose copies fail with the error of a broken device."""
    fits: int | None = None
    """Batches in flight for which there is memory."""

    def __init__(self, device: torch.device, dtype: str | None) -> None:
        self._move = transfer_to(device, dtype)
        self.pool, self._memory = Pool(), list[torch.Tensor]()
        self._jobs: deque[tuple[int, Callable[[], None]]] = deque()
        self._condition = threading.Condition()
        self._marks = self._wanted = self.finished = self._alive = 0
        self.most = 0
        """Most batches in flight at the same time."""
        self._random = random.Random(5)
        self.made.append(self)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def to_device(self, batch: Batch) -> Batch:
        if self.fits is not None and self._alive >= self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        moved = self._move(batch) if self._move else batch
        copied = moved.map(self._copy)
        self._memory += copied.tensors()
        return copied

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        value = to_cpu(tensor)
        if not value.nbytes:
            return value.clone()
        own, source = self.pool.tensor(value)
        own.copy_(value)
        host, target = self.pool.tensor(value)
        self._memory += [own, host]
        self._put(self._marks + 1, lambda: np.copyto(target, source))
        return host

    def mark(self) -> _Copied:
        self._marks += 1
        number, memory = self._marks, self._memory
        self._memory = []
        copied = _Copied(self, number, memory)
        if memory:
            self._alive += 1
            self.most = max(self.most, self._alive)
            weakref.finalize(copied, self._end)
        self._put(number, lambda: self._finish(number))
        return copied

    def wait(self, number: int) -> None:
        with self._condition:
            self._wanted = max(self._wanted, number)
            self._condition.notify_all()
            assert self._condition.wait_for(lambda: self.finished >= number, timeout=20)
        if self.fails_at is not None and number >= self.fails_at:
            kind = getattr(torch, "AcceleratorError", RuntimeError)  # from torch 2.8 on
            raise kind("CUDA error: device-side assert triggered")

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.nbytes:
            return tensor.clone()
        copied, _ = self.pool.tensor(tensor)
        return copied.copy_(tensor)

    def _end(self) -> None:
        self._alive -= 1

    def _put(self, number: int, job: Callable[[], None]) -> None:
        with self._condition:
            self._jobs.append((number, job))
            self._condition.notify_all()

    def _finish(self, number: int) -> None:
        with self._condition:
            self.finished = number
            self._condition.notify_all()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: (
                        self._jobs and (self.when == "any time" or self._jobs[0][0] <= self._wanted)
                    )
                )
                _, job = self._jobs.popleft()
            if self.when == "any time":
                time.sleep(self._random.choice([0, 0, 2e-4, 1e-3]))
            job()
