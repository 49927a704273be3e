"""Variants that wait in processes of their own and run a block of samples when it is their turn.

For settings of a whole process, which variants in one process cannot have: the allocator, the
precision of operators, the number of worker processes. A block is the timed loop of a run: reading
data, the forward pass and the transformed outputs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from gradrun.comparison.predictions import distances, same_values
from gradrun.config.schema import RunConfig
from gradrun.core.cpu import available_cpus, thread_count
from gradrun.core.errors import ConfigError, RunFailed
from gradrun.core.units import pluralize
from gradrun.engines.engine import Lost, start_error
from gradrun.engines.messages import (
    Done,
    Failed,
    Open,
    Quarantined,
    Ready,
    Task,
    unpack_rows,
)
from gradrun.engines.processes import ProcessesEngine
from gradrun.output.columns import as_tensors
from gradrun.output.transforms import Tensors

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Block:
    """One block of a lane."""

    samples: int
    seconds: float
    waited: float = 0.0
    """Share of the time in which a thread waited for a CPU."""
    batch_seconds: tuple[float, ...] = ()
    process_peak: int | None = None
    """Of all processes of the lane together, in bytes."""
    rows: tuple[Tensors, ...] = ()
    """The outputs of each sample in the order of the input, if they were asked for."""

    @property
    def seconds_per_sample(self) -> float:
        """Wall time per sample."""
        return self.seconds / self.samples


class Lane(Protocol):
    """A variant that is loaded and waits."""

    config: RunConfig
    start_seconds: float
    """From the start of the process to the end of the warm-up."""
    ready: Ready
    """Of the first process."""

    def run(self, start: int, stop: int, *, rows: bool = False) -> Block:
        """Run the samples start to stop, multiples of the unit or the end of the data.

        Raises:
            RunFailed: the model failed, or the process ended.
        """

    def close(self) -> None:
        """End the processes; closing twice has no effect."""


@dataclass
class ProcessLane:
    """A lane of one process, or of as many as `engine.workers` says."""

    config: RunConfig
    engine: ProcessesEngine
    workers: list[int]
    ready: Ready
    start_seconds: float
    _peaks: dict[int, int | None] = field(default_factory=dict)

    def run(self, start: int, stop: int, *, rows: bool = False) -> Block:
        parts = _divide(start, stop, len(self.workers), self.ready.unit)
        began = time.perf_counter()
        for worker, (first, last) in zip(self.workers, parts, strict=False):
            # Rows of several workers travel to the driver in a run, so that they count.
            keep = rows or len(self.workers) > 1
            self.engine.send(worker, Task(start=first, stop=last, rows=keep))
        done: dict[int, Done] = {}
        while len(done) < len(parts):
            if event := self.engine.next(_POLL_SECONDS):
                number, message = event
                if isinstance(message, Lost):
                    raise RunFailed(f"worker {number} {message.cause}")
                assert isinstance(message, Done)
                if message.error:
                    raise RunFailed(message.error)
                done[number] = message
        wall = time.perf_counter() - began
        for number, message in done.items():
            self._peaks[number] = message.process_peak
        ordered = [done[worker] for worker in self.workers if worker in done]
        peaks = [peak for peak in self._peaks.values() if peak is not None]
        return Block(
            samples=stop - start,
            seconds=ordered[0].seconds if len(ordered) == 1 else wall,
            waited=max(message.waited for message in ordered),
            batch_seconds=tuple(
                float(s) for message in ordered for s in np.frombuffer(message.batch_seconds)
            ),
            process_peak=sum(peaks) if len(peaks) == len(self._peaks) else None,
            rows=tuple(row for message in ordered for row in _rows(message)) if rows else (),
        )

    def close(self) -> None:
        self.engine.close()


class NotReady(RunFailed):
    """The processes of a lane did not start in time."""


def open_lane(config: RunConfig, *, trust_code: bool, timeout: float) -> ProcessLane:
    """Start the processes of a variant and wait until they are warm.

    Raises:
        ConfigError: the config cannot run on lanes.
        NotReady: `timeout` seconds have passed.
        RunFailed: the model or the data cannot be opened.
    """
    config.check_importable()
    count = lane_workers(config)
    threads = thread_count(config.run.threads)
    if count > 1 and config.run.threads == "auto":
        threads = max(1, available_cpus() // count)
        config = config.replace({"run.threads": threads})
    opening = Open(config=config.model_dump(mode="json"), trust_code=trust_code)
    engine = ProcessesEngine([opening] * count, threads, pin=count > 1)
    began = time.perf_counter()
    engine.start(count)
    ready: dict[int, Ready] = {}
    try:
        while len(ready) < count:
            left = timeout - (time.perf_counter() - began)
            if left <= 0:
                raise NotReady(f"not ready within {timeout:.0f} s")
            if event := engine.next(min(left, _POLL_SECONDS)):
                number, message = event
                if isinstance(message, Failed) and message.invalid:
                    raise ConfigError(message.error)
                if not isinstance(message, Ready):
                    raise start_error(number, message)
                ready[number] = message
    except BaseException:
        engine.close()
        raise
    workers = sorted(ready)
    seconds = time.perf_counter() - began
    return ProcessLane(config, engine, workers, ready[workers[0]], seconds)


def lane_workers(config: RunConfig) -> int:
    """Return the number of processes that a config asks for.

    Raises:
        ConfigError: it asks for a cluster.
    """
    if config.engine is None:
        return 1
    if config.engine.source != "processes":
        raise ConfigError(
            f"engine {config.engine.source} runs on other machines, and this command measures this "
            "one; remove the section, or use engine.source: processes",
            "engine.source",
        )
    if config.engine.workers == "auto":
        return max(1, available_cpus() // thread_count(config.run.threads))
    return config.engine.workers


def _divide(start: int, stop: int, parts: int, unit: int) -> list[tuple[int, int]]:
    """Cut a range at multiples of the unit into at most `parts` parts of similar size."""
    units = -(-(stop - start) // unit)
    parts = min(parts, units)
    cuts = [min(stop, start + units * part // parts * unit) for part in range(parts + 1)]
    return list(itertools.pairwise(cuts))


def _rows(done: Done) -> list[Tensors]:
    """Return the outputs of each sample in the order of the input.

    Raises:
        RunFailed: a sample has no prediction.
    """
    rows: list[Tensors] = []
    for event in done.events:
        if isinstance(event, Quarantined):
            raise RunFailed(
                f"sample {event.id!r} has no prediction, so that outputs cannot be compared: "
                f"{event.error}"
            )
        if event.valid is not None:
            raise RunFailed("a sample has no prediction; see gradrun infer")
        outputs, _, _ = unpack_rows(event)
        tensors = as_tensors(outputs)
        rows += ({name: tensor[i] for name, tensor in tensors.items()} for i in range(event.size))
    if done.positions is None:
        return rows
    order = sorted(range(len(rows)), key=done.positions.__getitem__)
    return [rows[i] for i in order]


# --- differences of outputs --------------------------------------------------------------------


@dataclass(frozen=True)
class Deviation:
    """The difference of the outputs of a variant from those of the baseline."""

    samples: int
    bitwise: bool
    max_abs: float
    max_rel: float
    """Greatest difference over the greatest output, of the output where it is largest."""
    cosine: float
    """Least over the samples."""
    top1: float
    """Share of the samples whose greatest value is at the same place."""
    close: bool
    """Within measure.rtol and measure.atol everywhere."""


def deviation(
    base: Sequence[Tensors], other: Sequence[Tensors], *, rtol: float, atol: float
) -> Deviation:
    """Compare the outputs of the same samples; texts are compared without their padding.

    Raises:
        RunFailed: the outputs have other names or shapes.
    """
    if len(base) != len(other):
        raise RunFailed(f"outputs of {pluralize(len(other), 'sample')} instead of {len(base)}")
    if base[0].keys() != other[0].keys():
        expected, found = (", ".join(rows[0]) for rows in (base, other))
        raise RunFailed(f"the outputs are {found} instead of {expected}")
    bitwise = close = True
    max_abs = max_rel = 0.0
    cosine, same_top = 1.0, torch.ones(len(base), dtype=torch.bool)
    for name in base[0]:
        difference = greatest = 0.0
        for positions, one, two in _stacked([b[name] for b in base], [o[name] for o in other]):
            bitwise &= one.dtype == two.dtype and _same_bytes(one, two)
            if not one.numel():
                continue
            one, two = _numbers(one), _numbers(two)
            same, gap = same_values(one, two), distances(one, two)
            difference = max(difference, float(gap.max()))
            # Scores of impossible classes are -inf, which must not hide the others' differences.
            greatest = max(greatest, float(one.nan_to_num(0.0, 0.0, 0.0).abs().max()))
            close &= torch.allclose(one, two, rtol=rtol, atol=atol, equal_nan=True)
            infinite = same & ~one.isfinite()
            first, second = (values.masked_fill(infinite, 0.0) for values in (one, two))
            cosines = torch.nn.functional.cosine_similarity(first, second, dim=1)
            cosines[same.all(1)] = 1.0
            cosine = min(cosine, float(cosines.nan_to_num(nan=-1.0).min()))
            if one.shape[1] > 1:
                same_top[positions] &= one.argmax(1) == two.argmax(1)
            else:
                same_top[positions] &= gap[:, 0] < 0.5
        max_abs = max(max_abs, difference)
        if difference:
            max_rel = max(max_rel, difference / greatest if greatest else torch.inf)
    top1 = float(same_top.double().mean())
    return Deviation(len(base), bitwise, max_abs, max_rel, cosine, top1, close)


def _stacked(
    base: Sequence[torch.Tensor], other: Sequence[torch.Tensor]
) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Stack samples of the same shape; crop others to the shape that both have."""
    if len({tensor.shape for tensor in (*base, *other)}) == 1:
        return [(slice(None), *_at_least_2d(torch.stack([*base]), torch.stack([*other])))]
    if all(len({tensor.shape for tensor in tensors}) == 1 for tensors in (base, other)):
        raise RunFailed(f"an output has shape {list(other[0].shape)}, not {list(base[0].shape)}")
    pairs = []
    for i, (one, two) in enumerate(zip(base, other, strict=True)):
        if one.ndim != two.ndim:
            raise RunFailed(f"an output has shape {list(two.shape)}, not {list(one.shape)}")
        common = tuple(slice(min(sizes)) for sizes in zip(one.shape, two.shape, strict=True))
        pairs.append((slice(i, i + 1), *_at_least_2d(one[common][None], two[common][None])))
    return pairs


def _at_least_2d(one: torch.Tensor, two: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (one[:, None], two[:, None]) if one.ndim == 1 else (one, two)


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of samples [n, ...] as [n, numbers]; a complex value is two numbers."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.flatten(1).double()


def _same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    if not one.numel():
        return True
    first, second = (t.contiguous().view(torch.uint8) for t in (one, two))
    return torch.equal(first, second)
