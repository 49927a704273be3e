"""pytest plugin: the fixture `gradrun_check` and the marker `no_graph`.

pytest loads it by its entry point in every session, so it imports torch only for tests that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gradrun.results.result import CheckResult

_MARKER = "no_graph: fail if a model called in the test returns a tensor with an autograd graph"


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def gradrun_check() -> Callable[..., CheckResult]:
    """Return a function that runs `gradrun.check` and fails the test if a check fails.

    It takes the arguments of `gradrun.check` and returns its result. An inconclusive check is a
    warning, or with `inconclusive="fail"` a failure.
    """

    def run(config: Any, *, inconclusive: str = "pass", **options: Any) -> CheckResult:
        import warnings

        from gradrun.checks.check import check
        from gradrun.core.errors import GradrunError

        __tracebackhide__ = True
        try:
            result = check(config, **options)
        except GradrunError as error:  # show the message without gradrun's frames
            raise error.with_traceback(None) from None
        bad = ["fail"] if inconclusive == "pass" else ["fail", "inconclusive"]
        lines = [
            f"{o.check}: {o.reason} (limit: {o.limit}; value: {o.value})"
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
    """Fail a marked test if a model returned a tensor with a graph."""
    if item.get_closest_marker("no_graph") is None:
        return (yield)
    with _record_graphs() as models:
        outcome = yield
    if models:
        count = "1 output retains" if len(models) == 1 else f"{len(models)} outputs retain"
        pytest.fail(
            f"{count} an autograd graph (first: {models[0]}); run the model under "
            "torch.inference_mode() or torch.no_grad()",
            pytrace=False,
        )
    return outcome


@contextmanager
def _record_graphs() -> Iterator[list[str]]:
    """Record the type of each outermost module that returns a tensor with a graph."""
    from gradrun.inference.module_calls import track_module_calls
    from gradrun.output.transforms import iter_tensors

    models: list[str] = []

    def leave(module: Any, _: Any, output: Any) -> None:
        # An enclosing module can still drop the graph.
        if not stack.calls and any(t.requires_grad for _, t in iter_tensors(output)):
            models.append(type(module).__name__)

    with track_module_calls(lambda *_: None, leave, always_leave=True) as stack:
        yield models
