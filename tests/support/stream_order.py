"""Check the order of work on CUDA streams without a device.

Streams, events and torch operations are recorded with vector clocks. Two uses of the same memory,
one of which writes, must be ordered by a wait between their streams or by a wait of the host; else
the order on a device is undefined, and `Order.races` names both. Tensors "on the device" are on the
device `meta`, which has shapes and no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
HOST = "host"

Clock = dict[str, int]


def merge(one: Clock, other: Clock) -> None:
    """Set a clock to the latest of both."""
    for name, time in other.items():
        one[name] = max(one.get(name, 0), time)


class Stream:
    """A CUDA stream, or the host."""

    def __init__(self, order: Order, name: str) -> None:
        self.order, self.name, self.clock = order, name, Clock()

    def wait_stream(self, other: Stream) -> None:
        """Order later work of this stream behind the work of another so far."""
        self.order.waits += 1
        if self.order.waits != self.order.ignored_wait:
            merge(self.clock, other.clock)


class Event:
    """A CUDA event."""

    def __init__(self, order: Order) -> None:
        self.order, self.clock = order, Clock()

    def record(self, stream: Stream) -> None:
        """Remember the work of a stream so far."""
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        """Let the host wait."""
        merge(self.order.host.clock, self.clock)

    def query(self) -> bool:
        """Return whether the host has waited for this event or a later one."""
        return all(self.order.host.clock.get(s, 0) >= time for s, time in self.clock.items())


class Order(TorchDispatchMode):
    """Records which stream uses which memory, and finds uses without an order."""

    def __init__(self, ignored_wait: int = 0) -> None:
        """Record; ignore a wait between streams, by its number from 1."""
        super().__init__()
        self.host, self.forward = Stream(self, HOST), Stream(self, "forward")
        self.current, self.waits, self.ignored_wait = self.forward, 0, ignored_wait
        self.names = iter(["inward", "outward"])
        self.races: list[str] = []
        self.pinned: dict[int, Any] = {}
        self.recorded: set[tuple[int, str]] = set()
        """Memory and the stream of record_stream()."""
        self.used: dict[int, set[str]] = {}
        """Memory and the streams that use it."""
        self._written: dict[int, tuple[str, int]] = {}
        self._read: dict[int, list[tuple[str, int]]] = {}
        self._kept: list[Any] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Replace the streams and events of torch.cuda."""
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(self, next(self.names)))
        patch.setattr(torch.cuda, "Event", lambda: Event(self))
        patch.setattr(torch.cuda, "stream", self._on)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        record = lambda tensor, stream: self.recorded.add((memory(tensor), stream.name))  # noqa: E731
        patch.setattr(torch.Tensor, "record_stream", record)

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def use(self, stream: Stream, reads: list[Any], writes: list[Any]) -> None:
        """Note that a stream, or the host, uses tensors."""
        merge(stream.clock, self.host.clock)  # work is queued after what the host waited for
        time = stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        for tensor, write in [*((t, False) for t in reads), *((t, True) for t in writes)]:
            key = memory(tensor)
            self._kept.append(tensor.untyped_storage())  # no two memories have the same key
            self.used.setdefault(key, set()).add(stream.name)
            before = [self._written[key]] if key in self._written else []
            before += self._read.get(key, []) if write else []
            for name, earlier in before:
                if stream.clock.get(name, 0) < earlier:
                    self.races.append(f"{name} and {stream.name} use {list(tensor.shape)}")
            if write:
                self._written[key], self._read[key] = (stream.name, time), []
            else:
                self._read.setdefault(key, []).append((stream.name, time))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pin = kwargs.pop("pin_memory", False)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket.__name__
        to_host = name == "copy_" and args[1].device == DEVICE and args[0].device != DEVICE
        result = args[0] if to_host else func(*args, **kwargs)
        if name in {"empty", "empty_like"}:
            if pin:
                self.pinned[memory(result)] = result.untyped_storage()
            return result
        if name in {"detach", "alias", "view", "slice", "expand"}:
            return result
        across = (
            isinstance(result, torch.Tensor)
            and len({result.device, *(t.device for t in tensors)}) > 1
        )
        if across:
            asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)
            (host,) = [t for t in [*tensors, result] if t.device != DEVICE][:1]
            assert asynchronous, "a copy between host and device blocks"
            assert memory(host) in self.pinned, "a copy between host and device is not pinned"
        on_device = any(t.device == DEVICE for t in [*tensors, result])
        in_place = name.endswith("_")
        reads = [t for t in tensors if not (name in {"copy_", "zero_"} and t is args[0])]
        self.use(self.current if on_device else self.host, reads, [args[0] if in_place else result])
        return result


def memory(tensor: torch.Tensor) -> int:
    """Return a key of the memory of a tensor."""
    return int(tensor.untyped_storage()._cdata)
