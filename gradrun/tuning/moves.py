"""The table of moves: which settings are tried, and when. The search treats all rows alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from gradrun.config.model import EagerModel
from gradrun.core.cpu import thread_count
from gradrun.core.grad_mode import GradMode
from gradrun.inference.allocator import describe_obstacle
from gradrun.tuning.facts import Facts, value_of

Changes = dict[str, Any]
Step = Literal["process", "batches", "kernels", "workers", "batches again", "last"]
Effect = Literal["none", "rounding", "precision"]

STEPS: tuple[Step, ...] = ("process", "batches", "kernels", "workers", "batches again", "last")
"""In this order; the moves of the step `kernels` are tried together, from all to fewer."""

BUNDLED: Step = "kernels"

_TEXTS = 128
"""Least limit of texts in a batch that is limited by tokens."""

_MEMORY_SHARE = 0.5
"""Share of the machine's memory that a larger batch, or more workers, may need, if all memory grew
with it.
"""


@dataclass(frozen=True)
class Move:
    """One row of the table."""

    name: str
    step: Step
    effect: Effect
    """The greatest effect on outputs."""
    settings: Callable[[Facts], Sequence[Changes]]
    """The changes to try on `facts.config`, the most promising first; none if it has them."""
    skip: Callable[[Facts], str] = lambda _: ""
    """Why the move does not apply, or ""."""
    climbs: bool = False
    """Whether to repeat it while it gains."""
    ranked: bool = False
    """Whether a setting is worth a try only if the ones before were refused."""


# --- settings ----------------------------------------------------------------------------------


def _other_values(key: str, *values: Any) -> Callable[[Facts], Sequence[Changes]]:
    """Try the values that the config does not have."""

    def settings(facts: Facts) -> Sequence[Changes]:
        return [{key: value} for value in values if value_of(facts.config, key) != value]

    return settings


def _batch_tokens(facts: Facts) -> Sequence[Changes]:
    if value_of(facts.config, "data.batch_tokens"):
        return []
    if value_of(facts.config, "data.group_by_length") is False:
        return []
    # The limit replaces that of the number of texts, which must not come first.
    size = max(_TEXTS, value_of(facts.config, "data.batch_size") or 0)
    return [
        {"data.batch_tokens": tokens, "data.batch_size": size} for tokens in (1024, 4096)
    ]  # fmt: skip


def _decode_threads(facts: Facts) -> Sequence[Changes]:
    used = value_of(facts.config, "data.decode_threads")
    used = facts.cpus if used == "auto" else used
    counts = {1, facts.cpus // 2, facts.cpus, 2 * facts.cpus} - {0, used}
    return [{"data.decode_threads": count} for count in sorted(counts)]


def _modes(facts: Facts) -> Sequence[Changes]:
    # inference_mode is never slower than no_grad by more than noise, and both save memory. Where
    # grad is faster, the reason is the fast path, which has a row of its own.
    better = {
        GradMode.GRAD: (GradMode.INFERENCE_MODE, GradMode.NO_GRAD),
        GradMode.NO_GRAD: (GradMode.INFERENCE_MODE,),
        GradMode.INFERENCE_MODE: (),
    }
    return [{"run.mode": mode.value} for mode in better[facts.config.run.mode]]


def _larger_batch(factor: int) -> Callable[[Facts], Sequence[Changes]]:
    """Try a batch size, if the whole process would still fit the memory of the machine."""

    def settings(facts: Facts) -> Sequence[Changes]:
        size = value_of(facts.config, "data.batch_size")
        if not size or factor * size > facts.samples:
            return []
        if factor * (facts.peak or 0) > _MEMORY_SHARE * facts.memory:
            return []
        return [{"data.batch_size": factor * size}]

    return settings


def _halve_batch(facts: Facts) -> Sequence[Changes]:
    size = value_of(facts.config, "data.batch_size")
    return [{"data.batch_size": size // 2}] if size and size > 1 else []


def _precisions(facts: Facts) -> Sequence[Changes]:
    changes: list[Changes] = []
    if facts.config.run.autocast is None and facts.config.run.float32_precision is None:
        if isinstance(facts.config.model, EagerModel) and facts.config.model.dtype is None:
            changes.append({"model.dtype": "bfloat16"})
        changes += [{"run.autocast": "bfloat16"}, {"run.float32_precision": "bf16"}]
    return changes


def _compiled(facts: Facts) -> Sequence[Changes]:
    if value_of(facts.config, "model.compile"):
        return []
    found: list[Changes] = [{"model.compile": {"freezing": True}}, {"model.compile": {}}]
    if find_spec("openvino"):
        found.append({"model.compile": {"backend": "openvino"}})
    return found


def _cuda_graphs(facts: Facts) -> Sequence[Changes]:
    compiled = value_of(facts.config, "model.compile") or {}
    if compiled.get("backend") == "cudagraphs" or compiled.get("mode") == "reduce-overhead":
        return []
    found: list[Changes] = [{"model.compile": {"backend": "cudagraphs"}}]
    if compiled.get("backend") == "inductor":
        return [{"model.compile.mode": "reduce-overhead"}, *found]
    return [*found, {"model.compile": {"mode": "reduce-overhead"}}] if facts.has_compiler else found


def _autotuned(facts: Facts) -> Sequence[Changes]:
    compiled = value_of(facts.config, "model.compile") or {}
    if compiled.get("backend") != "inductor" or compiled.get("mode"):
        return []
    return [{"model.compile.mode": "max-autotune"}]


def _workers(facts: Facts) -> Sequence[Changes]:
    found: list[Changes] = []
    count = facts.cpus
    while count > 1:
        engine = {"source": "processes", "workers": count}
        if count * (facts.peak or 0) <= _MEMORY_SHARE * facts.memory:
            found.append({"engine": engine, "run.threads": facts.cpus // count})
        count //= 2
    return found


def _threads(facts: Facts) -> Sequence[Changes]:
    used = thread_count(facts.config.run.threads)
    cpus = facts.cpus // (value_of(facts.config, "engine.workers") or 1)
    counts = {1, cpus // 2, cpus} - {0, used}
    return [{"run.threads": count} for count in sorted(counts, reverse=True)]


# --- conditions --------------------------------------------------------------------------------


def _no_retain(facts: Facts) -> str:
    return (
        f"this process does not use glibc's malloc alone {obstacle}"
        if (obstacle := describe_obstacle())
        else ""
    )


def _no_texts(facts: Facts) -> str:
    return "" if facts.config.data.source == "text" else "the data are not texts"


def _one_length(facts: Facts) -> str:
    if reason := _no_texts(facts):
        return reason
    padded = value_of(facts.config, "data.padding") == "max_length"
    return "all texts are padded to data.max_length" if padded else ""


def _no_decoding(facts: Facts) -> str:
    decoded = facts.config.data.source in {"images", "audio"}
    return "" if decoded else "the data are not image or audio files"


def _fixed_batches(facts: Facts) -> str:
    return "" if value_of(facts.config, "data.batch_size") else "the data have no batch size"


def _no_images(facts: Facts) -> str:
    if not isinstance(facts.config.model, EagerModel):
        return "the file of the model fixes its memory format"
    return "" if facts.has("Conv2d") else "the model has no Conv2d"


def _no_fast_bfloat16(facts: Facts) -> str:
    if not facts.constraints.allows_precision:
        return "the tolerance is that of float32; --within max_rel=0.01 allows more"
    if facts.device == "cpu" and not facts.cpu_flags & {"amx_bf16", "avx512_bf16", "bf16"}:
        return "the CPU has no instructions for bfloat16"
    return ""


def _no_compiler(facts: Facts) -> str:
    if facts.config.run.mode is GradMode.GRAD:
        return "run.mode grad"
    return "" if facts.has_compiler else "no C++ compiler (g++ or clang++) was found"


def _no_cuda(facts: Facts) -> str:
    return "" if facts.device.startswith("cuda") else "the model does not run on a CUDA device"


def _no_cuda_graphs(facts: Facts) -> str:
    if reason := _no_cuda(facts):
        return reason
    return "batches of these texts differ in length" if facts.varies else ""


def _no_fast_path(facts: Facts) -> str:
    found = facts.has("TransformerEncoderLayer", "MultiheadAttention")
    return "" if found else "the model has no nn.TransformerEncoderLayer"


def _no_attention(facts: Facts) -> str:
    found = facts.config.model.source == "huggingface"
    return "" if found else "the model is not from transformers"


def _one_cpu(facts: Facts) -> str:
    if facts.device != "cpu":
        return "the model does not run on the CPU"
    return "" if facts.cpus > 1 else "one CPU is available"


def _no_workers(facts: Facts) -> str:
    return _one_cpu(facts) or ("the config has an engine" if facts.config.engine else "")


def _not_compiled(facts: Facts) -> str:
    return "" if value_of(facts.config, "model.compile") else "a compiled model is not faster"


MOVES = (
    Move("allocator", "process", "none", _other_values("run.allocator", "retain"), _no_retain),
    Move("batches in flight", "process", "none", _other_values("run.in_flight", 3), _no_cuda),
    Move("gradient mode", "process", "rounding", _modes),
    Move(
        "length order", "batches", "rounding",
        _other_values("data.group_by_length", True), _no_texts,
    ),
    Move("tokens per batch", "batches", "rounding", _batch_tokens, _one_length),
    Move("decode threads", "batches", "none", _decode_threads, _no_decoding),
    Move(
        "much larger batches", "batches", "rounding", _larger_batch(8), _fixed_batches, climbs=True,
    ),
    Move(
        "larger batches", "batches", "rounding", _larger_batch(2), _fixed_batches, climbs=True,
    ),
    Move(
        "memory format", "kernels", "rounding",
        _other_values("model.channels_last", True), _no_images,
    ),
    Move(
        "precision", "kernels", "precision", _precisions, _no_fast_bfloat16, ranked=True,
    ),
    Move("fast path", "kernels", "rounding", _other_values("run.fast_path", False), _no_fast_path),
    Move(
        "attention", "kernels", "rounding",
        _other_values("model.attention", "sdpa", "eager"), _no_attention,
    ),
    Move("compile", "kernels", "rounding", _compiled, _no_compiler),
    Move("worker processes", "workers", "rounding", _workers, _no_workers),
    Move("threads", "workers", "rounding", _threads, _no_workers),
    Move(
        "larger batches", "batches again", "rounding", _larger_batch(2), _fixed_batches,
        climbs=True,
    ),
    Move(
        "smaller batches", "batches again", "rounding", _halve_batch, _fixed_batches, climbs=True,
    ),
    Move("CUDA graphs", "last", "rounding", _cuda_graphs, _no_cuda_graphs),
    Move("autotuned kernels", "last", "rounding", _autotuned, _not_compiled),
)  # fmt: skip


def applicable(moves: Sequence[Move], facts: Facts) -> Iterator[tuple[Move, str]]:
    """Yield each move with the reason why it is not tried, or ""."""
    for move in moves:
        reason = move.skip(facts)
        if not reason and move.effect != "none" and not facts.constraints.allows_rounding:
            # Some of these keep the bits, such as workers; the gate decides.
            reason = "" if move.step in {"process", "workers"} else "bitwise equal outputs"
        settings = [] if reason else move.settings(facts)
        changed = {key for setting in settings for key in setting}
        kept = [k for k in facts.constraints.tune.keep if any(_overlap(k, c) for c in changed)]
        if kept:
            reason = f"{kept[0]} is kept"
        yield move, reason


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one is below the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def merged(parts: Sequence[Changes]) -> Changes:
    """Return the changes of all parts."""
    return {key: value for part in parts for key, value in part.items()}
