"""Results of every kind with fixed values, and results with malicious text."""

from __future__ import annotations

from typing import Any

from gradrun.results.result import AnyResult, CheckResult, Outcome, RunInfo, Warning
from tests.report.test_audit_report import RESULTS as AUDITED
from tests.report.test_comparison_report import RESULTS as COMPARED
from tests.support.reporting import EVIL
from tests.support.run_results import CONFIG, MACHINE, MEMORY, measurement, run_result

KIB = 1024
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
        reason="the 99th percentile is above the limit; look at what changed",
        key="check.limits.latency_p99",
    ),
    Outcome(
        check="time vs main",
        limit=">= 1.0",
        value="0.99 (0.90 to 1.08)",
        status="inconclusive",
        reason="the interval holds the limit; raise measure.budget",
    ),
)


def check(*outcomes: Outcome) -> CheckResult:
    """Return the result of a check that measured one run."""
    return run_result(measurement(memory=WATCHED), cls=CheckResult, outcomes=outcomes)


RESULTS = {
    "run": run_result(measurement(memory=WATCHED)),
    "short run": run_result(measurement(7), warnings=(Warning(code="x", text="do so | or so"),)),
    "nothing": run_result(measurement(0), files=()),
    "comparison": COMPARED["modes"],
    "noisy": COMPARED["noisy"],
    "one process": COMPARED["one process"],
    "no comparison": COMPARED["nothing"],
    "audit": AUDITED["findings"],
    "unsafe": AUDITED["no safe mode"],
    "check": check(*OUTCOMES),
    "empty check": check(),
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
        "failures": (NASTY,),
        "files": (NASTY,),
        "warnings": (Warning(code=NASTY, text=NASTY),),
    }
    return base.replace(**{k: v for k, v in changes.items() if k in base.__struct_fields__})
