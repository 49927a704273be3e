"""What was measured: RunResult and its parts, which save and load themselves.

Raw figures only; every statistic is computed from them. Knows no torch and no table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from gradrun.core.errors import GradrunError
from gradrun.core.files import replace_file
from gradrun.core.grad_mode import GradMode
from gradrun.core.record import Record
from gradrun.results import stats

# Files come from anywhere: what no run can have measured is refused when it is read, so that
# nobody further on need expect it.
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
"""Of bytes or samples, as a machine can have them."""
Growth = Annotated[int, Meta(ge=-(2**62), le=2**62)]
"""Bytes; below 0 where more was given back than taken."""

_MAX_BYTES = 2**30


class Warning(Record, frozen=True, kw_only=True):
    """Something a reader of the figures must know; the text says what to do about it."""

    code: str
    text: str


class Environment(Record, frozen=True, kw_only=True):
    """The machine and the versions; `memory` in bytes, `cpus` is what the process may use."""

    gradrun: str
    torch: str
    numpy: str
    python: str
    platform: str
    cpu: str
    cores: Count
    cpus: Count
    threads: Count
    memory: Count
    device: str
    device_name: str | None = None


class Phases(Record, frozen=True, kw_only=True):
    """Seconds: the cold start (the first three), warming up, and the split of the timed pass."""

    load_model: Seconds
    open_data: Seconds
    first_batch: Seconds
    warm_up: Seconds
    data: Seconds
    forward: Seconds
    output: Seconds


class Memory(Record, frozen=True, kw_only=True):
    """Bytes; None where no meter could tell.

    `forward_peak` and `retained` are of one batch, above what was live before it; `retained` holds
    the outputs and, with gradients on, what their graph keeps.
    """

    weights: Count
    inputs: Count
    forward_peak: Growth | None = None
    retained: Growth | None = None
    timeline: tuple[Growth, ...] | None = None
    """What was live while the forward ran, thinned; its greatest is `forward_peak`."""
    peak_module: str | None = None
    """The module that was running at the peak, as "path (Type)"."""
    process_peak: Count | None = None
    process_method: str = "unavailable"
    device_allocated: Count | None = None
    device_reserved: Count | None = None


class Padding(Record, frozen=True, kw_only=True):
    """Tokens of texts that were filled up to the longest of their batch."""

    tokens: Count = 0
    """Of the texts themselves."""
    run: Count = 0
    """That the model computed, padding included."""
    ungrouped: Count = 0
    """That it would have computed in the order of the input."""

    def __add__(self, other: Padding) -> Padding:
        return Padding(
            tokens=self.tokens + other.tokens,
            run=self.run + other.run,
            ungrouped=self.ungrouped + other.ungrouped,
        )


class Measurement(Record, frozen=True, kw_only=True):
    """One pass over the data in one mode and one process; times in seconds, one entry a batch."""

    mode: GradMode
    variant: str = ""
    """What tells it from others in a comparison; empty in a run of its own."""
    process: int = 0
    batch_seconds: tuple[Seconds, ...]
    batch_sizes: tuple[Annotated[int, Meta(ge=1, le=2**40)], ...]
    phases: Phases
    memory: Memory
    batch_limit: Count | None = None
    """The largest batch that fitted in memory, where the one asked for did not."""
    padding: Padding | None = None
    """Of texts and their like."""

    def __post_init__(self) -> None:
        if len(self.batch_seconds) != len(self.batch_sizes):
            raise ValueError("batch_seconds and batch_sizes are not of the same length")

    @property
    def samples(self) -> int:
        """How many samples were predicted."""
        return sum(self.batch_sizes)

    @property
    def seconds_per_sample(self) -> list[float]:
        """One entry a batch (in a comparison: a round)."""
        return [s / n for s, n in zip(self.batch_seconds, self.batch_sizes, strict=True)]

    @property
    def seconds(self) -> float:
        """The timed pass from its first byte read to its last byte written."""
        return self.phases.data + self.phases.forward + self.phases.output

    @property
    def cold_start(self) -> float:
        """Seconds before the first prediction could be had, imports apart."""
        return self.phases.load_model + self.phases.open_data + self.phases.first_batch

    @property
    def throughput(self) -> float:
        """Samples a second over the whole timed pass."""
        return self.samples / self.seconds if self.seconds else 0.0

    def latency(self, quantile: float) -> stats.Estimate | None:
        """A quantile of the forward's time a batch, where there are batches enough to tell."""
        return stats.quantile(self.batch_seconds, quantile)

    @property
    def bound_by(self) -> tuple[str, dict[str, float]]:
        """The phase that took most of the timed pass, and the share of each (0 to 1)."""
        phases = {name: getattr(self.phases, name) for name in ("data", "forward", "output")}
        shares = {name: value / (self.seconds or 1.0) for name, value in phases.items()}
        return max(shares, key=lambda name: shares[name]), shares


class Comparison(Record, frozen=True, kw_only=True):
    """One variant against the baseline: baseline time / candidate time, above 1 is faster.

    `low` and `high` bound the ratio's 95 % interval over processes.
    """

    baseline: str
    candidate: str
    ratio: float
    low: float
    high: float
    verdict: stats.Verdict

    @property
    def relative_width(self) -> float:
        """Half the interval's width as a share of the ratio."""
        return (self.high - self.low) / 2 / self.ratio


class Equivalence(Record, frozen=True, kw_only=True):
    """A variant's outputs against the baseline's, on the same batches."""

    baseline: str
    candidate: str
    bitwise: bool
    max_abs_diff: float
    equal: bool
    """Bitwise, or within measure.rtol and measure.atol."""
    first_module: str | None = None
    """The first module whose output differs, as "path (Type)"."""
    compared: bool = True
    """Whether the two ran a sample in common; if not, they are not equal, and that says nothing."""


class SystemNoise(Record, frozen=True, kw_only=True):
    """How much of the machine others took while the worker measured."""

    steal: float = 0.0
    """Share of the time that a hypervisor gave away."""
    others: float = 0.0
    """Processors that other processes kept busy."""
    preemptions: float = 0.0
    """Involuntary context switches a second."""


Severity = Literal["error", "warning", "info"]


class Finding(Record, frozen=True, kw_only=True):
    """Something that an audit found in a model."""

    severity: Severity
    code: str
    modes: tuple[GradMode, ...] = ()
    """In which it was seen; none where it has nothing to do with a mode."""
    module: str = ""
    """The module at fault, as "path (Type)"; empty where it is the whole model."""
    source: str | None = None
    """The line at fault, as "file:line", where it is in code of the user's."""
    text: str
    advice: str
    """What to do about it; empty where there is nothing to be done."""
    cost: Growth | None = None
    """Bytes: held, or lost with each batch."""


class SavedForBackward(Record, frozen=True, kw_only=True):
    """Bytes that autograd keeps for the backward pass of one batch, by the module that saved."""

    module: str
    bytes: Count


Status = Literal["pass", "fail", "inconclusive"]


class Outcome(Record, frozen=True, kw_only=True):
    """What one check of `gradrun check` came to."""

    check: str
    """Its name: "runs", "forward_peak", "time vs main"."""
    limit: str
    """What is allowed, in words: "at most 60.0 MiB", ">= 1.0"."""
    value: str
    """What was found, in words; with its interval where it has one."""
    status: Status
    reason: str = ""
    """Why it failed or could not be decided, and what to do; empty where it passed."""
    key: str = ""
    """The dotted config key that asks for it: "check.limits.forward_peak"."""
    source: str | None = None
    """Where that stands, as "file:line:column"; None where it is a default."""


class Output(Record, frozen=True, kw_only=True):
    """One of the outputs that a model gave, over all samples."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of one sample."""
    mean: float
    spread: float
    """The standard deviation; both are of all values, and NaN where there are such."""


class Metric(Record, frozen=True, kw_only=True):
    """How well predictions agree with the labels."""

    name: str
    value: float
    samples: int
    """That it was taken over; those set apart are not among them."""


Kind = Literal["infer", "compare", "audit", "check"]


class RunInfo(Record, frozen=True, kw_only=True):
    """The values of the config that reports and statistics need."""

    model: str
    """Display name of the model, without folders."""
    mode: GradMode
    output_path: str
    batch_size: Count | None = None
    precision: Annotated[float, Meta(gt=0, le=1)] = 0.01
    """Relative half-width of the intervals requested by `measure.precision`."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RunInfo:
        """Extract the values from a config in JSON types."""
        model = config["model"]
        name = str(model.get("name") or model.get("target") or model.get("path") or model["source"])
        values = {
            "model": PurePath(name).name,
            "mode": config["run"]["mode"],
            "output_path": config["output"]["path"],
            "batch_size": config.get("data", {}).get("batch_size"),
        }
        if (precision := config.get("measure", {}).get("precision")) is not None:
            values["precision"] = precision
        return cls.of(values)


class RunResult(Record, frozen=True, kw_only=True, tag_field="kind"):
    """Base of the results of all commands: raw measurements, from which statistics are computed."""

    kind: ClassVar[Kind]
    format: Literal[2] = 2
    gradrun: str
    started_at: str
    info: RunInfo
    config: dict[str, Any]
    environment: Environment
    measurements: tuple[Measurement, ...]
    warnings: tuple[Warning, ...] = ()

    def save(self, path: Path) -> None:
        """Write to `path` atomically.

        Raises:
            OSError: the file cannot be written.
        """
        replace_file(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> AnyResult:
        """Read a result.json, or the one in a run folder; results of format 1 are upgraded.

        Raises:
            GradrunError: the file cannot be read or is not a result of a known format.
        """
        path = Path(path)
        if path.is_dir():
            path /= "result.json"
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise GradrunError(f"{path} is not a gradrun result: it is larger than 1 GiB")
            data = json.loads(path.read_bytes())
        except OSError as error:
            unfinished = path.with_name("journal.jsonl").is_file() and not path.exists()
            hint = "; the run is unfinished, to resume: infer --resume" if unfinished else ""
            raise GradrunError(f"{path} cannot be read: {error.strerror}{hint}") from error
        except (ValueError, RecursionError) as error:
            raise GradrunError(f"{path} is not a gradrun result: not JSON: {error}") from error
        _check_format(path, data)
        try:
            result: AnyResult = cls.of(data)
        except ValueError as error:
            raise GradrunError(f"{path} is not a gradrun result: {error}") from error
        return result

    @classmethod
    def of(cls, data: Any) -> Any:
        """Convert from JSON types to the class of the result's kind, upgrading format 1.

        Raises:
            ValueError: a value is missing or has another type.
        """
        if isinstance(data, dict) and data.get("format", 1) == 1:
            return _from_format_1(data)
        return _convert(data)


class InferResult(RunResult, frozen=True, kw_only=True, tag="infer"):
    """Result of `gradrun infer`, with exactly one measurement."""

    kind = "infer"
    measurements: Annotated[tuple[Measurement, ...], Meta(min_length=1)]
    files: tuple[str, ...] = ()
    """Prediction files, relative to the run folder."""
    predictions: Count | None = None
    """Rows in these files; None if the run writes no predictions."""
    quarantined: Count = 0
    """Rows without a prediction; quarantine.jsonl gives the reasons."""
    metrics: tuple[Metric, ...] = ()
    """In the order of the config."""
    resumed_at: Count = 0
    """Samples predicted by earlier runs, if this run resumed them."""


class CompareResult(RunResult, frozen=True, kw_only=True, tag="compare"):
    """Result of `gradrun compare`, with one measurement per variant and process."""

    kind = "compare"
    comparisons: tuple[Comparison, ...] = ()
    equivalence: tuple[Equivalence, ...] = ()
    failures: tuple[str, ...] = ()
    """One sentence per variant that failed."""

    def __post_init__(self) -> None:
        _check_rounds(self)
        if not all(m.batch_seconds for m in self.measurements):
            raise ValueError("a measurement of a comparison has no rounds")


class AuditResult(RunResult, frozen=True, kw_only=True, tag="audit"):
    """Result of `gradrun audit`, with one measurement per mode: memory only, no times."""

    kind = "audit"
    equivalence: tuple[Equivalence, ...] = ()
    findings: tuple[Finding, ...] = ()
    saved_for_backward: tuple[SavedForBackward, ...] = ()
    """In grad mode, largest first; the sum equals the retained bytes of the memory meter."""

    def __post_init__(self) -> None:
        _check_rounds(self)


class CheckResult(RunResult, frozen=True, kw_only=True, tag="check"):
    """Result of `gradrun check`, with one measurement per variant and process."""

    kind = "check"
    comparisons: tuple[Comparison, ...] = ()
    equivalence: tuple[Equivalence, ...] = ()
    files: tuple[str, ...] = ()
    predictions: Count | None = None
    quarantined: Count = 0
    metrics: tuple[Metric, ...] = ()
    outputs: tuple[Output, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    """In the order of the config."""

    def __post_init__(self) -> None:
        _check_rounds(self)

    @property
    def status(self) -> Status:
        """`fail` if any check failed, else `inconclusive` if any was, else `pass`."""
        found = {outcome.status for outcome in self.outcomes}
        order: tuple[Status, ...] = ("fail", "inconclusive")
        return next((status for status in order if status in found), "pass")


AnyResult = InferResult | CompareResult | AuditResult | CheckResult
KINDS = get_args(Kind)


def _check_rounds(result: RunResult) -> None:
    if any(t < 1e-12 for m in result.measurements for t in m.batch_seconds):
        raise ValueError("a round of zero duration, which a clock cannot measure")


def _convert(data: Any) -> AnyResult:
    result: AnyResult = msgspec.convert(data, AnyResult, strict=False)
    return result


def _from_format_1(data: dict[str, Any]) -> AnyResult:
    """Upgrade a result in format 1, which development versions of 0.1.0 wrote."""
    try:
        info = RunInfo.from_config(data["config"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"invalid config: {type(error).__name__}: {error}") from error
    upgraded = data | {
        "format": 2,
        "info": info.as_dict(),
        "quarantined": data.get("apart", 0),
        "saved_for_backward": data.get("kept", ()),
    }
    result = _convert(upgraded)
    if isinstance(result, AuditResult):
        result = result.replace(findings=tuple(map(_with_new_code, result.findings)))
    return result.replace(warnings=tuple(map(_with_new_code, result.warnings)))


Coded = TypeVar("Coded", Warning, Finding)

_NEW_CODES = {
    "disturbed": "noisy_machine",
    "unsteady": "high_variance",
    "tracks": "enables_grad",
    "tracks_in_vain": "redundant_enable_grad",
    "not_looked_at": "pass_failed",
    "fails": "model_fails",
}


def _with_new_code(coded: Coded) -> Coded:
    return coded.replace(code=_NEW_CODES.get(coded.code, coded.code))


def _check_format(path: Path, data: Any) -> None:
    """Distinguish other versions and other kinds from damaged files."""
    if not isinstance(data, dict):
        raise GradrunError(f"{path} is not a gradrun result: not a JSON object")
    version, writer = data.get("format", 1), str(data.get("gradrun", "unknown"))
    if isinstance(version, int) and version not in (1, 2):
        hint = "upgrade gradrun to read it" if version > 2 else "repeat the run to report it"
        raise GradrunError(
            f"{path} has format {version}, written by gradrun {writer}; this version reads "
            f"formats 1 and 2: {hint}"
        )
    if data.get("kind") not in KINDS:
        raise GradrunError(
            f"{path} is not a gradrun result: its kind is {data.get('kind')!r}; "
            f"allowed: {', '.join(KINDS)}"
        )


class Fact(Record, frozen=True, kw_only=True):
    """What one question about the gradient modes gave, when it was run."""

    topic: str
    question: str
    mode: GradMode | None = None
    """None where the question chooses no mode."""
    expected: str
    observed: str | None
    """None where it could not be tried."""
    why: str
    """What it means to who writes code."""
    unavailable: str = ""
    """Why it could not be tried."""

    @property
    def holds(self) -> bool:
        """Whether the expected was seen; what could not be tried is no difference."""
        return self.observed in (self.expected, None)


class ModeFacts(Record, frozen=True, kw_only=True):
    """What each gradient mode does on the installed torch and a device."""

    format: Literal[1] = 1
    kind: Literal["modes"] = "modes"
    gradrun: str
    environment: Environment
    facts: tuple[Fact, ...]

    @property
    def differing(self) -> tuple[Fact, ...]:
        """The facts that are not as expected."""
        return tuple(fact for fact in self.facts if not fact.holds)


@dataclass(frozen=True)
class DamagedRange:
    """A committed range whose files are missing or changed."""

    start: int
    stop: int
    file: str
    what: str
