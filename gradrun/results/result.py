"""Results of all commands: raw measurements, from which statistics are computed."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePath
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from gradrun.core.errors import GradrunError
from gradrun.core.files import replace_file
from gradrun.core.grad_mode import GradMode
from gradrun.core.record import Record
from gradrun.core.remote import as_path
from gradrun.results import stats
from gradrun.results.bounds import ByteChange, Count, Seconds
from gradrun.results.profile import Profile
from gradrun.results.trials import Trial, TunedKey, TunePhases
from gradrun.results.work import MachinePeaks, Work, describe_reach

_MAX_FILE_BYTES = 2**30


# --- measurements ------------------------------------------------------------------------------


class Environment(Record, frozen=True, kw_only=True):
    """Hardware and versions; `memory` in bytes, `cpus` are those available to the process."""

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
    allocator: str = ""
    """Setting of the CPU allocator, as run.allocator; empty in older results."""
    device: str
    device_name: str | None = None


class Phases(Record, frozen=True, kw_only=True):
    """Seconds of the cold start (the first three), the warm-up and the timed pass (the rest)."""

    load_model: Seconds = 0.0
    open_data: Seconds = 0.0
    first_batch: Seconds = 0.0
    warm_up: Seconds = 0.0
    data: Seconds = 0.0
    forward: Seconds = 0.0
    output: Seconds = 0.0


class FirstBatch(Record, frozen=True, kw_only=True):
    """Memory of the first batch of a run, in bytes as in Memory."""

    shape: tuple[Count, ...]
    """Of its largest input."""
    inputs: Count
    forward_peak: ByteChange | None
    retained: ByteChange | None


class Memory(Record, frozen=True, kw_only=True):
    """Bytes; None if not measured.

    `forward_peak` and `retained` are relative to the live bytes before the forward pass of one
    batch: the largest, by elements of its inputs. `retained` covers the outputs and, with gradients
    enabled, the tensors of their graph.
    """

    weights: Count
    inputs: Count
    forward_peak: ByteChange | None = None
    retained: ByteChange | None = None
    timeline: tuple[ByteChange, ...] | None = None
    """Live bytes during the forward pass, thinned; the maximum is `forward_peak`."""
    batch: Count | None = None
    """Number of the batch measured, from 0, in the order of the run; None if none was, or if it is
    unknown because batches differ in their number of samples."""
    shape: tuple[Count, ...] = ()
    """Shape of the largest input of that batch."""
    first_batch: FirstBatch | None = None
    """The first batch, if another one is larger."""
    peak_module: str | None = None
    """Module that was running at the peak, as "path (Type)"."""
    process_peak: Count | None = None
    process_method: str = "unavailable"
    device_allocated: Count | None = None
    device_reserved: Count | None = None


class Padding(Record, frozen=True, kw_only=True):
    """Counts of texts that were truncated, and padded to the longest of their batch."""

    texts: Count = 0
    truncated: Count = 0
    """Texts with more tokens than the limit."""
    limit: Count = 0
    """The greatest number of tokens; 0: unlimited."""
    longest: Count = 0
    """Tokens of the longest text before it was truncated."""
    repaired: Count = 0
    """Texts in which halves of surrogate pairs were replaced by U+FFFD."""
    first_repaired: str = ""
    """File and line of one of them."""
    tokens: Count = 0
    """Without padding."""
    run: Count = 0
    """Computed, with padding."""
    ungrouped: Count = 0
    """That would have been computed in the order of the input, with padding."""

    def __add__(self, other: Padding) -> Padding:
        sums = ("texts", "truncated", "repaired", "tokens", "run", "ungrouped")
        return Padding(
            limit=max(self.limit, other.limit),
            longest=max(self.longest, other.longest),
            first_repaired=self.first_repaired or other.first_repaired,
            **{name: getattr(self, name) + getattr(other, name) for name in sums},
        )

    def statements(self) -> Iterator[Statement]:
        """Yield how many texts were changed."""
        cut = f"{self.truncated:,} of {self.texts:,} truncated to {self.limit:,} tokens"
        text = cut if self.truncated else f"none of {self.texts:,} truncated"
        yield Statement(topic="texts", text=f"{text} (longest: {self.longest:,})")
        if self.repaired:
            text = f"half a character replaced by U+FFFD in {self.repaired:,}"
            yield Statement(topic="texts", text=f"{text}, such as {self.first_repaired}")


class Generation(Record, frozen=True, kw_only=True):
    """Times of generated texts, with one entry per batch."""

    first_token_seconds: tuple[Seconds, ...] = ()
    """From the start of the batch to the first new token of all its texts."""
    batch_seconds: tuple[Seconds, ...] = ()
    """From the start of the batch to its last token."""
    batch_tokens: tuple[Count, ...] = ()
    """New tokens of all texts of the batch, with their end tokens."""
    batch_steps: tuple[Count, ...] = ()
    """New tokens of the longest text of the batch."""

    def __add__(self, other: Generation) -> Generation:
        names = self.__struct_fields__
        return Generation(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def tokens(self) -> int:
        """New tokens of all texts."""
        return sum(self.batch_tokens)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second in which texts were generated."""
        seconds = sum(self.batch_seconds)
        return self.tokens / seconds if seconds else 0.0

    @property
    def seconds_per_later_token(self) -> tuple[float, ...]:
        """One entry for each batch with more than one token."""
        batches = zip(self.batch_seconds, self.first_token_seconds, self.batch_steps, strict=True)
        return tuple((total - first) / (steps - 1) for total, first, steps in batches if steps > 1)


class WorkerRange(Record, frozen=True, kw_only=True):
    """Samples start to stop, which a worker ran; seconds since the start of the timed pass."""

    start: Count
    stop: Count
    began: Seconds
    ended: Seconds


class WorkerStats(Record, frozen=True, kw_only=True):
    """One worker of an engine and its part of the timed pass."""

    worker: Count
    """Number of the worker, from 1; a replacement has a number of its own."""
    node: str
    cold_start: Seconds
    """Seconds to load the model, open the data and run the first batch."""
    samples: Count = 0
    data: Seconds = 0.0
    forward: Seconds = 0.0
    busy: Seconds = 0.0
    """Seconds in which it ran ranges."""
    process_peak: Count | None = None
    ranges: tuple[WorkerRange, ...] = ()
    lost: str = ""
    """How the worker ended before the run did; empty if it stayed."""
    lost_at: Seconds | None = None
    """Seconds since the start of the timed pass."""
    rejected: bool = False
    """Whether it was refused when it was ready, for the reason in `lost`."""
    repeated: Count = 0
    """Ranges that it ran again, after the loss of another worker or beside a slow one."""


class Compilation(Record, frozen=True, kw_only=True):
    """What torch.compile cost before the timed pass, and what it saves on the first batch."""

    seconds: Seconds
    """Of the first forward of each shape, which compiles it."""
    graphs: Count
    """Compiled in these forwards."""
    eager: Seconds
    """Forward time of the first batch without torch.compile, the median of a few."""
    compiled: Seconds
    """Forward time of the same batch at the end of the warm-up."""

    @property
    def speedup(self) -> float:
        """Eager time over compiled time; above 1, compiling is faster."""
        return self.eager / self.compiled if self.compiled else 1.0


class Measurement(Record, frozen=True, kw_only=True):
    """One pass over the data in one mode and one process, with one entry per batch."""

    mode: GradMode
    variant: str = ""
    """Name in a comparison, check or audit; empty in a run."""
    process: int = 0
    batch_seconds: tuple[Seconds, ...]
    batch_sizes: tuple[Annotated[int, Meta(ge=1, le=2**40)], ...]
    batch_elements: tuple[Count, ...] = ()
    """Elements of the inputs per batch; () if samples have equal numbers."""
    phases: Phases
    memory: Memory
    batch_limit: Count | None = None
    """Largest batch that fits in memory, if the configured one does not."""
    padding: Padding | None = None
    generation: Generation | None = None
    """None unless the model generates text."""
    compilation: Compilation | None = None
    """None if model.compile is off."""
    workers: tuple[WorkerStats, ...] = ()
    """The workers of an engine; the seconds in `phases` are then the mean over those that ran
    samples."""
    work: Work | None = None
    """Of the batch whose memory was measured; None if it was not counted."""
    peaks: MachinePeaks | None = None
    """Peaks of the machine with the threads of the run, if they were known."""

    def __post_init__(self) -> None:
        if len(self.batch_seconds) != len(self.batch_sizes):
            raise ValueError("batch_seconds and batch_sizes differ in length")
        if self.batch_elements and len(self.batch_elements) != len(self.batch_sizes):
            raise ValueError("batch_elements and batch_sizes differ in length")

    @property
    def samples(self) -> int:
        """Number of predicted samples."""
        return sum(self.batch_sizes)

    @property
    def seconds_per_sample(self) -> list[float]:
        """One entry per batch, or per round of a comparison."""
        return [s / n for s, n in zip(self.batch_seconds, self.batch_sizes, strict=True)]

    @property
    def seconds(self) -> float:
        """Duration of the timed pass, including reading data and writing predictions."""
        return self.phases.data + self.phases.forward + self.phases.output

    @property
    def cold_start(self) -> float:
        """Seconds until the first prediction, without imports."""
        return self.phases.load_model + self.phases.open_data + self.phases.first_batch

    @property
    def throughput(self) -> float:
        """Samples per second over the timed pass."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def samples_to_repay_compilation(self) -> int | None:
        """Samples after which compiling has saved the time that it took; None if it never does.

        Assumes that all batches gain as much as the first one. Workers compile at the same time.
        """
        compilation, forward = self.compilation, sum(self.batch_seconds, 0.0)
        if not compilation or not self.samples or compilation.speedup <= 1 or not forward:
            return None
        saved = forward / self.samples * (compilation.speedup - 1)
        workers = sum(bool(worker.samples) for worker in self.workers) or 1
        return math.ceil(workers * compilation.seconds / saved)

    def latency(self, quantile: float) -> stats.Estimate | None:
        """Estimate a quantile of the forward seconds per batch; None with too few batches."""
        return stats.quantile(self.batch_seconds, quantile)

    @property
    def reach(self) -> str:
        """Return the distance of the forward pass to the peak of the machine, with advice.

        Empty if the work or the peaks are unknown, or no batch like the counted one was timed.
        """
        if self.work is None or self.peaks is None:
            return ""
        elements = self.batch_elements or (self.work.elements,) * len(self.batch_sizes)
        counted = (self.work.batch_size, self.work.elements)
        timed = zip(self.batch_seconds, self.batch_sizes, elements, strict=True)
        alike = [seconds for seconds, *batch in timed if tuple(batch) == counted]
        return describe_reach(self.work, median(alike), self.peaks) if alike else ""

    @property
    def bound_by(self) -> tuple[str, dict[str, float]]:
        """The longest phase of the timed pass, and the share of each phase (0 to 1)."""
        phases = {name: getattr(self.phases, name) for name in ("data", "forward", "output")}
        shares = {name: value / (self.seconds or 1.0) for name, value in phases.items()}
        return max(shares, key=lambda name: shares[name]), shares


class SystemNoise(Record, frozen=True, kw_only=True):
    """Load on the machine from other sources during a measurement."""

    steal: float = 0.0
    """Share of the CPU time that the hypervisor gave to other virtual machines."""
    others: float = 0.0
    """Number of processors kept busy by other processes."""
    preemptions: float = 0.0
    """Involuntary context switches per second."""


class Warning(Record, frozen=True, kw_only=True):
    """A limitation of the figures; the text names a remedy."""

    code: str
    text: str


class Statement(Record, frozen=True, kw_only=True):
    """One interpretation that changes predictions, such as the source of the weights."""

    topic: str
    """What is interpreted: weights, preprocessing, tokenizer, classes, labels, order, ..."""
    text: str


# --- conclusions -------------------------------------------------------------------------------


class Comparison(Record, frozen=True, kw_only=True):
    """Ratio baseline time / candidate time with its 95 % interval; above 1 is faster."""

    baseline: str
    candidate: str
    ratio: float
    low: float
    high: float
    verdict: stats.Verdict

    @property
    def relative_width(self) -> float:
        """Half the width of the interval, relative to the ratio."""
        return (self.high - self.low) / 2 / self.ratio


class Equivalence(Record, frozen=True, kw_only=True):
    """Difference between the outputs of a variant and the baseline for the same batches."""

    baseline: str
    candidate: str
    bitwise: bool
    max_abs_diff: float
    equal: bool
    """Bitwise, or within measure.rtol and measure.atol."""
    first_module: str | None = None
    """First module whose output differs, as "path (Type)"."""
    compared: bool = True
    """False if no sample ran in both; then `equal` is False too."""


Severity = Literal["error", "warning", "info"]


class Finding(Record, frozen=True, kw_only=True):
    """A property of a model that an audit reports."""

    severity: Severity
    code: str
    modes: tuple[GradMode, ...] = ()
    """Modes in which it occurs; empty if it does not depend on the mode."""
    module: str = ""
    """Module that causes it, as "path (Type)"; empty for the whole model."""
    source: str | None = None
    """Line of user code that causes it, as "file:line"."""
    text: str
    advice: str
    """Remedy; empty if none is needed."""
    cost: ByteChange | None = None
    """Bytes retained, or leaked per batch."""


class SavedForBackward(Record, frozen=True, kw_only=True):
    """Bytes that one module saves for the backward pass of one batch."""

    module: str
    bytes: Count


Status = Literal["pass", "fail", "inconclusive"]
TuneStatus = Literal["faster", "nothing_helps", "inconclusive"]


class Outcome(Record, frozen=True, kw_only=True):
    """Outcome of one check, in words."""

    check: str
    limit: str
    value: str
    status: Status
    reason: str = ""
    """Why the check is not a pass, and a remedy; empty for a pass."""
    key: str = ""
    """Dotted config key of the limit."""
    source: str | None = None
    """Location of the key as "file:line:column"; None for a default."""


class Output(Record, frozen=True, kw_only=True):
    """Statistics of one output of a model over all samples and values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of one sample."""
    mean: float
    """NaN if any value is."""
    spread: float
    """Standard deviation; NaN if any value is."""


class ClassValue(Record, frozen=True, kw_only=True):
    """The value of a metric for one class."""

    name: str
    """Of the class, or its number."""
    value: float
    """NaN if neither predictions nor labels contain the class."""


class ConfusionMatrix(Record, frozen=True, kw_only=True):
    """Samples, or pixels, by true and predicted class."""

    classes: tuple[str, ...]
    counts: tuple[tuple[Count, ...], ...]
    """One row per true class, with one count per predicted class."""

    def __post_init__(self) -> None:
        if {len(self.counts), *map(len, self.counts)} - {len(self.classes)}:
            raise ValueError("classes and counts of a confusion matrix differ in number")


class Metric(Record, frozen=True, kw_only=True):
    """Agreement of the model's outputs with the labels."""

    name: str
    value: float
    samples: int
    """Samples with a prediction and a label."""
    note: str = ""
    """How the value is defined: the average over classes, the threshold."""
    per_class: tuple[ClassValue, ...] = ()
    matrix: ConfusionMatrix | None = None


class MetricChange(Record, frozen=True, kw_only=True):
    """A metric of a variant beside that of the baseline, over the same data."""

    name: str
    baseline: str
    candidate: str
    before: float
    """The baseline's value."""
    value: float
    """The candidate's value."""


class Example(Record, frozen=True, kw_only=True):
    """A prediction with its input, as short texts."""

    position: Count
    """In the input, from 0."""
    input: str
    picture: Annotated[bytes, Meta(max_length=2**16)] = b""
    """A JPEG thumbnail of the input; empty if it is not a picture."""
    prediction: str
    label: str = ""
    correct: bool | None = None
    """None if the prediction is not a class, or the sample has no label."""


class PredictedClass(Record, frozen=True, kw_only=True):
    """How often one class was predicted."""

    name: str
    count: Count


class ClassDistribution(Record, frozen=True, kw_only=True):
    """How often each class was predicted in one output."""

    output: str
    predictions: Count
    """Counted predictions; of a class map, one for each of its values."""
    samples: Count
    """The samples that were counted, from the first on."""
    distinct: Count
    """Classes that occur."""
    classes: Count | None = None
    """Classes of the model; None if unknown."""
    most_frequent: tuple[PredictedClass, ...]
    """At most 20, most frequent first."""


# --- results -----------------------------------------------------------------------------------


class RunInfo(Record, frozen=True, kw_only=True):
    """The values of the config that reports and statistics need."""

    model: str
    """Display name, without folders."""
    mode: GradMode
    output_path: str
    batch_size: Count | None = None
    precision: Annotated[float, Meta(gt=0, le=1)] = 0.01
    """measure.precision: target for the relative half-width of intervals."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RunInfo:
        """Extract the values from a config in JSON types."""
        model = config["model"]
        name = str(model.get("name") or model.get("target") or model.get("path") or model["source"])
        return cls.of(
            {
                "model": PurePath(name).name,
                "mode": config["run"]["mode"],
                "output_path": config["output"]["path"],
                "batch_size": config.get("data", {}).get("batch_size"),
                "precision": config.get("measure", {}).get("precision", 0.01),
            }
        )


class RunResult(Record, frozen=True, kw_only=True, tag_field="kind"):
    """Base of the results of all commands."""

    kind: ClassVar[Literal["infer", "compare", "audit", "check", "profile", "tune"]]
    format: Literal[2] = 2
    gradrun: str
    started_at: str
    info: RunInfo
    config: dict[str, Any]
    environment: Environment
    measurements: tuple[Measurement, ...]
    interpretation: tuple[Statement, ...] = ()
    warnings: tuple[Warning, ...] = ()

    def __post_init__(self) -> None:
        rounds = [m.batch_seconds for m in self.measurements]
        compares = self.kind == "compare" or bool(getattr(self, "comparisons", None))
        if compares and not all(rounds):
            raise ValueError("a measurement of a comparison has no rounds")
        if self.kind != "infer" and any(t < 1e-12 for times in rounds for t in times):
            raise ValueError("a round of zero duration, which a clock cannot measure")

    @property
    def of_whole_runs(self) -> bool:
        """Whether each round of the measurements is a run of all data by an engine."""
        return any(measured.workers for measured in self.measurements)

    @property
    def batch_sizes(self) -> set[int]:
        """First batch size of each variant."""
        firsts = (measured[0].batch_sizes[:1] for measured in self.by_variant().values())
        return {size for sizes in firsts for size in sizes}

    def by_variant(self) -> dict[str, list[Measurement]]:
        """Group the measurements by variant, the baseline first."""
        variants: dict[str, list[Measurement]] = {}
        for measured in self.measurements:
            variants.setdefault(measured.variant, []).append(measured)
        return variants

    def _repr_html_(self) -> str:
        """Return the report for the output of a notebook's cell."""
        # The report is built of results, so this module cannot depend on it.
        notebook = importlib.import_module("gradrun.report.notebook")
        return str(notebook.render(self))

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
        try:
            path = as_path(Path(path))
        except ValueError as error:
            raise GradrunError(str(error)) from error
        try:
            if path.is_dir():
                path /= "result.json"
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise GradrunError(f"{path} is not a gradrun result: it is over 1 GiB")
            data = json.loads(path.read_bytes())
        except OSError as error:
            unfinished = path.with_name("journal.jsonl").is_file() and not path.exists()
            hint = "; the run is unfinished, see gradrun verify" if unfinished else ""
            raise GradrunError(f"{path} cannot be read: {error.strerror}{hint}") from error
        except (ValueError, RecursionError) as error:
            raise GradrunError(f"{path} is not a gradrun result: not JSON: {error}") from error
        version = data.get("format", 1) if isinstance(data, dict) else None
        if isinstance(version, int) and version not in (1, 2):
            hint = "upgrade gradrun to read it" if version > 2 else "repeat the run to report it"
            raise GradrunError(
                f"{path} has format {version}, written by gradrun {data.get('gradrun')}; this "
                f"version reads formats 1 and 2: {hint}"
            )
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
        return msgspec.convert(data, AnyResult, strict=False)


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
    class_distribution: tuple[ClassDistribution, ...] = ()
    """One for each output of classes."""
    examples: tuple[Example, ...] = ()
    resumed_at: Count = 0
    """Samples predicted by earlier runs that this one resumed."""


class CompareResult(RunResult, frozen=True, kw_only=True, tag="compare"):
    """Result of `gradrun compare`, with one measurement per variant and process."""

    kind = "compare"
    comparisons: tuple[Comparison, ...] = ()
    equivalence: tuple[Equivalence, ...] = ()
    metric_changes: tuple[MetricChange, ...] = ()
    failures: tuple[str, ...] = ()
    """One sentence per variant that failed."""


class AuditResult(RunResult, frozen=True, kw_only=True, tag="audit"):
    """Result of `gradrun audit`, with one measurement per mode: memory only, no times."""

    kind = "audit"
    equivalence: tuple[Equivalence, ...] = ()
    findings: tuple[Finding, ...] = ()
    saved_for_backward: tuple[SavedForBackward, ...] = ()
    """In grad mode, largest first; the sum should equal the retained bytes."""


class CheckResult(RunResult, frozen=True, kw_only=True, tag="check"):
    """Result of `gradrun check`, with one measurement per variant and process."""

    kind = "check"
    comparisons: tuple[Comparison, ...] = ()
    equivalence: tuple[Equivalence, ...] = ()
    files: tuple[str, ...] = ()
    predictions: Count | None = None
    quarantined: Count = 0
    metrics: tuple[Metric, ...] = ()
    metric_changes: tuple[MetricChange, ...] = ()
    """Against the reference."""
    outputs: tuple[Output, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    """In the order of the config."""

    @property
    def status(self) -> Status:
        """`fail` if any check failed, else `inconclusive` if any was, else `pass`."""
        statuses = {outcome.status for outcome in self.outcomes}
        order: tuple[Status, ...] = ("fail", "inconclusive")
        return next((status for status in order if status in statuses), "pass")


class ProfileResult(RunResult, frozen=True, kw_only=True, tag="profile"):
    """Result of `gradrun profile`, with one measurement and one profile per variant."""

    kind = "profile"
    measurements: Annotated[tuple[Measurement, ...], Meta(min_length=1)]
    """Times without hooks, one entry per round."""
    profiles: Annotated[tuple[Profile, ...], Meta(min_length=1)]
    key: str = ""
    """The config key whose values are the variants."""
    depth: Count = 0
    """Levels of modules that a report shows; 0: all."""
    top: Count = 0
    """Modules that a report shows; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.profiles) != len(self.measurements):
            raise ValueError("profiles and measurements differ in length")
        for measured, profile in zip(self.measurements, self.profiles, strict=True):
            if len(measured.batch_seconds) != len(profile.hooked_seconds):
                raise ValueError("rounds with and without hooks differ in number")


class TuneResult(RunResult, frozen=True, kw_only=True, tag="tune"):
    """Result of `gradrun tune`, with two measurements per process of the confirmation."""

    kind = "tune"
    status: TuneStatus
    comparisons: tuple[Comparison, ...] = ()
    equivalence: tuple[Equivalence, ...] = ()
    trials: tuple[Trial, ...] = ()
    """In the order in which they were tried."""
    skipped: tuple[str, ...] = ()
    """Moves that do not apply, each with the reason."""
    keys: tuple[TunedKey, ...] = ()
    """The confirmed changes, or those of `unconfirmed`."""
    unconfirmed: Trial | None = None
    """The best setting of a search that ended before its confirmation."""
    refused: tuple[str, ...] = ()
    """Why settings that led the search were not confirmed."""
    tolerance: str
    """The constraints in words."""
    checked: Count = 0
    """Samples whose outputs were compared in the confirmation."""
    max_rel: float | None = None
    cosine: float | None = None
    steady: bool = False
    """Whether the time of the start was ignored."""
    job_samples: Count = 0
    start_seconds: Seconds = 0.0
    tuned_start_cold: Seconds | None = None
    tuned_start: Seconds | None = None
    """Of a process that finds compiled programs in the cache."""
    break_even: Count | None = None
    """Samples after which the longer start has paid."""
    detectable: float = 0.0
    """Least relative gain that the measurements exclude; 0 if nothing was timed."""
    budget: Seconds
    seconds: Seconds
    """Time that the search and the confirmation took."""
    phases: TunePhases = TunePhases()
    baseline_over: str = ""
    """How the config exceeds a limit of memory or latency without changes, or ""."""
    out_of_time: bool = False
    interrupted: bool = False
    """Whether Ctrl-C ended it."""
    file: str = ""
    """The tuned config; empty if none was written."""

    def headline(self, source: str) -> str:
        """Return one line about the setting that is written."""
        if self.unconfirmed:
            return (
                f"gradrun tune {self.gradrun}: NOT CONFIRMED, {self.unconfirmed.ratio:.2f} x as "
                f"fast as {source} in a search that ended early, {self.tolerance}, torch "
                f"{self.environment.torch}, {self.environment.cpu}, {self.started_at[:10]}"
            )
        (confirmed,) = self.comparisons
        changed = "" if self.max_rel is None else f", max_rel {self.max_rel:.2g} seen"
        return (
            f"gradrun tune {self.gradrun}: {confirmed.ratio:.2f} x as fast as {source} (95 % "
            f"{confirmed.low:.2f} to {confirmed.high:.2f}), {self.tolerance}{changed}, torch "
            f"{self.environment.torch}, {self.environment.cpu}, {self.started_at[:10]}"
        )


AnyResult = InferResult | CompareResult | AuditResult | CheckResult | ProfileResult | TuneResult

# --- format 1 ----------------------------------------------------------------------------------


def _from_format_1(data: dict[str, Any]) -> AnyResult:
    """Upgrade a result in format 1, which development versions of 0.1.0 wrote."""
    try:
        info = RunInfo.from_config(data["config"]).as_dict()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"invalid config: {type(error).__name__}: {error}") from error
    upgraded = data | {"format": 2, "info": info, "quarantined": data.get("apart", 0)}
    return msgspec.convert(upgraded, AnyResult, strict=False)  # type: ignore[no-any-return]


# --- other records -----------------------------------------------------------------------------


class Fact(Record, frozen=True, kw_only=True):
    """Observed behavior of a gradient mode for one question."""

    topic: str
    question: str
    mode: GradMode | None = None
    """None if the question is not asked per mode."""
    expected: str
    observed: str | None
    """None if the question could not be tested."""
    why: str
    """Consequence for user code."""
    unavailable: str = ""
    """Why the question could not be tested."""

    @property
    def holds(self) -> bool:
        """Whether the observation is as expected; an untested question counts as expected."""
        return self.observed in (self.expected, None)


class ModeFacts(Record, frozen=True, kw_only=True):
    """Behavior of each gradient mode with the installed torch on one device."""

    format: Literal[1] = 1
    kind: Literal["modes"] = "modes"
    gradrun: str
    environment: Environment
    facts: tuple[Fact, ...]

    @property
    def differing(self) -> tuple[Fact, ...]:
        """The facts that are not as expected."""
        return tuple(fact for fact in self.facts if not fact.holds)


class DamagedRange(Record, frozen=True):
    """A range of committed samples whose file is missing or changed."""

    start: int
    stop: int
    file: str
    problem: str


class Verification(Record, frozen=True):
    """Result of comparing the files of a run with the checksums in its journal."""

    folder: Path
    samples: int | None
    """Samples of the run; None if unknown, because it is unfinished."""
    committed: int
    """Samples in the journal."""
    ranges: int
    damaged: tuple[DamagedRange, ...]
    torn: bool
    """The last line of the journal is incomplete and was ignored."""
    resumable: bool = True
    """This version of gradrun can continue the run."""

    @property
    def complete(self) -> bool:
        """Whether all samples of the run are committed and unchanged."""
        return not self.damaged and self.committed == self.samples

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `complete` in JSON types."""
        return self.as_dict() | {"complete": self.complete}
