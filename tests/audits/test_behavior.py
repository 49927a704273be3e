"""What gradrun claims of the modes: each claim holds on this torch, and a false one is found out.

Runs the real probes; the table and the command have tests of their own.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from gradrun.audits import behavior
from gradrun.audits.behavior import compiled, prove
from gradrun.audits.behavior.probe import BLOCKS, Probe, Unavailable, in_all_modes, outcome
from gradrun.audits.mode_behavior import mode_behavior
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from gradrun.modes import assert_restored
from gradrun.results.result import Fact, ModeFacts
from tests.support.run_results import MACHINE

CPU = torch.device("cpu")
ALL = [(topic, probe) for topic, probes_of in behavior.TOPICS.items() for probe in probes_of]
QUICK = {topic: rows for topic, rows in behavior.TOPICS.items() if topic != "torch.compile"}


@pytest.fixture(scope="module")
def facts() -> tuple[Fact, ...]:
    """Everything, asked once."""
    return prove(CPU)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out torch.compile, which takes a second."""
    monkeypatch.setattr(behavior, "TOPICS", QUICK)


def only(monkeypatch: pytest.MonkeyPatch, *asked: Probe) -> None:
    monkeypatch.setattr(behavior, "TOPICS", {"A topic": asked})


def probe(**changes: Any) -> Probe:
    given = {"question": "?", "expected": "yes", "ask": lambda mode, device: "yes", "why": "Why."}
    return Probe(**(given | changes))


# --- what is claimed ---------------------------------------------------------------------------


@pytest.mark.parametrize(("topic", "asked"), ALL, ids=[f"{t}: {p.question}" for t, p in ALL])
def test_a_claim_holds_on_this_torch(facts: tuple[Fact, ...], topic: str, asked: Probe) -> None:
    seen = {f.mode: f.observed for f in facts if (f.topic, f.question) == (topic, asked.question)}
    assert seen == dict(asked.cells())


@pytest.mark.cuda
def test_every_claim_holds_on_a_gpu() -> None:
    assert not mode_behavior("cuda").differing


def test_facts_come_in_the_order_of_the_table_each_with_its_reason(
    facts: tuple[Fact, ...],
) -> None:
    in_order = [(t, p.question, mode) for t, p in ALL for mode, _ in p.cells()]
    assert [(f.topic, f.question, f.mode) for f in facts] == in_order
    assert len(set(in_order)) == len(in_order), "a question is asked once in a topic"
    assert all(f.why.endswith((".", '"')) for f in facts)


@pytest.mark.parametrize(
    ("question", "mode", "observed"),
    [
        ("r.requires_grad", "grad", "yes"),
        ("r.requires_grad", "no_grad", "no"),
        ("r._version", "inference_mode", "RuntimeError"),
        ("r.sum().backward()", "no_grad", "RuntimeError"),
        ("r.add_(1)", "no_grad", "works"),
        ("r.add_(1)", "inference_mode", "RuntimeError"),
        ("r * w, which saves r", "inference_mode", "RuntimeError"),
        ("r + w, which saves nothing", "inference_mode", "works"),
        ("w.view(-1).is_inference()", "inference_mode", "no"),
        ("p is", "inference_mode", "inference"),
        ("r.clone()", "inference_mode", "normal"),
        ("r.detach()", "inference_mode", "inference"),
        ("inference_mode(False) inside no_grad()", None, "on"),
        ("enable_grad() inside inference_mode(), says what is recorded", None, "off"),
        ("one torch.no_grad() entered again within itself, afterwards", None, "off"),
        ("asyncio.to_thread() in a block", "no_grad", "grad"),
        ("other tasks, at an await in one", "no_grad", "no_grad"),
        ("the thread, after two overlapped", "inference_mode", "inference_mode"),
        ("a block, fullgraph=True", "inference_mode", "1 graph"),
    ],
)
def test_the_page_says_what_is_known_of_torch(
    facts: tuple[Fact, ...], question: str, mode: str | None, observed: str
) -> None:
    """Written down a second time, so that a wrong probe and a wrong claim cannot agree."""
    assert [f.observed for f in facts if (f.question, f.mode) == (question, mode)] == [observed]


def test_torchs_decorator_misses_what_gradruns_guard_covers(facts: tuple[Fact, ...]) -> None:
    covered = {(f.topic, f.question, f.observed) for f in facts}
    for kind in ("an async def function", "an async generator"):
        assert ("torch's decorator covers", kind, "no") in covered
        assert ("gradrun's guard covers", kind, "yes") in covered


# --- another torch is found out ----------------------------------------------------------------


def differing(facts: tuple[Fact, ...]) -> set[tuple[str, str]]:
    return {(f.question, f.mode or "") for f in facts if not f.holds}


def test_an_inference_mode_that_is_only_no_grad_is_found_out(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setitem(BLOCKS, GradMode.INFERENCE_MODE, torch.no_grad)
    found = differing(prove(CPU))
    assert {mode for _, mode in found} == {"inference_mode"}
    assert {
        "is_inference_mode_enabled()",
        "r.is_inference()",
        "r._version",
        "r.add_(1)",
        "r * w, which saves r",
        "r.detach()",
        "r.data",
        "r.to(r.dtype)",
        "p is",
        "a training step on p afterwards",
        "a job, after one that left it on",
        "a caller, at a yield in a block",
        "other tasks, at an await in one",
        "the thread, after two overlapped",
        "a function",
        "a generator function's steps",
        "a class: its __init__",
    } == {question for question, _ in found}


def test_a_grad_mode_that_does_nothing_is_found_out(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Each is asked in a thread that has gradients off, so that turning them on shows."""
    monkeypatch.setitem(BLOCKS, GradMode.GRAD, torch.no_grad)
    found = differing(prove(CPU))
    assert {mode for _, mode in found} == {"grad"}
    assert {
        "is_grad_enabled()",
        "r.requires_grad",
        "r.is_leaf",
        "r.sum().backward()",
        "a job, after one that left it on",
        "a caller, at a yield in a block",
        "other tasks, at an await in one",
        "the thread, after two overlapped",
        "a function",
        "a generator function's steps",
        "a class: its __init__",
    } == {question for question, _ in found}


def test_a_torch_that_compiles_a_block_into_another_mode_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BLOCKS, GradMode.INFERENCE_MODE, torch.no_grad)
    only(monkeypatch, compiled.PROBES[0])
    (found,) = [fact for fact in prove(CPU) if not fact.holds]
    assert (found.mode, found.observed) == (GradMode.INFERENCE_MODE, "1 graph, wrong mode")


def test_a_wrong_claim_differs_and_no_other(
    monkeypatch: pytest.MonkeyPatch, facts: tuple[Fact, ...], quick: None
) -> None:
    topic = "r after the block"
    wrong = dataclasses.replace(QUICK[topic][0], expected=in_all_modes("works"))
    monkeypatch.setitem(QUICK, topic, (wrong, *QUICK[topic][1:]))
    proven = ModeFacts(gradrun="0", environment=MACHINE, facts=prove(CPU))
    (found,) = proven.differing
    assert (found.question, found.mode) == ("r.add_(1)", GradMode.INFERENCE_MODE)
    assert (found.expected, found.observed) == ("works", "RuntimeError")
    assert "read-only outside inference mode" in found.why


# --- what a probe may do -----------------------------------------------------------------------


def test_what_a_probe_raises_is_what_was_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(mode: GradMode, device: torch.device) -> str:
        raise TypeError("no such thing\nC++ stack: ...")

    only(monkeypatch, probe(ask=ask))
    (fact,) = prove(CPU)
    assert fact.observed == "raises TypeError: no such thing"
    assert not fact.holds


def test_an_error_that_says_something_else_is_not_the_expected_one() -> None:
    def call() -> None:
        raise RuntimeError("out of memory")

    assert outcome(call, "of memory") == "RuntimeError"
    with pytest.raises(RuntimeError, match="out of memory"):
        outcome(call, "Inplace update")


def test_what_cannot_be_tried_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(mode: GradMode, device: torch.device) -> str:
        raise Unavailable("there is none here")

    only(monkeypatch, probe(ask=ask))
    (fact,) = prove(CPU)
    assert (fact.observed, fact.untried) == (None, "there is none here")
    assert fact.holds


@pytest.mark.parametrize("leak", [False, True])
def test_a_probe_that_leaks_leaves_the_thread_as_it_was(
    monkeypatch: pytest.MonkeyPatch, leak: bool
) -> None:
    held: list[Any] = []

    def ask(mode: GradMode, device: torch.device) -> str:
        torch.set_grad_enabled(leak)
        held.append(torch.inference_mode())
        held[-1].__enter__()
        return "yes"

    only(monkeypatch, probe(ask=ask), probe(ask=lambda m, d: str(torch.is_grad_enabled())))
    with assert_restored(), torch.set_grad_enabled(not leak):
        assert [fact.observed for fact in prove(CPU)] == ["yes", "True"]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_answers_do_not_hang_on_the_mode_of_who_asks_nor_change_it(
    facts: tuple[Fact, ...], quick: None, grad: bool, inference: bool
) -> None:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        with assert_restored():
            assert prove(CPU) == tuple(fact for fact in facts if fact.topic in QUICK)
            gc.collect()  # an inference mode ends when its object does, in whatever thread


def test_warnings_of_torch_are_not_shown_and_the_callers_filters_stay(quick: None) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prove(CPU)
        assert not told
        warnings.warn("mine", stacklevel=1)
        assert len(told) == 1


# --- torch.compile -----------------------------------------------------------------------------


def test_asking_often_meets_no_limit_of_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, compiled.PROBES[0])
    for _ in range(torch._dynamo.config.recompile_limit // len(GradMode) + 1):
        assert {fact.observed for fact in prove(CPU)} == {"1 graph"}


def test_what_the_caller_has_compiled_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, compiled.PROBES[0])
    backend = compiled._Counting()
    double = torch.compile(lambda x: x * 2, backend=backend)
    double(torch.ones(2))
    prove(CPU)
    double(torch.ones(2))
    assert backend.graphs == 1


def unsupported(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("torch.compile is not supported on Python 4.0+\nsee the docs")


def turned_off(function: Any, **kwargs: Any) -> Any:
    return function


@pytest.mark.parametrize(
    ("instead", "reason"),
    [
        (
            unsupported,
            "torch.compile fails here: RuntimeError: torch.compile is not supported on Python 4.0+",
        ),
        (turned_off, "torch.compile is turned off here"),
    ],
)
def test_a_torch_that_cannot_compile_says_so_and_differs_in_nothing(
    monkeypatch: pytest.MonkeyPatch, instead: Any, reason: str
) -> None:
    monkeypatch.setattr(torch, "compile", instead)
    only(monkeypatch, *compiled.PROBES)
    facts = prove(CPU)
    assert len(facts) == 3 * len(compiled.PROBES)
    assert {(fact.observed, fact.untried, fact.holds) for fact in facts} == {(None, reason, True)}


# --- as a function -----------------------------------------------------------------------------


def test_json_holds_every_fact_and_is_read_back(quick: None) -> None:
    proven = mode_behavior("cpu")
    assert ModeFacts.from_json(proven.to_json()) == proven
    assert proven.environment.torch == torch.__version__
    assert proven.environment.device == "cpu"
    assert len(proven.facts) == sum(
        3 if p.expected != str(p.expected) else 1 for rows in QUICK.values() for p in rows
    )


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "xpu", "CPU"])
def test_a_device_that_is_not_there_is_an_error_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    only(monkeypatch, probe(ask=lambda mode, device: pytest.fail("it ran")))
    with pytest.raises(ConfigError, match=r"there is no (device '|cuda:99 here)"):
        mode_behavior(name)
