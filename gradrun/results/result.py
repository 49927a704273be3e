"""What was measured: RunResult and its parts, which save and load themselves.

Raw figures only; every statistic is computed from them. Knows no torch and no table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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

_MOST_BYTES = 2**30


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


class Outcome(Record, frozen=True, kw_only=True):
    """What one check of `gradrun check` came to."""

    check: str
    """Its name: "runs", "forward_peak", "time vs main"."""
    limit: str
    """What is allowed, in words: "at most 60.0 MiB", ">= 1.0"."""
    value: str
    """What was found, in words; with its interval where it has one."""
    status: Literal["pass", "fail", "inconclusive"]
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
KINDS = get_args(Kind)


class RunResult(Record, frozen=True, kw_only=True):
    """Everything that a run leaves for its readers."""

    format: Literal[1] = 1
    kind: Kind
    gradrun: str
    started_at: str
    config: dict[str, Any]
    environment: Environment
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...] = ()
    equivalence: tuple[Equivalence, ...] = ()
    findings: tuple[Finding, ...] = ()
    kept: tuple[SavedForBackward, ...] = ()
    """In grad, most first; together they are what the memory meter calls retained."""
    outputs: tuple[Output, ...] = ()
    """Of a check."""
    outcomes: tuple[Outcome, ...] = ()
    """Of a check, in the order of the config."""
    failures: tuple[str, ...] = ()
    """Variants of a comparison that could not be run, each a sentence."""
    files: tuple[str, ...] = ()
    """The predictions, by name in the run's folder."""
    predictions: Count | None = None
    """Samples in those files; None where none were asked for."""
    apart: Count = 0
    """Of these, such that no prediction could be made for; quarantine.jsonl says why."""
    metrics: tuple[Metric, ...] = ()
    """Over all predictions, in the order of the config."""
    resumed_at: Count = 0
    """Samples that an earlier run had predicted, whose files this one went on with."""
    warnings: tuple[Warning, ...] = ()

    def __post_init__(self) -> None:
        _check_config(self.config)
        if self.kind == "infer" and not self.measurements:
            raise ValueError("an infer run without a measurement")
        rounds = [m.batch_seconds for m in self.measurements]
        if self.kind == "compare" and not all(rounds):
            raise ValueError("a comparison without rounds")
        if self.kind != "infer" and any(t < 1e-12 for times in rounds for t in times):
            raise ValueError("rounds that took no time, which no clock gives")

    @property
    def status(self) -> str:
        """Of a check: fail where any failed, else inconclusive where any is, else pass."""
        found = {outcome.status for outcome in self.outcomes}
        return next((s for s in ("fail", "inconclusive") if s in found), "pass")

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        replace_file(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RunResult:
        """Read a result.json, or the one in a run's folder.

        Raises:
            GradrunError: there is none, or it is no result that this version reads.
        """
        path = Path(path)
        if path.is_dir():
            path /= "result.json"
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise GradrunError(f"{path} is no result of gradrun: it is over 1 GiB")
            told = json.loads(path.read_bytes())
        except OSError as error:
            unfinished = path.with_name("journal.jsonl").is_file() and not path.exists()
            hint = "; the run there has not ended: infer --resume goes on" if unfinished else ""
            raise GradrunError(f"{path} cannot be read: {error.strerror}{hint}") from error
        except (ValueError, RecursionError) as error:
            raise GradrunError(f"{path} is no result of gradrun: not JSON: {error}") from error
        _check_format(path, told)
        try:
            return cls.of(told)
        except ValueError as error:  # of a name that is no UTF-8, too
            raise GradrunError(f"{path} is no result of gradrun: {error}") from error


def _check_config(config: dict[str, Any]) -> None:
    """Hold that a config has what every report asks of it."""
    for section, key in (("model", "source"), ("output", "path"), ("run", "mode")):
        told = config.get(section)
        if not isinstance(told, dict) or not isinstance(told.get(key), str):
            raise ValueError(f"config has no {section}.{key}")


def _check_format(path: Path, told: Any) -> None:
    """Say what to do about a result that another version wrote in another way."""
    if not isinstance(told, dict):
        return
    version, writer = told.get("format", 1), str(told.get("gradrun", "unknown"))
    if isinstance(version, int) and version != 1:
        todo = "a newer gradrun reads it" if version > 1 else "run it again to report it"
        raise GradrunError(
            f"{path} is of format {version}, written by gradrun {writer}; this one reads format 1: "
            f"{todo}"
        )
    if told.get("kind") not in KINDS:
        raise GradrunError(
            f"{path} is no result of gradrun: its kind is {told.get('kind')!r}, where those that "
            f"are shown are of {', '.join(KINDS)}"
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
