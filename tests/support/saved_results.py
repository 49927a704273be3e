"""Results of every kind with fixed values, and results with malicious text."""

from __future__ import annotations

from typing import Any

from gradrun.core.grad_mode import GradMode
from gradrun.results.ratios import compare_measured
from gradrun.results.result import (
    AnyResult,
    AuditResult,
    CheckResult,
    ClassDistribution,
    CompareResult,
    Equivalence,
    Example,
    Fact,
    Finding,
    Measurement,
    Memory,
    ModeFacts,
    Outcome,
    PredictedClass,
    RunInfo,
    SavedForBackward,
    Statement,
    Warning,
)
from gradrun.results.work import Flops, Work
from tests.support.profile_results import PEAKS, PROFILES
from tests.support.reporting import EVIL
from tests.support.run_results import CONFIG, MACHINE, MEMORY, measurement, run_result

KIB, MIB = 1024, 1024**2


def config(output_path: str) -> dict[str, Any]:
    return CONFIG.model_dump(mode="json") | {"output": {"path": output_path}}


# --- runs --------------------------------------------------------------------------------------

WORK = Work(
    flops=(Flops(dtype="float32", count=52_000_000),), bytes=3_000_000, batch_size=4, elements=256
)
"""Of a batch that takes 0.7 ms: 74 GFLOP/s and 4 GB/s."""
UNMEASURED = Memory(weights=0, inputs=16)
WARNING = Warning(
    code="high_variance",
    text="the slowest 10 % of the batches took at least 2.4 times the median; if other programs "
    "use this machine, close them or lower run.threads",
)
RUNS = {
    "digits": run_result(),
    "warned": run_result(measurement(7, memory=UNMEASURED), warnings=(WARNING, WARNING)),
    "gpu": run_result(
        measurement(
            2_000,
            mode="grad",
            memory=MEMORY.replace(
                device_allocated=54_001_664,
                device_reserved=67_108_864,
                forward_peak=None,
                retained=None,
            ),
        ),
        environment=MACHINE.replace(device="cuda", device_name="NVIDIA H200"),
        files=tuple(f"predictions-{i:05}.safetensors" for i in range(5)),
    ),
    "nothing": run_result(measurement(0), files=()),
    "peak": run_result(measurement(work=WORK, peaks=PEAKS)),
}


# --- comparisons -------------------------------------------------------------------------------


def side(name: str, seconds: float, wobble: float, memory: Memory, mode: str) -> list[Measurement]:
    """Return five processes of seven rounds each; `wobble` is their relative distance in time."""
    return [
        measurement(
            7,
            mode=mode,
            variant=name,
            process=process,
            batch_seconds=tuple(seconds * (1 + wobble * (process - 2)) for _ in range(7)),
            batch_sizes=(4,) * 7,
            memory=memory,
        )
        for process in range(5)
    ]


def equal_outputs(
    candidate: str, base: str = "grad", difference: float = 0.0, **changes: Any
) -> Any:
    given = {
        "baseline": base,
        "candidate": candidate,
        "bitwise": not difference,
        "max_abs_diff": difference,
        "equal": True,
    }
    return Equivalence(**(given | changes))


def compared(*sides: list[Measurement], **changes: Any) -> CompareResult:
    measured = tuple(m for side in sides for m in side)
    given: dict[str, Any] = {
        "config": config("runs/digits-compare"),
        "measurements": measured,
        "comparisons": tuple(compare_measured(measured, 0.01)),
    }
    return run_result(cls=CompareResult, **(given | changes))


GRAD_TIMES = side(
    "grad", 9.13e-4, 0.001, MEMORY.replace(forward_peak=9 * MIB, retained=8 * MIB), "grad"
)
NO_GRAD_TIMES = side(
    "no_grad", 7.1e-4, 0.003, MEMORY.replace(forward_peak=3 * MIB, retained=MIB), "no_grad"
)
INFERENCE_TIMES = side(
    "inference_mode",
    7.0e-4,
    0.002,
    MEMORY.replace(forward_peak=3 * MIB, retained=MIB),
    "inference_mode",
)
TWICE = side("inference_mode again", 7.0e-4, 0.002, INFERENCE_TIMES[0].memory, "inference_mode")
WILD = side("no_grad", 7.1e-4, 0.35, UNMEASURED, "no_grad")
ON_GPU = MEMORY.replace(forward_peak=None, retained=None, device_allocated=54_001_664)
COMPARISONS = {
    "modes": compared(
        GRAD_TIMES,
        NO_GRAD_TIMES,
        INFERENCE_TIMES,
        equivalence=(equal_outputs("no_grad"), equal_outputs("inference_mode")),
    ),
    "same": compared(INFERENCE_TIMES, TWICE, equivalence=(equal_outputs("inference_mode again"),)),
    "noisy": compared(
        side("grad", 9.13e-4, 0.001, UNMEASURED, "grad"),
        WILD,
        equivalence=(equal_outputs("no_grad", difference=3.1e-7),),
        warnings=(
            Warning(
                code="not_precise",
                text="the budget of 60 s was spent after 5 processes, before the intervals were "
                "as narrow as 1.0%; reduce load on the machine or raise measure.budget",
            ),
        ),
    ),
    "differs": compared(
        GRAD_TIMES,
        NO_GRAD_TIMES,
        equivalence=(
            equal_outputs(
                "no_grad",
                difference=0.0123,
                equal=False,
                first_module="layers.0 (TransformerEncoderLayer)",
            ),
        ),
    ),
    "gpu": compared(
        side("grad", 9.13e-4, 0.001, ON_GPU, "grad"),
        side("no_grad", 7.1e-4, 0.003, ON_GPU, "no_grad"),
        environment=MACHINE.replace(device="cuda", device_name="NVIDIA H200"),
        equivalence=(equal_outputs("no_grad"),),
    ),
    "peak": compared(
        GRAD_TIMES,
        [m.replace(work=WORK, peaks=PEAKS) for m in INFERENCE_TIMES],
        equivalence=(equal_outputs("inference_mode"),),
    ),
    "threads": compared(
        side("run.threads=1", 9.13e-4, 0.001, MEMORY, "no_grad"),
        side("run.threads=2", 9.9e-4, 0.001, MEMORY, "no_grad"),
        equivalence=(equal_outputs("run.threads=2", "run.threads=1", 1.2e-7),),
    ),
    "alone": compared(GRAD_TIMES, failures=("no_grad, batch 3: was killed by SIGKILL",)),
    "nothing": compared(failures=("grad, batch 0: ValueError: no",)),
    "one process": compared(
        GRAD_TIMES[:1], NO_GRAD_TIMES[:1], equivalence=(equal_outputs("no_grad"),)
    ),
}


# --- audits ------------------------------------------------------------------------------------


def in_mode(mode: str, **memory: int | None) -> Any:
    return measurement(0, mode=mode, variant=mode, memory=MEMORY.replace(**memory))


GRAD = in_mode("grad", forward_peak=9 * MIB, retained=8 * MIB)
NO_GRAD = in_mode("no_grad", forward_peak=3 * MIB, retained=MIB)
INFERENCE = in_mode("inference_mode", forward_peak=3 * MIB, retained=MIB)
SAME = tuple(
    Equivalence(baseline="grad", candidate=mode, bitwise=True, max_abs_diff=0.0, equal=True)
    for mode in ("no_grad", "inference_mode")
)
DIFFERENT = SAME[0].replace(bitwise=False, max_abs_diff=0.25, equal=False)


def finding(severity: str, **changes: Any) -> Finding:
    given = {
        "severity": severity,
        "code": "made_in_inference_mode",
        "modes": ("inference_mode",),
        "module": "encoder.layers.0 (Block)",
        "source": "/home/me/nets/mine.py:41",
        "text": "Buffer encoder.layers.0.scale was made inside inference_mode",
        "advice": "Make it in __init__",
        "cost": 4096,
    }
    return Finding(**(given | changes))


def audit(**changes: Any) -> AuditResult:
    given: dict[str, Any] = {
        "config": config("runs/digits-audit"),
        "measurements": (GRAD, NO_GRAD, INFERENCE),
        "equivalence": SAME,
        "saved_for_backward": (
            SavedForBackward(module="encoder.layers.0 (Block)", bytes=6 * MIB),
            SavedForBackward(module="(the model) (Net)", bytes=MIB),
            SavedForBackward(module="(outputs)", bytes=MIB),
        ),
    }
    return run_result(cls=AuditResult, **(given | changes))


AUDITS = {
    "clean": audit(),
    "findings": audit(
        findings=(
            finding("error"),
            finding("warning", modes=tuple(GradMode), text="Draws random numbers", cost=None),
            finding("info", modes=(), module="", source=None, text="torch.compile is fine"),
        ),
    ),
    "no safe mode": audit(findings=(finding("error", modes=tuple(GradMode)),)),
    "grad alone": audit(
        measurements=(GRAD,),
        equivalence=(),
        findings=(
            finding(
                "error",
                code="model_fails",
                modes=("no_grad", "inference_mode"),
                advice="",
                cost=None,
            ),
        ),
    ),
    "differs": audit(
        equivalence=(DIFFERENT, SAME[1]), findings=(finding("error", modes=("no_grad",)),)
    ),
    "unmeasured": audit(
        measurements=tuple(
            m.replace(memory=Memory(weights=0, inputs=16)) for m in (GRAD, NO_GRAD, INFERENCE)
        ),
        saved_for_backward=(),
    ),
    "elsewhere": audit(
        saved_for_backward=(SavedForBackward(module="encoder.layers.0 (Block)", bytes=6 * MIB),)
    ),
    "many": audit(
        saved_for_backward=tuple(
            SavedForBackward(module=f"layers.{i} (Block)", bytes=MIB // 2) for i in range(16)
        )
    ),
}


# --- checks ------------------------------------------------------------------------------------

PASSED = Outcome(
    check="model runs", limit="no error", value="125 batches", status="pass", key="check.smoke"
)
FAILED = Outcome(
    check="forward peak",
    limit="at most 60.00 KiB",
    value="64.50 KiB",
    status="fail",
    reason="4.50 KiB above the limit (66,048 bytes)",
    key="check.limits.forward_peak",
    source="configs/digits.yaml:24:19",
)
INCONCLUSIVE = Outcome(
    check="time vs origin/main",
    limit="at most +5%",
    value="+4.8% (+3.1% to +6.5%)",
    status="inconclusive",
    reason="the confidence interval includes the limit; reduce load on the machine or raise "
    "measure.budget or measure.processes",
    key="check.regression.time",
)


def check(*outcomes: Outcome, **changes: Any) -> CheckResult:
    return run_result(cls=CheckResult, outcomes=outcomes, **changes)


CHECKS = {
    "passed": check(PASSED),
    "mixed": check(
        PASSED, FAILED, INCONCLUSIVE, warnings=(Warning(code="noisy_machine", text="busy"),)
    ),
}


# --- mode behaviors ----------------------------------------------------------------------------


def fact(question: str, expected: str, observed: str | None = "", **changes: Any) -> Fact:
    """Return a fact; by default the observation is as expected."""
    given: dict[str, Any] = {
        "topic": "r after the block",
        "question": question,
        "expected": expected,
        "observed": expected if observed == "" else observed,
        "why": f"This is why {question} matters.",
    }
    return Fact(**(given | changes))


def facts(question: str, *expected: str, **changes: Any) -> tuple[Fact, ...]:
    """Return the facts for one question in all three modes."""
    per_mode = zip(GradMode, expected, strict=True)
    return tuple(fact(question, text, mode=mode, **changes) for mode, text in per_mode)


def mode_facts(*facts: Fact, **changes: Any) -> ModeFacts:
    given: dict[str, Any] = {"gradrun": "0.1.0", "environment": MACHINE, "facts": facts}
    return ModeFacts(**(given | changes))


AFTER = (
    *facts("r.add_(1)", "works", "works", "RuntimeError"),
    *facts("r.clone()", "normal", "normal", "normal"),
)
NESTED = (
    fact("enable_grad() inside no_grad()", "on", topic="Blocks within blocks: gradients are"),
    fact(
        "set_grad_enabled(False) called in a function that has returned",
        "off",
        topic="Blocks within blocks: gradients are",
    ),
)
COMPILED = facts(
    "gradrun's guard, fullgraph=True", "1 graph", "1 graph", "1 graph", topic="torch.compile"
)
NO_COMPILE = tuple(
    known.replace(observed=None, unavailable="torch.compile is turned off here")
    for known in COMPILED
)
WORKS_NOW = fact("r.add_(1)", "RuntimeError", "works", mode="inference_mode")
BROKEN = fact(
    "r.clone()", "normal", "raises TypeError: clone() is no more: use copy()", mode="no_grad"
)
OFF = fact("no_grad() inside enable_grad()", "off", "on", topic=NESTED[0].topic)
MODES = {
    "proven": mode_facts(*AFTER, *NESTED, *COMPILED),
    "differs": mode_facts(
        *AFTER[:2], WORKS_NOW, AFTER[3], BROKEN, AFTER[5], NESTED[0], OFF, *NO_COMPILE
    ),
    "gpu": mode_facts(
        *AFTER,
        environment=MACHINE.replace(device="cuda", device_name="NVIDIA H200"),
    ),
    "mixed": mode_facts(*AFTER, fact("alone", "yes")),
    "unavailable": mode_facts(*AFTER, *NO_COMPILE),
}


# --- one of each kind --------------------------------------------------------------------------

TIMELINE = (0, 16 * KIB, 66_048, 32 * KIB, 48 * KIB, 160)
WATCHED = MEMORY.replace(timeline=TIMELINE, peak_module="stage2.0 (Conv2d)")
OUTCOMES = (
    Outcome(check="model runs", limit="no error", value="498 samples", status="pass"),
    Outcome(check="forward_peak", limit="at most 64.0 MiB", value="64.5 KiB", status="pass"),
    Outcome(
        check="latency_p99",
        limit="at most 500 µs",
        value="850 µs",
        status="fail",
        reason="the 99th percentile is above the limit",
        key="check.limits.latency_p99",
    ),
    Outcome(
        check="time vs main",
        limit=">= 1.0",
        value="0.99 (0.90 to 1.08)",
        status="inconclusive",
        reason="the confidence interval includes the limit; raise measure.budget",
    ),
)


RESULTS = {
    "run": run_result(measurement(memory=WATCHED)),
    "short run": run_result(measurement(7), warnings=(Warning(code="x", text="do so | or so"),)),
    "nothing": run_result(measurement(0), files=()),
    "comparison": COMPARISONS["modes"],
    "noisy": COMPARISONS["noisy"],
    "one process": COMPARISONS["one process"],
    "no comparison": COMPARISONS["nothing"],
    "audit": AUDITS["findings"],
    "unsafe": AUDITS["no safe mode"],
    "check": check(*OUTCOMES, measurements=(measurement(memory=WATCHED),)),
    "empty check": check(measurements=(measurement(memory=WATCHED),)),
    "profile": PROFILES["modules"],
    "profiled modes": PROFILES["modes"],
}

TAGS = f"<script>document.title='no'</script>\"'--></style><img src=x onerror=alert(1)>{EVIL}"
LINKS = "[here](https://example.org) ![x](https://example.org/x.png) @everyone `| # $x$ ~~y~~ #1"
NASTY = f"{TAGS} {LINKS} =cmd|' /C calc'!A0"


def hostile(kind: str) -> AnyResult:
    """Return a result in which every text field contains markup and control characters."""
    memory = WATCHED.replace(peak_module=NASTY, process_method=NASTY)
    machine = MACHINE.replace(
        **(
            dict.fromkeys(
                ("gradrun", "torch", "numpy", "python", "platform", "cpu", "device", "device_name"),
                NASTY,
            )
        )
    )
    config = CONFIG.model_dump(mode="json") | {
        "model": {"source": "python", "target": NASTY},
        "output": {"path": NASTY},
    }
    base = RESULTS[kind]
    variants = {m.variant: f"{i} {NASTY}" for i, m in enumerate(base.measurements) if m.variant}
    changes: dict[str, Any] = {
        "info": RunInfo.from_config(config),
        "config": config,
        "environment": machine,
        "started_at": NASTY,
        "measurements": tuple(
            m.replace(memory=memory, variant=variants.get(m.variant, "")) for m in base.measurements
        ),
        "comparisons": tuple(
            c.replace(baseline=variants[c.baseline], candidate=variants[c.candidate])
            for c in getattr(base, "comparisons", ())
        ),
        "findings": tuple(
            f.replace(**dict.fromkeys(("code", "module", "source", "text", "advice"), NASTY))
            for f in getattr(base, "findings", ())
        ),
        "saved_for_backward": tuple(
            s.replace(module=NASTY) for s in getattr(base, "saved_for_backward", ())
        ),
        "outcomes": tuple(
            o.replace(**dict.fromkeys(("check", "limit", "value", "reason", "key"), NASTY))
            for o in getattr(base, "outcomes", ())
        ),
        "examples": (
            Example(position=0, input=NASTY, picture=b"<svg>", prediction=NASTY, label=NASTY),
        ),
        "class_distribution": (
            ClassDistribution(
                output=NASTY,
                predictions=2,
                samples=1,
                distinct=1,
                most_frequent=(PredictedClass(name=NASTY, count=2),),
            ),
        ),
        "interpretation": (Statement(topic=NASTY, text=NASTY),),
        "profiles": tuple(
            p.replace(
                variant=variants.get(p.variant, ""),
                modules=tuple(m.replace(path=NASTY, type=NASTY) for m in p.modules),
                operators=tuple(
                    o.replace(name=NASTY, shapes=NASTY, modules=(NASTY,)) for o in p.operators
                ),
            )
            for p in getattr(base, "profiles", ())
        ),
        "failures": (NASTY,),
        "files": (NASTY,),
        "warnings": (Warning(code=NASTY, text=NASTY),),
    }
    return base.replace(**{k: v for k, v in changes.items() if k in base.__struct_fields__})
