"""The table of gradient modes: every answer holds on this torch, and wrong answers are detected."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from gradrun.audits.behavior import measure_facts, questions
from gradrun.audits.behavior.questions import QUESTIONS, Question
from gradrun.audits.behavior.snippet import BLOCKS, GraphCounter
from gradrun.audits.mode_behavior import mode_behavior
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from gradrun.modes import assert_restored
from gradrun.results.result import Fact, ModeFacts
from tests.conftest import Answer
from tests.support.forked import ForkedCommand
from tests.support.run_results import MACHINE
from tests.support.torch_version import IS_OLD, needs_torch_2_13

CPU = torch.device("cpu")
QUICK = tuple(question for question in QUESTIONS if question.topic != "torch.compile")
COMPILED = tuple(question for question in QUESTIONS if question.topic == "torch.compile")


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """Output of the command in a separate process."""
    folder = tmp_path_factory.mktemp("modes")
    command = ForkedCommand("modes", "--json", "-", cwd=folder, env={"COLUMNS": "120"})
    out, err = command.communicate()
    return Answer(command.wait(), out, err)


@pytest.fixture(scope="module")
def facts(answer: Answer) -> tuple[Fact, ...]:
    """All answers, measured once."""
    return ModeFacts.from_json(answer.out).facts


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip torch.compile, which takes a second."""
    monkeypatch.setattr(questions, "QUESTIONS", QUICK)


def ask_only(monkeypatch: pytest.MonkeyPatch, *asked: Question) -> None:
    monkeypatch.setattr(questions, "QUESTIONS", asked)


def question(code: str = "answer = True", **changes: Any) -> Question:
    given = {"topic": "A topic", "text": "?", "code": code, "expected": "yes", "why": "Why."}
    return Question(**(given | changes))


# --- expected answers --------------------------------------------------------------------------


@pytest.mark.parametrize("asked", QUESTIONS, ids=[f"{q.topic}: {q.text}" for q in QUESTIONS])
def test_an_expected_answer_is_observed_on_this_torch(
    facts: tuple[Fact, ...], asked: Question
) -> None:
    if IS_OLD and asked.topic == "torch.compile":
        pytest.skip("the expected answers of torch.compile are those of torch 2.13 and newer")
    observed = {
        f.mode: f.observed for f in facts if (f.topic, f.question) == (asked.topic, asked.text)
    }
    assert observed == dict(asked.cells())


@needs_torch_2_13
def test_the_command_prints_json_and_the_page_without_warnings_of_torch(answer: Answer) -> None:
    assert answer.code == 0, answer.text
    proven = ModeFacts.from_json(answer.out)
    assert {fact.topic for fact in proven.facts} == {question.topic for question in QUESTIONS}
    assert not proven.differing
    # The page goes to stderr, and what torch warns of goes nowhere.
    assert answer.err.lstrip().startswith(f"torch {torch.__version__}")
    assert f"{len(proven.facts)} behaviors verified on torch" in answer.err
    assert "Warning" not in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.cuda
def test_every_expected_answer_is_observed_on_a_gpu() -> None:
    assert not mode_behavior("cuda").differing


def test_facts_follow_the_order_of_the_table_each_with_its_reason(
    facts: tuple[Fact, ...],
) -> None:
    in_order = [(q.topic, q.text, mode) for q in QUESTIONS for mode, _ in q.cells()]
    assert [(f.topic, f.question, f.mode) for f in facts] == in_order
    assert len(set(in_order)) == len(in_order), "a topic contains each question once"
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
        ("enable_grad() inside inference_mode(): operations recorded", None, "off"),
        ("one torch.no_grad() entered again within itself, afterwards", None, "off"),
        ("asyncio.to_thread() in a block", "no_grad", "grad"),
        ("other tasks, at an await in one", "no_grad", "no_grad"),
        ("the thread, after two overlapped", "inference_mode", "inference_mode"),
        ("an async def function", "no_grad", "no"),
        ("an async generator", "inference_mode", "no"),
        ("a block, fullgraph=True", "inference_mode", "1 graph"),
    ],
)
def test_the_table_agrees_with_known_behavior_of_torch(
    facts: tuple[Fact, ...], question: str, mode: str | None, observed: str
) -> None:
    """Expected values written a second time: wrong code and a wrong expectation cannot agree."""
    assert [f.observed for f in facts if (f.question, f.mode) == (question, mode)] == [observed]


# --- a torch that behaves differently ----------------------------------------------------------


def differing(facts: tuple[Fact, ...]) -> set[tuple[str, str]]:
    return {(f.question, f.mode or "") for f in facts if not f.holds}


def test_an_inference_mode_that_is_only_no_grad_is_detected(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setitem(BLOCKS, GradMode.INFERENCE_MODE, torch.no_grad)
    found = differing(measure_facts(CPU))
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


def test_a_grad_mode_that_does_nothing_is_detected(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Each question starts in a thread with gradients off, so that enabling them is visible."""
    monkeypatch.setitem(BLOCKS, GradMode.GRAD, torch.no_grad)
    found = differing(measure_facts(CPU))
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


@needs_torch_2_13
def test_a_torch_that_compiles_a_block_into_another_mode_is_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BLOCKS, GradMode.INFERENCE_MODE, torch.no_grad)
    ask_only(monkeypatch, COMPILED[0])
    (found,) = [fact for fact in measure_facts(CPU) if not fact.holds]
    assert (found.mode, found.observed) == (GradMode.INFERENCE_MODE, "1 graph, wrong mode")


def test_a_wrong_expectation_differs_and_no_other(
    monkeypatch: pytest.MonkeyPatch, facts: tuple[Fact, ...], quick: None
) -> None:
    place = next(i for i, q in enumerate(QUICK) if q.text == "r.add_(1)")
    wrong = dataclasses.replace(QUICK[place], expected=("works",) * 3)
    ask_only(monkeypatch, *QUICK[:place], wrong, *QUICK[place + 1 :])
    measured = ModeFacts(gradrun="0", environment=MACHINE, facts=measure_facts(CPU))
    (found,) = measured.differing
    assert (found.question, found.mode) == ("r.add_(1)", GradMode.INFERENCE_MODE)
    assert (found.expected, found.observed) == ("works", "RuntimeError")
    assert "read-only outside inference mode" in found.why


# --- the code of a question --------------------------------------------------------------------


def test_an_unexpected_error_is_the_observed_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_only(monkeypatch, question("raise TypeError('no such thing\\nC++ stack: ...')"))
    (fact,) = measure_facts(CPU)
    assert fact.observed == "raises TypeError: no such thing"
    assert not fact.holds


def test_an_error_with_another_message_is_not_the_expected_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fails = "raise RuntimeError('out of memory')"
    ask_only(
        monkeypatch,
        question(fails, error="of memory", expected="RuntimeError"),
        question(fails, error="Inplace update", expected="RuntimeError"),
    )
    assert [fact.observed for fact in measure_facts(CPU)] == [
        "RuntimeError",
        "raises RuntimeError: out of memory",
    ]


def test_code_without_an_answer_works(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_only(monkeypatch, question("pass", expected="works"))
    assert [fact.observed for fact in measure_facts(CPU)] == ["works"]


@pytest.mark.parametrize("leak", [False, True])
def test_code_that_leaks_a_mode_leaves_the_thread_unchanged(
    monkeypatch: pytest.MonkeyPatch, leak: bool
) -> None:
    leaks = f"torch.set_grad_enabled({leak})\nguard = torch.inference_mode()\nguard.__enter__()"
    ask_only(
        monkeypatch,
        question(f"{leaks}\ntorch.guard = guard\nanswer = True"),
        question("answer = torch.is_grad_enabled()"),
    )
    monkeypatch.setattr(torch, "guard", None, raising=False)
    with assert_restored(), torch.set_grad_enabled(not leak):
        assert [fact.observed for fact in measure_facts(CPU)] == ["yes", "yes"]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_answers_neither_depend_on_nor_change_the_mode_of_the_caller(
    facts: tuple[Fact, ...], quick: None, grad: bool, inference: bool
) -> None:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        with assert_restored():
            assert measure_facts(CPU) == facts[: -3 * len(COMPILED)]
            gc.collect()  # inference mode ends when its object is deleted, in whatever thread


def test_warnings_of_torch_are_hidden_and_the_callers_filters_stay(quick: None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measure_facts(CPU)
        assert not caught
        warnings.warn("mine", stacklevel=1)
        assert len(caught) == 1


# --- torch.compile -----------------------------------------------------------------------------


@needs_torch_2_13
def test_repeated_questions_do_not_reach_the_recompile_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask_only(monkeypatch, COMPILED[0])
    for _ in range(torch._dynamo.config.recompile_limit // len(GradMode) + 1):
        assert {fact.observed for fact in measure_facts(CPU)} == {"1 graph"}


def test_functions_that_the_caller_has_compiled_stay_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask_only(monkeypatch, COMPILED[0])
    backend = GraphCounter()
    double = torch.compile(lambda x: x * 2, backend=backend)
    double(torch.ones(2))
    measure_facts(CPU)
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
def test_without_a_compiler_the_reason_is_shown_and_not_a_difference(
    monkeypatch: pytest.MonkeyPatch, instead: Any, reason: str
) -> None:
    monkeypatch.setattr(torch, "compile", instead)
    ask_only(monkeypatch, *COMPILED)
    facts = measure_facts(CPU)
    assert len(facts) == 3 * len(COMPILED)
    assert {(fact.observed, fact.unavailable, fact.holds) for fact in facts} == {
        (None, reason, True)
    }


# --- the public function -----------------------------------------------------------------------


def test_json_contains_every_fact_and_is_read_back(quick: None) -> None:
    measured = mode_behavior("cpu")
    assert ModeFacts.from_json(measured.to_json()) == measured
    assert measured.environment.torch == torch.__version__
    assert measured.environment.device == "cpu"
    assert len(measured.facts) == sum(len(list(question.cells())) for question in QUICK)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "xpu", "CPU"])
def test_an_unavailable_device_is_an_error_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(questions, "QUESTIONS", None)  # iterating it would fail
    with pytest.raises(ConfigError, match=r"(unknown device '|device cuda:99 is not available)"):
        mode_behavior(name)
