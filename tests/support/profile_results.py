"""Results of `gradrun profile` with fixed values: modules of planted times, work and memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import Any

from gradrun.core.grad_mode import GradMode
from gradrun.results.profile import ModuleCalls, OperatorTime, Profile
from gradrun.results.result import ProfileResult, Statement
from gradrun.results.work import Flops, MachinePeaks, Peak, Work
from tests.support.run_results import CONFIG, measurement, run_result

US = 1e-6
ROUNDS = 11
INSIDE, OUTSIDE = 0.8 * US, 1.4 * US
PEAKS = MachinePeaks(
    device="cpu",
    threads=2,
    products=(
        Peak(dtype="float32", rate=212e9, size=2048),
        Peak(dtype="bfloat16", rate=430e9, size=2048),
    ),
    copy=21.4e9,
    measured_at="2026-11-20T11:00:00+00:00",
)


class Planted:
    """A module with the time that it takes itself, in µs, and the modules that it calls."""

    def __init__(
        self,
        path: str,
        kind: str,
        own: float,
        *children: Planted,
        flops: int = 0,
        bytes: int = 0,
        peak: int = 0,
        parameters: int = 0,
        calls: int = 1,
    ) -> None:
        self.path, self.kind, self.own, self.children = path, kind, own * US, children
        self.work = Work(
            flops=(Flops(dtype="float32", count=flops),) if flops else (),
            bytes=bytes,
            operators=1,
            uncounted=() if flops else ("relu", "native_layer_norm"),
        )
        self.peak, self.parameters, self.calls = peak, parameters, calls

    def raw(self) -> float:
        """Seconds with children and the cost of hooks, as a hook would measure them."""
        inner = fsum(child.raw() + OUTSIDE * child.calls for child in self.children)
        return self.own + INSIDE * self.calls + inner

    def total(self) -> float:
        """Seconds with children, without hooks."""
        return self.own + fsum(child.total() for child in self.children)

    def entries(self, parent: int, first: int, wobble: Sequence[float]) -> list[ModuleCalls]:
        """Return the entries of this module, which gets the index `first`, and its children."""
        found = [
            ModuleCalls(
                path=self.path,
                type=self.kind,
                parent=parent,
                calls=self.calls,
                seconds=tuple(self.raw() * factor for factor in wobble),
                work=self.work,
                peak=self.peak,
                parameters=self.parameters,
            )
        ]
        for child in self.children:
            found += child.entries(first, first + len(found), wobble)
        return found


def wobble(size: float) -> list[float]:
    """Return factors around 1, with a median of 1."""
    return [1 + size * (i * 4 % ROUNDS - ROUNDS // 2) / ROUNDS for i in range(ROUNDS)]


def profile(model: Planted, variant: str = "", **changes: Any) -> Profile:
    factors = wobble(0.02)
    modules = model.entries(-1, 0, factors)
    hooks = (INSIDE + OUTSIDE) * sum(module.calls for module in modules)
    given: dict[str, Any] = {
        "variant": variant,
        "plain_seconds": tuple(model.total() * factor for factor in factors),
        "hooked_seconds": tuple(model.total() * factor + hooks for factor in factors),
        "inside": INSIDE,
        "outside": OUTSIDE,
        "modules": tuple(modules),
        "operators": (
            OperatorTime(
                name="addmm",
                shapes="[1024] [256, 256] [256, 1024]",
                calls=2,
                seconds=300 * US,
                modules=("blocks.0.first (Linear)", "blocks.1.first (Linear)"),
            ),
            OperatorTime(
                name="relu", shapes="[256, 1024]", calls=2, seconds=40 * US, modules=("act (ReLU)",)
            ),
        ),
        "operator_seconds": 700 * US,
        "peaks": PEAKS,
    }
    return Profile(**(given | changes))


def net(slow: float = 350) -> Planted:
    """Return a model of two blocks: the second is slow, and its norm is bound by memory."""
    return Planted(
        "",
        "Net",
        12,
        Planted(
            "blocks.0",
            "Block",
            4,
            Planted(
                "blocks.0.first", "Linear", 120, flops=13_000_000, bytes=1_400_000, peak=1_048_576,
                parameters=263_168,
            ),
            Planted("act", "ReLU", 22, bytes=430_000, peak=1_048_576),
            parameters=263_168,
            peak=2_097_152,
        ),
        Planted(
            "blocks.1",
            "Block",
            6,
            Planted(
                "blocks.1.first", "Linear", slow, flops=13_000_000, bytes=1_400_000,
                peak=1_048_576, parameters=263_168,
            ),
            Planted("act", "ReLU", 25, bytes=430_000, peak=1_048_576),
            Planted(
                "blocks.1.norm", "LayerNorm", 90, bytes=1_500_000, parameters=2048, calls=2
            ),
            parameters=265_216,
            peak=3_145_728,
        ),
        parameters=528_384,
        peak=3_145_728,
    )  # fmt: skip


def result(*profiles: Profile, **changes: Any) -> ProfileResult:
    measured = [
        measurement(
            ROUNDS,
            mode=one.variant if one.variant in set(GradMode) else "inference_mode",
            variant=one.variant,
            batch_seconds=one.plain_seconds,
            batch_sizes=(4,) * ROUNDS,
        )
        for one in profiles
    ]
    given: dict[str, Any] = {
        "config": CONFIG.model_dump(mode="json") | {"output": {"path": "runs/digits-profile"}},
        "measurements": tuple(measured),
        "profiles": profiles,
        "interpretation": (
            Statement(topic="batches", text="every round runs the same batch, of shape 4 x 256"),
        ),
        "top": 20,
    }
    return run_result(cls=ProfileResult, **(given | changes))


PROFILES = {
    "modules": result(profile(net())),
    "top": result(profile(net()), top=3, depth=2),
    "no peaks": result(profile(net(), peaks=None, operators=())),
    "noisy": result(profile(net(), plain_seconds=tuple(400 * US * f for f in wobble(0.9)))),
    "modes": result(
        profile(net(), "grad"), profile(net(slow=200), "inference_mode"), key="run.mode"
    ),
    "alike": result(
        profile(net(), "run.threads=1"), profile(net(), "run.threads=2"), key="run.threads"
    ),
}
