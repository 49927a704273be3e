"""Sentences and tables of profiles with planted times."""

from __future__ import annotations

import pytest

from gradrun.report import profile_tables
from gradrun.results.profile import ModuleDifference, ProfileFigures
from gradrun.results.stats import Estimate
from gradrun.results.work import Peak
from tests.support.profile_results import PEAKS, US, Planted, net, profile, result


def test_a_profile_without_hooks_states_the_time_only() -> None:
    """As of a compiled model, which is timed as a whole; nine calls cost 2.2 µs each."""
    hooked = ProfileFigures(profile(net()))
    assert "Hooks add 19.8 µs (3.1%), which is subtracted" in profile_tables._hooks(hooked)
    found = ProfileFigures(profile(Planted("", "Net", 300), inside=0.0, outside=0.0))
    text = profile_tables._hooks(found)
    assert text == "The forward pass takes 300 ± 2 µs without hooks."


def test_a_forward_faster_than_the_peak_is_doubted() -> None:
    assert [*profile_tables.doubts(result(profile(net())))] == []
    slow = PEAKS.replace(products=(Peak(dtype="float32", rate=1e9, size=2048),))
    (doubt,) = profile_tables.doubts(result(profile(net(), peaks=slow)))
    assert doubt.startswith("the forward pass is faster than the measured peak of the machine")


def test_no_peak_is_named_for_work_that_exceeds_it() -> None:
    text = profile_tables.verdict(result(profile(net())))
    assert "this machine's float32 peak" in text
    slow = PEAKS.replace(products=(Peak(dtype="float32", rate=1e9, size=2048),))
    assert "peak" not in profile_tables.verdict(result(profile(net(), peaks=slow)))


def test_the_largest_differences_are_listed_and_the_rest_counted() -> None:
    def layers(factor: float) -> Planted:
        children = (Planted(f"{n}", "Linear", (10 + n) * factor) for n in range(30))
        return Planted("", "Net", 10, *children)

    base, other = profile(layers(1), "grad"), profile(layers(2), "no_grad")
    table = profile_tables.difference(base, other, "run.mode")
    labels = [row[0] for row in table.rows]
    assert labels[0] == "forward"
    assert labels[1:4] == ["29 (Linear)", "28 (Linear)", "27 (Linear)"]
    assert table.note.endswith(f" {30 - (len(labels) - 1)} smaller differences are not listed.")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Estimate(0.0, -1 * US, 1 * US), "0 s"),
        (Estimate(40 * US, 39 * US, 41 * US), "+40 ± 1 µs"),
        (Estimate(-40 * US, -41 * US, -39 * US), "-40 ± 1 µs"),
        (Estimate(40 * US, 10 * US, 90 * US), "+10 to +90 µs"),
        (Estimate(-40 * US, -90 * US, -10 * US), "-10 to -90 µs"),
        (Estimate(40 * US, -10 * US, 90 * US), "+40 µs, unclear"),
        (Estimate(-40 * US, -90 * US, 10 * US), "-40 µs, unclear"),
    ],
)
def test_a_difference_is_shown_with_its_interval(change: Estimate, text: str) -> None:
    found = ModuleDifference("m", 1.0, 1.0, change, own=True)
    assert profile_tables._signed(found) == text


def test_peaks_without_float32_have_no_sentence() -> None:
    assert profile_tables.summarize_peaks(PEAKS).startswith(
        "With 2 threads, float32 products reach 212 GFLOP/s and copies 21.4 GB/s: below 9.91 FLOP"
    )
    assert profile_tables.summarize_peaks(PEAKS.replace(products=PEAKS.products[1:])) == ""
