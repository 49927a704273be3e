"""Figures of profiles that are made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gradrun.results.profile import (
    ModuleCalls,
    Profile,
    ProfileFigures,
    differences,
    forward_difference,
)
from gradrun.results.work import Flops, MachinePeaks, Peak, Work, describe_reach, reach

US = 1e-6
PEAKS = MachinePeaks(
    device="cpu",
    threads=2,
    products=(
        Peak(dtype="float32", rate=200e9, size=2048),
        Peak(dtype="bfloat16", rate=600e9, size=2048),
    ),
    copy=20e9,
)


def calls(path: str, parent: int, *seconds: float, **changes: Any) -> ModuleCalls:
    given: dict[str, Any] = {"type": "Linear", "calls": 1.0}
    return ModuleCalls(path=path, parent=parent, seconds=seconds, **(given | changes))


def profile(
    *modules: ModuleCalls, plain: Any = None, hooked: Any = None, **changes: Any
) -> Profile:
    whole = modules[0].seconds
    given: dict[str, Any] = {"inside": 0.0, "outside": 0.0}
    return Profile(
        plain_seconds=plain or whole,
        hooked_seconds=hooked or whole,
        modules=modules,
        **(given | changes),
    )


def test_the_cost_of_hooks_is_subtracted_from_the_module_and_from_its_caller() -> None:
    # Two children of 10 µs in a model that takes 5 µs itself; each call costs 1 µs inside of its
    # interval and 2 µs outside.
    child, root = 10 + 1, 5 + 1 + 2 * (10 + 1 + 2)
    rounds = 3
    figures = ProfileFigures(
        profile(
            calls("", -1, *[root * US] * rounds),
            calls("a", 0, *[child * US] * rounds),
            calls("b", 0, *[child * US] * rounds),
            plain=(25 * US,) * rounds,
            hooked=((25 + 3 * 3) * US,) * rounds,
            inside=1 * US,
            outside=2 * US,
        )
    )
    assert [m.self_time.value / US for m in figures.modules] == pytest.approx([5, 10, 10])
    assert figures.modules[0].time.value / US == pytest.approx(25)
    assert figures.overhead / US == pytest.approx(9)
    assert figures.sum_of_self_times == pytest.approx(1)
    assert figures.modules[1].share.value == pytest.approx(0.4)


def test_the_cost_in_the_model_replaces_that_in_an_empty_module_within_a_factor_of_two() -> None:
    def cost(difference: float) -> float:
        figures = ProfileFigures(
            profile(
                calls("", -1, 100 * US),
                plain=(100 * US,),
                hooked=((100 + difference) * US,),
                inside=1 * US,
                outside=3 * US,
            )
        )
        assert figures.outside == pytest.approx(3 * figures.inside)
        return figures.overhead / US

    assert [cost(d) for d in (-50, 1, 3, 7, 50)] == pytest.approx([2, 2, 3, 7, 8])


def test_a_cost_that_is_measured_precisely_in_the_model_is_used() -> None:
    rounds = 11
    figures = ProfileFigures(
        profile(
            calls("", -1, *[100 * US] * rounds),
            plain=(100 * US,) * rounds,
            hooked=tuple((130 + r) * US for r in range(rounds)),
            inside=1 * US,
            outside=3 * US,
        )
    )
    assert figures.overhead / US == pytest.approx(35)


def test_work_and_rates_include_children() -> None:
    one = Work(flops=(Flops(dtype="float32", count=3_000_000),), bytes=10_000, operators=1)
    figures = ProfileFigures(
        profile(
            calls("", -1, 100 * US, work=Work(bytes=5_000, operators=1, uncounted=("relu",))),
            calls("a", 0, 30 * US, work=one),
            peaks=PEAKS,
        )
    )
    whole = figures.modules[0]
    assert whole.work == one.replace(bytes=15_000, operators=2, uncounted=("relu",))
    found = whole.reach(PEAKS)
    assert found is not None
    assert found.flops == pytest.approx(3e10)
    assert found.compute == pytest.approx(0.15)
    assert found.memory == pytest.approx(15_000 / 20e9 / 100e-6)


@pytest.mark.parametrize(
    ("flops", "count", "bound", "share"),
    [
        (100e6, 1_000, "compute", 0.5),
        (10e6, 16_000_000, "memory", 0.8),
        (60e6, 60_000_000, "cache", 0.3),
        (1e6, 1_000, "overhead", 0.005),
    ],
)
def test_the_nearest_roof_binds(flops: float, count: int, bound: str, share: float) -> None:
    work = Work(flops=(Flops(dtype="float32", count=int(flops)),), bytes=count)
    found = reach(work, 1e-3, PEAKS)
    assert found is not None
    assert (found.bound, pytest.approx(found.share)) == (bound, share)


def test_mixed_types_are_compared_with_the_peak_of_each() -> None:
    work = Work(
        flops=(Flops(dtype="float32", count=20_000_000), Flops(dtype="bfloat16", count=60_000_000))
    )
    found = reach(work, 1e-3, PEAKS)
    assert found is not None
    assert found.compute == pytest.approx(0.2)
    unknown = Work(flops=(Flops(dtype="float64", count=1),))
    assert reach(unknown, 1e-3, PEAKS) is None


def test_the_sentence_names_share_rates_and_the_advice_for_the_bound() -> None:
    def sentence(flops: float, count: int, dtype: str = "float32") -> str:
        work = Work(flops=(Flops(dtype=dtype, count=int(flops)),), bytes=count)
        return describe_reach(work, 1e-3, PEAKS)

    assert sentence(68e6, 1000).startswith(
        "forward reaches 34% of this machine's float32 peak (68.0 of 200 GFLOP/s); its nearest "
        "limit is compute: run.autocast: bfloat16 can help, whose peak here is 3.0 times as high"
    )
    assert "nearest limit is memory (80% of the copy bandwidth): a larger batch" in sentence(
        1e6, 16_000_000
    )
    assert "far from both limits: a larger batch or model.compile" in sentence(1e6, 1000)
    assert "bfloat16 can help" not in sentence(300e6, 1000, "bfloat16")
    assert describe_reach(Work(bytes=5), 1e-3, PEAKS) == ""


def test_differences_name_the_module_that_changed_and_not_its_caller() -> None:
    def variant(child: float) -> Profile:
        wobble = [1 + 0.001 * r for r in range(-5, 6)]
        return profile(
            calls("", -1, *[(50 + child) * w * US for w in wobble]),
            calls("same", 0, *[40 * w * US for w in wobble]),
            calls("changes", 0, *[child * w * US for w in wobble]),
        )

    (found,) = differences(variant(20), variant(30))
    assert found.label == "changes (Linear)"
    assert found.difference.value == pytest.approx(10 * US)
    assert found.difference.low <= 10 * US <= found.difference.high
    assert differences(variant(20), variant(20)) == []
    whole = forward_difference(variant(20), variant(30))
    assert whole.difference.value == pytest.approx(10 * US)


def test_a_module_that_calls_other_children_is_compared_with_them() -> None:
    rounds = [1.0] * 7
    called = profile(
        calls("", -1, *[100 * US * r for r in rounds]),
        calls("block", 0, *[90 * US * r for r in rounds], type="Block"),
        calls("block.one", 1, *[80 * US * r for r in rounds]),
    )
    fused = profile(
        calls("", -1, *[60 * US * r for r in rounds]),
        calls("block", 0, *[50 * US * r for r in rounds], type="Block"),
    )
    (found,) = differences(called, fused)
    assert (found.label, found.own) == ("block (Block)", False)
    assert found.difference.value == pytest.approx(-40 * US)


@pytest.mark.parametrize(
    "modules",
    [
        (),
        (calls("", -1, 1.0), calls("a", -1, 1.0)),
        (calls("", -1, 1.0), calls("a", 1, 1.0)),
        (calls("", 0, 1.0),),
        tuple(calls("", i - 1, 1.0) for i in range(300)),
        (calls("", -1, 1.0), calls("a", 0, 1.0, 2.0)),
    ],
)
def test_an_impossible_tree_is_an_error(modules: Any) -> None:
    with pytest.raises(ValueError, match=r"modul|differ|without"):
        Profile(plain_seconds=(1.0,), hooked_seconds=(1.0,), inside=0, outside=0, modules=modules)


def test_a_round_of_no_duration_is_an_error() -> None:
    with pytest.raises(ValueError, match="zero duration"):
        profile(calls("", -1, 1.0), plain=(0.0,))
