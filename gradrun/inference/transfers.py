"""Copies of batches to the device, and of outputs back to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradrun.data.batch import Batch, transfer_to
from gradrun.output.transforms import to_cpu


class Copied:
    """The end of the copies of one batch; by itself, of copies that are complete."""

    def wait(self) -> None:
        """Wait until the outputs of the batch are complete in host memory.

        Raises:
            Exception: the device failed, in this batch or in a later one.
        """

    def done(self) -> bool:
        """Return whether wait() would return, or raise, at once."""
        return True


class Transfers:
    """Copies of batches and outputs that are complete when they return; on any device.

    Work on the current stream is the forward pass.
    """

    def __init__(self, device: torch.device, dtype: str | None) -> None:
        """Move batches to `device`, with floating-point inputs cast to `dtype`."""
        self._move = transfer_to(device, dtype)

    def to_device(self, batch: Batch) -> Batch:
        """Return the batch on the device, ready for work on the current stream."""
        return self._move(batch) if self._move else batch

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy in host memory of its own, complete after wait() of the next mark()."""
        # A copy, because a model may return the same memory with every batch.
        return to_cpu(tensor).clone() if tensor.is_cpu else to_cpu(tensor)

    def mark(self) -> Copied:
        """Return the end of the copies since the last call."""
        return Copied()


class _CudaCopied(Copied):
    """A recorded event, and the memory that copies before it use."""

    def __init__(self, event: Any, memory: list[torch.Tensor]) -> None:
        self._event, self._memory = event, memory

    def wait(self) -> None:
        self._event.synchronize()

    def done(self) -> bool:
        try:
            return bool(self._event.query())
        except RuntimeError:  # the device failed, and wait() reports it
            return True


class CudaTransfers(Transfers):
    """Copies through pinned memory on two streams, beside the stream of the forward pass.

    Every tensor that a copy uses is referenced until the host has waited for the copy. Besides,
    torch's allocators delay reuse: that of the device for recorded streams, and that of pinned
    memory for copies that do not block.
    """

    def __init__(self, device: torch.device, dtype: str | None) -> None:
        super().__init__(device, dtype)
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._dtype: Any = getattr(torch, dtype) if dtype else None
        stream: Any = torch.cuda.Stream  # not typed in torch
        self._inward, self._outward = stream(self._device), stream(self._device)
        self._memory: list[torch.Tensor] = []

    def to_device(self, batch: Batch) -> Batch:
        moved = batch.map(self._send)
        torch.cuda.current_stream(self._device).wait_stream(self._inward)
        return moved

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self._dtype if self._dtype and tensor.is_floating_point() else tensor.dtype
        if not tensor.is_cpu or tensor.layout != torch.strided:
            return tensor.to(self._device, dtype)
        pinned = torch.empty_like(tensor, dtype=dtype, pin_memory=True).copy_(tensor)
        with torch.cuda.stream(self._inward):
            moved = pinned.to(self._device, non_blocking=True)
        # The model may keep its input for longer than this batch.
        moved.record_stream(torch.cuda.current_stream(self._device))
        self._memory += [pinned, moved]
        return moved

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device != self._device or tensor.layout != torch.strided:
            return super().to_host(tensor)
        # A copy on the device first: the next forward may write to the memory of its outputs.
        own = tensor.detach().resolve_conj().resolve_neg()
        own = own.clone(memory_format=torch.contiguous_format)
        host = torch.empty(own.shape, dtype=own.dtype, device="cpu", pin_memory=True)
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            host.copy_(own, non_blocking=True)
        own.record_stream(self._outward)
        self._memory += [own, host]
        return host

    def mark(self) -> Copied:
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        kind: Any = torch.cuda.Event  # not typed in torch
        event = kind()
        event.record(self._outward)
        memory, self._memory = self._memory, []
        return _CudaCopied(event, memory)


TRANSFERS: dict[str, Callable[[torch.device, str | None], Transfers]] = {
    "cpu": Transfers,
    "cuda": CudaTransfers,
}
"""Device type -> copies for several batches in flight; other devices run one batch at a time."""
