"""pytest's plugin: a fixture that runs `gradrun check`, and a marker for tests without a graph.

Registered by an entry point, so that it is there where gradrun is installed. Imports torch only for
tests that ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gradrun.results.result import CheckResult

_MARKER = "no_graph: fails when a model called in the test returns a tensor that keeps a graph"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known to --strict-markers."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def gradrun_check() -> Callable[..., CheckResult]:
    """Runs `gradrun.check(config, ...)` and fails the test where a check fails.

    Takes what gradrun.check takes, and returns its result. `inconclusive="fail"` fails the test
    where a check cannot be decided too; by default it is a warning of the test's.
    """

    def run(config: Any, *, inconclusive: str = "pass", **options: Any) -> CheckResult:
        import warnings

        from gradrun.checks.check import check
        from gradrun.core.errors import GradrunError

        __tracebackhide__ = True
        try:
            result = check(config, **options)
        except GradrunError as error:  # a sentence for a person, without the way that it came
            raise error.with_traceback(None) from None
        bad = ["fail"] if inconclusive == "pass" else ["fail", "inconclusive"]
        lines = [
            f"{o.check}: {o.reason} (allowed: {o.limit}; found: {o.value})"
            for o in result.outcomes
            if o.status in bad
        ]
        if lines:
            pytest.fail("\n".join(["gradrun check:", *lines]), pytrace=False)
        for outcome in result.outcomes:
            if outcome.status == "inconclusive":
                warnings.warn(f"{outcome.check} is inconclusive: {outcome.reason}", stacklevel=2)
        return result

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Watch the models that a marked test calls."""
    if item.get_closest_marker("no_graph") is None:
        return (yield)
    with _watched() as kept:
        found = yield
    if kept:
        count = "1 output keeps" if len(kept) == 1 else f"{len(kept)} outputs keep"
        pytest.fail(
            f"{count} a graph, the first of {kept[0]}; run the model under "
            "torch.inference_mode() or torch.no_grad()",
            pytrace=False,
        )
    return found


@contextmanager
def _watched() -> Iterator[list[str]]:
    """Note each output with a graph that a model gives to code outside any model."""
    from gradrun.inference.module_calls import track_module_calls
    from gradrun.output.transforms import iter_tensors

    kept: list[str] = []

    def leave(module: Any, _: Any, returned: Any) -> None:
        # Inside another model a graph may yet be dropped.
        if not stack.calls and any(t.requires_grad for _, t in iter_tensors(returned)):
            kept.append(type(module).__name__)

    with track_module_calls(lambda *_: None, leave, always_leave=True) as stack:
        yield kept
