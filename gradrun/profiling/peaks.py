"""Measure the peaks of a machine: matrix products per type, and the bandwidth of copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from math import inf

import torch

from gradrun.comparison.session import MAX_OTHERS, MAX_STEAL
from gradrun.core.cpu import available_cpus
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.units import pluralize
from gradrun.inference.device import resolve_device, torch_threads
from gradrun.inference.environment import current_machine
from gradrun.inference.meters.system_load import SystemLoadMeter
from gradrun.profiling.call_tree import Clock, host_clock
from gradrun.results.peaks_cache import CachedPeaks, cache_path, cached_peaks, save_peaks
from gradrun.results.result import SystemNoise, Warning
from gradrun.results.work import MachinePeaks, Peak

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SIZES = (256, 512, 1024, 2048, 3072, 4096)
_GPU_SIZES = (1024, 2048, 4096, 8192, 16384)
_GAIN = 1.02
"""A larger matrix is tried while it is this much faster than the one before."""

_ROUNDS = 5
"""All peaks are measured in turn this often: a machine may be slow for some seconds."""
_SECONDS = 0.25
"""Per peak and round."""
_TRIAL_SECONDS = 0.05
_SLOWEST = 0.3
"""Seconds of one product above which no larger size is tried."""
_COPY_BYTES = 256 * 1024 * 1024
_LEAST_REPEATS = 3
_COPY = "copy"

Call = Callable[[], object]


def measure_peaks(
    device: torch.device, threads: int, progress: ProgressCallback = ignore
) -> tuple[MachinePeaks, SystemNoise]:
    """Measure the peaks of a device with a number of threads, and the load of other programs.

    A peak is the fastest of several products, because other programs only slow them down. Types
    that the device cannot multiply are left out.
    """
    now = host_clock(device)
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    sizes: dict[str, int] = {}
    calls: dict[str, Call] = {}
    steps = len(DTYPES) + _ROUNDS
    with torch_threads(threads), torch.inference_mode(), SystemLoadMeter() as load:
        for step, (name, dtype) in enumerate(zip(names, DTYPES, strict=True)):
            progress(Progress(f"finding a size for {name}", step, steps))
            with suppress(RuntimeError, TypeError):  # the device lacks the type
                sizes[name], calls[name] = _fastest_size(dtype, device, now)
        calls[_COPY] = _copy(device)
        shortest = dict.fromkeys(calls, inf)
        for number in range(_ROUNDS):
            progress(Progress("measuring the peaks", len(DTYPES) + number, steps))
            for name, call in calls.items():
                shortest[name] = min(shortest[name], _shortest(call, now, _SECONDS))
    products = [
        Peak(dtype=name, rate=2 * size**3 / shortest[name], size=size)
        for name, size in sizes.items()
    ]
    peaks = MachinePeaks(
        device=device.type,
        threads=threads,
        products=tuple(products),
        copy=2 * _COPY_BYTES / shortest[_COPY],
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return peaks, load.noise()


def kept_peaks(
    device: torch.device, threads: int, progress: ProgressCallback, *, again: bool = False
) -> tuple[MachinePeaks, list[Warning]]:
    """Return the cached peaks; measure and cache them if there are none, or `again` is set.

    Peaks that were measured beside other programs are not cached.
    """
    machine = current_machine(device)
    cached = None if again else cached_peaks(machine, threads)
    if cached:
        return cached, []
    peaks, noise = measure_peaks(device, threads, progress)
    if noise.others > MAX_OTHERS or noise.steal > MAX_STEAL:
        text = (
            f"the peaks of {pluralize(threads, 'thread')} were measured while other programs used "
            f"{noise.others:.1f} CPUs, and may be too low; they were not kept. On a quiet machine, "
            "run gradrun profile --machine"
        )
        return peaks, [Warning(code="noisy_peaks", text=text)]
    if not save_peaks(machine, peaks):
        text = (
            f"the peaks could not be kept in {cache_path(machine)}; GRADRUN_CACHE selects a folder"
        )
        return peaks, [Warning(code="peaks_not_kept", text=text)]
    return peaks, []


def machine_peaks(device: str = "auto", *, progress: ProgressCallback = ignore) -> CachedPeaks:
    """Measure and cache the peaks of a device; on a CPU, for several numbers of threads.

    Raises:
        ConfigError: the device is not available.
    """
    where = resolve_device(device)
    counts = thread_counts() if where.type == "cpu" else [torch.get_num_threads()]
    peaks, warnings = list[MachinePeaks](), list[Warning]()
    for count in counts:
        measured, noted = kept_peaks(where, count, progress, again=True)
        peaks.append(measured)
        warnings += noted
    return CachedPeaks(
        machine=current_machine(where),
        peaks=tuple(peaks),
        notes=tuple(warning.text for warning in warnings),
    )


def thread_counts() -> list[int]:
    """Return the powers of two up to the available CPUs, and their number."""
    cpus = available_cpus()
    return sorted({cpus, *(2**power for power in range(cpus.bit_length()) if 2**power <= cpus)})


def _fastest_size(dtype: torch.dtype, device: torch.device, now: Clock) -> tuple[int, Call]:
    """Return the size of matrices from which the rate does not rise, and their product."""
    best = 0.0
    for size in _SIZES if device.type == "cpu" else _GPU_SIZES:
        call = _product(size, dtype, device)
        seconds = _shortest(call, now, _TRIAL_SECONDS)
        rate = 2 * size**3 / seconds
        if rate < best * _GAIN:
            break
        best, found = rate, (size, call)
        if seconds > _SLOWEST / 8:  # twice the size takes eight times as long
            break
    return found


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Call:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    result = torch.empty_like(one)
    return lambda: torch.mm(one, two, out=result)


def _copy(device: torch.device) -> Call:
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _shortest(call: Call, now: Clock, seconds: float) -> float:
    """Return the shortest time of a call, of as many as fit in `seconds`, but at least three."""
    call()
    times: list[int] = []
    began = time.perf_counter()
    while len(times) < _LEAST_REPEATS or time.perf_counter() - began < seconds:
        started = now()
        call()
        times.append(now() - started)
    return max(min(times), 1) * 1e-9
