"""The section `tune`: constraints of `gradrun tune`, and the machine that a config was tuned on."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from gradrun.config import limits
from gradrun.config.base import Section, Size
from gradrun.config.check import ByteLimit, parsed_by

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|µs|ms|s|min)")
_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


def parse_duration(text: str) -> float:
    """Parse `"50ms"` or `"1.5 s"` as seconds.

    Raises:
        ValueError: the text is not a duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is not a duration; write 50ms or 1.5 s")
    return float(match[1]) * _UNITS[match[2]]


class WithinSection(Section):
    """The tolerated change of the outputs. Several limits hold together."""

    bitwise: bool = Field(False, description="no bit may change")
    max_abs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="greatest difference of a value"
    )
    max_rel: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="greatest difference of a value, relative to the greatest output"
    )
    cosine: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="least cosine similarity of a sample's outputs, such as 0.999"
    )
    top1: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the samples whose greatest output stays the same, such as 0.998"
    )
    metric: str | None = Field(None, description="a metric of the section `metrics` to preserve")
    drop: Annotated[float, Field(ge=0)] = Field(
        0.0, description="how much worse the metric may become, such as 0.002"
    )

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not any((self.bitwise, self.max_abs, self.max_rel, self.cosine, self.top1, self.metric)):
            raise ValueError("set a tolerance: bitwise, max_abs, max_rel, cosine, top1 or metric")
        return self


def _parse_within(given: Any) -> Any:
    return {"bitwise": True} if given == "bitwise" else given


Within = Annotated[
    WithinSection, BeforeValidator(_parse_within, json_schema_input_type=str | WithinSection)
]


class MachineSection(Section):
    """The machine that a config was tuned on."""

    torch: str = Field(description="version of torch")
    cpu: str = Field(description="model of the CPU")


class TuneSection(Section):
    """How `gradrun tune` searches."""

    within: Within | None = Field(
        None,
        description="tolerated change of the outputs: {max_rel: 0.01}, or bitwise; default: "
        "measure.rtol and measure.atol",
    )
    memory: ByteLimit | None = Field(
        None, description="limit of the process peak of all workers, such as 600 MiB"
    )
    p99: Annotated[str, parsed_by(parse_duration)] | None = Field(
        None, description="limit of the 99th percentile of the batch times, such as 50ms"
    )
    budget: Annotated[float, Field(gt=0, le=86_400)] = Field(
        300.0, description="approximate time limit in seconds"
    )
    samples: Size | None = Field(
        None, description="samples of a job, over which the start must pay; default: those of data"
    )
    steady: bool = Field(False, description="ignore the time of the start")
    keep: tuple[str, ...] = Field((), description="keys not to change, such as data.batch_size")
    machine: MachineSection | None = Field(
        None, description="where the config was tuned; `infer` warns on another machine"
    )

    @property
    def memory_limit(self) -> float | None:
        """Bytes."""
        return limits.byte_limit(self.memory).value if self.memory else None

    @property
    def p99_limit(self) -> float | None:
        """Seconds."""
        return parse_duration(self.p99) if self.p99 else None
