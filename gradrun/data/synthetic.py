"""Seeded random inputs, for measuring a model without data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from gradrun.config.data import SyntheticData, SyntheticInput
from gradrun.core.errors import ConfigError
from gradrun.data.source import BatchSource, ChunkedSource, OpeningFacts

_BLOCK_BYTES = 256 * 1024


def open_data(config: SyntheticData, facts: OpeningFacts) -> BatchSource:
    """Return a source that draws random rows when they are read."""
    readers = {
        name: _SyntheticReader(spec, config.samples, f"data.inputs.{name}", (facts.seed, i))
        for i, (name, spec) in enumerate(config.inputs.items())
    }
    return ChunkedSource(readers, config.batch_size, config.call)


class _SyntheticReader:
    """Draws rows in blocks of fixed size, each with its own seed.

    A sample depends neither on the batch size nor on where reading starts.
    """

    def __init__(self, spec: SyntheticInput, samples: int, key: str, seed: tuple[int, int]) -> None:
        self.spec, self.samples, self.seed = spec, samples, seed
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.sample_bytes = math.prod(spec.shape) * self.dtype.itemsize
        self.block = max(1, _BLOCK_BYTES // max(1, self.sample_bytes))
        if spec.distribution in {"normal", "uniform"} and not self.dtype.is_floating_point:
            raise ConfigError(
                f"{spec.distribution} numbers need a floating-point dtype, not {spec.dtype}; use "
                "distribution: randint",
                f"{key}.distribution",
            )
        if spec.distribution in {"uniform", "randint"}:
            if spec.low >= spec.high:
                raise ConfigError(
                    f"low {spec.low:g} must be below high {spec.high:g}", f"{key}.low"
                )
            lowest, highest = _limits(spec.distribution, self.dtype)
            if spec.low < lowest or spec.high > highest:
                raise ConfigError(
                    f"{spec.distribution} numbers of {spec.dtype} must be between {lowest:g} and "
                    f"{highest:g}",
                    f"{key}.low" if spec.low < lowest else f"{key}.high",
                )

    def describe(self) -> str:
        return f"random {self.spec.distribution} {self.spec.dtype} {list(self.spec.shape)}"

    def chunk(self, start: int, stop: int) -> tuple[torch.Tensor, Mapping[int, str]]:
        first, last = start // self.block, (stop - 1) // self.block
        blocks = torch.cat([self._draw(i) for i in range(first, last + 1)])
        offset = first * self.block
        return blocks[start - offset : stop - offset], {}

    def _draw(self, index: int) -> torch.Tensor:
        spec, shape = self.spec, (self.block, *self.spec.shape)
        # Multiples of the golden ratio keep the seeds of neighboring blocks and inputs far apart.
        seed = (self.seed[0] + 0x9E3779B97F4A7C15 * (index * 64 + self.seed[1] + 1)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        match spec.distribution:
            case "normal":
                drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
            case "uniform":
                drawn = (
                    torch.rand(shape, generator=generator, dtype=torch.float32)
                    * (spec.high - spec.low)
                    + spec.low
                )
            case "randint":
                low, high = math.ceil(spec.low), math.ceil(spec.high)
                drawn = torch.randint(low, max(high, low + 1), shape, generator=generator)
            case "zeros":
                drawn = torch.zeros(shape, dtype=torch.float32)
            case "ones":
                drawn = torch.ones(shape, dtype=torch.float32)
        return drawn.to(self.dtype)


def _limits(distribution: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return the lowest value, and the exclusive upper limit, that can be drawn and converted."""
    if distribution != "randint":
        # Drawn as float32 and scaled by high - low.
        limit = min(torch.finfo(torch.float32).max / 2, torch.finfo(dtype).max)
        return -limit, limit
    if dtype == torch.bool:
        return 0, 2
    drawn = torch.iinfo(torch.int64)
    if dtype.is_floating_point:
        limit = min(torch.finfo(dtype).max, drawn.max)
        return -limit, limit
    return torch.iinfo(dtype).min, min(torch.iinfo(dtype).max + 1, drawn.max)
