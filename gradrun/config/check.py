"""The `check` section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from gradrun.config import limits
from gradrun.config.base import OutputPath, Section
from gradrun.core.grad_mode import GradMode
from gradrun.core.remote import is_remote


def _check_golden_path(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise ValueError("golden outputs must be a .safetensors file")
    if is_remote(path):
        raise ValueError("golden outputs must be a local file")
    return path


def parsed_by(parse: Callable[[str], object]) -> AfterValidator:
    """Return a validator that calls `parse` for its ValueError and keeps the text."""

    def validate(text: str) -> str:
        parse(text)
        return text

    return AfterValidator(validate)


def _number_to_text(value: object) -> object:
    """Accept a YAML number as a limit, such as a count of bytes."""
    return str(value) if type(value) in {int, float} else value


_Text = Annotated[str, BeforeValidator(_number_to_text, json_schema_input_type=str | int | float)]
ByteLimit = Annotated[_Text, parsed_by(limits.byte_limit)]
NumberLimit = Annotated[_Text, parsed_by(limits.number_limit)]
Percentage = Annotated[_Text, parsed_by(limits.percentage)]
Tolerance = Annotated[float, Field(ge=0)]


class _WithMetrics(Section):
    """A section whose other keys are names of metrics."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    __pydantic_extra__: dict[str, _Text]

    def of_metrics(self) -> dict[str, str]:
        """Return the limits of metrics by name."""
        return dict(self.model_extra or {})


class LimitsSection(_WithMetrics):
    """Limits that hold on any machine; memory is that of the largest batch.

    Metrics are limited by name: `accuracy: ">= 0.97"`.
    """

    weights: ByteLimit | None = Field(None, description="size of the weights, such as 60 MiB")
    forward_peak: ByteLimit | None = Field(None, description="peak of tensors in the forward pass")
    retained: ByteLimit | None = Field(None, description="tensors retained after the forward pass")
    process_peak: ByteLimit | None = Field(None, description="peak resident set of the process")
    device_allocated: ByteLimit | None = Field(None, description="peak allocated on the device")
    device_reserved: ByteLimit | None = Field(None, description="peak reserved on the device")
    speedup_over_grad: NumberLimit | None = Field(
        None, description="time in grad divided by time, such as '>= 1.0'"
    )
    speedup_over_no_grad: NumberLimit | None = Field(None, description="the same for no_grad")
    speedup_over_inference_mode: NumberLimit | None = Field(
        None, description="the same for inference_mode"
    )


class RegressionSection(_WithMetrics):
    """Maximum increase over the baseline.

    Metrics are limited by name, as a share of the baseline's value: `accuracy: 1%`.
    """

    time: Percentage | None = Field("5%", description="time per batch; null: not checked")
    forward_peak: Percentage | None = Field("1%", description="tensor memory in the forward pass")
    retained: Percentage | None = Field(None, description="tensor memory after the forward pass")
    process_peak: Percentage | None = Field(None, description="peak resident set of the process")
    outputs: bool = Field(True, description="require equal outputs, within the tolerance")


class CheckSection(Section):
    """Requirements of `gradrun check`."""

    mode: GradMode | None = Field(None, description="the mode to check; default: run.mode")
    smoke: bool = Field(
        True, description="the model runs, outputs are finite, no graph is retained, modes agree"
    )
    limits: LimitsSection = LimitsSection()
    regression: RegressionSection = RegressionSection()
    expected: Annotated[OutputPath, AfterValidator(_check_golden_path)] | None = Field(
        None, description="file of golden outputs (.safetensors), written by --update-expected"
    )
    rtol: Tolerance = Field(
        1e-4, description="relative tolerance of golden outputs and a baseline's outputs"
    )
    atol: Tolerance = Field(1e-5, description="absolute tolerance of the same outputs")
