"""The sections `run`, `measure` and `metrics`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gradrun.config.base import Section, Size
from gradrun.config.output import OutputName
from gradrun.core.grad_mode import GradMode

Allocator = Literal["retain", "system"]


class RunSection(Section):
    """How the model runs."""

    mode: GradMode = Field(GradMode.INFERENCE_MODE, description="the gradient mode of the run")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?|mps)$", description="where the model runs"
    )
    threads: Literal["auto"] | Annotated[int, Field(gt=0, le=4096)] = Field(
        "auto",
        description="CPU threads; auto: OMP_NUM_THREADS or MKL_NUM_THREADS, else the CPUs that "
        "affinity and cgroup quota allow",
    )
    allocator: Allocator = Field(
        "retain",
        description="on CPUs with glibc: retain keeps freed memory for the next batch, which is "
        "faster and needs a little more; system: as the system's malloc",
    )
    in_flight: int = Field(
        1,
        ge=1,
        le=4,
        description="batches on the device at once; with 2 to 4, the copies to and from a CUDA "
        "device and the writing overlap with the forward passes",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of random weights, data and dropout")
    float32_precision: Literal["ieee", "bf16", "tf32"] | None = Field(
        None,
        description="precision inside float32 matrix products and convolutions: ieee is full; "
        "bf16 and tf32 are faster on CPUs or GPUs that have them; default: as torch is set",
    )
    fast_path: bool = Field(
        True, description="let torch use its fused path for transformer encoder layers"
    )
    autocast: Literal["float16", "bfloat16"] | None = Field(
        None, description="run the forward pass under torch.autocast with this type"
    )
    warmup: Literal["auto"] | Annotated[int, Field(ge=0, le=100_000)] = Field(
        "auto", description="untimed batches before the run; auto: until the time is steady"
    )
    deterministic: bool = Field(False, description="use torch's deterministic algorithms")
    on_error: Literal["stop", "quarantine"] = Field(
        "stop", description="stop at a failing sample, or write it to quarantine.jsonl and continue"
    )
    max_errors: Annotated[int, Field(ge=0)] | None = Field(
        None, description="stop after more quarantined samples than this; default: never"
    )
    on_nonfinite: Literal["warn", "quarantine", "stop"] = Field(
        "warn", description="action for predictions with NaN or infinity"
    )

    @property
    def process_settings(self) -> dict[str, object]:
        """The values of keys that hold for a whole process, by dotted key."""
        return {f"run.{name}": getattr(self, name) for name in PROCESS_SETTINGS}


PROCESS_SETTINGS = ("allocator", "float32_precision", "fast_path")
"""Keys of `run` that hold for a whole process."""


class MeasureSection(Section):
    """Measurements and their precision."""

    memory: bool = Field(
        True, description="measure tensor memory in untimed batches: the first and the largest"
    )
    batch_independence: bool = Field(
        True, description="test on the first batch whether predictions depend on their neighbors"
    )
    processes: Annotated[int, Field(ge=2, le=1000)] = Field(
        5, description="compare: minimum number of fresh processes, if measure.budget allows"
    )
    precision: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01, description="compare: target relative half-width of the confidence intervals"
    )
    budget: Annotated[float, Field(gt=0, le=86_400)] = Field(
        60.0, description="compare: approximate time limit in seconds"
    )
    timeout: Annotated[float, Field(gt=0, le=86_400)] = Field(
        300.0, description="compare: seconds without output after which a process is killed"
    )
    rtol: Annotated[float, Field(ge=0)] = Field(
        1.3e-6, description="compare: relative tolerance of outputs"
    )
    atol: Annotated[float, Field(ge=0)] = Field(
        1e-5, description="compare: absolute tolerance of outputs"
    )


_CLASSES = {"average", "threshold", "input", "per_class", "ignore"}
_ARGUMENTS = {
    "accuracy": _CLASSES | {"top_k"},
    "precision": _CLASSES,
    "recall": _CLASSES,
    "f1": _CLASSES,
    "iou": _CLASSES,
    "dice": _CLASSES,
    "exact_match": {"threshold", "input", "ignore"},
    "confusion_matrix": {"threshold", "input", "ignore"},
    "auroc": {"average", "thresholds", "input", "per_class", "ignore"},
    "calibration_error": {"bins", "input", "ignore"},
    "mse": set[str](),
    "mae": set[str](),
    "r2": set[str](),
}
METRIC_NAMES = tuple(_ARGUMENTS)
_ERRORS = {"calibration_error", "mse", "mae"}


class MetricSection(Section):
    """A measure of how well the model's outputs agree with data.labels."""

    name: Literal[
        "accuracy", "precision", "recall", "f1", "iou", "dice", "exact_match", "confusion_matrix",
        "auroc", "calibration_error", "mse", "mae", "r2",
    ]  # fmt: skip
    alias: Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,63}$")] | None = Field(
        None, description="its name in tables and in result.json; default: name"
    )
    output: OutputName | None = Field(
        None, description="the model's output to score; needed if several are selected"
    )
    label: Annotated[int, Field(ge=0)] | None = Field(
        None, description="position of the label to use, from 0, where each sample has several"
    )
    top_k: Size | None = Field(
        None, description="accuracy: count a sample as correct if it is among the top k classes"
    )
    average: Literal["micro", "macro", "weighted"] | None = Field(
        None, description="over classes; default: micro for accuracy, else macro"
    )
    per_class: bool | None = Field(
        None, description="report the value of each class as well as the average"
    )
    input: Literal["logits", "probabilities"] | None = Field(
        None,
        description="kind of the scores; needed for one score per sample or several labels, "
        "unless output.transform has sigmoid",
    )
    threshold: float | None = Field(
        None,
        description="one score, or several labels: scores above it are class 1; default: 0 for "
        "logits, 0.5 for probabilities",
    )
    thresholds: Annotated[int, Field(ge=2, le=100_000)] | None = Field(
        None,
        description="auroc: number of thresholds, for bounded memory; default: exact, which "
        "stores all scores",
    )
    bins: Annotated[int, Field(ge=2, le=10_000)] | None = Field(
        None, description="calibration_error: number of bins; default: 15"
    )
    ignore: int | None = Field(
        None, description="label of samples or pixels to leave out, such as 255"
    )

    @property
    def title(self) -> str:
        """The metric's name in tables and result.json."""
        return self.alias or (f"{self.name}_top{self.top_k}" if self.top_k else self.name)

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is a size of errors."""
        return self.name in _ERRORS

    @model_validator(mode="after")
    def _check_arguments(self) -> MetricSection:
        allowed = _ARGUMENTS[self.name]
        for argument in sorted(set[str]().union(*_ARGUMENTS.values()) - allowed):
            if getattr(self, argument) is not None:
                raise ValueError(
                    f"{self.name} does not take {argument}; allowed: "
                    f"{', '.join(sorted(allowed)) or 'no arguments'}"
                )
        return self


def _expand_name(metric: object) -> object:
    return {"name": metric} if isinstance(metric, str) else metric


def _check_titles(metrics: tuple[MetricSection, ...]) -> tuple[MetricSection, ...]:
    titles = [metric.title for metric in metrics]
    if repeated := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"two metrics have the name {repeated[0]}; set `alias` for one of them")
    return metrics


Metrics = Annotated[
    tuple[
        Annotated[
            MetricSection,
            BeforeValidator(_expand_name, json_schema_input_type=str | MetricSection),
        ],
        ...,
    ],
    AfterValidator(_check_titles),
]
